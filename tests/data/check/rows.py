"""Rows of groups for the tests of the check."""

from typing import Any

import numpy as np

Rows = list[dict[str, Any]]


def random_rows(count: int, seed: int = 0) -> Rows:
    """Ragged groups with ties, repeats, models, sources, and prompts that come again."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        n = int(draw.integers(2, 9))
        scores = [float(s) for s in draw.choice([1, 2, 3, 4.5, 7, 10, 31], n)]
        texts = ["x" * int(draw.integers(1, 60)) + chr(97 + int(draw.integers(26))) for _ in scores]
        if number % 5 == 0:
            texts[1] = " " + texts[0].upper()
        if number % 7 == 0:
            texts[-1] = texts[0]
        if number % 11 == 0:
            scores = [2.5] * n
        prompt: Any = f"Prompt {draw.integers(count * 3)}"
        if number % 2:
            prompt = [{"role": "user", "content": prompt.upper() + "  "}]
        rows.append(
            {
                "prompt": prompt,
                "responses": texts,
                "scores": scores,
                "models": [f"m{draw.integers(4)}" for _ in scores],
                "source": f"s{number % 3}",
            }
        )
    return rows


def norm(text: str) -> str:
    return " ".join(text.lower().split())


def group(number: int, scores: list[float], **changes: Any) -> dict[str, Any]:
    texts = [f"answer {number} {index:02}" for index in range(len(scores))]
    return {"prompt": f"p{number}", "responses": texts, "scores": scores, **changes}


def plain(count: int = 60) -> Rows:
    """Nothing to warn of: both sets even, no ties, equal lengths."""
    shapes = ([1, 2, 3, 4], [4, 1, 3, 2], [2, 4, 1, 3], [3, 2, 4, 1])
    return [group(i, [float(s) for s in shapes[i % 4]]) for i in range(count)]
