"""Groups of any range of a source, and columns under other names."""

from collections.abc import Callable
from typing import Any

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader, RowResult
from mpo_lightning.data.schemas.base import Converted, Row, Schema
from mpo_lightning.data.schemas.detect import Canonical
from mpo_lightning.data.schemas.pairs import Pairs, ScoredPairs
from mpo_lightning.data.schemas.single_response import ScoredResponses, Unpaired
from tests.conftest import example_rows

Write = Callable[..., str]


def prompts(results: list[RowResult]) -> list[Any]:
    return [result.group and result.group.prompt for result in results]


def test_any_range_of_groups(write_jsonl: Write) -> None:
    rows = example_rows(7)
    reader = GroupReader(write_jsonl(rows))
    assert len(reader) == 7
    for start in range(8):
        for stop in range(start, 8):
            expected = [row["prompt"] for row in rows[start:stop]]
            assert prompts(list(reader.results(start, stop))) == expected


def test_any_range_where_a_row_holds_one_response(write_jsonl: Write) -> None:
    """Rows of a prompt lie apart; one cannot be read, one has no score, one prompt is alone."""
    rows: list[Any] = [
        {"prompt": "A", "response": "a0", "score": 1, "id": 7, "judge": "x"},
        {"prompt": "B", "response": "b0", "score": 2, "id": 8, "judge": "x"},
        "{broken",
        {"prompt": "A", "response": "a1", "score": 3, "id": 7, "judge": "y"},
        {"prompt": "C", "response": "c0", "score": 3, "id": 9, "judge": "x"},
        {"prompt": "B", "response": "b1", "score": -2.5, "id": 8, "judge": "x"},
        {"prompt": "A", "response": "a2", "score": 0, "id": 7, "judge": "z"},
    ]
    path = write_jsonl(rows)
    reader = GroupReader(path)
    assert len(reader) == 4
    whole = list(reader.results())
    first, second, broken, alone = whole
    assert first.group is not None
    assert first.group.responses == ["a0", "a1", "a2"]
    assert first.group.scores == [1.0, 3.0, 0.0]
    assert first.group.extra == {"id": 7, "judge": ["x", "y", "z"]}
    assert first.source == f"{path}:1"
    assert second.group is not None
    assert (second.group.responses, second.group.scores) == (["b0", "b1"], [2.0, -2.5])
    assert "groups.jsonl:3: not valid JSON" in str(broken.error)
    assert alone.skipped == "with a single response"
    for start in range(5):
        for stop in range(start, 5):
            found = list(reader.results(start, stop))
            assert [result.source for result in found] == [o.source for o in whole[start:stop]]
            assert prompts(found) == prompts(whole[start:stop])


ANSWERS = {
    "label": {"prompt": "Why?", "completion": "So.", "label": True},
    "score": {"instruction": "Why?", "response": "So.", "score": 1.0},
    "kto_tag": {"question": "Why?", "output": "So.", "kto_tag": True},
}


@pytest.mark.parametrize("of", ANSWERS)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("system", "Be brief."),
        ("tools", [{"name": "f"}]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("history", [["Hello", "Hi!"]]),
    ],
)
def test_rows_of_other_conversations_make_other_groups(
    of: str, column: str, value: Any, write_jsonl: Write
) -> None:
    row = ANSWERS[of]
    other = {**row, column: value}
    reader = GroupReader(write_jsonl([row, other, row, {**other}, {**row, column: None}]))
    assert [len(r.group.responses) for r in reader.results() if r.group] == [3, 2]


def test_columns_under_other_names(write_jsonl: Write) -> None:
    rows = [
        {"question": row["prompt"], "answers": row["responses"], "marks": row["scores"]}
        for row in example_rows(2)
    ]
    path = write_jsonl(rows)
    columns = {"question": "prompt", "answers": "responses", "marks": "scores"}
    found = prompts(list(GroupReader(path, columns=columns).results()))
    assert found == [row["prompt"] for row in example_rows(2)]
    with pytest.raises(
        DataError, match=r"groups\.jsonl:1: data\.columns renames \['mark'\]; found"
    ):
        GroupReader(path, columns={"mark": "scores"})
    with pytest.raises(DataError, match="renames onto columns that are there already"):
        GroupReader(path, columns={"answers": "question"})


WHOLE = example_rows(1)[0]
PAIR = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
UNPAIRED = {"prompt": "Why?", "completion": "So.", "label": True}
SCORED = {"prompt": "Why?", "response": "So.", "score": 1.0}


@pytest.mark.parametrize(
    ("bad", "good", "schema"),
    [
        ({**PAIR, "chosen": None}, PAIR, Pairs()),
        ({}, PAIR, Pairs()),
        ("{broken", PAIR, Pairs()),
        (7, PAIR, Pairs()),
        # It has another format than all others.
        (WHOLE, PAIR, Pairs()),
        ({**PAIR, "score_chosen": 2.0, "score_rejected": 1.0}, PAIR, Pairs()),
        (
            {**example_rows(1)[0], "responses": None, "scores": None},
            example_rows(1)[0],
            Canonical(),
        ),
        ({"prompt": None, "response": None, "score": None}, SCORED, ScoredResponses()),
        ({"prompt": "Why?", "completion": "So.", "label": None}, UNPAIRED, Unpaired()),
    ],
)
def test_a_bad_first_row_is_one_bad_row(
    bad: Any, good: Any, schema: Schema, write_jsonl: Write
) -> None:
    path = write_jsonl([bad, good, {**good}, *[good] * 5])
    reader = GroupReader(path)
    assert reader.schema == schema
    found = list(reader.results())
    if bad != {**PAIR, "score_chosen": 2.0, "score_rejected": 1.0}:
        assert [result.source for result in found if result.error] == [f"{path}:1"]
    assert all(result.group for result in found[1:])


def test_first_hundred_rows_decide(write_jsonl: Write) -> None:
    """By what most of them are; where none can be told, the most usual columns are named."""
    scored = {**PAIR, "score_chosen": 2.0, "score_rejected": 1.0}
    assert GroupReader(write_jsonl([*[PAIR] * 51, *[scored] * 49])).schema == Pairs()
    assert GroupReader(write_jsonl([*[PAIR] * 49, *[scored] * 51])).schema == ScoredPairs()
    # Those that follow do not count.
    assert GroupReader(write_jsonl([*[PAIR] * 100, *[scored] * 200])).schema == Pairs()
    with pytest.raises(DataError, match=r"jsonl:2: the columns \['answer', 'question'\] fit no"):
        GroupReader(write_jsonl([{"odd": 1}, *[{"question": "A?", "answer": "a"}] * 2]))


def test_renamed_column_that_the_first_row_lacks(write_jsonl: Write) -> None:
    rows = [{"q": "Why?", "chosen": "So.", "rejected": "No."} for _ in range(3)]
    path = write_jsonl([{}, *rows])
    first, *others = GroupReader(path, columns={"q": "prompt"}).results()
    assert first.error is not None
    assert prompts(others) == ["Why?"] * 3


class Careless(Schema):
    columns = "question, best"

    @classmethod
    def fits(cls, columns: frozenset[str], row: Row) -> bool:
        return "question" in columns

    def convert(self, row: Row, source: str) -> Converted:
        return Converted({"prompt": row["question"], "responses": [row["best"]], "scores": [1]})


def test_row_on_which_a_schema_fails_is_named(write_jsonl: Write) -> None:
    path = write_jsonl([{"question": "Why?", "best": "So."}, {"question": "Why?"}])
    with pytest.raises(KeyError, match="best") as raised:
        list(GroupReader(path, schema=Careless()).results())
    assert raised.value.__notes__ == [f"{path}:2: Careless.convert failed on this row."]
