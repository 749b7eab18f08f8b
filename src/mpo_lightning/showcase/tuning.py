"""Choice of learning rates, alike for all methods, on prompts that are never tested."""

from collections.abc import Callable, Mapping, Sequence
from math import isnan, nan
from statistics import fmean
from typing import Any, Final

import torch

from mpo_lightning.losses import SetLoss
from mpo_lightning.showcase.runs import Fit, Prediction
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.training.metrics import kendall_tau_b

__all__ = ["LEARNING_RATES", "chosen_rates", "of_rows", "tau_b"]

LEARNING_RATES: Final = (5e-5, 1.5e-4, 4.5e-4)


def tau_b(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two rankings; NaN where one of them ties all."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return nan
    one, other = (torch.tensor([list(each)], dtype=torch.float64) for each in (first, second))
    return kendall_tau_b(one, other, torch.ones_like(one, dtype=torch.bool)).item()


def of_rows(predictions: Sequence[Prediction]) -> dict[int, list[Prediction]]:
    """Return the predictions by their rows, in the order of the responses."""
    found: dict[int, list[Prediction]] = {}
    for each in sorted(predictions, key=lambda each: (each.row, each.response)):
        found.setdefault(each.row, []).append(each)
    return found


def chosen_rates(
    runner: Runner,
    methods: Mapping[str, SetLoss],
    fit: Callable[[SetLoss, float], Fit],
    rates: Sequence[float] = LEARNING_RATES,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Choose each method's learning rate by the mean tau-b of log-ratios with scores.

    Args:
        runner: performs the fits.
        methods: the losses by their names.
        fit: makes the fit of a loss and a rate, with the tuning groups as those to judge.
        rates: the rates, of which the lower one is taken if two are level.

    Returns:
        the rate of each method, and a row for each that was tried.
    """
    tried = [(name, rate, fit(loss, rate)) for name, loss in methods.items() for rate in rates]
    runner([each for _, _, each in tried], "Learning rates")
    worlds = runner.folder / "worlds"
    rows: list[dict[str, Any]] = []
    for name, rate, each in tried:
        assert each.judged is not None
        judged = each.judged.rows(worlds)
        taus = [
            tau_b([p.log_ratio for p in of], [judged[row]["scores"][p.response] for p in of])
            for row, of in of_rows(each.predictions(worlds)).items()
        ]
        rows.append({"method": name, "lr": rate, "tau": fmean(t for t in taus if not isnan(t))})
    best: dict[str, float] = {}
    # The first of the best.
    for row in sorted(rows, key=lambda row: -float(row["tau"])):
        best.setdefault(row["method"], row["lr"])
    return best, rows
