"""AlpacaEval's results: annotations joined into groups, and answers that nobody has judged."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.schemas.alpaca_eval import AlpacaEval
from mpo_lightning.data.sources import open_source
from mpo_lightning.rollouts.score import score
from tests.data.schemas.rows import Row, as_row, results, write

JUDGE = "weighted_alpaca_eval_gpt4_turbo"
SHARED = Path(__file__).parents[4] / "shared" / "data" / "alpacaeval-judged.jsonl.gz"
QUESTIONS = ["Name a fruit.", "Name a stone.", "Name a hat."]


def answer(model: str, question: int) -> Row:
    return {
        "dataset": "vicuna",
        "instruction": QUESTIONS[question],
        "output": f"{model} on {question}",
        "generator": model,
    }


def judged(model: str, question: int, preference: float | None, **changes: Any) -> Row:
    return {
        "instruction": QUESTIONS[question],
        "output_1": f"base on {question}",
        "generator_1": "base",
        "dataset": "vicuna",
        "output_2": f"{model} on {question}",
        "generator_2": model,
        "annotator": JUDGE,
        "preference": preference,
        "price_per_example": 0.01,
        "raw_completion": {"text": "m"},
        **changes,
    }


def group(question: int, models: Sequence[str], scores: Sequence[float]) -> Row:
    return {
        "prompt": QUESTIONS[question],
        "responses": [f"{model} on {question}" for model in models],
        "scores": list(scores),
        "models": list(models),
        "dataset": "vicuna",
        "annotator": JUDGE,
    }


def make_results(folder: Path, *, judge: str = JUDGE) -> Path:
    """Three models, of which one is the baseline, and one was not judged."""
    for model in ("base", "one", "two", "new"):
        write([answer(model, q) for q in range(2)], folder / model, "model_outputs.json")
    for model, preferences in (("one", (1.75, 1.0)), ("two", (1.25, 2.0))):
        rows = [judged(model, q, preference) for q, preference in enumerate(preferences)]
        write(rows, folder / model / judge, "annotations.json")
        (folder / model / judge / "leaderboard.csv").write_text(",win_rate\none,50\n")
    return folder


ROWS = [
    judged("one", 0, 1.75),
    judged("one", 1, 1.0),
    judged("two", 1, 2.0),
    judged("two", 0, 1.0000048889),
]


def test_annotations_of_several_models_in_one_file(tmp_path: Path) -> None:
    first, second = map(as_row, results(ROWS, tmp_path))
    assert first == group(0, ["base", "one", "two"], [0.5, 0.75, pytest.approx(4.8889e-6)])
    assert second == group(1, ["base", "one", "two"], [0.5, 0.0, 1.0])
    assert GroupReader(write(ROWS, tmp_path)).schema == AlpacaEval()


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        (judged("three", 0, 1.5), [0.5, 0.75, 0.5]),
        # A draw in the first annotations.
        (judged("three", 0, 0), [0.5, 0.75, 0.5]),
        (judged("three", 0, 2), [0.5, 0.75, 1.0]),
        # The baseline against itself.
        (judged("base", 0, 1.5), [0.5, 0.75]),
    ],
)
def test_preferences_become_scores(row: Row, scores: list[float], tmp_path: Path) -> None:
    (found,) = results([ROWS[0], row], tmp_path)
    assert as_row(found)["scores"] == scores


LEFT_OUT = "without a score, left out"


def test_answer_that_the_judge_left_out(tmp_path: Path) -> None:
    rows = [*ROWS, judged("three", 0, None), judged("three", 2, None)]
    first, second, third = results(rows, tmp_path)
    assert as_row(first)["models"] == as_row(second)["models"] == ["base", "one", "two"]
    assert (first.notes, second.notes) == ((LEFT_OUT,), ())
    # Nobody's answer to it was judged, and the baseline alone is no group.
    assert third.skipped == "with a single response"
    *_, wrong, also = results(rows, tmp_path, AlpacaEval(unscored="error"))
    assert "rows.json:5: preference: found null" in str(wrong.error)
    assert "rows.json:6: preference: found null" in str(also.error)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (judged("x", 2, 3.0), "preference: found 3; expected 1 to 2 (or 0, a draw)"),
        (judged("x", 2, 0.5), "preference: found 0.5; expected 1 to 2"),
        (judged("x", 2, "good"), "preference: found 'good'"),  # type: ignore[arg-type]
        (judged("x", 2, 1.5, output_2=None), "output_2: found None"),
        (judged("x", 2, 1.5, output_1=""), "output_1: found ''"),
        (judged("x", 2, 1.5, instruction=None), "instruction: found null"),
        (
            judged("x", 1, 1.5, output_1="another"),
            "output_1: found 2 to one instruction",
        ),
        (
            judged("x", 1, 1.5, annotator="human"),
            "annotator: found 2 to one instruction",
        ),
    ],
)
def test_bad_annotation(row: Row, words: str, tmp_path: Path) -> None:
    for rows in ([*ROWS, row], [row, *ROWS]):
        errors = [str(each.error) for each in results(rows, tmp_path) if each.error]
        assert len(errors) == 1
        assert words in errors[0]


# ---------------------------------------------------------------------------------- results folder


@pytest.mark.parametrize("name", ["", f":{JUDGE}"])
def test_folder_of_results(name: str, tmp_path: Path) -> None:
    folder = make_results(tmp_path / "results")
    first, second = GroupReader(f"{folder}{name}").results()
    assert as_row(first) == group(0, ["base", "one", "two"], [0.5, 0.75, 0.25])
    assert as_row(second) == group(1, ["base", "one", "two"], [0.5, 0.0, 1.0])
    assert first.source == f"{folder}/one/{JUDGE}/annotations.json:1"
    # The new model's answers were not judged; the baseline's own file adds nothing.
    assert first.notes == second.notes == (LEFT_OUT,)


def test_answer_without_text(tmp_path: Path) -> None:
    rows = [*ROWS, judged("three", 0, 1.0, output_2=" ")]
    first, second = results(rows, tmp_path, AlpacaEval(empty="drop"))
    assert as_row(first)["models"] == as_row(second)["models"] == ["base", "one", "two"]
    assert first.notes == ("without text, left out",)


def test_answers_among_annotations_that_nobody_judged(tmp_path: Path) -> None:
    *_, alone = results([*ROWS, answer("one", 2), answer("two", 2)], tmp_path)
    assert alone.skipped == LEFT_OUT


@pytest.mark.parametrize("within", ["one", f"one/{JUDGE}", f"one/{JUDGE}/annotations.json"])
def test_results_of_one_model(within: str, tmp_path: Path) -> None:
    folder = make_results(tmp_path / "results")
    first, second = GroupReader(f"{folder}/{within}").results()
    assert as_row(first) == group(0, ["base", "one"], [0.5, 0.75])
    assert as_row(second) == group(1, ["base", "one"], [0.5, 0.0])


def test_pattern_of_annotations(tmp_path: Path) -> None:
    folder = make_results(tmp_path / "results")
    first, second = GroupReader(f"{folder}/*/{JUDGE}/annotations.json").results()
    assert as_row(first) == group(0, ["base", "one", "two"], [0.5, 0.75, 0.25])
    assert as_row(second)["models"] == ["base", "one", "two"]
    with pytest.raises(DataError, match=r"\*/gone\.json: no such file"):
        open_source(f"{folder}/*/gone.json")


def test_several_annotators(tmp_path: Path) -> None:
    folder = make_results(make_results(tmp_path / "results"), judge="other")
    with pytest.raises(DataError, match=rf"holds annotations of \['other', '{JUDGE}'\]"):
        GroupReader(str(folder))
    assert len([r for r in GroupReader(f"{folder}:other").results() if r.group]) == 2
    with pytest.raises(DataError, match="no annotations of 'gone' among"):
        GroupReader(f"{folder}:gone")


# ------------------------------------------------------------------------- answers without a judge


@pytest.mark.parametrize("name", ["", "/*/model_outputs.json"])
def test_answers_of_several_models_are_joined(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for model, questions in (("one", (0, 1)), ("two", (1, 0, 2)), ("three", (1,))):
        rows = [answer(model, question) for question in questions]
        write(rows, folder / model, "model_outputs.json")
    source = open_source(f"{folder}{name}")
    assert list(source.rows(0, len(source))) == [
        (
            f"{folder}/one/model_outputs.json:1",
            {
                "prompt": QUESTIONS[0],
                "responses": ["one on 0", "two on 0"],
                "models": ["one", "two"],
                "dataset": "vicuna",
            },
        ),
        (
            f"{folder}/one/model_outputs.json:2",
            {
                "prompt": QUESTIONS[1],
                "responses": ["one on 1", "three on 1", "two on 1"],
                "models": ["one", "three", "two"],
                "dataset": "vicuna",
            },
        ),
        (
            f"{folder}/two/model_outputs.json:3",
            {
                "prompt": QUESTIONS[2],
                "responses": ["two on 2"],
                "models": ["two"],
                "dataset": "vicuna",
            },
        ),
    ]
    assert [row for _, row in source.rows(1, 2)] == [source[1][1]]
    with pytest.raises(DataError, match="They have no scores: `mpo-lightning score` gives"):
        GroupReader(source)


def test_joined_answers_can_be_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def lengths(prompt, responses):\n    return [len(text) for text in responses]\n"
    (tmp_path / "lengths_of_answers.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for model in ("one", "seven"):
        rows = [answer(model, question) for question in range(3)]
        write(rows, tmp_path / "results" / model, "model_outputs.json")
    score(
        data=str(tmp_path / "results"),
        out=str(tmp_path / "scored"),
        function="lengths_of_answers:lengths",
        progress=False,
    )
    groups = list(map(as_row, GroupReader(str(tmp_path / "scored")).results()))
    assert [row["prompt"] for row in groups] == QUESTIONS
    assert groups[0]["models"] == ["one", "seven"]
    assert groups[0]["scores"] == [8.0, 10.0]


def test_one_models_answers_stay_as_they_are(tmp_path: Path) -> None:
    """`compare` reads them so."""
    path = write([answer("one", 0)], tmp_path, "model_outputs.json")
    assert open_source(path)[0] == (f"{path}:1", answer("one", 0))


# ------------------------------------------------------------------------------------- real results


@pytest.mark.skipif(not SHARED.is_file(), reason="needs the judged answers, which are not ours")
def test_real_annotations_give_the_groups_that_they_were_made_to(tmp_path: Path) -> None:
    """The judged groups, written as folders of annotations, are read back."""
    with gzip.open(SHARED, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:200]
    by_model: dict[str, list[Row]] = {}
    base = "gpt4_1106_preview"
    for row in rows:
        of = dict(
            zip(row["models"], zip(row["responses"], row["scores"], strict=True), strict=True)
        )
        for model in ("alpaca-7b", "gpt4_gamed", "FuseChat-Qwen-2.5-7B-Instruct", base):
            if model in of:
                entry = {
                    "instruction": row["prompt"],
                    "output_1": of[base][0],
                    "generator_1": base,
                    "output_2": of[model][0],
                    "generator_2": model,
                    "annotator": JUDGE,
                    "preference": 1 + of[model][1],
                }
                by_model.setdefault(model, []).append(entry)
    for model, entries in by_model.items():
        write(entries, tmp_path / "results" / model / JUDGE, "annotations.json")
    read = {row["prompt"]: row for row in map(as_row, GroupReader(f"{tmp_path}/results").results())}
    assert len(read) == len(rows)
    for row in rows:
        found = read[row["prompt"]]
        assert found["models"][0] == base
        given = dict(zip(row["models"], row["scores"], strict=True))
        expected = [0.5, *(given[model] for model in found["models"][1:])]
        np.testing.assert_allclose(found["scores"], expected, atol=1e-12)
        texts = dict(zip(row["models"], row["responses"], strict=True))
        assert found["responses"] == [texts[model] for model in found["models"]]


@pytest.mark.skipif(not SHARED.is_file(), reason="needs the judged answers, which are not ours")
def test_real_groups_as_they_are() -> None:
    reader = GroupReader(str(SHARED))
    found = [result.group for result in reader.results()]
    assert len(found) == 805
    assert all(group is not None and 50 < len(group.responses) < 59 for group in found)
