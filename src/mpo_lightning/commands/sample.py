"""``mpo-lightning sample``: responses to prompts."""

from mpo_lightning.commands.functions import call
from mpo_lightning.rollouts.sample import sample

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Run ``mpo-lightning sample``.

    Args:
        args: the arguments, the command's name first.
    """
    call(sample, args, "Sample n responses to each prompt.")
