"""``mpo-lightning compare``: which of two models' answers score higher, and how often."""

from mpo_lightning.commands.functions import call
from mpo_lightning.evaluation.compare import compare

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Run ``mpo-lightning compare``.

    Args:
        args: the arguments, the command's name first.
    """
    call(compare, args, "Score two models' answers: win rates, also at equal length.")
