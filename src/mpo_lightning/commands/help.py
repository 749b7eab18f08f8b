"""Pages of help: what is needed first, and one or two lines for each setting.

They are made from ``help.jsonl`` without importing what they describe, which takes seconds.
"""

import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable

from mpo_lightning.commands.help_data import Page, Setting, parts_of, read_pages
from mpo_lightning.commands.names import COMMANDS

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
    "trainer.max_epochs": "passes over the training data",
    "trainer.max_steps": "maximum number of optimizer steps; -1 for no limit",
    "trainer.accelerator": "auto, cpu, gpu or mps",
    "trainer.devices": "processes on each node: a number, a list of GPUs, or auto",
    "trainer.num_nodes": "number of nodes",
    "trainer.strategy": "auto, ddp, or a class such as mpo_lightning.strategy.FSDP2",
    "trainer.precision": "precision of the computation",
    "trainer.accumulate_grad_batches": "batches whose gradients make one optimizer step",
    "trainer.gradient_clip_val": "maximum gradient norm of a step",
    "trainer.val_check_interval": "share (0.5) or number (500) of batches between validations",
    "trainer.limit_train_batches": "share (0.1) or number (10) of the training batches to use",
    "trainer.limit_val_batches": "share (0.1) or number (10) of the validation batches to use",
    "trainer.log_every_n_steps": "optimizer steps between two rows of metrics; defaults to 50",
    "trainer.logger": "class or classes, such as WandbLogger; defaults to TensorBoard and CSV",
    "trainer.callbacks": "list of classes, such as LearningRateMonitor",
    "trainer.default_root_dir": "folder of checkpoints and logs; defaults to the current one",
    "checkpoint.monitor": "metric that decides which checkpoint is best, such as val/loss",
    "checkpoint.mode": "min or max: whether the best value is the lowest or the highest",
    "checkpoint.save_top_k": "number of best checkpoints to keep; -1 for all",
    "checkpoint.save_last": "write last.ckpt, from which --ckpt_path last resumes",
    "checkpoint.every_n_train_steps": "optimizer steps between checkpoints; defaults to an epoch",
    "checkpoint.filename": "file name, such as {epoch}-{step}",
    "seed_everything": "seed of all random number generators; true draws one",
    "ckpt_path": "a checkpoint file, or last: the newest one of this run",
}
FILE_OPTIONS = {
    "--config FILE": "a YAML file of these settings; files and options apply from left to right, "
    "and later ones override earlier ones",
    "--print_config": "print all settings and exit",
}
RUN_OPTIONS = {
    "--help_all": "list every option with its type, Lightning's own included",
    "--model.loss.help CLASS": "list the settings of a class: here of a loss, likewise of "
    "model.loss.partition, model.optimizer, model.lr_scheduler, trainer.strategy, trainer.logger "
    "and trainer.callbacks",
}
AS_OPTIONS = """

Every setting is an option with its group's name, --GROUP.SETTING VALUE, and a key of the file."""
# Longest text of a setting, in characters, where there is a place to cut it.
LONGEST = 100


def page_of(command: str, part: str = "") -> str:
    """Return the page of a command.

    Args:
        command: name of the command.
        part: name of its part, such as ``check`` of ``data``; another word is ignored.
    """
    parts = parts_of(command)
    if parts and part not in parts:
        usage, purpose = f"{{{','.join(parts)}}} ...", COMMANDS[command].purpose
        rows = {f"{name} --help": page.purpose for name, page in parts.items()}
        return _format(command, usage, purpose, {"parts, each with settings of its own": rows})
    name = f"{command} {part}" if parts else command
    return _page(name, read_pages()[name])


def _page(name: str, page: Page) -> str:
    settings = list(page.settings.values())
    placed = [setting for setting in settings if setting.usage]
    flags = [setting for setting in settings if setting.flag]
    needed = [page.settings[each] for each in NEEDED.get(name, ())]
    needed = needed or [each for each in settings if each.required and not each.usage]
    options = FILE_OPTIONS if page.file else {}
    if name in NEEDED:
        options = options | RUN_OPTIONS
    sections = {
        "options": options | {f"--{each.name}": _text(each) for each in flags},
        "arguments": _rows(placed),
        "required settings": {each.name: _text(each) for each in needed},
    }
    # Lightning's settings come last, most of them without a text.
    of_lightning = sorted({s.group for s in settings if s.name in LIGHTNING}, reverse=True)
    groups = [group for group in [*page.groups, ""] if group not in of_lightning]
    for group in [*groups, *of_lightning]:
        inside = [s for s in settings if s.group == group and s not in (*placed, *flags, *needed)]
        also = [s for s in inside if group in of_lightning and s.name not in LIGHTNING]
        title = f"{group} - {page.groups[group].rstrip('.')}" if group else "other settings"
        sections[title] = _rows(each for each in inside if each not in also)
        if also:
            sections[title]["also"] = ", ".join(each.name.rpartition(".")[2] for each in also)
    usage = [*(each.usage for each in placed), *(["[--config FILE ...]"] if page.file else [])]
    if len(settings) > len(placed) + len(flags):
        usage.append("--SETTING VALUE ..." if needed else "[--SETTING VALUE ...]")
    purpose = page.purpose + (AS_OPTIONS if page.groups else "")
    return _format(name, " ".join(usage), purpose, sections)


def _rows(settings: Iterable[Setting]) -> dict[str, str]:
    """Return the texts of settings by their names, without the group, and defaults."""
    return {
        each.name.rpartition(".")[2] + (f" = {each.default}" if each.default else ""): _text(each)
        for each in settings
    }


def _text(setting: Setting) -> str:
    """Return a setting's first sentence, its default in words, and values not yet mentioned."""
    purpose = LIGHTNING.get(setting.name, setting.purpose).replace("`", "")
    text, *more = (part.rstrip(".") for part in purpose.split(". "))
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


def _format(name: str, usage: str, purpose: str, sections: dict[str, dict[str, str]]) -> str:
    """Lay out a page with argparse."""

    class Formatter(RawDescriptionHelpFormatter):
        def __init__(self, prog: str) -> None:
            width = max(60, min(110, shutil.get_terminal_size().columns))
            super().__init__(prog, max_help_position=30, width=width)

    parser = ArgumentParser(
        usage=f"mpo-lightning {name} {usage}",
        description=purpose,
        formatter_class=Formatter,
        add_help=False,
    )
    for title, rows in sections.items():
        group = parser.add_argument_group(title)
        for row, text in rows.items():
            group.add_argument(row.lstrip("-"), metavar=row, help=text.replace("%", "%%"))
    return parser.format_help().rstrip()
