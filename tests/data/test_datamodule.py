"""From files to batches, through a real Trainer."""

import json
import os
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mpo_lightning.batch import GroupBatch
from mpo_lightning.data.datamodule import PreferenceDataModule
from mpo_lightning.data.dataset import GroupDataset
from mpo_lightning.data.groups import DataError
from mpo_lightning.data.sampler import StepGroups
from mpo_lightning.losses import InfoNCA, SetLoss
from tests import processes
from tests.conftest import example_rows, make_tokenizer, random_groups
from tests.data.chat_templates import tokenizer_of

Write = Callable[..., str]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return str(folder)


class Recorder(LightningModule):
    """Keeps the batches that it is given, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: dict[int, list[GroupBatch]] = {}
        self.validated: list[GroupBatch] = []
        self.tested: list[GroupBatch] = []

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        self.trained.setdefault(self.current_epoch, []).append(batch)
        return self.weight * 0

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self.validated.append(batch)

    def test_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self.tested.append(batch)

    def predict_step(self, batch: GroupBatch, batch_idx: int) -> GroupBatch:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def orders(self) -> dict[int, list[str]]:
        """The sources of each epoch, one text a batch."""
        return {epoch: rows_of(batches) for epoch, batches in self.trained.items()}


def rows_of(batches: list[GroupBatch]) -> list[str]:
    """The row numbers of each batch's groups, as "3 1"."""
    return [" ".join(source.rpartition(":")[2] for source in b.sources) for b in batches]


def make_trainer(**settings: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**defaults, **settings})


def fit(data: PreferenceDataModule, **settings: Any) -> Recorder:
    module = Recorder()
    make_trainer(**settings).fit(module, datamodule=data)
    return module


def text_of(row: dict[str, Any]) -> str:
    """What a group's tokens say one after another, rendered by hand."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    turns = "".join(f"<|{turn['role']}|>\n{turn['content']}<|eos|>\n" for turn in prompt)
    answers = "".join(f"{text}<|eos|>" for text in row["responses"])
    return f"<|bos|>{turns}<|assistant|>\n{answers}"


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
def test_rows_in_memory_train_as_those_of_a_file(
    kind: Callable[[Any], Any], tokenizer_folder: str, write_jsonl: Write, tmp_path: Path
) -> None:
    # Arrow has one type a column.
    rows = [row for row in example_rows(9) if isinstance(row["prompt"], str)]
    settings: dict[str, Any] = {
        "tokenizer": tokenizer_folder,
        "groups_per_batch": 2,
        "cache": str(tmp_path / "cache"),
    }
    path = write_jsonl(rows)
    of_file = fit(PreferenceDataModule(train=path, val=path, **settings))
    data = PreferenceDataModule(train=kind(rows), val=kind(rows[:1]), **settings)
    in_memory = fit(data)
    found, expected = in_memory.trained[0], of_file.trained[0]
    assert [batch.sources for batch in found] == [
        [source.replace(path, "train") for source in batch.sources] for batch in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.scores, other.scores)
        assert one.extras == other.extras
    assert {source for batch in in_memory.validated for source in batch.sources} == {"val:1"}
    assert str(data.reports[0]).startswith("train: 5 of 5 groups")


def test_bad_row_in_memory_is_named(tokenizer_folder: str, tmp_path: Path) -> None:
    rows = example_rows(3)
    rows[1]["scores"][0] = None
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=rows, cache=str(tmp_path))
    with pytest.raises(DataError, match=r"^train:2: scores\[0\]: found None"):
        data.setup("fit")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_hold_the_groups_of_the_file(
    num_workers: int, tokenizer_folder: str, write_jsonl: Write
) -> None:
    rows = example_rows(9)
    path = write_jsonl(rows)
    module = fit(
        PreferenceDataModule(
            tokenizer=tokenizer_folder, train=path, groups_per_batch=4, num_workers=num_workers
        )
    )
    tokenizer = make_tokenizer()
    assert [len(batch) for batch in module.trained[0]] == [4, 4, 1]
    seen = []
    for batch in module.trained[0]:
        assert isinstance(batch, GroupBatch)
        assert batch.tokens.dtype == torch.int64
        assert batch.counted.all()
        for number in range(len(batch)):
            group = batch.select(number)
            row = rows[int(group.sources[0].removeprefix(f"{path}:")) - 1]
            assert tokenizer.decode(group.tokens) == text_of(row)
            assert group.scores.tolist() == [row["scores"]]
            assert [json.loads(extra) for extra in group.extras] == [
                {"prompt_id": row["prompt_id"]}
            ]
            seen.append(row["prompt_id"])
    assert sorted(seen) == sorted(row["prompt_id"] for row in rows)


def test_order_is_of_seed_and_epoch_and_not_of_workers(
    tokenizer_folder: str, write_jsonl: Write
) -> None:
    path = write_jsonl(example_rows(12))

    def orders(seed: int, num_workers: int = 0) -> dict[int, list[str]]:
        # What else draws random numbers has no say.
        torch.manual_seed(seed + 100 * num_workers)
        data = PreferenceDataModule(
            tokenizer=tokenizer_folder,
            train=path,
            groups_per_batch=5,
            seed=seed,
            num_workers=num_workers,
        )
        return fit(data, max_epochs=3).orders()

    first = orders(1)
    assert sorted(first) == [0, 1, 2]
    assert len({tuple(order) for order in first.values()}) == 3
    assert orders(1) == first
    assert orders(1, num_workers=2) == first
    assert orders(2)[0] != first[0]


# Workers start before Lightning sets the first epoch after a resume (pytorch-lightning#21938), and
# what a checkpoint says of the epoch depends on when it was written.
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("when", ["at the epoch's end", "after the run"])
def test_order_after_a_resume_is_that_of_an_uninterrupted_run(
    when: str, num_workers: int, tokenizer_folder: str, write_jsonl: Write, tmp_path: Path
) -> None:
    path = write_jsonl(example_rows(12))

    def data() -> PreferenceDataModule:
        return PreferenceDataModule(
            tokenizer=tokenizer_folder, train=path, groups_per_batch=5, num_workers=num_workers
        )

    whole = fit(data(), max_epochs=3).orders()
    checkpoint = tmp_path / "end.ckpt"
    if when == "after the run":
        trainer = make_trainer(max_epochs=1)
        trainer.fit(Recorder(), datamodule=data())
        trainer.save_checkpoint(checkpoint)
    else:
        saver = ModelCheckpoint(dirpath=tmp_path, filename="end", save_on_train_epoch_end=True)
        fit(data(), max_epochs=1, enable_checkpointing=True, callbacks=[saver])
    resumed = Recorder()
    make_trainer(max_epochs=3).fit(resumed, datamodule=data(), ckpt_path=str(checkpoint))
    assert resumed.orders() == {1: whole[1], 2: whole[2]}


# Seven steps of two epochs of four, or of three where a limit leaves the last one out.
@pytest.mark.parametrize("limits", [{"groups_per_batch": 3}, {"tokens_per_batch": 240}])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 3},
        {"max_epochs": 3, "limit_train_batches": 3},
        {"max_epochs": -1, "max_steps": 9},
        {"max_epochs": -1, "max_steps": 9, "limit_train_batches": 3},
    ],
)
def test_resume_from_every_step_goes_on_with_the_next(
    settings: dict[str, int],
    num_workers: int,
    limits: dict[str, int],
    tokenizer_folder: str,
    write_jsonl: Write,
) -> None:
    path = write_jsonl(example_rows(11))
    folder = Path(path).parent

    def data() -> PreferenceDataModule:
        return PreferenceDataModule(
            tokenizer=tokenizer_folder, train=path, num_workers=num_workers, **limits
        )

    def steps(module: Recorder) -> list[tuple[int, str]]:
        return [(epoch, step) for epoch, order in module.orders().items() for step in order]

    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = steps(fit(data(), enable_checkpointing=True, callbacks=[saver], **settings))
    per_epoch = settings.get("limit_train_batches", 4)
    assert [epoch for epoch, _ in whole[:9]] == [step // per_epoch for step in range(9)]
    for step in range(1, 8):
        resumed = Recorder()
        make_trainer(**settings).fit(
            resumed, datamodule=data(), ckpt_path=str(folder / f"step={step}.ckpt")
        )
        assert steps(resumed) == whole[step:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_validation_test_and_prediction_are_in_file_order(
    num_workers: int, tokenizer_folder: str, write_jsonl: Write
) -> None:
    path = write_jsonl(example_rows(7))
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder,
        train=path,
        val=path,
        test=path,
        predict=path,
        groups_per_batch=3,
        num_workers=num_workers,
    )
    expected = ["1 2 3", "4 5 6", "7"]
    module = fit(data, max_epochs=2)
    assert rows_of(module.validated) == expected * 2
    trainer = make_trainer()
    trainer.validate(module, datamodule=data, verbose=False)
    assert rows_of(module.validated) == expected * 3
    trainer.test(module, datamodule=data, verbose=False)
    assert rows_of(module.tested) == expected
    predicted = trainer.predict(module, datamodule=data)
    assert rows_of(predicted) == expected  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- limit on tokens


@pytest.mark.parametrize("groups_per_batch", [None, 2])
def test_batches_keep_the_limit_on_tokens(
    groups_per_batch: int | None, tokenizer_folder: str, write_jsonl: Write
) -> None:
    path = write_jsonl(example_rows(30))
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder,
        train=path,
        val=path,
        groups_per_batch=groups_per_batch,
        tokens_per_batch=250,
    )
    module = fit(data, max_epochs=3)
    for epoch in range(3):
        batches = module.trained[epoch]
        numbers = [int(number) for rows in rows_of(batches) for number in rows.split()]
        assert sorted(numbers) == list(range(1, 31))
        assert all(len(batch.tokens) <= 250 for batch in batches)
        assert all(len(batch) <= (groups_per_batch or 30) for batch in batches)
    assert len({tuple(order) for order in module.orders().values()}) == 3
    # Of several groups, though one group alone is far below the limit.
    assert max(map(len, module.trained[0])) == (groups_per_batch or 6)
    # Validation in the file's order, each batch as long as the limits allow.
    sizes = data.datasets["val"].sizes
    assert " ".join(rows_of(module.validated)) == " ".join(map(str, [*range(1, 31)] * 3))
    first = len(module.validated[0])
    assert first == groups_per_batch or sum(sizes[:first]) <= 250 < sum(sizes[: first + 1])


def test_eight_groups_where_no_limit_is_given(tokenizer_folder: str, write_jsonl: Write) -> None:
    path = write_jsonl(example_rows(20))
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=path)
    assert [len(batch) for batch in fit(data).trained[0]] == [8, 8, 4]
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=path, tokens_per_batch=10_000)
    assert [len(batch) for batch in fit(data).trained[0]] == [20]


def test_sizes_are_the_tokens_of_a_batch() -> None:
    dataset = GroupDataset(random_groups([(3, [1, 2]), (5, [4, 4, 1]), (1, [1])]))
    assert dataset.sizes.tolist() == [6, 14, 2]
    for index, size in enumerate(dataset.sizes):
        assert len(dataset[StepGroups([index], counted=True)].tokens) == size


def test_groups_beyond_the_limit_are_reported_and_alone(
    tokenizer_folder: str, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    warned: list[str] = []
    monkeypatch.setattr("mpo_lightning.data.datamodule.rank_zero_warn", warned.append)
    rows = example_rows(12)
    for number in (3, 7):
        rows[number]["responses"][0] = "dog " * (300 + number)
    # Each source brings one of the two: the report is of both.
    paths = [write_jsonl(rows[:5], "a.jsonl"), write_jsonl(rows[5:], "b.jsonl")]

    def data(limit: int) -> PreferenceDataModule:
        return PreferenceDataModule(
            tokenizer=tokenizer_folder, train=paths, val=paths[0], tokens_per_batch=limit
        )

    module = fit(data(300), max_epochs=2)
    for batches in module.trained.values():
        beyond = [batch for batch in batches if len(batch.tokens) > 300]
        assert [len(batch) for batch in beyond] == [1, 1]
        assert sum(map(len, batches)) == 12
    largest = max(len(batch.tokens) for batch in module.trained[0])
    assert len(warned) == 2
    assert warned[0].startswith(
        "data.train: 2 of 12 groups hold more than 300 tokens (data.tokens_per_batch), "
        f"the largest {largest}."
    )
    assert warned[1].startswith("data.val: 1 of 5 groups")
    # A group of exactly the limit is within it.
    fit(data(largest))
    assert len(warned) == 2


# ---------------------------------------------------------------------------------------- sources


def test_fit_without_validation(tokenizer_folder: str, write_jsonl: Write) -> None:
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=write_jsonl(example_rows(3)))
    module = fit(data, num_sanity_val_steps=2)
    assert len(module.trained[0]) == 1
    assert not module.validated


def test_several_sources_follow_one_another(tokenizer_folder: str, write_jsonl: Write) -> None:
    paths = [write_jsonl(example_rows(2), "b.jsonl"), write_jsonl(example_rows(3), "a.jsonl")]
    data = PreferenceDataModule(tokenizer=tokenizer_folder, val=paths, groups_per_batch=8)
    module = Recorder()
    make_trainer().validate(module, datamodule=data, verbose=False)
    expected = [f"{paths[0]}:{n}" for n in (1, 2)] + [f"{paths[1]}:{n}" for n in (1, 2, 3)]
    assert module.validated[0].sources == expected
    assert [(report.data, report.kept) for report in data.reports] == [(paths[0], 2), (paths[1], 3)]


def test_each_role_reads_its_own_split(tokenizer_folder: str, tmp_path: Path) -> None:
    rows = [row for row in example_rows(20) if isinstance(row["prompt"], str)]
    splits = {
        "train": datasets.Dataset.from_list(rows[:2]),
        "validation": datasets.Dataset.from_list(rows[2:5]),
        "test": datasets.Dataset.from_list(rows[5:9]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    folder = str(tmp_path / "data")
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder, train=folder, val=folder, test=folder, predict=folder
    )
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    ids = {
        role: [json.loads(group.extra)["prompt_id"] for group in dataset.groups]
        for role, dataset in data.datasets.items()
    }
    expected = [row["prompt_id"] for row in rows[:9]]
    assert ids == {
        "train": expected[:2],
        "val": expected[2:5],
        "test": expected[5:],
        "predict": expected[5:],
    }


def test_reports_are_logged_and_files_read_once(
    tokenizer_folder: str, write_jsonl: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr("mpo_lightning.data.datamodule.rank_zero_info", logged.append)
    rows = example_rows(4)
    train = write_jsonl([{**rows[0], "scores": [1.0] * len(rows[0]["scores"])}, *rows[1:]])
    val = write_jsonl(rows, "val.jsonl")
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=train, val=val)
    module = fit(data)
    make_trainer().validate(module, datamodule=data, verbose=False)
    assert len(logged) == 2
    assert logged[0].startswith(f"data.train: {train}: 3 of 4 groups")
    assert f"1 with all scores equal (first: {train}:1)" in logged[0]
    assert logged[1].startswith(f"data.val: {val}: 4 of 4 groups")
    assert [report.dropped.total() for report in data.reports] == [1, 0]


def test_settings_reach_the_tokenizer(tokenizer_folder: str, write_jsonl: Write) -> None:
    path = write_jsonl(
        [{"prompt": "Name a dog: ", "responses": ["dog", "cat " * 40], "scores": [1, 2]}]
    )
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder,
        train=path,
        max_length=30,
        over_long="cut",
        prompt_format="text",
        boundary="separate",
    )
    data.setup("fit")
    (group,) = data.datasets["train"].groups
    tokenizer = make_tokenizer()
    assert tokenizer.decode(group.prompt) == "Name a dog: "
    assert tokenizer.decode(group.responses[0]) == "dog<|eos|>"
    assert len(group.prompt) + len(group.responses[1]) == 30


def test_equal_scores_are_for_prediction_only(tokenizer_folder: str, write_jsonl: Write) -> None:
    rows = example_rows(3)
    rows[1]["scores"] = [2.0] * len(rows[1]["scores"])
    path = write_jsonl(rows)
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder, train=path, predict=path, no_contrast="error"
    )
    with pytest.raises(DataError, match=r"groups\.jsonl:2: scores: found \[2.0, .* in 1 such row"):
        data.setup("fit")
    data.setup("predict")
    assert len(data.datasets["predict"]) == 3


def test_scores_that_are_equal_once_a_long_response_is_gone(
    tokenizer_folder: str, write_jsonl: Write
) -> None:
    rows = example_rows(3)
    rows[1].update(responses=["a", "b", "word " * 99], scores=[2, 2, 1])
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder,
        train=write_jsonl(rows),
        max_length=100,
        over_long="drop_response",
    )
    data.setup("fit")
    assert data.reports[0].dropped == {"with all scores equal": 1}
    assert data.reports[0].changed == {"beyond max_length dropped": 1}
    assert len(data.datasets["train"]) == data.reports[0].kept == 2


class Ranked(SetLoss):
    """A loss that learns from scores of at least 5 beside others only."""

    def __call__(self, log_ratios: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
        return log_ratios.sum(1)

    def has_contrast(self, scores: Tensor, valid: Tensor) -> Tensor:
        high = (scores >= 5) & valid
        return high.any(1) & (~high & valid).any(1)


def test_the_loss_decides_what_has_contrast(tokenizer_folder: str, write_jsonl: Write) -> None:
    scores = [[1, 2], [4, 6, 5], [7, 8], [3, 3], [9, 0, 1]]
    rows = [
        {"prompt": f"Name {i}", "responses": [f"it {j}" for j in range(len(s))], "scores": s}
        for i, s in enumerate(scores)
    ]
    path = write_jsonl(rows)
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=path, loss=Ranked())
    module = Recorder()
    make_trainer().fit(module, datamodule=data)
    trained = [row for batch in module.trained[0] for row in batch.scores.tolist()]
    assert sorted(trained) == [[4.0, 6.0, 5.0], [9.0, 0.0, 1.0]]
    (report,) = data.reports
    assert report.dropped == {
        "with all scores equal": 1,
        "whose scores Ranked has no contrast for": 2,
    }
    assert report.examples["whose scores Ranked has no contrast for"] == [f"{path}:1", f"{path}:3"]
    assert (report.groups, report.kept, report.responses) == (5, 2, 6)


@pytest.mark.parametrize("loss", [None, InfoNCA()])
def test_equal_scores_teach_some_losses(
    tokenizer_folder: str, write_jsonl: Write, loss: SetLoss | None
) -> None:
    """Without a loss, groups whose scores differ are kept; InfoNCA learns from equal ones, too."""
    rows = example_rows(4)
    rows[2].update(responses=["a", "b"], scores=[1, 1])
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=write_jsonl(rows), loss=loss)
    data.setup("fit")
    assert len(data.datasets["train"]) == (3 if loss is None else 4)
    assert data.reports[0].dropped == ({"with all scores equal": 1} if loss is None else {})


def test_predictions_tell_the_scores_that_were_given(
    tokenizer_folder: str, write_jsonl: Write
) -> None:
    rows = example_rows(3)
    path = write_jsonl(rows)
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder, train=path, predict=path, normalize_scores="rank"
    )
    data.setup("fit")
    data.setup("predict")
    assert [list(group.scores) for group in data.datasets["predict"].groups] == [
        row["scores"] for row in rows
    ]
    assert max(max(group.scores) for group in data.datasets["train"].groups) == 1.0


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ("group", [[0, 1], [0, 0.5, 1], [1, 0]]),
        ("source", [[0, 1], [0, 0.5, 1], [1, 0]]),
    ],
)
def test_ranks_of_several_sources(
    over: str, expected: list[list[float]], tokenizer_folder: str, write_jsonl: Write
) -> None:
    """Each source has a scale of its own."""

    def source(name: str, *scores: list[float]) -> str:
        return write_jsonl(
            [
                {"prompt": f"{name} {s}", "responses": ["a", "b", "c"][: len(s)], "scores": s}
                for s in scores
            ],
            name,
        )

    paths = [
        source("a.jsonl", [1, 2]),
        source("b.jsonl", [100, 200, 300]),
        source("c.jsonl", [9, 8]),
    ]
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder, train=paths, normalize_scores="rank", normalize_over=over
    )
    data.setup("fit")
    assert [list(group.scores) for group in data.datasets["train"].groups] == expected


def test_bad_rows_stop_the_run(tokenizer_folder: str, write_jsonl: Write) -> None:
    path = write_jsonl([*example_rows(2), {"prompt": "Why?", "responses": ["a", "b"]}])
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=path)
    with pytest.raises(DataError, match=r"groups\.jsonl:3: scores: found no such field"):
        fit(data)


# ---------------------------------------------------------------------------------- what is missing


def test_bad_rows_may_be_left_out(tokenizer_folder: str, write_jsonl: Write) -> None:
    """The first as any other; they are counted, also when token ids are read from the cache."""
    rows = example_rows(6)
    path = write_jsonl([{"prompt": None, "responses": ["a", "b"], "scores": [1, 0]}, *rows, "{x"])
    for _ in range(2):
        data = PreferenceDataModule(tokenizer=tokenizer_folder, train=path, bad_rows="drop")
        trained = fit(data)
        (report,) = data.reports
        assert (report.failed, report.kept) == (2, 6)
        assert "2 that cannot be used" in str(report)
        assert sum(len(batch) for batch in trained.trained[0]) == 6


def test_arguments_of_the_template_for_all_rows(tmp_path: Path, write_jsonl: Write) -> None:
    """A row's own go before."""
    tokenizer_of("Qwen 3").save_pretrained(tmp_path / "tokenizer")
    row = {"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 0]}
    own = row | {"chat_template_kwargs": {"enable_thinking": True}}
    for kwargs in ({"enable_thinking": False}, None):
        data = PreferenceDataModule(
            tokenizer=str(tmp_path / "tokenizer"),
            train=write_jsonl([row, own]),
            chat_template_kwargs=kwargs,
        )
        fit(data)
        # Where reasoning is off the block is the prompt's own, and nothing is left to be noted.
        noted = data.reports[0].changed.total()
        assert noted == (2 if kwargs else 4)


@pytest.mark.parametrize(
    ("run", "role"),
    [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")],
)
def test_missing_source(run: str, role: str, tokenizer_folder: str, write_jsonl: Write) -> None:
    path = write_jsonl(example_rows(2))
    others: Any = {name: path for name in ("train", "val", "test", "predict") if name != role}
    data = PreferenceDataModule(tokenizer=tokenizer_folder, **others)
    with pytest.raises(ValueError, match=rf"^data\.{role} is not set"):
        getattr(make_trainer(), run)(Recorder(), datamodule=data)


def test_missing_tokenizer(write_jsonl: Write) -> None:
    data = PreferenceDataModule(train=write_jsonl(example_rows(2)))
    with pytest.raises(ValueError, match=r"^data\.tokenizer is not set"):
        fit(data)


def test_missing_file(tokenizer_folder: str) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        fit(PreferenceDataModule(tokenizer=tokenizer_folder, train="gone.jsonl"))


@pytest.mark.parametrize("name", ["groups_per_batch", "tokens_per_batch", "max_length", "num_proc"])
def test_settings_below_one(name: str) -> None:
    wrong: Any = {name: 0}
    with pytest.raises(ValueError, match=rf"data\.{name} must be at least 1, got 0"):
        PreferenceDataModule(**wrong)


# An interrupted run leaves a trainer in the middle of an epoch, which a new one begins afresh.
def test_fit_again_after_an_interruption_sees_the_whole_epoch(
    tokenizer_folder: str, write_jsonl: Write
) -> None:
    data = PreferenceDataModule(
        tokenizer=tokenizer_folder, train=write_jsonl(example_rows(6)), groups_per_batch=2
    )

    class Interrupted(Recorder):
        def on_train_batch_end(self, outputs: Any, batch: GroupBatch, batch_idx: int) -> None:
            raise RuntimeError("interrupted")

    trainer = make_trainer()
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(Interrupted(), datamodule=data)
    module = Recorder()
    trainer.fit(module, datamodule=data)
    assert module.orders() == fit(data).orders()


# --------------------------------------------------------------------------- precision, processes


def test_scores_stay_as_they_were_given_in_bf16(tokenizer_folder: str, write_jsonl: Write) -> None:
    scores = [7.123456789012345, 1000.001]
    path = write_jsonl([{"prompt": "Why?", "responses": ["a", "b"], "scores": scores}])
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=path)
    module = Recorder()
    trainer = make_trainer(precision="bf16-true")
    trainer.fit(module, datamodule=data)
    (batch,) = module.trained[0]
    assert batch.scores.dtype == torch.float64
    assert batch.scores.tolist() == [scores]
    # The precision is on: the weights have it, and a batch of another kind would get it.
    assert module.weight.dtype == torch.bfloat16
    other = trainer.strategy.precision_plugin.convert_input({"scores": batch.scores})
    assert other["scores"].dtype == torch.bfloat16


class Writer(Recorder):
    """Leaves what each process saw in a file: they share no memory with the test."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        seen = {
            epoch: [
                (row, bool(batch.counted.all())) for batch, row in zip(b, rows_of(b), strict=True)
            ]
            for epoch, b in self.trained.items()
        }
        (self.folder / f"{self.global_rank}.pkl").write_bytes(pickle.dumps(seen))


def one_of_two(tokenizer: str, path: str, folder: Path) -> None:
    data = PreferenceDataModule(tokenizer=tokenizer, train=path, groups_per_batch=2)
    make_trainer(devices=2, strategy="ddp", max_epochs=2).fit(Writer(folder), datamodule=data)
    # Lightning leaves gloo's threads running; a process that ends with them may abort.
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_groups(
    tokenizer_folder: str, write_jsonl: Write, tmp_path: Path
) -> None:
    path = write_jsonl(example_rows(9))
    result = processes.run(one_of_two, [tokenizer_folder, path, tmp_path], processes=2)
    assert result.returncode == 0, result.stderr
    ranks = [pickle.loads((tmp_path / f"{rank}.pkl").read_bytes()) for rank in (0, 1)]
    data = PreferenceDataModule(tokenizer=tokenizer_folder, train=path, groups_per_batch=4)
    alone = fit(data, max_epochs=2).orders()
    for epoch in (0, 1):
        # Each step, both processes together, is the step of one process; at the end one borrows.
        assert [counted for _, counted in ranks[0][epoch]] == [True, True, True]
        assert [counted for _, counted in ranks[1][epoch]] == [True, True, False]
        steps = zip(*(rank[epoch] for rank in ranks), strict=True)
        together = [
            sorted(int(number) for rows, counted in step if counted for number in rows.split())
            for step in steps
        ]
        assert together == [sorted(map(int, rows.split())) for rows in alone[epoch]]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files in /proc")
def test_sending_the_groups_to_a_worker_opens_no_files() -> None:
    groups = random_groups([(3, [1, 2])] * 50)
    dataset = GroupDataset(groups)
    before = len(os.listdir("/proc/self/fd"))
    # A tensor by itself is sent as an open file: a worker of thousands of groups runs out of them.
    sent = ForkingPickler.dumps(dataset)
    assert len(os.listdir("/proc/self/fd")) == before
    received = pickle.loads(sent)
    assert len(received) == 50
    for given, got in zip(groups, received.groups, strict=True):
        assert torch.equal(got.prompt, given.prompt)
        assert all(map(torch.equal, got.responses, given.responses))
        assert got.prompt.dtype == given.prompt.dtype
        assert (got.scores, got.source, got.extra) == (given.scores, given.source, given.extra)


# A row without an answer among groups, and a row with one among prompts.
@pytest.mark.parametrize("prompts", [False, True])
@pytest.mark.parametrize("bad", [{}, {"prompt": "Why?"}, {"prompt": None, "responses": None}])
def test_a_bad_first_row_does_not_decide_what_predict_does(
    bad: dict[str, Any], prompts: bool, tokenizer_folder: str, write_jsonl: Write
) -> None:
    groups = example_rows(4)
    rows = [{"prompt": row["prompt"]} for row in groups] if prompts else groups
    data = PreferenceDataModule(tokenizer=tokenizer_folder, predict=write_jsonl([bad, *rows]))
    if prompts and bad == {"prompt": "Why?"}:
        data.setup("predict")
    else:
        with pytest.raises(DataError, match=r"groups\.jsonl:1: ") as raised:
            data.setup("predict")
        assert ".jsonl:2" not in str(raised.value)
    assert data._holds_prompts() == prompts
