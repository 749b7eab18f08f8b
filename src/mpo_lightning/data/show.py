"""Display of the first groups as training sees them, in colour."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from mpo_lightning.batch import TokenGroup
from mpo_lightning.printable import printable

__all__ = ["show_groups"]

# Colour of each set.
STYLES = {"chosen": "green", "rejected": "red", "in neither": "yellow"}


def show_groups(
    groups: Sequence[TokenGroup],
    tokenizer: Any,
    sets: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    *,
    console: Console | None = None,
) -> None:
    """Print groups: the prompt, and each response with its score and set.

    The text is decoded from the tokens, special tokens included. The prompt, which is not trained
    on, is dim; the last token of each response, which should end the turn, is highlighted.

    Args:
        groups: the groups.
        tokenizer: the tokenizer that made their tokens.
        sets: function from scores and valid slots, (B, N) each, to the chosen and the rejected set,
            bool (B, N).
        console: console to print to. Defaults to standard output.
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
            text = Text(printable(tokenizer.decode(ids[:-1])), style=STYLES[name])
            text.append(printable(tokenizer.decode(ids[-1:])), style=f"{STYLES[name]} reverse")
            score = f"{group.scores[slot]:g}"
            rows.add_row(Text(name, style=STYLES[name]), score, str(len(ids)), text)
        prompt = Text(printable(tokenizer.decode(group.prompt)), style="dim")
        note = Text(f"prompt, {len(group.prompt)} tokens, not trained on:", style="bold")
        body = Group(note, prompt, Text(), rows)
        console.print(Panel(body, title=Text(printable(group.source)), title_align="left"))
