"""Correlated groups: what each kind is compared with."""

from typing import Any

from mpo_lightning.studies.correlation import study
from mpo_lightning.studies.lab.conditions import Form
from tests.studies.made_up import MadeUp


def test_kinds_of_groups_are_held_beside_the_same_method() -> None:
    runner: Any = MadeUp()
    kinds = {}
    for row in study(runner, Form(seeds=2)).summary["differences"]:
        (groups, method), (others, same) = (row[at].split(": ") for at in ("first", "second"))
        if groups == others:
            assert method != same
            continue
        assert method == same
        assert row["worlds"] == 2
        kinds.setdefault(groups, []).append((others, method))
    assert len(kinds) == 2 * 4
    for beta in ("0.1", "1"):
        compared = ("5 copies of 2", "shared 0.9, clean")
        of = {kind: kinds[f"{kind}, beta {beta}"] for kind in compared}
        assert {others for others, _ in of["5 copies of 2"]} == {f"2 responses, beta {beta}"}
        plain = f"independent, clean, beta {beta}"
        assert {others for others, _ in of["shared 0.9, clean"]} == {plain}
        assert all(len(set(of_kind)) == 4 for of_kind in of.values())
