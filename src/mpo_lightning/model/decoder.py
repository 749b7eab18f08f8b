"""The part of a model that text passes through: the whole of most, the middle of a wrapper."""

from itertools import accumulate
from typing import Any

__all__ = ["text_decoder"]


def text_decoder(model: Any) -> Any:
    """Return the module from token ids to hidden states; its ``config`` is the language model's.

    It is the innermost model of transformers around the input embedding. So of a multimodal model
    it has nothing that images need: towers, their masks, positions in them.
    """
    from transformers import PreTrainedModel

    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    around = accumulate(path.split(".")[:-1], "{}.{}".format)
    modules = [model, *map(model.get_submodule, around)]
    return [module for module in modules if isinstance(module, PreTrainedModel)][-1]
