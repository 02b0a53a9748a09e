"""Meshes, how arrays are split over them, and several processes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from runs import gpt_config

from pcagpt import trees
from pcagpt.config.schema import TrainSettings
from pcagpt.errors import UserError
from pcagpt.losses import cross_entropy
from pcagpt.model import GPT, HeadBand
from pcagpt.sharding import inside, placement, processes
from pcagpt.training import optim
from pcagpt.training.step import initial_state

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = gpt_config(
    vocab_size=63,
    vocab_multiple=64,
    block_size=8,
    n_layer=1,
    n_head=2,
    n_embd=16,
    n_embd_wte=4,
    n_embd_wte_scale_tying=False,
)
ADAMW = optim.optimizer(TrainSettings())


def state_shapes(config=CONFIG):
    return jax.eval_shape(lambda: initial_state(GPT(config), ADAMW, seed=0))


# Meshes


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [
        (-1, 1, (8, 1)),
        (-1, 4, (2, 4)),
        (1, 1, (1, 1)),
        (2, 2, (2, 2)),
    ],
)
def test_mesh_has_the_devices_asked_for_or_all_of_them(data, fsdp, shape):
    mesh = placement.make_mesh(data, fsdp)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))
    assert mesh.devices.ravel().tolist() == jax.devices()[: mesh.size]


@pytest.mark.parametrize(("data", "fsdp"), [(4, 4), (-1, 3), (-1, 16), (0, 1), (-2, 1)])
def test_mesh_that_does_not_fit_the_devices_is_one_clear_line(data, fsdp):
    with pytest.raises(UserError, match="does not fit the 8 devices") as error:
        placement.make_mesh(data, fsdp)
    assert "\n" not in str(error.value)
    assert f"mesh.fsdp = {fsdp} " in str(error.value)


def test_one_device_needs_no_mesh(monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    line = "mesh.data = -1 with mesh.fsdp = 2 does not fit the one device: leave both"
    with pytest.raises(UserError, match=line):
        placement.make_mesh(-1, 2)


def test_batch_must_split_over_all_devices():
    mesh = placement.make_mesh(2, 4)
    placement.check_divisible("train.batch_size", 16, mesh)
    with pytest.raises(UserError, match=r"train.batch_size = 12 .* a multiple of 8"):
        placement.check_divisible("train.batch_size", 12, mesh)


# How arrays are split


def test_fsdp_splits_every_matrix_and_its_moments_but_no_vector():
    shapes = state_shapes()
    specs = {
        path: place.spec
        for path, place in trees.flatten(
            placement.shardings(shapes.params, placement.make_mesh(2, 4))
        ).items()
    }
    by_rows = PartitionSpec("fsdp", None)
    matrices = {
        "embed/band_0/wte",
        "embed/band_0/scale_up",
        "embed/band_0/scale_down",
        "wpe",
        "block_0/attn/qkv/kernel",
        "block_0/attn/proj/kernel",
        "block_0/mlp/fc/kernel",
        "block_0/mlp/proj/kernel",
    }
    for path, leaf in trees.flatten(shapes.params).items():
        assert specs[path] == (by_rows if path in matrices else PartitionSpec()), path
        assert (leaf.ndim == 2) == (path in matrices)

    places = placement.shardings(shapes.optimizer, placement.make_mesh(2, 4))
    moments = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), place.spec)
        for path, place in jax.tree_util.tree_leaves_with_path(places)
    ]
    for path in matrices:
        found = [s for name, s in moments if name.endswith(f"/{path}")]
        assert found == [by_rows, by_rows], path
    assert sum(spec != PartitionSpec() for _, spec in moments) == 2 * len(matrices)


def test_fsdp_splits_the_rows_of_a_teachers_head():
    head = tuple(HeadBand(jnp.zeros((rows, 8)), None, 0, rows) for rows in (16, 8))
    tree = {"head": head, "order": jnp.zeros(16)}
    places = placement.shardings(tree, placement.make_mesh(2, 4))
    by_rows = PartitionSpec("fsdp", None)
    assert [band.wte.spec for band in places["head"]] == [by_rows, by_rows]
    assert places["order"].spec == PartitionSpec()


def test_a_matrix_with_rows_that_do_not_divide_evenly_stays_whole():
    mesh = placement.make_mesh(1, 8)
    tree = {
        "embed": {"band_0": {"wte": jnp.zeros((12, 8)), "scale_up": jnp.zeros((4, 8))}},
        "wpe": jnp.zeros((8, 12)),
    }
    places = trees.flatten(placement.shardings(tree, mesh))
    assert places["embed/band_0/wte"].spec == PartitionSpec()
    assert places["embed/band_0/scale_up"].spec == PartitionSpec()
    assert places["wpe"].spec == PartitionSpec("fsdp", None)


def test_split_parameters_take_a_share_of_each_devices_memory():
    mesh = placement.make_mesh(1, 8)
    place = placement.shardings({"wte": jnp.zeros((64, 4))}, mesh)
    array = jax.device_put({"wte": jnp.arange(256.0).reshape(64, 4)}, place)["wte"]
    assert {shard.data.shape for shard in array.addressable_shards} == {(8, 4)}


def test_batch_is_split_over_all_devices_and_keeps_its_values():
    mesh = placement.make_mesh(2, 4)
    batch = np.arange(16 * 3).reshape(16, 3)
    placed = placement.put_batch(batch, placement.batch_sharding(mesh))
    np.testing.assert_array_equal(placed, batch)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    parts = batch.reshape(2, 8, 3)
    placed = placement.put_batch(parts, placement.part_sharding(mesh))
    np.testing.assert_array_equal(placed, parts)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 1, 3)}


def test_replicated_array_is_whole_on_every_device():
    placed = jax.device_put(
        np.arange(8), placement.replicated(placement.make_mesh(2, 4))
    )
    assert {shard.data.shape for shard in placed.addressable_shards} == {(8,)}
    assert len(placed.addressable_shards) == 8


def test_a_function_compiled_for_a_mesh_knows_its_devices():
    def devices(x):
        found.append(inside.device_count())
        (found_inside,) = inside.by_device([True], [False])(count_inside)(x)
        return found_inside

    def count_inside(x):
        found.append(inside.device_count())
        return (x.sum(axis=0),)

    found, mesh = [], placement.make_mesh(2, 4)
    split = jax.device_put(np.ones((16, 3)), placement.batch_sharding(mesh))
    np.testing.assert_array_equal(placement.jit(devices, mesh)(split), [16, 16, 16])
    assert found == [8, 1]
    np.testing.assert_array_equal(devices(split), [16, 16, 16])
    assert found[2:] == [1, 1]


def test_gathered_arrays_travel_in_their_own_dtype_and_gradients_stay_split():
    mesh = placement.make_mesh(1, 8)

    def program(function):
        traced = jax.jit(function).trace(jax.ShapeDtypeStruct((8, 2), jnp.float32))
        return traced.lower().as_text()

    def cast(array):
        return inside.gathered(array.astype(jnp.bfloat16))

    def gradient(array):
        return jax.grad(lambda array: inside.gathered(array).sum())(array)

    # Without the barrier, XLA may gather before the cast.
    barrier = r"%(\w+) = stablehlo.optimization_barrier %\w+ : tensor<8x2xbf16>"
    with jax.set_mesh(mesh):
        found = re.search(barrier, program(cast))
        assert f"sharding_constraint %{found[1]} " in program(cast)
        assert "sharding_constraint" not in program(gradient)
    assert "barrier" not in program(cast)
    assert "sharding_constraint" not in program(cast)


def test_each_device_sums_the_gradients_of_its_own_lookups():
    model, mesh = GPT(CONFIG), placement.make_mesh(2, 4)
    tokens_BT = jax.ShapeDtypeStruct((16, 8), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens_BT)

    def summed(variables, tokens_BT):
        return model.apply(variables, tokens_BT, method="hidden").sum()

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(summed)).lower(variables, tokens_BT).as_text()
    # Indices of 16 tokens, not of all 128.
    scatters = re.findall(r"stablehlo.scatter.*?-> tensor", program, re.DOTALL)
    assert [re.findall(r"tensor<(\d+)x1xi32>", text) for text in scatters] == [["16"]]


@pytest.mark.parametrize(
    ("devices", "tokens", "chunks", "kernels"),
    [(8, 128, 32, "xla"), (8, 128, 32, "triton"), (3, 96, 6, "xla")],
)
def test_any_number_of_chunks_works_on_any_mesh(devices, tokens, chunks, kernels):
    mesh = placement.make_mesh(devices, 1)
    h_ND = np.ones((tokens, 300), np.float32)
    wte_VK, targets_N = np.eye(11, 300, dtype=np.float32), np.zeros(tokens, np.int32)
    loss = functools.partial(cross_entropy, chunks=chunks, kernels=kernels)
    h_ND, targets_N = jax.device_put((h_ND, targets_N), placement.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda h, w, t: loss(h, (HeadBand(w, None, 0, 11),), t))(
            h_ND, wte_VK, targets_N
        )
    np.testing.assert_allclose(found, tokens * np.log(11), rtol=1e-6)


HEADS = {
    "full": [(11, None)],
    "low rank": [(11, 4)],
    "bands": [(3, None), (8, 4)],
}


# 128 tokens are 16 per device, which 4 divides and 32 does not; 96 are 12, and 8 does
# not divide them.
@pytest.mark.parametrize(
    ("name", "kernels", "tokens", "chunks"),
    [
        ("full", "xla", 96, 8),
        ("full", "triton", 128, 32),
        ("low rank", "xla", 128, 32),
        ("low rank", "triton", 96, 8),
        ("bands", "xla", 128, 4),
        ("bands", "triton", 96, 8),
    ],
)
def test_chunks_of_the_loss_move_no_token_to_another_device(
    name, kernels, tokens, chunks
):
    bands, width = HEADS[name], 300  # The head kernels do not take this width.
    mesh = placement.make_mesh(8, 1)
    split, whole = placement.batch_sharding(mesh), placement.replicated(mesh)

    def shape(*axes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(axes, dtype)

    head = tuple(
        HeadBand(shape(rows, rank or width), rank and shape(rank, width), start, rows)
        for start, (rows, rank) in zip((0, bands[0][0]), bands, strict=False)
    )

    def loss(h_ND, head, targets_N):
        return cross_entropy(h_ND, head, targets_N, chunks=chunks, kernels=kernels)

    gradient = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1)),
        in_shardings=(split, whole, split),
        out_shardings=(whole, (split, whole)),
    )
    arguments = shape(tokens, width), head, shape(tokens, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        compiled = gradient.lower(*arguments).compile()
    program = compiled.as_text()
    assert "all-reduce" in program  # of the sum and of the tables' gradients
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in program


def test_a_batch_starts_before_the_result_of_the_one_before_is_fetched():
    started = []

    def double(batch):
        started.append(batch)
        return 2 * batch

    batches = [(np.full(8, number),) for number in range(3)]
    mesh = placement.make_mesh(4, 2)
    seen = [
        (batch.tolist(), result.tolist(), len(started))
        for (batch,), result in placement.map_batches(double, batches, mesh)
    ]
    assert seen == [([0] * 8, [0] * 8, 2), ([1] * 8, [2] * 8, 3), ([2] * 8, [4] * 8, 3)]
    assert started[0].sharding == placement.batch_sharding(mesh)
    assert list(placement.map_batches(double, [], mesh)) == []


# Several processes


def test_distributed_start_without_an_address_is_one_clear_line(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="distributed.coordinator_address=HOST:PORT"):
        processes.start(None, None, None)


def test_distributed_start_passes_the_config_on(monkeypatch):
    calls = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **_: calls.append(args)
    )
    processes.start("host:1234", 2, 1)
    assert calls == [("host:1234", 2, 1)]


@pytest.mark.parametrize("count", [1, 2])
def test_several_processes_wait_for_each_other(monkeypatch, count):
    waited_for = []
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", waited_for.append)
    processes.wait_for_all("files are written")
    assert waited_for == ["files are written"][: count - 1]


def test_several_processes_must_use_all_their_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="does not fit the 8 devices"):
        placement.make_mesh(2, 2)
    assert placement.make_mesh(2, 4).size == 8
