"""Rooms import only from the rooms they may know, and every module stands on its own."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "mpo_lightning"
# The files beside the folders.
GROUND = {
    "batch",
    "checks",
    "digests",
    "errors",
    "files",
    "markdown",
    "optim",
    "printable",
    "quiet",
}
# A room is a folder (or `strategy.py`, `cli.py`); CONTRIBUTING.md has the same table. Each may
# import the ground and the rooms named here, and nothing else of the package.
ROOMS: dict[str, set[str]] = {
    "losses": set(),
    "model": set(),
    "data": {"losses"},
    "generation": {"data", "model"},
    "training": {"losses", "model", "generation"},
    "callbacks": {"training", "generation", "data", "model"},
    "strategy": {"training", "model"},
    "rollouts": {"generation", "data", "model"},
    "evaluation": {"rollouts", "generation", "training", "data"},
    "export": {"training", "generation", "data", "model"},
    "studies": {"training", "data", "model", "losses"},
    "commands": {
        *{"callbacks", "evaluation", "export", "rollouts", "studies", "training"},
        *{"data", "model", "losses"},
    },
    "cli": {"commands", "training"},
    "toy": set(),
    "showcase": {
        *{"studies", "evaluation", "training", "generation", "data", "model", "losses", "toy"},
    },
}
# Packages whose __init__ is a public face; elsewhere the file itself is imported.
FACES = {"losses", "data.check"}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(source: str) -> Iterator[str]:
    """Modules of the package that a file imports, without the package's name."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = ["." * node.level + (node.module or "")]
        for name in names:
            if name.split(".")[0] in {"mpo_lightning", ""}:
                yield name.removeprefix("mpo_lightning").removeprefix(".")


def faults(name: str, source: str) -> list[str]:
    """Imports of a module that its room may not make."""
    room = name.split(".", maxsplit=1)[0]
    if room in {"__init__", "__main__"}:
        return []
    found = []
    for imported in imports_of(source):
        other = imported.split(".")[0]
        if not (PACKAGE / (imported.replace(".", "/") + ".py")).is_file() and imported not in FACES:
            if not (room == other == "toy"):
                found.append(f"{name} imports {imported or 'the package'} through an __init__")
        elif room in GROUND:
            if other not in GROUND:
                found.append(f"{name} is ground, and imports {imported}")
        elif other not in {room, *GROUND, *ROOMS[room]}:
            found.append(f"{name} imports {imported}, which {room} must not know")
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_rooms_import_only_what_they_may(path: Path) -> None:
    assert not faults(module_name(path), path.read_text(encoding="utf-8"))


def test_every_file_has_its_room() -> None:
    found = {module_name(path).split(".")[0] for path in FILES}
    assert found - {"__init__", "__main__"} == GROUND | set(ROOMS)


def test_rooms_form_no_circle() -> None:
    def below(room: str, seen: tuple[str, ...] = ()) -> set[str]:
        assert room not in seen, f"a circle: {' -> '.join([*seen, room])}"
        return {room}.union(*(below(other, (*seen, room)) for other in ROOMS[room]))

    for room in ROOMS:
        below(room)


def test_what_is_allowed_is_needed() -> None:
    used: dict[str, set[str]] = {room: set() for room in ROOMS}
    for path in FILES:
        room = module_name(path).split(".")[0]
        if room in used:
            imported = imports_of(path.read_text(encoding="utf-8"))
            used[room] |= {name.split(".")[0] for name in imported} - GROUND - {room}
    assert used == ROOMS


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("data.reading", "from mpo_lightning.model.policy import Policy", "data must not know"),
        ("model.policy", "from mpo_lightning.data.groups import DataError", "model must not know"),
        ("losses.sets", "import mpo_lightning.training.module", "losses must not know"),
        ("rollouts.sample", "from mpo_lightning.evaluation.compare import compare", "must not"),
        ("batch", "from mpo_lightning.data.groups import DataError", "is ground"),
        ("toy.world", "from mpo_lightning.losses import MPO", "toy must not know"),
        ("cli", "from mpo_lightning import MPOModule", "through an __init__"),
        ("data.reading", "from mpo_lightning.data import sources", "through an __init__"),
        ("data.reading", "from . import sources", "through an __init__"),
    ],
)
def test_an_import_that_goes_the_wrong_way_is_found(name: str, line: str, fault: str) -> None:
    source = (PACKAGE / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
    assert not faults(name, source)
    # Inside a function, too.
    for planted in (f"{source}\n{line}\n", f"{source}\ndef late():\n    {line}\n"):
        assert len(found := faults(name, planted)) == 1
        assert fault in found[0]


def test_contributing_has_the_same_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \|([^|]*)\|", text, re.MULTILINE)
    assert {room: set(re.findall(r"`(\w+)`", may)) for room, may in rows} == ROOMS


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_can_be_imported(path: Path) -> None:
    name = module_name(path)
    if name.rpartition(".")[2] != "__main__":
        importlib.import_module(f"mpo_lightning.{name}".removesuffix(".__init__"))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, mpo_lightning; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names() -> None:
    import mpo_lightning

    for name in mpo_lightning.__all__:
        assert getattr(mpo_lightning, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        mpo_lightning.Nothing  # noqa: B018
