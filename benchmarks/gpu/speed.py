"""Seconds and memory of a step of a Llama-3-8B shape with random weights, beside TRL's.

Each method has a process and a model of its own, and goes through the groups one after the other:
for 8 responses a warm-up, counted steps and one under the profiler, for more one step. A step is
forward, backward, clipping and optimizer, on one group, in bfloat16 autocast, with the reference
known beforehand; neither Lightning nor the transformers Trainer is around it. TRL's is
`DPOTrainer`'s own loss on n/2 disjoint pairs of the same responses.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.flops import step_flops
from benchmarks.gpu.jobs import Notes, Row, Runner, Task
from benchmarks.worker import PeakMemory
from benchmarks.workloads import EOS, Shape, build_tokenizer, disjoint_pairs, make_rows
from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.losses import MPO
from mpo_lightning.model.loading import LoRA, PolicyConfig, build_policy

__all__ = ["measure_ours", "measure_trl", "tasks", "write_base"]

# Left for what comes after the last step that may begin.
MARGIN = 10.0
# Responses a pass where a group of 32 would not fit otherwise; TRL would accumulate gradients.
PER_PASS = 8
WORDS = 2000
# Computes what is known before a step, and returns the forward pass to the loss.
Prepare = Callable[[], Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class LlamaShape(Shape):
    """A Llama whose keys and values have fewer heads than its queries."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    key_value_heads: int = 8
    vocabulary: int = 128256

    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's linear layers; the first three are q, k, v."""
        h, i = self.hidden, self.intermediate
        kv = h * self.key_value_heads // self.heads
        return [(h, h), (h, kv), (h, kv), (h, h), (h, i), (h, i), (i, h)]


TINY = LlamaShape(
    layers=2, hidden=64, intermediate=176, heads=4, key_value_heads=2, vocabulary=WORDS, rank=4
)


class Cell(NamedTuple):
    """A group that is measured: its responses, their ratio to the prompt, and counted steps."""

    n: int
    ratio: str
    prompt: int
    response: int
    steps: int

    def named(self) -> Row:
        """Return what names it in the results."""
        return {"n": self.n, "ratio": self.ratio, "tokens": f"{self.prompt}:{self.response}"}


LENGTHS = {"4:1": (1024, 256), "1:1": (512, 512), "1:4": (256, 1024)}


def cells(*, tiny: bool) -> list[Cell]:
    """Return the groups, smallest first."""
    if tiny:
        return [Cell(8, "4:1", 32, 8, 1), Cell(32, "1:1", 8, 8, 1)]
    return [
        Cell(n, ratio, prompt, response, 3 if n == PER_PASS else 1)
        for n in (PER_PASS, 32)
        for ratio, (prompt, response) in LENGTHS.items()
    ]


def tasks(folder: Path, *, tiny: bool, device: str) -> list[Task]:
    """Return the methods, the most telling first, and before them what writes their base.

    Args:
        folder: where the base goes: 16 GB.
        tiny: whether the model is to be tiny, and the methods few.
        device: "cuda" or "cpu".
    """
    common: Row = {"folder": str(folder), "tiny": tiny, "device": device}
    jobs: list[tuple[str, str, Row]] = [("base", "write_base", {})]

    def ours(precision: str, layout: str, *, by_masks: bool = False) -> None:
        settings = {"precision": precision, "layout": layout, "by_masks": by_masks}
        name = f"{layout} by masks" if by_masks else layout
        jobs.append((f"ours, {name}, {precision}", "measure_ours", settings))

    if tiny:
        ours("nf4", "shared")
        ours("bf16", "separate")
    else:
        ours("bf16", "shared")
        ours("bf16", "separate")
    # After ours in bfloat16, which it is compared with.
    jobs.append(("TRL, bf16", "measure_trl", {}))
    ours("bf16", "shared", by_masks=True)
    if not tiny:
        ours("nf4", "shared")
        ours("nf4", "separate")

    def task(name: str, function: str, settings: Row, runner: Runner) -> list[Row]:
        left = runner.deadline - time.monotonic()
        if left < 2 * MARGIN:
            return [{"part": "speed", "method": name, "left_out": "no time was left"}]
        settings = {**common, **settings, "seconds": left - MARGIN}
        outcome = runner.run(f"benchmarks.gpu.speed:{function}", settings, left)
        rows = [{"part": "speed", "method": name, **row} for row in outcome.rows]
        if outcome.complaint():
            rows.append({"part": "speed", "method": name, "error": outcome.complaint()})
        return rows

    return [partial(task, *job) for job in jobs]


# ------------------------------------------------------------------------------- in the process


def write_base(settings: Row, notes: Notes) -> None:
    """Write the model in bfloat16, drawn on the device, and a tokenizer of one token a word."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = shape_of(settings)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(settings["device"]):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    base = Path(settings["folder"]) / "base"
    model.save_pretrained(base)
    build_tokenizer(base, WORDS)


def shape_of(settings: Row) -> LlamaShape:
    """Return the sizes of the model."""
    return TINY if settings["tiny"] else LlamaShape()


def measure_ours(settings: Row, notes: Notes) -> None:
    """Note a row for each group: seconds, memory, and where the time goes."""
    if settings["precision"] == "nf4" and find_spec("bitsandbytes") is None:
        notes.add(left_out="bitsandbytes is not there")
        return
    if settings["by_masks"]:
        # As where no kernel computes ragged attention.
        patch("mpo_lightning.model.attention.kernels_for", return_value=None).start()
    began = time.monotonic()
    shape, device = shape_of(settings), settings["device"]
    policy = build_policy(
        PolicyConfig(
            base=str(Path(settings["folder"]) / "base"),
            dtype="bfloat16",
            quantization="nf4" if settings["precision"] == "nf4" else "none",
            lora=LoRA(r=shape.rank),
        ),
        settings["layout"],
        device=device,
    ).to(device)
    stepper = Stepper(policy, device, notes, began + settings["seconds"])
    loss = MPO(beta=0.1)

    def loss_of(batch: GroupBatch, reference: Tensor) -> Tensor:
        return loss(policy(batch) - reference, batch.scores, batch.valid).mean()

    for cell in cells(tiny=settings["tiny"]):
        batch = group_of(cell).to(torch.device(device))
        for per_pass in [None] if cell.n <= PER_PASS else [PER_PASS, None]:
            if per_pass is None and cell.n > PER_PASS and settings["layout"] == "separate":
                # 41,000 tokens keep more than 200 GB.
                continue
            policy.responses_per_pass = per_pass

            def prepare(batch: GroupBatch = batch) -> Callable[[], Tensor]:
                return partial(loss_of, batch, policy.reference(batch))

            row = {"responses_per_pass": per_pass}
            flops = step_flops(shape, cell.prompt, [cell.response] * cell.n).total
            for found in stepper.measure(cell, row, prepare):
                rate = matrix_rate(shape, cell, device)
                share = flops / found["seconds"] / rate
                notes.add(**found, needed_flop=flops, matrix_rate=rate, share_of_rate=share)


def measure_trl(settings: Row, notes: Notes) -> None:
    """Note a row for each group of 8 that TRL computes; more are micro-batches of these."""
    if find_spec("trl") is None or find_spec("datasets") is None:
        notes.add(left_out="TRL is not there")
        return
    began = time.monotonic()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    shape, device = shape_of(settings), settings["device"]
    base = str(Path(settings["folder"]) / "base")
    chosen = [cell for cell in cells(tiny=settings["tiny"]) if cell.n == PER_PASS]
    pairs = [pair for cell in chosen for pair in disjoint_pairs(row_of(cell))]
    trainer = DPOTrainer(
        model=base,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(pairs),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=shape.rank, lora_alpha=32, target_modules="all-linear"
        ),
        args=DPOConfig(
            output_dir=str(Path(settings["folder"]) / "trl"),
            beta=0.1,
            per_device_train_batch_size=PER_PASS // 2,
            model_init_kwargs={"dtype": "bfloat16", "device_map": {"": device}},
            bf16=True,
            use_cpu=device == "cpu",
            max_length=None,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    model = trainer.model.train()
    stepper = Stepper(model, device, notes, began + settings["seconds"])
    for number, cell in enumerate(chosen):
        of_cell = range(number * PER_PASS // 2, (number + 1) * PER_PASS // 2)
        examples = [trainer.train_dataset[index] for index in of_cell]
        batch = {n: v.to(device) for n, v in trainer.data_collator(examples).items()}
        scored = int(batch["completion_mask"].sum())
        if scored != cell.n * cell.response:
            raise RuntimeError(f"TRL scores {scored} tokens of {cell}.")

        def prepare(batch: dict[str, Tensor] = batch) -> Callable[[], Tensor]:
            names = ("ref_chosen_logps", "ref_rejected_logps")
            found = trainer.compute_ref_log_probs(model, batch)
            known = {**batch, **dict(zip(names, found, strict=True))}
            return partial(trainer.compute_loss, model, known)

        # As with precompute_ref_log_probs=True, which would hash all the weights first.
        trainer.precompute_ref_logps = True
        for found in stepper.measure(cell, {}, prepare):
            notes.add(**found)


class Stepper:
    """Does optimizer steps on a model and measures them.

    Args:
        model: what is trained, its adapters alone.
        device: "cuda" or "cpu".
        notes: takes what went wrong, and what was left out.
        until: after which no step begins, `time.monotonic`.
    """

    def __init__(self, model: Any, device: str, notes: Notes, until: float) -> None:
        self._device = device
        self._notes = notes
        self._until = until
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-5, fused=True)

    def measure(self, cell: Cell, row: Row, prepare: Prepare) -> Iterator[Row]:
        """Yield the row with what was measured, if it was.

        Args:
            cell: the group; steps on one of 8 are warmed up and looked into. Those on more take
                long, and the reference has passed through the model before.
            row: what else names it.
            prepare: computes what is known before a step; returns the loss's forward pass.
        """
        row = {**cell.named(), **row}
        with self._notes.attempt(**row):
            try:
                found = self._measure(cell.steps, prepare, small=cell.n == PER_PASS)
            except torch.OutOfMemoryError:
                found = {"left_out": "it takes more memory than there is"}
            if "seconds" in found:
                yield {**row, **found}
            else:
                self._notes.add(**row, **found)
        # What a step that ran out of memory left.
        self._optimizer.zero_grad()
        gc.collect()
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def _measure(self, steps: int, prepare: Prepare, *, small: bool) -> Row:
        if time.monotonic() > self._until:
            return {"left_out": "no time was left"}
        with torch.autocast(self._device, dtype=torch.bfloat16):
            forward = prepare()
        if small:
            self._step(forward)
        seconds: list[float] = []
        memory = PeakMemory(self._device)
        while len(seconds) < steps and (not seconds or time.monotonic() < self._until):
            began = time.perf_counter()
            self._step(forward)
            seconds.append(time.perf_counter() - began)
        found: Row = {
            "seconds": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "steps": len(seconds),
            "peak_mib": round(memory.peak()),
        }
        if small and time.monotonic() < self._until:
            found["time_in"] = time_in_kernels(partial(self._step, forward), self._device)
        return found

    def _step(self, forward: Callable[[], Tensor]) -> None:
        with torch.autocast(self._device, dtype=torch.bfloat16):
            loss = forward()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._device == "cuda":
            torch.cuda.synchronize()


# A kernel is of the first of these that has a part of its name.
KINDS = {
    "attention": ("attention", "flash", "fmha"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "::mm", "::addmm", "linear"),
}


def time_in_kernels(step: Callable[[], None], device: str) -> dict[str, float]:
    """Return what part of a step's time in kernels falls to attention, products and the rest."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
    sums = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        kind = next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "rest")
        sums[kind] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    whole = sum(sums.values()) or 1.0
    return {kind: round(value / whole, 4) for kind, value in sums.items()}


def matrix_rate(shape: LlamaShape, cell: Cell, device: str) -> float:
    """Return the rate of bare bfloat16 products in the shared layout's shapes, FLOP/s."""
    tokens = cell.prompt + min(cell.n, PER_PASS) * cell.response
    sizes = [(tokens, a, b) for a, b in shape.linears()]
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    left = {a: torch.randn(tokens, a, **options) for _, a, _ in sizes}
    right = [torch.randn(b, a, **options) for _, a, b in sizes]

    def products() -> None:
        for (_, a, _), weight in zip(sizes, right, strict=True):
            torch.mm(left[a], weight.t())
        if device == "cuda":
            torch.cuda.synchronize()

    products()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        products()
        seconds.append(time.perf_counter() - began)
    return 2 * sum(rows * a * b for rows, a, b in sizes) / statistics.median(seconds)


def row_of(cell: Cell) -> Row:
    """Return a group of random words, of exactly these lengths once it is tokenised."""
    (row,) = make_rows(((cell.prompt, (cell.response,) * cell.n),), WORDS)
    return row


def group_of(cell: Cell) -> GroupBatch:
    """Return the same group as token ids."""
    row = row_of(cell)

    def ids(text: str) -> Tensor:
        return torch.tensor([1 if word == EOS else int(word[1:]) for word in text.split()])

    responses = tuple(ids(f"{text} {EOS}") for text in row["responses"])
    group = TokenGroup(ids(row["prompt"]), responses, tuple(row["scores"]), "gpu")
    return GroupBatch.from_groups([group])
