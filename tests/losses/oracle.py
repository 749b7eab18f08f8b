"""The losses in plain Python.

Exact fractions for sets and ``math`` on Python floats for values; no padding and no log space.
"""

import math
from collections.abc import Callable
from fractions import Fraction

from mpo_lightning.losses import (
    GVPO,
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
    EachAgainstBelow,
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
)
from mpo_lightning.losses.lists import LevelLoss


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


def plain_weights(loss: MPO | EachMPO, scores: list[float]) -> list[float]:
    """Each response's weight ``exp(w)``, without gamma."""
    n = len(scores)
    mean = sum(map(Fraction, scores)) / n
    delta = [float(Fraction(score) - mean) for score in scores]
    if loss.alpha_unit == "std":
        std = math.sqrt(sum(d * d for d in delta) / n)
        delta = [d / std if std else 0.0 for d in delta]
    weights = []
    for d in delta:
        sign = math.copysign(1.0, d) if loss.deviation == "signed" else 1.0
        weights.append(math.exp(loss.alpha * sign * abs(d) ** loss.power))
    return weights


def plain_masses(loss: MPO, log_ratios: list[float], scores: list[float]) -> list[float]:
    """Each response's mass ``exp(beta * r + w)``, gamma included."""
    rejected = plain_sets(loss.partition, scores)[1]
    return [
        math.exp(loss.beta * r) * weight * (loss.gamma if number in rejected else 1.0)
        for number, (r, weight) in enumerate(
            zip(log_ratios, plain_weights(loss, scores), strict=True)
        )
    ]


def plain_mpo(loss: MPO, log_ratios: list[float], scores: list[float]) -> float:
    chosen, rejected = plain_sets(loss.partition, scores)
    if not chosen or not rejected:
        return 0.0
    masses = plain_masses(loss, log_ratios, scores)
    return -math.log(sum(masses[i] for i in chosen) / sum(masses[i] for i in chosen + rejected))


def plain_each_parts(
    loss: EachMPO, log_ratios: list[float], scores: list[float]
) -> tuple[dict[int, float], dict[int, float], dict[int, float]]:
    """Of each chosen response: its share, and what it lacks; of each rejected one: its mass."""
    chosen, rejected = plain_sets(loss.partition, scores)
    if not chosen or not rejected:
        return {}, {}, {}
    weights = plain_weights(loss, scores)
    shares = {i: weights[i] / sum(weights[k] for k in chosen) for i in chosen}
    mean = sum(weights[k] for k in rejected) / len(rejected)
    masses = {
        j: loss.gamma * weights[j] / mean * math.exp(loss.beta * log_ratios[j]) for j in rejected
    }
    total = sum(masses.values())
    lacking = {i: total / (math.exp(loss.beta * log_ratios[i]) + total) for i in chosen}
    return shares, lacking, masses


def plain_each_mpo(loss: EachMPO, log_ratios: list[float], scores: list[float]) -> float:
    shares, lacking, _ = plain_each_parts(loss, log_ratios, scores)
    return -sum(share * math.log(1 - lacking[i]) for i, share in shares.items())


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


def plain_levels(loss: LevelLoss, scores: list[float]) -> list[float]:
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


def mpo_gradient(loss: MPO, log_ratios: list[float], scores: list[float]) -> list[float]:
    chosen, rejected = plain_sets(loss.partition, scores)
    found = [0.0] * len(scores)
    if not chosen or not rejected:
        return found
    masses = plain_masses(loss, log_ratios, scores)
    of_chosen = sum(masses[i] for i in chosen)
    total = of_chosen + sum(masses[j] for j in rejected)
    for i in chosen:
        found[i] = -loss.beta * masses[i] / of_chosen * (1 - of_chosen / total)
    for j in rejected:
        found[j] = loss.beta * masses[j] / total
    return found


def each_mpo_gradient(loss: EachMPO, log_ratios: list[float], scores: list[float]) -> list[float]:
    found = [0.0] * len(scores)
    shares, lacking, masses = plain_each_parts(loss, log_ratios, scores)
    for i, share in shares.items():
        found[i] = -loss.beta * share * lacking[i]
    for j, mass in masses.items():
        found[j] = -sum(found[i] for i in shares) * mass / sum(masses.values())
    return found


def mean_margin_gradient(
    loss: MDPO | MIPO, log_ratios: list[float], scores: list[float]
) -> list[float]:
    chosen, rejected = plain_sets(loss.partition, scores)
    found = [0.0] * len(scores)
    if not chosen or not rejected:
        return found
    d = sum(log_ratios[i] for i in chosen) / len(chosen)
    d -= sum(log_ratios[j] for j in rejected) / len(rejected)
    slope = -loss.beta / (1 + math.exp(loss.beta * d))
    if isinstance(loss, MIPO):
        slope = 2 * (d - 1 / (2 * loss.beta))
    for i in chosen:
        found[i] = slope / len(chosen)
    for j in rejected:
        found[j] = -slope / len(rejected)
    return found


def pair_gradient(loss: PairLoss, log_ratios: list[float], scores: list[float]) -> list[float]:
    found = [0.0] * len(scores)
    pairs = plain_pairs(loss, scores)
    for i, j in pairs:
        slope = plain_pair(loss, log_ratios[i] - log_ratios[j])[1] / len(pairs)
        found[i] += slope
        found[j] -= slope
    return found


def lipo_gradient(loss: LiPO, log_ratios: list[float], scores: list[float]) -> list[float]:
    found = [0.0] * len(scores)
    for (i, j), weight in plain_lipo_weights(loss, log_ratios, scores).items():
        push = weight * loss.beta / (1 + math.exp(loss.beta * (log_ratios[i] - log_ratios[j])))
        found[i] -= push
        found[j] += push
    return found


def level_gradient(
    loss: PlackettLuce | MultiLevelMPO, log_ratios: list[float], scores: list[float]
) -> list[float]:
    found = [0.0] * len(scores)
    masses = [math.exp(loss.beta * r) for r in log_ratios]
    shares = plain_level_shares(loss, scores)
    size = len(shares) if isinstance(loss, MultiLevelMPO) else 1
    for part, whole in shares:
        for i in whole:
            found[i] += loss.beta * masses[i] / sum(masses[k] for k in whole) / size
        for i in part:
            found[i] -= loss.beta * masses[i] / sum(masses[k] for k in part) / size
    return found


def info_nca_gradient(loss: InfoNCA, log_ratios: list[float], scores: list[float]) -> list[float]:
    targets = plain_shares([score / loss.temperature for score in scores])
    shares = plain_shares([loss.beta * r for r in log_ratios])
    return [loss.beta * (share - t) for share, t in zip(shares, targets, strict=True)]


def nca_gradient(loss: NCA, log_ratios: list[float], scores: list[float]) -> list[float]:
    targets = plain_shares([score / loss.temperature for score in scores])
    sigmoids = [1 / (1 + math.exp(-loss.beta * r)) for r in log_ratios]
    return [
        loss.beta * (sigmoid * (t + 1 / len(scores)) - t)
        for sigmoid, t in zip(sigmoids, targets, strict=True)
    ]


def plain_below(loss: EachAgainstBelow, scores: list[float]) -> dict[int, list[int]]:
    """Of each response that has lower ones: which."""
    levels = plain_levels(loss, scores)
    index = range(len(levels))
    below = {i: [j for j in index if levels[j] < levels[i]] for i in index}
    return {i: lower for i, lower in below.items() if lower}


def plain_each_below(loss: EachAgainstBelow, log_ratios: list[float], scores: list[float]) -> float:
    masses = [math.exp(loss.beta * r) for r in log_ratios]
    terms = [
        math.log(1 + sum(masses[j] for j in lower) / masses[i])
        for i, lower in plain_below(loss, scores).items()
    ]
    return sum(terms) / len(terms) if terms else 0.0


def each_below_gradient(
    loss: EachAgainstBelow, log_ratios: list[float], scores: list[float]
) -> list[float]:
    found = [0.0] * len(scores)
    masses = [math.exp(loss.beta * r) for r in log_ratios]
    below = plain_below(loss, scores)
    for i, lower in below.items():
        total = masses[i] + sum(masses[j] for j in lower)
        for j in lower:
            found[j] += loss.beta * masses[j] / total / len(below)
            found[i] -= loss.beta * masses[j] / total / len(below)
    return found


def plain_regression_errors(
    loss: GVPO, log_ratios: list[float], scores: list[float]
) -> list[float]:
    """Each reward less its target, by the papers' formulas divided by the temperature."""
    n, tau, strength = len(scores), loss.temperature, loss.temperature * loss.beta
    if loss.target == "centred":
        rewards = [strength * r for r in log_ratios]
        return [
            ((reward - sum(rewards) / n) - (score - sum(scores) / n)) / tau
            for reward, score in zip(rewards, scores, strict=True)
        ]
    if loss.target == "advantage":
        optimal = strength * math.log(sum(math.exp(score / strength) for score in scores) / n)
        return [
            (strength * r - (score - optimal)) / tau
            for r, score in zip(log_ratios, scores, strict=True)
        ]
    log_z = math.log(strength * (math.exp(1 / strength) - 1))
    quantiles = [
        (sum(other < score for other in scores) + scores.count(score) / 2) / n for score in scores
    ]
    return [
        -(quantile - strength * log_z - strength * r) / tau
        for quantile, r in zip(quantiles, log_ratios, strict=True)
    ]


def plain_gvpo(loss: GVPO, log_ratios: list[float], scores: list[float]) -> float:
    return sum(e * e for e in plain_regression_errors(loss, log_ratios, scores)) / len(scores)


def gvpo_gradient(loss: GVPO, log_ratios: list[float], scores: list[float]) -> list[float]:
    errors = plain_regression_errors(loss, log_ratios, scores)
    return [2 * loss.beta * error / len(scores) for error in errors]


Oracle = tuple[Callable[..., float], Callable[..., list[float]]]
ORACLES: dict[type, Oracle] = {
    MPO: (plain_mpo, mpo_gradient),
    EachMPO: (plain_each_mpo, each_mpo_gradient),
    PairLoss: (plain_pair_loss, pair_gradient),
    MDPO: (plain_mean_margin, mean_margin_gradient),
    MIPO: (plain_mean_margin, mean_margin_gradient),
    PlackettLuce: (plain_level_loss, level_gradient),
    MultiLevelMPO: (plain_level_loss, level_gradient),
    LiPO: (plain_lipo, lipo_gradient),
    InfoNCA: (plain_info_nca, info_nca_gradient),
    NCA: (plain_nca, nca_gradient),
    EachAgainstBelow: (plain_each_below, each_below_gradient),
    GVPO: (plain_gvpo, gvpo_gradient),
}


def oracle_of(loss: SetLoss) -> Oracle:
    return next(found for kind, found in ORACLES.items() if isinstance(loss, kind))


def plain(loss: SetLoss, log_ratios: list[float], scores: list[float]) -> float:
    """The loss of one group."""
    return oracle_of(loss)[0](loss, log_ratios, scores)


def plain_gradient(loss: SetLoss, log_ratios: list[float], scores: list[float]) -> list[float]:
    """The gradient of one group's loss, by the closed forms of docs/mathematics.md."""
    return oracle_of(loss)[1](loss, log_ratios, scores)
