"""``mpo-lightning export [CHECKPOINT]``: a trained adapter, alone or merged into its base."""

from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.commands.parser import SettingsParser
from mpo_lightning.export.export import export

__all__ = ["main"]

FLAGS = {
    "merged": "write the whole model, merged in float32, instead of the adapter",
    "force": "overwrite another export",
    "trust_remote_code": "let a hub model run its own code",
}


def main(args: list[str]) -> None:
    """Run ``mpo-lightning export``.

    Args:
        args: arguments, beginning with the command's name.
    """
    parser = SettingsParser(prog="mpo-lightning export", description=COMMANDS["export"].purpose)
    parser.add_argument("--config", action="config", help="a YAML file of these settings")
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=str,
        default="last",
        help="a .ckpt file, an adapter folder, or last, the last checkpoint of the run",
    )
    parser.add_function_arguments(export, skip={"checkpoint", *FLAGS})
    for name, purpose in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=purpose)
    values = parser.parse_args(args[1:]).as_dict()
    del values["config"]
    export(**values)
