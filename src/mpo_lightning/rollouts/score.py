"""From rows with responses to canonical rows, which have scores: a folder of parts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from tqdm.auto import tqdm  # type: ignore[import-untyped]

from mpo_lightning.data.groups import DataError, check_prompt, check_responses, collect_errors
from mpo_lightning.data.sources import open_source
from mpo_lightning.errors import RolloutError
from mpo_lightning.rollouts.part_folder import PartFolder, Tally, Workers
from mpo_lightning.rollouts.scorers import (
    FunctionScorer,
    RewardModelConfig,
    Scorable,
    Scores,
    load_reward_model,
    reward_model_identity,
)

__all__ = ["score"]


class Scorer(Protocol):
    """Gives numbers to responses."""

    def __call__(self, items: Sequence[Scorable], done: Callable[[int], None]) -> list[Scores]:
        """Scores of every response of every item; ``done`` is told of progress."""


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
    """Score responses, with a reward model or with a function of one's own.

    Started again, it goes on where it was cut. Started by torchrun, the processes share the work.

    Args:
        data: .jsonl, .json or .parquet file, folder of such files (as ``sample`` writes it), saved
            data set or hub id, with the columns ``prompt`` and ``responses``. Others pass through.
        out: folder of the output, which ``fit`` reads.
        reward_model: the model that scores, if no function does.
        function: ``module:function`` that scores in the reward model's place: called as f(prompt,
            responses) for each row, it gives one number for each response; higher is better.
        replace: replace scores that the rows have already, which is refused otherwise.
        rows_per_part: rows in each file of the output; a killed run loses one such part.
        progress: show a progress bar.

    Raises:
        DataError: if the rows cannot be used.
        PolicyError: if the reward model cannot be quantised.
        RolloutError: if something else of this is not possible.
    """
    if (reward_model.path is not None) == (function is not None):
        raise RolloutError("Name either a reward_model.path or a function.")
    source = open_source(data)

    def check(item: tuple[str, object]) -> None:
        _checked(*item, replace=replace)

    collect_errors(source.rows(0, len(source)), check)
    settings: dict[str, Any] = {"data": source.digest, "replace": replace}
    load: Callable[[], Scorer]
    if function is not None:
        by_function = FunctionScorer(function)
        settings |= by_function.identity()
        name, load = function, lambda: by_function
    else:
        settings["reward_model"] = reward_model_identity(reward_model)
        name, load = str(reward_model.path), cache(lambda: load_reward_model(reward_model))
    folder = PartFolder(out, "score", settings, rows=len(source), rows_per_part=rows_per_part)
    workers = Workers.from_environment()
    missing = folder.missing(workers)
    spans = [folder.span(part) for part in missing]
    with tqdm(
        total=sum(stop - start for start, stop in spans),
        desc="Scoring",
        unit="row",
        disable=not progress or workers.rank > 0,
    ) as bar:
        for part, (start, stop) in zip(missing, spans, strict=True):
            read = [_checked(*item, replace=replace) for item in source.rows(start, stop)]
            scores = load()([item for item, _ in read], bar.update)
            tally = Tally(read=len(read))
            written = [
                new
                for (item, row), values in zip(read, scores, strict=True)
                if (new := _row(item, row, values, name, tally)) is not None
            ]
            folder.write(part, written, tally)
    print(folder.summary(workers))
    return folder


def _checked(source: str, row: object, *, replace: bool) -> tuple[Scorable, Mapping[str, Any]]:
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError.of_field(
            source,
            "row",
            found=type(row).__name__,
            expected="an object with prompt and responses",
            remedy="Write one object a row.",
        )
    for column in ("prompt", "responses"):
        if row.get(column) is None:
            found = "null" if column in row else f"no such field among {sorted(map(str, row))}"
            raise DataError.of_field(
                source, column, found=found, expected="a value", remedy="Rename or add the field."
            )
    if row.get("scores") is not None and not replace:
        raise DataError.of_field(
            source,
            "scores",
            found="scores",
            expected="none yet",
            remedy="Set replace: true to replace them, or rename the column to keep them.",
        )
    prompt = check_prompt(row["prompt"], source)
    responses = check_responses(row["responses"], source)
    truncated = row.get("truncated")
    if truncated is not None and len(truncated) != len(responses):
        raise DataError.of_field(
            source,
            "truncated",
            found=f"{len(truncated)} entries for {len(responses)} responses",
            expected="one for each response",
            remedy="Repair the row, or remove the column.",
        )
    return Scorable(prompt, responses, source), row


def _row(
    item: Scorable, row: Mapping[str, Any], scores: Scores, scorer: str, tally: Tally
) -> dict[str, Any] | None:
    """The canonical row, with what was left out counted; none if there is too little left."""
    kept = [slot for slot, value in enumerate(scores) if value is not None]
    tally.note(
        "responses dropped: beyond the scorer's max_length", item.source, len(scores) - len(kept)
    )
    if len(kept) < 2:
        tally.drop("with fewer than two responses left", item.source)
        return None
    tally.note("rows have equal scores only", item.source, int(len(set(scores)) == 1))
    tally.note("rows had scores, now replaced", item.source, int(row.get("scores") is not None))
    tally.written += 1
    tally.responses += len(kept)
    chosen: dict[str, Any] = {
        "prompt": item.prompt,
        "responses": [item.responses[slot] for slot in kept],
        "scores": [scores[slot] for slot in kept],
    }
    if row.get("truncated") is not None:
        chosen["truncated"] = [row["truncated"][slot] for slot in kept]
    others = {str(name): value for name, value in row.items() if name not in chosen}
    for name, value in others.items():
        # Whether its entries belong to the responses cannot be known.
        as_many = isinstance(value, list) and len(value) == len(scores) > len(kept)
        tally.note(f"columns {name} left as long as the responses were", item.source, int(as_many))
    return {**chosen, **others, "scored_by": scorer}
