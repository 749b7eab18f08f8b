"""Makes the table of docs/architectures.md: each architecture, its layouts, and how exact they are.

python -m tests.model.architecture_table
"""

from pathlib import Path
from typing import Any

import torch

from mpo_lightning.batch import GroupBatch
from mpo_lightning.model.logps import exact_layouts, response_logps
from tests.conftest import plain_logps, random_groups
from tests.model.architectures import (
    CONTINUED,
    CONTINUED_WRAPPERS,
    SEPARATE,
    SHAPE,
    VARIANTS,
    WRAPPERS,
    variant_model,
)

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
LAYOUTS = ("shared", "continued", "separate")
Row = tuple[str, list[str]]


def models() -> dict[str, dict[str, Any]]:
    """Configurations by name, one for each architecture or variant of it."""
    shared, continued = {**VARIANTS, **WRAPPERS}, {**CONTINUED, **CONTINUED_WRAPPERS}
    return dict(sorted({**SEPARATE, **shared, **continued}.items()))


def layouts_of(name: str) -> list[str]:
    """Layouts of an architecture, in the table's order."""
    exact = exact_layouts(variant_model(name, **models()[name]))
    return [layout for layout in LAYOUTS if layout in exact]


def largest_difference(name: str, layout: Any) -> float:
    """Largest difference from the model's own full logits, in nats a response, in float32."""
    model = variant_model(name, **models()[name])
    batch = GroupBatch.from_groups(random_groups(SHAPE))
    with torch.no_grad():
        found = response_logps(model, batch, layout=layout, chunk_size=7)
        return float((found.double() - plain_logps(model, batch)).abs().max())


def written() -> list[Row]:
    """Rows of the table in the documentation: architecture, and cells of its layouts."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    return [(name.strip("`"), rest) for name, *rest in cells[2:]]


def main() -> None:
    """Write the table."""
    lines = ["| architecture | " + " | ".join(LAYOUTS) + " |", "| --- |" + " --- |" * len(LAYOUTS)]
    for name in models():
        exact = layouts_of(name)
        cells = [
            f"{largest_difference(name, layout):.0e}" if layout in exact else "-"
            for layout in LAYOUTS
        ]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    before = PAGE.read_text(encoding="utf-8").partition("| architecture |")[0]
    PAGE.write_text(before + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
