"""The layout of whole groups, and what Lightning and data loaders do to it."""

import pickle
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.plugins import HalfPrecision, MixedPrecision
from torch import Tensor
from torch.utils.data import DataLoader

from mpo_lightning.batch import GroupBatch, TokenGroup
from tests.conftest import random_groups


def group(
    prompt: list[int], *responses: list[int], scores: list[float], **extra: Any
) -> TokenGroup:
    return TokenGroup(
        prompt=torch.tensor(prompt, dtype=torch.long),
        responses=tuple(torch.tensor(ids, dtype=torch.long) for ids in responses),
        scores=tuple(scores),
        source=f"file:{prompt[0] if prompt else 0}",
        extra=extra,
    )


def two_groups() -> list[TokenGroup]:
    return [
        group([1, 2], [3], [4, 5, 6], scores=[0.1, 1e6 + 0.1], subset="a"),
        group([7], [8, 9], [10], [11, 12], scores=[-1.0, 2.5, 0.0]),
    ]


def assert_same(found: GroupBatch, expected: GroupBatch) -> None:
    """All attributes, values and dtypes alike."""
    assert type(found) is type(expected)
    assert vars(found).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        other = getattr(found, name)
        if isinstance(value, Tensor):
            assert other.dtype == value.dtype, name
            assert torch.equal(other, value), name
        else:
            assert other == value, name


def test_layout() -> None:
    """Group after group, each its prompt and then its responses, without padding."""
    batch = GroupBatch.from_groups(two_groups())
    assert len(batch) == 2
    assert batch.slots == 3
    assert batch.tokens.tolist() == list(range(1, 13))
    assert batch.tokens.dtype == torch.long
    assert batch.prompt_lengths == [2, 1]
    assert batch.response_lengths == [[1, 3], [2, 1, 2]]
    assert batch.scores.tolist() == [[0.1, 1e6 + 0.1, 0.0], [-1.0, 2.5, 0.0]]
    assert batch.scores.dtype == torch.float64
    assert batch.valid.tolist() == [[True, True, False], [True, True, True]]
    assert batch.lengths.tolist() == [[1, 3, 0], [2, 1, 2]]
    assert batch.lengths.dtype == torch.long
    assert batch.counted.tolist() == [True, True]
    assert batch.counted.dtype == batch.valid.dtype == torch.bool
    assert batch.sources == ["file:1", "file:7"]
    assert batch.extras == [{"subset": "a"}, {}]


def test_spans_say_where_prompts_and_responses_lie(ragged_batch: GroupBatch) -> None:
    groups = random_groups([(11, [3, 1, 9]), (4, [20, 2, 7, 5]), (17, [6, 6])])
    end = 0
    for span, one in zip(ragged_batch.spans(), groups, strict=True):
        assert span.start == end
        assert torch.equal(ragged_batch.tokens[span.start : span.first_response], one.prompt)
        for tokens, response in zip(span.responses(), one.responses, strict=True):
            assert torch.equal(ragged_batch.tokens[tokens], response)
        end = span.end
    assert end == len(ragged_batch.tokens)


def test_what_is_made_once_belongs_to_one_batch() -> None:
    """A copy, on another device say, and a part have other index tensors."""
    batch, made = GroupBatch.from_groups(two_groups()), []

    def make() -> int:
        made.append(1)
        return len(made)

    assert batch.once("a", make) == batch.once("a", make) == 1
    assert batch.once("b", make) == 2
    assert batch.to("cpu").once("a", make) == 3
    assert batch.select(0).once("a", make) == 4
    assert batch.once("a", make) == 1


def test_groups_may_be_laid_out_as_not_counted() -> None:
    batch = GroupBatch.from_groups(two_groups(), counted=False)
    assert batch.counted.tolist() == [False, False]
    assert batch.select(1).counted.tolist() == [False]


def test_tokens_are_long_whatever_the_groups_hold() -> None:
    narrow = [
        one._replace(prompt=one.prompt.int(), responses=tuple(r.int() for r in one.responses))
        for one in two_groups()
    ]
    assert_same(GroupBatch.from_groups(narrow), GroupBatch.from_groups(two_groups()))


def test_the_default_dtype_does_not_reach_scores() -> None:
    """Lightning's "bf16-true" sets torch's default dtype to bf16."""
    expected = GroupBatch.from_groups(two_groups())
    with HalfPrecision("bf16-true").forward_context():
        assert_same(GroupBatch.from_groups(two_groups()), expected)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_selected_group_is_that_group_alone(ragged_batch: GroupBatch, number: int) -> None:
    groups = random_groups([(11, [3, 1, 9]), (4, [20, 2, 7, 5]), (17, [6, 6])])
    assert_same(ragged_batch.select(number), GroupBatch.from_groups([groups[number]]))


def test_a_selected_group_keeps_its_own_facts() -> None:
    groups = two_groups()
    batch = GroupBatch.from_groups(groups)
    batch.counted = torch.tensor([True, False])
    assert_same(batch.select(0), GroupBatch.from_groups(groups[:1]))
    assert_same(batch.select(1), GroupBatch.from_groups(groups[1:], counted=False))


def test_selected_groups_partition_the_batch(ragged_batch: GroupBatch) -> None:
    parts = [ragged_batch.select(number) for number in range(len(ragged_batch))]
    assert torch.equal(torch.cat([part.tokens for part in parts]), ragged_batch.tokens)
    for part in parts:
        assert len(part.tokens) == part.prompt_lengths[0] + int(part.lengths.sum())


@pytest.mark.parametrize(
    ("groups", "complaint"),
    [
        ([], "at least one group"),
        ([group([], [1], [2], scores=[1, 2])], "file:0: a prompt or response holds no token"),
        ([group([5], [1], [], scores=[1, 2])], "file:5: a prompt or response holds no token"),
        ([group([5], scores=[])], "file:5: 0 responses and 0 scores"),
        ([group([5], [1], [2], scores=[1])], "file:5: 2 responses and 1 scores"),
        ([group([5], [1], scores=[1, 2])], "file:5: 1 responses and 2 scores"),
        ([*two_groups(), group([9], scores=[])], "file:9: 0 responses"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_groups_that_cannot_be_laid_out_are_refused(
    groups: list[TokenGroup], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        GroupBatch.from_groups(groups)


def test_to_moves_tensors_and_leaves_lengths_on_the_host() -> None:
    batch = GroupBatch.from_groups(two_groups())
    moved = batch.to("meta", non_blocking=True)
    tensors = {name for name, value in vars(moved).items() if isinstance(value, Tensor)}
    assert tensors == {"tokens", "lengths", "scores", "valid", "counted"}
    assert all(getattr(moved, name).is_meta for name in tensors)
    assert moved.scores.dtype == torch.float64
    assert (moved.prompt_lengths, moved.response_lengths) == ([2, 1], [[1, 3], [2, 1, 2]])
    assert_same(batch, GroupBatch.from_groups(two_groups()))
    assert_same(batch.to(torch.device("cpu")), batch)


def test_pickling_keeps_everything() -> None:
    batch = GroupBatch.from_groups(two_groups(), counted=False)
    assert_same(pickle.loads(pickle.dumps(batch)), batch)


def test_a_worker_process_hands_batches_over() -> None:
    loader = DataLoader(
        two_groups(),
        batch_size=2,
        num_workers=1,
        collate_fn=GroupBatch.from_groups,
        multiprocessing_context="fork",
    )
    (batch,) = loader
    assert_same(batch, GroupBatch.from_groups(two_groups()))


@pytest.mark.parametrize(
    "plugin",
    [
        HalfPrecision("bf16-true"),
        HalfPrecision("16-true"),
        MixedPrecision("bf16-mixed", device="cpu"),
    ],
    ids=lambda plugin: plugin.precision,
)
def test_precision_plugins_leave_scores_alone(plugin: Any) -> None:
    """A dataclass or dictionary of the same tensors would come back with cast scores."""
    batch = GroupBatch.from_groups(two_groups())
    assert_same(plugin.convert_input(batch), GroupBatch.from_groups(two_groups()))
    if isinstance(plugin, HalfPrecision):
        assert plugin.convert_input(vars(batch))["scores"].dtype != torch.float64


def test_lightning_moves_a_batch() -> None:
    batch = GroupBatch.from_groups(two_groups())
    moved = move_data_to_device(batch, torch.device("meta"))
    assert isinstance(moved, GroupBatch)
    assert moved.tokens.is_meta
    assert moved.scores.is_meta
    assert_same(move_data_to_device(batch, torch.device("cpu")), batch)
