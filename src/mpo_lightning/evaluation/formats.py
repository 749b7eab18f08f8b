"""File formats of answers to prompts: the package's own, AlpacaEval's and Arena-Hard's."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpo_lightning.batch import Message, Prompt, PromptItem, Response
from mpo_lightning.data.conversation import as_message, as_text, check_conversation, check_response
from mpo_lightning.data.groups import DataError, bad_field, check_object, is_list
from mpo_lightning.data.sources import RowSource
from mpo_lightning.generation.generate import Sample
from mpo_lightning.rollouts.sample import answered_row

__all__ = ["FORMATS", "ReadAnswers", "read_answers"]


# Makes a row of a prompt, its response, and the model's name and settings.
MakeRow = Callable[[PromptItem, Sample, Mapping[str, Any]], dict[str, Any]]


def _plain(item: PromptItem, sample: Sample, how: Mapping[str, Any]) -> dict[str, Any]:
    """Make a row as `sample` writes it."""
    return answered_row(item.request, item.row, [sample], how)


def _alpaca(item: PromptItem, sample: Sample, how: Mapping[str, Any]) -> dict[str, Any]:
    """Make an entry of AlpacaEval's ``model_outputs.json``."""
    given = {name: item.row[name] for name in ("dataset", "datasplit") if name in item.row}
    return {
        **given,
        "instruction": _text(item, "AlpacaEval"),
        "output": sample.text,
        "generator": how["model"],
        "truncated": sample.finish == "length",
    }


def _arena(item: PromptItem, sample: Sample, how: Mapping[str, Any]) -> dict[str, Any]:
    """Make a line of Arena-Hard's ``model_answer/MODEL.jsonl``, version 2."""
    uid = item.row.get("uid")
    if not isinstance(uid, str) or not uid:
        raise bad_field(
            item.request.source,
            "uid",
            found=repr(uid),
            expected="the question's id, a text",
            remedy="Take Arena-Hard's question.jsonl, or another predictions.format.",
        )
    return {
        "uid": uid,
        # A digest of the prompt alone, so that the same command writes the same file.
        "ans_id": item.request.key.hex(),
        "model": how["model"],
        "messages": [
            {"role": "user", "content": _text(item, "Arena-Hard")},
            {"role": "assistant", "content": {"answer": sample.text}},
        ],
        "truncated": sample.finish == "length",
    }


def _text(item: PromptItem, benchmark: str) -> str:
    """Return a prompt that is a single text; these benchmarks have no conversations.

    Raises:
        DataError: if it is a conversation.
    """
    text = as_text(item.request.prompt)
    if text is not None:
        return text
    found = f"a conversation of {len(item.request.prompt)} messages"
    expected, remedy = f"a text, which {benchmark} asks for", "Set predictions.format: jsonl."
    raise bad_field(item.request.source, "prompt", found, expected, remedy)


FORMATS: dict[str, MakeRow] = {"jsonl": _plain, "alpaca-eval": _alpaca, "arena-hard": _arena}


# --------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class ReadAnswers:
    """Responses to a prompt, read from a file.

    Attributes:
        prompt: a text, or the conversation before the answer; a conversation of a single user
            message is given as its text.
        responses: the responses; a text may be empty.
        truncated: number of them that were cut at the limit.
        source: "file:row".
        row: the whole row.
        template_arguments: arguments of the chat template, such as ``tools``.
    """

    prompt: Prompt
    responses: list[Response]
    truncated: int
    source: str
    row: Mapping[str, Any]
    template_arguments: Mapping[str, object]

    @property
    def texts(self) -> list[str]:
        """What the responses say to the user: of messages their content."""
        return [str(as_message(response)["content"]) for response in self.responses]


def read_answers(source: RowSource) -> Iterator[ReadAnswers]:
    """Read a file in any of these formats, or with TRL's ``prompt`` and ``completion``.

    Raises:
        DataError: naming the row, the field, what was found, what was expected and what to do.
    """
    for name, row in source.rows(0, len(source)):
        yield _read(check_object(row, name, "an object with a prompt and its response"), name)


def _read(row: Mapping[str, Any], source: str) -> ReadAnswers:
    if "responses" in row:
        prompt, field, found = row.get("prompt"), "responses", row["responses"]
    elif "output" in row:
        prompt, field, found = row.get("instruction"), "output", [row["output"]]
    elif "messages" in row:
        prompt, field, found = _of_messages(row["messages"], source)
    elif "completion" in row:
        prompt, field, found = row.get("prompt"), "completion", [_completion(row["completion"])]
    else:
        raise bad_field(
            source,
            "row",
            found=f"the columns {sorted(map(str, row))}",
            expected="prompt with responses or completion, instruction with output, or messages",
            remedy="Name a file that predict or sample wrote, AlpacaEval's or Arena-Hard's.",
        )
    if not is_list(found) or not found or not all(isinstance(r, str | Mapping) for r in found):
        raise _bad(source, field, found, "the response, a text or the assistant's message")
    responses: list[Response] = [
        each if isinstance(each, str) else check_response(each, f"{field}[{index}]", source)
        for index, each in enumerate(found)
    ]
    checked, arguments = check_conversation({**row, "prompt": prompt}, source)
    cut = row.get("truncated", False)
    truncated = sum(map(bool, cut)) if is_list(cut) else int(bool(cut))
    prompt = as_text(checked) or checked
    return ReadAnswers(prompt, responses, truncated, source, row, arguments)


def _bad(source: str, field: str, found: Any, expected: str) -> DataError:
    return bad_field(source, field, repr(found)[:60], expected, "Repair or remove the row.")


def _of_messages(messages: Any, source: str) -> tuple[list[Message], str, list[Any]]:
    if not is_list(messages) or len(messages) < 2 or not isinstance(messages[-1], Mapping):
        raise _bad(source, "messages", messages, "a question and its answer")
    content: Any = messages[-1].get("content")
    text = content.get("answer") if isinstance(content, Mapping) else content
    before: Any = list(messages[:-1])
    return before, f"messages[{len(messages) - 1}].content", [text]


def _completion(value: Any) -> Any:
    """Return a completion: a text, or a single message, whose text it is if it has no more."""
    if not (is_list(value) and len(value) == 1 and isinstance(value[0], Mapping)):
        return value
    return value[0] if value[0].keys() - {"role", "content"} else value[0].get("content")
