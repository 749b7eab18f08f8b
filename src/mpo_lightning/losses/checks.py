"""What a configured object says when a setting cannot be: class, setting, expected, found."""

import math
from typing import get_args

__all__ = ["require", "require_choice", "require_instance", "require_number"]


def require(owner: object, name: str, condition: bool, expected: str) -> None:
    """Refuse a setting unless the condition holds.

    Raises:
        ValueError: naming the owner's class, the setting, what was expected and what was found.
    """
    if not condition:
        value = getattr(owner, name)
        raise ValueError(f"{type(owner).__name__}: {name} must be {expected}, got {value!r}.")


def require_number(
    owner: object, name: str, expected: str, *, low: float, high: float = math.inf, **ends: bool
) -> None:
    """Refuse a setting unless it is a finite number between two bounds, which belong to it.

    Args:
        owner: the configured object.
        name: the setting.
        expected: the range in words.
        low: lower bound.
        high: upper bound.
        ends: ``open_low=True`` or ``open_high=True`` leave a bound out.
    """
    value = getattr(owner, name)
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    inside = number and low <= value <= high
    at_open_end = (ends.get("open_low") and value == low) or (
        ends.get("open_high") and value == high
    )
    require(owner, name, inside and not at_open_end, expected)


def require_choice(owner: object, name: str, annotation: object) -> None:
    """Refuse a setting that is none of a ``Literal``'s words."""
    choices = get_args(annotation)
    require(owner, name, getattr(owner, name) in choices, f"one of {', '.join(choices)}")


def require_instance(owner: object, name: str, kind: type) -> None:
    """Refuse a setting that is no instance of a class."""
    require(owner, name, isinstance(getattr(owner, name), kind), f"a {kind.__name__}")
