"""Groups in Arrow tables are the groups that went in."""

import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mpo_lightning.batch import GroupBatch, TokenGroup
from mpo_lightning.data.dataset import GroupDataset, Groups
from mpo_lightning.data.sampler import StepGroups
from tests.conftest import random_groups

SHAPE = [(3, [1, 2]), (5, [4, 4, 1]), (1, [1, 7]), (4, [2, 2, 2, 2]), (2, [5, 1])]


def given() -> list[TokenGroup]:
    groups = random_groups(SHAPE)
    groups[1] = groups[1]._replace(indices=(0, 2, 5), extra='{"id": "ü"}')
    return groups


def stored(rows_a_block: int, folder: Path) -> Any:
    """The groups on disk, in blocks of that many."""
    whole = GroupDataset(given()).groups.data
    parts = [
        whole.select(range(start, min(start + rows_a_block, len(whole))))
        for start in range(0, len(whole), rows_a_block)
    ]
    datasets.concatenate_datasets(parts).save_to_disk(str(folder))
    return datasets.load_from_disk(str(folder))


def assert_same(found: TokenGroup, expected: TokenGroup) -> None:
    assert torch.equal(found.prompt, expected.prompt)
    assert len(found.responses) == len(expected.responses)
    assert all(map(torch.equal, found.responses, expected.responses))
    assert found.scores == expected.scores
    assert (found.source, found.extra) == (expected.source, expected.extra)
    assert found.indices == (expected.indices or tuple(range(len(expected.responses))))


@pytest.mark.parametrize("rows_a_block", [1, 2, 5])
def test_groups_come_back_as_they_went_in(rows_a_block: int, tmp_path: Path) -> None:
    groups = Groups(stored(rows_a_block, tmp_path / "data"))
    for found, expected in zip(groups, given(), strict=True):
        assert_same(found, expected)
    assert_same(groups[-1], given()[-1])
    assert [group.source for group in groups[1:4]] == ["random:2", "random:3", "random:4"]
    with pytest.raises(IndexError):
        groups[5]


@pytest.mark.parametrize("rows_a_block", [1, 3, 5])
def test_some_groups_with_other_scores(rows_a_block: int, tmp_path: Path) -> None:
    data = stored(rows_a_block, tmp_path / "data")
    scores = np.arange(13.0)
    groups = Groups(data, scores, np.array([1, 3]))
    assert [group.source for group in groups] == ["random:2", "random:4"]
    assert [groups.source(index) for index in range(2)] == ["random:2", "random:4"]
    assert [group.scores for group in groups] == [(2.0, 3.0, 4.0), (7.0, 8.0, 9.0, 10.0)]
    assert groups.sizes.tolist() == [14, 12]
    assert groups.counts.tolist() == [3, 4]
    values, valid = groups.slots(0, 2)
    assert values.tolist() == [[2.0, 3.0, 4.0, 0.0], [7.0, 8.0, 9.0, 10.0]]
    assert valid.tolist() == [[True] * 3 + [False], [True] * 4]


def test_digest_is_of_tokens_and_scores_in_order(tmp_path: Path) -> None:
    def digest(groups: list[TokenGroup]) -> str:
        return GroupDataset(groups).digest

    reference = digest(given())
    # However the groups lie on disk, and whatever else was left out.
    for rows_a_block in (1, 2, 4):
        data = stored(rows_a_block, tmp_path / str(rows_a_block))
        assert Groups(data).digest() == reference
        some = Groups(data, None, np.array([0, 2, 3]))
        assert some.digest() == digest([given()[index] for index in (0, 2, 3)])
    groups = given()
    first, second = groups[0], groups[1]
    for changed in (
        [second, first, *groups[2:]],
        groups[1:],
        [first._replace(scores=(first.scores[1], first.scores[0])), *groups[1:]],
        [first._replace(prompt=first.prompt + 1), *groups[1:]],
        [first._replace(prompt=torch.cat([first.prompt, first.responses[0]])), *groups[1:]],
        [first._replace(responses=first.responses[::-1]), *groups[1:]],
    ):
        assert digest(changed) != reference
    assert digest([first._replace(source="elsewhere:9"), *groups[1:]]) == reference


def test_a_data_set_on_disk_is_sent_by_its_path(tmp_path: Path) -> None:
    dataset = GroupDataset(random_groups([(200, [300] * 4)] * 50))
    dataset.groups.data.save_to_disk(str(tmp_path / "data"))
    on_disk = GroupDataset(
        Groups(datasets.load_from_disk(str(tmp_path / "data")), None, np.arange(40))
    )
    sent = pickle.dumps(on_disk)
    assert len(sent) < 20_000 < len(pickle.dumps(dataset))
    received = pickle.loads(sent)
    assert len(received) == 40
    step = StepGroups([3, 39], counted=True)
    batch, expected = received[step], on_disk[step]
    assert isinstance(batch, GroupBatch)
    assert torch.equal(batch.tokens, expected.tokens)
    assert torch.equal(batch.scores, expected.scores)


def test_no_groups() -> None:
    dataset = GroupDataset([])
    assert (len(dataset), list(dataset.sizes)) == (0, [])
