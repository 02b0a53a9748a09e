"""Chunked token losses against a dense log_softmax."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcagpt.kernels import head
from pcagpt.losses import cross_entropy, distillation, scan_chunks, token_losses
from pcagpt.model import HeadBand

pytestmark = pytest.mark.usefixtures("quick")
WIDTH = 6

# Bands as (stored rows, real rows, rank; None: full width).
HEADS = {
    "dense": [(11, 11, None)],
    "padded": [(16, 11, 4)],
    "padded full": [(16, 11, None)],
    "high rank": [(16, 11, 5)],
    "bands": [(3, 3, None), (7, 5, 4), (8, 3, 2)],
    "padded full band": [(3, 3, 2), (16, 11, None)],
}
each_head = pytest.mark.parametrize("bands", HEADS.values(), ids=HEADS)


def inputs(bands, tokens, dtype=np.float32):
    """Hidden states, tables, sizes and targets; one target in five is ignored."""
    random = np.random.default_rng(tokens)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape), dtype)

    tables = tuple(
        (
            normal(rows, rank or WIDTH),
            None if rank is None else normal(rank, WIDTH),
        )
        for rows, _, rank in bands
    )
    sizes = tuple(real for _, real, _ in bands)
    targets = random.integers(0, sum(sizes), tokens).astype(np.int32)
    targets[::5] = -1
    return normal(tokens, WIDTH), tables, sizes, jnp.asarray(targets)


def head_of(tables, sizes):
    pairs = zip(tables, sizes, strict=True)
    return tuple(HeadBand(wte, down, size) for (wte, down), size in pairs)


def dense_losses(h, tables, sizes, targets):
    """One [N, V] of logits over the real rows, and jax's own log_softmax."""
    logits = jnp.concatenate(
        [
            (h if down is None else h @ down.T) @ wte[:size].T
            for (wte, down), size in zip(tables, sizes, strict=True)
        ],
        axis=1,
    )
    picked = jnp.take_along_axis(
        jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[:, None], axis=1
    )[:, 0]
    return jnp.where(targets >= 0, -picked, 0.0)


def gradient_by(loss):
    """Value and gradient in the hidden states and all tables."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)


@functools.partial(jax.jit, static_argnums=2)
def losses(h, tables, sizes, targets):
    return token_losses(h, head_of(tables, sizes), targets)


def value_of(chunks, logits_dtype=jnp.float32, factor=1.0, kernels="xla"):
    @functools.partial(jax.jit, static_argnums=2)
    def loss(h, tables, sizes, targets):
        return factor * cross_entropy(
            h,
            head_of(tables, sizes),
            targets,
            logits_dtype=logits_dtype,
            chunks=chunks,
            kernels=kernels,
        )

    return loss


@functools.cache
def chunked(*arguments, **keywords):
    return gradient_by(value_of(*arguments, **keywords))


dense = gradient_by(lambda *arguments: dense_losses(*arguments).sum())


def assert_close(found, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance
        ),
        found,
        expected,
    )


@each_head
def test_each_token_loss_is_that_of_a_dense_log_softmax(bands):
    arguments = inputs(bands, 30)
    found = losses(*arguments)
    assert found.dtype == jnp.float32
    assert_close(found, dense_losses(*arguments), 3e-6)
    np.testing.assert_array_equal(found[::5], 0)


# 28 has every divisor asked for, 30 not 7, 29 none.
@pytest.mark.parametrize(
    ("tokens", "chunks"), [(28, 1), (28, 2), (28, 7), (30, 7), (29, 7)]
)
@each_head
def test_sum_and_gradients_are_those_of_a_dense_log_softmax(bands, tokens, chunks):
    arguments = inputs(bands, tokens)
    assert_close(chunked(chunks)(*arguments), dense(*arguments), 1e-5)


@each_head
def test_kernels_give_the_sum_and_gradients_of_a_dense_log_softmax(bands, monkeypatch):
    # The one high rank of the bands is then not for the kernels.
    monkeypatch.setattr(head, "MAX_RANK", 4)
    arguments = inputs(bands, 28)
    found = gradient_by(value_of(2, kernels="pallas"))(*arguments)
    assert_close(found, dense(*arguments), 1e-5)


@pytest.mark.parametrize("name", ["padded full", "high rank"])
def test_kernels_round_no_chunk_s_gradient_of_a_table(name, monkeypatch):
    monkeypatch.setattr(head, "MAX_RANK", 4)
    h, tables, *rest = inputs(HEADS[name], 28)
    value = value_of(1, jnp.bfloat16, kernels="pallas")
    with jax.disable_jit():  # XLA may keep more digits than it is asked for.
        of_tables = jax.grad(value, 1)(h.astype(jnp.bfloat16), tables, *rest)
    gradient = of_tables[0][0][:11]  # The rest is padding, whose gradient is 0.
    rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(gradient != rounded) > 0.9


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_gradients_have_the_dtypes_of_what_they_are_of(chunks, kernels, monkeypatch):
    monkeypatch.setattr(head, "MAX_RANK", 4)
    for name in ("padded", "padded full", "high rank", "bands"):
        h, tables, *rest = inputs(HEADS[name], 28, jnp.bfloat16)
        value = value_of(chunks, jnp.bfloat16, kernels=kernels)
        _, gradients = gradient_by(value)(h, tables, *rest)
        assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("bfloat16")}


def test_kernels_store_no_logits_of_a_low_rank():
    bands, tokens = [(640, 640, 4), (896, 896, 2)], 256
    program = jax.make_jaxpr(
        jax.grad(value_of(1, kernels="pallas"), (0, 1)), static_argnums=2
    )(*inputs(bands, tokens))
    sizes = [int(size) for size in re.findall(r"f32\[(\d+),\d+\]", str(program))]
    shapes = re.findall(r"\[([\d,]+)\]", str(program))
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert sizes and largest < tokens * 640 / 4


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_sum_without_gradients_is_the_same(kernels):
    arguments = inputs(HEADS["bands"], 28)
    value, _ = chunked(2)(*arguments)
    assert_close(value_of(2, kernels=kernels)(*arguments), value, 1e-6)


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
def test_gradient_is_scaled_by_what_comes_from_above(kernels):
    arguments = inputs(HEADS["bands"], 28)
    _, once = chunked(2, kernels=kernels)(*arguments)
    value, scaled = chunked(2, factor=-3.5, kernels=kernels)(*arguments)
    assert value == -3.5 * chunked(2, kernels=kernels)(*arguments)[0]
    assert_close(scaled, jax.tree.map(lambda g: -3.5 * g, once), 1e-6)


def test_ignored_targets_have_neither_loss_nor_gradient():
    h, tables, sizes, targets = inputs(HEADS["bands"], 30)
    value, (gradient_h, gradient_tables) = chunked(3)(
        h, tables, sizes, jnp.full_like(targets, -1)
    )
    assert value == 0
    for leaf in (gradient_h, *jax.tree.leaves(gradient_tables)):
        np.testing.assert_array_equal(leaf, 0)
    _, (gradient_h, _) = chunked(3)(h, tables, sizes, targets)
    moved = np.any(gradient_h != 0, axis=1)
    np.testing.assert_array_equal(moved, targets >= 0)


def test_padding_rows_get_no_gradient_and_change_nothing():
    h, tables, sizes, targets = inputs(HEADS["bands"], 30)
    value, (_, gradient) = chunked(2)(h, tables, sizes, targets)
    np.testing.assert_array_equal(gradient[-1][0][3:], 0)
    wte, down = tables[-1]
    louder = (*tables[:-1], (wte.at[3:].set(1e4), down))
    again, (_, same) = chunked(2)(h, louder, sizes, targets)
    assert value == again
    np.testing.assert_array_equal(gradient[0][0], same[0][0])


def test_bfloat16_logits_are_rounded_and_everything_after_is_in_float32():
    h, tables, sizes, targets = inputs(HEADS["padded"], 28)
    half = h.astype(jnp.bfloat16)
    value, (gradient_h, gradient_tables) = chunked(2, jnp.bfloat16)(
        half, tables, sizes, targets
    )
    expected, (expected_h, expected_tables) = dense(
        half.astype(jnp.float32), tables, sizes, targets
    )
    assert value.dtype == jnp.float32
    assert value != expected
    assert float(value) == pytest.approx(float(expected), rel=4e-3)
    assert gradient_h.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient_tables)} == {
        jnp.dtype("float32")
    }
    assert_close(np.asarray(gradient_h, np.float32), expected_h, 0.06)
    assert_close(gradient_tables, expected_tables, 0.06)


def test_logits_are_rounded_once_and_to_what_is_asked_for():
    # Not compiled: XLA may keep more digits than it is asked for.
    h, tables, sizes, targets = inputs(HEADS["padded"], 28)
    half = h.astype(jnp.bfloat16)
    ((wte, down),) = tables
    z = half @ down.astype(jnp.bfloat16).T
    for logits_dtype in (jnp.bfloat16, jnp.float32):
        found = token_losses(half, head_of(tables, sizes), targets, logits_dtype)
        logits = jnp.matmul(
            z, wte.astype(jnp.bfloat16).T, preferred_element_type=logits_dtype
        )
        expected = dense_losses(
            logits.astype(jnp.float32), [(jnp.eye(16), None)], sizes, targets
        )
        assert found.dtype == jnp.float32
        assert_close(found, expected, 1e-6)


# Distillation


TEACHER_WIDTH = 5


def taught(bands, tokens):
    """As `inputs`, with a teacher's hidden states and tables, padded with loud rows."""
    random = np.random.default_rng(tokens + 1)
    teacher_h = jnp.asarray(random.normal(size=(tokens, TEACHER_WIDTH)), jnp.float32)
    tables = [random.normal(size=(rows, TEACHER_WIDTH)) for rows, _, _ in bands]
    for table, (_, real, _) in zip(tables, bands, strict=True):
        table[real:] = 9.0
    tables = tuple(jnp.asarray(table, jnp.float32) for table in tables)
    return (*inputs(bands, tokens), teacher_h, tables)


def dense_distillation(h, tables, sizes, targets, teacher_h, teacher_tables, share=1.0):
    """Both whole arrays of log-probabilities, and the definition of KL."""
    teacher_tables = [(table, None) for table in teacher_tables]
    log_q, log_p = (
        jax.nn.log_softmax(
            jnp.concatenate(
                [
                    (x if down is None else x @ down.T) @ wte[:size].T
                    for (wte, down), size in zip(pairs, sizes, strict=True)
                ],
                axis=1,
            )
        )
        for x, pairs in ((h, tables), (teacher_h, teacher_tables))
    )
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
    kl = jnp.where(targets >= 0, kl, 0.0)
    likelihood = dense_losses(h, tables, sizes, targets)
    return jnp.sum((1 - share) * likelihood + share * kl)


def distilled_by(chunks, logits_dtype=jnp.float32, share=1.0):
    """(loss, all sums) and the loss's gradients."""

    def loss(h, tables, sizes, targets, teacher_h, teacher_tables):
        found = distillation(
            h,
            head_of(tables, sizes),
            targets,
            teacher_h,
            head_of([(table, None) for table in teacher_tables], sizes),
            share=share,
            logits_dtype=logits_dtype,
            chunks=chunks,
        )
        return found["loss"], found

    return jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2
    )


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("chunks", [1, 3])
@each_head
def test_distillation_and_its_gradients_are_those_of_a_dense_divergence(
    bands, chunks, share
):
    arguments = taught(bands, 30)
    expected = gradient_by(functools.partial(dense_distillation, share=share))
    (loss, sums), gradients = distilled_by(chunks, share=share)(*arguments)
    assert_close((loss, gradients), expected(*arguments), 1e-5)
    wanted = dense_losses(*arguments[:4]).sum(), dense_distillation(*arguments)
    assert_close((sums["cross_entropy"], sums["kl"]), wanted, 1e-5)
    assert sums["kl"] > 1


@pytest.mark.parametrize("logits_dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(logits_dtype):
    h, tables, sizes, targets = inputs([(7, 5, None), (8, 3, None)], 30)
    (loss, sums), gradients = distilled_by(3, logits_dtype)(
        h, tables, sizes, targets, h, tuple(wte for wte, _ in tables)
    )
    assert loss == sums["kl"] == 0
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_allclose(leaf, 0, atol=2e-6)


def test_distilled_logits_are_rounded_to_what_is_asked_for():
    h, tables, sizes, targets, teacher_h, teacher_tables = taught(HEADS["bands"], 30)
    half, teacher_half = h.astype(jnp.bfloat16), teacher_h.astype(jnp.bfloat16)
    (loss, _), (gradient_h, gradient_tables) = distilled_by(3, jnp.bfloat16)(
        half, tables, sizes, targets, teacher_half, teacher_tables
    )
    expected, (expected_h, expected_tables) = gradient_by(dense_distillation)(
        half.astype(jnp.float32),
        tables,
        sizes,
        targets,
        teacher_half.astype(jnp.float32),
        teacher_tables,
    )
    assert loss.dtype == jnp.float32
    assert loss != expected
    assert float(loss) == pytest.approx(float(expected), rel=4e-3)
    assert gradient_h.dtype == jnp.bfloat16
    assert_close(np.asarray(gradient_h, np.float32), expected_h, 0.06)
    assert_close(gradient_tables, expected_tables, 0.06)


def test_distilling_holds_the_logits_of_one_chunk():
    arguments = taught([(96, 90, 4)], 30)
    for chunks, rows in ((1, 30), (3, 10)):
        function = functools.partial(distilled_by(chunks), *arguments[:3])
        jaxpr = str(jax.make_jaxpr(function)(*arguments[3:]))
        found = {int(n) for n in re.findall(r"f32\[(\d+),96\]", jaxpr)}
        assert max(found) == rows


# Chunks


@pytest.mark.parametrize(
    ("count", "asked", "used"),
    [(12, 1, 1), (12, 5, 4), (12, 12, 12), (12, 100, 12), (13, 12, 1), (30, 7, 6)],
)
def test_chunk_count_is_lowered_to_the_nearest_divisor(count, asked, used):
    calls = []

    def record(carry, arrays):
        calls.append(arrays[0].shape)
        return carry, arrays[0]

    _, outputs = scan_chunks(record, 0, asked, jnp.arange(count))
    assert set(calls) == {(count // used,)}
    np.testing.assert_array_equal(outputs, np.arange(count))


def test_chunks_are_strided_handed_on_in_turn_and_joined_in_order():
    def step(carry, arrays):
        (values, pairs) = arrays
        return carry + 1, (values * 10 + carry, pairs)

    carry, (values, pairs) = scan_chunks(
        step, 0, 3, jnp.arange(12), jnp.arange(24).reshape(12, 2)
    )
    assert carry == 3
    # Row n is of chunk n mod 3, so that a sharded axis stays on its device.
    np.testing.assert_array_equal(values, np.arange(12) * 10 + np.arange(12) % 3)
    np.testing.assert_array_equal(pairs, np.arange(24).reshape(12, 2))


def float32_shapes(function, *arguments):
    """Shapes of all float32 values that the traced function and its parts hold."""
    found = re.findall(r"f32\[([\d,]+)\]", str(function.trace(*arguments).jaxpr))
    return {tuple(sorted(map(int, shape.split(",")))) for shape in found}


def test_chunked_loss_never_holds_logits_of_all_tokens():
    tokens, rows, chunks = 512, 1024, 8
    h, tables, sizes, targets = inputs([(rows, rows - 5, 4)], tokens)
    arguments = h, tables, sizes, targets
    memory = {}
    for name, function in (("dense", dense), ("chunked", chunked(chunks))):
        compiled = function.lower(*arguments).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["dense"] >= 4 * tokens * rows
    assert memory["chunked"] <= memory["dense"] / 4

    assert (tokens, rows - 5) in float32_shapes(dense, *arguments)
    for function in (chunked(chunks), value_of(chunks)):
        shapes = float32_shapes(function, *arguments)
        assert (tokens // chunks, rows) in shapes
        assert max(map(math.prod, shapes)) == tokens // chunks * rows
