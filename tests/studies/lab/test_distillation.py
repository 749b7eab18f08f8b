"""Capacity: the adapted model is taught the ideal policy itself."""

from pathlib import Path

from mpo_lightning.studies.lab.distillation import Distillation


def test_the_model_comes_near_the_policy_it_is_taught(study_worlds: Path) -> None:
    short, long = (
        Distillation(seed=0, utility="additive", prompts=32, steps=steps)(study_worlds)
        for steps in (2, 30)
    )
    assert short["gold"] < long["gold"] < long["ideal_gold"]
    assert short["kl"] < long["kl"]
    # What no loss on 32 groups comes to.
    assert long["gold"] > 0.8 * long["ideal_gold"]
    assert long["outside"] < 0.01
