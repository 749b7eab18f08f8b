"""The model card: what an exported folder says of itself, from what its checkpoint recorded."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mpo_lightning.export.formulas import BIBTEX, FORMULAS, WHERE
from mpo_lightning.export.trained_adapter import TrainedAdapter
from mpo_lightning.markdown import table
from mpo_lightning.training.metrics import METRIC_NAMES
from mpo_lightning.training.record import Record, package_versions

__all__ = ["PICTURE", "CardFacts", "is_hub_id", "model_card"]

PICTURE = "training.png"
# Ranks that vLLM makes room for.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells beyond the adapter's record.

    Attributes:
        name: of the exported folder.
        base: as the card is to name it: its hub id, or the name of a folder.
        base_is_public: whether it is a hub id.
        revision: of the base.
        merged: whether the folder holds the whole model.
        notes: how the exported model differs from the policy that was trained.
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
    """The card, with the header that the hub reads; the license is left to whoever publishes."""
    record = adapter.record
    formula = FORMULAS.get(_loss_name(record)) if record is not None else None
    parts = [
        f"# {facts.name}",
        _summary(adapter, facts),
        *_usage(adapter, facts),
        *(["## Differences from the policy that was trained", *facts.notes] if facts.notes else []),
    ]
    if record is None:
        parts.append("The adapter's folder does not say how it was trained.")
    else:
        parts += [*_method(record), *_data(record), *_training(adapter, record)]
        parts += _metrics(record, facts)
    parts += ["## Versions", _versions(record)]
    if formula is not None:
        parts += ["## Citation", *_citation(formula.arxiv)]
    relation: dict[str, Any] = (
        {"base_model_relation": "finetune"} if facts.merged and facts.base_is_public else {}
    )
    header = ModelCardData(
        base_model=facts.base if facts.base_is_public else None,
        library_name="transformers" if facts.merged else "peft",
        pipeline_tag="text-generation",
        datasets=_hub_data(record) or None,
        tags=["mpo-lightning", "preference-optimization", "lora", *_loss_tags(record)],
        **relation,
    )
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _loss_name(record: Record) -> str:
    return str(_class_of(record["loss"])).rpartition(".")[2]


def _class_of(described: Any) -> Any:
    return described["class"] if isinstance(described, dict) else described


def _loss_tags(record: Record | None) -> list[str]:
    return [] if record is None else [_loss_name(record).lower()]


def _hub_data(record: Record | None) -> list[str]:
    if record is None or record["data"] is None:
        return []
    names = [source["name"].partition(":")[0] for source in record["data"]["sources"]["train"]]
    # Files have no folder in their names.
    return [name for name in names if "/" in name]


# ------------------------------------------------------------------------------------- text


def _summary(adapter: TrainedAdapter, facts: CardFacts) -> str:
    base = _base_text(facts)
    what = f"A LoRA adapter on {base}" if not facts.merged else f"{base} with a LoRA adapter merged"
    if adapter.record is None:
        return f"{what}."
    formula = FORMULAS.get(_loss_name(adapter.record))
    loss = adapter.record["loss"]
    method = formula.name if formula else f"`{_class_of(loss)}`"
    if _loss_name(adapter.record) == "MPO" and loss["settings"]["alpha"] > 0:
        method += ", weighted by deviation (W-MPO)"
    return (
        f"{what}, trained on groups of scored responses with mpo-lightning: {method}, "
        f"{adapter.record['steps']:,} optimizer steps."
    )


def _base_text(facts: CardFacts) -> str:
    if not facts.base_is_public:
        return f"the local model `{facts.base}`"
    at = f" (revision `{facts.revision}`)" if facts.revision else ""
    return f"[{facts.base}](https://huggingface.co/{facts.base}){at}"


def _base_to_load(facts: CardFacts) -> str:
    return facts.base if facts.base_is_public else f"path/to/{facts.base}"


def _usage(adapter: TrainedAdapter, facts: CardFacts) -> list[str]:
    name = f'name = "{facts.name}"  # this folder, or its id on the hub'
    if facts.merged:
        return [
            "## How to load it",
            _fence(
                "python",
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                name,
                'model = AutoModelForCausalLM.from_pretrained(name, dtype="auto")',
                "tokenizer = AutoTokenizer.from_pretrained(name)",
            ),
            "With vLLM:",
            _fence("sh", f"vllm serve {facts.name}"),
        ]
    dtype = "auto" if adapter.record is None else adapter.record["base"]["dtype"]
    arguments = [f'"{_base_to_load(facts)}"', f'dtype="{dtype}"']
    if facts.revision:
        arguments.append(f'revision="{facts.revision}"')
    quantised = _quantisation(adapter.quantization, dtype)
    if quantised:
        arguments.append("quantization_config=quantization")
    imports = ["AutoModelForCausalLM", "AutoTokenizer"]
    imports += ["BitsAndBytesConfig"] if quantised else []
    return [
        "## How to load it",
        _fence(
            "python",
            *(["import torch"] if "torch." in quantised else []),
            "from peft import PeftModel",
            f"from transformers import {', '.join(imports)}",
            "",
            name,
            *([f"quantization = {quantised}"] if quantised else []),
            f"base = AutoModelForCausalLM.from_pretrained({', '.join(arguments)})",
            "model = PeftModel.from_pretrained(base, name)",
            "tokenizer = AutoTokenizer.from_pretrained(name)",
        ),
        *_vllm(adapter, facts),
    ]


def _quantisation(kind: str, dtype: str) -> str:
    """The base in the bits that it had in training: the policy is that base with the adapter."""
    return {
        "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        f"bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.{dtype})",
        "int8": "BitsAndBytesConfig(load_in_8bit=True)",
    }.get(kind, "")


def _vllm(adapter: TrainedAdapter, facts: CardFacts) -> list[str]:
    if adapter.config.get("use_dora"):
        return ["vLLM serves no DoRA adapters: export the merged model for it."]
    rank = next((r for r in VLLM_RANKS if r >= adapter.config["r"]), adapter.config["r"])
    at = f" --revision {facts.revision}" if facts.revision else ""
    return [
        "With vLLM, under the name `policy`:",
        _fence(
            "sh",
            f"vllm serve {_base_to_load(facts)}{at} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules policy={facts.name}",
        ),
    ]


def _method(record: Record) -> list[str]:
    loss = record["loss"]
    settings = loss["settings"] if isinstance(loss, dict) else {}
    formula = FORMULAS.get(_loss_name(record))
    parts = ["## Method"]
    if formula is None:
        parts.append(f"A loss of the project's own, `{_class_of(loss)}`.")
    else:
        papers = ", ".join(_arxiv(number) for number in formula.arxiv)
        parts += [
            f"{formula.name} ({papers}). The loss of a group:",
            f"$$ {formula.latex} $$",
            f"{WHERE}; {formula.where}.",
        ]
        if settings.get("reference_free") or settings.get("length_normalized"):
            parts.append(
                "In the place of $r_i$ stands, as the settings below say, the policy's "
                "log-probability (`reference_free`) or a value per token (`length_normalized`)."
            )
        if settings.get("likelihood"):
            parts.append(
                "To it is added `likelihood` times the mean negative log-probability per token of "
                "the chosen responses."
            )
    parts.append(table(("setting", "value"), _flat({"loss": loss})))
    return parts


def _data(record: Record) -> list[str]:
    data = record["data"]
    if data is None:
        return ["## Data", "The data module that was used does not say what it read."]
    parts = ["## Data"]
    rows, dropped = [], []
    for role, sources in data["sources"].items():
        for source in sources:
            rows.append(
                (
                    role,
                    f"`{source['name']}`",
                    f"`{source['digest'][:16]}`",
                    f"{source['groups']:,}",
                    f"{source['kept']:,}",
                    f"{source['responses']:,}",
                )
            )
            for what in ("dropped", "changed"):
                kind = "groups dropped" if what == "dropped" else "responses"
                dropped += [
                    f"- `{source['name']}`: {count:,} {kind} {reason}"
                    for reason, count in source[what].items()
                ]
    titles = ("used for", "source", "digest of its content", "groups", "kept", "responses")
    parts.append(table(titles, rows))
    parts.append("\n".join(dropped) if dropped else "Nothing was dropped.")
    parts.append(table(("setting", "value"), _flat({"data": data["settings"]})))
    return parts


def _training(adapter: TrainedAdapter, record: Record) -> list[str]:
    config = adapter.config
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
    modules = config.get("target_modules")
    if isinstance(modules, list):
        kinds = sorted({name.rpartition(".")[2] for name in modules})
        modules = f"{', '.join(kinds)} ({len(modules)} entries)"
    lora = {name: config[name] for name in names if name in config} | {"target_modules": modules}
    base = {name: record["base"][name] for name in ("quantization", "dtype", "model")}
    groups = {
        "optimizer steps": record["steps"],
        "base": base,
        "lora": lora,
        "optimizer": record["optimizer"],
        "learning-rate schedule": record["schedule"],
        "model": record["module"],
        "trainer": record["trainer"],
    }
    return ["## Training", table(("setting", "value"), _flat(groups))]


def _metrics(record: Record, facts: CardFacts) -> list[str]:
    metrics = record["metrics"]
    rows = [
        (f"`{name}`", _number(metrics.get(f"train/{name}")), _number(metrics.get(f"val/{name}")))
        for name in METRIC_NAMES
        if f"train/{name}" in metrics or f"val/{name}" in metrics
    ]
    parts = ["## Metrics"]
    if rows:
        parts += [
            "The last values that were logged before the checkpoint was written: of one optimizer "
            "step in training, of all groups in validation.",
            table(("metric", "train", "validation"), rows),
        ]
    else:
        parts.append("None was logged before the checkpoint was written.")
    if facts.picture:
        parts.append(f"![Loss, reward margin and reward accuracy over the steps]({PICTURE})")
    return parts


def _versions(record: Record | None) -> str:
    now = package_versions()
    then = record["versions"] if record is not None else {}
    rows = [(name, then.get(name, "-"), version) for name, version in now.items()]
    return table(("package", "in training", "in the export"), rows)


def _citation(arxiv: Iterable[str]) -> list[str]:
    return [
        *("- " + _arxiv(number) for number in arxiv),
        *(_fence("bibtex", BIBTEX[number]) for number in arxiv if number in BIBTEX),
    ]


# -------------------------------------------------------------------------------- formatting


def _arxiv(number: str) -> str:
    return f"arXiv [{number}](https://arxiv.org/abs/{number})"


def _fence(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-" if value is None else value


def _flat(settings: dict[str, Any], above: str = "") -> list[tuple[str, str]]:
    """Settings as rows, nested ones under names with dots."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        path = f"{above}.{name}" if above else name
        if isinstance(value, dict) and set(value) == {"class", "settings"}:
            rows += [(path, f"`{value['class']}`"), *_flat(value["settings"], path)]
        elif isinstance(value, dict):
            rows += _flat(value, path)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((path, text))
    return rows
