"""The command, its studies in full on results made up here, and two of them in their quick form."""

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from mpo_lightning.cli import main
from mpo_lightning.commands import study as command
from mpo_lightning.studies import skew
from mpo_lightning.studies.lab.conditions import Findings, Form
from mpo_lightning.studies.lab.runner import Runner
from mpo_lightning.studies.lab.training import TrainingRun
from mpo_lightning.studies.methods import METHODS


class MadeUp:
    """A runner that trains nothing: a run's gold depends on its seed and what it is."""

    def __init__(self, *, reaches: bool = True) -> None:
        self.reaches = reaches
        self.seen: list[TrainingRun] = []

    def __call__(self, tasks: Sequence[Any], description: str) -> list[Any]:
        return [self.result(task) for task in tasks]

    def result(self, task: Any) -> Any:
        if isinstance(task, TrainingRun):
            self.seen.append(task)
            return self.of_run(task)
        return {
            "BuildWorld": lambda: {},
            "SampleBias": lambda: {
                kind: {str(n): n**-0.5 for n in task.sizes} for kind in ("acceptable", "chosen")
            },
            "Agreement": lambda: dict.fromkeys(("kendall_tau", "same_set", "chosen_share"), 0.5),
            "Reliability": lambda: {
                name: {str(n): 1 / n for n in (2, 4, 8, 16, 32)}
                for name in ("mean", "median", "full ranking")
            },
        }[type(task).__name__]()

    def of_run(self, run: TrainingRun) -> dict[str, Any]:
        quality = 1 + 0.1 * run.seed % 7 + len(repr(run.loss)) / 1000
        names = ("ideal_gold", "win_rate", "acceptable_bias", "distance", "rarity", "outside")
        names += ("effective_chosen", "chosen_shift", "rejected_shift")
        reach = 2.0 if self.reaches else 0.5
        trajectory = [
            {
                **dict.fromkeys(names, 0.5),
                "step": float(step),
                "kl": reach * step / 40,
                "gold": quality * (step / 40) ** 0.5,
                "bias": run.responses**-0.5 + 0.01 * run.seed,
            }
            for step in range(0, 41, 2)
        ]
        return {
            "trajectory": trajectory,
            "groups": run.prompts,
            "dropped": 0,
            "seconds": 1.0,
            "step_ms": float(run.responses),
            "memory_mib": 1.0,
        }


@pytest.mark.parametrize("name", command.STUDIES)
@pytest.mark.parametrize("reaches", [True, False])
@pytest.mark.parametrize("quick_form", [True, False])
def test_both_forms_on_made_up_results(
    name: str, reaches: bool, quick_form: bool, tmp_path: Path
) -> None:
    runner: Any = MadeUp(reaches=reaches)
    form = Form(quick=quick_form)
    found: Findings = import_module(f"mpo_lightning.studies.{name}").study(runner, form)
    json.dumps(found.summary, allow_nan=False)
    for rows in found.tables.values():
        assert rows
    seeds = {run.seed for run in runner.seen if run.seed < 1000}
    assert len(seeds) >= (1 if quick_form else 4)
    assert all(len(row) == len(found.shown[0]) for row in found.shown)
    if reaches and not quick_form:
        # Figures are slow to write; drawing them runs their code.
        for draw in found.figures.values():
            draw().savefig(tmp_path / "figure.png", dpi=20)


def test_kinds_of_groups_are_held_beside_the_same_method() -> None:
    study = import_module("mpo_lightning.studies.correlation").study
    beside = study(MadeUp(), Form()).summary["beside"]
    kinds = {}
    for row in beside:
        (kind, method), (plain, same) = (row[at].split(": ") for at in ("first", "second"))
        assert method == same
        assert row["difference"]["count"] == 6
        kinds[kind] = plain
    assert len(beside) == 4 * len(kinds)
    assert kinds["5 copies of 2"] == "2 responses"
    assert kinds["shared 0.9, clean"] == "independent, clean"


def test_methods_are_trained_alike() -> None:
    runner: Any = MadeUp()
    found: Findings = import_module("mpo_lightning.studies.methods").study(runner, Form())
    compared = [run for run in runner.seen if run.seed < 1000]
    assert len(compared) == 10 * len(METHODS)
    first = {(run.seed, run.prompts, run.responses, run.epochs, run.judge) for run in compared}
    assert len(first) == 10
    tuning = [run for run in runner.seen if run.seed >= 1000]
    assert len(tuning) == 3 * 2 * len(METHODS)
    assert {run.lr for run in tuning} == {5e-4, 1e-3, 2e-3}
    # All rates give the same here, so the first is chosen.
    assert {entry["lr"] for entry in found.summary["learning_rates"].values()} == {5e-4}


def test_slopes_of_made_up_bias() -> None:
    runner: Any = MadeUp()
    found: Findings = import_module("mpo_lightning.studies.responses").study(runner, Form(seeds=1))
    assert found.summary["sample_bias_slope"] == pytest.approx(-0.5)
    slopes = found.summary["policy_bias_slopes"]
    assert slopes["MPO, prompts fixed, 1 nat"]["mean"] == pytest.approx(-0.5)
    fits = found.summary["policy_bias_floors"]["MPO, prompts fixed, 1 nat"]
    assert fits["mean"] == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------ the command


def quick(name: str, out: Path, study_worlds: Path, *options: str) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    if not (out / "worlds").exists():
        shutil.copytree(study_worlds, out / "worlds")
    main(["study", name, "--quick", "--seeds", "1", "--workers", "1", "--out", str(out), *options])
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert (summary["study"], summary["form"]) == (name, "quick")
    return summary


def test_responses_quick(
    study_worlds: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With all methods it runs on made-up results above.
    monkeypatch.setattr("mpo_lightning.studies.responses.QUICK_COMPARED", ("MPO",))
    out = tmp_path / "out"
    summary = quick("responses", out, study_worlds)
    assert -0.55 < summary["sample_bias_slope"] < -0.45
    assert -0.6 < summary["sample_bias_slopes"]["chosen"]["mean"] < -0.4
    gold = {label: values["gold"] for label, values in summary["at_1_nat"].items()}
    # Five times the data.
    more, less = gold["MPO, n=10, prompts fixed"], gold["MPO, n=2, prompts fixed"]
    assert more["mean"] > less["mean"] + 0.05
    with (out / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["seed"] for row in rows} == {"0"}
    assert len(rows) == 3 * len(summary["at_1_nat"])
    header, rule, *lines = (out / "table.md").read_text(encoding="utf-8").splitlines()
    assert header == "| bias of | at | log-log slope | floor |"
    assert rule == "| --- | --- | --- | --- |"
    slope = summary["policy_bias_slopes"]["MPO, prompts fixed, 1 nat"]["mean"]
    assert f"| policy: MPO, prompts fixed | 1 nat | {slope:.3f} |" in "\n".join(lines)
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in ("gold", "policy_bias"))
    assert "5 runs made now" in capsys.readouterr().out
    # Again: nothing is left to do. One result lost: that one is made, and the same is found.
    quick("responses", out, study_worlds)
    assert "0 runs made now" in capsys.readouterr().out
    next(iter(sorted((out / "runs").iterdir()))).unlink()
    again = quick("responses", out, study_worlds)
    assert "\n1 runs made now" in capsys.readouterr().out
    assert again["at_1_nat"] == summary["at_1_nat"]
    with pytest.raises(SystemExit, match="is of responses, not of methods"):
        main(["study", "methods", "--out", str(out)])


def test_skew_quick(study_worlds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The other one is skewed the other way.
    grid = replace(skew.GRID, quick_scenarios=["normal", "left"])
    monkeypatch.setattr(skew, "GRID", grid)
    summary = quick("skew", tmp_path / "out", study_worlds)
    found = {label: values["gold"]["mean"] for label, values in summary["at_1_nat"].items()}
    # The median knows the order only, and the shape leaves it.
    assert found["left: MPO median"] == pytest.approx(found["normal: MPO median"], abs=1e-6)
    assert found["left: MPO mean"] != pytest.approx(found["normal: MPO mean"], abs=1e-3)
    assert all(gold > 0.5 for gold in found.values())
    reliable = {name: values["16"]["mean"] for name, values in summary["reliability"].items()}
    # Simulated elsewhere for this setting: .92, .72 and .27.
    assert reliable["median"] == pytest.approx(0.92, abs=0.03)
    assert reliable["mean"] == pytest.approx(0.72, abs=0.03)
    assert reliable["full ranking"] == pytest.approx(0.27, abs=0.03)


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        main(["study", "nothing", "--out", str(tmp_path)])
    for option in ("--seeds=0", "--workers=0"):
        with pytest.raises(SystemExit, match="at least 1, got 0"):
            main(["study", "skew", "--out", str(tmp_path), option])
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit, match="is a file"):
        main(["study", "skew", "--out", str(file)])
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(SystemExit, match="another program"):
        main(["study", "skew", "--out", str(tmp_path)])
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "scipy" else name)
    with pytest.raises(SystemExit, match=r"need scipy: pip install 'mpo-lightning\[studies\]'"):
        main(["study", "skew", "--out", str(tmp_path / "new")])


def test_a_study_does_not_need_its_processes_twice(tmp_path: Path) -> None:
    runner = Runner(tmp_path, workers=2, show_progress=False)
    with runner:
        assert runner([], "Nothing") == []
    assert runner.performed == 0
