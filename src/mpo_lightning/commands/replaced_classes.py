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
_check_type = _typehints.ActionTypeHint._check_type
# Old and new classes that were told: jsonargparse merges the same settings several times, those of
# the user first.
TOLD: set[tuple[str, str]] = set()


def start_from_defaults(kind: type) -> None:
    """Have parsers of a kind drop the settings of a class that another one replaces.

    What is dropped is told on stderr, in one line that names both classes.
    """

    def discard(parser_or_action: Any, before: Any, after: Any) -> None:
        if not isinstance(parent_parser.get(), kind):
            _carry_over(parser_or_action, before, after)  # type: ignore[no-untyped-call]
        elif _has_settings(before) and not _is_same(before["class_path"], after["class_path"]):
            _tell(parser_or_action, before, after["class_path"])
            before.pop("init_args", None)
            before.pop("dict_kwargs", None)

    def check(
        action: Any, value: Any, append: bool = False, cfg: Any = None, mode: Any = None
    ) -> Any:
        found = _check_type(action, value, append, cfg, mode)  # type: ignore[no-untyped-call]
        before = cfg.get(action.dest) if cfg else None
        # Some classes are replaced by a name, such as ddp.
        ours = isinstance(parent_parser.get(), kind)
        if ours and isinstance(found, str) and _has_settings(before):
            _tell(action, before, found)
        return found

    _typehints.discard_init_args_on_class_path_change = discard
    action_class: Any = _typehints.ActionTypeHint
    action_class._check_type = check


def _has_settings(value: Any) -> bool:
    is_class = isinstance(value, Namespace | dict) and "class_path" in value
    return is_class and ("init_args" in value or "dict_kwargs" in value)


def _is_same(old: str, new: str) -> bool:
    return old == new or import_object(old) is import_object(new)


def _tell(parser_or_action: Any, before: Any, new: str) -> None:
    """Tell which settings of a class are dropped: those that are not its defaults."""
    old, given = before["class_path"], before.get("init_args") or {}
    given = given.as_dict() if isinstance(given, Namespace) else given
    more = getattr(parser_or_action, "sub_add_kwargs", {})
    parser_of: Any = _typehints.ActionTypeHint.get_class_parser
    defaults = parser_of(old, more).get_defaults().as_dict()
    changed = {k: v for k, v in given.items() if v != defaults.get(k)}
    changed |= before.get("dict_kwargs") or {}
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
