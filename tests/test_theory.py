"""The results of docs/mathematics.md on numbers: special cases, optima and bounds."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpo_lightning.losses import (
    DPO,
    IPO,
    MDPO,
    MIPO,
    MPO,
    AboveMean,
    AboveQuantile,
    BestRest,
    EachAgainstBelow,
    EachMPO,
    Hinge,
    MultiLevelMPO,
    PlackettLuce,
    RobustDPO,
    SetLoss,
    SimPO,
    TopBottom,
)
from mpo_lightning.losses.base import Measured

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def value(loss: SetLoss, log_ratios: Tensor, scores: Tensor) -> Tensor:
    return loss(log_ratios, scores, torch.ones_like(scores, dtype=torch.bool))


def same(first: SetLoss, second: SetLoss, scores: Tensor, seed: int = 0) -> None:
    log_ratios = 4 * normal(*scores.shape, seed=seed)
    expected = value(second, log_ratios, scores)
    assert expected.std() > 0.01
    torch.testing.assert_close(value(first, log_ratios, scores), expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------------- special cases

PAIR = torch.tensor([7.0, 2.5], dtype=F64).repeat(40, 1)
TWO_LEVELS = torch.tensor([1, 0, 0, 1, 0], dtype=F64).repeat(40, 1)
DISTINCT = torch.tensor([3, 9, 1, 4, 7.5], dtype=F64).repeat(40, 1)


@pytest.mark.parametrize(
    "loss",
    [
        MPO(),
        MPO(alpha=2.0),
        EachMPO(),
        MDPO(),
        PlackettLuce(),
        EachMPO(alpha=2.0),
        EachAgainstBelow(),
        MultiLevelMPO(),
        RobustDPO(flipped=0.0),
        MPO(partition=TopBottom()),
        MPO(partition=AboveQuantile()),
        MPO(partition=BestRest()),
    ],
    ids=str,
)
def test_two_responses_are_dpo(loss: SetLoss) -> None:
    same(loss, DPO(), PAIR)


@pytest.mark.parametrize("pairs", ["random", "all", "sets"])
def test_two_responses_make_one_pair(pairs: str) -> None:
    same(DPO(pairs=pairs), DPO(), PAIR)  # type: ignore[arg-type]
    same(IPO(pairs=pairs), MIPO(), PAIR)  # type: ignore[arg-type]


def test_two_levels_are_mpo() -> None:
    same(PlackettLuce(), MPO(), TWO_LEVELS)
    same(MultiLevelMPO(), MPO(), TWO_LEVELS)
    # Two bins of equal width cut where the middle of the range is, three levels do not.
    same(PlackettLuce(levels=2), MPO(partition=AboveMean()), DISTINCT)
    with pytest.raises(AssertionError):
        same(PlackettLuce(), MPO(), DISTINCT)
    same(EachAgainstBelow(), EachMPO(), TWO_LEVELS)
    same(EachAgainstBelow(levels=2), EachMPO(), DISTINCT)


def test_each_against_below_is_plackett_luce_where_no_scores_are_equal() -> None:
    log_ratios = 4 * normal(40, 5)
    found = value(EachAgainstBelow(), log_ratios, DISTINCT)
    torch.testing.assert_close(4 * found, value(PlackettLuce(), log_ratios, DISTINCT))
    log_ratios = 4 * normal(40, 5)
    assert (
        (value(EachAgainstBelow(), log_ratios, TWO_LEVELS) * 2)
        .ne(value(PlackettLuce(), log_ratios, TWO_LEVELS))
        .all()
    )


def test_one_chosen_response_leaves_nothing_to_average() -> None:
    same(EachMPO(partition=BestRest(), gamma=3.0), MPO(partition=BestRest(), gamma=3.0), DISTINCT)


def test_plackett_luce_is_best_against_rest_again_and_again() -> None:
    log_ratios = 4 * normal(40, 5)
    total = torch.zeros(40, dtype=F64)
    order = DISTINCT[0].argsort(descending=True)
    for place in range(4):
        rest = order[place:]
        total += value(MPO(partition=BestRest()), log_ratios[:, rest], DISTINCT[:, rest])
    torch.testing.assert_close(value(PlackettLuce(), log_ratios, DISTINCT), total)


def test_mpo_is_no_more_than_each_of_its_chosen_alone() -> None:
    """The set's mass is at least any member's; the mean over members is at least the least."""
    log_ratios = 4 * normal(40, 5)
    mpo, each = (value(loss, log_ratios, TWO_LEVELS) for loss in (MPO(), EachMPO()))
    assert (mpo < each).all()
    # Against the whole group, Jensen: the mean of -log shares is at least L + log |Y+|.
    shares = (0.1 * log_ratios).log_softmax(1)
    of_each = -(shares[:, 0] + shares[:, 3]) / 2
    assert (of_each >= mpo + math.log(2) - 1e-12).all()


def test_simpo_is_dpo_with_a_margin() -> None:
    log_ratios = 4 * normal(40, 2)
    found = value(SimPO(beta=2.0, margin=0.4), log_ratios, PAIR)
    expected = value(DPO(beta=2.0), log_ratios - torch.tensor([0.4, 0.0]), PAIR)
    torch.testing.assert_close(found, expected)
    loss = SimPO()
    policy, reference = normal(1, 2), normal(1, 2, seed=1)
    lengths = torch.tensor([[2, 5]])
    compared = loss.compared(
        Measured(
            policy_logps=policy,
            reference_logps=reference,
            lengths=lengths,
            scores=torch.zeros(1, 2),
            valid=torch.ones(1, 2, dtype=torch.bool),
        )
    )
    torch.testing.assert_close(compared, policy / lengths)


@pytest.mark.parametrize("flipped", [0.1, 0.4])
def test_robust_dpo_expects_what_dpo_would_be_with_true_labels(flipped: float) -> None:
    log_ratios = 4 * normal(40, 2)
    loss = RobustDPO(flipped=flipped)
    as_given = value(loss, log_ratios, PAIR)
    turned = value(loss, log_ratios, PAIR.flip(1))
    expected = value(DPO(), log_ratios, PAIR)
    torch.testing.assert_close((1 - flipped) * as_given + flipped * turned, expected)


# ------------------------------------------------------------------------------ stationary points


@pytest.mark.parametrize("loss", [IPO(beta=0.25), MIPO(beta=0.25), IPO(pairs="sets", beta=0.25)])
def test_ipo_is_stationary_at_its_margin(loss: SetLoss) -> None:
    """Chosen and rejected 1 / (2 beta) = 2 nats apart, wherever they are."""
    leaf = torch.tensor([[5.0, 3.0, 3.0, 5.0, 3.0]], dtype=F64, requires_grad=True)
    found = value(loss, leaf, TWO_LEVELS[:1])
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    assert found.item() == 0
    assert gradient.eq(0).all()


def test_hinge_is_content_with_its_margin() -> None:
    assert value(Hinge(beta=0.5), torch.tensor([[2.5, 0.4]]), PAIR[:1]).item() == 0
    assert value(Hinge(beta=0.5), torch.tensor([[2.0, 0.4]]), PAIR[:1]).item() > 0


def descend(loss: SetLoss, start: Tensor, steps: int = 4000) -> Tensor:
    """Plain gradient descent on free log-ratios until the chosen set holds 95 % of the mass."""
    ratios = start.clone()
    for _ in range(steps):
        leaf = ratios.requires_grad_()
        (gradient,) = torch.autograd.grad(value(loss, leaf, SCORES).sum(), leaf)
        ratios = (ratios - 0.5 * gradient).detach()
        mass = ratios.softmax(1)[:, :5].sum(1)
        if bool((mass > 0.95).all()):
            return ratios
    raise AssertionError("never solved")


SCORES = torch.tensor([1.0] * 5 + [0.0] * 5, dtype=F64).repeat(20, 1)


def effective(ratios: Tensor) -> float:
    """Effective part of the chosen, mean over groups: exp(entropy) / 5."""
    shares = ratios[:, :5].softmax(1)
    return ((-(shares * shares.log()).sum(1)).exp() / 5).mean().item()


def test_the_winner_takes_all_of_mpo_and_not_of_each_mpo() -> None:
    """At equal mass on the chosen set MPO widens what lay apart, EachMPO evens it out."""
    start = normal(20, 10)
    before = effective(start)
    mpo, each = (effective(descend(loss(beta=1.0), start)) for loss in (MPO, EachMPO))
    assert mpo < before - 0.1
    assert each > before + 0.15


# ------------------------------------------------------------------------ noise and partitions


def test_two_sets_are_read_more_reliably_than_a_ranking() -> None:
    """Scores one apart, normal noise of one half: how often each reading is the true one."""
    expected = {
        "ranking": [0.92, 0.77, 0.54, 0.27],
        "median": [0.92, 0.92, 0.92, 0.92],
        "mean": [0.92, 0.78, 0.74, 0.72],
    }
    found: dict[str, list[float]] = {name: [] for name in expected}
    for n in (2, 4, 8, 16):
        true = torch.arange(n, dtype=F64).expand(20000, n)
        noisy = true + 0.5 * normal(20000, n, seed=n)
        valid = torch.ones(20000, n, dtype=torch.bool)
        found["ranking"].append((noisy.argsort(1) == true).all(1).double().mean().item())
        for name, rule in (("median", AboveQuantile()), ("mean", AboveMean())):
            right = (rule(noisy, valid)[0] == rule(true, valid)[0]).all(1)
            found[name].append(right.double().mean().item())
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=0.015), name


# -------------------------------------------------------------------- bounds on mutual information

RHO = 0.9
INFORMATION = -0.5 * math.log(1 - RHO**2)


def bounds(k: int, n: int, critic: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """``log(n / k) - E[MPO]`` and ``log(n - k + 1) - E[EachMPO]``, beta 1.

    x and y are standard normal with correlation RHO; k responses are drawn given x, the others from
    the marginal law; the log-ratios are the critic's.
    """
    x = normal(8000, 1, seed=n)
    chosen = RHO * x + math.sqrt(1 - RHO**2) * normal(8000, k, seed=n + k)
    y = torch.cat([chosen, normal(8000, n - k, seed=n + k + 1)], dim=1)
    scores = (torch.arange(n) < k).to(F64).expand(8000, n)
    inside, outside = (
        value(loss(beta=1.0), critic(x, y), scores).mean().item() for loss in (MPO, EachMPO)
    )
    return math.log(n / k) - inside, math.log(n - k + 1) - outside


def density_ratio(x: Tensor, y: Tensor) -> Tensor:
    """The best critic, log p(y | x) - log p(y)."""
    of_x = (y - RHO * x).square() / (1 - RHO**2)
    return -0.5 * math.log(1 - RHO**2) - of_x / 2 + y.square() / 2


CRITICS = [density_ratio, lambda x, y: x * y, lambda x, y: 0.5 * density_ratio(x, y) + x]


@pytest.mark.parametrize("critic", CRITICS, ids=["best", "product", "half"])
@pytest.mark.parametrize(
    ("k", "n"), [(1, 2), (1, 16), (3, 16), (4, 16), (15, 16), (4, 64), (8, 64)]
)
def test_losses_bound_the_information_of_what_they_choose(
    k: int, n: int, critic: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """EachMPO: of one response. MPO: of the whole chosen set, k times as much."""
    inside, outside = bounds(k, n, critic)
    assert outside < INFORMATION + 0.02
    assert inside < k * INFORMATION + 0.02
    if k == 1:
        assert inside == pytest.approx(outside)


def test_the_bound_is_tight_for_many_responses_and_mpo_passes_that_of_one() -> None:
    assert bounds(1, 512, density_ratio)[1] == pytest.approx(INFORMATION, abs=0.03)
    inside, outside = bounds(8, 512, density_ratio)
    assert outside == pytest.approx(INFORMATION, abs=0.03)
    assert inside > INFORMATION + 0.05
    # Its limit is the mean over x of log E[p(y | x) / p(y)] given x, a Renyi divergence of order 2.
    x = torch.special.ndtri((torch.arange(200, dtype=F64)[:, None] + 0.5) / 200)
    y = torch.linspace(-10, 10, 1001, dtype=F64)
    given_x = -0.5 * (y - RHO * x).square() / (1 - RHO**2) - 0.5 * math.log(1 - RHO**2)
    density = (given_x - 0.5 * math.log(2 * math.pi)).exp()
    second = torch.trapezoid(density * density_ratio(x, y).exp(), y).log().mean().item()
    assert second == pytest.approx(0.981, abs=0.01)
    assert inside < second


# ------------------------------------------------------------------------ what preferences measure

DRAWN = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
CHOSEN = torch.tensor([0.15, 0.4, 0.6, 0.9], dtype=F64)
LOG_ODDS = CHOSEN.logit()
GOOD = DRAWN * CHOSEN / (DRAWN * CHOSEN).sum()
BAD = DRAWN * (1 - CHOSEN) / (DRAWN * (1 - CHOSEN)).sum()


def optimum(risk: Callable[[Tensor], Tensor]) -> Tensor:
    """Log-ratios of the four responses at which a risk is least; the first taken as zero."""
    leaf = torch.zeros(4, dtype=F64, requires_grad=True)
    optimizer = torch.optim.LBFGS([leaf], max_iter=500, tolerance_grad=1e-10, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = risk(leaf)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return leaf.detach() - leaf.detach()[0]


def expected(loss: SetLoss, k: int, n: int) -> Callable[[Tensor], Tensor]:
    """Exact expectation of a loss on k chosen of n responses: all sets of the four, enumerated."""
    which = torch.cartesian_prod(*[torch.arange(4)] * n)
    weight = GOOD[which[:, :k]].prod(1) * BAD[which[:, k:]].prod(1)
    scores = (torch.arange(n) < k).to(F64).expand(len(which), n)
    return lambda ratios: (weight * value(loss, ratios[which], scores)).sum()


@pytest.mark.parametrize(
    ("loss", "k", "n"),
    [
        (EachMPO(beta=0.5), 1, 3),
        (EachMPO(beta=2.0), 2, 5),
        (MPO(beta=0.5), 1, 4),
        (DPO(beta=0.5, pairs="sets"), 2, 4),
    ],
    ids=["each-1-of-3", "each-2-of-5", "mpo-1-of-4", "dpo-2-of-4"],
)
def test_the_best_policy_has_the_odds_of_being_chosen(loss: SetLoss, k: int, n: int) -> None:
    """At beta r = logit P(chosen | y), whatever the responses are drawn from."""
    found = loss.beta * optimum(expected(loss, k, n))
    torch.testing.assert_close(found, LOG_ODDS - LOG_ODDS[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("k", "n", "page"), [(2, 4, [2.37, 3.53, 5.70]), (3, 6, [3.44, 4.95, 7.38])], ids=["2", "3"]
)
def test_mpo_with_several_chosen_ends_further_out(k: int, n: int, page: list[float]) -> None:
    found = optimum(expected(MPO(beta=1.0), k, n))
    assert found[1:].tolist() == pytest.approx(page, abs=0.006)
    assert (found[1:] > 1.4 * (LOG_ODDS - LOG_ODDS[0])[1:]).all()


def test_weights_of_mpo_subtract_at_its_optimum() -> None:
    """Log-weights that are a function of the response, one chosen: beta r = log-odds - w."""
    log_weights = torch.tensor([0.0, 1.0, -0.5, 2.0], dtype=F64)
    risk = expected(MPO(beta=1.0), 1, 4)
    found = optimum(lambda ratios: risk(ratios + log_weights))
    torch.testing.assert_close(found, LOG_ODDS - LOG_ODDS[0] - log_weights, rtol=0, atol=1e-5)


def test_weights_of_each_mpo_count_as_more_draws() -> None:
    """With 40 chosen and 400 rejected: near log(p+ e^w+) - log(p- e^w-), up to a constant."""
    of_chosen = torch.tensor([1.0, -0.5, 0.3, 0.8], dtype=F64)
    of_rejected = torch.tensor([0.2, 0.9, -0.6, 0.1], dtype=F64)
    generator = torch.Generator().manual_seed(0)

    def draw(law: Tensor, count: int) -> Tensor:
        return law.multinomial(300 * count, True, generator=generator).view(300, count)

    good, bad = draw(GOOD, 40), draw(BAD, 400)
    weights = torch.cat([of_chosen[good], of_rejected[bad]], dim=1)

    class Weighted(EachMPO):
        def log_weights(self, scores: Tensor, valid: Tensor) -> Tensor:
            return weights

    which = torch.cat([good, bad], dim=1)
    scores = (torch.arange(440) < 40).to(F64).expand(300, 440)
    found = optimum(lambda ratios: value(Weighted(beta=1.0), ratios[which], scores).mean())
    wanted = LOG_ODDS + of_chosen - of_rejected
    torch.testing.assert_close(found, wanted - wanted[0], rtol=0, atol=0.1)
    assert (found - (LOG_ODDS - LOG_ODDS[0]))[1] < -2


SLOPE = 1.749


def preference_bounds(k: int, n: int, factor: float = 1.0) -> tuple[float, float]:
    """As ``bounds``, for y standard normal, chosen with probability sigmoid(SLOPE * y)."""
    generator = torch.Generator().manual_seed(n + k)
    y = torch.randn(8000, n, generator=generator, dtype=F64)
    accepted = torch.rand(8000, n, generator=generator, dtype=F64) < (SLOPE * y).sigmoid()
    good = torch.where(accepted, y, -y)  # the law of the rejected is the mirror image
    scores = (torch.arange(n) < k).to(F64).expand(8000, n)
    energies = factor * SLOPE * torch.where(scores > 0, good, -good)
    inside, outside = (
        value(loss(beta=1.0), energies, scores).mean().item() for loss in (MPO, EachMPO)
    )
    return math.log(n / k) - inside, math.log(n - k + 1) - outside


def test_losses_bound_how_far_chosen_and_rejected_differ() -> None:
    """By KL(p+ || p-) = 1 for EachMPO and k times as much for MPO."""
    y = torch.linspace(-14, 14, 20001, dtype=F64)
    good = 2 / math.sqrt(2 * math.pi) * (-y * y / 2).exp() * (SLOPE * y).sigmoid()
    divergence = torch.trapezoid(good * SLOPE * y, y).item()
    assert divergence == pytest.approx(1, abs=1e-3)
    second = torch.trapezoid(good * (SLOPE * y).exp(), y).log().item()
    assert second == pytest.approx(2.11, abs=0.005)
    page = {(4, 8): (0.48, 0.64), (8, 512): (1.72, 1.00)}
    for k, n in [(1, 8), (3, 8), (7, 8), *page]:
        inside, outside = preference_bounds(k, n)
        assert outside < divergence + 0.02
        assert inside < k * divergence + 0.02
        # The log-odds are the best energies of EachMPO.
        for factor in (0.6, 1.5):
            if n == 8:
                assert preference_bounds(k, n, factor)[1] < outside - 0.02
        if (k, n) in page:
            assert (inside, outside) == pytest.approx(page[k, n], abs=0.01)
    assert divergence + 0.5 < inside < second


def test_weights_move_the_push_of_whole_groups_in_mpo_and_not_in_each_mpo() -> None:
    """Per standard deviation: a lone good response is hushed, a lone bad one heard more."""
    found: dict[str, list[float]] = {}
    for scores in ([9.0, 1, 1, 1], [9.0, 9, 9, 1]):
        for loss in (MPO, EachMPO):
            for alpha in (0.0, 1.0):
                leaf = torch.zeros(1, 4, dtype=F64, requires_grad=True)
                weighted = loss(beta=1.0, alpha=alpha, alpha_unit="std")
                total = value(weighted, leaf, torch.tensor([scores], dtype=F64)).sum()
                (gradient,) = torch.autograd.grad(total, leaf)
                push = gradient.clamp(min=0).sum().item()
                found.setdefault(loss.__name__, []).append(push)
    assert found["MPO"] == pytest.approx([0.75, 0.49, 0.25, 0.51], abs=0.005)
    assert found["EachMPO"] == pytest.approx([0.75, 0.75, 0.5, 0.5])
