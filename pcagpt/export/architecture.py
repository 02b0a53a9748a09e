"""What transformers asks for in a folder of the form hf-factored."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from pcagpt.errors import UserError, reason_of
from pcagpt.export.source import Source
from pcagpt.run import hugging_face_files


def for_causal_lm(source: Source) -> tuple[str, dict[str, np.ndarray]]:
    """(class of the model with a head, {name: array} of tensors that it also asks for).

    The model ties these to stored tensors. An hf-factored folder ties nothing, so it
    stores them, too. UserError if the model would have weights that are not there:
    transformers renames and merges weights (experts) by `model_type`, and such a folder
    has one of its own, so that what is not stored under its name would be random.
    """
    remedy = f"hf-factored cannot hold {source.folder}: give --config.format=hf"
    fields, problem = source.config(), None
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):  # no values
        # Only its own loader reads all that a config.json may hold.
        hugging_face_files.write_config(Path(folder), fields)
        options = {"trust_remote_code": False}
        try:
            config = transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, **options
            )
            model = transformers.AutoModelForCausalLM.from_config(config, **options)
        except MemoryError:
            raise
        # The package and what it calls raise errors of many types for odd configs.
        except Exception as error:
            problem = f"transformers has no {source.architecture}"
            if _is_known(fields.get("model_type")):
                problem = (
                    f"transformers makes no {source.architecture} of its config.json "
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
    arrays = {name.removeprefix(prefix): a for name, a in source.tensors.items()}
    given = {*arrays, source.table_name.removeprefix(prefix)}
    wanted = {name: name.removeprefix(prefix) for name in model.state_dict()}
    del wanted[f"{head}.weight"]
    tied = {}
    for name in sorted(wanted):
        if wanted[name] in given:
            continue
        others = [other.removeprefix(prefix) for other in _other_names(model, name)]
        if not (stored := [other for other in others if other in arrays]):
            raise UserError(
                f"a {type(model).__name__} reads {name} from weights of other names, "
                f"so that {remedy}"
            )
        tied[name] = arrays[stored[0]]
    return type(model).__name__, tied


def _is_known(kind: object) -> bool:
    """Whether transformers has a language model of this `model_type`, or it has none.

    For a config.json without one, it says so itself.
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
