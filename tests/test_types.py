"""A type checker accepts a user's script, and finds the mistakes in it."""

import json
import shutil
import subprocess
import sys

import pytest
from command_line import ROOT

RIGHT = """
from pathlib import Path

import numpy as np

import pcagpt

model = pcagpt.load("run")
loss: float = model.loss("text") + model.loss(np.arange(4)) + model.loss([1, 2, 3])
logits: np.ndarray = model.logits("text")
for piece in model.generate("The", max_tokens=3, top_p=0.9, stop=["x"]):
    print(piece.upper())
small = pcagpt.compress(model, max_bytes=10_000, bands=[1, 7])
if small.interval is not None:
    print(small.interval[0] + small.interval[1])
folder: Path = small.save("x")
factors = pcagpt.factorize(model.table, 4, method="pca")
print(factors.wte.shape, model.path.name, model.vocab_size + 1)
try:
    pcagpt.compress("x", max_added_loss=0.1, data={"train": "a", "val": [1, 2]})
except pcagpt.UserError as error:
    print(error)
"""
WRONG = """
import pcagpt

model = pcagpt.load("run")
model.los("x")
pcagpt.compress(model, max_byte=3)
model.generate("x", top_p="a")
pcagpt.nothing
"""


@pytest.mark.skipif(
    not shutil.which("pyright"), reason="needs: pip install 'pyright[nodejs]'"
)
def test_pyright_accepts_the_library_and_a_script_that_uses_it(tmp_path):
    for name, text in (("right.py", RIGHT), ("wrong.py", WRONG)):
        (tmp_path / name).write_text(text)
    settings = {"typeCheckingMode": "basic", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))

    def errors(*files):
        command = ["pyright", "--outputjson", "--pythonpath", sys.executable, *files]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        found = json.loads(done.stdout)["generalDiagnostics"]
        return [one["range"]["start"]["line"] for one in found], done.stdout

    library = [str(ROOT / "pcagpt" / name) for name in ("__init__.py", "api")]
    for files in (["right.py"], library):
        assert errors(*files)[0] == [], errors(*files)[1]
    assert errors("wrong.py")[0] == [4, 5, 6, 7]
