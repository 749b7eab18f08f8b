"""Errors name the setting at fault as the user wrote it."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.errors import UserError, fields_below, of_the_disk


def test_a_field_gets_the_prefix_of_each_caller() -> None:
    with pytest.raises(DataError) as caught, fields_below("model"), fields_below("policy"):
        raise DataError("it is missing.", field="base")
    assert str(caught.value) == "model.policy.base: it is missing."
    # From another process it comes back the same.
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.field) == (str(caught.value), "model.policy.base")


def test_an_error_without_a_field_stays_as_it_is() -> None:
    with pytest.raises(UserError) as caught, fields_below("model"):
        raise UserError("FSDP1 needs GPUs.")
    assert str(caught.value) == "FSDP1 needs GPUs."


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES", "ENOTDIR", "EEXIST", "EDQUOT"])
def test_error_of_the_disk_is_one_line_with_its_path(name: str) -> None:
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number), "/data/a\x1bfile")
    error.add_note("Set data.cache.")
    told = of_the_disk(error)
    assert told is not None
    assert told.startswith(f"/data/a\\x1bfile: {os.strerror(number)}. ")
    assert told.endswith("or name another place. Set data.cache.")
    assert "\n" not in told


def test_other_errors_of_the_system_keep_their_trace() -> None:
    assert of_the_disk(OSError(errno.ECONNREFUSED, "refused", "x")) is None
    # Nothing could be named.
    assert of_the_disk(OSError(errno.EIO, "Input/output error")) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_told_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "mpo_lightning", "cache", "show", "--tokens"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    told = "error: the command's output cannot be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (1, told)
