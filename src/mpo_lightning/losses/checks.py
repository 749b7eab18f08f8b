"""Validators for settings.

Their messages name the class, the setting, the expected and the given value.
"""

import math
from typing import get_args

__all__ = ["require", "require_choice", "require_instance", "require_number"]


def require(owner: object, name: str, condition: bool, expected: str) -> None:
    """Raise unless the condition on a setting holds.

    Args:
        owner: the configured object.
        name: the setting, an attribute of it.
        condition: whether its value is allowed.
        expected: the allowed values in words, as they follow "must be".

    Raises:
        ValueError: the condition does not hold.
    """
    if not condition:
        value = getattr(owner, name)
        raise ValueError(f"{type(owner).__name__}: {name} must be {expected}, got {value!r}.")


def require_number(
    owner: object, name: str, expected: str, *, low: float, high: float = math.inf, **ends: bool
) -> None:
    """Raise unless a setting is a finite number in an interval.

    Args:
        owner: the configured object.
        name: the setting, an attribute of it.
        expected: the interval in words.
        low: lower bound, which belongs to the interval.
        high: upper bound, which belongs to the interval. Defaults to no bound.
        ends: ``open_low=True`` or ``open_high=True`` excludes that bound.

    Raises:
        ValueError: the setting is no number, not finite, or outside the interval.
    """
    value = getattr(owner, name)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    inside = number and low <= value <= high
    at_open_end = (ends.get("open_low") and value == low) or (
        ends.get("open_high") and value == high
    )
    require(owner, name, inside and not at_open_end, expected)


def require_choice(owner: object, name: str, annotation: object) -> None:
    """Raise a ValueError unless a setting is one of the values of a ``Literal``."""
    choices = get_args(annotation)
    require(owner, name, getattr(owner, name) in choices, f"one of {', '.join(choices)}")


def require_instance(owner: object, name: str, kind: type) -> None:
    """Raise a ValueError unless a setting is an instance of a class."""
    require(owner, name, isinstance(getattr(owner, name), kind), f"a {kind.__name__}")
