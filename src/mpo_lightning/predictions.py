"""What ``predict`` writes: log-probabilities, rewards and ranks of every response, as Parquet."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from mpo_lightning.batch import GroupBatch

__all__ = ["PredictionWriter", "prediction_rows"]

SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        "response": pa.int64(),
        "score": pa.float64(),
        "tokens": pa.int64(),
        "policy_logp": pa.float32(),
        "reference_logp": pa.float32(),
        "log_ratio": pa.float32(),
        "reward": pa.float32(),
        "rank": pa.int64(),
        "extra": pa.string(),
    }
)


def prediction_rows(
    batch: GroupBatch, policy_logps: Tensor, reference_logps: Tensor, rewards: Tensor
) -> list[dict[str, object]]:
    """One row per response, with the columns of SCHEMA.

    ``response`` counts from 0 as in the source; ``rank`` counts from 1, the highest reward first,
    and equal rewards share the best of their ranks. ``extra`` is the group's other columns as JSON.

    Args:
        batch: the groups.
        policy_logps: (B, N), nats.
        reference_logps: (B, N), nats.
        rewards: ``beta`` times the log-ratio that the loss compares, (B, N).
    """
    higher = (rewards[:, None, :] > rewards[:, :, None]) & batch.valid[:, None, :]
    ranks = (1 + higher.sum(2)).tolist()
    columns = {
        "score": batch.scores.tolist(),
        "tokens": batch.lengths.tolist(),
        "policy_logp": policy_logps.tolist(),
        "reference_logp": reference_logps.tolist(),
        "log_ratio": (policy_logps - reference_logps).tolist(),
        "reward": rewards.tolist(),
        "rank": ranks,
    }
    rows: list[dict[str, object]] = []
    for group, (source, extra) in enumerate(zip(batch.sources, batch.extras, strict=True)):
        file, _, row = source.rpartition(":")
        for slot, response in enumerate(batch.indices[group]):
            values = {name: column[group][slot] for name, column in columns.items()}
            identity = {"file": file, "row": int(row), "response": response}
            # Parquet and datasets rows may hold dates and the like, which JSON has no form for.
            rows.append({**identity, **values, "extra": json.dumps(extra, default=str)})
    return rows


class PredictionWriter(Callback):
    """Writes predictions as they come, one part per process, and joins the parts at the end.

    Args:
        path: the Parquet file; one that exists is never overwritten.
    """

    def __init__(self, path: str = "predictions.parquet") -> None:
        self.path = Path(path)
        self._writer: pq.ParquetWriter | None = None

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.part{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this process's part.

        Raises:
            FileExistsError: if the file is there already.
        """
        if self.path.exists():
            raise FileExistsError(
                f"{self.path} exists already. Move it, or set predictions.path to another file."
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._part(trainer.global_rank), SCHEMA)

    def on_predict_batch_end(  # noqa: PLR0917 (the signature is Lightning's)
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the rows of a batch."""
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_pylist(outputs, schema=SCHEMA))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Join the parts in the order of the files' rows."""
        assert self._writer is not None
        self._writer.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part(rank) for rank in range(trainer.world_size)]
            table = pa.concat_tables([pq.read_table(part) for part in parts])
            order = [(name, "ascending") for name in ("file", "row", "response")]
            joined = self.path.with_name(f".{self.path.name}.joined")
            pq.write_table(table.sort_by(order), joined)
            joined.rename(self.path)
            for part in parts:
                part.unlink()
            print(f"Wrote {table.num_rows} responses to {self.path}")
        trainer.strategy.barrier()
