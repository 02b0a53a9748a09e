"""Each kernel against float64: interpreted on CPUs, compiled on GPUs."""

import functools
import itertools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from runs import gpt_config

from pcagpt import kernels
from pcagpt.kernels import norm
from pcagpt.kernels.mosaic import attention, mlp
from pcagpt.kernels.mosaic import launch as mosaic_launch
from pcagpt.kernels.mosaic import low_rank_head as mosaic_head
from pcagpt.kernels.mosaic import norm as mosaic_norm
from pcagpt.kernels.mosaic import softmax as mosaic_softmax
from pcagpt.kernels.triton import gelu, launch, low_rank_head, one_token, softmax
from pcagpt.kernels.triton import norm as triton_norm
from pcagpt.losses.fused import head_kernels
from pcagpt.model.attention import Attention
from pcagpt.sharding.inside import by_device
from pcagpt.sharding.placement import BATCH_AXES, make_mesh

ON_GPU = jax.default_backend() != "cpu"


class Precision(NamedTuple):
    """Dtype of inputs, and tolerances relative to the norm of the expected result.

    rounded: for values rounded to the dtype; exact: for others; head: for the head's
    gradients, since a logit of 20 in float32 makes its probability uncertain by 1e-6.
    """

    dtype: jnp.dtype
    rounded: float
    exact: float
    head: float


HALF = Precision(jnp.bfloat16, 4e-3, 2e-3, 4e-3)
FULL = Precision(jnp.float32, 1e-6, 1e-6, 3e-6)  # not for GPUs
PRECISIONS = [HALF] if ON_GPU else [HALF, FULL]
in_each_precision = pytest.mark.parametrize(
    "precision", PRECISIONS, ids=lambda p: jnp.dtype(p[0]).name
)
pytestmark = pytest.mark.usefixtures("quick")
on_eight_devices = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices"
)


def random_array(seed, *shape, dtype=jnp.float32, scale=1.0):
    values = np.random.default_rng(seed).normal(scale=scale, size=shape)
    return jnp.asarray(values, dtype)


def exact(*arrays):
    return [np.asarray(array.astype(jnp.float32), np.float64) for array in arrays]


def assert_near(found, wanted, tolerance):
    assert np.isfinite(found).all()
    error = np.linalg.norm(np.asarray(found, np.float64) - wanted)
    assert error <= tolerance * np.linalg.norm(wanted), error / np.linalg.norm(wanted)


def softmax_of(logits):
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return p / p.sum(axis=1, keepdims=True)


# The head: tokens, stored rows, real rows, rank. Multiples of the tiles and others;
# tables shorter than a tile, with several programs per tile; rows in several pieces.
HEADS = [(128, 256, 256, 32), (100, 77, 70, 5), (64, 300, 257, 200), (1, 9, 8, 64)]
HEADS += [(400, 130, 129, 128), (70, 100, 90, 149), (65, 40, 40, 300)]
# Of Mosaic: more tiles than programs and slots; many kept tiles and one streamed tile,
# for the softmax and for the gradient; tokens in two parts; less than a tile; one whole
# tile that counts, and three tiles that do not.
MOSAIC_HEADS = [(300, 640, 600, 128), (1200, 77, 70, 5), (64, 1300, 1290, 5)]
MOSAIC_HEADS += [(1, 9, 8, 64), (2, 512, 128, 16)]
each_head = pytest.mark.parametrize(
    ("form", "count", "rows", "size", "rank", "precision"),
    [(low_rank_head, *head, precision) for head in HEADS for precision in PRECISIONS]
    + [(mosaic_head, *head, HALF) for head in MOSAIC_HEADS],
)


@pytest.fixture
def few_programs(monkeypatch):
    monkeypatch.setattr(mosaic_launch, "multiprocessors", lambda: 2)


def factors(count, rows, rank, dtype):
    """Hidden states and a table; their logits have a standard deviation of 5."""
    z = random_array(0, count, rank, dtype=dtype)
    return z, random_array(1, rows, rank, dtype=dtype, scale=5 / rank**0.5)


@each_head
@pytest.mark.usefixtures("few_programs")
def test_normaliser_and_mean_row_are_those_of_a_softmax(
    form, count, rows, size, rank, precision
):
    z, wte = factors(count, rows, rank, precision.dtype)
    normaliser, mean = jax.jit(form.summarize, static_argnums=2)(z, wte, size)
    assert (normaliser.dtype, mean.dtype) == (jnp.float32,) * 2
    z, wte = exact(z, wte[:size])
    logits = z @ wte.T
    highest = logits.max(axis=1)
    wanted = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    assert_near(normaliser, wanted, precision.exact)
    assert_near(mean, softmax_of(logits) @ wte, precision.head)


@pytest.mark.parametrize(
    ("capability", "is_large"),
    [("9.0", True), ("10.3", True), ("8.9", False), ("12.0", False), (None, False)],
)
def test_tiles_fit_in_the_shared_memory_of_the_gpu(capability, is_large, monkeypatch):
    gpu = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert launch.has_large_shared_memory() is is_large
    for rank in range(16, low_rank_head.MAX_RANK + 1, 16):
        for choices in (low_rank_head.SUMMARY_TILES, low_rank_head.GRADIENT_TILES):
            tiles = low_rank_head._tiles(choices, rank)
            rows = tiles.kept + tiles.stages * tiles.streamed
            assert 2 * rows * rank <= (227 if is_large else 99) * 1024


@pytest.mark.parametrize(
    ("form", "precision"),
    [*((low_rank_head, precision) for precision in PRECISIONS), (mosaic_head, HALF)],
)
def test_normaliser_is_right_for_logits_far_from_0(form, precision):
    sign = jnp.asarray([1, -1] * 4, precision.dtype)
    z = jnp.full((8, 16), 20.0, precision.dtype) * sign[:, None]
    wte = jnp.full((40, 16), 4.0, precision.dtype)
    normaliser, mean = form.summarize(z, wte, 30)
    logits = np.where(np.arange(8) % 2, -1280.0, 1280.0)
    np.testing.assert_allclose(normaliser, logits + np.log(30), rtol=1e-6)
    # A GPU may round the maximum of the exponents, but not the exponents themselves.
    np.testing.assert_allclose(mean, 4.0, rtol=1280 * 2**-24)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("row", [0, 130, 290])
def test_mosaic_sums_logits_far_above_those_of_its_first_rows(row):
    # Of five tiles of tokens, two lose their sums. The first rows that a kernel reads
    # are those of the last tile, from 256 on.
    z, wte = factors(600, 300, 16, jnp.bfloat16)
    z, wte = z.at[jnp.asarray([5, 77, 300])].set(9.0), wte.at[row].set(9.0)
    normaliser, mean = mosaic_head.summarize(z, wte, 295)
    z, wte = exact(z, wte[:295])
    logits = z @ wte.T
    highest = logits.max(axis=1)
    assert highest.max() == 9 * 9 * 16
    wanted = highest + np.log(np.exp(logits - highest[:, None]).sum(axis=1))
    np.testing.assert_allclose(normaliser, wanted, rtol=1e-6, atol=1e-5)
    assert_near(mean, softmax_of(logits) @ wte, HALF.head)


def test_mosaic_computes_a_mean_again_that_would_overflow():
    # 98.4 more than the other logits: the sum is about 2**110, times the row 2**130.
    z, wte = factors(3, 200, 16, jnp.bfloat16)
    z, wte = z.at[:, 0].set(0).at[1, 0].set(98.5 * 2.0**-20), wte.at[:, 0].set(0)
    z, wte = z.at[1, 1:].set(0), wte.at[7].set(0).at[7, 0].set(2.0**20)
    normaliser, mean = mosaic_head.summarize(z, wte, 200)
    z, wte = exact(z, wte)
    logits = z @ wte.T
    assert 97 < logits[1, 7] < 100 and not logits[1, 128:].any()
    assert_near(mean, softmax_of(logits) @ wte, HALF.head)
    np.testing.assert_allclose(normaliser[1], logits[1, 7], rtol=1e-6)


@each_head
@pytest.mark.usefixtures("few_programs")
def test_gradient_of_the_table_is_predictions_minus_occurrences(
    form, count, rows, size, rank, precision
):
    z, wte = factors(count, rows, rank, precision.dtype)
    random = np.random.default_rng(2)
    targets = random.integers(-2, rows + 2, count).astype(np.int32)
    is_counted = random.random(count) < 0.8
    targets[~is_counted] = -1
    logits = np.matmul(*exact(z, wte.T))
    p, normaliser = softmax_of(logits), np.log(np.exp(logits).sum(axis=1))
    normaliser = jnp.where(is_counted, normaliser, jnp.inf).astype(jnp.float32)
    found = jax.jit(form.table_gradient)(wte, z, normaliser, targets)
    assert found.dtype == jnp.float32
    occurs = targets[:, None] == np.arange(rows)
    wanted = (p * is_counted[:, None] - occurs).T @ exact(z)[0]
    assert_near(found, wanted, precision.head)


# Of Mosaic: rows in one block and in several; more rows than programs and fewer.
@pytest.mark.parametrize(
    ("backend", "count", "columns", "size"),
    [
        *(("triton", 7, 100, 90), ("triton", 3, 64, 64), ("triton", 5, 33, 20)),
        *(("triton", 4, 200, 65), ("triton", 3, 1, 1)),
        *(("mosaic", 7, 128, 100), ("mosaic", 2, 12928, 12800)),
    ],
)
@in_each_precision
def test_loss_and_gradient_of_stored_logits(
    backend, count, columns, size, precision, monkeypatch
):
    monkeypatch.setattr(softmax, "COLUMNS", 32)
    function = {"triton": softmax, "mosaic": mosaic_softmax}[backend].loss_and_gradient
    logits = random_array(0, count, columns, dtype=precision.dtype, scale=3.0)
    targets = np.random.default_rng(1).integers(0, size, count).astype(np.int32)
    targets[-1] = -1
    of_rows = jax.jit(function, static_argnums=1)
    loss, gradient = of_rows(logits, size, targets)
    assert (loss.dtype, gradient.dtype) == (jnp.float32, precision.dtype)
    p = softmax_of(exact(logits)[0][:, :size])
    rows = np.arange(count - 1)
    np.testing.assert_allclose(
        loss[:-1], -np.log(p[rows, targets[:-1]]), rtol=1e-5, atol=1e-6
    )
    wanted = np.zeros((count, columns))
    wanted[:, :size] = p
    wanted[rows, targets[:-1]] -= 1
    wanted[-1] = 0
    assert loss[-1] == 0
    assert_near(gradient, wanted, precision.rounded)


def plain_add_and_norm(x, update, bias, scale, offset):
    total = x + jnp.tile(update, (len(x) // len(update), 1)) + bias
    centred = total - total.mean(axis=1, keepdims=True)
    variance = (centred**2).mean(axis=1, keepdims=True)
    return total, centred / jnp.sqrt(variance + 1e-5) * scale + offset


# Triton: one program and many programs, with three pieces of 256 columns and one of 16.
# Mosaic: fewer rows than programs, programs with one row and with two, and one row.
# The last norm of a model has no gradient of its sum; the first repeats an update.
@pytest.mark.parametrize("used", [("sum", "normed"), ("sum",), ("normed",)])
@pytest.mark.parametrize(
    ("backend", "count", "width", "repeats"),
    [
        *(("triton", 24, 768, 1), ("triton", 4104, 16, 2), ("triton", 1, 16, 1)),
        *(("mosaic", 24, 768, 1), ("mosaic", 50, 128, 5), ("mosaic", 1, 256, 1)),
    ],
)
@in_each_precision
def test_addition_norm_and_their_gradients(
    backend, count, width, repeats, used, precision
):
    form = {"triton": triton_norm, "mosaic": mosaic_norm}[backend]
    x, update, of_sum, of_normed = (
        random_array(i, count, width, dtype=precision.dtype) for i in range(4)
    )
    update = update[: count // repeats]
    parameters = [random_array(i, width, dtype=jnp.float32) for i in range(4, 7)]

    def loss(function, dtype, arrays):
        total, normed = function(*arrays)
        terms = {"sum": (total * of_sum.astype(dtype)).sum()}
        terms["normed"] = (normed * of_normed.astype(dtype)).sum()
        value = sum(terms[name] for name in used)
        return value.astype(jnp.float32), (total, normed)

    def results(function, dtype, arrays):
        of_arrays = jax.jit(
            jax.grad(functools.partial(loss, function, dtype), has_aux=1)
        )
        gradients, outputs = of_arrays(arrays)
        return [*outputs, *gradients]

    arrays = [x, update, *parameters]
    found = results(
        lambda *a: norm.add_and_norm(*a, 1e-5, form), precision.dtype, arrays
    )
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in exact(*arrays)]
        wanted = results(plain_add_and_norm, jnp.float64, wide)
    for name, a, b in zip(
        ["sum", "normed", "x", "update", "bias", "scale", "offset"],
        found,
        wanted,
        strict=True,
    ):
        assert a.dtype == (
            jnp.float32 if name in ("bias", "scale", "offset") else precision.dtype
        )
        assert_near(*exact(a), np.asarray(b), 2 * precision.rounded)


@pytest.mark.parametrize(("count", "width"), [(24, 48), (4096, 16)])
@in_each_precision
def test_gelu_with_its_bias_and_their_gradients(count, width, precision):
    h, of_gelu = (
        random_array(i, count, width, dtype=precision.dtype, scale=2.0)
        for i in range(2)
    )
    bias = random_array(2, width, dtype=jnp.float32)
    found, pull = jax.vjp(jax.jit(gelu.bias_gelu), h, bias)
    of_h, of_bias = pull(of_gelu)
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in exact(h, bias, of_gelu)]
        wanted, pull = jax.vjp(
            lambda h, bias: jax.nn.gelu(h + bias, approximate=True), *wide[:2]
        )
        wanted_of_h, wanted_of_bias = pull(wide[2])
    assert found.dtype == of_h.dtype == precision.dtype
    assert of_bias.dtype == jnp.float32
    assert_near(*exact(found), np.asarray(wanted), precision.rounded)
    assert_near(*exact(of_h), np.asarray(wanted_of_h), 2 * precision.rounded)
    assert_near(of_bias, np.asarray(wanted_of_bias), 2 * precision.rounded)


@in_each_precision
def test_gelu_far_from_0_is_0_or_its_input_and_its_gradient_0_or_1(precision):
    h = jnp.asarray([[-1e4, -60.0, 60.0, 1e4]], precision.dtype)
    found, pull = jax.vjp(gelu.bias_gelu, h, jnp.zeros(4))
    np.testing.assert_array_equal(found, np.asarray([[0, 0, 60, 1e4]], precision.dtype))
    np.testing.assert_array_equal(pull(jnp.ones_like(h))[0], [[0, 0, 1, 1]])


# A program has two tiles, or one. A tile has more factors than slots, or one.
@pytest.mark.parametrize("width", [320, 64])
def test_mlp_and_its_gradients(width, monkeypatch):
    count, hidden = 384, 512
    monkeypatch.setattr(mosaic_launch, "multiprocessors", lambda: 5)
    scales = {"x": 1.0, "fc": width**-0.5, "bias": 0.5, "proj": hidden**-0.5}
    shapes = (count, width), (width, hidden), (hidden,), (hidden, width)
    arrays = [
        random_array(i, *shape, dtype=jnp.float32 if i == 2 else jnp.bfloat16, scale=s)
        for i, (shape, s) in enumerate(zip(shapes, scales.values(), strict=True))
    ]
    assert mlp.fits(count, width, hidden, jnp.bfloat16)
    of_y = random_array(4, count, width, dtype=jnp.bfloat16)
    found, pull = jax.vjp(jax.jit(mlp.mlp), *arrays)
    gradients = pull(of_y)
    np.testing.assert_array_equal(*exact(jax.jit(mlp.mlp)(*arrays), found))
    with jax.enable_x64(True):
        wide = [jnp.asarray(array, jnp.float64) for array in exact(*arrays, of_y)]
        wanted, pull = jax.vjp(
            lambda x, fc, b, proj: jax.nn.gelu(x @ fc + b, approximate=True) @ proj,
            *wide[:4],
        )
        wanted_gradients = pull(wide[4])
    assert_near(*exact(found), np.asarray(wanted), HALF.rounded)
    for of_a, wanted, a in zip(gradients, wanted_gradients, arrays, strict=True):
        assert of_a.dtype == a.dtype
        assert_near(*exact(of_a), np.asarray(wanted), 2 * HALF.rounded)


def test_mosaic_gelu_far_from_0_is_0_or_its_input_and_its_gradient_0_or_1():
    h = jnp.asarray([-1e4, -60.0, 60.0, 1e4])
    np.testing.assert_array_equal(
        mlp._slope_and_gelu(h), [[0, 0, 1, 1], [0, 0, 60, 1e4]]
    )


def exact_attention(qkv_NX, length, heads):
    q_BTHC, k_BTHC, v_BTHC = (
        third.reshape(-1, length, heads, 64) for third in jnp.split(qkv_NX, 3, axis=1)
    )
    logits_BHts = jnp.einsum("bthc,bshc->bhts", q_BTHC, k_BTHC) / np.sqrt(64)
    mask_ts = jnp.tri(length, dtype=bool)
    p_BHts = jax.nn.softmax(jnp.where(mask_ts, logits_BHts, -jnp.inf))
    return jnp.einsum("bhts,bshc->bthc", p_BHts, v_BTHC).reshape(len(qkv_NX), -1)


# A program has two heads, or two pairs of tiles; several sequences; large logits.
@pytest.mark.parametrize(
    ("batch", "length", "heads", "scale"), [(2, 256, 2, 1.0), (1, 512, 1, 4.0)]
)
def test_attention_and_its_gradient(batch, length, heads, scale, monkeypatch):
    monkeypatch.setattr(mosaic_launch, "multiprocessors", lambda: 2)
    shape, sizes = (batch * length, heads * 64), (length, heads)
    thirds = [random_array(i, *shape, scale=scale if i < 2 else 1.0) for i in range(3)]
    qkv = jnp.concatenate(thirds, axis=1).astype(jnp.bfloat16)
    of_y = random_array(3, *shape, dtype=jnp.bfloat16)
    assert attention.fits((batch, length, heads, 64), jnp.bfloat16)
    found, pull = jax.vjp(jax.jit(lambda qkv: attention.attention(qkv, *sizes)), qkv)
    (gradient,) = pull(of_y)
    with jax.enable_x64(True):
        wide, wide_of_y = (jnp.asarray(array) for array in exact(qkv, of_y))
        wanted, pull = jax.vjp(lambda qkv: exact_attention(qkv, *sizes), wide)
        (wanted_gradient,) = pull(wide_of_y)
    assert found.dtype == gradient.dtype == jnp.bfloat16
    for one, wanted_one in zip(
        (found, *jnp.split(gradient, 3, axis=1)),
        (wanted, *jnp.split(wanted_gradient, 3, axis=1)),
        strict=True,
    ):
        (one,), wanted_one = exact(one), np.asarray(wanted_one)
        assert_near(one, wanted_one, 2 * HALF.rounded)
        # Each tile: an error in one of many is small beside all of them.
        for tile in np.split(np.arange(len(one)), len(one) // attention.HALF):
            assert_near(one[tile], wanted_one[tile], 4 * HALF.rounded)


def attention_layer(implementation, **sizes):
    sizes = {"n_embd": 128, "n_head": 2, "block_size": 256} | sizes
    precision = {"compute_dtype": "bfloat16", "attention": implementation}
    return Attention(gpt_config(**sizes, **precision))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_model_has_this_attention(keeps):
    """The same values, gradients, and keys and values for decoding as XLA's form."""
    x_ND = random_array(0, 512, 128, dtype=jnp.bfloat16)
    parameters = attention_layer("xla").init(jax.random.key(0), x_ND, 256, True)
    parameters = jax.tree.map(  # Biases begin with zeros.
        lambda a: a + 0.1 * random_array(1, *a.shape), parameters
    )

    def outcome(implementation):
        def run(parameters, x_ND):
            (y_ND, bias_D), kept = attention_layer(implementation).apply(
                parameters, x_ND, 256, True, mutable=["cache"] if keeps else []
            )
            return (y_ND + bias_D).astype(jnp.float32), kept

        y_ND, pull, kept = jax.vjp(run, parameters, x_ND, has_aux=True)
        return jax.tree.leaves((y_ND, pull(jnp.cos(y_ND)), kept))

    found, wanted = outcome("mosaic"), outcome("xla")
    assert len(found) == 6 + 2 * keeps
    for one, wanted_one in zip(found, wanted, strict=True):
        assert_near(*exact(one, wanted_one), 3 * HALF.rounded)


@pytest.mark.parametrize(("length", "width"), [(128, 64), (384, 64), (256, 128)])
def test_attention_of_other_sizes_is_cudnns(length, width, monkeypatch):
    asked = []
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda q, *rest, implementation, **more: asked.append(implementation) or q,
    )
    layer = attention_layer("mosaic", n_embd=width, n_head=1, block_size=length)
    x_ND = jnp.zeros((length, width), jnp.bfloat16)
    layer.init_with_output(jax.random.key(0), x_ND, length, True)
    assert asked == ["cudnn"]


# Several devices


@on_eight_devices
def test_eight_devices_work_on_their_own_rows_and_add_up():
    mesh = make_mesh(2, 4)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))

    def all_kernels(z, wte, targets, h, bias):
        normaliser, mean = low_rank_head.summarize(z, wte, 50)
        add_up = by_device([False, True, True, True], [False])
        (gradient,) = add_up(lambda *arrays: (low_rank_head.table_gradient(*arrays),))(
            wte, z, normaliser, targets
        )
        loss, of_logits = softmax.loss_and_gradient(z @ wte.T, 50, targets)

        def activations(h, bias):
            total, normed = norm.add_and_norm(
                h, 2 * h, bias, bias, bias, 1e-5, triton_norm
            )
            return (gelu.bias_gelu(total, bias) * normed).sum()

        gradients = jax.grad(activations, argnums=(0, 1))(h, bias)
        return normaliser, mean, gradient, loss, of_logits, gradients

    split = random_array(0, 64, 16), random_array(3, 64, 32)
    targets = np.random.default_rng(1).integers(0, 50, 64).astype(np.int32)
    whole = random_array(1, 56, 16), random_array(2, 32, dtype=jnp.float32)
    wanted = jax.jit(all_kernels)(split[0], whole[0], targets, split[1], whole[1])
    z, h = jax.device_put(split, rows)
    with jax.set_mesh(mesh):
        compiled = (
            jax.jit(all_kernels)
            .lower(z, whole[0], jax.device_put(targets, rows), h, whole[1])
            .compile()
        )
    program = compiled.as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program
    found = compiled(z, whole[0], jax.device_put(targets, rows), h, whole[1])
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert_near(*exact(a), exact(b)[0], 1e-6)


# A device has whole repeats of the update, or a part of one.
@on_eight_devices
@pytest.mark.parametrize("length", [4, 16])
@pytest.mark.parametrize("form", [triton_norm, mosaic_norm])
def test_eight_devices_repeat_an_update(form, length):
    x, update, weights = (
        random_array(i, count, 128) for i, count in enumerate((64, length, 64))
    )
    vectors = [random_array(i, 128) for i in range(3, 6)]

    def gradients(function):
        def total(*arrays):
            return (function(*arrays)[1] * weights).sum()

        arrays = x, update, *vectors
        step = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4))).lower(*arrays)
        step = step.compile()
        assert "collective-permute" not in step.as_text()  # They send sums only.
        return step(*arrays)

    wanted = gradients(plain_add_and_norm)
    mesh = make_mesh(2, 4)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
    with jax.set_mesh(mesh):
        found = gradients(lambda *a: norm.add_and_norm(*a, 1e-5, form))
    for a, b in zip(found, wanted, strict=True):
        assert_near(a, b, 1e-5)


@on_eight_devices
@pytest.mark.skipif(ON_GPU, reason="lowers for GPUs that are not here")
def test_mosaic_kernels_of_eight_devices_work_on_their_own_rows(monkeypatch):
    mesh = make_mesh(2, 4)
    rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    whole = NamedSharding(mesh, PartitionSpec())
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(mosaic_launch, "multiprocessors", lambda: 132)

    def lowered(function, *arrays):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for shape, dtype, sharding in arrays
        ]
        traced = jax.jit(function).trace(*shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    half = jnp.bfloat16
    stored = functools.partial(mosaic_softmax.loss_and_gradient, size=100)
    of_all = jax.grad(lambda *a: mlp.mlp(*a).sum(), argnums=(0, 1, 2, 3))

    def low_rank(z, wte, targets):
        normaliser, mean = mosaic_head.summarize(z, wte, 250)
        add_up = by_device([False, True, True, True], [False])
        gradient = add_up(lambda *arrays: (mosaic_head.table_gradient(*arrays),))
        return mean, gradient(wte, z, normaliser, targets)

    with jax.set_mesh(mesh):
        table, numbers = ((256, 64), half, whole), ((8 * 128,), jnp.int32, rows)
        program = lowered(low_rank, ((8 * 128, 64), half, rows), table, numbers)
        assert program.count("all_reduce") == 1  # of the table's gradient
        assert "tensor<128x64xf32>" in program
        assert mlp.fits(8 * 128, 64, 512, half)
        assert not mlp.fits(9 * 128, 64, 512, half)
        program = lowered(
            lambda x, t: stored(x, targets_n=t),
            ((16, 256), half, rows),
            ((16,), jnp.int32, rows),
        )
        assert "tensor<2x2x128xbf16>" in program
        matrices = ((64, 512), half, whole), ((512, 64), half, whole)
        bias = (512,), jnp.float32, whole
        x = (8 * 128, 64), half, rows
        vectors = [((256,), jnp.float32, whole)] * 3
        program = lowered(of_norm, *[((16, 256), half, rows)] * 2, *vectors)
        # Of three vectors in one array, for each norm.
        assert program.count("all_reduce") == 6
        assert "tensor<2x256xbf16>" in program
        of_attention = jax.grad(lambda qkv: attention.attention(qkv, 256, 2).sum())
        program = lowered(of_attention, ((16 * 256, 3 * 2 * 64), half, rows))
        assert "all_reduce" not in program
        assert "tensor<512x384xbf16>" in program
        program = lowered(of_all, x, matrices[0], bias, matrices[1])
        assert program.count("all_reduce") == 1  # of the bias's gradient
        assert "tensor<128x512xbf16>" in program


# GPUs


@pytest.mark.skipif(ON_GPU, reason="there they are compiled")
def test_every_kernel_lowers_for_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def lower(function, *shapes):
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        lowered = jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("xla.gpu.triton")

    half, full, whole = jnp.bfloat16, jnp.float32, jnp.int32
    count, rows = 2048, 1000
    with gpu_that_is_not_here():
        ranks = (*low_rank_head.GRADIENT_TILES, 149, 300)
        for rank, is_large in itertools.product(ranks, (False, True)):
            has_large = functools.partial(bool, is_large)
            monkeypatch.setattr(launch, "has_large_shared_memory", has_large)
            z, wte = ((count, rank), half), ((rows, rank), half)
            assert (
                lower(functools.partial(low_rank_head.summarize, size=999), z, wte) == 1
            )
            numbers = ((count,), full), ((count,), whole)
            assert lower(low_rank_head.table_gradient, wte, z, *numbers) == 1
        logits = ((count, rows), half)
        stored = functools.partial(softmax.loss_and_gradient, size=999)
        assert (
            lower(lambda x, t: stored(x, targets_n=t), logits, ((count,), whole)) == 1
        )

        def activations(h, parameter):
            total, normed = norm.add_and_norm(
                h, h, *(parameter,) * 3, 1e-5, triton_norm
            )
            return (gelu.bias_gelu(total, parameter) * normed).sum()

        arguments = ((count, 768), half), ((768,), full)
        assert lower(jax.grad(activations, argnums=(0, 1)), *arguments) == 4

        def block(x, parts, vector, kernel, keys):
            update = one_token.Sum(parts, vector)
            norm_ = one_token.Norm(vector, vector, 1e-5)
            stream, parts = one_token.norm_product(x, update, norm_, kernel)
            qkv = one_token.Sum(jnp.tile(parts, 3), jnp.tile(vector, 3))
            y, keys, _ = one_token.attend(qkv, keys, keys, jnp.int32(3))
            parts = one_token.gelu_product(update, kernel)
            return stream, one_token.product(y, kernel), parts, keys

        for batch in (1, 64):
            shapes = (batch, 768), (2, batch, 768), (768,), (768, 768)
            arrays = (*zip(shapes, (half, full, full, half), strict=True),)
            cache = ((batch, 1024, 12, 64), half)
            assert lower(block, *arrays, cache) == 4


@pytest.mark.skipif(ON_GPU, reason="there they are compiled")
def test_every_mosaic_kernel_lowers_for_a_gpu_that_is_not_here(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def lowered(function, *shapes):
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        traced = jax.jit(function).trace(*arrays)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    def kernels_in(program):
        return program.count("@mosaic_gpu")

    half = jnp.bfloat16
    with gpu_that_is_not_here():
        stored = functools.partial(mosaic_softmax.loss_and_gradient, size=50257)
        logits, targets = ((4096, 50304), half), ((4096,), jnp.int32)
        program = lowered(lambda x, t: stored(x, targets_n=t), logits, targets)
        assert kernels_in(program) == 1
        assert "output_operand_alias" in program  # It needs no second array.
        for rank in (100, 128, 64):
            z, wte = ((32768, rank), half), ((50304, rank), half)
            summarize = functools.partial(mosaic_head.summarize, size=50257)
            assert kernels_in(lowered(summarize, z, wte)) == 2
            numbers = ((32768,), jnp.float32), ((32768,), jnp.int32)
            for rows in (50304, 1000):
                wte = (rows, rank), half
                program = lowered(mosaic_head.table_gradient, wte, z, *numbers)
                assert kernels_in(program) == 1
        for hidden in (3072, 4096):
            fc, bias = ((768, hidden), half), ((hidden,), jnp.float32)
            arrays = ((32768, 768), half), fc, bias, (fc[0][::-1], half)
            assert mlp.fits(32768, 768, hidden, half)
            assert kernels_in(lowered(mlp.mlp, *arrays)) == 1
            of_all = jax.grad(lambda *a: mlp.mlp(*a).sum(), argnums=(0, 1, 2, 3))
            assert kernels_in(lowered(of_all, *arrays)) == 2
        assert attention.fits((32, 1024, 12, 64), half)
        qkv = (32 * 1024, 3 * 12 * 64), half
        attend = functools.partial(attention.attention, length=1024, heads=12)
        assert kernels_in(lowered(attend, qkv)) == 1
        program = lowered(jax.grad(lambda qkv: attend(qkv).sum()), qkv)
        assert kernels_in(program) == 3
        assert "output_operand_alias" in program  # Gradients need no second array.
        for width in (768, 2048):
            rows, numbers = ((32768, width), half), ((width,), jnp.float32)
            assert mosaic_norm.fits(width)
            program = lowered(of_norm, rows, rows, *[numbers] * 3)
            assert kernels_in(program) <= 4  # Six norms and their gradients share them.
        # Kernels read no repeated update, and no gradient of a sum that is not used.
        update = (1024, 2048), half
        program = lowered(of_normed, rows, update, *[numbers] * 3)
        assert kernels_in(program) == 2
        many, few, vector = "32768x2048xbf16", "1024x2048xbf16", "2048xf32"
        for inputs in (
            (many, few, *[vector] * 3),
            (many, many, vector, *["32768xf32"] * 2),
        ):
            read = ", ".join(f"tensor<{shape}>" for shape in inputs)
            assert f": ({read}) -> (" in program


def of_normed(*arrays):
    """All gradients of a norm without its sum, like a model's last one."""

    def total(*arrays):
        return norm.add_and_norm(*arrays, 1e-5, mosaic_norm)[1].sum()

    return jax.grad(total, argnums=(0, 1, 2, 3, 4))(*arrays)


def of_norm(*arrays):
    """All gradients of a sum of what six of Mosaic's norms return."""

    def total(x, update, *parameters):
        for _ in range(6):
            update, x = norm.add_and_norm(x, update, *parameters, 1e-5, mosaic_norm)
        return (x + update).sum()

    return jax.grad(total, argnums=(0, 1, 2, 3, 4))(*arrays)


def gpu_that_is_not_here():
    """A description of the GPU, which newer versions of JAX ask for."""
    described = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), (AxisType.Auto,), abstract_device=described
    )
    return jax.sharding.use_abstract_mesh(mesh)


def norm_of(x, scale, offset, epsilon=1e-5):
    centred = x - x.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + epsilon)
    return centred / deviation * scale + offset


def gelu_of(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# One row or several; a kernel that is cut along its rows, and one that is not.
@pytest.mark.parametrize(("count", "width"), [(1, 32), (3, 80), (2, 1536)])
@in_each_precision
def test_products_of_few_rows_are_those_of_the_layers(count, width, precision):
    dtype = precision.dtype
    x = random_array(0, count, width, dtype=dtype)
    kernel = random_array(1, width, 96, dtype=dtype, scale=0.1)
    update = one_token.Sum(random_array(2, 2, count, width), random_array(3, width))
    scale, offset = 1 + random_array(4, width), random_array(5, width)
    exact_x, exact_kernel, *more = exact(x, kernel, *update, scale, offset)
    parts, bias, exact_scale, exact_offset = more
    exact_update = parts.sum(axis=0) + bias
    near = functools.partial(assert_near, tolerance=precision.exact)

    def total(parts):
        assert parts.shape == (-(-width // one_token.ROWS), count, 96)
        return np.asarray(parts, np.float64).sum(axis=0)

    near(total(one_token.product(x, kernel)), exact_x @ exact_kernel)
    found = one_token.gelu_product(update, kernel)
    near(total(found), gelu_of(exact_update) @ exact_kernel)
    norm_ = one_token.Norm(scale, offset, 1e-5)
    stream, found = one_token.norm_product(x, update, norm_, kernel)
    assert stream.dtype == dtype
    assert_near(exact(stream)[0], exact_x + exact_update, precision.rounded)
    wanted = norm_of(exact(stream)[0], exact_scale, exact_offset) @ exact_kernel
    near(total(found), wanted)


# One tile of the cache and several, at its first place, between tiles, and at its last.
@pytest.mark.parametrize(("batch", "capacity"), [(1, 128), (3, 96), (140, 64)])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_new_token_attends_to_itself_and_all_earlier_ones(batch, capacity, place):
    heads, width = 2, 16
    position = {"first": 0, "middle": capacity // 2 + 5, "last": capacity - 1}[place]
    shape = batch, capacity, heads, width
    keys, values = random_array(0, *shape), random_array(1, *shape)
    qkv = one_token.Sum(
        random_array(2, 2, batch, 3 * heads * width), random_array(3, 3 * heads * width)
    )
    (parts, bias, k, v), d = exact(*qkv, keys, values), heads * width
    new_q, new_k, new_v = np.split(parts.sum(axis=0), 3, axis=1)
    k[:, position] = new_k.reshape(batch, heads, width)
    v[:, position] = new_v.reshape(batch, heads, width)
    q = (new_q + bias[:d]).reshape(batch, heads, width)
    k, v = k[:, : position + 1], v[:, : position + 1]
    logits = np.einsum("bhc,bthc->bht", q, k) / np.sqrt(width)
    p = softmax_of(logits.reshape(batch * heads, -1)).reshape(logits.shape)
    wanted = np.einsum("bht,bthc->bhc", p, v).reshape(batch, d) + bias[2 * d :]
    # Later places of the cache hold what an earlier text left there.
    y, new_keys, new_values = one_token.attend(qkv, keys, values, jnp.int32(position))
    assert_near(y, wanted, FULL.exact)
    assert_near(exact(new_keys)[0][:, : position + 1], k, FULL.exact)
    np.testing.assert_array_equal(new_keys[:, position + 1 :], keys[:, position + 1 :])
    assert_near(exact(new_values)[0][:, : position + 1], v, FULL.exact)


def test_the_kernels_of_one_token_leave_odd_widths_to_the_plain_form():
    assert one_token.fits(768, 12) and one_token.fits(1600, 25)
    assert not any(itertools.starmap(one_token.fits, [(768, 16), (24, 3), (96, 12)]))


def test_norm_takes_usual_widths_and_leaves_those_of_many_pieces_to_the_plain_form():
    assert all(map(triton_norm.fits, (768, 1024, 1280, 2048, 48)))
    assert not any(map(triton_norm.fits, (1600, 300, 75)))


def test_gelu_leaves_widths_of_small_pieces_to_the_plain_form():
    assert gelu.fits(4 * 768) and gelu.fits(1248) and not gelu.fits(1200)


def test_kernels_are_for_recent_nvidia_gpus_and_triton_may_be_missing(monkeypatch):
    def run_on(capability):
        return kernels.that_run_on(SimpleNamespace(compute_capability=capability))

    assert {run_on(capability) for capability in ("8.0", "8.9")} == {("triton", "xla")}
    assert {run_on(c) for c in ("9.0", "10.3", "12.0")} == {kernels.CHOICES}
    assert {run_on(c) for c in ("7.5", "gfx942", None)} == {("xla",)}
    assert kernels.that_run_on(SimpleNamespace()) == ("xla",)  # a CPU
    uses = {name: kernels.use_triton(name) for name in kernels.CHOICES}
    assert uses == {"mosaic": True, "triton": True, "xla": False}
    monkeypatch.setattr(launch, "triton", None)
    assert (run_on("8.0"), run_on("9.0")) == (("xla",), ("mosaic", "xla"))
    assert not kernels.use_triton("mosaic")


def test_each_table_takes_the_kernels_of_the_head_that_fit_its_rank(monkeypatch):
    half = jnp.bfloat16
    assert head_kernels("mosaic", 128, half) is mosaic_head
    assert head_kernels("triton", 128, half) is low_rank_head
    for rank, dtype in ((129, half), (128, jnp.float32), (320, half)):
        assert head_kernels("mosaic", rank, dtype) is low_rank_head
    assert head_kernels("mosaic", 321, half) is None
    assert head_kernels("xla", 128, half) is None
    blackwell = SimpleNamespace(compute_capability="10.0")
    with monkeypatch.context() as context:
        context.setattr(jax, "devices", lambda: [blackwell])
        assert head_kernels("mosaic", 128, half) is low_rank_head
    monkeypatch.setattr(launch, "triton", None)
    assert head_kernels("mosaic", 128, half) is mosaic_head
    assert head_kernels("mosaic", 129, half) is None


def test_the_tokens_of_a_short_table_are_split_so_that_no_program_waits(monkeypatch):
    monkeypatch.setattr(mosaic_launch, "multiprocessors", lambda: 132)
    assert mosaic_head._splits(tiles=393, steps=256) == 1
    assert mosaic_head._splits(tiles=1, steps=256) == 128
    assert mosaic_head._splits(tiles=66, steps=256) == 2
    assert mosaic_head._splits(tiles=1, steps=1) == 1
    # Eight parts would be the least work, but only 3 % less than three.
    assert mosaic_head._splits(tiles=400, steps=256) == 3


def test_mosaic_leaves_what_it_has_no_tiles_for_to_other_forms(monkeypatch):
    assert mosaic_softmax.fits(50304, jnp.bfloat16)
    assert not mosaic_softmax.fits(50304, jnp.float32)  # too long for shared memory
    assert not mosaic_softmax.fits(100, jnp.bfloat16)
    assert mlp.fits(32768, 768, 512, jnp.bfloat16)
    for sizes in ((100, 768, 512), (128, 80, 512), (128, 64, 300)):
        assert not mlp.fits(*sizes, jnp.bfloat16)
    assert not mlp.fits(32768, 768, 512, jnp.float32)
    assert mosaic_norm.fits(1280)
    assert not mosaic_norm.fits(1600)  # not a multiple of the threads
    assert not mosaic_norm.fits(4096)
    of_consumers = {"shared_memory_per_block_optin": 99 * 1024}
    gpu = SimpleNamespace(compute_capability="12.0", **of_consumers)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert not mlp.fits(32768, 768, 512, jnp.bfloat16)
    assert not mosaic_softmax.fits(50304, jnp.bfloat16)
    assert mosaic_softmax.fits(20480, jnp.bfloat16)
