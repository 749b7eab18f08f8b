"""``mpo-lightning merge``: an adapter and its base become one model."""

from jsonargparse import ArgumentParser

from mpo_lightning.rollouts.merging import merge

__all__ = ["main"]


def main(args: list[str]) -> None:
    """Run ``mpo-lightning merge``.

    Args:
        args: the arguments, the command's name first.
    """
    parser = ArgumentParser(
        prog="mpo-lightning merge", description="Merge an adapter into its base."
    )
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    parser.add_function_arguments(merge)
    chosen = parser.instantiate_classes(parser.parse_args(args[1:]))
    del chosen["config"]
    merge(**chosen)
