"""``mpo-lightning score``: scores of responses."""

from jsonargparse import ArgumentParser

from mpo_lightning.rollouts.scoring import score

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Run ``mpo-lightning score``.

    Args:
        args: the arguments, the command's name first.
    """
    parser = ArgumentParser(
        prog="mpo-lightning score", description="Score responses; the output is for fit."
    )
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    parser.add_function_arguments(score)
    chosen = parser.instantiate_classes(parser.parse_args(args[1:]))
    del chosen["config"]
    score(**chosen)
