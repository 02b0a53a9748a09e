"""scripts/tour.ipynb runs from its first cell to its last."""

import json
import os
import subprocess
import sys

import pytest
from command_line import ROOT
from runs import quick_environment

NOTEBOOK = json.loads((ROOT / "scripts" / "tour.ipynb").read_text("utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TINY = """
OWN = "nowhere"
LAYERS, WIDTH, LENGTH, STEPS = 1, 16, 16, 10
BOUNDS = [17_000, 34_000]
TEXT = 320
WORDS = 5
"""
NAMES = ["OWN", "LAYERS", "BOUNDS", "TEXT", "WORDS"]


def source(cell):
    """The Python of a cell; that of the sizes is a test's."""
    is_sizes = "sizes" in cell["metadata"].get("tags", ())
    return TINY if is_sizes else "".join(cell["source"])


def test_the_tour_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len({*ids}) == len(ids)
    for cell in CODE:
        assert cell["outputs"] == [] and cell["execution_count"] is None
        compile(source(cell), cell["id"], "exec")


def test_the_sizes_that_a_test_replaces_are_those_of_the_notebook():
    (sizes,) = (c for c in CODE if "sizes" in c["metadata"].get("tags", ()))
    for text in ("".join(sizes["source"]), TINY):
        lines = [line for line in text.splitlines() if " = " in line]
        assert [line.split(",")[0].split(" = ")[0] for line in lines] == NAMES


@pytest.mark.slow
def test_the_cells_of_the_tour_run_in_order(tmp_path, compiled):
    (tmp_path / "scripts").mkdir()  # Jupyter starts there.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = quick_environment(compiled) | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", "\n\n".join(map(source, CODE))],
        cwd=tmp_path / "scripts",
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    for line in ("262,144 bytes in the token table", "before: The people", "after: "):
        assert line in ended.stdout, ended.stdout
    assert ended.stdout.count(" bytes add ") == 4
    tour = tmp_path / "checkpoints" / "tour"
    assert (tour / "tables.svg").read_text().startswith("<svg")
    assert (tour / "exported" / "small_hf" / "model.safetensors").is_file()
    assert not os.listdir(tmp_path / "scripts")
