"""Prompts: checked before anything is loaded, with keys by content."""

from collections.abc import Callable

import pytest

from mpo_lightning.data.groups import DataError
from mpo_lightning.data.prompts import PromptSource, request

CHAT = [{"role": "user", "content": "Count."}]


def test_rows_with_their_keys(write_jsonl: Callable[..., str]) -> None:
    path = write_jsonl([{"prompt": "a", "id": 1}, {"prompt": CHAT}, {"prompt": "a"}])
    source = PromptSource(path)
    rows = source.rows(0, 3)
    assert [(item.prompt, again) for item, _, again in rows] == [
        ("a", False),
        (CHAT, False),
        ("a", True),
    ]
    keys = [item.key for item, _, _ in rows]
    assert keys == [request("a").key, request(CHAT).key, request("a", occurrence=1).key]
    assert len(set(keys)) == 3
    assert source.rows(2, 3)[0][0].source == f"{path}:3"
    assert rows[0][1]["id"] == 1


def test_system_prompt(write_jsonl: Callable[..., str]) -> None:
    own = [{"role": "system", "content": "Sing."}, *CHAT]
    path = write_jsonl([{"prompt": "a"}, {"prompt": CHAT}, {"prompt": own}])
    system = {"role": "system", "content": "Be brief."}
    assert [item.prompt for item, _, _ in PromptSource(path, "Be brief.").rows(0, 3)] == [
        [system, {"role": "user", "content": "a"}],
        [system, *CHAT],
        own,
    ]


def test_all_bad_rows_are_told(write_jsonl: Callable[..., str]) -> None:
    bad = [{"question": "a"}, {"prompt": None}, {"prompt": " "}, "3", "{"]
    with pytest.raises(DataError) as caught:
        PromptSource(write_jsonl([{"prompt": "a"}, *bad]))
    message = str(caught.value)
    assert "5 rows cannot be used" in message
    for line, found in enumerate(
        [
            "prompt: found no such field among ['question']",
            "prompt: found null",
            "prompt: found ' '",
            "row: found int",
            "not valid JSON",
        ],
        start=2,
    ):
        assert f"groups.jsonl:{line}: {found}" in message
