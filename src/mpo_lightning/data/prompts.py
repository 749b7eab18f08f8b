"""Prompts to be answered: checked rows of a source, each with the key of its random numbers."""

import json
from collections.abc import Mapping
from hashlib import blake2b

from mpo_lightning.batch import Prompt, Request
from mpo_lightning.data.conversation import (
    as_messages,
    check_conversation,
    check_prompt,
    parse_texts,
)
from mpo_lightning.data.groups import check_object, collect_errors
from mpo_lightning.data.sources import RowSource, open_source, rename_columns

__all__ = ["OF_RESPONSES", "PromptSource", "has_prompt_only", "request"]

# Columns that may hold a prompt, in order of precedence: the package's own (and Arena-Hard's), and
# AlpacaEval's.
PROMPT_COLUMNS = ("prompt", "instruction")
# Columns that show that a row holds responses.
RESPONSE_COLUMNS = frozenset(
    {
        *("responses", "response", "completions", "completion", "generations", "answers"),
        *("chosen", "rejected", "scores", "score"),
    }
)
# Columns of an input row that belong to its own responses and not to newly sampled ones.
OF_RESPONSES = ("responses", "scores", "truncated", "sampled")


def request(
    prompt: Prompt,
    source: str = "prompt",
    occurrence: int = 0,
    template_arguments: Mapping[str, object] | None = None,
) -> Request:
    """Return a request whose random numbers depend on the prompt's content.

    Args:
        prompt: a text, or the conversation before the answer.
        source: its origin, for messages.
        occurrence: number of earlier requests with the same prompt, each of which gets other
            random numbers.
        template_arguments: arguments of the chat template, such as ``tools``.

    Raises:
        DataError: if it is not a prompt.
    """
    arguments = dict(template_arguments or {})
    checked = check_prompt(prompt, source)
    parts = [checked, occurrence, *([arguments] if arguments else [])]
    content = json.dumps(parts, sort_keys=True, default=str).encode()
    return Request(checked, blake2b(content, digest_size=16).digest(), source, arguments)


def has_prompt_only(row: Mapping[str, object]) -> bool:
    """Whether a row has a prompt and no column of responses."""
    return any(name in row for name in PROMPT_COLUMNS) and not RESPONSE_COLUMNS & set(row)


class PromptSource:
    """Prompts of a source, all of them checked when it is opened.

    A row's prompt is its column ``prompt``, or else AlpacaEval's ``instruction``.

    Args:
        data: file, folder or hub id, see `open_source`; or a source that is open.
        system_prompt: system message for all conversations without one.
        columns: columns to rename: the name in the source, and the name to read it as.

    Raises:
        DataError: if the source or any of its prompts cannot be used.
    """

    def __init__(
        self,
        data: str | RowSource,
        system_prompt: str | None = None,
        *,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        self.source = open_source(data) if isinstance(data, str) else data
        self.system_prompt = system_prompt
        self.columns = dict(columns or {})
        # Number of earlier rows with the same prompt, for each row.
        self._occurrences: list[int] = []
        seen: dict[bytes, int] = {}

        def check(item: tuple[str, object]) -> None:
            key = self._request(*self._renamed(*item), 0).key
            self._occurrences.append(seen.get(key, 0))
            seen[key] = seen.get(key, 0) + 1

        collect_errors(self.source.rows(0, len(self.source)), check)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.source)

    def rows(self, start: int, stop: int) -> list[tuple[Request, Mapping[str, object], bool]]:
        """Return request, row, and whether the prompt came before, for a range of rows from 0."""
        result = []
        for number, item in enumerate(self.source.rows(start, stop), start=start):
            occurrence = self._occurrences[number]
            source, row = self._renamed(*item)
            result.append((self._request(source, row, occurrence), row, occurrence > 0))
        return result

    def _renamed(self, source: str, row: object) -> tuple[str, Mapping[str, object]]:
        given = check_object(row, source, "an object with a prompt")
        return source, parse_texts(rename_columns(given, self.columns, source), source)[0]

    def _request(self, source: str, row: Mapping[str, object], occurrence: int) -> Request:
        name = next((name for name in PROMPT_COLUMNS if row.get(name) is not None), "prompt")
        prompt, arguments = check_conversation(row, source, name)
        return request(self._with_system_prompt(prompt), source, occurrence, arguments)

    def _with_system_prompt(self, prompt: Prompt) -> Prompt:
        if self.system_prompt is None:
            return prompt
        messages = as_messages(prompt)
        if messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.system_prompt}, *messages]
