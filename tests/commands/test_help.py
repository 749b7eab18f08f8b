"""Help that one can read: quick, complete, and true of the command line that there is."""

import subprocess
import sys
from typing import Any

import pytest
import yaml

from mpo_lightning.cli import main
from mpo_lightning.commands.help import RUN, run_settings
from mpo_lightning.commands.names import COMMANDS
from mpo_lightning.commands.signatures import definition, settings_of


@pytest.fixture(autouse=True)
def _plain_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])


def test_help_waits_for_nothing_heavy() -> None:
    """What is read from the source needs no torch; the others' parsers need no Lightning."""
    code = """
import sys
from mpo_lightning.cli import main
from mpo_lightning.commands.names import COMMANDS

def loaded(*names):
    return [name for name in names if name in sys.modules]

for command in ("fit", "validate", "test", "predict", "sample", "score", "export"):
    main([command, "--help"])
    assert not loaded("torch", "numpy", "jsonargparse"), command
for command in COMMANDS:
    try:
        main([command, "-h"])
    except SystemExit as stopped:
        assert stopped.code == 0, command
    heavy = loaded("lightning", "transformers", "peft", "datasets", "torchmetrics", "bitsandbytes")
    assert not heavy, (command, heavy)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage: mpo-lightning fit --config FILE" in result.stdout
    assert "usage: mpo-lightning study" in result.stdout
    assert "groups_per_batch           groups (prompts) of a step on one process" in result.stdout


def test_a_page_may_be_cut_short() -> None:
    command = f"{sys.executable} -m mpo_lightning fit --help | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("usage: mpo-lightning fit")
    assert result.stderr == ""


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Printed settings by their dotted names; a class is one of them."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict) and "class_path" not in value:
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_the_page_has_the_settings_that_there_are(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and defaults as LightningCLI has them, whose parser knows nothing of the page."""
    with pytest.raises(SystemExit):
        main([command, "--model.policy.base=x", "--print_config"])
    printed = leaves(yaml.safe_load(capsys.readouterr().out))
    page = {setting.name: setting for setting in run_settings(command)}
    assert set(page) == set(printed)
    compared = 0
    for name, value in printed.items():
        default = page[name].default
        if name == "model.policy.base":
            assert default is None
        elif isinstance(value, dict):
            assert value["class_path"].rsplit(".")[-1] in (default or "")
        else:
            assert yaml.safe_load(default or "null") == value, name
            compared += 1
    assert compared > 80
    main([command, "--help"])
    shown = capsys.readouterr().out
    assert all(name.rpartition(".")[2] in shown for name in printed)


def test_choices_and_purposes_are_those_of_the_source() -> None:
    settings = {setting.name: setting for setting in run_settings("fit")}
    assert settings["model.layout"].choices == ("auto", "shared", "separate")
    assert settings["data.trust_remote_code"].choices == ("true", "false")
    assert settings["model.policy.lora.r"].purpose == "rank."
    assert settings["data.max_length"].purpose == "limit on prompt + response, in tokens."


@pytest.mark.parametrize("command", ["sample", "score", "compare", "export"])
def test_a_function_is_described_by_its_own_docstring(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    function = definition(COMMANDS[command].module, command)
    assert function is not None
    settings = settings_of(function)
    assert all(setting.purpose for setting in settings)
    main([command, "--help"])
    shown = capsys.readouterr().out
    assert "default_factory" not in shown
    assert (shown.index("  out  ") < shown.index("what else there is")) == (command != "compare")
    assert all(setting.name.rpartition(".")[2] in shown for setting in settings)


def test_everything_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help_all"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--trainer.barebones {true,false}" in shown
    assert "--data.groups_per_batch" in shown
    with pytest.raises(SystemExit):
        main(["fit", "--model.loss.help=MPO"])
    assert "--model.loss.alpha" in capsys.readouterr().out
    assert {COMMANDS[name].module for name in ("fit", "validate", "test", "predict")} == {RUN}
