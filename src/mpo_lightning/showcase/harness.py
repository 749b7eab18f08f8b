"""Evaluation of a tuned model beside its base by somebody else's code: lm-evaluation-harness."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np

from mpo_lightning.errors import UserError
from mpo_lightning.files import write_whole
from mpo_lightning.generation.model import choose_device
from mpo_lightning.markdown import table
from mpo_lightning.showcase.constraints import text_of
from mpo_lightning.showcase.estimates import bootstrap
from mpo_lightning.studies.lab.statistics import Interval

__all__ = ["evaluate"]

SPLITS: Final = ("test", "other-kinds")
NEW_TOKENS: Final = 80
# Of each page of the held-out text, so that it fits the context.
CHARACTERS: Final = 4000
MAKE: Final = "python -m mpo_lightning.showcase prompts --out showcase/prompts"
CHECKERS: Final = (
    "IFEval's checkers need langdetect, immutabledict and nltk's punkt_tab: "
    "pip install 'lm_eval[hf,ifeval]', and python -m nltk.downloader punkt_tab, or NLTK_DATA set "
    "to llama_index/core/_static/nltk_cache of the package llama-index-core."
)


def evaluate(
    models: Mapping[str, Path],
    *,
    prompts: Path,
    text: Path,
    out: Path,
    tasks: Sequence[str],
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate models, and write what they got with the differences of the last from the first.

    "constraints" are IFEval's checkers on greedy answers to the show case's prompts; "text" is the
    log-likelihood of pages, in bits a byte. Intervals are bootstraps over prompts and pages.

    Args:
        models: folders of the base and the tuned model by their names.
        prompts: folder of the show case's prompts.
        text: folder of pages, ``.md``.
        out: file of the results, JSON.
        tasks: which of the two.
        limit: number of prompts of each split, and of pages. Defaults to all.

    Raises:
        UserError: if the harness, its checkers or the files are missing.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is missing: pip install 'lm_eval[hf,ifeval]'.")
    if "constraints" in tasks and not _has_checkers():
        raise UserError(CHECKERS)
    named: dict[str, dict[str, Any]] = {}
    if "constraints" in tasks:
        named |= {split: _constraints(split, prompts / f"{split}.jsonl") for split in SPLITS}
    if "text" in tasks:
        named["text"] = _text(text)
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, folder in models.items():
        for task, of in _by_harness(folder, named, limit).items():
            for measure, found in of.items():
                values.setdefault(task, {}).setdefault(measure, {})[name] = found
    results = {
        task: {measure: _estimated(of) for measure, of in by_measure.items()}
        for task, by_measure in values.items()
    }
    content = {
        "lm_eval": version("lm_eval"),
        "models": {name: str(folder) for name, folder in models.items()},
        "results": results,
    }
    write_whole(out, (json.dumps(content, indent=2) + "\n").encode())
    rows = [
        [task, measure, *(f"{of[name]['mean']:.3f}" for name in models), _signed(of["difference"])]
        for task, by_measure in results.items()
        for measure, of in by_measure.items()
    ]
    print(table(["task", "measure", *models, "difference [95% interval]"], rows))
    return content


def _signed(difference: Mapping[str, float | None]) -> str:
    return Interval.from_json(difference).signed()


def _has_checkers() -> bool:
    if any(find_spec(name) is None for name in ("langdetect", "immutabledict", "nltk")):
        return False
    import nltk  # type: ignore[import-untyped]

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _constraints(split: str, file: Path) -> dict[str, Any]:
    """Return the task of a split, as the harness reads it; the checkers are its ifeval's."""
    from lm_eval.tasks.ifeval import utils  # type: ignore[import-untyped]

    if not file.is_file():
        raise UserError(f"--prompts: {file} is missing. Make it: {MAKE}")
    given = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [{**row, "prompt": text_of(row["prompt"])} for row in given]
    return {
        **_task(split, rows),
        "output_type": "generate_until",
        "doc_to_text": "prompt",
        "doc_to_target": "key",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        "process_results": utils.process_results,
        "metric_list": [
            {"metric": f"{level}_level_{how}_acc", "aggregation": mean, "higher_is_better": True}
            for level, mean in (("prompt", "mean"), ("inst", utils.agg_inst_level_acc))
            for how in ("strict", "loose")
        ],
    }


def _text(folder: Path) -> dict[str, Any]:
    """Return the task of the pages' likelihood."""
    pages = sorted(folder.glob("*.md"))
    if not pages:
        raise UserError(f"--text: {folder} has no pages (.md).")
    rows = [{"page": page.read_text(encoding="utf-8")[:CHARACTERS]} for page in pages]
    return {
        **_task("text", rows),
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "page",
        "metric_list": [{"metric": "bits_per_byte"}],
    }


def _task(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    import datasets

    # Through JSON, which fills what a row's arguments lack with null.
    data = datasets.Dataset.from_list([json.loads(json.dumps(row)) for row in rows])
    return {
        "task": name,
        "custom_dataset": lambda **_: datasets.DatasetDict({"test": data}),
        "test_split": "test",
        "num_fewshot": 0,
    }


def _by_harness(
    folder: Path, named: Mapping[str, dict[str, Any]], limit: int | None
) -> dict[str, dict[str, list[float]]]:
    """Return by task and measure the value of each row."""
    from lm_eval import simple_evaluate  # type: ignore[import-untyped]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
    from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]

    device = str(choose_device("auto"))
    model = HFLM(pretrained=str(folder), dtype="float32", batch_size=8, device=device)
    found: dict[str, dict[str, list[float]]] = {}
    for task, config in named.items():
        results: Any = simple_evaluate(
            model=model,
            tasks=[config],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            apply_chat_template=task != "text",
            bootstrap_iters=0,
        )
        samples = sorted(results["samples"][task], key=lambda sample: int(sample["doc_id"]))
        of = found.setdefault(task, {})
        for sample in samples:
            for measure, value in _measured(sample).items():
                of.setdefault(measure, []).append(value)
    return found


def _measured(sample: Mapping[str, Any]) -> dict[str, float]:
    """Return the measures of a row that the harness has evaluated."""
    if "bits_per_byte" in sample:
        logp, size = sample["bits_per_byte"]
        return {"bits a byte": -logp / size / float(np.log(2))}
    return {
        f"{what}, {how}": float(np.mean(sample[f"{level}_level_{how}_acc"]))
        for level, what in (("inst", "share met"), ("prompt", "both met"))
        for how in ("strict", "loose")
    }


def _estimated(of: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the means by model, and the difference of the last from the first."""
    arrays = {name: np.array([values]) for name, values in of.items()}
    first, *_, last = arrays.values()
    found = {name: bootstrap(values)[0] for name, values in arrays.items()}
    difference = bootstrap(last - first)[0]
    return {name: v.to_json() for name, v in {**found, "difference": difference}.items()}
