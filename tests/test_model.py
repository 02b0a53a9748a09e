"""The model against a GPT-2 in plain numpy, and what it must never do."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import gpt_config
from scipy import special

from pcagpt import trees
from pcagpt.losses import token_losses
from pcagpt.model import GPT, training_flops_per_token
from pcagpt.model.attention import _causal_attention, _split_product
from pcagpt.model.block import _bias_gelu

VOCAB = 21
DENSE = gpt_config(
    vocab_size=VOCAB, vocab_multiple=8, block_size=7, n_layer=2, n_head=2, n_embd=8
)
FACTORIZED = dataclasses.replace(DENSE, n_embd_wte=3)
UNTIED = dataclasses.replace(FACTORIZED, n_embd_wte_scale_tying=False)
BANDS = dataclasses.replace(
    UNTIED, n_embd_wte=0, band_sizes=(4, 7, 10), band_ranks=(0, 4, 2)
)
CONFIGS = {
    "dense": DENSE,
    "tied": FACTORIZED,
    "no bias": dataclasses.replace(UNTIED, bias=False),
    "bands": BANDS,
    "exact gelu": dataclasses.replace(DENSE, gelu="exact"),
}
pytestmark = pytest.mark.usefixtures("quick")
# Shorter than the block size.
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, 6), np.int32)
KEY = jax.random.key(0)
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@functools.cache
def shapes_of(config):
    return jax.eval_shape(
        GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )


def random_variables(config, dtype=np.float32, seed=0):
    """Parameters far from their initial values, so that every bias and norm counts."""
    random = np.random.default_rng(seed)
    flat = {
        path: random.normal(1.0 if path.endswith("/scale") else 0.0, 0.4, leaf.shape)
        for path, leaf in trees.flatten(shapes_of(config)["params"]).items()
    }
    flat = {path: jnp.asarray(leaf, dtype) for path, leaf in flat.items()}
    variables = {"params": trees.unflatten(flat), "constants": {}}
    if len(config.bands) > 1:
        order = random.permutation(VOCAB).astype(np.int32)
        variables["constants"] = {"embed": {"position_of_token": jnp.asarray(order)}}
    return variables


def in_float64(config):
    """The config with all of it in float64, to be run with dropout on.

    1 - 1e-17 rounds to 1: nothing is dropped, but attention is then flax's, in the
    compute dtype; jax.nn.dot_product_attention has a softmax in float32 always.
    """
    return dataclasses.replace(config, compute_dtype="float64", dropout=1e-17)


@jax.jit(static_argnums=0)
def logits_of(config, variables, tokens_BT):
    return GPT(config).apply(variables, tokens_BT)


@jax.jit(static_argnums=(0, 3))
def hidden_of(config, variables, tokens_BT, deterministic=True, key=None):
    rngs = None if key is None else {"dropout": key}
    return GPT(config).apply(
        variables, tokens_BT, deterministic, method="hidden", rngs=rngs
    )


# A GPT-2 of its own


def numpy_table(config, variables):
    """Ŵ [V, D] for the input and for the head, rows in the users' token order."""
    flat = trees.flatten(variables["params"])
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
    tables = [], []
    for number in range(max(1, len(config.band_sizes))):
        rows = config.band_sizes[number] if config.band_sizes else config.vocab_size
        wte = flat[f"embed/band_{number}/wte"][:rows]
        up = flat.get(f"embed/band_{number}/scale_up", np.eye(config.n_embd))
        down = flat.get(f"embed/band_{number}/scale_down", up)
        tables[0].append(wte @ up)
        tables[1].append(wte @ down)
    position = np.arange(config.vocab_size)
    if variables["constants"]:
        position = np.asarray(variables["constants"]["embed"]["position_of_token"])
    return tuple(np.concatenate(side)[position] for side in tables)


def numpy_gpt2(config, variables, tokens_BT):
    """Hidden states [B, T, D] and logits [B, T, V] in float64, loop by loop."""
    flat = trees.flatten(variables["params"])
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * flat[f"{name}/scale"] + flat.get(f"{name}/bias", 0)

    def linear(x, name):
        return x @ flat[f"{name}/kernel"] + flat.get(f"{name}/bias", 0)

    def gelu(x):
        if config.gelu == "exact":
            return 0.5 * x * (1 + special.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attend(x, name):
        width = config.n_embd // config.n_head
        q, k, v = np.split(linear(x, f"{name}/qkv"), 3, axis=-1)
        y = np.zeros_like(q)
        for head in range(config.n_head):
            part = slice(head * width, (head + 1) * width)
            for t in range(len(x)):
                score = k[: t + 1, part] @ q[t, part] / math.sqrt(width)
                weight = np.exp(score - score.max())
                y[t, part] = weight / weight.sum() @ v[: t + 1, part]
        return linear(y, f"{name}/proj")

    table_in, table_out = numpy_table(config, variables)
    hidden = []
    for tokens_T in tokens_BT:
        x = table_in[tokens_T] + flat["wpe"][: len(tokens_T)]
        for block in (f"block_{i}" for i in range(config.n_layer)):
            x = x + attend(norm(x, f"{block}/ln_1"), f"{block}/attn")
            h = gelu(linear(norm(x, f"{block}/ln_2"), f"{block}/mlp/fc"))
            x = x + linear(h, f"{block}/mlp/proj")
        hidden.append(norm(x, "ln_f"))
    hidden = np.stack(hidden)
    return hidden, hidden @ table_out.T


@each_config
def test_logits_agree_with_a_gpt2_in_numpy(config):
    variables = random_variables(config)
    _, expected = numpy_gpt2(config, variables, TOKENS)
    logits = logits_of(config, variables, TOKENS)
    assert (logits.shape, logits.dtype) == ((*TOKENS.shape, VOCAB), jnp.float32)
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.parametrize("name", ["dense", "no bias", "bands"])
def test_hidden_state_agrees_with_numpy_to_twelve_digits_in_float64(name):
    with jax.enable_x64(True):
        config = in_float64(CONFIGS[name])
        variables = random_variables(config, np.float64)
        expected, _ = numpy_gpt2(config, variables, TOKENS)
        hidden = hidden_of(config, variables, TOKENS, False, KEY)
    assert hidden.dtype == np.float64
    np.testing.assert_allclose(
        hidden.reshape(expected.shape), expected, rtol=1e-12, atol=1e-12
    )


# Causality


@pytest.mark.parametrize(
    ("name", "dropout"), [("tied", 0.0), ("bands", 0.0), ("dense", 0.3)]
)
def test_no_hidden_state_depends_on_later_tokens(name, dropout):
    config = dataclasses.replace(CONFIGS[name], dropout=dropout)
    variables = random_variables(config)
    # Distinct tokens: the gradient of a table row is that of one place in the text.
    tokens = np.random.default_rng(2).permutation(VOCAB)[:12].reshape(2, 6)
    length = tokens.shape[1]
    direction = np.random.default_rng(3).normal(size=config.n_embd)
    deterministic, key = not dropout, jax.random.key(5)

    @jax.jit
    def jacobian(params):
        def outputs(params):
            hidden = hidden_of(
                config, variables | {"params": params}, tokens, deterministic, key
            )
            return hidden @ jnp.asarray(direction, jnp.float32)

        return jax.jacrev(outputs)(params)

    gradients = jacobian(variables["params"])
    later = np.triu(np.ones((length, length), bool), k=1)
    for sequence in range(2):
        rows = slice(sequence * length, (sequence + 1) * length)
        depends = np.any(np.asarray(gradients["wpe"])[rows, :length] != 0, axis=-1)
        np.testing.assert_array_equal(depends[later], False)
        # Dropout hides a part, in attention and in the vectors.
        assert depends[~later].mean() >= 1 - 2 * dropout

    position = np.arange(VOCAB)
    if variables["constants"]:
        position = np.asarray(variables["constants"]["embed"]["position_of_token"])
    depends = np.concatenate(
        [
            np.any(np.asarray(gradients["embed"][f"band_{i}"]["wte"]) != 0, axis=-1)[
                :, : band.size
            ]
            for i, band in enumerate(config.bands)
        ],
        axis=1,
    )[:, position[tokens.reshape(-1)]]
    allowed = np.kron(np.eye(2, dtype=bool), ~later)
    np.testing.assert_array_equal(depends[~allowed], False)
    assert depends[allowed].mean() >= 1 - 2 * dropout


# Padding


@pytest.mark.parametrize("name", ["tied", "bands"])
def test_padding_rows_get_no_probability_and_no_gradient(name):
    config = CONFIGS[name]
    assert config.padded_vocab_size == 24
    variables = random_variables(config)
    last = f"embed/band_{len(config.bands) - 1}/wte"
    real = config.bands[-1].size

    @jax.jit
    def losses(params):
        """Of every token as the target of the first position: [V]."""
        model, bound = GPT(config), variables | {"params": params}
        h_ND = model.apply(bound, TOKENS[:1, :1], method="hidden")
        head = model.apply(bound, method="head")
        return token_losses(jnp.repeat(h_ND, VOCAB, 0), head, jnp.arange(VOCAB))

    @jax.jit
    def gradient(params):
        return trees.flatten(jax.grad(lambda p: losses(p).sum())(params))[last]

    params = variables["params"]
    probabilities = np.exp(-losses(params))
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    found = np.asarray(gradient(params))
    np.testing.assert_array_equal(found[real:], 0)
    assert np.all(np.any(found[:real] != 0, axis=1))

    flat = trees.flatten(params)
    flat[last] = flat[last].at[real:].set(1e4)
    louder = trees.unflatten(flat)
    np.testing.assert_array_equal(losses(louder), losses(params))
    np.testing.assert_array_equal(
        logits_of(config, variables | {"params": louder}, TOKENS),
        logits_of(config, variables, TOKENS),
    )


# Bands


def test_bands_with_a_token_order_are_a_dense_model_with_the_concatenated_table():
    with jax.enable_x64(True):
        config = dataclasses.replace(in_float64(BANDS), n_embd_wte_scale_tying=True)
        variables = random_variables(config, np.float64)
        table, _ = numpy_table(config, variables)
        dense = in_float64(DENSE)
        params = variables["params"] | {
            "embed": {"band_0": {"wte": jnp.asarray(np.pad(table, ((0, 3), (0, 0))))}}
        }
        dense_variables = {"params": params, "constants": {}}
        targets = jnp.asarray(TOKENS.reshape(-1))
        found = []
        for c, v in ((config, variables), (dense, dense_variables)):
            hidden = hidden_of(c, v, TOKENS, False, KEY)
            head = GPT(c).apply(v, method="head")
            columns = GPT(c).apply(v, targets, method="renumber")
            found.append((hidden, token_losses(hidden, head, columns)))
    (hidden_a, loss_a), (hidden_b, loss_b) = found
    np.testing.assert_allclose(hidden_a, hidden_b, atol=1e-12)
    np.testing.assert_allclose(loss_a, loss_b, atol=1e-5)  # logits in float32


def test_renumbering_keeps_minus_1_for_no_target():
    variables = random_variables(BANDS)
    position = np.asarray(variables["constants"]["embed"]["position_of_token"])
    tokens = np.array([-1, 0, 20, -1, 7])
    found = GPT(BANDS).apply(variables, tokens, method="renumber")
    np.testing.assert_array_equal(
        found, [-1, position[0], position[20], -1, position[7]]
    )


def test_token_order_starts_as_the_ids_and_is_not_a_parameter():
    initial = initial_variables()
    order = initial["constants"]["embed"]["position_of_token"]
    np.testing.assert_array_equal(order, np.arange(500))
    assert not any("position" in path for path in trees.flatten(initial["params"]))


# Dropout and compute dtype


def test_dropout_matters_and_repeats_with_its_key():
    config = dataclasses.replace(FACTORIZED, dropout=0.2)
    variables = random_variables(config)
    one, again, other = (
        hidden_of(config, variables, TOKENS, False, jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1
    off = hidden_of(config, variables, TOKENS)
    np.testing.assert_array_equal(off, hidden_of(FACTORIZED, variables, TOKENS))
    assert np.abs(one - off).max() > 0.1


def equations(jaxpr):
    """All of a jaxpr and, each time they are called, of those in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            if hasattr(value, "eqns"):
                yield from equations(value)


def test_dropout_is_where_gpt2_has_it_with_independent_masks():
    config = dataclasses.replace(FACTORIZED, dropout=0.2)
    traced = hidden_of.trace(config, random_variables(config), TOKENS, False, KEY)
    masks = [
        equation.params["shape"]
        for equation in equations(traced.jaxpr)
        if equation.primitive.name == "random_bits"
    ]
    activations, attention, layers = (18, 8), (3, 2, 6, 6), config.n_layer
    # After the embedding; after attention and MLP; on attention probabilities.
    assert masks.count(activations) == 1 + 2 * layers
    assert masks.count(attention) == layers
    assert len(masks) == 1 + 3 * layers


def test_dropping_almost_nothing_is_the_model_without_dropout():
    # Training with dropout uses another implementation of attention.
    config = dataclasses.replace(FACTORIZED, dropout=1e-12)
    variables = random_variables(config)
    np.testing.assert_allclose(
        hidden_of(config, variables, TOKENS, False, KEY),
        hidden_of(FACTORIZED, variables, TOKENS),
        atol=5e-6,
    )


def test_bfloat16_stays_near_float32_and_parameters_stay_float32():
    config = dataclasses.replace(BANDS, compute_dtype="bfloat16")
    errors = []
    for seed in range(128):  # A single draw's error says little: 0.003 to 0.02.
        variables = random_variables(config, seed=seed)
        half = hidden_of(config, variables, TOKENS)
        full = np.asarray(hidden_of(BANDS, variables, TOKENS))
        assert half.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(half, np.float32) - full)
        errors.append(error / np.linalg.norm(full))
    assert min(errors) > 1e-3 and np.mean(errors) < 0.0085
    stored = {leaf.dtype for leaf in jax.tree.leaves(shapes_of(config)["params"])}
    assert stored == {jnp.dtype("float32")}


def test_gelu_keeps_only_its_input_for_the_backward_pass():
    h_NF, bias_F = jax.ShapeDtypeStruct((6, 8), jnp.float32), jnp.zeros(8)

    def gelu(h_NF, bias_F):
        return _bias_gelu(h_NF, bias_F, False)

    residuals = jax.eval_shape(lambda h, b: jax.vjp(gelu, h, b)[1], h_NF, bias_F)
    shapes = [leaf.shape for leaf in jax.tree.leaves(residuals)]
    assert shapes.count((6, 8)) == 1


# Parameters


@functools.cache
def initial_variables():
    config = gpt_config(
        vocab_size=500,
        vocab_multiple=4,
        block_size=64,
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_embd_wte_scale_tying=False,
        band_sizes=(300, 200),
        band_ranks=(0, 24),
    )
    init = jax.jit(GPT(config).init)
    return init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def test_initial_weights_have_the_spread_of_gpt2():
    groups = {}
    for path, leaf in trees.flatten(initial_variables()["params"]).items():
        kind = path if path.startswith(("embed", "wpe")) else path.split("/", 1)[1]
        groups.setdefault(kind, []).append(np.asarray(leaf).reshape(-1))
    for kind, leaves in groups.items():
        values = np.concatenate(leaves)
        if kind.endswith("bias"):
            np.testing.assert_array_equal(values, 0, kind)
        elif kind.endswith("/scale") or kind == "scale":
            np.testing.assert_array_equal(values, 1, kind)
        else:
            std = 0.02 / 2 if kind.endswith("proj/kernel") else 0.02
            assert values.std() == pytest.approx(std, rel=0.06), kind
            assert abs(values.mean()) < 4 * std / math.sqrt(values.size), kind


def test_tied_scales_are_one_leaf_and_a_full_rank_has_scales_too():
    full_rank = dataclasses.replace(DENSE, n_embd_wte=DENSE.n_embd)
    for config, shapes in (
        (DENSE, {"wte": (24, 8)}),
        (FACTORIZED, {"wte": (24, 3), "scale_up": (3, 8)}),
        (UNTIED, {"wte": (24, 3), "scale_up": (3, 8), "scale_down": (3, 8)}),
        (full_rank, {"wte": (24, 8), "scale_up": (8, 8)}),
    ):
        band = shapes_of(config)["params"]["embed"]["band_0"]
        assert {name: leaf.shape for name, leaf in band.items()} == shapes


def test_flops_of_gpt2_small_by_hand():
    small = gpt_config()
    blocks, attention = 12 * 12 * 768 * 768, 12 * 12 * 1024 * 768
    assert training_flops_per_token(small) == 6 * (blocks + 50304 * 768) + attention
    factorized = dataclasses.replace(small, n_embd_wte=128)
    head = 50304 * 128 + 2 * 128 * 768
    assert training_flops_per_token(factorized) == 6 * (blocks + head) + attention
    halves = dataclasses.replace(small, band_sizes=(257, 50000), band_ranks=(0, 128))
    head = 257 * 768 + 50047 * 128 + 2 * 128 * 768
    assert training_flops_per_token(halves) == 6 * (blocks + head) + attention


# One block of queries, several, and a last one that is shorter.
@pytest.mark.parametrize("length", [5, 64, 100, 128, 300])
def test_attention_in_blocks_of_queries_is_causal_attention(length):
    random = np.random.default_rng(length)
    q, k, v, weight = random.normal(size=(4, 2, length, 3, 4)).astype(np.float32)

    def whole(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def in_blocks(q, k, v):
        return _causal_attention(q, k, v, "xla")

    def outcome(attention):
        y, back = jax.vjp(attention, q, k, v)
        return y, *back(weight)

    for found, wanted in zip(outcome(in_blocks), outcome(whole), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_thirds_of_a_product_have_its_values_and_gradients():
    random = np.random.default_rng(0)
    x, kernel = (jnp.asarray(random.normal(size=s)) for s in ((5, 4), (4, 12)))
    weights = tuple(jnp.asarray(random.normal(size=(3, 5, 4))))

    def outcome(function):
        thirds, back = jax.vjp(jax.jit(function), x, kernel)
        return *thirds, *back(weights)

    plain = outcome(lambda x, kernel: tuple(jnp.split(x @ kernel, 3, axis=1)))
    for a, b in zip(outcome(_split_product), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
