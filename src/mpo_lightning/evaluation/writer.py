"""Files that ``predict`` writes: measures of given responses, or answers to prompts."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from mpo_lightning.batch import PromptItem
from mpo_lightning.checks import check_settings
from mpo_lightning.data.groups import collect_errors
from mpo_lightning.data.prompt_dataset import PromptDataset
from mpo_lightning.data.prompts import OF_RESPONSES
from mpo_lightning.data.report import DataReport
from mpo_lightning.errors import UserError
from mpo_lightning.evaluation.formats import FORMATS
from mpo_lightning.files import json_line, whole_file, write_whole
from mpo_lightning.generation.generate import PromptAnswer, Sample
from mpo_lightning.printable import printable
from mpo_lightning.rollouts.part_folder import ROWS_WRITTEN
from mpo_lightning.rollouts.sample import LESS_ROOM
from mpo_lightning.training.predictions import SCHEMA

__all__ = ["PredictionError", "PredictionWriter"]

Format = Literal["auto", "parquet", "jsonl", "alpaca-eval", "arena-hard"]
# Default file names.
NAMES = {
    "parquet": "predictions.parquet",
    "jsonl": "answers.jsonl",
    "alpaca-eval": "model_outputs.json",
    "arena-hard": "{model}.jsonl",
}


class PredictionError(UserError, ValueError):
    """Predictions that cannot be written as asked; the message says what to do."""


class PredictionWriter(BasePredictionWriter):
    """Writes predictions as they come, one part per process, and joins the parts at the end.

    Args:
        path: the file; one that exists is never overwritten. Defaults to a name by the format, in
            the working directory.
        format: "parquet" holds log-probabilities, reward and rank of each response of scored
            groups; the others hold answers to prompts: "jsonl" the package's own rows,
            "alpaca-eval" AlpacaEval's ``model_outputs.json``, "arena-hard" Arena-Hard's
            ``model_answer`` (version 2). "auto" is parquet for groups; for prompts alpaca-eval if
            rows have ``instruction``, arena-hard if they have ``uid`` and ``prompt``, else jsonl.
        model: name of the model in the answers. Defaults to base and checkpoint.
    """

    def __init__(
        self, path: str | None = None, format: Format = "auto", model: str | None = None
    ) -> None:
        super().__init__("batch")
        self.path = None if path is None else Path(path).expanduser()
        self.format: Format = format
        self.model = model
        check_settings(self)
        self._output: _Measures | _AnswerFile | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this process's part.

        Raises:
            PredictionError: if the file is there already, or the format does not go with the data.
            DataError: if the format lacks something in the rows.
        """
        prompts = getattr(getattr(trainer, "datamodule", None), "prompts", None)
        kind = self._kind(prompts)
        model = self.model or _model_name(trainer, pl_module)
        path = self.path or Path(NAMES[kind].format(model=model))
        suffix = Path(NAMES[kind]).suffix
        if path.suffix != suffix:
            raise PredictionError(
                f"predictions.path: {path}: {kind} is written to a {suffix} file. Rename it, or "
                "set predictions.format."
            )
        if path.exists():
            raise PredictionError(
                f"{path} exists already. Move it, or set predictions.path to another file."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        if prompts is None:
            self._output = _Measures(path, trainer.global_rank)
            return
        module: Any = pl_module
        how = {"model": model, **asdict(module.generation)}
        self._output = _AnswerFile(path, kind, how, prompts, trainer.global_rank)

    def _kind(self, prompts: PromptDataset | None) -> str:
        if prompts is None:
            if self.format not in {"auto", "parquet"}:
                raise PredictionError(
                    f"predictions.format is {self.format}, which holds answers to prompts, but the "
                    "data are scored groups. Set data.predict_as: prompts to answer their prompts."
                )
            return "parquet"
        if self.format == "parquet":
            raise PredictionError(
                "predictions.format is parquet, which holds measures of given responses, but the "
                "data are prompts alone, which are answered. Set it to auto or jsonl."
            )
        if self.format != "auto":
            return self.format
        columns = set(prompts.items[0].row)
        if "prompt" not in columns:
            return "alpaca-eval"
        return "arena-hard" if "uid" in columns else "jsonl"

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Write the rows of a batch."""
        assert self._output is not None
        self._output.add(prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts, in the order of the rows read.

        Raises:
            PredictionError: if there is nothing to write.
        """
        assert self._output is not None
        self._output.close()
        trainer.strategy.barrier()
        done: str | PredictionError = ""
        if trainer.is_global_zero:
            try:
                done = self._output.join(trainer.world_size)
                print(printable(done))
            except PredictionError as error:
                done = error
        # All processes end alike.
        done = trainer.strategy.broadcast(done)
        if isinstance(done, PredictionError):
            raise done


def _model_name(trainer: Trainer, module: Any) -> str:
    """Return the names of the base and of the checkpoint that its adapter comes from."""
    base = Path(module.policy_config.base).name
    return f"{base}+{Path(trainer.ckpt_path).stem}" if trainer.ckpt_path else base


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f".{path.name}.part{rank}")


def _remove(parts: Sequence[Path]) -> None:
    for part in parts:
        part.unlink()


class _Measures:
    """A Parquet file of measures, one row a response."""

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path
        self._writer = pq.ParquetWriter(_part(path, rank), SCHEMA)

    def add(self, rows: list[dict[str, object]]) -> None:
        self._writer.write_table(pa.Table.from_pylist(rows, schema=SCHEMA))

    def close(self) -> None:
        self._writer.close()

    def join(self, processes: int) -> str:
        parts = [_part(self.path, rank) for rank in range(processes)]
        table = pa.concat_tables([pq.read_table(part) for part in parts])
        order = [(name, "ascending") for name in ("file", "row", "response")]
        with whole_file(self.path) as joined:
            pq.write_table(table.sort_by(order), joined)
        _remove(parts)
        return f"Wrote {table.num_rows} responses to {self.path}"


class _AnswerFile:
    """A file of answers, one row a prompt, in the prompts' order.

    Raises:
        DataError: if the rows lack what the format needs, before anything is answered.
    """

    def __init__(
        self, path: Path, kind: str, how: dict[str, Any], prompts: PromptDataset, rank: int
    ) -> None:
        self.path = path
        self.how = how
        self.items = prompts.items
        self._row = FORMATS[kind]
        self.special_tokens = how.pop("special_tokens")
        collect_errors(self.items, lambda item: self._row(item, Sample("", "stop"), how))
        self._file = _part(path, rank).open("w", encoding="utf-8")

    def add(self, outputs: list[PromptAnswer]) -> None:
        for item, answers in ((output.item, output.answers) for output in outputs):
            entry: dict[str, Any] = {"number": item.number, "refused": answers.refused}
            of_prompt = {f"prompts answered from {note}": True for note in answers.notes}
            for sample in answers.samples:
                entry["row"] = self._row(item, sample, self.how)
                if sample.is_dropped(self.special_tokens, item.request.source):
                    entry["refused"] = "whose answer has special tokens in its midst"
                entry["notes"] = of_prompt | {
                    f"answered within {LESS_ROOM}": answers.limit < self.how["max_new_tokens"],
                    "responses truncated": sample.finish == "length",
                    "responses empty": sample.empty,
                    "responses with special tokens in their midst, left out of the text": (
                        sample.special_tokens > 0
                    ),
                }
            # Parquet and datasets rows may hold dates and the like, which JSON has no form for.
            self._file.write(json.dumps(entry, default=str) + "\n")

    def close(self) -> None:
        self._file.close()

    def join(self, processes: int) -> str:
        parts = [_part(self.path, rank) for rank in range(processes)]
        lines = [line for part in parts for line in part.read_bytes().splitlines()]
        entries = list(map(json.loads, lines))
        entries.sort(key=lambda entry: int(entry["number"]))
        report = DataReport(str(self.path))
        answered = [e for e in entries if self._count(e, self.items[e["number"]], report)]
        if not answered:
            _remove(parts)
            counts = report.summary(*ROWS_WRITTEN)
            raise PredictionError(f"{self.path}: no answer, so no file is written. {counts}")
        lines = [json_line(entry["row"]) for entry in answered]
        if self.path.suffix == ".json":
            lines = [b"[\n", b",".join(lines), b"]\n"]
        write_whole(self.path, b"".join(lines))
        _remove(parts)
        return (
            f"Wrote answers of {self.how['model']} to {self.path}: {report.summary(*ROWS_WRITTEN)}"
        )

    def _count(self, entry: dict[str, Any], item: PromptItem, report: DataReport) -> bool:
        """Count a prompt and whatever is odd about its answer; return whether it has one."""
        source = item.request.source
        report.groups += 1
        if entry["refused"] is not None:
            report.drop(entry["refused"], source)
            return False
        report.keep(1)
        report.note("prompts came before", source, int(item.repeated))
        for reason, found in entry["notes"].items():
            report.note(reason, source, int(found))
        for column in OF_RESPONSES:
            report.note(f"columns {column} not read", source, int(column in item.row))
        return True
