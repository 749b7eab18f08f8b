"""Files of trusted labels: how they are read, matched, reported and refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_lightning.commands.data import main
from mpo_lightning.data.check import check, compare_with_trusted
from mpo_lightning.data.check.report import CheckReport, TrustedReport
from mpo_lightning.data.check.trusted_labels import LENGTH
from mpo_lightning.data.check.view import format_report, format_warnings
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.schemas.base import Converted
from mpo_lightning.data.schemas.detect import Canonical
from tests.data.check.rows import Rows

Write = Callable[..., str]


def made(count: int = 30, n: int = 6) -> tuple[Rows, Rows]:
    """Rows of a judge who likes long answers, and trusted labels of four answers of each third."""
    draw = np.random.default_rng(0)
    rows, labels = [], []
    for number in range(count):
        gold, lengths = draw.standard_normal(n), draw.integers(1, 100, n)
        texts = [f"answer {number} {i} " + "x" * int(length) for i, length in enumerate(lengths)]
        scores = (gold + (lengths - 50) / 20).round(6).tolist()
        more = {"models": [f"m{i % 2}" for i in range(n)], "depth": lengths.tolist()}
        rows.append({"prompt": f"Why {number}?", "responses": texts, "scores": scores, **more})
        if number % 3 == 0:
            given = {"prompt": f"Why {number}?", "responses": texts[:1:-1]}
            labels.append({**given, "scores": gold[:1:-1].tolist()})
    return rows, labels


def trusted(report: CheckReport) -> TrustedReport:
    assert report.trusted is not None
    return report.trusted


def test_labels_are_matched_with_whole_groups(write_jsonl: Write) -> None:
    rows, labels = made()
    # Labels of another prompt, of another response, and of one response only.
    labels[0]["responses"][0] = "Another answer"
    labels[1] = {**labels[1], "responses": [labels[1]["responses"][0], "None"], "scores": [1, 2]}
    labels.append({"prompt": "Who?", "responses": ["a", "b"], "scores": [1, 2]})
    path = write_jsonl(labels, "gold.jsonl")
    report = check(write_jsonl(rows), trusted=path, by=["models", "depth", "source"])
    found = trusted(report)
    assert (found.labels, found.read.responses, found.read.kept) == (40, 36, 10)
    assert (found.unknown_prompts.count, found.unknown_prompts.rows) == (2, [f"{path}:11"])
    assert found.unknown_responses.count == 2
    assert found.unknown_responses.rows == [f"{path}:1", f"{path}:2"]
    # The same numbers from arrays.
    gold = [[math.nan] * 6 for _ in rows]
    for place, row in enumerate(labels[:10]):
        for text, label in zip(row["responses"], row["scores"], strict=True):
            if text in rows[3 * place]["responses"]:
                gold[3 * place][rows[3 * place]["responses"].index(text)] = label
    columns = {
        LENGTH: [list(map(len, row["responses"])) for row in rows],
        "models": [row["models"] for row in rows],
        "depth": [row["depth"] for row in rows],
    }
    scores = [row["scores"] for row in rows]
    again = compare_with_trusted(scores, gold, columns=columns)
    assert found.comparison.alone == again.alone == 1
    for name in ("tau", "order", "differences", "places", "columns"):
        assert getattr(found.comparison, name) == getattr(again, name)
    columns_found = [(column.column, column.value) for column in again.columns]
    assert columns_found == [(LENGTH, None), ("models", "m0"), ("depth", None)]
    text = format_report(report)
    assert f"{path}: 36 of 40 matched; used 35 in 9 groups of 9 prompts" in text
    assert f"2 (5.0%), first {path}:11 of prompts that are not checked" in text
    assert "1 (2.5%) alone in their group" in text
    assert "models 'm0', beyond" in text
    warning = next(each for each in report.warnings if each.name == "favoured-column")
    assert LENGTH in warning.found
    assert any(each.startswith("favoured-column: ") for each in format_warnings(report))
    read = json.loads(report.to_json())["trusted"]
    assert read["comparison"]["tau"]["value"] == found.comparison.tau.value
    assert json.loads(check(write_jsonl(rows)).to_json())["trusted"] is None


def test_prompts_and_responses_are_the_same_when_normalised(write_jsonl: Write) -> None:
    """But one that is the same to the letter goes first; a response labelled twice has the mean."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Why  {i}?"}],
            "responses": ["Yes", "yes", "No", f"Maybe {i}"],
            "scores": [4, 3, 2, 1],
        }
        for i in range(6)
    ]
    labels = [
        {
            "prompt": f"why {i}?",
            "responses": ["yes", " NO ", "no", f"MAYBE {i}", f"Maybe {i} "],
            "scores": [3, 8, 2, 1, 2],
        }
        for i in range(6)
    ]
    found = trusted(check(write_jsonl(rows), trusted=write_jsonl(labels, "gold.jsonl")))
    assert (found.labels, found.read.responses) == (30, 30)
    # "yes" 3, "No" 5, "Maybe" 1.5; "Yes" has none.
    nan = math.nan
    again = compare_with_trusted([[4, 3, 2, 1]] * 6, [[nan, 3, 5, 1.5]] * 6)
    assert found.comparison.labels == 18
    assert found.comparison.tau.value == again.tau.value == pytest.approx(1 / 3)


def test_several_groups_and_rows_of_a_prompt(write_jsonl: Write) -> None:
    """Each group is compared with each row of labels, in their own scales, as one prompt."""
    rows, labels = made()
    twice = [*labels, *({**row, "scores": [9 * s + 5 for s in row["scores"]]} for row in labels)]
    files = [write_jsonl(rows, "a.jsonl"), write_jsonl(rows[:15], "b.jsonl")]
    found = trusted(check(files, trusted=write_jsonl(twice, "gold.jsonl"))).comparison
    assert (found.prompts, found.groups) == (10, 30)
    whole = trusted(check(files[0], trusted=write_jsonl(labels, "once.jsonl"))).comparison
    assert (whole.prompts, whole.groups) == (10, 10)
    one = trusted(check(files[0], trusted=write_jsonl(twice, "both.jsonl"))).comparison
    assert one.tau == whole.tau


def test_labels_in_other_shapes(write_jsonl: Write, tmp_path: Path) -> None:
    """One label a row, as the checked rows are, or canonical where the checked rows are not."""
    rows, labels = made()
    expected = trusted(check(write_jsonl(rows), trusted=write_jsonl(labels, "gold.jsonl")))
    single = [
        {"prompt": row["prompt"], "response": text, "score": score}
        for row in labels
        for text, score in zip(row["responses"], row["scores"], strict=True)
    ]
    single.append({"prompt": "Who?", "response": "Alone", "score": 1})
    found = trusted(check(write_jsonl(rows), trusted=write_jsonl(single, "single.jsonl")))
    assert found.comparison == expected.comparison
    assert found.read.dropped == {"with a single response": 1}
    assert "1 rows with a single response" in format_report(
        check(write_jsonl(rows), trusted=write_jsonl(single, "single.jsonl"))
    )

    class Marked(Canonical):
        required = frozenset({"prompt", "answers", "scores"})

        def convert(self, row: Any, source: str) -> Converted:
            return Converted({**row, "responses": row["answers"]})

    def renamed(rows: Rows, names: dict[str, str]) -> Rows:
        return [{names.get(name, name): value for name, value in row.items()} for row in rows]

    names = {"prompt": "question", "responses": "answers"}
    theirs = write_jsonl(renamed(rows, names), "theirs.jsonl")
    settings = {"schema": Marked(), "columns": {"question": "prompt"}}
    for name, given in (("their-gold", renamed(labels, names)), ("gold", labels)):
        report = check(theirs, trusted=write_jsonl(given, f"{name}.jsonl"), **settings)
        assert trusted(report).comparison == expected.comparison


def test_changed_groups_are_compared_as_they_are_counted(write_jsonl: Write) -> None:
    def turned(group: PreferenceGroup) -> PreferenceGroup:
        return replace(group, scores=[-score for score in group.scores])

    rows, labels = made()
    path = write_jsonl(labels, "gold.jsonl")
    as_is = trusted(check(write_jsonl(rows), trusted=path)).comparison.tau.value
    turned_tau = trusted(check(write_jsonl(rows), trusted=path, transform=turned)).comparison.tau
    assert as_is is not None
    assert turned_tau.value == pytest.approx(-as_is)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "prompt": "Who?"}, "none of its 40 labels .* its prompts differ"),
        (
            lambda row: {**row, "responses": list("abcd")},
            "none of its 40 labels .* its responses to them are others",
        ),
        (
            lambda row: {**row, "responses": [row["responses"][0], *"abc"]},
            "10 of its labels belong to checked responses, but never two to the same group",
        ),
        (lambda row: {**row, "scores": [1, 2]}, r"no row of trusted labels .*\n10 rows cannot be"),
    ],
    ids=["prompts", "responses", "alone", "bad rows"],
)
def test_labels_that_belong_to_nothing_are_refused(
    change: Callable[[Any], Any], message: str, write_jsonl: Write
) -> None:
    rows, labels = made()
    path = write_jsonl([change(row) for row in labels], "gold.jsonl")
    with pytest.raises(DataError, match=rf"^{path}: {message}"):
        check(write_jsonl(rows), trusted=path)


def test_where_no_checked_row_can_be_used_their_errors_are_shown(write_jsonl: Write) -> None:
    rows, labels = made()
    bad = write_jsonl([{**row, "scores": [1]} for row in rows])
    report = check(bad, trusted=write_jsonl(labels, "gold.jsonl"))
    assert report.trusted is None
    assert "30 rows cannot be used" in format_report(report)


def test_bad_rows_of_labels_are_shown_and_fail_the_command(
    write_jsonl: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows, labels = made()
    arguments = ["data", "check", write_jsonl(rows), "--json", str(tmp_path / "check.json")]
    main([*arguments, "--trusted", write_jsonl(labels, "gold.jsonl")])
    assert "tau-b" in capsys.readouterr().out
    labels[2]["scores"][1] = None
    path = write_jsonl(labels, "bad.jsonl")
    with pytest.raises(SystemExit):
        main([*arguments, "--trusted", path])
    assert f"{path}:3: scores[1]: found None" in capsys.readouterr().out
    read = json.loads((tmp_path / "check.json").read_text())["trusted"]["read"]
    assert (read["failed"], read["kept"]) == (1, 9)
