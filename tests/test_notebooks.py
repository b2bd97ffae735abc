"""Notebooks are readers of result tables, kept without their outputs."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_outputs_are_stripped(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)
def test_a_notebook_opens_with_its_question_and_the_command_of_its_table(file: Path) -> None:
    first, second = nbformat.read(file, as_version=4).cells[:2]
    assert first.cell_type == second.cell_type == "markdown"
    assert "?" in first.source
    assert os.linesep + "    " in second.source or "```" in second.source
    assert "make demo" in second.source or "pagemill" in second.source
