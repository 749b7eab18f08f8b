"""Validators for settings.

Their messages name the class, the setting, the expected and the given value.
"""

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
from torch import Tensor

__all__ = [
    "check_arguments",
    "check_settings",
    "plain",
    "require",
    "require_instance",
    "require_number",
]


def plain(value: Any) -> Any:
    """Return NumPy's and torch's numbers and arrays as Python's, at any depth.

    A value without any is returned as it is.
    """
    if isinstance(value, np.generic | np.ndarray | Tensor):
        found = value.tolist()
        # A long double stays one.
        return found if type(found) is type(value) else plain(found)
    if isinstance(value, dict):
        entries = {key: plain(entry) for key, entry in value.items()}
        same = all(entry is value[key] for key, entry in entries.items())
        return value if same else entries
    if type(value) in {list, tuple}:
        parts = type(value)(map(plain, value))
        return value if all(a is b for a, b in zip(parts, value, strict=True)) else parts
    return value


# ----------------------------------------------------------------------------- by type hints


def check_settings(owner: object) -> None:
    """Check an object's settings, attributes of their names, by the hints of its constructor.

    A number of NumPy or torch becomes Python's. See `check_arguments` for the rest.

    Raises:
        ValueError: naming the setting, what it must be, and what was given.
    """
    name, kept = type(owner).__name__, vars(owner)
    for setting, hint in _hints(type(owner).__init__).items():
        if setting in kept:
            object.__setattr__(owner, setting, _checked(name, setting, kept[setting], hint))


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Check arguments of a function by its hints.

    A ``Literal`` takes one of its values, a bool true or false, and None stands only where the hint
    has it: what code compares with names of choices would take None for one of the others.

    Args:
        function: the function.
        values: its arguments by name; others are ignored.

    Raises:
        ValueError: naming the argument, what it must be, and what was given.
    """
    for name, hint in _hints(function).items():
        if name in values:
            _checked(function.__name__, name, values[name], hint)


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = get_type_hints(function)
    except NameError:
        # A user's class whose hints name what only type checkers import.
        hints = dict(function.__annotations__)
    return {name: hint for name, hint in hints.items() if name != "return"}


def _checked(owner: str, name: str, value: Any, hint: Any) -> Any:
    """Return a setting's value, NumPy's and torch's numbers as Python's."""
    value = plain(value)
    choices, expected = get_args(hint), ""
    if get_origin(hint) is Literal:
        expected = "" if value in choices else f"one of {', '.join(choices)}"
    elif hint is bool:
        expected = "" if isinstance(value, bool) else "true or false"
    elif value is None and hint not in {Any, object, NoneType} and NoneType not in choices:
        words = {int: "a whole number", float: "a number", str: "a text"}
        expected = words.get(hint, f"a {getattr(hint, '__name__', 'value')}")
    elif value is not None and not callable(value) and _wants_function(hint, value):
        expected, value = "a function that makes it, not what it makes", type(value)
    if expected:
        raise ValueError(f"{owner}: {name} must be {expected}, got {value!r}.")
    return value


def _wants_function(hint: Any, value: Any) -> bool:
    """Whether a hint is of a function, perhaps beside classes of which the value is none."""
    members = (hint,) if get_origin(hint) is Callable else get_args(hint)
    others = [each for each in members if get_origin(each) is not Callable]
    return len(others) < len(members) and not any(
        not isinstance(each, type) or isinstance(value, each) for each in others
    )


# --------------------------------------------------------------------------------- one by one


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


def require_instance(owner: object, name: str, kind: type) -> None:
    """Raise a ValueError unless a setting is an instance of a class."""
    require(owner, name, isinstance(getattr(owner, name), kind), f"a {kind.__name__}")
