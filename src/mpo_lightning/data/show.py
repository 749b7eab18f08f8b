"""The first groups as training sees them, in colour."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mpo_lightning.batch import TokenGroup

__all__ = ["show_groups"]

# Of a set: its name and its colour.
STYLES = {"chosen": "green", "rejected": "red", "in neither": "yellow"}


def show_groups(
    groups: Sequence[TokenGroup],
    tokenizer: Any,
    sets: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    console: Console | None = None,
) -> None:
    """Print groups: the prompt, each response with its score and set, and what is trained on.

    The text is that of the tokens, special ones included. What is not trained on, the prompt, is
    dim; of a response all is trained on, and its last token is set off: it should end the turn.

    Args:
        groups: to show.
        tokenizer: that made them.
        sets: gives the chosen and the rejected set, bool (B, N), of scores and valid slots (B, N).
        console: where to print; standard output if none.
    """
    console = console or Console()
    for group in groups:
        scores = torch.tensor([group.scores], dtype=torch.float64)
        chosen, rejected = sets(scores, torch.ones_like(scores, dtype=torch.bool))
        rows = Table(box=None, padding=(0, 2, 0, 0), show_header=True, header_style="bold")
        for title in ("set", "score", "tokens", "trained on"):
            rows.add_column(title, justify="left" if title in {"set", "trained on"} else "right")
        for slot, ids in enumerate(group.responses):
            name = "in neither"
            if chosen[0, slot]:
                name = "chosen"
            elif rejected[0, slot]:
                name = "rejected"
            text = Text(tokenizer.decode(ids[:-1]), style=STYLES[name])
            text.append(tokenizer.decode(ids[-1:]), style=f"{STYLES[name]} reverse")
            score = f"{group.scores[slot]:g}"
            rows.add_row(Text(name, style=STYLES[name]), score, str(len(ids)), text)
        prompt = Text(tokenizer.decode(group.prompt), style="dim")
        note = Text(f"prompt, {len(group.prompt)} tokens, not trained on:", style="bold")
        body = Group(note, prompt, Text(), rows)
        console.print(Panel(body, title=Text(group.source), title_align="left"))
