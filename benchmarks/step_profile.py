"""Where the time of a step goes: products, attention, head, elementwise, optimizer, Python.

python -m benchmarks.step_profile [--prompt 128] [--response 128] [-n 8] [--threads 1] [--out FILE]

One group, the shared prompt, the reference known, on CPU. The processor's rate of bare products is
measured between the steps, as in the benchmark.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from benchmarks.flops import step_flops
from benchmarks.workloads import Shape, build_base
from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.model.fast_linear import matmul
from mpo_lightning.model.loading import LoRA, PolicyConfig, build_policy

__all__ = ["Steps", "main", "parts_of"]

PARTS = ("products", "attention", "head", "elementwise", "optimizer", "Python")
# Calls whose insides belong together, by how they begin.
WITHIN = {
    "_RaggedAttention": "attention",
    "_FrozenHead": "head",
    "Optimizer.": "optimizer",
    "aten::_foreach": "optimizer",
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise")


class Steps:
    """Training steps on one group of random tokens.

    Args:
        shape: sizes of the model.
        prompt: tokens of the prompt.
        responses: tokens of each response.
    """

    def __init__(self, shape: Shape, prompt: int, responses: Sequence[int]) -> None:
        self.shape, self.prompt, self.responses = shape, prompt, list(responses)
        with tempfile.TemporaryDirectory() as folder:
            build_base(Path(folder), shape)
            config = PolicyConfig(base=folder, lora=LoRA(r=shape.rank))
            self.policy = build_policy(config, "shared")
        generator = torch.Generator().manual_seed(0)

        def tokens(count: int) -> torch.Tensor:
            return torch.randint(2, shape.vocabulary, (count,), generator=generator)

        scores = tuple(float(score) for score in range(len(responses)))
        group = TokenGroup(tokens(prompt), tuple(map(tokens, responses)), scores, "profile:1")
        self.batch = GroupBatch.from_groups([group])
        self.trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def step(self) -> None:
        """Forward, backward, clipping and update."""
        self.optimizer.zero_grad()
        logps = self.policy(self.batch)
        (logps * torch.linspace(-1, 1, logps.shape[1])).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()

    def rate(self) -> float:
        """Rate of bare products in the shapes of the frozen layers, FLOP/s."""
        tokens = self.prompt + sum(self.responses)
        done, began = 0, time.perf_counter()
        for inputs, outputs in 3 * self.shape.linears():
            matmul(torch.zeros(tokens, inputs), torch.zeros(outputs, inputs))
            done += 2 * tokens * inputs * outputs
        return done / (time.perf_counter() - began)


def _part(event: Any) -> str:
    around: Any = event
    while around is not None:
        for start, part in WITHIN.items():
            if around.name.startswith(start):
                return part
        around = around.cpu_parent
    if event.name in PRODUCTS:
        return "products"
    return "elementwise" if event.name.startswith("aten::") else "Python"


def parts_of(steps: Steps, count: int = 3) -> dict[str, float]:
    """Return the share of each part in the time of steps."""
    with profile() as profiled:
        began = time.perf_counter()
        for _ in range(count):
            steps.step()
        seconds = time.perf_counter() - began
    found = dict.fromkeys(PARTS, 0.0)
    for event in profiled.events() or []:
        found[_part(event)] += event.self_cpu_time_total / 1e6
    # Between calls into torch.
    found["Python"] += max(0.0, seconds - sum(found.values()))
    return {part: found[part] / sum(found.values()) for part in PARTS}


def main(arguments: Sequence[str] | None = None, shape: Shape | None = None) -> None:
    """Measure and print, or write, the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("-n", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    steps = Steps(shape or Shape(), options.prompt, [options.response] * options.n)
    need = step_flops(steps.shape, steps.prompt, steps.responses)
    steps.step()
    shares = []
    for _ in range(options.rounds):
        before = steps.rate()
        began = time.perf_counter()
        steps.step()
        seconds = time.perf_counter() - began
        shares.append(need.total / seconds / ((before + steps.rate()) / 2))
    parts = parts_of(steps)
    needed = {
        "products": need.base + need.adapters,
        "attention": need.attention,
        "head": need.head,
    }
    lines = [
        f"n = {options.n}, {options.prompt}:{options.response} tokens, threads: {options.threads}. "
        f"Share of the rate of bare products: {statistics.median(shares):.2f} "
        f"({min(shares):.2f} to {max(shares):.2f} in {options.rounds} steps).",
        "",
        "| part | share of the time | share of the arithmetic |",
        "| --- | --- | --- |",
        *(
            f"| {part} | {share:.3f} | {needed.get(part, 0) / need.total:.3f} |"
            for part, share in parts.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
