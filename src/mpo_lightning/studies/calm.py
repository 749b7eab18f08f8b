"""Libraries kept from saying hundreds of times what a study's runs have in common."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]

# Deprecations inside the libraries, loaders without workers, and no validation data.
KNOWN = (
    ".*does not have many workers.*",
    ".*is_gradient_checkpointing.*",
    ".*LeafSpec.*",
    ".*Total length of `list` across ranks is zero.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notes, the bars of other libraries, and the warnings that are known."""
    import datasets
    from transformers.utils import logging as of_transformers

    # bitsandbytes warns, when it is imported, that a package for 4-bit weights is missing.
    known = {"lightning.pytorch": logging.WARNING, "lightning.fabric": logging.WARNING}
    known["bitsandbytes"] = logging.ERROR
    levels = {name: logging.getLogger(name).level for name in known}
    bars = of_transformers.is_progress_bar_enabled()
    of_datasets = not datasets.are_progress_bars_disabled()
    for name, level in known.items():
        logging.getLogger(name).setLevel(level)
    of_transformers.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            for message in KNOWN:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        if bars:
            of_transformers.enable_progress_bar()
        if of_datasets:
            datasets.enable_progress_bars()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
