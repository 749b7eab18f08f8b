"""Partition rules by hand, against exact fractions, and what they promise about ties and order."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpo_lightning.losses import (
    DPO,
    MDPO,
    MPO,
    NCA,
    AboveMean,
    AboveQuantile,
    AboveThreshold,
    AboveTrimmedMean,
    BestRest,
    EachMPO,
    InfoNCA,
    LiPO,
    MultiLevelMPO,
    Partition,
    PlackettLuce,
    SetLoss,
    TopBottom,
)

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


def test_trimmed_mean_equals_exact_fractions() -> None:
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
        (lambda: PlackettLuce(levels=1), "PlackettLuce: levels must be .*, got 1"),
        (lambda: NCA(reference_free=1), "NCA: reference_free must be true or false, got 1"),
        (lambda: MDPO(likelihood=-1), "MDPO: likelihood must be a number >= 0, got -1"),
    ],
)
def test_impossible_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ----------------------------------------------------------------------- contrast, and own sets


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # Groups: 3, 3 | 3, 1 | 1, 1, 0 | one response.
        (MPO(), [False, True, True, False]),
        (MPO(partition=AboveThreshold(threshold=2)), [False, True, False, False]),
        (EachMPO(partition=BestRest()), [False, True, True, False]),
        (DPO(), [False, True, True, False]),
        (DPO(pairs="random"), [False, True, True, False]),
        (DPO(pairs="all"), [False, True, True, False]),
        (DPO(pairs="sets", partition=AboveThreshold(threshold=2)), [False, True, False, False]),
        (PlackettLuce(), [False, True, True, False]),
        (MultiLevelMPO(levels=2), [False, True, True, False]),
        (LiPO(), [False, True, True, False]),
        (InfoNCA(), [True, True, True, False]),
        (NCA(), [True, True, True, True]),
    ],
    ids=str,
)
def test_contrast_is_where_a_gradient_is(loss: SetLoss, expected: list[bool]) -> None:
    nan = torch.nan
    scores = torch.tensor([[3, 3, nan], [3, nan, 1], [1, 1, 0], [nan, 2, nan]]).double()
    valid = ~scores.isnan()
    assert loss.has_contrast(scores, valid).tolist() == expected
    generator = torch.Generator().manual_seed(0)
    ratios = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(ratios, scores, valid).sum(), ratios)
    assert gradient.ne(0).any(1).tolist() == expected


def members(found: Tensor) -> list[int]:
    return found[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("loss", "chosen", "rejected"),
    [
        (MPO(), [0, 1], [2, 3]),
        (MPO(partition=TopBottom(k=1)), [0], [3]),
        (DPO(), [0], [3]),
        (DPO(pairs="all"), [0, 1], [2, 3]),
        (DPO(pairs="sets", partition=BestRest()), [0], [1, 2, 3]),
        (InfoNCA(), [0, 1], [2, 3]),
    ],
    ids=str,
)
def test_a_losses_own_sets(loss: SetLoss, chosen: list[int], rejected: list[int]) -> None:
    scores = torch.tensor([[9.0, 7.0, 2.0, 1.0]])
    found = loss.sets(scores, torch.ones(1, 4, dtype=torch.bool))
    assert [members(part) for part in found] == [chosen, rejected]


def test_a_response_in_neither_set_touches_nothing() -> None:
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
    valid = torch.ones(1, 5, dtype=torch.bool)
    without = torch.tensor([[True, True, False, True, True]])
    ratios = torch.tensor([[1.0, -2.0, torch.nan, 0.5, 3.0]], dtype=torch.float64)
    for loss in (MPO(partition=TopBottom()), EachMPO(partition=TopBottom())):
        leaf = ratios.clone().requires_grad_()
        value = loss(leaf, scores, valid)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        assert gradient[0, 2] == 0
        torch.testing.assert_close(value, loss(ratios, scores, without))


# ------------------------------------------------------------------------------- a random pair


def drawn(scores: Tensor, valid: Tensor) -> Tensor:
    return DPO(pairs="random").drawn(scores, valid)


def test_a_random_pair_is_one_ordered_pair_and_always_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 5, (300, 6), generator=generator).double()
    valid = torch.rand(300, 6, generator=generator) < 0.8
    pairs = drawn(scores, valid)
    differs = [len(set(s[v].tolist())) > 1 for s, v in zip(scores, valid, strict=True)]
    assert pairs.sum((1, 2)).tolist() == [int(d) for d in differs]
    for number, winner, loser in pairs.nonzero().tolist():
        assert valid[number, winner]
        assert valid[number, loser]
        assert scores[number, winner] > scores[number, loser]
    # In another batch, with other padding, in fp32, in another order.
    assert torch.equal(drawn(scores[7:9], valid[7:9]), pairs[7:9])
    assert torch.equal(drawn(torch.where(valid, scores, torch.nan).float(), valid), pairs)
    order = torch.randperm(6, generator=generator)
    turned = drawn(scores[:, order], valid[:, order])
    expected = pairs[:, order][:, :, order]
    # Which of two equals is drawn may change.
    turned_scores = scores[:, order]
    for first, second in zip(turned.nonzero().tolist(), expected.nonzero().tolist(), strict=True):
        number = first[0]
        assert second[0] == number
        assert turned_scores[number, first[1:]].equal(turned_scores[number, second[1:]])


def test_every_pair_is_as_likely() -> None:
    """Chi-squared over the six pairs of four scores, and over the pairs of 2, 2, 1."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6000, 4, generator=generator, dtype=torch.float64).sort(1).values
    counts = drawn(scores, torch.ones(6000, 4, dtype=torch.bool)).sum(0)
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    assert ((counts - 1000).square() / 1000).sum() < 20.5  # 0.1 % point, five degrees of freedom
    low = torch.rand(6000, 1, generator=generator, dtype=torch.float64)
    tied = torch.cat([low + 1, low + 1, low], dim=1)
    first, second = drawn(tied, torch.ones(6000, 3, dtype=torch.bool)).sum(0)[:2, 2].tolist()
    assert first + second == 6000
    assert abs(first - 3000) < 130  # 3.3 standard deviations
