"""What the compiled step stores at GPT-2's vocabulary; how memory is measured."""

import functools
import math
import re
import runpy
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from command_line import ROOT
from runs import gpt_config, quick_environment

from pcagpt.config.schema import TrainSettings
from pcagpt.kernels.mosaic import launch, mlp
from pcagpt.kernels.mosaic import norm as mosaic_norm
from pcagpt.kernels.triton import low_rank_head, norm
from pcagpt.model import GPT
from pcagpt.training import optim
from pcagpt.training.step import initial_state, train_step

ROWS, WIDTH, CHUNKS = 50304, 768, 8


def shape(*axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(axes, dtype)


def largest_arrays(compiled):
    """Elements of the largest array of each dtype in the compiled program."""
    largest = {}
    for dtype, axes in re.findall(r"\b(\w+)\[([\d,]+)\]", compiled.as_text()):
        count = math.prod(map(int, axes.split(",")))
        largest[dtype] = max(largest.get(dtype, 0), count)
    return largest


def traced_step(rank, kernels, attention="xla", length=128):
    """The step with one layer and short sequences: attention takes little memory."""
    config = gpt_config(
        n_layer=1,
        block_size=length,
        n_embd_wte=rank,
        compute_dtype="bfloat16",
        kernels=kernels,
        attention=attention,
    )
    model, adamw = GPT(config), TrainSettings(steps=10, warmup_steps=0)
    optimizer = optim.optimizer(adamw)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer,
        seed=1,
        loss_chunks=CHUNKS,
    )
    state = jax.eval_shape(functools.partial(initial_state, model, optimizer, 1))
    batch = shape(1, 32, length + 1, dtype=jnp.int32)
    return jax.jit(step, donate_argnums=0).trace(state, batch)


TOKENS = 32 * 128
TABLE, CHUNK, HIDDEN = ROWS * WIDTH, TOKENS // CHUNKS * ROWS, TOKENS * 4 * WIDTH


@pytest.mark.parametrize(
    ("rank", "kernels", "largest", "gigabytes"),
    [
        (0, "xla", TABLE, 1.2),
        pytest.param(0, "triton", TABLE, 1.0, marks=pytest.mark.slow),
        pytest.param(128, "triton", HIDDEN, 0.5, marks=pytest.mark.slow),
        pytest.param(128, "xla", CHUNK, 0.9, marks=pytest.mark.slow),
    ],
)
def test_step_stores_no_logits_of_all_tokens(rank, kernels, largest, gigabytes):
    compiled = traced_step(rank, kernels).lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < gigabytes * 1e9
    assert max(largest_arrays(compiled).values()) == largest


MLP = {"mlp_gelu", "mlp_gradient"}  # Mosaic's


def kernels_of(jaxpr):
    """Names of the kernels that a program calls, however deep."""
    found = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("pallas_call", "mpmd_map"):
            found.add(equation.params["name"])
            continue
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found |= kernels_of(inner)
    return found


@pytest.mark.parametrize(
    ("rank", "loss_kernels"),
    [
        (0, {"softmax_loss_and_gradient"}),
        (128, {"head_summarize", "head_table_gradient"}),
    ],
)
def test_step_calls_every_kernel_that_serves_it(rank, loss_kernels, monkeypatch):
    both_ways = {"add_and_norm", "bias_gelu"}
    both_ways |= {f"{name}_gradient" for name in both_ways}
    with monkeypatch.context() as context:
        # Mosaic asks the device what only newer NVIDIA GPUs know.
        context.setattr(mlp, "fits", pytest.fail)
        context.setattr(mosaic_norm, "fits", pytest.fail)
        step = traced_step(rank, "triton").jaxpr
        assert kernels_of(step) == both_ways | loss_kernels
        assert kernels_of(traced_step(rank, "xla").jaxpr) == set()
    monkeypatch.setattr(launch, "multiprocessors", lambda: 132)
    monkeypatch.setattr(norm, "fits", pytest.fail)  # Triton's
    for name in ("summarize", "table_gradient"):
        monkeypatch.setattr(low_rank_head, name, pytest.fail)

    def attend(q, *rest, **knobs):  # cuDNN's
        assert q.shape[1] == 1  # Parameters are initialised with one token.
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    of_layers = {"add_and_norm", "add_and_norm_gradient", *MLP}
    of_layers |= {"attention", "attention_of_queries", "attention_of_keys"}
    step = traced_step(rank, "mosaic", attention="mosaic", length=256).jaxpr
    of_mosaic = {"head_summarize_lost"} if rank else set()
    assert kernels_of(step) == of_layers | loss_kernels | of_mosaic


SCRIPT = ROOT / "scripts" / "memory.py"


def test_the_slope_is_that_of_what_is_in_use_all_the_time():
    script = runpy.run_path(str(SCRIPT))
    saves = [5_000_000 * (step % 75 == 0) for step in range(1000)]
    samples = [(step, 7000 + 5 * step + more) for step, more in enumerate(saves)]
    slope, error = script["fit"](script["lowest"](samples, 20))
    assert slope == pytest.approx(5, abs=0.01)
    assert error < 0.01
    assert script["lowest"](samples[:1], 20) == samples[:1]
    assert script["lowest"]([], 20) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks glibc")
def test_the_script_trains_and_prints_a_slope_and_its_limit_decides_the_exit_code():
    ended = subprocess.run(
        [sys.executable, SCRIPT, "--steps=1500", "--limit=-1e9"],
        env=quick_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert ended.returncode == 1
    assert re.search(r"MB at step [\d,]+; slope -?\d+ ± \d+ bytes", ended.stdout)
