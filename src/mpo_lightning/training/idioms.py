"""Lightning's idioms that need an answer of this package; docs/lightning.md lists them all."""

import re
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelPruning, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import default_collate

from mpo_lightning.batch import GroupBatch, PromptBatch, TokenGroup
from mpo_lightning.errors import UserError
from mpo_lightning.training.metrics import METRICS

__all__ = ["check_loaders", "check_monitors", "group_batch", "refuse_unsupported", "restored"]

COPIED_EMPTY = "it looks at the module before its model is loaded, and would change nothing"
REFUSED: dict[type, str] = {
    StochasticWeightAveraging: f"{COPIED_EMPTY}. Use WeightAveraging or EMAWeightAveraging",
    ModelPruning: f"{COPIED_EMPTY}. Choose a smaller model.policy.lora.r",
    BaseFinetuning: "the base is frozen for the whole run, and its adapter alone is trained",
}
OTHER_METRICS = {"lr", "train/skipped_steps", "system/tokens_per_second", "system/memory_gib"}
# Logged by the callback Samples and Lightning's LearningRateMonitor.
OTHER_PREFIXES = ("samples/", "lr-")
STAGES = ("train", "val")
NO_BATCH = (
    "A step takes a GroupBatch, or groups of token ids: TokenGroup(prompt, responses, scores, "
    "source), or mappings with prompt, responses and scores. Rows of text are tokenised by "
    "PreferenceDataModule(tokenizer=..., train=rows), in the place of the loader; a DataLoader of "
    "groups takes collate_fn=list, and one of batches batch_size=None."
)


def refuse_unsupported(trainer: Trainer, module: LightningModule) -> None:
    """Refuse what would train nothing or something else, before anything is loaded.

    Raises:
        UserError: naming it, and what to do instead.
    """
    fitting = trainer.state.fn == TrainerFn.FITTING
    if module._compiler_ctx is not None:
        raise UserError(
            "torch.compile(module) compiles Lightning's hooks again for each batch. Compile the "
            "decoder's layers, once: model.policy.compile: true."
        )
    if isinstance(trainer.strategy, DeepSpeedStrategy):
        raise UserError(
            "trainer.strategy: deepspeed is not supported. mpo_lightning.strategy.FSDP2 shards the "
            "model, too."
        )
    if fitting and trainer.precision == "16-true":
        raise UserError(
            "trainer.precision: 16-true keeps the adapter in float16, where AdamW's steps become "
            "NaN. Use 16-mixed or bf16-mixed, and model.policy.dtype: float16 or bfloat16 to save "
            "memory: the adapter stays in float32."
        )
    if (
        fitting
        and trainer.precision == "bf16-true"
        and not isinstance(trainer.strategy, FSDPStrategy)
    ):
        rank_zero_warn(
            "trainer.precision: bf16-true keeps the adapter in bfloat16, too, where changes below "
            "1/256 of a weight are lost. bf16-mixed with model.policy.dtype: bfloat16 takes the "
            "same memory for the base, and keeps the adapter in float32."
        )
    own_step = type(module).training_step.__module__.startswith("mpo_lightning.")
    if fitting and own_step and not module.automatic_optimization:
        raise UserError(
            "automatic_optimization is false, but training_step leaves the optimizer to Lightning, "
            "so that nothing would be trained. Leave it true, or write a training_step."
        )
    for callback in getattr(trainer, "callbacks", []):
        for kind, why in REFUSED.items():
            if fitting and isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__} is not supported: {why}.")


# ------------------------------------------------------------------------------------ monitors


def check_monitors(trainer: Trainer, module: LightningModule, *, validates: bool = True) -> None:
    """Check the metrics that callbacks and schedulers watch, and the direction in which they do.

    Args:
        trainer: the run's trainer.
        module: the module.
        validates: whether the run has validation data.

    Raises:
        UserError: naming the metric's real name, or the real names.
    """
    watching = [(each, each) for each in getattr(trainer, "callbacks", [])]
    watching += [(each.scheduler, each) for each in trainer.lr_scheduler_configs]
    # A class of the user's own may log metrics of its own.
    classes = [type(each) for each in (module, *getattr(trainer, "callbacks", []))]
    others = any(
        each.__module__.split(".")[0] not in {"lightning", "mpo_lightning"} for each in classes
    )
    for watcher, settings in watching:
        name = getattr(settings, "monitor", None)
        if isinstance(name, str):
            mode = getattr(watcher, "mode", None)
            _check_monitor(type(watcher).__name__, name, mode, validates, others)


def _check_monitor(
    watcher: str, name: str, mode: str | None, validates: bool, others: bool
) -> None:
    stage, _, metric = name.partition("/")
    info = METRICS.get(metric) if stage in STAGES else None
    if info is None:
        of_stages = [f"{stage}/{metric}" for stage in STAGES for metric in (*METRICS, "groups")]
        if name in {*of_stages, *OTHER_METRICS} or name.startswith(OTHER_PREFIXES):
            return
        meant = [each for each in of_stages if _letters(each) == _letters(name)]
        if others and not meant:
            return
        of_stage = [n for n in of_stages if _letters(name).startswith(n.partition("/")[0])]
        problem = f"{watcher} watches {name}, which is not a metric here. " + (
            f"It is called {meant[0]}."
            if meant
            else f"Metrics: {', '.join(of_stage or of_stages)}."
        )
        if not others:
            raise UserError(problem)
        rank_zero_warn(f"{problem} Mind this unless a class of your own logs {name}.")
        return
    if stage == "val" and not validates:
        raise UserError(
            f"{watcher} watches {name}, but the run has no validation data: name them as data.val, "
            f"or watch train/{metric}."
        )
    better = {True: "max", False: "min", None: mode}[info.higher_is_better]
    if mode in {"min", "max"} and mode != better:
        raise UserError(
            f"{watcher} watches {name} with mode {mode}, but it is better "
            f"{'higher' if better == 'max' else 'lower'}: set mode to {better}."
        )


def _letters(name: str) -> str:
    """Return a metric's name as it may be known from other libraries: without punctuation."""
    return re.sub(r"^(eval|validation|valid)", "val", re.sub(r"[^a-z0-9]", "", name.lower()))


# ------------------------------------------------------------------------------------- loaders


def check_loaders(loaders: Any) -> None:
    """Refuse loaders that would stack groups of different lengths as one tensor.

    Raises:
        UserError: saying which settings a loader takes.
    """
    for loader in CombinedLoader(loaders).flattened:
        if getattr(loader, "collate_fn", None) is default_collate:
            raise UserError(f"The DataLoader stacks the items of a batch as tensors. {NO_BATCH}")


def group_batch(found: Any) -> GroupBatch | PromptBatch:
    """Return what a loader gave as a batch.

    Raises:
        UserError: if it is neither a batch nor groups of token ids.
    """
    if isinstance(found, GroupBatch | PromptBatch):
        return found
    groups: Any = [found] if isinstance(found, TokenGroup | Mapping) else found
    if not isinstance(groups, list | tuple) or not groups:
        raise UserError(f"A loader gave {_kind(found)}. {NO_BATCH}")
    return GroupBatch.from_groups([_token_group(each, i) for i, each in enumerate(groups)])


def _token_group(found: Any, number: int) -> TokenGroup:
    if isinstance(found, Mapping) and {"prompt", "responses", "scores"} <= found.keys():
        found = TokenGroup(
            found["prompt"],
            found["responses"],
            found["scores"],
            found.get("source", f"batch:{number}"),
        )
    if not isinstance(found, TokenGroup):
        raise UserError(f"A loader gave {_kind(found)} as a group. {NO_BATCH}")
    try:
        scores = torch.as_tensor(found.scores)
        prompt, *responses = (_ids(each) for each in (found.prompt, *found.responses))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"A loader gave a group whose parts are no token ids. {NO_BATCH}"
        ) from error
    if scores.is_floating_point() and scores.dtype.itemsize < 4:
        raise UserError(
            f"Scores came as {scores.dtype}, in which they are rounded: the trainer's precision "
            "casts tensors of a loader. Give them as a list of numbers."
        )
    return found._replace(
        prompt=prompt, responses=tuple(responses), scores=tuple(scores.double().tolist())
    )


def _ids(found: Any) -> Tensor:
    ids = torch.as_tensor(found)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"found {ids.dtype} of shape {tuple(ids.shape)}")
    return ids


def _kind(found: Any) -> str:
    return f"a {type(found).__name__}"


# ------------------------------------------------------------------------------ hyperparameters


def restored(value: Any) -> Any:
    """Return a setting that `describe` wrote into a checkpoint; any other as it is.

    Nothing is imported for it but this package: a class of the user's own has to be imported
    before, as its instances were.

    Raises:
        UserError: if the class is not imported.
    """
    if not isinstance(value, Mapping) or value.keys() != {"class", "settings"}:
        return value
    path = str(value["class"])
    parts = path.split(".")
    homes = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
    home = next((name for name in homes if name in sys.modules), "")
    kind: Any = sys.modules.get(home)
    for name in path.removeprefix(f"{home}.").split("."):
        kind = getattr(kind, name, None)
    homes = [each.__module__ for each in getattr(kind, "__mro__", ())]
    if not (is_dataclass(kind) and any(name.startswith("mpo_lightning.") for name in homes)):
        raise UserError(
            f"The checkpoint's settings name {path}, which is no class of this package, nor one "
            "that is imported and derived from one. Import it first, or give the setting to "
            "load_from_checkpoint."
        )
    made: Any = kind
    return made(**{name: restored(each) for name, each in value["settings"].items()})
