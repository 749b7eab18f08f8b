"""Token ids on disk: made once, the same however they were made, found by content only."""

import ast
import errno
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.data import prepare as prepare_module
from mpo_lightning.data.dataset import Groups
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prepare import CODE, prepare
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.rendering import RenderingRules
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.schemas.pairs import Pairs
from mpo_lightning.data.tokens import GroupTokenizer, load_tokenizer
from tests.conftest import example_rows, make_tokenizer
from tests.processes import Started

Write = Callable[..., str]


def make(tokenizer: Any = None, **changes: Any) -> GroupTokenizer:
    defaults: dict[str, Any] = {
        "max_length": 60,
        "over_long": "drop_response",
        "prompt_format": "auto",
        "boundary": "strict",
    }
    return GroupTokenizer(tokenizer or make_tokenizer(), **{**defaults, **changes})


def tokens_of(reader: GroupReader, tokenize: GroupTokenizer) -> list[Any]:
    """The groups one by one, past everything that prepare does."""
    report, found = DataReport("x"), []
    for result in reader.results():
        if result.group is not None:
            group = tokenize(result.group, report)
            if group is not None:
                found.append(as_lists(group))
    return found


def as_lists(group: TokenGroup) -> tuple[Any, ...]:
    responses = [response.tolist() for response in group.responses]
    return group.source, group.prompt.tolist(), responses, list(group.indices)


@pytest.mark.parametrize("processes", [1, 2])
def test_groups_on_disk_are_those_made_one_by_one(
    processes: int, tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_GROUPS", 7)
    rows = example_rows(40)
    rows[5]["responses"] = [f"{n} " + "word " * 90 for n in range(len(rows[5]["responses"]))]
    reader, tokenize = GroupReader(write_jsonl(rows)), make()
    data, report = prepare(reader, tokenize, root=tmp_path / "cache", processes=processes)
    groups = list(Groups(data))
    assert [as_lists(group) for group in groups] == tokens_of(reader, tokenize)
    for group in groups:
        row = rows[int(group.source.rpartition(":")[2]) - 1]
        assert list(group.scores) == [row["scores"][index] for index in group.indices]
        assert json.loads(group.extra) == {"prompt_id": row["prompt_id"]}
    assert (report.groups, report.kept) == (40, len(groups))
    assert report.dropped == {"with too few responses left": 1}
    assert report.responses == sum(len(group.responses) for group in groups)
    # Nothing half made is left behind.
    kept = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert len(kept) == 2
    assert kept[1] == f"{kept[0]}.lock"


def test_the_same_is_not_made_twice(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(example_rows(6))
    root = tmp_path / "cache"
    first, report = prepare(GroupReader(path), make(), root=root)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def refuse(*args: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(prepare_module, "_tokenize_chunk", refuse)
    # Also with the tokenizer from elsewhere, if it is the same.
    for tokenizer in (make_tokenizer(), load_tokenizer(str(tmp_path / "tokenizer"))):
        again, same = prepare(GroupReader(path), make(tokenizer), root=root)
        assert again[:] == first[:]
        assert same == report


def test_what_is_complete_is_only_read(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator may share it, on a disk that is read-only here."""
    path = write_jsonl(example_rows(6))
    root = tmp_path / "cache"
    made, report = prepare(GroupReader(path), make(), root=root)
    before = {file.name for file in root.iterdir()}

    class ReadOnly(FileLock):
        def _acquire(self) -> None:
            raise OSError(errno.EROFS, "Read-only file system", self.lock_file)

    monkeypatch.setattr(prepare_module, "FileLock", ReadOnly)
    found, same = prepare(GroupReader(path), make(), root=root)
    assert found[:] == made[:]
    assert same == report
    with pytest.raises(OSError, match="Read-only file system") as caught:
        prepare(GroupReader(path), make(max_length=50), root=root)
    assert "data.cache" in "".join(caught.value.__notes__)
    assert {file.name for file in root.iterdir()} == before


def test_full_disk_is_told_with_the_folder(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare_module, "_make", full)
    with pytest.raises(OSError, match="No space left") as caught:
        prepare(GroupReader(write_jsonl(example_rows(6))), make(), root=tmp_path / "cache")
    assert caught.value.filename == str(tmp_path / "cache")


CHANGES: dict[str, Callable[[str], tuple[GroupReader, GroupTokenizer]]] = {
    "limit": lambda path: (GroupReader(path), make(max_length=59)),
    "what is over-long": lambda path: (GroupReader(path), make(over_long="cut")),
    "format": lambda path: (GroupReader(path), make(prompt_format="text")),
    "boundary": lambda path: (GroupReader(path), make(boundary="separate")),
    "responses kept": lambda path: (GroupReader(path), make(max_responses=2)),
    "which are kept": lambda path: (GroupReader(path), make(keep_responses="extremes")),
    "vocabulary": lambda path: (GroupReader(path), make(make_tokenizer(vocab_size=300))),
    "template": lambda path: (GroupReader(path), make(make_tokenizer(chat=False))),
    "columns": lambda path: (GroupReader(path, columns={"note": "remark"}), make()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_the_tokens_makes_them_anew(
    what: str, tmp_path: Path, write_jsonl: Write
) -> None:
    rows = [{**row, "prompt": "Why?", "note": 1} for row in example_rows(3)]
    path = write_jsonl(rows)
    root = tmp_path / "cache"
    prepare(GroupReader(path), make(), root=root)
    prepare(*CHANGES[what](path), root=root)
    assert len([folder for folder in root.iterdir() if folder.is_dir()]) == 2


def imported(path: Path, root: Path) -> set[Path]:
    """Files below a folder that a file of the package imports, at any remove."""
    package = "mpo_lightning.data."
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        for node in ast.walk(ast.parse(waiting.pop().read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith(package):
                name = str(node.module).removeprefix(package).replace(".", "/")
                file = root / f"{name}.py"
                if file not in found:
                    found.add(file)
                    waiting.append(file)
    return found


def test_the_key_names_the_files_that_decide_the_tokens() -> None:
    root = Path(prepare_module.__file__).parent
    roots = [root / name for name in ("reading.py", "tokens.py")]
    decisive = set(roots).union(*(imported(path, root) for path in roots))
    # What puts the groups into the table.
    decisive |= {root / "prepare.py", root / "dataset.py"}
    assert sorted(CODE) == sorted(str(path.relative_to(root)) for path in decisive)


def test_other_code_makes_the_tokens_anew(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    shutil.copytree(Path(prepare_module.__file__).parent, code)
    monkeypatch.setattr(prepare_module, "__file__", str(code / "prepare.py"))
    reader, tokenize = GroupReader(write_jsonl(example_rows(3))), make()
    keys = [prepare_module._key(reader, tokenize)]
    for name in ("show.py", "check/warnings.py", "schemas/pairs.py", "tokens.py"):
        with (code / name).open("a", encoding="utf-8") as file:
            file.write("# changed\n")
        keys.append(prepare_module._key(reader, tokenize))
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 3


def test_content_of_the_file_and_settings_of_its_schema(tmp_path: Path, write_jsonl: Write) -> None:
    root = tmp_path / "cache"
    pair = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
    path = write_jsonl([pair])
    prepare(GroupReader(path, schema=Pairs()), make(), root=root)
    prepare(GroupReader(path, schema=Pairs(empty="drop")), make(), root=root)
    write_jsonl([{**pair, "chosen": "Thus."}])
    data, _ = prepare(GroupReader(path, schema=Pairs()), make(), root=root)
    assert len([folder for folder in root.iterdir() if folder.is_dir()]) == 3
    assert "Thus" in make_tokenizer().decode(data[0]["responses"][0])


TYPED_IN = """
from mpo_lightning.data.schemas.base import Converted, Schema

class Shouted(Schema):
    columns = "question, answers"

    @classmethod
    def fits(cls, columns, row):
        return columns >= {"question", "answers"}

    def convert(self, row, source):
        texts = [text.upper() + "!" for text in row["answers"]]
        return Converted({"prompt": row["question"], "responses": texts, "scores": [1, 0]})
"""


def test_schema_that_was_typed_in_is_known_by_what_it_does(
    tmp_path: Path, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a notebook, where a class has no file and its cell is run again after a change."""
    path = write_jsonl([{"question": "Why?", "answers": ["So.", "No."]}])

    def tokens(code: str) -> list[str]:
        main = ModuleType("__main__")
        monkeypatch.setitem(sys.modules, "__main__", main)
        exec(code, vars(main))
        reader = GroupReader(path, schema=vars(main)["Shouted"]())
        data, _ = prepare(reader, make(), root=tmp_path / "cache")
        return [make_tokenizer().decode(response) for response in data[0]["responses"]]

    assert tokens(TYPED_IN) == ["SO.!<|eos|>", "NO.!<|eos|>"]
    assert tokens(TYPED_IN.replace('"!"', '"?"')) == ["SO.?<|eos|>", "NO.?<|eos|>"]
    # What it did before is still known.
    tokens(TYPED_IN)
    assert len(list((tmp_path / "cache").glob("*.lock"))) == 2


def test_bad_rows_are_told_again_when_the_same_is_asked_for(
    tmp_path: Path, write_jsonl: Write
) -> None:
    rows: list[Any] = [*example_rows(2), {"prompt": "Why?", "responses": ["a", "b"]}, "{broken"]
    path = write_jsonl(rows)
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"2 rows cannot be used:\n.*:3: scores(.|\n)*:4: not v"
        ):
            prepare(GroupReader(path), make(), root=tmp_path / "cache")


def test_nothing_that_remains_is_told_again_too(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(example_rows(3))
    for _ in range(2):
        with pytest.raises(DataError, match=r"No group of .* can be used(.|\n)*3 with a prompt"):
            prepare(GroupReader(path), make(max_length=2), root=tmp_path / "cache")


def prepare_slowly(path: str, root: Path) -> None:
    made = prepare_module._make

    def slowly(*args: Any) -> None:
        time.sleep(1)
        print("made")
        made(*args)

    prepare_module._make = slowly
    data, report = prepare(GroupReader(path), make(), root=root)
    print(len(data), report.kept)


def test_processes_that_ask_at_once_wait_for_one(tmp_path: Path, write_jsonl: Write) -> None:
    path = write_jsonl(example_rows(6))
    started = [Started(prepare_slowly, [path, tmp_path / "cache"]) for _ in range(2)]
    found = [one.finish() for one in started]
    assert [one.returncode for one in found] == [0, 0]
    assert sorted((one.stdout for one in found), key=len) == ["6 6\n", "made\n6 6\n"]


# ------------------------------------------------------------------ nothing is lost or moved

TEXTS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=20
).filter(str.strip)
ROWS = st.lists(
    st.integers(2, 6).flatmap(
        lambda n: st.fixed_dictionaries(
            {
                "prompt": TEXTS
                | st.lists(
                    st.fixed_dictionaries(
                        {"role": st.sampled_from(["user", "assistant"]), "content": TEXTS}
                    ),
                    max_size=3,
                ).map(lambda turns: [*turns, {"role": "user", "content": "And?"}]),
                "responses": st.lists(TEXTS, min_size=n, max_size=n),
                "scores": st.lists(
                    st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9),
                    min_size=n,
                    max_size=n,
                ),
                "truncated": st.none() | st.lists(st.booleans(), min_size=n, max_size=n),
            }
        )
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=ROWS)
def test_batches_decode_to_exactly_what_went_in(rows: list[dict[str, Any]]) -> None:
    """From a file, through Arrow and a batch: each response beside its own score and prompt."""
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        rules = RenderingRules.counting()
        tokenize = make(tokenizer, max_length=10_000, over_long="error", rendering=rules)
        data, report = prepare(GroupReader(str(path)), tokenize, root=Path(folder) / "cache")
        report.check()
        batch = GroupBatch.from_groups(list(Groups(data)))
    assert len(batch) == len(rows)
    for number, row in enumerate(rows):
        group = batch.select(number)
        count = len(row["responses"])
        assert group.valid.tolist() == [[True] * count]
        assert group.scores[0].tolist() == [float(score) for score in row["scores"]]
        prompt, *responses = group.tokens.split(
            [group.prompt_lengths[0], *group.response_lengths[0]]
        )
        turns = row["prompt"]
        if isinstance(turns, str):
            turns = [{"role": "user", "content": turns}]
        rendered = "".join(f"<|{turn['role']}|>\n{turn['content']}<|eos|>\n" for turn in turns)
        assert tokenizer.decode(prompt) == f"<|bos|>{rendered}<|assistant|>\n"
        truncated = row["truncated"] or [False] * count
        for ids, text, cut in zip(responses, row["responses"], truncated, strict=True):
            assert tokenizer.decode(ids) == text + ("" if cut else "<|eos|>")
