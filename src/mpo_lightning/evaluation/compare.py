"""Comparison of two models' answers to the same prompts: scores and win rates."""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mpo_lightning.checks import check_arguments
from mpo_lightning.data.groups import DataError, check_number
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.sources import open_source
from mpo_lightning.errors import RolloutError
from mpo_lightning.evaluation.formats import ReadAnswers, read_answers
from mpo_lightning.evaluation.win_rates import (
    Estimate,
    Games,
    length_controlled_win_rate,
    mean_over_prompts,
    win_rate,
)
from mpo_lightning.files import write_whole
from mpo_lightning.printable import printable
from mpo_lightning.rollouts.scorers import (
    FunctionScorer,
    RewardModelConfig,
    Scorable,
    load_reward_model,
    reward_model_identity,
)

__all__ = ["compare"]

VERSION = 1
SHOWN_EXAMPLES = 3


def compare(
    *,
    policy: str,
    reference: str,
    reward_model: RewardModelConfig = RewardModelConfig(),  # noqa: B008 (frozen)
    function: str | None = None,
    difficulty: str | None = None,
    resamples: int = 1000,
    seed: int = 0,
    out: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Score two models' answers to the same prompts and report how often each wins.

    Both files are what ``predict`` or ``sample`` write, AlpacaEval's ``model_outputs.json``,
    Arena-Hard's answers, or rows with ``prompt`` and ``completion``.

    Args:
        policy: file with the answers of the model to be judged.
        reference: file with the answers of the model that it is compared with.
        reward_model: the model that scores, unless a function does.
        function: ``module:function`` that scores instead of a reward model: called as f(prompt,
            responses) for each prompt, it returns one number for each response; higher is better.
        difficulty: column of the reference's rows with the difficulty of the prompt, a number.
        resamples: number of bootstrap samples of the prompts, for the intervals.
        seed: seed of these draws.
        out: JSON file for the results; one that exists is never overwritten.
        progress: show a progress bar.

    Returns:
        The content of ``out``.

    Raises:
        DataError: if the files cannot be used.
        PolicyError: if the reward model cannot be quantised.
        RolloutError: if a setting cannot be used, the scorer fails, or ``out`` cannot be written.
    """
    check_arguments(compare, locals())
    if (reward_model.path is not None) == (function is not None):
        raise RolloutError("Name either a reward_model.path or a function.")
    if resamples < 100:
        raise RolloutError(f"resamples must be at least 100, got {resamples}.")
    target = None if out is None else Path(out).expanduser()
    if target is not None and target.exists():
        raise RolloutError(f"out: {out} exists already. Move it, or name another file.")
    pairs, dropped = _matched(policy, reference)
    # Before anything is loaded.
    difficulties = None if difficulty is None else [_difficulty(b, difficulty) for _, b in pairs]
    scorer: Any
    if function is not None:
        scorer = FunctionScorer(function)
        identity = scorer.identity()
    else:
        scorer, identity = load_reward_model(reward_model), reward_model_identity(reward_model)
    items = [
        Scorable(a.prompt, [*a.responses, *b.responses], a.source, a.template_arguments)
        for a, b in pairs
    ]
    with tqdm(total=len(items), desc="Scoring", unit="prompt", disable=not progress) as bar:
        scores = scorer(items, bar.update)
    noted = DataReport("compare")
    for note in scorer.noted:
        noted.note(*note)
    kept = [place for place, values in enumerate(scores) if None not in values]
    dropped["beyond the scorer's max_length"] = [
        items[place].source for place, values in enumerate(scores) if None in values
    ]
    if not kept:
        raise RolloutError("No prompt has answers of both that the scorer takes.")
    results = _results(
        [pairs[place] for place in kept],
        [scores[place] for place in kept],
        None if difficulties is None else [difficulties[place] for place in kept],
        resamples=resamples,
        seed=seed,
    )
    content = {
        "format": "mpo-lightning compare",
        "version": VERSION,
        "settings": {
            "policy": policy,
            "reference": reference,
            "scored_by": identity,
            "difficulty": difficulty,
            "resamples": resamples,
            "seed": seed,
        },
        "dropped": {
            reason: {"prompts": len(sources), "first": sources[:SHOWN_EXAMPLES]}
            for reason, sources in dropped.items()
            if sources
        },
        "noted": {
            reason: {"responses": count, "first": noted.examples[reason]}
            for reason, count in noted.changed.items()
        },
        **results,
    }
    _show(content)
    if target is not None:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise RolloutError(f"out: {out}: cannot be written: {error}.") from error
        print(printable(f"Wrote {out}"))
    return content


# -------------------------------------------------------------------------------------- matching


def _matched(
    policy: str, reference: str
) -> tuple[list[tuple[ReadAnswers, ReadAnswers]], dict[str, list[str]]]:
    """Return both models' answers to each common prompt, and the prompts of one file only.

    Repetitions of a prompt are matched in the order of the files.

    Raises:
        DataError: if there is no such prompt.
    """
    first, second = (_by_prompt(read_answers(open_source(name))) for name in (policy, reference))
    pairs = [(answers, second[key]) for key, answers in first.items() if key in second]
    if not pairs:
        raise DataError(
            f"{policy} and {reference} have no prompt in common; the first are "
            f"{_first_prompt(first)} and {_first_prompt(second)}."
        )
    return pairs, {
        "only in the policy's file": [a.source for key, a in first.items() if key not in second],
        "only in the reference's file": [b.source for key, b in second.items() if key not in first],
    }


def _by_prompt(answers: Iterable[ReadAnswers]) -> dict[tuple[str, int], ReadAnswers]:
    found: dict[tuple[str, int], ReadAnswers] = {}
    times: dict[str, int] = {}
    for each in answers:
        asked = [each.prompt, each.template_arguments]
        key = json.dumps(asked, sort_keys=True, default=str)
        found[key, times.get(key, 0)] = each
        times[key] = times.get(key, 0) + 1
    return found


def _first_prompt(answers: dict[tuple[str, int], ReadAnswers]) -> str:
    return repr(next(iter(answers.values())).prompt)[:60]


def _difficulty(answers: ReadAnswers, column: str) -> float:
    return check_number(answers.row.get(column), column, answers.source)


# --------------------------------------------------------------------------------------- results


def _results(
    pairs: list[tuple[ReadAnswers, ReadAnswers]],
    scores: list[list[float]],
    difficulties: list[float] | None,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    of_policy = [s[: len(a.responses)] for (a, _), s in zip(pairs, scores, strict=True)]
    of_reference = [s[len(a.responses) :] for (a, _), s in zip(pairs, scores, strict=True)]
    outcomes, lengths, prompts = zip(
        *(
            ((1 + np.sign(score_a - score_b)) / 2, len(text_a) - len(text_b), number)
            for number, (a, b) in enumerate(pairs)
            for score_a, text_a in zip(of_policy[number], a.texts, strict=True)
            for score_b, text_b in zip(of_reference[number], b.texts, strict=True)
        ),
        strict=True,
    )
    games = Games(
        np.array(outcomes, dtype=np.float64),
        np.array(lengths, dtype=np.float64),
        np.array(prompts),
        None if difficulties is None else np.array(difficulties),
    )
    differences = [np.mean(a) - np.mean(b) for a, b in zip(of_policy, of_reference, strict=True)]
    draws = {"resamples": resamples, "seed": seed}
    controlled = length_controlled_win_rate(games, **draws)
    return {
        "prompts": len(pairs),
        "games": {
            "wins": int((games.outcomes == 1).sum()),
            "ties": int((games.outcomes == 0.5).sum()),
            "losses": int((games.outcomes == 0).sum()),
        },
        "win_rate": _plain(win_rate(games)),
        "length_controlled_win_rate": None if controlled is None else _plain(controlled),
        "score_difference": _plain(mean_over_prompts(np.array(differences), **draws)),
        "policy": _of_model([a for a, _ in pairs], of_policy),
        "reference": _of_model([b for _, b in pairs], of_reference),
    }


def _of_model(answers: list[ReadAnswers], scores: list[list[float]]) -> dict[str, float]:
    """Summarise one model's answers: counts, and means over prompts."""
    lengths = [float(np.mean([len(text) for text in each.texts])) for each in answers]
    return {
        "responses": sum(len(each.responses) for each in answers),
        "truncated": sum(each.truncated for each in answers),
        "empty": sum(not text.strip() for each in answers for text in each.texts),
        "score": float(np.mean([np.mean(values) for values in scores])),
        "length": float(np.mean(lengths)),
    }


def _plain(estimate: Estimate) -> dict[str, float | None]:
    # JSON has no NaN.
    return {k: None if math.isnan(v) else v for k, v in asdict(estimate).items()}


def _show(content: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = Table("", "policy", "reference", title=f"{content['prompts']} prompts", box=None)
    for name, key, form in (
        ("responses", "responses", "d"),
        ("mean score", "score", ".3f"),
        ("mean length, characters", "length", ".1f"),
        ("cut at the limit", "truncated", "d"),
        ("empty", "empty", "d"),
    ):
        table.add_row(name, *(format(content[side][key], form) for side in ("policy", "reference")))
    console.print(table)
    games = content["games"]
    console.print(
        f"policy against reference: {games['wins']} wins, {games['ties']} ties, "
        f"{games['losses']} losses; means over prompts, 95 % intervals"
    )
    results = Table(box=None, show_header=False)
    for name, key in (
        ("win rate, a tie counts 1/2", "win_rate"),
        ("win rate at equal length", "length_controlled_win_rate"),
        ("difference of mean scores", "score_difference"),
    ):
        results.add_row(name, _text(content[key]))
    console.print(results)
    for reason, of_reason in content["dropped"].items():
        first = printable(", ".join(of_reason["first"]))
        console.print(f"not compared: {of_reason['prompts']} prompts {reason} (first: {first})")
    for reason, of_reason in content["noted"].items():
        first = printable(", ".join(of_reason["first"]))
        console.print(f"noted: {of_reason['responses']} {reason} (first: {first})")


def _text(estimate: dict[str, float | None] | None) -> str:
    if estimate is None:
        return "not identified: all lengths differ by the same number"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}, without interval: all outcomes are equal"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
