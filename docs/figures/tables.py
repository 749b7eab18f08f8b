"""Fills the tables and figures of the pages of results from what is kept of the studies.

    python docs/figures/tables.py

A comment `<!-- table: STUDY/NAME -->` says which table follows it, `<!-- figure: STUDY/NAME: TEXT
-->` which figure; what was there is replaced. Of a study of which nothing is kept there is none.
The text around them is written by hand.
"""

import csv
import gzip
import json
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from mpo_lightning.markdown import table

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "docs" / name for name in ("results.md", "results-real-model.md")]
RESULTS = ROOT / "docs" / "results"
# A mark, and lines of a table, or a figure, after it.
MARKED = re.compile(
    r"(?P<mark><!-- (?P<kind>table|figure): (?P<study>\w+)/(?P<name>[\w.-]+)"
    r"(?:: (?P<text>.+?))? -->\n)(?:\n(?:\|.*\n)+|\n!\[.*\n)?"
)
BETAS = ("0.1", "1")
PRIMARY = "0.5"
STUDIES = (
    *("methods", "deviation", "calibration", "correlation", "sets", "skew", "levels"),
    *("responses", "scaling"),
)
# Of a real model.
REAL_STUDIES = ("verifiable",)
# Studies of scenarios by methods, and whether the scenarios are the table's rows.
GRIDS = {"deviation": False, "sets": False, "skew": False, "levels": False}
GRIDS |= {"calibration": True, "correlation": True}
# Measures of a real model's answers.
SHARE = "share of constraints met"
OF_ANSWERS = ("cut at the limit", "distinct pairs of words")
# What is not known: of too few values.
NONE = "-"

Summary = dict[str, Any]


def summary(study: str) -> Summary:
    """What is kept of a study."""
    path = RESULTS / study / "summary.json"
    found: Summary = json.loads(path.read_text(encoding="utf-8"))
    return found


def number(value: float | None, *, signed: bool = False, digits: int = 3) -> str:
    """Without a minus before zeros."""
    return NONE if value is None else f"{value:{'+' if signed else 'z'}.{digits}f}"


def interval(of: dict[str, Any], *, signed: bool = False, digits: int = 3) -> str:
    """Mean and 95 % interval."""
    mean, low, high = (number(of[k], signed=signed, digits=digits) for k in ("mean", "low", "high"))
    return mean if low == NONE else f"{mean} [{low}, {high}]"


def probability(p: float | None) -> str:
    """A p-value, to two digits, or three below a tenth."""
    if p is None:
        return NONE
    if p < 0.0005:
        return "< .001"
    return "1" if p > 0.995 else f"{p:.{3 if p < 0.0995 else 2}f}".removeprefix("0")


def difference(row: dict[str, Any]) -> str:
    """Difference with its interval, and in how many worlds it is positive."""
    return f"{interval(row['difference'], signed=True)}, {row['won']} of {row['worlds']}"


def means(measures: dict[str, dict[str, Any]], label: str, most: int) -> str:
    """Gold of a condition, and of how many worlds, where not all have come to the divergence."""
    gold = measures[label]["gold"]
    return interval(gold) + ("" if gold["count"] == most else f" ({gold['count']} worlds)")


def most_worlds(measures: dict[str, dict[str, Any]]) -> int:
    """Of any condition: those of the study."""
    return max(int(condition["gold"]["count"]) for condition in measures.values())


def contrasts(study: str) -> str:
    """The comparisons that were named beforehand."""
    heads = ["contrast", "expected", "difference", "p, Holm", "p, Wilcoxon", "worlds won"]
    return table(
        [*heads, "would have shown"],
        [
            [
                row["name"],
                {"none": "level", "-": "\N{MINUS SIGN}"}.get(row["expected"], row["expected"]),
                interval(row["difference"], signed=True),
                probability(row["p_holm"]),
                probability(row["p_wilcoxon"]),
                f"{row['won']} of {row['worlds']}",
                number(row["detectable_after_holm"]),
            ]
            for row in summary(study)["contrasts"]
        ],
    )


def methods(beta: str) -> str:
    """All methods at a beta, beside MPO."""
    found = summary("methods")
    at, end = found["measures"][PRIMARY], found["measures"]["end"]
    less = {row["first"]: row for row in found["differences"][PRIMARY]}
    near = {row["first"]: row for row in found["differences"]["0.25"]}
    rows = []
    for label, of in at.items():
        of_beta, name = label.split(": ")
        if of_beta != f"beta {beta}":
            continue
        rows.append(
            [
                name,
                f"{found['learning_rates'][label]['lr']:g}",
                interval(of["gold"]),
                interval(less[label]["difference"], signed=True) if label in less else "",
                f"{less[label]['won']} of {less[label]['worlds']}" if label in less else "",
                interval(near[label]["difference"], signed=True) if label in near else "",
                number(of["outside"]["mean"]),
                number(of["gold_of_all"]["mean"]),
                number(of["bias"]["mean"]),
                number(of["effective_chosen"]["mean"], digits=2),
                number(of["chosen_shift"]["mean"], digits=2),
                str(of["gold"]["count"]),
                *(number(end[label][m]["mean"]) for m in ("kl", "gold", "gold_of_all")),
            ]
        )
    heads = ["method", "learning rate", "gold at 0.5 nat", "less MPO's", "worlds won"]
    heads += ["less MPO's at 0.25 nat", "outside", "gold of all", "bias", "effective chosen"]
    heads += ["chosen's logp", "worlds at 0.5 nat", "at the end: KL", "gold", "gold of all"]
    return table(heads, rows)


def maps() -> str:
    """The score-to-coefficient map of each method, and gold where it should decide."""
    found = summary("methods")
    of, near = found["maps"], found["measures"]["0.25"]
    names = list(dict.fromkeys(label.split(": ")[1] for label in of))
    heads = ["method", "signal-to-noise", *(f"gold at 0.25 nat, beta {beta}" for beta in BETAS)]
    heads += [*(f"cosine at 0.5 nat, beta {beta}" for beta in BETAS), "gold of a population"]
    return table(
        heads,
        [
            [
                name,
                number(of[f"beta {BETAS[0]}: {name}"]["snr"]["mean"], digits=2),
                *(number(near[f"beta {beta}: {name}"]["gold"]["mean"]) for beta in BETAS),
                *(number(of[f"beta {beta}: {name}"]["cosine"]["mean"]) for beta in BETAS),
                number(of[f"beta {BETAS[0]}: {name}"]["population_gold"]["mean"]),
            ]
            for name in names
        ],
    )


def predicted() -> str:
    """How well the maps predict gold near the reference, over methods."""
    return table(
        ["beta", "methods", "Pearson", "p", "Spearman"],
        [
            [
                beta.removeprefix("beta "),
                str(of["methods"]),
                number(of["pearson"], digits=2),
                probability(of["pearson_p"]),
                number(of["spearman"], digits=2),
            ]
            for beta, of in summary("methods")["predicted"].items()
        ],
    )


def parts(label: str) -> tuple[str, str, str]:
    """Scenario, beta and method of the label of a grid's condition."""
    place, method = label.split(": ")
    scenario, beta = place.split(", beta ")
    return scenario, beta, method


def grid(study: str, beta: str) -> str:
    """Differences of methods by scenario, and the gold of the method that stands first."""
    found = summary(study)
    measures = found["measures"]
    most = most_worlds(measures)
    scenarios = list(dict.fromkeys(parts(label)[0] for label in measures))
    baseline = parts(next(iter(measures)))[2]
    columns: dict[str, dict[str, str]] = {
        f"{baseline}: gold": {
            s: means(measures, f"{s}, beta {beta}: {baseline}", most) for s in scenarios
        }
    }
    for row in found["differences"]:
        (scenario, of_beta, first), (other, _, second) = (
            parts(row[k]) for k in ("first", "second")
        )
        if (of_beta, scenario) == (beta, other):
            columns.setdefault(f"{first} less {second}", {})[scenario] = difference(row)
    if GRIDS[study]:
        return table(
            [study, *columns], [[s, *(of[s] for of in columns.values())] for s in scenarios]
        )
    return table(
        ["", *scenarios], [[name, *(of[s] for s in scenarios)] for name, of in columns.items()]
    )


def agreement() -> str:
    """Judges beside gold, before any training."""
    heads = ["judge", r"Kendall's $\tau$", "responses in gold's set", "chosen"]
    return table(
        heads,
        [
            [
                judge,
                number(of["kendall_tau"], digits=2),
                *(f"{100 * of[name]:.0f} %" for name in ("same_set", "chosen_share")),
            ]
            for judge, of in summary("calibration")["agreement_with_gold"].items()
        ],
    )


def warned(of: dict[str, int], worlds: int, other: Collection[str]) -> str:
    """Warnings given in half of the worlds or more, but for others, and in how many."""
    return ", ".join(
        f"`{name}`" + ("" if count == worlds else f" ({count})")
        for name, count in of.items()
        if 2 * count >= worlds and name not in other
    )


def checks() -> str:
    """What the check of the data says of each judge, and the method that this leads to.

    Without what it says of every world's responses, whatever their scores: they are short, and some
    are equal.
    """
    found = summary("calibration")["checks"]
    of_texts = ["near-empty-responses", "duplicate-responses"]
    rows = []
    for judge, said in found.items():
        none = said["none"]
        worlds = sum(none["methods"].values())
        with_labels = [
            warned(of["warnings"], worlds, {*none["warnings"], *of_texts}) or NONE
            for labels, of in said.items()
            if labels != "none"
        ]
        methods = [
            ", ".join(f"{method} ({count})" for method, count in of["methods"].items())
            for of in said.values()
        ]
        rows.append(
            [judge, warned(none["warnings"], worlds, of_texts) or NONE, *with_labels, *methods]
        )
    labels = [labels for labels in next(iter(found.values())) if labels != "none"]
    heads = ["judge", "without labels", *(f"with {each} also" for each in labels)]
    heads += ["leads to (worlds)", *(f"with {each}" for each in labels)]
    return table(heads, rows)


def following(beta: str) -> str:
    """Gold of W-MPO per score as it is, and of what the check's advice leads to."""
    rows = [row for row in summary("calibration")["following"] if f"{row['beta']:g}" == beta]
    columns = {
        f"{'no' if labels == 'none' else labels} labels: advised less {text}": f"{labels} labels "
        f"less {name}"
        for labels in summary("calibration")["checks"][rows[0]["judge"]]
        for name, text in (("as_it_is", "as it is"), ("plain", "MPO"))
    }
    return table(
        ["judge", "W-MPO 1 per score as it is", *columns],
        [
            [
                row["judge"],
                interval(row["as_it_is"]),
                *(difference(row[c]) for c in columns.values()),
            ]
            for row in rows
        ],
    )


def beside(beta: str) -> str:
    """Gold by kind of group, less that of groups without what makes the kind."""
    found = summary("correlation")
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in found["differences"]:
        (kind, of_beta, method), (plain, _, _) = (parts(row[k]) for k in ("first", "second"))
        if of_beta == beta and kind != plain:
            rows.setdefault((kind, plain), {})[method] = difference(row)
    bias = found["sample_bias_of_chosen"]
    return table(
        ["groups; less others", "sample bias of the chosen", *next(iter(rows.values()))],
        [
            [f"{kind}; less {plain}", f"{bias[kind]:.3f}; {bias[plain]:.3f}", *of.values()]
            for (kind, plain), of in rows.items()
        ],
    )


def capacity() -> str:
    """What the adapted model comes to when it is taught the ideal policy itself."""
    return table(
        ["quality", "gold", "ideal policy's", "share", "at KL", "outside"],
        [
            [
                utility,
                interval(of["gold"]),
                number(of["ideal_gold"]["mean"]),
                f"{100 * of['gold']['mean'] / of['ideal_gold']['mean']:.0f} %",
                number(of["kl"]["mean"], digits=2),
                number(of["outside"]["mean"]),
            ]
            for utility, of in summary("correlation")["capacity"].items()
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
    """Bias of trained policies over n, in its parts."""
    found = summary("responses")
    slopes, bias = found["policy_bias_slopes"], found["policy_bias"]
    sizes = list(next(iter(bias.values())))
    heads = ["policy", "part of its bias", "slope on $n$, log-log", "worlds"]
    return table(
        [*heads, *(f"n = {n}" for n in sizes)],
        [
            [
                *name.split(": "),
                interval(slopes[name]),
                str(slopes[name]["count"]),
                *(number(bias[name][n]["mean"]) for n in sizes),
            ]
            for name in bias
        ],
    )


def budgets(beta: str) -> str:
    """Gold of 1,280 scored responses, as prompts by responses of a prompt."""
    measures = summary("responses")["measures"]
    most = most_worlds(measures)
    rows: dict[str, list[str]] = {}
    sizes: dict[str, None] = {}
    for label in measures:
        of_beta, name = label.split(": ")
        if of_beta == f"beta {beta}":
            method, size = name.rsplit(", ", 1)
            sizes[size] = None
            rows.setdefault(method, []).append(means(measures, label, most))
    return table(
        ["prompts x responses", *sizes], [[method, *texts] for method, texts in rows.items()]
    )


def scaling() -> str:
    """Time, memory and gold by n."""
    found = summary("scaling")
    time, memory, measures = found["step_ms"], found["memory_mib"], found["measures"]
    ways = list(time)
    most = most_worlds(measures)
    heads = ["n", f"step, ms: {ways[0]}", ways[1]]
    heads += [f"memory beyond libraries and model, MiB: {ways[0]}", ways[1]]
    return table(
        [*heads, *(f"gold at 0.5 nat, beta {beta}" for beta in BETAS)],
        [
            [
                n,
                *(f"{time[way][n]['mean']:.0f}" for way in ways),
                *(f"{memory[way][n]['mean']:.0f}" for way in ways),
                *(means(measures, f"beta {beta}: n={n}", most) for beta in BETAS),
            ]
            for n in time[ways[0]]
        ],
    )


def population() -> str:
    """Gold at 0.25 nat that infinitely many groups of n responses would teach."""
    found = summary("scaling")["population_gold"]
    return table(
        ["loss", *(f"n = {n}" for n in next(iter(found.values())))],
        [[loss, *(number(value["mean"]) for value in of.values())] for loss, of in found.items()],
    )


def real_contrasts(study: str) -> str:
    """The comparisons of a study of a real model that were named beforehand."""
    return table(
        ["contrast", "expected", "difference", "p, Holm", "within .03"],
        [
            [
                row["name"],
                "level" if row["expected"] == "none" else row["expected"],
                interval(row["difference"], signed=True),
                probability(row["p_holm"]),
                "yes" if row["level"] else "no",
            ]
            for row in summary(study)["contrasts"]
        ],
    )


def verifiable_methods() -> str:
    """Answers of the base, and of what each method made of it."""
    found = summary("verifiable")
    test, others = found["means"]["test"], found["means"]["other-kinds"]
    less = {row["name"]: row["difference"] for row in found["differences"]["test"][SHARE]}
    divergence = {
        row["condition"]: row["divergence"] for row in found["frontier"] if row["scale"] == 1
    }
    rows = []
    for label in others[SHARE]:
        difference = less.get(f"{label} - MPO")
        rows.append(
            [
                label,
                f"{found['learning_rates'][label]:g}" if label in divergence else "",
                interval(test[SHARE][label]),
                "" if difference is None else interval(difference, signed=True),
                number(test["both met"][label]["mean"]),
                interval(others[SHARE][label]),
                number(divergence.get(label), digits=2),
                number(test["words"][label]["mean"], digits=1),
                *(number(test[m][label]["mean"]) for m in OF_ANSWERS),
            ]
        )
    heads = ["model", "learning rate", SHARE, "less MPO's", "both met"]
    heads += ["share, kinds never trained", "divergence, nats", "words", *OF_ANSWERS]
    return table(heads, rows)


def verifiable_half() -> str:
    """Score and divergence of the adapters at half their scale and at all of it."""
    rows: dict[str, list[str]] = {}
    for row in summary("verifiable")["frontier"]:
        of = rows.setdefault(row["condition"], [])
        of += [interval(row["score"]), number(row["divergence"], digits=2)]
    heads = ["method", *("half: share met", "divergence, nats", "all: share met")]
    return table([*heads, "divergence, nats"], [[name, *of] for name, of in rows.items()])


def learning_rates(study: str) -> str:
    """Mean tau-b of log-ratios with scores on the tuning prompts, by method and learning rate."""
    with gzip.open(RESULTS / study / "tuning.csv.gz", "rt", encoding="utf-8") as file:
        tried = list(csv.DictReader(file))
    rates = list(dict.fromkeys(row["lr"] for row in tried))
    taus = {(row["method"], row["lr"]): number(float(row["tau"])) for row in tried}
    return table(
        ["tau-b at learning rate", *(f"{float(rate):g}" for rate in rates)],
        [
            [method, *(taus[method, rate] for rate in rates)]
            for method in dict.fromkeys(row["method"] for row in tried)
        ],
    )


TABLES: dict[str, Callable[[], str]] = {
    **{f"{study}/contrasts": partial(contrasts, study) for study in STUDIES},
    **{f"{study}/contrasts": partial(real_contrasts, study) for study in REAL_STUDIES},
    **{f"{study}/learning-rates": partial(learning_rates, study) for study in REAL_STUDIES},
    "verifiable/methods": verifiable_methods,
    "verifiable/half": verifiable_half,
    **{f"methods/beta-{beta}": partial(methods, beta) for beta in BETAS},
    **{f"{study}/beta-{beta}": partial(grid, study, beta) for study in GRIDS for beta in BETAS},
    **{f"correlation/beside-{beta}": partial(beside, beta) for beta in BETAS},
    **{f"responses/budgets-{beta}": partial(budgets, beta) for beta in BETAS},
    **{f"calibration/following-{beta}": partial(following, beta) for beta in BETAS},
    "methods/maps": maps,
    "methods/predicted": predicted,
    "calibration/agreement": agreement,
    "calibration/checks": checks,
    "correlation/capacity": capacity,
    "skew/reliability": reliability,
    "responses/samples": samples,
    "responses/policies": policies,
    "scaling/costs": scaling,
    "scaling/population": population,
}


def filled(page: str) -> str:
    """A page with its marked tables and figures made anew."""

    def of(match: re.Match[str]) -> str:
        study, name = match["study"], match["name"]
        if match["kind"] == "table":
            return f"{match['mark']}\n{TABLES[f'{study}/{name}']()}\n"
        return f"{match['mark']}\n![{match['text']}](results/{study}/{name}.png)\n"

    return MARKED.sub(of, page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
