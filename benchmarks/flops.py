"""How much arithmetic a step needs: floating-point operations, two for a multiply and add."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.workloads import Shape

__all__ = ["StepFlops", "causal_pairs", "step_flops"]


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step by where they fall.

    Attributes:
        base: frozen linear layers of the decoder, forward and the gradient of their inputs.
        adapters: LoRA, forward and the gradients of weights and inputs.
        attention: products of queries and keys and of weights and values, forward and backward.
        head: output head on the scored tokens, forward and the gradient of its input.
    """

    base: int
    adapters: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.base + self.adapters + self.attention + self.head


def causal_pairs(prompt: int, responses: Sequence[int]) -> int:
    """(query, key) pairs where the prompt attends causally and each response to it and itself."""
    own = sum(length * prompt + length * (length + 1) // 2 for length in responses)
    return prompt * (prompt + 1) // 2 + own


def step_flops(shape: Shape, prompt: int, responses: Sequence[int]) -> StepFlops:
    """What one group needs where the prompt is computed once and the reference is known.

    With T = P + sum(R) tokens, S = sum(R) scored tokens, rank r and, for each linear layer of a
    decoder layer, a inputs and b outputs::

        base       2 T a b (forward) + 2 T a b (gradient of the input)
        adapters   2 T r (a + b) each forward, for the weights and for the inputs
        attention  (4 forward + 8 backward) hidden * pairs, pairs as in `causal_pairs`
        head       2 S hidden vocabulary (forward) + the same (gradient of the input)

    The input of the first layer's q, k and v needs no gradient: the embeddings are frozen. What an
    implementation computes a second time to save memory is not needed and not counted, nor is
    anything that is not a matrix product.
    """
    scored = sum(responses)
    tokens = prompt + scored
    of_layer = sum(a * b for a, b in shape.linears())
    widths = sum(a + b for a, b in shape.linears())
    first = shape.linears()[:3]
    base = 4 * tokens * of_layer * shape.layers - 2 * tokens * sum(a * b for a, b in first)
    # Through A to the first layer's input: not needed either.
    adapters = 6 * tokens * shape.rank * widths * shape.layers
    adapters -= 2 * tokens * shape.rank * sum(a for a, _ in first)
    attention = 12 * shape.hidden * causal_pairs(prompt, responses) * shape.layers
    head = 4 * scored * shape.hidden * shape.vocabulary
    return StepFlops(base=base, adapters=adapters, attention=attention, head=head)
