"""Rows through a real file and the real reader."""

import json
from pathlib import Path
from typing import Any

from mpo_lightning.data.reading import GroupReader, RowResult
from mpo_lightning.data.schemas.base import Schema

Row = dict[str, Any]


def said(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def write(rows: list[Any], folder: Path, name: str = "rows.json") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def results(rows: list[Any], folder: Path, schema: Schema | None = None) -> list[RowResult]:
    return list(GroupReader(write(rows, folder), schema=schema).results())


def as_row(result: RowResult) -> Row:
    assert result.error is None, str(result.error)
    group = result.group
    assert group is not None, result.skipped
    return {
        "prompt": group.prompt,
        "responses": group.responses,
        "scores": group.scores,
        **group.extra,
    }


def group_of(rows: list[Any], folder: Path, schema: Schema | None = None) -> Row:
    """The only group of some rows."""
    (result,) = results(rows, folder, schema)
    return as_row(result)


def error_of(rows: list[Any], folder: Path, schema: Schema | None = None) -> str:
    """The only error of some rows, of which the first can be used."""
    errors = [str(each.error) for each in results(rows, folder, schema) if each.error]
    assert len(errors) == 1, errors
    return errors[0]
