"""Scoring of rows with responses, into a folder of parts with canonical rows."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from mpo_lightning.checks import check_arguments
from mpo_lightning.data.conversation import (
    CONTEXT,
    check_conversation,
    check_responses,
    context_columns,
    parse_texts,
)
from mpo_lightning.data.groups import bad_field, check_field, check_object, collect_errors
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.sources import open_source
from mpo_lightning.errors import RolloutError
from mpo_lightning.generation.generate import Done
from mpo_lightning.rollouts.part_folder import PartFolder
from mpo_lightning.rollouts.scorers import (
    FunctionScorer,
    RewardModel,
    RewardModelConfig,
    Scorable,
    Scores,
    load_reward_model,
    reward_model_identity,
    written_date,
)

__all__ = ["score"]


def score(
    *,
    data: str,
    out: str,
    reward_model: RewardModelConfig = RewardModelConfig(),  # noqa: B008 (frozen)
    function: str | None = None,
    replace: bool = False,
    rows_per_part: int = 256,
    progress: bool = True,
) -> PartFolder:
    """Score responses, with a reward model or with your own function.

    Run again after an interruption, it continues. Processes started by torchrun share the work.

    Args:
        data: .jsonl, .json, .csv, .tsv or .parquet file, folder of such files (as ``sample`` writes
            it) or of AlpacaEval's answers, saved data set or hub id, with the columns ``prompt``
            and ``responses``. Others pass through.
        out: folder of the output, which ``fit`` reads.
        reward_model: the model that scores, unless a function does.
        function: ``module:function`` that scores instead of a reward model: called as f(prompt,
            responses) for each row, it returns one number for each response; higher is better.
        replace: whether to replace scores that the rows have already; otherwise they are refused.
        rows_per_part: rows in each file of the output; a killed run loses at most one part.
        progress: whether to show a progress bar.

    Raises:
        DataError: if the rows cannot be used.
        PolicyError: if the reward model cannot be quantised.
        RolloutError: if a setting cannot be used, or scoring fails.
    """
    check_arguments(score, locals())
    if (reward_model.path is not None) == (function is not None):
        raise RolloutError("Name either a reward_model.path or a function.")
    source = open_source(data)

    def check(item: tuple[str, object]) -> None:
        _checked(*item, replace=replace)

    def load_checked() -> RewardModel:
        model = load_reward_model(dated)
        rows = source.rows(0, len(source))
        model.check(_checked(*item, replace=replace)[0] for item in rows)
        return model

    collect_errors(source.rows(0, len(source)), check)
    settings: dict[str, Any] = {"data": source.digest, "replace": replace}
    load: Callable[[], FunctionScorer | RewardModel]
    if function is not None:
        by_function = FunctionScorer(function)
        settings |= by_function.identity()
        name, load = function, lambda: by_function
    else:
        settings["reward_model"] = reward_model_identity(reward_model)
        settings["date"] = written_date(reward_model)
        name, load = str(reward_model.path), cache(load_checked)
    folder = PartFolder(out, "score", settings, rows=len(source), rows_per_part=rows_per_part)
    dated = dataclasses.replace(reward_model, date=folder.settings.get("date") or reward_model.date)

    def make(start: int, stop: int, report: DataReport, done: Done) -> list[dict[str, Any]]:
        read = [_checked(*item, replace=replace) for item in source.rows(start, stop)]
        scorer = load()
        scores = scorer([item for item, _ in read], done)
        while scorer.noted:
            report.note(*scorer.noted.pop(0))
        made = (
            _row(item, row, values, name, report)
            for (item, row), values in zip(read, scores, strict=True)
        )
        return [row for row in made if row is not None]

    folder.fill(make, title="Scoring", unit="row", progress=progress)
    return folder


def _checked(source: str, row: object, *, replace: bool) -> tuple[Scorable, Mapping[str, Any]]:
    whole = check_object(row, source, "an object with prompt and responses")
    given: Mapping[str, Any] = parse_texts(whole, source)[0]
    prompt, arguments = check_conversation(given, source)
    responses = check_responses(check_field(given, "responses", source), source)
    if given.get("scores") is not None and not replace:
        remedy = "Set replace: true to replace them, or rename the column to keep them."
        raise bad_field(source, "scores", "scores", "none yet", remedy)
    truncated = given.get("truncated")
    if truncated is not None and len(truncated) != len(responses):
        found = f"{len(truncated)} entries for {len(responses)} responses"
        remedy = "Repair the row, or remove the column."
        raise bad_field(source, "truncated", found, "one for each response", remedy)
    return Scorable(prompt, responses, source, arguments), given


def _row(
    item: Scorable, row: Mapping[str, Any], scores: Scores, scorer: str, report: DataReport
) -> dict[str, Any] | None:
    """Return the canonical row, or None if too few responses are left; count what was dropped."""
    remaining = [slot for slot, value in enumerate(scores) if value is not None]
    report.note(
        "responses dropped: beyond the scorer's max_length",
        item.source,
        len(scores) - len(remaining),
    )
    if len(remaining) < 2:
        report.drop("with fewer than two responses left", item.source)
        return None
    report.note("rows have equal scores only", item.source, int(len(set(scores)) == 1))
    report.note("rows had scores, now replaced", item.source, int(row.get("scores") is not None))
    report.keep(len(remaining))
    scored: dict[str, Any] = {
        "prompt": item.prompt,
        "responses": [item.responses[slot] for slot in remaining],
        "scores": [scores[slot] for slot in remaining],
    }
    if row.get("truncated") is not None:
        scored["truncated"] = [row["truncated"][slot] for slot in remaining]
    scored |= context_columns(item.template_arguments)
    read = {*scored, *CONTEXT}
    others = {str(name): value for name, value in row.items() if name not in read}
    for name, value in others.items():
        # Its entries may or may not belong to the responses.
        as_many = isinstance(value, list) and len(value) == len(scores) > len(remaining)
        report.note(f"columns {name} left as long as the responses were", item.source, int(as_many))
    return {**scored, **others, "scored_by": scorer}
