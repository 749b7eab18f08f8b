"""What a run found, as a page and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpo_lightning.markdown import table

__all__ = ["draw", "failures", "markdown", "name_of"]

Row = dict[str, Any]
NAMING = ("part", "architecture", "strategy", "method", "precision", "layout", "n", "ratio")


def name_of(row: Row) -> str:
    """Return what a row is about."""
    return ", ".join(str(row[name]) for name in NAMING if row.get(name) is not None)


def failures(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that say that something is wrong."""
    return [row for row in rows if "error" in row or row.get("ok") is False]


def markdown(results: Row) -> str:
    """Return the page."""
    rows = results["rows"]
    parts = [
        f"# {results['machine']['device']}\n",
        f"Made by `{results['command']}` in {results['minutes']:.1f} minutes. What is done, and "
        "what the numbers mean, is told in [../../README.md](../../README.md#on-a-gpu).\n",
        table(["what", ""], [[name, str(v)] for name, v in results["machine"].items()]) + "\n",
    ]
    bad = failures(rows)
    parts.append(f"**{len(bad)} failures.**\n" if bad else "No failures.\n")
    for row in bad:
        parts.append(f"- {name_of(row)}: {'an error' if 'error' in row else 'too far off'}")
        if "error" in row:
            indented = "\n".join(f"      {line}" for line in row["error"].strip().splitlines())
            parts.append(f"\n{indented}\n")
    left_out = [row for row in rows if "left_out" in row]
    if left_out:
        parts.append("\nLeft out:\n")
        for row in left_out:
            parts.append(f"- {name_of(row)}: {row['left_out']}")
    parts += [*_correctness(rows), *_strategies(rows), *_speed(rows)]
    parts.append("\n![The same as a picture](gpu.png)")
    return "\n".join(parts)


def _correctness(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if "gradient" in row]
    if not found:
        return []
    body = [
        [
            *(row[name] for name in ("architecture", "precision", "layout")),
            *(f"{row[name]:.1e}" for name in ("value", "worst_value", "gradient")),
            f"{row['worst_gradient']:.1e}",
            "yes" if row["ok"] else "**no**",
            ", ".join(f"{count} {name}" for name, count in row["kernels"].items()),
        ]
        for row in found
    ]
    said = sorted({f"{row['architecture']}: {line}" for row in found for line in row["said"]})
    return [
        "\n## Exactness\n",
        "Against full logits in float32 on the CPU, with the same weights: nats a token, mean "
        "over the responses and of the worst one; the relative error of the adapters' gradient, "
        "all together and of the worst one. *own* are the model's own logits in the same "
        "precision on the device: the yardstick. *Kernels*: operators of a forward pass.\n",
        table(
            [
                *["architecture", "precision", "layout", "values", "worst", "gradients"],
                *["worst", "ok", "kernels"],
            ],
            body,
        ),
        *(["\nWhat the package said of attention:\n"] if said else []),
        *(f"- {line}" for line in said),
    ]


def _strategies(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if "bit_for_bit" in row]
    if not found:
        return []
    body = [
        [
            row["strategy"],
            "yes" if row["bit_for_bit"] else "no",
            f"{row['difference']:.1e}",
            f"{row['loss_difference']:.1e}",
            f"{row['losses'][-1]:.4f}",
            "yes" if row["ok"] else "**no**",
        ]
        for row in found
    ]
    return [
        "\n## Killed and resumed\n",
        "A resumed run beside one that was not interrupted. The adapters' difference is relative "
        "to what was learnt.\n",
        table(
            ["strategy", "bit for bit", "adapters", "losses", "last loss", "ok"],
            body,
        ),
    ]


def _speed(rows: Sequence[Row]) -> list[str]:
    found = [row for row in rows if "seconds" in row and row["part"] == "speed"]
    if not found:
        return []
    of_trl = {row["tokens"]: row["seconds"] for row in found if row["method"].startswith("TRL")}
    body = []
    for row in found:
        inside = row.get("time_in", {})
        # More responses are micro-batches of 4 pairs.
        trl = of_trl.get(row["tokens"]) if row["method"].endswith("bf16") else None
        times = f"{trl * row['n'] / 8 / row['seconds']:.2f}" if trl else ""
        body.append(
            [
                str(row["n"]),
                f"{row['ratio']} ({row['tokens']})",
                row["method"],
                str(row.get("responses_per_pass") or "all"),
                f"{row['seconds']:.3f} ({row['least']:.3f} to {row['most']:.3f})",
                str(row["steps"]),
                times,
                f"{row['peak_mib'] / 1024:.1f}",
                f"{row['share_of_rate']:.2f}" if "share_of_rate" in row else "",
                f"{row['matrix_rate'] / 1e12:.1f}" if "matrix_rate" in row else "",
                *(f"{inside[kind]:.2f}" if inside else "" for kind in ("attention", "products")),
            ]
        )
    body.sort(key=lambda line: (int(line[0]), line[1]))
    return [
        "\n## Seconds and memory of a step\n",
        "The reference is known beforehand. *TRL's time*: that of the same responses as pairs, "
        "over this one; at n = 32 four micro-batches of it. *Share*: of the rate of bare bfloat16 "
        "products, counting only the arithmetic that the shared layout needs. *Attention* and "
        "*products*: their part of the time in kernels.\n",
        table(
            [
                *["n", "prompt:response", "method", "a pass", "seconds", "steps", "TRL's time"],
                *["peak GiB", "share", "rate, TFLOP/s", "attention", "products"],
            ],
            body,
        ),
    ]


def draw(results: Row, path: Path) -> None:
    """Draw seconds by method, and errors beside their yardsticks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = results["rows"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    timed = [row for row in rows if "seconds" in row and row["part"] == "speed"]
    places = list(dict.fromkeys((row["n"], row["ratio"], row["tokens"]) for row in timed))
    methods: dict[str, list[Row]] = {}
    for row in timed:
        per_pass = row.get("responses_per_pass")
        label = row["method"] + (f", {per_pass} a pass" if per_pass else "")
        methods.setdefault(label, []).append(row)
    for label, own in methods.items():
        at = [places.index((row["n"], row["ratio"], row["tokens"])) for row in own]
        left.plot(at, [row["seconds"] for row in own], "o", label=label, alpha=0.8)
    left.set_xticks(range(len(places)), [f"n = {n}\n{r}\n{t}" for n, r, t in places])
    left.set_ylabel("seconds a step")
    left.grid(axis="y", alpha=0.3)
    left.set_title("A Llama-3-8B shape" if timed else "No step was measured")
    exact = [row for row in rows if "gradient" in row and row["layout"] != "own"]
    own_errors = {
        (row["architecture"], row["precision"]): row["gradient"]
        for row in rows
        if row.get("layout") == "own" and "gradient" in row
    }
    for precision in dict.fromkeys(row["precision"] for row in exact):
        pairs = [
            (own_errors.get((row["architecture"], precision)), row["gradient"])
            for row in exact
            if row["precision"] == precision
        ]
        known = [pair for pair in pairs if pair[0] is not None]
        right.plot(*zip(*known, strict=True), "o", label=precision, alpha=0.6)
    right.set_xlabel("relative error of gradients, the model's own logits")
    right.set_ylabel("relative error of gradients, this package's layouts")
    right.grid(alpha=0.3)
    right.set_title("Against float32")
    if exact:
        right.set_xscale("log")
        right.set_yscale("log")
        low, high = right.get_xlim()
        right.plot([low, high], [low, high], color="black", linewidth=0.5)
        right.legend(fontsize=8)
    if timed:
        left.set_yscale("log")
        left.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
