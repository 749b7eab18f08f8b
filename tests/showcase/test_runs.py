"""Fits and answers of the studies of a real model, on a tiny one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_lightning.losses import DPO, MPO, SetLoss
from mpo_lightning.showcase.runs import (
    Base,
    Fit,
    Sampled,
    logps,
    picked,
    seen_by,
    trained_model,
)
from mpo_lightning.studies.lab.results import StudyError
from mpo_lightning.studies.lab.runner import Runner, result_of
from tests.conftest import example_rows


@dataclass(frozen=True)
class Given:
    """Groups that a test has made."""

    seed: int

    def rows(self, worlds: Path) -> list[dict[str, Any]]:
        return example_rows(6, seed=self.seed)


def test_pairs_are_the_same_alone() -> None:
    rows = example_rows(40)
    for loss in (DPO(beta=1), DPO(beta=1, pairs="random"), MPO(beta=1)):
        for row, kept in zip(rows, seen_by(loss, rows), strict=True):
            values = [float(len(text)) / 10 for text in row["responses"]]
            of_kept = [values[row["responses"].index(text)] for text in kept["responses"]]
            assert loss_of(loss, kept["scores"], of_kept) == pytest.approx(
                loss_of(loss, row["scores"], values)
            )
            assert len(kept["scores"]) == (2 if isinstance(loss, DPO) else len(row["scores"]))
            assert kept["prompt_id"] == row["prompt_id"]


def loss_of(loss: SetLoss, scores: list[float], log_ratios: list[float]) -> float:
    given = torch.tensor([scores], dtype=torch.float64)
    valid = torch.ones_like(given, dtype=torch.bool)
    return loss(torch.tensor([log_ratios], dtype=torch.float64), given, valid).item()


def test_groups_without_a_pair_stay_whole() -> None:
    row = {"responses": ["a", "b", "c"], "scores": [1, 1, 1], "truncated": [True, False, True]}
    assert list(seen_by(DPO(), [row])) == [row]
    assert picked(row, [2, 0])["responses"] == ["c", "a"]
    assert picked(row, [1])["truncated"] == [False]


def test_a_fit_and_the_one_after_it(base: str, tmp_path: Path) -> None:
    of = Base.of(Path(base))
    first = Fit(
        base=of,
        groups=(Given(0),),
        loss=MPO(),
        lr=0.01,
        seed=0,
        steps=3,
        groups_per_step=2,
        responses=3,
        prompts=5,
        judged=Given(1),
    )
    second = Fit(
        base=of,
        groups=(Given(2),),
        loss=DPO(),
        lr=0.01,
        seed=1,
        steps=2,
        groups_per_step=3,
        judged=Given(1),
        after=first,
    )
    worlds = tmp_path / "worlds"
    with Runner(tmp_path, workers=1, show_progress=False) as runner:
        results = runner([first, second], "")
    assert [result["groups"] for result in results] == [5, 6]
    one, other = first.predictions(worlds), second.predictions(worlds)
    ratios = [each.log_ratio for each in one]
    assert max(map(abs, ratios)) > 0.2
    judged = Given(1).rows(worlds)
    assert [(p.row, p.response) for p in one] == [
        (number, n) for number, row in enumerate(judged) for n in range(len(row["scores"]))
    ]

    # The merged adapter, read back from the disk, is what was trained.
    def under(fit: Fit | None, scale: float = 1.0) -> list[float]:
        cache = str(tmp_path / "cache")
        return logps(trained_model(of, fit, worlds, scale), of, judged, cache)

    of_base, of_first, of_second = (under(fit) for fit in (None, first, second))
    assert [p.reference_logp for p in one] == pytest.approx(of_base, abs=1e-3)
    assert ratios == pytest.approx(
        [a - b for a, b in zip(of_first, of_base, strict=True)], abs=1e-3
    )
    # The second stays close to the first.
    assert [p.reference_logp for p in other] == pytest.approx(of_first, abs=1e-3)
    assert [p.log_ratio for p in other] == pytest.approx(
        [a - b for a, b in zip(of_second, of_first, strict=True)], abs=1e-3
    )
    assert under(first, scale=0) == pytest.approx(of_base, abs=1e-3)
    half = [a - b for a, b in zip(under(first, scale=0.5), of_base, strict=True)]
    assert half == pytest.approx([ratio / 2 for ratio in ratios], abs=0.35 * max(map(abs, ratios)))


def test_answers_are_kept(base: str, tmp_path: Path) -> None:
    asked = Sampled(
        base=Base.of(Path(base)), split="tuning", prompts=2, n=3, new_tokens=5, seed=0, first=1
    )
    worlds = tmp_path / "worlds"
    with Runner(tmp_path, workers=1, show_progress=False) as runner:
        (result,) = runner([asked], "")
    assert [row["key"] for row in result["rows"]] == [257, 258]
    assert all(len(row["responses"]) == len(row["scores"]) == 3 for row in result["rows"])
    again = result_of(asked, worlds)
    assert again == result
    (tmp_path / "runs").rename(tmp_path / "lost")
    (tmp_path / "runs").mkdir()
    drawn = result_of(asked, worlds)
    assert drawn["rows"] == result["rows"]


def test_base_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="--base: .*none is no folder"):
        Base.of(tmp_path / "none")
