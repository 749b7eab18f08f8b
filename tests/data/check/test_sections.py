"""Sections of the report against plain loops over the groups."""

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

import mpo_lightning.data.check.table
from mpo_lightning.data.check.run import check
from mpo_lightning.losses import AboveThreshold, BestRest, Partition, TopBottom
from tests.data.check.rows import group, norm, random_rows

Write = Callable[..., str]


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpo_lightning.data.check.table, "BLOCK", 50)


@pytest.mark.parametrize("alpha_unit", ["score", "std"])
def test_statistics_are_those_of_plain_loops(
    write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, alpha_unit: Any
) -> None:
    small_blocks(monkeypatch)
    rows = random_rows(150)
    report = check(
        [write_jsonl(rows[:70], "a.jsonl"), write_jsonl(rows[70:], "b.jsonl")],
        alpha=0.3,
        power=1.5,
        alpha_unit=alpha_unit,
    )
    every = np.array([s for row in rows for s in row["scores"]])
    scores = report.total.scores
    assert (scores.count, scores.low, scores.high) == (len(every), every.min(), every.max())
    assert scores.mean == pytest.approx(every.mean())
    assert scores.std == pytest.approx(every.std())
    assert scores.skewness == pytest.approx(scipy.stats.skew(every))
    assert scores.kurtosis == pytest.approx(scipy.stats.kurtosis(every))
    assert report.histogram == [(v, v, int((every == v).sum())) for v in np.unique(every)]

    mixed = [row for row in rows if len(set(row["scores"])) > 1]
    groups = [np.array(row["scores"]) for row in mixed]
    delta = np.concatenate([s - s.mean() for s in groups])
    assert report.deviations.count == len(delta)
    assert report.deviations.skewness == pytest.approx(scipy.stats.skew(delta))
    assert report.deviations.kurtosis == pytest.approx(scipy.stats.kurtosis(delta))
    assert report.group_skewness == pytest.approx(np.mean([scipy.stats.skew(s) for s in groups]))
    assert report.group_kurtosis == pytest.approx(
        np.mean([scipy.stats.kurtosis(s) for s in groups])
    )
    std = report.group_std
    assert (std.p10, std.median, std.p90) == pytest.approx(
        tuple(np.quantile([s.std() for s in groups], [0.1, 0.5, 0.9]))
    )

    sets: dict[int, dict[int, int]] = {}
    for row in rows:
        n, mean = len(row["scores"]), np.mean(row["scores"])
        chosen = sum(s > mean for s in row["scores"])
        sets.setdefault(n, {}).setdefault(chosen, 0)
        sets[n][chosen] += 1
    assert report.sets == sets
    assert report.equal.count == len(rows) - len(mixed)
    pairs = [pair for row in rows for pair in combinations(row["scores"], 2)]
    assert report.ties.pairs == len(pairs)
    assert report.ties.tied_pairs == sum(a == b for a, b in pairs)
    assert report.ties.groups == sum(len(set(r["scores"])) < len(r["scores"]) for r in rows)
    assert report.ties.best == sum(r["scores"].count(max(r["scores"])) > 1 for r in rows)
    assert (report.ties.highest, report.ties.at_highest) == (31, int((every == 31).sum()))
    assert report.ties.sharing_highest == sum(
        c for c in (row["scores"].count(31) for row in rows) if c > 1
    )

    limit = 5 * delta.std()
    assert report.outliers.limit == pytest.approx(limit)
    assert report.outliers.count == int((np.abs(delta) > limit).sum())
    largest, effective = [], []
    for s in groups:
        size = np.abs(s - s.mean()) / (s.std() if alpha_unit == "std" else 1.0)
        weights = scipy.special.softmax(0.3 * size**1.5)
        largest.append(weights.max())
        effective.append(np.exp(scipy.stats.entropy(weights)) / len(s))
    weights = report.weights
    assert weights.largest.median == pytest.approx(np.median(largest))
    assert weights.effective.p90 == pytest.approx(np.quantile(effective, 0.9))
    several = [len(s) > 2 for s in groups]
    assert weights.even_of == sum(several)
    assert weights.dominated.count == sum(np.array(several) & (np.array(largest) > 0.9))
    assert weights.even == sum(np.array(several) & (np.array(effective) > 0.99))


def test_lengths_and_their_bias_are_those_of_plain_loops(
    write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    rows = random_rows(120, seed=1)
    report = check(write_jsonl(rows))
    within, chosen, rejected = [], [], []
    for row in rows:
        lengths, scores = np.array([len(t) for t in row["responses"]]), np.array(row["scores"])
        if scores.std() and lengths.std():
            within.append(scipy.stats.pearsonr(scores, lengths).statistic)
        if scores.std():
            chosen += lengths[scores > scores.mean()].tolist()
            rejected += lengths[scores <= scores.mean()].tolist()
    bias = report.bias
    assert bias.groups == len(within)
    assert bias.within == pytest.approx(np.mean(within))
    every = [(len(t), s) for r in rows for t, s in zip(r["responses"], r["scores"], strict=True)]
    assert bias.pooled == pytest.approx(scipy.stats.pearsonr(*zip(*every, strict=True)).statistic)
    assert (bias.chosen, bias.rejected) == pytest.approx((np.mean(chosen), np.mean(rejected)))
    lengths = sorted(length for length, _ in every)
    chars = report.response_chars
    assert (chars.count, chars.low, chars.high) == (len(lengths), lengths[0], lengths[-1])
    assert chars.mean == pytest.approx(np.mean(lengths))
    assert chars.p95 == lengths[math.ceil(0.95 * len(lengths)) - 1]


def test_repeats_and_columns_are_those_of_plain_loops(
    write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    rows = random_rows(200, seed=2)
    a, b = write_jsonl(rows[:90], "a.jsonl"), write_jsonl(rows[90:], "b.jsonl")
    report = check([a, b])
    found = report.duplicates
    exact = same = unequal = contradicting = short = 0
    for row in rows:
        texts, scores = row["responses"], row["scores"]
        mean = sum(scores) / len(scores)
        exact += len(texts) - len(set(texts))
        same += len(texts) - len(set(map(norm, texts)))
        short += sum(len(t.strip()) <= 3 for t in texts)
        repeats = [
            (s, t)
            for (x, s), (y, t) in combinations(zip(texts, scores, strict=True), 2)
            if norm(x) == norm(y)
        ]
        unequal += any(s != t for s, t in repeats)
        contradicting += any((s > mean) != (t > mean) for s, t in repeats)
    assert (found.exact.count, found.normalized.count) == (exact, same)
    assert (found.unequal.count, found.contradicting.count) == (unequal, contradicting)
    assert found.near_empty.count == short
    assert min(exact, same - exact, unequal, contradicting, short) > 0

    def key(row: dict[str, Any]) -> str:
        prompt = row["prompt"]
        return norm(prompt if isinstance(prompt, str) else prompt[0]["content"])

    keys = [key(row) for row in rows]
    repeated = [i for i, k in enumerate(keys) if k in keys[:i]]
    names = [f"{a}:{i + 1}" if i < 90 else f"{b}:{i - 89}" for i in repeated]
    assert found.prompts.count == len(repeated) > 3
    assert found.prompts.rows == names[:3]
    ((first, second, shared),) = found.shared
    both = set(keys[:90]) & set(keys[90:])
    assert (first, second, shared.count) == (a, b, len(both))
    rows_of_b = [i for i, k in enumerate(keys[90:]) if k in both and k not in keys[90 : 90 + i]]
    assert shared.rows == [f"{b}:{i + 1}" for i in rows_of_b[:3]]

    for model in report.of_responses["models"]:
        mine = [
            (s, s > np.mean(r["scores"]), s == max(r["scores"]), len(set(r["scores"])) > 1)
            for r in rows
            for s, m in zip(r["scores"], r["models"], strict=True)
            if m == model.name
        ]
        assert model.responses == len(mine)
        assert model.mean == pytest.approx(np.mean([s for s, *_ in mine]))
        mixed = [entry for entry in mine if entry[3]]
        assert model.contrasted == len(mixed)
        assert model.chosen == pytest.approx(np.mean([entry[1] for entry in mixed]))
        assert model.best == pytest.approx(np.mean([entry[2] for entry in mixed]))
    assert len(report.of_responses["models"]) == 4
    assert "source" not in report.of_responses
    for source in report.of_groups["source"]:
        theirs = [np.array(r["scores"]) for r in rows if r["source"] == source.name]
        assert (source.groups, source.responses) == (len(theirs), sum(map(len, theirs)))
        assert source.mean == pytest.approx(np.concatenate(theirs).mean())
        spread = np.concatenate([s - s.mean() for s in theirs])
        assert source.std == pytest.approx(np.sqrt(np.square(spread).mean()))
        assert source.no_contrast == sum(s.std() == 0 for s in theirs)


def test_tokens_are_those_of_the_run(write_jsonl: Write, tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Name a fruit.", "responses": ["An apple.", "A pear " * 20], "scores": [2, 1]},
        {"prompt": "Count " * 40, "responses": ["One.", "Two, three."], "scores": [1, 2]},
    ]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": rows[0]["prompt"]}], add_generation_prompt=True
    )["input_ids"]
    report = check(write_jsonl(rows), tokenizer=tokenizer, max_length=60)
    tokens = report.tokens
    assert tokens is not None
    assert tokens.prompt.low == len(whole)
    # The end-of-turn token counts.
    answers = [
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1
        for row in rows
        for text in row["responses"]
    ]
    assert tokens.response.count == 4
    assert tokens.response.mean == pytest.approx(np.mean(answers))
    assert (tokens.beyond.count, tokens.groups_beyond, tokens.prompts_beyond.count) == (3, 2, 1)
    assert (tokens.beyond_chosen, tokens.beyond_rejected) == (1, 2)
    assert (tokens.chosen, tokens.rejected) == (2, 2)
    assert "beyond-max-length" in [warning.name for warning in report.warnings]
    # From its folder, as everywhere.
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    files, folder = write_jsonl(rows), str(tmp_path / "tokenizer")
    assert check(files, tokenizer=folder, max_length=60).tokens == tokens
    # A group that cannot be tokenised is a bad row.
    bad = {"prompt": [{"role": "tool", "content": "x"}], "responses": ["a", "b"], "scores": [1, 2]}
    read = check(write_jsonl([*rows, bad]), tokenizer=tokenizer).total.read
    assert (read.groups, read.failed, read.kept) == (3, 1, 2)


def test_groups_of_thousands_of_responses(write_jsonl: Write) -> None:
    scores = [float(j * 7919 % 1000) for j in range(3000)]
    report = check(write_jsonl([group(i, scores) for i in range(50)]))
    assert report.sets == {3000: {1500: 50}}


@pytest.mark.parametrize(
    ("partition", "kept", "equal", "other"),
    [
        (None, 3, 1, 0),
        (AboveThreshold(threshold=3.5), 1, 1, 2),
        (TopBottom(k=1), 3, 1, 0),
    ],
)
def test_groups_without_contrast_are_counted_by_the_rule_that_splits_them(
    partition: Partition | None, kept: int, equal: int, other: int, write_jsonl: Write
) -> None:
    scores = ([1.0, 2.0, 3.0], [4.0, 5.0], [2.0, 6.0, 6.0], [2.0, 2.0])
    path = write_jsonl([group(i, row, source="s") for i, row in enumerate(scores)])
    report = check(path, partition=partition)
    assert (report.total.read.kept, report.total.no_contrast) == (kept, equal + other)
    rule = type(partition).__name__
    reasons = {
        "with all scores equal": equal,
        f"whose scores {rule} has no contrast for": other,
    }
    assert report.total.read.dropped == {reason: k for reason, k in reasons.items() if k}
    assert report.files[0].no_contrast == equal + other
    assert report.equal.count == equal
    assert report.groups_of_chosen[0] == equal + other
    assert [value.no_contrast for value in report.of_groups["source"]] == [equal + other]


def test_scores_that_differ_by_rounding_are_dropped_only_without_contrast(
    write_jsonl: Write,
) -> None:
    path = write_jsonl([group(0, [0.1, 0.1, 0.1]), group(1, [0.3, 0.1 + 0.2])])
    for partition, kept in ((None, 0), (BestRest(), 1)):
        report = check(path, partition=partition)
        read = report.total.read
        assert (read.kept, report.total.no_contrast) == (kept, 2 - kept)
        assert read.dropped == {"with all scores equal": 2 - kept}
        assert report.equal.count == 2
    # The one group that is kept has no spread, skewness or length bias.
    assert (report.group_std.median, report.group_skewness, report.bias.within) == (0, None, None)
