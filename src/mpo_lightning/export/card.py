"""Model card of an exported folder: ``card.md.jinja``, filled in with its checkpoint's record."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from mpo_lightning.export.trained_adapter import TrainedAdapter
from mpo_lightning.markdown import table
from mpo_lightning.training.metrics import METRICS
from mpo_lightning.training.record import Record, package_versions

__all__ = ["PICTURE", "CardFacts", "is_hub_id", "model_card"]

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PICTURE = "training.png"
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
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters["settings_table"] = _settings_table
    environment.filters["arxiv_link"] = lambda n: f"arXiv [{n}](https://arxiv.org/abs/{n})"
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(_values(adapter, facts))
    # Parts that are left out leave blank lines.
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n")


def _values(adapter: TrainedAdapter, facts: CardFacts) -> dict[str, Any]:
    """Return the template's variables."""
    record, config = adapter.record, adapter.config
    at = f" (revision `{facts.revision}`)" if facts.revision else ""
    link = f"[{facts.base}](https://huggingface.co/{facts.base}){at}"
    versions = {} if record is None else record["versions"]
    return {
        "header": _header(facts, record).to_yaml(),
        "name": facts.name,
        "merged": facts.merged,
        "base": link if facts.base_is_public else f"the local model `{facts.base}`",
        "base_path": facts.base if facts.base_is_public else f"path/to/{facts.base}",
        "revision": facts.revision,
        "quantization": adapter.quantization,
        "dtype": "auto" if record is None else record["base"]["dtype"],
        "dora": config.get("use_dora"),
        "rank": next((rank for rank in VLLM_RANKS if rank >= config["r"]), config["r"]),
        "notes": facts.notes,
        "record": record,
        "versions": table(
            ("package", "in training", "in the export"),
            [(name, versions.get(name, "-"), now) for name, now in package_versions().items()],
        ),
        "formula": None,
        **({} if record is None else _values_of_record(record, config, facts)),
    }


def _values_of_record(record: Record, config: dict[str, Any], facts: CardFacts) -> dict[str, Any]:
    """Return the template's variables that tell of the training."""
    loss, formula, metrics = record["loss"], record["formula"], record["metrics"]
    settings = loss["settings"] if isinstance(loss, dict) else {}
    title = (formula and formula["title"]) or f"`{_class_of(loss)}`"
    weighted = _loss_name(record) == "MPO" and settings.get("alpha", 0) > 0
    modules = config.get("target_modules")
    if isinstance(modules, list):
        kinds = sorted({name.rpartition(".")[2] for name in modules})
        modules = f"{', '.join(kinds)} ({len(modules)} entries)"
    lora = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    measured = [
        (f"`{name}`", *(_number(metrics.get(f"{stage}/{name}")) for stage in ("train", "val")))
        for name in METRICS
        if f"train/{name}" in metrics or f"val/{name}" in metrics
    ]
    return {
        "method": title + ", weighted by deviation (W-MPO)" * weighted,
        "formula": formula,
        "loss_title": title,
        "settings": settings,
        "sources": _sources(record),
        "dropped": list(_dropped(record)),
        "training": {
            "optimizer steps": record["steps"],
            "base": {name: record["base"][name] for name in ("quantization", "dtype", "model")},
            "lora": {name: config[name] for name in lora if name in config}
            | {"target_modules": modules},
            "optimizer": record["optimizer"],
            "learning-rate schedule": record["schedule"],
            "model": record["module"],
            "trainer": record["trainer"],
        },
        "metrics": measured and table(("metric", "train", "validation"), measured),
        "picture": PICTURE if facts.picture else None,
    }


def _header(facts: CardFacts, record: Record | None) -> ModelCardData:
    relation: dict[str, Any] = (
        {"base_model_relation": "finetune"} if facts.merged and facts.base_is_public else {}
    )
    names = [] if record is None else [source["name"] for source in _data(record).get("train", [])]
    loss = [] if record is None else [_loss_name(record).lower()]
    return ModelCardData(
        base_model=facts.base if facts.base_is_public else None,
        library_name="transformers" if facts.merged else "peft",
        pipeline_tag="text-generation",
        # Hub ids without their split; a file has no folder in its name.
        datasets=[name.partition(":")[0] for name in names if "/" in name.partition(":")[0]]
        or None,
        tags=["mpo-lightning", "preference-optimization", "lora", *loss],
        **relation,
    )


def _class_of(described: Any) -> str:
    return str(described["class"] if isinstance(described, dict) else described)


def _loss_name(record: Record) -> str:
    return _class_of(record["loss"]).rpartition(".")[2]


def _data(record: Record) -> dict[str, Any]:
    """Return the sources that were read, by the role that they had."""
    return {} if record["data"] is None else dict(record["data"]["sources"])


def _sources(record: Record) -> str:
    titles = ("used for", "source", "digest of its content", "groups", "kept", "responses")
    rows = [
        (
            role,
            f"`{source['name']}`",
            f"`{source['digest'][:16]}`",
            *(f"{source[name]:,}" for name in ("groups", "kept", "responses")),
        )
        for role, sources in _data(record).items()
        for source in sources
    ]
    return table(titles, rows)


def _dropped(record: Record) -> Iterator[str]:
    for sources in _data(record).values():
        for source in sources:
            for what, kind in (("dropped", "groups dropped"), ("changed", "responses")):
                for reason, count in source[what].items():
                    yield f"`{source['name']}`: {count:,} {kind} {reason}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-" if value is None else value


def _settings_table(settings: Mapping[str, Any]) -> str:
    return table(("setting", "value"), _flat(settings))


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
