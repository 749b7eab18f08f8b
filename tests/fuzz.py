"""Hostile rows and configurations, from a seed: ``python -m tests.fuzz``.

Rows of all schemas and configurations of ``configs/`` are mutated: in their values, their keys and
their bytes. Each is then one of these:

- refused: an error meant for users, or a row that is left out and counted;
- accepted: what is read is what an independent reading of the mutated text finds;
- silent: it is read as something else;
- traceback: it ends with any other error;
- hang: it takes longer than a time that is never needed.

The suite runs a short form, `tests/test_fuzz.py`.
"""

import argparse
import csv
import io
import json
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from ast import literal_eval
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import pyarrow
import pyarrow.parquet
import yaml
from jsonargparse import ArgumentParser, capture_parser

from mpo_lightning.commands import run as run_command
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prompts import PromptSource
from mpo_lightning.data.reading import GroupReader, RowResult
from mpo_lightning.data.sources import open_rows
from mpo_lightning.errors import UserError
from tests.data.schemas.test_junk import ROWS, places

CONFIGS = sorted(Path(__file__).parents[1].glob("configs/**/*.yaml"))
FORMATS = ("jsonl", "json", "csv", "parquet", "memory", "prompts")
# Seconds that a file of rows, or a configuration, never needs.
LONGEST = 60
# Rows of a file.
ROWS_OF_FILE = 50
MARK = "ZEBRA"
INTERNAL = re.compile(
    "has no attribute|unhashable|subscriptable|Unexpected config|Key must be|NoneT"
)
# Columns that a schema makes.
COMPUTED = {"models", "kept_responses"}
CANONICAL = {
    "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
    "responses": ["So.", {"role": "assistant", "content": "No.", "reasoning_content": "Hm."}],
    "scores": [1.5, -2],
    "truncated": [False, True],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "chat_template_kwargs": {"thinking": True},
    "id": 7,
}
NESTED: Any = "x"
for _ in range(200):
    NESTED = [NESTED]
JUNK: list[Any] = [
    *(None, True, False, 0, -1, 2**63, -(10**400), 1.5, 1e308, float("nan"), float("inf"), 5),
    *(
        "",
        " ",
        MARK,
        "\ud800",
        f"a\x1b[31m{MARK}",
        "\x00",
        "\u202e",
        "[{",
        "null",
        "1e5",
        "x" * 9999,
    ),
    *("[{'role': 'user', 'content': 'a'}]", '{"from": "human", "value": "b"}', "[" * 3000, "NaN"),
    *([], {}, [None], [[]], [{}], ["x"], [1], {"x": []}, {"role": "user"}, [["x", "y"]], NESTED),
    *({"role": {}, "content": []}, {"role": ["user"], "content": ["x"]}, {"from": [], "value": {}}),
    *({"role": "assistant", "content": MARK}, [{"role": "user", "content": [{"text": MARK}]}]),
    *({"function": {"name": {}, "arguments": "["}}, [{"role": "user", "content": MARK}] * 2),
]


@contextmanager
def no_hang() -> Iterator[None]:
    def late(_: int, __: FrameType | None) -> None:
        raise TimeoutError("hang")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------ mutations


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def mutated(row: Any, chance: random.Random) -> Any:
    """A copy in which a value, a key or an entry is another, is gone or comes twice."""
    row = deepcopy(row)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        paths = [path for path in places(row) if path]
        if not paths:
            return chance.choice(JUNK)
        path = chance.choice(paths)
        owner, key = at(row, path[:-1]), path[-1]
        how = chance.randrange(6)
        if how == 0:
            del owner[key]
        elif how == 1:
            owner[key] = deepcopy(at(row, chance.choice(paths)))
        elif how == 2 and isinstance(owner, list):
            owner.append(deepcopy(owner[key]))
        elif how == 2:
            owner[chance.choice(("x\x1b[2J", "prompt", "responses", "", "\ud800", "role"))] = owner[
                key
            ]
        elif how == 3 and isinstance(owner[key], str):
            text = owner[key]
            cut = chance.randrange(len(text) + 1)
            owner[key] = (
                text[:cut] + chance.choice(("\x07", MARK, "\u2028", "\U0001f600")) + text[cut:]
            )
        else:
            owner[key] = deepcopy(chance.choice(JUNK))
    return row


def mutated_bytes(line: bytes, chance: random.Random) -> bytes:
    """Bytes of a line that is cut, repeated, of another encoding, or damaged."""
    where = chance.randrange(len(line) + 1)
    text = line.decode()
    changes: list[Callable[[], bytes]] = [
        lambda: line[:where],
        lambda: line[where:],
        lambda: line + line,
        lambda: b"\xef\xbb\xbf" + line,
        lambda: text.encode("utf-16"),
        lambda: text.encode("latin-1", "replace").replace(b"o", b"\xf6", 1),
        lambda: line[:where] + bytes([chance.randrange(256)]) + line[where:],
        lambda: line[:where] + bytes([chance.randrange(256)]) + line[where + 1 :],
        lambda: re.sub(rb'"(\w+)":', rb'"\1": 0, "\1":', line, count=1),
        lambda: line.replace(b"1.5", b"9" * 5000).replace(b"[", b"[" * chance.choice((1, 2, 5000))),
        lambda: line.replace(b'"', b"'"),
    ]
    return chance.choice(changes)().replace(b"\n", b" ").replace(b"\r", b" ")


# ------------------------------------------------------------------------- independent readings


def texts(value: Any) -> list[str]:
    """All texts in a value, keys among them; of numbers as they are written."""
    if isinstance(value, dict):
        return [text for pair in value.items() for each in pair for text in texts(each)]
    if isinstance(value, list | tuple):
        return [text for each in value for text in texts(each)]
    return [value if isinstance(value, str) else json.dumps(value, default=str)]


def strict(line: bytes) -> Any:
    """A line's JSON by another reading: no key twice, UTF-8 only.

    Raises:
        ValueError: if it is not that.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) < len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    text = line.decode("utf-8").removeprefix("\ufeff")
    try:
        return json.JSONDecoder(object_pairs_hook=once).decode(text.strip(" \t\f\v"))
    except RecursionError as error:
        raise ValueError("too deep") from error


def difference(row: Any, result: RowResult) -> str:
    """How a group differs from its row, or an empty text.

    A canonical row is read by its fields here again. Of any other nothing may be made up: each text
    is one of the row's, or a part of one, and columns that pass through are as they were.
    """
    group = result.group
    assert group is not None
    if not isinstance(row, dict):
        return "a row that is no object"
    known = [*texts(row), *texts([json.loads(text) for text in texts(row) if is_json(text)])]
    joined = "".join(known)
    messages = [] if isinstance(group.prompt, str) else group.prompt
    found = [group.prompt] if isinstance(group.prompt, str) else [m["content"] for m in messages]
    for response in group.responses:
        found.append(response if isinstance(response, str) else str(response["content"]))
    for text in found:
        # Two columns may be one prompt, and parts of a content one text.
        parts = [text] if any(text in each for each in known) else text.split("\n")
        if any(part.strip() not in joined and not is_made_of(part, known) for part in parts):
            return f"made up: {text[:60]!r}"
    if len(group.scores) != len(group.responses):
        return "scores"
    for name, value in group.extra.items():
        if (
            name in row
            and name not in COMPUTED
            and not alike(value, row[name])
            and not alike(value, [row[name]])
        ):
            return f"column {name!r}: {value!r} for {row[name]!r}"[:200]
    if {"prompt", "responses", "scores"} <= row.keys():
        return canonical_difference(row, result)
    return ""


def is_made_of(text: str, known: list[str]) -> bool:
    """Whether a text is some of the known ones, one after the other."""
    while text:
        first = max((each for each in known if each and text.startswith(each)), key=len, default="")
        if not first:
            return False
        text = text[len(first) :]
    return True


def canonical_difference(row: dict[str, Any], result: RowResult) -> str:
    group = result.group
    assert group is not None
    scores, cut = parsed(row["scores"]), parsed(row.get("truncated"))
    given = [said(response) for response in parsed(row["responses"])]
    prompt = row["prompt"] if isinstance(group.prompt, str) else parsed(row["prompt"])
    # The library of data sets gives messages as an object of lists, too.
    prompt = prompt["content"] if isinstance(prompt, dict) else prompt
    before = [said(message) for message in prompt] if isinstance(prompt, list) else [prompt]
    made = [group.prompt] if isinstance(group.prompt, str) else list(map(said, group.prompt))
    pairs = {
        "scores": (list(map(float, scores)), group.scores),
        "truncated": (cut, group.truncated),
        "responses": (given, list(map(said, group.responses))),
        # A system message may come before.
        "prompt": (before, made[max(0, len(made) - len(before)) :]),
    }
    wrong = [f"{name} {one!r} as {two!r}" for name, (one, two) in pairs.items() if one != two]
    return "; ".join(wrong)[:400]


def said(message: Any) -> Any:
    """The content of a message or a response; of parts their texts."""
    if isinstance(message, list) and len(message) == 1:
        message = message[0]
    if not isinstance(message, dict):
        return message
    content = next((message[name] for name in ("content", "value") if message.get(name)), "")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def parsed(value: Any) -> Any:
    """What a text holds that is a list or an object, as JSON or as Python writes it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for reading in (json.loads, literal_eval):
            try:
                return reading(value.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return value


def alike(one: Any, other: Any) -> bool:
    return repr(one) == repr(other) or repr(parsed(one)) == repr(parsed(other))


# ------------------------------------------------------------------------------------- a file


def written(
    rows: list[Any], kind: str, folder: Path, chance: random.Random
) -> tuple[Any, list[Any]]:
    """A source of rows of a kind, and what another reading finds in each (an error: ValueError)."""
    path = folder / f"rows.{kind}"
    if kind == "memory":
        return open_rows(rows, "rows"), rows
    if kind in {"jsonl", "prompts"}:
        path = folder / "rows.jsonl"
        lines = [
            json.dumps(row, ensure_ascii=chance.random() < 0.7).encode("utf-8", "replace")
            for row in rows
        ]
        lines = [mutated_bytes(line, chance) if chance.random() < 0.4 else line for line in lines]
        lines = [line for line in lines if line.strip(b"\xef\xbb\xbf \t\f\v")]
        path.write_bytes(b"\n".join(lines))
        return str(path), [found(line) for line in lines]
    if kind == "json":
        path.write_text(json.dumps(rows), encoding="utf-8")
        return str(path), json.loads(path.read_text(encoding="utf-8"))
    objects = [row for row in rows if isinstance(row, dict)]
    if kind == "csv":
        names = list(dict.fromkeys(str(name) for row in objects for name in row))
        clean = [name for name in names if name.isprintable() and name]
        with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(clean)
            for row in objects:
                cells = (row.get(name) for name in clean)
                writer.writerow(c if isinstance(c, str) else json.dumps(c) for c in cells)
        with path.open(encoding="utf-8", newline="") as file:
            return str(path), [
                {k: v or None for k, v in row.items()} for row in csv.DictReader(file)
            ]
    kept: list[Any] = []
    for row in objects:
        try:
            table = pyarrow.Table.from_pylist([*kept, row])
            pyarrow.parquet.write_table(table, io.BytesIO())
        except (pyarrow.ArrowException, OverflowError, UnicodeError, RecursionError, TypeError):
            continue
        kept.append(row)
    plain = {"prompt": "Why?", "responses": ["So.", "No."], "scores": [1.0, 2.0]}
    table = pyarrow.Table.from_pylist(kept or [plain])
    pyarrow.parquet.write_table(table, path)
    return str(path), pyarrow.parquet.read_table(path).to_pylist()


def found(line: bytes) -> Any:
    try:
        return strict(line)
    except ValueError as error:
        return error


def outcome_of(row: Any, result: RowResult) -> tuple[str, str]:
    if result.group is None:
        return "refused", ""
    if isinstance(row, ValueError):
        return "silent", f"read where another reading fails: {row}"
    wrong = difference(row, result)
    return ("silent", wrong) if wrong else ("accepted", "")


def read_prompts(path: Path, expected: list[Any]) -> Iterator[tuple[str, str]]:
    """Read the rows of a file as prompts, each by itself."""
    for line, row in zip(path.read_bytes().split(b"\n"), expected, strict=True):
        path.write_bytes(line)
        try:
            ((request, _, _),) = PromptSource(str(path)).rows(0, 1)
        except DataError as error:
            str(error).encode()
            yield "refused", ""
            continue
        made = request.prompt if isinstance(request.prompt, str) else said(request.prompt[-1])
        known = [] if isinstance(row, ValueError) else texts(row)
        known += [text for each in known if is_json(each) for text in texts(json.loads(each))]
        if isinstance(row, dict) and (made in known or made in "".join(known)):
            yield "accepted", ""
        else:
            yield "silent", f"{row!r} as {made!r}"[:400]


def read_file(
    good: Any, kind: str, folder: Path, chance: random.Random
) -> Iterator[tuple[str, str]]:
    """Mutate a row, write the results as a file, read it, and yield how each row ends."""
    rows = [mutated(good, chance) if chance.random() < 0.9 else good for _ in range(ROWS_OF_FILE)]
    source, expected = written(rows, kind, folder, chance)
    try:
        if kind == "prompts":
            yield from read_prompts(Path(source), expected)
            return
        schema = None if chance.random() < 0.3 else GroupReader(open_rows([good], "x")).schema
        reader = GroupReader(source, schema=schema)
        results = list(reader.results())
    except DataError as error:
        # What is wrong with the whole file is one error.
        str(error).encode()
        yield from [("refused", "")] * len(expected)
        return
    for result in results:
        str(result.error).encode()
    if reader.schema.one_response_a_row:
        # A group is of several rows.
        for result in results:
            yield outcome_of({"rows": [r for r in expected if isinstance(r, dict)]}, result)
        yield from [("accepted", "")] * (len(expected) - len(results))
        return
    if len(results) != len(expected):
        yield "silent", f"{len(expected)} rows as {len(results)}"
        return
    for row, result in zip(expected, results, strict=True):
        yield outcome_of(row, result)


def fuzz_rows(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield kind of file, outcome and what was found for each of about ``count`` rows."""
    chance, done, goods = random.Random(seed), 0, [*([CANONICAL] * 8), *ROWS]
    with tempfile.TemporaryDirectory() as folder:
        while done < count:
            kind, good = FORMATS[(done // ROWS_OF_FILE) % len(FORMATS)], chance.choice(goods)
            outcomes: list[tuple[str, str]] = []
            try:
                with no_hang():
                    outcomes += read_file(good, kind, Path(folder), chance)
            except TimeoutError:
                outcomes.append(("hang", str(good)))
            except Exception:
                outcomes.append(("traceback", traceback.format_exc()))
            for outcome, said in outcomes:
                yield kind, outcome, said
            done += ROWS_OF_FILE


# ------------------------------------------------------------------------------ configurations

VALUES: list[str] = [
    *(
        "null",
        "true",
        "-1",
        "0",
        "1.5",
        ".nan",
        ".inf",
        "-.inf",
        "1e400",
        "9" * 5000,
        "0x" + "f" * 40,
    ),
    *("[]", "{}", "[[]]", "{a: b}", "''", "' '", "text", '"\\ud800"', '"\\x1b[31m"', "2026-13-45"),
    *("!!python/object:os.system {}", "!!python/object/apply:os.system ['true']", "!!binary aGk="),
    *("!!set {a, b}", "!!timestamp 2026-01-01", "!unknown x", "&a [*a]", "&b {k: *b}", "*missing"),
    *("[" * 3000, "{class_path: os.system, init_args: {command: 'true'}}", "{class_path: 3}"),
    *(
        "{class_path: subprocess.Popen}",
        "{class_path: builtins.eval}",
        "{class_path: torch.optim.SGD}",
    ),
    *(
        "{class_path: no.such.thing}",
        "{class_path: mpo_lightning.losses.MPO, init_args: {beta: x}}",
    ),
    *(
        "{class_path: [a]}",
        "{init_args: {}}",
        "{class_path: '', init_args: 4}",
        "<<",
        "1_000",
        "012",
    ),
    *(
        "1:30",
        "yes",
        "~",
        "!!float x",
        "!!int '7'",
        "? [a]",
        "@x",
        "`x`",
        "%x",
        "- a",
        "1e-5",
        "5e",
    ),
]


def mutated_config(text: str, chance: random.Random) -> bytes:
    """A configuration in which a value, a key, a line or the bytes are others."""
    lines = text.splitlines()
    settings = [n for n, line in enumerate(lines) if re.match(r"\s*[\w-]+:", line)]
    number = chance.choice(settings)
    key, _, _ = lines[number].partition(":")
    how = chance.randrange(10)
    if how < 5:
        lines[number] = f"{key}: {chance.choice(VALUES)}"
    elif how == 5:
        lines.insert(number, lines[number])
    elif how == 6:
        lines[number] = lines[number].replace(
            key.strip(), chance.choice(("no_such", "\t", "x.y", "1")), 1
        )
    elif how == 7:
        lines[number] = chance.choice(("\t", "  ", "")) + lines[number].lstrip(
            chance.choice((" ", ""))
        )
    elif how == 8:
        del lines[number]
    else:
        data = "\n".join(lines).encode()
        where = chance.randrange(len(data))
        cut: list[Callable[[], bytes]] = [
            lambda: data[:where],
            lambda: data.decode().encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + data,
            lambda: data[:where] + b"\xff" + data[where:],
            lambda: data[:where] + b"\x00" + data[where:],
            lambda: data + b"\n---\na: 1\n",
            lambda: b"",
        ]
        return chance.choice(cut)()
    return "\n".join(lines).encode("utf-8", "replace")


def same_value(given: Any, shown: Any) -> bool:  # noqa: PLR0911 (a case each)
    """Whether a setting is printed as it was given; a text may stand for a number."""
    if isinstance(given, dict):
        if not isinstance(shown, dict):
            return isinstance(shown, str) and str(given.get("class_path", "\0")) in shown
        inner = shown.get("init_args", {})
        more = {**(inner if isinstance(inner, dict) else {}), **shown}
        return all(key in more and same_value(each, more[key]) for key, each in given.items())
    if isinstance(given, list) and isinstance(shown, list):
        return len(given) == len(shown) and all(map(same_value, given, shown))
    if isinstance(shown, list) and len(shown) == 1:
        return same_value(given, shown[0])
    if isinstance(shown, dict):
        return isinstance(given, str) and str(shown.get("class_path", "")).endswith(given)
    if type(given) is type(shown) and given == shown:
        return True
    if isinstance(shown, str) and isinstance(given, str):
        return shown.endswith(f".{given}")
    if isinstance(given, bool) or isinstance(shown, bool):
        return str(given).lower() == str(shown).lower()
    try:
        return float(given) == float(shown)
    except (TypeError, ValueError):
        return str(given) == str(shown)


def outcome_of_config(parser: ArgumentParser, content: bytes, path: Path) -> tuple[str, str]:
    path.write_bytes(content)
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    with no_hang(), redirect_stdout(out), redirect_stderr(err):
        try:
            parser.parse_args(["fit", f"--config={path}", "--print_config"])
        except SystemExit as stopped:
            status = stopped.code
    if status not in (0, None):
        said = err.getvalue() + (status if isinstance(status, str) else "")
        lines = said.strip().splitlines()
        clean = all(letter.isprintable() or letter == "\n" for letter in said)
        # Notes on what was read before may come before.
        errors = [line for line in lines if not line.endswith("what is set for it.")]
        if len(errors) != 1 or not errors[0].startswith("error: ") or not clean:
            return "traceback", f"told in {len(lines)} lines: {said[:900]}"
        if INTERNAL.search(said):
            return "traceback", f"told in Python's words: {said[:900]}"
        return "refused", ""
    given = yaml.safe_load(content.decode("utf-8"))
    if given is None or isinstance(given, dict):
        shown = yaml.safe_load(out.getvalue())
        wrong = [key for key, each in (given or {}).items() if not same_value(each, shown.get(key))]
        text = f"{wrong}: {[(given[key], shown.get(key)) for key in wrong]}"
        return ("silent", text[:900]) if wrong else ("accepted", "")
    return "silent", f"a configuration that is {given!r}"


def fuzz_configs(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Yield name of the configuration, outcome and what was found, for each of ``count``."""
    chance = random.Random(seed)
    # Lightning's command line looks at the arguments of the process.
    with patch("sys.argv", ["mpo-lightning", "fit"]):
        parser = capture_parser(lambda: run_command.main(["fit"]))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            config = CONFIGS[number % len(CONFIGS)]
            content = mutated_config(config.read_text(encoding="utf-8"), chance)
            try:
                outcome, said = outcome_of_config(parser, content, Path(folder) / "config.yaml")
            except TimeoutError:
                outcome, said = "hang", content.decode(errors="replace")[:900]
            except (Exception, UserError):
                outcome, said = "traceback", traceback.format_exc()
            yield config.name, outcome, said


def run(rows: int, configs: int, seed: int) -> tuple[str, list[str]]:
    """Return a table of counts, and what was not refused or accepted, each kind of it once."""
    counts: dict[str, Counter[str]] = {}
    wrong: dict[str, str] = {}
    for what, cases in (("rows", fuzz_rows(rows, seed)), ("configs", fuzz_configs(configs, seed))):
        for kind, outcome, said in cases:
            name = f"{what}, {kind}"
            counts.setdefault(name, Counter())[outcome] += 1
            if outcome not in {"refused", "accepted"}:
                last = said.strip().splitlines()[-1:] or [""]
                wrong.setdefault(f"{name}: {outcome} {last[0][:50]}", f"{name}: {outcome}: {said}")
    ends = ("refused", "accepted", "silent", "traceback", "hang")
    total = sum(counts.values(), Counter())
    lines = [f"{'':34}" + "".join(f"{end:>11}" for end in ends)]
    for name, found_of in [*counts.items(), ("all", total)]:
        lines.append(f"{name:34}" + "".join(f"{found_of[end]:>11,}" for end in ends))
    return "\n".join(lines), list(wrong.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=24_000)
    parser.add_argument("--configs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    began = time.monotonic()
    table, faults = run(chosen.rows, chosen.configs, chosen.seed)
    print(table, *faults, f"{time.monotonic() - began:.0f} seconds", sep="\n")
    sys.exit(bool(faults))
