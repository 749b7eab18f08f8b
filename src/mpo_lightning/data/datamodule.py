"""PreferenceDataModule: files of scored groups to loaders of GroupBatch."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from mpo_lightning.batch import GroupBatch, PromptBatch
from mpo_lightning.data.dataset import GroupDataset, Groups
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prepare import prepare
from mpo_lightning.data.prompt_dataset import PromptDataset
from mpo_lightning.data.prompts import PromptSource, has_prompt_only
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.sampler import GroupSampler
from mpo_lightning.data.schemas.base import Schema
from mpo_lightning.data.score_scales import Keep, Normalization, Scale, normalize_scores
from mpo_lightning.data.show import show_groups
from mpo_lightning.data.sources import Rows, RowSource, open_rows, open_source, rename_columns
from mpo_lightning.data.tokens import (
    Boundary,
    GroupTokenizer,
    OverLong,
    PromptFormat,
    load_tokenizer,
    tokenizer_digest,
)
from mpo_lightning.errors import ResumeError, fields_below, require_same
from mpo_lightning.files import cache_folder, public_name
from mpo_lightning.losses import AboveMean, SetLoss
from mpo_lightning.losses.scores import differs

__all__ = ["PreferenceDataModule"]

Role = Literal["train", "val", "test", "predict"]
# Which files a Trainer function reads; it cannot do without the first.
ROLES_OF_STAGE: dict[str, tuple[Role, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}


ROLES_OF_RUN = ROLES_OF_STAGE["fit"]
# Settings that decide what is trained on, in which batches.
RECORDED = (
    "groups_per_batch",
    "tokens_per_batch",
    "max_length",
    "over_long",
    "prompt_format",
    "boundary",
    "max_responses",
    "keep_responses",
    "normalize_scores",
    "normalize_over",
    "no_contrast",
    "seed",
)
# Groups whose scores are looked at together.
AT_A_TIME = 4096


class PreferenceDataModule(LightningDataModule):
    """Scored groups from files, checked, tokenised and batched whole.

    A row has ``prompt`` (a text, or a list of ``{"role", "content"}`` messages), ``responses`` (a
    list of texts) and ``scores`` (one number each, higher is better), or the columns of a known
    public data set; see docs/data.md. A source is a ``.jsonl``, ``.json`` or ``.parquet`` file, a
    folder of such files or of ``datasets.save_to_disk``, or a hub id, with a split after a colon
    if wanted; in your own code also rows in memory, as a list or a ``datasets.Dataset``, which
    messages and predictions name by what they are for: ``train:17``. Token ids are computed once
    and kept on disk.

    Args:
        tokenizer: folder or hub id of the tokenizer; the command line takes the model's base where
            none is given.
        train: source, or sources, or rows, to train on.
        val: what to validate on.
        test: what to test on.
        predict: what to predict for: scored groups, or prompts alone, which are answered.
        predict_as: what predict does with rows. "groups" measures the responses that they hold,
            "prompts" answers their prompts anew and reads nothing else of them; "auto" is prompts
            where the first row has ``prompt`` (or ``instruction``) and no responses.
        schema: shape of the rows; found from their columns if none.
        columns: columns to read under another name: the name in the source, and the name to use.
        groups_per_batch: groups (prompts) of a step on one process, at most; 8 where neither this
            nor tokens_per_batch is given. Prompts alone are answered so many (or 8) at a time.
        tokens_per_batch: tokens of a step on one process, at most: each group's prompt once and its
            responses. Both limits hold where both are given. Training batches are made of groups of
            similar size then; a group beyond the limit is a batch of its own.
        max_length: limit on prompt + response, in tokens.
        over_long: what to do with a response beyond the limit. "drop_group", "drop_response" (the
            others are compared among themselves), "cut" or "error". A prompt that leaves no room
            drops its group, or is an error.
        max_responses: responses of a group that are kept at most; all if none.
        keep_responses: which. "first" as given, "balanced" as many above the group's mean score as
            not, "extremes" the highest and the lowest scored.
        normalize_scores: bring scores to one scale. "z-score" counts from the mean in standard
            deviations; "rank" is 0 for the lowest and 1 for the highest.
        normalize_over: each group by itself, or all groups of a source together.
        loss: the loss that is trained, which says what groups teach it something; the command line
            passes the module's. Without it, groups whose scores differ do.
        no_contrast: what to do with a group that teaches the loss nothing: all its scores are
            equal, or the loss's partition leaves one set empty; predict keeps it.
        prompt_format: "chat" renders with the chat template, "text" writes prompt and response one
            after the other, "auto" is chat where the tokenizer has a template.
        boundary: "strict" wants the prompt's tokens to begin the tokens of prompt + response,
            "separate" tokenises the two apart.
        show: groups to print at the start, as training sees them: the first of each source's.
        num_workers: processes that prepare batches.
        num_proc: processes that tokenize; all processors that are free to use if none.
        cache: folder where token ids are kept; one of the user's cache folder if none.
        seed: seed of the order of the training groups.
        trust_remote_code: let a hub tokenizer run its own code.
    """

    def __init__(
        self,
        *,
        tokenizer: str | None = None,
        train: str | list[str] | Rows | None = None,
        val: str | list[str] | Rows | None = None,
        test: str | list[str] | Rows | None = None,
        predict: str | list[str] | Rows | None = None,
        predict_as: Literal["auto", "groups", "prompts"] = "auto",
        schema: Schema | None = None,
        columns: dict[str, str] | None = None,
        groups_per_batch: int | None = None,
        tokens_per_batch: int | None = None,
        max_length: int = 2048,
        over_long: OverLong = "drop_group",
        prompt_format: PromptFormat = "auto",
        boundary: Boundary = "strict",
        max_responses: int | None = None,
        keep_responses: Keep = "first",
        normalize_scores: Normalization = "none",
        normalize_over: Scale = "group",
        loss: SetLoss | None = None,
        no_contrast: Literal["drop", "error"] = "drop",
        show: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("groups_per_batch", groups_per_batch, 1),
            ("tokens_per_batch", tokens_per_batch, 1),
            ("max_length", max_length, 1),
            ("max_responses", max_responses, 2),
            ("num_proc", num_proc, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}.")
        self.tokenizer_path = tokenizer
        self.sources: dict[Role, list[str | Rows]] = {
            "train": _sources(train),
            "val": _sources(val),
            "test": _sources(test),
            "predict": _sources(predict),
        }
        self.predict_as: Literal["auto", "groups", "prompts"] = predict_as
        if groups_per_batch is None and tokens_per_batch is None:
            groups_per_batch = 8
        self.groups_per_batch = groups_per_batch
        self.tokens_per_batch = tokens_per_batch
        self.max_length = max_length
        self.over_long: OverLong = over_long
        self.schema = schema
        self.columns = columns
        self.max_responses = max_responses
        self.keep_responses: Keep = keep_responses
        self.normalize_scores: Normalization = normalize_scores
        self.normalize_over: Scale = normalize_over
        self.loss = loss
        self.no_contrast: Literal["drop", "error"] = no_contrast
        self.show = show
        self.num_proc = num_proc
        self.cache = cache_folder("tokens") if cache is None else Path(cache)
        self.prompt_format: PromptFormat = prompt_format
        self.boundary: Boundary = boundary
        self.num_workers = num_workers
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self.tokenizer: Any = None
        self.datasets: dict[Role, GroupDataset] = {}
        # What predict answers, where its data are prompts alone.
        self.prompts: PromptDataset | None = None
        self.reports: list[DataReport] = []
        # What was read for a role, for the record of a run.
        self._read: dict[Role, list[dict[str, Any]]] = {}
        # Of a checkpoint that the run goes on from: how its groups were dealt out.
        self._resumed_order: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Read, check and tokenise what the stage needs; say what was kept and what was dropped.

        Raises:
            DataError: naming file, row and field of what cannot be used.
        """
        needed = ROLES_OF_STAGE[stage][0]
        if not self.sources[needed]:
            raise DataError(f"data.{needed} is not set: name a file of scored groups.")
        if stage == "predict" and self._holds_prompts():
            self.prompts = self._load_prompts()
            return
        for role in ROLES_OF_STAGE[stage]:
            if self.sources[role] and role not in self.datasets:
                self.datasets[role] = self._load(role)

    def answers_prompts(self) -> bool:
        """Whether predict answers prompts without responses; known once it is set up."""
        return self.prompts is not None

    def _holds_prompts(self) -> bool:
        """Whether predict answers prompts: by the setting, or by the first row of each source.

        Raises:
            DataError: if some sources are prompts alone and others are not.
        """
        if self.predict_as != "auto":
            return self.predict_as == "prompts"
        if self.schema is not None:
            return False
        opened = [self._open(source, "predict") for source in self.sources["predict"]]
        alone = {source.name: self._is_of_prompts(source) for source in opened}
        if len(set(alone.values())) > 1:
            raise DataError(
                f"data.predict: {[s for s in alone if alone[s]]} hold prompts alone, "
                f"{[s for s in alone if not alone[s]]} do not. Predict for them one after the "
                "other, or set data.predict_as."
            )
        return all(alone.values())

    def _is_of_prompts(self, source: RowSource) -> bool:
        rows = (row for _, row in source.rows(0, len(source)) if isinstance(row, Mapping))
        first = next(rows, {})
        return has_prompt_only(rename_columns(first, self.columns or {}, source.name))

    def _load_prompts(self) -> PromptDataset:
        sources = [
            PromptSource(self._open(source, "predict"), columns=self.columns)
            for source in self.sources["predict"]
        ]
        prompts = PromptDataset(sources, self._tokenize(min_responses=1))
        rank_zero_info(f"data.predict: {len(prompts)} prompts to answer")
        return prompts

    def _tokenize(self, *, min_responses: int) -> GroupTokenizer:
        """What makes token ids, by the settings."""
        if self.tokenizer is None:
            if self.tokenizer_path is None:
                raise DataError("data.tokenizer is not set: the folder or hub id of a tokenizer.")
            with fields_below("data"):
                self.tokenizer = load_tokenizer(
                    self.tokenizer_path, trust_remote_code=self.trust_remote_code
                )
        with fields_below("data"):
            return GroupTokenizer(
                self.tokenizer,
                max_length=self.max_length,
                over_long=self.over_long,
                prompt_format=self.prompt_format,
                boundary=self.boundary,
                max_responses=self.max_responses,
                keep_responses=self.keep_responses,
                min_responses=min_responses,
            )

    def _load(self, role: Role) -> GroupDataset:
        from datasets import concatenate_datasets

        contrasts = role != "predict"
        tokenize = self._tokenize(min_responses=2 if contrasts else 1)
        parts: list[Groups] = []
        self._read[role] = []
        for source in self.sources[role]:
            reader = GroupReader(self._open(source, role), schema=self.schema, columns=self.columns)
            data, report = prepare(reader, tokenize, root=self.cache, processes=self.num_proc)
            groups = Groups(data)
            # Predictions tell the scores that were given.
            if contrasts:
                scores = normalize_scores(
                    groups.scores, groups.counts, self.normalize_scores, self.normalize_over
                )
                groups = self._with_contrast(Groups(data, scores), report)
                report.check()
            rank_zero_info(f"data.{role}: {report}")
            if self.trainer is None or self.trainer.is_global_zero:
                sets = AboveMean() if self.loss is None else self.loss.sets
                show_groups(groups[: self.show], self.tokenizer, sets)
            self.reports.append(report)
            self._read[role].append(_told(reader, report))
            parts.append(groups)
        starts = np.cumsum([0, *(len(part.data) for part in parts)]).tolist()
        groups = Groups(
            concatenate_datasets([part.data for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.kept + start for part, start in zip(parts, starts, strict=False)]),
        )
        dataset = GroupDataset(groups)
        self._warn_of_large_groups(role, dataset)
        return dataset

    def _open(self, source: str | Rows, role: Role) -> RowSource:
        """A source by its name, or rows in memory by what they are for."""
        if not isinstance(source, str):
            return open_rows(source, role)
        splits: dict[Role, str] = {"val": "validation", "predict": "test"}
        return open_source(source, default_split=splits.get(role, role))

    def _with_contrast(self, groups: Groups, report: DataReport) -> Groups:
        """Keep the groups that teach the loss something; the others are counted.

        Raises:
            DataError: for a group without contrast, if it is an error.
        """
        loss = "a loss" if self.loss is None else type(self.loss).__name__
        has_contrast = differs if self.loss is None else self.loss.has_contrast
        contrast, equal = np.ones((2, len(groups)), dtype=bool)
        for start in range(0, len(groups), AT_A_TIME):
            scores, valid = groups.slots(start, start + AT_A_TIME)
            part = slice(start, start + AT_A_TIME)
            contrast[part] = has_contrast(scores, valid).numpy()
            equal[part] = ~differs(scores, valid).numpy()
        if contrast.all():
            return groups
        if self.no_contrast == "error":
            without = np.flatnonzero(~contrast)
            first = groups[int(without[0])]
            raise DataError.of_field(
                first.source,
                "scores",
                found=f"{list(first.scores)}, in {len(without)} such row(s)",
                expected=f"scores that give {loss} something to contrast",
                remedy="Remove the rows, or set data.no_contrast: drop.",
            )
        report.drop_without_contrast(contrast, equal, loss, groups.source)
        kept = Groups(groups.data, groups.scores, groups.kept[contrast])
        report.kept = len(kept)
        report.responses = int(kept.counts.sum())
        return kept

    def _warn_of_large_groups(self, role: Role, dataset: GroupDataset) -> None:
        if self.tokens_per_batch is None:
            return
        beyond = dataset.sizes[dataset.sizes > self.tokens_per_batch]
        if len(beyond):
            rank_zero_warn(
                f"data.{role}: {len(beyond)} of {len(dataset)} groups hold more than "
                f"{self.tokens_per_batch} tokens (data.tokens_per_batch), the largest "
                f"{beyond.max()}. Each is a batch of its own; model.responses_per_pass keeps "
                "the memory that it takes constant."
            )

    def _processes(self) -> dict[str, int]:
        """How many processes share data, and which of them this is."""
        assert self.trainer is not None
        # The strategy knows; a single process has no such arguments.
        return dict(self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0})

    def _loader(self, role: Role) -> DataLoader[GroupBatch]:
        assert self.trainer is not None
        if getattr(self.trainer, "overfit_batches", 0):
            raise DataError(
                "trainer.overfit_batches puts its own sampler in the place of the one that deals "
                f"whole groups. Name a small file as data.{role} instead."
            )
        processes = self._processes()
        dataset = self.datasets[role]
        sampler = GroupSampler(
            dataset.sizes,
            groups_per_batch=self.groups_per_batch,
            tokens_per_batch=self.tokens_per_batch,
            shuffle=role == "train",
            seed=self.seed,
            num_replicas=processes["num_replicas"],
            rank=processes["rank"],
        )
        # Lightning starts worker processes before it sets the epoch of the first epoch after a
        # resume (pytorch-lightning#21938), and current_epoch lags behind then: the sampler must
        # know from the start what Lightning will set.
        loop = self.trainer.fit_loop
        progress: Any = loop.epoch_progress.current
        epoch = progress.processed
        if role == "train" and loop.restarting and progress.started > progress.processed:
            # Resumed inside an epoch: Lightning counts on from its batch, but walks the loader from
            # the start. After the epoch's last batch it goes on with the next epoch.
            batches: Any = loop.epoch_loop.batch_progress
            if batches.is_last_batch:
                epoch += 1
            else:
                sampler.skip = batches.current.processed
                self._expect_resumed_order(processes["num_replicas"])
                # It is.
                warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        elif role == "train" and loop.restarting:
            # Resumed between two epochs. Where trainer.max_steps is set, Lightning takes that for
            # the inside of an epoch, all of which it then passes over.
            loop._restarting = loop.epoch_loop.restarting = False
        sampler.set_epoch(epoch)
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            # Its own, since each new iterator draws a number, also after a resume.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def record(self) -> dict[str, Any]:
        """What was read and with which settings, without paths; see `record.training_record`."""
        settings = {name: getattr(self, name) for name in RECORDED}
        return {"settings": settings, "sources": {r: self._read.get(r, []) for r in ROLES_OF_RUN}}

    # --------------------------------------------------------------------------- checkpoints

    def _order(self, processes: int) -> dict[str, Any]:
        """What decides which groups a step holds."""
        by_tokens = self.tokens_per_batch is not None
        groups = self.groups_per_batch
        return {
            "seed": self.seed,
            "tokens_per_batch": self.tokens_per_batch,
            "groups of all processes in a batch": groups and groups * processes,
            "processes (with tokens_per_batch)": processes if by_tokens else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to have as well: tokenizer, training groups, their order."""
        assert self.trainer is not None
        if "train" not in self.datasets:
            return {}
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "train": self.datasets["train"].digest,
            "order": self._order(self.trainer.world_size),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint of another tokenizer or other training groups.

        Raises:
            ResumeError: saying which.
        """
        if not state or self.tokenizer is None:
            return
        digest = tokenizer_digest(self.tokenizer)
        remedy = "Use the one that the run began with (data.tokenizer)."
        require_same("tokenizer", {"digest": state["tokenizer"]}, {"digest": digest}, remedy)
        if "train" not in self.datasets:
            return
        remedy = (
            "Use the files, and the data settings, that the run began with, or begin a new run."
        )
        found, here = {"digest": state["train"]}, {"digest": self.datasets["train"].digest}
        require_same("data set (data.train)", found, here, remedy)
        self._resumed_order = state["order"]

    def _expect_resumed_order(self, processes: int) -> None:
        """Inside an epoch: what the checkpoint's batches left over must be what is left here.

        Raises:
            ResumeError: naming the setting that differs.
        """
        if self._resumed_order is None:
            raise ResumeError(
                "The checkpoint was written inside an epoch of other data. Go on from one that was "
                "written at an epoch's end."
            )
        remedy = "Go on with the same, or from a checkpoint that was written at an epoch's end."
        require_same("order of groups", self._resumed_order, self._order(processes), remedy)

    def train_dataloader(self) -> DataLoader[GroupBatch]:
        """Training groups, in a new order each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[GroupBatch] | list[DataLoader[GroupBatch]]:
        """Validation groups in file order; nothing where fit has no validation data."""
        assert self.trainer is not None
        if self.trainer.state.fn == "fit" and "val" not in self.datasets:
            return []
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[GroupBatch]:
        """Test groups in file order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[GroupBatch] | DataLoader[PromptBatch]:
        """Groups to predict for, in file order, or prompts to answer, by length."""
        if self.prompts is None:
            return self._loader("predict")
        sampler = self.prompts.sampler(self.groups_per_batch or 8, **self._processes())
        return DataLoader(self.prompts, sampler=sampler, batch_size=None)


def _sources(value: str | list[str] | Rows | None) -> list[str | Rows]:
    """The names of sources, or rows in memory as the only one."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return list(value)
    return [cast("str | Rows", value)]


def _told(reader: GroupReader, report: DataReport) -> dict[str, Any]:
    return {
        "name": public_name(reader.source.name),
        "digest": reader.source.digest,
        "groups": report.groups,
        "kept": report.kept,
        "responses": report.responses,
        "dropped": dict(report.dropped),
        "changed": dict(report.changed),
    }
