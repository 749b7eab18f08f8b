"""Metrics against SciPy and plain Python loops, in one batch, in several, and on two processes."""

import math
from collections import defaultdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from scipy.stats import kendalltau
from torch import Tensor

from mpo_lightning.losses import AboveMean, TopBottom
from mpo_lightning.losses.base import LossOutput, Measured
from mpo_lightning.training.metrics import (
    METRIC_NAMES,
    GroupMetrics,
    group_statistics,
    kendall_tau_b,
)
from tests import processes

Statistics = dict[str, tuple[Tensor, Tensor]]
BETA = 0.25


def ragged(count: int = 41, slots: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of group_statistics: 1 to 6 responses at scattered slots, NaN in the others.

    Small integers tie scores and rewards often; some groups have equal scores throughout.
    """
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    valid = torch.rand(count, slots, generator=generator).argsort(1) < integers(1, slots, count, 1)
    scores = integers(0, 4, count, slots).double()
    scores[::9] = scores[::9, :1]
    reference_logps = -integers(20, 90, count, slots).float()
    policy_logps = reference_logps + integers(-3, 4, count, slots) / 2
    return {
        "loss": torch.rand(count, generator=generator),
        "policy_logps": torch.where(valid, policy_logps, math.nan),
        "reference_logps": torch.where(valid, reference_logps, math.nan),
        "scores": torch.where(valid, scores, math.nan),
        "valid": valid,
        "lengths": torch.where(valid, integers(1, 50, count, slots), 0),
    }


def rows(arguments: dict[str, Tensor], part: Any) -> dict[str, Tensor]:
    return {name: value[part] for name, value in arguments.items()}


def statistics_of(arguments: dict[str, Tensor]) -> Statistics:
    rewards = BETA * (arguments["policy_logps"] - arguments["reference_logps"])
    chosen, rejected = AboveMean()(arguments["scores"], arguments["valid"])
    return statistics_with(arguments, rewards, chosen, rejected)


def statistics_with(
    arguments: dict[str, Tensor], rewards: Tensor, chosen: Tensor, rejected: Tensor
) -> Statistics:
    measured = Measured(**{name: v for name, v in arguments.items() if name != "loss"})
    return group_statistics(measured, LossOutput(arguments["loss"], rewards, chosen, rejected))


def counted(arguments: dict[str, Tensor]) -> Tensor:
    return torch.ones(len(arguments["loss"]), dtype=torch.bool)


def one_batch(arguments: dict[str, Tensor]) -> dict[str, float]:
    """The values of all groups, through one update."""
    metrics = GroupMetrics()
    metrics.update(statistics_of(arguments), counted(arguments))
    return {name: value.item() for name, value in metrics.compute().items()}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plain_values(arguments: dict[str, Tensor]) -> dict[str, float]:
    """All metrics by loops over groups and responses, as docs/metrics.md defines them."""
    terms: dict[str, list[float]] = defaultdict(list)
    pairs: list[float] = []
    for number, mask in enumerate(arguments["valid"]):
        score, policy, reference, length = (
            arguments[name][number, mask].tolist()
            for name in ("scores", "policy_logps", "reference_logps", "lengths")
        )
        n = len(score)
        reward = [BETA * (p - r) for p, r in zip(policy, reference, strict=True)]
        terms["loss"].append(arguments["loss"][number].item())
        terms["kl"].append(mean([r - p for p, r in zip(policy, reference, strict=True)]))
        chosen = [i for i in range(n) if Fraction(score[i]) * n > sum(map(Fraction, score))]
        rejected = [i for i in range(n) if i not in chosen]
        if not chosen:
            continue
        for name, members in (("chosen", chosen), ("rejected", rejected)):
            terms[f"rewards/{name}"].append(mean([reward[i] for i in members]))
            terms[f"logps/{name}"].append(mean([policy[i] for i in members]))
            terms[f"lengths/{name}"].append(mean([length[i] for i in members]))
            terms[f"log_ratios/{name}"].append(mean([policy[i] - reference[i] for i in members]))
            terms[f"sizes/{name}"].append(len(members))
        terms["rewards/margin"].append(terms["rewards/chosen"][-1] - terms["rewards/rejected"][-1])
        for i in chosen:
            for j in rejected:
                pairs.append(1.0 if reward[i] > reward[j] else 0.5 * (reward[i] == reward[j]))
        top = [i for i in range(n) if reward[i] == max(reward)]
        terms["rewards/top1"].append(mean([float(score[i] == max(score)) for i in top]))
        for name, one, other in (
            ("rewards/kendall_tau", reward, score),
            ("lengths/kendall_tau", reward, length),
            ("lengths/score_tau", score, length),
        ):
            tau = kendalltau(one, other).statistic
            terms[name].append(0.0 if math.isnan(tau) else tau)
        terms["scores/deviation"].append(mean([abs(s - mean(score)) for s in score]))
        masses = [math.exp(r) for r in reward]
        of_chosen = sum(masses[i] for i in chosen)
        terms["chosen_mass"].append(of_chosen / sum(masses))
        shares = [masses[i] / of_chosen for i in chosen]
        entropy = -sum(share * math.log(share) for share in shares)
        terms["effective_chosen"].append(math.exp(entropy) / len(chosen))
    return {
        **{name: mean(values) for name, values in terms.items()},
        "rewards/accuracy": mean(pairs),
    }


# ----------------------------------------------------------------------------------- kendall's tau


@pytest.mark.parametrize("levels", [2, 4, 1000])
def test_kendall_tau_b_equals_scipy(levels: int) -> None:
    """With ties in one ranking, in both, in none, and anything in padded slots."""
    generator = torch.Generator().manual_seed(levels)
    valid = torch.rand(150, 8, generator=generator) < 0.7
    first = torch.randint(levels, (150, 8), generator=generator).float()
    second = torch.randint(levels, (150, 8), generator=generator).double() / 7
    found = kendall_tau_b(
        torch.where(valid, first, math.nan), torch.where(valid, second, math.inf), valid
    )
    assert found.dtype == torch.float64
    undefined = 0
    for tau, a, b, mask in zip(found, first, second, valid, strict=True):
        expected = math.nan
        if mask.sum() > 1:
            expected = kendalltau(a[mask].numpy(), b[mask].numpy()).statistic
        undefined += math.isnan(expected)
        assert tau.item() == pytest.approx(0 if math.isnan(expected) else expected, abs=1e-12)
    assert undefined < 75


def test_kendall_tau_b_by_hand() -> None:
    """Rewards 3, 2, 2 against scores 3, 1, 2.

    Pairs (0, 1) and (0, 2) agree; (1, 2) ties in rewards. Untied: 2 in rewards, 3 in scores, so
    tau-b is 2 / sqrt(2 * 3).
    """
    rewards, scores = torch.tensor([[3.0, 2.0, 2.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    found = kendall_tau_b(rewards, scores, torch.ones(1, 3, dtype=torch.bool))
    assert found.item() == pytest.approx(2 / math.sqrt(6))


# -------------------------------------------------------------------------------------- statistics


def test_every_metric_equals_plain_python() -> None:
    for seed in range(3):
        arguments = ragged(seed=seed)
        expected = plain_values(arguments)
        found = one_batch(arguments)
        assert found.pop("groups") == 41
        assert set(found) == set(METRIC_NAMES) == set(expected)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=2e-6, abs=2e-6), name


def test_statistics_have_every_name_and_one_number_a_group() -> None:
    arguments = ragged()
    statistics = statistics_of(arguments)
    assert tuple(statistics) == METRIC_NAMES
    for name, (value, weight) in statistics.items():
        assert value.shape == weight.shape == (41,), name
        assert value.isfinite().all(), name
        assert not value.requires_grad


def test_the_documentation_has_every_metric() -> None:
    page = Path(__file__).parents[2] / "docs" / "metrics.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    named = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert tuple(named[-len(METRIC_NAMES) :]) == METRIC_NAMES
    # What else is logged stands in a table before; a run holds it to that (test_watched_run).
    assert not set(METRIC_NAMES) & set(named[: -len(METRIC_NAMES)])


def test_statistics_by_hand() -> None:
    """Scores 8, 6, 1, 1 (mean 4) choose the first two; beta = 1/4.

    Log-ratios 4 ln 3, 0, 0, 4 ln 2 are rewards ln 3, 0, 0, ln 2, masses 3, 1, 1, 2. Of the four
    pairs (chosen, rejected) those of the first are in order, those of the second a tie and wrong:
    2.5 of 4. The chosen set holds 4/7, in shares 3/4 and 1/4.
    """
    log_ratios = 4 * torch.tensor([[3.0, 1.0, 1.0, 2.0]]).log()
    reference = torch.tensor([[-10.0, -20.0, -30.0, -40.0]])
    found = one_batch(
        {
            "loss": torch.tensor([0.7]),
            "policy_logps": reference + log_ratios,
            "reference_logps": reference,
            "scores": torch.tensor([[8.0, 6.0, 1.0, 1.0]]),
            "valid": torch.ones(1, 4, dtype=torch.bool),
            "lengths": torch.tensor([[5, 8, 1, 2]]),
        }
    )
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    # Ordered alike: (0,1), (0,2), (0,3); reversed: (1,3); tied: (1,2) in rewards, (2,3) in scores.
    assert found == pytest.approx(
        {
            "loss": 0.7,
            "rewards/chosen": math.log(3) / 2,
            "rewards/rejected": math.log(2) / 2,
            "rewards/margin": math.log(3 / 2) / 2,
            "rewards/accuracy": 2.5 / 4,
            "rewards/top1": 1,
            "rewards/kendall_tau": (3 - 1) / math.sqrt(5 * 5),
            "chosen_mass": 4 / 7,
            "effective_chosen": math.exp(entropy) / 2,
            "logps/chosen": -15 + 2 * math.log(3),
            "logps/rejected": -35 + 2 * math.log(2),
            "kl": -math.log(6),
            "lengths/chosen": 6.5,
            "lengths/rejected": 1.5,
            # No lengths tie. Of rewards (0,2), (0,3), (2,3) are alike, (0,1), (1,3) reversed; of
            # scores all alike but (0,1).
            "lengths/kendall_tau": (3 - 2) / math.sqrt(5 * 6),
            "lengths/score_tau": (4 - 1) / math.sqrt(5 * 6),
            "log_ratios/chosen": 2 * math.log(3),
            "log_ratios/rejected": 2 * math.log(2),
            "sizes/chosen": 2,
            "sizes/rejected": 2,
            "scores/deviation": 3,
            "groups": 1,
        },
        rel=5e-6,
    )


def test_sets_are_those_that_are_given() -> None:
    """Scores 8, 6, 4, 1, 0 by the best two against the worst two: the middle enters nothing.

    beta = 1/4, log-ratios 4 ln 3, 0, 4 ln 9, 0, 4 ln 2: masses 3, 1, 9, 1, 2. Pairs (0, 3) and
    (0, 4) in order, (1, 3) a tie, (1, 4) wrong. The chosen hold 4 of 7. The middle is still the top
    reward.
    """
    log_ratios = 4 * torch.tensor([[3.0, 1.0, 9.0, 1.0, 2.0]]).log()
    reference = torch.tensor([[-10.0, -20.0, -30.0, -40.0, -50.0]])
    scores, valid = torch.tensor([[8.0, 6.0, 4.0, 1.0, 0.0]]), torch.ones(1, 5, dtype=torch.bool)
    chosen, rejected = TopBottom(k=2)(scores, valid)
    measured = Measured(
        policy_logps=reference + log_ratios,
        reference_logps=reference,
        lengths=torch.tensor([[5, 8, 1, 2, 3]]),
        scores=scores,
        valid=valid,
    )
    output = LossOutput(torch.tensor([0.7]), BETA * log_ratios, chosen, rejected)
    statistics = group_statistics(measured, output)
    expected = {
        "rewards/chosen": math.log(3) / 2,
        "rewards/rejected": math.log(2) / 2,
        "rewards/accuracy": 2.5 / 4,
        "rewards/top1": 0,
        "chosen_mass": 4 / 7,
        "lengths/chosen": 6.5,
        "lengths/rejected": 2.5,
        "kl": -4 * math.log(54) / 5,
    }
    found = {name: statistics[name][0].item() for name in expected}
    assert found == pytest.approx(expected, rel=5e-6)


def test_a_group_with_one_set_only_carries_nothing_of_sets() -> None:
    """Above a threshold all are chosen and none rejected: not a mean of one side alone."""
    arguments = ragged()
    chosen = arguments["valid"]
    rewards = BETA * (arguments["policy_logps"] - arguments["reference_logps"])
    statistics = statistics_with(arguments, rewards, chosen, torch.zeros_like(chosen))
    for name, (value, weight) in statistics.items():
        assert value.isfinite().all(), name
        assert (weight.sum() > 0) == (name in ("loss", "kl")), name


def test_the_first_step_measures_chance() -> None:
    """All rewards are zero: pairs tie, the mass is spread evenly, no ranking is there to agree."""
    arguments = ragged()
    arguments["policy_logps"] = arguments["reference_logps"].clone()
    found = one_batch(arguments)
    assert found["rewards/accuracy"] == 0.5
    assert found["rewards/margin"] == found["rewards/kendall_tau"] == found["kl"] == 0
    assert found["effective_chosen"] == pytest.approx(1, rel=1e-6)
    # Scores of the group with one best of four: a fair pick hits it once in four.
    part = {name: value[:1, :4] for name, value in arguments.items() if value.ndim == 2}
    part["valid"] = torch.ones(1, 4, dtype=torch.bool)
    part["scores"] = torch.tensor([[1.0, 9.0, 3.0, 2.0]])
    part["policy_logps"] = part["reference_logps"] = torch.full((1, 4), -5.0)
    assert one_batch({**part, "loss": torch.zeros(1)})["rewards/top1"] == 0.25


def test_a_group_of_equal_scores_enters_loss_and_kl_only() -> None:
    arguments = ragged(seed=5)
    equal = torch.tensor(
        [
            len({*s[v].tolist()}) == 1
            for s, v in zip(arguments["scores"], arguments["valid"], strict=True)
        ]
    )
    assert 3 < equal.sum() < 30
    for name, (_, weight) in statistics_of(arguments).items():
        expected = torch.ones(41, dtype=torch.bool) if name in ("loss", "kl") else ~equal
        assert torch.equal(weight > 0, expected), name
    found, without = one_batch(arguments), one_batch(rows(arguments, ~equal))
    assert {name for name in found if found[name] != without[name]} == {"loss", "kl", "groups"}


def test_statistics_do_not_depend_on_the_losses_weights() -> None:
    """Shares are those of rewards: another loss value changes the metric "loss" alone."""
    arguments = ragged()
    other = {**arguments, "loss": arguments["loss"] + 1}
    found, changed = one_batch(arguments), one_batch(other)
    assert {name for name in found if found[name] != changed[name]} == {"loss"}


def test_precision_contexts_change_nothing() -> None:
    """Lightning's "bf16-true" changes torch's default dtype, in which thirds are coarse."""
    arguments = ragged()
    expected = one_batch(arguments)
    with HalfPrecision("bf16-true").forward_context():
        assert one_batch(arguments) == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert one_batch(arguments) == expected


# ------------------------------------------------------------------------------------ accumulation


def test_unequal_batches_equal_one() -> None:
    """Also where a batch holds one group, or none with a contrast."""
    arguments = ragged()
    metrics = GroupMetrics()
    for part in (slice(0, 1), slice(1, 20), slice(20, 23), slice(23, 41)):
        piece = rows(arguments, part)
        metrics.update(statistics_of(piece), counted(piece))
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(one_batch(arguments), rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("filler", [math.nan, math.inf])
def test_groups_that_do_not_count_leave_everything_untouched(filler: float) -> None:
    arguments = ragged()
    metrics = GroupMetrics()
    metrics.update(statistics_of(arguments), counted(arguments))
    before = metrics.totals.clone()
    broken = {
        name: torch.full_like(value, filler) if value.is_floating_point() else value
        for name, value in rows(arguments, slice(0, 5)).items()
    }
    broken["scores"] = arguments["scores"][:5]
    metrics.update(statistics_of(broken), torch.zeros(5, dtype=torch.bool))
    assert torch.equal(metrics.totals, before)


def test_a_batch_may_mix_groups_that_count_and_groups_that_do_not() -> None:
    arguments = ragged()
    count = torch.arange(41) % 3 > 0
    metrics = GroupMetrics()
    metrics.update(statistics_of(arguments), count)
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == pytest.approx(one_batch(rows(arguments, count)), rel=1e-6, abs=1e-7)


def test_nan_in_a_group_that_counts_is_seen() -> None:
    arguments = ragged()
    arguments["loss"][3] = math.nan
    assert math.isnan(one_batch(arguments)["loss"])


def test_a_metric_that_no_group_carries_is_nan() -> None:
    arguments = ragged()
    arguments["scores"] = torch.ones_like(arguments["scores"])
    found = one_batch(arguments)
    assert {name for name, value in found.items() if not math.isnan(value)} == {
        "loss",
        "kl",
        "groups",
    }


@pytest.mark.filterwarnings("ignore:The ``compute`` method:UserWarning")
def test_reset_forgets() -> None:
    first, second = ragged(seed=0), ragged(seed=1)
    metrics = GroupMetrics()
    metrics.update(statistics_of(first), counted(first))
    metrics.compute()
    metrics.reset()
    assert metrics.compute()["groups"] == 0
    metrics.update(statistics_of(second), counted(second))
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == one_batch(second)


def test_inference_mode_leaves_the_metrics_usable() -> None:
    arguments = ragged()
    metrics = GroupMetrics()
    with torch.inference_mode():
        metrics.update(statistics_of(arguments), counted(arguments))
        metrics.reset()
    metrics.update(statistics_of(arguments), counted(arguments))
    found = {name: value.item() for name, value in metrics.compute().items()}
    assert found == one_batch(arguments)


@pytest.mark.parametrize("how", ["to", "bfloat16", "half", "plugin"])
def test_a_cast_module_keeps_float64_sums(how: str) -> None:
    """In bf16 a count stops at 256: 256 + 1 is 256 there."""
    module = torch.nn.Module()
    module.metrics = GroupMetrics()
    module.layer = torch.nn.Linear(2, 2)
    arguments = ragged()
    for _ in range(7):
        module.metrics.update(statistics_of(arguments), counted(arguments))
    if how == "plugin":
        HalfPrecision("bf16-true").convert_module(module)
    elif how == "to":
        module.to(torch.bfloat16)
    else:
        getattr(module, how)()
    assert module.layer.weight.dtype in (torch.bfloat16, torch.float16)
    assert module.metrics.totals.dtype == torch.float64
    module.metrics.update(statistics_of(arguments), counted(arguments))
    values = module.metrics.compute()
    assert values["groups"] == 8 * 41
    assert values["loss"].item() == pytest.approx(one_batch(arguments)["loss"], rel=1e-6)
    module.metrics.reset()
    assert module.metrics.totals.dtype == torch.float64


def test_metrics_follow_a_module_to_another_device() -> None:
    assert GroupMetrics().to("meta").totals.device.type == "meta"


# -------------------------------------------------------------------------------- two processes


def _share(folder: Path) -> None:
    """Process 0 has 4 groups in two batches, process 1 has 3 and one that does not count."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    arguments = ragged(count=7)
    metrics = GroupMetrics()
    for part in ([[0], [1, 2, 3]], [[4, 5, 6, 0]])[rank]:
        piece = rows(arguments, part)
        count = counted(piece)
        if rank == 1:
            count[-1] = False
            piece["loss"] = torch.where(count, piece["loss"], math.nan)
        metrics.update(statistics_of(piece), count)
    torch.save(metrics.compute(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    result = processes.run(_share, [tmp_path], processes=2)
    assert result.returncode == 0, result.stderr
    expected = one_batch(ragged(count=7))
    assert expected["groups"] == 7
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        found = {name: value.item() for name, value in found.items()}
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
