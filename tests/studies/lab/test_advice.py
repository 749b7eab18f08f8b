"""What the check of the data says of the studies' judges, and where its advice leads."""

from pathlib import Path

import pytest

from mpo_lightning.data.check.warnings import KINDS, TRUSTED_KINDS
from mpo_lightning.studies.calibration import GRID
from mpo_lightning.studies.lab.advice import (
    AT_MEDIAN,
    PER_STD,
    UNWEIGHTED,
    DataCheck,
    advised,
)
from mpo_lightning.studies.world.judges import NoisyJudge


def test_labels_see_what_the_scores_do_not_show(study_worlds: Path) -> None:
    clean = DataCheck(seed=0, judge=NoisyJudge(noise=0.3))(study_worlds)
    trusted = {kind.name for kind in TRUSTED_KINDS}
    assert not any(trusted & set(found) for found in clean.values())
    corrupted = DataCheck(seed=0, judge=NoisyJudge(noise=0.3, corrupted_tops=0.3))(study_worlds)
    assert not trusted & set(corrupted["none"])
    assert "wrong-best" in corrupted["480"]
    tasteful = DataCheck(seed=0, judge=NoisyJudge(noise=0.3, taste=1.0))(study_worlds)
    assert "favoured-column" in tasteful["480"]
    assert "favoured-column" not in tasteful["none"]


@pytest.mark.parametrize(
    ("warnings", "method"),
    [
        ([], "W-MPO 1 per score"),
        (["duplicate-responses", "favoured-column"], "W-MPO 1 per score"),
        (["weight-dominance"], "W-MPO 1 per std"),
        (["weight-dominance", "wrong-best"], "MPO"),
        (["skewed-scores", "weight-dominance"], "MPO median"),
        (["skewed-scores", "wrong-best"], "MPO median"),
    ],
)
def test_advice(warnings: list[str], method: str) -> None:
    assert advised(warnings) == method
    assert method in GRID.methods


def test_advice_goes_by_warnings_that_there_are() -> None:
    names = {kind.name for kind in [*KINDS, *TRUSTED_KINDS]}
    assert names >= UNWEIGHTED | AT_MEDIAN | PER_STD
