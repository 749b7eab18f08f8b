"""The report of the show case, on answers that are made up."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.showcase.__main__ import main
from mpo_lightning.showcase.constraints import score
from mpo_lightning.showcase.measures import MEASURES, met_by_kind, paired, read_answers
from mpo_lightning.showcase.prompts import prompts
from mpo_lightning.toy.report import CURVES

LONG = "word " * 60
QUOTED = '"One. Two. Three. Four."'


def write_scored(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    with (folder / "part-00000.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def scored(rows: list[dict[str, Any]], *responses: str) -> list[dict[str, Any]]:
    """The same answers to each prompt, scored as `score` does."""
    answers = list(responses)
    return [
        {
            **row,
            "responses": answers,
            "truncated": [False, True],
            "scores": score(row["prompt"], answers),
        }
        for row in rows
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files that the report reads: 12 test prompts, one of which was lost afterwards."""
    made = prompts(0)
    report = tmp_path / "report"
    for split, count in (("test", 12), ("other-kinds", 5)):
        rows = made[split][:count]
        write_scored(report / f"{split}-before-scored", scored(rows, LONG, "one"))
        after = rows[1:] if split == "test" else rows
        write_scored(report / f"{split}-after-scored", scored(after, LONG, QUOTED))
    wins = {"value": 0.6, "low": 0.5, "high": 0.7}
    (report / "comparison.json").write_text(json.dumps({"win_rate": wins}), encoding="utf-8")
    of_responses = [
        {"file": f"x/{folder}/part-00000.jsonl", "tokens": 4, "log_ratio": value}
        for folder, value in (("test-after-scored", 1.0), ("test-after-scored", 2.0), ("y", 9.0))
    ]
    pq.write_table(pa.Table.from_pylist(of_responses), report / "predictions.parquet")
    columns = [f"{stage}/{metric}" for stage in ("train", "val") for metric in CURVES.values()]
    with (tmp_path / "metrics.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["step", *columns])
        writer.writeheader()
        writer.writerows({"step": step, **dict.fromkeys(columns, 0.5)} for step in range(3))
    return tmp_path


def test_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", "--run", str(run)])
    shown = capsys.readouterr().out
    found = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    assert found["prompts"] == {"test": 11, "other-kinds": 5}
    assert found["kl"] == 1.5
    # By hand, over the eleven prompts that both have.
    before, after = (
        {
            row["key"]: sum(row["scores"]) / 2
            for row in map(json.loads, (folder / "part-00000.jsonl").read_text().splitlines())
        }
        for folder in (run / "report" / f"test-{side}-scored" for side in ("before", "after"))
    )
    gains = [after[key] - before[key] for key in after]
    share = found["compared"]["test"]["share of constraints met"]
    assert share["difference"]["value"] == pytest.approx(sum(gains) / 11)
    assert share["difference"]["low"] < sum(gains) / 11 < share["difference"]["high"]
    assert share["before"]["value"] == pytest.approx(sum(before[key] for key in after) / 11)
    assert found["compared"]["test"]["words"]["before"]["value"] == 30.5
    assert found["compared"]["test"]["cut at the limit"]["before"]["value"] == 0.5
    assert found["kinds"]["test"]["before"]["words-at-least"] == 0.5
    assert found["kinds"]["other-kinds"]["after"]["title"] == 0
    assert len([line for line in shown.splitlines() if line.startswith("| test:")]) == 5
    page = (run / "report" / "report.md").read_text(encoding="utf-8")
    assert shown.split("\n\n")[0] in page
    # The first ten in the file's order.
    answers = [line for line in page.splitlines() if LONG.strip() in line]
    second = prompts(0)["test"][1]["prompt"][0]["content"]
    assert len(answers) == 10
    assert answers[0].startswith(f"| {second[:30]}")
    for picture in ("showcase.png", "curves.png"):
        assert (run / "report" / picture).stat().st_size > 10_000


def test_a_missing_file_is_told_in_one_line(run: Path) -> None:
    (run / "report" / "comparison.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: .*comparison\.json"):
        main(["report", "--run", str(run)])


def test_answers_of_something_else_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "Hello", "responses": ["a", "b"], "scores": [1, 0]}]
    write_scored(tmp_path / "other", rows)
    with pytest.raises(DataError, match=r"part-00000.jsonl:1: key: .*showcase prompts"):
        read_answers(tmp_path / "other")
    made = prompts(0)["test"]
    for name, part in (("a", made[:2]), ("b", made[2:3])):
        write_scored(tmp_path / name, scored(part, "one", "two"))
    one, other = (read_answers(tmp_path / name) for name in "ab")
    with pytest.raises(DataError, match="no prompt in common"):
        paired(one, other, "words")


def test_measures_by_hand(tmp_path: Path) -> None:
    text = "Greet me. Use at most 3 words. Wrap your whole answer in double quotation marks."
    row = {"key": 5, "prompt": [{"role": "user", "content": text}]}
    write_scored(tmp_path / "x", scored([row], '"So so so."', "so so so so"))
    answers = read_answers(tmp_path / "x")
    values = {name: measure(answers[5]) for name, measure in MEASURES.items()}
    assert values == {
        "share of constraints met": 0.5,
        "both met": 0.5,
        "words": 3.5,
        "cut at the limit": 0.5,
        # One of five pairs.
        "distinct pairs of words": 0.2,
    }
    assert met_by_kind(answers) == {"words-at-most": 0.5, "quotation-marks": 0.5}
