"""Trials in which a process of a run is killed at a random time: ``python -m tests.kill_trials``.

Each starts a run as users do, kills one of its two processes (SIGKILL) and measures how long the
last process of the run lives on. The suite has the short form, `tests/training/test_processes.py`.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import example_rows, make_tokenizer, tiny_model, write_rows
from tests.runs import OVERLAYS, ROOT, write_recipe

# Seconds after which a run is taken to hang.
LONGEST = 60.0
SCRIPT = """
import sys
from lightning.pytorch import Trainer
from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.losses import MPO
from mpo_lightning.strategy import FSDP2

base, train, root, strategy = sys.argv[1:]
loss = MPO()
module = MPOModule(policy=PolicyConfig(base=base, lora=LoRA(r=4)), loss=loss)
data = PreferenceDataModule(
    tokenizer=base, train=train, loss=loss, groups_per_batch=1, num_workers=1
)
Trainer(
    accelerator="cpu", devices=2, strategy="ddp" if strategy == "ddp" else FSDP2(),
    max_epochs=100000, default_root_dir=root, enable_progress_bar=False,
).fit(module, data)
"""


def members(mark: str) -> Iterator[tuple[int, str | None]]:
    """Living processes of a trial, with the local rank that each was started with."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            ended = stat.read_text(encoding="utf-8").rpartition(") ")[2].startswith("Z")
            variables = (stat.parent / "environ").read_bytes().decode().split("\0")
        except OSError:
            continue
        given = dict(each.split("=", 1) for each in variables if "=" in each)
        if given.get("TRIAL") == mark and not ended:
            yield int(stat.parent.name), given.get("LOCAL_RANK")


def rank_process(started: int, mark: str, launcher: str, rank: int) -> int | None:
    """The process of a rank, if it has been started."""
    if rank == 0 and launcher != "torchrun":
        return started
    # Its data workers, which it has started, come after it.
    found = sorted(process for process, of in members(mark) if of == str(rank))
    return found[0] if found else None


def command(launcher: str, strategy: str, folder: Path, root: Path) -> list[str]:
    """The command line of a run without end."""
    if launcher == "script":
        script = folder / "train_it.py"
        script.write_text(SCRIPT, encoding="utf-8")
        return [
            *(sys.executable, str(script), str(folder / "base"), str(folder / "groups.jsonl")),
            *(str(root), strategy),
        ]
    python = [sys.executable]
    if launcher == "torchrun":
        torchrun = ["torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
        python += ["-m", *torchrun, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return [
        *(*python, "-m", "mpo_lightning", "fit", "--config", str(folder / "recipe.yaml")),
        *(*OVERLAYS[strategy], f"--trainer.default_root_dir={root}"),
    ]


def trial(launcher: str, strategy: str, rank: int, after: float, folder: Path) -> str:
    """Kill a rank so many seconds after its start, and report how the run ended."""
    root = Path(tempfile.mkdtemp(dir=folder))
    with (root / "output").open("wb") as output:
        started = subprocess.Popen(
            command(launcher, strategy, folder, root),
            stdout=output,
            stderr=output,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
                "TRIAL": str(root),
            },
        )
        mark = str(root)
        # Both are there: before, there is no run of two processes.
        while started.poll() is None and rank_process(started.pid, mark, launcher, 1) is None:
            time.sleep(0.05)
        time.sleep(after)
        victim = rank_process(started.pid, mark, launcher, rank)
        assert victim is not None, (root / "output").read_text(encoding="utf-8")
        os.kill(victim, signal.SIGKILL)
        begin = time.monotonic()
        while any(members(mark)) and time.monotonic() - begin < LONGEST:
            started.poll()
            time.sleep(0.05)
        lived = time.monotonic() - begin
        for process, _ in list(members(mark)):
            os.kill(process, signal.SIGKILL)
        started.wait()
    text = (root / "output").read_text(encoding="utf-8", errors="replace")
    trained = list(root.rglob("metrics.csv"))
    said = [line for line in text.splitlines() if "has died" in line or "terminated with" in line]
    said += [line for line in text.splitlines() if "exitcode" in line]
    stage = "training" if trained else "before training"
    return f"{lived:6.2f} s  {stage:15}  {'; '.join(said)[:150] or 'NOTHING SAID ' + text[-300:]}"


def main() -> None:
    """Run the trials and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2, help="of each launcher, strategy and rank")
    parser.add_argument("--launchers", nargs="+", default=["lightning", "script", "torchrun"])
    parser.add_argument("--longest", type=float, default=20, help="seconds up to the kill")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = str(folder / "base")
        tiny_model().save_pretrained(base)
        make_tokenizer().save_pretrained(base)
        train = write_rows(folder / "groups.jsonl", example_rows(11))
        write_recipe(
            folder, base, train, trainer={"max_epochs": 100_000}, data={"groups_per_batch": 1}
        )
        for number in range(given.trials):
            for launcher in given.launchers:
                for strategy in ("ddp", "fsdp2"):
                    for rank in (0, 1):
                        after = chance.uniform(0, given.longest)
                        result = trial(launcher, strategy, rank, after, folder)
                        what = (
                            f"{number} {launcher:9} {strategy:5} rank {rank} after {after:4.1f} s"
                        )
                        print(f"{what}: {result}", flush=True)


if __name__ == "__main__":
    main()
