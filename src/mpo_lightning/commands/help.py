"""Pages of help that one can read: what is needed first, a line or two a setting.

They are read from the source of what they describe, at once: the command line itself takes seconds
to be ready for its first argument.
"""

import ast
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mpo_lightning.commands.signatures import (
    Definition,
    Setting,
    definition,
    purposes_of,
    settings_of,
    source,
)

__all__ = ["OWN_OPTIONS", "RUN", "arguments_of", "function_settings", "page", "run_settings"]

RUN = "mpo_lightning.commands.run"
WATCHING = "mpo_lightning.commands.run_callbacks"
# What a command of LightningCLI cannot do without.
NEEDED = {
    "fit": ("model.policy.base", "data.train"),
    "validate": ("model.policy.base", "data.val", "ckpt_path"),
    "test": ("model.policy.base", "data.test", "ckpt_path"),
    "predict": ("model.policy.base", "data.predict", "ckpt_path", "predictions.path"),
}
TITLES = {
    "model": "the policy's training",
    "model.policy": "the model that is trained",
    "model.policy.lora": "its adapter",
    "data": "scored groups",
    "trainer": "Lightning's Trainer",
    "checkpoint": "what is saved, and when",
    "predictions": "what predict writes",
    "model.generation": "how predict answers prompts",
    "progress": "what is shown while it runs",
    "samples": "answers before and after, side by side",
    "health": "training-health warnings",
    "health.thresholds": "their thresholds",
    "": "of this command",
}
# Of Lightning's own settings, those that are worth a line, in our words; the others are named.
LIGHTNING = {
    "trainer": {
        "max_epochs": "passes over the training data",
        "max_steps": "optimizer steps at most; -1 for no limit",
        "accelerator": "auto, cpu, gpu or mps",
        "devices": "processes on each node: a number, a list of GPUs, or auto",
        "num_nodes": "nodes",
        "strategy": "auto, ddp, or a class such as mpo_lightning.strategy.FSDP2",
        "precision": "of the arithmetic",
        "accumulate_grad_batches": "batches whose gradients make one optimizer step",
        "gradient_clip_val": "largest norm of a step's gradient",
        "val_check_interval": "validate after this share (0.5) or number (500) of training batches",
        "limit_train_batches": "share (0.1) or number (10) of the training batches to use",
        "limit_val_batches": "the same of the validation batches",
        "log_every_n_steps": "optimizer steps between two rows of metrics; 50 if not set",
        "logger": "class or classes, such as WandbLogger; TensorBoard and CSV if not set",
        "callbacks": "list of classes, such as LearningRateMonitor",
        "default_root_dir": "folder of checkpoints and logs; the current one if not set",
    },
    "checkpoint": {
        "monitor": "metric that tells the best, such as val/loss",
        "mode": "min or max: what is best",
        "save_top_k": "how many of the best are kept; -1 for all",
        "save_last": "write last.ckpt, which --ckpt_path last goes on from",
        "every_n_train_steps": "optimizer steps between two checkpoints; an epoch if not set",
        "filename": "name of a file, such as {epoch}-{step}",
    },
    "": {
        "seed_everything": "seed of all random numbers; true draws one",
        "ckpt_path": "a checkpoint file, or last: the newest one of this run",
    },
}
OWN_OPTIONS = {
    "--config FILE": "settings in YAML; files and options are taken from left to right, and the "
    "later one wins",
    "--print_config": "print all settings as they would be, and stop",
    "--help_all": "every option with its type, Lightning's own included",
    "--model.loss.help CLASS": "the settings of a class: of a loss here, and likewise of "
    "model.loss.partition, model.optimizer, model.lr_scheduler, trainer.strategy, trainer.logger "
    "and trainer.callbacks",
}


def page(command: str, module: str, purpose: str) -> str | None:
    """The page of a command; none if its parser is to write it.

    Args:
        command: the command's name.
        module: the module that runs it.
        purpose: what it is for, in a line.
    """
    if module == RUN:
        return _run_page(command, purpose)
    settings = function_settings(command, module)
    function = definition(module, command)
    if settings is None or function is None:
        return None
    purposes = purposes_of(function)
    arguments = arguments_of(module)
    flags = [s for s in settings if s.name in _flags(module)]
    given = [s for s in settings if s.name in arguments]
    needed = [s for s in settings if s.default is None and s not in given]
    others = [s for s in settings if s not in [*given, *flags, *needed]]
    usage = " ".join(["usage: mpo-lightning", command, *(f"[{a.upper()}]" for a in arguments)])
    lines = [f"{usage} --SETTING VALUE ...", "", purpose, ""]
    lines += _rows([("--config FILE", "a YAML file of these settings")])
    for title, some in (("argument", given), ("What it needs", needed)):
        lines += ["", title, *_setting_rows(some)] if some else []
    for group in dict.fromkeys(s.name.rpartition(".")[0] for s in others):
        inside = [s for s in others if s.name.rpartition(".")[0] == group]
        title = f"{group}: {purposes[group].rstrip('.')}" if group else "what else there is"
        lines += ["", title, *_setting_rows(inside)]
    if flags:
        flag_rows = [(f"--{flag.name}", _text(flag)) for flag in flags]
        lines += ["", "without a value", *_rows(flag_rows)]
    return "\n".join(lines)


def function_settings(command: str, module: str) -> list[Setting] | None:
    """The settings of a command that calls a function of its name; none if it calls none.

    Args:
        command: the command's name.
        module: the module that runs it.
    """
    function = definition(module, command)
    if function is None or not isinstance(function.node, ast.FunctionDef):
        return None
    flags = _flags(module)
    settings = settings_of(function)
    return [replace(s, choices=()) if s.name in flags else s for s in settings]


def arguments_of(module: str) -> list[str]:
    """Names of the arguments that a command takes without a name before them.

    Args:
        module: the module that runs it.
    """
    return [
        call.args[0].value
        for call in _calls(module)
        if isinstance(call.func, ast.Attribute)
        and call.func.attr == "add_argument"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
        and not call.args[0].value.startswith("-")
    ]


def _flags(module: str) -> set[str]:
    """Names of the settings that a module takes without a value."""
    found = definition(module, "FLAGS")
    if found is None or not isinstance(found.node, ast.Assign):
        return set()
    return set(ast.literal_eval(found.node.value))


def _run_page(command: str, purpose: str) -> str:
    settings = run_settings(command)
    lines = [
        f"usage: mpo-lightning {command} --config FILE [--config FILE ...] [--SETTING VALUE ...]",
        "",
        purpose,
        "",
        "Every setting is a key of the file and an option: max_length under data is "
        "--data.max_length.",
        "",
        *_rows(list(OWN_OPTIONS.items())),
    ]
    needed = [s for name in NEEDED[command] for s in settings if s.name == name]
    lines += ["", "What it needs", *_rows([(s.name, _text(s)) for s in needed])]
    groups = {_group(s): TITLES.get(_group(s), "") for s in settings}
    for group in sorted(groups, key=[*TITLES, *groups].index):
        inside = [s for s in settings if s not in needed and _group(s) == group]
        if not inside:
            continue
        lines += ["", ": ".join(filter(None, (group, groups[group])))]
        lines += _group_rows(group, inside)
    return "\n".join(lines)


def _group(setting: Setting) -> str:
    return setting.name.rpartition(".")[0]


def _group_rows(group: str, settings: Sequence[Setting]) -> list[str]:
    if group not in LIGHTNING:
        return _setting_rows(settings)
    often = LIGHTNING[group]
    named = {s.name.rpartition(".")[2]: s for s in settings}
    rows = [replace(s, purpose=often[name]) for name, s in named.items() if name in often]
    rows.sort(key=lambda s: list(often).index(s.name.rpartition(".")[2]))
    rest = ", ".join(name for name in named if name not in often)
    return _setting_rows(rows) + (_wrapped("  also: ", rest) if rest else [])


# ---------------------------------------------------------------- what LightningCLI is given


def run_settings(command: str) -> list[Setting]:
    """The settings of fit, validate, test or predict, as commands/run.py gives them.

    Args:
        command: which of the four.
    """
    given = _Given()
    settings = []
    for group, found in given.groups.items():
        for setting in settings_of(found):
            name = f"{group}.{setting.name}"
            if name not in given.linked:
                default = given.defaults.get(name, setting.default)
                settings.append(replace(setting, name=name, default=default))
    seed = given.defaults["seed_everything"]
    settings.append(
        Setting(
            name="seed_everything",
            default=seed,
            purpose="",
            kind="bool | int",
            choices=(),
        )
    )
    trainer = given.groups["trainer"]
    assert isinstance(trainer.node, ast.ClassDef)
    (method,) = [
        each
        for each in trainer.node.body
        if isinstance(each, ast.FunctionDef) and each.name == command
    ]
    # The Trainer takes these from the settings above, but for `verbose`, which the command sets.
    passed = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
    passed.add("verbose")
    own = settings_of(Definition(method, trainer.module))
    return settings + [setting for setting in own if setting.name not in passed]


class _Given:
    """What the command line tells LightningCLI: classes, other defaults, linked settings."""

    def __init__(self) -> None:
        self.groups: dict[str, Definition] = {}
        self.defaults: dict[str, str] = {}
        self.linked: set[str] = set()
        for module, call in ((m, c) for m in (RUN, WATCHING) for c in _calls(m)):
            match call:
                case ast.Call(func=ast.Name(id="MPOCLI"), args=[model, data], keywords=keywords):
                    self._add(module, "model", model)
                    self._add(module, "data", data)
                    named = {each.arg: each.value for each in keywords}
                    for name, value in ast.literal_eval(named["trainer_defaults"]).items():
                        self.defaults[f"trainer.{name}"] = _as_yaml(value)
                    seed = ast.literal_eval(named["seed_everything_default"])
                    self.defaults["seed_everything"] = _as_yaml(seed)
                case ast.Call(
                    func=ast.Attribute(attr="add_lightning_class_args"),
                    args=[each, ast.Constant(value=str(group))],
                ):
                    self._add(module, group, each)
                case ast.Call(func=ast.Attribute(attr="set_defaults"), args=[values]):
                    for name, value in ast.literal_eval(values).items():
                        self.defaults[name] = _as_yaml(value)
                case ast.Call(
                    func=ast.Attribute(attr="link_arguments"),
                    args=[_, ast.Constant(value=str(target)), *_],
                ):
                    self.linked.add(target)
                case _:
                    pass
        trainer = definition("lightning.pytorch", "Trainer")
        assert trainer is not None
        self.groups["trainer"] = trainer

    def _add(self, module: str, group: str, named: ast.expr) -> None:
        found = definition(module, named.id) if isinstance(named, ast.Name) else None
        assert found is not None, f"{module} names a class of {group} that is not imported"
        self.groups[group] = found


def _calls(module: str) -> Iterator[ast.Call]:
    for node in ast.walk(source(module)):
        if isinstance(node, ast.Call):
            yield node


def _as_yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---------------------------------------------------------------------------------- layout

LONGEST = 100


def _setting_rows(settings: Sequence[Setting]) -> list[str]:
    cells = []
    for setting in settings:
        default = "" if setting.default in {None, "null"} else f" = {setting.default}"
        cells.append((setting.name.rpartition(".")[2] + default, _text(setting)))
    return _rows(cells)


def _text(setting: Setting) -> str:
    """What it is for in a sentence, and the values that there are if that does not tell them."""
    text = setting.purpose.replace("`", "").split(". ")[0].rstrip(".")
    while len(text) > LONGEST and (cut := max(text.rfind("; "), text.rfind(": "))) > 0:
        text = text[:cut]
    if setting.choices in {(), ("true", "false")} or all(c in text for c in setting.choices):
        return text
    return f"{text} ({' | '.join(setting.choices)})"


def _rows(cells: Sequence[tuple[str, str]]) -> list[str]:
    """Names and purposes in two columns; a long name has its purpose below."""
    width = min(max(len(name) for name, _ in cells), 31) + 4
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
