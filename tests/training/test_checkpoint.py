"""Checkpoints: what they hold, the adapter folder beside them, and saves that are interrupted."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpo_lightning import LoRA, MPOModule, PolicyConfig, PreferenceDataModule
from mpo_lightning.digests import seal
from mpo_lightning.errors import CheckpointError, ResumeError
from mpo_lightning.files import adapter_folder
from mpo_lightning.losses import MPO
from mpo_lightning.model.policy import PolicyError
from mpo_lightning.optim import WarmupCosine
from mpo_lightning.training.checkpoint import RunCheckpoint
from tests.conftest import example_rows, random_groups
from tests.runs import GO_ON, SAVE_EACH_STEP, assert_same_adapter, fit
from tests.training.fits import RAGGED, Recorder, adapter, loader, make_module, make_trainer


def fit_with_checkpoints(
    base: str, folder: Path, data: str, ckpt_path: str | None = None
) -> tuple[MPOModule, Recorder, PreferenceDataModule]:
    """Two epochs, a checkpoint after each."""
    module = make_module(
        base,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        lr_scheduler=WarmupCosine(),
    )
    record = Recorder()
    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_last=True)
    trainer = make_trainer(
        max_epochs=2, callbacks=[record, keep], enable_checkpointing=True, log_every_n_steps=1
    )
    datamodule = PreferenceDataModule(tokenizer=base, train=data, groups_per_batch=3)
    trainer.fit(module, datamodule, ckpt_path=ckpt_path, weights_only=True)
    return module, record, datamodule


def test_checkpoints_hold_the_adapter_and_resume_the_same_losses(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    data = write_jsonl(example_rows(8))
    whole, record, _ = fit_with_checkpoints(base, tmp_path / "a", data)
    resumed, rest, _ = fit_with_checkpoints(
        base, tmp_path / "b", data, ckpt_path=str(tmp_path / "a" / "epoch=0.ckpt")
    )
    assert len(record.steps) == 6
    assert rest.steps[-3:] == record.steps[-3:]
    for name, weight in adapter(whole).items():
        assert torch.equal(adapter(resumed)[name], weight), name


def test_checkpoint_files_are_small_plain_and_complete(
    base: str, write_jsonl: Callable[..., str], tmp_path: Path
) -> None:
    module, _, _ = fit_with_checkpoints(base, tmp_path / "c", write_jsonl(example_rows(8)))
    file = tmp_path / "c" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(adapter(module))
    weights = sum(w.numel() * 4 for w in adapter(module).values())
    # Adapter and the two moments of AdamW, and bookkeeping.
    assert file.stat().st_size < 3 * weights + 100_000
    assert checkpoint["hyper_parameters"] == module.hparams

    folder = adapter_folder(file)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    ids = torch.arange(2, 40)[None]
    assert module.policy is not None
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, module.policy.causal_lm(ids).logits)
    chat = [{"role": "user", "content": "hi"}]
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)


def test_a_trainer_writes_the_adapter_of_the_module_that_it_fits_now(
    base: str, tmp_path: Path
) -> None:
    data = loader(random_groups(RAGGED), [8])
    trainer = make_trainer()
    trainer.fit(make_module(base), data)
    second = make_module(base, lora=LoRA(r=2, target_modules=["q_proj"]))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, data)
    trainer.save_checkpoint(tmp_path / "second.ckpt")
    settings = json.loads((tmp_path / "second-adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["target_modules"]) == (2, ["q_proj"])


def test_removed_checkpoints_take_their_adapter_folder_along(base: str, tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1)
    trainer = make_trainer(callbacks=[keep], enable_checkpointing=True)
    trainer.fit(make_module(base), loader(random_groups(RAGGED), [4, 4]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step=2-adapter", "step=2.ckpt"]


def test_checkpoint_of_another_adapter_is_refused(base: str, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.fit(make_module(base), loader(random_groups(RAGGED), [8]))
    trainer.save_checkpoint(tmp_path / "r4.ckpt")
    data = loader(random_groups(RAGGED), [8])
    for lora in (LoRA(r=8), LoRA(r=4, target_modules=["q_proj"])):
        with pytest.raises(PolicyError, match="adapter is not this run's.*lora_"):
            make_trainer().fit(
                make_module(base, lora=lora), data, ckpt_path=str(tmp_path / "r4.ckpt")
            )


class Hostile:
    """An object that runs code when it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return (Path.touch, (self.touched,))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("torch", "holds code or other objects"),
        ("pickle", "holds code or other objects"),
        ("cut", "cannot be read as a checkpoint"),
    ],
)
def test_checkpoint_that_is_no_plain_values_is_refused_in_one_line(
    kind: str, why: str, base: str, tmp_path: Path
) -> None:
    file, hostile = tmp_path / "x.ckpt", Hostile(tmp_path / "ran")
    torch.save({"state_dict": {}, "callbacks": hostile}, file)
    content = file.read_bytes()
    bytes_of = {"torch": content, "pickle": pickle.dumps(hostile, protocol=2), "cut": content[:200]}
    file.write_bytes(bytes_of[kind])
    seal(file)
    with pytest.raises(ResumeError, match=f"x.ckpt {why}") as refused:
        make_trainer().fit(
            make_module(base), loader(random_groups(RAGGED), [8]), ckpt_path=str(file)
        )
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "ran").exists()


def test_module_loads_from_a_checkpoint_in_user_code(base: str, tmp_path: Path) -> None:
    module = make_module(base)
    trainer = make_trainer()
    trainer.fit(module, loader(random_groups(RAGGED), [8]))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    policy = PolicyConfig(base=base, lora=LoRA(r=4))
    loaded = MPOModule.load_from_checkpoint(tmp_path / "x.ckpt", policy=policy, loss=MPO())
    for name, weight in adapter(module).items():
        assert torch.equal(adapter(loaded)[name], weight)


def test_run_killed_while_it_saves_leaves_the_checkpoint_before(
    recipe: Path, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """The second save of last.ckpt dies with its file half written."""
    dying = [
        "--trainer.callbacks+=tests.interruptions.KillWhileSaving",
        "--trainer.callbacks.save=4",
    ]
    root = tmp_path / "killed"
    killed = fit(recipe, root, *SAVE_EACH_STEP, *dying, check=False)
    assert killed.returncode == -9
    assert (root / "checkpoints" / ".last.ckpt.partial").is_file()
    assert torch.load(root / "checkpoints" / "last.ckpt")["global_step"] == 1
    fit(recipe, root, *SAVE_EACH_STEP, *GO_ON)
    assert_same_adapter(root, whole("single"))
    assert not [path for path in (root / "checkpoints").iterdir() if "partial" in path.name]


@pytest.mark.parametrize("name", ["last.ckpt", "last-adapter/tokenizer.json"])
def test_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    recipe: Path, tmp_path: Path, name: str
) -> None:
    """Half of a file can be written."""
    root = tmp_path / "full"
    fit(recipe, root, "--trainer.max_epochs=1")
    file = root / "checkpoints" / "last.ckpt"
    before = file.read_bytes()
    half = (root / "checkpoints" / name).stat().st_size // 2
    ended = fit(recipe, root, *GO_ON, check=False, file_size=half)
    assert ended.returncode == 1
    assert "the checkpoint cannot be written" in ended.stderr
    assert "Make room or give access" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert file.read_bytes() == before
    fit(recipe, root, *GO_ON)


@pytest.mark.parametrize("ours", [True, False])
def test_links_are_refused_before_anything_is_loaded(base: str, ours: bool) -> None:
    """Lightning links an earlier checkpoint at the run's end: the last steps would be lost."""
    saver = (RunCheckpoint if ours else ModelCheckpoint)(save_last="link", every_n_train_steps=1)
    trainer = make_trainer(max_steps=1, callbacks=[saver], enable_checkpointing=True)
    module = make_module(base)
    with pytest.raises(CheckpointError, match=r"checkpoint\.save_last: a link .* Set it to true"):
        trainer.fit(module, PreferenceDataModule(tokenizer=base, train="no such.jsonl"))
    assert module.policy is None
