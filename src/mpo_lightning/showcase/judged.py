"""Study of a real model on judged responses of public models to AlpacaEval's prompts."""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from math import log, nan, sqrt
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import logit
from scipy.stats import rankdata

from mpo_lightning.data.groups import check_field, check_object
from mpo_lightning.data.sources import open_source
from mpo_lightning.losses import DPO, MPO, InfoNCA, SetLoss
from mpo_lightning.showcase.constraints import text_of
from mpo_lightning.showcase.estimates import bootstrap, compared, described, drawn, shown
from mpo_lightning.showcase.runs import Base, Fit, Prediction, fit_table, picked
from mpo_lightning.showcase.tuning import LEARNING_RATES, chosen_rates, of_rows, tau_b
from mpo_lightning.studies.lab.conditions import Contrast, Findings, Form
from mpo_lightning.studies.lab.results import StudyError
from mpo_lightning.studies.lab.runner import Runner

__all__ = ["ARMS", "File", "JudgedGroups", "study"]

Row = dict[str, Any]
Floats = NDArray[np.float64]

ARMS: Final = ("main", "scales", "example")
METHODS: Final[Mapping[str, SetLoss]] = {
    "MPO": MPO(beta=0.1),
    "W-MPO": MPO(beta=0.1, alpha=0.5, alpha_unit="std"),
    "DPO best-worst": DPO(beta=0.1),
    "DPO random pair": DPO(beta=0.1, pairs="random"),
    "DPO all pairs": DPO(beta=0.1, pairs="all"),
    "InfoNCA": InfoNCA(beta=0.1, temperature=0.25),
}
LIKELIHOOD: Final = "reference, log-probability of a token"
RIDGE: Final = "ridge on words and length"
CONTRASTS: Final = (
    Contrast("MPO - reference's log-probability", ("MPO",), (LIKELIHOOD,), "+"),
    Contrast("MPO - ridge", ("MPO",), (RIDGE,), "+"),
    Contrast("MPO - DPO random pair", ("MPO",), ("DPO random pair",), "+"),
    Contrast("MPO - DPO best-worst", ("MPO",), ("DPO best-worst",), "none"),
)
PRIMARY: Final = "accuracy at equal length"
# Pairs whose order is asked for: differences in log tokens below, in logit above.
EQUAL_LENGTH: Final = 0.15
LEAST_DIFFERENCE: Final = 1.0

# Writers that game the judge, and the baseline itself; see the plan.
ATTACK: Final = "example"
LEFT_OUT: Final = frozenset({ATTACK, "gpt4_gamed", "gpt4_1106_preview"})
# Share of the groups that the arm of real corruption puts the attack into.
ATTACKED_SHARE: Final = 0.15
LONGEST_RESPONSE: Final = 400
LONGEST_PROMPT: Final = 1000
FOLDS: Final = 3
# Half of the last digit that the published scores have.
SMALLEST: Final = 5e-7
# Draws the families of writers that are held out: of the seeds 0 to 3 the one that leaves most
# prompts with pairs to order.
FAMILIES_SEED: Final = 2

REMEDY: Final = "Make the file of AlpacaEval's public results with 'mpo-lightning data convert'."


@dataclass(frozen=True, kw_only=True)
class Split:
    """Prompts and writers of each part.

    Attributes:
        held_out: writers whose responses are tested and never trained.
        tuning: numbers of the rows with which learning rates are chosen.
        folds: numbers of the rows of each fold.
    """

    held_out: frozenset[str]
    tuning: list[int]
    folds: list[list[int]]


@cache
def _read(path: str) -> list[Row]:
    source = open_source(path)
    rows = []
    for name, given in source.rows(0, len(source)):
        row = check_object(given, name, "an object with prompt, responses, scores and models")
        for column in ("prompt", "responses", "scores", "models"):
            check_field(row, column, name, REMEDY)
        rows.append(dict(row))
    return rows


def family(writer: str) -> str:
    """Return a writer's family: the letters that its name begins with, in small ones."""
    found = re.match("[a-z]+", writer.lower())
    return writer if found is None else found.group()


def held_out_writers(writers: Sequence[str], seed: int = FAMILIES_SEED) -> frozenset[str]:
    """Draw whole families of writers, as long as at most a third of the writers are in them."""
    families = sorted({family(writer) for writer in writers})
    random.Random(seed).shuffle(families)
    drawn: list[str] = []
    for name in families:
        of = [writer for writer in writers if family(writer) == name]
        if len(drawn) + len(of) <= len(writers) // 3:
            drawn += of
    return frozenset(drawn)


def _numbers(row: Row, writers: Callable[[str], bool]) -> list[int]:
    """Return the numbers of a row's usable responses by some writers."""
    return [
        n
        for n, (writer, text) in enumerate(zip(row["models"], row["responses"], strict=True))
        if writers(writer) and text.strip() and len(text) <= LONGEST_RESPONSE
    ]


@dataclass(frozen=True)
class File:
    """A file of judged responses.

    Attributes:
        digest: digest of its content, which stands for it in the names of results.
        path: where it is.
    """

    digest: str
    path: str = field(repr=False)

    @classmethod
    def of(cls, path: str | None) -> "File":
        """Return a file in the package's own format, with the columns of AlpacaEval's results.

        Raises:
            StudyError: if none is named.
            DataError: if it cannot be read.
        """
        if path is None:
            raise StudyError(f"--data: name a file of judged responses. {REMEDY}")
        return cls(open_source(path).digest, path)


@dataclass(frozen=True, kw_only=True)
class Division:
    """Sizes of a division of the file's prompts.

    Args:
        responses: responses of a group.
        tuning: number of tuning prompts.
        most: number of the other prompts, at most. Defaults to all.
    """

    responses: int = 8
    tuning: int = 48
    most: int | None = None


@cache
def divide(path: str, division: Division) -> Split:
    """Divide the writers by family, and by chance the prompts with responses enough.

    They are enough where as many are by training writers as a group has, and half as many by
    writers that are held out.

    Raises:
        StudyError: if there are too few such prompts.
    """
    responses, tuning = division.responses, division.tuning
    rows = _read(path)
    writers = sorted({writer for row in rows for writer in row["models"]} - LEFT_OUT)
    held_out = held_out_writers(writers)
    trained = frozenset(writers) - held_out
    able = [
        number
        for number, row in enumerate(rows)
        if len(text_of(row["prompt"])) <= LONGEST_PROMPT
        and len(_numbers(row, trained.__contains__)) >= responses
        and len(_numbers(row, held_out.__contains__)) >= responses // 2
    ]
    random.Random(0).shuffle(able)
    rest = able[tuning:][: division.most]
    if len(rest) < FOLDS or not held_out:
        raise StudyError(
            f"--data: {path} has {len(able)} prompts with {responses} responses of at most "
            f"{LONGEST_RESPONSE} characters by training writers and {responses // 2} by others, of "
            f"{len(writers)} writers. {REMEDY}"
        )
    folds = [sorted(rest[fold::FOLDS]) for fold in range(FOLDS)]
    return Split(held_out=held_out, tuning=sorted(able[:tuning]), folds=folds)


SCALES: Final[Mapping[str, Callable[[Sequence[float]], Floats]]] = {
    "logit": lambda scores: np.asarray(logit(np.clip(scores, SMALLEST, 1 - SMALLEST))),
    "raw": lambda scores: np.asarray(scores, dtype=np.float64),
    "ranks": lambda scores: np.asarray(rankdata(scores) / len(scores)),
}


@dataclass(frozen=True, kw_only=True)
class JudgedGroups:
    """Groups of judged responses, and their rows.

    Args:
        file: the file.
        division: division of its prompts.
        fold: number of the fold that is tested; None for the tuning prompts.
        tested: the tested fold with all responses by held-out writers, instead of the other folds
            with some by training writers.
        scale: scale of the scores, of `SCALES`.
        attacked: put the attack on the judge, at any length, in the place of a response of some
            groups.
        most: number of prompts, at most. Defaults to all.
    """

    file: File
    division: Division
    fold: int | None
    tested: bool
    scale: str = "logit"
    attacked: bool = False
    most: int | None = None

    def numbers(self) -> list[int]:
        """Return the numbers of the rows in the file."""
        of = divide(self.file.path, self.division)
        if self.fold is None:
            return of.tuning
        folds = (f for f in range(FOLDS) if (f == self.fold) == self.tested)
        return sorted(number for fold in folds for number in of.folds[fold])[: self.most]

    def rows(self, worlds: Path) -> list[Row]:
        """Return the rows, with scores on the scale."""
        return [self._row(number) for number in self.numbers()]

    def _row(self, number: int) -> Row:
        row = _read(self.file.path)[number]
        held_out = divide(self.file.path, self.division).held_out
        if self.tested:
            kept = _numbers(row, held_out.__contains__)
        else:
            rng = random.Random(number)
            able = _numbers(row, lambda writer: writer not in held_out | LEFT_OUT)
            kept = rng.sample(able, min(self.division.responses, len(able)))
            attack = rng.random() < ATTACKED_SHARE
            if self.attacked and attack and ATTACK in row["models"]:
                kept[-1] = row["models"].index(ATTACK)
        found = picked(row, kept)
        return {**found, "scores": SCALES[self.scale](found["scores"]).tolist()}


# ------------------------------------------------------------------------------------ measuring


def measures(
    rewards: Sequence[float], scores: Sequence[float], tokens: Sequence[int]
) -> dict[str, float]:
    """Return the measures of one prompt's rewards; NaN where the prompt says nothing.

    Args:
        rewards: what orders the responses.
        scores: logits of the judge's probabilities.
        tokens: lengths of the responses.
    """
    right, pairs = 0.0, 0
    for a in range(len(scores)):
        for b in range(a):
            apart = scores[a] - scores[b]
            equally_long = abs(log(tokens[a] / tokens[b])) < EQUAL_LENGTH
            if equally_long and abs(apart) > LEAST_DIFFERENCE:
                by_reward = (rewards[a] - rewards[b]) * (1 if apart > 0 else -1)
                right += 1.0 if by_reward > 0 else 0.5 if by_reward == 0 else 0.0
                pairs += 1
    tau, length = tau_b(rewards, scores), tau_b(tokens, scores)
    own_length = tau_b(rewards, tokens)
    apart = (1 - own_length**2) * (1 - length**2)
    return {
        PRIMARY: right / pairs if pairs else nan,
        "pairs": float(pairs),
        "tau-b": tau,
        "tau-b, given length": (tau - own_length * length) / sqrt(apart) if apart > 0 else nan,
        "highest is best": float(scores[int(np.argmax(rewards))] == max(scores)),
    }


def ridge(trained: Sequence[Row], tested: Sequence[Row]) -> list[list[float]]:
    """Predict scores from words, pairs of words and length, learned from a group's differences.

    Args:
        trained: groups to learn from.
        tested: groups to predict for.

    Returns:
        a prediction for each response of each tested group.
    """
    from scipy.sparse import csr_matrix, hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import RidgeCV

    texts = [text for row in trained for text in row["responses"]]
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True).fit(texts)

    def features(of: Sequence[str]) -> Any:
        return hstack([words.transform(of), csr_matrix([[log(len(text))] for text in of])]).tocsr()

    wanted = np.concatenate([np.asarray(r["scores"]) - np.mean(r["scores"]) for r in trained])
    model = RidgeCV(alphas=np.logspace(-1, 3, 9)).fit(features(texts), wanted)
    return [model.predict(features(row["responses"])).tolist() for row in tested]


# ---------------------------------------------------------------------------------------- study


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of the study."""

    methods: int = len(METHODS)
    # Methods of the arms beside the main one, of the first ones.
    others: int = 3
    division: Division = Division()
    tuned: int = 64
    groups_per_step: int = 8
    rates: tuple[float, ...] = LEARNING_RATES


QUICK: Final = Sizes(
    methods=4,
    others=1,
    division=Division(responses=4, tuning=3, most=9),
    tuned=4,
    groups_per_step=2,
    rates=LEARNING_RATES[-1:],
)


class _Plan:
    """Makes the study's fits."""

    def __init__(self, base: Base, file: File, sizes: Sizes) -> None:
        self.base = base
        self.file = file
        self.sizes = sizes

    def groups(self, fold: int | None, *, tested: bool, **settings: Any) -> JudgedGroups:
        """Groups of the file."""
        division = self.sizes.division
        return JudgedGroups(file=self.file, division=division, fold=fold, tested=tested, **settings)

    def fit(self, loss: SetLoss, lr: float, fold: int, **settings: Any) -> Fit:
        """Fit for one epoch on the other folds, that is judged on this one."""
        return self._fit(
            loss,
            lr,
            seed=fold,
            groups=self.groups(fold, tested=False, **settings),
            judged=self.groups(fold, tested=True),
        )

    def tuning(self, loss: SetLoss, lr: float) -> Fit:
        """Fit that is judged on the tuning prompts, by training writers."""
        return self._fit(
            loss,
            lr,
            seed=100,
            groups=self.groups(0, tested=False, most=self.sizes.tuned),
            judged=self.groups(None, tested=False),
        )

    def _fit(
        self, loss: SetLoss, lr: float, *, seed: int, groups: JudgedGroups, judged: JudgedGroups
    ) -> Fit:
        per_step = self.sizes.groups_per_step
        return Fit(
            base=self.base,
            groups=(groups,),
            loss=loss,
            lr=lr,
            seed=seed,
            steps=max(1, len(groups.numbers()) // per_step),
            groups_per_step=per_step,
            judged=judged,
        )


def _conditions(arms: Sequence[str], sizes: Sizes) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return each condition's method and the settings of its groups."""
    names = list(METHODS)[: sizes.methods]
    found: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in names}
    if "scales" in arms:
        for scale in ("raw", "ranks"):
            # To best and worst a scale is all the same.
            for name in names[: min(2, sizes.others)]:
                found[f"{name}, {scale}"] = (name, {"scale": scale})
    if "example" in arms:
        for name in names[: sizes.others]:
            found[f"{name}, attacked"] = (name, {"attacked": True})
    return found


def study(
    runner: Runner, form: Form, base: Base, file: File, arms: Sequence[str] = ARMS
) -> Findings:
    """Run the study.

    Args:
        runner: performs the tasks.
        form: size of the study; the seeds are those of its folds.
        base: the model.
        file: the judged responses.
        arms: parts of the study, of `ARMS`; "main" is always run.

    Raises:
        StudyError: if scikit-learn is missing, or the file has too few prompts.
    """
    if find_spec("sklearn") is None:
        raise StudyError("The study needs scikit-learn: pip install scikit-learn.")
    sizes = QUICK if form.quick else Sizes()
    plan = _Plan(base, file, sizes)
    methods = {name: METHODS[name] for name in list(METHODS)[: sizes.methods]}
    rates, tried = chosen_rates(runner, methods, plan.tuning, sizes.rates)
    conditions = _conditions(arms, sizes)
    fits = {
        (label, fold): plan.fit(METHODS[name], rates[name], fold, **settings)
        for label, (name, settings) in conditions.items()
        for fold in range(FOLDS)
    }
    runner(list(fits.values()), "Fits")
    worlds = runner.folder / "worlds"
    table: list[dict[str, Any]] = []
    for fold in range(FOLDS):
        tested = plan.groups(fold, tested=True)
        rows = tested.rows(worlds)
        by_row = {label: of_rows(fits[label, fold].predictions(worlds)) for label in conditions}
        regression = ridge(plan.groups(fold, tested=False).rows(worlds), rows)
        for place, (number, row) in enumerate(zip(tested.numbers(), rows, strict=True)):
            # A group that is too long is missing, of all conditions.
            if place in by_row["MPO"]:
                of = {label: found[place] for label, found in by_row.items()}
                rewards = _rewards(of, regression[place])
                tokens = [each.tokens for each in of["MPO"]]
                scores = [row["scores"][each.response] for each in of["MPO"]]
                table += [
                    {"condition": label, "fold": fold, "prompt": number, **found}
                    for label, values in rewards.items()
                    for found in [measures(values, scores, tokens)]
                ]
    tables = {"prompts": table, "fits": fit_table(fits, worlds), "tuning": tried}
    return _findings(tables, rates, file, plan)


def _rewards(
    of: Mapping[str, Sequence[Prediction]], regression: Sequence[float]
) -> dict[str, list[float]]:
    """Return by condition what orders a prompt's responses, baselines among them."""
    any_of = next(iter(of.values()))
    return {
        **{label: [each.log_ratio for each in found] for label, found in of.items()},
        **{
            f"{label}, a token": [each.log_ratio / each.tokens for each in found]
            for label, found in of.items()
        },
        LIKELIHOOD: [each.reference_logp / each.tokens for each in any_of],
        "reference, log-probability": [each.reference_logp for each in any_of],
        RIDGE: [regression[each.response] for each in any_of],
        "length": [float(each.tokens) for each in any_of],
    }


def _findings(
    tables: Mapping[str, list[dict[str, Any]]],
    rates: Mapping[str, float],
    file: File,
    plan: _Plan,
) -> Findings:
    table = tables["prompts"]
    labels = list(dict.fromkeys(row["condition"] for row in table))

    def values(measure: str) -> dict[str, Floats]:
        """Values of each condition, over the prompts that have one under every condition."""
        all_of = np.array(
            [[row[measure] for row in table if row["condition"] == label] for label in labels]
        )
        kept = all_of[:, ~np.isnan(all_of).any(0)]
        return {label: of[None] for label, of in zip(labels, kept, strict=True)}

    primary = values(PRIMARY)
    contrasts = compared(primary, CONTRASTS)
    others = [name for name in table[0] if name not in ("condition", "fold", "prompt", "pairs")]
    means = {
        measure: {
            label: bootstrap(found)[0] for label, found in values(measure).items() if found.size
        }
        for measure in others
    }
    pairs = [(label, "MPO") for label in METHODS if label in labels]
    pairs += [(label, label.split(",")[0]) for label in labels if label.split(",")[0] in METHODS]
    of = divide(file.path, plan.sizes.division)
    summary = {
        "contrasts": contrasts,
        "differences": described(primary, [pair for pair in pairs if pair[0] != pair[1]]),
        "means": {
            measure: {label: value.to_json() for label, value in found.items()}
            for measure, found in means.items()
        },
        "pairs_per_prompt": float(np.mean([r["pairs"] for r in table if r["condition"] == "MPO"])),
        "learning_rates": dict(rates),
        "data": {
            "digest": file.digest,
            "held_out_writers": sorted(of.held_out),
            "prompts": [len(fold) for fold in of.folds],
        },
    }
    figures = {
        "accuracy": lambda: drawn(
            {name: v for name, v in means[PRIMARY].items() if not name.endswith(", a token")},
            PRIMARY,
            chance=0.5,
        )
    }
    return Findings(summary, tables, figures, shown(contrasts))
