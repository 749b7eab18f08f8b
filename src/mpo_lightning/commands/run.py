"""``mpo-lightning fit|validate|test|predict --config FILE``: Lightning's own command line."""

import sys
from typing import Any

import torch.distributed
from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpo_lightning.commands.parser import SettingsParser, check_environment
from mpo_lightning.commands.run_callbacks import add_watching, name_missing_library, watched
from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.errors import UserError
from mpo_lightning.evaluation.writer import PredictionWriter
from mpo_lightning.training.checkpoint import RunCheckpoint
from mpo_lightning.training.loggers import RunConfig
from mpo_lightning.training.module import MPOModule

__all__ = ["MPOCLI", "main"]


def _checkpoint_folder(root: str | None) -> str:
    return f"{root or '.'}/checkpoints"


class RunParser(SettingsParser, LightningArgumentParser):
    """LightningCLI's parser, with errors of one line; its own help is the one with everything."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--help_all", action="help", help="Show every option and exit.")


class MPOCLI(LightningCLI):
    """LightningCLI with a checkpoint to resume from, watching, and a place for predictions."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``checkpoint``, ``predictions``, and what watches a run."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        # `--ckpt_path last` finds what a fixed folder holds, whatever version the logger is at.
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", _checkpoint_folder)
        parser.set_defaults({"checkpoint.save_last": True})
        # The loss decides which groups teach it something.
        parser.link_arguments("model.loss", "data.loss", apply_on="instantiate")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        add_watching(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read the environment, files and options, and refuse what none of them may set."""
        for each in self._subcommand_parsers.values():
            check_environment(each)
        super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a value that one of them refuses is a usage error."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            name_missing_library(error)
            self.parser.error(str(error))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("enable_checkpointing") is False:
            # Lightning refuses a checkpoint callback then, and ours is always among the arguments.
            callbacks = [c for c in callbacks if not isinstance(c, RunCheckpoint)]
        return super()._instantiate_trainer(
            config, watched(config, callbacks, fitting=self.subcommand == "fit")
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without its own table of results: `EvaluationReport` has a better one."""
        skipped = LightningCLI.subcommands()
        return {**skipped, **{name: skipped[name] | {"verbose"} for name in ("validate", "test")}}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "verbose": False} if subcommand in {"validate", "test"} else kwargs

    def before_instantiate_classes(self) -> None:
        """Take the tokenizer from the base where none is named."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        assert isinstance(config, Namespace)
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.policy.base


def main(args: list[str]) -> None:
    """Run Lightning's command line.

    Args:
        args: the arguments, the command's name first.
    """
    try:
        MPOCLI(
            MPOModule,
            PreferenceDataModule,
            seed_everything_default=0,
            # Long training lets one response of each chosen set take all the mass. Lightning's
            # summary counts 4-bit weights wrongly; the policy tells what its weights take.
            trainer_defaults={"max_epochs": 1, "enable_model_summary": False},
            auto_configure_optimizers=False,
            parser_class=RunParser,
            parser_kwargs={
                "prog": "mpo-lightning",
                "default_env": True,
                "env_prefix": "MPO_LIGHTNING",
            },
            save_config_callback=RunConfig,
            # A repeated or resumed run, and validate after fit, write their configuration again.
            save_config_kwargs={"overwrite": True},
            # LightningCLI takes those of the process by itself, and warns of others beside them.
            args=None if args == sys.argv[1:] else args,
        )
    except SIGTERMException:
        _part()
        raise
    except FileExistsError as error:
        raise UserError(str(error)) from error
    _part()


def _part() -> None:
    """Part from the other processes, all of which have come to their end.

    Lightning leaves gloo's threads running; a process that ends with them may abort.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
