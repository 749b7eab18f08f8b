"""The number of responses: the parts of a bias that was planted, and their slopes."""

from typing import Any

import pytest
import torch

from mpo_lightning.studies.lab.conditions import Form
from mpo_lightning.studies.responses import _parts, study
from tests.studies.made_up import MadeUp


def test_parts_of_planted_gaps() -> None:
    generator = torch.Generator().manual_seed(0)
    constant = 0.05 * torch.randn(4000, generator=generator)
    shared = constant.square().mean().sqrt().item()
    for n in (2, 40):
        noise = 0.2 * torch.randn(4, 4000, generator=generator) / n**0.5
        found = _parts((constant + noise).tolist())
        # Of few draws and many attributes, so that chance is small.
        assert found["sampling"] == pytest.approx(0.2 / n**0.5, rel=0.03)
        assert found["shared"] == pytest.approx(shared, rel=0.1)
        assert found["whole"] == pytest.approx((constant + noise).abs().mean().item())
    # The bias as a whole is no sum of rates: it falls from one part to the other.
    only = _parts((0.2 * torch.randn(4, 4000, generator=generator)).tolist())
    assert only["shared"] < 0.25 * only["sampling"]


def test_slopes_of_made_up_bias() -> None:
    runner: Any = MadeUp()
    found = study(runner, Form(seeds=1)).summary
    assert found["sample_bias_slopes"]["acceptable"]["mean"] == pytest.approx(-0.5)
    slopes = {name: slope["mean"] for name, slope in found["policy_bias_slopes"].items()}
    assert len(slopes) == 3 * 3
    for place in ("MPO, beta 0.1, at 0.5 nat", "InfoNCA, beta 1, converged"):
        # Draws differ as one over root n, and share what does not fall, but for what the mean of
        # four draws leaves of the noise.
        assert slopes[f"{place}: sampling"] == pytest.approx(-0.5, abs=1e-6)
        assert -0.4 < slopes[f"{place}: whole"] < -0.05
    # Every world's responses and noise are drawn four times.
    biased = [run for run in runner.seen if run.prompts == 128 and run.responses == 5]
    draws = {(run.sampling.draw, getattr(run.judge, "draw", None)) for run in biased}
    assert draws == {(draw, draw) for draw in range(4)}
