"""The folder of parts: whole or not at all, one set of settings, shared by processes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.sources import open_source
from mpo_lightning.errors import DamagedError, RolloutError
from mpo_lightning.rollouts.part_folder import ROWS_WRITTEN, PartFolder, Workers

SETTINGS = {"seed": 0, "model": {"base": "x", "adapter": None}}


def make(folder: Path, settings: dict[str, Any] = SETTINGS, **sizes: int) -> PartFolder:
    return PartFolder(folder, "sample", settings, **{"rows": 7, "rows_per_part": 3, **sizes})


def test_parts_and_their_rows(tmp_path: Path) -> None:
    folder = make(tmp_path / "a" / "b")
    assert [folder.span(part) for part in range(len(folder))] == [(0, 3), (3, 6), (6, 7)]
    folder.write(1, [{"text": "ü"}, {"text": "\ud800"}], DataReport("part", groups=3, kept=2))
    assert folder.missing() == [0, 2]
    written = folder.path(1).read_bytes()
    assert written == '{"text": "ü"}\n{"text": "\\ud800"}\n'.encode()
    assert make(tmp_path / "a" / "b").missing() == [0, 2]


def test_every_part_is_some_process_s(tmp_path: Path) -> None:
    folder = make(tmp_path, rows=10, rows_per_part=1)
    folder.write(4, [], DataReport("part"))
    shares = [folder.missing(Workers(rank, 3)) for rank in range(3)]
    assert shares == [[0, 3, 6, 9], [1, 7], [2, 5, 8]]


def test_workers_are_torchrun_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Workers.from_environment() == Workers(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert Workers.from_environment() == Workers(2, 5)


@pytest.mark.parametrize(
    ("changes", "sizes", "found"),
    [
        ({"seed": 1}, {}, "seed was 0, is 1"),
        ({"model": {"base": "y", "adapter": None}}, {}, "model.base was 'x', is 'y'"),
        ({}, {"rows": 8}, "rows was 7, is 8"),
        ({}, {"rows_per_part": 2}, "rows_per_part was 3, is 2"),
        ({"new": 1}, {}, "new was None, is 1"),
    ],
)
def test_other_settings(
    tmp_path: Path, changes: dict[str, Any], sizes: dict[str, int], found: str
) -> None:
    make(tmp_path)
    with pytest.raises(RolloutError) as caught:
        make(tmp_path, {**SETTINGS, **changes}, **sizes)
    assert f"begun with other settings: {found}. Name" in str(caught.value)


def test_other_command(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(RolloutError, match="format was 'mpo-lightning sample'"):
        PartFolder(tmp_path, "score", SETTINGS, rows=7, rows_per_part=3)


def test_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(RolloutError, match=r"holds other files \(thesis\.tex\)"):
        make(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RolloutError, match="cannot be used for output"):
        make(file)


def test_damaged_settings(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "settings.json").write_text("{", encoding="utf-8")
    with pytest.raises(RolloutError, match="cannot be used for output"):
        make(tmp_path)


def test_what_a_killed_process_left(tmp_path: Path) -> None:
    folder = make(tmp_path)
    left = tmp_path / ".part-00001.jsonl.0123.partial"
    left.write_text('{"half', encoding="utf-8")
    folder.write(0, [], DataReport("part"))
    assert "1 of 3 parts" in folder.summary(Workers())
    assert left.exists()
    folder.write(1, [], DataReport("part"))
    folder.write(2, [], DataReport("part"))
    assert "is complete: 3 parts" in folder.summary(Workers())
    assert not left.exists()


def test_a_failed_write_leaves_no_part(tmp_path: Path) -> None:
    folder = make(tmp_path)
    folder.path(0).mkdir()
    with pytest.raises(RolloutError, match=r"part-00000\.jsonl: cannot be written"):
        folder.write(0, [], DataReport("part"))


def test_report_on_all_parts(tmp_path: Path) -> None:
    folder = make(tmp_path)
    for part in (0, 2):
        report = DataReport("part", groups=3, kept=2, responses=5)
        report.drop("too long", f"a:{part}")
        report.note("empty", f"b:{part}", 2)
        report.note("never", "c:1", 0)
        folder.write(part, [], report)
    total = make(tmp_path).report()
    assert total == DataReport(
        str(tmp_path),
        groups=6,
        kept=4,
        responses=10,
        dropped=Counter({"too long": 2}),
        changed=Counter({"empty": 4}),
        examples={"too long": ["a:0", "a:2"], "empty": ["b:0", "b:2"]},
    )
    assert total.summary(*ROWS_WRITTEN).splitlines() == [
        "4 of 6 rows written, 2.5 responses each",
        "  rows dropped: 2 too long (first: a:0, a:2)",
        "  noted: 4 empty (first: b:0, b:2)",
    ]
    (tmp_path / "part-00002.report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DamagedError, match=r"part-00002\.report\.json is damaged"):
        folder.report()


def test_unfinished_and_foreign_parts_are_refused_where_rows_are_read(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    rows = [{"prompt": "a", "responses": ["b", "c"]}]
    for part in (0, 2):
        folder.write(part, rows, DataReport("part", groups=3, kept=1))
    found = r"is unfinished: 2 of 3 parts are there; .* part-00001\.jsonl.*/out/part-\*\.jsonl\.$"
    with pytest.raises(DataError, match=found):
        open_source(str(tmp_path / "out"))
    # What is there can be asked for.
    assert len(open_source(str(tmp_path / "out" / "part-*.jsonl"))) == 2
    folder.write(1, rows, DataReport("part", groups=3, kept=1))
    assert len(open_source(str(tmp_path / "out"))) == 3
    for suffix in (".jsonl", ".report.json", ".sha256"):
        part = tmp_path / "out" / f"part-00000{suffix}"
        content = part.read_text(encoding="utf-8").replace("part-00000", "part-00003")
        part.with_name(f"part-00003{suffix}").write_text(content, encoding="utf-8")
    with pytest.raises(DamagedError, match=r"part-00003\.jsonl is none of the 3 parts of"):
        open_source(str(tmp_path / "out"))
    (tmp_path / "out" / "part-00003.sha256").unlink()
    with pytest.raises(DamagedError, match=r"part-00003\.sha256 cannot be read"):
        open_source(str(tmp_path / "out"))


def test_settings_say_what_was_done(tmp_path: Path) -> None:
    make(tmp_path)
    content = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert content["settings"] == {**SETTINGS, "rows": 7, "rows_per_part": 3}
