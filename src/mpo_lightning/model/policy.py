"""The policy: a base model with LoRA on it, and the reference inside it.

The reference is the same weights with the adapters off, never a second copy.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.errors import DamagedError, UserError
from mpo_lightning.model.decoder import text_decoder
from mpo_lightning.model.logps import ExactLayout, Layout, exact_layouts, response_logps

__all__ = ["Policy", "PolicyError", "decoder_layers", "digest_of_weights", "require_finite"]

# Number of responses that the check of the first batch compares.
CHECKED_RESPONSES = 8


class PolicyError(UserError, ValueError):
    """Base model or adapter that cannot be used as asked; the message says what to do."""


class Policy(nn.Module):
    """Log-probabilities of responses under the policy and under its reference.

    Args:
        model: a PEFT model with fresh LoRA adapters.
        layout: "shared", "continued" or "separate"; "auto" is the cheapest for each batch.
        responses_per_pass: responses that go through the model at a time. Defaults to all of a
            batch.
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
        # Device mesh over which the parameters are sharded, and whether the next backward pass
        # reduces gradients over it.
        self._mesh: Any = None
        self._synchronize = True
        self._identity: dict[str, str] | None = None
        # Log-probabilities of the probe batch before the policy was sharded.
        self._probe: Tensor | None = None

    @property
    def causal_lm(self) -> Any:
        """The transformers model, with the adapters in it."""
        return self.model.get_base_model()

    def forward(
        self, batch: GroupBatch, *, layout: Layout | None = None, by_full_logits: bool = False
    ) -> Tensor:
        """Return the log-probability of each response under the policy, nats, fp32 (B, N).

        Every computation goes through this method, because sharded parameters are gathered only
        when this module is called.

        Args:
            batch: whole groups.
            layout: overrides the policy's layout.
            by_full_logits: compute only the last response of a one-group batch, from the model's
                own ``model(input_ids).logits``; the other slots are zero.
        """
        if by_full_logits:
            return self._by_full_logits(batch)
        return response_logps(
            self.causal_lm,
            batch,
            layout=layout or self._layout_of_all(),
            responses_per_pass=self.responses_per_pass,
            **self._sharding_arguments(batch),
        )

    def _layouts(self) -> list[ExactLayout]:
        """Return the layouts beside separate rows in which batches may be computed."""
        exact = [layout for layout in exact_layouts(self.causal_lm) if layout != "separate"]
        return [layout for layout in exact if self.layout in ("auto", layout)]

    def _layout_of_all(self) -> Layout:
        """Return the policy's layout; processes that share a model take one with as many calls."""
        if self._mesh is not None and self.layout == "auto" and self._layouts() == ["continued"]:
            return "continued"
        return self.layout

    def _sharding_arguments(self, batch: GroupBatch) -> dict[str, Any]:
        """Return the arguments of `response_logps` that keep sharded processes in step.

        All processes call the model equally often, and reduce gradients once.
        """
        if self._mesh is None:
            return {}
        # fully_shard has turned this module into an FSDPModule.
        sharded: Any = self
        if self.responses_per_pass is None:
            if torch.is_grad_enabled():
                sharded.set_requires_gradient_sync(self._synchronize)
            return {}
        passes = batch.once("passes", partial(self._passes_of_all_processes, batch))
        if torch.is_grad_enabled():
            # A pass without gradients may come between a forward and its backward pass, and must
            # leave this alone.
            sharded.set_requires_gradient_sync(self._synchronize and passes == 1)
        return {
            "passes": passes,
            "before_last_backward": partial(sharded.set_requires_gradient_sync, self._synchronize),
        }

    def _passes_of_all_processes(self, batch: GroupBatch) -> int:
        """Return the largest number of slices on any process."""
        assert self.responses_per_pass is not None
        responses = sum(map(len, batch.response_lengths))
        passes = torch.tensor(
            math.ceil(responses / self.responses_per_pass), device=batch.tokens.device
        )
        group = self._mesh.get_group()
        torch.distributed.all_reduce(passes, torch.distributed.ReduceOp.MAX, group=group)
        return int(passes)

    @torch.no_grad()
    def reference(self, batch: GroupBatch) -> Tensor:
        """Return the same under the reference: adapters off, no dropout, no gradients."""
        with self.model.disable_adapter(), eval_mode(self.model):
            logps: Tensor = self(batch)
        return logps

    def identity(self) -> dict[str, str]:
        """Return what the reference's values depend on besides the tokens, as digests and names.

        It covers the base's weights as they are in memory, quantised or not, and its configuration;
        not where they came from, nor the adapter. Computed once, before the weights are sharded.
        """
        if self._identity is not None:
            return self._identity
        settings = {
            name: value
            for name, value in self.causal_lm.config.to_dict().items()
            if not name.startswith("_") and name not in {"transformers_version", "use_cache"}
        }
        config = json.dumps(settings, sort_keys=True, default=str).encode()
        self._identity = {
            "model": type(self.causal_lm).__name__,
            "weights": digest_of_weights(self.causal_lm),
            "config": hashlib.sha256(config).hexdigest(),
            "dtype": str(self.causal_lm.dtype).removeprefix("torch."),
            "attention": text_decoder(self.causal_lm).config._attn_implementation,
        }
        return self._identity

    def record_fingerprint(self, known: tuple[dict[str, str], Tensor] | None = None) -> None:
        """Record, before the weights are sharded, what `check_shards` compares afterwards.

        Args:
            known: fingerprint from a process that has all the weights. Defaults to computing it.
        """
        self._identity, self._probe = known or (self.identity(), self._probe_logps())

    def fingerprint(self) -> tuple[dict[str, str], Tensor]:
        """Return the base's identity and the reference's log-probabilities of the probe batch."""
        assert self._identity is not None
        assert self._probe is not None
        return self._identity, self._probe

    def _probe_logps(self) -> Tensor:
        return self.reference(probe_batch(self.causal_lm).to(self.causal_lm.device))[0].cpu()

    def describe(self) -> str:
        """Return the size of the weights by dtype, and of the trained ones, as text."""
        sizes: dict[str, int] = {}
        trained = sum(p.nbytes for p in self.parameters() if p.requires_grad)
        for parameter in self.parameters():
            kind = str(parameter.dtype).removeprefix("torch.")
            packed = getattr(parameter, "quant_state", None) is not None
            # Sharded 4-bit weights are plain bytes.
            if packed or parameter.dtype == torch.uint8:
                kind = "4-bit"
            elif type(parameter).__name__ == "Int8Params":
                kind = "8-bit"
            sizes[kind] = sizes.get(kind, 0) + parameter.nbytes
        parts = [f"{size / 2**20:,.1f} MiB {kind}" for kind, size in sorted(sizes.items())]
        return f"{', '.join(parts)}; {trained / 2**20:,.1f} MiB of it trained"

    def is_untrained(self) -> bool:
        """Whether the adapter still adds nothing: one factor of each LoRA is zero."""
        # The factor that starts at zero; of an embedding's adapter it is the other one.
        zero = ("lora_B", "lora_embedding_A")
        ups = [p for name, p in self.model.named_parameters() if any(z in name for z in zero)]
        return not any(bool(up.any()) for up in ups)

    @torch.no_grad()
    def check(self, batch: GroupBatch) -> None:
        """Compare one small group of a batch with the model's own full logits.

        This catches an architecture whose attention, positions or logits the package would get
        wrong.

        Raises:
            PolicyError: naming the model, the difference and the setting to use.
        """
        group = small_group(batch)
        with eval_mode(self.model):
            try:
                full = self(group, by_full_logits=True)[0]
            except (AttributeError, TypeError, ValueError) as error:
                raise PolicyError(
                    f"{type(self.causal_lm).__name__} does not compute token ids alone: {error} "
                    "Name a model of text, or one that takes text without images.",
                    field="base",
                ) from error
            separate = self(group, layout="separate")[0]
            others = {layout: self(group, layout=layout)[0] for layout in self._layouts()}
        self._compare(group, separate[-1:], full[-1:], "in separate rows", "the model's own logits")
        for layout, found in others.items():
            self._compare(group, found, separate, f"in the {layout} layout", "separate rows")

    def check_shards(self) -> None:
        """Compare the reference's values on the probe batch with those before sharding.

        Raises:
            PolicyError: naming the model, the difference and what to do.
        """
        if self._probe is None:
            return
        batch = probe_batch(self.causal_lm)
        self._compare(batch, self._probe_logps(), self._probe, "once sharded", "the whole model")

    def check_reference(self, batch: GroupBatch, look_up: Callable[[GroupBatch], Tensor]) -> None:
        """Compare cached reference log-probabilities of a small group with computed ones.

        Raises:
            PolicyError: naming the model, the difference and what to do.
        """
        group = small_group(batch)
        computed = self.reference(group)[0]
        self._compare(group, look_up(group)[0], computed, "in the reference cache", "the model")

    def tolerance(self, lengths: Tensor) -> Tensor:
        """Return the largest difference in nats that counts as rounding, by response length.

        Kernels were seen to differ by about 1e-6 nats a token in fp32 and 5e-2 in 16 bits, short
        responses by more: a 4-token one by 0.5.

        Args:
            lengths: tokens of each response, of any shape.
        """
        exact = self.precision() in {"float32", "float64"}
        exact = exact and not torch.is_autocast_enabled(lengths.device.type)
        return (1e-4 if exact else 0.1) * (10 + lengths)

    def precision(self) -> str:
        """Return the weights' dtype, with that of products where they round float32 to fewer bits.

        See ``torch.set_float32_matmul_precision``.
        """
        dtype = str(self.causal_lm.dtype).removeprefix("torch.")
        on_gpu = self.causal_lm.device.type == "cuda"
        backend = torch.backends.cuda if on_gpu else torch.backends.mkldnn
        products = backend.matmul.fp32_precision
        rounded = dtype == "float32" and products in {"tf32", "bf16"}
        return f"{dtype}, products in {products}" if rounded else dtype

    def _compare(
        self, group: GroupBatch, found: Tensor, expected: Tensor, where: str, by: str
    ) -> None:
        lengths = group.lengths[0, -len(found) :]
        gaps = (found - expected).abs()
        # Written so that NaN counts as a difference.
        if bool((gaps <= self.tolerance(lengths)).all()):
            return
        worst = int((gaps / lengths).nan_to_num(torch.inf).argmax())
        remedy = {
            "in the shared layout": " Set model.layout: separate.",
            "in the continued layout": " Set model.layout: separate.",
            "in the reference cache": " Set model.reference: adapters-off, or clear the cache.",
            "once sharded": " Train it on one device or with DDP.",
        }.get(where, "")
        raise PolicyError(
            f"{type(self.causal_lm).__name__} ({self.causal_lm.config.model_type}): a response of "
            f"{group.sources[0]} has log-probability {float(found[worst]):.4f} {where}, but "
            f"{float(expected[worst]):.4f} by {by}: a difference of {float(gaps[worst]):.4f} nats "
            f"over {int(lengths[worst])} tokens.{remedy}"
        )

    def _by_full_logits(self, group: GroupBatch) -> Tensor:
        (span,) = group.spans()
        prompt = span.prompt
        ids = torch.cat([group.tokens[:prompt], group.tokens[-span.lengths[-1] :]])
        # Without the last token, which no token before it may depend on.
        logits = self.causal_lm(input_ids=ids[None, :-1], use_cache=False).logits[0, prompt - 1 :]
        logps = logits.float().log_softmax(-1).gather(1, ids[prompt:, None])
        result = torch.zeros(group.valid.shape, device=ids.device)
        result[0, -1] = logps.sum()
        return result

    def shard(self, mesh: Any) -> None:
        """Shard the parameters (FSDP2): each decoder layer, then all that is outside of them.

        Args:
            mesh: one-dimensional device mesh of the processes.
        """
        from torch.distributed.fsdp import fully_shard

        if not any(parameter.is_meta for parameter in self.parameters()):
            self.record_fingerprint()
        self._mesh = mesh
        for layer in decoder_layers(self.causal_lm):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)

    def synchronize_gradients(self, enabled: bool) -> None:
        """Set whether the next backward pass of a sharded policy reduces gradients."""
        self._synchronize = enabled

    def save_adapter(self, path: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the adapter as a folder that ``PeftModel.from_pretrained`` loads.

        Args:
            path: the folder.
            state_dict: adapter weights by their names in ``self.model``. Defaults to this process's
                own parameters.
        """
        self.model.save_pretrained(path, state_dict=state_dict, save_embedding_layers=False)


def digest_of_weights(model: Any) -> str:
    """Return the SHA-256 of a model's weights as they are in memory, without adapters."""

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, value = item
        described = f"{name.replace('.base_layer', '')} {value.dtype} {tuple(value.shape)}"
        of_weight = hashlib.sha256(described.encode())
        of_weight.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return of_weight.digest()

    frozen = sorted((n, v) for n, v in model.state_dict().items() if "lora_" not in n)
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, frozen))).hexdigest()


def require_finite(path: Path, values: Mapping[str, Any], *, infinity: bool = False) -> None:
    """Refuse weights that are no numbers.

    Args:
        path: the file that they were read from.
        values: tensors by name; other values are ignored.
        infinity: whether they may be infinite.

    Raises:
        DamagedError: naming the file and the first such tensor.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        bad = value.isnan() if infinity else ~value.isfinite()
        if bool(bad.any()):
            found = f"holds {int(bad.sum())} NaN or infinite values in {name}"
            raise DamagedError(path, found, "Take an earlier checkpoint, or train again.")


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers that transformers says must stay on one device."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def probe_batch(model: Any) -> GroupBatch:
    """Return a prompt and two responses of fixed tokens from the model's vocabulary."""
    tokens = torch.arange(1, 25) * 7919 % model.get_input_embeddings().weight.shape[0]
    prompt, *responses = tokens.split(8)
    group = TokenGroup(prompt, tuple(responses), (0.0, 1.0), "probe:1")
    return GroupBatch.from_groups([group])


def small_group(batch: GroupBatch) -> GroupBatch:
    """Return the smallest group of a batch, with its first responses only where it has many."""
    sizes = [span.end - span.start for span in batch.spans()]
    return batch.select(sizes.index(min(sizes))).slices(CHECKED_RESPONSES)[0]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode, and each module back to its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
