"""A class that takes another's place in the settings starts from its own defaults, and says so.

jsonargparse carries over each setting of the old class that the new one accepts, so that a loss
would be trained with another loss's beta.
"""

import os
import sys
from typing import Any

from jsonargparse import Namespace, _typehints
from jsonargparse._common import parent_parser
from jsonargparse._util import import_object

__all__ = ["TOLD", "start_from_defaults"]

_carry_over = _typehints.discard_init_args_on_class_path_change
# Old and new classes that were told: jsonargparse merges the same settings several times, those of
# the user first.
TOLD: set[tuple[str, str]] = set()


def start_from_defaults(kind: type) -> None:
    """Have parsers of a kind drop the settings of a class that another one replaces.

    What is dropped is told on stderr, in one line that names both classes.
    """

    def discard(parser_or_action: Any, before: Any, after: Any) -> None:
        if isinstance(parent_parser.get(), kind):
            _drop(parser_or_action, before, after)
        else:
            _carry_over(parser_or_action, before, after)  # type: ignore[no-untyped-call]

    _typehints.discard_init_args_on_class_path_change = discard


def _drop(parser_or_action: Any, before: Any, after: Any) -> None:
    has_settings = isinstance(before, Namespace | dict) and (
        "init_args" in before or "dict_kwargs" in before
    )
    if not has_settings or before["class_path"] == after["class_path"]:
        return
    old, new = before["class_path"], after["class_path"]
    if import_object(old) is import_object(new):
        return
    given = before.pop("init_args", None) or {}
    given = given.as_dict() if isinstance(given, Namespace) else given
    more = getattr(parser_or_action, "sub_add_kwargs", {})
    parser_of: Any = _typehints.ActionTypeHint.get_class_parser
    defaults = parser_of(old, more).get_defaults().as_dict()
    changed = {k: v for k, v in given.items() if v != defaults.get(k)}
    changed |= before.pop("dict_kwargs", None) or {}
    if not changed or (old, new) in TOLD:
        return
    TOLD.add((old, new))
    # The processes that a run starts parse the same settings.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        before_it, name = (path.rpartition(".")[2] for path in (old, new))
        values = ", ".join(f"{key} {_short(value)}" for key, value in changed.items())
        sys.stderr.write(
            f"{name} takes the place of {before_it}, whose settings are dropped ({values}): {name} "
            "has its own defaults, and what is set for it.\n"
        )


def _short(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return "null" if value is None else str(value)
