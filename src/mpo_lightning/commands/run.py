"""``mpo-lightning fit|validate|test|predict --config FILE``: Lightning's command line."""

import os
import sys
from typing import Any

import torch.distributed
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpo_lightning.commands.parser import SettingsParser, check_environment
from mpo_lightning.commands.run_callbacks import (
    add_callback_settings,
    name_missing_library,
    run_callbacks,
)
from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.errors import UserError
from mpo_lightning.evaluation.writer import PredictionWriter
from mpo_lightning.training.checkpoint import RunCheckpoint
from mpo_lightning.training.loggers import RunConfig
from mpo_lightning.training.module import MPOModule

__all__ = ["MPOCLI", "main"]


def _checkpoint_folder(root: str | None) -> str:
    return f"{root or '.'}/checkpoints"


def _from_home(value: Any) -> Any:
    """Put the home folder in the place of ``~`` in all paths of some settings."""
    if isinstance(value, str):
        return os.path.expanduser(value) if value.startswith("~") else value
    if isinstance(value, list):
        return [_from_home(each) for each in value]
    if isinstance(value, Namespace):
        for name, each in vars(value).items():
            value[name] = _from_home(each)
    return value


class RunParser(SettingsParser, LightningArgumentParser):
    """LightningCLI's parser with one-line errors, whose own help is ``--help_all``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_argument("--help_all", action="help", help="show every option and exit")


class MPOCLI(LightningCLI):
    """LightningCLI with this package's checkpoints, predictions, progress bar and health checks."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``checkpoint``, ``predictions``, ``progress``, ``samples`` and ``health``."""
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        # `--ckpt_path last` needs a folder that does not change with the logger's version.
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", _checkpoint_folder)
        parser.set_defaults({"checkpoint.save_last": True})
        # The loss decides which groups teach it something.
        parser.link_arguments("model.loss", "data.loss", apply_on="instantiate")
        parser.add_lightning_class_args(PredictionWriter, "predictions")
        add_callback_settings(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read the environment, files and options, and refuse variables that name no setting."""
        for each in self._subcommand_parsers.values():
            check_environment(each)
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint: unlike Lightning's, those here hold none."""

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a value that one of them refuses is a usage error."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            name_missing_library(error)
            self.parser.error(str(error), error)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config.get("enable_checkpointing") is False:
            # Lightning refuses a checkpoint callback then, and ours is always among the callbacks.
            callbacks = [c for c in callbacks if not isinstance(c, RunCheckpoint)]
        return super()._instantiate_trainer(
            config, run_callbacks(config, callbacks, fitting=self.subcommand == "fit")
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands, without the option for its table of results.

        `EvaluationReport` prints a better one.
        """
        skipped = LightningCLI.subcommands()
        return {**skipped, **{name: skipped[name] | {"verbose"} for name in ("validate", "test")}}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "verbose": False} if subcommand in {"validate", "test"} else kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command.

        Raises:
            UserError: if nothing was left to do.
        """
        super()._run_subcommand(subcommand)
        trainer: Any = self.trainer
        done = {
            "fit": lambda: trainer.global_step,
            "validate": lambda: sum(trainer.num_val_batches),
            "test": lambda: sum(trainer.num_test_batches),
            "predict": lambda: sum(trainer.num_predict_batches),
        }
        if trainer.state.finished and not done[subcommand]():
            raise UserError(
                f"{subcommand} has done nothing: the trainer's limits (max_steps, max_epochs, "
                "limit_train_batches and others) leave no batch. Raise them."
            )

    def before_instantiate_classes(self) -> None:
        """Take the tokenizer from the base unless one is set."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        assert isinstance(config, Namespace)
        if config.data.tokenizer is None:
            config.data.tokenizer = config.model.policy.base
        # Our classes do so themselves, Lightning's loggers and checkpoint paths do not.
        for name in ("trainer", "ckpt_path"):
            config[name] = _from_home(config.get(name))


def main(args: list[str]) -> None:
    """Run Lightning's command line.

    Args:
        args: arguments, beginning with the command's name.
    """
    try:
        MPOCLI(
            MPOModule,
            PreferenceDataModule,
            seed_everything_default=0,
            # In long training one response of each chosen set takes all the mass. Lightning's
            # summary counts 4-bit weights wrongly; the policy logs the size of its weights.
            trainer_defaults={"max_epochs": 1, "enable_model_summary": False},
            auto_configure_optimizers=False,
            parser_class=RunParser,
            parser_kwargs={
                "prog": "mpo-lightning",
                "default_env": True,
                "env_prefix": "MPO_LIGHTNING",
            },
            save_config_callback=RunConfig,
            # Repeated and resumed runs, and validate after fit, write their configuration again.
            save_config_kwargs={"overwrite": True},
            # LightningCLI takes those of the process by itself, and warns if it is passed others.
            args=None if args == sys.argv[1:] else args,
        )
    except SIGTERMException:
        _leave_process_group()
        raise
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split())) from error
    _leave_process_group()


def _leave_process_group() -> None:
    """Leave the process group; all processes have finished.

    Lightning leaves gloo's threads running, with which a process may abort at exit.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
