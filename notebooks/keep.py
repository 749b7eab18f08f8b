"""Run the notebooks, in their order and in a folder of their own, and keep what they show.

`make notebooks` runs all, `make notebooks NOTEBOOKS=notebooks/02*` some of them.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient

__all__ = ["NOTEBOOKS", "execute", "tidy"]

NOTEBOOKS = sorted(Path(__file__).parent.glob("*.ipynb"))


def execute(notebook: Any, folder: Path, *, timeout: int = 600) -> None:
    """Run a notebook's cells in a folder; a cell that fails is an error.

    Args:
        notebook: as nbformat reads it; its outputs are replaced.
        folder: working directory of its code.
        timeout: seconds that one cell may take.
    """
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(
        notebook, timeout=timeout, kernel_name="python3", resources=resources, record_timing=False
    )
    client.execute()
    tidy(notebook)


def tidy(notebook: Any) -> None:
    """Take out what does not belong on a page: the log, progress bars, the Python that was used."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}


def main(paths: list[str]) -> None:
    """Run notebooks and keep their outputs.

    Args:
        paths: notebooks; all if none.
    """
    # They share what one of them has made.
    with TemporaryDirectory(prefix="notebooks-") as folder:
        for path in map(Path, paths or map(str, NOTEBOOKS)):
            print(path)
            notebook = nbformat.read(path, as_version=4)
            execute(notebook, Path(folder))
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main(sys.argv[1:])
