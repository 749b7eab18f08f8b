"""Model card of an exported folder: ``card.md.jinja``, filled in with its checkpoint's record."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined, Template

from mpo_lightning.export.trained_adapter import TrainedAdapter
from mpo_lightning.markdown import cell, table
from mpo_lightning.printable import printable
from mpo_lightning.training.metrics import METRIC_NAMES
from mpo_lightning.training.record import Record, package_versions

__all__ = ["PICTURE", "CardFacts", "is_hub_id", "model_card"]

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PICTURE = "training.png"
TAGS = ("mpo-lightning", "preference-optimization", "lora")
# Values of vLLM's --max-lora-rank.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts that a card states beyond the adapter's record.

    Attributes:
        name: name of the exported folder.
        base: name of the base in the card: its hub id, or the name of a folder.
        base_is_public: whether it is a hub id.
        revision: revision of the base.
        merged: whether the folder holds the whole model.
        notes: differences between the exported model and the policy that was trained.
        picture: whether the folder holds PICTURE.
    """

    name: str
    base: str
    base_is_public: bool
    revision: str | None
    merged: bool
    notes: Sequence[str]
    picture: bool


def is_hub_id(name: str) -> bool:
    """Whether a base's name has the form of a hub id, ``org/name`` or ``name``."""
    return _HUB_ID.fullmatch(name) is not None


def model_card(adapter: TrainedAdapter, facts: CardFacts) -> ModelCard:
    """Return the card with the header that the hub reads; the publisher adds a license."""
    record, config = adapter.record, adapter.config
    loss = "" if record is None else _class_of(record["loss"])
    modules = config.get("target_modules")
    if isinstance(modules, list):
        modules = [*modules, *(config.get("target_parameters") or [])]
        kinds = sorted({name.rpartition(".")[2] for name in modules})
        modules = f"{', '.join(kinds)} ({len(modules)} entries)"
    # Fused experts have another rank than layers.
    ranks = config.get("rank_pattern") or {}
    rank = max(config["r"], *ranks.values()) if ranks else config["r"]
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    text = _template().render(
        **vars(facts) | {"picture": PICTURE if facts.picture else None},
        header=_header(facts, record, loss).to_yaml(),
        record=record,
        loss_class=loss,
        quantization=adapter.quantization,
        dtype="auto" if record is None else record["base"]["dtype"],
        lora={name: config[name] for name in names if name in config}
        | {"target_modules": modules}
        | ({"rank_pattern": ranks, "alpha_pattern": config["alpha_pattern"]} if ranks else {}),
        auto_class=_auto_class(record),
        vllm_rank=next((each for each in VLLM_RANKS if each >= rank), rank),
        metric_names=METRIC_NAMES,
        versions=package_versions(),
    )
    # Parts that are left out leave blank lines.
    return ModelCard(printable(re.sub(r"\n{3,}", "\n\n", text)).rstrip() + "\n")


def _template() -> Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {
        "arxiv_link": lambda number: f"arXiv [{number}](https://arxiv.org/abs/{number})",
        "cell": cell,
        "number": _number,
        "settings_table": lambda settings: table(("setting", "value"), _flat(settings)),
        "thousands": lambda count: f"{count:,}",
    }
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _header(facts: CardFacts, record: Record | None, loss: str) -> ModelCardData:
    relation: dict[str, Any] = (
        {"base_model_relation": "finetune"} if facts.merged and facts.base_is_public else {}
    )
    read = [] if not record or not record["data"] else record["data"]["sources"]["train"]
    names = [source["name"].partition(":")[0] for source in read]
    return ModelCardData(
        base_model=facts.base if facts.base_is_public else None,
        library_name="transformers" if facts.merged else "peft",
        pipeline_tag="text-generation",
        # Files have no folder in their names.
        datasets=[name for name in names if "/" in name] or None,
        tags=[*TAGS, loss.rpartition(".")[2].lower()] if loss else list(TAGS),
        **relation,
    )


def _auto_class(record: Record | None) -> str:
    """Return the transformers class that loads the base: a few multimodal ones have their own."""
    from transformers.models.auto import modeling_auto as known

    name = None if record is None else record["base"]["model"]
    causal = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    multimodal = known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    own = name in multimodal and name not in causal
    return "AutoModelForImageTextToText" if own else "AutoModelForCausalLM"


def _class_of(described: Any) -> str:
    return str(described["class"] if isinstance(described, dict) else described)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value or "-")


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Yield settings as rows, nested ones under names with dots."""
    for name, value in settings.items():
        path = f"{above}.{name}" if above else name
        if isinstance(value, dict) and set(value) == {"class", "settings"}:
            yield path, f"`{value['class']}`"
            yield from _flat(value["settings"], path)
        elif isinstance(value, dict):
            yield from _flat(value, path)
        else:
            yield path, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
