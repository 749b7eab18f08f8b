"""Limits of a model, as its configuration states them."""

from typing import Any

from mpo_lightning.batch import ModelLimits

__all__ = ["limits_of"]

# Recurrent: the configuration states the length of its training, which is no limit.
WITHOUT_POSITIONS = {"rwkv"}
# Their positions begin after the number of the padding token.
AFTER_PADDING = {
    *("camembert", "data2vec-text", "ibert", "lilt", "longformer", "luke", "markuplm", "mpnet"),
    *("roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"),
}
# Scalings of rotary positions whose factor is not yet in ``max_position_embeddings``; of others
# ("llama3", "longrope") that is the extended length.
EXTENDED = {"linear", "dynamic", "yarn"}


def limits_of(config: Any) -> ModelLimits:
    """Return the limits of a model.

    A sliding window is no limit: positions go on beyond it.

    Args:
        config: its transformers configuration; of a multimodal wrapper the language model's holds.
    """
    text = config.get_text_config()
    tokens = getattr(text, "vocab_size", None)
    stated = (getattr(text, name, None) for name in ("max_position_embeddings", "max_seq_len"))
    positions = next((value for value in stated if value is not None), None)
    without = text.model_type in WITHOUT_POSITIONS or getattr(text, "alibi", False) is True
    if without or positions is None or positions < 1:
        return ModelLimits(tokens, None)
    if text.model_type in AFTER_PADDING:
        positions -= int(text.pad_token_id) + 1
    # Of models that scale each kind of layer in its own way, the stated length is the extended one.
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) in EXTENDED and rope.get("factor"):
        original = rope.get("original_max_position_embeddings") or positions
        positions = max(positions, int(original * rope["factor"]))
    return ModelLimits(tokens, positions)
