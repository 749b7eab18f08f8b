"""Where the package keeps what it has computed once."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(kind: str) -> Path:
    """The folder of the caches of one kind ("reference", "tokens") where none is named.

    ``MPO_LIGHTNING_CACHE`` says where it is; it lies in the user's cache folder otherwise.
    """
    own = os.environ.get("MPO_LIGHTNING_CACHE")
    if own:
        return Path(own) / kind
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "mpo-lightning" / kind
