"""Token ids that a model has no embedding for, found before it computes anything."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mpo_lightning.batch import Request
from mpo_lightning.data.dataset import Groups
from mpo_lightning.data.groups import DataError, bad_field, collect_errors
from mpo_lightning.data.tokens import GroupTokenizer

__all__ = ["check_groups", "check_ids", "may_exceed", "prompts_within"]

REMEDY = (
    "The tokenizer is another model's, or has tokens that were added to it alone: use the model's "
    "own, or save the model with an embedding that has them (resize_token_embeddings)."
)


def may_exceed(tokenizer: Any, tokens: int | None) -> bool:
    """Whether a tokenizer has ids that an embedding of so many tokens lacks."""
    return tokens is not None and max(tokenizer.get_vocab().values()) >= tokens


def check_ids(
    ids: Sequence[int], tokens: int | None, tokenizer: Any, source: str, field: str
) -> None:
    """Check that a model has all tokens of a text.

    Args:
        ids: token ids of the text.
        tokens: number of token ids of the model's embedding.
        tokenizer: the tokenizer that they are of, for the message.
        source: "file:row".
        field: the column, with an index where it is a list.

    Raises:
        DataError: naming the first token that it lacks.
    """
    beyond = () if tokens is None else (token for token in ids if token >= tokens)
    for token in beyond:
        found = f"token {token} ({tokenizer.convert_ids_to_tokens(token)!r})"
        expected = f"tokens below {tokens}, which is the size of the model's embedding"
        raise bad_field(source, field, found, expected, REMEDY)


def prompts_within(
    requests: Iterable[Request], tokenizer: GroupTokenizer, tokens: int | None
) -> list[list[int]]:
    """Return the tokens of prompts, and check that a model has them all.

    Args:
        requests: the prompts.
        tokenizer: tokenizer with the rules of training.
        tokens: number of token ids of the model's embedding.

    Raises:
        DataError: for all prompts together that cannot be tokenised, or hold a token that it lacks.
    """

    def ids_of(item: Request) -> list[int]:
        ids = tokenizer.prompt_ids(item.prompt, item.source, item.template_arguments)
        check_ids(ids, tokens, tokenizer.tokenizer, item.source, "prompt")
        return ids

    return collect_errors(requests, ids_of)


def check_groups(groups: Groups, tokens: int | None, tokenizer: Any, role: str) -> None:
    """Check that a model has all tokens of some groups.

    Args:
        groups: the groups.
        tokens: number of token ids of the model's embedding.
        tokenizer: the tokenizer that made them.
        role: the setting that names their files, for the message.

    Raises:
        DataError: naming the first token that it lacks, and counting its groups.
    """
    if tokens is None or not may_exceed(tokenizer, tokens):
        return
    beyond = np.flatnonzero(groups.largest_ids >= tokens)
    if not len(beyond):
        return
    group = groups[int(beyond[0])]
    places = group.indices or range(len(group.responses))
    fields = ("prompt", *(f"responses[{place}]" for place in places))
    for field, ids in zip(fields, (group.prompt, *group.responses), strict=True):
        source = f"{len(beyond):,} of {len(groups):,} groups, first {group.source}"
        try:
            check_ids(ids.tolist(), tokens, tokenizer, source, field)
        except DataError as error:
            error.field = role
            raise
