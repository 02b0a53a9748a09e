"""Residual addition and LayerNorm by the kernels of a backend, with their gradients.

A backend's module has `forward_rows` and `backward_rows` for the rows of one device.

Shape letters: N rows, T rows of an update, D their width. `of_x` is the gradient of the
loss with respect to x.
"""

import functools
from types import ModuleType

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from pcagpt import kernels
from pcagpt.kernels.mosaic import norm as mosaic
from pcagpt.kernels.triton import norm as triton
from pcagpt.sharding import inside


def form_of(backend: str, width: int) -> ModuleType | None:
    """The module with the kernels for rows of this width, or None."""
    if backend == "mosaic" and mosaic.fits(width):
        return mosaic
    return triton if kernels.use_triton(backend) and triton.fits(width) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def add_and_norm(
    x_ND, update_TD, bias_D, scale_D, offset_D, epsilon: float, form: ModuleType
):
    """s = x + update + bias, and LayerNorm(s) * scale + offset, both [N, D].

    The T rows of the update are repeated if there are fewer than N. x, update and the
    results have the compute dtype; bias, scale, offset, statistics and sums are
    float32. `epsilon` is added to the variance.
    """
    return _run(x_ND, update_TD, bias_D, scale_D, offset_D, epsilon, form)[:2]


def _run(x_ND, update_TD, bias_D, scale_D, offset_D, epsilon, form):
    count, length = len(x_ND), len(update_TD)
    if count // inside.device_count() % length:  # A device has no whole repeats.
        update_TD = jnp.tile(update_TD, (count // length, 1))
    has_own_rows = len(update_TD) == count
    on_devices = inside.by_device([True, has_own_rows, *[False] * 3], [True] * 4)
    forward = functools.partial(form.forward_rows, epsilon=epsilon)
    return on_devices(forward)(x_ND, update_TD, bias_D, scale_D, offset_D)


def _forward(x_ND, update_TD, bias_D, scale_D, offset_D, epsilon, form):
    arrays = [a.value for a in (x_ND, update_TD, bias_D, scale_D, offset_D)]
    sum_ND, normed_ND, *statistics = _run(*arrays, epsilon, form)
    rows_T = arrays[1][:, 0]  # Only their number is read.
    return (sum_ND, normed_ND), (rows_T, (sum_ND, scale_D.value, *statistics))


def _backward(epsilon, form, residuals, gradients):
    del epsilon
    of_sum_ND, of_normed_ND = gradients
    rows_T, arrays = residuals
    # The sum of the last norm is not used, so the kernel does not read its gradient.
    if isinstance(of_sum_ND, SymbolicZero):
        of_sum_ND = None
    if isinstance(of_normed_ND, SymbolicZero):
        of_normed_ND = jnp.zeros(of_normed_ND.shape, of_normed_ND.dtype)
    backward = inside.by_device([*[True] * 3, False, True, True], [True, False])
    # The gradients of bias, scale and offset are one array, summed once over devices.
    gradient_ND, of_parameters_3D = backward(form.backward_rows)(
        of_sum_ND, of_normed_ND, *arrays
    )
    of_update_TD = gradient_ND
    if len(rows_T) < len(gradient_ND):
        of_update_TD = _sum_of_repeats(gradient_ND, len(rows_T))
    return gradient_ND, of_update_TD, *of_parameters_3D


add_and_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def _sum_of_repeats(rows_ND, length: int) -> jax.Array:
    """The sum over the repeats of `length` rows, [T, D] in the dtype of the rows.

    On a GPU, XLA's sum over the leading axis takes three times as long.
    """
    if inside.device_count() > 1:  # They would send each other the slices.
        return rows_ND.reshape(-1, length, rows_ND.shape[1]).sum(axis=0)
    repeats = (
        lax.slice_in_dim(rows_ND, start, start + length).astype(jnp.float32)
        for start in range(0, len(rows_ND), length)
    )
    return functools.reduce(jnp.add, repeats).astype(rows_ND.dtype)
