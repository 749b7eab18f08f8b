"""Win rates of one model's responses against another's, raw and at equal length.

A *game* compares one response of each model to the same prompt. Several responses to a prompt make
a game of each pair; together these have the weight of one prompt. Prompts are the sample from a
population, so the bootstrap resamples prompts.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Estimate", "Games", "length_controlled_win_rate", "mean_over_prompts", "win_rate"]

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

# Of a two-sided 95 % interval.
QUANTILES = (0.025, 0.975)
NORMAL = 1.959963984540054
# Largest number of games times regressions that are fitted together, which bounds memory.
CHUNK = 4_000_000
# Most steps of Newton's method, and most halvings of one.
STEPS = 100


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: the value.
        low: lower end; NaN where the data do not determine it.
        high: upper end.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Games:
    """Games of two models.

    Attributes:
        outcomes: 1 where the first wins, 0 where the second does, 1/2 for a tie, (G,).
        length_differences: length of the first's response minus the second's, (G,).
        prompts: number of each game's prompt, from 0 and without gaps, (G,).
        difficulty: difficulty of each prompt, in any unit, (P,); None if it is not known.
    """

    outcomes: Floats
    length_differences: Floats
    prompts: Integers
    difficulty: Floats | None = None

    @property
    def weights(self) -> Floats:
        """Weight of each game, (G,): those of a prompt sum to one."""
        weights: Floats = 1 / np.bincount(self.prompts)[self.prompts]
        return weights

    def of_prompts(self, values: Floats) -> Floats:
        """Mean over the games of each prompt, (P,)."""
        means: Floats = np.bincount(self.prompts, self.weights * values).astype(np.float64)
        return means


def win_rate(games: Games) -> Estimate:
    """Mean outcome over prompts, with Wilson's score interval.

    Wilson's interval keeps its coverage for a rate near 0 or 1 and for few prompts, where a
    bootstrap of equal outcomes has no width at all. It assumes Bernoulli outcomes, 0 or 1. Ties,
    and several games a prompt, vary less than those of the same mean: the number of prompts n is
    replaced by the effective n p (1 - p) / s^2, where s^2 is the variance over prompts. Without
    ties that is n - 1; where all prompts agree it is n.
    """
    values = games.of_prompts(games.outcomes)
    rate, count = float(values.mean()), float(len(values))
    variance = float(values.var(ddof=1)) if len(values) > 1 else 0.0
    if variance > 0:
        count *= rate * (1 - rate) / variance
    scale = 1 + NORMAL**2 / count
    centre = (rate + NORMAL**2 / (2 * count)) / scale
    reach = NORMAL / scale * np.sqrt(rate * (1 - rate) / count + NORMAL**2 / (4 * count**2))
    return Estimate(rate, max(0.0, float(centre - reach)), min(1.0, float(centre + reach)))


def mean_over_prompts(values: Floats, *, resamples: int, seed: int) -> Estimate:
    """Mean of one value a prompt, with a percentile bootstrap interval.

    Args:
        values: (P,).
        resamples: number of bootstrap samples.
        seed: seed of the draws.
    """
    counts = _resampled(len(values), resamples, seed)
    means = counts @ values / len(values)
    low, high = np.quantile(means, QUANTILES)
    return Estimate(float(values.mean()), float(low), float(high))


def length_controlled_win_rate(games: Games, *, resamples: int, seed: int) -> Estimate | None:
    """Win rate expected if both models' responses were equally long.

    Logistic regression as in AlpacaEval 2 (arXiv 2404.04475, equation 2), without the terms of its
    leaderboard: the probability that the first model wins game g is ::

        sigmoid(theta + phi tanh(d_g / s) + psi gamma_g)

    where d is the difference in length, s its standard deviation and gamma the prompt's
    standardised difficulty (no such term if it is not given). The controlled rate is the mean of
    sigmoid(theta + psi gamma) over prompts. Each coefficient has a log-F(1, 1) prior, which is one
    more game with outcome 1/2 and this coefficient alone (Greenland and Mansournia 2015): the fit
    is finite even if one side always wins. The interval is a percentile bootstrap over prompts;
    there is none where all outcomes are equal.

    Args:
        games: the games.
        resamples: number of bootstrap samples.
        seed: seed of the draws.

    Returns:
        None if all lengths differ by the same number, other than zero: quality and length are not
        identified then.
    """
    spread = float(games.length_differences.std())
    if spread == 0 and games.length_differences.any():
        return None
    columns = [np.ones_like(games.outcomes)]
    if spread > 0:
        columns.append(np.tanh(games.length_differences / spread))
    gamma = np.zeros(0)
    if games.difficulty is not None and games.difficulty.std() > 0:
        gamma = (games.difficulty - games.difficulty.mean()) / games.difficulty.std()
        columns.append(gamma[games.prompts])
    design = np.stack(columns, axis=1)

    def controlled(counts: Floats) -> Floats:
        """Return the rate, (R,), of bootstrap samples with these counts of each prompt, (R, P)."""
        weights = games.weights * counts[:, games.prompts]
        coefficients = fit_logistic(design, games.outcomes, weights)
        at_equal_length = coefficients[:, :1]
        if len(gamma):
            at_equal_length = at_equal_length + coefficients[:, -1:] * gamma
        rates = _sigmoid(np.broadcast_to(at_equal_length, counts.shape))
        means: Floats = (rates * counts).sum(1) / counts.sum(1)
        return means

    prompts = len(np.bincount(games.prompts))
    value = float(controlled(np.ones((1, prompts)))[0])
    if (games.outcomes == games.outcomes[0]).all():
        return Estimate(value, np.nan, np.nan)
    counts = _resampled(prompts, resamples, seed)
    size = max(1, CHUNK // len(games.outcomes))
    parts = [controlled(counts[at : at + size]) for at in range(0, resamples, size)]
    low, high = np.quantile(np.concatenate(parts), QUANTILES)
    return Estimate(value, float(low), float(high))


def _resampled(count: int, resamples: int, seed: int) -> Floats:
    """Draw bootstrap samples of prompts: how often each one is in each sample, (R, P)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), resamples).astype(np.float64)


def _sigmoid(value: Any) -> Any:
    return np.exp(-np.logaddexp(0, -value))


def fit_logistic(design: Floats, outcomes: Floats, weights: Floats) -> Floats:
    """Fit several weighted logistic regressions at once, by Newton's method.

    They maximise the likelihood, which takes any outcome from 0 to 1, under log-F(1, 1) priors. It
    is strictly concave, so the maximum is unique.

    Args:
        design: explanatory variables, (G, K).
        outcomes: (G,).
        weights: weight of each game in each regression, (R, G).

    Returns:
        Coefficients, (R, K).

    Raises:
        ArithmeticError: if a regression does not converge.
    """
    # The priors, as games: each coefficient alone, with outcome 1/2.
    count = design.shape[1]
    design = np.concatenate([design, np.eye(count)])
    outcomes = np.concatenate([outcomes, np.full(count, 0.5)])
    weights = np.concatenate([weights, np.ones((len(weights), count))], axis=1)
    squares = (design[:, :, None] * design[:, None, :]).reshape(len(design), -1)
    coefficients = np.zeros((len(weights), count))

    def loss(at: Floats) -> Floats:
        scores = at @ design.T
        losses = np.logaddexp(0, scores) - outcomes * scores
        total: Floats = (weights * losses).sum(1)
        return total

    current = loss(coefficients)
    for _ in range(STEPS):
        chance = _sigmoid(coefficients @ design.T)
        gradient = (weights * (chance - outcomes)) @ design
        curvature = (weights * chance * (1 - chance)) @ squares
        shaped = curvature.reshape(len(weights), count, count)
        step = np.linalg.solve(shaped, gradient[:, :, None])[:, :, 0]
        if np.abs(step).max() < 1e-9:
            return coefficients
        # Halved where a full step would overshoot.
        length = np.ones((len(weights), 1))
        for _ in range(STEPS):
            tried = loss(coefficients - length * step)
            worse = tried > current + 1e-12 * np.abs(current)
            if not worse.any():
                break
            length[worse] /= 2
        coefficients = coefficients - length * step
        current = tried
    raise ArithmeticError("A logistic regression did not converge.")
