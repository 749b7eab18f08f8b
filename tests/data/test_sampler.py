"""Which groups a process sees, over numbers of groups and of processes and their limits."""

import random
from itertools import pairwise
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
    return samplers_of([1] * num_groups, processes, shuffle, seed, groups_per_batch=per_batch)


def samplers_of(
    sizes: list[int], processes: int, shuffle: bool = True, seed: int = 0, **limits: int | None
) -> list[GroupSampler]:
    return [
        GroupSampler(sizes, **limits, shuffle=shuffle, seed=seed, num_replicas=processes, rank=rank)
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


# -------------------------------------------------------------------------------- limit on tokens


def draw_sizes(count: int, seed: int = 0) -> list[int]:
    """Sizes as those of real groups: most of some hundreds of tokens, few of thousands."""
    draw = random.Random(seed)
    return [1 + int(draw.lognormvariate(6, 0.7)) for _ in range(count)]


def random_case(seed: int) -> tuple[list[int], int, int | None, int]:
    draw = random.Random(seed)
    sizes = draw_sizes(draw.choice([1, 2, 3, 10, 50, 300]), seed)
    if seed % 5 == 0:
        sizes = [7] * len(sizes)
    limit = draw.choice([1, min(sizes), max(sizes), 3 * max(sizes), sum(sizes), 10 * sum(sizes)])
    return sizes, limit, draw.choice([None, None, 1, 3, 16]), draw.choice([1, 2, 3, 4, 8, 13])


# Sizes, tokens per batch, groups per batch, processes.
TOKEN_CASES = [
    # One batch would hold all; more processes than groups; none fits; all by themselves.
    ([2, 3, 4], 100, None, 2),
    ([2, 3, 4], 100, None, 8),
    ([20, 30, 40, 50, 60], 10, None, 2),
    ([5, 5, 5, 5], 5, None, 3),
    *(random_case(seed) for seed in range(60)),
]
TokenCase = tuple[list[int], int, int | None, int]


def name_of(case: TokenCase) -> str:
    sizes, tokens, groups, processes = case
    return f"{len(sizes)}-groups-{tokens}-tokens-{groups}-at-most-{processes}-processes"


over_token_cases = pytest.mark.parametrize("case", TOKEN_CASES, ids=name_of)


def steps_of(case: TokenCase, *, epoch: int = 0, shuffle: bool = True) -> list[Any]:
    """The steps of an epoch, each what the processes take in it."""
    sizes, tokens, groups, processes = case
    ranks = samplers_of(sizes, processes, shuffle, tokens_per_batch=tokens, groups_per_batch=groups)
    for rank in ranks:
        rank.set_epoch(epoch)
        # As many as are announced, on each process.
        assert len(list(rank)) == len(rank)
    return list(zip(*(list(rank) for rank in ranks), strict=True))


@over_token_cases
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_group_once_in_equally_many_steps_of_tokens(case: TokenCase, shuffle: bool) -> None:
    epochs = [steps_of(case, epoch=epoch, shuffle=shuffle) for epoch in range(4)]
    assert len({len(steps) for steps in epochs}) == 1
    for steps in epochs:
        seen = [index for step in steps for own in step if own.counted for index in own.indices]
        assert sorted(seen) == list(range(len(case[0])))


@over_token_cases
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_keep_both_limits_unless_of_a_single_group(case: TokenCase, shuffle: bool) -> None:
    sizes, tokens, groups, _ = case
    for step in steps_of(case, shuffle=shuffle):
        for own in step:
            assert own.indices
            assert len(own.indices) <= (groups or len(sizes))
            assert len(own.indices) == 1 or sum(sizes[index] for index in own.indices) <= tokens


def test_training_borrows_only_where_no_batch_can_be_split() -> None:
    borrowing = 0
    for case in TOKEN_CASES:
        steps = steps_of(case)
        if all(own.counted for step in steps for own in step):
            continue
        borrowing += 1
        sizes, _, _, processes = case
        assert len(sizes) % processes, name_of(case)
        assert all(len(own.indices) == 1 for step in steps for own in step), name_of(case)
        # Without the borrowed groups there would be a step less.
        assert len(steps) == -(-len(sizes) // processes), name_of(case)
    assert 5 < borrowing < len(TOKEN_CASES)


@over_token_cases
def test_without_shuffle_batches_are_as_long_as_the_limits_allow(case: TokenCase) -> None:
    sizes, tokens, groups, _ = case
    steps = steps_of(case, shuffle=False)
    batches = [own.indices for step in steps for own in step if own.counted]
    # The order of the file, through the processes of a step and from step to step.
    assert [index for batch in batches for index in batch] == list(range(len(sizes)))
    for batch, following in pairwise(batches):
        assert (
            sum(sizes[index] for index in [*batch, following[0]]) > tokens or len(batch) == groups
        )


def test_limits_by_hand() -> None:
    sizes = [3, 3, 3, 1, 9, 2, 2, 2, 5, 1]

    def steps(processes: int, **limits: int) -> list[list[tuple[list[int], bool]]]:
        ranks = samplers_of(sizes, processes, shuffle=False, **limits)
        return [[tuple(own) for own in step] for step in zip(*ranks, strict=True)]

    tokens = [[0, 1], [2, 3], [4], [5, 6, 7], [8, 9]]
    assert steps(1, tokens_per_batch=6) == [[(batch, True)] for batch in tokens]
    fewer = [[0], [1], [2, 3], [4], [5, 6], [7], [8], [9]]
    assert steps(1, tokens_per_batch=5) == [[(batch, True)] for batch in fewer]
    both = [[0, 1], [2, 3], [4], [5, 6], [7], [8, 9]]
    assert steps(1, tokens_per_batch=6, groups_per_batch=2) == [[(batch, True)] for batch in both]
    assert steps(2, tokens_per_batch=6) == [
        [([0, 1], True), ([2, 3], True)],
        [([4], True), ([5, 6, 7], True)],
        # Whatever the other process holds, one group is enough to keep in step.
        [([8, 9], True), ([8], False)],
    ]
    assert steps(4, tokens_per_batch=6)[1] == [([8, 9], True)] + [([8], False)] * 3


def test_largest_batches_are_split_for_the_processes() -> None:
    # Batches of 9, of 4 + 4 and of 2 * 5 tokens: the largest cannot be split, the next one can.
    sizes = [9, 4, 4, 2, 2, 2, 2, 2]
    for processes, expected in [
        (1, [[9], [4, 4], [2, 2, 2, 2, 2]]),
        (2, [[9], [4, 4], [2, 2, 2], [2, 2]]),
        (5, [[9], [4], [4], [2, 2, 2], [2, 2]]),
    ]:
        steps = steps_of((sizes, 10, None, processes))
        batches = [sorted(sizes[index] for index in own.indices) for step in steps for own in step]
        assert sorted(batches) == sorted(expected)
        assert all(own.counted for step in steps for own in step)


def spreads(sizes: list[int], batches: list[list[int]]) -> list[float]:
    """Largest size of each batch over its smallest, of the batches with several groups."""
    several = [[sizes[index] for index in batch] for batch in batches if len(batch) > 1]
    assert len(several) > 50
    return [max(batch) / min(batch) for batch in several]


@pytest.mark.parametrize("groups", [None, 16])
@pytest.mark.parametrize("tokens", [2000, 8000])
def test_groups_of_a_batch_are_of_similar_size(tokens: int, groups: int | None) -> None:
    sizes = draw_sizes(2000)
    steps = steps_of((sizes, tokens, groups, 1))
    bucketed = spreads(sizes, [own.indices for (own,) in steps])
    unordered = steps_of((sizes, tokens, groups, 1), shuffle=False)
    assert sorted(spreads(sizes, [own.indices for (own,) in unordered]))[len(unordered) // 2] > 3
    assert sorted(bucketed)[len(bucketed) // 2] < 1.12
    # Only at the ends of the distribution groups of a size are too few for a batch.
    assert sorted(bucketed)[int(len(bucketed) * 0.9)] < 1.25


@pytest.mark.parametrize("groups", [None, 16])
@pytest.mark.parametrize("processes", [2, 8])
def test_processes_of_a_step_hold_similarly_many_tokens(processes: int, groups: int | None) -> None:
    sizes = draw_sizes(8000)

    def idle(steps: list[Any]) -> float:
        """Share of their time that processes wait for the fullest one."""
        held = [[sum(sizes[index] for index in own.indices) for own in step] for step in steps]
        return 1 - sum(map(sum, held)) / sum(processes * max(step) for step in held)

    assert idle(steps_of((sizes, 8000, groups, processes))) < 0.01
    assert idle(steps_of((sizes, 8000, groups, processes), shuffle=False)) > 0.02


def test_batches_are_drawn_from_the_seed_and_their_order_from_the_epoch() -> None:
    def drawn(seed: int, epoch: int) -> list[list[int]]:
        (sampler,) = samplers_of(draw_sizes(300), 1, seed=seed, tokens_per_batch=4000)
        sampler.set_epoch(epoch)
        assert order(sampler) == order(sampler)
        return [step.indices for step in sampler]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(7, 3) == drawn(7, 3)
    assert drawn(0, 0) != drawn(0, 1)
    assert sorted(drawn(0, 0)) == sorted(drawn(0, 1)) == sorted(drawn(0, 2))
    assert sorted(drawn(0, 0)) != sorted(drawn(1, 0))
    # Neither short nor long batches come first.
    lengths = [len(batch) for batch in drawn(0, 0)]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


@pytest.mark.parametrize("limits", [{"groups_per_batch": 3}, {"tokens_per_batch": 2000}])
@pytest.mark.parametrize("shuffle", [True, False])
def test_skip_leaves_out_the_first_steps_of_one_walk(shuffle: bool, limits: Any) -> None:
    for sampler in samplers_of(draw_sizes(40), 2, shuffle, **limits):
        sampler.set_epoch(2)
        whole = list(sampler)
        for skip in range(len(whole) + 1):
            sampler.skip = skip
            assert list(sampler) == whole[skip:]
        assert list(sampler) == whole


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


@pytest.mark.parametrize("limits", [{"groups_per_batch": 2}, {"tokens_per_batch": 2}])
def test_lightning_leaves_the_sampler_alone(connector: Any, limits: Any) -> None:
    sampler, _ = samplers_of([1] * 10, 2, **limits)
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
