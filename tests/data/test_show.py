"""What is shown of a group is what training sees."""

import io

import torch
from rich.console import Console

from mpo_lightning.batch import TokenGroup
from mpo_lightning.data.show import show_groups
from mpo_lightning.losses import AboveMean, TopBottom
from tests.conftest import make_tokenizer


def shown(partition: object, *, colour: bool) -> str:
    tokenizer = make_tokenizer()

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text)["input_ids"])

    group = TokenGroup(
        prompt=ids("<|user|>\nWhy [bold]?<|eos|>"),
        responses=(ids("It scatters<|eos|>"), ids("No"), ids("Blue<|eos|>")),
        scores=(3.0, 2.5, -1.0),
        source="file.jsonl:7",
    )
    out = io.StringIO()
    system = "standard" if colour else None
    console = Console(file=out, width=90, force_terminal=colour, color_system=system)
    show_groups([group], tokenizer, partition, console=console)  # type: ignore[arg-type]
    return out.getvalue()


def test_prompt_responses_scores_and_sets() -> None:
    lines = shown(AboveMean(), colour=False).splitlines()
    assert "file.jsonl:7" in lines[0]
    text = "\n".join(lines)
    # Text that looks like markup is text.
    assert "Why [bold]?<|eos|>" in text
    rows = [line.strip("│ ").split() for line in lines]
    assert [row[:2] + row[3:] for row in rows if row and row[0] in {"chosen", "rejected"}] == [
        ["chosen", "3", "It", "scatters<|eos|>"],
        ["chosen", "2.5", "No"],
        ["rejected", "-1", "Blue<|eos|>"],
    ]


def test_a_response_in_neither_set_and_colours() -> None:
    text = shown(TopBottom(k=1), colour=True)
    assert "in neither" in text
    # Green, red, yellow, dim, and the last token reversed.
    for code in ("\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[7;32m"):
        assert code in text
