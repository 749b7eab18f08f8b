"""The studies' world: a small Llama taught one enumerable language, with exact probabilities.

A world depends on a seed alone and is kept in a folder of its own:

- ``base/``: the model and its tokenizer, as `transformers` loads them; the reference of all runs;
- ``world.pt``: its log-probability of every response to every prompt, and how well it was taught.

Groups are drawn from the reference's own probabilities.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from mpo_lightning.digests import check_folder
from mpo_lightning.files import whole_folder
from mpo_lightning.quiet import quiet
from mpo_lightning.studies.world.enumeration import enumerate_ends, enumerate_logps
from mpo_lightning.studies.world.grammar import (
    CONTEXTS,
    SYMBOLS,
    Grammar,
    Utility,
    prompts,
    responses,
)

__all__ = ["BuildWorld", "GroupSampling", "StudyWorld", "draw_seed", "load_world"]

# Part of a world's folder name. Raise it when a change of this code changes the worlds it builds.
VERSION = 2
BEGIN, END, PAD = "<begin>", "<end>", "<pad>"
HELD_OUT = 64
# The model, and its training: optimizer steps, prompts with two symbols a step, peak learning rate.
HIDDEN_SIZE = 96
LAYERS = 2
STEPS = 300
ROWS = 128
PEAK_LR = 5e-3


@dataclass(frozen=True, kw_only=True)
class GroupSampling:
    """Settings for drawing the responses of a group from the reference.

    Args:
        shared: probability that a response takes its first symbol from the group's first one
            (its second symbol is drawn behind it); 0 is independent sampling.
        copies: number of times that each drawn response stands in its group.
        temperature: temperature of the draws; 1 is the reference itself.
        draw: number of the draw: another one gives other responses of the same world.
    """

    shared: float = 0.0
    copies: int = 1
    temperature: float = 1.0
    draw: int = 0


def draw_seed(seed: int, draw: int) -> int:
    """Return a seed for a draw in the world of a seed; the world's own for draw 0."""
    return seed + 100_000 * draw


@dataclass(frozen=True)
class StudyWorld:
    """A complete world.

    Attributes:
        folder: its folder.
        seed: its seed.
        logps: log-probability of each response under the reference, float64 (P, R); the
            exponentials sum to a little less than one.
        measured: how well the model was taught: divergence from the grammar (nats), and the mass
            that falls on no response.
    """

    folder: Path
    seed: int
    logps: Tensor
    measured: dict[str, float]

    @property
    def base(self) -> Path:
        """The folder of the model and its tokenizer."""
        return self.folder / "base"

    @cached_property
    def grammar(self) -> Grammar:
        """The language."""
        return Grammar.draw(self.seed)

    @cached_property
    def order(self) -> Tensor:
        """All prompts in random order: the last 64 are held out, groups take the first ones."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(len(self.logps), generator=generator)

    @cached_property
    def reference(self) -> Tensor:
        """`logps` normalised over the responses, (P, R): the distribution that groups come from."""
        return self.logps.log_softmax(1)

    @property
    def held_out(self) -> Tensor:
        """Prompts that no group has."""
        return self.order[-HELD_OUT:]

    def trained(self, count: int) -> Tensor:
        """Return the prompts of a data set of ``count`` groups: a larger one begins with a smaller.

        Raises:
            ValueError: if there are fewer prompts.
        """
        if count > len(self.order) - HELD_OUT:
            raise ValueError(f"There are {len(self.order) - HELD_OUT} prompts, not {count}.")
        return self.order[:count]

    def gold(self, utility: Utility = "additive") -> Tensor:
        """Return the true quality of each response, (P, R), in standard deviations.

        Under the reference it has mean 0 in every prompt and, on average over prompts, variance 1.
        """
        gold, weights = self.grammar.gold(utility), self.reference.exp()
        gold = gold - (weights * gold).sum(1, keepdim=True)
        return gold / (weights * gold.square()).sum(1).mean().sqrt()

    def sample(self, prompts: Tensor, count: int, sampling: GroupSampling) -> Tensor:
        """Draw responses to each prompt; their numbers are long (len(prompts), count).

        More responses begin with those of a smaller count, and do not depend on the other prompts.
        """
        rows = []
        first = self.reference.view(-1, len(SYMBOLS), len(SYMBOLS))
        for prompt in prompts.tolist():
            start = draw_seed(self.seed, sampling.draw) * 1_000_003 + prompt
            generator = torch.Generator().manual_seed(start)
            joint = (self.reference[prompt] / sampling.temperature).softmax(0)
            drawn = joint.multinomial(512, replacement=True, generator=generator)
            if sampling.shared > 0:
                begin = int(drawn[0]) // len(SYMBOLS)
                behind = (first[prompt, begin] / sampling.temperature).softmax(0)
                again = behind.multinomial(512, replacement=True, generator=generator)
                shares = torch.rand(512, generator=generator) < sampling.shared
                drawn = torch.where(shares, begin * len(SYMBOLS) + again, drawn)
            rows.append(drawn.repeat_interleave(sampling.copies)[:count])
        return torch.stack(rows)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base)

    def prompt_ids(self, numbers: Tensor) -> Tensor:
        """Return the token ids of prompts, (len(numbers), 4), the begin token first."""
        texts = prompts()
        return torch.tensor(self.tokenizer([texts[n] for n in numbers.tolist()])["input_ids"])

    @property
    def symbol_ids(self) -> Tensor:
        """Token ids of the symbols."""
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(SYMBOLS)))

    def write_groups(self, path: Path, prompts_: Tensor, drawn: Tensor, scores: Tensor) -> None:
        """Write groups as JSON Lines, one prompt with its responses and scores a line."""
        prompt_texts, response_texts = prompts(), responses()
        lines = [
            json.dumps(
                {
                    "prompt": prompt_texts[prompt],
                    "responses": [response_texts[n] for n in row],
                    "scores": of_row,
                }
            )
            for prompt, row, of_row in zip(
                prompts_.tolist(), drawn.tolist(), scores.tolist(), strict=True
            )
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_world(root: Path, seed: int) -> StudyWorld:
    """Load the world of a seed, which is built first if it is missing.

    Processes that ask for the same world wait for the one that builds it.

    Args:
        root: folder of worlds.
        seed: seed of the grammar, the model and everything drawn from it.
    """
    folder = root / f"seed-{seed}-v{VERSION}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        if not folder.is_dir():
            with whole_folder(folder) as unfinished:
                _write(unfinished, seed)
    check_folder(folder, remedy="Remove the folder: it is built again.")
    content = torch.load(folder / "world.pt", weights_only=True)
    return StudyWorld(folder, seed, content["logps"], content["measured"])


@dataclass(frozen=True, kw_only=True)
class BuildWorld:
    """The task of building a world; its result is how well the model was taught.

    Args:
        seed: seed of the world.
    """

    seed: int

    def __call__(self, worlds: Path) -> dict[str, float]:
        """Build it."""
        return load_world(worlds, self.seed).measured


def _make_tokenizer() -> Any:
    """Make a tokenizer of one token a letter; a text begins with the begin token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [BEGIN, END, PAD]
    vocabulary = {token: number for number, token in enumerate([*special, *CONTEXTS, *SYMBOLS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _write(folder: Path, seed: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    grammar = Grammar.draw(seed)
    prompt_ids = torch.tensor(tokenizer(prompts())["input_ids"])
    symbol_ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(SYMBOLS)))
    end = tokenizer.eos_token_id
    ids = {"prompts": prompt_ids, "symbols": symbol_ids, "end": torch.tensor(end)}
    _teach(model, grammar, ids, seed)
    with quiet():
        model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    with torch.no_grad():
        found = enumerate_logps(model, prompt_ids, symbol_ids)
    reference = found.log_softmax(1)
    ends = enumerate_ends(model, prompt_ids[:: len(prompt_ids) // 8], symbol_ids, end)
    measured = {
        "divergence": (grammar.logps.exp() * (grammar.logps - reference)).sum(1).mean().item(),
        "outside": 1 - found.exp().sum(1).mean().item(),
        "unended": 1 - (reference[:: len(prompt_ids) // 8].exp() * ends.exp()).sum(1).mean().item(),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "entropy": -(reference.exp() * reference).sum(1).mean().item(),
    }
    torch.save({"logps": found, "measured": measured}, folder / "world.pt")


def _teach(model: Any, grammar: Grammar, token_ids: dict[str, Tensor], seed: int) -> None:
    """Teach the grammar's own probabilities of the next symbol: maximum likelihood without noise.

    Cross-entropy against what the grammar gives each symbol has its minimum where the likelihood of
    infinitely many samples has its maximum.
    """
    prompt_ids, symbol_ids, end = (token_ids[name] for name in ("prompts", "symbols", "end"))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LR, total_steps=STEPS, pct_start=0.1
    )
    first, second = grammar.first.float().exp(), grammar.second.float().exp()
    model.train()
    for _ in range(STEPS):
        asked = torch.randint(len(prompt_ids), (ROWS,), generator=generator)
        one = first[asked].multinomial(1, generator=generator)[:, 0]
        two = second[asked, one].multinomial(1, generator=generator)[:, 0]
        ids = torch.cat([prompt_ids[asked], symbol_ids[torch.stack([one, two], 1)]], 1)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=3).logits
        wanted = torch.zeros_like(logits)
        wanted[:, 0, symbol_ids] = first[asked]
        wanted[:, 1, symbol_ids] = second[asked, one]
        wanted[:, 2, end] = 1.0
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
