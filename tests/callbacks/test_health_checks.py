"""Each check of a run that goes wrong: a stream of groups that shows it, and one that does not.

Streams are made of log-ratios and scores, step after step, and go through the metrics that a run
logs; nothing here computes a metric by itself.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mpo_lightning.callbacks.health_checks import (
    CHECKS,
    Finding,
    Recent,
    Row,
    Thresholds,
    mean_of,
    sampled_length_drift,
)
from mpo_lightning.losses import MPO, SetLoss
from mpo_lightning.losses.base import Measured
from mpo_lightning.training.metrics import GroupMetrics, group_statistics

THRESHOLDS = Thresholds()
GROUPS, RESPONSES = 8, 6
LossSettings = dict[str, Any]


class Stream:
    """Steps of groups as a policy at a stage of training would give them.

    Args:
        quality: nats by which a response gains with each unit of its score's deviation.
        noise: nats by which responses differ otherwise.
        shift: nats by which all responses have changed.
        per_token: nats by which each of a response's tokens has changed.
        scores: makes the scores of a step, (B, N), from normal ones; the step's number comes along.
    """

    def __init__(
        self,
        *,
        quality: float = 1.0,
        noise: float = 1.0,
        shift: float = 0.0,
        per_token: float = 0.0,
        scores: Callable[[Tensor, int], Tensor] = lambda normal, step: normal,
    ) -> None:
        self.quality, self.noise, self.shift, self.per_token = quality, noise, shift, per_token
        self.scores = scores

    def row(self, step: int, loss: SetLoss) -> Row:
        """What a run logs of one step."""
        generator = torch.Generator().manual_seed(step)

        def normal() -> Tensor:
            return torch.randn(GROUPS, RESPONSES, generator=generator)

        quality = normal()
        scores = self.scores(quality, step).double()
        lengths = torch.randint(20, 60, (GROUPS, RESPONSES), generator=generator)
        centred = quality - quality.mean(1, keepdim=True)
        ratios = self.quality * centred + self.noise * normal() + self.shift
        ratios += self.per_token * lengths
        reference = -1.5 * lengths
        valid = torch.ones(GROUPS, RESPONSES, dtype=torch.bool)
        measured = Measured(
            policy_logps=reference + ratios,
            reference_logps=reference,
            lengths=lengths,
            scores=scores,
            valid=valid,
        )
        statistics = group_statistics(measured, loss.evaluate(measured))
        metrics = GroupMetrics()
        metrics.update(statistics, torch.ones(GROUPS, dtype=torch.bool))
        values = {name: value.item() for name, value in metrics.compute().items()}
        return {**values, "lr": 1e-5}


def findings(
    now: Stream,
    *,
    first: Stream | None = None,
    steps: int = 40,
    thresholds: Thresholds = THRESHOLDS,
    **loss: Any,
) -> dict[str, Finding]:
    """What is found after so many steps of which the last window comes from ``now``."""
    of_loss = MPO(**{"beta": 0.1, **loss})
    first = first or Stream(quality=0, noise=0)
    beginning = [first.row(step, of_loss) for step in range(thresholds.window)]
    rows = [now.row(steps - thresholds.window + step, of_loss) for step in range(thresholds.window)]
    recent = Recent(
        steps=steps,
        rows=rows,
        now=mean_of(rows),
        first=mean_of(beginning),
        beta=of_loss.beta,
        alpha=of_loss.alpha,
    )
    found = {name: look(recent, thresholds) for name, look in CHECKS.items()}
    return {name: finding for name, finding in found.items() if finding is not None}


def several_scales(normal: Tensor, step: int) -> Tensor:
    """Every second group was scored from 0 to 100 instead."""
    factor = torch.where(torch.arange(len(normal)) % 2 == 0, 1.0, 25.0)
    return normal * factor[:, None]


def all_but_one(normal: Tensor, step: int) -> Tensor:
    """The judge gives everything but the worst response the same high score."""
    return torch.where(normal == normal.amin(1, keepdim=True), 1.0, 9.0)


HEALTHY = {
    "at the start": Stream(quality=0, noise=0),
    "in the midst": Stream(quality=3, noise=2),
    "far": Stream(quality=12, noise=4),
    "with noise only at first": Stream(quality=0, noise=0.5),
}
SICK: dict[str, tuple[Stream, LossSettings, int]] = {
    "loss_variation": (Stream(scores=several_scales), {"alpha": 0.5}, 40),
    "few_rejected": (Stream(scores=all_but_one), {}, 40),
    "collapse": (Stream(quality=200, noise=10), {}, 40),
    "slow": (Stream(quality=0.0005, noise=0.02), {}, 100),
    "displacement": (Stream(quality=3, shift=-10), {}, 40),
    "length_drift": (Stream(quality=0.5, noise=0.5, per_token=0.2), {}, 40),
}


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_healthy_streams_show_nothing(name: str, alpha: float) -> None:
    assert findings(HEALTHY[name], alpha=alpha) == {}


@pytest.mark.parametrize("check", SICK)
def test_each_check_warns_alone(check: str) -> None:
    stream, loss, steps = SICK[check]
    first = stream if check == "loss_variation" else None
    found = findings(stream, first=first, steps=steps, **loss)
    assert set(found) == {check}
    assert found[check].severity >= 1
    assert "Try: " in found[check].message


def test_every_check_has_a_stream() -> None:
    assert set(SICK) == set(CHECKS)


def test_one_scale_of_scores_with_the_same_weights_varies_little() -> None:
    """It is the mixture of scales that is seen: the healthy scale alone does not vary."""
    assert findings(Stream(quality=1), first=Stream(quality=1), alpha=0.5) == {}


def test_loss_that_falls_steeply_does_not_vary() -> None:
    loss = MPO(beta=0.1)
    row = Stream(quality=0, noise=0).row(0, loss)
    rows = [{**row, "loss": 40.0 - 2 * step} for step in range(20)]
    recent = Recent(
        steps=20, rows=rows, now=mean_of(rows), first={**row, "loss": 1.0}, beta=0.1, alpha=0.0
    )
    assert CHECKS["loss_variation"](recent, THRESHOLDS) is None


def test_variation_does_not_depend_on_the_groups_of_a_step() -> None:
    """Steps of two groups vary more than steps of eight, by the root of four, and not in this."""
    look, loss = CHECKS["loss_variation"], MPO(beta=0.1, alpha=0.5)
    rows = [Stream(scores=several_scales).row(step, loss) for step in range(80)]
    found = []
    for together in (1, 4):
        merged = [
            {**mean_of(rows[at : at + together]), "groups": float(GROUPS * together)}
            for at in range(0, 80, together)
        ]
        now = mean_of(merged)
        recent = Recent(steps=9, rows=merged, now=now, first=now, beta=0.1, alpha=0.5)
        finding = look(recent, THRESHOLDS)
        assert finding is not None
        found.append(finding.severity)
    assert found[0] == pytest.approx(found[1], rel=0.4)


def test_one_response_that_takes_all_is_a_collapse() -> None:
    """The chosen sets' mass is far from all, but one of each set has it."""
    check = "collapse"
    found = findings(Stream(quality=0, noise=500), thresholds=Thresholds(chosen_mass=0.999))
    assert "one response of each chosen set" in found[check].message


def test_progress_is_asked_for_after_some_steps_only() -> None:
    stuck = Stream(quality=0.0005, noise=0.02)
    assert findings(stuck, steps=99) == {}
    assert findings(stuck, steps=200)["slow"].severity == 2
    rows = [{**stuck.row(step, MPO()), "lr": step * 1e-7} for step in range(20)]
    warming_up = Recent(
        steps=200, rows=rows, now=mean_of(rows), first=mean_of(rows), beta=0.1, alpha=0.0
    )
    assert CHECKS["slow"](warming_up, THRESHOLDS) is None


def test_lengths_of_rewards_that_are_rounding_say_nothing() -> None:
    """All rewards follow length, by a thousandth of a nat."""
    assert findings(Stream(quality=0, noise=0, per_token=1e-5)) == {}


def test_lengths_that_scores_follow_too_are_no_drift() -> None:
    def by_length(normal: Tensor, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        torch.randn(normal.shape, generator=generator)
        return torch.randint(20, 60, normal.shape, generator=generator).float()

    stream = Stream(quality=0, noise=0.5, per_token=0.2, scores=by_length)
    assert findings(stream) == {}


@pytest.mark.parametrize(("length", "word"), [(160.0, "longer"), (60.0, "shorter")])
def test_sampled_lengths(length: float, word: str) -> None:
    finding = sampled_length_drift(length, 100.0, THRESHOLDS)
    assert finding is not None
    assert f"become {word}" in finding.message
    assert sampled_length_drift(100.0 * THRESHOLDS.sampled_length - 1, 100.0, THRESHOLDS) is None
    assert sampled_length_drift(length**2 / 100, 100.0, THRESHOLDS).severity == pytest.approx(
        2 * finding.severity
    )


def test_means_are_over_groups_and_leave_out_what_is_nan() -> None:
    rows = [{"a": 1.0, "b": float("nan"), "groups": 1.0}, {"a": 4.0, "b": 2.0, "groups": 2.0}]
    assert mean_of(rows) == {"a": 3.0, "b": 2.0, "groups": pytest.approx(5 / 3)}


def test_limits_are_checked() -> None:
    with pytest.raises(ValueError, match="health.thresholds.window must be >= 3, got 2"):
        Thresholds(window=2)
    with pytest.raises(ValueError, match="health.thresholds.again must be > 1"):
        Thresholds(again=1.0)


def test_settings_that_are_advised_exist() -> None:
    """Each name in an advice is a setting of the command line."""
    from mpo_lightning import losses
    from mpo_lightning.commands.help_data import read_pages

    names = read_pages()["fit"].settings
    known = set(names) | {name.rpartition(".")[0] for name in names}
    known |= {f"model.loss.{name}" for name in vars(MPO())}
    text = sampled_length_drift(9.0, 1.0, THRESHOLDS).message
    for stream, loss, steps in SICK.values():
        for finding in findings(stream, steps=steps, alpha=loss.get("alpha", 0.5)).values():
            text += f"\n{finding.message}"
    advised = set(re.findall(r"(?:model|data|trainer|samples|health)\.[a-z_.]*[a-z]", text))
    assert len(advised) > 10
    assert advised <= known
    for name in ("EachMPO", "AboveQuantile", "TopBottom"):
        assert name in text
        assert name in losses.__all__
