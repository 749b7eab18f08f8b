"""Partition rules by hand, against exact fractions, and what they promise about ties and order."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_lightning.losses import (
    AboveMean,
    AboveQuantile,
    AboveThreshold,
    AboveTrimmedMean,
    BestRest,
    Partition,
    TopBottom,
)
from tests.losses.family import ragged
from tests.losses.oracle import plain_sets

RULES: list[Partition] = [
    AboveMean(),
    AboveQuantile(),
    AboveQuantile(quantile=0.0),
    AboveQuantile(quantile=0.8),
    AboveThreshold(threshold=2.0),
    AboveTrimmedMean(),
    AboveTrimmedMean(trim=0.4),
    TopBottom(k=1),
    TopBottom(k=2),
    BestRest(),
]
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def letters(rule: Partition, scores: list[float]) -> str:
    """The sets as a word: c chosen, r rejected, - neither."""
    values = torch.tensor([scores], dtype=torch.float64)
    chosen, rejected = rule(values, torch.ones_like(values, dtype=torch.bool))
    assert not (chosen & rejected).any()
    pairs = zip(chosen[0].tolist(), rejected[0].tolist(), strict=True)
    return "".join("c" if c else "r" if r else "-" for c, r in pairs)


@pytest.mark.parametrize(
    ("rule", "scores", "expected"),
    [
        (AboveMean(), [9, 7, 7, 4, 2, 1], "cccrrr"),
        (AboveMean(), [5, 3, 1], "crr"),  # a response at the mean is rejected
        (AboveMean(), [0.1, 0.2, 0.3], "rrc"),  # 0.2 is the mean as given, though not in binary
        (AboveMean(), [1e6 + 0.1, 1e6 + 0.2, 1e6 + 0.3], "rrc"),
        (AboveMean(), [1.0, 1.0 + 1e-12], "rc"),  # small is not equal
        (AboveMean(), [1e6 + 0.11, 1e6 + 0.12], "rc"),  # equal in fp32
        (AboveMean(), [-3.0, -1.0], "rc"),
        (AboveMean(), [2.0], "r"),
        (AboveMean(), [100, 7, 7, 4, 2, 1], "crrrrr"),  # an outlier takes the mean with it
        (AboveQuantile(), [100, 7, 6, 4, 2, 1], "cccrrr"),  # and leaves the median
        (AboveQuantile(), [5, 4, 3, 2, 1], "ccrrr"),  # the median itself is rejected
        (AboveQuantile(), [3, 3, 3, 1], "cccr"),  # nothing above: those at it
        (AboveQuantile(), [5, 3, 3, 1], "crrr"),
        (AboveQuantile(), [2, 2, 2], "rrr"),
        (AboveQuantile(quantile=0.75), [5, 4, 3, 2, 1], "crrrr"),
        (AboveQuantile(quantile=0.0), [5, 4, 3, 1, 1], "cccrr"),
        (AboveThreshold(threshold=3), [5, 3, 1], "crr"),
        (AboveThreshold(threshold=3), [5, 4], "cc"),
        (AboveThreshold(threshold=3), [1, 2], "rr"),
        (AboveTrimmedMean(), [100, 7, 6, 2, 1], "ccc" + "rr"),  # of 7, 6, 2: 5
        (AboveTrimmedMean(), [5, 5, 5, 5, 1], "ccccr"),
        (AboveTrimmedMean(trim=0.4), [0.3, 0.1, 0.1, 0.1, 0.1], "crrrr"),
        (TopBottom(), [4, 3, 5, 1, 2], "c-crr"),  # the paper's recipe: the median is dropped
        (TopBottom(), [1, 2], "rc"),
        (TopBottom(), [1, 2, 3], "r-c"),
        (TopBottom(), [7], "-"),
        (TopBottom(), [5, 4, 4, 2, 1, 0], "ccc-rr"),  # scores as the second best
        (TopBottom(), [5, 3, 3, 3, 1], "c---r"),
        (TopBottom(), [5, 5, 5, 1], "cccr"),
        (TopBottom(), [5, 1, 1, 1], "crrr"),
        (TopBottom(), [2, 2, 2, 2], "----"),
        (BestRest(), [4, 9, 1], "rcr"),
        (BestRest(), [9, 9, 1], "ccr"),
        (BestRest(), [1, 1], "cc"),
    ],
    ids=str,
)
def test_by_hand(rule: Partition, scores: list[float], expected: str) -> None:
    assert letters(rule, scores) == expected


@each_rule
@settings(max_examples=60, deadline=None)
@given(
    scores=st.lists(st.sampled_from([0.1, 0.2, 0.3, 1.0, 2.0, 3.0, 1e6]), min_size=1, max_size=9),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_promises(rule: Partition, scores: list[float], padding: int, seed: int) -> None:
    """Whatever the ties: disjoint, in order, blind to place and padding, with contrast."""
    word = letters(rule, scores)
    chosen = [s for s, c in zip(scores, word, strict=True) if c == "c"]
    rejected = [s for s, c in zip(scores, word, strict=True) if c == "r"]
    if chosen and rejected:
        assert min(chosen) > max(rejected)
    if not isinstance(rule, AboveThreshold):
        assert bool(chosen and rejected) == (len(set(scores)) > 1)
    for score in set(scores):
        assert len({c for s, c in zip(scores, word, strict=True) if s == score}) == 1
    order = torch.randperm(len(scores) + padding, generator=torch.Generator().manual_seed(seed))
    padded = torch.tensor([*scores, *[torch.nan] * padding], dtype=torch.float64)[order][None]
    valid = (torch.arange(len(scores) + padding) < len(scores))[order][None]
    sets = rule(padded, valid)
    for found, letter in zip(sets, "cr", strict=True):
        expected = torch.tensor([c == letter for c in word] + [False] * padding)[order]
        assert torch.equal(found[0], expected)


@pytest.mark.parametrize(
    "rule", [r for r in RULES if isinstance(r, AboveQuantile | TopBottom | BestRest)], ids=str
)
def test_rules_of_order_do_not_see_monotone_maps(rule: Partition) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200, 7), generator=generator).double()
    valid = torch.rand(200, 7, generator=generator) < 0.8
    for found, expected in zip(rule(scores.exp() - 9, valid), rule(scores, valid), strict=True):
        assert torch.equal(found, expected)


@each_rule
def test_ragged_groups_equal_exact_fractions(rule: Partition) -> None:
    _, scores, valid = ragged(count=200)
    for group, mask, *sets in zip(scores, valid, *rule(scores, valid), strict=True):
        expected = plain_sets(rule, group[mask].tolist())
        for found, members in zip(sets, expected, strict=True):
            assert found[mask].nonzero().flatten().tolist() == members
            assert not found[~mask].any()


def test_trimmed_mean_of_tenths_equals_exact_fractions() -> None:
    """A tenth is no binary number: scores at the mean must not fall to one side by rounding."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 7, (300, 10), generator=generator).double() / 10
    chosen, _ = AboveTrimmedMean()(scores, torch.ones(300, 10, dtype=torch.bool))
    compared = 0
    for row, found in zip(scores.tolist(), chosen.tolist(), strict=True):
        tenths = [Fraction(round(10 * score)) for score in row]
        kept = sorted(tenths)[2:-2]
        expected = [score * 6 > sum(kept) for score in tenths]
        if any(expected):
            assert found == expected
            compared += 1
    assert compared > 200
