"""The forms of an exported folder. Each writes all its files, except the model card."""

import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pcagpt.array_files import write_npy, write_npz
from pcagpt.compression import original
from pcagpt.compression.codes import Codes
from pcagpt.errors import UserError
from pcagpt.export.source import ExportedTable, Source
from pcagpt.factorization import factor_files
from pcagpt.file_hashes import digests_of
from pcagpt.files import write_text
from pcagpt.json_files import write_json
from pcagpt.model import order_constants
from pcagpt.run import hugging_face, hugging_face_files
from pcagpt.run.exported import CODED_TABLE, OTHERS, TYPE

HERE = Path(__file__).parent
MODELING, LOADER = "modeling_pcagpt.py", "load_coded.py"


def write_dense(folder: Path, source: Source) -> None:
    """A folder that transformers loads as it is; the table is multiplied out."""
    table = source.table
    if isinstance(table, ExportedTable) and not table.is_tied:
        raise UserError(
            f"{source.folder} has two different scale matrices, so that its output "
            "head is another table than its input: give --config.format=hf-factored"
        )
    tensors = source.tensors | {source.table_name: table.dense()}
    hugging_face_files.write_tensors(folder / hugging_face.WEIGHTS, tensors)
    hugging_face_files.write_config(folder, source.config())
    source.write_beside(folder)


def write_factored(folder: Path, source: Source) -> None:
    """A folder that transformers loads at its small size, with our modelling file."""
    table = source.table
    if isinstance(table, ExportedTable):
        is_small = not table.is_full
    else:
        is_small = table.constants is not None
    if not is_small:
        raise UserError(
            f"{source.folder} has a table without factors and without packed codes: "
            f"give --config.format={'coded' if source.coded else 'hf'}"
        )
    if (source.record.get("compressed") or {}).get("side"):
        raise UserError(
            f"{source.folder} is one of two tables, and this form has one for input "
            "and output: give --config.format=hf"
        )
    architecture, tied = source.architecture, {}
    if "architecture" in source.record:
        with original.of_extra(source.folder, source.architecture):
            from pcagpt.export.architecture import for_causal_lm
        architecture, tied = for_causal_lm(source)
    arrays, layout = parts(table)
    prefix = source.table_name.removesuffix("weight")
    own = {prefix + name: array for name, array in arrays.items()}
    path = folder / hugging_face.WEIGHTS
    hugging_face_files.write_tensors(path, source.tensors | tied | own)
    config = source.config()
    module, name = Path(MODELING).stem, "CompressedForCausalLM"
    config |= {
        "model_type": TYPE + config["model_type"],
        "architectures": [name],
        "auto_map": {
            "AutoConfig": f"{module}.CompressedConfig",
            "AutoModelForCausalLM": f"{module}.{name}",
        },
        "table": layout,
    }
    hugging_face_files.write_config(folder, config)
    source.write_beside(folder)
    code = (HERE / MODELING).read_text("utf-8")
    own = f'ARCHITECTURE = "{architecture}"'
    write_text(folder / MODELING, re.sub('ARCHITECTURE = ".*"', own, code, count=1))


def write_coded(folder: Path, source: Source) -> None:
    """All weights but the table, the table as its coded file, and a loader."""
    if not source.coded:
        raise UserError(
            f"{source.folder} has no coded table: give a model that compress wrote "
            "with compress.methods=coded, such as compressed/best_coded_k128"
        )
    hugging_face_files.write_tensors(folder / OTHERS, source.tensors)
    shutil.copyfile(source.coded, folder / CODED_TABLE)
    hugging_face_files.write_config(folder, source.config())
    source.write_beside(folder)
    shutil.copyfile(HERE / LOADER, folder / LOADER)


def write_npz_files(folder: Path, source: Source) -> None:
    """The table, or its factors, as the files that `init.import_*` read.

    The mean of a centred table of a run is not in them: it is in the run's `wpe`.
    """
    table = source.table
    if not isinstance(table, ExportedTable):
        raise UserError(
            f"{source.folder} has a table of codes, which has no factors: give "
            "--config.format=hf"
        )
    if len(table.bands) > 1:
        if not table.is_tied:
            raise UserError(
                f"{source.folder} has two different scale matrices in a band, for "
                "which there are no files: give --config.format=hf-factored"
            )
        factor_files.write_bands(folder, table.table())
        return
    (wte, up, down), mean = table.bands[0], table.mean
    if up is None:
        write_npy(folder / "wte.npy", wte if mean is None else wte + mean)
    else:
        write_npy(factor_files.table_path(folder, len(up)), wte)
        path = factor_files.scale_path(folder, len(up))
        with_mean = {} if mean is None else {"mean": mean}
        down = up if down is None else down
        write_npz(path, scale_up=up, scale_down=down, **with_mean)
    # Readers of the files check these digests.
    files = digests_of(folder, [path.name for path in folder.iterdir()])
    write_json(folder / factor_files.METADATA_FILE, {"files": files})


class Parts(NamedTuple):
    """A table as hf-factored stores it."""

    arrays: dict[str, np.ndarray]
    layout: dict[str, Any]


def parts(table: ExportedTable | Codes) -> Parts:
    """The state of `modeling_pcagpt.CompressedEmbedding`, and `config.table`."""
    arrays = {}
    if isinstance(table, ExportedTable):
        for number, band in enumerate(table.bands):
            for name, array in band._asdict().items():
                if array is not None:
                    arrays[f"bands.{number}.{name}"] = array
        sizes = [len(band.wte) for band in table.bands]
        ranks = [0 if b.scale_up is None else len(b.scale_up) for b in table.bands]
        mean, blocks, is_tied = table.mean, [], table.is_tied
        constants = order_constants(table.order)["embed"]
    else:
        sizes, ranks = list(table.sizes), list(table.ranks)
        constants = table.constants["embed"]
        shared = dict(constants["directions"])
        mean, is_tied = shared.pop("mean"), True
        arrays |= {f"shared.{name}": array for name, array in shared.items()}
        for number in range(len(sizes)):
            for name, array in constants[f"band_{number}"].items():
                arrays[f"bands.{number}.{name}"] = array
        blocks = np.reshape(table.blocks, (len(sizes), -1)).tolist()
    if mean is not None:
        arrays["mean"] = mean
    if len(sizes) > 1:
        arrays["position"] = constants["position_of_token"]
    layout = {
        "sizes": sizes,
        "ranks": ranks,
        "blocks": blocks,
        "is_tied": is_tied,
        "has_mean": mean is not None,
    }
    return Parts({name: np.asarray(a) for name, a in arrays.items()}, layout)


FORMATS = {
    "hf": write_dense,
    "hf-factored": write_factored,
    "coded": write_coded,
    "npz": write_npz_files,
}
