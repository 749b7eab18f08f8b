"""``mpo-lightning sample``: responses to prompts."""

from jsonargparse import ArgumentParser

from mpo_lightning.rollouts.sampling import sample

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Run ``mpo-lightning sample``.

    Args:
        args: the arguments, the command's name first.
    """
    parser = ArgumentParser(
        prog="mpo-lightning sample", description="Sample n responses to each prompt."
    )
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    parser.add_function_arguments(sample)
    chosen = parser.instantiate_classes(parser.parse_args(args[1:]))
    del chosen["config"]
    sample(**chosen)
