"""Losses against numbers worked out by hand, plain Python, and what the equations promise.

The oracles use exact fractions for sets and ``math`` on Python floats for values; they know neither
padding nor log space.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from mpo_lightning.losses import (
    DPO,
    IPO,
    MDPO,
    MIPO,
    MPO,
    NCA,
    AboveMean,
    AboveQuantile,
    AboveThreshold,
    AboveTrimmedMean,
    BestRest,
    EachMPO,
    Hinge,
    InfoNCA,
    LiPO,
    MultiLevelMPO,
    PairLoss,
    Partition,
    PlackettLuce,
    RobustDPO,
    SetLoss,
    SimPO,
    TopBottom,
    deviation_log_weights,
    deviations,
    ordered_pairs,
)

LOSSES: list[SetLoss] = [
    MPO(beta=0.3),
    MPO(beta=0.3, alpha=0.7),
    MPO(beta=0.3, alpha=0.4, power=2.0),
    MPO(beta=0.3, alpha=0.7, deviation="signed"),
    MPO(beta=0.3, gamma=3.0),
    MPO(beta=0.3, alpha=0.7, alpha_unit="std"),
    MPO(beta=0.5, alpha=1.3, power=0.5, deviation="signed", gamma=2.0, alpha_unit="std"),
    DPO(beta=0.3),
    DPO(beta=0.3, pairs="all"),
    InfoNCA(beta=0.3, temperature=1.5),
    NCA(beta=0.3, temperature=1.5),
    MPO(beta=0.3, alpha=0.4, partition=TopBottom(k=2), gamma=2.0),
    MPO(beta=0.3, partition=AboveQuantile()),
    MPO(beta=0.3, partition=AboveThreshold(threshold=1.0)),
    EachMPO(beta=0.3),
    EachMPO(beta=0.3, alpha=0.7, gamma=2.0, partition=AboveQuantile(quantile=0.7)),
    DPO(beta=0.3, pairs="sets"),
    DPO(beta=0.3, pairs="sets", partition=BestRest()),
    IPO(beta=0.3),
    IPO(beta=0.3, pairs="all"),
    Hinge(beta=0.3, pairs="all"),
    RobustDPO(beta=0.3, flipped=0.2, pairs="all"),
    SimPO(beta=0.3, margin=0.7),
    SimPO(beta=0.3, margin=0.7, pairs="sets", partition=TopBottom(k=1)),
    MDPO(beta=0.3),
    MDPO(beta=0.3, partition=TopBottom(k=2)),
    MIPO(beta=0.3),
    MIPO(beta=0.3, partition=AboveTrimmedMean()),
    PlackettLuce(beta=0.3),
    PlackettLuce(beta=0.3, levels=3),
    MultiLevelMPO(beta=0.3),
    MultiLevelMPO(beta=0.3, levels=3),
    LiPO(beta=0.3),
]
MPO_LOSSES = [loss for loss in LOSSES if isinstance(loss, MPO) and loss.partition == AboveMean()]
each_loss = pytest.mark.parametrize("loss", LOSSES, ids=str)


def above_mean_set(scores: Tensor, valid: Tensor) -> Tensor:
    return AboveMean()(scores, valid)[0]


def row(*values: float) -> Tensor:
    """One group, float64 (1, n)."""
    return torch.tensor([values], dtype=torch.float64)


def full(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def value_of(loss: SetLoss, log_ratios: Tensor, scores: Tensor) -> float:
    """The loss of one group without padding."""
    return loss(log_ratios, scores, full(scores)).item()


def value_and_gradient(
    loss: SetLoss, log_ratios: Tensor, scores: Tensor, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    leaf = log_ratios.detach().clone().requires_grad_()
    values = loss(leaf, scores, full(scores) if valid is None else valid)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), gradient


# ------------------------------------------------------------------------------------ the oracle


def above_the_mean(scores: list[float]) -> list[bool]:
    exact = [Fraction(score) for score in scores]
    return [score * len(exact) > sum(exact) for score in exact]


def plain_sets(partition: Partition, scores: list[float]) -> tuple[list[int], list[int]]:
    """Indices of chosen and rejected responses, by what docs/mathematics.md says in words."""
    n, index = len(scores), range(len(scores))
    exact = [Fraction(score) for score in scores]
    ascending = sorted(exact)
    if isinstance(partition, TopBottom):
        k = min(partition.k, n // 2)
        if k == 0:
            return [], []
        worst, best = ascending[k - 1], ascending[n - k]
        chosen = [i for i in index if exact[i] >= best]
        rejected = [i for i in index if exact[i] <= worst]
        if best == worst:
            above = [i for i in index if exact[i] > best]
            below = [i for i in index if exact[i] < best]
            tied = [i for i in index if exact[i] == best]
            if not above and not below:
                return [], []
            return above or tied, below or tied
        return chosen, rejected
    if isinstance(partition, BestRest):
        threshold = None
        chosen = [i for i in index if exact[i] == max(exact)]
    else:
        if isinstance(partition, AboveMean):
            threshold = sum(exact) / n
        elif isinstance(partition, AboveThreshold):
            threshold = Fraction(partition.threshold)
        elif isinstance(partition, AboveTrimmedMean):
            cut = int(Fraction(str(partition.trim)) * n)
            kept = ascending[cut : n - cut]
            threshold = sum(kept) / len(kept)
        else:
            assert isinstance(partition, AboveQuantile)
            threshold = ascending[int(Fraction(str(partition.quantile)) * (n - 1))]
        chosen = [i for i in index if exact[i] > threshold]
        if not chosen and len(set(exact)) > 1 and not isinstance(partition, AboveThreshold):
            chosen = [i for i in index if exact[i] == threshold]
    return chosen, [i for i in index if i not in chosen]


def plain_masses(loss: MPO | EachMPO, log_ratios: list[float], scores: list[float]) -> list[float]:
    """Each response's mass ``exp(beta * r + w)``, gamma included."""
    n = len(scores)
    mean = sum(map(Fraction, scores)) / n
    delta = [float(Fraction(score) - mean) for score in scores]
    if loss.alpha_unit == "std":
        std = math.sqrt(sum(d * d for d in delta) / n)
        delta = [d / std if std else 0.0 for d in delta]
    masses = []
    rejected = plain_sets(loss.partition, scores)[1]
    for number, (r, d) in enumerate(zip(log_ratios, delta, strict=True)):
        sign = math.copysign(1.0, d) if loss.deviation == "signed" else 1.0
        weight = loss.alpha * sign * abs(d) ** loss.power
        masses.append(
            math.exp(loss.beta * r + weight) * (loss.gamma if number in rejected else 1.0)
        )
    return masses


def plain_mpo(loss: MPO, log_ratios: list[float], scores: list[float]) -> float:
    chosen, rejected = plain_sets(loss.partition, scores)
    if not chosen or not rejected:
        return 0.0
    masses = plain_masses(loss, log_ratios, scores)
    return -math.log(sum(masses[i] for i in chosen) / sum(masses[i] for i in chosen + rejected))


def plain_each_mpo(loss: EachMPO, log_ratios: list[float], scores: list[float]) -> float:
    chosen, rejected = plain_sets(loss.partition, scores)
    if not chosen or not rejected:
        return 0.0
    masses = plain_masses(loss, log_ratios, scores)
    against = sum(masses[j] for j in rejected)
    return -sum(math.log(masses[i] / (masses[i] + against)) for i in chosen) / len(chosen)


def plain_pairs(loss: PairLoss, scores: list[float]) -> list[tuple[int, int]]:
    index = range(len(scores))
    if loss.pairs == "all":
        return [(i, j) for i in index for j in index if scores[i] > scores[j]]
    if loss.pairs == "sets":
        chosen, rejected = plain_sets(loss.partition, scores)
        return [(i, j) for i in chosen for j in rejected]
    assert loss.pairs == "best-worst"
    best = scores.index(max(scores))
    worst = max(i for i in index if scores[i] == min(scores))
    return [(best, worst)] if scores[best] > scores[worst] else []


def plain_pair(loss: PairLoss, d: float) -> tuple[float, float]:
    """What a pair costs whose log-ratios differ by d, and the derivative by d."""
    h = loss.beta * d
    sigmoid = 1 / (1 + math.exp(-h))
    if isinstance(loss, IPO):
        return (d - 1 / (2 * loss.beta)) ** 2, 2 * (d - 1 / (2 * loss.beta))
    if isinstance(loss, Hinge):
        return max(0.0, 1 - h), -loss.beta if h < 1 else 0.0
    if isinstance(loss, SimPO):
        passed = 1 / (1 + math.exp(loss.beta * loss.margin - h))
        return -math.log(passed), -loss.beta * (1 - passed)
    if isinstance(loss, RobustDPO):
        f = loss.flipped
        value = -(1 - f) * math.log(sigmoid) + f * math.log(1 - sigmoid)
        slope = -(1 - f) * (1 - sigmoid) - f * sigmoid
        return value / (1 - 2 * f), loss.beta * slope / (1 - 2 * f)
    return math.log1p(math.exp(-h)), -loss.beta * (1 - sigmoid)


def plain_pair_loss(loss: PairLoss, log_ratios: list[float], scores: list[float]) -> float:
    pairs = plain_pairs(loss, scores)
    terms = [plain_pair(loss, log_ratios[i] - log_ratios[j])[0] for i, j in pairs]
    return sum(terms) / len(terms) if terms else 0.0


def plain_mean_margin(loss: MDPO | MIPO, log_ratios: list[float], scores: list[float]) -> float:
    chosen, rejected = plain_sets(loss.partition, scores)
    if not chosen or not rejected:
        return 0.0
    d = sum(log_ratios[i] for i in chosen) / len(chosen)
    d -= sum(log_ratios[j] for j in rejected) / len(rejected)
    if isinstance(loss, MIPO):
        return (d - 1 / (2 * loss.beta)) ** 2
    return math.log1p(math.exp(-loss.beta * d))


def plain_levels(loss: PlackettLuce | MultiLevelMPO, scores: list[float]) -> list[float]:
    if loss.levels is None or max(scores) == min(scores):
        return scores
    low, width = Fraction(min(scores)), Fraction(max(scores)) - Fraction(min(scores))
    bins = [int((Fraction(score) - low) / width * loss.levels) for score in scores]
    return [float(min(number, loss.levels - 1)) for number in bins]


def plain_level_shares(
    loss: PlackettLuce | MultiLevelMPO, scores: list[float]
) -> list[tuple[list[int], list[int]]]:
    """For each level but the lowest: whose mass is to be large, in whose total."""
    levels = plain_levels(loss, scores)
    index = range(len(levels))
    shares = []
    for level in sorted(set(levels))[1:]:
        if isinstance(loss, PlackettLuce):
            of_level = [i for i in index if levels[i] == level]
            shares.append((of_level, [i for i in index if levels[i] <= level]))
        else:
            shares.append(([i for i in index if levels[i] >= level], list(index)))
    return shares


def plain_level_loss(
    loss: PlackettLuce | MultiLevelMPO, log_ratios: list[float], scores: list[float]
) -> float:
    masses = [math.exp(loss.beta * r) for r in log_ratios]
    shares = plain_level_shares(loss, scores)
    total = -sum(
        math.log(sum(masses[i] for i in part) / sum(masses[i] for i in whole))
        for part, whole in shares
    )
    return total / len(shares) if isinstance(loss, MultiLevelMPO) and shares else total


def plain_lipo_weights(
    loss: LiPO, log_ratios: list[float], scores: list[float]
) -> dict[tuple[int, int], float]:
    index = range(len(scores))
    order = sorted(index, key=lambda i: (-log_ratios[i], -scores[i], i))
    rank = {i: place + 1 for place, i in enumerate(order)}
    width = max(scores) - min(scores)
    gain = [2 ** ((score - min(scores)) / width) if width else 1.0 for score in scores]
    return {
        (i, j): abs(gain[i] - gain[j]) * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
        for i in index
        for j in index
        if scores[i] > scores[j]
    }


def plain_lipo(loss: LiPO, log_ratios: list[float], scores: list[float]) -> float:
    return sum(
        weight * math.log1p(math.exp(-loss.beta * (log_ratios[i] - log_ratios[j])))
        for (i, j), weight in plain_lipo_weights(loss, log_ratios, scores).items()
    )


def plain_shares(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def plain_info_nca(loss: InfoNCA, log_ratios: list[float], scores: list[float]) -> float:
    targets = plain_shares([score / loss.temperature for score in scores])
    shares = plain_shares([loss.beta * r for r in log_ratios])
    return -sum(t * math.log(share) for t, share in zip(targets, shares, strict=True))


def plain_nca(loss: NCA, log_ratios: list[float], scores: list[float]) -> float:
    targets = plain_shares([score / loss.temperature for score in scores])
    total = 0.0
    for t, r in zip(targets, log_ratios, strict=True):
        sigmoid = 1 / (1 + math.exp(-loss.beta * r))
        total -= t * math.log(sigmoid) + math.log(1 - sigmoid) / len(scores)
    return total


def plain(loss: SetLoss, log_ratios: list[float], scores: list[float]) -> float:
    oracles: dict[type, Callable[..., float]] = {
        MPO: plain_mpo,
        EachMPO: plain_each_mpo,
        PairLoss: plain_pair_loss,
        MDPO: plain_mean_margin,
        MIPO: plain_mean_margin,
        PlackettLuce: plain_level_loss,
        MultiLevelMPO: plain_level_loss,
        LiPO: plain_lipo,
        InfoNCA: plain_info_nca,
        NCA: plain_nca,
    }
    oracle = next(found for kind, found in oracles.items() if isinstance(loss, kind))
    return oracle(loss, log_ratios, scores)


def ragged(count: int = 60, slots: int = 8, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios, scores and valid of groups with 1 to 7 responses at scattered slots; ties."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, slots, (count,), generator=generator)
    valid = torch.rand(count, slots, generator=generator).argsort(1) < sizes[:, None]
    log_ratios = 4 * torch.randn(count, slots, generator=generator, dtype=torch.float64)
    scores = torch.randint(0, 5, (count, slots), generator=generator).double()
    return log_ratios, scores, valid


# ------------------------------------------------------------------------------- sets and weights


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ([9, 7, 7, 4, 2, 1], [1, 1, 1, 0, 0, 0]),
        ([5, 3, 1], [1, 0, 0]),  # a response at the mean is rejected
        ([0.1, 0.2, 0.3], [0, 0, 1]),  # 0.2 is the mean as given, though not in binary
        ([1e6 + 0.1, 1e6 + 0.2, 1e6 + 0.3], [0, 0, 1]),
        ([1.0, 1.0 + 1e-12], [0, 1]),  # small is not equal
        ([1e6 + 0.11, 1e6 + 0.12], [0, 1]),  # equal in fp32
        ([-3.0, -1.0], [0, 1]),
        ([2.0], [0]),
    ],
    ids=str,
)
def test_chosen_set_is_what_scores_above_the_mean(scores: list[float], chosen: list[int]) -> None:
    values = row(*scores)
    assert above_mean_set(values, full(values)).tolist() == [[bool(c) for c in chosen]]


def test_chosen_set_equals_exact_fractions() -> None:
    _, scores, valid = ragged(count=200)
    found = above_mean_set(scores, valid)
    for group, mask, chosen in zip(scores, valid, found, strict=True):
        assert chosen[mask].tolist() == above_the_mean(group[mask].tolist())
        assert not chosen[~mask].any()


@pytest.mark.parametrize("n", [2, 3, 5, 7, 31, 100, 1001])
def test_equal_scores_are_equal_at_any_size_and_magnitude(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    score = torch.rand(300, 1, generator=generator, dtype=torch.float64) - 0.5
    scores = (score * torch.logspace(-9, 9, 300, dtype=torch.float64)[:, None]).repeat(1, n)
    assert deviations(scores, full(scores)).eq(0).all()


def test_deviations_are_computed_in_float64_whatever_comes_in() -> None:
    scores = torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 6.0]])
    found = deviations(scores, full(scores))
    assert found.dtype == torch.float64
    assert found.tolist() == [[0, 0, 0], [-2, -1, 3]]


def test_ordered_pairs_by_hand() -> None:
    """Scores 2, 1, 2 and a padded slot: the pairs are (0, 1) and (2, 1)."""
    found = ordered_pairs(row(2, 1, 2, 9), torch.tensor([[True, True, True, False]]))
    assert found.nonzero().tolist() == [[0, 0, 1], [0, 2, 1]]
    # Equal in fp32.
    close = row(1e6 + 0.12, 1e6 + 0.11)
    assert ordered_pairs(close, full(close)).nonzero().tolist() == [[0, 0, 1]]


def test_deviation_log_weights_by_hand() -> None:
    """Scores 6, 2, 1 have mean 3 and deviations 3, -1, -2; their variance is (9+1+4)/3 = 14/3."""
    scores, valid = row(6, 2, 1, 50), torch.tensor([[True, True, True, False]])

    def weights(**settings: Any) -> list[float]:
        return deviation_log_weights(scores, valid, **settings)[0].tolist()

    std = math.sqrt(14 / 3)
    assert weights(alpha=0.5) == [1.5, 0.5, 1.0, 0.0]
    assert weights(alpha=0.5, deviation="signed") == [1.5, -0.5, -1.0, 0.0]
    assert weights(alpha=0.5, power=2.0) == [4.5, 0.5, 2.0, 0.0]
    assert weights(alpha=0.5, power=2.0, deviation="signed") == [4.5, -0.5, -2.0, 0.0]
    assert weights(alpha=0.5, power=0.0) == [0.5, 0.5, 0.5, 0.0]
    assert weights(alpha=2.0, alpha_unit="std") == pytest.approx([6 / std, 2 / std, 4 / std, 0])


# --------------------------------------------------------------------------------- hand arithmetic


def test_mpo_by_hand() -> None:
    """Scores 5, 4, 1, 2 have mean 3: the first two are chosen.

    With beta = 1/2 and r = 2 ln 3, 2 ln 2, 0, 0 the masses are 3, 2, 1, 1, so the chosen set holds
    5/7 and the loss is ln(7/5). Within the chosen set p = 3/5, 2/5; over all q = 3, 2, 1, 1 over 7.
    Gradients: -beta p (1 - 5/7) = -3/35, -2/35 and beta q = 1/14, 1/14.
    """
    log_ratios = row(2 * math.log(3), 2 * math.log(2), 0, 0)
    values, gradient = value_and_gradient(MPO(beta=0.5), log_ratios, row(5, 4, 1, 2))
    assert values.item() == pytest.approx(math.log(7 / 5), rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([-3 / 35, -2 / 35, 1 / 14, 1 / 14], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 1 / 3),
        ({"alpha": math.log(2)}, 4 / 9),
        ({"alpha": math.log(2), "power": 2.0}, 16 / 33),
        ({"alpha": math.log(2), "deviation": "signed"}, 16 / 21),
        ({"alpha": math.log(2), "gamma": 3.0}, 4 / 19),
        ({"alpha": math.log(2) * math.sqrt(8 / 3), "alpha_unit": "std"}, 4 / 9),
        ({"gamma": 3.0}, 1 / 7),
    ],
    ids=str,
)
def test_weights_by_hand(settings: dict[str, Any], share: float) -> None:
    """Scores 5, 3, 1 have mean 3: only the first is chosen. Deviations 2, 0, -2, variance 8/3.

    At r = 0 the masses are the weights. With alpha = ln 2: absolute 4, 1, 4, hence 4/9; squared
    16, 1, 16, hence 16/33; signed 4, 1, 1/4, hence 16/21; gamma = 3 on the rejected 4, 3, 12, hence
    4/19. Dividing by the standard deviation sqrt(8/3) is undone by an alpha that large.
    """
    found = value_of(MPO(beta=0.1, **settings), row(0, 0, 0), row(5, 3, 1))
    assert found == pytest.approx(-math.log(share), rel=1e-12)


@pytest.mark.parametrize(
    ("deviation", "expected"),
    [
        ("absolute", [-0.348, -0.086, -0.086, 0.039, 0.160, 0.321]),
        ("signed", [-0.018, -0.004, -0.004, 0.020, 0.005, 0.002]),
    ],
)
@pytest.mark.parametrize("beta", [0.05, 1.0])
def test_gradients_of_the_two_kinds_of_deviation(
    deviation: Any, expected: list[float], beta: float
) -> None:
    """Scores 9, 7, 7, 4, 2, 1 (mean 5), alpha = 0.7, r = 0; gradients in units of beta.

    Absolute: w = 2.8, 1.4, 1.4, 0.7, 2.1, 2.8, masses 16.44, 4.06, 4.06, 2.01, 8.17, 16.44, sum
    51.18. The chosen hold 24.55, so 1 - sigma = .520 and the first gets -.520 * 16.44 / 24.55.
    Signed: w = 2.8, 1.4, 1.4, -0.7, -2.1, -2.8; the rejected hold .68 of 25.24.
    """
    loss = MPO(beta=beta, alpha=0.7, deviation=deviation)
    _, gradient = value_and_gradient(loss, torch.zeros(1, 6).double(), row(9, 7, 7, 4, 2, 1))
    assert (gradient[0] / beta).tolist() == pytest.approx(expected, abs=5.01e-4)


def test_dpo_by_hand() -> None:
    """Scores 3, 2, 1, beta = 1, r = ln 3, 0, ln 3.

    Pairs and margins: (0, 1) ln 3, (0, 2) 0, (1, 2) -ln 3, so sigmoids 3/4, 1/2, 1/4. Best against
    worst is the second alone: ln 2. All: (ln 4/3 + ln 2 + ln 4) / 3 = ln(32/3) / 3.
    """
    log_ratios, scores = row(math.log(3), 0, math.log(3)), row(3, 2, 1)
    assert value_of(DPO(beta=1), log_ratios, scores) == pytest.approx(math.log(2), rel=1e-12)
    found = value_of(DPO(beta=1, pairs="all"), log_ratios, scores)
    assert found == pytest.approx(math.log(32 / 3) / 3, rel=1e-12)


def test_info_nca_by_hand() -> None:
    """Temperature 2, S = 2 ln 3, 0: t = 3/4, 1/4. beta = 1/2, r = 0, 2 ln 4: shares 1/5, 4/5.

    The loss is 3/4 ln 5 + 1/4 ln 5/4; the gradient beta (share - t) = -11/40, +11/40.
    """
    values, gradient = value_and_gradient(
        InfoNCA(beta=0.5, temperature=2), row(0, 2 * math.log(4)), row(2 * math.log(3), 0)
    )
    assert values.item() == pytest.approx(math.log(5) - math.log(4) / 4, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([-11 / 40, 11 / 40], rel=1e-12)


def test_nca_by_hand() -> None:
    """Temperature 1, S = ln 3, 0: t = 3/4, 1/4. beta = 1, r = ln 3, 0: sigmoids 3/4, 1/2.

    The loss is -[3/4 ln 3/4 + 1/2 ln 1/4] - [1/4 ln 1/2 + 1/2 ln 1/2]; the gradient
    beta (sigmoid (t + 1/n) - t) = 3/4 * 5/4 - 3/4, 1/2 * 3/4 - 1/4 = 3/16, 1/8.
    """
    values, gradient = value_and_gradient(
        NCA(beta=1, temperature=1), row(math.log(3), 0), row(math.log(3), 0)
    )
    expected = -0.75 * math.log(0.75) - 0.5 * math.log(0.25) - 0.75 * math.log(0.5)
    assert values.item() == pytest.approx(expected, rel=1e-12)
    assert gradient[0].tolist() == pytest.approx([3 / 16, 1 / 8], rel=1e-12)


# ------------------------------------------------------------------------------ against the oracle


@each_loss
def test_ragged_groups_equal_plain_python(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged()
    found = loss(log_ratios, scores, valid)
    assert found.shape == (60,)
    for value, r, s, mask in zip(found, log_ratios, scores, valid, strict=True):
        expected = plain(loss, r[mask].tolist(), s[mask].tolist())
        assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-13)


@each_loss
def test_fp32_is_close_to_plain_python(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged(seed=1)
    found = loss(log_ratios.float(), scores, valid)
    assert found.dtype == torch.float32
    for value, r, s, mask in zip(found, log_ratios.float(), scores, valid, strict=True):
        expected = plain(loss, r[mask].tolist(), s[mask].tolist())
        assert value.item() == pytest.approx(expected, rel=1e-5, abs=2e-6)


@each_loss
def test_gradients_equal_their_closed_forms(loss: SetLoss) -> None:  # noqa: PLR0912, PLR0915 (a table)
    """docs/mathematics.md: the gradient of each loss, evaluated with plain Python numbers."""
    log_ratios, scores, valid = ragged(seed=2)
    _, gradients = value_and_gradient(loss, log_ratios, scores, valid)
    for gradient, r_, s_, mask in zip(gradients, log_ratios, scores, valid, strict=True):
        r, s = r_[mask].tolist(), s_[mask].tolist()
        n, expected = len(r), [0.0] * len(r)
        if isinstance(loss, MPO | EachMPO | MDPO | MIPO):
            chosen, rejected = plain_sets(loss.partition, s)
            if not chosen or not rejected:
                pass
            elif isinstance(loss, MPO):
                masses = plain_masses(loss, r, s)
                of_chosen = sum(masses[i] for i in chosen)
                total = of_chosen + sum(masses[j] for j in rejected)
                for i in chosen:
                    expected[i] = -loss.beta * masses[i] / of_chosen * (1 - of_chosen / total)
                for j in rejected:
                    expected[j] = loss.beta * masses[j] / total
            elif isinstance(loss, EachMPO):
                masses = plain_masses(loss, r, s)
                against = sum(masses[j] for j in rejected)
                for i in chosen:
                    missing = against / (masses[i] + against)
                    expected[i] = -loss.beta * missing / len(chosen)
                    for j in rejected:
                        expected[j] += loss.beta * missing * masses[j] / against / len(chosen)
            else:
                d = sum(r[i] for i in chosen) / len(chosen)
                d -= sum(r[j] for j in rejected) / len(rejected)
                slope = -loss.beta / (1 + math.exp(loss.beta * d))
                if isinstance(loss, MIPO):
                    slope = 2 * (d - 1 / (2 * loss.beta))
                for i in chosen:
                    expected[i] = slope / len(chosen)
                for j in rejected:
                    expected[j] = -slope / len(rejected)
        elif isinstance(loss, PairLoss):
            pairs = plain_pairs(loss, s)
            for i, j in pairs:
                slope = plain_pair(loss, r[i] - r[j])[1] / len(pairs)
                expected[i] += slope
                expected[j] -= slope
        elif isinstance(loss, LiPO):
            for (i, j), weight in plain_lipo_weights(loss, r, s).items():
                push = weight * loss.beta / (1 + math.exp(loss.beta * (r[i] - r[j])))
                expected[i] -= push
                expected[j] += push
        elif isinstance(loss, PlackettLuce | MultiLevelMPO):
            masses = [math.exp(loss.beta * x) for x in r]
            shares = plain_level_shares(loss, s)
            for part, whole in shares:
                size = len(shares) if isinstance(loss, MultiLevelMPO) else 1
                for i in whole:
                    expected[i] += loss.beta * masses[i] / sum(masses[k] for k in whole) / size
                for i in part:
                    expected[i] -= loss.beta * masses[i] / sum(masses[k] for k in part) / size
        else:
            assert isinstance(loss, InfoNCA | NCA)
            targets = plain_shares([score / loss.temperature for score in s])
            if isinstance(loss, InfoNCA):
                shares = plain_shares([loss.beta * x for x in r])
                expected = [loss.beta * (q - t) for q, t in zip(shares, targets, strict=True)]
            else:
                sigmoids = [1 / (1 + math.exp(-loss.beta * x)) for x in r]
                expected = [
                    loss.beta * (sigmoid * (t + 1 / n) - t)
                    for sigmoid, t in zip(sigmoids, targets, strict=True)
                ]
        assert gradient[mask].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-13)


@each_loss
def test_gradcheck(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged(count=4, slots=6, seed=3)
    inputs = log_ratios.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: loss(r, scores, valid), (inputs,))


@each_loss
def test_a_group_teaches_at_the_first_step_where_it_has_contrast(loss: SetLoss) -> None:
    """At r = 0, where training starts; InfoNCA's optimum is there if scores are equal."""
    _, scores, valid = ragged()
    contrast = loss.has_contrast(scores, valid)
    _, gradient = value_and_gradient(loss, torch.zeros_like(scores), scores, valid)
    taught = gradient.abs().amax(1) > 1e-15
    assert contrast.sum() > 20
    assert not (taught & ~contrast).any()
    if not isinstance(loss, InfoNCA | NCA):
        assert torch.equal(taught, contrast)
    chosen, rejected = loss.sets(scores, valid)
    assert not (chosen & rejected).any()
    assert not ((chosen | rejected) & ~valid).any()


# ---------------------------------------------------------------------------------- special cases


@pytest.mark.parametrize("loss", [MPO(beta=0.3), MPO(beta=0.3, alpha=2.0)], ids=str)
@pytest.mark.parametrize("swap", [False, True])
def test_two_responses_are_dpo(loss: MPO, swap: bool) -> None:
    """Absolute deviations of two responses are equal and cancel."""
    log_ratios = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double() * 9
    scores = row(7.0, 2.5).repeat(50, 1)
    expected = -logsigmoid(0.3 * (log_ratios[:, 0] - log_ratios[:, 1]))
    if swap:
        log_ratios, scores = log_ratios.flip(1), scores.flip(1)
    torch.testing.assert_close(loss(log_ratios, scores, full(scores)), expected, rtol=1e-10, atol=0)
    found = DPO(beta=0.3)(log_ratios, scores, full(scores))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_two_responses_with_signed_deviations_add_a_margin() -> None:
    """The weights are +-alpha (S+ - S-)/2, so alpha (S+ - S-) enters the sigmoid."""
    found = value_of(MPO(beta=0.3, alpha=0.2, deviation="signed"), row(1.5, 4.0), row(7.0, 2.5))
    expected = math.log1p(math.exp(-(0.3 * (1.5 - 4.0) + 0.2 * 4.5)))
    assert found == pytest.approx(expected, rel=1e-12)


def test_one_chosen_response_is_cross_entropy() -> None:
    log_ratios = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)).double() * 9
    scores = row(1, 0, 9, 1, 2).repeat(20, 1)
    found = MPO(beta=0.3)(log_ratios, scores, full(scores))
    expected = cross_entropy(0.3 * log_ratios, torch.full((20,), 2), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("scores", "chosen"), [([1, 2], 1), ([5, 4, 1, 2], 2), ([9, 9, 9, 9, 1], 4), ([9, 1, 1], 1)]
)
def test_the_first_step_has_a_known_loss(scores: list[float], chosen: int) -> None:
    """At r = 0 the loss is ln(n / number chosen)."""
    n = len(scores)
    found = value_of(MPO(), torch.zeros(1, n), row(*scores))
    assert found == pytest.approx(math.log(n / chosen), rel=1e-6)


def test_power_zero_is_mpo() -> None:
    log_ratios, scores, valid = ragged()
    found = MPO(beta=0.3, alpha=5.0, power=0.0)(log_ratios, scores, valid)
    expected = MPO(beta=0.3)(log_ratios, scores, valid)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_nca_of_a_sharp_pair_is_the_nca_pair_of_trl() -> None:
    log_ratios = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double() * 9
    scores = row(1.0, 0.0).repeat(50, 1)
    found = NCA(beta=0.3, temperature=1e-4)(log_ratios, scores, full(scores))
    winner, loser = (0.3 * log_ratios).unbind(1)
    expected = -logsigmoid(winner) - 0.5 * logsigmoid(-winner) - 0.5 * logsigmoid(-loser)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("pairs", ["best-worst", "all"])
def test_dpo_of_a_sharp_pair_is_info_nca(pairs: Any) -> None:
    log_ratios, scores = row(1.5, -2.0), row(1.0, 0.0)
    found = value_of(InfoNCA(beta=0.3, temperature=1e-4), log_ratios, scores)
    expected = value_of(DPO(beta=0.3, pairs=pairs), log_ratios, scores)
    assert found == pytest.approx(expected, rel=1e-12)


def test_best_worst_takes_the_first_best_and_the_last_worst() -> None:
    """Scores 1, 5, 5, 1, 1 and a padded 9: slot 1 against slot 4; at r = 0 the push is 1/2."""
    valid = torch.tensor([[True] * 5 + [False]])
    values, gradient = value_and_gradient(
        DPO(beta=1), torch.zeros(1, 6), row(1, 5, 5, 1, 1, 9), valid
    )
    assert values.item() == pytest.approx(math.log(2))
    assert gradient[0].tolist() == [0, -0.5, 0, 0, 0.5, 0]


# ------------------------------------------------------------------- what the gradients promise


@pytest.mark.parametrize("loss", MPO_LOSSES, ids=str)
def test_a_groups_gradients_sum_to_zero_and_push_by_what_is_unsolved(loss: MPO) -> None:
    """Either side is pushed by beta (1 - sigma), sigma being the chosen set's share."""
    log_ratios, scores, valid = ragged(seed=4)
    values, gradient = value_and_gradient(loss, log_ratios, scores, valid)
    torch.testing.assert_close(gradient.sum(1), torch.zeros(60).double(), rtol=0, atol=1e-14)
    push = loss.beta * (1 - (-values).exp())
    torch.testing.assert_close(gradient.clamp(min=0).sum(1), push, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(-gradient.clamp(max=0).sum(1), push, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", MPO_LOSSES, ids=str)
def test_mpo_is_nowhere_stationary(loss: MPO) -> None:
    """Each rejected response is pushed down and each chosen one up, at any finite log-ratios."""
    log_ratios, scores, valid = ragged(seed=5)
    chosen = above_mean_set(scores, valid)
    contrast = chosen.any(1)
    _, gradient = value_and_gradient(loss, log_ratios, scores, valid)
    assert contrast.sum() > 30
    assert (gradient[chosen] < 0).all()
    assert (gradient[valid & ~chosen & contrast[:, None]] > 0).all()


def test_the_winner_takes_all_within_the_above_mean_set() -> None:
    """Gradients of the chosen are as their masses: e^0.3 to 1 for log-ratios 1 and 0."""
    _, gradient = value_and_gradient(MPO(beta=0.3), row(1, 0, 5, -2), row(4, 4, 0, 0))
    assert (gradient[0, 0] / gradient[0, 1]).item() == pytest.approx(math.exp(0.3), rel=1e-12)


@pytest.mark.parametrize("constant", [0.0, -3.0, 40.0])
def test_info_nca_is_stationary_at_the_scores_up_to_a_constant(constant: float) -> None:
    scores = row(3.0, 1.0, 1.0, -2.0)
    loss = InfoNCA(beta=0.3, temperature=1.5)
    optimum = (scores / 1.5 + constant) / 0.3
    _, gradient = value_and_gradient(loss, optimum, scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    for slot in range(4):
        moved = optimum.clone()
        moved[0, slot] += 0.1
        assert value_of(loss, moved, scores) > value_of(loss, optimum, scores)


def test_nca_is_stationary_at_absolute_values() -> None:
    """At beta r = ln(n t), with t from plain Python; a constant more is not stationary."""
    scores = row(3.0, 1.0, 1.0, -2.0)
    loss = NCA(beta=0.3, temperature=1.5)
    targets = plain_shares([2.0, 2 / 3, 2 / 3, -4 / 3])
    optimum = row(*(math.log(4 * t) / 0.3 for t in targets))
    _, gradient = value_and_gradient(loss, optimum, scores)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)
    for move in (row(0.1, 0, 0, 0), row(0, 0, 0, 0.1), row(0.1, 0.1, 0.1, 0.1)):
        for moved in (optimum + move, optimum - move):
            assert value_of(loss, moved, scores) > value_of(loss, optimum, scores)


# --------------------------------------------------------------------------------- invariances


@each_loss
@pytest.mark.parametrize("filler", [math.nan, math.inf, -math.inf, 1e30], ids=str)
def test_padding_is_inert(loss: SetLoss, filler: float) -> None:
    """Anything may lie in padded slots, of log-ratios and of scores."""
    log_ratios, scores, valid = ragged(count=20)
    values, gradient = value_and_gradient(
        loss,
        torch.where(valid, log_ratios, filler),
        torch.where(valid, scores, filler),
        valid,
    )
    assert gradient[~valid].eq(0).all()
    assert gradient.isfinite().all()
    for number, mask in enumerate(valid):
        one = slice(number, number + 1)
        expected = value_and_gradient(loss, log_ratios[one, mask], scores[one, mask])
        torch.testing.assert_close(values[one], expected[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(gradient[one, mask], expected[1], rtol=1e-12, atol=1e-14)


@each_loss
def test_more_padding_changes_nothing(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged()
    values, gradient = value_and_gradient(loss, log_ratios, scores, valid)
    wider = [torch.nn.functional.pad(part, (2, 3)) for part in (log_ratios, scores, valid)]
    wide_values, wide_gradient = value_and_gradient(loss, *wider)
    torch.testing.assert_close(wide_values, values, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(wide_gradient[:, 2:-3], gradient, rtol=1e-12, atol=1e-14)


@each_loss
def test_order_of_responses_does_not_matter(loss: SetLoss) -> None:
    """Best-worst DPO breaks ties by order, so no two scores are equal here."""
    log_ratios, _, valid = ragged(seed=6)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(valid.shape, generator=generator, dtype=torch.float64)
    order = torch.rand(valid.shape, generator=generator).argsort(1)
    values, gradient = value_and_gradient(loss, log_ratios, scores, valid)
    turned_values, turned_gradient = value_and_gradient(
        loss, log_ratios.gather(1, order), scores.gather(1, order), valid.gather(1, order)
    )
    torch.testing.assert_close(turned_values, values, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(turned_gradient, gradient.gather(1, order), rtol=1e-11, atol=1e-13)


@each_loss
def test_groups_do_not_touch_each_other(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged()
    leaf = log_ratios.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, scores, valid)[7], leaf)
    assert gradient[7].abs().sum() > 0
    gradient[7] = 0
    assert gradient.eq(0).all()


@each_loss
def test_a_common_shift_of_log_ratios_cancels_but_in_nca(loss: SetLoss) -> None:
    """Only NCA says how likely responses should be, not merely in which proportion."""
    log_ratios, scores, valid = ragged()
    shift = torch.linspace(-30, 30, 60).double()[:, None]
    shifted = loss(log_ratios + shift, scores, valid)
    unshifted = loss(log_ratios, scores, valid)
    if isinstance(loss, NCA):
        assert (shifted - unshifted).abs().max() > 1
    else:
        torch.testing.assert_close(shifted, unshifted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.125, 1.0, 1000.0])
@pytest.mark.parametrize("offset", [-7.0, 1e6 + 0.1])
def test_mpo_does_not_see_unit_or_origin_of_scores(scale: float, offset: float) -> None:
    log_ratios, scores, valid = ragged()
    found = MPO(beta=0.3)(log_ratios, scale * scores + offset, valid)
    torch.testing.assert_close(found, MPO(beta=0.3)(log_ratios, scores, valid), rtol=0, atol=0)


def test_mpo_sees_more_of_the_scores_than_their_order() -> None:
    """0, 2, 3 have mean 5/3, two above; their cubes 0, 8, 27 have mean 35/3, one above."""
    scores = row(0, 2, 3)
    values = [value_of(MPO(), torch.zeros(1, 3).double(), s) for s in (scores, scores**3)]
    assert values == pytest.approx([math.log(3 / 2), math.log(3)])


@pytest.mark.parametrize("pairs", ["best-worst", "all"])
def test_dpo_sees_the_order_of_scores_only(pairs: Any) -> None:
    log_ratios, scores, valid = ragged()
    loss = DPO(beta=0.3, pairs=pairs)
    found = loss(log_ratios, scores.exp() - 100, valid)
    torch.testing.assert_close(found, loss(log_ratios, scores, valid), rtol=0, atol=0)


def test_std_unit_does_not_see_the_unit_of_scores() -> None:
    log_ratios, scores, valid = ragged()

    def values(scale: float, unit: Any) -> Tensor:
        loss = MPO(beta=0.3, alpha=0.7, alpha_unit=unit)
        return loss(log_ratios, scale * scores, valid)

    torch.testing.assert_close(values(0.01, "std"), values(1, "std"), rtol=1e-10, atol=1e-12)
    assert (values(0.01, "score") - values(1, "score")).abs().max() > 0.1


# --------------------------------------------------------------------------- edges and precision


@pytest.mark.parametrize(
    "loss",
    [
        *MPO_LOSSES,
        MPO(alpha=3.0, power=0.0, gamma=0.5),
        DPO(beta=0.3),
        # A hinge that is passed by far has no gradient either.
        *(loss for loss in LOSSES if isinstance(loss, PairLoss) and not isinstance(loss, Hinge)),
        EachMPO(beta=0.3, alpha=0.7),
        MPO(beta=0.3, partition=BestRest()),
        MPO(beta=0.3, partition=TopBottom()),
        MPO(beta=0.3, partition=AboveTrimmedMean()),
        MDPO(beta=0.3),
        MIPO(beta=0.3),
        PlackettLuce(beta=0.3, levels=3),
        MultiLevelMPO(beta=0.3),
        LiPO(beta=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "scores",
    [[0.1] * 3, [1e6 + 0.1] * 7, [-1 / 3] * 6, [0.0] * 2, [1e-9] * 5, [5.0]],
    ids=lambda scores: f"{len(scores)} x {scores[0]}",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_group_without_contrast_is_exactly_zero(
    loss: SetLoss, scores: list[float], dtype: torch.dtype
) -> None:
    """Its neighbour has the same scores and one more, which makes a contrast."""
    n = len(scores)
    valid = torch.tensor([[True] * n + [False], [True] * (n + 1)])
    both = torch.tensor([[*scores, scores[0] + 1]] * 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    log_ratios = 30 * torch.randn(2, n + 1, generator=generator, dtype=dtype)
    values, gradient = value_and_gradient(loss, log_ratios, both, valid)
    assert values[0].item() == 0
    assert gradient[0].eq(0).all()
    assert gradient[1].ne(0).any()


@each_loss
@pytest.mark.parametrize("chosen", [1e4, -1e4, 0.0])
@pytest.mark.parametrize("rejected", [1e4, -1e4])
def test_extremes_stay_finite_and_right(loss: SetLoss, chosen: float, rejected: float) -> None:
    """Log-ratios of 1e4, where ``exp(beta * r)`` overflows fp32 and fp64 alike."""
    scores = torch.tensor([[9.0, 7.0, 2.0, 1.0, 0.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    log_ratios = torch.tensor([[chosen, chosen - 1, rejected, rejected + 1, 0.0]])
    values, gradient = value_and_gradient(loss, log_ratios, scores, valid)
    assert gradient.isfinite().all()
    exact, exact_gradient = value_and_gradient(loss, log_ratios.double(), scores, valid)
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=2e-3)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-3, atol=1e-3)
    # Where it takes labels to be flipped, a large margin is worth more than nothing.
    assert values.item() >= 0 or isinstance(loss, RobustDPO)
    if chosen != rejected and (loss in MPO_LOSSES or loss == DPO(beta=0.3)):
        # In order it costs nothing, in the wrong order beta times the distance, weights aside.
        assert values.item() == pytest.approx(
            loss.beta * max(rejected - chosen, 0), rel=2e-2, abs=1e-3
        )


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_fp32(loss: SetLoss, dtype: torch.dtype) -> None:
    log_ratios, scores, valid = ragged()
    half = log_ratios.to(dtype)
    values, gradient = value_and_gradient(loss, half, scores, valid)
    expected, expected_gradient = value_and_gradient(loss, half.float(), scores, valid)
    assert values.dtype == torch.float32
    assert torch.equal(values, expected)
    assert torch.equal(gradient, expected_gradient.to(dtype))


@each_loss
def test_float64_stays_float64(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged()
    assert loss(log_ratios, scores, valid).dtype == torch.float64


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_precision_contexts_change_nothing(loss: SetLoss, dtype: torch.dtype) -> None:
    """Lightning's "bf16-true" changes torch's default dtype, "bf16-mixed" casts operations."""
    log_ratios, scores, valid = ragged()
    expected = value_and_gradient(loss, log_ratios.to(dtype), scores, valid)
    with HalfPrecision("bf16-true").forward_context():
        found = value_and_gradient(loss, log_ratios.to(dtype), scores, valid)
    assert all(map(torch.equal, found, expected))
    with torch.autocast("cpu", torch.bfloat16):
        found = value_and_gradient(loss, log_ratios.to(dtype), scores, valid)
    assert all(map(torch.equal, found, expected))


# ------------------------------------------------------------------------------------- settings


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
    ],
)
def test_other_settings_have_their_ranges(cls: type[SetLoss], field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^{cls.__name__}: {field} must be .*, got {value}\.$"):
        cls(**{field: value})


@dataclass(frozen=True, kw_only=True)
class Halved(MPO):
    """Somebody's own loss."""

    part: float = 0.5

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        return self.part * super().__call__(log_ratios, scores, valid)


def loss_from(class_path: str, **init_args: Any) -> SetLoss:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=SetLoss)
    config = parser.parse_object({"loss": {"class_path": class_path, "init_args": init_args}})
    return parser.instantiate_classes(config).loss


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("loss", [*LOSSES, Halved(beta=0.2, part=0.25)], ids=str)
def test_a_configuration_builds_each_loss(loss: SetLoss) -> None:
    cls = type(loss)
    given = {field.name: getattr(loss, field.name) for field in fields(loss) if field.init}
    assert loss_from(f"{cls.__module__}.{cls.__name__}", **given) == loss


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("MPO", {"aplha": 0.5}, "aplha"),
        ("DPO", {"alpha": 0.5}, "alpha"),
        ("InfoNCA", {"temprature": 0.5}, "temprature"),
        ("NCA", {"beta": 0.1, "tau": 1.0}, "tau"),
        ("DPO", {"pairs": "best_worst"}, "best_worst"),
        ("MPO", {"deviation": "squared"}, "squared"),
        ("MPO", {"alpha": "much"}, "much"),
    ],
)
def test_a_configuration_with_a_mistake_is_refused(
    name: str, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        loss_from(f"mpo_lightning.losses.{name}", **settings)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_configuration_with_an_impossible_value_is_refused() -> None:
    with pytest.raises(ValueError, match="MPO: beta must be"):
        loss_from("mpo_lightning.losses.MPO", beta=-0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DPO(pairs="best_worst"),
            "DPO: pairs must be one of best-worst, random, all, sets, got 'best_worst'",
        ),
        (lambda: MPO(deviation="typo"), "MPO: deviation must be one of absolute, signed"),
        (lambda: MPO(alpha_unit="sd"), "MPO: alpha_unit must be one of score, std"),
    ],
)
def test_misspelt_choices_are_refused_in_python_too(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_large_common_offset_costs_no_precision() -> None:
    ratios = torch.tensor([[0.3, -0.2, 0.1]])
    scores, valid = torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    # 1024 leaves the differences exact to 1e-4; the loss must not lose more.
    shifted = MPO(beta=1.0)(ratios + 1024, scores, valid)
    exact = MPO(beta=1.0)((ratios + 1024).double(), scores, valid)
    assert abs(shifted.double() - exact).item() < 2e-7
