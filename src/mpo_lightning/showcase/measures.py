"""Measures of scored answers, one value a prompt: what the report and the study compare."""

import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpo_lightning.data.groups import DataError, check_field, check_object
from mpo_lightning.data.sources import open_source
from mpo_lightning.showcase.constraints import constraints_of, text_of

__all__ = ["MEASURES", "Answers", "met_by_kind", "paired", "read_answers"]

REMEDY: Final = "Sample and score the prompts of 'python -m mpo_lightning.showcase prompts'."


class Answers(NamedTuple):
    """A prompt's scored answers.

    Attributes:
        prompt: text of the prompt.
        responses: the answers.
        scores: share of the prompt's constraints that each answer meets.
        truncated: whether each was cut at the limit of new tokens.
    """

    prompt: str
    responses: list[str]
    scores: list[float]
    truncated: list[bool]


def read_answers(folder: Path) -> dict[int, Answers]:
    """Read what `score` wrote, by the prompts' ``key``.

    Raises:
        DataError: if it cannot be read, or its rows are not those of the show case's prompts.
    """
    source = open_source(str(folder))
    found = {}
    for name, given in source.rows(0, len(source)):
        row = check_object(given, name, "an object with prompt and responses")
        for column in ("key", "prompt", "responses", "scores", "truncated"):
            check_field(row, column, name, REMEDY)
        text = text_of(row["prompt"])
        found[row["key"]] = Answers(text, row["responses"], row["scores"], row["truncated"])
    return found


def _words(texts: list[str]) -> list[list[str]]:
    return [re.findall(r"\w+", text.lower()) for text in texts]


def _distinct_pairs(answers: Answers) -> float:
    pairs = [pair for words in _words(answers.responses) for pair in pairwise(words)]
    return len(set(pairs)) / max(1, len(pairs))


MEASURES: Final[Mapping[str, Callable[[Answers], float]]] = {
    "share of constraints met": lambda of: float(np.mean(of.scores)),
    "both met": lambda of: float(np.mean([score == 1 for score in of.scores])),
    "words": lambda of: float(np.mean([len(words) for words in _words(of.responses)])),
    "cut at the limit": lambda of: float(np.mean(of.truncated)),
    "distinct pairs of words": _distinct_pairs,
}
"""Mean over a prompt's answers; of the last, the share among all pairs of the prompt's answers."""


def paired(
    first: Mapping[int, Answers], second: Mapping[int, Answers], measure: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a measure of two sets of answers over the prompts that both answer, in their order.

    Raises:
        DataError: if they have no prompt in common.
    """
    keys = sorted(first.keys() & second.keys())
    if not keys:
        raise DataError("The two folders have no prompt in common.")
    value = MEASURES[measure]
    values = (np.array([value(of[key]) for key in keys]) for of in (first, second))
    one, other = values
    return one, other


def met_by_kind(answers: Mapping[int, Answers]) -> dict[str, float]:
    """Return the share of answers that meet each kind of constraint, of those asked for it."""
    met: dict[str, list[bool]] = {}
    for each in answers.values():
        for constraint in constraints_of(each.prompt):
            met.setdefault(constraint.kind.name, []).extend(map(constraint.is_met, each.responses))
    return {kind: float(np.mean(values)) for kind, values in met.items()}
