"""Draws the figures of docs/method.md, from what the package itself computes.

    python docs/figures/method.py

Writes `split.svg`, `pushes.svg`, `winner.svg` and `shared.svg` beside this file.
"""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from mpo_lightning.losses import DPO, MPO, AboveMean, EachMPO, SetLoss

HERE = Path(__file__).parent
CHOSEN, REJECTED, PLAIN, PROMPT = "#2a7f62", "#b5443a", "#555555", "#4c6ea8"
# The group of docs/mathematics.md, "Why absolute".
SCORES = (9.0, 7.0, 7.0, 4.0, 2.0, 1.0)
ALPHA = 0.7
LOSSES: dict[str, SetLoss] = {
    "DPO, best against worst": DPO(beta=1.0),
    "DPO, all pairs": DPO(beta=1.0, pairs="all"),
    "MPO": MPO(beta=1.0),
    f"W-MPO, alpha = {ALPHA}": MPO(beta=1.0, alpha=ALPHA),
}


def group() -> tuple[Tensor, Tensor]:
    """Scores and validity of the figures' one group, (1, N) each."""
    scores = torch.tensor([SCORES], dtype=torch.float64)
    return scores, torch.ones_like(scores, dtype=torch.bool)


def pushes(loss: SetLoss) -> list[float]:
    """How hard each response is pushed up at the start: minus the loss's gradient at r = 0."""
    scores, valid = group()
    ratios = torch.zeros_like(scores, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(ratios, scores, valid).sum(), ratios)
    return [-value for value in gradient[0].tolist()]


def shares(loss: SetLoss, steps: int, rate: float = 0.5) -> list[list[float]]:
    """Shares of the chosen responses in their set's mass, as gradient descent goes on.

    Log-ratios are free numbers here, no model is behind them; the chosen start a little apart.
    """
    scores, valid = group()
    chosen, _ = AboveMean()(scores, valid)
    ratios = torch.zeros_like(scores)
    ratios[chosen] = torch.tensor([0.0, 0.3, -0.3], dtype=torch.float64)
    path = []
    for _ in range(steps):
        path.append(ratios[chosen].softmax(0).tolist())
        ratios.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(ratios, scores, valid).sum(), ratios)
        ratios = (ratios - rate * gradient).detach()
    return path


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_split() -> Figure:
    """A group's scores, and its mean, which splits it."""
    figure, (axis,) = _figure(7, 2.1)
    scores, valid = group()
    chosen, _ = AboveMean()(scores, valid)
    mean = float(scores.mean())
    seen: dict[float, int] = {}
    for score, is_chosen in zip(SCORES, chosen[0].tolist(), strict=True):
        height = seen[score] = seen.get(score, 0) + 1
        color = CHOSEN if is_chosen else REJECTED
        axis.plot([mean, score], [height, height], color=color, linewidth=1, zorder=1)
        axis.scatter([score], [height], s=130, color=color, zorder=2)
    axis.axvline(mean, color=PLAIN, linestyle="--")
    axis.text(mean, 2.75, "mean score", ha="center", color=PLAIN)
    axis.text(8.0, 2.75, "chosen set", ha="center", color=CHOSEN)
    axis.text(2.0, 2.75, "rejected set", ha="center", color=REJECTED)
    axis.set(xlim=(0, 10), ylim=(0.4, 3.2), yticks=[], xlabel="score; lines are deviations")
    axis.spines["left"].set_visible(False)
    return figure


def draw_pushes() -> Figure:
    """What each loss does to each response in the first step."""
    figure, axes = _figure(9.5, 2.6, len(LOSSES))
    for axis, (name, loss) in zip(axes, LOSSES.items(), strict=True):
        values = pushes(loss)
        colors = [CHOSEN if value > 0 else REJECTED for value in values]
        axis.bar(range(len(values)), values, color=colors)
        axis.axhline(0, color=PLAIN, linewidth=0.8)
        axis.set_xticks(range(len(values)), [f"{score:g}" for score in SCORES])
        axis.set(title=name, xlabel="score of the response", ylim=(-0.55, 0.55))
    axes[0].set_ylabel("push, up or down")
    return figure


def draw_winner() -> Figure:
    """Shares within the chosen set under MPO and EachMPO."""
    figure, axes = _figure(7.5, 2.6, 2)
    for axis, loss in zip(axes, (MPO(beta=1.0), EachMPO(beta=1.0)), strict=True):
        path = shares(loss, steps=400)
        for number in range(len(path[0])):
            axis.plot([step[number] for step in path], color=CHOSEN, alpha=0.5 + 0.25 * number)
        axis.set(title=type(loss).__name__, xlabel="step", ylim=(0, 1))
    axes[0].set_ylabel("share of the chosen set")
    return figure


def draw_shared() -> Figure:
    """Which token sees which: three rows of their own, and one row with the prompt once."""
    prompt, lengths = 6, [5, 3, 4]
    figure, axes = _figure(8.5, 4.2, 2)
    own_rows = sum(prompt + length for length in lengths)
    separate = torch.zeros(own_rows, own_rows, dtype=torch.long)
    at = 0
    for length in lengths:
        size = prompt + length
        causal = torch.ones(size, size).tril().long()
        causal[:, prompt:] *= 2
        separate[at : at + size, at : at + size] = causal
        at += size
    # Which response a token of the shared row belongs to; 0 is the prompt.
    part = torch.arange(1 + len(lengths)).repeat_interleave(torch.tensor([prompt, *lengths]))
    seen = (part == 0) | (part[:, None] == part)
    seen = seen.tril().long()
    seen[:, prompt:] *= 2
    colors = mpl.colors.ListedColormap(["#f2f2f2", PROMPT, CHOSEN])
    titles = (
        f"a row for each response: {own_rows} tokens",
        f"one row for the group: {prompt + sum(lengths)} tokens",
    )
    for axis, picture, title in zip(axes, (separate, seen), titles, strict=True):
        axis.imshow(picture, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
        axis.set(title=title, xlabel="sees this token", xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel("this token")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture that is the same, byte for byte, where nothing changed."""
    with mpl.rc_context({"svg.hashsalt": "mpo-lightning", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


FIGURES = {
    "split": draw_split,
    "pushes": draw_pushes,
    "winner": draw_winner,
    "shared": draw_shared,
}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        save(draw(), HERE / f"{name}.svg")
