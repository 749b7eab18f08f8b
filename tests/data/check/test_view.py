"""The report of a check as text and as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.view import draw_picture, format_report
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.schemas.base import Converted, SkippedRow
from mpo_lightning.data.schemas.detect import Canonical
from mpo_lightning.losses import AboveThreshold
from tests.data.check.rows import group, random_rows

Write = Callable[..., str]


def test_groups_without_contrast_have_their_column_whatever_the_reason(write_jsonl: Write) -> None:
    class Picky(Canonical):
        def convert(self, row: Any, source: str) -> Converted:
            if row["prompt"] == "p3":
                # The words that groups without contrast are counted under.
                raise SkippedRow("with all scores equal")
            return Converted(dict(row))

    scores = ([1.0, 2.0], [4.0, 5.0], [2.0, 6.0], [1.0, 9.0], [2.0, 2.0])
    path = write_jsonl([group(i, row) for i, row in enumerate(scores)])
    report = check(path, schema=Picky(), partition=AboveThreshold(threshold=3.5))
    titles, counts, *_ = format_report(report).splitlines()
    assert "skipped  no contrast  usable" in titles
    # Groups, bad, skipped, no contrast, usable, responses.
    assert counts.split()[1:-1] == ["5", "0", "1", "3", "1", "8"]
    assert "0: 3 (75.0%), 1: 1 (25.0%) (0: no contrast)" in format_report(report)


def test_the_report_as_a_picture(write_jsonl: Write, tmp_path: Path) -> None:
    report = check(write_jsonl(random_rows(40)), alpha=0.2)
    draw_picture(report, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="picture cannot be written"):
        draw_picture(report, tmp_path / "check.unknown")
