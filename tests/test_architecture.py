"""Imports point down, and every module stands on its own."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "mpo_lightning"
# From the ground up; a file imports from floors below its own only.
FLOORS = [
    {
        "errors",
        "files",
        "folders",
        "markdown",
        "commands.noise",
        "commands.signatures",
        "commands.parsing",
    },
    {"commands.help"},
    {
        "batch",
        "linear",
        "ending",
        "checkpoint",
        "optim",
        "record",
        "losses.checks",
        "losses.scores",
    },
    {"losses.partition"},
    {"losses.base"},
    {"losses.sets", "losses.pairs", "losses.lists"},
    {"losses"},
    {
        "metrics",
        "reference",
        "attention",
        "gated",
        "resume",
        "data.groups",
        "data.sampler",
        "data.scores",
        "faults",
        "loggers",
        "callbacks.throughput",
        "callbacks.progress",
        "callbacks.signatures",
        "evaluation_report",
        "rollouts.win_rates",
    },
    {
        "logps",
        "data.sources",
        "data.report",
        "data.schema",
        "data.dataset",
        "data.show",
        "data.identity",
        "data.tallies",
        "predictions",
    },
    {"data.conversations", "data.tokens", "data.check_report", "rollouts.prompts"},
    {"data.lists", "data.pairs", "data.singles", "data.ultrafeedback"},
    {"data.schemas"},
    {"data.reading"},
    {"policy"},
    {"data.counting", "data.check_chunk", "data.check_warnings", "data.writing"},
    {"data.prepare", "data.check_tally", "data.check_view", "rollouts.prompt_dataset"},
    {"data.datamodule", "data.check", "data.convert", "data.split"},
    {"loading", "rollouts.parts"},
    {"rollouts.generation"},
    {"rollouts.answers"},
    {"module", "prediction_files"},
    {
        "strategy",
        "rollouts.server",
        "rollouts.rewards",
        "export.source",
        "callbacks.samples",
        "callbacks.health",
    },
    {
        "rollouts.sampling",
        "rollouts.scoring",
        "rollouts.comparing",
        "commands.functions",
        "commands.watching",
    },
    {"export.formulas", "export.curves", "export.merging", "export.writing"},
    {"export.card"},
    {"export.exporting"},
    {
        "studies.grammar",
        "studies.enumeration",
        "studies.statistics",
        "studies.runner",
        "studies.calm",
    },
    {"studies.world", "studies.measures", "studies.figures"},
    {"studies.judges"},
    {"studies.training", "studies.samples", "studies.reward", "studies.agreement"},
    {"studies.conditions"},
    {"studies.methods"},
    {"studies.responses", "studies.deviation", "studies.scaling", "studies.grid"},
    {"studies.calibration", "studies.correlation", "studies.skew", "studies.levels"},
    {
        "commands.run",
        "commands.cache",
        "commands.data",
        "commands.sample",
        "commands.score",
        "commands.export",
        "commands.compare",
        "commands.study",
    },
    {"cli"},
    # The command line calls it by its name, as all commands.
    {"commands.completion"},
    {
        "__main__",
        "__init__",
        "data.__init__",
        "callbacks.__init__",
        "commands.__init__",
        "rollouts.__init__",
        "export.__init__",
        "studies.__init__",
    },
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    # The one __init__ that is imported through: floors above need the family as a whole, and the
    # command line finds by their short names those losses that are imported.
    return "losses" if name == "losses.__init__" else name


def project_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {
        name.removeprefix("mpo_lightning").removeprefix(".")
        for name in names
        if "mpo_lightning" in name
    }


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path: Path) -> None:
    name = module_name(path)
    if name.startswith("toy."):
        # The quick start's world knows nothing of the package: it is a user of it.
        assert all(i.split(".")[0] == "toy" for i in project_imports(path))
        return
    for imported in project_imports(path):
        assert imported in FLOOR_OF, (
            f"{name} imports {imported or 'the package'} through an __init__"
        )
        assert FLOOR_OF[imported] < FLOOR_OF[name], f"{name} imports {imported}, not below it"


def test_every_file_has_its_floor() -> None:
    assert {module_name(p) for p in FILES if "toy" not in p.parts} == set(FLOOR_OF)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_can_be_imported(path: Path) -> None:
    name = module_name(path)
    if name != "__main__":
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
