"""The enumerable language: a random grammar, gold scores and nuisance attributes, all as tables.

A prompt is three context letters, a response two symbols of an alphabet of 32. So there are 1,024
responses to each prompt, and every expectation under a policy is a sum over them, without sampling
noise. Responses are numbered ``32 * first + second``; ``P`` prompts, ``R`` = 1,024 responses, ``K``
attributes.
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

__all__ = ["CONTEXTS", "RESPONSES", "SYMBOLS", "Grammar", "Utility", "prompts", "responses"]

SYMBOLS = "abcdefghijklmnopqrstuvwxyz012345"
CONTEXTS = "ABCDEFGHIJ"
PROMPT_LENGTH = 3
RESPONSES = len(SYMBOLS) ** 2
ATTRIBUTES = 16
# Factor of the part of the gold score that depends on the prompt: a third of its variance.
INTERACTION = 0.7

Utility = Literal["additive", "product"]


def prompts() -> list[str]:
    """Return all prompts, in the order of the tables."""
    return ["".join(letters) for letters in product(CONTEXTS, repeat=PROMPT_LENGTH)]


def responses() -> list[str]:
    """Return all responses to any prompt, in the order of the tables."""
    return [first + second for first in SYMBOLS for second in SYMBOLS]


def _of_pairs(values: Tensor) -> Tensor:
    """Average values of symbols over each response's two: (32, ...) to (R, ...)."""
    return ((values[:, None] + values[None, :]) / 2).flatten(0, 1)


@dataclass(frozen=True)
class Grammar:
    """A language, its attributes and its gold; all float64.

    Attributes:
        first: log-probability of the first symbol, (P, 32).
        second: log-probability of the second symbol given the first, (P, 32, 32).
        attributes: nuisance attributes of each response, unrelated to its quality, (R, K): means
            over its symbols of random signs.
        worth: value of a symbol for any prompt, (32,), orthogonal to the attributes.
        taste: value of a symbol for a prompt with a leaning of one, (32,), orthogonal too.
        leaning: the leaning of each prompt, (P,), the sum of its letters' signs over root three.
    """

    first: Tensor
    second: Tensor
    attributes: Tensor
    worth: Tensor
    taste: Tensor
    leaning: Tensor

    @classmethod
    def draw(cls, seed: int) -> "Grammar":
        """Draw a log-linear grammar with full support, its attributes and its gold."""
        generator = torch.Generator().manual_seed(seed)
        size, letters = len(SYMBOLS), len(CONTEXTS)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def signs(count: int) -> Tensor:
            half = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(count // 2)
            return half[torch.randperm(count, generator=generator)]

        at = torch.tensor(list(product(range(letters), repeat=PROMPT_LENGTH)))
        place = torch.arange(PROMPT_LENGTH)
        first = (0.5 * normal(PROMPT_LENGTH, letters, size))[place, at].sum(1)
        second = (0.5 * normal(PROMPT_LENGTH, letters, size))[place, at].sum(1)
        pairs = 0.7 * normal(size, size)
        marks = torch.stack([signs(size) for _ in range(ATTRIBUTES)], dim=1)
        # Worth and taste are orthogonal to the attributes: to like a symbol is not to like an
        # attribute. Their values are normal quantiles: a normal sample of 32 without outliers.
        ranks = torch.arange(1, size + 1, dtype=torch.float64)
        quantiles = math.sqrt(2) * torch.erfinv(2 * (ranks - 0.5) / size - 1)
        basis = torch.cat([torch.ones(size, 1, dtype=torch.float64), marks], dim=1)
        values = []
        for _ in range(2):
            drawn = quantiles[torch.randperm(size, generator=generator)]
            rest = drawn - basis @ torch.linalg.lstsq(basis, drawn[:, None]).solution[:, 0]
            values.append(rest / rest.square().mean().sqrt())
            basis = torch.cat([basis, rest[:, None]], dim=1)
        return cls(
            first=first.log_softmax(-1),
            second=(second[:, None, :] + pairs).log_softmax(-1),
            attributes=_of_pairs(marks),
            worth=values[0],
            taste=values[1],
            leaning=signs(letters)[at].sum(1) / math.sqrt(PROMPT_LENGTH),
        )

    @property
    def logps(self) -> Tensor:
        """Log-probability of each response under the grammar, (P, R)."""
        return (self.first[:, :, None] + self.second).flatten(1)

    def gold(self, utility: Utility = "additive") -> Tensor:
        """Return the true quality of each response, (P, R), before it is scaled.

        Args:
            utility: "additive" is the mean worth of the two symbols; "product" the product of the
                two, a quality that neither symbol has by itself. Both with an interaction of 0.7
                between a prompt's leaning and the symbols.
        """
        worth = (
            _of_pairs(self.worth) * math.sqrt(2)
            if utility == "additive"
            else (self.worth[:, None] * self.worth[None, :]).flatten()
        )
        taste = _of_pairs(self.taste) * math.sqrt(2)
        return worth[None] + INTERACTION * self.leaning[:, None] * taste[None]
