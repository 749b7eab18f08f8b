"""Hostile rows and configurations: a part of ``python -m tests.fuzz``."""

import pytest

from tests.fuzz import run


def test_mutations_are_refused_or_read_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["mpo-lightning"])
    table, faults = run(rows=2_400, configs=12, seed=1)
    assert not faults, "\n".join([table, *faults])
    # Neither are all refused, nor all accepted.
    refused, accepted, *_ = (int(n.replace(",", "")) for n in table.splitlines()[-1].split()[1:])
    assert min(refused, accepted) > 500
