"""The picture of a run's metrics."""

from pathlib import Path

from mpo_lightning.export.curves import draw, read_metrics

METRICS = """epoch,step,train/loss,val/loss,lr
0,0,0.7,,0.1
0,1,0.6,,0.1
0,1,,0.65,
1,2,0.5,,0.1
"""


def test_rows_after_the_checkpoint_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(METRICS, encoding="utf-8")
    rows = read_metrics(path, steps=1)
    assert [row.get("train/loss", row.get("val/loss")) for row in rows] == [0.7, 0.6, 0.65]
    assert draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not draw([{"step": 0.0, "lr": 0.1}], tmp_path / "nothing.png")
    assert not (tmp_path / "nothing.png").exists()
