"""What transformers asks for in a folder of the form hf-factored."""

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from pcagpt.compression import stored_tensors
from pcagpt.errors import OF_NO_FILE, UserError, reason_of
from pcagpt.export.source import Source
from pcagpt.json_files import read_json
from pcagpt.run import hugging_face, hugging_face_files
from pcagpt.run.trained import Run


def for_causal_lm(source: Source) -> tuple[str, dict[str, np.ndarray]]:
    """(class of the model with a head, {name: array} of tensors that it also asks for).

    The model ties these to stored tensors. An hf-factored folder ties nothing, so it
    stores them, too. UserError as for `_class_and_tied`.
    """
    name, tied = _class_and_tied(
        source.folder,
        source.architecture,
        source.config(),
        source.tensors,
        source.table_name,
    )
    return name, {name: source.tensors[other] for name, other in tied.items()}


def holds_factors(run: Run) -> bool:
    """Whether hf-factored can hold the one table of a model that is a folder."""
    config = read_json(run.folder / hugging_face.CONFIG, "restore it") or {}
    config |= {"tie_word_embeddings": True}  # As an export has it.
    names, tables = stored_tensors.find(run.folder)
    table = stored_tensors.table_among(tables, "", run.folder)
    try:
        _class_and_tied(run.folder, run.architecture, config, names, table)
    except UserError:
        return False
    return True


def _class_and_tied(
    place: Path,
    architecture: str,
    stored_config: dict[str, Any],
    stored: Collection[str],
    table_name: str,
) -> tuple[str, dict[str, str]]:
    """(class of the model with a head, {name that it also asks for: stored name}).

    stored: the names of its tensors. UserError if the model would have weights that are
    not there: transformers renames and merges weights (experts) by `model_type`, and
    such a folder has one of its own, so that what is not stored under its name would be
    random.
    """
    remedy, problem = f"hf-factored cannot hold {place}: give --config.format=hf", None
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):  # no values
        # Only its own loader reads all that a config.json may hold.
        hugging_face_files.write_config(Path(folder), stored_config)
        options = {"trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, **options
            )
            model = transformers.AutoModelForCausalLM.from_config(config, **options)
        except OF_NO_FILE:
            raise
        # The package and what it calls raise errors of many types for odd configs.
        except Exception as error:
            problem = f"transformers has no {architecture}"
            if _is_known(stored_config.get("model_type")):
                problem = (
                    f"transformers makes no {architecture} of its config.json "
                    f"({reason_of(error)})"
                )
    if problem:
        raise UserError(f"{problem}, so that {remedy}")
    if not isinstance(config, type(model).config_class):
        raise UserError(
            f"a {type(model).__name__} is only a part of what config.json describes, "
            f"so that {remedy}"
        )
    names = {module: name for name, module in model.named_modules()}
    head, prefix = names[model.get_output_embeddings()], f"{model.base_model_prefix}."
    full = {name.removeprefix(prefix): name for name in stored}
    given = {*full, table_name.removeprefix(prefix)}
    wanted = {name: name.removeprefix(prefix) for name in model.state_dict()}
    del wanted[f"{head}.weight"]
    tied = {}
    for name in sorted(wanted):
        if wanted[name] in given:
            continue
        others = [other.removeprefix(prefix) for other in _other_names(model, name)]
        if not (same := [full[other] for other in others if other in full]):
            raise UserError(
                f"a {type(model).__name__} reads {name} from weights of other names, "
                f"so that {remedy}"
            )
        tied[name] = same[0]
    return type(model).__name__, tied


def _is_known(kind: object) -> bool:
    """Whether transformers has a language model of this `model_type`.

    True also without a `model_type`: the error of transformers then says so.
    """
    if not isinstance(kind, str):
        return True
    configs = transformers.CONFIG_MAPPING
    return kind in configs and configs[kind] in transformers.MODEL_FOR_CAUSAL_LM_MAPPING


def _other_names(model: transformers.PreTrainedModel, name: str) -> Iterator[str]:
    """The names of the same parameter of a model."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = parameters.get(name)
    return (other for other, one in parameters.items() if one is own)
