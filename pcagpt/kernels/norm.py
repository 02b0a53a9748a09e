"""Residual addition and LayerNorm by the kernels of a backend, with their gradients.

Shape letters: N rows, D their width. `of_x` is the gradient of the loss with respect to
x.
"""

import functools
from types import ModuleType

import jax

from pcagpt import kernels
from pcagpt.kernels.mosaic import norm as mosaic
from pcagpt.kernels.triton import norm as triton


def form_of(backend: str, width: int) -> ModuleType | None:
    """The module with the kernels for rows of this width, or None."""
    if backend == "mosaic" and mosaic.fits(width):
        return mosaic
    return triton if kernels.use_triton(backend) and triton.fits(width) else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def add_and_norm(
    x_ND, update_ND, bias_D, scale_D, offset_D, epsilon: float, form: ModuleType
):
    """s = x + update + bias, and LayerNorm(s) * scale + offset, both [N, D].

    x, update and the results have the compute dtype; bias, scale, offset, statistics
    and sums are float32. `epsilon` is added to the variance.
    """
    return _forward(x_ND, update_ND, bias_D, scale_D, offset_D, epsilon, form)[0]


def _forward(x_ND, update_ND, bias_D, scale_D, offset_D, epsilon, form):
    sum_ND, normed_ND, *statistics = form.forward_rows(
        x_ND, update_ND, bias_D, scale_D, offset_D, epsilon=epsilon
    )
    return (sum_ND, normed_ND), (sum_ND, scale_D, *statistics)


def _backward(epsilon, form, residuals, gradients):
    del epsilon
    # The gradients of bias, scale and offset are one array, summed once over devices.
    gradient_ND, of_parameters_3D = form.backward_rows(*gradients, *residuals)
    return gradient_ND, gradient_ND, *of_parameters_3D


add_and_norm.defvjp(_forward, _backward)
