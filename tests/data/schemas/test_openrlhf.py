"""OpenRLHF's preference rows: the keys that its recipes and readers name."""

from pathlib import Path

import pytest

from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.schemas.base import Schema
from mpo_lightning.data.schemas.pairs import Pairs, ScoredPairs
from mpo_lightning.data.schemas.single_response import ScoredResponses
from tests.data.schemas.rows import Row, error_of, group_of, said, write

ASKED = [said("user", "Hello"), said("assistant", "Hi!"), said("user", "Name a fruit.")]
APPLE, STONE = said("assistant", "An apple."), said("assistant", "A stone.")
GROUP: Row = {"prompt": ASKED, "responses": ["An apple.", "A stone."], "scores": [1.0, 0.0]}

ROWS: dict[str, tuple[type[Schema], list[Row], Row]] = {
    "chosen and rejected": (
        Pairs,
        [{"chosen": [*ASKED, APPLE], "rejected": [*ASKED, STONE]}],
        GROUP,
    ),
    "prompt_key, messages": (
        Pairs,
        [{"prompt": ASKED, "chosen": [APPLE], "rejected": [STONE]}],
        GROUP,
    ),
    "input": (
        Pairs,
        [{"input": "Name a fruit.", "chosen": "An apple.", "rejected": "A stone."}],
        {**GROUP, "prompt": "Name a fruit."},
    ),
    "input, messages": (
        Pairs,
        [{"input": ASKED, "chosen": [APPLE], "rejected": [STONE]}],
        GROUP,
    ),
    "preference_dataset_mixture2_and_safe_pku": (
        ScoredPairs,
        [
            {
                "chosen": [*ASKED, APPLE],
                "rejected": [*ASKED, STONE],
                "chosen_score": 4.5,
                "rejected_score": 2.0,
                "margin": 2.5,
            }
        ],
        {**GROUP, "scores": [4.5, 2.0], "margin": 2.5},
    ),
    "scores of an instruction's responses": (
        ScoredPairs,
        [
            {
                "instruction": "Name a fruit.",
                "chosen": "An apple.",
                "rejected": "A stone.",
                "score_chosen": 8,
                "score_rejected": 3,
            }
        ],
        {**GROUP, "prompt": "Name a fruit.", "scores": [8.0, 3.0]},
    ),
    "ultrafeedback-unpaired-preferences": (
        ScoredResponses,
        [
            {"instruction": "Name a fruit.", "response": "An apple.", "score": 1},
            {"instruction": "Name a fruit.", "response": "A stone.", "score": 0},
        ],
        {**GROUP, "prompt": "Name a fruit."},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_every_form(name: str, tmp_path: Path) -> None:
    schema, rows, expected = ROWS[name]
    assert group_of(rows, tmp_path) == expected
    assert GroupReader(write(rows, tmp_path)).schema == schema()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("input", {"input": None}, "input: found null"),
        ("input", {"input": ""}, "prompt: found ''"),
        ("input, messages", {"chosen": "An apple."}, "in both columns"),
        ("prompt_key, messages", {"prompt": None}, "prompt: found null"),
        ("preference_dataset_mixture2_and_safe_pku", {"chosen_score": None}, "chosen_score: found"),
        ("preference_dataset_mixture2_and_safe_pku", {"chosen_score": 1.0}, "chosen: found the sc"),
        ("ultrafeedback-unpaired-preferences", {"score": "good"}, "score: found 'good'"),
    ],
)
def test_a_bad_row_is_one_bad_row(name: str, change: Row, words: str, tmp_path: Path) -> None:
    (good, *_) = ROWS[name][1]
    bad = {**good, **change}
    for rows in ([good, bad], [bad, good, good]):
        message = error_of(rows, tmp_path)
        assert message.startswith(f"{tmp_path}/rows.json:{rows.index(bad) + 1}: ")
        assert words in message
