"""Rows of predictions: log-probabilities, reward and rank of each response."""

import pyarrow as pa
from torch import Tensor

from mpo_lightning.batch import GroupBatch
from mpo_lightning.losses.base import Measured

__all__ = ["SCHEMA", "prediction_rows"]

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
    batch: GroupBatch, measured: Measured, rewards: Tensor
) -> list[dict[str, object]]:
    """Return one row per response, with the columns of SCHEMA.

    ``response`` counts from 0 as in the source; ``rank`` counts from 1, the highest reward first,
    and equal rewards share the best of their ranks. ``extra`` is the group's other columns as JSON.

    Args:
        batch: the groups.
        measured: log-probabilities of their responses.
        rewards: ``beta`` times the log-ratio that the loss compares, (B, N).
    """
    higher = (rewards[:, None, :] > rewards[:, :, None]) & batch.valid[:, None, :]
    ranks = (1 + higher.sum(2)).tolist()
    columns = {
        "score": batch.scores.tolist(),
        "tokens": batch.lengths.tolist(),
        "policy_logp": measured.policy_logps.tolist(),
        "reference_logp": measured.reference_logps.tolist(),
        "log_ratio": measured.log_ratios.tolist(),
        "reward": rewards.tolist(),
        "rank": ranks,
    }
    rows: list[dict[str, object]] = []
    for group, (source, extra) in enumerate(zip(batch.sources, batch.extras, strict=True)):
        file, _, row = source.rpartition(":")
        for slot, response in enumerate(batch.indices[group]):
            values = {name: column[group][slot] for name, column in columns.items()}
            identity = {"file": file, "row": int(row), "response": response}
            rows.append({**identity, **values, "extra": extra})
    return rows
