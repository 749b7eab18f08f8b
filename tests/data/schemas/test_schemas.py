"""Rows of public data sets, in their real columns, and the canonical rows that they become."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from jsonargparse import ArgumentParser

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.reading import GroupReader
from mpo_lightning.data.report import DataReport
from mpo_lightning.data.rows import check_row
from mpo_lightning.data.schemas.alpaca_eval import AlpacaEval
from mpo_lightning.data.schemas.base import Converted, Schema, ScoredSchema, SkippedRow
from mpo_lightning.data.schemas.detect import SCHEMAS, Canonical, detect
from mpo_lightning.data.schemas.lists import BestOf, Generations, Nectar, Numbered, OnPolicy, Ranked
from mpo_lightning.data.schemas.pairs import (
    Arena,
    HelpSteer2Preference,
    HelpSteer3,
    Pairs,
    SafePairs,
    ScoredPairs,
    TranscriptPairs,
)
from mpo_lightning.data.schemas.rejected import Rejected
from mpo_lightning.data.schemas.single_response import HelpSteer2, ScoredResponses, Unpaired
from mpo_lightning.data.schemas.ultrafeedback import UltraFeedback
from tests.data.schemas.rows import as_row

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def completion(text: str, overall: float | None, *ratings: str, model: str = "llama") -> Row:
    aspects = ("instruction_following", "honesty", "truthfulness", "helpfulness")
    return {
        "model": model,
        "principle": "helpfulness",
        "custom_system_prompt": "As an AI assistant, be helpful.",
        "response": text,
        "critique": "Clear enough.",
        "overall_score": overall,
        "fine-grained_score": 3.0,
        "annotations": {
            aspect: {"Rating": rating, "Rationale": "Because."}
            for aspect, rating in zip(aspects, ratings, strict=True)
        },
    }


COMPLETIONS = [
    completion("Apples.", 10.0, "2", "1", "1", "2", model="alpaca"),
    completion("Pears, and why.", 10.0, "5", "5", "5", "4", model="gpt-4"),
    completion("Stones.", 10.0, "4", "3", "N/A", "3", model="bard"),
    completion("A plum.", 6.5, "4", "N/A", "5", "3"),
]
ULTRAFEEDBACK: Row = {
    "source": "sharegpt",
    "instruction": "Name a fruit.",
    "models": ["alpaca", "gpt-4", "bard", "llama"],
    "completions": COMPLETIONS,
    "correct_answers": ["None"],
}
FRUITS = ["Apples.", "Pears, and why.", "Stones.", "A plum."]
ULTRAFEEDBACK_OUT: Row = {
    "prompt": "Name a fruit.",
    "responses": FRUITS,
    "scores": [10.0, 10.0, 10.0, 6.5],
    "source": "sharegpt",
    "correct_answers": ["None"],
    "models": ["alpaca", "gpt-4", "bard", "llama"],
}
CHAT = [user("Name a fruit."), assistant("An apple.")]
CHAT_REJECTED = [user("Name a fruit."), assistant("A stone.")]
TURNS = [user("Hello"), assistant("Hi!"), user("Name a fruit.")]
ATTRIBUTES = {"helpfulness": 4, "correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 2}
ONE = {"prompt": "Name a fruit.", "responses": ["An apple.", "A stone."], "scores": [1.0, 0.0]}

# Name, schema, rows as they are published, canonical row. One group each.
CASES: dict[str, tuple[type[Schema], list[Row], Row]] = {
    "canonical": (Canonical, [{**ONE, "id": "p1"}], {**ONE, "id": "p1"}),
    "openbmb/UltraFeedback": (UltraFeedback, [ULTRAFEEDBACK], ULTRAFEEDBACK_OUT),
    "openbmb/UltraFeedback, object of lists": (
        UltraFeedback,
        [
            {
                **ULTRAFEEDBACK,
                "completions": {
                    name: [entry[name] for entry in COMPLETIONS] for name in COMPLETIONS[0]
                },
            }
        ],
        ULTRAFEEDBACK_OUT,
    ),
    "princeton-nlp/llama3-ultrafeedback-armorm": (
        OnPolicy,
        [
            {
                "prompt_id": "f0e3",
                "prompt": "Name a fruit.",
                "all_generated_responses": FRUITS[:3],
                "all_rm_scores": [0.11, 0.17, 0.04],
                "chosen": [user("Name a fruit."), assistant("Pears, and why.")],
                "rejected": [user("Name a fruit."), assistant("Stones.")],
            }
        ],
        {
            "prompt": "Name a fruit.",
            "responses": FRUITS[:3],
            "scores": [0.11, 0.17, 0.04],
            "prompt_id": "f0e3",
            "chosen": [user("Name a fruit."), assistant("Pears, and why.")],
            "rejected": [user("Name a fruit."), assistant("Stones.")],
        },
    ),
    "all_generated_responses with scores": (
        OnPolicy,
        [{"prompt": "A?", "all_generated_responses": ["a", "b"], "scores": [1.5, -2.0]}],
        {"prompt": "A?", "responses": ["a", "b"], "scores": [1.5, -2.0]},
    ),
    "all_generated_resopnses": (
        OnPolicy,
        [{"prompt": "A?", "all_generated_resopnses": ["a", "b"], "all_rm_scores": [1.5, -2.0]}],
        {"prompt": "A?", "responses": ["a", "b"], "scores": [1.5, -2.0]},
    ),
    "generated, score": (
        OnPolicy,
        [{"prompt": "A?", "generated": ["a", "b"], "score": [1.5, -2.0]}],
        {"prompt": "A?", "responses": ["a", "b"], "scores": [1.5, -2.0]},
    ),
    "generate_0, rm_scores": (
        Numbered,
        [
            {
                "prompt": "A?",
                "generate_0": [assistant("a")],
                "generate_1": [assistant("b")],
                "generate_2": [assistant("c")],
                "rm_scores": [0.5, 0.25, 0.0],
            }
        ],
        {"prompt": "A?", "responses": ["a", "b", "c"], "scores": [0.5, 0.25, 0.0]},
    ),
    "distilabel": (
        Generations,
        [
            {
                "instruction": "Name a fruit.",
                "generations": FRUITS,
                "generation_models": ["a", "b", "c", "d"],
                "ratings": [4, None, 1, 5],
                "rationales": ["Good.", None, "Bad.", "Best."],
            }
        ],
        {
            "prompt": "Name a fruit.",
            "responses": [FRUITS[0], FRUITS[2], FRUITS[3]],
            "scores": [4.0, 1.0, 5.0],
            "generation_models": ["a", "b", "c", "d"],
            "rationales": ["Good.", None, "Bad.", "Best."],
            "kept_responses": [0, 2, 3],
        },
    ),
    "distilabel, ratings as texts": (
        Generations,
        [{"prompt": "A?", "generations": ["a", "b"], "ratings": ["4", "2.5"]}],
        {"prompt": "A?", "responses": ["a", "b"], "scores": [4.0, 2.5]},
    ),
    "ChenDRAG/ultrafeedback_reward": (
        Numbered,
        [
            {
                "prompt": "A?",
                **{f"A{index}": f"answer {index}" for index in range(4)},
                **{f"score_A{index}": 4.0 - index for index in range(4)},
            }
        ],
        {
            "prompt": "A?",
            "responses": [f"answer {index}" for index in range(4)],
            "scores": [4.0, 3.0, 2.0, 1.0],
        },
    ),
    "A0_score, and twelve of them": (
        Numbered,
        [
            {
                "prompt": "A?",
                **{f"A{index}": f"answer {index}" for index in reversed(range(12))},
                **{f"A{index}_score": index / 4 for index in range(12)},
            }
        ],
        {
            "prompt": "A?",
            "responses": [f"answer {index}" for index in range(12)],
            "scores": [index / 4 for index in range(12)],
        },
    ),
    "berkeley-nest/Nectar": (
        Nectar,
        [
            {
                "prompt": "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Name a fruit. "
                "\n\nAssistant: ",
                "answers": [
                    {"answer": "A plum.", "model": "gpt-4", "rank": 1.0},
                    {"answer": "A pear.\n\nHuman: And?", "model": "claude", "rank": 3.0},
                    {"answer": "Human: apples", "model": "llama", "rank": 2.0},
                ],
                "turns": 2,
                "num_responses": 3,
                "source": ["lmsys-chat-1m"],
                "good_natured": True,
            }
        ],
        {
            "prompt": TURNS,
            "responses": ["A plum.", "A pear.\n\nHuman: And?", "Human: apples"],
            "scores": [-1.0, -3.0, -2.0],
            "turns": 2,
            "num_responses": 3,
            "source": ["lmsys-chat-1m"],
            "good_natured": True,
            "models": ["gpt-4", "claude", "llama"],
        },
    ),
    "NeMo-RL": (
        Ranked,
        [
            {
                "context": TURNS,
                "completions": [
                    {"rank": 1, "completion": [assistant("A pear.")]},
                    {"rank": 0, "completion": [assistant("A plum.")]},
                ],
                "task_name": "chat",
            }
        ],
        {
            "prompt": TURNS,
            "responses": ["A pear.", "A plum."],
            "scores": [-1.0, 0.0],
            "task_name": "chat",
        },
    ),
    "allenai/reward-bench-2": (
        BestOf,
        [
            {
                "id": "7",
                "prompt": "Name a fruit.",
                "chosen": ["A plum.", "A pear."],
                "rejected": ["A stone.", "A hat.", "No."],
                "num_correct": 2,
            }
        ],
        {
            "prompt": "Name a fruit.",
            "responses": ["A plum.", "A pear.", "A stone.", "A hat.", "No."],
            "scores": [1.0, 1.0, 0.0, 0.0, 0.0],
            "id": "7",
            "num_correct": 2,
        },
    ),
    "TRL, explicit, texts": (
        Pairs,
        [{"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A stone."}],
        ONE,
    ),
    "TRL, explicit, conversations": (
        Pairs,
        [{"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT_REJECTED[1:]}],
        {**ONE, "prompt": CHAT[:1]},
    ),
    "TRL, implicit, conversations": (
        Pairs,
        [{"chosen": CHAT, "rejected": CHAT_REJECTED, "source": "x"}],
        {**ONE, "prompt": CHAT[:1], "source": "x"},
    ),
    "TRL, implicit, texts": (
        Pairs,
        [{"chosen": "The sky is blue.", "rejected": "The sky is black."}],
        {"prompt": "The sky is", "responses": [" blue.", " black."], "scores": [1.0, 0.0]},
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        ScoredPairs,
        [
            {
                "prompt": "Name a fruit.",
                "prompt_id": "f0e3",
                "chosen": CHAT,
                "rejected": CHAT_REJECTED,
                "messages": CHAT,
                "score_chosen": 8.5,
                "score_rejected": 7.0,
            }
        ],
        {
            **ONE,
            "prompt": CHAT[:1],
            "scores": [8.5, 7.0],
            "prompt_id": "f0e3",
            "messages": CHAT,
        },
    ),
    "chosen-rating": (
        ScoredPairs,
        [
            {
                "prompt": "Name a fruit.",
                "chosen": CHAT,
                "chosen-rating": 5.0,
                "chosen-model": "gpt-4",
                "rejected": CHAT_REJECTED,
                "rejected-rating": 3.5,
            }
        ],
        {**ONE, "prompt": CHAT[:1], "scores": [5.0, 3.5], "chosen-model": "gpt-4"},
    ),
    "Anthropic/hh-rlhf": (
        TranscriptPairs,
        [
            {
                "chosen": "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Name a fruit.\n\n"
                "Assistant: An apple.\n\nOr two.",
                "rejected": "\n\nHuman: Hello\n\nAssistant: Hi!\n\nHuman: Name a fruit.\n\n"
                "Assistant: A stone.",
            }
        ],
        {"prompt": TURNS, "responses": ["An apple.\n\nOr two.", "A stone."], "scores": [1.0, 0.0]},
    ),
    "nvidia/HelpSteer2, preferences": (
        HelpSteer2Preference,
        [
            {
                "split": "train",
                "prompt": "Hello\n<extra_id_1>Assistant\nHi!\n<extra_id_1>User\nName a fruit.",
                "response_1": "An apple.",
                "response_2": "A stone.",
                "preference_strength": -2,
            }
        ],
        {**ONE, "prompt": TURNS, "scores": [0.0, -2.0], "split": "train"},
    ),
    "nvidia/HelpSteer3": (
        HelpSteer3,
        [
            {
                "domain": "general",
                "context": TURNS,
                "response1": "An apple.",
                "response2": "A stone.",
                "overall_preference": 0,
                "individual_preference": [{"score": 0, "reasoning": "Even."}],
            }
        ],
        {
            **ONE,
            "prompt": TURNS,
            "scores": [0.0, 0.0],
            "domain": "general",
            "individual_preference": [{"score": 0, "reasoning": "Even."}],
        },
    ),
    "PKU-Alignment/PKU-SafeRLHF": (
        SafePairs,
        [
            {
                "prompt": "Name a fruit.",
                "response_0": "An apple.",
                "response_1": "A stone.",
                "better_response_id": 0,
                "safer_response_id": 1,
            }
        ],
        {**ONE, "better_response_id": 0, "safer_response_id": 1},
    ),
    "lmsys/chatbot_arena_conversations": (
        Arena,
        [
            {
                "model_a": "vicuna",
                "model_b": "dolly",
                "winner": "model_a",
                "conversation_a": CHAT,
                "conversation_b": CHAT_REJECTED,
                "turn": 1,
            }
        ],
        {
            **ONE,
            "prompt": CHAT[:1],
            "model_a": "vicuna",
            "model_b": "dolly",
            "turn": 1,
            "winner": "model_a",
        },
    ),
    "nvidia/HelpSteer2": (
        HelpSteer2,
        [
            {"prompt": "Name a fruit.", "response": "An apple.", **ATTRIBUTES},
            {"prompt": "Name a fruit.", "response": "A stone.", **ATTRIBUTES, "correctness": 0},
        ],
        {
            **ONE,
            # .65 * 4 + .8 * 3 + .45 * 4 + .55 * 1 - .4 * 2, and without the 2.4.
            "scores": pytest.approx([6.55, 4.15], abs=1e-12),
            **ATTRIBUTES,
            "correctness": [3, 0],
        },
    ),
    "one scored response a row": (
        ScoredResponses,
        [
            {"prompt": "Name a fruit.", "response": "An apple.", "score": 0.5, "judge": "j"},
            {"prompt": "Name a fruit.", "response": "A stone.", "score": -0.5, "judge": "j"},
        ],
        {**ONE, "scores": [0.5, -0.5], "judge": "j"},
    ),
    "completion, reward, in conversations": (
        ScoredResponses,
        [
            {"prompt": CHAT[:1], "completion": CHAT[1:], "reward": 2.0},
            {"prompt": CHAT[:1], "completion": CHAT_REJECTED[1:], "reward": 1.0},
        ],
        {**ONE, "prompt": CHAT[:1], "scores": [2.0, 1.0]},
    ),
    "TRL, unpaired": (
        Unpaired,
        [
            {"prompt": "Name a fruit.", "completion": "An apple.", "label": True},
            {"prompt": "Name a fruit.", "completion": "A stone.", "label": False},
        ],
        ONE,
    ),
    "TRL, unpaired, conversations": (
        Unpaired,
        [
            {"prompt": CHAT[:1], "completion": CHAT[1:], "label": True},
            {"prompt": CHAT[:1], "completion": CHAT_REJECTED[1:], "label": False},
        ],
        {**ONE, "prompt": CHAT[:1]},
    ),
}


def write_jsonl(rows: list[Row], folder: Path) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(rows: list[Row], folder: Path) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")
    return str(folder / "rows.parquet")


def write_dataset(rows: list[Row], folder: Path) -> str:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return str(folder / "saved")


WRITERS = [write_jsonl, write_parquet, write_dataset]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", CASES)
def test_published_rows_become_the_canonical_row(
    name: str, write: Callable[[list[Row], Path], str], tmp_path: Path
) -> None:
    _, rows, expected = CASES[name]
    (result,) = GroupReader(write(rows, tmp_path)).results()
    assert as_row(result) == expected
    assert all(type(score) is float for score in as_row(result)["scores"])


@pytest.mark.parametrize("name", CASES)
def test_every_shape_is_recognised_and_no_other_claims_it(name: str) -> None:
    expected, (row, *_), _ = CASES[name]
    fitting = [schema for schema in SCHEMAS if schema.fits(frozenset(row), row)]
    assert fitting == [expected]
    assert detect([("x:1", row)]) == expected()


def test_every_schema_has_its_rows_here() -> None:
    # Those of trainers and of AlpacaEval have files of their own.
    assert {schema for schema, _, _ in CASES.values()} == set(SCHEMAS) - {Rejected, AlpacaEval}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "A?", "answer": "a"},
        {"prompt": "A?", "chosen": "a"},
        # Two shapes at once: which scores are meant is the user's to say.
        {**ONE, "all_generated_responses": ["a", "b"], "all_rm_scores": [1, 2]},
        {"prompt": "A?", "completion": "a", "label": True, "score": 3.0},
    ],
)
def test_unknown_and_ambiguous_columns_are_refused(row: Row) -> None:
    with pytest.raises(DataError) as caught:
        detect([("x:1", row)])
    message = str(caught.value)
    assert message.startswith(f"x:1: the columns {sorted(row)} fit ")
    assert all(f"\n  {schema.__name__}: {schema.columns}" in message for schema in SCHEMAS)


def convert(schema: Schema, row: Row) -> Converted:
    return schema.convert(row, "x:1")


# ------------------------------------------------------------------------------ UltraFeedback

FLAG = "with a 10 that its aspects contradict"


@pytest.mark.parametrize(
    ("setting", "scores", "notes"),
    [
        ("flag", [10, 10, 10, 6.5], (FLAG, FLAG)),
        # The first one's aspects are 1.5 on average, the third one's 10 / 3: 1 + 7 / 3 * 9 / 4.
        ("repair", [1.0, 10, 6.25, 6.5], (f"{FLAG}, scored by them",) * 2),
        ("drop", [10, 6.5], (f"{FLAG}, left out",) * 2),
    ],
)
def test_wrong_tens(setting: Any, scores: list[float], notes: tuple[str, ...]) -> None:
    converted = convert(UltraFeedback(wrong_tens=setting), ULTRAFEEDBACK)
    assert converted.row["scores"] == pytest.approx(scores, abs=1e-12)
    assert converted.notes == notes
    if setting == "drop":
        assert converted.row["responses"] == ["Pears, and why.", "A plum."]
        assert converted.row["models"] == ["gpt-4", "llama"]
        assert converted.row["kept_responses"] == [1, 3]


def test_wrong_ten_as_an_error() -> None:
    with pytest.raises(DataError, match=r"x:1: completions\[0\]\.overall_score: found 10, and asp"):
        convert(UltraFeedback(wrong_tens="error"), ULTRAFEEDBACK)


def test_ten_that_nothing_confirms_is_counted() -> None:
    few = [completion("a", 10, *["N/A"] * 4), COMPLETIONS[3]]
    row = {**ULTRAFEEDBACK, "models": None, "completions": few}
    converted = convert(UltraFeedback(wrong_tens="drop"), row)
    assert converted.row["scores"] == [10.0, 6.5]
    assert converted.notes == ("with a 10 that no rated aspect can confirm",)


def test_aspects_as_scores() -> None:
    converted = convert(UltraFeedback(score="aspects"), ULTRAFEEDBACK)
    assert converted.row["scores"] == pytest.approx([1.5, 4.75, 10 / 3, 4.0], abs=1e-12)
    assert converted.notes == ("with aspects that are not rated",) * 2


def test_weighted_aspects() -> None:
    schema = UltraFeedback(score="aspects", aspect_weights={"honesty": 1.0, "helpfulness": 3.0})
    converted = convert(schema, ULTRAFEEDBACK)
    # (1 + 3 * 2) / 4, (5 + 3 * 4) / 4, (3 + 3 * 3) / 4, and helpfulness alone.
    assert converted.row["scores"] == [1.75, 4.25, 3.0, 3.0]
    assert converted.notes == ("with aspects that are not rated",)


def test_aspects_may_be_null_where_arrow_found_none() -> None:
    bare = {**COMPLETIONS[3], "annotations": dict.fromkeys(COMPLETIONS[3]["annotations"])}
    row = {**ULTRAFEEDBACK, "models": None, "completions": [*COMPLETIONS[:2], bare]}
    converted = convert(UltraFeedback(score="aspects", unscored="drop"), row)
    assert converted.row["kept_responses"] == [0, 1]
    assert converted.notes[-2:] == ("with aspects that are not rated", "without a score, left out")
    with pytest.raises(DataError, match=r"completions\[2\]\.annotations: found null"):
        convert(UltraFeedback(score="aspects"), row)


def test_models_pass_through_where_completions_do_not_name_them() -> None:
    bare = [{**each, "model": None} for each in COMPLETIONS]
    converted = convert(UltraFeedback(), {**ULTRAFEEDBACK, "completions": bare})
    assert converted.row["models"] == ULTRAFEEDBACK["models"]


def test_models_that_the_completions_contradict_are_noted() -> None:
    row = {**ULTRAFEEDBACK, "models": ["alpaca", "gpt-4", "llama", "bard"]}
    converted = convert(UltraFeedback(), row)
    assert converted.row["models"] == ULTRAFEEDBACK["models"]
    assert [note for note in converted.notes if "`models`" in note] == [
        "of a row whose column `models` names others than its completions, replaced"
    ] * len(COMPLETIONS)


@pytest.mark.parametrize(("count", "words"), [(0, "no responses"), (1, "a single response")])
def test_fewer_than_two_responses_are_a_skipped_row(count: int, words: str) -> None:
    with pytest.raises(SkippedRow, match=f"^with {words}$"):
        convert(UltraFeedback(), {**ULTRAFEEDBACK, "completions": COMPLETIONS[:count]})


# ------------------------------------------------------------------------------- other settings


def test_normal_scores_of_ranks() -> None:
    row = CASES["berkeley-nest/Nectar"][1][0]
    converted = convert(Nectar(scores="normal"), row)
    quantile = NormalDist().inv_cdf
    assert converted.row["scores"] == [quantile(2.5 / 3), quantile(0.5 / 3), quantile(1.5 / 3)]
    zero_best = convert(Ranked(scores="normal"), CASES["NeMo-RL"][1][0])
    assert zero_best.row["scores"] == [quantile(0.25), quantile(0.75)]


def test_leaked_turns() -> None:
    row = CASES["berkeley-nest/Nectar"][1][0]
    note = "with another turn of the transcript in it"
    assert convert(Nectar(), row).notes == (note, note)
    more = {
        **row,
        "answers": [*row["answers"], {"answer": "Ask the Human: no.", "model": "m", "rank": 4.0}],
    }
    dropped = convert(Nectar(leaked_turns="drop"), more)
    assert dropped.row["responses"] == ["A plum.", "Ask the Human: no."]
    # Ranks stay those among all answers.
    assert dropped.row["scores"] == [-1.0, -4.0]
    assert dropped.row["models"] == ["gpt-4", "m"]
    assert dropped.notes == (f"{note}, left out",) * 2
    with pytest.raises(SkippedRow, match="fewer than two responses that can be used"):
        convert(Nectar(leaked_turns="drop"), row)
    with pytest.raises(DataError, match=r"x:1: answers\[1\]\.answer: found another turn"):
        convert(Nectar(leaked_turns="error"), row)


def test_ratings_that_are_null_may_be_an_error() -> None:
    row = CASES["distilabel"][1][0]
    assert convert(Generations(), row).notes == ("without a score, left out",)
    with pytest.raises(DataError, match=r"x:1: ratings\[1\]: found null; expected a finite number"):
        convert(Generations(unscored="error"), row)


def test_prompt_beside_the_instruction_is_kept_where_it_differs() -> None:
    row = {"instruction": "A?", "generations": ["a", "b"], "ratings": [1, 2]}
    assert "prompt" not in convert(Generations(), {**row, "prompt": "A?"}).row["responses"]
    assert convert(Generations(), {**row, "prompt": "A?"}).row["prompt"] == "A?"
    with pytest.raises(DataError, match=r"x:1: prompt: found a column that this schema does not"):
        convert(Generations(), {**row, "prompt": "B?"})


def test_empty_responses_may_be_left_out() -> None:
    row = {
        "prompt": "A?",
        "all_generated_responses": ["a", " ", "c"],
        "all_rm_scores": [1.0, 2.0, 3.0],
        "truncated": [False, False, True],
    }
    converted = convert(OnPolicy(empty="drop"), row)
    assert converted.notes == ("without text, left out",)
    group = check_row(converted.row, "x:1")
    assert (group.responses, group.scores) == (["a", "c"], [1.0, 3.0])
    assert group.truncated == [False, True]
    assert group.extra == {"kept_responses": [0, 2]}
    with pytest.raises(DataError, match=r"x:1: all_generated_responses\[1\]: found ' '"):
        convert(OnPolicy(), row)


def test_numbered_response_that_is_not_there() -> None:
    row = {"prompt": "A?", "A0": "a", "A1": "b", "A2": None}
    scores = {"score_A0": 1.0, "score_A1": 2.0, "score_A2": None}
    assert convert(Numbered(), {**row, **scores}).row == {
        "prompt": "A?",
        "responses": ["a", "b"],
        "scores": [1.0, 2.0],
    }
    with pytest.raises(DataError, match=r"x:1: A2: found None"):
        convert(Numbered(), {**row, **scores, "score_A2": 3.0})


def test_differing_prompts() -> None:
    row = {"chosen": CHAT, "rejected": [user("Name a stone."), assistant("A ruby.")]}
    with pytest.raises(DataError, match=r"x:1: rejected: found the prompt .*Name a stone"):
        convert(Pairs(), row)
    with pytest.raises(SkippedRow, match="with responses to different prompts"):
        convert(Pairs(differing_prompts="drop"), row)
    arena = {**CASES["lmsys/chatbot_arena_conversations"][1][0], "conversation_b": row["rejected"]}
    with pytest.raises(DataError, match=r"x:1: conversation_b: found the prompt"):
        convert(Arena(), arena)


def test_prompt_column_that_contradicts_the_conversation() -> None:
    with pytest.raises(DataError, match=r"x:1: prompt: found 'Name a hat.'; expected what comes"):
        convert(Pairs(), {"prompt": "Name a hat.", "chosen": CHAT, "rejected": CHAT_REJECTED})


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("One two three", "One two four", "One two"),
        # A word is on one side whole, and white space the response's.
        ("One two", "One twofold", "One"),
        ("One  two", "One  three", "One"),
        ("One two", "One two", "One"),
    ],
)
def test_prompt_of_texts_is_how_both_begin(chosen: str, rejected: str, prompt: str) -> None:
    converted = convert(Pairs(), {"chosen": chosen, "rejected": rejected})
    responses = [chosen[len(prompt) :], rejected[len(prompt) :]]
    assert (converted.row["prompt"], converted.row["responses"]) == (prompt, responses)
    assert converted.notes == ("to a prompt that is how chosen and rejected begin",) * 2


def test_responses_that_repeat_their_prompt_are_counted() -> None:
    row = {"prompt": "A?", "chosen": "A? Yes.", "rejected": "No."}
    converted = convert(Pairs(), row)
    assert converted.row["responses"] == ["A? Yes.", "No."]
    assert converted.notes == ("that begins with its prompt",)


@pytest.mark.parametrize(
    ("weights", "scores"),
    [
        ({"better": 1.0}, [1, 0]),
        ({"safer": 2.0}, [0, 2]),
        ({"better": 1.0, "safer": 0.5}, [1, 0.5]),
    ],
)
def test_safe_pairs_by_weights(weights: dict[str, float], scores: list[float]) -> None:
    row = CASES["PKU-Alignment/PKU-SafeRLHF"][1][0]
    assert convert(SafePairs(weights=weights), row).row["scores"] == scores


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("nvidia/HelpSteer2, preferences", "preference_strength"),
        ("nvidia/HelpSteer3", "overall_preference"),
    ],
)
def test_a_preference_above_zero_is_for_the_second(name: str, column: str) -> None:
    schema, (row,), _ = CASES[name]
    assert convert(schema(), {**row, column: 3}).row["scores"] == [0.0, 3.0]
    assert convert(schema(), {**row, column: -1}).row["scores"] == [0.0, -1.0]


@pytest.mark.parametrize(
    ("winner", "scores"),
    [("model_a", [1, 0]), ("model_b", [0, 1]), ("tie", [0, 0]), ("tie (bothbad)", [0, 0])],
)
def test_winner_of_an_arena(winner: str, scores: list[float]) -> None:
    row = {**CASES["lmsys/chatbot_arena_conversations"][1][0], "winner": winner}
    assert convert(Arena(), row).row["scores"] == scores


def test_attributes_by_weights() -> None:
    row = CASES["nvidia/HelpSteer2"][1][0]
    schema = HelpSteer2(weights={"helpfulness": 1.0, "verbosity": -0.5})
    assert convert(schema, row).row["scores"] == [3.0]
    generic = ScoredResponses(weights={"a": 2.0, "b": 0.5})
    row = {"prompt": "A?", "response": "a", "a": 1, "b": 4}
    assert convert(generic, row).row == {
        "prompt": "A?",
        "responses": ["a"],
        "scores": [4.0],
        "a": 1,
        "b": 4,
    }


# -------------------------------------------- scores that contradict what is chosen and rejected

WRONG = {"prompt": "Hi", "chosen": "good", "rejected": "bad"}
LIST = {"prompt": "Hi", "all_generated_responses": ["a", "b", "c"], "all_rm_scores": [2, 3, 1]}
RATED = {"instruction": "Hi", "generations": ["a", "b", "c"], "ratings": [2, 3, 1]}
NUMBERED = {"prompt": "Hi", "A0": "a", "A1": "b", "score_A0": 2, "score_A1": 3}
# Schema, row, the field that is contradicted, and what its scores are.
CONTRADICTIONS: list[tuple[type[ScoredSchema], Row, str, list[float]]] = [
    (ScoredPairs, {**WRONG, "score_chosen": 3.0, "score_rejected": 8.0}, "chosen", [3, 8]),
    (ScoredPairs, {**WRONG, "chosen-rating": 3.0, "rejected-rating": 8.0}, "chosen", [3, 8]),
    (
        ScoredPairs,
        {
            "chosen": [user("Hi"), assistant("good")],
            "rejected": [user("Hi"), assistant("bad")],
            "chosen_score": -1,
            "rejected_score": 0,
        },
        "chosen",
        [-1, 0],
    ),
    # The prompt is how both begin, so the responses are no longer those of the row.
    (
        ScoredPairs,
        {"chosen": "One two", "rejected": "One three", "score_chosen": 1, "score_rejected": 2},
        "chosen",
        [1, 2],
    ),
    (OnPolicy, {**LIST, "chosen": [user("Hi"), assistant("a")]}, "chosen", [2, 3, 1]),
    (OnPolicy, {**LIST, "chosen": "c", "rejected": "b"}, "chosen", [2, 3, 1]),
    (OnPolicy, {**LIST, "chosen": "edited", "rejected": "b"}, "rejected", [2, 3, 1]),
    (Generations, {**RATED, "chosen": "a", "rejected": "c"}, "chosen", [2, 3, 1]),
    (Numbered, {**NUMBERED, "chosen": assistant("a")}, "chosen", [2, 3]),
]


@pytest.mark.parametrize(("schema", "row", "field", "scores"), CONTRADICTIONS)
def test_scores_that_contradict_the_order(
    schema: type[ScoredSchema], row: Row, field: str, scores: list[float]
) -> None:
    with pytest.raises(DataError, match=rf"x:1: {field}: found the .*`contradicting`"):
        convert(schema(), row)
    with pytest.raises(SkippedRow, match="^whose scores contradict chosen and rejected$"):
        convert(schema(contradicting="drop"), row)
    kept = convert(schema(contradicting="scores"), row)
    assert kept.row["scores"] == scores
    assert kept.notes[-1] == f"called {field}, against their scores"


def test_order_against_scores_is_the_schema_of_pairs() -> None:
    _, row, _, _ = CONTRADICTIONS[0]
    assert convert(Pairs(), row).row["scores"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("schema", "row"),
    [
        (ScoredPairs(), {**WRONG, "score_chosen": 8.0, "score_rejected": 8.0}),
        (OnPolicy(), {**LIST, "chosen": "b", "rejected": "a"}),
        (OnPolicy(), {**LIST, "chosen": "edited", "rejected": "also edited"}),
        (OnPolicy(), {**LIST, "all_rm_scores": [3, 3, 1], "chosen": "a", "rejected": "b"}),
        (OnPolicy(), {**LIST, "all_rm_scores": [1, 1, 1], "chosen": "a", "rejected": "b"}),
        (
            OnPolicy(),
            {**LIST, "all_generated_responses": ["b", "b", "c"], "chosen": "b", "rejected": "c"},
        ),
        (Generations(), {**RATED, "ratings": [2, None, 1], "chosen": "a", "rejected": "c"}),
    ],
)
def test_scores_that_do_not_contradict(schema: Schema, row: Row) -> None:
    assert not any("against" in note for note in convert(schema, row).notes)


def test_contradictions_are_one_bad_row_each_and_counted(tmp_path: Path) -> None:
    good = {**WRONG, "score_chosen": 8.0, "score_rejected": 3.0}
    bad = {**WRONG, "score_chosen": 3.0, "score_rejected": 8.0}
    path = write_jsonl([bad, good, bad], tmp_path)
    report = DataReport(path)
    for result in GroupReader(path).results():
        result.count_in(report)
    assert report.failed == 2
    assert f"{path}:1: chosen: found the score 3; expected the highest, 8." in report.errors[0]
    report = DataReport(path)
    for result in GroupReader(path, schema=ScoredPairs(contradicting="scores")).results():
        result.count_in(report)
    places = f"(first: {path}:1, {path}:3)"
    assert f"responses: 2 called chosen, against their scores {places}" in str(report)


# --------------------------------------------------------------------- rows of one response each


def test_rows_of_one_prompt_are_a_group_wherever_they_are(tmp_path: Path) -> None:
    rows = [
        {"prompt": "A?", "response": "a1", "score": 1.0, "judge": "x", "at": 1, "truncated": False},
        {"prompt": "B?", "response": "b1", "score": 2.0, "judge": "x", "at": 2, "truncated": True},
        {"prompt": "A?", "response": "a2", "score": 3.0, "judge": "x", "at": 3, "truncated": True},
        {"prompt": "C?", "response": "c1", "score": 4.0, "judge": "x", "at": 4, "truncated": True},
        {"prompt": "B?", "response": "b2", "score": 5.0, "judge": "x", "at": 5, "truncated": False},
        {"prompt": "A?", "response": "a3", "score": None, "judge": "x", "at": 6, "truncated": True},
    ]
    path = write_jsonl(rows, tmp_path)
    first, second, third, fourth = GroupReader(path).results()
    assert as_row(first) == {
        "prompt": "A?",
        "responses": ["a1", "a2"],
        "scores": [1.0, 3.0],
        "judge": "x",
        "at": [1, 3],
    }
    assert first.source == f"{path}:1"
    assert first.group is not None
    assert first.group.truncated == [False, True]
    assert as_row(second)["responses"] == ["b1", "b2"]
    assert third.skipped == "with a single response"
    assert str(fourth.error).startswith(f"{path}:6: score: found null")
    *_, left_out = GroupReader(path, schema=ScoredResponses(unscored="drop")).results()
    assert left_out.skipped == "without a score, left out"


# ----------------------------------------------------------------------------------- settings


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    path = write_jsonl([{"question": "A?", "answers": ["a", "b"], "marks": [1, 2]}], tmp_path)
    names = {"question": "prompt", "answers": "responses", "marks": "scores"}
    (result,) = GroupReader(path, columns=names).results()
    assert as_row(result) == {"prompt": "A?", "responses": ["a", "b"], "scores": [1.0, 2.0]}


@pytest.mark.parametrize(
    ("names", "words"),
    [({"absent": "prompt"}, r"renames \['absent'\]"), ({"id": "prompt"}, "there already")],
)
def test_renaming_that_cannot_be_done(names: dict[str, str], words: str, tmp_path: Path) -> None:
    path = write_jsonl([{**ONE, "id": "p1"}], tmp_path)
    with pytest.raises(DataError, match=words):
        list(GroupReader(path, columns=names).results())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UltraFeedback(score="mean"), "score must be one of overall, aspects, got 'mean'"),  # type: ignore[arg-type]
        (lambda: UltraFeedback(aspect_weights={"style": 1.0}), "aspect_weights must give"),
        (lambda: UltraFeedback(aspect_weights={"honesty": -1.0}), "aspect_weights must give"),
        (lambda: Nectar(scores="rank"), "scores must be one of negative_rank, normal"),  # type: ignore[arg-type]
        (lambda: Pairs(differing_prompts="keep"), "differing_prompts must be one of"),  # type: ignore[arg-type]
        (lambda: OnPolicy(empty="keep"), "empty must be one of error, drop"),  # type: ignore[arg-type]
        (
            lambda: OnPolicy(contradicting="keep"),
            "contradicting must be one of error, drop, scores",
        ),  # type: ignore[arg-type]
        (lambda: HelpSteer2(weights={}), "weights must name columns"),
        (lambda: SafePairs(weights={"nicer": 1.0}), "weights must be of better, safer"),
    ],
)
def test_settings_are_checked(make: Callable[[], Schema], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


class Holder:
    def __init__(self, schema: Schema | None = None) -> None:
        self.schema = schema


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_is_named_by_its_class_in_a_configuration(schema: type[Schema]) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(Holder, "data")
    settings = parser.parse_object({"data": {"schema": {"class_path": schema.__name__}}})
    assert parser.instantiate(settings).data.schema == schema()


def test_settings_of_a_schema_in_a_configuration() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(Holder, "data")
    given = {"score": "aspects", "wrong_tens": "repair", "aspect_weights": {"honesty": 2.0}}
    settings = parser.parse_object(
        {"data": {"schema": {"class_path": "UltraFeedback", "init_args": given}}}
    )
    assert parser.instantiate(settings).data.schema == UltraFeedback(**given)  # type: ignore[arg-type]
