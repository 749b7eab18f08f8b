"""The completion script, run by bash."""

import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from mpo_lightning import losses
from mpo_lightning.cli import main
from mpo_lightning.commands.completion import options_of
from mpo_lightning.commands.names import COMMANDS

BASH = shutil.which("bash")
# Words typed, the one to complete last, and the completions expected.
CASES: list[tuple[list[str], list[str]]] = [
    (["fi"], ["fit"]),
    (["ex"], ["export"]),
    (["export", "--mer"], ["--merged"]),
    (["export", "--chec"], []),
    ([""], list(COMMANDS)),
    (["cache", ""], ["show", "clear"]),
    (["data", "c"], ["check", "convert"]),
    (["study", "met"], ["methods"]),
    (["completion", ""], ["bash"]),
    (["fit", "--da"], ["--data."]),
    (["fit", "--data.tr"], ["--data.train", "--data.trust_remote_code"]),
    (["predict", "--model.policy.lo"], ["--model.policy.lora."]),
    (
        ["fit", "--model.policy.lora.use"],
        ["--model.policy.lora.use_rslora", "--model.policy.lora.use_dora"],
    ),
    (["fit", "--model.layout", "s"], ["shared", "separate"]),
    (["fit", "--model.layout", "="], ["auto", "continued", "shared", "separate"]),
    (["fit", "--model.layout", "=", "se"], ["separate"]),
    (["fit", "--model.loss", "MD"], ["MDPO"]),
    (["fit", "--model.loss.al"], ["--model.loss.alpha", "--model.loss.alpha_unit"]),
    (["fit", "--model.loss.partition", "Be"], ["BestRest"]),
    (["fit", "--data.schema", "Ultra"], ["UltraFeedback"]),
    (["fit", "--data.schema.le"], ["--data.schema.leaked_turns"]),
    (["fit", "--model.lr_scheduler.w"], ["--model.lr_scheduler.warmup"]),
    (["sample", "--print"], ["--print_config"]),
    (["export", "--merged"], ["--merged"]),
    (["fit", "--trainer.precision", "bf"], ["bf16-true", "bf16-mixed", "bf16"]),
    (["fit", "--config", "quick"], ["quick start.yaml", "quickstart.yaml"]),
    (["sample", "--model.quantization", "n"], ["none", "nf4"]),
    (["data", "split", "--form"], ["--format"]),
    (["data", "split", "--format", ""], ["jsonl", "parquet"]),
    (["data", "check", "--format"], []),
    (["data", "check", "--partition", "B"], ["BestRest"]),
    (["data", "check", "quick"], ["quick start.yaml", "quickstart.yaml"]),
    (["study", "methods", "--see"], ["--seeds"]),
    (["fit", "--nothing"], []),
]


@pytest.mark.skipif(BASH is None, reason="needs bash")
def test_bash_is_offered_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    (tmp_path / "completion.sh").write_text(capsys.readouterr().out, encoding="utf-8")
    for name in ("quickstart.yaml", "quick start.yaml"):
        (tmp_path / name).touch()
    lines = ["set -u", "source ./completion.sh", "complete -p mpo-lightning"]
    for words, _ in CASES:
        quoted = " ".join(f"'{word}'" for word in ["mpo-lightning", *words])
        lines += [
            f"COMP_WORDS=({quoted}); COMP_CWORD={len(words)}; _mpo_lightning",
            "printf '%s|' ${COMPREPLY[@]+\"${COMPREPLY[@]}\"}; echo",
        ]
    assert BASH is not None
    result = subprocess.run(
        [BASH, "--norc", "-c", "\n".join(lines)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    registered, *offered = result.stdout.splitlines()
    assert registered == "complete -F _mpo_lightning mpo-lightning"
    assert len(offered) == len(CASES)
    for (words, expected), line in zip(CASES, offered, strict=True):
        found = line.removesuffix("|").split("|") if line != "|" else []
        assert sorted(dict.fromkeys(found)) == sorted(expected), words


def test_all_losses_and_their_settings_are_known() -> None:
    options = options_of("fit")
    concrete = {
        name
        for name in losses.__all__
        if isinstance(kind := getattr(losses, name), type)
        and issubclass(kind, losses.SetLoss)
        and not getattr(kind, "__abstractmethods__", None)
    }
    assert set(options["--model.loss"]) == concrete
    for name in concrete:
        for setting in fields(getattr(losses, name)):
            assert f"--model.loss.{setting.name}" in options, (name, setting.name)
