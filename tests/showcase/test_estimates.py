"""Bootstrap of crossed seeds and prompts, and contrasts, against what is known of them."""

import numpy as np
import pytest

from mpo_lightning.showcase.estimates import bootstrap, compared, described
from mpo_lightning.studies.lab.conditions import Contrast


def test_one_seed_resamples_prompts_alone() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, size=(1, 400))
    interval, p = bootstrap(values)
    error = values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)
    assert p < 0.001
    assert bootstrap(-values)[1] == pytest.approx(p, abs=0.001)


def test_seeds_that_differ_widen_the_interval() -> None:
    rng = np.random.default_rng(2)
    prompts = rng.normal(0, 1.0, size=(1, 200)).repeat(3, 0)
    alone, _ = bootstrap(prompts)
    both, p = bootstrap(prompts + np.array([[-1.0], [0.0], [1.0]]))
    # The variance of a mean of three of -1, 0, 1 is 2/9.
    assert both.high - both.low == pytest.approx(
        2 * 1.96 * np.sqrt(2 / 9 + ((alone.high - alone.low) / 3.92) ** 2), rel=0.15
    )
    assert p > 0.3


def test_contrasts() -> None:
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 0.1, size=(3, 300))
    of = {"a": noise + 0.1, "b": noise, "c": noise + rng.normal(0, 0.01, size=noise.shape)}
    named = [
        Contrast("a - b", ("a",), ("b",), "+"),
        Contrast("c - b", ("c",), ("b",), "none"),
        Contrast("b - c", ("b",), ("c",), "+"),
        Contrast("missing", ("a",), ("d",), "+"),
    ]
    first, level, last = compared(of, named)
    assert (first["level"], level["level"]) == (False, True)
    assert first["difference"]["mean"] == pytest.approx(0.1)
    # Holm over the two that expect a sign.
    assert first["p_holm"] == pytest.approx(2 * first["p"])
    assert last["p_holm"] == last["p"] > 0.01
    assert level["p"] is None
    assert [row["name"] for row in described(of, [("a", "b")])] == ["a - b"]
