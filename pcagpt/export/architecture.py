"""The weights that transformers asks for in a folder of the form hf-factored."""

import torch
import transformers

from pcagpt.errors import UserError
from pcagpt.export.source import Source


def check_names(source: Source) -> None:
    """UserError if the model of such a folder would have weights that are not there.

    transformers renames and merges weights (experts) by `model_type`, and such a folder
    has one of its own: what is not stored under its name would be random.
    """
    remedy = f"hf-factored cannot hold {source.folder}: give --config.format=hf"
    architecture = getattr(transformers, source.architecture, None)
    if architecture is None:
        raise UserError(f"transformers has no {source.architecture}, so that {remedy}")
    with torch.device("meta"):  # without values
        model = architecture(architecture.config_class.from_dict(source.config()))
    names = {module: name for name, module in model.named_modules()}
    head, prefix = names[model.get_output_embeddings()], f"{model.base_model_prefix}."
    wanted = model.state_dict().keys() - {f"{head}.weight"}
    given = {n.removeprefix(prefix) for n in (*source.tensors, source.table_name)}
    if lacking := [name for name in wanted if name.removeprefix(prefix) not in given]:
        raise UserError(
            f"a {source.architecture} reads {min(lacking)} from weights of other "
            f"names, so that {remedy}"
        )
