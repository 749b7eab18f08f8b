"""Every loss states the equation and the papers that docs/mathematics.md gives it."""

from pathlib import Path

import pytest

from mpo_lightning import losses

PAGE = (Path(__file__).parents[2] / "docs" / "mathematics.md").read_text(encoding="utf-8")
LOSSES: dict[str, type[losses.SetLoss]] = {
    name: found
    for name in losses.__all__
    if isinstance(found := getattr(losses, name), type)
    and issubclass(found, losses.SetLoss)
    and name not in {"SetLoss", "PairLoss"}
}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_that_of_the_page(name: str) -> None:
    loss = LOSSES[name]
    # Each its own: an inherited equation may be that of another loss.
    assert {"title", "latex", "arxiv"} <= set(vars(loss))
    assert loss.latex
    assert loss.symbols
    assert loss.arxiv
    assert "".join(loss.latex.split()) in "".join(PAGE.split())
    for number in loss.arxiv:
        assert number in PAGE
