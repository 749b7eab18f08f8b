"""Loggers of a run: one folder, texts, and metrics of earlier runs."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mpo_lightning.training.loggers import keep_metrics, log_text, run_loggers


def test_tensorboard_and_csv_share_the_next_versions_folder(tmp_path: Path) -> None:
    for version in range(2):
        loggers = run_loggers(tmp_path, "logs")
        assert [type(logger) for logger in loggers] == [TensorBoardLogger, CSVLogger]
        folder = tmp_path / "logs" / f"version_{version}"
        assert {logger.log_dir for logger in loggers} == {str(folder)}  # type: ignore[attr-defined]
        folder.mkdir(parents=True)


def test_metrics_of_earlier_runs_in_a_fixed_folder_are_kept(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    keep_metrics(logger)
    assert list(tmp_path.iterdir()) == []
    for number in (1, 2):
        (tmp_path / "metrics.csv").write_text(f"run {number}", encoding="utf-8")
        keep_metrics(logger)
        assert (tmp_path / f"metrics-{number}.csv").read_text(encoding="utf-8") == f"run {number}"
    assert not (tmp_path / "metrics.csv").exists()


def test_texts_go_to_the_loggers_that_take_them(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    tables: list[Any] = []
    # Without its library, which is not needed here.
    wandb = WandbLogger.__new__(WandbLogger)
    wandb.log_text = lambda key, **table: tables.append((key, table))  # type: ignore[method-assign]
    loggers = [board, CSVLogger(tmp_path), wandb]
    trainer: Any = SimpleNamespace(loggers=loggers)
    log_text(trainer, "samples", "**bold**", 7)
    assert tables == [("samples", {"columns": ["step", "text"], "data": [["7", "**bold**"]]})]
    board.experiment.flush()
    events = EventAccumulator(board.log_dir)
    events.Reload()
    (event,) = events.Tensors("samples/text_summary")
    assert (event.step, event.tensor_proto.string_val[0]) == (7, b"**bold**")
