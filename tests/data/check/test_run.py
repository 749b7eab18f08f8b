"""The check as a whole: rows that cannot be used, settings, extremes."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.view import format_report
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.schemas.base import Converted, SkippedRow
from mpo_lightning.data.schemas.detect import Canonical
from tests.data.check.rows import group, random_rows

Write = Callable[..., str]


def test_bad_and_skipped_rows_are_counted(write_jsonl: Write) -> None:
    class Picky(Canonical):
        def convert(self, row: Any, source: str) -> Converted:
            if row["prompt"] == "skip":
                raise SkippedRow("with a prompt to skip")
            notes = ("with a top score that its ratings contradict",) * (10 in row["scores"])
            return Converted(dict(row), notes)

    good = {"prompt": "p", "responses": ["one", "two"], "scores": [1, 2]}
    rows: list[Any] = [
        good,
        *[{**good, "scores": [1, "two"]}] * 12,
        {**good, "prompt": "skip"},
        {**good, "prompt": "q", "scores": [10, 1]},
        "{not json",
        {**good, "prompt": "r", "scores": [3, 3]},
    ]
    path = write_jsonl(rows)
    report = check(path, schema=Picky())
    read = report.files[0].read
    assert (read.groups, read.failed, read.kept) == (17, 13, 2)
    assert len(read.errors) == 10
    assert read.dropped == {"with a prompt to skip": 1, "with all scores equal": 1}
    assert report.total.read.dropped == read.dropped
    assert report.groups == 3
    text = format_report(report)
    assert "13 rows cannot be used" in text
    assert "... and 3 more" in text
    assert f"{path}:14" in text
    (warning,) = [w for w in report.warnings if w.name == "schema-notes"]
    assert "1 with a top score that its ratings contradict" in warning.found
    assert warning.rows == [f"{path}:15"]


def test_a_file_of_bad_rows_only_gives_a_report(write_jsonl: Write) -> None:
    report = check(write_jsonl([{"prompt": "p", "responses": ["a"], "scores": [1]}]))
    assert report.groups == 0
    assert "1 rows cannot be used" in format_report(report)
    assert json.loads(report.to_json())["total"]["scores"]["mean"] is None


def test_groups_can_be_changed_before_they_are_counted(write_jsonl: Write) -> None:
    def capped(group: PreferenceGroup) -> PreferenceGroup:
        return replace(group, scores=[min(score, 4.0) for score in group.scores])

    report = check(write_jsonl(random_rows(30)), transform=capped)
    assert report.total.scores.high == 4.0


@pytest.mark.parametrize(
    "scores",
    [[1e308, -1e308, 5.0], [1.7e308, 1.7e308, 0.0], [5e-324, 0.0, 1e-310], [1e200, 1.0, 2.0]],
)
def test_scores_at_the_ends_of_the_range(scores: list[float], write_jsonl: Write) -> None:
    report = check(write_jsonl([group(i, scores, source="s") for i in range(3)]), alpha=0.5)
    read = json.loads(report.to_json())
    assert (read["total"]["scores"]["low"], read["total"]["scores"]["high"]) == (
        min(scores),
        max(scores),
    )
    assert sum(count for *_, count in read["histogram"]) == 9
    assert "nan" not in format_report(report)


@pytest.mark.parametrize("setting", ["alpha", "power"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(DataError, match=setting):
        check("nothing.jsonl", **{setting: value})


def test_the_report_as_json(write_jsonl: Write) -> None:
    report = check(write_jsonl(random_rows(40)), alpha=0.2)
    read = json.loads(report.to_json())
    assert read["sets"] == {
        str(n): {str(c): k for c, k in sizes.items()} for n, sizes in report.sets.items()
    }
    assert read["total"]["read"]["dropped"] == dict(report.total.read.dropped)
    assert [w["name"] for w in read["warnings"]] == [w.name for w in report.warnings]
