"""Damaged files: each kind of file, damaged in each way, read by each command that reads it.

``python -m tests.damage`` runs the whole matrix and prints it with its counts; ``--quick`` the part
that the tests run. A cell ends in one of these ways:

- refused: the command ends with one line that names the file;
- told: it goes on, and says of the file what it does not say of a sound one;
- remade: what was lost is made again, and the results are those of a sound file;
- silent: it goes on as if nothing were wrong;
- traceback: it ends with anything but an error that is meant for users.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.batch import GroupBatch
from mpo_lightning.cli import main
from mpo_lightning.digests import SUMS, seal, write_sums
from mpo_lightning.errors import UserError
from mpo_lightning.generation.generate import Sampling
from mpo_lightning.generation.model import ModelConfig, load_sampler
from mpo_lightning.losses import MPO
from mpo_lightning.model.loading import build_policy
from mpo_lightning.model.reference_cache import ReferenceCache
from tests.conftest import (
    example_rows,
    make_tokenizer,
    random_groups,
    tiny_config,
    tiny_model,
    write_rows,
)
from tests.runs import write_recipe
from tests.training.fits import make_trainer

LAST = "run/checkpoints/last.ckpt"
ADAPTER = "run/checkpoints/last-adapter"
STEP = "run/checkpoints/step=2"
SCORES = "--function=tests.damage:scores"
QUIET = "--progress=false"
REFERENCE = ["--model.reference=cached", "--model.reference_cache=references"]


def scores(prompt: Any, responses: list[Any]) -> list[float]:
    """Scores without a model."""
    return [float(len(str(response))) for response in responses]


# ---------------------------------------------------------------------------------- commands


def run(name: str, *options: str) -> list[str]:
    return [name, "--config=recipe.yaml", *options]


def fit_in_python() -> None:
    module, data = in_python()
    make_trainer(max_epochs=2).fit(module, data, ckpt_path=LAST)


def validate_in_python() -> None:
    module, data = in_python()
    make_trainer().validate(module, data, ckpt_path=LAST, verbose=False)


def in_python() -> tuple[MPOModule, PreferenceDataModule]:
    loss = MPO(beta=0.5, alpha=1.0)
    module = MPOModule(
        policy=PolicyConfig(base="base", lora=LoRA(r=4)), loss=loss, lr_scheduler=None
    )
    files = {"train": "train.jsonl", "val": "val.jsonl", "cache": "tokens"}
    return module, PreferenceDataModule(tokenizer="base", loss=loss, groups_per_batch=2, **files)


def load_in_python() -> None:
    policy = PolicyConfig(base="base", lora=LoRA(r=4))
    MPOModule.load_from_checkpoint(LAST, policy=policy, loss=MPO(beta=0.5, alpha=1.0))


def sampler_in_python() -> None:
    load_sampler(ModelConfig(adapter=ADAPTER), Sampling())


def policy_in_python() -> None:
    build_policy(PolicyConfig(base="merged", lora=LoRA(r=4)), "auto")


COMMANDS: dict[str, list[str] | Callable[[], None]] = {
    "fit": run("fit", f"--ckpt_path={LAST}"),
    "validate": run("validate", f"--ckpt_path={LAST}"),
    "test": run("test", f"--ckpt_path={LAST}", "--data.test=val.jsonl"),
    "predict": run("predict", f"--ckpt_path={LAST}", "--data.predict=val.jsonl"),
    "Trainer.fit": fit_in_python,
    "Trainer.validate": validate_in_python,
    "load_from_checkpoint": load_in_python,
    "export CKPT": ["export", LAST, "--out=new"],
    "export FOLDER": ["export", ADAPTER, "--out=new"],
    "export --merged": ["export", ADAPTER, "--merged", "--out=new"],
    "export again": ["export", ADAPTER, "--out=exported"],
    "export --merged again": [
        *("export", ADAPTER, "--merged", "--out=merged"),
        "--max_shard_size=40KB",
    ],
    "export elsewhere": ["export", "elsewhere", "--out=new"],
    "export --merged elsewhere": ["export", "elsewhere", "--merged", "--out=new"],
    "load_sampler": sampler_in_python,
}


def sample(*model: str, out: str = "new") -> list[str]:
    sampling = ["--n=2", "--max_new_tokens=2", "--rows_per_part=2", QUIET]
    return ["sample", "--prompts=prompts.jsonl", *model, f"--out={out}", *sampling]


COMMANDS |= {
    "sample adapter": sample(f"--model.adapter={ADAPTER}"),
    "sample exported": sample("--model.adapter=exported"),
    "sample elsewhere": sample("--model.adapter=elsewhere", "--model.base=base"),
    "sample merged": sample("--model.base=merged"),
    "sample again": sample("--model.base=base", out="samples"),
    "fit merged": run("fit", "--model.policy.base=merged", "--trainer.max_steps=1"),
    "PolicyConfig": policy_in_python,
    "score": ["score", "--data=samples", SCORES, "--out=new", QUIET],
    "score part": ["score", "--data=samples/part-00001.jsonl", SCORES, "--out=new", QUIET],
    "score again": [
        *("score", "--data=sound/samples", SCORES, "--out=scored", "--rows_per_part=2", QUIET),
    ],
    "compare": [
        *("compare", "--policy=samples", "--reference=sound/samples", SCORES),
        *("--resamples=100", QUIET),
    ],
    "compare scored": [
        *("compare", "--policy=sound/scored", "--reference=scored", SCORES),
        *("--resamples=100", QUIET),
    ],
    "predict samples": run(
        *("predict", "--data.predict=samples", "--data.predict_as=prompts"),
        "--model.generation.max_new_tokens=2",
    ),
    "fit scored": run("fit", "--data.train=scored", "--trainer.max_steps=1"),
    "validate scored": run("validate", "--data.val=scored"),
    "data check": ["data", "check", "scored"],
    "data convert": ["data", "convert", "scored", "--out=new.jsonl"],
    "fit tokens": run("fit", "--trainer.max_steps=1"),
    "validate tokens": run("validate", "--data.val=train.jsonl"),
    "cache show --tokens": ["cache", "show", "--tokens", "tokens"],
    "fit references": run("fit", "--trainer.max_steps=1", *REFERENCE),
    "validate references": run("validate", "--data.val=train.jsonl", *REFERENCE),
    "cache show": ["cache", "show", "references"],
}

# Commands that take a second or two, and those of them that the tests run.
SLOW = {
    name
    for name, does in COMMANDS.items()
    if not callable(does) and does[0] in {"fit", "validate", "test", "predict"}
}
ONCE = [
    *("fit", "validate", "test", "predict", "fit merged", "fit scored", "fit tokens"),
    *("predict samples", "validate references"),
]

# ----------------------------------------------------------------------------------- damages

Damage = Callable[[Path, Path], None]


def flip(at: float) -> Damage:
    """One bit, at a part of the file's length."""

    def damage(path: Path, other: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(at * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


def truncate(path: Path, other: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def zero(path: Path, other: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def lose(path: Path, other: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def lose_in_save(path: Path, other: Path) -> None:
    """A save was killed between its renames."""
    path.rename(path.with_name(f".{path.name}.old"))


def swap(path: Path, other: Path) -> None:
    """The same file of another step, shard, part or cache."""
    lose(path, other)
    (shutil.copytree if other.is_dir() else shutil.copy)(other, path)


def repeat_line(path: Path, other: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[-1]]))


def lose_line(path: Path, other: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:]))


def flip_in(chosen: Callable[[dict[str, Any]], torch.Tensor]) -> Damage:
    """A bit of a tensor in a checkpoint, where it stands in the file."""

    def damage(path: Path, other: Path) -> None:
        tensor = chosen(torch.load(path))
        content = path.read_bytes()
        at = content.index(tensor.contiguous().numpy().tobytes())
        changed = bytearray(content)
        changed[at + 1] ^= 1
        path.write_bytes(changed)

    return damage


def nan_in(chosen: Callable[[dict[str, Any]], torch.Tensor]) -> Damage:
    """NaN in a checkpoint that is sound otherwise."""

    def damage(path: Path, other: Path) -> None:
        content = torch.load(path)
        chosen(content)[0, 0] = torch.nan
        torch.save(content, path)
        seal(path)

    return damage


def nan_in_adapter(path: Path, other: Path) -> None:
    weights = load_file(path)
    next(iter(weights.values()))[0, 0] = torch.nan
    save_file(weights, path, metadata={"format": "pt"})
    if (path.parent / SUMS).is_file():
        write_sums(path.parent)


def weight(checkpoint: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = list(checkpoint["state_dict"].values())[1]
    return found


def moment(checkpoint: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = checkpoint["optimizer_states"][0]["state"][1]["exp_avg"]
    return found


LOST: dict[str, Damage] = {
    "truncated": truncate,
    "empty": empty,
    "zeroed": zero,
    "missing": lose,
}
CHANGED: dict[str, Damage] = {"bit, first": flip(0.02), "bit": flip(0.5), "bit, last": flip(0.98)}
SWAPPED: dict[str, Damage] = {"swapped": swap}
LINES: dict[str, Damage] = {"line twice": repeat_line, "line less": lose_line}
OF_CHECKPOINT: dict[str, Damage] = {
    "bit of a weight": flip_in(weight),
    "bit of a moment": flip_in(moment),
    "NaN weight": nan_in(weight),
    "NaN moment": nan_in(moment),
}
ANY = {**CHANGED, **LOST}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file.

    Args:
        path: the file.
        other: what it is swapped with.
        damages: the ways in which it is damaged.
        commands: those that read it.
        names: what a message may name it by, beside the file's own name.
        lenient: damages that a command need not refuse, and how such a cell ends.
    """

    path: str
    other: str = ""
    damages: dict[str, Damage]
    commands: Sequence[str]
    names: Sequence[str] = ()
    lenient: dict[str, str] = field(default_factory=dict)


ON_CHECKPOINT = ["fit", "validate", "test", "predict", "Trainer.fit", "Trainer.validate"]
ON_ADAPTER = ["export FOLDER", "export CKPT", "export --merged", "sample adapter", "load_sampler"]
ON_EXPORTED = ["export again", "sample exported"]
ON_MERGED = ["export --merged again", "sample merged", "fit merged", "PolicyConfig"]
ON_SAMPLES = ["score", "compare", "sample again", "predict samples", "score part"]
ON_SCORED = [
    *("fit scored", "score again", "validate scored", "compare scored"),
    *("data check", "data convert"),
]
ON_TOKENS = ["fit tokens", "cache show --tokens", "validate tokens"]
ON_REFERENCES = ["fit references", "cache show", "validate references"]

KINDS: dict[str, Kind] = {
    "checkpoint": Kind(
        path=LAST,
        other=f"{STEP}.ckpt",
        damages={**ANY, **OF_CHECKPOINT, **SWAPPED},
        commands=[*ON_CHECKPOINT, "export CKPT", "load_from_checkpoint"],
        # Another checkpoint, sound by itself.
        lenient={"swapped": "told"},
    ),
    "adapter weights": Kind(
        path=f"{ADAPTER}/adapter_model.safetensors",
        other=f"{STEP}-adapter/adapter_model.safetensors",
        damages={**ANY, "NaN weight": nan_in_adapter, **SWAPPED},
        commands=ON_ADAPTER,
    ),
    **{
        f"adapter {name}": Kind(path=f"{ADAPTER}/{name}", damages=ANY, commands=ON_ADAPTER)
        for name in ("adapter_config.json", "training.json", "tokenizer.json", SUMS)
    },
    "adapter folder": Kind(
        path=ADAPTER,
        other=f"{STEP}-adapter",
        damages={"missing": lose, **SWAPPED},
        commands=ON_ADAPTER,
        lenient={"swapped": "told"},
    ),
    "other folder beside": Kind(
        path=ADAPTER,
        other=f"{STEP}-adapter",
        damages=SWAPPED,
        commands=ON_CHECKPOINT,
        lenient={"swapped": "told"},
    ),
    "folder lost in a save": Kind(
        path=ADAPTER,
        damages={"missing": lose_in_save},
        commands=ON_CHECKPOINT,
        lenient={"missing": "told"},
    ),
    "PEFT adapter weights": Kind(
        path="elsewhere/adapter_model.safetensors",
        damages={**LOST, "NaN weight": nan_in_adapter},
        commands=["export elsewhere", "sample elsewhere", "export --merged elsewhere"],
    ),
    "PEFT adapter config": Kind(
        path="elsewhere/adapter_config.json",
        damages=LOST,
        commands=["export elsewhere", "sample elsewhere", "export --merged elsewhere"],
    ),
    "exported weights": Kind(
        path="exported/adapter_model.safetensors",
        other=f"{STEP}-adapter/adapter_model.safetensors",
        damages={**ANY, **SWAPPED},
        commands=ON_EXPORTED,
    ),
    **{
        f"exported {name}": Kind(
            path=f"exported/{name}", damages=ANY, commands=ON_EXPORTED, names=["exported"]
        )
        for name in ("adapter_config.json", "export.json", SUMS)
    },
    "merged shard": Kind(
        path="merged/model-00002-of-00003.safetensors",
        other="merged/model-00001-of-00003.safetensors",
        damages={**ANY, **SWAPPED},
        commands=ON_MERGED,
    ),
    **{
        f"merged {name}": Kind(
            path=f"merged/{name}", damages=ANY, commands=ON_MERGED, names=["merged"]
        )
        for name in ("model.safetensors.index.json", "config.json", SUMS)
    },
    "sampled rows": Kind(
        path="samples/part-00001.jsonl",
        other="samples/part-00000.jsonl",
        damages={**ANY, **LINES, **SWAPPED},
        commands=ON_SAMPLES,
        lenient={"missing": "remade"},
    ),
    **{
        f"sampled {name}": Kind(
            path=f"samples/{name}",
            other=f"samples/{name.replace('00001', '00000')}",
            damages={**ANY, **(SWAPPED if "part" in name else {})},
            commands=ON_SAMPLES,
            names=["samples/part-00001", "samples/settings.json"],
        )
        for name in ("part-00001.report.json", "part-00001.sha256", "settings.json")
    },
    "scored rows": Kind(
        path="scored/part-00001.jsonl",
        other="scored/part-00000.jsonl",
        damages={**ANY, **LINES, **SWAPPED},
        commands=ON_SCORED,
        lenient={"missing": "remade"},
    ),
    "scored settings": Kind(
        path="scored/settings.json", damages=ANY, commands=ON_SCORED, names=["scored: holds other"]
    ),
    **{
        f"token {name}": Kind(
            path=f"tokens/TRAIN/{name}",
            other=f"tokens/VAL/{name}",
            damages={**ANY, **SWAPPED},
            commands=ON_TOKENS,
        )
        for name in ("data-00000-of-00001.arrow", "report.json")
    },
    f"token {SUMS}": Kind(path=f"tokens/TRAIN/{SUMS}", damages=ANY, commands=ON_TOKENS),
    "reference shard": Kind(
        path="references/*/responses-*.parquet",
        other="others/*/responses-*.parquet",
        damages={"bit": flip(0.3), **LOST, **SWAPPED},
        commands=ON_REFERENCES,
        # A shard that is not there is one that was never written.
        lenient={"missing": "remade"},
    ),
    "reference cache.json": Kind(
        path="references/*/cache.json",
        other="others/*/cache.json",
        damages={**CHANGED, **LOST, **SWAPPED},
        commands=ON_REFERENCES,
    ),
}


# ------------------------------------------------------------------------------------- world


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, as the command line of a program that was given no arguments."""
    before, argv = Path.cwd(), sys.argv
    os.chdir(folder)
    sys.argv = ["mpo-lightning"]
    try:
        yield
    finally:
        os.chdir(before)
        sys.argv = argv


def build(folder: Path) -> Path:
    """Make one tiny run and all that comes of it: each kind of file, sound."""
    folder.mkdir()
    with inside(folder):
        tiny_model(tiny_config(hidden_size=16, intermediate_size=32)).save_pretrained("base")
        make_tokenizer().save_pretrained("base")
        rows = example_rows(6)
        write_rows(Path("train.jsonl"), rows)
        write_rows(Path("val.jsonl"), example_rows(2, seed=1))
        write_rows(Path("prompts.jsonl"), [{"prompt": row["prompt"]} for row in rows])
        write_recipe(
            Path(),
            "base",
            "train.jsonl",
            trainer={"logger": False, "default_root_dir": "run", "max_epochs": 2},
            model={"lr_scheduler": None},
            data={"val": "val.jsonl", "cache": "tokens", "num_proc": 1},
        )
        steps = ["--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1"]
        main(run("fit", "--trainer.max_epochs=1", *steps, "--checkpoint.filename={step}"))
        main(
            run("fit", *REFERENCE, "--trainer.max_steps=1", "--trainer.enable_checkpointing=false")
        )
        other = ReferenceCache("others", {"model": "another"})
        batch = GroupBatch.from_groups(random_groups([(3, [2, 2])]))
        other.add(batch, torch.tensor([[-1.0, -2.0]]))
        other.flush()
        for name in ("export again", "export --merged again"):
            main(list(COMMANDS[name]))  # type: ignore[arg-type]
        build_policy(PolicyConfig(base="base", lora=LoRA(r=4)), "auto").save_adapter(
            Path("elsewhere")
        )
        make_tokenizer().save_pretrained("elsewhere")
        main(sample("--model.base=base", out="samples"))
        Path("sound").mkdir()
        shutil.copytree("samples", "sound/samples")
        main(list(COMMANDS["score again"]))  # type: ignore[arg-type]
        shutil.copytree("scored", "sound/scored")
    return folder


def find(folder: Path, pattern: str) -> Path:
    """The file of a kind; token ids are in the folder whose report names their source."""
    for word, source in (("TRAIN", "train.jsonl"), ("VAL", "val.jsonl")):
        if word in pattern:
            reports = (folder / "tokens").glob("*/report.json")
            (report,) = (path for path in reports if source in path.read_text(encoding="utf-8"))
            pattern = pattern.replace(word, report.parent.name)
    (found,) = folder.glob(pattern)
    return found


# ------------------------------------------------------------------------------------- cells


@dataclass(frozen=True)
class Ended:
    """How a command ended, what it said, and the files that it left."""

    error: BaseException | None
    text: str
    results: dict[str, bytes]

    @property
    def message(self) -> str:
        """The error as a user sees it."""
        if isinstance(self.error, SystemExit) and not isinstance(self.error.code, str):
            return self.text
        return str(self.error)


def ended(folder: Path, command: str) -> Ended:
    """Run a command."""
    does = COMMANDS[command]
    output, error = io.StringIO(), None
    with (
        inside(folder),
        redirect_stdout(output),
        redirect_stderr(output),
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        try:
            if callable(does):
                does()
            else:
                main(list(does))
        except (Exception, SystemExit) as raised:
            error = raised
    text = "\n".join([output.getvalue(), *(str(each.message) for each in warned)])
    left = [p for name in ("new", "samples", "scored") for p in (folder / name).rglob("*")]
    left += [folder / ADAPTER / "adapter_model.safetensors", folder / "new.jsonl"]
    results = {str(p.relative_to(folder)): p.read_bytes() for p in left if p.is_file()}
    return Ended(error, text, results)


class Matrix:
    """The matrix over one world.

    Args:
        world: the folder of sound files.
        scratch: the folder that each cell has its own copy at.
    """

    def __init__(self, world: Path, scratch: Path) -> None:
        self.world = world
        self.scratch = scratch
        self._sound: dict[str, Ended] = {}

    def _copy(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.copytree(self.world, self.scratch)

    def sound(self, command: str) -> Ended:
        """A command over sound files, which must succeed."""
        if command not in self._sound:
            self._copy()
            found = ended(self.scratch, command)
            assert found.error is None, f"{command}: {found.error!r}"
            self._sound[command] = found
        return self._sound[command]

    def cell(self, name: str, damage: str, command: str) -> tuple[str, str]:
        """How a command over a damaged file ends, and what was said."""
        kind = KINDS[name]
        self._copy()
        path = find(self.scratch, kind.path)
        other = find(self.scratch, kind.other) if kind.other else path
        kind.damages[damage](path, other)
        found = ended(self.scratch, command)
        names = (path.name, *kind.names)

        def names_it(line: str) -> bool:
            return any(each in line for each in names)

        if found.error is None:
            sound = self.sound(command)
            said = set(found.text.splitlines()) - set(sound.text.splitlines())
            told = [line for line in said if names_it(line)]
            if told:
                return "told", told[0]
            if kind.lenient.get(damage) == "remade" and found.results == sound.results:
                return "remade", ""
            return "silent", ""
        for_users = isinstance(found.error, UserError | SystemExit)
        lines = found.message.strip().splitlines()
        of_table = command.startswith("cache show")
        if for_users and (len(lines) == 1 or of_table) and any(map(names_it, lines)):
            return "refused", found.message
        return "traceback", f"{type(found.error).__name__}: {found.message}"


def as_expected(name: str, damage: str, outcome: str) -> bool:
    """Whether a cell ends as it must."""
    return outcome in {"refused", KINDS[name].lenient.get(damage, "refused")}


def cells() -> list[tuple[str, str, str]]:
    """All cells: kind, damage, command."""
    return [(n, d, c) for n, kind in KINDS.items() for d in kind.damages for c in kind.commands]


def some_cells() -> list[tuple[str, str, str]]:
    """Two damages of each kind of file by quick commands, and the slow ones once each."""
    chosen: list[tuple[str, str, str]] = []
    for number, (name, kind) in enumerate(KINDS.items()):
        quick = [each for each in kind.commands if each not in SLOW]
        damages = [list(kind.damages)[(2 * number + i) % len(kind.damages)] for i in range(2)]
        for place, damage in enumerate(dict.fromkeys(damages)):
            chosen.append((name, damage, quick[(number + place) % len(quick)]))
    left = [*(each for each in COMMANDS if each not in SLOW), *ONCE]
    # Every damage, and every command that is not left to the whole matrix.
    for part, wanted in ((2, left), (1, [damage for _, damage, _ in cells()])):
        for name in wanted:
            if name not in {each[part] for each in chosen}:
                fitting = [each for each in cells() if each[part] == name]
                chosen.append(fitting[len(chosen) % len(fitting)])
    return chosen


def report(outcomes: dict[tuple[str, str, str], tuple[str, str]]) -> str:
    """The matrix: for each kind of file, how often each damage ended how; and the counts."""
    lines = []
    for name, kind in KINDS.items():
        for damage in kind.damages:
            found = {c: o for (n, d, c), (o, _) in outcomes.items() if (n, d) == (name, damage)}
            if found:
                counts = Counter(found.values())
                ends = ", ".join(f"{count} {end}" for end, count in sorted(counts.items()))
                lines.append(f"{name:34} {damage:16} {ends}")
    for (name, damage, command), (outcome, said) in outcomes.items():
        if not as_expected(name, damage, outcome):
            lines.append(f"NOT AS EXPECTED  {name}, {damage}, {command}: {outcome}  {said[:500]}")
    counts = Counter(outcome for outcome, _ in outcomes.values())
    ends = ("refused", "told", "remade", "silent", "traceback")
    shown = ", ".join(f"{end}: {counts[end]}" for end in ends)
    return "\n".join([*lines, f"{len(outcomes)} cells of {len(KINDS)} kinds of files: {shown}"])


def run_matrix(*, quick: bool) -> bool:
    """Run and print the matrix; return whether all cells end as they must."""
    with tempfile.TemporaryDirectory() as temporary:
        began = time.monotonic()
        matrix = Matrix(build(Path(temporary) / "world"), Path(temporary) / "cell")
        outcomes = {}
        # Slow commands last, and each over sound files first.
        for command in sorted(COMMANDS, key=lambda command: command in SLOW):
            matrix.sound(command)
            for each in some_cells() if quick else cells():
                if each[2] == command:
                    outcomes[each] = matrix.cell(*each)
                    print(*each, *outcomes[each], sep="\t", file=sys.stderr, flush=True)
    print(report(outcomes))
    print(f"{time.monotonic() - began:.0f} seconds")
    return all(as_expected(n, d, outcome) for (n, d, _), (outcome, _) in outcomes.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the part that the tests run")
    sys.exit(not run_matrix(quick=parser.parse_args().quick))
