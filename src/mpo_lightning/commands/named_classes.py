"""What a ``class_path`` may make: classes of a setting's type, and nothing where any value may be.

jsonargparse calls whatever function is named where a setting takes an optimizer, a scheduler or any
other callable, and makes any class where a setting takes any value.
"""

from inspect import isclass
from typing import Any

from jsonargparse import _typehints, set_parsing_settings
from jsonargparse._common import parent_parser
from jsonargparse._util import import_object

__all__ = ["make_classes_only"]

_make = _typehints.adapt_class_type
_make_any = _typehints.adapt_classes_any


def make_classes_only(kind: type) -> None:
    """Have parsers of a kind refuse functions by ``class_path``, and keep values of type Any.

    Where a setting's type is a class, jsonargparse checks what is named itself: a subclass, or a
    function with that return type.
    """

    def make(value: Any, *args: Any, **more: Any) -> Any:
        ours = isinstance(parent_parser.get(), kind)
        if ours and more.get("typehint") is None and not isclass(import_object(value.class_path)):
            raise ImportError(f"{value.class_path} is not a class of the setting's type")
        return _make(value, *args, **more)  # type: ignore[no-untyped-call]

    def make_any(value: Any, *args: Any, **more: Any) -> Any:
        if isinstance(parent_parser.get(), kind):
            return value
        return _make_any(value, *args, **more)  # type: ignore[no-untyped-call]

    # Modules that run code, such as os and subprocess; by itself it warns of them only.
    set_parsing_settings(import_path_denylist=[])
    hints: Any = _typehints
    hints.adapt_class_type = make
    hints.adapt_classes_any = make_any
