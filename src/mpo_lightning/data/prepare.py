"""The groups of a source as token ids, computed once and kept on disk.

The rows are dealt out in runs to as many processes as wanted; what these make of them is written
to Arrow files as it comes and memory-mapped afterwards, so that neither the rows nor the tokens
have to fit into memory. What was made is found again by content: of the source, of the tokenizer,
of the settings and of the code that made it.
"""

import json
import os
import shutil
from hashlib import sha256
from inspect import getsourcefile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from mpo_lightning.data.counting import count_outcome
from mpo_lightning.data.dataset import SCHEMA
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.tokens import GroupTokenizer, tokenizer_digest
from mpo_lightning.files import whole_folder

__all__ = ["Kept", "kept", "prepare", "remove"]

# Groups of one run; a run's report is one row.
RUN = 500
# Below it a process costs more than it saves.
WORTH_A_PROCESS = 4 * RUN
REPORT = "report.json"


def prepare(
    reader: GroupReader, tokenize: GroupTokenizer, *, root: Path, processes: int | None = None
) -> tuple[Any, DataReport]:
    """Tokenise all groups of a source, or find what an earlier call made of the same.

    Several processes that ask for the same wait for the one that makes it.

    Args:
        reader: the source.
        tokenize: makes token ids of a group.
        root: folder of what is kept.
        processes: that share the work; as many as this process may use if none.

    Returns:
        a data set of the ``datasets`` library with the columns of `dataset.SCHEMA`, one row a kept
        group, and what became of all of them.

    Raises:
        DataError: if rows cannot be used, or none remains; also where that was found before.
    """
    from datasets import load_from_disk

    folder = root / _key(reader, tokenize)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / REPORT).is_file():
            _make(folder, reader, tokenize, processes)
    report = DataReport.from_json((folder / REPORT).read_text(encoding="utf-8"))
    report.check()
    return load_from_disk(str(folder)), report


class Kept(NamedTuple):
    """Token ids on disk: where, of which source, how many groups, how large."""

    folder: Path
    source: str
    groups: int
    bytes: int


def kept(root: Path) -> list[Kept]:
    """What lies in a folder of token ids; other folders are passed over."""
    found = []
    for path in sorted(root.glob(f"[!.]*/{REPORT}")):
        report = DataReport.from_json(path.read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        found.append(Kept(path.parent, report.data, report.kept, size))
    return found


def remove(root: Path) -> list[Kept]:
    """Remove all token ids from a folder, and give what they were."""
    removed = kept(root)
    for each in removed:
        with FileLock(f"{each.folder}.lock"):
            shutil.rmtree(each.folder)
    return removed


def _key(reader: GroupReader, tokenize: GroupTokenizer) -> str:
    """Of all that decides what the groups become."""
    # Which of the files beside this one have a say is not worth being wrong about.
    here = Path(__file__).parent
    code = sorted([*here.glob("*.py"), *here.glob("schemas/*.py")])
    content = {
        # Rows are named by their source, in messages and in predictions.
        "source": [reader.source.name, reader.source.digest],
        "schema": repr(reader.schema),
        "columns": reader.columns,
        "tokenizer": tokenizer_digest(tokenize.tokenizer),
        "settings": tokenize.settings,
        "code": [sha256(path.read_bytes()).hexdigest() for path in code],
        "schema's code": _code_of(type(reader.schema)),
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _code_of(schema: type) -> str:
    """A digest of what a schema does: of its file, or of itself if it was typed in."""
    from datasets.fingerprint import Hasher

    try:
        own = getsourcefile(schema)
    # In a notebook or at a prompt there is no file.
    except (OSError, TypeError):
        own = None
    if own is None or not Path(own).is_file():
        return str(Hasher.hash(schema))
    return sha256(Path(own).read_bytes()).hexdigest()


def _make(
    folder: Path, reader: GroupReader, tokenize: GroupTokenizer, processes: int | None
) -> None:
    import datasets

    starts = np.arange(0, len(reader), RUN)
    runs = datasets.Dataset.from_dict({"start": starts})
    if processes is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        processes = min(available, len(reader) // WORTH_A_PROCESS)
    with TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        rows = runs.with_format("arrow").map(
            _tokenize_run,
            batched=True,
            batch_size=1,
            remove_columns=["start"],
            features=datasets.Features.from_arrow_schema(_WITH_REPORT),
            fn_kwargs={"reader": reader, "tokenize": tokenize},
            num_proc=processes if processes > 1 else None,
            cache_file_name=f"{temporary}/run.arrow",
            new_fingerprint=folder.name,
            desc=f"Tokenizing {reader.source.name} ({RUN} groups each)",
        )
        report = DataReport(reader.source.name)
        texts = rows.data.table.column("report")
        for text in texts.filter(pc.is_valid(texts)).to_pylist():
            report.add(DataReport.from_json(text))
        usable = rows.select(np.flatnonzero(pc.is_null(texts).to_numpy()))
        # A second bar, for a copy that takes seconds.
        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        with whole_folder(folder) as whole:
            usable.remove_columns("report").with_format(None).save_to_disk(str(whole))
            (whole / REPORT).write_text(report.to_json(), encoding="utf-8")
        if shown:
            datasets.enable_progress_bars()


_WITH_REPORT = SCHEMA.append(pa.field("report", pa.string()))


def _tokenize_run(run: pa.Table, reader: GroupReader, tokenize: GroupTokenizer) -> pa.Table:
    """The kept groups of a run, and a last row that holds its report alone."""
    (start,) = run.column("start").to_pylist()
    stop = min(start + RUN, len(reader))
    report = DataReport(reader.source.name)
    columns: dict[str, list[Any]] = {name: [] for name in _WITH_REPORT.names}
    for outcome in reader.outcomes(start, stop):
        group = count_outcome(outcome, report)
        if group is None:
            continue
        try:
            ids = tokenize(group, report)
        except DataError as error:
            report.fail(error)
            continue
        if ids is None:
            continue
        values = {
            "prompt": ids.prompt,
            "responses": ids.responses,
            "scores": [group.scores[index] for index in ids.indices],
            "indices": ids.indices,
            "source": outcome.source,
            # Parquet and datasets rows may hold dates and the like, which JSON has no form for.
            "extra": json.dumps(group.extra, default=str),
            "report": None,
        }
        for name, value in values.items():
            columns[name].append(value)
    for name, column in columns.items():
        column.append(report.to_json() if name == "report" else None)
    return pa.table(columns, schema=_WITH_REPORT)
