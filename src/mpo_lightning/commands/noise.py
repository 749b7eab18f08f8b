"""What libraries tell of that somebody who runs a command can do nothing about, left out."""

import logging
import warnings

__all__ = ["be_calm"]

# Deprecations between the libraries, and a summary that counts weights as 32-bit ones.
WARNINGS = (
    ".*gradient_checkpointing(_enable)?` is deprecated",
    ".*isinstance\\(treespec, LeafSpec\\)` is deprecated",
    "torch.distributed.nn.functional.all_gather is deprecated",
    # Metrics are summed over the processes before they are logged.
    "It is recommended to use .*sync_dist=True",
    "Precision .* is not supported by the model summary",
    # `metrics.csv` of an earlier run is given another name before.
    "Experiment logs directory .* exists and is not empty",
)
# By the logger: advertising, and a kernel for inference that is not used here.
NOTES = {
    "lightning.pytorch.utilities.rank_zero": "try installing [litlogger]",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}


def be_calm() -> None:
    """Leave these messages out from here on; all others are told as ever."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in NOTES:
        logging.getLogger(name).addFilter(_is_of_interest)


def _is_of_interest(record: logging.LogRecord) -> bool:
    return NOTES[record.name] not in record.getMessage()
