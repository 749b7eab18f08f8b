"""Hostile rows and configurations: a part of ``python -m tests.fuzz``."""

from dataclasses import replace
from typing import Any

import pytest

from mpo_lightning.data.groups import PreferenceGroup
from mpo_lightning.data.rows import check_row
from tests.fuzz import run


def test_mutations_are_refused_or_read_as_written() -> None:
    table, faults = run(rows=2_400, configs=12, seed=1)
    assert not faults, "\n".join([table, *faults])
    # Neither are all refused, nor all accepted.
    refused, accepted, *_ = (int(n.replace(",", "")) for n in table.splitlines()[-1].split()[1:])
    assert min(refused, accepted) > 500


def test_a_change_of_what_is_read_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The independent reading is one: the order of responses is that of their texts here."""

    def reordered(row: Any, source: str) -> PreferenceGroup:
        group = check_row(row, source)
        return replace(group, responses=sorted(group.responses, key=str))

    monkeypatch.setattr("mpo_lightning.data.reading.check_row", reordered)
    _, faults = run(rows=600, configs=0, seed=1)
    assert any("silent: responses" in fault for fault in faults)
