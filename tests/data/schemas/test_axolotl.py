"""axolotl's preference rows, of every type that its documentation lists."""

from pathlib import Path

import pytest

from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.schemas.base import Schema
from mpo_lightning.data.schemas.lists import Nectar
from mpo_lightning.data.schemas.pairs import Pairs
from mpo_lightning.data.schemas.single_response import Unpaired
from tests.data.schemas.rows import Row, error_of, group_of, said, write

ASKED = said("user", "Name a fruit.")
APPLE, STONE = said("assistant", "An apple."), said("assistant", "A stone.")
TEXTS: Row = {"chosen": "An apple.", "rejected": "A stone."}
CONVERSATIONS: Row = {"chosen": [ASKED, APPLE], "rejected": [ASKED, STONE]}
GROUP: Row = {"responses": ["An apple.", "A stone."], "scores": [1.0, 0.0]}
OF_TEXT: Row = {"prompt": "Name a fruit.", **GROUP}
OF_MESSAGES: Row = {"prompt": [ASKED], **GROUP}

ROWS: dict[str, tuple[type[Schema], list[Row], Row]] = {
    "chatml.argilla": (
        Pairs,
        [
            {
                "instruction": "Name a fruit.",
                "chosen_response": "An apple.",
                "rejected_response": "A stone.",
            }
        ],
        OF_TEXT,
    ),
    "chatml.argilla_chat": (Pairs, [CONVERSATIONS], OF_MESSAGES),
    "chatml.icr, bradley_terry": (Pairs, [{"input": "Name a fruit.", **TEXTS}], OF_TEXT),
    "chatml.intel": (Pairs, [{"question": "Name a fruit.", **TEXTS}], OF_TEXT),
    "chatml.prompt_pairs, user_defined": (Pairs, [{"prompt": "Name a fruit.", **TEXTS}], OF_TEXT),
    "chatml.ultra, orpo": (Pairs, [{"prompt": "Name a fruit.", **CONVERSATIONS}], OF_MESSAGES),
    "zephyr.nectar": (
        Nectar,
        [
            {
                "prompt": "\n\nHuman: Name a fruit.\n\nAssistant: ",
                "answers": [
                    {"answer": "An apple.", "rank": 1},
                    {"answer": "A stone.", "rank": 2},
                ],
            }
        ],
        {**OF_MESSAGES, "scores": [-1.0, -2.0]},
    ),
    "chat_template.default": (
        Pairs,
        [{"messages": [ASKED], "chosen": APPLE, "rejected": STONE}],
        OF_MESSAGES,
    ),
    "chat_template.default, lists": (
        Pairs,
        [{"messages": [ASKED], "chosen": [APPLE], "rejected": [STONE]}],
        OF_MESSAGES,
    ),
    "chat_template.default, parts": (
        Pairs,
        [
            {
                "messages": [ASKED],
                "chosen": {"role": "assistant", "content": [{"type": "text", "text": "An apple."}]},
                "rejected": STONE,
            }
        ],
        OF_MESSAGES,
    ),
    "chat_template.default, reasoning": (
        Pairs,
        [
            {
                "messages": [ASKED],
                "chosen": {**APPLE, "reasoning_content": "Red and round."},
                "rejected": {
                    **STONE,
                    "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
                },
            }
        ],
        {
            **OF_MESSAGES,
            "responses": [
                {**APPLE, "reasoning_content": "Red and round."},
                {**STONE, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            ],
        },
    ),
    "chat_template.default, texts": (Pairs, [{"conversation": [ASKED], **TEXTS}], OF_MESSAGES),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        Pairs,
        [
            {
                "input": "Name a fruit.",
                **TEXTS,
                "generations": ["A stone.", "An apple."],
                "rating": [3.0, 9.0],
                "status": "swapped",
                "chosen_score": 9.0,
            }
        ],
        {
            **OF_TEXT,
            "generations": ["A stone.", "An apple."],
            "rating": [3.0, 9.0],
            "status": "swapped",
            "chosen_score": 9.0,
        },
    ),
    "kto, chatml.argilla": (
        Unpaired,
        [
            {"instruction": "Name a fruit.", "completion": "An apple.", "label": True},
            {"instruction": "Name a fruit.", "completion": "A stone.", "label": False},
        ],
        OF_TEXT,
    ),
    "kto, chatml.intel": (
        Unpaired,
        [
            {"question": "Name a fruit.", "completion": "An apple.", "label": "True"},
            {"question": "Name a fruit.", "completion": "A stone.", "label": "False"},
        ],
        OF_TEXT,
    ),
    "kto, chatml.ultra": (
        Unpaired,
        [
            {"prompt": "Name a fruit.", "completion": "An apple.", "label": 1},
            {"prompt": "Name a fruit.", "completion": "A stone.", "label": 0},
        ],
        OF_TEXT,
    ),
    "kto, llama3.argilla_chat": (
        Unpaired,
        [
            {"completion": [ASKED, APPLE], "label": True},
            {"completion": [ASKED, STONE], "label": False},
        ],
        OF_MESSAGES,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_type(name: str, tmp_path: Path) -> None:
    schema, rows, expected = ROWS[name]
    assert group_of(rows, tmp_path) == expected
    assert GroupReader(write(rows, tmp_path)).schema == schema()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"messages": [ASKED], "chosen": APPLE}, "rejected: found no such field"),
        ({"messages": [ASKED], "chosen": APPLE, "rejected": None}, "rejected: found null"),
        ({"messages": [ASKED], "chosen": APPLE, "rejected": ASKED}, "rejected: found a conversat"),
        ({"messages": [], "chosen": APPLE, "rejected": STONE}, "prompt"),
        ({"chosen": APPLE, "rejected": STONE}, "prompt: found no such field"),
        (
            {"messages": [ASKED, APPLE], "chosen": APPLE, "rejected": STONE},
            "prompt to end with the user's",
        ),
        ({"messages": [ASKED], "chosen": "An apple.", "rejected": [STONE]}, "in both columns"),
    ],
)
def test_a_bad_row_is_one_bad_row(bad: Row, words: str, tmp_path: Path) -> None:
    good = ROWS["chat_template.default"][1][0]
    for rows in ([good, bad], [bad, good, good]):
        message = error_of(rows, tmp_path)
        assert message.startswith(f"{tmp_path}/rows.json:{rows.index(bad) + 1}: ")
        assert words in message
