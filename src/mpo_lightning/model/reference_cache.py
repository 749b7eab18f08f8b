"""Log-probabilities of responses under the frozen reference, computed once and kept on disk.

A cache holds the values of one reference. Its folder is named after everything the values depend on
besides the tokens; inside it a value is found by the tokens themselves (content addressing). Rows
may move, files may be renamed and scores may change: a response is computed again only if its
tokens, its prompt's tokens or the reference differ.

The folder holds ``cache.json``, which describes the reference, and shards, Parquet files of keys
and values. Files are never changed, and appear complete or not at all, so that any number of
processes may read and write at the same time, on a network file system too.
"""

import json
import shlex
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.errors import UserError
from mpo_lightning.files import write_whole

__all__ = [
    "DESCRIPTION",
    "FORMAT",
    "SHARDS",
    "ReferenceCache",
    "ReferenceCacheError",
    "clear_command",
    "identity_digest",
    "read_identity",
    "response_keys",
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

# Keys of 16 bytes. NumPy sorts and compares them in full, but drops trailing zeros from a single
# one taken out as ``bytes``: take slices of one key instead.
Keys = NDArray[np.bytes_]
Values = NDArray[np.float64]


class ReferenceCacheError(UserError, ValueError):
    """Cache that cannot be used; the message names the file, what was found and what to do."""


# --------------------------------------------------------------------------------------- keys


def _digests(prompt: bytes, responses: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the key of each response, given token ids as little-endian int64.

    The prompt's length is hashed first: the same tokens split elsewhere are another response.
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


def response_keys(groups: Sequence[TokenGroup]) -> Keys:
    """Return the keys of all responses, group after group."""
    return _as_keys(
        digest
        for group in groups
        for digest in _digests(_ids(group.prompt), map(_ids, group.responses))
    )


def _keys_of_batch(batch: GroupBatch) -> Keys:
    """Return the keys of all responses, group after group."""
    raw, digests = _ids(batch.tokens), list[bytes]()
    for span in batch.spans():
        prompt = raw[8 * span.start : 8 * span.first_response]
        responses = [raw[8 * tokens.start : 8 * tokens.stop] for tokens in span.responses()]
        digests.extend(_digests(prompt, responses))
    return _as_keys(digests)


# -------------------------------------------------------------------------------------- files


def identity_digest(identity: Mapping[str, str]) -> str:
    """Return the digest of everything that a reference's values depend on besides the tokens."""
    content = {"version": VERSION, "identity": dict(identity)}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return sha256(canonical.encode()).hexdigest()


def clear_command(folder: Path) -> str:
    """Return the command that removes a cache."""
    return f"mpo-lightning cache clear {shlex.quote(str(folder.parent))} --name {folder.name}"


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise ReferenceCacheError(
            f"{path}: cannot be written: {error}. Make room or give access, or set "
            "model.reference_cache to another folder."
        ) from error


def read_identity(folder: Path) -> dict[str, str]:
    """Read the identity of the reference that a folder's cache.json describes.

    Raises:
        ReferenceCacheError: if cache.json is missing, damaged, or of another format or version.
    """
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
            f"{path}: cannot be read ({error}). Remove the cache: {clear_command(folder)}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ReferenceCacheError(
            f"{path}: not the description of a reference cache. Remove that folder, or use another."
        )
    if content.get("version") != VERSION or not isinstance(content.get("identity"), dict):
        raise ReferenceCacheError(
            f"{path}: a reference cache of version {content.get('version')!r}, this is version "
            f"{VERSION}. Remove the cache: {clear_command(folder)}"
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
    # Digests and sums of logarithms neither compress nor repeat.
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
            f"whole cache: {clear_command(path.parent)}"
        )

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            table = file.read(use_threads=False)
    # A damaged length may ask for any amount of memory, a damaged name may not be UTF-8.
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        raise refuse(f"truncated, damaged or not Parquet ({error})") from error
    if not schema.equals(COLUMNS, check_metadata=False):
        raise refuse(f"its columns are {schema.remove_metadata()}, not those of a reference cache")
    metadata = schema.metadata or {}
    for name, value in _shard_metadata(digest).items():
        if metadata.get(name) != value:
            found = metadata.get(name, b"none").decode(errors="replace")
            raise refuse(
                f"its {name.decode()} is {found}, that of the cache is {value.decode()}: it "
                "belongs elsewhere"
            )
    chunks = table["key"].chunks
    keys = [np.frombuffer(c.buffers()[1], "S16", len(c), 16 * c.offset) for c in chunks if len(c)]
    # A copy: a view would keep the whole file in memory.
    values = table["logp"].to_numpy().copy()
    if not np.isfinite(values).all():
        raise refuse("it holds a value that is not a number")
    return np.concatenate([np.empty(0, "S16"), *keys]), values


# -------------------------------------------------------------------------------------- cache


class ReferenceCache:
    """Log-probabilities of responses under one reference, found by content.

    The folder is ``root/<16 hexadecimal digits>``, after the identity. Any number of processes may
    open it, read it and add to it at the same time.

    Args:
        root: the folder of all caches.
        identity: everything that the values depend on besides the token ids: digests of weights
            and configuration, the dtype, the attention kernel.
        responses_per_shard: write a shard after this many responses, or
        seconds_per_shard: after this many seconds, whichever comes first. A killed process loses
            at most one shard.

    Attributes:
        folder: this reference's folder.

    Raises:
        ReferenceCacheError: if the folder is damaged or holds anything but this cache.
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
        self._digest = identity_digest(identity)
        self.folder = Path(root).expanduser() / self._digest[:16]
        # Rounding between batches of different shapes, as a fraction of the value, or of 1 nat for
        # smaller values. Small models in bf16 differed by 4e-3.
        dtype = self.identity.get("dtype", "")
        exact = "16" not in dtype and "tf32" not in dtype
        self._tolerance = 5e-3 if exact else 5e-2
        self._keys: Keys = np.empty(0, "S16")
        self._values: Values = np.empty(0)
        # Names of the shards in memory, and values that are not in a shard yet.
        self._read: set[str] = set()
        self._waiting: dict[bytes, float] = {}
        self._written_at = time.monotonic()
        self._open_folder()
        self.reload()

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Listed before looking for cache.json, which is written before any shard.
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
        found = read_identity(self.folder)
        if found != self.identity:
            names = sorted(found.keys() | self.identity.keys())
            differing = [n for n in names if found.get(n) != self.identity.get(n)]
            raise ReferenceCacheError(
                f"{path}: describes another reference; {', '.join(differing)} differ. Remove the "
                f"cache: {clear_command(self.folder)}"
            )

    def __len__(self) -> int:
        """Number of known responses."""
        return len(self._keys) + len(self._waiting)

    def _find(self, keys: Keys) -> tuple[Values, NDArray[np.bool_]]:
        """Return the value of each key, zero for an unknown one, and which keys are known."""
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

    def known(self, keys: Keys) -> NDArray[np.bool_]:
        """Return which keys have a value."""
        return self._find(keys)[1]

    def look_up(self, batch: GroupBatch, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the log-probability of each response, nats, (B, N) on the batch's device.

        Args:
            batch: the groups.
            dtype: dtype of the result; values are stored as float64.

        Raises:
            ReferenceCacheError: naming the row and the response of an unknown value.
        """
        values, known = self._find(_keys_of_batch(batch))
        if not known.all():
            raise ReferenceCacheError(
                f"{_name_of(batch, int(np.argmin(known)))} is not in the reference cache "
                f"{self.folder}. The cache was filled from other data or other tokens, or cleared "
                "since: start the run again."
            )
        result = torch.zeros(batch.valid.shape, dtype=torch.float64)
        # Responses are in the order of the valid slots.
        result[batch.valid.cpu()] = torch.from_numpy(values)
        return result.to(batch.tokens.device, dtype)

    def add(self, batch: GroupBatch, logps: Tensor) -> None:
        """Take computed values, which are written with the next shard.

        Args:
            batch: the groups.
            logps: (B, N), nats; padding is ignored.

        Raises:
            ReferenceCacheError: naming the row and the response of a value that is not finite or
                contradicts the known one. Nothing of the batch is taken then.
        """
        keys = _keys_of_batch(batch)
        values: Values = logps.detach().to("cpu", torch.float64)[batch.valid.cpu()].numpy()
        if not np.isfinite(values).all():
            place = int(np.argmin(np.isfinite(values)))
            raise ReferenceCacheError(
                f"{_name_of(batch, place)} has a reference log-probability of {values[place]}. "
                "Check the model and its dtype."
            )
        before, known = self._find(keys)
        changed = known & self._differ(np.minimum(before, values), np.maximum(before, values))
        if changed.any():
            place = int(np.argmax(changed))
            raise ReferenceCacheError(
                f"{_name_of(batch, place)} has a reference log-probability of {values[place]:.6g}; "
                f"{self.folder} holds {before[place]:.6g}. Something changed that the cache does "
                f"not know of, or is random. Remove the cache: {clear_command(self.folder)}"
            )
        for place in np.flatnonzero(~known).tolist():
            self._waiting[keys[place : place + 1].tobytes()] = float(values[place])
        late = time.monotonic() - self._written_at >= self.seconds_per_shard
        if late or len(self._waiting) >= self.responses_per_shard:
            self.flush()

    def _differ(self, low: Values, high: Values) -> NDArray[np.bool_]:
        """Return which pairs of values of one response differ by more than rounding."""
        scale = np.maximum(1.0, np.maximum(np.abs(low), np.abs(high)))
        return high - low > self._tolerance * scale

    def flush(self) -> None:
        """Write the values that are not on disk yet as a shard."""
        if self._waiting:
            # Sorted, so that merging is a single pass.
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
        """Flush, then read the shards that others have written since.

        Raises:
            ReferenceCacheError: naming a file that is damaged or belongs to another cache, or the
                folder if two shards contradict each other.
        """
        self.flush()
        paths = sorted(p for p in self.folder.glob(SHARDS) if p.name not in self._read)
        self._merge([_read_shard(path, self._digest) for path in paths])
        self._read.update(path.name for path in paths)

    def _merge(self, pieces: list[tuple[Keys, Values]]) -> None:
        """Take in the content of shards; a response that was computed twice gets its lower value.

        So all processes use the same value, in whatever order they read the shards.
        """
        if not pieces:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in pieces)])
        values = np.concatenate([self._values, *(values for _, values in pieces)])
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
        if len(starts) < len(keys):
            low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
            changed = self._differ(low, high)
            if changed.any():
                place = int(np.argmax(changed))
                raise ReferenceCacheError(
                    f"{self.folder}: two shards give one response different values, "
                    f"{low[place]:.6g} and {high[place]:.6g}. Something changed that the cache "
                    "does not know of, or is random. Remove the cache: "
                    f"{clear_command(self.folder)}"
                )
            keys, values = keys[starts], low
        self._keys, self._values = keys, values


def _name_of(batch: GroupBatch, place: int) -> str:
    """Return the row and number, for messages, of a response counted through the whole batch."""
    names = [
        f"{source}: response {response} (from 0)"
        for source, indices in zip(batch.sources, batch.indices, strict=True)
        for response in indices
    ]
    return names[place]
