"""Every notebook of examples/ is stored without outputs, and runs from its first cell to its last, offline."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
EXPECTED = {  # kinds of what a notebook shows, and words of what it prints
    "compare_anywhere": ("image/png", "equal time ("),
    "gate_in_your_loop": ("image/png", "the gate kept"),
}


def read(path):
    return nbformat.read(path, as_version=4)


def test_the_notebooks_are_those_expected():
    assert [path.stem for path in NOTEBOOKS] == sorted(EXPECTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_valid_stored_without_outputs_and_listed(path):
    notebook = read(path)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}  # no version of whoever saved it
    assert f"(notebooks/{path.name})" in (ROOT / "examples" / "README.md").read_text()
    text = notebook.cells[0].source
    assert text.startswith("# ")
    assert "\nMinutes: " in text


@pytest.mark.slow  # a kernel's start and some seconds of training
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_from_the_first_cell_to_the_last(path, tmp_path, monkeypatch):
    places = [str(ROOT), str(ROOT / "python_api"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
    monkeypatch.setenv("SECONDS", "0.3")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing is fetched
    monkeypatch.setenv("HOME", str(tmp_path))  # the kernel's own files
    notebook = read(path)
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    image, words = EXPECTED[path.stem]
    assert any(image in output.get("data", {}) for output in outputs)
    assert words in "".join(output.get("text", "") for output in outputs)
