"""Noise of the libraries is left out, and nothing else."""

import logging
import warnings

import pytest

from mpo_lightning.commands.noise import NOTES, be_calm


def test_only_what_is_known_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        be_calm()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be", stacklevel=1)
        warnings.warn("Experiment logs directory a/b exists and is not empty. All", stacklevel=1)
        warnings.warn("The number of training batches (3) is smaller than", stacklevel=1)
    assert [str(each.message)[:10] for each in told] == ["The number"]
    for name, message in NOTES.items():
        with caplog.at_level(logging.INFO, logger=name):
            logging.getLogger(name).info(f"Tip: {message}, it is free")
            logging.getLogger(name).info("Seed set to 0")
    assert [record.message for record in caplog.records] == ["Seed set to 0"] * len(NOTES)
