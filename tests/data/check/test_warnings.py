"""Each warning of the check, and its documentation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.data.check.report import CheckReport
from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.view import format_warnings
from mpo_lightning.data.check.warnings import KINDS, TRUSTED_KINDS, Kind
from mpo_lightning.losses import AboveThreshold
from tests.conftest import CHAT_TEMPLATE, make_tokenizer, write_rows
from tests.data.check.rows import Rows, group, plain
from tests.data.check.test_trusted_power import PLANTED

Write = Callable[..., str]


CASES: dict[str, tuple[Rows, dict[str, Any]]] = {
    "equal-scores": (plain() + [group(100 + i, [2.0, 2.0]) for i in range(10)], {}),
    "ties": (plain() + [group(100 + i, [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]) for i in range(60)], {}),
    "score-ceiling": (plain() + [group(100 + i, [4.0, 4.0, 4.0, 1.0]) for i in range(60)], {}),
    "skewed-scores": (plain() + [group(100 + i, [1.0, 2.0, 3.0, 30.0]) for i in range(8)], {}),
    "outliers": ([*plain(400), group(500, [1.0, 2.0, 3.0, 90.0])], {}),
    "lopsided-sets": ([group(i, [1.0, 2.0, 3.0, 9.0]) for i in range(60)], {}),
    "scale-varies": (
        [group(i, [s * 10.0 ** (i % 3) for s in (1.0, 2.0, 3.0, 4.0)]) for i in range(60)],
        {},
    ),
    "weight-dominance": ([group(i, [1.0, 1.1, 1.2, 9.0]) for i in range(60)], {"alpha": 2.0}),
    "weight-without-effect": (plain(), {"alpha": 0.001}),
    "length-bias": (
        [
            group(i, [1.0, 2.0, 3.0, 4.0], responses=[f"text {i} " + "x" * k for k in range(4)])
            for i in range(60)
        ],
        {},
    ),
    "near-empty-responses": (
        [*plain(), *(group(100 + i, [1.0, 2.0], responses=["no", "yes."]) for i in range(5))],
        {},
    ),
    "duplicate-responses": (
        [
            *plain(),
            *(
                group(100 + i, [1.0, 1.5, 4.0], responses=["abcd", " ABCD", "efghi"])
                for i in [0, 1]
            ),
            group(103, [1.0, 1.5, 4.0], responses=["abcd", "Abcd", "efghi"]),
        ],
        {},
    ),
    "contradicting-duplicates": (
        [*plain(200), group(300, [1.0, 4.0], responses=["same", "same"])],
        {},
    ),
    "repeated-prompts": (plain() + plain(4), {}),
    "one-sided-column": (
        [{**row, "models": [f"m{s:g}" for s in row["scores"]]} for row in plain()],
        {},
    ),
    "source-without-contrast": (
        [
            *({**row, "source": "good"} for row in plain(400)),
            *(group(500 + i, [2.0, 2.0], source="flat") for i in range(35)),
        ],
        {},
    ),
}


def names(report: CheckReport) -> list[str]:
    return [warning.name for warning in report.warnings]


def test_there_is_nothing_to_warn_of_where_all_is_well(write_jsonl: Write) -> None:
    assert names(check(write_jsonl(plain()), alpha=0.5)) == []


@pytest.mark.parametrize("name", CASES)
def test_each_warning_is_given_where_there_is_reason(name: str, write_jsonl: Write) -> None:
    rows, settings = CASES[name]
    report = check(write_jsonl(rows), **settings)
    assert name in names(report)
    (text,) = [t for t in format_warnings(report) if t.startswith(f"{name}: ")]
    assert "Why: " in text
    assert "What to do: " in text


def test_files_that_share_prompts_are_warned_of(write_jsonl: Write) -> None:
    rows = plain()
    files = [write_jsonl(rows[:30], "train.jsonl"), write_jsonl(rows[29:], "val.jsonl")]
    report = check(files)
    (warning,) = [w for w in report.warnings if w.name == "shared-prompts"]
    assert warning.rows == [f"{files[1]}:1"]
    assert f"1 by {files[0]} and {files[1]}" in warning.found
    assert "shared-prompts" not in names(check([files[0], write_jsonl(rows[30:], "other.jsonl")]))


def test_a_source_on_one_side_of_a_threshold_is_warned_of(write_jsonl: Write) -> None:
    rows = [group(i, [float(i % 5), 4.5], source="near") for i in range(40)]
    rows += [group(100 + i, [7.0, 8.0 + i % 2], source="far") for i in range(40)]
    report = check(write_jsonl(rows), partition=AboveThreshold(threshold=4.2))
    (warning,) = [w for w in report.warnings if w.name == "source-without-contrast"]
    assert warning.found == "source 'far': 40 of 40 groups (100.0%) have no contrast"
    assert "equal-scores" not in names(report)


def test_every_kind_of_warning_has_its_test_and_its_documentation() -> None:
    tested = {*CASES, "shared-prompts", "schema-notes", "rendering", "beyond-max-length"}
    assert {kind.name for kind in KINDS} == tested
    few = {"few-trusted-labels"}
    assert {kind.name for kind in TRUSTED_KINDS} == few | {name for name, *_ in PLANTED.values()}
    assert_documented("### Warnings", KINDS)
    assert_documented("### Warnings from trusted labels", TRUSTED_KINDS)


def assert_documented(title: str, kinds: Sequence[Kind[Any]]) -> None:
    text = (Path(__file__).parents[3] / "docs" / "data-check.md").read_text(encoding="utf-8")
    table = text.partition(f"\n{title}\n")[2].partition("## ")[0]
    assert [line for line in table.splitlines() if line.startswith("| `")] == [
        f"| `{kind.name}` | {kind.threshold:g} | {kind.when} | {kind.why} |" for kind in kinds
    ]


def test_rows_that_training_would_refuse_are_counted_with_the_setting(tmp_path: Path) -> None:
    """As they are rendered with the tokenizer's chat template; nothing is left out."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message.content }}", "message.content | trim }}"
    )
    thought = {"role": "assistant", "content": "B", "thinking": "hm"}
    rows = [
        {"prompt": "Why?", "responses": ["So. ", "So.", "No."], "scores": [1, 0, 2]},
        {"prompt": "Why?", "responses": ["So. ", "No."], "scores": [1, 0]},
        {"prompt": "Name?", "responses": ["A", thought], "scores": [1, 0]},
    ]
    path = write_rows(tmp_path / "x.jsonl", rows)
    assert "rendering" not in {warning.name for warning in check(path).warnings}
    report = check(path, tokenizer=tokenizer)
    (warning,) = (each for each in report.warnings if each.name == "rendering")
    equal = "2 with the tokens of another of their group and another score"
    assert f"{equal} (data.rendering.equal_tokens)" in warning.found
    lost = "1 whose text the chat template leaves out or changes"
    assert f"{lost} (data.rendering.response_text)" in warning.found
    assert "white space" not in warning.found
    assert warning.rows == [f"{path}:1", f"{path}:3"]
    assert "schema-notes" not in {each.name for each in report.warnings}
    trimmed = "whose white space the chat template removes or changes (data.rendering.white_space)"
    assert report.rendered.changed[trimmed] == 2
    assert report.total.read.kept == 3


def test_pairs_have_no_ceiling(tmp_path: Path) -> None:
    """Of chosen and rejected, the one always has the highest score."""
    rows = [group(i, [1.0, 0.0]) for i in range(60)]
    report = check(write_rows(tmp_path / "pairs.jsonl", rows))
    assert report.ties.at_highest == 60
    assert "score-ceiling" not in names(report)
