"""Rows of predict: log-probabilities, rewards and ranks of all responses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning import PreferenceDataModule
from tests.conftest import example_rows, random_groups
from tests.training.fits import RAGGED, loader, make_module, make_trainer


def test_predict_gives_log_probabilities_rewards_and_ranks(
    base: str, write_jsonl: Callable[..., str]
) -> None:
    rows = example_rows(3)
    rows[1]["scores"] = [2.0] * len(rows[1]["scores"])
    path = write_jsonl(rows)
    module = make_module(base)
    make_trainer(max_epochs=3).fit(module, loader(random_groups(RAGGED), [8]))
    data = PreferenceDataModule(tokenizer=base, predict=path, groups_per_batch=2)
    batches = make_trainer().predict(module, data)
    assert batches is not None
    found: list[dict[str, Any]] = [row for batch in batches for row in batch]  # type: ignore[misc]
    assert [(row["row"], row["response"]) for row in found] == [
        (line, index) for line, row in enumerate(rows, 1) for index in range(len(row["scores"]))
    ]
    for row in found:
        assert row["file"] == path
        assert row["score"] == rows[row["row"] - 1]["scores"][row["response"]]
        assert row["log_ratio"] == pytest.approx(row["policy_logp"] - row["reference_logp"])
        assert row["reward"] == pytest.approx(0.5 * row["log_ratio"], rel=1e-5)
        assert json.loads(row["extra"]) == {"prompt_id": f"p{row['row'] - 1}"}
    for line in (1, 2, 3):
        group = sorted((r for r in found if r["row"] == line), key=lambda r: -r["reward"])
        assert [r["rank"] for r in group] == list(range(1, len(group) + 1))


def test_predictions_name_the_place_in_the_row_when_responses_were_dropped(
    base: str, write_jsonl: Callable[..., str]
) -> None:
    row = {"prompt": "hi", "responses": ["a " * 90, "short", "brief"], "scores": [3, 2, 1]}
    data = PreferenceDataModule(
        tokenizer=base, predict=write_jsonl([row]), max_length=60, over_long="drop_response"
    )
    batches = make_trainer().predict(make_module(base), data)
    assert batches is not None
    found = [(r["response"], r["score"]) for r in batches[0]]  # type: ignore[index, union-attr]
    assert found == [(1, 2.0), (2, 1.0)]


def test_predictions_with_a_cached_reference(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    data = write_jsonl(example_rows(5))
    rows = []
    for reference in ("adapters-off", "cached"):
        module = make_module(base, reference=reference, reference_cache=str(tmp_path))
        files = PreferenceDataModule(tokenizer=base, predict=data, groups_per_batch=2)
        batches = make_trainer().predict(module, files)
        assert batches is not None
        rows.append([row for batch in batches for row in batch])
    for first, second in zip(*rows, strict=True):
        assert second["reference_logp"] == pytest.approx(first["reference_logp"], abs=1e-4)
