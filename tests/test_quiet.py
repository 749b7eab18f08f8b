"""Noise of the libraries is left out, and nothing else."""

import logging
import warnings

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from transformers.utils import logging as of_transformers

from mpo_lightning.model.loading import PolicyConfig, load_base
from mpo_lightning.quiet import NOTES, filter_known_warnings, quiet, without_bars


def test_only_what_is_known_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        filter_known_warnings()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be", stacklevel=1)
        warnings.warn("Experiment logs directory a/b exists and is not empty. All", stacklevel=1)
        warnings.warn("The number of training batches (3) is smaller than", stacklevel=1)
    assert [str(each.message)[:10] for each in told] == ["The number"]
    for name, notes in NOTES.items():
        with caplog.at_level(logging.INFO, logger=name):
            for note in notes:
                logging.getLogger(name).info(f"Tip: {note}, it is free")
            logging.getLogger(name).info("GPU available: True")
    assert [record.message for record in caplog.records] == ["GPU available: True"] * len(NOTES)


def test_quiet() -> None:
    bars = of_transformers.is_progress_bar_enabled()
    level = logging.getLogger("lightning.pytorch").level
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet():
            warnings.warn("The loader does not have many workers", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            assert not logging.getLogger("lightning.pytorch").isEnabledFor(logging.INFO)
            assert logging.getLogger("lightning.pytorch").isEnabledFor(logging.WARNING)
            assert not of_transformers.is_progress_bar_enabled()
        warnings.warn("does not have many workers", stacklevel=1)
    assert [str(w.message) for w in seen] == ["something else", "does not have many workers"]
    assert of_transformers.is_progress_bar_enabled() == bars
    assert logging.getLogger("lightning.pytorch").level == level


@pytest.mark.parametrize("asked_for", [False, True])
def test_bars_of_loading(
    asked_for: bool, base: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Downloads keep theirs."""
    monkeypatch.setattr(of_transformers, "_tqdm_active", True)
    level = of_transformers.get_verbosity()
    of_transformers.set_verbosity(of_transformers.INFO if asked_for else of_transformers.WARNING)
    try:
        with without_bars():
            assert not are_progress_bars_disabled()
        capsys.readouterr()
        load_base(PolicyConfig(base=base), torch.device("cpu"))
    finally:
        of_transformers.set_verbosity(level)
    assert ("Loading weights" in capsys.readouterr().err) == asked_for
    assert of_transformers.is_progress_bar_enabled()


def test_quiet_ends_with_an_error() -> None:
    bars = of_transformers.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    assert of_transformers.is_progress_bar_enabled() == bars
