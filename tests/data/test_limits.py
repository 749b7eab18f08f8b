"""Rows that a model cannot compute are found by its limits, before it computes anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.batch import TokenGroup
from mpo_lightning.data.dataset import GroupDataset
from mpo_lightning.data.groups import DataError
from tests.conftest import example_rows, make_tokenizer, random_groups, tiny_config, tiny_model

Write = Callable[..., str]
WORD = "<|extra|>"


@pytest.fixture(scope="module")
def small_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a row less in its embedding than its tokenizer has tokens."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([WORD])
    tokenizer.save_pretrained(folder)
    tiny_model(tiny_config(vocab_size=len(tokenizer) - 1)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 40 positions."""
    folder = tmp_path_factory.mktemp("short")
    make_tokenizer().save_pretrained(folder)
    tiny_model(tiny_config(max_position_embeddings=40)).save_pretrained(folder)
    return str(folder)


class Never(MPOModule):
    """Loads no model: what is wrong must be found before."""

    def configure_model(self) -> None:
        raise AssertionError("The model was loaded.")


def run(base: str, stage: str, **data: Any) -> PreferenceDataModule:
    """Set the data up as a stage does, up to the point where the model would be loaded."""
    module = Never(policy=PolicyConfig(base=base, lora=LoRA(r=4)))
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=1,
    )
    data_module = PreferenceDataModule(tokenizer=base, **data)
    with pytest.raises(AssertionError, match="The model was loaded"):
        getattr(trainer, stage)(module, datamodule=data_module)
    return data_module


def rows_with(place: str) -> list[dict[str, Any]]:
    """Six groups, of which the fifth has the word that the model lacks."""
    rows = example_rows(6)
    if place == "prompt":
        rows[4]["prompt"] = f"Say {WORD}."
    else:
        rows[4]["responses"][1] = f"{rows[4]['responses'][1]} {WORD}"
    return rows


ROLES = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}


@pytest.mark.parametrize(
    ("stage", "role"), [(stage, role) for stage, roles in ROLES.items() for role in roles]
)
@pytest.mark.parametrize("place", ["prompt", "responses[1]"])
def test_a_token_that_the_model_lacks_is_found_in_every_split(
    small_vocabulary: str, write_jsonl: Write, stage: str, role: str, place: str
) -> None:
    data = {role: write_jsonl(rows_with(place))}
    if stage == "fit":
        data.setdefault("train", write_jsonl(example_rows(4), "whole.jsonl"))
    with pytest.raises(
        DataError,
        match=rf"(?s)data\.{role}: 1 of 6 groups, first .*groups.jsonl:5: "
        rf"{place.replace('[', '.').replace(']', '.')}: found token 384 \('{WORD[:2]}.*"
        "expected tokens below 384.*resize_token_embeddings",
    ):
        run(small_vocabulary, stage, **data)


def test_it_is_found_among_prompts_too(small_vocabulary: str, write_jsonl: Write) -> None:
    prompts = write_jsonl([{"prompt": "Hi"}, {"prompt": f"Say {WORD}."}])
    with pytest.raises(DataError, match=r"jsonl:2: prompt: found token 384 .*below 384"):
        run(small_vocabulary, "predict", predict=prompts)


def test_a_token_that_no_row_has_does_no_harm(small_vocabulary: str, write_jsonl: Write) -> None:
    run(small_vocabulary, "fit", train=write_jsonl(example_rows(4)))


def test_a_group_that_is_dropped_does_no_harm(small_vocabulary: str, write_jsonl: Write) -> None:
    rows = rows_with("responses[1]")
    rows[4]["scores"] = [1.0] * len(rows[4]["scores"])
    assert len(run(small_vocabulary, "fit", train=write_jsonl(rows)).datasets["train"]) == 5


def test_largest_ids_are_those_of_each_group() -> None:
    groups = random_groups([(3, [2, 5]), (1, [1, 1, 4]), (7, [6, 1])])
    dataset = GroupDataset(groups)
    expected = [max(int(part.max()) for part in (g.prompt, *g.responses)) for g in groups]
    assert dataset.groups.largest_ids.tolist() == expected
    selected = type(dataset.groups)(dataset.groups.data, selected=dataset.groups.selected[[2, 0]])
    assert selected.largest_ids.tolist() == [expected[2], expected[0]]
    assert isinstance(groups[0], TokenGroup)


# -------------------------------------------------------------------------------- positions


def long_rows() -> list[dict[str, Any]]:
    """Four groups, of which the last has a response of more than 40 tokens."""
    rows = [{"prompt": f"{n}?", "responses": ["a b", "c"], "scores": [1, 0]} for n in range(4)]
    rows[3]["responses"] = [" ".join(["fox"] * 60), "c"]
    return rows


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_rows_beyond_the_positions_are_treated_as_too_long(
    short: str, write_jsonl: Write, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    role = {"fit": "train", "validate": "val"}.get(stage, stage)
    data = run(short, stage, **{role: write_jsonl(long_rows())})
    assert len(data.datasets[role]) == 3  # type: ignore[index]
    told = caplog.text
    assert "data.max_length: 2048 is more than the 40 positions of the model" in told
    assert "1 with a response beyond max_length" in told


def test_they_may_be_cut(short: str, write_jsonl: Write) -> None:
    data = run(short, "fit", train=write_jsonl(long_rows()), over_long="cut")
    group = data.datasets["train"].groups[3]
    assert len(group.prompt) + max(map(len, group.responses)) == 40


def test_they_may_be_errors(short: str, write_jsonl: Write) -> None:
    with pytest.raises(DataError, match=r"jsonl:4: responses\[0\].* 40 .*the model's positions"):
        run(short, "fit", train=write_jsonl(long_rows()), over_long="error")


def test_a_lower_limit_is_not_told(
    short: str, write_jsonl: Write, caplog: pytest.LogCaptureFixture
) -> None:
    run(short, "fit", train=write_jsonl(long_rows()), max_length=30)
    assert "positions" not in caplog.text


def test_data_without_a_model_have_no_limit(short: str, write_jsonl: Write) -> None:
    data = PreferenceDataModule(tokenizer=short, train=write_jsonl(long_rows()))
    data.setup("fit")
    assert len(data.datasets["train"]) == 4


def test_a_base_that_is_no_model_is_named(tmp_path: Path, short: str, write_jsonl: Write) -> None:
    module = Never(policy=PolicyConfig(base=str(tmp_path)))
    data = PreferenceDataModule(tokenizer=short, train=write_jsonl(long_rows()))
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"model\.policy\.base: .*holds neither config.json"):
        trainer.fit(module, datamodule=data)
