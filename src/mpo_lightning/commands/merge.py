"""``mpo-lightning merge``: an adapter and its base become one model."""

from mpo_lightning.commands.functions import call
from mpo_lightning.rollouts.merging import merge

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Run ``mpo-lightning merge``.

    Args:
        args: the arguments, the command's name first.
    """
    call(merge, args, "Merge an adapter into its base.")
