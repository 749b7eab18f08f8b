"""The policy: a base model with LoRA on it, and the reference that it contains.

The reference is the same weights with the adapters off, never a second copy. That holds because
nothing but LoRA weights is ever trained and because a run starts from fresh adapters: a base that
is itself an adapter folder is refused.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from mpo_lightning.attention import SHARED_PROMPT_ATTENTION
from mpo_lightning.batch import GroupBatch
from mpo_lightning.logps import (
    DENSE_MASK_MODELS,
    SHARED_PROMPT_MODELS,
    Layout,
    can_share_prompts,
    response_logps,
)

__all__ = ["LoRA", "Policy", "PolicyConfig", "PolicyError", "build_policy"]

# Responses of one group that the first-batch check compares.
CHECKED_RESPONSES = 8


class PolicyError(ValueError):
    """A base model or adapter that cannot be trained as asked; the message says what to do."""


@dataclass(kw_only=True)
class LoRA:
    """Settings of the adapter, with PEFT's names and meaning. arXiv 2106.09685.

    Args:
        r: rank.
        lora_alpha: scale; the update is ``lora_alpha / r`` times ``B A``.
        lora_dropout: dropout on the adapters' input while training; the reference has none.
        target_modules: names of the linear layers to adapt, or "all-linear" (all but the head).
        exclude_modules: names to leave out.
        use_rslora: scale by ``lora_alpha / sqrt(r)`` instead.
        use_dora: weight-decomposed LoRA (arXiv 2402.09353).
    """

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"LoRA: r must be at least 1, got {self.r}.")
        if self.lora_alpha <= 0:
            raise ValueError(f"LoRA: lora_alpha must be > 0, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"LoRA: lora_dropout must be in [0, 1), got {self.lora_dropout}.")


@dataclass(kw_only=True)
class PolicyConfig:
    """Which model is trained, and how it is loaded.

    Args:
        base: folder or hub id of any causal language model, in safetensors.
        lora: the adapter.
        dtype: dtype of the base weights; "auto" is the one they are stored in. Adapters of 16-bit
            models are kept in float32.
        gradient_checkpointing: compute activations again in the backward pass to save memory.
        compile: compile the decoder layers (`torch.compile`); the first steps take long. Not
            together with gradient_checkpointing, nor with a sharded policy.
        attn_implementation: transformers' attention implementation, with model.layout: separate;
            its default if none. A shared prompt has an attention of its own.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: let a hub model run its own code.
        random_init: random weights from the base's configuration, for tests and benchmarks.
    """

    base: str
    lora: LoRA = field(default_factory=LoRA)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    random_init: bool = False

    def __post_init__(self) -> None:
        if self.compile and self.gradient_checkpointing:
            raise ValueError(
                "model.policy: compile and gradient_checkpointing exclude each other: a "
                "checkpointed layer would be computed as if it were not compiled. Choose one."
            )


class Policy(nn.Module):
    """Log-probabilities of responses under the policy and under its reference.

    Args:
        model: a PEFT model with fresh LoRA adapters.
        layout: how batches are computed: "shared", "separate", or for each the cheaper ("auto").
        responses_per_pass: responses that go through the model at a time; all of a batch if none.
    """

    def __init__(
        self,
        model: Any,
        *,
        layout: Layout,
        responses_per_pass: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.layout: Layout = layout
        self.responses_per_pass = responses_per_pass
        # The processes between which the parameters are sharded, and whether the next backward
        # pass reduces gradients over them.
        self._mesh: Any = None
        self._synchronize = True

    @property
    def causal_lm(self) -> Any:
        """The transformers model, adapters in place."""
        return self.model.get_base_model()

    def forward(
        self, batch: GroupBatch, *, layout: Layout | None = None, by_full_logits: bool = False
    ) -> Tensor:
        """Log-probability of each response under the policy, nats, fp32 (B, N).

        Everything that computes goes through here, since sharded parameters are gathered when this
        module is called, and only then.

        Args:
            batch: whole groups.
            layout: another layout than the policy's.
            by_full_logits: compute the last response of a one-group batch alone, from the model's
                own ``model(input_ids).logits``; that slot only is filled.
        """
        if by_full_logits:
            return self._by_full_logits(batch)
        return response_logps(
            self.causal_lm,
            batch,
            layout=layout or self.layout,
            responses_per_pass=self.responses_per_pass,
            **self._in_step_with_other_processes(batch),
        )

    def _in_step_with_other_processes(self, batch: GroupBatch) -> dict[str, Any]:
        """What slices need where parameters are sharded: passes, and one reduction of gradients."""
        if self._mesh is None:
            return {}
        # fully_shard has made it one.
        sharded: Any = self
        if self.responses_per_pass is None:
            if torch.is_grad_enabled():
                sharded.set_requires_gradient_sync(self._synchronize)
            return {}
        # Parameters are gathered by all processes at once, so all go through the model as often.
        responses = sum(len(lengths) for lengths in batch.response_lengths)
        passes = torch.tensor(
            math.ceil(responses / self.responses_per_pass), device=batch.tokens.device
        )
        group = self._mesh.get_group()
        torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX, group=group)
        if torch.is_grad_enabled():
            # Not by a pass without gradients that comes between a forward and its backward pass.
            sharded.set_requires_gradient_sync(self._synchronize and int(passes) == 1)
        return {
            "passes": int(passes),
            "before_last_backward": partial(sharded.set_requires_gradient_sync, self._synchronize),
        }

    @torch.no_grad()
    def reference(self, batch: GroupBatch) -> Tensor:
        """The same under the reference: adapters off, no dropout, no gradients."""
        with self.model.disable_adapter(), eval_mode(self.model):
            logps: Tensor = self(batch)
        return logps

    def identity(self) -> dict[str, str]:
        """What the reference's values depend on besides the tokens, as digests and names.

        Of the base's weights as they are in memory, quantised or not, and of its configuration:
        neither where they came from nor what is trained on them. To be asked before sharding.
        """
        weights = hashlib.sha256()
        for name, value in sorted(self.causal_lm.state_dict().items()):
            if "lora_" in name:
                continue
            described = f"{name.replace('.base_layer', '')} {value.dtype} {tuple(value.shape)}"
            weights.update(described.encode())
            weights.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
        settings = {
            name: value
            for name, value in self.causal_lm.config.to_dict().items()
            if not name.startswith("_") and name not in {"transformers_version", "use_cache"}
        }
        attention = self.causal_lm.config._attn_implementation
        return {
            "model": type(self.causal_lm).__name__,
            "weights": weights.hexdigest(),
            "config": hashlib.sha256(
                json.dumps(settings, sort_keys=True, default=str).encode()
            ).hexdigest(),
            "dtype": str(self.causal_lm.dtype).removeprefix("torch."),
            "attention": attention if self.layout == "separate" else SHARED_PROMPT_ATTENTION,
        }

    def is_fresh(self) -> bool:
        """Whether the adapter still computes nothing: every B of its products is zero."""
        ups = [p for name, p in self.model.named_parameters() if "lora_B" in name]
        return not any(bool(up.any()) for up in ups)

    @torch.no_grad()
    def check(self, batch: GroupBatch) -> None:
        """Compare one small group of a batch against the model's own full logits.

        Catches an architecture whose attention, positions or logits the package would get wrong.

        Raises:
            PolicyError: naming the model, the difference and the setting to use.
        """
        vocabulary = self.causal_lm.get_input_embeddings().weight.shape[0]
        if int(batch.tokens.max()) >= vocabulary:
            raise PolicyError(
                f"A batch holds token {int(batch.tokens.max())}, but the model has only "
                f"{vocabulary}: data.tokenizer belongs to another model."
            )
        group = small_group(batch)
        with eval_mode(self.model):
            separate = self(group, layout="separate")[0]
            shared = separate if self.layout == "separate" else self(group, layout="shared")[0]
            full = self(group, by_full_logits=True)[0]
        self._compare(group, separate[-1:], full[-1:], "in separate rows", "the model's own logits")
        self._compare(group, shared, separate, "in the shared layout", "separate rows")

    def check_reference(self, batch: GroupBatch, look_up: Callable[[GroupBatch], Tensor]) -> None:
        """Compare cached reference log-probabilities of a small group with computed ones.

        Raises:
            PolicyError: naming the model, the difference and what to do.
        """
        group = small_group(batch)
        computed = self.reference(group)[0]
        self._compare(group, look_up(group)[0], computed, "in the reference cache", "the model")

    def rounding(self, lengths: Tensor) -> Tensor:
        """By how many nats kernels may differ on responses of so many tokens.

        Seen are about 1e-6 nats a token in fp32 and 1e-2 in 16 bits.
        """
        device = lengths.device.type
        low_precision = self.causal_lm.dtype.itemsize < 4 or torch.is_autocast_enabled(device)
        return (0.1 if low_precision else 1e-4) * lengths

    def _compare(
        self, group: GroupBatch, found: Tensor, expected: Tensor, where: str, by: str
    ) -> None:
        lengths = group.lengths[0, -len(found) :]
        gaps = (found - expected).abs()
        # Written so that NaN, too, is a difference.
        if bool((gaps <= self.rounding(lengths)).all()):
            return
        worst = int((gaps / lengths).nan_to_num(torch.inf).argmax())
        remedy = {
            "in the shared layout": " Set model.layout: separate.",
            "in the reference cache": " Set model.reference: adapters-off, or clear the cache.",
        }.get(where, "")
        raise PolicyError(
            f"{type(self.causal_lm).__name__} ({self.causal_lm.config.model_type}): a response of "
            f"{group.sources[0]} has log-probability {float(found[worst]):.4f} {where}, but "
            f"{float(expected[worst]):.4f} by {by}: a difference of {float(gaps[worst]):.4f} nats "
            f"over {int(lengths[worst])} tokens.{remedy}"
        )

    def _by_full_logits(self, group: GroupBatch) -> Tensor:
        prompt, length = group.prompt_lengths[0], group.response_lengths[0][-1]
        ids = torch.cat([group.tokens[:prompt], group.tokens[-length:]])
        logits = self.causal_lm(ids[None], use_cache=False).logits[0, prompt - 1 : -1]
        logps = logits.float().log_softmax(-1).gather(1, ids[prompt:, None])
        result = torch.zeros(group.valid.shape, device=ids.device)
        result[0, -1] = logps.sum()
        return result

    def shard(self, mesh: Any) -> None:
        """Shard the parameters over a mesh (FSDP2): each decoder layer, and what is around them.

        Args:
            mesh: the one-dimensional device mesh of the processes that share data.
        """
        from torch.distributed.fsdp import fully_shard

        self._mesh = mesh
        for layer in decoder_layers(self.causal_lm):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def synchronize_gradients(self, enabled: bool) -> None:
        """Whether the next backward pass of a sharded policy reduces gradients over processes."""
        self._synchronize = enabled

    def save_adapter(self, path: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the adapter as a folder that ``PeftModel.from_pretrained`` loads.

        Args:
            path: the folder.
            state_dict: adapter weights by their names in ``self.model``, where they must not be
                taken from this process's own parameters.
        """
        self.model.save_pretrained(path, state_dict=state_dict, save_embedding_layers=False)


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers that transformers says must stay whole."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def small_group(batch: GroupBatch) -> GroupBatch:
    """The smallest group of a batch, or its first responses."""
    sizes = [p + sum(r) for p, r in zip(batch.prompt_lengths, batch.response_lengths, strict=True)]
    return batch.select(sizes.index(min(sizes))).slices(CHECKED_RESPONSES)[0]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---------------------------------------------------------------------------------- building


def build_policy(
    config: PolicyConfig,
    layout: Layout,
    responses_per_pass: int | None = None,
) -> Policy:
    """Load the base and put fresh adapters on it.

    Args:
        config: the base and the adapter.
        layout: how batches are computed; "auto" is the cheaper for each batch where the
            architecture can share a prompt.
        responses_per_pass: responses that go through the model at a time; all of a batch if none.

    Raises:
        PolicyError: if the base is not a model, the adapter fits nothing, or the layout is not
            possible for this architecture.
    """
    from mpo_lightning.gated import keep_less_of_gated_mlps
    from mpo_lightning.linear import use_fast_products

    base = _load_base(config)
    chosen = _choose_layout(base.config, layout, config.attn_implementation)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    model = _add_lora(base, config.lora)
    use_fast_products(model)
    keep_less_of_gated_mlps(model)
    if config.compile:
        for layer in decoder_layers(base):
            # Whatever the lengths of a batch, it is compiled once.
            layer.compile(dynamic=True)
    # transformers loads models in eval mode, and Lightning keeps the mode that it finds.
    model.train()
    return Policy(model, layout=chosen, responses_per_pass=responses_per_pass)


def _choose_layout(settings: Any, layout: Layout, attn_implementation: str | None) -> Layout:
    model_type = settings.model_type
    if layout == "separate":
        return "separate"
    if not can_share_prompts(settings):
        if layout == "shared":
            able = ", ".join(sorted(SHARED_PROMPT_MODELS | DENSE_MASK_MODELS))
            raise PolicyError(
                f"model.layout is shared, but {model_type} is not among the architectures that can "
                f"share a prompt ({able}). Set it to auto."
            )
        rank_zero_info(f"Layout: separate rows, since {model_type} models cannot share a prompt.")
        return "separate"
    if attn_implementation is not None and model_type in SHARED_PROMPT_MODELS:
        raise PolicyError(
            f"model.policy.attn_implementation is {attn_implementation}, but a shared prompt has "
            "an attention of its own. Set model.layout: separate, or leave attn_implementation out."
        )
    if layout == "shared":
        return "shared"
    rank_zero_info("Layout: a group's prompt is shared where that computes fewer tokens.")
    return "auto"


def _load_base(config: PolicyConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(config.base)
    if (folder / "adapter_config.json").is_file():
        raise PolicyError(
            f"model.policy.base: {folder} is an adapter, not a model. The reference of a trained "
            "adapter is not its base: merge it (PeftModel.merge_and_unload), save the result, and "
            "name that folder."
        )
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PolicyError(
                f"model.policy.base: {folder} holds no config.json, so it is not a model's folder."
            )
        # What an exported adapter names as its base must not depend on the working directory.
        name = str(folder.resolve())
    else:
        name = config.base
    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(name, **hub)
        _switch_off_dropout(settings)
        kwargs: dict[str, Any] = {
            "dtype": config.dtype,
            "attn_implementation": config.attn_implementation,
            **hub,
        }
        if config.random_init:
            del kwargs["revision"]
            if config.dtype == "auto":
                kwargs["dtype"] = settings.dtype or torch.float32
            return AutoModelForCausalLM.from_config(settings, **kwargs)
        model, loaded = AutoModelForCausalLM.from_pretrained(
            name, config=settings, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, ImportError) as error:
        raise PolicyError(
            f"model.policy.base: {config.base} cannot be loaded as a causal language model: {error}"
        ) from error
    absent = sorted([*loaded["missing_keys"], *(str(key) for key in loaded["mismatched_keys"])])
    if absent:
        raise PolicyError(
            f"model.policy.base: {config.base} lacks {len(absent)} weights of "
            f"{type(model).__name__} (first: {absent[:3]}); they would be random."
        )
    return model


def _switch_off_dropout(settings: Any) -> None:
    """Set the base's own dropout to zero: the reference has none, and log-ratios start at 0."""
    names = [
        name
        for name, value in settings.to_dict().items()
        if isinstance(value, float) and value > 0 and "drop" in name
    ]
    for name in names:
        setattr(settings, name, 0.0)
    if names:
        rank_zero_info(f"The base model's own dropout is off: {', '.join(names)}.")


def _add_lora(base: Any, lora: LoRA) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        exclude_modules=lora.exclude_modules,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        bias="none",
    )
    linear = sorted(
        {n.rpartition(".")[2] for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    )
    try:
        model = get_peft_model(base, settings)
    except ValueError as error:
        raise PolicyError(
            f"model.policy.lora.target_modules {lora.target_modules} cannot be adapted: {error} "
            f"Linear layers of this model: {', '.join(linear)}."
        ) from error
    if isinstance(lora.target_modules, list):
        adapted = model.targeted_module_names
        unmatched = [
            target
            for target in lora.target_modules
            if not any(name == target or name.endswith(f".{target}") for name in adapted)
        ]
        if unmatched:
            raise PolicyError(
                f"model.policy.lora.target_modules: {unmatched} match no layer. "
                f"Linear layers of this model: {', '.join(linear)}."
            )
    other = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
    if other:
        raise PolicyError(
            f"{other[:3]} would be trained beside the adapters, and switching the adapters off "
            "would not restore them."
        )
    return model
