"""Which groups a process sees, over numbers of groups and of processes."""

from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, DistributedSampler

from mpo_lightning.data.sampler import GroupSampler, StepGroups

# Groups, groups per batch, processes.
CASES = [
    (10, 2, 1),
    (10, 2, 2),
    (7, 2, 3),
    (12, 3, 2),
    (13, 3, 2),
    (64, 8, 4),
    (65, 1, 64),
    # Fewer groups than processes.
    (1, 4, 4),
    (3, 1, 8),
    (5, 8, 6),
]


def samplers(
    num_groups: int, per_batch: int, processes: int, *, shuffle: bool = True, seed: int = 0
) -> list[GroupSampler]:
    return [
        GroupSampler(
            num_groups, per_batch, shuffle=shuffle, seed=seed, num_replicas=processes, rank=rank
        )
        for rank in range(processes)
    ]


def global_steps(ranks: list[GroupSampler]) -> list[list[int]]:
    """The groups of each step over all processes, each group that counts."""
    steps = zip(*(list(rank) for rank in ranks), strict=True)
    return [[index for own in step if own.counted for index in own.indices] for step in steps]


def order(sampler: GroupSampler) -> list[int]:
    return [index for step in sampler for index in step.indices]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_group_exactly_once_an_epoch(case: tuple[int, int, int], shuffle: bool) -> None:
    ranks = samplers(*case, shuffle=shuffle)
    for epoch in range(3):
        for rank in ranks:
            rank.set_epoch(epoch)
        seen = [index for step in global_steps(ranks) for index in step]
        assert sorted(seen) == list(range(case[0]))


@pytest.mark.parametrize("case", CASES)
def test_equally_many_steps_on_every_process(case: tuple[int, int, int]) -> None:
    num_groups, per_batch, processes = case
    whole_batch = per_batch * processes
    expected = num_groups // whole_batch + (num_groups % whole_batch > 0)
    for rank in samplers(*case):
        assert len(list(rank)) == len(rank) == expected


@pytest.mark.parametrize("case", CASES)
def test_steps_are_full_but_the_last_and_shared_evenly(case: tuple[int, int, int]) -> None:
    num_groups, per_batch, processes = case
    *full, last = zip(*(list(rank) for rank in samplers(*case)), strict=True)
    assert all(len(own.indices) == per_batch for step in full for own in step)
    assert all(own.counted for step in full for own in step)
    sizes = [len(own.indices) if own.counted else 0 for own in last]
    assert sum(sizes) == num_groups - len(full) * per_batch * processes
    assert max(sizes) - min(sizes) <= 1


def test_uneven_end_borrows_a_group_that_does_not_count() -> None:
    # Three processes take two groups each; one group is left for the three.
    ends = [list(rank)[-1] for rank in samplers(7, 2, 3, shuffle=False)]
    assert ends == [
        StepGroups([6], counted=True),
        StepGroups([6], counted=False),
        StepGroups([6], counted=False),
    ]
    alone = [list(rank) for rank in samplers(1, 4, 3)]
    assert alone == [
        [StepGroups([0], counted=True)],
        [StepGroups([0], counted=False)],
        [StepGroups([0], counted=False)],
    ]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_groups", [3, 16, 41])
def test_groups_of_a_step_do_not_depend_on_the_number_of_processes(
    num_groups: int, shuffle: bool
) -> None:
    alone, *others = (
        [
            sorted(step)
            for step in global_steps(
                samplers(num_groups, 8 // processes, processes, shuffle=shuffle)
            )
        ]
        for processes in (1, 2, 4, 8)
    )
    assert len(alone) == -(-num_groups // 8)
    for other in others:
        assert other == alone


def test_without_shuffle_groups_come_in_file_order() -> None:
    steps = global_steps(samplers(10, 2, 2, shuffle=False))
    assert [sorted(step) for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    (alone,) = samplers(5, 2, 1, shuffle=False)
    assert [step.indices for step in alone] == [[0, 1], [2, 3], [4]]
    alone.set_epoch(3)
    assert order(alone) == [0, 1, 2, 3, 4]


def test_order_is_drawn_from_seed_and_epoch() -> None:
    def drawn(seed: int, epoch: int) -> list[int]:
        (sampler,) = samplers(50, 4, 1, seed=seed)
        sampler.set_epoch(epoch)
        # The same each time it is walked.
        assert order(sampler) == order(sampler)
        return order(sampler)

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(7, 3) == drawn(7, 3)
    assert drawn(0, 0) != list(range(50))
    assert drawn(0, 0) != drawn(0, 1)
    assert drawn(0, 0) != drawn(1, 0)


@pytest.fixture
def connector() -> Any:
    """What puts samplers into loaders, in a trainer of two processes that is never launched."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    return trainer._data_connector


def test_lightning_leaves_the_sampler_alone(connector: Any) -> None:
    sampler, _ = samplers(10, 2, 2)
    loader: DataLoader[Any] = DataLoader(range(10), sampler=sampler, batch_size=None)  # type: ignore[arg-type]
    plain: DataLoader[Any] = DataLoader(range(10))  # type: ignore[arg-type]
    for stage in (RunningStage.TRAINING, RunningStage.VALIDATING, RunningStage.TESTING):
        assert connector._prepare_dataloader(loader, True, stage) is loader
        # Of another loader it makes one of its own.
        changed = connector._prepare_dataloader(plain, True, stage)
        assert isinstance(changed.sampler, DistributedSampler)
    # Prediction makes a new loader always: of the same sampler.
    changed = connector._prepare_dataloader(loader, False, RunningStage.PREDICTING)
    assert changed.sampler is sampler
    assert changed.batch_size is None
