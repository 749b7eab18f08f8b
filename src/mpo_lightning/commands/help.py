"""Pages of help: what is needed first, and one or two lines for each setting.

They are made from ``help.jsonl`` without importing what they describe, which takes seconds.
"""

import shutil
import textwrap
from collections.abc import Iterable, Sequence

from mpo_lightning.commands.help_data import Page, Setting, parts_of, read_pages
from mpo_lightning.commands.names import COMMANDS, RUN

__all__ = ["RUN_OPTIONS", "page_of"]

# Settings that a command of LightningCLI cannot do without.
NEEDED = {
    "fit": ("model.policy.base", "data.train"),
    "validate": ("model.policy.base", "data.val", "ckpt_path"),
    "test": ("model.policy.base", "data.test", "ckpt_path"),
    "predict": ("model.policy.base", "data.predict", "ckpt_path", "predictions.path"),
}
# Lightning's settings that get a line of their own, in our words; the others are only named.
LIGHTNING = {
    "trainer": {
        "max_epochs": "passes over the training data",
        "max_steps": "maximum number of optimizer steps; -1 for no limit",
        "accelerator": "auto, cpu, gpu or mps",
        "devices": "processes on each node: a number, a list of GPUs, or auto",
        "num_nodes": "number of nodes",
        "strategy": "auto, ddp, or a class such as mpo_lightning.strategy.FSDP2",
        "precision": "precision of the computation",
        "accumulate_grad_batches": "batches whose gradients make one optimizer step",
        "gradient_clip_val": "maximum gradient norm of a step",
        "val_check_interval": "validate after this share (0.5) or number (500) of training batches",
        "limit_train_batches": "share (0.1) or number (10) of the training batches to use",
        "limit_val_batches": "share (0.1) or number (10) of the validation batches to use",
        "log_every_n_steps": "optimizer steps between two rows of metrics; defaults to 50",
        "logger": "class or classes, such as WandbLogger; defaults to TensorBoard and CSV",
        "callbacks": "list of classes, such as LearningRateMonitor",
        "default_root_dir": "folder of checkpoints and logs; defaults to the current one",
    },
    "checkpoint": {
        "monitor": "metric that decides which checkpoint is best, such as val/loss",
        "mode": "min or max: whether the best value is the lowest or the highest",
        "save_top_k": "number of best checkpoints to keep; -1 for all",
        "save_last": "write last.ckpt, from which --ckpt_path last resumes",
        "every_n_train_steps": "optimizer steps between checkpoints; defaults to an epoch",
        "filename": "file name, such as {epoch}-{step}",
    },
    "": {
        "seed_everything": "seed of all random number generators; true draws one",
        "ckpt_path": "a checkpoint file, or last: the newest one of this run",
    },
}
FILE_OPTIONS = {
    "--config FILE": "a YAML file of these settings; options override it",
    "--print_config": "print all settings and exit",
}
RUN_OPTIONS = {
    "--config FILE": "a YAML file of settings; files and options apply from left to right, and "
    "later ones override earlier ones",
    "--print_config": "print all settings and exit",
    "--help_all": "list every option with its type, Lightning's own included",
    "--model.loss.help CLASS": "list the settings of a class: here of a loss, likewise of "
    "model.loss.partition, model.optimizer, model.lr_scheduler, trainer.strategy, trainer.logger "
    "and trainer.callbacks",
}
# Longest text of a setting, in characters, where there is a place to cut it.
LONGEST = 100


def page_of(command: str, part: str = "") -> str:
    """Return the page of a command.

    Args:
        command: name of the command.
        part: name of its part, such as ``check`` of ``data``; another word is ignored.
    """
    parts = parts_of(command)
    if COMMANDS[command].module == RUN:
        return _run_page(command, read_pages()[command])
    if parts and part not in parts:
        usage = f"usage: mpo-lightning {command} {{{','.join(parts)}}} ..."
        rows = _rows([(name, page.purpose) for name, page in parts.items()])
        first = next(iter(parts))
        more = f"mpo-lightning {command} {first} --help lists the settings of {first}."
        return "\n".join([usage, "", COMMANDS[command].purpose, "", *rows, "", more])
    name = f"{command} {part}" if parts else command
    return _page(name, read_pages()[name])


def _page(name: str, page: Page) -> str:
    settings = page.settings.values()
    placed = [setting for setting in settings if setting.usage]
    needed = [s for s in settings if s.required and not s.usage]
    flags = [setting for setting in settings if setting.flag]
    others = [s for s in settings if s not in (*placed, *needed, *flags)]
    words = [f"usage: mpo-lightning {name}", *(setting.usage for setting in placed)]
    if needed or others:
        words.append("--SETTING VALUE ..." if needed else "[--SETTING VALUE ...]")
    words += [f"[--{flag.name}]" for flag in flags]
    lines = [*_wrapped("", " ".join(words)), ""]
    for line in page.purpose.splitlines():
        lines += _wrapped("", line)
    if page.file:
        lines += ["", *_rows(FILE_OPTIONS.items())]
    for title, some in (("Arguments", placed), ("Required settings", needed)):
        lines += ["", title, *_setting_rows(some)] if some else []
    for group in sorted({s.group for s in others}, key=[*page.groups, ""].index):
        title = f"{group}: {page.groups[group].rstrip('.')}" if group else "Other settings"
        lines += ["", title, *_setting_rows([s for s in others if s.group == group])]
    if flags:
        rows = [(f"--{flag.name}", _text(flag)) for flag in flags]
        lines += ["", "Flags, which take no value", *_rows(rows)]
    return "\n".join(lines)


def _run_page(command: str, page: Page) -> str:
    lines = [
        f"usage: mpo-lightning {command} --config FILE [--config FILE ...] [--SETTING VALUE ...]",
        "",
        page.purpose,
        "",
        "Every setting is a key of the file and an option: max_length under data is "
        "--data.max_length.",
        "",
        *_rows(RUN_OPTIONS.items()),
    ]
    needed = [page.settings[name] for name in NEEDED[command]]
    lines += ["", "Required settings", *_rows([(s.name, _text(_in_our_words(s))) for s in needed])]
    for group in [*(group for group in page.groups if group not in LIGHTNING), *LIGHTNING]:
        inside = [s for s in page.settings.values() if s.group == group and s not in needed]
        title = f"{group}: {page.groups[group].rstrip('.')}" if group else "Seed and checkpoint"
        lines += ["", title, *_group_rows(group, inside)]
    return "\n".join(lines)


def _group_rows(group: str, settings: Sequence[Setting]) -> list[str]:
    if group not in LIGHTNING:
        return _setting_rows(settings)
    often = list(LIGHTNING[group])
    named = {setting.name.rpartition(".")[2]: setting for setting in settings}
    rows = _setting_rows([_in_our_words(named[name]) for name in often if name in named])
    rest = ", ".join(name for name in named if name not in often)
    return rows + (_wrapped("  also: ", rest) if rest else [])


def _in_our_words(setting: Setting) -> Setting:
    group, _, name = setting.name.rpartition(".")
    return setting._replace(purpose=LIGHTNING.get(group, {}).get(name, setting.purpose))


# ---------------------------------------------------------------------------------- layout


def _setting_rows(settings: Iterable[Setting]) -> list[str]:
    cells = []
    for setting in settings:
        default = "" if setting.default is None else f" = {setting.default}"
        cells.append((setting.name.rpartition(".")[2] + default, _text(setting)))
    return _rows(cells)


def _text(setting: Setting) -> str:
    """Return a setting's first sentence, its default in words, and values not yet mentioned."""
    text, *more = (part.rstrip(".") for part in setting.purpose.replace("`", "").split(". "))
    while len(text) > LONGEST and (cut := max(text.rfind("; "), text.rfind(": "))) > 0:
        text = text[:cut]
    default = next((part for part in more if part.startswith("Defaults to ")), "")
    text = f"{text}; d{default[1:]}" if default else text
    kinds = {kind for kind in setting.kinds if kind != "null"}
    if setting.choices not in {(), ("true", "false")}:
        told = all(choice in text for choice in setting.choices)
        return text if told else f"{text} ({' | '.join(setting.choices)})"
    if setting.default is None and len(kinds) == 1 and not kinds & {"a text", "a class"}:
        return f"{text} ({kinds.pop()})"
    return text


def _rows(cells: Iterable[tuple[str, str]]) -> list[str]:
    """Return names and texts in two columns; the text of a long name begins on the next line."""
    cells = list(cells)
    width = min(max((len(name) for name, _ in cells), default=0), 31) + 4
    lines = []
    for name, text in cells:
        start = f"  {name}".ljust(width)
        if len(start) > width:
            lines.append(start)
            start = " " * width
        lines += _wrapped(start, text)
    return lines


def _wrapped(start: str, text: str) -> list[str]:
    width = max(60, min(110, shutil.get_terminal_size().columns))
    return textwrap.wrap(
        text,
        width=width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_on_hyphens=False,
    ) or [start.rstrip()]
