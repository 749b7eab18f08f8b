"""Check and measure the package on a CUDA device, in one run of 8 minutes.

Three parts: are values and gradients right in low precision, does a killed run resume under each
strategy, how fast is a step and what does it take. Each runs in processes of its own; what fails
there is written with its traceback, the rest goes on, and the exit status is 1 at the end. See
README.md in the folder above.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Row, Runner, Task
from benchmarks.gpu.report import draw, failures, markdown, name_of

RESULTS = Path(__file__).parent.parent / "results"
PARTS = ("strategies", "correctness", "speed")
# So many tasks that measure no time go side by side on a GPU.
AT_ONCE = 12
# What forked processes have loaded.
PRELOAD = [
    *("mpo_lightning.commands.run", "datasets", "peft", "torch.distributed.fsdp", "bitsandbytes"),
    *("transformers.models.llama.modeling_llama", "lightning.pytorch", "torch._dynamo"),
]


def tasks_of(part: str, folder: Path, *, tiny: bool, device: str) -> list[Task]:
    """Return the tasks of a part."""
    module: Any = import_module(f"benchmarks.gpu.{part}")
    if part == "correctness":
        tasks: list[Task] = module.tasks(tiny=tiny, device=device)
    else:
        tasks = module.tasks(folder / part, tiny=tiny, device=device)
    return tasks


def run(
    out: Path | None, *, tiny: bool, device: str, minutes: float, parts: Sequence[str], command: str
) -> Row:
    """Run the parts, and write the results after each.

    Args:
        out: folder of the results. Defaults to one by the device's name.
        tiny: whether models are to be tiny.
        device: "cuda" or "cpu".
        minutes: how long it may take; what would begin later is left out.
        parts: some of `PARTS`.
        command: how this was asked for, for the page.

    Raises:
        SystemExit: if there is no such device.
    """
    began = time.monotonic()
    rows: list[Row] = []
    results: Row = {"command": command, "rows": rows}

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    def take(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            state = "FAILED" if failures([row]) else "left out" if "left_out" in row else "done"
            say(f"{state}: {name_of(row)}")
        results["minutes"] = (time.monotonic() - began) / 60
        write(results, target)

    with tempfile.TemporaryDirectory(prefix="mpo-gpu-") as temporary:
        folder = Path(temporary)
        deadline = began + 60 * minutes
        runner = Runner(folder / "jobs", fork=device == "cpu", deadline=deadline)
        if device == "cpu":
            for name in PRELOAD:
                if find_spec(name.partition(".")[0]):
                    import_module(name)
        outcome = runner.run("benchmarks.gpu.jobs:look", {"device": device}, 120)
        if outcome.complaint():
            sys.exit(f"{device} does not work here. {outcome.complaint()}")
        (results["machine"],) = outcome.rows
        slug = re.sub(r"[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
        target = out or RESULTS / f"gpu-{slug}"
        # The longest first.
        untimed = [part for part in PARTS if part in parts and part != "speed"]
        tasks = [t for part in untimed for t in tasks_of(part, folder, tiny=tiny, device=device)]
        if device == "cpu":
            # Forked processes are not for several threads.
            for task in tasks:
                take(task(runner))
        else:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                for found in pool.map(lambda task: task(runner), tasks):
                    take(found)
        if "speed" in parts:
            for task in tasks_of("speed", folder, tiny=tiny, device=device):
                take(task(runner))
    take([])
    say(f"written to {target}")
    return results


def write(results: Row, out: Path) -> None:
    """Write the numbers, the page and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(markdown(results) + "\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        draw(results, out / "gpu.png")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: does it run at all")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.5, help="what it may take")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.out is None and (options.tiny or options.device == "cpu"):
        parser.error("--tiny and --device cpu need --out: their numbers mean nothing")
    # Nothing is fetched, and the libraries' own advice is not for a run like this.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    results = run(
        options.out,
        tiny=options.tiny,
        device=options.device,
        minutes=options.minutes,
        parts=options.parts,
        command=" ".join(["make gpu", *(sys.argv[1:] if arguments is None else arguments)]),
    )
    bad = len(failures(results["rows"]))
    if bad:
        sys.exit(f"{bad} failures; see gpu.md")


if __name__ == "__main__":
    main()
