"""Samples: responses of policy and reference to a few prompts, side by side."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from mpo_lightning.batch import Prompt
from mpo_lightning.checks import check_settings
from mpo_lightning.data.conversation import as_messages, as_text, response_text
from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.data.limits import check_ids
from mpo_lightning.data.tokens import GroupTokenizer
from mpo_lightning.errors import UserError
from mpo_lightning.generation.generate import Answers, ModelSampler, Sample, Sampling
from mpo_lightning.markdown import table
from mpo_lightning.model.policy import eval_mode
from mpo_lightning.printable import printable
from mpo_lightning.training.loggers import log_text
from mpo_lightning.training.module import MPOModule

__all__ = ["Samples", "SamplesError"]

FILE = "samples.jsonl"


class SamplesError(UserError, ValueError):
    """Samples that cannot be generated as asked; the message says what to do."""


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    source: str
    text: str

    @property
    def key(self) -> bytes:
        """Key of its random numbers, from its content."""
        return blake2b(json.dumps(self.ids).encode(), digest_size=16).digest()


class Samples(Callback):
    """Generates responses to a few prompts before training and at each validation.

    The counterpart of TRL's LogCompletionsCallback. Responses of the policy stand beside those of
    the reference, which is the policy before training: in ``samples.jsonl`` in the run's folder, in
    loggers that take texts, and in a table at the end of training. The prompts stay the same,
    decoding is greedy by default, and the random state of training is not touched. Mean lengths are
    logged as ``samples/length`` and ``samples/reference_length``.

    All processes compute all responses, and the first one writes them.

    Args:
        count: number of prompts; 0 generates no samples.
        prompts: texts to respond to, all of them. Defaults to the first ``count`` prompts of the
            validation data, or of the training data without validation.
        max_new_tokens: largest number of tokens of a response.
        temperature: divides the logits; 0 is greedy.
        top_p: sample from the smallest set of tokens with this probability mass; 1 for all.
        seed: seed of the random numbers, where the temperature is not 0.
    """

    def __init__(
        self,
        *,
        count: int = 4,
        prompts: Sequence[str] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.count = count
        self.prompts = None if prompts is None else list(prompts)
        check_settings(self)
        if self.count < 0:
            raise ValueError(f"samples.count must be at least 0, got {count}.")
        self.sampling = Sampling(
            n=1, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
        )
        # From the last pass: each prompt's text, the reference's response and the policy's.
        self.shown: list[tuple[str, Sample | str, Sample | str]] = []
        self._prompts: list[_Prompt] = []
        self._sampler: ModelSampler | None = None
        self._before: list[Answers] = []
        self._file: Path | None = None
        self._step: int | None = None

    @property
    def _on(self) -> bool:
        return bool(self.prompts) if self.prompts is not None else self.count > 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check strategy and data module before anything is loaded.

        Raises:
            SamplesError: under a strategy that shards the model, or without the data module.
        """
        if stage != "fit" or not self._on:
            return
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
            raise SamplesError(
                f"samples: {type(strategy).__name__} shards the model, which cannot generate then. "
                "Set samples.count: 0, and sample from the run's adapter: mpo-lightning sample "
                "--model.adapter checkpoints/last-adapter."
            )
        if not isinstance(self._data(trainer), PreferenceDataModule):
            raise SamplesError("samples: their tokenizer is that of PreferenceDataModule: use it.")

    @staticmethod
    def _data(trainer: Trainer) -> Any:
        return getattr(trainer, "datamodule", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate the reference's responses; a resumed run gets the same ones.

        Raises:
            DataError: if the model lacks a token of a prompt.
        """
        if not self._on:
            return
        assert isinstance(pl_module, MPOModule)
        assert pl_module.policy is not None
        data: PreferenceDataModule = self._data(trainer)
        tokenizer = GroupTokenizer.without_limit(
            data.tokenizer,
            data.prompt_format,
            template_arguments=data.chat_template_kwargs or {},
            date=data.date,
        )
        self._prompts = self._chosen_prompts(data, tokenizer)
        for prompt in self._prompts:
            tokens = pl_module.limits().tokens
            check_ids(prompt.ids, tokens, data.tokenizer, prompt.source, "prompt")
        model = pl_module.policy.causal_lm
        self._sampler = ModelSampler(model, tokenizer, self.sampling)
        self._before = self._answers(trainer, pl_module, reference=True)
        # `log_dir` is broadcast by the first process, so all processes ask for it.
        folder = trainer.log_dir or trainer.default_root_dir
        self._file = Path(folder) / FILE
        self._step = None

    def _chosen_prompts(
        self, data: PreferenceDataModule, tokenizer: GroupTokenizer
    ) -> list[_Prompt]:
        if self.prompts is not None:
            sources = [f"samples.prompts[{number}]" for number in range(len(self.prompts))]
            return [
                _Prompt(tokenizer.prompt_ids(prompt, source), source, prompt)
                for prompt, source in zip(self.prompts, sources, strict=True)
            ]
        first = data.first_prompts("val" if "val" in data.datasets else "train", self.count)
        return [
            _Prompt(group.prompt.tolist(), group.source, _conversation(prompt))
            for group, prompt in first
        ]

    def _answers(self, trainer: Trainer, module: MPOModule, *, reference: bool) -> list[Answers]:
        """Generate one response to each prompt."""
        assert module.policy is not None
        assert self._sampler is not None
        model = module.policy.model
        with (
            eval_mode(model),
            model.disable_adapter() if reference else nullcontext(),
            trainer.precision_plugin.forward_context(),
        ):
            return self._sampler.answer(
                [prompt.ids for prompt in self._prompts], [prompt.key for prompt in self._prompts]
            )

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate the policy's responses, write them, and log their lengths."""
        if not self._on or trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._sample(trainer, pl_module)
        lengths = [
            [len(answer.ids) for answer in answers if isinstance(answer, Sample)]
            for answers in zip(*[(before, after) for _, before, after in self.shown], strict=True)
        ]
        for name, of_one in zip(("reference_length", "length"), lengths, strict=True):
            if of_one:
                pl_module.log(f"samples/{name}", sum(of_one) / len(of_one), batch_size=1)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, MPOModule)
        assert self._sampler is not None
        after = self._answers(trainer, pl_module, reference=False)
        self.shown = [
            (prompt.text, _one(old), _one(new))
            for prompt, old, new in zip(self._prompts, self._before, after, strict=True)
        ]
        self._step = trainer.global_step
        if trainer.is_global_zero:
            self._write(trainer.global_step)
            log_text(trainer, "samples", self._markdown(), trainer.global_step)

    def _write(self, step: int) -> None:
        assert self._file is not None
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            for prompt, (text, before, after) in zip(self._prompts, self.shown, strict=True):
                row = {
                    "step": step,
                    "source": prompt.source,
                    "prompt": text,
                    **_described("before", before),
                    **_described("after", after),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _markdown(self) -> str:
        rows = [(text, _text(before), _text(after)) for text, before, after in self.shown]
        return table(("prompt", "before", "after"), rows)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print responses before and after training side by side."""
        if not self._on:
            return
        if self._step != trainer.global_step:
            # No validation came after the last step.
            self._sample(trainer, pl_module)
        if trainer.is_global_zero:
            self._show()
            rank_zero_info(f"Samples: {self._file}")

    def _show(self) -> None:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table("prompt", "before", "after", title="Samples", show_lines=True)
        for text, before, after in self.shown:
            # Not markup: a response may hold brackets.
            table.add_row(*(Text(printable(part)) for part in (text, _text(before), _text(after))))
        Console().print(table)


def _conversation(prompt: Prompt) -> str:
    """Return a prompt as its reader sees it: of several messages, who says what."""
    if (text := as_text(prompt)) is not None:
        return text
    return "\n".join(
        f"{message['role']}: {response_text(message)}" for message in as_messages(prompt)
    )


def _one(answers: Answers) -> Sample | str:
    """Return the only response, or the reason for which there is none."""
    return answers.samples[0] if answers.refused is None else answers.refused


def _text(answer: Sample | str) -> str:
    if isinstance(answer, str):
        return f"({answer})"
    return answer.text if answer.finish == "stop" else f"{answer.text} ..."


def _described(name: str, answer: Sample | str) -> dict[str, object]:
    if isinstance(answer, str):
        return {name: None, f"{name}_refused": answer}
    return {name: answer.text, f"{name}_tokens": len(answer.ids), f"{name}_finish": answer.finish}
