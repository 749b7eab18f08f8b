"""The command line: ``mpo-lightning fit|validate|test|predict --config FILE``.

``mpo-lightning cache show|clear`` looks after the reference caches.
"""

import sys
from pathlib import Path
from typing import Any

import torch.distributed
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpo_lightning.checkpoint import CheckpointError, RunCheckpoint
from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.data.groups import DataError
from mpo_lightning.faults import NonFiniteError, is_out_of_memory
from mpo_lightning.module import MPOModule
from mpo_lightning.policy import PolicyError
from mpo_lightning.predictions import PredictionWriter
from mpo_lightning.reference import ReferenceCacheError, clear, default_root, inspect
from mpo_lightning.resume import ResumeError

__all__ = ["MPOCLI", "main"]

# What a user can mend: told in a sentence, not in a stack trace.
USER_ERRORS = (
    *(DataError, PolicyError, ReferenceCacheError, ResumeError),
    *(CheckpointError, NonFiniteError, FileExistsError),
)


def _checkpoint_folder(root: str | None) -> str:
    return f"{root or '.'}/checkpoints"


class MPOCLI(LightningCLI):
    """LightningCLI with a checkpoint to resume from and a place for predictions."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``checkpoint`` and ``predictions``."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        # `--ckpt_path last` finds what a fixed folder holds, whatever version the logger is at.
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", _checkpoint_folder)
        parser.set_defaults({"checkpoint.save_last": True})
        parser.add_lightning_class_args(PredictionWriter, "predictions")

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a value that one of them refuses is a usage error."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            self.parser.error(str(error))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("enable_checkpointing") is False:
            # Lightning refuses a checkpoint callback then, and ours is always among the arguments.
            callbacks = [c for c in callbacks if not isinstance(c, RunCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def before_instantiate_classes(self) -> None:
        """Take the tokenizer from the base where none is named."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        assert isinstance(config, Namespace)
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.policy.base


def _show_caches(root: str) -> None:
    titles = ("name", "responses", "shards", "size", "dtype", "model", "state")
    rows = [
        (
            cache.folder.name,
            "-" if cache.responses is None else f"{cache.responses:,}",
            f"{cache.shards:,}",
            f"{cache.bytes / 2**20:,.1f} MiB",
            cache.identity.get("dtype", "-"),
            cache.identity.get("model", "-"),
            cache.problem or "ok",
        )
        for cache in inspect(root)
    ]
    if not rows:
        print(f"No reference cache in {root}")
        return
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        print("  ".join(cell.ljust(n) for cell, n in zip(row, widths, strict=True)).rstrip())
    if any(row[-1] != "ok" for row in rows):
        sys.exit(1)


def _cache(args: list[str]) -> None:
    """``mpo-lightning cache show|clear [ROOT]``."""
    parsers = {}
    for name, purpose in {
        "show": "List the reference caches, and say what is wrong with one that is refused.",
        "clear": "Remove the reference caches.",
    }.items():
        parsers[name] = ArgumentParser(description=purpose)
        parsers[name].add_argument(
            "root", nargs="?", type=str, default=str(default_root()), help="the caches' folder"
        )
    parsers["clear"].add_argument("--name", type=str, help="remove only the cache of this name")
    parser = ArgumentParser(prog="mpo-lightning cache")
    commands = parser.add_subcommands(dest="action")
    for name, subparser in parsers.items():
        commands.add_subcommand(name, subparser, help=subparser.description)
    chosen = parser.parse_args(args)
    if chosen.action == "show":
        _show_caches(chosen.show.root)
        return
    removed = clear(chosen.clear.root, chosen.clear.name)
    for folder in removed:
        print(f"Removed {folder}")
    if not removed:
        print(f"No reference cache in {chosen.clear.root}")


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: arguments, those of the process if none.
    """
    # A class_path may name a file of the user's, beside the configuration; an installed command
    # does not look there by itself.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    given = sys.argv[1:] if args is None else args
    try:
        if isinstance(given, list) and given[:1] == ["cache"]:
            _cache(given[1:])
            return
        MPOCLI(
            MPOModule,
            PreferenceDataModule,
            seed_everything_default=0,
            # Long training lets one response of each chosen set take all the mass.
            trainer_defaults={"max_epochs": 1},
            auto_configure_optimizers=False,
            # A repeated or resumed run, and validate after fit, write their configuration again.
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"epilog": "mpo-lightning cache --help: caches of the reference"},
            args=args,
        )
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit("\n".join([f"error: {error}", *getattr(error, "__notes__", [])]))
    except SIGTERMException:
        _part()
        raise
    _part()


def _part() -> None:
    """Part from the other processes, all of which have come to their end.

    Lightning leaves gloo's threads running; a process that ends with them may abort.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
