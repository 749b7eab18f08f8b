"""Win rates by hand and against scipy; length taken out of a judge that likes it."""

from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

from mpo_lightning.evaluation.win_rates import (
    Games,
    fit_logistic,
    length_controlled_win_rate,
    mean_over_prompts,
    win_rate,
)

DRAWS = {"resamples": 100, "seed": 0}


def one_each(outcomes: Any, lengths: Any = 0.0, difficulty: Any = None) -> Games:
    """One game a prompt."""
    values = np.asarray(outcomes, dtype=float)
    differences = np.broadcast_to(np.asarray(lengths, dtype=float), values.shape)
    return Games(values, differences, np.arange(len(values)), difficulty)


def judged(
    count: int, *, quality: float, taste: float, longer: float, seed: int, hard: float = 0.0
) -> Games:
    """A judge to whom a response is worth its quality and its length, and who is not certain."""
    random = np.random.default_rng(seed)
    lengths = random.normal(longer, 100.0, count)
    difficulty = random.normal(size=count)
    odds = quality + taste * np.tanh(lengths / lengths.std()) + hard * difficulty
    wins = random.random(count) < 1 / (1 + np.exp(-odds))
    return one_each(wins, lengths, difficulty if hard else None)


def test_win_rate_by_hand() -> None:
    """6 wins of 11: s^2 = 11/10 p (1 - p), so 10 tosses; a tie lessens it."""
    found = win_rate(one_each([1.0] * 6 + [0.0] * 5))
    z, p = 1.96, 6 / 11
    centre, reach = (p + z**2 / 20) / (1 + z**2 / 10), z * (p * (1 - p) / 10 + z**2 / 400) ** 0.5
    assert found.value == p
    assert found.low == pytest.approx(centre - reach / (1 + z**2 / 10), abs=1e-4)
    assert found.high == pytest.approx(centre + reach / (1 + z**2 / 10), abs=1e-4)
    ties = win_rate(one_each([1.0] * 2 + [0.0] + [0.5] * 8))
    assert ties.value == p
    assert ties.high - ties.low < found.high - found.low


@pytest.mark.parametrize("outcome", [0.0, 1.0, 0.5])
def test_prompts_that_agree_have_wilsons_interval(outcome: float) -> None:
    found = win_rate(one_each([outcome] * 20))
    low, high = stats.binomtest(int(20 * outcome), 20).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


def test_intervals_hold_what_they_promise() -> None:
    """With many ties and with several games a prompt, over repeated samples."""
    random = np.random.default_rng(1)
    values = {"ties": np.array([0.0, 0.5, 1.0]), "several": np.arange(9) / 8}
    shares = {"ties": [0.1, 0.7, 0.2], "several": stats.binom.pmf(range(9), 8, 0.6)}
    for name, of_prompt in values.items():
        truth = float(of_prompt @ shares[name])
        held = [
            (found := win_rate(one_each(random.choice(of_prompt, 60, p=shares[name])))).low
            <= truth
            <= found.high
            for _ in range(600)
        ]
        assert 0.92 <= np.mean(held) <= 0.98, name


def test_several_games_of_a_prompt_share_its_weight() -> None:
    games = Games(np.array([1.0, 1.0, 0.0, 0.5, 0.0]), np.zeros(5), np.array([0, 0, 0, 0, 1]), None)
    # (2.5 / 4 + 0) / 2
    assert win_rate(games).value == pytest.approx(0.3125)


def test_bootstrap_of_a_mean_is_near_students_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 200)
    found = mean_over_prompts(values, resamples=4000, seed=0)
    low, high = stats.t.interval(0.95, 199, loc=values.mean(), scale=stats.sem(values))
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), low, high), abs=0.03
    )


def test_logistic_fits_against_scipy() -> None:
    """The same maximum by another method, from the penalised likelihood as it is defined."""
    random = np.random.default_rng(2)
    design = np.column_stack([np.ones(50), random.normal(size=(50, 2))])
    outcomes = random.choice([0.0, 0.5, 1.0], 50)
    weights = random.integers(0, 4, (3, 50)).astype(float)

    def negative(at: Any, weight: Any) -> float:
        chance = 1 / (1 + np.exp(-design @ at))
        data = weight * (outcomes * np.log(chance) + (1 - outcomes) * np.log1p(-chance))
        # The density of log-F(1, 1) is proportional to exp(b / 2) / (1 + exp(b)).
        prior = at / 2 - np.log1p(np.exp(at))
        return float(-data.sum() - prior.sum())

    for found, weight in zip(fit_logistic(design, outcomes, weights), weights, strict=True):
        expected = optimize.minimize(
            negative, np.zeros(3), args=(weight,), method="BFGS", options={"gtol": 1e-9}
        )
        assert found == pytest.approx(expected.x, abs=1e-5)
        assert negative(found, weight) <= expected.fun + 1e-12


@pytest.mark.parametrize("longer", [-80.0, 120.0])
def test_a_judge_that_likes_length_is_seen_through(longer: float) -> None:
    """At equal length the policy wins 60 %; that it is longer, or shorter, decides the raw rate."""
    games = judged(3000, quality=np.log(1.5), taste=1.5, longer=longer, seed=3)
    raw = win_rate(games)
    controlled = length_controlled_win_rate(games, **DRAWS)
    assert controlled is not None
    assert abs(raw.value - 0.6) > 0.1
    assert (raw.value > 0.6) == (longer > 0)
    assert controlled.value == pytest.approx(0.6, abs=0.025)
    assert controlled.low < 0.6 < controlled.high
    assert controlled.high - controlled.low < 0.1


def test_a_judge_that_ignores_length_gives_both_alike() -> None:
    games = judged(3000, quality=0.4, taste=0.0, longer=100.0, seed=4)
    controlled = length_controlled_win_rate(games, **DRAWS)
    assert controlled is not None
    assert controlled.value == pytest.approx(win_rate(games).value, abs=0.02)


def test_difficulty_is_averaged_over() -> None:
    """The mean over prompts is not the rate of the mean prompt."""
    games = judged(3000, quality=1.0, taste=1.0, longer=100.0, seed=5, hard=2.0)
    controlled = length_controlled_win_rate(games, **DRAWS)
    assert controlled is not None
    gamma = np.random.default_rng(6).normal(size=100_000)
    truth = float(np.mean(1 / (1 + np.exp(-(1 + 2 * gamma)))))
    assert truth < 1 / (1 + np.exp(-1.0)) - 0.05
    assert controlled.value == pytest.approx(truth, abs=0.02)


def test_exchange_and_comparison_with_itself() -> None:
    games = judged(300, quality=0.5, taste=1.0, longer=60.0, seed=7)
    exchanged = one_each(1 - games.outcomes, -games.length_differences)
    one, other = (length_controlled_win_rate(g, **DRAWS) for g in (games, exchanged))
    assert one is not None
    assert other is not None
    assert one.value == pytest.approx(1 - other.value, abs=1e-8)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low), abs=1e-8)
    itself = length_controlled_win_rate(one_each([0.5] * 40), **DRAWS)
    assert itself is not None
    assert itself.value == pytest.approx(0.5, abs=1e-12)


def test_what_cannot_be_told() -> None:
    """All equally much longer: no rate. All won: a rate short of one, without an interval."""
    assert length_controlled_win_rate(one_each([1, 0, 1], 30.0), **DRAWS) is None
    found = length_controlled_win_rate(one_each([1.0] * 30), **DRAWS)
    assert found is not None
    # One more game, half won: (30 + .5) / 31.
    assert found.value == pytest.approx(30.5 / 31, abs=1e-9)
    assert np.isnan(found.low)
    # The longer one wins always: its length is what wins, as far as can be told.
    lengths = np.array([50.0, -50.0, 30.0, -30.0, 90.0, -90.0] * 10)
    found = length_controlled_win_rate(one_each(lengths > 0, lengths), **DRAWS)
    assert found is not None
    assert found.value == pytest.approx(0.5, abs=1e-9)
