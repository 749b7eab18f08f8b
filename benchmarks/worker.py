"""One method in a process of its own: does one optimizer step each time it is told to.

Started by `compute.py` as ``python -m benchmarks.worker SETTINGS.json``. Each line on standard
input means "go on"; each answer is one JSON object a line on what was standard output. Whatever
the libraries print goes to standard error.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks.workloads import (
    Shape,
    all_pairs,
    disjoint_pairs,
    read_in_training_order,
)

MIB = 2**20
Count = dict[str, int]


class Steps:
    """Waits for the parent before a step, and tells it afterwards what the step took."""

    def __init__(self, answers: TextIO, *, give_back: bool) -> None:
        self._answers = answers
        self._give_back = give_back
        self._began = 0.0
        self._first = True

    def say(self, **values: Any) -> None:
        """Send one answer."""
        print(json.dumps(values), file=self._answers, flush=True)

    def wait(self) -> None:
        """Block until the parent says go; end quietly where the parent has gone."""
        if not sys.stdin.readline():
            # The parent was interrupted: libraries would turn SystemExit into a stack trace.
            os._exit(1)

    def start(self) -> None:
        """Imports are done: wait until the others are not setting themselves up."""
        self.say(imported=True)
        self.wait()
        self._began = time.perf_counter()

    def begin(self) -> None:
        """Right before a step: forward, backward and optimizer are still to come."""
        if self._first:
            self._first = False
            _give_memory_back()
            setup = time.perf_counter() - self._began
            self.say(resident=_status("VmRSS"), setup_seconds=setup)
        self.wait()
        _forget_peak()
        self._began = time.perf_counter()

    def end(self, **values: Any) -> None:
        """Right after a step."""
        seconds = time.perf_counter() - self._began
        peak = _status("VmHWM")
        if self._give_back:
            _give_memory_back()
        self.say(seconds=seconds, peak=peak, **values)


def _status(field: str) -> float:
    """A field of /proc/self/status in MiB; where there is none, the peak of the whole process."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (MIB if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _forget_peak() -> None:
    """Let the peak start anew, so that it is that of the coming step; Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


class PeakMemory:
    """The most memory held since it was made: of this process, or of what torch has on a GPU.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            _forget_peak()

    def peak(self) -> float:
        """Return it in MiB."""
        return torch.cuda.max_memory_allocated() / MIB if self._on_gpu else _status("VmHWM")


def _give_memory_back() -> None:
    """Return free memory to the system, so that all the waiting workers fit side by side."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# ------------------------------------------------------------------------------------------ ours


def run_ours(settings: dict[str, Any], steps: Steps) -> None:
    """Train with PreferenceDataModule, MPOModule and Lightning's Trainer."""
    from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

    from mpo_lightning.batch import GroupBatch
    from mpo_lightning.data.datamodule import PreferenceDataModule
    from mpo_lightning.losses import MPO
    from mpo_lightning.model.loading import LoRA, PolicyConfig
    from mpo_lightning.training.module import MPOModule

    class StepByStep(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            steps.begin()

        def on_train_batch_end(
            self,
            trainer: Trainer,
            pl_module: LightningModule,
            outputs: Any,
            batch: Any,
            batch_idx: int,
        ) -> None:
            steps.end(**count(batch))

    def count(batch: GroupBatch) -> Count:
        lengths = batch.response_lengths[0]
        computed = len(batch.tokens)
        if settings["layout"] == "separate":
            computed = len(lengths) * (batch.prompt_lengths[0] + max(lengths))
        if settings["layout"] == "continued":
            computed = batch.prompt_lengths[0] + len(lengths) * max(lengths)
        return {"n": len(lengths), "scored": sum(lengths), "computed": computed}

    steps.start()
    seed_everything(0, verbose=False)
    # What a method leaves out keeps its default: the reference by switching the adapters off, all
    # responses of a group in one pass.
    options = {
        name: settings[name]
        for name in ("reference", "reference_cache", "responses_per_pass")
        if settings.get(name) is not None
    }
    module = MPOModule(
        policy=PolicyConfig(
            base=settings["base"],
            lora=LoRA(r=settings["shape"]["rank"]),
            fast_linear=settings.get("fast_linear", True),
        ),
        loss=MPO(beta=0.1, alpha=0.5),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0, fused=True),
        lr_scheduler=None,
        layout=settings["layout"],
        **options,
    )
    data = PreferenceDataModule(
        tokenizer=settings["base"],
        train=settings["rows"],
        groups_per_batch=1,
        max_length=settings.get("max_length") or 4096,
        over_long="cut",
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision="32-true",
        max_epochs=-1,
        max_steps=settings["steps"],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepByStep()],
    )
    trainer.fit(module, data)


# ------------------------------------------------------------------------------------------- TRL


def run_trl(settings: dict[str, Any], steps: Steps) -> None:
    """Train with TRL's DPOTrainer on pairs of the same file."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils as trl_utils

    # What the collator made of each step; it runs ahead of the steps, in their order.
    made: list[Count] = []

    class StepByStep(TrainerCallback):  # type: ignore[misc]
        optimizer_began = 0.0
        optimizer_seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            steps.begin()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.optimizer_began = time.perf_counter()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            self.optimizer_seconds = time.perf_counter() - self.optimizer_began

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.end(optimizer_seconds=self.optimizer_seconds, **made.pop(0))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            # The collator served the precomputed reference before.
            made.clear()

    if settings.get("scored_only"):
        # Off the GPU TRL puts every position through the head, prompts too; with this, those that
        # are scored, as it does on a GPU.
        trl_utils._use_triton = lambda device: True

    steps.start()
    rows = read_in_training_order(Path(settings["rows"]))
    pairs_of = all_pairs if settings.get("all_pairs") else disjoint_pairs
    pairs = [pair for row in rows for pair in pairs_of(row)]
    n = len(rows[0]["responses"])
    trainer = DPOTrainer(
        model=settings["base"],
        processing_class=AutoTokenizer.from_pretrained(settings["base"]),
        train_dataset=Dataset.from_list(pairs),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=settings["shape"]["rank"],
            lora_alpha=32,
            lora_dropout=0.0,
            target_modules="all-linear",
            bias="none",
        ),
        callbacks=[StepByStep()],
        args=DPOConfig(
            output_dir=settings["folder"],
            beta=0.1,
            per_device_train_batch_size=n // 2,
            precompute_ref_log_probs=bool(settings.get("precomputed")),
            max_steps=settings["steps"],
            # Not TRL's defaults, and the same for both sides:
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            max_length=settings.get("max_length"),
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            # Nothing but training:
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
    )
    collate: Callable[[list[Any]], dict[str, Any]] = trainer.data_collator

    def counting(examples: list[Any]) -> dict[str, Any]:
        batch = collate(examples)
        scored = int(batch["completion_mask"].sum())
        made.append({"n": n, "scored": scored, "computed": batch["input_ids"].numel()})
        return batch

    trainer.data_collator = counting
    trainer.train()


# ------------------------------------------------------------------------------- matrix products


def run_matmul(settings: dict[str, Any], steps: Steps) -> None:
    """The machine's rate: fp32 products of the shapes that the shared layout multiplies."""
    shape = Shape(**settings["shape"])
    steps.start()
    prompt, responses = settings["groups"][0]
    scored = sum(responses)
    tokens = prompt + scored
    sizes = [(tokens, a, b) for a, b in shape.linears()] * 2
    sizes.append((scored, shape.hidden, shape.vocabulary))
    operations = 2 * sum(rows * a * b for rows, a, b in sizes)
    from mpo_lightning.model.fast_linear import onednn_is_faster

    # The faster of PyTorch's two libraries for it; torch.mm takes the other.
    fast = onednn_is_faster()
    left = {(rows, a): torch.randn(rows, a) for rows, a, _ in sizes}
    right = {(a, b): torch.randn(b, a) for _, a, b in sizes}
    for _ in range(settings["steps"]):
        steps.begin()
        for rows, a, b in sizes:
            if fast:
                torch.ops.mkldnn._linear_pointwise(left[rows, a], right[a, b], None, "none", [], "")
            else:
                torch.mm(left[rows, a], right[a, b].t())
        steps.end(operations=operations)


SIDES: dict[str, Callable[[dict[str, Any], Steps], None]] = {
    "ours": run_ours,
    "trl": run_trl,
    "matmul": run_matmul,
}


def main() -> None:
    """Run the side that the settings name."""
    settings: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    # The answers keep the real standard output; whatever else prints goes to the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    steps = Steps(answers, give_back=settings.get("give_back", False))
    SIDES[settings["side"]](settings, steps)


if __name__ == "__main__":
    main()
