"""Check of a data set: what is in it, and what to mind before training on it."""

from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.trusted import compare_with_trusted

__all__ = ["check", "compare_with_trusted"]
