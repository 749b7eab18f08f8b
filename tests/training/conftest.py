"""A run on the command line that tests interrupt, and the same run uninterrupted."""

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import example_rows, shared_folder, write_rows
from tests.runs import fit, of_two, write_recipe


@pytest.fixture(scope="session")
def recipe(base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 groups in 6 batches of which 4 make an optimizer step, with dropout, and validation."""
    folder = shared_folder(tmp_path_factory, "interrupted")
    with FileLock(folder / "lock"):
        if (folder / "recipe.yaml").is_file():
            return folder / "recipe.yaml"
        return write_recipe(
            folder,
            base,
            write_rows(folder / "groups.jsonl", example_rows(11)),
            trainer={
                "accumulate_grad_batches": 4,
                "gradient_clip_val": 0.5,
                "val_check_interval": 3,
            },
            model={"policy": {"base": base, "lora": {"r": 4, "lora_dropout": 0.2}}},
            data={"val": write_rows(folder / "val.jsonl", example_rows(3, seed=1))},
        )


@pytest.fixture(scope="session")
def whole(recipe: Path) -> Callable[[str], Path]:
    """Folder of the uninterrupted run under a strategy, made once for all test processes."""

    def make(strategy: str) -> Path:
        root = recipe.parent / strategy
        with FileLock(f"{root}.lock"):
            if not (root / "checkpoints" / "last.ckpt").is_file():
                fit(recipe, root, *([] if strategy == "single" else of_two(strategy)))
        return root

    return make
