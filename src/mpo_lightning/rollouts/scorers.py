"""Scorers of responses: a reward model, or a user's function."""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mpo_lightning.batch import Prompt, Response
from mpo_lightning.checks import check_settings, plain
from mpo_lightning.data.conversation import as_text, response_text
from mpo_lightning.data.groups import bad_field, collect_errors
from mpo_lightning.data.limits import check_ids, may_exceed
from mpo_lightning.data.rendering import ChatRenderer
from mpo_lightning.digests import check_folder
from mpo_lightning.errors import RolloutError, UserError, fields_below
from mpo_lightning.files import digest_of_files
from mpo_lightning.generation.generate import Done, ignore
from mpo_lightning.generation.model import choose_device, files_digest
from mpo_lightning.model.limits import limits_of
from mpo_lightning.model.loading import (
    PolicyConfig,
    Quantization,
    fix_bitsandbytes_modes,
    quantised_arguments,
)
from mpo_lightning.quiet import without_bars

__all__ = [
    "FunctionScorer",
    "RewardModel",
    "RewardModelConfig",
    "Scorable",
    "load_reward_model",
    "reward_model_identity",
    "written_date",
]

# None for a response beyond the scorer's length limit.
Scores = list[float | None]
# Heads of sequence classifiers, which are never quantised.
HEADS = ["score", "classifier"]


@dataclass(frozen=True)
class Scorable:
    """A prompt with responses to score.

    Attributes:
        prompt: a text, or the conversation before the answer.
        responses: the answers.
        source: "file:row", for messages.
        template_arguments: arguments of the chat template, such as ``tools``.
    """

    prompt: Prompt
    responses: Sequence[Response]
    source: str
    template_arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """Reward model, and how it is loaded.

    Args:
        path: folder or hub id of a sequence classifier, in safetensors.
        weights: weight of each label in the score, by the label's name, if there are several.
        dtype: dtype of the weights; "auto" is the one they are stored in.
        quantization: quantise the linear layers: "none", "nf4" or "int8".
        input_format: "chat" renders prompt and response with the reward model's own chat template,
            "pair" passes them as a pair of texts; "auto" is chat where there is a template.
        response_text: what to do with a response of which the chat template leaves out text, such
            as reasoning: "error", or "keep" to score and count it.
        date: date and time that the chat template gets if it asks for one, in ISO 8601. Defaults to
            the present; an output that is continued keeps its own.
        max_length: limit on prompt + response, in tokens. Defaults to the model's own. A longer
            response has no score: it is left out and counted.
        responses_per_batch: responses that are scored together.
        device: "auto" is this process's GPU if there is one, else the CPU.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let a hub model run its own code.
    """

    path: str | None = None
    weights: dict[str, float] = field(default_factory=dict)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization = "none"
    input_format: Literal["auto", "chat", "pair"] = "auto"
    response_text: Literal["error", "keep"] = "error"
    date: str | None = None
    max_length: int | None = None
    responses_per_batch: int = 16
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_settings(self)
        object.__setattr__(self, "path", self.path and os.path.expanduser(self.path))


# --------------------------------------------------------------------------------- reward model


class RewardModel:
    """Scorer that is a sequence classifier with its own tokenizer and chat template.

    Args:
        model: a sequence classifier of transformers.
        tokenizer: its tokenizer.
        config: its settings.

    Raises:
        RolloutError: if the settings do not say which label is the score, or ask for a chat
            template that is missing.
    """

    def __init__(self, model: Any, tokenizer: Any, config: RewardModelConfig) -> None:
        self.model = model.eval()
        _score_in_float32(model)
        self.tokenizer = tokenizer
        self.config = config
        if config.responses_per_batch < 1:
            raise RolloutError("reward_model.responses_per_batch must be at least 1.")
        self.weights = self._label_weights()
        has_template = tokenizer.chat_template is not None
        if config.input_format == "chat" and not has_template:
            raise RolloutError(
                "reward_model.input_format is chat, but its tokenizer has no chat template. Set "
                "its chat_template, or use pair."
            )
        self.renderer = _renderer(tokenizer, config)
        # Differences between data and rendered texts, for the caller's report.
        self.noted: list[tuple[str, str, int]] = []
        self.limits = limits_of(model.config)
        self.max_length = min(
            (limit for limit in (config.max_length, self.limits.positions) if limit is not None),
            default=None,
        )
        self._checked = False

    def _label_weights(self) -> Tensor:
        labels = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        given = self.config.weights
        if len(labels) == 1 and not given:
            return torch.ones(1)
        if not given or set(given) - set(labels):
            unknown = sorted(set(given) - set(labels))
            found = f"unknown are {unknown}" if unknown else "none is named"
            raise RolloutError(
                f"reward_model.weights: the model has the labels {', '.join(labels)}; {found}. "
                'Say how they make the score, as in {"helpfulness": 0.7, "brevity": 0.3}.'
            )
        return torch.tensor([float(given.get(label, 0.0)) for label in labels])

    def __call__(self, items: Sequence[Scorable], done: Done = ignore) -> list[Scores]:
        """Return the scores of each item's responses, None for responses beyond the limit.

        Args:
            items: prompts with their responses.
            done: called with the number of newly scored items.

        Raises:
            DataError: if the chat template refuses an item.
            RolloutError: if a score is not finite, or depends on the other responses of its batch.
        """
        encoded = [
            (number, slot, row)
            for number, item in enumerate(items)
            for slot, row in enumerate(self._encode(item))
        ]
        scores: list[Scores] = [[None] * len(item.responses) for item in items]
        waiting = [len(item.responses) for item in items]
        # Similar lengths share a batch, so that there is little padding.
        encoded.sort(key=lambda entry: len(entry[2]["input_ids"]))
        size = self.config.responses_per_batch
        for at in range(0, len(encoded), size):
            batch = encoded[at : at + size]
            fitting = [entry for entry in batch if self._fits(entry[2])]
            if fitting:
                values = self._scores([row for _, _, row in fitting])
                for (number, slot, _), value in zip(fitting, values, strict=True):
                    if not math.isfinite(value):
                        raise RolloutError(
                            f"{items[number].source}: responses[{slot}]: the reward model gives "
                            f"{value}. Load it in another dtype (reward_model.dtype)."
                        )
                    scores[number][slot] = value
            for number, _, _ in batch:
                waiting[number] -= 1
                done(int(waiting[number] == 0))
        return scores

    def check(self, items: Iterable[Scorable]) -> None:
        """Check that the model has all tokens of some items.

        Raises:
            DataError: for all items together that hold a token beyond the model's embedding.
        """
        if may_exceed(self.tokenizer, self.limits.tokens):
            collect_errors(items, self._encode)
            # They will be noted when the items are scored.
            self.noted.clear()

    def _fits(self, row: dict[str, list[int]]) -> bool:
        return self.max_length is None or len(row["input_ids"]) <= self.max_length

    def _encode(self, item: Scorable) -> list[dict[str, list[int]]]:
        """Tokenise each response after its prompt."""
        if self.renderer is None:
            prompt = as_text(item.prompt)
            if prompt is None:
                found, expected = f"{len(item.prompt)} messages", "a text or a single user message"
                remedy = "The reward model reads pairs of texts: it has no chat template."
                raise bad_field(item.source, "prompt", found, expected, remedy)
            texts = list(map(response_text, item.responses))
            encoded = self.tokenizer([prompt] * len(texts), texts, verbose=False)
        else:
            # The template has written the special tokens.
            encoded = self.tokenizer(self._rendered(item), add_special_tokens=False, verbose=False)
        names = [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in encoded]
        rows = [
            {name: list(encoded[name][slot]) for name in names}
            for slot in range(len(item.responses))
        ]
        for slot, row in enumerate(rows):
            ids, field = row["input_ids"], f"responses[{slot}], after its prompt"
            check_ids(ids, self.limits.tokens, self.tokenizer, item.source, field)
        return rows

    def _rendered(self, item: Scorable) -> list[str]:
        assert self.renderer is not None
        rendered = self.renderer(item.prompt, item.responses, item.source, item.template_arguments)
        for finding in rendered.findings:
            if finding.kind == "response_text" and self.config.response_text == "error":
                field = f"responses[{finding.slot}]"
                found = f"{finding.found} by the reward model's template"
                expected = "an answer that holds the response's text"
                remedy = "Use another template, or set reward_model.response_text: keep."
                raise bad_field(item.source, field, found, expected, remedy)
            count = len(item.responses) if finding.slot is None else 1
            to = "to " if finding.slot is None else ""
            reason = f"responses {to}{finding.reason}, for the reward model"
            if finding.kind == "response_text":
                reason += " (reward_model.response_text)"
            self.noted.append((reason, item.source, count))
        return [rendered.prompt + answer for answer in rendered.answers]

    def _scores(self, rows: list[dict[str, list[int]]]) -> list[float]:
        values = self._forward(rows)
        # Rows are sorted by length: the first has the most padding.
        if not self._checked and len(rows[0]["input_ids"]) < len(rows[-1]["input_ids"]):
            self._compare(values[0], self._forward(rows[:1])[0])
            self._checked = True
        return values

    def _compare(self, in_batch: float, alone: float) -> None:
        """Check that padding leaves a score unchanged, that is, that its last token is found."""
        sixteen_bits = self.model.dtype.itemsize < 4 or self.config.quantization != "none"
        tolerance = (0.05 if sixteen_bits else 1e-3) * (1 + abs(alone))
        if not abs(in_batch - alone) <= tolerance:
            raise RolloutError(
                f"{type(self.model).__name__}: a response's score is {alone:.4f} alone and "
                f"{in_batch:.4f} beside longer ones: it cannot be used in batches. Set "
                "reward_model.responses_per_batch: 1."
            )

    @torch.inference_mode()
    def _forward(self, rows: list[dict[str, list[int]]]) -> list[float]:
        width = max(len(row["input_ids"]) for row in rows)
        pad = self._padding(rows)
        settings, device = self.model.config.get_text_config(), self.model.device
        fill = {"input_ids": pad, "attention_mask": 0, "token_type_ids": 0}
        batch = {
            name: torch.tensor(
                [row[name] + [fill[name]] * (width - len(row[name])) for row in rows], device=device
            )
            for name in rows[0]
        }
        before = settings.pad_token_id
        # The model finds each row's last token by the padding token.
        settings.pad_token_id = pad
        try:
            logits = self.model(**batch).logits
        finally:
            settings.pad_token_id = before
        scores: list[float] = (logits.double().cpu() @ self.weights.double()).tolist()
        return scores

    def _padding(self, rows: list[dict[str, list[int]]]) -> int:
        """Return the model's own padding token, or else one that no row contains."""
        own = self.model.config.get_text_config().pad_token_id
        if own is not None:
            return int(own)
        used = {token for row in rows for token in row["input_ids"]}
        size = self.model.get_input_embeddings().weight.shape[0]
        return next(token for token in range(size) if token not in used)


def _score_in_float32(model: Any) -> None:
    """Compute the head of a sequence classifier in float32, and tell if it has none that is known.

    In 16 bits scores would fall into few values: near 20 they are multiples of 1/8 in bfloat16. The
    last hidden state, and with it most of the work, stays in the model's dtype.
    """
    heads = [head for name in HEADS if isinstance(head := getattr(model, name, None), nn.Module)]
    for head in heads:
        head.float().register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))
    if not heads and model.dtype.itemsize < 4:
        spacing = 16 * torch.finfo(model.dtype).eps
        print(
            f"{type(model).__name__} computes scores in {str(model.dtype).removeprefix('torch.')}: "
            f"near 20 they are multiples of {spacing:g}, and differences below that become ties. "
            "Set reward_model.dtype: float32."
        )


def _renderer(tokenizer: Any, config: RewardModelConfig) -> ChatRenderer | None:
    """Return the renderer of conversations; None if prompt and response are a pair of texts."""
    if tokenizer.chat_template is None or config.input_format == "pair":
        return None
    with fields_below("reward_model"):
        whose = "the reward model's chat template"
        return ChatRenderer(tokenizer, date=config.date, whose=whose)


def _load_tokenizer(config: RewardModelConfig) -> Any:
    from transformers import AutoTokenizer

    assert config.path is not None
    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        return AutoTokenizer.from_pretrained(config.path, **hub)
    except (OSError, ImportError, KeyError, ValueError) as error:
        raise RolloutError(
            f"reward_model.path: {config.path}: no tokenizer can be loaded: {error}"
        ) from error


def written_date(config: RewardModelConfig) -> str | None:
    """Return the date that the reward model's chat template writes; None if it writes none.

    Raises:
        RolloutError: if its tokenizer cannot be loaded.
    """
    renderer = _renderer(_load_tokenizer(config), config)
    return None if renderer is None else renderer.date


def load_reward_model(config: RewardModelConfig) -> RewardModel:
    """Load a reward model.

    Raises:
        RolloutError: if it is no sequence classifier, or lacks weights.
        PolicyError: if it cannot be quantised.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    assert config.path is not None
    check_folder(Path(config.path))
    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    device, arguments = choose_device(config.device), {"dtype": config.dtype, **hub}
    try:
        settings = AutoConfig.from_pretrained(config.path, **hub)
        if config.quantization != "none":
            as_policy = PolicyConfig(
                base=config.path, dtype=config.dtype, quantization=config.quantization
            )
            with fields_below("reward_model"):
                quantised = quantised_arguments(as_policy, settings, device)
            quantised["quantization_config"].llm_int8_skip_modules = HEADS
            arguments |= quantised
        with without_bars():
            model, loaded = AutoModelForSequenceClassification.from_pretrained(
                config.path, use_safetensors=True, output_loading_info=True, **arguments
            )
    except UserError:
        raise
    except (OSError, ImportError, KeyError, ValueError, SafetensorError) as error:
        raise RolloutError(
            f"reward_model.path: {config.path} cannot be loaded as a sequence classifier: {error}"
        ) from error
    absent = sorted([*loaded["missing_keys"], *map(str, loaded["mismatched_keys"])])
    if absent:
        raise RolloutError(
            f"reward_model.path: {config.path} lacks {', '.join(absent[:3])}, so its scores would "
            "be random: it is no reward model."
        )
    fix_bitsandbytes_modes(model)
    if config.quantization == "none":
        model = model.to(device)
    return RewardModel(model, _load_tokenizer(config), config)


# ------------------------------------------------------------------------------------- function


class FunctionScorer:
    """Scorer that calls ``f(prompt, responses)``, which returns one number for each response.

    ``prompt`` is as in the row, a text or a list of messages.

    Args:
        path: address of the function, ``module:function``.

    Raises:
        RolloutError: if there is no such function.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        module, _, name = path.partition(":")
        if not module or not name:
            raise RolloutError(f"function: {path}: name it as module:function.")
        try:
            found: Any = import_module(module)
        except ModuleNotFoundError as error:
            # Another missing module, which the user's module imports, is the user's own error.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            raise RolloutError(
                f"function: {path}: there is no module {error.name} on Python's path or in the "
                f"working directory ({Path.cwd()})."
            ) from error
        for part in name.split("."):
            found = getattr(found, part, None)
        if not callable(found):
            raise RolloutError(f"function: {path}: {module} has no function {name}.")
        self.function: Callable[[Prompt, list[Response]], Sequence[Any]] = found
        self.noted: list[tuple[str, str, int]] = []

    def identity(self) -> dict[str, str | None]:
        """Return the function's address and a digest of its file."""
        try:
            file = inspect.getsourcefile(self.function)
        except TypeError:
            # A callable object, whose class has a file.
            file = inspect.getsourcefile(type(self.function))
        return {
            "function": self.path,
            "function_file": None if file is None else digest_of_files(Path(file)),
        }

    def __call__(self, items: Sequence[Scorable], done: Done = ignore) -> list[Scores]:
        """Return the scores of each item's responses.

        Raises:
            RolloutError: if the function returns the wrong number of scores, or anything but finite
                numbers.
        """
        results = []
        for item in items:
            try:
                given = list(self.function(item.prompt, list(item.responses)))
            except Exception as error:
                error.add_note(f"{self.path} was given {item.source}.")
                raise
            if len(given) != len(item.responses):
                raise RolloutError(
                    f"{item.source}: {self.path} gave {len(given)} scores for "
                    f"{len(item.responses)} responses. It must give one for each, in their order."
                )
            results.append([self._number(v, item, slot) for slot, v in enumerate(given)])
            done(1)
        return results

    def _number(self, value: Any, item: Scorable, slot: int) -> float | None:
        if isinstance(value, np.ndarray | Tensor) and value.shape == (1,):
            value = value[0]
        value = plain(value)
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RolloutError(
                f"{item.source}: responses[{slot}]: {self.path} gave {value!r}; a finite number "
                "was expected."
            )
        return float(value)


def reward_model_identity(config: RewardModelConfig) -> dict[str, Any]:
    """Return everything that a reward model's scores depend on."""
    assert config.path is not None
    no_matter = {"device", "trust_remote_code"}
    settings = {name: value for name, value in vars(config).items() if name not in no_matter}
    return {**settings, "files": files_digest(config.path)}
