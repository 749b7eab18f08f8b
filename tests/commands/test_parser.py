"""What settings mean: null, keys that come twice, classes that are replaced, paths."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from jsonargparse import ArgumentParser, Namespace, capture_parser

from mpo_lightning import PreferenceDataModule
from mpo_lightning.commands import run
from mpo_lightning.commands.functions import main as call_function


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """The parser of fit, validate, test and predict."""
    with patch("sys.argv", ["mpo-lightning", "fit"]):
        return capture_parser(lambda: run.main(["fit"]))


@pytest.fixture
def parse(
    parser: ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Parse arguments of fit in an empty folder; ``text`` is the content of the first --config."""
    monkeypatch.chdir(tmp_path)

    def parse(*args: str, text: str = "", command: str = "fit") -> Any:
        Path("c.yaml").write_text(text or "{}", encoding="utf-8")
        given = [command, "--config", "c.yaml", "--model.policy.base", "b", *args]
        return parser.parse_args(given)[command]

    return parse


@pytest.fixture
def refused(parse: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Parse arguments that are refused, and return the message."""

    def refused(*args: str, **more: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            parse(*args, **more)
        assert stopped.value.code == 2
        return capsys.readouterr().err.strip().removeprefix("error: ")

    return refused


# ------------------------------------------------------------------------------------------ null


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {policy: {quantization: null}}",
            "model.policy.quantization must be none, nf4 or int8, got null (in c.yaml). Did you "
            "mean none?",
        ),
        (
            "data: {normalize_scores: null}",
            "data.normalize_scores must be none, z-score or rank, got null (in c.yaml). Did you "
            "mean none?",
        ),
        (
            "data: {over_long: ~}",
            "data.over_long must be drop_group, drop_response, cut or error, got null (in c.yaml).",
        ),
        (
            "model: {layout: null}",
            "model.layout must be auto, shared, continued or separate, got null*",
        ),
        ("data: {max_length: null}", "data.max_length must be a whole number, got null (in c*"),
        ("data: {seed: null}", "data.seed must be a whole number, got null (in c.yaml)."),
        ("model: {policy: {lora: {r: null}}}", "model.policy.lora.r must be a whole number*"),
        ("model: {policy: {fast_linear: null}}", "model.policy.fast_linear must be true or*"),
        ("model: {loss: null}", "model.loss must be DPO, *, got null (in c.yaml)."),
        (
            "model: {loss: {class_path: MPO, init_args: {beta: null}}}",
            "model.loss.beta must be a number, got null (in c.yaml).",
        ),
        (
            "data: {schema: {class_path: UltraFeedback, init_args: {score: null}}}",
            "data.schema.score must be overall or aspects, got null (in c.yaml).",
        ),
        ("predictions: {format: null}", "predictions.format must be auto, *, got null*"),
        ("data: null", "data: null in the place of its settings. Leave it out."),
        ("model: {policy: {lora: null}}", "model.policy.lora: null in the place of its*"),
    ],
)
def test_null_is_no_other_value(refused: Callable[..., str], text: str, message: str) -> None:
    start, _, end = message.partition("*")
    found = refused(text=text)
    assert found.startswith(start)
    assert found.endswith(end.rpartition("*")[2])


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_null_is_refused_by_every_command(refused: Callable[..., str], command: str) -> None:
    assert "data.boundary must be" in refused(text="data: {boundary: null}", command=command)


def test_null_on_the_command_line_and_in_the_environment(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "got null" in refused("--data.no_contrast=null")
    loss = '{"class_path": "MPO", "init_args": {"deviation": null}}'
    assert "model.loss.deviation must be absolute or" in refused("--model.loss", loss)
    monkeypatch.setenv("MPO_LIGHTNING_FIT__DATA__NO_CONTRAST", "null")
    assert "(in MPO_LIGHTNING_FIT__DATA__NO_CONTRAST)" in refused()
    monkeypatch.setenv("MPO_LIGHTNING_FIT__DATA__NO_CONTRAST", "drop")
    monkeypatch.setenv("MPO_LIGHTNING_FIT__MODEL__LOSS", loss)
    assert "model.loss.deviation must be absolute or" in refused()


def test_null_in_the_file_of_a_group(refused: Callable[..., str]) -> None:
    Path("data.yaml").write_text("seed: null", encoding="utf-8")
    assert refused("--data", "data.yaml") == "data.seed must be a whole number, got null."


def test_null_where_a_setting_has_it(parse: Callable[..., Any]) -> None:
    text = (
        "model: {lr_scheduler: null, responses_per_pass: null}\n"
        "data: {schema: null, tokens_per_batch: null, cache: null}\n"
        "trainer: {max_epochs: null, logger: null, callbacks: null, max_time: null}\n"
    )
    parsed = parse(text=text)
    assert parsed.model.lr_scheduler is parsed.data.schema is parsed.trainer.max_epochs is None


def test_null_for_commands_that_are_functions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, text, expected in (
        ("sample", "n: null", "n must be a whole number, got null"),
        ("sample", "model: {dtype: null}", "model.dtype must be auto, float32, "),
        ("score", "reward_model: {input_format: null}", "reward_model.input_format must be auto"),
        ("compare", "resamples: null", "resamples must be a whole number, got null"),
        ("export", "onto: null", "onto must be full-precision or dequantized, got null"),
        ("export", "merged: null", "merged: must be true or false, got null."),
        ("export", "force: 'no'", "force: must be true or false, got no."),
    ):
        file = tmp_path / "c.yaml"
        file.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit):
            call_function([command, "--config", str(file)])
        assert capsys.readouterr().err.startswith(f"error: {expected}")


# ---------------------------------------------------------------------- keys that come twice


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model:\n  layout: auto\ndata:\n  max_length: 9\nmodel:\n  layout: shared\n",
            "c.yaml: model comes twice, in lines 1 and 5. Keep one of them.",
        ),
        (
            "model:\n  optimizer:\n    class_path: A\n    init_args:\n      lr: 1\n      lr: 2\n",
            "c.yaml: model.optimizer.init_args.lr comes twice, in lines 5 and 6. Keep one of them.",
        ),
        (
            '{"data": {"seed": 1, "seed": 2}}',
            "c.yaml: data.seed comes twice, in line 1. Keep one of them.",
        ),
        (
            "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args:\n"
            "      monitor: a\n      monitor: b\n",
            "c.yaml: trainer.callbacks[0].init_args.monitor comes twice, in lines 5 and 6. Keep "
            "one of them.",
        ),
    ],
)
def test_a_key_that_comes_twice(refused: Callable[..., str], text: str, message: str) -> None:
    assert refused(text=text) == message


def test_a_key_that_comes_twice_elsewhere(
    refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that is a value, in values of options and of the environment, in another file."""
    twice = "class_path: UltraFeedback\ninit_args:\n  score: overall\n  score: aspects\n"
    (tmp_path / "schema.yaml").write_text(twice, encoding="utf-8")
    expected = "schema.yaml: init_args.score comes twice, in lines 3 and 4. Keep one of them."
    assert refused("--data.schema", "schema.yaml") == expected
    assert refused(text="data: {schema: schema.yaml}") == expected
    text = "class_path: FSDP2\ninit_args:\n  timeout: 1\n  timeout: 2\n"
    (tmp_path / "strategy.yaml").write_text(text, encoding="utf-8")
    assert refused("--trainer.strategy", "strategy.yaml", "--data.seed=no") == (
        "strategy.yaml: init_args.timeout comes twice, in lines 3 and 4. Keep one of them."
    )
    loss = '{"class_path": "MPO", "init_args": {"beta": 1, "beta": 2}}'
    assert refused("--model.loss", loss).startswith("init_args.beta comes twice, in line 1.")
    assert refused("--data.columns", '{"a": "b", "a": "c"}').startswith("a comes twice")
    assert refused("--config", "{data: {seed: 1, seed: 2}}").startswith("data.seed comes twice")
    monkeypatch.setenv("MPO_LIGHTNING_FIT__MODEL__LOSS", loss)
    assert refused().startswith("init_args.beta comes twice, in line 1.")


def test_merged_keys_and_anchors_come_once(parse: Callable[..., Any]) -> None:
    text = (
        "model:\n  policy: &p\n    lora: &l {r: 4, lora_alpha: 8}\n"
        "  generation: {<<: {seed: 3, top_k: 5}, seed: 4}\n"
        "samples: {prompts: [&x one, *x, *x]}\n"
    )
    parsed = parse(text=text)
    assert (parsed.model.generation.seed, parsed.model.generation.top_k) == (4, 5)
    assert parsed.samples.prompts == ["one"] * 3


def test_a_text_may_look_like_a_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        call_function(
            [
                *["sample", "--prompts", "none.jsonl", "--out", "o", "--model.base", "b"],
                *["--system_prompt", "a: 1\na: 2"],
            ]
        )
    assert not capsys.readouterr().err


# --------------------------------------------------------------------- classes that are replaced

RECIPE = """
model:
  loss: {class_path: MPO, init_args: {beta: 0.5, alpha: 0.5}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.002, betas: [0.8, 0.9]}}
data:
  schema: {class_path: UltraFeedback, init_args: {empty: drop}}
"""


@pytest.mark.parametrize("by_file", [False, True])
def test_another_class_starts_from_its_defaults(
    parse: Callable[..., Any], capsys: pytest.CaptureFixture[str], by_file: bool
) -> None:
    names = {"model.loss": "SimPO", "model.optimizer": "torch.optim.SGD", "data.schema": "Nectar"}
    if by_file:
        Path("over.yaml").write_text(
            "model: {loss: SimPO, optimizer: {class_path: torch.optim.SGD}}\n"
            "data: {schema: {class_path: Nectar, init_args: {leaked_turns: drop}}}\n",
            encoding="utf-8",
        )
        more = ["--config", "over.yaml"]
    else:
        more = [part for name, value in names.items() for part in (f"--{name}", value)]
        more += ["--data.schema.leaked_turns", "drop"]
    parsed = parse(*more, text=RECIPE)
    assert parsed.model.loss.init_args.beta == 0.1
    assert parsed.model.optimizer.init_args.lr == 0.001
    schema = parsed.data.schema.init_args
    assert (schema.empty, schema.leaked_turns) == ("error", "drop")
    told = capsys.readouterr().err.splitlines()
    assert sorted(told) == [
        "Nectar takes the place of UltraFeedback, whose settings are dropped (empty drop): Nectar "
        "has its own defaults, and what is set for it.",
        "SGD takes the place of AdamW, whose settings are dropped (lr 0.002, betas (0.8, 0.9)): "
        "SGD has its own defaults, and what is set for it.",
        "SimPO takes the place of MPO, whose settings are dropped (beta 0.5, alpha 0.5): SimPO has "
        "its own defaults, and what is set for it.",
    ]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ["--model.lr_scheduler.warmup=0.3", "--model.lr_scheduler=ConstantLR"],
            "ConstantLR takes the place of WarmupCosine, whose settings are dropped (warmup 0.3)",
        ),
        (
            [
                *["--model.loss.partition=TopBottom", "--model.loss.partition.k=3"],
                "--model.loss.partition=AboveQuantile",
            ],
            "AboveQuantile takes the place of TopBottom, whose settings are dropped (k 3)",
        ),
        (
            [
                *["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"],
                *["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=y"],
            ],
            "TensorBoardLogger takes the place of CSVLogger, whose settings are dropped (save_dir",
        ),
        (
            [
                "--trainer.strategy",
                '{"class_path": "DDPStrategy", "init_args": {"static_graph": true}}',
                "--trainer.strategy=ddp",
            ],
            "ddp takes the place of DDPStrategy, whose settings are dropped (static_graph True)",
        ),
        # The default has another rate than its class.
        (
            ["--model.optimizer=torch.optim.SGD"],
            "SGD takes the place of AdamW, whose settings are dropped (lr",
        ),
        # Nothing was set, or the class is the same by another name.
        (["--model.loss=SimPO"], ""),
        (["--model.loss.beta=3", "--model.loss=mpo_lightning.losses.sets.MPO"], ""),
    ],
    ids=str,
)
def test_what_is_dropped_is_told(
    parse: Callable[..., Any], capsys: pytest.CaptureFixture[str], more: list[str], told: str
) -> None:
    parse(*more)
    found = capsys.readouterr().err
    assert found.startswith(told)
    assert len(found.splitlines()) == bool(told)


def test_a_name_of_two_classes(refused: Callable[..., str]) -> None:
    message = refused("fit", "--model.lr_scheduler=ReduceLROnPlateau")
    assert message.startswith(
        "model.lr_scheduler: several classes are called ReduceLROnPlateau. Name one: "
    )
    assert "lightning.pytorch.cli.ReduceLROnPlateau" in message


def test_the_same_class_keeps_its_settings(parse: Callable[..., Any]) -> None:
    again = parse("--model.loss=mpo_lightning.losses.sets.MPO", text=RECIPE)
    assert again.model.loss.init_args.beta == 0.5


# ----------------------------------------------------------------------------------------- paths


def test_paths_in_a_file_are_relative_to_the_working_directory(
    parse: Callable[..., Any], tmp_path: Path
) -> None:
    """Also those of further files of settings."""
    Path("more").mkdir()
    Path("schema.yaml").write_text("{class_path: Nectar}", encoding="utf-8")
    Path("more/o.yaml").write_text("data: {schema: schema.yaml, train: t.jsonl}", encoding="utf-8")
    Path("more/data.yaml").write_text("{schema: schema.yaml, train: t.jsonl}", encoding="utf-8")
    for given in (["--config", "more/o.yaml"], ["--data", "more/data.yaml"]):
        parsed = parse(*given)
        assert parsed.data.schema.class_path.endswith("Nectar")
        assert parsed.data.train == "t.jsonl"
        assert Path.cwd() == tmp_path


def test_home_in_lightning_s_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parse: Callable[..., Any]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "trainer: {logger: [{class_path: CSVLogger, init_args: {save_dir: ~/logs}}]}"
    parsed = parse("--trainer.default_root_dir=~/run", "--ckpt_path=~/last.ckpt", text=text)
    for name in ("trainer", "ckpt_path"):
        parsed[name] = run._from_home(parsed[name])
    assert parsed.trainer.default_root_dir == f"{tmp_path}/run"
    assert parsed.ckpt_path == f"{tmp_path}/last.ckpt"
    assert parsed.trainer.logger[0].init_args.save_dir == f"{tmp_path}/logs"
    assert parsed.trainer.accelerator == "auto"


# ------------------------------------------------------------------------- hostile configurations


def write(name: str) -> None:
    """A function that a configuration names."""
    Path(name).touch()


TOUCH = "{class_path: os.system, init_args: {command: touch ran}}"
OPENED = "{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}"
WRITTEN = "{class_path: tests.commands.test_parser.write, init_args: {name: ran}}"
PLACES = {
    "optimizer": "model: {optimizer: %s}",
    "rate": "model: {optimizer: {class_path: SGD, init_args: {lr: %s}}}",
    "schedule": "model: {lr_scheduler: %s}",
    "function of a schedule": (
        "model: {lr_scheduler: {class_path: LambdaLR, init_args: {lr_lambda: %s}}}"
    ),
    "loss": "model: {loss: %s}",
    "partition": "model: {loss: {class_path: MPO, init_args: {partition: %s}}}",
    "schema": "data: {schema: %s}",
    "logger": "trainer: {logger: %s}",
    "callbacks": "trainer: {callbacks: [%s]}",
    "strategy": "trainer: {strategy: %s}",
    "plugins": "trainer: {plugins: [%s]}",
    "profiler": "trainer: {profiler: %s}",
    "text": "trainer: {default_root_dir: %s}",
    "duration": "trainer: {max_time: %s}",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("named", [TOUCH, OPENED, WRITTEN], ids=["os", "subprocess", "function"])
def test_only_what_a_setting_takes_is_called(
    place: str, named: str, refused: Callable[..., str]
) -> None:
    message = refused(text=PLACES[place] % named)
    assert message.splitlines()[-1].removeprefix("error: ").startswith(("model.", "data.", "train"))
    assert not Path("ran").exists()


def test_modules_that_run_code_are_named(refused: Callable[..., str]) -> None:
    message = refused(text="model: {lr_scheduler: os.system}")
    assert message == (
        "model.lr_scheduler: os.system is not allowed in settings: os can run any code."
    )


@pytest.mark.parametrize("named", [TOUCH, OPENED, WRITTEN], ids=["os", "subprocess", "function"])
@pytest.mark.parametrize(
    "place", ["data: {chat_template_kwargs: {a: %s}}", "data: {train: [{prompt: %s}]}"]
)
def test_what_may_be_any_value_stays_a_value(
    place: str, named: str, parse: Callable[..., Any], parser: ArgumentParser
) -> None:
    settings = parser.instantiate(Namespace(fit=parse(text=place % named), subcommand="fit"))
    assert isinstance(settings.fit.data, PreferenceDataModule)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [*a]", "c.yaml: what begins in line 1 contains itself."),
        ("model: &a\n  policy: *a", "c.yaml: what begins in line 1 contains itself."),
        ("model: &a {<<: *a}", "c.yaml: what begins in line 1 contains itself."),
        (
            "\n".join(
                ["a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
                + [
                    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
                    for before, name in pairwise("abcdefgh")
                ]
            ),
            "c.yaml: what begins in line 7 holds more than 1,000,000 values.",
        ),
        (f"a: {'[' * 3000}{']' * 3000}", "c.yaml: values are nested too deeply."),
        (
            f"trainer: {{max_steps: {'9' * 5000}}}",
            "c.yaml: a value cannot be read: Exceeds the limit (4300 digits) for integer string "
            "conversion: value has 5000 digits.",
        ),
        (
            f"trainer: {{max_steps: {'9' * 400}}}",
            "trainer.max_steps: must be finite, got a whole number of 1329 bits.",
        ),
        (
            "model: {optimizer: {class_path: AdamW, init_args: {lr: .nan}}}",
            "model.optimizer.lr: must be finite, got nan.",
        ),
        (
            "model: {optimizer: {class_path: AdamW, init_args: {betas: [.inf, 0.9]}}}",
            "model.optimizer.betas: must be finite, got inf.",
        ),
        (
            "trainer: {gradient_clip_val: .nan}",
            "trainer.gradient_clip_val: must be finite, got nan.",
        ),
        (
            "data: {train: !!python/object/apply:os.system [touch ran]}",
            "c.yaml, line 1, column 15: not YAML: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object/apply:os.system'.",
        ),
        (
            "data: {train: a\0}",
            "c.yaml: not YAML: special characters are not allowed at character 15.",
        ),
        ("- a", "c.yaml: found no settings; expected a mapping of them."),
    ],
    ids=lambda text: text[:20],
)
def test_yaml_that_cannot_be_used_is_refused_in_one_line(
    text: str, message: str, refused: Callable[..., str]
) -> None:
    assert refused(text=text) == message


@pytest.mark.parametrize("value", ["nan", ".inf", "1e400"])
def test_options_are_finite(value: str, refused: Callable[..., str]) -> None:
    assert "model.optimizer.lr" in refused(f"--model.optimizer.lr={value}")


def test_settings_in_another_encoding_are_refused_in_one_line(
    parser: ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes("data: {train: é}".encode("latin-1"))
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["fit", "--config", str(file)])
    expected = f"error: {file}: not UTF-8: invalid continuation byte at byte 14.\n"
    assert capsys.readouterr().err == expected
