"""``mpo-lightning score``: scores of responses."""

from mpo_lightning.commands.functions import call
from mpo_lightning.rollouts.score import score

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Run ``mpo-lightning score``.

    Args:
        args: the arguments, the command's name first.
    """
    call(score, args, "Score responses; the output is for fit.")
