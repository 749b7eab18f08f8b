"""Fills the tables of docs/results.md from the summaries that are kept beside it.

    python docs/figures/tables.py

A comment `<!-- table: NAME -->` says which table follows it; what was there is replaced. The text
around the tables is written by hand.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_lightning.markdown import table

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "results.md"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n\n)(?:\|.*\n)*")

Summary = dict[str, Any]


def summary(study: str) -> Summary:
    """What is kept of a study."""
    path = ROOT / "docs" / "results" / study / "summary.json"
    found: Summary = json.loads(path.read_text(encoding="utf-8"))
    return found


def number(value: float, *, signed: bool = False, digits: int = 3) -> str:
    """Without a minus before zeros."""
    return f"{value:{'+' if signed else 'z'}.{digits}f}"


def interval(of: dict[str, Any], *, signed: bool = False, digits: int = 3) -> str:
    """Mean and 95 % interval."""
    mean, low, high = (number(of[k], signed=signed, digits=digits) for k in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def probability(p: float) -> str:
    """A p-value, to two digits, or three below a tenth."""
    if p < 0.0005:
        return "< .001"
    return "1" if p > 0.995 else f"{p:.{3 if p < 0.0995 else 2}f}".removeprefix("0")


def seeds(of: dict[str, Any], most: int) -> str:
    """How many seeds a value rests on, where not all of them came to the divergence."""
    return "" if of["count"] == most else f" ({of['count']} seeds)"


def gold(found: Summary, label: str) -> dict[str, Any]:
    """Gold score at 1 nat of a condition."""
    value: dict[str, Any] = found["at_1_nat"][label]["gold"]
    return value


def most_seeds(found: Summary) -> int:
    """Of any condition: those of the study."""
    return max(int(condition["gold"]["count"]) for condition in found["at_1_nat"].values())


def difference(found: Summary, first: str, second: str, p: str = "p") -> str:
    """Of two conditions' gold, with p before or after adjustment."""
    for row in found["comparisons"]:
        if (row["first"], row["second"]) == (first, second):
            text = interval(row["difference"], signed=True)
            if row[p] is not None:
                text += f", p {probability(row[p])}"
            return text + seeds(row["difference"], most_seeds(found))
    raise KeyError(f"{first!r} is not compared with {second!r}")


def parts(found: Summary) -> list[str]:
    """The scenarios of a grid."""
    return list(dict.fromkeys(label.split(": ")[0] for label in found["at_1_nat"]))


def methods() -> str:
    """All methods, beside MPO."""
    found = summary("methods")
    compared = {row["first"]: row for row in found["comparisons"]}
    early = {row["first"]: row for row in found["comparisons_at_0.25_nat"]}
    rows = []
    for name, at in found["at_1_nat"].items():
        less, p, less_early = "", "", ""
        if name in compared:
            less = interval(compared[name]["difference"], signed=True)
            p = probability(compared[name]["p_holm"])
            less_early = interval(early[name]["difference"], signed=True)
        rows.append(
            [
                name,
                f"{found['learning_rates'][name]['lr']:g}",
                interval(at["gold"]),
                less,
                p,
                less_early,
                number(at["bias"]["mean"]),
                number(at["win_rate"]["mean"]),
                number(at["chosen_shift"]["mean"], digits=2),
                str(at["gold"]["count"]),
            ]
        )
    heads = ["method", "learning rate", "gold at 1 nat", "less MPO's", "p"]
    heads += ["less MPO's at 0.25 nat", "bias", "win rate", "chosen's logp", "seeds at 1 nat"]
    return table(heads, rows)


def deviation() -> str:
    """Weights against none, by noise."""
    found = summary("deviation")
    noises = [name.removeprefix("noise ") for name in found["best_alpha"]]
    alphas = dict.fromkeys(row["first"].split(", ")[0] for row in found["comparisons"])
    return table(
        [r"less $\alpha$ = 0", *(f"noise {noise}" for noise in noises)],
        [
            [
                alpha.removeprefix("alpha "),
                *(
                    difference(found, f"{alpha}, noise {n}", f"alpha 0, noise {n}", "p_holm")
                    for n in noises
                ),
            ]
            for alpha in alphas
        ],
    )


def samples() -> str:
    """Bias of drawn responses, and its slope on n."""
    found = summary("responses")
    kinds = {"acceptable": "acceptable responses", "chosen": "the chosen set that the judge makes"}
    sizes = list(found["sample_bias"]["acceptable"])
    return table(
        ["attribute bias of", "slope on $n$, log-log", *(f"n = {n}" for n in sizes)],
        [
            [
                title,
                interval(found["sample_bias_slopes"][kind]),
                *(number(found["sample_bias"][kind][n]["mean"]) for n in sizes),
            ]
            for kind, title in kinds.items()
        ],
    )


def policies() -> str:
    """Slopes of the trained policies' bias on n, and what would be left for n without end."""
    found = summary("responses")
    slopes, floors = found["policy_bias_slopes"], found["policy_bias_floors"]
    most = max(slope["count"] for slope in slopes.values())
    early, late = ("0.25 nat", "1 nat")
    trained = dict.fromkeys(label.rpartition(", ")[0] for label in slopes)
    return table(
        ["policy of", f"slope at {early}", f"floor at {early}", f"slope at {late}"],
        [
            [
                name,
                *(
                    interval(of[f"{name}, {where}"]) + seeds(of[f"{name}, {where}"], most)
                    for of, where in ((slopes, early), (floors, early), (slopes, late))
                ),
            ]
            for name in trained
        ],
    )


def calibration() -> str:
    """Methods and remedies by judge."""
    found = summary("calibration")
    pairs = [
        ("W-MPO 1 per score", "MPO"),
        ("W-MPO 1 per std", "W-MPO 1 per score"),
        ("W-MPO 1 on ranks", "W-MPO 1 per score"),
        ("MPO median", "MPO"),
        ("InfoNCA on z-scores", "InfoNCA"),
        ("InfoNCA on ranks", "InfoNCA"),
        ("DPO best-worst", "MPO"),
    ]
    agreement = found["agreement_with_gold"]
    heads = ["judge", r"agrees with gold, $\tau$", "MPO's gold"]
    heads += [f"{first} less {second}" for first, second in pairs]
    most = most_seeds(found)
    return table(
        heads,
        [
            [
                judge,
                number(agreement[judge]["kendall_tau"], digits=2),
                number(gold(found, f"{judge}: MPO")["mean"])
                + seeds(gold(found, f"{judge}: MPO"), most),
                *(difference(found, f"{judge}: {one}", f"{judge}: {two}") for one, two in pairs),
            ]
            for judge in parts(found)
        ],
    )


def correlation() -> str:
    """Gold by kind of group."""
    found = summary("correlation")
    compared = ["MPO", "W-MPO 1", "InfoNCA 1", "DPO best-worst"]
    most = most_seeds(found)
    return table(
        ["groups", "sample bias of the chosen", *compared],
        [
            [
                groups,
                number(found["sample_bias_of_chosen"][groups]),
                *(
                    interval(gold(found, f"{groups}: {name}"))
                    + seeds(gold(found, f"{groups}: {name}"), most)
                    for name in compared
                ),
            ]
            for groups in parts(found)
        ],
    )


def beside() -> str:
    """Gold by kind of group, less that of groups without what makes the kind."""
    found = summary("correlation")
    rows: dict[tuple[str, str], list[str]] = {}
    methods: dict[str, None] = {}
    for row in found["beside"]:
        (kind, method), (plain, _) = (row[place].split(": ") for place in ("first", "second"))
        text = f"{interval(row['difference'], signed=True)}, p {probability(row['p'])}"
        rows.setdefault((kind, plain), []).append(text)
        methods[method] = None
    return table(
        ["groups; less others", *methods],
        [[f"{kind}; less {plain}", *texts] for (kind, plain), texts in rows.items()],
    )


def skew() -> str:
    """Rules by shape."""
    found = summary("skew")
    shapes = parts(found)
    rules = {
        "MPO, median": "MPO median",
        "MPO, top quarter": "MPO top quarter",
        "MPO, trimmed mean": "MPO trimmed mean",
        "W-MPO 1, mean": "W-MPO 1 mean",
        "InfoNCA": "InfoNCA 1",
        "DPO, best-worst": "DPO best-worst",
    }
    of_mean = [gold(found, f"{shape}: MPO mean") for shape in shapes]
    first = [number(of["mean"]) + seeds(of, most_seeds(found)) for of in of_mean]
    return table(
        ["gold at 1 nat, less the split at the mean", *shapes],
        [
            ["(MPO, mean: its gold)", *first],
            *(
                [
                    title,
                    *(difference(found, f"{s}: {name}", f"{s}: MPO mean") for s in shapes),
                ]
                for title, name in rules.items()
            ),
        ],
    )


def reliability() -> str:
    """Groups that noise leaves as they are, by rule and size."""
    found = summary("skew")["reliability"]
    sizes = list(found["mean"])
    return table(
        ["groups as without noise", *(f"n = {n}" for n in sizes)],
        [
            [rule, *(f"{100 * of_n[n]['mean']:.0f} %" for n in sizes)]
            for rule, of_n in found.items()
        ],
    )


def levels() -> str:
    """Methods by number of levels."""
    found = summary("levels")
    names = ["multi-level", "Plackett-Luce", "DPO all pairs", "W-MPO 1", "InfoNCA 1"]
    kinds = {"noise 0": "clean judge", "noise 1": "noisy judge"}
    counts = list(dict.fromkeys(part.split(", ")[0] for part in parts(found)))
    return table(
        ["gold at 1 nat, less MPO's", *counts],
        [
            [
                f"{name}, {kind}",
                *(difference(found, f"{n}, {noise}: {name}", f"{n}, {noise}: MPO") for n in counts),
            ]
            for noise, kind in kinds.items()
            for name in names
        ],
    )


def scaling() -> str:
    """Time, memory and gold by n."""
    found = summary("scaling")
    time, memory = found["step_ms"], found["memory_mib"]
    ways = ["at once", "64 at a time"]
    most = most_seeds(found)
    heads = ["n", f"step, ms: {ways[0]}", ways[1]]
    heads += [f"memory beyond libraries and model, MiB: {ways[0]}", ways[1], "gold at 1 nat"]
    return table(
        heads,
        [
            [
                n,
                *(f"{time[way][n]['mean']:.0f}" for way in ways),
                *(f"{memory[way][n]['mean']:.0f}" for way in ways),
                interval(gold(found, f"n={n}, {ways[0]}"))
                + seeds(gold(found, f"n={n}, {ways[0]}"), most),
            ]
            for n in time[ways[0]]
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    made.__name__: made
    for made in (
        methods,
        deviation,
        samples,
        policies,
        calibration,
        correlation,
        beside,
        skew,
        reliability,
        levels,
        scaling,
    )
}


def filled(page: str) -> str:
    """A page with its marked tables made anew."""
    return MARKED.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
