"""Every loss has the formula that docs/mathematics.md gives."""

from pathlib import Path

import pytest

from mpo_lightning import losses
from mpo_lightning.export.formulas import FORMULAS

PAGE = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text(encoding="utf-8")
LOSSES = {
    name
    for name in losses.__all__
    if isinstance(getattr(losses, name), type)
    and issubclass(getattr(losses, name), losses.SetLoss)
    and name not in {"SetLoss", "PairLoss"}
}


def test_every_loss_has_one() -> None:
    assert set(FORMULAS) == LOSSES


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_it_is_that_of_the_page(name: str) -> None:
    formula = FORMULAS[name]
    assert "".join(formula.latex.split()) in "".join(PAGE.split())
    for number in formula.arxiv:
        assert number in PAGE
