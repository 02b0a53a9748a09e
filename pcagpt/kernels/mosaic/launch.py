"""Runs Mosaic kernels on GPUs and interprets them on CPUs."""

from collections.abc import Callable

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

LEAST_COMPUTE_CAPABILITY = 9.0  # Hopper, the first with the bulk copy engine
SHARED_BYTES = 227 * 1024  # of a Hopper GPU, for one program
MULTIPROCESSORS_OF_A_CPU = 3  # for tests


def takes(capability: float) -> bool:
    """Whether a GPU of this compute capability runs the kernels of this package."""
    return capability >= LEAST_COMPUTE_CAPABILITY


def has_wgmma(device: jax.Device | None = None) -> bool:
    """Whether the device has Hopper's products, which newer GPUs replaced.

    A CPU interprets them. None: the first device.
    """
    device = device or jax.devices()[0]
    capability = getattr(device, "compute_capability", "9.0")
    return str(capability).startswith("9.")


def multiprocessors() -> int:
    """Number of multiprocessors of the GPU."""
    if is_interpreted():
        return MULTIPROCESSORS_OF_A_CPU
    described = jax.sharding.get_abstract_mesh().abstract_device
    # Tests describe a GPU that is not here.
    return described.num_cores if described else jax.devices()[0].core_count


def shared_bytes() -> int:
    """Shared memory that one program can use; Blackwell for consumers has 99 KB."""
    return getattr(jax.devices()[0], "shared_memory_per_block_optin", SHARED_BYTES)


def is_interpreted() -> bool:
    """Whether kernels are interpreted, because the backend is a CPU."""
    return jax.default_backend() == "cpu"


def call(body: Callable, results, *, programs: int, groups: int, name: str):
    """A function that runs `body` in this many programs.

    A program has `groups` groups of 128 threads. `body` gets references to the inputs
    and to the results. `program()` and `group()` are its place. An input may be a
    reference that `body` writes. The threads of a group wait for each other only where
    `body` says so, for example in `plgpu.commit_smem`.
    """
    return pl.kernel(
        body,
        out_type=results,
        mesh=plgpu.Mesh(
            grid=(programs,),
            grid_names=("program",),
            num_threads=groups,
            thread_name="group",
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=_interpreter() if is_interpreted() else False,
        name=name,
    )


def _interpreter():
    try:
        return plgpu.InterpretGPUParams()
    except AttributeError:  # JAX 0.10 does not export it.
        from jax._src.pallas.mosaic_gpu.interpret import params

        return params.InterpretGPUParams()


def with_scratch(body: Callable, **arrays) -> None:
    """Calls `body` with these arrays and barriers in the shared memory of a program."""
    pl.run_scoped(body, **arrays, collective_axes="group")


def program() -> tuple[jax.Array, int]:
    """The number of this program, and of all programs."""
    return jax.lax.axis_index("program"), jax.lax.axis_size("program")


def group() -> jax.Array:
    """The number of this group of threads in its program."""
    return jax.lax.axis_index("group")


def shared(shape: tuple[int, ...], dtype, columns: int = 0):
    """An array in shared memory.

    `columns`: width of its tiles of 8 rows, swizzled, as products read them.
    """
    if not columns:
        return plgpu.SMEM(shape, dtype)
    swizzle = columns * jax.numpy.dtype(dtype).itemsize
    tiles = plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(shape, dtype, transforms=tiles)
