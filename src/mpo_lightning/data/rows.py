"""Check of one canonical row: ``prompt``, ``responses``, ``scores``, optionally ``truncated``."""

from mpo_lightning.checks import plain
from mpo_lightning.data.conversation import CONTEXT, check_conversation, check_responses
from mpo_lightning.data.groups import (
    PreferenceGroup,
    bad_field,
    check_field,
    check_list,
    check_number,
    check_object,
    show,
)

__all__ = ["check_row"]

FIELDS = ("prompt", "responses", "scores", "truncated", *CONTEXT)


def _check_scores(scores: object, count: int, source: str) -> list[float]:
    remedy = "Give one score for each response."
    given = check_list(scores, "scores", source, "a list of numbers", remedy)
    values = [check_number(score, f"scores[{index}]", source) for index, score in enumerate(given)]
    if len(values) != count:
        found = f"{len(values)} scores for {count} responses"
        remedy = "Repair the row: which score belongs to which response cannot be guessed."
        raise bad_field(source, "scores", found, "one score for each response", remedy)
    return values


def _check_truncated(truncated: object, count: int, source: str) -> list[bool]:
    remedy = "Say for each response whether its generation hit the limit, or drop the column."
    listed = check_list(truncated, "truncated", source, "a list of true and false", remedy)
    given = list(map(plain, listed))
    for index, value in enumerate(given):
        if not isinstance(value, bool):
            field = f"truncated[{index}]"
            raise bad_field(source, field, show(value), "true or false", remedy)
    if len(given) != count:
        found = f"{len(given)} entries for {count} responses"
        remedy = "Repair the row, or drop the column."
        raise bad_field(source, "truncated", found, "one for each response", remedy)
    return [bool(value) for value in given]


def check_row(row: object, source: str) -> PreferenceGroup:
    """Check one canonical row.

    Args:
        row: a mapping with ``prompt``, ``responses`` and ``scores``, optionally ``truncated`` and
            the columns that `check_conversation` reads; others pass through.
        source: "file:row", for messages.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    row = check_object(row, source, "an object with prompt, responses and scores")
    given = {name: check_field(row, name, source) for name in ("prompt", "responses", "scores")}
    prompt, arguments = check_conversation(row, source)
    responses = check_responses(given["responses"], source)
    scores = _check_scores(given["scores"], len(responses), source)
    # Null where other rows of the file have it.
    truncated = row.get("truncated")
    if truncated is not None:
        truncated = _check_truncated(truncated, len(responses), source)
    extra = {str(name): value for name, value in row.items() if name not in FIELDS}
    return PreferenceGroup(prompt, responses, scores, source, extra, truncated, arguments)
