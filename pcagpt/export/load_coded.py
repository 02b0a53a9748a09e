"""Opens this model in transformers: from load_coded import load; model = load().

It needs pcagpt, torch and transformers. The table is decoded here, so that the model
takes as much memory as one that was never compressed.
"""

import hashlib
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from pcagpt import coding

FOLDER = Path(__file__).parent


def load(
    folder: str | Path = FOLDER, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The model of a folder; ValueError if it is not that of the export.

    dtype: as for from_pretrained; "auto" is that of config.json if it states one.
    """
    folder = Path(folder)
    record = json.loads((folder / "pcagpt.json").read_text("utf-8"))
    table, others = folder / "table.pcat", folder / "others.safetensors"
    for path in (folder / "config.json", table, others):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != record["files"][path.name]["sha256"]:
            raise ValueError(
                f"{path} was changed or damaged since it was written: export the model "
                "again"
            )
    name, (coded, _) = record["table"], coding.read(table)
    tensors = load_file(others)
    tensors[name] = torch.from_numpy(coded.dense())
    options = {"trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(folder, **options)
    with torch.device("meta"):  # only to find its class, without values
        model = transformers.AutoModelForCausalLM.from_config(config, **options)
    model = type(model).from_pretrained(
        None, config=model.config, state_dict=tensors, dtype=dtype
    )
    # It may name more tokens that end a text.
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model
