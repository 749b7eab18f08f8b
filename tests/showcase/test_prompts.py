"""Prompts of the show case: divided by topic, the same for the same seed, rows that all read."""

import json
from pathlib import Path

import pytest

from mpo_lightning.data.prompts import PromptSource
from mpo_lightning.errors import UserError
from mpo_lightning.showcase.__main__ import main
from mpo_lightning.showcase.constraints import CONFLICTS, HELD_OUT, KINDS, constraints_of
from mpo_lightning.showcase.prompts import SPLITS, TEMPLATES, TOPICS, prompts, write_prompts


def test_splits_share_no_topic_and_no_instruction() -> None:
    for seed in range(3):
        rows = prompts(seed)
        assert {split: len(of) for split, of in rows.items()} == {
            "train": 128,
            "tuning": 48,
            "test": 128,
            "other-kinds": 48,
        }
        topics = []
        for of in rows.values():
            texts = [row["prompt"][0]["content"] for row in of]
            assert len(set(texts)) == len(texts)
            topics.append({topic for topic in TOPICS for text in texts if f"{topic}" in text})
        for number, one in enumerate(topics):
            assert len(one) > 10
            for other in topics[number + 1 :]:
                assert not one & other
        keys = [row["key"] for of in rows.values() for row in of]
        assert keys == list(range(352))


def test_topics_and_templates_are_many() -> None:
    assert len(set(TOPICS)) == 100
    assert len(set(TEMPLATES)) == 20
    # A topic within another could not be told apart.
    assert not [(a, b) for a in TOPICS for b in TOPICS if a != b and a in b]


def test_columns_say_what_the_prompt_says() -> None:
    held_out = {kind.name for kind in HELD_OUT}
    for split, rows in prompts(0).items():
        for row in rows:
            asked = constraints_of(row["prompt"])
            assert [each.kind.name for each in asked] == row["kinds"]
            assert frozenset(row["kinds"]) not in CONFLICTS
            assert len(set(row["kinds"])) == 2
            assert [each.kind.instruction for each in asked] == row["instruction_id_list"]
            assert [each.arguments for each in asked] == row["kwargs"]
            assert (set(row["kinds"]) <= held_out) == (split == "other-kinds")
            assert held_out.isdisjoint(row["kinds"]) == (split != "other-kinds")
        if split != "tuning":
            assert {k.name for k in SPLITS[split][1]} == {k for row in rows for k in row["kinds"]}
    assert len(KINDS) == 15


def test_files_are_deterministic_and_are_prompts(tmp_path: Path) -> None:
    main(["prompts", "--out", str(tmp_path / "a"), "--seed", "3", "--train", "7"])
    write_prompts(tmp_path / "b", 3)
    for split, (count, _) in SPLITS.items():
        part = (tmp_path / "a" / f"{split}.jsonl").read_bytes()
        whole = (tmp_path / "b" / f"{split}.jsonl").read_bytes()
        assert whole.startswith(part)
        assert len(part.splitlines()) == (7 if split == "train" else count)
        assert [json.loads(line) for line in whole.splitlines()] == prompts(3)[split]
    source = PromptSource(str(tmp_path / "a" / "train.jsonl"), None)
    assert len(source.rows(0, len(source))) == 7
    assert prompts(3) != prompts(4)
    with pytest.raises(UserError, match="--test must be from 1 to 128, got 0"):
        write_prompts(tmp_path / "c", sizes={"test": 0})
    with pytest.raises(SystemExit, match="error: --other-kinds must be from 1 to 48, got 49"):
        main(["prompts", "--out", str(tmp_path / "c"), "--other-kinds", "49"])
