"""The model that the knobs and the device ask for."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pcagpt.config.schema import ModelSettings
from pcagpt.errors import UserError
from pcagpt.model import GPT
from pcagpt.run.build import Hardware, build_config, hardware

CPU, OTHER_GPU = Hardware("cpu"), Hardware("gpu")
AMPERE = Hardware("gpu", ("triton", "xla"))
HOPPER = Hardware("gpu", ("mosaic", "triton", "xla"), is_hopper=True)
BLACKWELL = Hardware("gpu", ("mosaic", "triton", "xla"))
WITHOUT_TRITON = Hardware("gpu", ("mosaic", "xla"))


def test_the_vocabulary_is_the_corpus_s_unless_the_model_has_a_larger_one():
    assert build_config(ModelSettings(), 97, CPU).vocab_size == 97
    model = ModelSettings(vocab_size=200)
    assert build_config(model, 97, CPU).vocab_size == 200
    with pytest.raises(UserError, match="model.vocab_size is 200, .* up to 200"):
        build_config(model, 201, CPU)


def test_bands_must_hold_the_whole_vocabulary():
    model = ModelSettings(band_sizes=(10, 80), band_ranks=(8, 0))
    assert build_config(model, 90, CPU).band_ranks == (8, 0)
    with pytest.raises(UserError, match="add up to 90: .* 97"):
        build_config(model, 97, CPU)


@pytest.mark.parametrize(
    ("device", "asked", "expected"),
    [
        (CPU, {}, ("float32", "xla", "xla")),
        (AMPERE, {}, ("bfloat16", "cudnn", "triton")),
        (HOPPER, {}, ("bfloat16", "mosaic", "mosaic")),
        (HOPPER, {"kernels": "triton"}, ("bfloat16", "cudnn", "triton")),
        (
            HOPPER,
            {"kernels": "xla", "attention": "mosaic"},
            ("bfloat16", "mosaic", "xla"),
        ),
        (HOPPER, {"attention": "cudnn"}, ("bfloat16", "cudnn", "mosaic")),
        (HOPPER, {"compute_dtype": "float32"}, ("float32", "xla", "xla")),
        (BLACKWELL, {}, ("bfloat16", "cudnn", "mosaic")),
        (OTHER_GPU, {}, ("bfloat16", "cudnn", "xla")),
        (Hardware("tpu"), {}, ("float32", "xla", "xla")),
        (AMPERE, {"compute_dtype": "float32"}, ("float32", "xla", "xla")),
        (AMPERE, {"attention": "xla"}, ("bfloat16", "xla", "triton")),
        (AMPERE, {"kernels": "xla"}, ("bfloat16", "cudnn", "xla")),
        (CPU, {"compute_dtype": "bfloat16"}, ("bfloat16", "xla", "xla")),
        (CPU, {"kernels": "triton"}, ("float32", "xla", "triton")),
        (CPU, {"kernels": "mosaic"}, ("float32", "xla", "mosaic")),
    ],
)
def test_auto_takes_what_the_device_does_best(device, asked, expected):
    config = build_config(ModelSettings(**asked), 97, device)
    assert (config.compute_dtype, config.attention, config.kernels) == expected


@pytest.mark.parametrize(
    ("device", "asked", "words"),
    [
        (OTHER_GPU, {"kernels": "triton"}, "Ampere or newer.*leave model.kernels=auto"),
        (AMPERE, {"kernels": "mosaic"}, "Hopper or newer.*leave model.kernels=auto"),
        (HOPPER, {"kernels": "mosaic"}, "model.compute_dtype=bfloat16"),
        (WITHOUT_TRITON, {"kernels": "triton"}, "still has this backend"),
        (AMPERE, {"attention": "cudnn"}, "needs a GPU, and model.compute_dtype=bf"),
        (OTHER_GPU, {"attention": "mosaic"}, "Hopper GPU, .*leave model.attention=a"),
        (HOPPER, {"attention": "mosaic"}, "model.compute_dtype=bfloat16"),
    ],
)
def test_what_the_device_cannot_do_is_refused(device, asked, words):
    dtype = "bfloat16" if device in (OTHER_GPU, WITHOUT_TRITON) else "float32"
    with pytest.raises(UserError, match=words):
        build_config(ModelSettings(compute_dtype=dtype, **asked), 97, device)


def test_a_process_asks_its_own_device(monkeypatch):
    """The memory of another process's device cannot be read."""
    (own, *_) = jax.local_devices()
    monkeypatch.setattr(jax, "devices", pytest.fail)
    monkeypatch.setattr(jax, "local_devices", lambda: [own])
    assert hardware().platform == own.platform


@pytest.mark.parametrize(
    ("capability", "is_hopper"),
    [("9.0", True), ("8.0", False), ("10.0", False), (None, False)],
)
def test_hopper_is_known_by_its_capability(capability, is_hopper, monkeypatch):
    device = SimpleNamespace(platform="gpu", memory_stats=dict)
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert hardware().is_hopper is is_hopper


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 12 * 10**6, "n_layer": 1},
        {"n_layer": 10**9, "n_embd": 12},
        {"block_size": 10**12},
        {"vocab_multiple": 10**12},
    ],
)
def test_a_model_beyond_the_memory_is_refused_before_it_is_made(sizes):
    device = Hardware("cpu", memory=2**37)
    with pytest.raises(
        UserError, match=r"a model of .* weights: .* lower model.n_layer"
    ):
        build_config(ModelSettings(**sizes), 97, device)
    assert build_config(ModelSettings(), 50257, device)


def test_a_device_that_does_not_tell_its_memory_limits_only_the_blocks():
    with pytest.raises(UserError, match="weights: 10,000 blocks are the limit; lower"):
        build_config(ModelSettings(n_layer=10_001), 97, CPU)


@pytest.mark.parametrize(
    "table",
    [
        {},
        {"n_embd_wte": 128},
        {"band_sizes": (1000, 4000), "band_ranks": (0, 64)},
        {
            **{"band_sizes": (1000, 4000), "band_ranks": (0, 0)},
            "band_blocks": (40, 20, 0, 0, 5, 5, 20, 0, 0, 0, 0, 0, 10, 20),
        },
    ],
    ids=["dense", "factorized", "in bands", "packed"],
)
def test_a_model_may_fill_the_memory(table):
    model = ModelSettings(n_layer=1, **table)
    init = GPT(build_config(model, 5000, CPU)).init
    shapes = jax.eval_shape(init, jax.random.key(0), np.zeros((1, 4), np.int32))
    memory = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    build_config(model, 5000, Hardware("cpu", memory=memory))
    with pytest.raises(UserError, match="lower model.n_layer"):
        build_config(model, 5000, Hardware("cpu", memory=memory - 1))
