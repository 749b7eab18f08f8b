"""Instructions with two verifiable constraints each, composed of templates and everyday topics."""

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mpo_lightning.errors import UserError
from mpo_lightning.files import write_whole
from mpo_lightning.showcase.constraints import HELD_OUT, TRAINED, Constraint, Kind, draw

__all__ = ["SPLITS", "TEMPLATES", "TOPICS", "prompts", "write_prompts"]

TEMPLATES: Final = (
    "Give a beginner some advice on {topic}.",
    "Explain {topic} to a child.",
    "Why do people enjoy {topic}?",
    "What does one need for {topic}?",
    "Describe a good day of {topic}.",
    "What is the hardest part of {topic}?",
    "Write a short message that invites a friend to try {topic}.",
    "Tell a very short story about {topic}.",
    "How does one get better at {topic}?",
    "Write a short advertisement for a course on {topic}.",
    "What mistakes do people make when they begin with {topic}?",
    "What can {topic} teach us?",
    "Write a diary entry about {topic}.",
    "How much time does {topic} take?",
    "Is {topic} good for your health? Answer for a newspaper.",
    "What should one know before spending money on {topic}?",
    "Recommend {topic} to somebody who is always busy.",
    "How can a family share {topic}?",
    "Write the opening of a talk about {topic}.",
    "What is the nicest thing about {topic}?",
)
TOPICS: Final = (
    *("baking bread", "growing tomatoes", "riding a bicycle to work", "learning to swim"),
    *("keeping a diary", "painting a room", "playing chess", "walking a dog", "cooking soup"),
    *("reading before sleep", "playing the guitar", "collecting stamps", "fishing in a lake"),
    *("knitting a scarf", "repairing a chair", "learning Spanish", "watching birds"),
    *("camping in the rain", "taking photographs of flowers", "singing in a choir"),
    *("planting a tree", "making coffee", "saving money", "cleaning a kitchen", "moving house"),
    *("travelling by train", "writing letters", "dancing in the kitchen", "running a marathon"),
    *("feeding ducks", "building a kite", "looking at the stars", "making pancakes"),
    *("hiking in the hills", "visiting museums", "learning to whistle", "sewing a button on"),
    *("buying a used car", "looking after a cat", "rowing a boat", "picking apples"),
    *("folding paper cranes", "playing table tennis", "making candles", "keeping bees"),
    *("shopping at a market", "doing crossword puzzles", "skating on a frozen pond"),
    *("getting up early", "meditating", "packing a suitcase", "juggling three balls"),
    *("making jam", "climbing trees", "watering house plants", "telling jokes", "skipping rope"),
    *("sorting old photographs", "cooking rice", "speaking in public", "sharing a flat"),
    *("growing herbs on a balcony", "learning to drive", "decorating a cake"),
    *("drawing portraits", "swimming in the sea", "working from home", "playing the piano"),
    *("choosing a gift", "mending socks", "brewing tea", "building a snowman"),
    *("flying a drone", "planning a birthday party", "stretching in the morning"),
    *("writing poems", "restoring old furniture", "visiting grandparents", "ironing shirts"),
    *("volunteering at a library", "collecting seashells", "playing cards", "carving wood"),
    *("making ice cream", "waiting for a bus", "learning the names of trees"),
    *("keeping an aquarium", "sleeping in a tent", "practising yoga", "making pottery"),
    *("riding a horse", "recycling glass", "listening to the radio", "cooking for ten guests"),
    *("cutting hair at home", "gardening in winter", "walking in a city at night"),
    *("solving a sudoku", "memorising a speech", "making a salad"),
)
SPLITS: Final[dict[str, tuple[int, tuple[Kind, ...]]]] = {
    "train": (128, TRAINED),
    "tuning": (48, TRAINED),
    "test": (128, TRAINED),
    "other-kinds": (48, HELD_OUT),
}
"""Number of prompts of each split, and the kinds of its constraints. Topics are of one split."""


def prompts(seed: int = 0, *, train: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Compose the rows of each split.

    Args:
        seed: of the division of topics, and of everything that is drawn.
        train: number of training prompts; another one divides the topics otherwise. Defaults to
            that of SPLITS.

    Returns:
        rows with ``prompt`` (one message), ``kinds``, and IFEval's ``key``,
        ``instruction_id_list`` and ``kwargs``. No two rows of a split have the same instruction.
    """
    rng = random.Random(seed)
    topics = rng.sample(TOPICS, len(TOPICS))
    splits = SPLITS if train is None else {**SPLITS, "train": (train, TRAINED)}
    total = sum(count for count, _ in splits.values())
    rows: dict[str, list[dict[str, Any]]] = {}
    begin = done = 0
    for split, (count, kinds) in splits.items():
        done += count
        end = round(len(topics) * done / total)
        instructions = [
            template.format(topic=topic) for topic in topics[begin:end] for template in TEMPLATES
        ]
        chosen = rng.sample(instructions, count)
        rows[split] = list(_rows(chosen, kinds, rng, first=done - count))
        begin = end
    return rows


def _rows(
    instructions: list[str], kinds: tuple[Kind, ...], rng: random.Random, *, first: int
) -> Iterator[dict[str, Any]]:
    for key, instruction in enumerate(instructions, start=first):
        asked = draw(kinds, rng)
        text = " ".join([instruction, *(constraint.sentence for constraint in asked)])
        yield {"prompt": [{"role": "user", "content": text}], **_columns(key, asked)}


def _columns(key: int, asked: list[Constraint]) -> dict[str, Any]:
    return {
        "key": key,
        "kinds": [constraint.kind.name for constraint in asked],
        "instruction_id_list": [constraint.kind.instruction for constraint in asked],
        "kwargs": [constraint.arguments for constraint in asked],
    }


def write_prompts(out: Path, seed: int = 0, sizes: Mapping[str, int] | None = None) -> None:
    """Write each split to ``out/SPLIT.jsonl``; the same arguments give the same bytes.

    Args:
        out: folder, made if it is missing.
        seed: as of `prompts`.
        sizes: how many of a split's rows are written, its first ones. Defaults to all.

    Raises:
        UserError: if a split has not so many.
    """
    out.mkdir(parents=True, exist_ok=True)
    for split, rows in prompts(seed).items():
        count = (sizes or {}).get(split, len(rows))
        if not 0 < count <= len(rows):
            raise UserError(f"--{split} must be from 1 to {len(rows)}, got {count}.")
        text = "".join(json.dumps(row) + "\n" for row in rows[:count])
        write_whole(out / f"{split}.jsonl", text.encode())
