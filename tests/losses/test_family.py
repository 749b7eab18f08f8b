"""Properties of every loss: against plain Python, padding, order, precision, configuration."""

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.plugins import HalfPrecision
from torch import Tensor

from mpo_lightning.losses import (
    DPO,
    GVPO,
    MDPO,
    MIPO,
    MPO,
    NCA,
    AboveThreshold,
    BestRest,
    EachAgainstBelow,
    EachMPO,
    Hinge,
    InfoNCA,
    LiPO,
    MultiLevelMPO,
    PlackettLuce,
    RobustDPO,
    SetLoss,
    TopBottom,
)
from mpo_lightning.losses.lists import ScoreTargetLoss
from tests.losses.family import LOSSES, MPO_LOSSES, each_loss, ragged, value_and_gradient
from tests.losses.oracle import plain, plain_gradient


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
def test_gradients_equal_their_closed_forms(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged(seed=2)
    _, gradients = value_and_gradient(loss, log_ratios, scores, valid)
    for gradient, r, s, mask in zip(gradients, log_ratios, scores, valid, strict=True):
        expected = plain_gradient(loss, r[mask].tolist(), s[mask].tolist())
        assert gradient[mask].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-13)


@each_loss
def test_gradcheck(loss: SetLoss) -> None:
    log_ratios, scores, valid = ragged(count=4, slots=6, seed=3)
    inputs = log_ratios.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: loss(r, scores, valid), (inputs,))


@each_loss
def test_a_group_teaches_at_the_first_step_where_it_has_contrast(loss: SetLoss) -> None:
    """At r = 0, where training starts; targets may be there, as InfoNCA's are for equal scores."""
    _, scores, valid = ragged()
    contrast = loss.has_contrast(scores, valid)
    _, gradient = value_and_gradient(loss, torch.zeros_like(scores), scores, valid)
    taught = gradient.abs().amax(1) > 1e-15
    assert contrast.sum() > 20
    assert not (taught & ~contrast).any()
    if not isinstance(loss, ScoreTargetLoss):
        assert torch.equal(taught, contrast)
    chosen, rejected = loss.sets(scores, valid)
    assert not (chosen & rejected).any()
    assert not ((chosen | rejected) & ~valid).any()


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
        (EachAgainstBelow(), [False, True, True, False]),
        (GVPO(), [True, True, True, False]),
        (GVPO(target="advantage"), [True, True, True, True]),
        (GVPO(target="quantile"), [True, True, True, True]),
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
def test_a_common_shift_of_log_ratios_cancels_but_for_absolute_targets(loss: SetLoss) -> None:
    """These say how likely responses should be, not merely in which proportion."""
    log_ratios, scores, valid = ragged()
    shift = torch.linspace(-30, 30, 60).double()[:, None]
    shifted = loss(log_ratios + shift, scores, valid)
    unshifted = loss(log_ratios, scores, valid)
    if isinstance(loss, NCA) or getattr(loss, "target", "centred") != "centred":
        assert (shifted - unshifted).abs().max() > 1
    else:
        torch.testing.assert_close(shifted, unshifted, rtol=1e-10, atol=1e-12)


def without_zeros(loss: SetLoss) -> bool:
    """There may be targets for equal scores; a hinge may be passed, a threshold not met."""
    on_threshold = isinstance(getattr(loss, "partition", None), AboveThreshold)
    return isinstance(loss, ScoreTargetLoss | Hinge) or on_threshold


@pytest.mark.parametrize(
    "loss",
    [
        *(loss for loss in LOSSES if not without_zeros(loss)),
        MPO(alpha=3.0, power=0.0, gamma=0.5),
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
    return parser.instantiate(config).loss


@pytest.mark.parametrize("loss", [*LOSSES, Halved(beta=0.2, part=0.25)], ids=str)
def test_a_configuration_builds_each_loss(loss: SetLoss) -> None:
    cls = type(loss)
    given = {field.name: getattr(loss, field.name) for field in fields(loss) if field.init}
    assert loss_from(f"{cls.__module__}.{cls.__name__}", **given) == loss


@pytest.mark.parametrize(
    ("name", "settings", "complaint"),
    [
        ("MPO", {"aplha": 0.5}, "aplha"),
        ("DPO", {"alpha": 0.5}, "alpha"),
        ("InfoNCA", {"temprature": 0.5}, "temprature"),
        ("NCA", {"beta": 0.1, "tau": 1.0}, "tau"),
        ("DPO", {"pairs": "best_worst"}, "best_worst"),
        ("GVPO", {"target": "centered"}, "centered"),
        ("MPO", {"deviation": "squared"}, "squared"),
        ("MPO", {"alpha": "much"}, "much"),
    ],
)
def test_a_configuration_with_a_mistake_is_refused(
    name: str, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ArgumentError, match=complaint):
        loss_from(f"mpo_lightning.losses.{name}", **settings)


def test_a_configuration_with_an_impossible_value_is_refused() -> None:
    with pytest.raises(ValueError, match="MPO: beta must be"):
        loss_from("mpo_lightning.losses.MPO", beta=-0.1)


CLASSES = sorted({type(loss) for loss in LOSSES}, key=lambda cls: cls.__name__)


def descriptions(cls: type) -> dict[str, str]:
    """Settings and their descriptions in the command line's help."""
    parser = ArgumentParser()
    parser.add_class_arguments(cls)
    return {action.dest: action.help for action in parser._actions}


@pytest.mark.parametrize("cls", [*CLASSES, Halved], ids=lambda cls: cls.__name__)
def test_inherited_settings_are_described_too(cls: type[SetLoss]) -> None:
    found = descriptions(cls)
    undescribed = {field.name for field in fields(cls) if field.init and not found[field.name]}
    assert undescribed == ({"part"} if cls is Halved else set())


def test_a_class_may_describe_an_inherited_setting_anew() -> None:
    assert descriptions(MDPO)["beta"] == descriptions(MPO)["beta"]
    assert "1 / (2 beta)" in descriptions(MIPO)["beta"]
