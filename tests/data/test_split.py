"""A prompt is on one side, wherever it comes and however it is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prompt_identity import normalized, prompt_key
from mpo_lightning.data.reading import Sources
from mpo_lightning.data.split import split, uniform_hash

FRACTIONS = {"train": 0.7, "val": 0.2, "test": 0.1}


def rows_for(numbers: Any) -> list[dict[str, Any]]:
    return [
        {"prompt": f"Question {i}?", "responses": ["a", f"b{i}"], "scores": [1, 2], "id": i}
        for i in numbers
    ]


def read(folder: Path, suffix: str = "jsonl") -> dict[str, set[Any]]:
    return {
        name: {g.extra["id"] for g in Sources(files=[str(folder / f"{name}.{suffix}")]).groups([])}
        for name in FRACTIONS
    }


@pytest.mark.parametrize(
    "other",
    [
        "  what is\n\tIT? ",
        [{"role": "user", "content": "What is it?"}],
        "\uff37hat is it?",
    ],
)
def test_the_same_prompt_written_in_another_way(other: Any) -> None:
    assert prompt_key(other) == prompt_key("What is it?")
    assert uniform_hash(other, 3) == uniform_hash("What is it?", 3)


@pytest.mark.parametrize(
    "other",
    [
        "What is it",
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}],
        [{"role": "tool", "content": "What is it?"}],
        [{"role": "user", "content": "What"}, {"role": "user", "content": "is it?"}],
    ],
)
def test_other_prompts(other: Any) -> None:
    assert prompt_key(other) != prompt_key("What is it?")


def test_normalisation_does_not_depend_on_being_applied_twice() -> None:
    for text in ("Straße  X", "İ \u2003Å", "\ufb01ne"):
        assert normalized(normalized(text)) == normalized(text)


def test_places_are_uniform_and_independent_across_seeds() -> None:
    prompts = [f"Prompt {i}" for i in range(2000)]
    first = np.array([uniform_hash(p) for p in prompts])
    second = np.array([uniform_hash(p, -5) for p in prompts])
    for places in (first, second):
        assert scipy.stats.kstest(places, "uniform").pvalue > 0.001
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(2000)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_every_group_is_in_one_part_and_a_prompt_never_in_two(
    suffix: Any, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    rows = rows_for(range(1000))
    again = [
        {**row, "prompt": row["prompt"].upper().replace(" ", "\n "), "id": row["id"] + 10_000}
        for row in rows[::3]
    ]
    files = [write_jsonl(rows, "a.jsonl"), write_jsonl(again, "b.jsonl")]
    report = split(Sources(files=files), tmp_path / "out", FRACTIONS, file_format=suffix)
    parts = read(tmp_path / "out", suffix)
    assert sorted(i for part in parts.values() for i in part) == sorted(
        row["id"] for row in rows + again
    )
    prompts = {name: {i % 10_000 for i in part} for name, part in parts.items()}
    assert sum(map(len, prompts.values())) == 1000
    assert report.groups == {name: len(part) for name, part in parts.items()}
    for name, share in FRACTIONS.items():
        # Five standard deviations of a binomial number.
        assert abs(len(prompts[name]) - 1000 * share) < 5 * np.sqrt(1000 * share * (1 - share))
        assert f"{name}.{suffix}: {len(parts[name]):,} groups" in str(report)


def test_further_rows_and_other_orders_move_no_prompt(
    write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    few = Sources(files=[write_jsonl(rows_for(range(300)), "few.jsonl")])
    many = Sources(files=[write_jsonl(rows_for(range(600))[::-1], "many.jsonl")])
    split(few, tmp_path / "few", FRACTIONS)
    split(many, tmp_path / "many", FRACTIONS)
    before, after = read(tmp_path / "few"), read(tmp_path / "many")
    assert all(before[name] <= after[name] for name in FRACTIONS)
    split(few, tmp_path / "seed", FRACTIONS, seed=1)
    assert read(tmp_path / "seed") != before


def test_what_is_there_already_is_kept(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    sources = Sources(files=[write_jsonl(rows_for(range(200)))])
    out = tmp_path / "out"
    split(sources, out, FRACTIONS)
    with pytest.raises(DataError, match=r"train.jsonl exists already.*--force"):
        split(sources, out, FRACTIONS)
    split(sources, out, FRACTIONS, seed=1, force=True)
    before = read(out)
    # A part of another division would share prompts with the new ones.
    with pytest.raises(DataError, match=r"other files of rows \(test.jsonl\)"):
        split(sources, out, {"train": 0.9, "val": 0.1}, force=True)
    bad = Sources(files=[write_jsonl([*rows_for(range(200)), {"prompt": "p"}], "bad.jsonl")])
    with pytest.raises(DataError, match=r"bad.jsonl:201"):
        split(bad, out, FRACTIONS, force=True)
    assert read(out) == before
    report = split(bad, out, FRACTIONS, force=True, bad_rows="drop")
    assert sum(report.groups.values()) == 200
    assert sorted(path.name for path in out.iterdir()) == ["test.jsonl", "train.jsonl", "val.jsonl"]


def test_a_part_without_groups_is_an_error(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    sources = Sources(files=[write_jsonl(rows_for(range(3)))])
    with pytest.raises(DataError, match="test: gets none of 3 groups"):
        split(sources, tmp_path / "out", {"train": 0.999, "test": 0.001})
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "fractions",
    [{}, {"train": 0.5}, {"train": 1.5, "val": -0.5}, {"train": float("nan")}, {"../a": 1.0}],
)
def test_fractions_that_make_no_sense(fractions: dict[str, float], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fractions"):
        split(Sources(files=["nothing.jsonl"]), tmp_path, fractions)


def test_the_last_part_takes_what_rounding_leaves(
    write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpo_lightning.data.split.uniform_hash", lambda *_: 1 - 2**-53)
    # Ten times 0.1 is below 1.
    fractions = {f"p{i}": 0.1 for i in range(10)}
    sources = Sources(files=[write_jsonl(rows_for(range(5)))])
    with pytest.raises(DataError, match=r"p8: gets none of 5 groups"):
        split(sources, tmp_path / "out", fractions)


def test_parts_are_canonical_rows(write_jsonl: Callable[..., str], tmp_path: Path) -> None:
    rows = rows_for(range(100))
    split(Sources(files=[write_jsonl(rows)]), tmp_path / "out", {"all": 1.0})
    lines = (tmp_path / "out" / "all.jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == rows
