"""Measurements to numbers, tables and a picture."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.flops import step_flops
from benchmarks.workloads import Shape, Workload
from mpo_lightning.markdown import table

__all__ = ["draw", "markdown", "spread", "summarise", "summarise_real", "summarise_sweep"]

# What the tables call each method, in their order.
TITLES = {
    "trl": "TRL",
    "trl-precomputed": "TRL, reference precomputed",
    "trl-scored-only": "TRL, head on responses only",
    "trl-all-pairs": "TRL, all pairs",
    "separate": "ours, separate rows",
    "shared": "ours, shared prompt",
    "shared-cached": "ours, shared, reference cached",
    "continued": "ours, cache continued",
    "shared-plain": "ours, shared, torch's layers",
    "shared-cached-plain": "ours, shared, torch's layers, reference cached",
}
SWEEP_TITLES = {"passes": "8 responses a pass", "at-once": "all at once"}
SPEEDUPS = {
    "speedup_vs_trl": ("trl", "shared"),
    "speedup_vs_trl_precomputed": ("trl-precomputed", "shared-cached"),
    "speedup_vs_trl_scored_only": ("trl-scored-only", "shared"),
    "speedup_vs_trl_all_pairs": ("trl-all-pairs", "shared"),
    "speedup_vs_separate": ("separate", "shared"),
}
HYBRID_SPEEDUP = {"speedup_continued": ("separate", "continued")}
# With the same products on both sides; on real work only.
PLAIN_SPEEDUPS = {
    "speedup_vs_trl_plain": ("trl", "shared-plain"),
    "speedup_vs_trl_precomputed_plain": ("trl-precomputed", "shared-cached-plain"),
}

Measured = dict[str, Any]
Stat = dict[str, Any]


def spread(values: Sequence[float], digits: int = 4) -> Stat:
    """Median, least and greatest."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "rounds": len(values),
    }


def step_seconds(method: str, measured: Measured, n: int) -> list[float]:
    """Seconds of each counted optimizer step.

    On all pairs one micro-batch of n/2 pairs was measured, with an optimizer step of its own. The
    whole step has n/2 such micro-batches and one optimizer step.
    """
    seconds: list[float] = measured["seconds"]
    if method != "trl-all-pairs":
        return seconds
    parts = zip(seconds, measured["optimizer_seconds"], strict=True)
    return [(whole - last) * (n // 2) + last for whole, last in parts]


def summarise(workload: Workload, shape: Shape, measured: dict[str, Measured]) -> dict[str, Any]:
    """One row of the results: medians over the counted rounds, with their least and greatest.

    A speed-up is the median of the rounds' own: within a round all methods train on the same group,
    one right after the other.
    """
    methods = {name: measured[name] for name in TITLES if name in measured}
    seconds = {name: step_seconds(name, values, workload.n) for name, values in methods.items()}
    lengths = [length for _, responses in workload.groups for length in responses]
    row: dict[str, Any] = {
        "workload": workload.name,
        "n": workload.n,
        "prompt_response": workload.ratio,
        "prompt_tokens": statistics.median(prompt for prompt, _ in workload.groups),
        "response_tokens": statistics.median(lengths),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "scaled": [name for name in methods if name == "trl-all-pairs"],
        "peak_mib": {name: spread(values["peak"], 0) for name, values in methods.items()},
        "above_start_mib": {
            name: spread([peak - values["resident"] for peak in values["peak"]], 0)
            for name, values in methods.items()
        },
        "setup_seconds": {n: round(v["setup_seconds"], 1) for n, v in methods.items()},
        "computed_tokens": {n: v["computed"] for n, v in methods.items()},
    }
    for key, (slow, fast) in {**SPEEDUPS, **HYBRID_SPEEDUP, **PLAIN_SPEEDUPS}.items():
        if slow in seconds and fast in seconds:
            # One of them may have fewer rounds; they begin with the same one.
            pairs = zip(seconds[slow], seconds[fast], strict=False)
            values = spread([a / b for a, b in pairs], 2)
            row[key] = values["median"]
            row[f"{key}_range"] = [values["min"], values["max"]]
    if "trl" in methods and "shared" in methods:
        for key, of in (("memory_vs_trl", "peak_mib"), ("above_start_vs_trl", "above_start_mib")):
            row[key] = round(row[of]["shared"]["median"] / row[of]["trl"]["median"], 3)
    if "matmul" in measured:
        rates = [measured["matmul"]["operations"] / s for s in measured["matmul"]["seconds"]]
        row["matmul_gflops"] = spread([rate / 1e9 for rate in rates], 1)
        if "shared-cached" in seconds:
            row |= _share(workload, shape, seconds["shared-cached"], rates)
    return row


def _share(
    workload: Workload, shape: Shape, seconds: Sequence[float], rates: Sequence[float]
) -> dict[str, Any]:
    """What part of the rate of bare matrix products the step reaches, round by round."""
    needed = [
        # The first round of all is the warm-up, which is not among the seconds.
        step_flops(shape, *workload.groups[(1 + number) % len(workload.groups)]).total
        for number in range(len(seconds))
    ]
    shares = [f / (s * rate) for f, s, rate in zip(needed, seconds, rates, strict=True)]
    return {
        "needed_gflop": round(statistics.median(needed) / 1e9, 1),
        "share_of_matmul_rate": spread(shares, 3),
    }


def summarise_sweep(measured: dict[str, Measured]) -> list[dict[str, Any]]:
    """One row for each n: seconds and peak memory with and without limited passes."""
    rows: dict[int, dict[str, Any]] = {}
    for name, values in measured.items():
        for n in dict.fromkeys(values["n"]):
            at = [index for index, found in enumerate(values["n"]) if found == n]
            peaks = [values["peak"][index] for index in at]
            rows.setdefault(n, {"n": n})[name] = {
                "seconds": spread([values["seconds"][index] for index in at]),
                "peak_mib": spread(peaks, 0),
                "above_start_mib": spread([peak - values["resident"] for peak in peaks], 0),
            }
    return [rows[n] for n in sorted(rows)]


def summarise_real(found: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """What real work took, and what it was: lengths in tokens, and where the responses are from."""
    groups = tuple((prompt, tuple(responses)) for prompt, responses in found["lengths"])
    workload = Workload(name="real", groups=groups, ratio="real", rounds=1)
    row = summarise(workload, shape, found["measured"])
    limits = {name: found["settings"][name] for name in ("max_length", "n")}
    return {**row, **limits, "source": found["source"], "lengths": found["lengths"]}


# -------------------------------------------------------------------------------------- Markdown


def _stat(value: Stat | None, digits: int) -> str:
    if value is None:
        return ""
    text = f"{value['median']:.{digits}f}"
    if value["rounds"] == 1:
        return text
    return f"{text} ({value['min']:.{digits}f} to {value['max']:.{digits}f})"


def _named(row: dict[str, Any]) -> list[str]:
    tokens = f"{row['prompt_tokens']:.0f}:{row['response_tokens']:.0f}"
    return [str(row["n"]), f"{row['prompt_response']} ({tokens})"]


def _ratio(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    least, most = row[f"{key}_range"]
    return f"{row[key]:.2f} ({least:.2f} to {most:.2f})"


def _by_method(rows: Sequence[dict[str, Any]], key: str, cell: Callable[[str, Any], str]) -> str:
    used = [name for name in TITLES if any(name in row[key] for row in rows)]
    body = [
        [*_named(row), *(cell(name, row[key][name]) if name in row[key] else "" for name in used)]
        for row in rows
    ]
    return table(["n", "prompt:response", *(TITLES[name] for name in used)], body) + "\n"


def markdown(results: dict[str, Any]) -> str:
    """The results as a page."""
    rows, sweep = results["rows"], results["sweep"]
    parts = [
        "# Seconds and memory per optimizer step\n",
        f"Made by `{results['command']}` in {results['minutes']:.0f} minutes. "
        "What is compared, and how fairly, is told in [../README.md](../README.md).\n",
        table(
            ["what", ""],
            [[name, str(value)] for name, value in results["machine"].items()],
        )
        + "\n",
        "Median (least to greatest) over the counted rounds; a round is one optimizer step of each "
        "method on the same group.\n",
    ]
    if rows:
        parts += [
            "## Speed-up of the shared prompt\n",
            "Against TRL on n/2 disjoint pairs; the reference is computed in the step on both "
            "sides, or known beforehand on both sides. *Share*: part of this machine's rate of "
            "bare fp32 matrix products that the step with the cached reference reaches, counting "
            "only the arithmetic that it needs.\n",
            table(
                [
                    *["n", "prompt:response", "vs TRL", "both with known reference"],
                    *["vs TRL, head on responses only", "vs TRL, all pairs*"],
                    *["vs own separate rows", "peak memory / TRL's", "above start / TRL's"],
                    *["products, GFLOP/s", "share", "rounds"],
                ],
                [
                    [
                        *_named(row),
                        *(_ratio(row, key) for key in SPEEDUPS),
                        *(f"{row[k]:.2f}" if k in row else "" for k in MEMORY_RATIOS),
                        _stat(row.get("matmul_gflops"), 0),
                        _stat(row.get("share_of_matmul_rate"), 2),
                        str(max(value["rounds"] for value in row["seconds"].values())),
                    ]
                    for row in rows
                ],
            )
            + "\n",
            "\\* scaled: one micro-batch of n/2 pairs was measured, times the n/2 micro-batches of "
            "the step.\n",
            "## Seconds per optimizer step\n",
            _by_method(
                rows,
                "seconds",
                lambda name, value: _stat(value, 2) + ("*" if name == "trl-all-pairs" else ""),
            ),
            "## Peak resident memory of a step, MiB\n",
            "Of the whole process, libraries included. The second table is above what was resident "
            "right before the first step. On all pairs it is that of one micro-batch.\n",
            _by_method(rows, "peak_mib", lambda _, value: f"{value['median']:.0f}"),
            _by_method(rows, "above_start_mib", lambda _, value: f"{value['median']:.0f}"),
            "## Seconds from a loaded interpreter to the first step\n",
            "Model, tokenizer, data; with a known reference also computing it for the file's "
            "groups (two where all are alike, as many as steps in the ragged file).\n",
            _by_method(rows, "setup_seconds", lambda _, value: f"{value:.1f}"),
        ]
    if results["hybrids"]:
        parts += [
            "## A hybrid of recurrent layers and attention\n",
            "The prompt once and its cache continued, against separate rows; the reference is "
            "computed in the step.\n",
            table(
                [
                    *["n", "prompt:response", "speed-up"],
                    *(f"{TITLES[name]}: {what}" for what in HYBRID_COLUMNS for name in HYBRID),
                ],
                [
                    [
                        *_named(row),
                        _ratio(row, "speedup_continued"),
                        *(_stat(row["seconds"].get(name), 2) for name in HYBRID),
                        *(_stat(row["peak_mib"].get(name), 0) for name in HYBRID),
                        *(_stat(row["above_start_mib"].get(name), 0) for name in HYBRID),
                    ]
                    for row in results["hybrids"]
                ],
            )
            + "\n",
        ]
    if sweep:
        names = [name for name in SWEEP_TITLES if any(name in row for row in sweep)]
        head = ["n"]
        for name in names:
            title = SWEEP_TITLES[name]
            head += [f"{title}: seconds", f"{title}: peak MiB", f"{title}: above start, MiB"]
        body = []
        for row in sweep:
            cells = [str(row["n"])]
            for name in names:
                found = row.get(name, {})
                cells += [
                    _stat(found.get("seconds"), 2),
                    _stat(found.get("peak_mib"), 0),
                    _stat(found.get("above_start_mib"), 0),
                ]
            body.append(cells)
        parts += [
            "## Any number of responses\n",
            f"Shared prompt, {results['sweep_tokens']} prompt:response tokens, the reference "
            "computed in the step.\n",
            table(head, body) + "\n",
        ]
    if results.get("real"):
        parts += _real(results["real"])
    parts.append("![The same as a picture](compute.png)\n")
    return "\n".join(parts)


def _real(row: dict[str, Any]) -> list[str]:
    body = []
    for name, seconds in row["seconds"].items():
        ratios = [key for key, (_, fast) in (SPEEDUPS | PLAIN_SPEEDUPS).items() if fast == name]
        body.append(
            [
                TITLES[name],
                _stat(seconds, 2),
                next((_ratio(row, key) for key in ratios if key in row), ""),
                f"{row['peak_mib'][name]['median']:.0f}",
                f"{row['above_start_mib'][name]['median']:.0f}",
                str(row["computed_tokens"][name]),
            ]
        )
    return [
        "## Real work\n",
        f"SmolLM2-135M-Instruct in float32, groups of {row['n']} responses ({row['source']}), "
        f"prompt and response cut to {row['max_length']} tokens: medians of "
        f"{row['prompt_tokens']:.0f} tokens a prompt, {row['response_tokens']:.0f} a response. A "
        "step is one group. *Faster*: than TRL with the reference treated alike. *Torch's layers*: "
        "with `fast_linear: false`, so that both sides multiply matrices with the same library. "
        "*Tokens*: computed in the last step, padding included.\n",
        table(
            ["method", "seconds", "faster", "peak MiB", "above start, MiB", "tokens"],
            body,
        )
        + "\n",
    ]


HYBRID = ("separate", "continued")
HYBRID_COLUMNS = ("seconds", "peak MiB", "above start, MiB")
MEMORY_RATIOS = ("memory_vs_trl", "above_start_vs_trl")


# --------------------------------------------------------------------------------------- picture


def draw(results: dict[str, Any], path: Path) -> None:
    """Step seconds by method and workload; memory and seconds against n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {
        "trl": "#b2182b",
        "trl-precomputed": "#ef8a62",
        "trl-scored-only": "#fddbc7",
        "trl-all-pairs": "#67001f",
        "separate": "#d1e5f0",
        "shared": "#67a9cf",
        "shared-cached": "#2166ac",
    }
    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.7, 1])
    rows = results["rows"]

    left = figure.add_subplot(grid[:, 0])
    used = [name for name in TITLES if any(name in row["seconds"] for row in rows)]
    for place, name in enumerate(used):
        title = TITLES[name]
        stats = [row["seconds"][name] for row in rows if name in row["seconds"]]
        # Side by side within their workload.
        beside = 0.8 * (place - (len(used) - 1) / 2) / len(used)
        at = [index + beside for index, row in enumerate(rows) if name in row["seconds"]]
        middle = [stat["median"] for stat in stats]
        below = [stat["median"] - stat["min"] for stat in stats]
        above = [stat["max"] - stat["median"] for stat in stats]
        left.errorbar(
            at,
            middle,
            yerr=[below, above],
            fmt="o" if name.startswith("trl") else "s",
            color=colours[name],
            markeredgecolor="black",
            markeredgewidth=0.5,
            markersize=8,
            label=title + (" (scaled)" if name == "trl-all-pairs" else ""),
        )
    left.set_yscale("log")
    left.set_xticks(
        range(len(rows)),
        [f"n = {r['n']}\n{r['prompt_response']}\n{':'.join(_tokens(r))}" for r in rows],
    )
    left.set_xlabel("responses, prompt:response ratio, tokens")
    left.set_ylabel("seconds per optimizer step")
    left.set_title("One group, one step")
    left.grid(axis="y", alpha=0.3, which="both")
    for edge in range(1, len(rows)):
        left.axvline(edge - 0.5, color="black", alpha=0.15)
    if used:
        left.legend(fontsize=8)

    sweep = results["sweep"]
    for place, key, title in ((0, "peak_mib", "peak resident MiB"), (1, "seconds", "seconds")):
        axes = figure.add_subplot(grid[place, 1])
        for name, colour in (("passes", "#2166ac"), ("at-once", "#b2182b")):
            found = [(row["n"], row[name][key]["median"]) for row in sweep if name in row]
            if found:
                axes.plot(*zip(*found, strict=True), "o-", color=colour, label=SWEEP_TITLES[name])
        axes.set_xscale("log", base=2)
        if key == "seconds":
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xlabel("responses of the group, n")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if sweep:
            axes.legend(fontsize=8)
            axes.set_xticks([row["n"] for row in sweep], [str(row["n"]) for row in sweep])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _tokens(row: dict[str, Any]) -> list[str]:
    return [f"{row['prompt_tokens']:.0f}", f"{row['response_tokens']:.0f}"]
