"""Log-probabilities of responses under the frozen reference, computed once and kept on disk.

A cache holds the values of one reference. Its folder is named after everything they depend on
besides the tokens; inside it, a value is found by the tokens themselves. Rows may move, files may
be renamed and scores may change: a response is computed again only if its tokens, its prompt's
tokens or the reference differ.
"""

import json
import re
import shlex
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.errors import UserError
from mpo_lightning.files import cache_folder, write_whole

__all__ = [
    "CacheInfo",
    "ReferenceCache",
    "ReferenceCacheError",
    "clear",
    "default_root",
    "fill",
    "inspect",
]

FORMAT = "mpo-lightning reference log-probabilities"
VERSION = 1
DESCRIPTION = "cache.json"
SHARDS = "responses-*.parquet"
COLUMNS = pa.schema(
    [
        pa.field("key", pa.binary(16), nullable=False),
        pa.field("logp", pa.float64(), nullable=False),
    ]
)
# What may lie in a cache's folder; names of files that a killed writer left begin with a dot.
OWN_FOLDER = re.compile(r"[0-9a-f]{16}")
OWN_FILE = re.compile(r"cache\.json|responses-[0-9a-f]{32}\.parquet|\.[0-9a-f]{32}\.partial")

# All keys have 16 bytes. NumPy drops trailing zeros where it hands out a single one as ``bytes``,
# which is never done here; it sorts and compares them in full.
Keys = NDArray[np.bytes_]
Values = NDArray[np.float64]


class ReferenceCacheError(UserError, ValueError):
    """A cache that cannot be used; the message says which file, what was found, what to do."""


def default_root() -> Path:
    """The folder of all caches where none is named."""
    return cache_folder("reference")


# --------------------------------------------------------------------------------------- keys


def _digests(prompt: bytes, responses: Iterable[bytes]) -> Iterable[bytes]:
    """Key of each response, from token ids as little-endian int64.

    The prompt's length goes first: the same tokens cut elsewhere are another response.
    """
    start = blake2b(len(prompt).to_bytes(8, "little") + prompt, digest_size=16)
    for response in responses:
        key = start.copy()
        key.update(response)
        yield key.digest()


def _ids(tokens: Tensor) -> bytes:
    return tokens.cpu().numpy().astype("<i8").tobytes()


def _as_keys(digests: Iterable[bytes]) -> Keys:
    return np.frombuffer(b"".join(digests), dtype="S16")


def _keys_of_groups(groups: Sequence[TokenGroup]) -> Keys:
    """Keys of all responses, group after group."""
    return _as_keys(
        digest
        for group in groups
        for digest in _digests(_ids(group.prompt), map(_ids, group.responses))
    )


def _keys_of_batch(batch: GroupBatch) -> Keys:
    """Keys of all responses, group after group."""
    raw, digests = _ids(batch.tokens), list[bytes]()

    def part(start: int, stop: int) -> bytes:
        return raw[8 * start : 8 * stop]

    for span in batch.spans():
        responses = [part(response.start, response.stop) for response in span.responses()]
        digests.extend(_digests(part(span.start, span.first_response), responses))
    return _as_keys(digests)


# -------------------------------------------------------------------------------------- files


def _identity_digest(identity: Mapping[str, str]) -> str:
    content = {"version": VERSION, "identity": dict(identity)}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()


def _clear_command(folder: Path) -> str:
    return f"mpo-lightning cache clear {shlex.quote(str(folder.parent))} --name {folder.name}"


def _write(path: Path, data: bytes) -> None:
    """Write a file that others see complete or not at all."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise ReferenceCacheError(
            f"{path}: cannot be written: {error}. Make room or give access, or set "
            "model.reference_cache to another folder."
        ) from error


def _read_identity(folder: Path) -> dict[str, str]:
    """The identity in a folder's cache.json, which must be of this format and version."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ReferenceCacheError(
            f"{path}: no such file, so nothing says what {folder} holds. Remove that folder, or "
            "use another."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReferenceCacheError(
            f"{path}: cannot be read ({error}). Remove the cache: {_clear_command(folder)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ReferenceCacheError(
            f"{path}: not the description of a reference cache. Remove that folder, or use another."
        )
    if content.get("version") != VERSION or not isinstance(content.get("identity"), dict):
        raise ReferenceCacheError(
            f"{path}: a reference cache of version {content.get('version')!r}, this is version "
            f"{VERSION}. Remove the cache: {_clear_command(folder)}"
        )
    identity: dict[str, str] = content["identity"]
    return identity


def _shard_metadata(digest: str) -> dict[bytes, bytes]:
    return {b"format": FORMAT.encode(), b"version": b"%d" % VERSION, b"identity": digest.encode()}


def _shard_bytes(keys: Keys, values: Values, digest: str) -> bytes:
    column = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )
    schema = COLUMNS.with_metadata(_shard_metadata(digest))
    sink = pa.BufferOutputStream()
    # Digests and sums do not compress, and no value comes twice.
    pq.write_table(
        pa.table([column, pa.array(values)], schema=schema),
        sink,
        compression="none",
        use_dictionary=False,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]


def _read_shard(path: Path, digest: str) -> tuple[Keys, Values]:
    def refuse(found: str) -> ReferenceCacheError:
        return ReferenceCacheError(
            f"{path}: {found}. Remove this file, and its responses are computed again, or the "
            f"whole cache: {_clear_command(path.parent)}"
        )

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            table = file.read(use_threads=False)
    # A damaged length may ask for any amount of memory, a damaged name may be no text.
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise refuse(f"truncated, damaged or not Parquet ({error})") from error
    if not schema.equals(COLUMNS, check_metadata=False):
        raise refuse(f"its columns are {schema.remove_metadata()}, not those of a reference cache")
    metadata, expected = schema.metadata or {}, _shard_metadata(digest)
    for name, value in expected.items():
        if metadata.get(name) != value:
            found = metadata.get(name, b"none").decode(errors="replace")
            raise refuse(
                f"its {name.decode()} is {found}, that of the cache is {value.decode()}: it "
                "belongs elsewhere"
            )
    chunks = table["key"].chunks
    keys = [np.frombuffer(c.buffers()[1], "S16", len(c), 16 * c.offset) for c in chunks if len(c)]
    # A copy: a view would keep the whole file's memory.
    values = table["logp"].to_numpy().copy()
    if not np.isfinite(values).all():
        raise refuse("it holds a value that is not a number")
    return np.concatenate([np.empty(0, "S16"), *keys]), values


# -------------------------------------------------------------------------------------- cache


class ReferenceCache:
    """Log-probabilities of responses under one reference, by content.

    The folder is ``root/<16 hexadecimal digits>``, after the identity. Any number of processes may
    open it, read it and add to it at the same time.

    Args:
        root: the folder of all caches.
        identity: everything that the values depend on besides the token ids, such as digests of
            weights and configuration, the dtype and the attention kernel.
        responses_per_shard: a shard is written as soon as so many responses wait for it, ...
        seconds_per_shard: ... or so long after the last one: what a killed process loses.

    Attributes:
        folder: this reference's folder.

    Raises:
        ReferenceCacheError: if the folder holds anything that is not this cache, or a damaged one.
    """

    def __init__(
        self,
        root: str | Path,
        identity: Mapping[str, str],
        *,
        responses_per_shard: int = 10_000,
        seconds_per_shard: float = 60.0,
    ) -> None:
        self.identity = dict(identity)
        self.responses_per_shard = responses_per_shard
        self.seconds_per_shard = seconds_per_shard
        self._digest = _identity_digest(identity)
        self.folder = Path(root).expanduser() / self._digest[:16]
        # How far values of one response may lie apart, in parts of the value or of one nat, when
        # they come from batches of different shapes. Measured on small models: bf16 4e-3.
        exact = "16" not in self.identity.get("dtype", "")
        self._tolerance = 5e-3 if exact else 5e-2
        self._keys: Keys = np.empty(0, "S16")
        self._values: Values = np.empty(0)
        self._read: set[str] = set()
        self._waiting: dict[bytes, float] = {}
        self._written_at = time.monotonic()
        self._open_folder()
        self.reload()

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Listed before cache.json is looked for: who writes a shard has written that before.
            entries = [p.name for p in self.folder.iterdir() if not p.name.endswith(".partial")]
        except OSError as error:
            raise ReferenceCacheError(
                f"{self.folder}: cannot be opened: {error}. Set model.reference_cache to a folder "
                "that can be written."
            ) from error
        path = self.folder / DESCRIPTION
        if not entries and not path.exists():
            content = {"format": FORMAT, "version": VERSION, "identity": self.identity}
            _write(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
        found = _read_identity(self.folder)
        if found != self.identity:
            names = sorted(found.keys() | self.identity.keys())
            differing = [n for n in names if found.get(n) != self.identity.get(n)]
            raise ReferenceCacheError(
                f"{path}: describes another reference; {', '.join(differing)} differ. Remove the "
                f"cache: {_clear_command(self.folder)}"
            )

    def __len__(self) -> int:
        """Number of responses known."""
        return len(self._keys) + len(self._waiting)

    def _find(self, keys: Keys) -> tuple[Values, NDArray[np.bool_]]:
        """Value of each key, zero where there is none, and which of them are known."""
        places = np.searchsorted(self._keys, keys)
        values, known = np.zeros(len(keys)), places < len(self._keys)
        known[known] = self._keys[places[known]] == keys[known]
        values[known] = self._values[places[known]]
        if self._waiting:
            for place in np.flatnonzero(~known).tolist():
                value = self._waiting.get(keys[place : place + 1].tobytes())
                if value is not None:
                    values[place], known[place] = value, True
        return values, known

    def _slots_missing(self, groups: Sequence[TokenGroup], keys: Keys) -> dict[int, list[int]]:
        """The responses that aren't known, each content once: slots by index of the group."""
        unknown = np.flatnonzero(~self._find(keys)[1])
        _, first = np.unique(keys[unknown], return_index=True)
        counts = np.array([len(group.responses) for group in groups], dtype=np.int64)
        starts = np.cumsum(counts) - counts
        owners = np.repeat(np.arange(len(groups)), counts)
        slots: dict[int, list[int]] = {}
        for place in np.sort(unknown[first]).tolist():
            owner = int(owners[place])
            slots.setdefault(owner, []).append(place - int(starts[owner]))
        return slots

    def missing(self, groups: Sequence[TokenGroup]) -> list[TokenGroup]:
        """The groups with only those responses whose value isn't known.

        A group of which all is known is absent; a content that comes several times appears once.
        """
        slots = self._slots_missing(groups, _keys_of_groups(groups))
        return [_part(groups[index], chosen) for index, chosen in slots.items()]

    def look_up(self, batch: GroupBatch, dtype: torch.dtype = torch.float32) -> Tensor:
        """Log-probability of each response, (B, N) in nats, zero on padding, on the batch's device.

        Args:
            batch: the groups.
            dtype: of the result; values are kept as float64.

        Raises:
            ReferenceCacheError: naming the row and the response, if one isn't known.
        """
        values, known = self._find(_keys_of_batch(batch))
        if not known.all():
            source, response = _name_of(batch, int(np.argmin(known)))
            raise ReferenceCacheError(
                f"{source}: response {response} (from 0) is not in the reference cache "
                f"{self.folder}. The cache was filled from other data or other tokens, or cleared "
                "since: start the run again."
            )
        counts = [len(lengths) for lengths in batch.response_lengths]
        result = np.zeros((len(batch), batch.slots))
        result[np.arange(batch.slots) < np.array(counts)[:, None]] = values
        return torch.from_numpy(result).to(batch.tokens.device, dtype)

    def add(self, batch: GroupBatch, logps: Tensor) -> None:
        """Take computed values; they are written with the next shard.

        Args:
            batch: the groups.
            logps: (B, N), nats; padding is ignored.

        Raises:
            ReferenceCacheError: naming the row and the response, for a value that is not finite or
                that is not the one already known. Nothing of the batch is taken then.
        """
        keys = _keys_of_batch(batch)
        rows = logps.detach().to("cpu", torch.float64).numpy()
        counts = [len(lengths) for lengths in batch.response_lengths]
        values = np.concatenate([row[:n] for row, n in zip(rows, counts, strict=True)])
        if not np.isfinite(values).all():
            place = int(np.argmin(np.isfinite(values)))
            source, response = _name_of(batch, place)
            raise ReferenceCacheError(
                f"{source}: the reference gives response {response} (from 0) a log-probability of "
                f"{values[place]}. Check the model and its dtype."
            )
        before, known = self._find(keys)
        changed = known & self._differ(np.minimum(before, values), np.maximum(before, values))
        if changed.any():
            place = int(np.argmax(changed))
            source, response = _name_of(batch, place)
            raise ReferenceCacheError(
                f"{source}: the reference gives response {response} (from 0) {values[place]:.6g}; "
                f"{self.folder} holds {before[place]:.6g}. Something changed that the cache does "
                f"not know of, or is random. Remove the cache: {_clear_command(self.folder)}"
            )
        for place in np.flatnonzero(~known).tolist():
            self._waiting[keys[place : place + 1].tobytes()] = float(values[place])
        late = time.monotonic() - self._written_at >= self.seconds_per_shard
        if late or len(self._waiting) >= self.responses_per_shard:
            self.flush()

    def _differ(self, low: Values, high: Values) -> NDArray[np.bool_]:
        """Whether values of one response differ by more than rounding."""
        scale = np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
        return high - low > self._tolerance * scale

    def flush(self) -> None:
        """Write what waits as a shard; it appears complete or not at all."""
        if self._waiting:
            # In order, so that merging is a single pass.
            digests = sorted(self._waiting)
            keys = _as_keys(digests)
            values = np.array([self._waiting[digest] for digest in digests])
            path = self.folder / f"responses-{uuid.uuid4().hex}.parquet"
            _write(path, _shard_bytes(keys, values, self._digest))
            self._read.add(path.name)
            self._waiting.clear()
            self._merge([(keys, values)])
        self._written_at = time.monotonic()

    def reload(self) -> None:
        """Write what waits, and read the shards that others have written since.

        Raises:
            ReferenceCacheError: naming the file, for one that is damaged or not of this cache;
                naming the folder, if two shards contradict each other.
        """
        self.flush()
        paths = sorted(p for p in self.folder.glob(SHARDS) if p.name not in self._read)
        self._merge([_read_shard(path, self._digest) for path in paths])
        self._read.update(path.name for path in paths)

    def _merge(self, pieces: list[tuple[Keys, Values]]) -> None:
        """Take in sorted pieces; of a response computed twice the lower value stays."""
        if not pieces:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in pieces)])
        values = np.concatenate([self._values, *(values for _, values in pieces)])
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        if len(starts) < len(keys):
            # The lower one whatever the order of reading: every process takes the same.
            low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
            changed = self._differ(low, high)
            if changed.any():
                place = int(np.argmax(changed))
                raise ReferenceCacheError(
                    f"{self.folder}: two shards give one response different values, "
                    f"{low[place]:.6g} and {high[place]:.6g}. Something changed that the cache "
                    "does not know of, or is random. Remove the cache: "
                    f"{_clear_command(self.folder)}"
                )
            keys, values = keys[starts], low
        self._keys, self._values = keys, values


def _part(group: TokenGroup, slots: list[int]) -> TokenGroup:
    """A group with some of its responses."""
    places = group.indices or range(len(group.responses))
    return group._replace(
        responses=tuple(group.responses[slot] for slot in slots),
        scores=tuple(group.scores[slot] for slot in slots),
        indices=tuple(places[slot] for slot in slots),
    )


def _name_of(batch: GroupBatch, place: int) -> tuple[str, int]:
    """Row, and place in its row, of a response counted through the whole batch."""
    names = [
        (source, response)
        for source, indices in zip(batch.sources, batch.indices, strict=True)
        for response in indices
    ]
    return names[place]


# --------------------------------------------------------------------------------------- fill

# A batch of the plan: indices of groups, each with the slots of its missing responses.
Plan = list[list[tuple[int, list[int]]]]


def _plan(slots: dict[int, list[int]], groups: Sequence[TokenGroup], tokens: int) -> Plan:
    """Batches of similar size, the largest first: memory that does not suffice shows at once."""

    def size(item: tuple[int, list[int]]) -> int:
        group = groups[item[0]]
        return len(group.prompt) + sum(len(group.responses[slot]) for slot in item[1])

    plan: Plan = []
    room = 0
    for item in sorted(slots.items(), key=size, reverse=True):
        if size(item) > room:
            plan.append([])
            room = max(tokens, size(item))
        plan[-1].append(item)
        room -= size(item)
    return plan


def fill(
    cache: ReferenceCache,
    groups: Sequence[TokenGroup],
    compute: Callable[[GroupBatch], Tensor],
    *,
    tokens_per_batch: int,
    rank: int = 0,
    world_size: int = 1,
    broadcast: Callable[[Plan], Plan] = lambda plan: plan,
    barrier: Callable[[], object] = lambda: None,
    description: str,
) -> int:
    """Compute what the cache lacks, with a progress bar, and write it as it comes.

    An interrupted call is taken up by the next. Every process calls ``compute`` equally often, as a
    sharded model needs them all: one that has no batch left computes another's and drops it.

    Args:
        cache: this process's view of the cache.
        groups: the same groups in the same order on every process.
        compute: gives the log-probabilities of a batch, (B, N), nats.
        tokens_per_batch: prompts and responses together; a larger group is a batch by itself.
        rank: this process, the first being 0.
        world_size: number of processes.
        broadcast: gives every process what the first one passes in.
        barrier: waits until all processes have come to it.
        description: of the progress bar.

    Returns:
        Number of responses computed, by all processes together.

    Raises:
        ReferenceCacheError: if a value is not finite or contradicts the cache, or if values that
            another process wrote cannot be seen here.
    """
    keys = _keys_of_groups(groups)
    plan: Plan = []
    if rank == 0:
        plan = _plan(cache._slots_missing(groups, keys), groups, tokens_per_batch)
    plan = broadcast(plan)
    counts = [sum(len(slots) for _, slots in batch) for batch in plan]
    try:
        with tqdm(
            total=sum(counts), desc=description, unit=" responses", disable=rank > 0 or not plan
        ) as bar:
            for start in range(0, len(plan), world_size):
                own = start + rank < len(plan)
                # The last batch is the smallest.
                items = plan[start + rank] if own else plan[-1]
                batch = GroupBatch.from_groups([_part(groups[i], slots) for i, slots in items])
                logps = compute(batch)
                if own:
                    cache.add(batch, logps)
                bar.update(sum(counts[start : start + world_size]))
    finally:
        cache.flush()
    barrier()
    cache.reload()
    _, known = cache._find(keys)
    if not known.all():
        raise ReferenceCacheError(
            f"{cache.folder}: {np.sum(~known)} of {len(known)} responses are not here although "
            "every process has written its part. Set model.reference_cache to a folder that all "
            "nodes share."
        )
    return sum(counts)


# -------------------------------------------------------------------------- inspect and clear


class CacheInfo(NamedTuple):
    """What is known of one folder below the root.

    Attributes:
        folder: the cache's folder.
        responses: number of values; None where they cannot be read.
        shards: number of shard files.
        bytes: size of all files together.
        identity: what the values depend on; empty where it cannot be read.
        problem: why the cache is refused, if it is.
    """

    folder: Path
    responses: int | None
    shards: int
    bytes: int
    identity: dict[str, str]
    problem: str | None


def _folders(root: str | Path) -> list[Path]:
    root = Path(root).expanduser()
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def inspect(root: str | Path) -> list[CacheInfo]:
    """Every folder below the root, each read in full; one that is no sound cache has a problem."""
    found = []
    for folder in _folders(root):
        responses, problem, identity = None, None, dict[str, str]()
        try:
            identity = _read_identity(folder)
            name = _identity_digest(identity)[:16]
            if folder.name != name:
                raise ReferenceCacheError(
                    f"{folder}: holds the cache of another reference, {name}. Rename the folder "
                    f"or remove it: {_clear_command(folder)}"
                )
            responses = len(ReferenceCache(folder.parent, identity))
        except ReferenceCacheError as error:
            problem = str(error)
        shards = len(list(folder.glob(SHARDS)))
        size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        found.append(CacheInfo(folder, responses, shards, size, identity, problem))
    return found


def _check_is_own(folder: Path) -> None:
    """Refuse to remove a folder that isn't a cache, whole or damaged, and nothing else."""
    files = list(folder.iterdir())
    foreign = [p.name for p in files if not OWN_FILE.fullmatch(p.name) or not p.is_file()]
    try:
        content = json.loads((folder / DESCRIPTION).read_bytes())
        described = isinstance(content, dict) and content.get("format") == FORMAT
    except (OSError, ValueError):
        # Damaged or never written: names have to do.
        described = OWN_FOLDER.fullmatch(folder.name) is not None
    if foreign or not described:
        found = f"holds {', '.join(sorted(foreign))}" if foreign else "is not described as one"
        raise ReferenceCacheError(
            f"{folder}: not a reference cache: it {found}. Nothing was removed. Name the cache to "
            "be cleared, or move this folder away."
        )


def clear(root: str | Path, name: str | None = None) -> list[Path]:
    """Remove one cache, or all below the root.

    Args:
        root: the folder of all caches.
        name: the folder's name; none given means all.

    Returns:
        The folders removed.

    Raises:
        ReferenceCacheError: naming a folder that is not a cache; nothing is removed then.
    """
    folders = _folders(root)
    if name is not None:
        names = [folder.name for folder in folders]
        if name not in names:
            raise ReferenceCacheError(
                f"{root}: no cache named {name}; found {', '.join(names) or 'none'}."
            )
        folders = [folders[names.index(name)]]
    for folder in folders:
        _check_is_own(folder)
    for folder in folders:
        # cache.json goes last: shards without it would be refused, not taken up, by a new process.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == DESCRIPTION):
            path.unlink(missing_ok=True)
        folder.rmdir()
    return folders
