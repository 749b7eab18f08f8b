"""CSV and TSV: every cell as it is written, and any range of rows."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.sources import open_source
from tests.data.schemas.rows import as_row, said

Cells = list[dict[str, Any]]
ROWS: Cells = [
    {"prompt": "Größe?\u2028", "chosen": "007", "rejected": "NA", "score": "1.0"},
    {"prompt": 'Say "hi",\nthen go;', "chosen": "nan", "rejected": "a\r\nb\tc", "score": None},
    {"prompt": "x" * 200_000, "chosen": " 1e5 ", "rejected": "True", "score": "null"},
]


def as_csv(rows: Cells, delimiter: str = ",", **settings: Any) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, **settings)
    writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return out.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.csv", as_csv(ROWS)),
        ("rows.csv", as_csv(ROWS, lineterminator="\n")),
        ("rows.csv", as_csv(ROWS, quoting=csv.QUOTE_ALL)),
        ("rows.csv", b"\xef\xbb\xbf" + as_csv(ROWS, quoting=csv.QUOTE_ALL)),
        # Spreadsheets where the comma is the decimal point.
        ("rows.csv", as_csv(ROWS, ";")),
        ("rows.tsv", as_csv(ROWS, "\t")),
        ("rows.csv", as_csv(ROWS).removesuffix(b"\r\n")),
        ("rows.csv", as_csv(ROWS) + b"\r\n\n"),
    ],
)
def test_cells_are_texts_and_nothing_is_guessed(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    source = open_source(str(tmp_path / name))
    assert len(source) == len(ROWS)
    assert [row for _, row in source.rows(0, 3)] == ROWS
    # The third row begins after a record of three lines.
    assert [place for place, _ in source.rows(0, 3)] == [
        f"{tmp_path / name}:{line}" for line in (2, 3, 6)
    ]
    for start in range(4):
        for stop in range(start, 4):
            assert [row for _, row in source.rows(start, stop)] == ROWS[start:stop]
    assert source[1][1] == ROWS[1]


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    digests = []
    for content in (b"a,b\n1,2\n", b"a,b\n1,2\n", b"a,b\n1,3\n", b"a,c\n1,2\n"):
        path.write_bytes(content)
        digests.append(open_source(str(path)).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


HEADER = b"prompt,chosen,rejected\n"
GOOD = b"Why?,So.,No.\n"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"Why?,So.\n", "found 2 cells; expected 3, one for each column"),
        (b"Why?,So., or so,No.\n", "found 4 cells; expected 3"),
        (b'"Why?"x,So.,No.\n', "cannot be read as CSV (',' expected after '\"')"),
        (b"Why?,S\xf6.,No.\n", "not UTF-8 (byte 0xf6)"),
    ],
)
def test_a_bad_row_is_one_bad_row(bad: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(HEADER + bad + GOOD + bad + GOOD)
    source = open_source(str(path))
    rows = list(source.rows(0, len(source)))
    for index, line in ((0, 2), (2, 4)):
        assert str(rows[index][1]).startswith(f"{path}:{line}: {words}")
        assert str(source[index][1]) == str(rows[index][1])
    good = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert [rows[1], rows[3]] == [(f"{path}:3", good), (f"{path}:5", good)]


def test_quote_that_is_not_closed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(HEADER + GOOD + b'"Why?,So.,No.\n' + GOOD)
    first, second = list(open_source(str(path)).rows(0, 2))
    assert first[1] == {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    assert str(second[1]).startswith(f"{path}:3: cannot be read as CSV (unexpected end of data)")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no rows"),
        (HEADER, "holds no rows"),
        (b"a,b,a\n1,2,3\n", r"rows.csv:1: found the columns \['a'\] twice"),
        ("a,b\n1,2\n".encode("utf-16"), r"rows.csv:1: not UTF-8 \(byte 0xff\)"),
        (b'"a"x,b\n1,2\n', "rows.csv:1: cannot be read as CSV"),
    ],
)
def test_header_that_cannot_be_used(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / "rows.csv"))


# ------------------------------------------------------------------------- groups that are in cells

MESSAGES = [{"role": "user", "content": "Why, then?"}]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("So.", "No.")]
GROUP: dict[str, Any] = {"prompt": "Why?", "responses": ["So.", "No."], "scores": [1.0, 0.0]}
TABLES: dict[str, tuple[Cells, dict[str, Any]]] = {
    "lists": (
        [{"prompt": "Why?", "responses": json.dumps(["So.", "No."]), "scores": "[7.5, -1]"}],
        {**GROUP, "scores": [7.5, -1.0]},
    ),
    "lists as Python writes them": (
        [{"prompt": "Why?", "responses": str(["It's so.", "No."]), "scores": str([7.5, -1])}],
        {**GROUP, "responses": ["It's so.", "No."], "scores": [7.5, -1.0]},
    ),
    "texts that look like something else": (
        [{"prompt": "007", "chosen": "1.0", "rejected": "NA"}],
        {"prompt": "007", "responses": ["1.0", "NA"], "scores": [1.0, 0.0]},
    ),
    "messages and numbers": (
        [
            {
                "prompt": json.dumps(MESSAGES),
                "chosen": json.dumps(ANSWERS[0]),
                "rejected": str(ANSWERS[1]),
                "score_chosen": "2.50",
                "score_rejected": " 1e0",
            }
        ],
        {**GROUP, "prompt": MESSAGES, "scores": [2.5, 1.0]},
    ),
    "one response a row": (
        [
            {"prompt": "Why?", "response": "So.", "score": "0.5", "id": "01"},
            {"prompt": "Why?", "response": "No.", "score": "-3", "id": "02"},
        ],
        {**GROUP, "scores": [0.5, -3.0], "id": ["01", "02"]},
    ),
    "labels": (
        [
            {"prompt": "Why?", "completion": "So.", "label": "TRUE"},
            {"prompt": "Why?", "completion": "No.", "label": "False"},
        ],
        GROUP,
    ),
    "safe pairs": (
        [
            {
                "prompt": "Why?",
                "response_0": "So.",
                "response_1": "No.",
                "better_response_id": "0",
                "safer_response_id": "1",
            }
        ],
        {**GROUP, "better_response_id": "0", "safer_response_id": "1"},
    ),
    "a system prompt": (
        [
            {
                "system": "Be brief.",
                "instruction": "Why?",
                "input": "",
                "chosen": "So.",
                "rejected": "No.",
            }
        ],
        {**GROUP, "prompt": [said("system", "Be brief."), said("user", "Why?")]},
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_groups_in_cells(name: str, suffix: str, tmp_path: Path) -> None:
    rows, expected = TABLES[name]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(as_csv(rows, "\t" if suffix == "tsv" else ","))
    (result,) = GroupReader(str(path)).results()
    assert as_row(result) == expected
    # That lists are written as texts is what such files are like.
    assert result.notes == ()
