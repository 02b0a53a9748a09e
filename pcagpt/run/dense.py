"""A run's weights with its token table multiplied out.

Shape letters: V vocabulary, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pcagpt import trees
from pcagpt.config.schema import ModelSettings
from pcagpt.errors import UserError
from pcagpt.model import FULL_TABLE, GPT, without_embedding
from pcagpt.run.trained import Run


def dense_weights(run: Run) -> dict[str, np.ndarray]:
    """{parameter path: float32 array} of the same model with a full table [V, D].

    The table has a row for each token, in the order of ids. The mean of a centred
    factorization is in the position embeddings of the run, so nothing is added here.

    Raises UserError if input and head have different tables, or for damaged weights.
    """
    model, variables = run.load(ModelSettings(compute_dtype="float32", kernels="xla"))
    params, config = variables["params"], model.config
    for band in params.get("embed", {}).values():
        up, down = band.get("scale_up"), band.get("scale_down")
        if down is not None and not np.array_equal(up, down):
            raise UserError(
                f"{run.folder} has two different scale matrices, so that its output "
                "head is another table than its input: a model with one table cannot "
                "compute this; --config.format=npz writes both matrices"
            )
    tokens_V = jnp.arange(config.vocab_size)
    with jax.default_matmul_precision("highest"):
        table_VD = model.apply(variables, tokens_V, method=_embed)
    found = trees.flatten(without_embedding(params))
    found = {FULL_TABLE: table_VD} | found
    return {path: np.asarray(leaf, np.float32) for path, leaf in found.items()}


def _embed(model: GPT, tokens_N: jax.Array) -> jax.Array:
    # flax calls a submodule only through a method of the model.
    return model.embed(tokens_N)
