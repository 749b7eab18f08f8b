"""What is measured: the model, its word-level tokenizer, and files of groups of exact lengths."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_lightning.data.sampler import GroupSampler

__all__ = [
    "EOS",
    "HybridShape",
    "Row",
    "Shape",
    "Workload",
    "all_pairs",
    "build_base",
    "build_tokenizer",
    "disjoint_pairs",
    "make_rows",
    "ragged_lengths",
    "read_in_training_order",
    "write_rows",
]

PAD, EOS = "<pad>", "</s>"
Row = dict[str, Any]
Pair = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the Llama that is trained, and the rank of its adapter."""

    layers: int = 8
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    vocabulary: int = 8000
    rank: int = 16

    def linears(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a decoder layer's linear layers; the first three are q, k, v."""
        h, i = self.hidden, self.intermediate
        return [(h, h), (h, h), (h, h), (h, h), (h, i), (h, i), (i, h)]

    def config(self) -> Any:
        """Return the model's configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(**self._sizes(), num_key_value_heads=self.heads)

    def _sizes(self) -> dict[str, Any]:
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }


@dataclass(frozen=True, kw_only=True)
class HybridShape(Shape):
    """Sizes of a model in the shape of Qwen3.5: of four layers, three are recurrent."""

    vocabulary: int = 4096

    def config(self) -> Any:
        """Return the model's configuration."""
        from transformers import AutoConfig

        size = self.hidden // self.heads
        of_heads = {"head_dim": size, "num_key_value_heads": max(1, self.heads // 4)}
        of_heads |= {f"linear_{kind}_head_dim": size for kind in ("key", "value")}
        of_heads |= {f"linear_num_{kind}_heads": self.heads for kind in ("key", "value")}
        kinds = [
            "linear_attention" if (layer + 1) % 4 else "full_attention"
            for layer in range(self.layers)
        ]
        return AutoConfig.for_model("qwen3_5_text", **self._sizes(), **of_heads, layer_types=kinds)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Groups of n responses, one group an optimizer step.

    Attributes:
        name: how it is called in tables and on the command line.
        groups: prompt length and response lengths of each group in the file, in training order.
        ratio: prompt : response tokens, for tables.
        rounds: counted optimizer steps of each method.
        all_pairs_rounds: counted steps on all pairs; 0 leaves that method out.
        scored_only_rounds: counted steps of TRL with its head on response positions only; 0 leaves
            that method out.
        plain_rounds: counted steps of ours with torch's own linear layers; 0 leaves those out.
        max_length: limit on prompt and response, in tokens. Defaults to more than there are.
        give_back: processes return free memory between steps, where not all fit side by side. No
            training does: each step then asks the system for its memory anew.
    """

    name: str
    groups: tuple[tuple[int, tuple[int, ...]], ...]
    ratio: str
    rounds: int
    all_pairs_rounds: int = 0
    scored_only_rounds: int = 0
    plain_rounds: int = 0
    max_length: int | None = None
    give_back: bool = False

    @property
    def n(self) -> int:
        """Responses of a group."""
        return len(self.groups[0][1])

    @classmethod
    def even(
        cls,
        n: int,
        prompt: int,
        response: int,
        ratio: str,
        *,
        rounds: int,
        kind: str = "",
        **settings: Any,
    ) -> "Workload":
        """All groups alike. Two are enough: they are walked through again and again."""
        groups = ((prompt, (response,) * n),) * 2
        name = f"{kind}n{n}-{prompt}x{response}"
        return cls(name=name, groups=groups, ratio=ratio, rounds=rounds, **settings)


def ragged_lengths(
    count: int, n: int, *, seed: int = 0, longest: int = 512
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Log-normal lengths: medians of 128 tokens, about two thirds within 70 to 235."""
    generator = torch.Generator().manual_seed(seed)

    def draw() -> int:
        length = 128 * torch.exp(0.6 * torch.randn((), generator=generator))
        return int(length.clamp(8, longest))

    return tuple((draw(), tuple(draw() for _ in range(n))) for _ in range(count))


# -------------------------------------------------------------------------------- base and rows


def build_tokenizer(folder: Path, words: int) -> None:
    """Write a tokenizer that has one token a word, "w2" and so on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {PAD: 0, EOS: 1, **{f"w{i}": i for i in range(2, words)}}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    wrapped.save_pretrained(folder)


def build_base(folder: Path, shape: Shape) -> None:
    """Write a model with random weights, fp32, and a tokenizer that has one token a word."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape.config()).float().save_pretrained(folder)
    build_tokenizer(folder, shape.vocabulary)


def make_rows(
    groups: tuple[tuple[int, tuple[int, ...]], ...], vocabulary: int, *, seed: int = 0
) -> list[Row]:
    """Groups of random words; half of a group's responses score above its mean.

    A response of R tokens has R - 1 words: both sides append the end-of-sequence token.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> str:
        ids = torch.randint(2, vocabulary, (count,), generator=generator).tolist()
        return " ".join(f"w{i}" for i in ids)

    return [
        {
            "prompt": words(prompt),
            "responses": [f" {words(length - 1)}" for length in responses],
            "scores": [float(s) for s in torch.randperm(len(responses), generator=generator)],
        }
        for prompt, responses in groups
    ]


def training_order(count: int) -> list[int]:
    """The row of each step in the first epoch, as PreferenceDataModule deals them."""
    sampler = GroupSampler(
        [1] * count, groups_per_batch=1, shuffle=True, seed=0, num_replicas=1, rank=0
    )
    return [index for step in sampler for index in step.indices]


def write_rows(path: Path, rows: list[Row]) -> None:
    """Write rows so that training, which shuffles them, sees them in the order given."""
    lines = [""] * len(rows)
    for place, row in zip(training_order(len(rows)), rows, strict=True):
        lines[place] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_in_training_order(path: Path) -> list[Row]:
    """The rows of a file in the order in which PreferenceDataModule trains on them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [rows[place] for place in training_order(len(rows))]


# ------------------------------------------------------------------------------------- for TRL


def _split(row: Row) -> tuple[list[str], list[str]]:
    mean = sum(row["scores"]) / len(row["scores"])
    scored = list(zip(row["responses"], row["scores"], strict=True))
    return [r for r, s in scored if s > mean], [r for r, s in scored if s <= mean]


def disjoint_pairs(row: Row) -> list[Pair]:
    """The group as n/2 pairs: each response once."""
    chosen, rejected = _split(row)
    return [
        {"prompt": row["prompt"], "chosen": c, "rejected": r}
        for c, r in zip(chosen, rejected, strict=True)
    ]


def all_pairs(row: Row) -> list[Pair]:
    """The group as all (n/2)^2 pairs of a chosen and a rejected response."""
    chosen, rejected = _split(row)
    return [{"prompt": row["prompt"], "chosen": c, "rejected": r} for c in chosen for r in rejected]


def as_settings(workload: Workload, shape: Shape) -> dict[str, Any]:
    """The workload as plain values: a measurement is taken up again only where these agree."""
    plain: dict[str, Any] = json.loads(json.dumps({**asdict(workload), "shape": asdict(shape)}))
    return plain
