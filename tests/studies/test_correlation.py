"""Correlated groups: what each kind is compared with."""

from typing import Any

from mpo_lightning.studies.correlation import study
from mpo_lightning.studies.lab.conditions import Form
from tests.studies.made_up import MadeUp


def test_kinds_of_groups_are_held_beside_the_same_method() -> None:
    runner: Any = MadeUp()
    beside = study(runner, Form()).summary["beside"]
    kinds = {}
    for row in beside:
        (kind, method), (plain, same) = (row[at].split(": ") for at in ("first", "second"))
        assert method == same
        assert row["difference"]["count"] == 6
        kinds[kind] = plain
    assert len(beside) == 4 * len(kinds)
    assert kinds["5 copies of 2"] == "2 responses"
    assert kinds["shared 0.9, clean"] == "independent, clean"
