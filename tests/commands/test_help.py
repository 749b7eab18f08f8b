"""Pages of help are quick, complete, and those of the parsers."""

import subprocess
import sys
from typing import Any

import pytest
import yaml

from collect_help import collected
from mpo_lightning.cli import main
from mpo_lightning.commands.help_data import FILE, read_pages
from mpo_lightning.commands.names import COMMANDS, RUN


@pytest.fixture(autouse=True)
def _plain_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-lightning"])


PAGES = [*COMMANDS, "cache show", "cache clear", "data check", "data convert", "data split"]


def test_kept_pages_are_those_of_the_parsers() -> None:
    assert FILE.read_text(encoding="utf-8") == collected(), "run: make format"


def test_help_loads_nothing_heavy() -> None:
    code = f"""
import sys
from mpo_lightning.cli import main

for page in {PAGES}:
    main([*page.split(), "-h"])
    heavy = {{"torch", "numpy", "lightning", "jsonargparse"}} & set(sys.modules)
    assert not heavy, (page, heavy)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for page in PAGES:
        assert f"usage: mpo-lightning {page} " in result.stdout
    assert "  groups_per_batch            limit on the groups of a step on one" in result.stdout


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
    """Compared with the configuration that LightningCLI prints."""
    with pytest.raises(SystemExit):
        main([command, "--model.policy.base=x", "--print_config"])
    printed = leaves(yaml.safe_load(capsys.readouterr().out))
    page = read_pages()[command].settings
    assert set(page) == set(printed)
    compared = 0
    for name, value in printed.items():
        default = page[name].default
        if name == "model.policy.base":
            assert page[name].required
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
    settings = read_pages()["fit"].settings
    assert settings["model.layout"].choices == ("auto", "shared", "continued", "separate")
    assert settings["data.trust_remote_code"].choices == ("true", "false")
    assert settings["data.columns"].kinds == ("a mapping", "null")
    assert settings["model.policy.lora.r"].purpose == "rank."
    purpose = "limit on prompt + response, in tokens; the model's own, where that is lower."
    assert settings["data.max_length"].purpose == purpose
    # The run's folder decides it.
    assert "checkpoint.dirpath" not in settings


@pytest.mark.parametrize("page", [page for page in PAGES if page in read_pages()])
def test_a_page_names_every_setting(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = read_pages()[page].settings
    assert all(setting.purpose for setting in settings.values())
    main([*page.split(), "--help"])
    shown = capsys.readouterr().out
    assert all(name.rpartition(".")[2] in shown for name in settings)
    for name, setting in settings.items():
        if setting.required and not setting.usage:
            assert "\nrequired settings:" in shown.partition(f"\n  {name}  ")[0], name


def test_a_page_tells_arguments_flags_and_types(capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage: mpo-lightning export [CHECKPOINT] [--config FILE ...] --SETTING VALUE" in shown
    assert " --merged write the whole model" in shown
    assert " checkpoint = last a .ckpt file" in shown
    main(["data", "check", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "usage: mpo-lightning data check FILES ... [--SETTING VALUE ...]" in shown
    assert "(AboveMean | AboveQuantile | " in shown
    assert " max_length = 2048 limit" in shown
    assert " (a mapping) split split of a source" in shown


def test_help_of_a_command_with_parts_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "--help"])
    shown = capsys.readouterr().out
    assert "usage: mpo-lightning data {check,convert,split} ..." in shown
    assert "\n  split --help    Divide scored groups by prompt" in shown


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
