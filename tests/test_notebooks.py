"""The notebooks are stored with their outputs, and still run: they assert what they say."""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MACHINE_PATH = re.compile(r"(?<![\w.:/~-])/(home|tmp|root|usr|opt|work|Users|var|mnt)/\w")

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])


def code_cells(path: Path) -> list[dict]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


@each
def test_stored_as_executed(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert path.stat().st_size < 800_000  # pictures as wide as the page take their room


@each
def test_no_path_of_the_machine_it_was_made_on(path):
    text = re.sub(r'"image/png": ".*?"', "", path.read_text(encoding="utf-8"))
    assert not MACHINE_PATH.search(text), MACHINE_PATH.search(text)


@each
def test_checks_something(path):
    assert sum("assert " in "".join(cell["source"]) for cell in code_cells(path)) >= 3


@each
def test_checks_are_folded(path):
    """They have cells of their own, which the site leaves out, and nothing to show."""
    for cell in code_cells(path):
        tags = cell["metadata"].get("tags", [])
        folded = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        assert folded == bool({"remove-cell", "remove-input"} & set(tags)), cell["id"]
        if "remove-cell" in tags:
            assert not cell["outputs"], cell["id"]
        else:
            assert "assert " not in "".join(cell["source"]), cell["id"]


@each
def test_pictures_have_a_text(path):
    """It stands in the metadata of the cell, and `docs/hooks.py` brings it to the site."""
    for cell in code_cells(path):
        if any("image/png" in output.get("data", {}) for output in cell["outputs"]):
            assert cell["metadata"].get("alt"), cell["id"]


@pytest.mark.slow
@each
def test_runs(path, tmp_path, monkeypatch):
    for module in ("ipykernel", "matplotlib", "mlxtend"):
        pytest.importorskip(module)
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    copy = shutil.copy(path, tmp_path)
    root = str(Path(__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", root, prepend=os.pathsep)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    notebook = nbformat.read(copy, as_version=4)
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # Jupyter's own are not ours to mend
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute()  # a cell that raises, raises here
