"""Each layout in low precision against full logits in float32: values and LoRA gradients.

A small model with random weights is loaded as a run loads it, in bfloat16 or 4 bits, on the device.
What it should compute is computed in float32 on the CPU, from the model's own full logits, one
response after the other, with the same weights: 4-bit ones as bitsandbytes dequantises them. Low
precision has an error of its own, so the yardstick is the error of the model's own full logits in
the same precision on the device, which involves nothing of this package's layouts.
"""

import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.jobs import Notes, Row, Runner, Task
from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.model.loading import LoRA, PolicyConfig, build_policy
from mpo_lightning.model.logps import exact_layouts
from mpo_lightning.model.policy import Policy

__all__ = ["check", "tasks"]

PRECISIONS = ("float32", "bf16", "nf4")
# A layout may be so many times as far off as the model's own logits are, in rows of their own: in
# values, of which there are few, and in gradients.
TIMES = (3.0, 2.0)
# Its own gradients must not be further off than this, or they would excuse anything.
COARSEST = 0.25
# Errors below these are rounding, whatever the yardstick says: nats a token, and relative.
ROUNDING = {"float32": (1e-5, 1e-4), "bf16": (2e-3, 1e-2), "nf4": (2e-3, 1e-2)}
SECONDS = 200
THREADS = 2


class Sizes(NamedTuple):
    """A small model and the groups it is tried on: tokens of a prompt and of its responses."""

    hidden: int
    heads: int
    layers: int
    vocabulary: int
    window: int
    groups: list[tuple[int, list[int]]]

    def settings_of(self, architecture: str) -> Row:
        """Return a configuration of an architecture, in which what it is known for comes to bear.

        Windows are shorter than prompts, and soft-caps as low as logits are.
        """
        windows = {
            "sliding_window": self.window,
            "layer_types": ["sliding_attention", "full_attention"] * (self.layers // 2),
        }
        own: dict[str, Row] = {
            "llama": {},
            "qwen3": {},
            "gemma2": {
                **windows,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 20.0,
                "query_pre_attn_scalar": self.hidden // self.heads,
            },
            # All experts, since rounding may choose others.
            "gpt_oss": {**windows, "num_local_experts": 4, "num_experts_per_tok": 4},
            "mistral": {"sliding_window": self.window},
            "qwen3_5_text": {
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                # Keys are normalised, so short ones would magnify rounding.
                "linear_key_head_dim": 64,
                "linear_value_head_dim": 32,
                "layer_types": ["linear_attention", "full_attention"] * (self.layers // 2),
            },
        }
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // 2,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **own[architecture],
        }


ARCHITECTURES = ("llama", "qwen3", "gemma2", "gpt_oss", "mistral", "qwen3_5_text")
TINY = Sizes(64, 4, 2, 384, 6, [(11, [3, 1, 9]), (4, [20, 2, 7, 5])])
FULL = Sizes(512, 8, 2, 2048, 96, [(300, [40, 150, 260, 7]), (64, [400, 33]), (190, [128] * 4)])


def tasks(*, tiny: bool, device: str) -> list[Task]:
    """Return a process for each architecture; with a tiny model, one for all."""
    parts = [ARCHITECTURES] if tiny else [(name,) for name in ARCHITECTURES]

    def task(architectures: tuple[str, ...], runner: Runner) -> list[Row]:
        settings = {"architectures": architectures, "tiny": tiny, "device": device}
        outcome = runner.run("benchmarks.gpu.correctness:check", settings, SECONDS)
        rows = [{"part": "correctness", **row} for row in outcome.rows]
        complaint = outcome.complaint()
        if complaint:
            name = ", ".join(architectures)
            rows.append({"part": "correctness", "architecture": name, "error": complaint})
        return rows

    return [partial(task, architectures) for architectures in parts]


# ------------------------------------------------------------------------------- in the process


def check(settings: Row, notes: Notes) -> None:
    """Note the errors of each architecture, precision and layout."""
    sizes = TINY if settings["tiny"] else FULL
    if settings["device"] == "cuda":
        # Others compute on the CPU at the same time.
        torch.set_num_threads(THREADS)
    for architecture in settings["architectures"]:
        for precision in PRECISIONS:
            case = {"architecture": architecture, "precision": precision}
            if precision == "nf4" and find_spec("bitsandbytes") is None:
                notes.add(**case, left_out="bitsandbytes is not there")
                continue
            with notes.attempt(**case), tempfile.TemporaryDirectory() as folder:
                write_base(Path(folder), sizes.settings_of(architecture), architecture)
                _check_precision(Path(folder), sizes, case, settings["device"], notes)


def write_base(folder: Path, settings: Row, architecture: str) -> None:
    """Write a model with random weights that bfloat16 can hold."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.2 / math.sqrt(parameter.shape[-1]))
    model.bfloat16().save_pretrained(folder)


def _check_precision(folder: Path, sizes: Sizes, case: Row, device: str, notes: Notes) -> None:
    precision = case["precision"]
    low = precision != "float32"
    with _log_lines() as said:
        policy = build_policy(
            PolicyConfig(
                base=str(folder),
                dtype="bfloat16" if low else "float32",
                quantization="nf4" if precision == "nf4" else "none",
                lora=LoRA(r=8),
            ),
            "auto",
            device=device,
        ).to(device)
    # As users run it: bf16-mixed.
    autocast: Callable[[], Any] = nullcontext
    if low:
        autocast = partial(torch.autocast, device, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            drawn = 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(drawn)
    batch = random_batch(sizes)
    weights = torch.randn(batch.valid.shape, generator=generator) * batch.valid
    truth = measure(_in_float32(policy, folder), partial(own_logps, batch), weights)

    on_device = batch.to(torch.device(device))
    layouts: dict[str, Callable[[Policy], Tensor]] = {"own": partial(own_logps, on_device)}
    for exact in exact_layouts(policy.causal_lm):
        layouts[exact] = partial(_by_layout, on_device, exact, None)
        if exact != "separate":
            layouts[f"{exact}, 2 a pass"] = partial(_by_layout, on_device, exact, 2)
    yardstick: Errors | None = None
    for layout, compute in layouts.items():
        with notes.attempt(**case, layout=layout):
            began = time.perf_counter()
            with _log_lines() as lines, autocast(), AttentionOps() as ops, torch.no_grad():
                compute(policy)
            errors = measure(policy, compute, weights, autocast).against(truth, batch)
            if layout == "own":
                yardstick = errors
                ok = errors.gradient <= COARSEST
            else:
                ok = yardstick is not None and errors.within(yardstick, ROUNDING[precision])
            notes.add(
                **case,
                layout=layout,
                **errors._asdict(),
                ok=ok,
                kernels=ops.names(),
                said=[line for line in (*said, *lines) if "ttention" in line],
                seconds=round(time.perf_counter() - began, 2),
            )


class Errors(NamedTuple):
    """How far off: nats a token, and relative to the size of the true gradient.

    Attributes:
        value: mean over responses.
        worst_value: of the worst response.
        gradient: of all adapters together.
        worst_gradient: of the adapter that is furthest off.
    """

    value: float
    worst_value: float
    gradient: float
    worst_gradient: float

    def within(self, yardstick: "Errors", rounding: tuple[float, float]) -> bool:
        """Whether these are about as small as others; NaN is not."""
        value = max(TIMES[0] * yardstick.value, rounding[0])
        gradient = max(TIMES[1] * yardstick.gradient, rounding[1])
        return self.value <= value and self.gradient <= gradient


class Found(NamedTuple):
    """Log-probabilities (B, N), and gradients of a weighted sum of them by adapter; on the CPU."""

    logps: Tensor
    gradients: dict[str, Tensor]

    def against(self, truth: "Found", batch: GroupBatch) -> Errors:
        """Compare with what is right."""
        off = (self.logps - truth.logps).abs()[batch.valid] / batch.lengths[batch.valid]
        gaps = {n: float((g - truth.gradients[n]).norm()) for n, g in self.gradients.items()}
        sizes = {name: float(g.norm()) for name, g in truth.gradients.items()}
        whole = math.hypot(*gaps.values()) / math.hypot(*sizes.values())
        worst = max(gap / sizes[name] for name, gap in gaps.items() if sizes[name])
        return Errors(float(off.mean()), float(off.max()), whole, worst)


def measure(
    policy: Policy,
    compute: Callable[[Policy], Tensor],
    weights: Tensor,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Found:
    """Return log-probabilities, and gradients of their weighted sum."""
    policy.zero_grad()
    # Not around the backward pass: as Lightning has it.
    with autocast():
        logps = compute(policy)
    (logps * weights.to(logps)).sum().backward()  # type: ignore[no-untyped-call]
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    # An expert that no token was sent to has no gradient.
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained}
    return Found(
        logps.detach().double().cpu(), {n: g.double().cpu().clone() for n, g in gradients.items()}
    )


def own_logps(batch: GroupBatch, policy: Policy) -> Tensor:
    """Return the log-probability of each response by the model's own logits, row by row, (B, N)."""
    rows = []
    for span in batch.spans():
        prompt = batch.tokens[span.start : span.first_response]
        values = []
        for response in span.responses():
            ids = torch.cat([prompt, batch.tokens[response]])
            logits = policy.causal_lm(ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps = logits.float().log_softmax(-1)
            values.append(logps.gather(1, ids[len(prompt) :, None]).sum())
        padding = [torch.zeros_like(values[0])] * (batch.slots - len(values))
        rows.append(torch.stack([*values, *padding]))
    return torch.stack(rows)


def _by_layout(batch: GroupBatch, layout: Any, per_pass: int | None, policy: Policy) -> Tensor:
    policy.responses_per_pass = per_pass
    logps: Tensor = policy(batch, layout=layout)
    return logps


def _in_float32(policy: Policy, folder: Path) -> Policy:
    """Return the same policy in float32 on the CPU, in plain arithmetic."""
    plain = PolicyConfig(
        base=str(folder),
        dtype="float32",
        attn_implementation="eager",
        fast_linear=False,
        recompute_gated_mlps=False,
        lora=LoRA(r=8),
    )
    exact = build_policy(plain, "separate")
    values = dict(policy.named_parameters())
    for name, parameter in exact.named_parameters():
        parameter.data.copy_(_dequantised(values.pop(name)))
    if values:
        raise RuntimeError(f"float32 has no {sorted(values)[:3]}")
    return exact


def _dequantised(parameter: Any) -> Tensor:
    state = getattr(parameter, "quant_state", None)
    values: Tensor = parameter.detach()
    if state is not None:
        from bitsandbytes.functional import dequantize_4bit

        values = dequantize_4bit(values, state)
    return values.float().cpu()


def random_batch(sizes: Sizes) -> GroupBatch:
    """Return ragged groups of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> Tensor:
        return torch.randint(2, sizes.vocabulary, (length,), generator=generator)

    return GroupBatch.from_groups(
        [
            TokenGroup(ids(p), tuple(ids(r) for r in rs), tuple(map(float, range(len(rs)))), "gpu")
            for p, rs in sizes.groups
        ]
    )


class AttentionOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that compute attention, by name: which path a layout took."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "attention" in name or name == "_softmax":
            self._calls[name] += 1
        return func(*args, **(kwargs or {}))

    def names(self) -> dict[str, int]:
        """Return how often each was called; a softmax is attention in plain arithmetic."""
        return dict(self._calls)


@contextmanager
def _log_lines() -> Iterator[list[str]]:
    """Collect what is logged meanwhile."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    loggers = [logging.getLogger(n) for n in ("mpo_lightning", "lightning.pytorch")]
    handler = Keep(logging.INFO)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
