"""Runs that get SIGTERM save, end on all processes together, and can be resumed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runs import (
    AS_USERS,
    GO_ON,
    assert_same_adapter,
    assert_same_metrics,
    fit,
    metrics,
    of_two,
)

TERM = {
    # Of batches 6 to 9, which make one optimizer step, it is the third.
    "with gradients of three batches": ["TermAtBatch", "--trainer.callbacks.batch=8"],
    "in a validation": ["TermInValidation", "--trainer.callbacks.validation=2"],
    "in a validation with gradients": ["TermInValidation", "--trainer.callbacks.validation=3"],
}


@pytest.mark.parametrize("moment", TERM)
def test_run_saves_and_ends_after_sigterm(
    recipe: Path, whole: Callable[[str], Path], tmp_path: Path, moment: str
) -> None:
    """SIGTERM comes when nothing was to be saved before the run's end."""
    callback, option = TERM[moment]
    ended = fit(
        recipe, tmp_path / "ended", f"--trainer.callbacks+=tests.interruptions.{callback}", option
    )
    assert "SIGTERM: saved" in ended.stderr + ended.stdout
    checkpoint = torch.load(tmp_path / "ended" / "checkpoints" / "last.ckpt")
    assert 0 < checkpoint["global_step"] < 4
    fit(recipe, tmp_path / "ended", *GO_ON)
    expected, found = metrics(whole("single")), metrics(tmp_path / "ended")
    assert_same_metrics(found, expected[-len(found) :])
    assert_same_adapter(tmp_path / "ended", whole("single"))


def test_processes_save_and_end_together_after_sigterm(
    recipe: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """The other one waits inside an exchange of gradients when the signal comes to both.

    Lightning hands the signal on to the processes that it has started itself.
    """
    options = of_two("fsdp2")
    term = ["--trainer.callbacks+=tests.interruptions.TermAtBatch"]
    term += ["--trainer.callbacks.batch=4", "--trainer.callbacks.wait=3"]
    ended = fit(recipe, tmp_path / "ended", *options, *term, launcher=AS_USERS)
    assert "SIGTERM: saved" in ended.stderr + ended.stdout
    fit(recipe, tmp_path / "ended", *options, *GO_ON)
    assert_same_adapter(tmp_path / "ended", whole("fsdp2"))
