"""MPOModule through a real Trainer: gradients, metrics, schedules, the reference."""

import functools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.batch import GroupBatch
from mpo_lightning.losses import (
    DPO,
    GVPO,
    MDPO,
    MPO,
    AboveThreshold,
    EachAgainstBelow,
    EachMPO,
    LiPO,
    MultiLevelMPO,
    PlackettLuce,
    SetLoss,
    SimPO,
    TopBottom,
)
from mpo_lightning.model import logps
from mpo_lightning.model.loading import build_policy
from mpo_lightning.model.policy import Policy, PolicyError
from mpo_lightning.optim import WarmupCosine
from tests.conftest import example_rows, random_groups
from tests.training.fits import RAGGED, Recorder, adapter, loader, make_module, make_trainer

# --------------------------------------------------------------- the mean over a step's groups


@pytest.mark.parametrize("layout", ["shared", "separate"])
@pytest.mark.parametrize("sizes", [[1] * 8, [4, 4], [3, 1, 4], [2, 2, 2, 2], [5, 3]], ids=str)
def test_accumulated_groups_give_the_gradient_of_one_batch(
    base: str, sizes: list[int], layout: str
) -> None:
    """Ragged groups in ragged batches: the step is a mean over groups, not over batches."""
    groups = random_groups(RAGGED)
    expected = make_module(base, layout="separate")
    make_trainer().fit(expected, loader(groups, [8]))
    module = make_module(base, layout=layout)
    make_trainer(accumulate_grad_batches=len(sizes)).fit(module, loader(groups, sizes))
    start = make_module(base)
    start.configure_model()
    for name, weight in adapter(expected).items():
        step = (weight - adapter(start)[name]).abs().max()
        torch.testing.assert_close(adapter(module)[name], weight, rtol=0, atol=1e-6, msg=name)
        assert step > 1e-4 or "lora_A" in name, f"{name} did not move"


def test_clipping_sees_the_mean_gradient(base: str) -> None:
    """Clipped before the division, eight batches would be cut eight times as hard."""
    groups = random_groups(RAGGED)
    steps = {}
    for sizes in ([8], [3, 1, 4]):
        start = make_module(base)
        start.configure_model()
        module = make_module(base)
        trainer = make_trainer(accumulate_grad_batches=len(sizes), gradient_clip_val=0.1)
        trainer.fit(module, loader(groups, sizes))
        before = adapter(start)
        steps[len(sizes)] = {n: before[n] - w for n, w in adapter(module).items()}
    for name, step in steps[1].items():
        torch.testing.assert_close(steps[3][name], step, rtol=0, atol=1e-7)
    norm = sum(step.square().sum() for step in steps[3].values()) ** 0.5
    assert float(norm) == pytest.approx(0.05 * 0.1, rel=1e-3)


def test_last_partial_window_is_a_mean_over_its_own_groups(base: str) -> None:
    groups = random_groups(RAGGED)
    module = make_module(base)
    make_trainer(accumulate_grad_batches=3).fit(module, loader(groups, [2, 2, 2, 2]))
    expected = make_module(base)
    make_trainer().fit(expected, loader(groups, [6, 2]))
    for name, weight in adapter(expected).items():
        torch.testing.assert_close(adapter(module)[name], weight, rtol=0, atol=1e-6)


def test_gradient_is_that_of_the_mean_loss_by_hand(base: str) -> None:
    groups = random_groups(RAGGED)
    module = make_module(base)
    make_trainer(max_steps=1).fit(module, loader(groups, [8]))
    other = make_module(base)
    other.configure_model()
    assert other.policy is not None
    batch = GroupBatch.from_groups(groups)
    log_ratios = other.policy(batch) - other.policy.reference(batch)
    before = adapter(other)
    other.loss(log_ratios, batch.scores, batch.valid).mean().backward()
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            expected = before[name] - 0.05 * parameter.grad
            torch.testing.assert_close(adapter(module)[name], expected, rtol=0, atol=1e-7)


def test_groups_that_do_not_count_leave_the_step_alone(base: str) -> None:
    groups = random_groups(RAGGED)
    filler = GroupBatch.from_groups(groups[5:6], counted=False)
    batches = [GroupBatch.from_groups(groups[:4]), filler]
    module = make_module(base)
    record = Recorder()
    trainer = make_trainer(accumulate_grad_batches=2, callbacks=[record])
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    expected, expected_record = make_module(base), Recorder()
    make_trainer(callbacks=[expected_record]).fit(expected, loader(groups, [4]))
    for name, weight in adapter(expected).items():
        torch.testing.assert_close(adapter(module)[name], weight, rtol=0, atol=1e-7)
    (found,), (expected_step,) = record.steps, expected_record.steps
    assert found == pytest.approx(expected_step)


def test_logged_step_metrics_are_those_of_the_whole_step(base: str) -> None:
    groups = random_groups(RAGGED)
    one, many = Recorder(), Recorder()
    options: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 1}
    make_trainer(callbacks=[one], **options).fit(make_module(base), loader(groups, [8]))
    trainer = make_trainer(callbacks=[many], accumulate_grad_batches=3, **options)
    trainer.fit(make_module(base), loader(groups, [1, 4, 3]))
    assert len(one.steps) == 2
    for first, second in zip(one.steps, many.steps, strict=True):
        assert second == pytest.approx(first, rel=1e-4, abs=1e-5)


def test_step_zero_metrics_have_their_closed_form(base: str) -> None:
    groups = random_groups(RAGGED)
    record = Recorder()
    module = make_module(base, loss=MPO(beta=0.5))
    make_trainer(max_steps=1, callbacks=[record]).fit(module, loader(groups, [8]))
    above = [sum(s > sum(g.scores) / len(g.scores) for s in g.scores) for g in groups]
    expected = torch.tensor([len(g.scores) / k for g, k in zip(groups, above, strict=True)]).log()
    (values,) = record.steps
    assert values["train/loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert values["train/rewards/accuracy"] == 0.5
    assert values["train/rewards/margin"] == 0
    assert values["train/kl"] == 0


@pytest.mark.filterwarnings("ignore:.*bf16-true keeps the adapter in bfloat16")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("layout", ["shared", "separate"])
def test_precisions_train_close_to_each_other(base: str, precision: Any, layout: str) -> None:
    """Also the first-batch checks run in each: a fresh adapter stays at exactly zero."""
    record, batch = Recorder(), GroupBatch.from_groups(random_groups(RAGGED))
    module = make_module(base, layout=layout)
    trainer = make_trainer(precision=precision, max_epochs=4, callbacks=[record])
    trainer.fit(module, loader(random_groups(RAGGED), [8]))
    first, last = record.steps[0], record.steps[-1]
    at_zero = module.loss(torch.zeros_like(batch.scores), batch.scores, batch.valid)
    assert first["train/loss"] == pytest.approx(at_zero.mean().item(), rel=1e-5)
    assert last["train/loss"] < first["train/loss"] - 0.1


# ------------------------------------------------------------------------- the life of a step


def test_hooks_come_in_the_order_that_the_module_says(base: str) -> None:
    """A window of two batches, as in the docstring of training/module.py."""
    module = make_module(base, lr_scheduler=WarmupCosine())
    calls: list[str] = []

    def watch(name: str) -> None:
        hook = getattr(module, name)

        @functools.wraps(hook)
        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            result = hook(*args, **kwargs)
            if name == "optimizer_step":
                calls.append("weights changed")
            return result

        setattr(module, name, watched)

    before = ["on_train_batch_start", "training_step", "optimizer_zero_grad", "backward"]
    update = ["on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step"]
    after = ["lr_scheduler_step", "on_train_batch_end"]
    for name in (*before, *update, *after):
        watch(name)
    trainer = make_trainer(accumulate_grad_batches=2, max_steps=1)
    trainer.fit(module, loader(random_groups(RAGGED), [4, 4]))
    assert calls == [
        *before,
        "on_train_batch_end",
        "on_train_batch_start",
        *("optimizer_step", "training_step", "backward"),
        *("on_before_optimizer_step", "configure_gradient_clipping", "weights changed"),
        *after,
    ]


@pytest.mark.parametrize(
    ("layout", "name"), [("shared", "shared_row"), ("separate", "packed_rows")]
)
def test_index_tensors_are_made_once_a_batch(
    base: str, monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    """For policy and reference together; the first batch is checked, and not looked at here."""
    groups, made = random_groups(RAGGED), []
    original = getattr(logps, name)

    def rows(batch: GroupBatch, **settings: bool) -> Any:
        made.append(batch.sources)
        return original(batch, **settings)

    monkeypatch.setattr(logps, name, rows)
    make_trainer().fit(make_module(base, layout=layout), loader(groups, [4, 4]))
    assert made.count([group.source for group in groups[4:]]) == 1


# ------------------------------------------------------------------------ the data module's loss


def test_data_module_that_was_given_another_loss_is_refused(
    base: str, write_jsonl: Callable[..., str]
) -> None:
    path = write_jsonl(example_rows(3))
    data = PreferenceDataModule(tokenizer=base, train=path, loss=MPO(beta=0.1))
    with pytest.raises(ValueError, match=r"was given MPO\(.*but MPO\(.*Give both the same loss"):
        make_trainer().fit(make_module(base), data)


@pytest.mark.parametrize("given", [False, True])
def test_groups_that_teach_nothing_are_left_out_or_counted_in_a_warning(
    base: str, write_jsonl: Callable[..., str], given: bool
) -> None:
    """Two of five lie above the threshold as a whole, which only the loss knows."""
    rows = example_rows(5)
    for row in rows[:2]:
        row["scores"] = [score + 20 for score in row["scores"]]
    for row in rows[2:]:
        row["scores"] = [15, *range(len(row["scores"]) - 1)]
    loss = MPO(beta=0.5, partition=AboveThreshold(threshold=12))
    data = PreferenceDataModule(
        tokenizer=base, train=write_jsonl(rows), loss=loss if given else None, groups_per_batch=2
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        make_trainer(max_epochs=2).fit(make_module(base, loss=loss), data)
    found = [str(each.message) for each in warned if "teach MPO nothing" in str(each.message)]
    assert [text.split(" teach")[0] for text in found] == (
        [] if given else ["2 groups of this epoch"] * 2
    )


# ----------------------------------------------------------------------------------- the checks


def test_oracle_stops_a_policy_that_starts_away_from_its_reference(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(base)
    module.configure_model()
    assert module.policy is not None
    honest = module.policy.reference
    monkeypatch.setattr(module.policy, "reference", lambda batch: honest(batch) + 0.5)
    with pytest.raises(PolicyError, match="must agree, but a log-ratio.*0.5000"):
        make_trainer().fit(module, loader(random_groups(RAGGED), [8]))


def test_a_second_fit_continues_without_the_oracle(base: str) -> None:
    module = make_module(base)
    data = loader(random_groups(RAGGED), [4, 4])
    make_trainer().fit(module, data)
    first = adapter(module)
    make_trainer().fit(module, data)
    assert any(not torch.equal(first[n], p) for n, p in adapter(module).items())


# ---------------------------------------------------------------------- optimizer and schedule


class Rates(Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"max_epochs": 2}, 8),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 4),
        ({"max_epochs": 5, "max_steps": 7}, 7),
        ({"max_epochs": 1, "limit_train_batches": 2}, 2),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, 2),
        ({"max_epochs": -1, "max_steps": 6}, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_datamodule", [True, False])
def test_schedule_spans_the_run(
    base: str, write_jsonl: Callable[..., str], settings: Any, steps: int, with_datamodule: bool
) -> None:
    module = make_module(base, lr_scheduler=WarmupCosine(warmup=0.5))
    trainer = make_trainer(**settings)
    if with_datamodule:
        path = write_jsonl(example_rows(8))
        trainer.fit(module, PreferenceDataModule(tokenizer=base, train=path, groups_per_batch=2))
    else:
        trainer.fit(module, loader(random_groups(RAGGED), [2, 2, 2, 2]))
    assert trainer.global_step == steps
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_any_torch_scheduler_and_any_loss_can_be_injected(base: str) -> None:
    class Distance(SetLoss):
        def __call__(
            self, log_ratios: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor
        ) -> torch.Tensor:
            target = torch.where(valid, scores.float() - self.beta * log_ratios, 0.0)
            return target.square().sum(1)

    rates = Rates()
    module = make_module(
        base, loss=Distance(beta=1.0), lr_scheduler=lambda o: StepLR(o, step_size=1, gamma=0.5)
    )
    make_trainer(callbacks=[rates]).fit(module, loader(random_groups(RAGGED), [4, 4]))
    assert rates.rates == [0.05, 0.025]


@pytest.mark.parametrize("loss", [MPO(beta=0.5), MPO(beta=0.5, alpha=1.0), DPO(beta=0.5)], ids=str)
def test_training_raises_the_margin_and_lowers_the_loss(base: str, loss: SetLoss) -> None:
    record = Recorder()
    module = make_module(base, loss=loss)
    trainer = make_trainer(max_epochs=8, callbacks=[record], log_every_n_steps=1)
    trainer.fit(module, loader(random_groups(RAGGED), [8]))
    first, last = record.steps[0], record.steps[-1]
    assert last["train/loss"] < 0.8 * first["train/loss"]
    assert last["train/rewards/margin"] > 0.3
    assert last["train/rewards/accuracy"] > 0.7


@pytest.mark.parametrize(
    "loss",
    [
        SimPO(beta=2.0, pairs="all"),
        MPO(beta=3.0, reference_free=True, length_normalized=True, gamma=2.0),
        EachMPO(beta=0.5, length_normalized=True, likelihood=0.1),
        MDPO(beta=0.5, partition=TopBottom(k=1)),
        PlackettLuce(beta=0.5),
        MultiLevelMPO(beta=0.5, levels=2),
        EachAgainstBelow(beta=0.5, likelihood=0.1),
        GVPO(beta=0.5, target="quantile"),
        LiPO(beta=0.5, reference_free=True),
    ],
    ids=lambda loss: type(loss).__name__,
)
@pytest.mark.parametrize("responses_per_pass", [None, 2])
def test_a_step_is_the_gradient_of_what_the_loss_reads(
    base: str, loss: SetLoss, responses_per_pass: int | None
) -> None:
    """Reference-free, per token, with a likelihood term: by hand from log-probabilities."""
    groups = random_groups(RAGGED)
    module = make_module(base, loss=loss, responses_per_pass=responses_per_pass)
    record = Recorder()
    make_trainer(max_steps=1, callbacks=[record]).fit(module, loader(groups, [3, 5]))

    start = make_module(base, loss=loss)
    start.configure_model()
    batch = GroupBatch.from_groups(groups[:3])
    policy, reference = start._policy(batch), start._policy.reference(batch)
    compared = policy if loss.reference_free else policy - reference
    if loss.length_normalized:
        compared = torch.where(batch.valid, compared / batch.lengths, 0.0)
    losses = loss(compared, batch.scores, batch.valid)
    chosen, rejected = loss.sets(batch.scores, batch.valid)
    for number in range(3):
        at = chosen[number].nonzero().flatten().tolist()
        if loss.likelihood and at and rejected[number].any():
            term = sum(-policy[number, i] / batch.lengths[number, i] for i in at) / len(at)
            losses = losses + loss.likelihood * term * torch.eye(3)[number]
    losses.mean().backward()
    assert record.steps[0]["train/loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    for name, parameter in start.named_parameters():
        if parameter.requires_grad:
            expected = parameter.detach() - 0.05 * parameter.grad
            torch.testing.assert_close(adapter(module)[name], expected, rtol=0, atol=2e-6)
    # Policy and reference are one at the start, whatever the loss reads.
    assert record.steps[0]["train/kl"] == 0
    reward = (loss.beta * compared.detach())[chosen].mean().item()
    if loss.reference_free:
        assert reward < -1
        assert record.steps[0]["train/rewards/chosen"] < -1
    else:
        assert record.steps[0]["train/rewards/chosen"] == reward == 0


# ------------------------------------------------------------------ the reference, and slices


def test_reference_is_the_same_before_training_after_it_and_after_resume(
    base: str, tmp_path: Path
) -> None:
    groups = random_groups(RAGGED)
    batch = GroupBatch.from_groups(groups)
    module = make_module(base)
    module.configure_model()
    assert module.policy is not None
    before = module.policy.reference(batch)
    trainer = make_trainer(max_epochs=3)
    trainer.fit(module, loader(groups, [8]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert torch.equal(module.policy.reference(batch), before)
    resumed = make_module(base)
    make_trainer(max_epochs=4).fit(resumed, loader(groups, [8]), ckpt_path=str(tmp_path / "x.ckpt"))
    assert resumed.policy is not None
    assert torch.equal(resumed.policy.reference(batch), before)
    assert (resumed.policy(batch) - before).abs().max() > 0.1


def fit_cached(
    base: str, cache: Path, data: str, **settings: Any
) -> tuple[MPOModule, list[dict[str, float]]]:
    """A run over files, its validation included; what it logged at each step."""
    record = Recorder()
    trainer = make_trainer(max_epochs=2, callbacks=[record], **settings.pop("trainer", {}))
    module = make_module(base, reference_cache=str(cache), **settings)
    files = PreferenceDataModule(tokenizer=base, train=data, val=data, groups_per_batch=3)
    trainer.fit(module, files)
    return module, record.steps


@pytest.fixture
def count_references(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the responses that the reference computes."""
    counts: list[int] = []
    original = Policy.reference

    def reference(self: Policy, batch: GroupBatch) -> torch.Tensor:
        counts.append(int(batch.valid.sum()))
        return original(self, batch)

    monkeypatch.setattr(Policy, "reference", reference)
    return counts


def test_cached_reference_trains_as_one_computed_in_every_step(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path, count_references: list[int]
) -> None:
    data = write_jsonl(example_rows(8))
    responses = sum(len(row["responses"]) for row in example_rows(8))
    expected, steps = fit_cached(base, tmp_path, data)
    assert sum(count_references) > 2 * responses
    count_references.clear()
    module, cached_steps = fit_cached(base, tmp_path, data, reference="cached")
    # Each response once, before training and for validation, and the group of the first check.
    assert responses < sum(count_references) < responses + 9
    assert len(cached_steps) == len(steps) == 6
    for found, step in zip(cached_steps, steps, strict=True):
        assert found == pytest.approx(step, rel=1e-4, abs=1e-4)
    for name, weight in adapter(expected).items():
        torch.testing.assert_close(adapter(module)[name], weight, rtol=1e-4, atol=1e-5)

    count_references.clear()
    _, again = fit_cached(base, tmp_path, data, reference="cached", lora=LoRA(r=8))
    assert sum(count_references) < 9, "another adapter has the same reference"
    assert len(again) == 6


def test_what_the_cached_values_depend_on(base: str, tmp_path: Path) -> None:
    def identity(folder: str = base, layout: Any = "auto", **settings: Any) -> dict[str, str]:
        policy = build_policy(PolicyConfig(base=folder, **settings), layout)
        return policy.identity()

    original = identity()
    assert identity(lora=LoRA(r=2, lora_dropout=0.1), gradient_checkpointing=True) == original
    shutil.copytree(base, tmp_path / "elsewhere")
    assert identity(str(tmp_path / "elsewhere")) == original
    differing = {
        "dtype": identity(dtype="bfloat16"),
        "attention": identity(layout="separate"),
        "config": identity(),
        "weights": identity(),
    }
    assert differing["dtype"]["weights"] != original["weights"]
    assert differing["attention"]["weights"] == original["weights"]
    changed = AutoModelForCausalLM.from_pretrained(base)
    changed.config.rope_parameters["rope_theta"] = 500.0
    changed.save_pretrained(tmp_path / "config")
    assert identity(str(tmp_path / "config"))["config"] != original["config"]
    assert identity(str(tmp_path / "config"))["weights"] == original["weights"]
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    changed.save_pretrained(tmp_path / "weights")
    assert identity(str(tmp_path / "weights"))["weights"] != original["weights"]


def test_cache_filled_after_training_holds_the_reference(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """A cache made from a resumed policy must not hold that policy (lesson of others' caches)."""
    data = write_jsonl(example_rows(6))
    groups = random_groups(RAGGED)
    module = make_module(base)
    trainer = make_trainer(max_epochs=4)
    trainer.fit(module, loader(groups, [8]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = make_module(base, reference="cached", reference_cache=str(tmp_path / "cache"))
    files = PreferenceDataModule(tokenizer=base, val=data)
    trainer = make_trainer()
    (found,) = trainer.validate(resumed, files, ckpt_path=str(tmp_path / "x.ckpt"), verbose=False)
    (expected,) = make_trainer().validate(module, files, verbose=False)
    assert expected["val/kl"] > 0.01
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_values_of_another_model_in_the_cache_stop_the_run(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(example_rows(6))
    original = Policy.reference
    monkeypatch.setattr(Policy, "reference", lambda self, batch: original(self, batch) - 0.1)
    with pytest.raises(PolicyError, match="the adapter is fresh"):
        fit_cached(base, tmp_path / "a", data)
    monkeypatch.undo()
    monkeypatch.setattr(Policy, "check_reference", lambda *_: None)
    monkeypatch.setattr(Policy, "is_untrained", lambda _: False)
    monkeypatch.setattr(Policy, "reference", lambda self, batch: original(self, batch) - 0.1)
    fit_cached(base, tmp_path / "b", data, reference="cached")
    monkeypatch.undo()
    with pytest.raises(PolicyError, match=r"in the reference cache.*difference of 0\.1"):
        fit_cached(base, tmp_path / "b", data, reference="cached")


def test_cached_reference_wants_to_know_all_groups(base: str, tmp_path: Path) -> None:
    module = make_module(base, reference="cached", reference_cache=str(tmp_path))
    with pytest.raises(PolicyError, match="use PreferenceDataModule"):
        make_trainer().fit(module, loader(random_groups(RAGGED), [8]))


@pytest.mark.parametrize("settings", [{}, {"layout": "separate"}])
def test_slices_of_responses_train_as_one_pass(base: str, settings: dict[str, Any]) -> None:
    groups = random_groups(RAGGED)
    adapters = []
    for per_pass in (None, 1, 3):
        module = make_module(base, responses_per_pass=per_pass, **settings)
        trainer = make_trainer(accumulate_grad_batches=2, max_epochs=2, gradient_clip_val=0.5)
        trainer.fit(module, loader(groups, [3, 1, 4]))
        adapters.append(adapter(module))
    for other in adapters[1:]:
        for name, weight in adapters[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_a_group_of_512_responses_trains(base: str) -> None:
    groups = random_groups([(6, [3 + i % 5 for i in range(512)])])
    module = make_module(base, responses_per_pass=8)
    record = Recorder()
    make_trainer(max_epochs=2, callbacks=[record]).fit(module, loader(groups, [1]))
    assert record.steps[-1]["train/loss"] < record.steps[0]["train/loss"]


def test_responses_per_pass_must_be_positive(base: str) -> None:
    with pytest.raises(ValueError, match=r"model\.responses_per_pass must be at least 1, got 0"):
        make_module(base, responses_per_pass=0)


# ------------------------------------------------------------------------------ validate, test


@pytest.mark.parametrize("stage", ["val", "test"])
def test_evaluation_equals_the_mean_over_groups(
    base: str, write_jsonl: Callable[..., str], stage: str
) -> None:
    path = write_jsonl(example_rows(7))
    module = make_module(base)
    values = []
    for size in (7, 3, 1):
        data = PreferenceDataModule(tokenizer=base, groups_per_batch=size, **{stage: path})
        trainer = make_trainer()
        run = trainer.validate if stage == "val" else trainer.test
        values.append(run(module, data, verbose=False)[0])
    assert set(values[0]) >= {f"{stage}/loss", f"{stage}/rewards/accuracy", f"{stage}/kl"}
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-5, abs=1e-5)


def test_validation_in_the_middle_changes_no_gradient(
    base: str, write_jsonl: Callable[..., str]
) -> None:
    train, val = write_jsonl(example_rows(8)), write_jsonl(example_rows(5, seed=1), "val.jsonl")
    adapters = []
    for validation in (None, val):
        module = make_module(base, lora=LoRA(r=4, lora_dropout=0.0))
        data = PreferenceDataModule(tokenizer=base, train=train, val=validation, groups_per_batch=2)
        make_trainer(val_check_interval=2 if validation else None).fit(module, data)
        adapters.append(adapter(module))
    for name, weight in adapters[0].items():
        assert torch.equal(adapters[1][name], weight)
