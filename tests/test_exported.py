"""Exports that were edited by hand are refused in one line."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from pcagpt.errors import UserError
from pcagpt.json_files import write_plain_json
from pcagpt.run import exported
from pcagpt.run.trained import Run

SIZES = {"vocab_size": 97, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
ONE_RANK = {"sizes": [97], "ranks": [4], "blocks": []}
PACKED = {"sizes": [60, 37], "ranks": [0, 0], "blocks": [[0, 0, 0, 0, 2, 0, 0]] * 2}


def write(folder, layout):
    """An export without weights, whose record lists no files."""
    folder.mkdir(exist_ok=True)
    config = SIZES | {"model_type": "pcagpt_gpt2", "activation_function": "gelu"}
    if isinstance(layout, dict):
        layout = {"is_tied": True, "has_mean": False} | layout
    write_plain_json(folder / "config.json", config | {"table": layout})
    write_plain_json(folder / "pcagpt.json", {"files": {}})
    return folder


@pytest.mark.parametrize("layout", [ONE_RANK, PACKED])
def test_a_whole_layout_is_read(layout, tmp_path):
    model = Run.open(write(tmp_path, layout)).settings.model
    assert model.n_embd_wte == (4 if layout is ONE_RANK else None)
    assert model.band_sizes == (() if layout is ONE_RANK else (60, 37))


@pytest.mark.parametrize(
    "layout",
    [
        {},
        [],
        ONE_RANK | {"ranks": []},
        ONE_RANK | {"ranks": ["4"]},
        ONE_RANK | {"ranks": [4.5]},
        ONE_RANK | {"ranks": [True]},
        ONE_RANK | {"ranks": [-4]},
        ONE_RANK | {"sizes": [], "ranks": []},
        ONE_RANK | {"sizes": [60, 37]},
        PACKED | {"ranks": [0]},
        PACKED | {"sizes": [97, 0]},
        PACKED | {"blocks": [1, 1]},
        PACKED | {"blocks": [[None], [0]]},
        PACKED | {"blocks": PACKED["blocks"][:1]},
    ],
    ids=str,
)
def test_a_layout_that_does_not_fit_its_bands_is_refused(layout, tmp_path):
    with pytest.raises(UserError, match=r"config.json is damaged .*: export the mod"):
        Run.open(write(tmp_path, layout))


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    write(tmp_path, ONE_RANK)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"has no tensor transformer.wpe.weight: exp"):
        exported.read_weights(tmp_path)


@pytest.mark.parametrize("name", ["others.safetensors", "table.pcat"])
def test_a_file_of_an_older_export_in_the_same_folder_is_refused(name, tmp_path):
    (write(tmp_path, ONE_RANK) / name).touch()
    with pytest.raises(UserError, match=f"{name} is not of the export .*: remove it$"):
        Run.open(tmp_path)


def test_a_model_that_was_trained_further_is_not_called_damaged_only(tmp_path):
    changed, copied = (write(tmp_path / name, ONE_RANK) for name in ("same", "other"))
    files = {"config.json": {"sha256": "0" * 64}}
    write_plain_json(changed / "pcagpt.json", {"files": files})
    (copied / "pcagpt.json").unlink()  # transformers does not copy it.
    for folder in (changed, copied):
        words = "if you changed it, such as by training, only transformers reads it"
        with pytest.raises(UserError, match=f"{folder}.*export the model.*; {words}$"):
            Run.open(folder)
