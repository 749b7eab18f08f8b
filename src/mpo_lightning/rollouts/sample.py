"""Sampling of responses to prompts, into a folder of parts."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import Any

from mpo_lightning.batch import Request
from mpo_lightning.checks import check_arguments
from mpo_lightning.data.conversation import CONTEXT, context_columns
from mpo_lightning.data.prompts import OF_RESPONSES, PromptSource
from mpo_lightning.data.report import DataReport
from mpo_lightning.errors import RolloutError
from mpo_lightning.generation.generate import Answers, Done, ModelSampler, Sample, Sampling
from mpo_lightning.generation.model import (
    ModelConfig,
    load_group_tokenizer,
    load_sampler,
    model_identity,
)
from mpo_lightning.generation.server import ServerConfig, ServerSampler
from mpo_lightning.rollouts.part_folder import PartFolder

__all__ = ["LESS_ROOM", "answered_row", "sample"]

LESS_ROOM = "what the model's context leaves, less than max_new_tokens"


def sample(
    *,
    prompts: str,
    out: str,
    model: ModelConfig = ModelConfig(),  # noqa: B008 (frozen)
    server: ServerConfig = ServerConfig(),  # noqa: B008 (frozen)
    system_prompt: str | None = None,
    responses_per_batch: int = 64,
    rows_per_part: int = 256,
    progress: bool = True,
    **sampling: Any,
) -> PartFolder:
    """Sample n responses to each prompt, from a model in this process or from a server.

    Run again after an interruption, it continues. Processes started by torchrun share the work.

    Args:
        prompts: .jsonl, .json, .csv, .tsv or .parquet file, folder of such files, saved data set or
            hub id, with a column ``prompt`` (or ``instruction``): a text or a list of messages.
            Other columns pass through.
        out: folder of the output.
        model: the model that answers.
        server: the server that answers instead of a model.
        system_prompt: system message for all conversations without one; it becomes part of
            ``prompt`` in the output.
        responses_per_batch: responses that are generated together (not by a server).
        rows_per_part: prompts in each file of the output; a killed run loses at most one part.
        progress: whether to show a progress bar.
        **sampling: settings of `Sampling`: ``n``, ``temperature``, ``seed`` and others.

    Raises:
        DataError: if the prompts cannot be used.
        PolicyError: if the model cannot be loaded.
        RolloutError: if a setting cannot be used, or sampling fails.
    """
    check_arguments(sample, locals())
    how = Sampling(**sampling)
    by_server = server.url is not None
    if by_server == (model.base is not None or model.adapter is not None):
        raise RolloutError("Name either a model (model.base, model.adapter) or a server.url.")
    source = PromptSource(prompts, system_prompt)
    settings: dict[str, Any] = {
        "prompts": source.source.digest,
        "system_prompt": system_prompt,
        **asdict(how),
    }
    load: Callable[[], ModelSampler | ServerSampler]
    if by_server:
        server_sampler = ServerSampler(server, how)
        # Without its address, which may change.
        settings["model"] = {"served": server_sampler.model}
        name, load = server_sampler.model, lambda: server_sampler
    else:
        settings["model"] = model_identity(model)
        settings["date"] = load_group_tokenizer(model).date
        settings["responses_per_batch"] = responses_per_batch
        name = " + ".join(part for part in (settings["model"]["base"], model.adapter) if part)
        load = cache(lambda: _sampler(dated, how, responses_per_batch, source))
    folder = PartFolder(out, "sample", settings, rows=len(source), rows_per_part=rows_per_part)
    dated = replace(model, date=folder.settings.get("date") or model.date)

    def make(start: int, stop: int, report: DataReport, done: Done) -> list[dict[str, Any]]:
        rows = source.rows(start, stop)
        answers = load()([request for request, _, _ in rows], done)
        made = (
            _row(request, row, answer, again=again, sampling=how, model=name, report=report)
            for (request, row, again), answer in zip(rows, answers, strict=True)
        )
        return [row for row in made if row is not None]

    folder.fill(make, title="Sampling", unit="prompt", progress=progress)
    return folder


def _sampler(
    model: ModelConfig, how: Sampling, responses_per_batch: int, source: PromptSource
) -> ModelSampler:
    """Load a sampler that has all tokens of the prompts."""
    sampler = load_sampler(model, how, responses_per_batch=responses_per_batch)
    sampler.check(request for request, _, _ in source.rows(0, len(source)))
    return sampler


def _row(
    request: Request,
    row: Mapping[str, object],
    answers: Answers,
    *,
    again: bool,
    sampling: Sampling,
    model: str,
    report: DataReport,
) -> dict[str, Any] | None:
    """Return the output row, or None if too few responses are left; count what was dropped."""
    source = request.source
    if answers.refused is not None:
        report.drop(answers.refused, source)
        return None
    report.note("prompts came before and are answered anew", source, int(again))
    for note in answers.notes:
        report.note(f"prompts answered from {note}", source)
    less = answers.limit is not None and answers.limit < sampling.max_new_tokens
    report.note(f"answered within {LESS_ROOM}", source, int(less))
    remaining = []
    for drawn in answers.samples:
        if drawn.finish not in {"stop", "length"}:
            report.note(f"responses dropped: ended for {drawn.finish}", source)
        elif drawn.is_dropped(sampling.special_tokens, source):
            report.note("responses dropped: special tokens in their midst", source)
        elif drawn.empty:
            report.note("responses dropped: empty", source)
        else:
            remaining.append(drawn)
    # Training needs two responses; with n = 1 the rows are not for training.
    if len(remaining) < min(2, sampling.n):
        report.drop("with too few responses left", source)
        return None
    for drawn in remaining:
        report.note("responses truncated", source, int(drawn.finish == "length"))
        report.note(
            "responses with special tokens in their midst, left out of the text",
            source,
            int(drawn.special_tokens > 0),
        )
        report.note(
            "responses with half characters, U+FFFD in their place",
            source,
            int(drawn.half_characters > 0),
        )
    report.note(
        "responses repeat another of their group",
        source,
        len(remaining) - len({json.dumps(drawn.response) for drawn in remaining}),
    )
    for column in OF_RESPONSES:
        report.note(f"rows whose own {column} are left out", source, int(column in row))
    report.keep(len(remaining))
    settings = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "seed")}
    return answered_row(request, row, remaining, {"model": model, **settings})


def answered_row(
    request: Request, row: Mapping[str, object], samples: Sequence[Sample], how: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the output row of a prompt's row; its other columns pass through.

    Args:
        request: the prompt.
        row: the row that holds it.
        samples: the responses.
        how: name of the model, and settings of sampling.
    """
    return {
        "prompt": request.prompt,
        "responses": [drawn.response for drawn in samples],
        "truncated": [drawn.finish == "length" for drawn in samples],
        **context_columns(request.template_arguments),
        **{k: v for k, v in row.items() if k not in ("prompt", *CONTEXT, *OF_RESPONSES)},
        "sampled": dict(how),
    }
