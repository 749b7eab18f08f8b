"""lm-evaluation-harness reads an adapter that a run left, and gives our log-likelihoods."""

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from mpo_lightning.cli import main

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
# What a task says to have continuations scored; the prompt goes through the chat template.
TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{responses}}}}"
doc_to_target: "{{{{best}}}}"
metric_list: [{{metric: acc}}]
"""


def test_log_likelihoods_are_ours(
    toy_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])
    # The configuration names its files from where the user stands.
    monkeypatch.chdir(toy_world.parent)
    lines = (toy_world / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    rows: list[dict[str, Any]] = []
    for line in lines:
        row = json.loads(line)
        # The harness scores continuations alone, without the end of turn.
        cut = [True] * len(row["responses"])
        best = max(range(len(cut)), key=row["scores"].__getitem__)
        rows.append({**row, "truncated": cut, "best": best})
    data, predictions = tmp_path / "rows.jsonl", tmp_path / "ours.parquet"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    root = tmp_path / "run"
    common = [
        *["--config", str(CONFIG), f"--trainer.default_root_dir={root}"],
        *["--trainer.logger=false", "--trainer.enable_progress_bar=false"],
    ]
    train = ["--trainer.limit_train_batches=2", "--data.groups_per_batch=2", "--data.val=null"]
    eager = ["--trainer.max_epochs=1", "--model.lr_scheduler=null", "--model.optimizer.lr=0.02"]
    main(["fit", *common, *train, *eager])
    checkpoint = root / "checkpoints" / "last.ckpt"
    where = [f"--data.predict={data}", f"--predictions.path={predictions}"]
    main(["predict", *common, f"--ckpt_path={checkpoint}", *where])
    ours = pq.read_table(predictions).to_pylist()

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "toy_choice.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    assert yaml.safe_load((tasks / "toy_choice.yaml").read_text(encoding="utf-8"))
    adapter = root / "checkpoints" / "last-adapter"
    results: Any = simple_evaluate(
        model="hf",
        model_args=f"pretrained={toy_world / 'base'},peft={adapter},dtype=float32",
        tasks=["toy_choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        apply_chat_template=True,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    theirs = [
        float(response[0][0])
        for sample in sorted(results["samples"]["toy_choice"], key=lambda s: int(s["doc_id"]))
        for response in sample["resps"]
    ]
    assert len(theirs) == sum(len(row["responses"]) for row in rows)
    assert theirs == pytest.approx([row["policy_logp"] for row in ours], abs=1e-4, rel=1e-5)
    # The adapter was on: the base's numbers are others.
    assert max(abs(row["log_ratio"]) for row in ours) > 0.05
