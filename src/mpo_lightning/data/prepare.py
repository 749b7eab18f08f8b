"""Token ids of a source's groups, computed once and cached on disk.

Chunks of rows are distributed over processes. The token ids are written to Arrow files as they are
computed and memory-mapped afterwards, so that neither rows nor tokens have to fit into memory. The
cache key is a digest of the source, the tokenizer, the settings and the code that decides them.
"""

import json
import os
import re
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

from mpo_lightning.data.dataset import SCHEMA, table_row
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.report import BadRows, DataReport
from mpo_lightning.data.tokens import GroupTokenizer, tokenizer_digest
from mpo_lightning.digests import SUMS, check_folder
from mpo_lightning.errors import DamagedError
from mpo_lightning.files import naming, whole_folder
from mpo_lightning.printable import printable

__all__ = ["CODE", "CachedTokens", "cached_tokens", "prepare", "remove"]

# Groups that are tokenised together; each chunk has one report.
CHUNK_GROUPS = 500
# With fewer groups, starting a process takes longer than it saves.
GROUPS_PER_PROCESS = 4 * CHUNK_GROUPS
REPORT = "report.json"
OWN_FOLDER = re.compile(r"[0-9a-f]{32}")
ANOTHER_PLACE = "That of token ids is data.cache, and MPO_LIGHTNING_CACHE that of all caches."
# Files of this folder that decide the rows of the cache: this one, the table's columns, and all
# that reading.py and tokens.py import.
CODE = (
    "prepare.py",
    "dataset.py",
    "reading.py",
    "rows.py",
    "conversation.py",
    "tokens.py",
    "rendering.py",
    "groups.py",
    "report.py",
    "score_scales.py",
    "sources.py",
    "part_files.py",
    "row_source.py",
    "csv_files.py",
    "compressed.py",
    "llama_factory.py",
    "alpaca_eval.py",
    "schemas/alpaca_eval.py",
    "split_files.py",
    "schemas/base.py",
    "schemas/conversations.py",
    "schemas/detect.py",
    "schemas/lists.py",
    "schemas/pairs.py",
    "schemas/rejected.py",
    "schemas/single_response.py",
    "schemas/trainer_columns.py",
    "schemas/ultrafeedback.py",
)


def prepare(
    reader: GroupReader,
    tokenize: GroupTokenizer,
    *,
    root: Path,
    processes: int | None = None,
    bad_rows: BadRows = "error",
) -> tuple[Any, DataReport]:
    """Tokenise all groups of a source, or load the cached result.

    If several processes need the same source, one of them tokenises it and the others wait.

    Args:
        reader: the source.
        tokenize: tokenizer of its groups.
        root: folder of the cache.
        processes: number of processes to use. Defaults to the number of processors available.
        bad_rows: whether rows that cannot be used are an error, or dropped.

    Returns:
        a data set of the ``datasets`` library with the columns of `dataset.SCHEMA`, one row per
        remaining group, and the report on all groups.


    Raises:
        DamagedError: if the cached result is not what was written.
        DataError: if rows cannot be used, or none remains; a cached result raises it again.
    """
    from datasets import load_from_disk

    folder = root / _key(reader, tokenize)
    # What is complete is only read: it may lie where nothing can be written, not even a lock.
    if not folder.is_dir():
        with naming(root, remedy=ANOTHER_PLACE):
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.is_dir():
                    _make(folder, reader, tokenize, processes)
    _check(folder)
    report = DataReport.from_json((folder / REPORT).read_bytes())
    report.check(bad_rows)
    return load_from_disk(str(folder)), report


def _check(folder: Path) -> None:
    check_folder(folder, required=None, remedy=f"Remove {folder}, and it is made again.")


class CachedTokens(NamedTuple):
    """Cached token ids of a source.

    Attributes:
        folder: the folder.
        source: name of the source; empty where it cannot be read.
        groups: number of groups; None where it cannot be read.
        bytes: size on disk.
        problem: error with which they are refused; None for sound ones.
    """

    folder: Path
    source: str
    groups: int | None
    bytes: int
    problem: str | None


def cached_tokens(root: Path) -> list[CachedTokens]:
    """List the token ids in a cache, and check them; other folders are ignored."""
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        here = {file.name: file for file in folder.iterdir()} if folder.is_dir() else {}
        if not OWN_FOLDER.fullmatch(folder.name) or not {SUMS, REPORT} & here.keys():
            continue
        size = sum(file.stat().st_size for file in here.values())
        try:
            _check(folder)
            report = DataReport.from_json(here[REPORT].read_bytes())
        except DamagedError as error:
            found.append(CachedTokens(folder, "", None, size, str(error)))
        else:
            found.append(CachedTokens(folder, report.data, report.kept, size, None))
    return found


def remove(root: Path) -> list[CachedTokens]:
    """Remove all token ids from a cache, and list them."""
    removed = cached_tokens(root)
    for each in removed:
        with FileLock(f"{each.folder}.lock"):
            shutil.rmtree(each.folder)
    return removed


def _key(reader: GroupReader, tokenize: GroupTokenizer) -> str:
    """Return a digest of everything that decides the token ids."""
    here = Path(__file__).parent
    content = {
        # Rows are named after their source, in messages and in predictions.
        "source": [reader.source.name, reader.source.digest],
        "schema": repr(reader.schema),
        "columns": reader.columns,
        "tokenizer": tokenizer_digest(tokenize.tokenizer),
        "settings": tokenize.settings,
        "code": [sha256((here / name).read_bytes()).hexdigest() for name in CODE],
        "schema's code": _code_of(type(reader.schema)),
    }
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _code_of(schema: type) -> str:
    """Return a digest of a schema's file, or of the class itself if it has none."""
    from datasets.fingerprint import Hasher

    try:
        own = getsourcefile(schema)
    # A class from a notebook or an interactive session has no file.
    except (OSError, TypeError):
        own = None
    if own is None or not Path(own).is_file():
        return str(Hasher.hash(schema))
    return sha256(Path(own).read_bytes()).hexdigest()


def _make(
    folder: Path, reader: GroupReader, tokenize: GroupTokenizer, processes: int | None
) -> None:
    import datasets

    starts = np.arange(0, len(reader), CHUNK_GROUPS)
    chunks = datasets.Dataset.from_dict({"start": starts})
    if processes is None:
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        processes = min(available, len(reader) // GROUPS_PER_PROCESS)
    with TemporaryDirectory(prefix=".", dir=folder.parent) as temporary:
        rows = chunks.with_format("arrow").map(
            _tokenize_chunk,
            batched=True,
            batch_size=1,
            remove_columns=["start"],
            features=datasets.Features.from_arrow_schema(_WITH_REPORT),
            fn_kwargs={"reader": reader, "tokenize": tokenize},
            num_proc=processes if processes > 1 else None,
            cache_file_name=f"{temporary}/chunks.arrow",
            new_fingerprint=folder.name,
            desc=printable(f"Tokenizing {reader.source.name} ({CHUNK_GROUPS} groups each)"),
        )
        report = DataReport(reader.source.name)
        texts = rows.data.table.column("report")
        for text in texts.filter(pc.is_valid(texts)).to_pylist():
            report.add(DataReport.from_json(text))
        usable = rows.select(np.flatnonzero(pc.is_null(texts).to_numpy()))
        # The copy takes seconds and needs no second progress bar.
        shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        with whole_folder(folder) as whole:
            usable.remove_columns("report").with_format(None).save_to_disk(str(whole))
            (whole / REPORT).write_text(report.to_json(), encoding="utf-8")
        if shown:
            datasets.enable_progress_bars()


_WITH_REPORT = SCHEMA.append(pa.field("report", pa.string()))


def _tokenize_chunk(chunk: pa.Table, reader: GroupReader, tokenize: GroupTokenizer) -> pa.Table:
    """Return the remaining groups of a chunk, and a last row that holds only its report."""
    (start,) = chunk.column("start").to_pylist()
    report = DataReport(reader.source.name)
    rows: list[dict[str, Any]] = []
    for result in reader.results(start, min(start + CHUNK_GROUPS, len(reader))):
        group = result.count_in(report)
        if group is None:
            continue
        try:
            tokens = tokenize(group, report)
        except DataError as error:
            report.fail(error)
            continue
        if tokens is not None:
            rows.append(table_row(tokens))
    rows.append({"report": report.to_json()})
    return pa.Table.from_pylist(rows, schema=_WITH_REPORT)
