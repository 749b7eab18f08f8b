"""What a run does when numbers stop being numbers, or memory runs out."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mpo_lightning.batch import GroupBatch
from mpo_lightning.training.failures import (
    FiniteSteps,
    NonFiniteError,
    all_finite,
    describe_nonfinite,
    is_out_of_memory,
)
from tests.conftest import example_rows, random_groups
from tests.runs import OVERLAYS, assert_same_adapter, fit, metrics, write_recipe


@pytest.fixture
def recipe(base: str, write_jsonl: Callable[..., str], tmp_path: Path) -> Path:
    """Row 3 has a score of 13; 6 groups in 3 steps of two batches."""
    rows = example_rows(6)
    rows[2]["scores"][1] = 13.0
    return write_recipe(
        tmp_path,
        base,
        write_jsonl(rows),
        trainer={"max_epochs": 1, "accumulate_grad_batches": 2},
        model={"lr_scheduler": None},
        data={"groups_per_batch": 1},
    )


def explode(kind: str = "") -> list[str]:
    return [f"--model.loss=tests.interruptions.Explosive{kind}", "--model.loss.beta=0.5"]


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_loss_that_is_no_number_stops_and_names_the_row(
    recipe: Path, tmp_path: Path, strategy: str
) -> None:
    root = tmp_path / "run"
    options = ["--checkpoint.every_n_train_steps=1", *OVERLAYS[strategy]]
    result = fit(recipe, root, *explode(), *options, check=False)
    assert result.returncode == 1
    assert "the loss of 1 group(s) is not finite" in result.stderr
    assert f"{tmp_path / 'groups.jsonl'}:3: loss nan, log-ratios [" in result.stderr
    assert ", scores [" in result.stderr
    assert "13" in result.stderr
    assert "Traceback" not in result.stderr
    for file in (root / "checkpoints").glob("*.ckpt"):
        weights = torch.load(file)["state_dict"]
        assert all(weight.isfinite().all() for weight in weights.values())


@pytest.mark.parametrize("kind", ["", "Gradient"])
@pytest.mark.parametrize("strategy", ["single", "fsdp2"])
def test_such_steps_can_be_left_out_and_are_counted(
    recipe: Path, tmp_path: Path, strategy: str, kind: str
) -> None:
    """The adapter at the end is that of a run whose step the row was not part of."""
    root = tmp_path / "run"
    options = ["--model.on_nonfinite=skip", *OVERLAYS[strategy]]
    accumulate = 2 if strategy == "single" else 1
    options += [f"--trainer.accumulate_grad_batches={accumulate}"]
    result = fit(recipe, root, *explode(kind), *options)
    assert "is left out (1 so far)" in result.stderr
    counts = [row["train/skipped_steps"] for row in metrics(root)]
    assert len(counts) == 3
    assert counts[-1] == 1
    finite = [math.isfinite(row["train/loss"]) for row in metrics(root)]
    assert finite.count(False) == (0 if kind else 1)
    assert torch.load(root / "checkpoints" / "last.ckpt")["skipped_steps"] == 1


def test_a_skipped_step_changes_no_weight(recipe: Path, tmp_path: Path) -> None:
    """Neither by momentum nor by weight decay: ended right before it or after it is the same."""
    options = [*explode(), "--model.on_nonfinite=skip", "--model.optimizer.weight_decay=0.5"]
    options += ["--data.seed=1"]
    fit(recipe, tmp_path / "all", *options)
    losses = [row["train/loss"] for row in metrics(tmp_path / "all")]
    bad = list(map(math.isfinite, losses)).index(False)
    assert bad > 0, "weights that never moved prove nothing: take another seed"
    for name, steps in (("with", bad + 1), ("without", bad)):
        fit(recipe, tmp_path / name, *options, f"--trainer.max_steps={steps}")
    assert_same_adapter(tmp_path / "with", tmp_path / "without")


def test_out_of_memory_gives_advice(
    recipe: Path, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    """The system refuses the memory for a group of very many responses."""
    texts = [f"An apple grows on a tree; so does a pear {number}." for number in range(3000)]
    row = {"prompt": "A fruit?", "responses": texts, "scores": [i % 7 for i in range(3000)]}
    options = [f"--data.train={write_jsonl([row], 'large.jsonl')}"]
    options += ["--trainer.callbacks+=tests.interruptions.LittleMemory"]
    result = fit(recipe, tmp_path / "run", *options, check=False)
    assert result.returncode == 1
    assert "Out of memory. To need less" in result.stderr
    assert "model.responses_per_pass" in result.stderr
    assert "Traceback" not in result.stderr


def test_out_of_memory_is_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def step_of(
    steps: FiniteSteps, losses: list[float], gradient: float, *, elsewhere: float = 0.0
) -> tuple[bool, torch.Tensor | None]:
    """Ask for the fourth step, of one batch; what it says, and the gradient afterwards.

    Args:
        steps: what is tested.
        losses: of the groups.
        gradient: of the only parameter.
        elsewhere: whether another process has something that is not finite.
    """
    strategy = SimpleNamespace(reduce=lambda here, reduce_op: here + elsewhere)
    trainer: Any = SimpleNamespace(precision_plugin=None, strategy=strategy, global_step=3)
    groups = random_groups([(3, [2, 2])] * len(losses))
    loss = torch.tensor(losses)
    steps.add(GroupBatch.from_groups(groups), loss, torch.zeros(len(losses), 2))
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([gradient])
    accepted = steps.accept(trainer, loss.mean(), [parameter])
    steps.clear()
    return accepted, parameter.grad


def test_finite_steps_are_made() -> None:
    steps = FiniteSteps("stop")
    assert step_of(steps, [1.0, 2.0], 3.0) == (True, torch.tensor([3.0]))
    assert steps.skipped == 0


@pytest.mark.parametrize(
    ("losses", "gradient", "elsewhere", "found"),
    [
        ([1.0, math.nan], math.nan, 0.0, r"of 1 group\(s\) is not finite:\n  random:2: loss nan"),
        ([1.0, 2.0], math.inf, 0.0, "all losses are finite, but the gradient is not"),
        ([1.0, 2.0], 3.0, 1.0, "all losses are finite, but the gradient is not"),
    ],
    ids=["loss", "gradient", "another process"],
)
def test_steps_that_are_not_finite_stop_the_run_or_are_left_out(
    losses: list[float], gradient: float, elsewhere: float, found: str
) -> None:
    with pytest.raises(NonFiniteError, match=rf"^Optimizer step 4: (?s:.*){found}"):
        step_of(FiniteSteps("stop"), losses, gradient, elsewhere=elsewhere)
    steps = FiniteSteps("skip")
    for skipped in (1, 2):
        with pytest.warns(
            UserWarning, match=rf"step 4 is left out \({skipped} so far\): .*{found}"
        ):
            # Optimizers pass over a parameter without gradient.
            assert step_of(steps, losses, gradient, elsewhere=elsewhere) == (False, None)
    # Nothing of a step is left for the next one.
    assert step_of(steps, [1.0], 3.0) == (True, torch.tensor([3.0]))
    assert steps.skipped == 2


def test_descriptions_name_counted_groups_only() -> None:
    batch = GroupBatch.from_groups(random_groups([(3, [2, 2]), (3, [2, 2, 4]), (3, [2, 2])]))
    batch.counted[2] = False
    loss = torch.tensor([1.0, torch.inf, torch.nan])
    ratios = torch.tensor([[0.0, 1, 2], [1.5, -2, torch.inf], [0, 0, 0]])
    (line,) = describe_nonfinite(batch, loss, ratios)
    assert line.startswith("random:2: loss inf, log-ratios [1.5, -2, inf], scores [0.")


def test_finite_gradients() -> None:
    assert all_finite([torch.zeros(2), torch.ones(3)])
    assert not all_finite([torch.zeros(2), torch.tensor([1.0, torch.nan])])
    assert not all_finite([torch.tensor([torch.inf])])
