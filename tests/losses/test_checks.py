"""Messages about settings that cannot be, in Python."""

import math
from typing import Any

import pytest
import torch

from mpo_lightning.losses import (
    DPO,
    GVPO,
    MDPO,
    MPO,
    NCA,
    AboveQuantile,
    AboveThreshold,
    AboveTrimmedMean,
    InfoNCA,
    PlackettLuce,
    SetLoss,
    TopBottom,
)


@pytest.mark.parametrize("cls", [MPO, DPO, InfoNCA, NCA])
@pytest.mark.parametrize("beta", [0, -1, math.nan, math.inf])
def test_beta_must_be_positive(cls: type[SetLoss], beta: float) -> None:
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: beta must be .* > 0, got {beta}\.$"):
        cls(beta=beta)


@pytest.mark.parametrize(
    ("cls", "field", "value"),
    [
        *((MPO, "alpha", value) for value in (-0.1, math.nan, math.inf)),
        *((MPO, "power", value) for value in (-1, math.nan, math.inf)),
        *((MPO, "gamma", value) for value in (0, -2, math.nan, math.inf)),
        *((InfoNCA, "temperature", value) for value in (0, -1, math.nan, math.inf)),
        *((NCA, "temperature", value) for value in (0, -1, math.nan, math.inf)),
        *((GVPO, "temperature", value) for value in (0, -1, math.nan, math.inf)),
    ],
)
def test_other_settings_have_their_ranges(cls: type[SetLoss], field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {field} must be .*, got {value}\.$"):
        cls(**{field: value})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AboveQuantile(quantile=1.0), "AboveQuantile: quantile must be .*, got 1.0"),
        (lambda: AboveQuantile(quantile=-0.1), "AboveQuantile: quantile must be .*, got -0.1"),
        (lambda: AboveTrimmedMean(trim=0.5), "AboveTrimmedMean: trim must be .*, got 0.5"),
        (lambda: AboveThreshold(threshold=torch.inf), "AboveThreshold: threshold must be .* inf"),
        (lambda: TopBottom(k=0), "TopBottom: k must be a whole number >= 1, got 0"),
        (lambda: TopBottom(k=1.5), "TopBottom: k must be a whole number >= 1, got 1.5"),
        (lambda: MPO(partition="AboveMean"), "MPO: partition must be a Partition, got 'AboveMean'"),
        (lambda: DPO(partition=None), "DPO: partition must be a Partition, got None"),
        (lambda: MPO(beta="0.1"), "MPO: beta must be a number > 0, got '0.1'"),
        (
            lambda: DPO(pairs="best_worst"),
            "DPO: pairs must be one of best-worst, random, all, sets, got 'best_worst'",
        ),
        (lambda: MPO(deviation="typo"), "MPO: deviation must be one of absolute, signed"),
        (lambda: MPO(alpha_unit="sd"), "MPO: alpha_unit must be one of score, std"),
        (lambda: GVPO(target="mean"), "GVPO: target must be one of centred, advantage, quantile"),
        (lambda: PlackettLuce(levels=1), "PlackettLuce: levels must be .*, got 1"),
        (lambda: NCA(reference_free=1), "NCA: reference_free must be true or false, got 1"),
        (lambda: MDPO(likelihood=-1), "MDPO: likelihood must be a number >= 0, got -1"),
    ],
)
def test_impossible_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
