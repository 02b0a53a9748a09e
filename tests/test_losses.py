"""Chunked token losses against a dense log_softmax."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pcagpt.kernels.mosaic import low_rank_head as mosaic_head
from pcagpt.kernels.triton import low_rank_head
from pcagpt.losses import cross_entropy, distillation, scan_chunks, token_losses
from pcagpt.losses.interval import mean_interval
from pcagpt.model import HeadBand
from pcagpt.sharding import placement

pytestmark = pytest.mark.usefixtures("quick")
WIDTH, TEACHER_WIDTH = 20, 5

# Bands as (stored rows, real rows, rank; None: full width).
HEADS = {
    "full": [(16, 11, None)],
    "low rank": [(16, 11, 4)],
    "high rank": [(16, 11, 17)],  # higher than the tests let the kernels take
    "bands": [(3, 3, None), (7, 5, 4), (8, 3, 2)],
    "padded full band": [(3, 3, 2), (16, 11, None)],
}
each_head = pytest.mark.parametrize("bands", HEADS.values(), ids=HEADS)
both_forms = pytest.mark.parametrize("kernels", ["xla", "triton"])


@pytest.fixture(autouse=True)
def low_limit(monkeypatch):
    monkeypatch.setattr(low_rank_head, "MAX_RANK", 16)


def starts(bands):
    """The first column of each band."""
    return [sum(size for _, size, _ in bands[:i]) for i in range(len(bands))]


def inputs(bands, tokens=28, dtype=np.float32):
    """Hidden states, head and targets; one target in five is ignored."""
    random = np.random.default_rng(tokens)

    def normal(rows, columns):  # Products have a standard deviation of 1.
        return jnp.asarray(random.normal(size=(rows, columns)) / columns**0.25, dtype)

    head = tuple(
        HeadBand(
            normal(rows, rank or WIDTH),
            None if rank is None else normal(rank, WIDTH),
            start,
            size,
        )
        for start, (rows, size, rank) in zip(starts(bands), bands, strict=True)
    )
    targets = random.integers(0, sum(band.size for band in head), tokens)
    targets[::5] = -1
    return normal(tokens, WIDTH), head, jnp.asarray(targets, jnp.int32)


def log_softmax(h, head):
    """[N, V] over the real rows, all at once, by jax's own function."""
    logits = [
        (h if band.scale_down is None else h @ band.scale_down.T)
        @ band.wte[: band.size].T
        for band in head
    ]
    return jax.nn.log_softmax(jnp.concatenate(logits, axis=1))


@jax.jit
def dense_losses(h, head, targets):
    log_p = log_softmax(h, head)
    picked = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[:, None], axis=1)
    return jnp.where(targets >= 0, -picked[:, 0], 0.0)


def with_gradients(loss):
    """Loss and its gradients in the hidden states and the head."""
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


dense = with_gradients(lambda *arguments: dense_losses(*arguments).sum())


@functools.cache
def chunked(chunks, logits_dtype=jnp.float32, kernels="xla", factor=1.0):
    def loss(h, head, targets):
        options = {"logits_dtype": logits_dtype, "chunks": chunks, "kernels": kernels}
        return factor * cross_entropy(h, head, targets, **options)

    return with_gradients(loss)


def assert_close(found, expected, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32),
            np.asarray(b, np.float32),
            rtol=tolerance,
            atol=tolerance,
        ),
        found,
        expected,
    )


@each_head
def test_each_token_loss_is_that_of_a_dense_log_softmax(bands):
    arguments = inputs(bands)
    found = jax.jit(token_losses)(*arguments)
    assert found.dtype == jnp.float32
    assert_close(found, dense_losses(*arguments), 3e-6)
    np.testing.assert_array_equal(found[::5], 0)


@both_forms
@each_head
def test_sum_and_gradients_are_those_of_a_dense_log_softmax(bands, kernels):
    arguments = inputs(bands)
    found = chunked(2, kernels=kernels)(*arguments)
    assert_close(found, dense(*arguments), 1e-5)


def test_each_band_takes_the_kernels_of_its_rank(monkeypatch):
    # The full band is too wide for the kernels; the rank of the others becomes 16.
    h, head, targets = inputs(HEADS["bands"], dtype=jnp.bfloat16)
    counts = dict.fromkeys((low_rank_head, mosaic_head), 0)

    def count(form, function, *arguments):
        counts[form] += 1
        return function(*arguments)

    for form, name in itertools.product(counts, ("summarize", "table_gradient")):
        counted = functools.partial(count, form, getattr(form, name))
        monkeypatch.setattr(form, name, counted)
    wide = h.astype(jnp.float32), jax.tree.map(jnp.float32, head), targets
    wanted = dense(*wide)
    for limit, of_mosaic in ((16, 4), (0, 0)):
        monkeypatch.setattr(mosaic_head, "MAX_RANK", limit)
        found = chunked.__wrapped__(2, kernels="mosaic")(h, head, targets)
        assert counts == {mosaic_head: of_mosaic, low_rank_head: 4 - of_mosaic}
        assert_close(found, wanted, 0.03)
        counts[mosaic_head] = 0


# 28 tokens have every divisor, 30 have no 7, 29 have none.
@pytest.mark.parametrize(("tokens", "chunks"), [(28, 7), (30, 7), (29, 7)])
def test_any_number_of_chunks_gives_the_same_loss_and_gradients(tokens, chunks):
    arguments = inputs(HEADS["bands"], tokens)
    assert_close(chunked(chunks)(*arguments), dense(*arguments), 1e-5)


@both_forms
def test_loss_without_gradients_is_the_same(kernels):
    arguments = inputs(HEADS["bands"])
    value = jax.jit(functools.partial(cross_entropy, chunks=2, kernels=kernels))
    assert_close(value(*arguments), dense(*arguments)[0], 1e-5)


@pytest.mark.parametrize("name", ["full", "high rank"])
def test_kernels_do_not_round_a_chunks_gradient_of_a_table(name):
    h, head, targets = inputs(HEADS[name])
    loss = functools.partial(cross_entropy, logits_dtype=jnp.bfloat16, kernels="triton")
    with jax.disable_jit():  # XLA may keep more digits than it is asked for.
        [band] = jax.grad(loss, 1)(h.astype(jnp.bfloat16), head, targets)
    gradient = band.wte[: band.size]
    rounded = gradient.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(gradient != rounded) > 0.9


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("bands", "xla"), ("bands", "triton"), ("high rank", "triton")],
)
def test_gradients_have_the_dtypes_of_their_parameters(name, kernels):
    h, head, targets = inputs(HEADS[name])
    _, gradients = chunked(2, jnp.bfloat16, kernels)(
        h.astype(jnp.bfloat16), head, targets
    )
    assert gradients[0].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients[1])} == {"float32"}


def array_shapes(function, *arguments):
    """Shapes of all arrays in the traced program and its parts."""
    found = re.findall(
        r"[fi]\d+\[([\d,]+)\]", str(jax.make_jaxpr(function)(*arguments))
    )
    return {tuple(sorted(map(int, shape.split(",")))) for shape in found}


def test_kernels_store_no_logits_of_a_low_rank():
    bands, tokens = [(640, 640, 4), (896, 896, 2)], 256
    shapes = array_shapes(chunked(1, kernels="triton"), *inputs(bands, tokens))
    assert (4, 640) in shapes
    assert max(map(math.prod, shapes)) < tokens * 640 / 4


@both_forms
def test_gradient_is_scaled_by_the_gradient_of_the_result(kernels):
    arguments = inputs(HEADS["bands"])
    value, gradients = chunked(2, kernels=kernels)(*arguments)
    found = chunked(2, kernels=kernels, factor=-4.0)(*arguments)  # rounds nothing
    wanted = jax.tree.map(lambda x: -4.0 * x, (value, gradients))
    assert_close(found, wanted, 1e-6)


@both_forms
def test_ignored_targets_have_neither_loss_nor_gradient(kernels):
    h, head, targets = inputs(HEADS["bands"])
    none = jnp.full_like(targets, -1)
    value, gradients = chunked(2, kernels=kernels)(h, head, none)
    assert value == 0
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(leaf, 0)
    _, (of_h, _) = chunked(2, kernels=kernels)(h, head, targets)
    np.testing.assert_array_equal(np.any(of_h != 0, axis=1), targets >= 0)


@both_forms
def test_padding_rows_get_no_gradient_and_change_nothing(kernels):
    h, head, targets = inputs(HEADS["bands"])
    value, (_, gradient) = chunked(2, kernels=kernels)(h, head, targets)
    size = head[-1].size
    np.testing.assert_array_equal(gradient[-1].wte[size:], 0)
    louder = head[-1].replace(wte=head[-1].wte.at[size:].set(1e4))
    again, (_, same) = chunked(2, kernels=kernels)(h, (*head[:-1], louder), targets)
    assert value == again
    np.testing.assert_array_equal(gradient[0].wte, same[0].wte)


def test_only_logits_are_rounded_and_reductions_are_in_float32():
    h, head, targets = inputs(HEADS["low rank"])
    half = h.astype(jnp.bfloat16)
    value, gradients = chunked(2, jnp.bfloat16)(half, head, targets)
    expected, wanted = dense(half.astype(jnp.float32), head, targets)
    assert value.dtype == jnp.float32
    assert value != expected
    assert float(value) == pytest.approx(float(expected), rel=4e-3)
    assert_close(gradients, wanted, 0.06)


def test_logits_are_rounded_once_and_to_the_dtype_asked_for():
    # Not compiled: XLA may keep more digits than it is asked for.
    h, head, targets = inputs(HEADS["low rank"])
    half, [band] = h.astype(jnp.bfloat16), head
    z = half @ band.scale_down.astype(jnp.bfloat16).T
    for logits_dtype in (jnp.bfloat16, jnp.float32):
        found = token_losses(half, head, targets, logits_dtype)
        logits = jnp.matmul(
            z, band.wte.astype(jnp.bfloat16).T, preferred_element_type=logits_dtype
        )
        identity = (HeadBand(jnp.eye(16), None, 0, band.size),)
        expected = dense_losses(logits.astype(jnp.float32), identity, targets)
        assert found.dtype == jnp.float32
        assert_close(found, expected, 1e-6)


def test_chunked_loss_never_holds_logits_of_all_tokens():
    tokens, rows, chunks = 512, 1024, 8
    arguments = inputs([(rows, rows - 5, 4)], tokens)
    assert (tokens, rows - 5) in array_shapes(dense, *arguments)
    for kernels, rank in (("xla", 4), ("xla", None), ("triton", None)):
        given = inputs([(rows, rows - 5, rank)], tokens)
        shapes = array_shapes(chunked(chunks, kernels=kernels), *given)
        assert max(map(math.prod, shapes)) == tokens // chunks * rows
    dense_memory, memory = (
        function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
        for function in (dense, chunked(chunks))
    )
    assert memory <= dense_memory / 4


# Distillation


def taught(bands, tokens=30):
    """As `inputs`, with a teacher's hidden states and head, padded with loud rows."""
    random = np.random.default_rng(tokens + 1)
    teacher_h = jnp.asarray(random.normal(size=(tokens, TEACHER_WIDTH)), jnp.float32)
    tables = [random.normal(size=(rows, TEACHER_WIDTH)) for rows, _, _ in bands]
    for table, (_, size, _) in zip(tables, bands, strict=True):
        table[size:] = 9.0
    teacher_head = tuple(
        HeadBand(jnp.asarray(table, jnp.float32), None, start, size)
        for table, start, (_, size, _) in zip(tables, starts(bands), bands, strict=True)
    )
    return (*inputs(bands, tokens), teacher_h, teacher_head)


def dense_distillation(h, head, targets, teacher_h, teacher_head, share=1.0):
    """The definition of KL on whole arrays of log-probabilities."""
    log_q, log_p = log_softmax(h, head), log_softmax(teacher_h, teacher_head)
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1)
    kl = jnp.where(targets >= 0, kl, 0.0)
    return jnp.sum((1 - share) * dense_losses(h, head, targets) + share * kl)


def distilled(chunks, logits_dtype=jnp.float32, share=1.0):
    """(loss, all sums) and the loss's gradients."""

    def loss(*arguments):
        options = {"share": share, "logits_dtype": logits_dtype, "chunks": chunks}
        sums = distillation(*arguments, **options)
        return sums["loss"], sums

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize(
    ("name", "chunks", "share"),
    [("full", 1, 0.25), ("low rank", 3, 1.0), ("bands", 3, 0.25)],
)
def test_distillation_and_its_gradients_are_those_of_a_dense_divergence(
    name, chunks, share
):
    arguments = taught(HEADS[name])
    expected = with_gradients(functools.partial(dense_distillation, share=share))
    (loss, sums), gradients = distilled(chunks, share=share)(*arguments)
    assert_close((loss, gradients), expected(*arguments), 1e-5)
    wanted = dense_losses(*arguments[:3]).sum(), dense_distillation(*arguments)
    assert_close((sums["cross_entropy"], sums["kl"]), wanted, 1e-5)
    assert sums["kl"] > 1


@pytest.mark.parametrize("logits_dtype", [jnp.float32, jnp.bfloat16])
def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(logits_dtype):
    h, head, targets = inputs([(7, 5, None), (8, 3, None)])
    (loss, sums), gradients = distilled(2, logits_dtype)(h, head, targets, h, head)
    assert loss == sums["kl"] == 0
    for leaf in jax.tree.leaves(gradients):
        np.testing.assert_allclose(leaf, 0, atol=2e-6)


def test_distilled_logits_are_rounded_to_the_dtype_asked_for():
    h, head, targets, teacher_h, teacher_head = taught(HEADS["bands"])
    half, teacher_half = h.astype(jnp.bfloat16), teacher_h.astype(jnp.bfloat16)
    (loss, _), gradients = distilled(3, jnp.bfloat16)(
        half, head, targets, teacher_half, teacher_head
    )
    expected, wanted = with_gradients(dense_distillation)(
        half.astype(jnp.float32),
        head,
        targets,
        teacher_half.astype(jnp.float32),
        teacher_head,
    )
    assert loss.dtype == jnp.float32
    assert loss != expected
    assert float(loss) == pytest.approx(float(expected), rel=4e-3)
    assert gradients[0].dtype == jnp.bfloat16
    assert_close(gradients, wanted, 0.06)


def test_distilling_holds_the_logits_of_one_chunk():
    arguments = taught([(96, 90, 4)])
    for chunks, rows in ((1, 30), (3, 10)):
        shapes = array_shapes(distilled(chunks), *arguments)
        assert max(shape[0] for shape in shapes if shape[-1] == 96) == rows


# Chunks


@pytest.mark.parametrize(
    ("count", "asked", "used"), [(12, 5, 4), (12, 100, 12), (13, 12, 1)]
)
def test_chunk_count_is_lowered_to_the_nearest_divisor(count, asked, used):
    calls = []

    def record(carry, arrays):
        calls.append(arrays[0].shape)
        return carry, arrays[0]

    _, outputs = scan_chunks(record, 0, asked, jnp.arange(count))
    assert set(calls) == {(count // used,)}
    np.testing.assert_array_equal(outputs, np.arange(count))


def test_no_row_of_a_chunk_moves_to_another_device():
    def record(carry, arrays):
        calls.append(arrays[0].shape)
        return carry, arrays[0]

    calls, mesh = [], placement.make_mesh(2, 4)
    with jax.set_mesh(mesh):  # 3 rows on each of 8 devices: no 4 chunks.
        jax.eval_shape(lambda rows: scan_chunks(record, 0, 4, rows), jnp.arange(24))
    assert set(calls) == {(8,)}


@pytest.mark.parametrize(
    ("devices", "chunk_of"), [(1, lambda row: row // 4), (2, lambda row: row % 3)]
)
def test_chunks_follow_one_another_on_one_device_and_alternate_on_several(
    devices, chunk_of
):
    def step(carry, arrays):
        values, pairs = arrays
        return carry + 1, (values * 10 + carry, pairs)

    with jax.set_mesh(placement.make_mesh(devices, 1)):
        carry, (values, pairs) = scan_chunks(
            step, 0, 3, jnp.arange(12), jnp.arange(24).reshape(12, 2)
        )
    assert carry == 3
    rows = np.arange(12)
    np.testing.assert_array_equal(values, rows * 10 + chunk_of(rows))
    np.testing.assert_array_equal(pairs, np.arange(24).reshape(12, 2))


def test_intervals_are_those_worked_by_hand():
    mean, bounds = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 * 1.0 / math.sqrt(3)  # t at 97.5 % with 2 degrees of freedom
    assert mean == 2.0
    assert bounds == pytest.approx([2 - half, 2 + half], rel=1e-6)
    mean, bounds = mean_interval([1.0, 3.0], np.array([3.0, 1.0]))
    # w = ¾, ¼: Σ w² (x − 1.5)² = 0.28125, over 1 − Σ w² = 0.375; t with 1 degree.
    half = 12.706205 * math.sqrt(0.28125 / 0.375)
    assert mean == 1.5
    assert bounds == pytest.approx([1.5 - half, 1.5 + half], rel=1e-6)
    assert mean_interval([2.0]) == (2.0, None)
