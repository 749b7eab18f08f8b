"""Filters for third-party messages that a user of this package cannot act on."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["filter_known_warnings", "quiet", "without_bars"]

# Deprecations between libraries, and a summary that counts weights as 32-bit ones.
WARNINGS = (
    ".*gradient_checkpointing(_enable)?` is deprecated",
    ".*isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "torch.distributed.nn.functional.all_gather is deprecated",
    # Predictions say which row they belong to.
    "Couldn't infer the batch indices fetched from your dataloader",
    # Metrics are summed over the processes before they are logged.
    "It is recommended to use .*sync_dist=True",
    # A data module without validation files.
    "Total length of `list` across ranks is zero",
    "Precision .* is not supported by the model summary",
    # PEFT looks for the ranks of fused experts among layers only.
    "The following (rank|alpha)_pattern keys did not match any targeted module",
    # The `metrics.csv` of an earlier run is renamed before.
    "Experiment logs directory .* exists and is not empty",
    # The module's own `optimizer_step` expects it.
    "When using `Trainer.accumulate_grad_batches != 1.` and overriding",
)
# Of runs without workers, by the hundred.
WARNINGS_OF_SMALL_RUNS = (
    ".*does not have many workers.*",
    ".*is_gradient_checkpointing.*",
)
# By logger: advertising, what the settings or the run's last lines say anyway, devices that are not
# asked for, and an inference kernel that is not used here.
NOTES = {
    "lightning.pytorch.utilities.rank_zero": (
        "try installing [litlogger]",
        "TPU available",
        "`Trainer.fit` stopped: `max_",
    ),
    "lightning.fabric.utilities.seed": ("Seed set to",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}
# Lowest level that is still shown. bitsandbytes warns when imported that a package is missing.
LEVELS = {
    "lightning.pytorch": logging.WARNING,
    "lightning.fabric": logging.WARNING,
    "bitsandbytes": logging.ERROR,
}


def filter_known_warnings() -> None:
    """Hide `WARNINGS` and `NOTES` for the rest of the process; all others are shown."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in NOTES:
        logging.getLogger(name).addFilter(_is_of_interest)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return not any(note in record.getMessage() for note in NOTES[record.name])


@contextmanager
def without_bars() -> Iterator[None]:
    """Hide transformers' bars of loading and saving for a while; those of downloads stay.

    With the environment's ``TRANSFORMERS_VERBOSITY=info`` they are shown.
    """
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        enable_progress_bars,
    )
    from transformers.utils import logging as of_transformers

    if (
        not of_transformers.is_progress_bar_enabled()
        or of_transformers.get_verbosity() <= of_transformers.INFO
    ):
        yield
        return
    downloads = not are_progress_bars_disabled()
    of_transformers.disable_progress_bar()
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        of_transformers.enable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide Lightning's notes, other libraries' progress bars and the known warnings for a while."""
    import datasets
    from transformers.utils import logging as of_transformers

    levels = {name: logging.getLogger(name).level for name in LEVELS}
    bars = of_transformers.is_progress_bar_enabled()
    of_datasets = not datasets.are_progress_bars_disabled()
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    of_transformers.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for message in (*WARNINGS, *WARNINGS_OF_SMALL_RUNS):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        if bars:
            of_transformers.enable_progress_bar()
        if of_datasets:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
