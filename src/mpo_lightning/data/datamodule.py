"""PreferenceDataModule: from files of scored groups to loaders of GroupBatch."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from mpo_lightning.batch import (
    GroupBatch,
    ModelLimits,
    Prompt,
    PromptBatch,
    RunModel,
    TokenGroup,
)
from mpo_lightning.checks import check_settings
from mpo_lightning.data.dataset import GroupDataset, Groups
from mpo_lightning.data.groups import DataError, bad_field
from mpo_lightning.data.limits import check_groups
from mpo_lightning.data.prepare import prepare
from mpo_lightning.data.prompt_dataset import PromptDataset
from mpo_lightning.data.prompts import PromptSource, has_prompt_only
from mpo_lightning.data.reading import BadRows, GroupReader
from mpo_lightning.data.rendering import RenderingRules, now
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
# Data that each Trainer function reads; the first is required.
ROLES_OF_STAGE: dict[str, tuple[Role, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
}
ROLES_OF_RUN = ROLES_OF_STAGE["fit"]
# Settings that decide the training groups and their batches.
RECORDED = (
    "groups_per_batch",
    "tokens_per_batch",
    "max_length",
    "over_long",
    "prompt_format",
    "boundary",
    "chat_template_kwargs",
    "date",
    "max_responses",
    "keep_responses",
    "bad_rows",
    "normalize_scores",
    "normalize_over",
    "no_contrast",
    "seed",
)
# Groups whose scores are checked together.
CHUNK_GROUPS = 4096


class PreferenceDataModule(LightningDataModule):
    """Scored groups from files, checked, tokenised and batched whole.

    A row has ``prompt`` (a text, or a list of ``{"role", "content"}`` messages), ``responses`` (a
    list of texts) and ``scores`` (one number each, higher is better), or the columns of a known
    public data set or another trainer; see docs/data.md. A source is a ``.jsonl``, ``.json``,
    ``.csv``, ``.tsv`` or ``.parquet`` file, a folder of such files or of
    ``datasets.save_to_disk``, or a hub id, with a split after a colon if wanted; in Python also
    rows in memory, as a list or a ``datasets.Dataset``, which messages and predictions name after
    their use: ``train:17``. Token ids are computed once and cached on disk.

    Args:
        tokenizer: folder or hub id of the tokenizer. Defaults to the model's base on the command
            line.
        train: source, list of sources, or rows, to train on.
        val: source, list of sources, or rows, to validate on.
        test: source, list of sources, or rows, to test on.
        predict: source, list of sources, or rows, to predict for: scored groups, or prompts alone,
            which are answered.
        predict_as: what predict does with rows. "groups" computes log-probabilities of their
            responses; "prompts" answers their prompts and ignores their responses; "auto" is
            prompts where most of the first 100 rows have ``prompt`` (or ``instruction``) and no
            responses.
        schema: format of the rows. Defaults to the one that most of the first 100 rows fit.
        columns: columns to rename: the name in the source, and the name to read it as.
        groups_per_batch: limit on the groups of a step on one process. Defaults to 8 where
            tokens_per_batch is not set either. Prompts alone are answered so many at a time, or 8.
        tokens_per_batch: limit on the tokens of a step on one process: each group's prompt once and
            its responses. Both limits hold where both are set. Training batches then consist of
            groups of similar size; a group beyond the limit is a batch of its own.
        max_length: limit on prompt + response, in tokens; the model's own, where that is lower.
        over_long: what to do with a response beyond the limit. "drop_group", "drop_response" (the
            others are compared among themselves), "cut" or "error". A prompt that leaves no room
            for a response drops its group, or is an error.
        max_responses: limit on the responses of a group. Defaults to none.
        keep_responses: responses to keep under that limit. "first" as given, "balanced" as many
            above the group's mean score as not, "extremes" the highest and the lowest scored.
        normalize_scores: bring scores to one scale. "z-score" is the distance from the mean in
            standard deviations; "rank" is 0 for the lowest and 1 for the highest.
        normalize_over: scope of the normalisation: each group, or all groups of a source.
        loss: loss to be trained, which decides which groups have a contrast; the command line sets
            it to the module's. Defaults to a contrast in all groups whose scores differ.
        no_contrast: what to do with a group that teaches the loss nothing, because all its scores
            are equal, or the loss's partition leaves one set empty: "drop" or "error". Predict
            keeps it.
        prompt_format: "chat" renders with the chat template, "text" writes prompt and response one
            after the other, "auto" is chat where the tokenizer has a template.
        boundary: "auto" tokenises prompt and response together, and a response whose beginning
            would join the prompt's end by itself; "strict" refuses such a response; "separate"
            tokenises all prompts and responses separately.
        chat_template_kwargs: arguments of the chat template, such as ``enable_thinking``, for all
            rows; a row's own go before.
        date: date and time that the chat template gets if it asks for one, in ISO 8601. Defaults to
            the present; a run that is resumed keeps its own.
        rendering: what to do where tokens are not what the data say.
        bad_rows: "error" stops if a row cannot be used; "drop" leaves such rows out, and counts
            them.
        show: number of groups of each source to print at the start, as training sees them.
        num_workers: worker processes that make batches.
        num_proc: processes that tokenise. Defaults to the number of processors available.
        cache: folder for token ids. Defaults to one in the user's cache folder.
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
        boundary: Boundary = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
        rendering: RenderingRules = RenderingRules(),  # noqa: B008 (frozen)
        max_responses: int | None = None,
        keep_responses: Keep = "first",
        normalize_scores: Normalization = "none",
        normalize_over: Scale = "group",
        loss: SetLoss | None = None,
        no_contrast: Literal["drop", "error"] = "drop",
        bad_rows: BadRows = "error",
        show: int = 0,
        num_workers: int = 0,
        num_proc: int | None = None,
        cache: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
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
        self.bad_rows: BadRows = bad_rows
        self.show = show
        self.num_proc = num_proc
        self.cache = cache_folder("tokens") if cache is None else Path(cache).expanduser()
        self.prompt_format: PromptFormat = prompt_format
        self.boundary: Boundary = boundary
        self.chat_template_kwargs = chat_template_kwargs
        # Once tokens are made, the date that they contain; None if the template writes none.
        self.date = date
        self.rendering = rendering
        self.num_workers = num_workers
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        self._told: str | None = None
        check_settings(self)
        for name, least in (
            ("groups_per_batch", 1),
            ("tokens_per_batch", 1),
            ("max_length", 1),
            ("max_responses", 2),
            ("num_proc", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"data.{name} must be at least {least}, got {value}.")
        self.tokenizer: Any = None
        self.datasets: dict[Role, GroupDataset] = {}
        # Prompts for predict to answer, if its data have no responses.
        self.prompts: PromptDataset | None = None
        self.reports: list[DataReport] = []
        # Sources of each role, for the training record.
        self._read: dict[Role, list[dict[str, Any]]] = {}
        self._readers: dict[Role, list[GroupReader]] = {}
        # Order of groups in the checkpoint that the run resumes from.
        self._resumed_order: dict[str, Any] | None = None

    def setup(self, stage: str) -> None:
        """Read, check and tokenise the data of a stage, and print the reports.

        Raises:
            DataError: naming file, row and field of rows that cannot be used.
            PolicyError: if the model's configuration cannot be read.
        """
        needed = ROLES_OF_STAGE[stage][0]
        if not self.sources[needed]:
            raise DataError(f"data.{needed} is not set: name a file of scored groups.")
        if stage == "predict" and self._holds_prompts():
            self.prompts = self._load_prompts()
            return
        longest = self._longest()
        if longest < self.max_length:
            rank_zero_info(
                f"data.max_length: {self.max_length} is more than the {longest} positions of the "
                f"model, so that {longest} is the limit, beyond which data.over_long "
                f"({self.over_long}) holds."
            )
        for role in ROLES_OF_STAGE[stage]:
            if self.sources[role] and role not in self.datasets:
                self.datasets[role] = self._load(role)

    def _limits(self) -> ModelLimits:
        """Return the limits of the run's model; none without a model."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return module.limits() if isinstance(module, RunModel) else ModelLimits()

    def _longest(self) -> int:
        """Return the limit on prompt + response, in tokens."""
        return min(self.max_length, self._limits().positions or self.max_length)

    @property
    def batch_size(self) -> int:
        """Groups per batch, by the name that Lightning's BatchSizeFinder changes."""
        return self.groups_per_batch or 1

    @batch_size.setter
    def batch_size(self, groups: int) -> None:
        self.groups_per_batch = groups

    def answers_prompts(self) -> bool:
        """Whether predict answers prompts without responses; known after setup."""
        return self.prompts is not None

    def _holds_prompts(self) -> bool:
        """Whether predict answers prompts, by the setting or the first rows of each source.

        Raises:
            DataError: if some sources are prompts alone and others are not.
        """
        if self.predict_as != "auto":
            return self.predict_as == "prompts"
        if self.schema is not None:
            return False
        opened = [self._open(source, "predict") for source in self.sources["predict"]]
        alone = {source.name: self._has_prompts_only(source) for source in opened}
        if len(set(alone.values())) > 1:
            raise DataError(
                f"data.predict: {[s for s in alone if alone[s]]} hold prompts alone, "
                f"{[s for s in alone if not alone[s]]} do not. Predict for each in a run of its "
                "own, or set data.predict_as."
            )
        return all(alone.values())

    def _has_prompts_only(self, source: RowSource) -> bool:
        """Whether most of the first rows are prompts alone."""
        found = [
            has_prompt_only(rename_columns(row, self.columns or {}, name))
            for name, row in source.first_objects()
        ]
        return 2 * sum(found) > len(found)

    def _load_prompts(self) -> PromptDataset:
        sources = [
            PromptSource(self._open(source, "predict"), columns=self.columns)
            for source in self.sources["predict"]
        ]
        for each in sources:
            self._require_same_on_all(each.source)
        tokenize = self._tokenize(min_responses=1)
        prompts = PromptDataset(sources, tokenize, self._limits().tokens)
        rank_zero_info(f"data.predict: {len(prompts)} prompts to answer")
        return prompts

    def _tokenize(self, *, min_responses: int) -> GroupTokenizer:
        """Return the tokenizer of groups, by the settings and the model's limits."""
        if self.tokenizer is None:
            if self.tokenizer_path is None:
                raise DataError("data.tokenizer is not set: the folder or hub id of a tokenizer.")
            with fields_below("data"):
                self.tokenizer = load_tokenizer(
                    self.tokenizer_path, trust_remote_code=self.trust_remote_code
                )
        date = self.date
        if date is None and self.trainer is not None:
            # All processes of a run write the same.
            date = self.trainer.strategy.broadcast(now())
        rendering = self.rendering
        if min_responses < 2:
            # Without a contrast, scores do not matter.
            rendering = replace(rendering, equal_tokens="keep")
        with fields_below("data"):
            made = GroupTokenizer(
                self.tokenizer,
                max_length=self._longest(),
                over_long=self.over_long,
                prompt_format=self.prompt_format,
                boundary=self.boundary,
                max_responses=self.max_responses,
                keep_responses=self.keep_responses,
                min_responses=min_responses,
                rendering=rendering,
                template_arguments=self.chat_template_kwargs or {},
                date=date,
            )
        if made.date is not None and made.date != self._told:
            rank_zero_info(f"data.date: the chat template writes the date; it gets {made.date}.")
        self.date = self._told = made.date
        return made

    def _load(self, role: Role) -> GroupDataset:
        from datasets import concatenate_datasets

        contrasts = role != "predict"
        tokenize = self._tokenize(min_responses=2 if contrasts else 1)
        parts: list[Groups] = []
        self._read[role], self._readers[role] = [], []
        for source in self.sources[role]:
            opened = self._open(source, role)
            self._require_same_on_all(opened)
            reader = GroupReader(opened, schema=self.schema, columns=self.columns)
            data, report = prepare(
                reader, tokenize, root=self.cache, processes=self.num_proc, bad_rows=self.bad_rows
            )
            groups = Groups(data)
            # Predictions report the scores as given.
            if contrasts:
                scores = normalize_scores(
                    groups.scores, groups.counts, self.normalize_scores, self.normalize_over
                )
                groups = self._with_contrast(Groups(data, scores), report)
                report.check(self.bad_rows)
            rank_zero_info(f"data.{role}: {report}")
            if self.trainer is None or self.trainer.is_global_zero:
                sets = AboveMean() if self.loss is None else self.loss.sets
                show_groups(groups[: self.show], self.tokenizer, sets)
            self.reports.append(report)
            self._read[role].append(_source_record(reader, report))
            self._readers[role].append(reader)
            parts.append(groups)
        starts = np.cumsum([0, *(len(part.data) for part in parts)]).tolist()
        groups = Groups(
            concatenate_datasets([part.data for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate(
                [part.selected + start for part, start in zip(parts, starts, strict=False)]
            ),
        )
        with fields_below("data"):
            check_groups(groups, self._limits().tokens, self.tokenizer, role)
        dataset = GroupDataset(groups)
        self._warn_of_large_groups(role, dataset)
        return dataset

    def first_prompts(self, role: Role, count: int) -> list[tuple[TokenGroup, Prompt]]:
        """Return the first groups of a role, each with its prompt as its row has it."""
        found: list[tuple[TokenGroup, Prompt]] = []
        wanted = list(self.datasets[role].groups[:count])
        for reader in self._readers[role]:
            for result in reader.results():
                if len(found) == len(wanted):
                    return found
                # Rows that were left out have no group.
                if result.group and result.source == wanted[len(found)].source:
                    found.append((wanted[len(found)], result.group.prompt))
        return found

    def _open(self, source: str | Rows, role: Role) -> RowSource:
        """Open a source by its name, or rows in memory under the name of their role."""
        if not isinstance(source, str):
            return open_rows(source, role)
        splits: dict[Role, str] = {"val": "validation", "predict": "test"}
        return open_source(source, default_split=splits.get(role, role))

    def _require_same_on_all(self, source: RowSource) -> None:
        """Refuse a source whose content is another than on the first process.

        Raises:
            DataError: on each process that differs.
        """
        if self.trainer is None:
            return
        first = self.trainer.strategy.broadcast(source.digest)
        if first != source.digest:
            raise DataError(
                f"{source.name}: holds other rows than rank 0 has read, as rank "
                f"{self.trainer.global_rank} reads it. It has changed meanwhile, or is another "
                "file on another machine. All processes must read the same rows: start again."
            )

    def _with_contrast(self, groups: Groups, report: DataReport) -> Groups:
        """Select the groups that teach the loss something, and count the others.

        Raises:
            DataError: for a group without contrast, if it is an error.
        """
        loss = "a loss" if self.loss is None else type(self.loss).__name__
        has_contrast = differs if self.loss is None else self.loss.has_contrast
        contrast, equal = np.ones((2, len(groups)), dtype=bool)
        for start in range(0, len(groups), CHUNK_GROUPS):
            scores, valid = groups.slots(start, start + CHUNK_GROUPS)
            part = slice(start, start + CHUNK_GROUPS)
            contrast[part] = has_contrast(scores, valid).numpy()
            equal[part] = ~differs(scores, valid).numpy()
        if contrast.all():
            return groups
        if self.no_contrast == "error":
            without = np.flatnonzero(~contrast)
            first = groups[int(without[0])]
            found = f"{list(first.scores)}, in {len(without)} such row(s)"
            expected = f"scores that give {loss} something to contrast"
            remedy = "Remove the rows, or set data.no_contrast: drop."
            raise bad_field(first.source, "scores", found, expected, remedy)
        report.drop_without_contrast(contrast, equal, loss, groups.source)
        selected = Groups(groups.data, groups.scores, groups.selected[contrast])
        report.kept = len(selected)
        report.responses = int(selected.counts.sum())
        return selected

    def _warn_of_large_groups(self, role: Role, dataset: GroupDataset) -> None:
        if self.tokens_per_batch is None:
            return
        beyond = dataset.sizes[dataset.sizes > self.tokens_per_batch]
        if len(beyond):
            rank_zero_warn(
                f"data.{role}: {len(beyond)} of {len(dataset)} groups hold more than "
                f"{self.tokens_per_batch} tokens (data.tokens_per_batch), the largest "
                f"{beyond.max()}. Each is a batch of its own; model.responses_per_pass keeps "
                "its memory constant."
            )

    def _processes(self) -> dict[str, int]:
        """Return the number of processes that share the data, and the rank of this one."""
        # None with a single process.
        shared = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return dict(shared or {"num_replicas": 1, "rank": 0})

    def _loader(self, role: Role) -> DataLoader[GroupBatch]:
        if role not in self.datasets:
            raise DataError(f"data.{role} is not read: name it, and call setup before.")
        processes = self._processes()
        dataset = self.datasets[role]
        # The same batches in each epoch, which Lightning limits.
        overfit = bool(getattr(self.trainer, "overfit_batches", 0))
        sampler = GroupSampler(
            dataset.sizes,
            groups_per_batch=self.groups_per_batch,
            tokens_per_batch=self.tokens_per_batch,
            shuffle=role == "train" and not overfit,
            seed=self.seed,
            num_replicas=processes["num_replicas"],
            rank=processes["rank"],
        )
        if self.trainer is not None:
            self._follow_epochs(sampler, role, processes["num_replicas"])
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None
            and self.trainer.strategy.root_device.type == "cuda",
            # Every new iterator draws a number, also after a resume, so the global generator must
            # not be used.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _follow_epochs(self, sampler: GroupSampler, role: Role, processes: int) -> None:
        """Begin a sampler where the run is: at an epoch, or inside of one after a resume."""
        assert self.trainer is not None
        # Lightning starts worker processes before it sets the first epoch after a resume
        # (pytorch-lightning#21938), and current_epoch is out of date then: the epoch that Lightning
        # will set has to be known from the start.
        loop = self.trainer.fit_loop
        progress: Any = loop.epoch_progress.current
        epoch = progress.processed
        if role == "train" and loop.restarting and progress.started > progress.processed:
            # Resumed inside an epoch: Lightning continues its count of batches, but reads the
            # loader from the start. After the epoch's last batch comes the next epoch.
            batches: Any = loop.epoch_loop.batch_progress
            if batches.is_last_batch:
                epoch += 1
            else:
                sampler.skip = batches.current.processed
                self._expect_resumed_order(processes)
                # Lightning warns of loaders that do not skip batches; this one does.
                warnings.filterwarnings("ignore", ".*your dataloader is not resumable.*")
        elif role == "train" and loop.restarting:
            # Resumed between two epochs. With trainer.max_steps, Lightning would take this for the
            # inside of an epoch and skip the whole epoch.
            loop._restarting = loop.epoch_loop.restarting = False
        sampler.set_epoch(epoch)

    def record(self) -> dict[str, Any]:
        """Return settings and sources, without paths, for the training record."""
        settings = {name: getattr(self, name) for name in RECORDED}
        return {"settings": settings, "sources": {r: self._read.get(r, []) for r in ROLES_OF_RUN}}

    # --------------------------------------------------------------------------- checkpoints

    def _order(self, processes: int) -> dict[str, Any]:
        """Return the settings that decide the groups of a step."""
        by_tokens = self.tokens_per_batch is not None
        groups = self.groups_per_batch
        return {
            "seed": self.seed,
            "tokens_per_batch": self.tokens_per_batch,
            "groups of all processes in a batch": groups and groups * processes,
            "processes (with tokens_per_batch)": processes if by_tokens else None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return digests of tokenizer and training groups, and their order, for a resumed run."""
        assert self.trainer is not None
        if "train" not in self.datasets:
            return {}
        return {
            "tokenizer": tokenizer_digest(self.tokenizer),
            "date": self.date,
            "train": self.datasets["train"].digest,
            "order": self._order(self.trainer.world_size),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that tokenizer and training groups are those of the checkpoint.

        Raises:
            ResumeError: naming the one that differs.
        """
        if not state or self.tokenizer is None:
            return
        digest = tokenizer_digest(self.tokenizer)
        remedy = "Use the one that the run began with (data.tokenizer)."
        require_same("tokenizer", {"digest": state["tokenizer"]}, {"digest": digest}, remedy)
        self._set_date(state["date"])
        if "train" not in self.datasets:
            return
        remedy = (
            "Use the files, and the data settings, that the run began with, or begin a new run."
        )
        found, here = {"digest": state["train"]}, {"digest": self.datasets["train"].digest}
        require_same("data set (data.train)", found, here, remedy)
        self._resumed_order = state["order"]

    def _set_date(self, date: str | None) -> None:
        """Make the tokens anew with a checkpoint's date, if the chat template writes one."""
        if date is None or date == self.date:
            return
        self.date = date
        for role in list(self.datasets):
            self.datasets[role] = self._load(role)
        if self.prompts is not None:
            self.prompts = self._load_prompts()

    def _expect_resumed_order(self, processes: int) -> None:
        """Check that the order of groups is the checkpoint's, to resume inside an epoch.

        Raises:
            ResumeError: naming the setting that differs.
        """
        if self._resumed_order is None:
            raise ResumeError(
                "The checkpoint was written inside an epoch of other data. Resume from one that "
                "was written at an epoch's end."
            )
        remedy = "Use the same, or resume from a checkpoint that was written at an epoch's end."
        require_same("order of groups", self._resumed_order, self._order(processes), remedy)

    def train_dataloader(self) -> DataLoader[GroupBatch]:
        """Return the loader of training groups, in a new order each epoch."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[GroupBatch] | list[DataLoader[GroupBatch]]:
        """Return the loader of validation groups, in file order; none if fit has no such data."""
        fitting = self.trainer is None or self.trainer.state.fn == "fit"
        if fitting and "val" not in self.datasets:
            return []
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[GroupBatch]:
        """Return the loader of test groups, in file order."""
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[GroupBatch] | DataLoader[PromptBatch]:
        """Return the loader of groups in file order, or of prompts to answer, by length."""
        if self.prompts is None:
            return self._loader("predict")
        sampler = self.prompts.sampler(self.groups_per_batch or 8, **self._processes())
        return DataLoader(self.prompts, sampler=sampler, batch_size=None)


def _sources(value: str | list[str] | Rows | None) -> list[str | Rows]:
    """Return a list of names of sources, or of rows in memory as the only source."""
    if value is None:
        return []
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return list(value)
    return [cast("str | Rows", value)]


def _source_record(reader: GroupReader, report: DataReport) -> dict[str, Any]:
    """Return the entry of a source in the training record."""
    return {
        "name": public_name(reader.source.name),
        "digest": reader.source.digest,
        "groups": report.groups,
        "kept": report.kept,
        "responses": report.responses,
        "dropped": dict(report.dropped),
        "changed": dict(report.changed),
    }
