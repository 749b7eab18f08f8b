"""Rows from every kind of source, and what is said of one that cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from mpo_lightning.data import row_source
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.sources import Rows, open_rows, open_source
from tests.conftest import read_rows

ROWS: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Frage {number}: größer?\u2028\U0001f600"}],
        # Ragged, and in one row a column that is null.
        "responses": [f"Antwort {index}\nja" for index in range(2 + number)],
        "scores": [index / 3 for index in range(2 + number)],
        "prompt_id": f"p{number}" if number else None,
    }
    for number in range(3)
]


def one_a_line(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_jsonl_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(one_a_line(ROWS), encoding="utf-8")
    return path


def write_json(folder: Path) -> Path:
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
    return path


def write_parquet(folder: Path) -> Path:
    path = folder / "rows.parquet"
    # Several row groups: the numbers go on from one to the next.
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=2)
    return path


def write_csv(folder: Path) -> Path:
    path = folder / "rows.csv"
    path.write_text("prompt,chosen,rejected\np,a,b\nq,c,d\n", encoding="utf-8")
    return path


def write_dataset(folder: Path) -> Path:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def write_dataset_dict(folder: Path) -> Path:
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "validation": datasets.Dataset.from_list(ROWS[1:]),
    }
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    return folder / "splits"


WRITERS = [write_jsonl_file, write_json, write_parquet, write_dataset, write_dataset_dict]


@pytest.mark.parametrize("write", WRITERS)
def test_every_kind_of_source_gives_the_same_rows(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = write(tmp_path)
    assert list(read_rows(str(path))) == [
        (f"{path}:{number}", row) for number, row in enumerate(ROWS, start=1)
    ]


@pytest.mark.parametrize(
    ("suffix", "default", "rows"),
    [
        ("", "train", ROWS),
        ("", "validation", ROWS[1:]),
        (":validation", "train", ROWS[1:]),
        (":train", "validation", ROWS),
        ("/validation", "train", ROWS[1:]),
    ],
)
def test_split_of_a_saved_folder(
    suffix: str, default: str, rows: list[Any], tmp_path: Path
) -> None:
    folder = write_dataset_dict(tmp_path)
    # What `datasets` leaves behind in a folder is not part of the data.
    datasets.Dataset.from_list(ROWS).map(
        lambda row: row, cache_file_name=str(folder / "train" / "cache-1.arrow")
    )
    read = list(read_rows(f"{folder}{suffix}", default_split=default))
    assert [row for _, row in read] == rows
    assert read[0][0] == f"{folder}{suffix}:1"


def test_folder_of_parts_is_one_source(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    (folder / "part-00001.jsonl").write_text(one_a_line(ROWS[2:]), encoding="utf-8")
    (folder / "part-00000.jsonl").write_text(one_a_line(ROWS[:2]), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "part-00002.parquet")
    (folder / "settings.json").write_text("{}", encoding="utf-8")
    places = ["0.jsonl:1", "0.jsonl:2", "1.jsonl:1", "2.parquet:1", "2.parquet:2", "2.parquet:3"]
    assert list(read_rows(str(folder))) == [
        (f"{folder}/part-0000{place}", row)
        for place, row in zip(places, [*ROWS, *ROWS], strict=True)
    ]


def test_pattern_is_one_source(tmp_path: Path) -> None:
    for run, rows in (("b", ROWS[2:]), ("a", ROWS[:2])):
        (tmp_path / run).mkdir()
        (tmp_path / run / "rows.jsonl").write_text(one_a_line(rows), encoding="utf-8")
    found = list(read_rows(f"{tmp_path}/*/rows.jsonl"))
    places = ["a/rows.jsonl:1", "a/rows.jsonl:2", "b/rows.jsonl:1"]
    assert found == [(f"{tmp_path}/{place}", row) for place, row in zip(places, ROWS, strict=True)]
    # A file is named by its name, whatever characters it has.
    (tmp_path / "[x]*.jsonl").write_text(one_a_line(ROWS[:1]), encoding="utf-8")
    assert [row for _, row in read_rows(f"{tmp_path}/[x]*.jsonl")] == ROWS[:1]


SPLITS = {
    "data split": ["train.jsonl", "val.jsonl", "test.jsonl"],
    "other words": ["Training.jsonl", "dev.jsonl", "eval.jsonl", "heldout.jsonl"],
    "prefixes": ["mine_train.parquet", "mine_valid.parquet", "mine_test.parquet"],
    "shards": [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "validation-00000-of-00001.parquet",
        "test-00000-of-00001.parquet",
    ],
}


def folder_of(folder: Path, files: list[str]) -> str:
    """A folder of files; each row says which of them it is in."""
    folder.mkdir(parents=True)
    for name in files:
        rows = [{"file": name, "number": number} for number in range(2)]
        if name.endswith(".parquet"):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
        else:
            (folder / name).write_text(one_a_line(rows), encoding="utf-8")
    return str(folder)


def files_read(data: str, **settings: str) -> list[str]:
    """The files of a folder that are read, in order."""
    return list(dict.fromkeys(row["file"] for _, row in read_rows(data, **settings)))


@pytest.mark.parametrize("layout", ["data split", "prefixes", "shards"])
def test_folder_of_splits_gives_the_one_that_is_wanted(tmp_path: Path, layout: str) -> None:
    """Training must not read what is kept for testing."""
    files = SPLITS[layout]
    folder = folder_of(tmp_path / "split", files)
    for split, word in (("train", "train"), ("validation", "val"), ("test", "test")):
        expected = [name for name in files if word in name]
        assert files_read(folder, default_split=split) == expected
        assert files_read(f"{folder}:{split}") == expected
    assert open_source(folder, default_split="train").name == f"{folder}:train"
    with pytest.raises(DataError, match="not said which split is wanted.*as in .*test"):
        open_source(folder)


def test_folder_that_holds_its_files_as_the_hub_does(tmp_path: Path) -> None:
    folder_of(tmp_path / "name" / "data", SPLITS["shards"])
    (tmp_path / "name" / "README.md").write_text("...", encoding="utf-8")
    assert files_read(str(tmp_path / "name"), default_split="test") == [SPLITS["shards"][3]]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train.jsonl", "test.jsonl"], "validation", "none is named as validation"),
        (SPLITS["other words"], "validation", "2 kinds of them are named as validation"),
        (["train.jsonl", "train.parquet", "val.jsonl"], "train", "2 kinds of them .* as train"),
        (
            ["train_sft.jsonl", "train_prefs.jsonl", "test_prefs.jsonl"],
            "train",
            "2 kinds of them are named as train",
        ),
        (["train.jsonl", "test.jsonl", "more.jsonl"], "train", "several splits, and some of none"),
    ],
    ids=str,
)
def test_folder_whose_split_is_not_clear_is_refused(
    tmp_path: Path, files: list[str], split: str, message: str
) -> None:
    folder = folder_of(tmp_path / "split", files)
    with pytest.raises(DataError, match=rf"(?s)its files are .*{message}.*name the file"):
        open_source(folder, default_split=split)


def test_split_of_a_folder_by_its_own_name(tmp_path: Path) -> None:
    files = ["train_sft.jsonl", "train_prefs.jsonl", "test_prefs.jsonl"]
    folder = folder_of(tmp_path / "split", files)
    assert files_read(f"{folder}:train_prefs") == ["train_prefs.jsonl"]
    with pytest.raises(DataError, match="none is named as train_gen"):
        open_source(f"{folder}:train_gen")


def test_folder_of_one_split_is_read_whole(tmp_path: Path) -> None:
    """Named by the user, whatever its files are called."""
    folder = folder_of(tmp_path / "mine", ["test-a.jsonl", "test-b.jsonl"])
    assert files_read(folder, default_split="train") == ["test-a.jsonl", "test-b.jsonl"]


@pytest.mark.parametrize("write", WRITERS)
def test_any_range_of_rows(write: Callable[[Path], Path], tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path)))
    assert len(source) == len(ROWS)
    for start in range(len(ROWS) + 1):
        for stop in range(start, len(ROWS) + 1):
            assert [row for _, row in source.rows(start, stop)] == ROWS[start:stop]
    assert source[2][1] == ROWS[2]


@pytest.mark.parametrize("write", WRITERS)
def test_digest_is_of_the_content(write: Callable[[Path], Path], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    one, two = write(tmp_path / "one"), write(tmp_path / "two")
    if not one.is_dir():
        # Wherever the file lies; a saved data set carries a name of its own for its content.
        assert open_source(str(one)).digest == open_source(str(two)).digest
    before = open_source(str(one)).digest
    assert open_source(str(one)).digest == before
    ROWS[1]["scores"][0] += 1
    try:
        write(tmp_path / "two")
        assert open_source(str(tmp_path / "two" / one.name)).digest != before
    finally:
        ROWS[1]["scores"][0] -= 1


def test_json_lines_count_lines_as_an_editor_does(tmp_path: Path) -> None:
    first, second, third = (json.dumps(row).encode() for row in ROWS)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + first + b"\r\n  \r\n\n" + second + b"\n\n\n" + third)
    assert list(read_rows(str(path))) == [
        (f"{path}:{line}", row) for line, row in zip((2, 5, 8), ROWS, strict=True)
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_byte_order_mark_directly_before_the_data(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    text = json.dumps(ROWS[0])
    path.write_text(text if name == "rows.jsonl" else f"[{text}]", encoding="utf-8-sig")
    assert [row for _, row in read_rows(str(path))] == ROWS[:1]


def test_rows_need_not_be_objects_here(tmp_path: Path) -> None:
    # The check of the rows reports them together with all other bad rows.
    path = tmp_path / "rows.json"
    path.write_text('[{"a": 1}, 2, null]', encoding="utf-8")
    assert [row for _, row in read_rows(str(path))] == [{"a": 1}, 2, None]


GOOD = json.dumps(ROWS[0]).encode()
# File name, its bytes, and what the message must hold.
UNREADABLE: dict[str, tuple[str, bytes, list[str]]] = {
    "empty": ("x.jsonl", b"", ["x.jsonl", "no rows"]),
    "blank": ("x.jsonl", b"\xef\xbb\xbf\n \n", ["x.jsonl", "no rows"]),
    "empty .json": ("x.json", b" \n", ["x.json", "no rows"]),
    "empty array": ("x.json", b"[]", ["x.json", "no rows"]),
    "Latin-1 line": (
        "x.jsonl",
        GOOD + b'\n{"prompt": "gr\xf6\xdfer"}\n',
        ["x.jsonl:2", "not UTF-8", "0xf6", "at 14", "Save the file as UTF-8"],
    ),
    "UTF-16": ("x.jsonl", GOOD.decode().encode("utf-16"), ["x.jsonl:1", "not UTF-8", "0xff at 0"]),
    "Latin-1 .json": ("x.json", b'["\xf6"]', ["x.json", "not UTF-8", "0xf6 at 2"]),
    "cut line": (
        "x.jsonl",
        GOOD + b"\n\n" + GOOD[:-9],
        ["x.jsonl:3", "not valid JSON", "column", "line may be cut"],
    ),
    "object over several lines": (
        "x.jsonl",
        json.dumps(ROWS[0], indent=2).encode(),
        ["x.jsonl:1", "not valid JSON", "one whole object"],
    ),
    "array on one line": (
        "x.jsonl",
        json.dumps(ROWS).encode(),
        ["x.jsonl:1", "found a JSON array", "one object per line", "Rename the file to .json"],
    ),
    "array over several lines": (
        "x.jsonl",
        json.dumps(ROWS, indent=2).encode(),
        ["x.jsonl:1", "not valid JSON", "may be a JSON array", "named .json"],
    ),
    "array with an object a line": (
        "x.jsonl",
        b"[" + GOOD + b",\n" + GOOD + b"]",
        ["x.jsonl:1", "not valid JSON", "may be a JSON array", "named .json"],
    ),
    "object in .json": (
        "x.json",
        GOOD,
        ["x.json", "found dict", "an array of objects", ".jsonl"],
    ),
    "lines in .json": ("x.json", GOOD + b"\n" + GOOD, ["x.json", "line 2, column 1", ".jsonl"]),
    "cut .json": ("x.json", b'[{"a":', ["x.json", "not valid JSON", "line 1, column"]),
    "no Parquet": ("x.parquet", GOOD, ["x.parquet", "cannot be read as Parquet", "Write it again"]),
    "empty Parquet": ("x.parquet", b"", ["x.parquet", "cannot be read as Parquet"]),
    "unknown suffix": ("x.xls", b"a,b\n", ["x.xls", "'.xls'", ".jsonl", ".csv", ".parquet"]),
    "no suffix": ("x", GOOD, ["x: found suffix ''", ".jsonl"]),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_file_is_explained(what: str, tmp_path: Path) -> None:
    name, content, words = UNREADABLE[what]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(str(tmp_path / name)))
    for word in words:
        assert word in str(caught.value)


def damage(path: Path, start: int, stop: int) -> None:
    content = bytearray(path.read_bytes())
    content[start:stop] = bytes(byte ^ 0xFF for byte in content[start:stop])
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# A file cut in a download, and one whose footer is whole but not what it points to.
@pytest.mark.parametrize("spoil", [cut, lambda path: damage(path, 20, 60)], ids=["cut", "damaged"])
def test_broken_parquet(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, compression="none")
    spoil(path)
    with pytest.raises(DataError, match=r"rows\.parquet: cannot be read as Parquet"):
        list(read_rows(str(path)))


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        list(read_rows("data/gone.jsonl"))
    assert "data/gone.jsonl: no such file" in str(caught.value)
    # A relative path is read from where the command runs.
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["folder", "folder.parquet"])
def test_folder_that_is_no_dataset(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "rows.txt").write_text(one_a_line(ROWS), encoding="utf-8")
    with pytest.raises(DataError, match=rf"{name}: not a folder that datasets' save_to_disk wrote"):
        list(read_rows(str(tmp_path / name)))
    # Nor is it guessed at when a split is named.
    with pytest.raises(DataError, match=r"not a folder that datasets' save_to_disk wrote"):
        list(read_rows(f"{tmp_path / name}:train"))


@pytest.mark.parametrize("part", ["*.arrow", "state.json"])
def test_damaged_saved_dataset(part: str, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    cut(next(folder.glob(part)))
    with pytest.raises(DataError, match=r"saved: not a folder that datasets' save_to_disk wrote"):
        list(read_rows(str(folder)))


@pytest.mark.parametrize(("suffix", "default"), [(":test", "train"), ("", "test")])
def test_missing_split(suffix: str, default: str, tmp_path: Path) -> None:
    folder = write_dataset_dict(tmp_path)
    with pytest.raises(DataError) as caught:
        list(read_rows(f"{folder}{suffix}", default_split=default))
    assert "no split 'test' among ['train', 'validation']" in str(caught.value)
    assert f"{folder}:<split>" in str(caught.value)


def test_split_of_a_saved_dataset_without_splits(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path)
    with pytest.raises(DataError, match="no splits"):
        list(read_rows(f"{folder}:train"))


@pytest.mark.parametrize(
    ("data", "split"), [("org/name:train_prefs", "train_prefs"), ("org/n", "s")]
)
def test_hub_that_cannot_be_reached(data: str, split: str) -> None:
    with pytest.raises(DataError) as caught:
        list(read_rows(data, default_split="s"))
    message = str(caught.value)
    assert message.startswith(f"{data.partition(':')[0]}: neither a file nor a folder here")
    assert f"split {split!r}" in message
    assert "hub failed (ConnectionError" in message


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = list(read_rows("org/name:train_prefs")) + list(read_rows("org/name"))
    assert asked == [("org/name", "train_prefs"), ("org/name", "train")]
    assert read[:3] == [(f"org/name:train_prefs:{n}", row) for n, row in enumerate(ROWS, start=1)]


def test_broken_hub_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, subset: str | None, split: str) -> Any:
        raise datasets.exceptions.DatasetGenerationError("An error occurred")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"org/name: .*DatasetGenerationError"):
        list(read_rows("org/name"))


# ------------------------------------------------------------------------------------ in memory


def with_more_columns() -> datasets.Dataset:
    """A data set whose format shows some of its columns, as tensors."""
    more = [{**row, "more": 1} for row in ROWS]
    return datasets.Dataset.from_list(more).with_format("torch", columns=list(ROWS[0]))


IN_MEMORY: dict[str, Callable[[], Rows]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "data set": lambda: datasets.Dataset.from_list(ROWS),
    "selected rows": lambda: datasets.Dataset.from_list([ROWS[2], *ROWS]).select([1, 2, 3]),
    "format": with_more_columns,
    "NumPy": lambda: [{name: as_numpy(value) for name, value in row.items()} for row in ROWS],
    "torch": lambda: [
        {**row, "scores": torch.tensor(row["scores"], dtype=torch.float64)} for row in ROWS
    ],
}


def as_numpy(value: Any) -> Any:
    """As pandas and pyarrow hand rows over: lists of texts and of numbers are arrays."""
    if isinstance(value, list):
        return np.array(value, dtype=np.float64 if isinstance(value[0], float) else object)
    return value


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_rows_in_memory_are_those_that_were_given(kind: str) -> None:
    source = open_rows(IN_MEMORY[kind](), "train")
    numbered = [(f"train:{number}", row) for number, row in enumerate(ROWS, start=1)]
    assert list(source.rows(0, len(source))) == numbered
    assert list(source.rows(1, 2)) == numbered[1:2]


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_digest_of_rows_in_memory_is_of_their_content(kind: Callable[[Any], Rows]) -> None:
    def digest(rows: list[Any]) -> str:
        return open_rows(kind(rows), "train").digest

    again = json.loads(json.dumps(ROWS))
    assert digest(again) == digest(json.loads(json.dumps(ROWS)))
    last = {**ROWS[2], "scores": [0.0, 1.0, 2.0, 4.0]}
    changed = [[*ROWS[:2], last], ROWS[:2], ROWS[::-1], [{**row, "more": 1} for row in ROWS]]
    assert len({digest(ROWS), *map(digest, changed)}) == 5


def test_digest_does_not_trust_the_name_that_map_gave() -> None:
    """A function that reads something else gives other rows under the same fingerprint."""
    given = {"score": 1.0}

    def of_data(score: float) -> datasets.Dataset:
        given["score"] = score
        return datasets.Dataset.from_list(ROWS).map(
            lambda row: {"added": given["score"]}, new_fingerprint="the-same", keep_in_memory=True
        )

    assert of_data(1.0)._fingerprint == of_data(2.0)._fingerprint
    assert open_rows(of_data(1.0), "a").digest != open_rows(of_data(2.0), "a").digest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Path("train.jsonl"), "train: found PosixPath; expected .* name a path as a text"),
        (datasets.DatasetDict(), "found DatasetDict; expected .* hand over one split"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "found IterableDataset"),
        (datasets.Dataset.from_list(ROWS).with_transform(dict), "has a transform.* Use map"),
        (datasets.Dataset.from_list([]), "train: holds no rows"),
        ([], "train: holds no rows"),
    ],
)
def test_what_is_no_list_of_rows(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_rows(rows, "train")


@pytest.mark.parametrize("write", [write_jsonl_file, write_csv, write_parquet, write_dataset])
def test_file_that_changes_between_its_readings_is_refused(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = write(tmp_path)
    source = open_source(str(path))
    rows = list(source.rows(0, 2))
    assert list(source.rows(0, 2)) == rows
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    content = file.read_bytes()
    file.unlink()
    with pytest.raises(DataError, match=f"^{file}: has changed while it was read"):
        list(source.rows(0, 2))
    # Of the same length, put in its place as a download is.
    (tmp_path / "new").write_bytes(content[::-1])
    (tmp_path / "new").rename(file)
    with pytest.raises(DataError, match=f"^{file}: has changed while it was read"):
        list(source.rows(0, 2))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json", "rows.jsonl.gz"])
def test_file_that_changes_while_it_is_opened_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the half that was read looks like: here it is empty, or no JSON."""
    path = tmp_path / name
    path.write_text("[", encoding="utf-8")
    states = iter([(1, 1), (1, 1), (2, 2)])
    monkeypatch.setattr(row_source, "_state", lambda _: next(states))
    with pytest.raises(DataError, match=f"^{path}: has changed while it was read"):
        open_source(str(path))
