"""Digests find every change of a file that was written with them, and name it."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from mpo_lightning.digests import SUMS, check_folder, check_seal, check_sums, seal, seal_of
from mpo_lightning.errors import DamagedError
from mpo_lightning.files import whole_folder

REMEDY = "Copy it again."


def make(folder: Path) -> Path:
    with whole_folder(folder) as partial:
        (partial / "inner").mkdir()
        for name in ("config.json", "model.safetensors", "README.md", "inner/a.json"):
            (partial / name).write_text(f"{name} " * 3, encoding="utf-8")
    return folder


def test_other_programs_read_the_digests_of_a_folder(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    check_folder(folder)
    listed = [line.split()[-1] for line in (folder / SUMS).read_text().splitlines()]
    assert listed == ["config.json", "inner/a.json", "model.safetensors"]
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=folder, check=True)
    # What its owner changes on purpose is stated anew by the same program, also with ``./``.
    (folder / "config.json").write_text("mine", encoding="utf-8")
    with pytest.raises(DamagedError, match=r"config\.json is damaged or of elsewhere"):
        check_folder(folder)
    anew = f"find . -type f ! -name {SUMS} -exec sha256sum {{}} + > {SUMS}"
    subprocess.run(["sh", "-c", anew], cwd=folder, check=True)
    check_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "inner/a.json", SUMS])
def test_every_bit_and_every_length_of_a_folders_files_counts(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "out")
    path = folder / name
    content = path.read_bytes()
    changed = [content[:length] for length in range(len(content))]
    for place in range(len(content)):
        one = bytearray(content)
        one[place] ^= 1 << place % 8
        changed.append(bytes(one))
    changed += [bytes(len(content)), content + b"\n"]
    for each in changed:
        path.write_bytes(each)
        with pytest.raises(DamagedError) as refused:
            check_folder(folder, remedy=REMEDY)
        assert str(refused.value).startswith(f"{folder}{os.sep}")
        assert str(refused.value).endswith(REMEDY)
    path.write_bytes(content)
    check_folder(folder)


def test_files_that_are_missing_or_come_from_elsewhere(tmp_path: Path) -> None:
    folder = make(tmp_path / "out")
    (folder / "README.md").write_text("The owner's own words.", encoding="utf-8")
    (folder / "LICENSE").touch()
    check_folder(folder)
    (folder / "extra.json").touch()
    with pytest.raises(DamagedError, match=r"extra\.json is not of this folder"):
        check_folder(folder)
    (folder / "extra.json").unlink()
    (folder / "model.safetensors").write_bytes(b"other")
    check_folder(folder, large=False)
    (folder / "model.safetensors").unlink()
    with pytest.raises(DamagedError, match=f"model.safetensors is missing; {SUMS} lists it"):
        check_folder(folder, large=False)
    (folder / SUMS).unlink()
    check_folder(folder)
    check_folder(tmp_path / "my-org" / "model")
    with pytest.raises(DamagedError, match=f"{SUMS} is missing"):
        check_folder(folder, required=None)
    (folder / "training.json").touch()
    with pytest.raises(DamagedError, match=f"{SUMS} is missing"):
        check_folder(folder)
    with pytest.raises(DamagedError, match="cannot be read"):
        check_sums(folder / SUMS)


def test_every_bit_and_every_length_of_a_sealed_file_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.arange(3)}, path)
    whole = path.read_bytes()
    digest = seal(path)
    assert seal_of(path) == digest
    check_seal(path, remedy=REMEDY)
    assert torch.load(path, weights_only=True)["a"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    assert len(content) == len(whole) + 71
    changed = [content[:length] for length in range(0, len(content), 7)]
    for place in range(len(content)):
        one = bytearray(content)
        one[place] ^= 1 << place % 8
        changed.append(bytes(one))
    for each in [*changed, bytes(len(content)), content + b"\n", whole]:
        path.write_bytes(each)
        with pytest.raises(DamagedError, match=str(path)):
            check_seal(path, remedy=REMEDY)
    path.write_bytes(content)
    check_seal(path, remedy=REMEDY)
    with pytest.raises(DamagedError, match=r"cannot be read \(No such file"):
        check_seal(tmp_path / "none.ckpt", remedy=REMEDY)
