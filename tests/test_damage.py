"""Damaged files are refused by name: a part of the matrix of ``python -m tests.damage``."""

import pytest

from tests.damage import Matrix, as_expected, build, some_cells


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("damage")
    return Matrix(build(folder / "world"), folder / "cell")


@pytest.mark.parametrize(("kind", "damage", "command"), some_cells())
def test_damaged_file(matrix: Matrix, kind: str, damage: str, command: str) -> None:
    outcome, said = matrix.cell(kind, damage, command)
    assert as_expected(kind, damage, outcome), f"{outcome}: {said}"
