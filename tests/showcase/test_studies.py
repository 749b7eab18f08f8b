"""Quick forms of the studies of a real model, on a tiny one, by their command."""

import csv
import gzip
import json
import random
from collections.abc import Callable
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from mpo_lightning.showcase import judged
from mpo_lightning.showcase.__main__ import main
from mpo_lightning.showcase.judged import Division, File, JudgedGroups, measures, ridge
from mpo_lightning.showcase.measures import MEASURES
from tests.conftest import CORPUS

WORDS = " ".join(CORPUS).split()
# Twelve writers of six families, and one that games the judge.
WRITERS = [f"{name}-{k}" for name in ("ant", "bee", "cat", "dog", "elk", "fox") for k in (1, 2)]


def rows_of(path: Path) -> list[dict[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(name: str, out: Path, base: str, *more: str) -> dict[str, Any]:
    where = ["--out", str(out), "--base", base, "--workers", "1"]
    main(["study", name, "--quick", *where, *more])
    found: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def file(write_jsonl: Callable[..., str]) -> str:
    """Judged responses, of equal length, some of them too long to be used."""
    rng = random.Random(0)
    writers = [*WRITERS, "example"]
    rows = []
    for number in range(20):
        responses = [" ".join(rng.sample(WORDS, 6)) for _ in writers]
        responses[number % 12] = "long " * 100
        responses[-1] = "} } " * 110
        scores = [0.0, *(round(rng.random() ** 4, 6) for _ in writers[2:]), 0.99]
        prompt = f"{number} {' '.join(rng.sample(WORDS, 4))}"
        rows.append({"prompt": prompt, "responses": responses, "scores": scores, "models": writers})
    return write_jsonl(rows, "judged.jsonl")


def test_verifiable(
    base: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A tiny model meets no constraint; of these scores every group has several.
    monkeypatch.setattr(
        "mpo_lightning.showcase.runs.score", lambda _, texts: [len(t) % 3 / 2 for t in texts]
    )
    summary = run("verifiable", tmp_path / "out", base)
    primary = next(iter(MEASURES))
    answers = rows_of(tmp_path / "out" / "answers.csv.gz")
    conditions = {row["condition"] for row in answers}
    assert conditions == {
        *("base", "MPO", "W-MPO", "DPO best-worst", "DPO random pair", "InfoNCA", "GVPO"),
        *("MPO, 4 x 2", "MPO, 4 x 4", "MPO, 8 x 2", "MPO, 2 x 8"),
        *("DPO best-worst, 4 x 4", "DPO best-worst, 2 x 8"),
        *("MPO, second round", "DPO best-worst, second round"),
    }

    def mean(condition: str, split: str, scale: str = "1.0") -> float:
        named = {"condition": condition, "split": split, "scale": scale}
        return fmean(float(row[primary]) for row in answers if named.items() <= row.items())

    groups = {row["condition"]: row for row in rows_of(tmp_path / "out" / "fits.csv.gz")}
    assert groups.keys() == conditions - {"base"}
    for name, count in (("MPO", 4), ("MPO, 8 x 2", 8), ("MPO, 2 x 8", 2)):
        found = groups[name]
        assert int(found["groups"]) + int(found["without_contrast"]) == count
    for split, prompts in (("test", 4), ("other-kinds", 2)):
        means = summary["means"][split][primary]
        for condition, value in means.items():
            assert value["mean"] == pytest.approx(mean(condition, split))
            assert value["count"] == prompts
    contrasts = {row["name"]: row for row in summary["contrasts"]}
    assert contrasts["MPO - base"]["difference"]["mean"] == pytest.approx(
        mean("MPO", "test") - mean("base", "test")
    )
    assert len(contrasts) == 4
    trained = {name for name in conditions if "," not in name} - {"base"}
    frontier = {(row["condition"], row["scale"]): row["divergence"] for row in summary["frontier"]}
    assert frontier.keys() == {(name, scale) for name in trained for scale in (0.5, 1)}
    assert all(frontier.values())
    assert {(r["prompts"], r["responses"]): r["scored"] for r in summary["scored_responses"]} == {
        (4, 8): 32,
        (4, 2): 8,
        (4, 4): 16,
        (8, 2): 16,
        (2, 8): 16,
    }
    for figure in ("methods", "frontier", "responses"):
        assert (tmp_path / "out" / f"{figure}.png").stat().st_size > 5000
    capsys.readouterr()
    # Everything is kept, and a part reads what the whole has made.
    part = run("verifiable", tmp_path / "out", base, "--arms", "main")
    assert "0 runs made now" in capsys.readouterr().out
    assert part["contrasts"] == summary["contrasts"]
    with pytest.raises(SystemExit, match="error: --arms must be of main, others, responses"):
        main(["study", "verifiable", "--out", str(tmp_path), "--base", base, "--arms", "x"])


def test_judged(base: str, file: str, tmp_path: Path) -> None:
    summary = run("judged", tmp_path / "out", base, "--data", file, "--arms", "main", "example")
    prompts = rows_of(tmp_path / "out" / "prompts.csv.gz")
    accuracies = [float(row[judged.PRIMARY]) for row in prompts if row["condition"] == "MPO"]
    assert len(accuracies) == 9
    mean = summary["means"][judged.PRIMARY]["MPO"]["mean"]
    assert mean == pytest.approx(fmean(value for value in accuracies if not isnan(value)))
    fits = rows_of(tmp_path / "out" / "fits.csv.gz")
    assert {row["condition"] for row in fits} == {*list(judged.METHODS)[:4], "MPO, attacked"}
    assert all(row["groups"] == "6" for row in fits)
    named = {row["condition"] for row in prompts}
    assert {"MPO", "MPO, attacked", "MPO, a token", "length"} <= named
    assert {judged.LIKELIHOOD, judged.RIDGE} <= named
    # The sixth of the writers' families is left for no third.
    assert len(summary["data"]["held_out_writers"]) == 4
    assert [row["name"] for row in summary["contrasts"]] == [c.name for c in judged.CONTRASTS]
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 5000


def test_judged_needs_a_file(base: str, tmp_path: Path, file: str) -> None:
    with pytest.raises(SystemExit, match=r"error: --data: name a file .*data convert"):
        main(["study", "judged", "--out", str(tmp_path / "out"), "--base", base])
    small = tmp_path / "small.jsonl"
    small.write_text(Path(file).read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    with pytest.raises(SystemExit, match="error: --data: .* has 0 prompts with 8 responses"):
        main(["study", "judged", *f"--out {tmp_path} --base {base} --data {small}".split()])


def test_judged_groups_leave_apart_what_is_tested(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judged, "ATTACKED_SHARE", 0.5)
    of, division = File.of(file), Division(responses=4, tuning=3, most=15)

    def groups(fold: int | None, *, tested: bool, **more: Any) -> JudgedGroups:
        return JudgedGroups(file=of, division=division, fold=fold, tested=tested, **more)

    tested = [set(groups(fold, tested=True).numbers()) for fold in range(3)]
    assert set.union(*tested, groups(None, tested=False).numbers()) <= set(range(20))
    assert sum(map(len, tested)) == len(set.union(*tested)) == 15
    attacks = changed = 0
    for fold, numbers in enumerate(tested):
        trained = groups(fold, tested=False)
        assert not numbers & set(trained.numbers())
        held_out = {w for row in groups(fold, tested=True).rows(tmp_path) for w in row["models"]}
        assert len(held_out) == 4
        assert {writer[:3] for writer in held_out} < {writer[:3] for writer in WRITERS}
        attacked = groups(fold, tested=False, attacked=True).rows(tmp_path)
        for row, other in zip(trained.rows(tmp_path), attacked, strict=True):
            assert len(row["scores"]) == len(set(row["models"])) == 4
            assert {w[:3] for w in row["models"]}.isdisjoint({w[:3] for w in held_out})
            assert "example" not in row["models"]
            assert max(map(len, row["responses"])) <= 400
            # All but the last are the same.
            assert other["models"][:3] == row["models"][:3]
            attacks += other["models"][3] == "example"
            changed += other["models"][3] != row["models"][3]
    assert 0 < attacks == changed < 30
    raw, ranks, logits = (
        groups(0, tested=False, scale=scale).rows(tmp_path) for scale in ("raw", "ranks", "logit")
    )
    assert {score for row in ranks for score in row["scores"]} >= {0.25, 0.5, 0.75, 1}
    for row, of_raw in zip(logits, raw, strict=True):
        assert sorted(range(4), key=row["scores"].__getitem__) == sorted(
            range(4), key=of_raw["scores"].__getitem__
        )
    # A probability of zero is half of the last digit.
    assert min(score for row in logits for score in row["scores"]) == pytest.approx(-14.5, abs=0.01)


def test_measures_by_hand() -> None:
    # Pairs of equal length: (0, 1) in order, (2, 3) not; (0, 1) to (2, 3) are of other lengths.
    found = measures([2.0, 1.0, 3.0, 5.0], [4.0, 2.0, 3.0, 1.0], [10, 11, 30, 32])
    assert found[judged.PRIMARY] == 0.5
    assert found["pairs"] == 2
    assert found["highest is best"] == 0
    # Of six pairs of rewards two agree with scores, five with lengths; of scores one with lengths.
    assert found["tau-b"] == pytest.approx(-2 / 6)
    assert found["tau-b, given length"] == pytest.approx((-1 / 3 + 4 / 9) / (1 - 4 / 9))
    assert measures([1.0, 1.0], [5.0, 1.0], [9, 9])[judged.PRIMARY] == 0.5
    # Scores too near, lengths too far.
    nothing = measures([1.0, 2.0, 3.0], [1.0, 1.5, 9.0], [10, 10, 20])
    assert isnan(nothing[judged.PRIMARY])
    assert nothing["pairs"] == 0


def test_ridge_learns_a_word() -> None:
    rng = random.Random(0)
    texts = [[" ".join(rng.sample(WORDS, 5)) for _ in range(6)] for _ in range(40)]
    rows = [
        {"responses": of, "scores": [number + 5.0 * ("apple" in text.lower()) for text in of]}
        for number, of in enumerate(texts)
    ]
    given = [{"responses": ["a dog and an apple", "a dog and a pear"], "scores": [0.0, 0.0]}]
    ((with_apple, without),) = ridge(rows, given)
    assert with_apple > without + 1
