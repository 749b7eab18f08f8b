"""Tasks of the studies of a real model: answers to prompts, and fits on groups.

Each is a frozen dataclass that names all it depends on; the studies' `Runner` keeps its result.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import fmean
from typing import Any, Final, Literal, Protocol

import torch
from lightning.pytorch import Trainer, seed_everything
from peft.tuners.lora import LoraLayer

from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.data.prompts import request
from mpo_lightning.files import whole_folder
from mpo_lightning.generation.generate import ModelSampler, Sampling
from mpo_lightning.generation.model import (
    ModelConfig,
    choose_device,
    files_digest,
    load_group_tokenizer,
    put_adapter,
)
from mpo_lightning.losses import SetLoss
from mpo_lightning.losses.pairs import PairLoss
from mpo_lightning.model.loading import LoRA, PolicyConfig, build_policy, load_base
from mpo_lightning.optim import WarmupCosine
from mpo_lightning.quiet import quiet
from mpo_lightning.showcase.constraints import score
from mpo_lightning.showcase.prompts import prompts
from mpo_lightning.studies.lab.results import StudyError
from mpo_lightning.studies.lab.runner import result_of
from mpo_lightning.studies.lab.training import WITHOUT_OUTPUT
from mpo_lightning.training.module import MPOModule

__all__ = [
    "TRAIN",
    "Base",
    "Fit",
    "Groups",
    "Prediction",
    "Sampled",
    "fit_table",
    "logps",
    "picked",
    "seen_by",
    "trained_model",
]

Row = dict[str, Any]

TRAIN: Final = 256
"""Number of training prompts that the study of verifiable scores divides."""
TEMPERATURE: Final = 0.8
OF_RESPONSES: Final = ("responses", "scores", "truncated", "models")
RESPONSES_PER_BATCH: Final = 192
# Longer groups are left out.
MAX_LENGTH: Final = 1024


@dataclass(frozen=True)
class Base:
    """The model that a study begins with.

    Attributes:
        digest: digest of its files, which stands for it in the names of results.
        dtype: dtype of its weights in training and sampling; adapters are merged in float32.
        folder: its folder.
    """

    digest: str
    dtype: Literal["float32", "bfloat16"]
    folder: str = field(repr=False)

    @classmethod
    def of(cls, folder: Path, dtype: Literal["float32", "bfloat16"] = "float32") -> "Base":
        """Return the model of a folder.

        Raises:
            StudyError: if there is no such folder.
        """
        digest = files_digest(str(folder)) if folder.is_dir() else None
        if digest is None:
            raise StudyError(
                f"--base: {folder} is no folder. "
                f"Make it: python -m mpo_lightning.showcase model --out {folder}"
            )
        return cls(digest, dtype, str(folder))


class Groups(Protocol):
    """A task, or a part of a file, that gives rows of scored groups."""

    def rows(self, worlds: Path) -> list[Row]:
        """Return rows with ``prompt``, ``responses`` and ``scores``."""


@dataclass(frozen=True)
class Prediction:
    """A response's prediction by a fit.

    Attributes:
        row: number of its group among the judged rows, from 0.
        response: its number in the row, from 0.
        tokens: number of its tokens.
        reference_logp: log-probability under the reference.
        log_ratio: that of the policy minus that of the reference.
    """

    row: int
    response: int
    tokens: int
    reference_logp: float
    log_ratio: float


def picked(row: Mapping[str, Any], numbers: Sequence[int]) -> Row:
    """Return a row with some of its responses, in the order of their numbers."""
    of = {name: [row[name][n] for n in numbers] for name in OF_RESPONSES if name in row}
    return {**row, **of}


def seen_by(loss: SetLoss, rows: Sequence[Row]) -> Iterator[Row]:
    """Yield rows without the responses that a loss on one pair of each group never looks at.

    The loss and its gradient stay as they are, for fewer tokens.
    """
    one_pair = isinstance(loss, PairLoss) and loss.pairs in ("best-worst", "random")
    for row in rows:
        numbers = list(range(len(row["scores"])))
        if isinstance(loss, PairLoss) and one_pair:
            scores = torch.tensor([row["scores"]], dtype=torch.float64)
            (drawn,) = loss.drawn(scores, torch.ones_like(scores, dtype=torch.bool))
            # A group without a pair stays whole, is left out by the data module, and counted.
            numbers = (drawn.any(0) | drawn.any(1)).nonzero()[:, 0].tolist() or numbers
        yield picked(row, numbers)


# -------------------------------------------------------------------------------------- fitting


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The task of fitting an adapter, with the settings of `make showcase` where none is named.

    Args:
        base: the first model.
        groups: groups to train on, one after the other.
        loss: the loss.
        lr: highest learning rate of AdamW, after a warm-up and before half a cosine.
        seed: seed of the adapter and of the order.
        steps: optimizer steps, whatever the number of groups.
        groups_per_step: groups of a step.
        prompts: number of groups, the first ones. Defaults to all.
        responses: number of responses of a group, the first ones. Defaults to all.
        judged: groups to predict for after training.
        after: an earlier fit, merged into the base: this one starts there, and stays close to it.
    """

    base: Base
    groups: tuple[Groups, ...]
    loss: SetLoss
    lr: float
    seed: int
    steps: int
    groups_per_step: int
    prompts: int | None = None
    responses: int | None = None
    judged: Groups | None = None
    after: "Fit | None" = None

    def __call__(self, worlds: Path) -> dict[str, Any]:
        """Fit; leave the adapter; return number of groups, seconds and predictions."""
        rows = [row for groups in self.groups for row in groups.rows(worlds)][: self.prompts]
        given = [picked(row, range(len(row["scores"]))[: self.responses]) for row in rows]
        start: Any = self.base.folder
        if self.after is not None:
            start = trained_model(self.base, self.after, worlds)
        with tempfile.TemporaryDirectory() as folder, quiet():
            seed_everything(self.seed, verbose=False)
            module = MPOModule(
                policy=PolicyConfig(
                    base=start, dtype=self.base.dtype, lora=LoRA(r=16, lora_alpha=32)
                ),
                loss=self.loss,
                optimizer=lambda parameters: torch.optim.AdamW(
                    parameters, lr=self.lr, weight_decay=0.0
                ),
                lr_scheduler=WarmupCosine(warmup=0.1),
                reference="cached",
                reference_cache=str(worlds / "reference"),
            )
            data = PreferenceDataModule(
                tokenizer=self.base.folder,
                train=list(seen_by(self.loss, given)),
                predict=None if self.judged is None else self.judged.rows(worlds),
                loss=self.loss,
                groups_per_batch=1,
                max_length=MAX_LENGTH,
                seed=self.seed,
                cache=f"{folder}/tokens",
            )
            trainer = Trainer(
                accelerator="auto",
                devices=1,
                max_epochs=-1,
                max_steps=self.steps,
                accumulate_grad_batches=self.groups_per_step,
                gradient_clip_val=1.0,
                default_root_dir=folder,
                **WITHOUT_OUTPUT,
            )
            started = time.perf_counter()
            trainer.fit(module, datamodule=data)
            seconds = time.perf_counter() - started
            predicted = trainer.predict(module, datamodule=data) if self.judged else []
            assert module.policy is not None
            with whole_folder(self._place(worlds)) as place:
                module.policy.save_adapter(place)
        return {
            "groups": len(data.datasets["train"]),
            "without_contrast": len(given) - len(data.datasets["train"]),
            "seconds": seconds,
            "predictions": [_as_prediction(row) for batch in predicted or [] for row in batch],
        }

    def predictions(self, worlds: Path) -> list[Prediction]:
        """Return the predictions for the judged groups."""
        return [Prediction(*values) for values in result_of(self, worlds)["predictions"]]

    def adapter(self, worlds: Path) -> Path:
        """Return the adapter's folder; it is fitted again if somebody has removed it."""
        result_of(self, worlds)
        place = self._place(worlds)
        if not place.is_dir():
            self(worlds)
        return place

    def _place(self, worlds: Path) -> Path:
        return worlds / f"adapter-{sha256(repr(self).encode()).hexdigest()[:24]}"


def fit_table(fits: Mapping[tuple[str, int], Fit], worlds: Path) -> list[Row]:
    """Return a row of numbers of groups and seconds for each fit, by its condition and seed."""
    rows = []
    for (condition, seed), fit in fits.items():
        numbers = {k: v for k, v in result_of(fit, worlds).items() if k != "predictions"}
        rows.append({"condition": condition, "seed": seed, "lr": fit.lr, **numbers})
    return rows


def _as_prediction(row: Any) -> list[float]:
    # Rows in memory are numbered from 1.
    others = (row[name] for name in ("response", "tokens", "reference_logp", "log_ratio"))
    return [row["row"] - 1, *others]


def trained_model(base: Base, fit: Fit | None, worlds: Path, scale: float = 1.0) -> Any:
    """Load the base with the adapters of a fit, and of those before it, merged.

    Args:
        base: the base.
        fit: the fit; None for the base itself.
        worlds: folder that the tasks share.
        scale: factor of the last adapter's update.
    """
    return _merged(base, fit, worlds, scale).to(getattr(torch, base.dtype)).eval()


def _merged(base: Base, fit: Fit | None, worlds: Path, scale: float = 1.0) -> Any:
    if fit is None:
        device = choose_device("auto")
        return load_base(PolicyConfig(base=base.folder, dtype="float32"), device).to(device)
    adapted = put_adapter(_merged(base, fit.after, worlds), str(fit.adapter(worlds)))
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(scale)
    return adapted.merge_and_unload()


# ------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The task of sampling and scoring answers to prompts of the show case.

    Args:
        base: the first model.
        split: split of the prompts.
        prompts: number of prompts.
        first: number of the first one in its split, from 0.
        n: answers to each.
        new_tokens: limit on an answer's tokens.
        seed: seed of the answers.
        fit: the fit whose model answers. Defaults to none, the base.
        scale: factor of its update.
        measured: number of prompts whose first two answers' log-ratio to the base is measured.
    """

    base: Base
    split: str
    prompts: int
    n: int
    new_tokens: int
    seed: int
    first: int = 0
    fit: Fit | None = None
    scale: float = 1.0
    measured: int = 0

    def __call__(self, worlds: Path) -> dict[str, Any]:
        """Return the scored rows, the mean log-ratio of the measured answers, and seconds."""
        started = time.perf_counter()
        with quiet():
            model = trained_model(self.base, self.fit, worlds, self.scale)
            sampler = ModelSampler(
                model,
                load_group_tokenizer(ModelConfig(base=self.base.folder)),
                Sampling(
                    n=self.n,
                    temperature=TEMPERATURE,
                    max_new_tokens=self.new_tokens,
                    seed=self.seed,
                ),
                responses_per_batch=RESPONSES_PER_BATCH,
            )
            asked = prompts(0, train=TRAIN)[self.split][self.first :][: self.prompts]
            answers = sampler([request(row["prompt"]) for row in asked])
            rows = []
            for row, answer in zip(asked, answers, strict=True):
                texts = [drawn.text for drawn in answer.samples]
                cut = [drawn.finish == "length" for drawn in answer.samples]
                scores = score(row["prompt"], texts)
                rows.append({**row, "responses": texts, "truncated": cut, "scores": scores})
            divergence = self._divergence(model, rows) if self.measured else None
        seconds = time.perf_counter() - started
        return {"rows": rows, "divergence": divergence, "seconds": seconds}

    def rows(self, worlds: Path) -> list[Row]:
        """Return the rows to train on: answers that say nothing are left out."""
        rows = (_with_text(row) for row in result_of(self, worlds)["rows"])
        return [row for row in rows if len(row["responses"]) > 1]

    def _divergence(self, model: Any, rows: Sequence[Row]) -> float:
        """Return the mean log-ratio of the measured answers; it leaves adapters on the model."""
        spoken = [_with_text(row) for row in rows[: self.measured]]
        asked = [picked(row, (0, 1)) for row in spoken if len(row["responses"]) > 1]
        other = trained_model(self.base, None, Path())
        with tempfile.TemporaryDirectory() as cache:
            own, of_base = (logps(each, self.base, asked, cache) for each in (model, other))
        return fmean(a - b for a, b in zip(own, of_base, strict=True))


def _with_text(row: Row) -> Row:
    return picked(row, [n for n, text in enumerate(row["responses"]) if text.strip()])


def logps(model: Any, base: Base, rows: Sequence[Row], cache: str) -> list[float]:
    """Return the log-probability of each response under a model without adapters."""
    policy = build_policy(PolicyConfig(base=model), "auto", device=model.device)
    data = PreferenceDataModule(
        tokenizer=base.folder,
        predict=list(rows),
        predict_as="groups",
        max_length=MAX_LENGTH,
        cache=cache,
    )
    data.setup("predict")
    batches = (batch.to(model.device) for batch in data.predict_dataloader())
    return [value for b in batches for value in policy.reference(b)[b.valid].tolist()]
