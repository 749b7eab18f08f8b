"""Errors name the setting at fault as the user wrote it."""

import pickle

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.errors import UserError, fields_below


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
