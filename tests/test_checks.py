"""Checks of settings in Python: null, choices, and numbers of NumPy and torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.callbacks.health import TrainingHealth
from mpo_lightning.callbacks.health_checks import Thresholds
from mpo_lightning.checks import check_settings, plain
from mpo_lightning.data.convert import convert
from mpo_lightning.data.reading import Sources
from mpo_lightning.data.schemas.lists import Nectar
from mpo_lightning.data.schemas.ultrafeedback import UltraFeedback
from mpo_lightning.data.split import split
from mpo_lightning.evaluation.writer import PredictionWriter
from mpo_lightning.export.export import export
from mpo_lightning.generation.generate import Generation, Sampling
from mpo_lightning.generation.model import ModelConfig
from mpo_lightning.losses import DPO, MPO, AboveQuantile, TopBottom
from mpo_lightning.optim import WarmupCosine
from mpo_lightning.rollouts.sample import sample
from mpo_lightning.rollouts.score import score
from mpo_lightning.rollouts.scorers import RewardModelConfig

MODULE = MPOModule
DATA = PreferenceDataModule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: PolicyConfig(base="b", quantization=None),  # type: ignore[arg-type]
            "PolicyConfig: quantization must be one of none, nf4, int8, got None.",
        ),
        (
            lambda: PolicyConfig(base=None),  # type: ignore[arg-type]
            "PolicyConfig: base must be a text, got None.",
        ),
        (
            lambda: DATA(normalize_scores=None),  # type: ignore[arg-type]
            "PreferenceDataModule: normalize_scores must be one of none, z-score, rank, got None.",
        ),
        (
            lambda: DATA(prompt_format=None),  # type: ignore[arg-type]
            "PreferenceDataModule: prompt_format must be one of auto, chat, text, got None.",
        ),
        (lambda: DATA(max_length=None), "PreferenceDataModule: max_length must be a whole number"),  # type: ignore[arg-type]
        (lambda: DATA(seed=None), "PreferenceDataModule: seed must be a whole number, got None."),  # type: ignore[arg-type]
        (
            lambda: MODULE(policy=PolicyConfig(base="b"), layout=None),  # type: ignore[arg-type]
            "MPOModule: layout must be one of auto, shared, continued, separate, got None.",
        ),
        (
            lambda: MODULE(policy=PolicyConfig(base="b"), on_nonfinite=None),  # type: ignore[arg-type]
            "MPOModule: on_nonfinite must be one of stop, skip, got None.",
        ),
        (lambda: LoRA(r=None), "LoRA: r must be a whole number, got None."),  # type: ignore[arg-type]
        (lambda: MPO(deviation=None), "MPO: deviation must be one of absolute, signed, got None."),  # type: ignore[arg-type]
        (lambda: MPO(reference_free=None), "MPO: reference_free must be true or false, got None."),  # type: ignore[arg-type]
        (lambda: DPO(beta=None), "DPO: beta must be a number, got None."),  # type: ignore[arg-type]
        (lambda: TopBottom(k=None), "TopBottom: k must be a whole number, got None."),  # type: ignore[arg-type]
        (
            lambda: UltraFeedback(score=None),  # type: ignore[arg-type]
            "UltraFeedback: score must be one of overall, aspects, got None.",
        ),
        (lambda: Nectar(empty=None), "Nectar: empty must be one of error, drop, got None."),  # type: ignore[arg-type]
        (lambda: Sampling(n=None), "Sampling: n must be a whole number, got None."),  # type: ignore[arg-type]
        (
            lambda: Generation(special_tokens=None),  # type: ignore[arg-type]
            "Generation: special_tokens must be one of drop, keep, error, got None.",
        ),
        (
            lambda: ModelConfig(dtype=None),  # type: ignore[arg-type]
            "ModelConfig: dtype must be one of auto, float32, bfloat16, float16, got None.",
        ),
        (
            lambda: RewardModelConfig(input_format=None),  # type: ignore[arg-type]
            "RewardModelConfig: input_format must be one of auto, chat, pair, got None.",
        ),
        (
            lambda: PredictionWriter(format=None),  # type: ignore[arg-type]
            "PredictionWriter: format must be one of auto, parquet, ",
        ),
        (
            lambda: convert(Sources(files=["x"]), "o.jsonl", bad_rows=None),  # type: ignore[arg-type]
            "convert: bad_rows must be one of error, drop, got None.",
        ),
        (
            lambda: split(Sources(files=["x"]), "o", {"a": 1.0}, file_format=None),  # type: ignore[arg-type]
            "split: file_format must be one of jsonl, parquet, got None.",
        ),
        (
            lambda: sample(prompts="p", out="o", rows_per_part=None),  # type: ignore[arg-type]
            "sample: rows_per_part must be a whole number, got None.",
        ),
        (
            lambda: score(data="d", out="o", replace=None),  # type: ignore[arg-type]
            "score: replace must be true or false, got None.",
        ),
        (
            lambda: TrainingHealth(ignore=None),  # type: ignore[arg-type]
            "TrainingHealth: ignore must be a Sequence, got None.",
        ),
        (
            lambda: export("last", out="o", onto=None),  # type: ignore[arg-type]
            "export: onto must be one of full-precision, dequantized, got None.",
        ),
    ],
)
def test_null_is_no_other_value(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match="must be") as caught:
        make()
    assert str(caught.value).startswith(message)


def test_null_where_a_setting_has_it() -> None:
    data = PreferenceDataModule(schema=None, tokens_per_batch=None, cache=None, max_responses=None)
    assert data.max_responses is None
    module = MPOModule(policy=PolicyConfig(base="b"), lr_scheduler=None, responses_per_pass=None)
    assert module.lr_scheduler is None
    assert ModelConfig(base="b").adapter is None


@pytest.mark.parametrize("half", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
@pytest.mark.parametrize("three", [np.int64(3), torch.tensor(3), np.uint8(3)])
def test_numbers_of_numpy_and_torch_are_numbers(half: Any, three: Any) -> None:
    loss = MPO(beta=half, alpha=half, reference_free=np.bool_(True), partition=TopBottom(k=three))
    assert loss == MPO(beta=0.5, alpha=0.5, reference_free=True, partition=TopBottom(k=3))
    assert type(loss.beta) is float
    assert AboveQuantile(quantile=half).quantile == 0.5
    assert WarmupCosine(warmup=half).warmup == 0.5
    assert type(LoRA(r=three, lora_dropout=half).r) is int
    assert Sampling(n=three, temperature=half) == Sampling(n=3, temperature=0.5)
    assert type(PreferenceDataModule(max_length=three, seed=three).seed) is int
    assert Thresholds(window=three, moved=half).moved == 0.5
    weights = RewardModelConfig(weights={"a": half}).weights
    assert type(weights["a"]) is float
    for nothing in (np.float32("nan"), torch.tensor(torch.inf)):
        with pytest.raises(ValueError, match="MPO: beta must be a number > 0, got (nan|inf)"):
            MPO(beta=nothing)


def test_plain_values() -> None:
    given = {
        "a": [np.float32(0.5), (torch.tensor([1, 2]),)],
        "b": np.array([["x"], [None]], object),
    }
    assert plain(given) == {"a": [0.5, ([1, 2],)], "b": [["x"], [None]]}
    unchanged = {"a": [1, {"b": None}], "c": ("d",)}
    assert plain(unchanged) is unchanged
    assert plain(np.longdouble(2)) == 2


@dataclass
class _Own:
    kind: Literal["a", "b"]
    maybe: int | None = None
    anything: Any = None


def test_a_class_of_the_user_s() -> None:
    check_settings(_Own("a"))
    with pytest.raises(ValueError, match="_Own: kind must be one of a, b, got 'c'"):
        check_settings(_Own("c"))  # type: ignore[arg-type]


def test_home_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leading ~ is the home folder; hub ids are left alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert PolicyConfig(base="~/base").base == f"{tmp_path}/base"
    assert PolicyConfig(base="org/~base").base == "org/~base"
    model = ModelConfig(base="~/b", adapter="~/a", tokenizer="org/t")
    assert (model.base, model.adapter) == (f"{tmp_path}/b", f"{tmp_path}/a")
    assert model.tokenizer == "org/t"
    assert RewardModelConfig(path="~/r").path == f"{tmp_path}/r"
    assert PreferenceDataModule(cache="~/c").cache == tmp_path / "c"
    assert PredictionWriter(path="~/p").path == tmp_path / "p"
