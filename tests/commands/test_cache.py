"""Token ids kept on disk, shown and cleared; reference caches are tested in test_cli."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mpo_lightning import PreferenceDataModule
from mpo_lightning.cli import main
from tests.conftest import example_rows, make_tokenizer


def test_token_ids_are_shown_and_cleared(
    write_jsonl: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    root = tmp_path / "cache"
    paths = [write_jsonl(example_rows(n), f"{n}.jsonl") for n in (3, 5)]
    data = PreferenceDataModule(tokenizer=str(tmp_path / "tokenizer"), train=paths, cache=str(root))
    data.setup("fit")
    (root / "mine").mkdir()
    (root / "mine" / "note.txt").write_text("not a cache", encoding="utf-8")
    main(["cache", "show", "--tokens", str(root)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "groups", "size", "source", "state"]
    assert sorted((line.split()[1], *line.split()[-2:]) for line in lines[1:]) == [
        ("3", paths[0], "ok"),
        ("5", paths[1], "ok"),
    ]
    # A report that is cut is told, and goes with the others.
    report = next(root.glob("*/report.json"))
    report.write_bytes(report.read_bytes()[:9])
    with pytest.raises(SystemExit) as stopped:
        main(["cache", "show", "--tokens", str(root)])
    assert stopped.value.code == 1
    shown = capsys.readouterr().out
    assert f"{report} is damaged" in shown
    assert f"Remove {report.parent}, and it is made again." in shown
    main(["cache", "clear", "--tokens", str(root)])
    assert capsys.readouterr().out.count("Removed") == 2
    main(["cache", "show", "--tokens", str(root)])
    assert f"No token ids in {root}" in capsys.readouterr().out
    assert (root / "mine" / "note.txt").is_file()
    again = PreferenceDataModule(
        tokenizer=str(tmp_path / "tokenizer"), train=paths, cache=str(root)
    )
    again.setup("fit")
    assert len(again.datasets["train"]) == 8
