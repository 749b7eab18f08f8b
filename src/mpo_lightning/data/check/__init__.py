"""Check of a data set: what is in it, and what to mind before training on it."""

from mpo_lightning.data.check.run import check

__all__ = ["check"]
