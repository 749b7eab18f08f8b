"""Whatever stands in the place of a value: a row is an error of its own, or it is read."""

from collections.abc import Iterator
from copy import copy
from typing import Any

import pytest

from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.sources import open_rows
from tests.data.schemas import (
    test_alpaca_eval,
    test_axolotl,
    test_llama_factory,
    test_ms_swift,
    test_openrlhf,
    test_schemas,
)
from tests.data.schemas.rows import Row

JUNK: list[Any] = [
    None,
    -1.5,
    float("nan"),
    10**400,
    " ",
    "[{",
    [],
    {},
    ["x"],
    [None],
    [[{}]],
    {"role": ["user"], "content": ["x"]},
    {"from": {}, "value": 1},
    [{"role": "tool_call", "content": "{}"}],
    b"x",
    "\ud800",
]
ROWS: list[Row] = [
    *(row for _, rows, _ in test_axolotl.ROWS.values() for row in rows[:1]),
    *(row for _, rows, _ in test_openrlhf.ROWS.values() for row in rows[:1]),
    *(row for _, rows, _ in test_schemas.CASES.values() for row in rows[:1]),
    test_ms_swift.ROW,
    {"messages": test_ms_swift.MESSAGES, "rejected_messages": test_ms_swift.MESSAGES},
    {"query": "a", "response": "b", "history": [["c", "d"]], "rejected_response": ["e", "f"]},
    test_llama_factory.SHAREGPT,
    {**test_llama_factory.ALPACA, "history": [["c", "d"]], "system": "e"},
    test_alpaca_eval.ROWS[0],
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from places(value[key], (*path, key))


def put(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    if not path:
        return junk
    changed = copy(value)
    changed[path[0]] = put(value[path[0]], path[1:], junk)
    return changed


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_junk_in_every_place(number: int) -> None:
    good = ROWS[number]
    schema = GroupReader(open_rows([good], "x")).schema
    bad = [put(good, path, junk) for path in places(good) for junk in JUNK]
    results = list(GroupReader(open_rows([*bad, good], "x"), schema=schema).results())
    if not schema.one_response_a_row:
        assert len(results) == len(bad) + 1
        assert results[-1].error is None
    # Nor does it decide what the others are.
    for row in bad:
        assert GroupReader(open_rows([row, good, good], "x")).schema == schema
