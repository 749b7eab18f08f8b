"""What is known is not said, what is not is, and afterwards all is as before."""

import logging
import warnings

import pytest
from transformers.utils import logging as of_transformers

from mpo_lightning.studies.calm import quiet


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


def test_quiet_ends_with_an_error() -> None:
    bars = of_transformers.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet():
        raise RuntimeError
    assert of_transformers.is_progress_bar_enabled() == bars
