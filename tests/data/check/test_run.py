"""The check against plain loops over the groups, and each of its warnings."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

import mpo_lightning.data.check.tally
from mpo_lightning.data.check.report import CheckReport
from mpo_lightning.data.check.run import check
from mpo_lightning.data.check.view import draw_picture, format_report, format_warnings
from mpo_lightning.data.check.warnings import KINDS
from mpo_lightning.data.groups import DataError, PreferenceGroup
from mpo_lightning.data.schemas.base import Converted, SkippedRow
from mpo_lightning.data.schemas.detect import Canonical

Rows = list[dict[str, Any]]
Write = Callable[..., str]


def random_rows(count: int, seed: int = 0) -> Rows:
    """Ragged groups with ties, repeats, models, sources, and prompts that come again."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        n = int(draw.integers(2, 9))
        scores = [float(s) for s in draw.choice([1, 2, 3, 4.5, 7, 10, 31], n)]
        texts = ["x" * int(draw.integers(1, 60)) + chr(97 + int(draw.integers(26))) for _ in scores]
        if number % 5 == 0:
            texts[1] = " " + texts[0].upper()
        if number % 7 == 0:
            texts[-1] = texts[0]
        if number % 11 == 0:
            scores = [2.5] * n
        prompt: Any = f"Prompt {draw.integers(count * 3)}"
        if number % 2:
            prompt = [{"role": "user", "content": prompt.upper() + "  "}]
        rows.append(
            {
                "prompt": prompt,
                "responses": texts,
                "scores": scores,
                "models": [f"m{draw.integers(4)}" for _ in scores],
                "source": f"s{number % 3}",
            }
        )
    return rows


def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpo_lightning.data.check.tally, "CHUNK_GROUPS", 13)


def norm(text: str) -> str:
    return " ".join(text.lower().split())


@pytest.mark.parametrize("alpha_unit", ["score", "std"])
def test_statistics_are_those_of_plain_loops(
    write_jsonl: Write, monkeypatch: pytest.MonkeyPatch, alpha_unit: Any
) -> None:
    small_chunks(monkeypatch)
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
    small_chunks(monkeypatch)
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
    small_chunks(monkeypatch)
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
        assert source.equal == sum(s.std() == 0 for s in theirs)


def test_tokens_are_those_of_the_run(write_jsonl: Write, tokenizer: Any) -> None:
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
    # A group that cannot be tokenised is a bad row.
    bad = {"prompt": [{"role": "tool", "content": "x"}], "responses": ["a", "b"], "scores": [1, 2]}
    read = check(write_jsonl([*rows, bad]), tokenizer=tokenizer).total.read
    assert (read.groups, read.failed, read.kept) == (3, 1, 2)


def test_bad_and_skipped_rows_are_counted(write_jsonl: Write) -> None:
    class Picky(Canonical):
        def convert(self, row: Any, source: str) -> Converted:
            if row["prompt"] == "skip":
                raise SkippedRow("with a prompt to skip")
            notes = ("with a top score that its ratings contradict",) * (10 in row["scores"])
            return Converted(dict(row), notes)

    good = {"prompt": "p", "responses": ["one", "two"], "scores": [1, 2]}
    rows: list[Any] = [
        good,
        *[{**good, "scores": [1, "two"]}] * 12,
        {**good, "prompt": "skip"},
        {**good, "prompt": "q", "scores": [10, 1]},
        "{not json",
        {**good, "prompt": "r", "scores": [3, 3]},
    ]
    path = write_jsonl(rows)
    report = check(path, schema=Picky())
    read = report.files[0].read
    assert (read.groups, read.failed, read.kept) == (17, 13, 2)
    assert len(read.errors) == 10
    assert read.dropped == {"with a prompt to skip": 1, "with all scores equal": 1}
    assert report.total.read.dropped == read.dropped
    assert report.groups == 3
    text = format_report(report)
    assert "13 rows cannot be used" in text
    assert "... and 3 more" in text
    assert f"{path}:14" in text
    (warning,) = [w for w in report.warnings if w.name == "schema-notes"]
    assert "1 with a top score that its ratings contradict" in warning.found
    assert warning.rows == [f"{path}:15"]


def test_a_file_of_bad_rows_only_gives_a_report(write_jsonl: Write) -> None:
    report = check(write_jsonl([{"prompt": "p", "responses": ["a"], "scores": [1]}]))
    assert report.groups == 0
    assert "1 rows cannot be used" in format_report(report)
    assert json.loads(report.to_json())["total"]["scores"]["mean"] is None


def test_groups_can_be_changed_before_they_are_counted(write_jsonl: Write) -> None:
    def capped(group: PreferenceGroup) -> PreferenceGroup:
        return replace(group, scores=[min(score, 4.0) for score in group.scores])

    report = check(write_jsonl(random_rows(30)), transform=capped)
    assert report.total.scores.high == 4.0


@pytest.mark.parametrize(
    "scores",
    [[1e308, -1e308, 5.0], [1.7e308, 1.7e308, 0.0], [5e-324, 0.0, 1e-310], [1e200, 1.0, 2.0]],
)
def test_scores_at_the_ends_of_the_range(scores: list[float], write_jsonl: Write) -> None:
    report = check(write_jsonl([group(i, scores, source="s") for i in range(3)]), alpha=0.5)
    read = json.loads(report.to_json())
    assert (read["total"]["scores"]["low"], read["total"]["scores"]["high"]) == (
        min(scores),
        max(scores),
    )
    assert sum(count for *_, count in read["histogram"]) == 9
    assert "nan" not in format_report(report)


def test_groups_of_thousands_of_responses(write_jsonl: Write) -> None:
    scores = [float(j * 7919 % 1000) for j in range(3000)]
    report = check(write_jsonl([group(i, scores) for i in range(50)]))
    assert report.sets == {3000: {1500: 50}}


@pytest.mark.parametrize("setting", ["alpha", "power"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(DataError, match=setting):
        check("nothing.jsonl", **{setting: value})


# -------------------------------------------------------------------------------------- warnings


def group(number: int, scores: list[float], **changes: Any) -> dict[str, Any]:
    texts = [f"answer {number} {index:02}" for index in range(len(scores))]
    return {"prompt": f"p{number}", "responses": texts, "scores": scores, **changes}


def plain(count: int = 60) -> Rows:
    """Nothing to warn of: both sets even, no ties, equal lengths."""
    shapes = ([1, 2, 3, 4], [4, 1, 3, 2], [2, 4, 1, 3], [3, 2, 4, 1])
    return [group(i, [float(s) for s in shapes[i % 4]]) for i in range(count)]


CASES: dict[str, tuple[Rows, dict[str, Any]]] = {
    "equal-scores": (plain() + [group(100 + i, [2.0, 2.0]) for i in range(10)], {}),
    "ties": (plain() + [group(100 + i, [1.0, 1.0, 1.0, 1.0, 3.0, 3.0]) for i in range(60)], {}),
    "score-ceiling": (plain() + [group(100 + i, [4.0, 4.0, 2.0, 1.0]) for i in range(60)], {}),
    "skewed-scores": (plain() + [group(100 + i, [1.0, 2.0, 3.0, 30.0]) for i in range(8)], {}),
    "outliers": ([*plain(400), group(500, [1.0, 2.0, 3.0, 90.0])], {}),
    "lopsided-sets": ([group(i, [1.0, 2.0, 3.0, 9.0]) for i in range(60)], {}),
    "scale-varies": (
        [group(i, [s * 10.0 ** (i % 3) for s in (1.0, 2.0, 3.0, 4.0)]) for i in range(60)],
        {},
    ),
    "weight-dominance": ([group(i, [1.0, 1.1, 1.2, 9.0]) for i in range(60)], {"alpha": 2.0}),
    "weight-without-effect": (plain(), {"alpha": 0.001}),
    "length-bias": (
        [
            group(i, [1.0, 2.0, 3.0, 4.0], responses=[f"text {i} " + "x" * k for k in range(4)])
            for i in range(60)
        ],
        {},
    ),
    "near-empty-responses": (
        [*plain(), *(group(100 + i, [1.0, 2.0], responses=["no", "yes."]) for i in range(5))],
        {},
    ),
    "duplicate-responses": (
        [
            *plain(),
            *(
                group(100 + i, [1.0, 1.5, 4.0], responses=["abcd", " ABCD", "efghi"])
                for i in [0, 1]
            ),
            group(103, [1.0, 1.5, 4.0], responses=["abcd", "Abcd", "efghi"]),
        ],
        {},
    ),
    "contradicting-duplicates": (
        [*plain(200), group(300, [1.0, 4.0], responses=["same", "same"])],
        {},
    ),
    "repeated-prompts": (plain() + plain(4), {}),
    "one-sided-column": (
        [{**row, "models": [f"m{s:g}" for s in row["scores"]]} for row in plain()],
        {},
    ),
    "source-without-contrast": (
        [
            *({**row, "source": "good"} for row in plain(400)),
            *(group(500 + i, [2.0, 2.0], source="flat") for i in range(35)),
        ],
        {},
    ),
}


def names(report: CheckReport) -> list[str]:
    return [warning.name for warning in report.warnings]


def test_there_is_nothing_to_warn_of_where_all_is_well(write_jsonl: Write) -> None:
    assert names(check(write_jsonl(plain()), alpha=0.5)) == []


@pytest.mark.parametrize("name", CASES)
def test_each_warning_is_given_where_there_is_reason(name: str, write_jsonl: Write) -> None:
    rows, settings = CASES[name]
    report = check(write_jsonl(rows), **settings)
    assert name in names(report)
    (text,) = [t for t in format_warnings(report) if t.startswith(f"{name}: ")]
    assert "Why: " in text
    assert "What to do: " in text


def test_files_that_share_prompts_are_warned_of(write_jsonl: Write) -> None:
    rows = plain()
    files = [write_jsonl(rows[:30], "train.jsonl"), write_jsonl(rows[29:], "val.jsonl")]
    report = check(files)
    (warning,) = [w for w in report.warnings if w.name == "shared-prompts"]
    assert warning.rows == [f"{files[1]}:1"]
    assert f"1 by {files[0]} and {files[1]}" in warning.found
    assert "shared-prompts" not in names(check([files[0], write_jsonl(rows[30:], "other.jsonl")]))


def test_every_kind_of_warning_has_its_test_and_its_documentation() -> None:
    tested = {*CASES, "shared-prompts", "schema-notes", "beyond-max-length"}
    assert {kind.name for kind in KINDS} == tested
    text = (Path(__file__).parents[2] / "docs" / "data-check.md").read_text(encoding="utf-8")
    for kind in KINDS:
        assert f"| `{kind.name}` | {kind.threshold:g} |" in text


def test_the_report_as_json_and_as_a_picture(write_jsonl: Write, tmp_path: Path) -> None:
    report = check(write_jsonl(random_rows(40)), alpha=0.2)
    read = json.loads(report.to_json())
    assert read["sets"] == {
        str(n): {str(c): k for c, k in sizes.items()} for n, sizes in report.sets.items()
    }
    assert read["total"]["read"]["dropped"] == dict(report.total.read.dropped)
    assert [w["name"] for w in read["warnings"]] == names(report)
    draw_picture(report, tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(DataError, match="picture cannot be written"):
        draw_picture(report, tmp_path / "check.unknown")
