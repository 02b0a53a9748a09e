"""Identities of a factorized table, each of them exact in theory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import gpt_config

from pcagpt import trees
from pcagpt.factorization import Factorizer, energy_kept
from pcagpt.factorization.solve import table_of_rank, truncate
from pcagpt.model import GPT, embedding_parameters, total_parameters

pytestmark = pytest.mark.usefixtures("quick")
VOCAB, WIDTH = 29, 8
DENSE = gpt_config(
    vocab_size=VOCAB, vocab_multiple=8, block_size=6, n_layer=1, n_head=2, n_embd=WIDTH
)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, 6), np.int32)
RANDOM = np.random.default_rng(2)
# A common direction, as trained tables have, and a falling spectrum.
TABLE = RANDOM.normal(size=(VOCAB, WIDTH)) * 0.8 ** np.arange(WIDTH) + RANDOM.normal(
    size=WIDTH
)


def in_float64(config):
    """The config with all of it in float64; 1 - 1e-17 rounds to 1: nothing drops.

    With dropout on attention is flax's, which keeps the compute dtype; that of jax.nn
    has a softmax in float32 always.
    """
    return dataclasses.replace(config, compute_dtype="float64", dropout=1e-17)


@functools.cache
def shapes_of(config):
    return jax.eval_shape(
        GPT(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )["params"]


def blocks(dtype):
    """Everything but the embedding, far from its initial values."""
    random = np.random.default_rng(0)
    flat = {
        path: random.normal(1.0 if path.endswith("/scale") else 0.0, 0.4, leaf.shape)
        for path, leaf in trees.flatten(shapes_of(DENSE)).items()
        if not path.startswith("embed/")
    }
    return {path: jnp.asarray(leaf, dtype) for path, leaf in flat.items()}


def padded(table):
    """The table with padding rows of rubbish."""
    return np.pad(table, ((0, 3), (0, 0)), constant_values=5.0)


def dense_model(config, table):
    """Variables of the model with a full table [V, D]."""
    dtype = jnp.dtype(config.compute_dtype)
    embed = {"embed/band_0/wte": jnp.asarray(padded(table), dtype)}
    return {"params": trees.unflatten(blocks(dtype) | embed)}


def factorized_model(config, wte, scale, wpe_shift=0.0):
    """Variables of the model with that table [V, k] and scale [k, D] on both sides."""
    dtype = jnp.dtype(config.compute_dtype)
    flat = blocks(dtype) | {
        "embed/band_0/wte": jnp.asarray(padded(wte), dtype),
        "embed/band_0/scale_up": jnp.asarray(scale, dtype),
    }
    if not config.n_embd_wte_scale_tying:
        flat["embed/band_0/scale_down"] = flat["embed/band_0/scale_up"]
    flat["wpe"] = flat["wpe"] + jnp.asarray(wpe_shift, dtype)
    return {"params": trees.unflatten(flat)}


@jax.jit(static_argnums=0)
def log_probs(config, variables, tokens=TOKENS):
    """[N, V] in the compute dtype, from what training and evaluation read."""
    model = GPT(config)
    h_ND = model.apply(
        variables,
        tokens,
        deterministic=config.dropout == 0,
        method="hidden",
        rngs={"dropout": jax.random.key(0)},
    )
    [band] = model.apply(variables, method="head")
    wte, down, size = band.wte, band.scale_down, band.size
    z_NK = h_ND if down is None else h_ND @ down.T
    return jax.nn.log_softmax(z_NK @ wte[:size].T)


def assert_same_function(config_a, variables_a, config_b, variables_b, tolerance):
    found, expected = (
        np.asarray(log_probs(config, variables))
        for config, variables in ((config_a, variables_a), (config_b, variables_b))
    )
    assert found.dtype == np.dtype(config_a.compute_dtype)
    assert np.ptp(expected) > 2  # a function worth comparing
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def with_rank(config, rank, tied=True):
    return dataclasses.replace(config, n_embd_wte=rank, n_embd_wte_scale_tying=tied)


# 1. Full rank is the baseline.


@pytest.mark.parametrize(
    ("dtype", "tolerance", "split", "tied"),
    [
        ("float32", 1e-5, 0.5, True),
        ("float64", 1e-12, 0.0, True),
        ("float64", 1e-12, 1.0, False),
    ],
)
def test_full_rank_is_the_baseline_at_any_split(dtype, tolerance, split, tied):
    with jax.enable_x64(dtype == "float64"):
        config = DENSE if dtype == "float32" else in_float64(DENSE)
        low_rank = truncate(
            Factorizer(TABLE.astype(dtype), "svd").factors, WIDTH, split
        )
        full = with_rank(config, WIDTH, tied)
        assert_same_function(
            full,
            factorized_model(full, low_rank.wte, low_rank.scale),
            config,
            dense_model(config, TABLE),
            tolerance,
        )


# 2. Any rank is a dense model.


@pytest.mark.parametrize("rank", [1, 7])
def test_any_rank_is_the_dense_model_with_the_product_as_its_table(rank):
    with jax.enable_x64(True):
        config = in_float64(DENSE)
        wte, scale = truncate(Factorizer(TABLE, "svd").factors, rank, 0.5)
        low = with_rank(config, rank)
        assert_same_function(
            low,
            factorized_model(low, wte, scale),
            config,
            dense_model(config, wte @ scale),
            1e-12,
        )


# 3. Eckart and Young.


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 3e-6), ("float64", 1e-13)]
)
def test_error_is_the_tail_of_the_spectrum_and_energy_what_it_leaves(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        factors = Factorizer(TABLE.astype(dtype), "svd").factors
    assert factors.table.dtype == dtype
    exact = np.linalg.svd(TABLE, compute_uv=False)
    energy = energy_kept(factors.singular_values)
    whole = np.sum(TABLE**2)
    for rank in range(1, WIDTH + 1):
        wte, scale = truncate(factors, rank)
        squared_error = np.sum((TABLE - wte.astype(np.float64) @ scale) ** 2)
        tail = np.sum(exact[rank:] ** 2)
        assert squared_error == pytest.approx(tail, abs=tolerance * whole)
        relative = np.sqrt(squared_error / whole)
        assert energy[rank - 1] == pytest.approx(1 - relative**2, abs=tolerance)


# 4. Orthonormal scales.


@pytest.mark.parametrize("rank", range(1, WIDTH + 1))
def test_scale_matrix_is_orthonormal_when_the_table_keeps_the_spectrum(rank):
    scale = truncate(
        Factorizer(TABLE.astype(np.float32), "svd").factors, rank, 0.0
    ).scale
    np.testing.assert_allclose(scale @ scale.T, np.eye(rank), atol=1e-6)


# 5. Gauge.


@pytest.mark.parametrize("tied", [True, False])
def test_any_invertible_matrix_between_table_and_scale_cancels(tied):
    with jax.enable_x64(True):
        config = with_rank(in_float64(DENSE), 3, tied)
        wte, scale = truncate(Factorizer(TABLE, "svd").factors, 3)
        gauge = np.random.default_rng(3).normal(size=(3, 3))
        assert np.abs(gauge - gauge.T).max() > 0.5
        assert_same_function(
            config,
            factorized_model(config, wte @ gauge, np.linalg.inv(gauge) @ scale),
            config,
            factorized_model(config, wte, scale),
            1e-12,
        )


# 6. Centring is free.


@pytest.mark.parametrize("rank", [2, WIDTH])
def test_mean_goes_into_the_positions_and_cancels_in_the_head(rank):
    with jax.enable_x64(True):
        config = in_float64(DENSE)
        table = table_of_rank(Factorizer(TABLE, "pca").factors, rank)
        ((wte, scale),), mean = table.bands, table.mean
        assert np.linalg.norm(mean) > 1
        low = with_rank(config, rank)
        assert_same_function(
            low,
            factorized_model(low, wte, scale, wpe_shift=mean),
            config,
            dense_model(config, mean + wte @ scale),
            1e-12,
        )


def test_error_of_a_centred_table_lies_between_two_uncentred_ranks():
    with jax.enable_x64(True):
        plain, centred = (
            Factorizer(TABLE, "svd").factors,
            Factorizer(TABLE, "pca").factors,
        )

    def error(factors, rank):
        return np.linalg.norm(TABLE - table_of_rank(factors, rank).dense())

    for rank in range(1, WIDTH):
        found = error(centred, rank)
        assert error(plain, rank + 1) - 1e-12 <= found
        assert found <= error(plain, rank) + 1e-12


# 7. Counts.


def test_counts_of_gpt2_small():
    assert embedding_parameters(gpt_config()) == 38_597_376
    assert total_parameters(gpt_config()) == 124_439_808


@pytest.mark.parametrize(
    ("rank", "tied", "times", "untied", "untied_times", "model", "model_times"),
    [
        (128, 6_531_200, 5.91, 6_629_504, 5.82, 92_373_632, 1.347),
        (768, 39_187_200, 0.985, 39_777_024, 0.970, 125_029_632, 0.995),
    ],
)
def test_counts_of_gpt2_small_at_a_rank(
    rank, tied, times, untied, untied_times, model, model_times
):
    full = gpt_config()
    one, two = with_rank(full, rank), with_rank(full, rank, tied=False)
    assert embedding_parameters(one) == tied
    assert embedding_parameters(two) == untied
    assert total_parameters(one) == model
    assert total_parameters(two) == model + rank * 768
    digits = 3 if rank == 768 else 2
    assert round(embedding_parameters(full) / tied, digits) == times
    assert round(embedding_parameters(full) / untied, digits) == untied_times
    assert round(total_parameters(full) / model, 3) == model_times


@pytest.mark.parametrize(
    ("embedding", "bias", "multiple"),
    [
        ({}, True, 8),
        ({"n_embd_wte": 3}, False, 1),
        ({"n_embd_wte": 3, "n_embd_wte_scale_tying": False}, True, 8),
        ({"band_sizes": (5, 24), "band_ranks": (0, 2)}, False, 8),
    ],
)
def test_counts_are_those_of_the_leaves_without_the_padding(embedding, bias, multiple):
    config = dataclasses.replace(DENSE, bias=bias, vocab_multiple=multiple, **embedding)
    flat = trees.flatten(shapes_of(config))
    last = flat[f"embed/band_{len(config.bands) - 1}/wte"]
    padding = (config.padded_vocab_size - VOCAB) * last.shape[1]
    assert (padding > 0) == (multiple == 8)
    sizes = {path: leaf.size for path, leaf in flat.items()}
    tables = sum(size for path, size in sizes.items() if path.startswith("embed/"))
    order = VOCAB if len(config.bands) > 1 else 0  # A position of each token.
    assert embedding_parameters(config) == tables - padding + order
    assert total_parameters(config) == sum(sizes.values()) - padding + order
    assert any("bias" in path for path in flat) == bias
