"""Converted files read back as the same groups; what cannot be written is told."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo_lightning.data.convert import convert
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.reading import Sources

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
SCORE = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**6), 10**6))
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": TEXT}),
    max_size=2,
).map(lambda before: [*before, {"role": "user", "content": "Go."}])
RESPONSES = st.lists(st.tuples(TEXT, SCORE, st.booleans()), min_size=2, max_size=4)


def rows_of(prompts: st.SearchStrategy[Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    def row(parts: tuple[Any, Any, Any, Any, Any]) -> dict[str, Any]:
        prompt, responses, tags, number, info = parts
        texts, scores, truncated = zip(*responses, strict=True)
        return {
            "prompt": prompt,
            "responses": list(texts),
            "scores": list(scores),
            "truncated": list(truncated),
            "tags": tags,
            "number": number,
            "info": info,
        }

    parts = st.tuples(
        prompts,
        RESPONSES,
        st.lists(TEXT, max_size=2),
        st.one_of(st.none(), st.integers(-(2**40), 2**40), st.floats(-1e300, 1e300)),
        st.fixed_dictionaries({"a": st.one_of(st.none(), TEXT)}),
    )
    return st.lists(parts.map(row), min_size=1, max_size=6)


def read(*files: str) -> list[PreferenceGroup]:
    return list(Sources(files=files).groups([]))


def content(group: PreferenceGroup) -> dict[str, Any]:
    return {name: value for name, value in vars(group).items() if name != "source"}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_reading_the_result_gives_the_same_groups(
    suffix: str, data: st.DataObject, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    # Texts and conversations do not go together in one Parquet column.
    kinds = [TEXT, MESSAGES] + [st.one_of(TEXT, MESSAGES)] * (suffix == ".jsonl")
    rows = data.draw(rows_of(data.draw(st.sampled_from(kinds))))
    before = write_jsonl(rows)
    out = tmp_path / f"out{suffix}"
    reports = convert(Sources(files=[before]), out, force=True)
    assert [content(g) for g in read(str(out))] == [content(g) for g in read(before)]
    assert [(r.groups, r.kept) for r in reports] == [(len(rows), len(rows))]
    assert [path.name for path in tmp_path.iterdir() if "unfinished" in path.name] == []


def test_several_files_renamed_columns_and_chunks(
    write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo_lightning.data.writing.CHUNK_ROWS", 2)
    good = {"question": "p", "responses": ["a", "b"], "scores": [1, 2]}
    # Types of a column become known late, and one column comes late.
    rows = [good, good, {**good, "weight": None}, {**good, "weight": 1}, {**good, "weight": 0.5}]
    files = [write_jsonl(rows, "a.jsonl"), write_jsonl([{**good, "id": "x"}], "b.jsonl")]
    sources = Sources(files=files, columns={"question": "prompt"})
    out = tmp_path / "out.parquet"
    convert(sources, out)
    assert [g.extra["weight"] for g in read(str(out))] == [None, None, None, 1.0, 0.5, None]
    assert [g.extra["id"] for g in read(str(out))] == [None] * 5 + ["x"]
    convert(sources, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0]}


def test_nothing_is_written_for_bad_rows_unless_they_may_go(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    good = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
    sources = Sources(files=[write_jsonl([good, {**good, "scores": [1, None]}, good])])
    out = tmp_path / "folder" / "out.jsonl"
    with pytest.raises(DataError, match=r"groups.jsonl:2: scores\[1\].*\n.*--bad_rows drop"):
        convert(sources, out)
    assert list(out.parent.iterdir()) == []
    (report,) = convert(sources, out, bad_rows="drop")
    assert (report.groups, report.kept, report.failed) == (3, 2, 1)
    assert len(read(str(out))) == 2
    only_bad = Sources(files=[write_jsonl([{**good, "scores": [1]}], "bad.jsonl")])
    with pytest.raises(DataError, match="no group can be used"):
        convert(only_bad, tmp_path / "none.jsonl", bad_rows="drop")


def test_a_file_is_overwritten_only_when_asked_and_only_when_all_went_well(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    good = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}
    path = write_jsonl([good])
    with pytest.raises(DataError, match="exists already"):
        convert(Sources(files=[path]), path)
    out = tmp_path / "out.jsonl"
    out.write_text("before", encoding="utf-8")
    bad = Sources(files=[write_jsonl([good, {}], "bad.jsonl")])
    with pytest.raises(DataError):
        convert(bad, out, force=True)
    assert out.read_text(encoding="utf-8") == "before"
    # Also a file that is being read.
    convert(Sources(files=[path]), path, force=True)
    assert len(read(path)) == 1
    for wrong, message in (("out.json", "suffix '.json'"), (".", "suffix ''")):
        with pytest.raises(DataError, match=message):
            convert(Sources(files=[path]), tmp_path / wrong)


def test_what_a_format_cannot_hold_is_told(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    good = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0]}
    mixed = Sources(files=[write_jsonl([{**good, "note": 1}, {**good, "note": "n"}])])
    with pytest.raises(DataError, match=r"groups.jsonl:1 to .*groups.jsonl:2: note: .*\.jsonl"):
        convert(mixed, tmp_path / "out.parquet")
    empty = Sources(files=[write_jsonl([{**good, "info": {}}], "empty.jsonl")])
    with pytest.raises(DataError, match="Parquet cannot hold such columns"):
        convert(empty, tmp_path / "out.parquet")
    for name, value in (("when", datetime.datetime(2024, 1, 1)), ("x", float("nan"))):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**good, name: value}]), path)
        with pytest.raises(DataError, match=rf"{name}.parquet:1: {name}: .*Write .parquet"):
            convert(Sources(files=[str(path)]), tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out.*"))


def test_half_a_character_in_another_column_passes_through(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    row = {"prompt": "p", "responses": ["ä", "b"], "scores": [1, 2], "note": "\ud83d ö"}
    out = tmp_path / "out.jsonl"
    convert(Sources(files=[write_jsonl([row])]), out)
    assert read(str(out))[0].extra == {"note": "\ud83d ö"}


def test_parquet_holds_texts_beside_conversations_as_messages(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """As of a file of LLaMA-Factory of which some rows have a history."""
    texts = {"prompt": "p", "responses": ["a", "b"], "scores": [1.0, 2.0]}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    talk = {**texts, "prompt": [*turns, {"role": "user", "content": "s"}]}
    mixed = Sources(files=[write_jsonl([texts, talk, texts])])
    out = tmp_path / "out.parquet"
    (report,) = convert(mixed, out)
    assert "4 to a text prompt, written as one user message" in str(report)
    message = [{"role": "user", "content": "p"}]
    assert [group.prompt for group in read(str(out))] == [message, talk["prompt"], message]
    # JSON Lines hold them as they are.
    (report,) = convert(mixed, tmp_path / "out.jsonl")
    assert "to a text prompt" not in str(report)
    assert [group.prompt for group in read(str(tmp_path / "out.jsonl"))] == [
        row["prompt"] for row in (texts, talk, texts)
    ]
