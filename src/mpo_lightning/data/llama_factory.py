"""Data sets that LLaMA-Factory's ``dataset_info.json`` describes."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mpo_lightning.data.groups import DataError, is_list, show
from mpo_lightning.data.row_source import RawRow, RowSource, digest_of

__all__ = ["DESCRIPTIONS", "open_described"]

DESCRIPTIONS = "dataset_info.json"
# What a description calls a column, and LLaMA-Factory's own name for it.
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "kto_tag",
}
IN_ALPACA = frozenset({"instruction", "input", "output", "history"})
IN_MESSAGES = ("conversations", "chosen", "rejected")
# Columns that change what a model is asked, wherever they come from.
DECISIVE = ("input", "history", "system", "tools", "images", "videos", "audios")
# Names under which other formats hold a prompt or a response.
READ_ELSEWHERE = frozenset(
    {"prompt", "question", "query", "messages", "conversation", "response", "completion", "label"}
    | set(COLUMNS.values())
)
TAGS = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
FORMATTING = ("alpaca", "sharegpt", "openai")
KEYS = frozenset(
    {"file_name", "hf_hub_url", "formatting", "ranking", "columns", "tags", "split", "subset"}
)
# Where else the same data may be found.
MIRRORS = frozenset({"ms_hub_url", "om_hub_url"})


def open_described(
    path: Path, name: str, open_source: Callable[[str, str, str | None], RowSource]
) -> RowSource:
    """Open a data set by its description, with columns and roles under their usual names.

    Args:
        path: the ``dataset_info.json``.
        name: the data set.
        open_source: opens a source by its name, the split (if it is on the hub) and the subset.

    Raises:
        DataError: if it is not described, the description cannot be followed, or the source cannot
            be read.
    """
    where = f"{path}:{name}"
    try:
        known = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(known, dict) or not isinstance(known.get(name), dict):
        listed = show(sorted(known), 300) if isinstance(known, dict) else "nothing"
        raise DataError(
            f"{path}: no data set {name!r} among {listed}. Name one of them after a colon, "
            f"{path}:<name>."
        )
    described = {key: value for key, value in known[name].items() if value is not None}
    columns, tags = described.get("columns", {}), described.get("tags", {})
    for key, names in (("columns", columns), ("tags", tags)):
        texts = names.values() if isinstance(names, dict) else [names]
        if not all(isinstance(text, str | None) for text in texts) or not isinstance(names, dict):
            raise DataError(f"{where}: {key}: found {show(names)}; expected an object of texts.")
    by = described.get("formatting", "alpaca")
    unknown = sorted(
        (set(described) - KEYS - MIRRORS)
        | {f"columns.{key}" for key in set(columns) - set(COLUMNS)}
        | {f"tags.{key}" for key in set(tags) - {"role_tag", "content_tag", *TAGS}}
    )
    if unknown or by not in FORMATTING:
        found = f"the keys {unknown}" if unknown else f"formatting {by!r}"
        raise DataError(
            f"{where}: found {found}; expected the keys {sorted(KEYS)}, and a formatting of "
            f"{', '.join(FORMATTING)}. Name the data set's file itself, with data.columns."
        )
    if not described.get("ranking") and "kto_tag" not in columns:
        raise DataError(
            f"{where}: describes no preferences. Set `ranking`, or name the columns that hold "
            "them (chosen and rejected, or kto_tag)."
        )
    if "hf_hub_url" in described:
        split = described.get("split", "train")
        source = open_source(described["hf_hub_url"], split, described.get("subset"))
    elif "file_name" in described:
        source = open_source(str(path.parent / described["file_name"]), "train", None)
    else:
        raise DataError(f"{where}: names neither file_name nor hf_hub_url.")
    return _Described(source, where, described)


class _Described(RowSource):
    """Rows with columns and roles named as LLaMA-Factory names them by default.

    A column that the description does not name passes through, unless other formats hold a prompt
    or a response in it.
    """

    def __init__(self, source: RowSource, name: str, described: Mapping[str, Any]) -> None:
        self.source = source
        self.name = name
        self.in_cells = source.in_cells
        self.digest = digest_of(source.digest, json.dumps(described, sort_keys=True))
        in_alpaca = described.get("formatting", "alpaca") == "alpaca"
        unread = {"conversations"} if in_alpaca else IN_ALPACA
        given = described.get("columns", COLUMNS)
        # Their name of a column, and LLaMA-Factory's.
        self.columns = {
            theirs: COLUMNS[ours]
            for ours, theirs in given.items()
            if theirs and COLUMNS[ours] not in unread
        }
        tags = described.get("tags", {})
        self.keys = {
            tags.get("role_tag", "from"): "from",
            tags.get("content_tag", "value"): "value",
        }
        self.roles = {tags.get(tag, role): role for tag, role in TAGS.items()}

    def __len__(self) -> int:
        return len(self.source)

    def rows(self, start: int, stop: int) -> Iterator[tuple[str, RawRow]]:
        """Yield the rows, named by their own file."""
        for source, row in self.source.rows(start, stop):
            yield source, self._row(row, source) if isinstance(row, Mapping) else row

    def _row(self, row: Mapping[str, Any], source: str) -> RawRow:
        for name in DECISIVE:
            if row.get(name) and name not in self.columns:
                return DataError(
                    f"{source}: {name}: found a column that {self.name} does not name and that "
                    f"changes the conversation. Name it there (columns), or remove it."
                )
        renamed = {self.columns[name]: value for name, value in row.items() if name in self.columns}
        for name in IN_MESSAGES:
            if name in renamed:
                renamed[name] = self._messages(renamed[name])
        turns = renamed.get("conversations")
        # The conversation's own system prompt replaces the one in the column.
        if is_list(turns) and any(_role(turn) == "system" for turn in turns[:1]):
            renamed.pop("system", None)
        others = set(row) - set(self.columns) - READ_ELSEWHERE - set(renamed)
        return {**renamed, **{name: row[name] for name in row if name in others}}

    def _messages(self, value: Any) -> Any:
        """Return messages with the default keys and roles; anything else as it is."""
        if is_list(value):
            return [self._messages(message) for message in value]
        if not isinstance(value, Mapping):
            return value
        message = {self.keys.get(key, key): part for key, part in value.items()}
        role = message.get("from")
        return message | {"from": self.roles.get(role, role)} if isinstance(role, str) else message


def _role(message: object) -> object:
    return message.get("from", message.get("role")) if isinstance(message, Mapping) else None
