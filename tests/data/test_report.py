"""Counts that add up, and what is said of them."""

import re

import numpy as np
import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.report import DataReport


def failed(*rows: int) -> DataReport:
    report = DataReport("x")
    for number in rows:
        report.fail(DataError(f"x:{number}: prompt: found ''"))
    return report


def test_one_bad_row_is_the_message() -> None:
    with pytest.raises(DataError, match=r"^x:2: prompt: found ''$"):
        failed(2).check()


@pytest.mark.parametrize("bad", [2, 10, 11, 25])
def test_all_bad_rows_are_counted_and_ten_shown(bad: int) -> None:
    report = DataReport("x")
    for start in range(1, bad + 1, 7):
        report.add(failed(*range(start, min(start + 7, bad + 1))))
    with pytest.raises(DataError) as caught:
        report.check()
    title, *lines = str(caught.value).splitlines()
    assert title.startswith(f"{bad} rows ")
    named = [match[1] for line in lines if (match := re.match(r" +(x:\d+): prompt: found", line))]
    assert named == [f"x:{number}" for number in range(1, min(bad, 10) + 1)]
    assert lines[len(named) :] == ([f"  ... and {bad - 10} more"] if bad > 10 else [])


def part(start: int) -> DataReport:
    report = DataReport("x", groups=5, kept=3, responses=9)
    report.drop("too long", f"x:{start}")
    contrast = np.array([True, False, False])
    equal = np.array([False, False, True])
    report.drop_without_contrast(contrast, equal, "MPO", lambda i: f"x:{start + i}")
    report.note("cut", f"x:{start + 2}", 2)
    report.note("odd", f"x:{start}", 0)
    return report


def test_parts_add_up_and_survive_json() -> None:
    whole = DataReport("x")
    for start in range(1, 26, 5):
        whole.add(DataReport.from_json(part(start).to_json()))
    assert DataReport.from_json(whole.to_json()) == whole
    whole.check()
    assert str(whole).splitlines() == [
        "x: 15 of 25 groups, 3.0 responses each",
        "  groups dropped: 5 too long (first: x:1, x:6, x:11)",
        "  groups dropped: 5 with all scores equal (first: x:3, x:8, x:13)",
        "  groups dropped: 5 whose scores MPO has no contrast for (first: x:2, x:7, x:12)",
        "  responses: 10 cut (first: x:3, x:8, x:13)",
    ]


def test_examples_and_reasons_are_few() -> None:
    report = DataReport("x")
    for number in (1, 1, 2, 3, 4):
        report.note("cut", f"x:{number}")
    assert report.examples["cut"] == ["x:1", "x:2", "x:3"]
    for number in range(300):
        report.drop(f"for reason {number}", "x:1")
    assert report.dropped["(for other reasons)"] == 100
    assert len(report.dropped) == 201


def test_nothing_left_is_an_error_with_the_report() -> None:
    report = DataReport("x", groups=1)
    report.drop("too long", "x:1")
    with pytest.raises(DataError, match=r"No group of x(.|\n)*1 too long \(first: x:1\)"):
        report.check()
