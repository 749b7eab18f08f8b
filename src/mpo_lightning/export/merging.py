"""Merging of an adapter into its base, in float32, with a measurement of what it changes."""

import gc
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from mpo_lightning.export.trained_adapter import ExportError, TrainedAdapter
from mpo_lightning.files import in_transformers
from mpo_lightning.generation.model import put_adapter
from mpo_lightning.model.limits import limits_of
from mpo_lightning.model.loading import PolicyConfig, load_base
from mpo_lightning.model.policy import digest_of_weights

__all__ = ["Change", "Dtype", "Merged", "Onto", "merge"]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Onto = Literal["full-precision", "dequantized"]

# Largest difference of logits that merging in float32 may make, as a fraction of the largest logit.
TOLERANCE = 1e-3
# Number of tokens on which models are compared.
PROBED = 128


@dataclass(frozen=True, kw_only=True)
class Change:
    """Difference of one model's logits from another's on a few fixed tokens.

    Attributes:
        logits: largest difference, as a fraction of the largest logit.
        kl: mean over the tokens of KL(expected || found), nats.
        top: fraction of the tokens whose likeliest successor is the same.
    """

    logits: float
    kl: float
    top: float

    @classmethod
    def between(cls, found: Tensor, expected: Tensor) -> "Change":
        """Compare logits with the expected ones, (T, V) each."""
        one, other = found.double().log_softmax(-1), expected.double().log_softmax(-1)
        return cls(
            logits=float((found - expected).abs().max() / expected.abs().max()),
            kl=float((other.exp() * (other - one)).sum(-1).mean().clamp(min=0)),
            top=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        )

    def __str__(self) -> str:
        """Return the difference in words."""
        return (
            f"logits differ by at most {self.logits:.2g} of the largest, by {self.kl:.2g} nats a "
            f"token in KL divergence, and {self.top:.0%} of the likeliest tokens are the same"
        )


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A merged model, and its difference from the policy that was trained.

    Attributes:
        model: the model, in the dtype in which it is to be written.
        dtype: that dtype.
        rounded_away: fraction of the adapter's update that is lost in this dtype.
        from_exact: difference from base and adapter in float32.
        from_trained: difference from the policy with its quantised base; None if the base was not
            quantised, or cannot be quantised here.
        base_is_known: whether the base's weights are those of training, bit for bit; None without
            a record of them.
    """

    model: Any
    dtype: torch.dtype
    rounded_away: float
    from_exact: Change
    from_trained: Change | None
    base_is_known: bool | None


def merge(
    adapter: TrainedAdapter,
    config: PolicyConfig,
    *,
    onto: Onto = "full-precision",
    dtype: Dtype = "auto",
) -> Merged:
    """Merge an adapter into its base.

    Args:
        adapter: the adapter.
        config: the model that it was trained on, unquantised, and how it is loaded.
        onto: weights to merge into: "full-precision", or those that quantisation left in training
            ("dequantized").
        dtype: dtype in which the model will be written; "auto" is that of the base.

    Raises:
        ExportError: if the base is quantised or another one, or the adapter cannot be merged.
        PolicyError: if the base cannot be loaded, or the adapter does not fit it.
    """
    settings = _settings(config)
    quantised = adapter.quantization
    if onto == "dequantized" and quantised == "none":
        raise ExportError(
            "the base was not quantised in training, or the adapter's folder does not say so: "
            "there is nothing to dequantise. Leave it at full-precision.",
            field="onto",
        )
    known = {} if adapter.record is None else adapter.record["base"]

    def load(quantization: Any, dtype: Any) -> Any:
        changed = replace(config, quantization=quantization, dtype=dtype)
        return load_base(changed, torch.device("cpu"))

    of_trained, base_is_known, model = None, None, None
    if quantised != "none" and (onto == "dequantized" or find_spec("bitsandbytes") is not None):
        model = load(quantised, known["dtype"])
        base_is_known = digest_of_weights(model) == known["weights"]
        policy = put_adapter(model, str(adapter.folder))
        of_trained = _logits(policy)
        model = policy.unload().dequantize() if onto == "dequantized" else None
        del policy
        gc.collect()
    if model is None:
        # The adapter was trained on the base as it was loaded then, in that dtype.
        as_trained = known and quantised == "none"
        model = load("none", known["dtype"] if as_trained else "float32")
        if as_trained:
            base_is_known = digest_of_weights(model) == known["weights"]
            if not base_is_known:
                raise ExportError(
                    f"the weights of {config.base} are not those that the adapter was trained on. "
                    "Name that model.",
                    field="base",
                )
    written = settings.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    merged, exact, lost = _merged(put_adapter(model.float(), str(adapter.folder)), written)
    # The base's own configuration: training and merging load it with dropout switched off.
    merged.config = settings
    merged.config.dtype = written
    found = _logits(merged)
    return Merged(
        model=merged,
        dtype=written,
        rounded_away=lost,
        from_exact=Change.between(found, exact),
        from_trained=None if of_trained is None else Change.between(found, of_trained),
        base_is_known=base_is_known,
    )


def _settings(config: PolicyConfig) -> Any:
    """Return the base's configuration.

    Raises:
        ExportError: if it cannot be loaded, or the base is quantised.
    """
    from transformers import AutoConfig

    name, in_file = in_transformers(config.base)
    try:
        settings = AutoConfig.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code, **in_file
        )
    except (OSError, ValueError) as error:
        raise ExportError(f"{config.base} cannot be loaded: {error}", field="base") from error
    if getattr(settings, "quantization_config", None) is not None:
        raise ExportError(
            f"the weights of {config.base} are quantised; merged, the update would be rounded to "
            "their few values. Name the unquantised model that it was made from, or export the "
            "adapter alone.",
            field="base",
        )
    return settings


@torch.inference_mode()
def _logits(model: Any) -> Tensor:
    """Return the logits of a few fixed tokens, float32 (T, V)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = min(PROBED, limits_of(model.config).positions or PROBED)
    tokens = torch.arange(1, length + 1)[None] * 7919 % vocabulary
    logits: Tensor = model.eval()(input_ids=tokens, use_cache=False).logits[0].float()
    return logits


@torch.inference_mode()
def _merged(policy: Any, dtype: torch.dtype) -> tuple[Any, Tensor, float]:
    """Return the merged model in a dtype, the policy's logits, and the lost part of the update.

    Raises:
        ExportError: if the merged model computes something else.
    """
    expected = _logits(policy)
    before = _adapted_weights(policy.get_base_model())
    try:
        merged = policy.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ExportError(f"it cannot be merged: {error}", field="adapter") from error
    gap = Change.between(_logits(merged), expected).logits
    # Written so that NaN, too, is a difference.
    if not gap <= TOLERANCE:
        raise ExportError(
            f"the merged {type(merged).__name__} computes something else: logits that differ by "
            f"{gap:.2g} of the largest.",
            field="adapter",
        )
    after = dict(merged.named_parameters())
    update, lost = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for name, weight in before.items():
        update += (after[name] - weight).double().square().sum()
        lost += (after[name].to(dtype).float() - after[name]).double().square().sum()
    share = float((lost / update).sqrt()) if update > 0 else 0.0
    # `Module.to` would make complex numbers real (the vision model of Llama 4).
    for tensor in (*merged.parameters(), *merged.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return merged, expected, share


def _adapted_weights(base: Any) -> dict[str, Tensor]:
    """Return copies of the weights that merging changes, by their names after merging."""
    mark = ".base_layer.weight"
    return {
        f"{name.removesuffix(mark)}.weight": value.clone()
        for name, value in base.named_parameters()
        if name.endswith(mark)
    }
