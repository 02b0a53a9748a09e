"""Cross entropy of a low-rank head with kernels that store no logits.

`triton.low_rank_head` explains the method. Each band takes kernels that fit its rank.
Without such kernels, it stores one chunk of logits at a time, in float32.

Shape letters: N tokens, n tokens of a chunk, V rows of a band, D width, K rank.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from pcagpt.kernels import use_triton
from pcagpt.kernels.mosaic import low_rank_head as mosaic_head
from pcagpt.kernels.triton import low_rank_head as triton_head
from pcagpt.losses.chunks import scan_chunks
from pcagpt.model import ALIGNED, Head, HeadBand, products, project
from pcagpt.sharding.inside import by_device, device_count, gathered


def head_kernels(kernels: str, rank: int, dtype):
    """The module with the kernels for a table of that rank, or None."""
    if kernels == "mosaic" and mosaic_head.fits(rank, dtype):
        return mosaic_head
    return triton_head if use_triton(kernels) and triton_head.fits(rank) else None


def fused_cross_entropy(
    h_ND, head: Head, targets_N, chunks: int, kernels: str
) -> jax.Array:
    """`cross_entropy` with kernels; `chunks` is for bands with too high a rank."""
    if len(head) > 1 and device_count() == 1:
        head = tuple(map(_aligned, head))
    tables = tuple(band.replace(scale_down=None) for band in head)
    return _loss(chunks, kernels, _project(h_ND, head), tables, targets_N)


def _aligned(band: HeadBand) -> HeadBand:
    """The band with a rank that is a multiple of ALIGNED; the new columns are 0."""
    if band.scale_down is None:
        return band
    missing = -band.wte.shape[1] % ALIGNED
    return band.replace(
        wte=jnp.pad(band.wte, ((0, 0), (0, missing))),
        scale_down=jnp.pad(band.scale_down, ((0, missing), (0, 0))),
    )


def _project(h_ND, head: Head) -> tuple[jax.Array, ...]:
    """`project` for each band, by one product if there is one device.

    Several devices would have to exchange parts of the joined matrices.
    """
    scales = [band.scale_down for band in head if band.scale_down is not None]
    if not scales or device_count() > 1:
        return tuple(project(h_ND, band.scale_down) for band in head)
    ends = itertools.accumulate(len(scale_KD) for scale_KD in scales)
    z_NK = project(h_ND, jnp.concatenate(scales))
    parts = iter(jnp.split(z_NK, list(ends)[:-1], axis=1))
    return tuple(h_ND if band.scale_down is None else next(parts) for band in head)


# XLA cannot differentiate a kernel. The forward pass also computes the gradients with
# respect to z, the backward pass those with respect to the tables.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _loss(chunks, kernels, z_of_bands, tables: Head, targets_N):
    return _forward(chunks, kernels, z_of_bands, tables, targets_N)[0]


def _forward(chunks, kernels, z_of_bands, tables, targets_N):
    is_counted_N = targets_N >= 0
    dtype = z_of_bands[0].dtype
    cast_tables = jax.tree.map(lambda wte_VK: gathered(wte_VK.astype(dtype)), tables)
    summaries, rows, target_logit_N = [], [], 0.0
    for z_NK, wte_VK, local_N, size in _bands(z_of_bands, cast_tables, targets_N):
        summaries.append(_summarize(z_NK, wte_VK, size, chunks, kernels))
        is_here_N1 = ((local_N >= 0) & (local_N < size))[:, None]
        row_NK = wte_VK[jnp.clip(local_N, 0, size - 1)].astype(jnp.float32)
        rows.append(jnp.where(is_here_N1, row_NK, 0.0))
        target_logit_N += jnp.sum(rows[-1] * z_NK, axis=1)
    normaliser_N = jax.nn.logsumexp(jnp.stack([n_N for n_N, _ in summaries]), axis=0)
    loss = jnp.sum(jnp.where(is_counted_N, normaliser_N - target_logit_N, 0.0))
    gradients = []
    for (band_normaliser_N, mean_NK), row_NK in zip(summaries, rows, strict=True):
        share_N = jnp.exp(band_normaliser_N - normaliser_N)
        gradient_NK = share_N[:, None] * mean_NK - row_NK
        gradients.append(jnp.where(is_counted_N[:, None], gradient_NK, 0.0))
    return loss, (z_of_bands, tables, cast_tables, targets_N, normaliser_N, gradients)


def _backward(chunks, kernels, residuals, cotangent):
    z_of_bands, tables, cast_tables, targets_N, normaliser_N, gradients = residuals
    normaliser_N = jnp.where(targets_N >= 0, normaliser_N, jnp.inf)
    of_z = tuple(
        (gradient_NK * cotangent).astype(z_NK.dtype)
        for gradient_NK, z_NK in zip(gradients, z_of_bands, strict=True)
    )

    # The sum over devices must be the last operation. XLA can then add the lookup's
    # gradient of the same table before this sum, and sums over devices only once.
    @by_device([False, True, True, True, False], [False])
    def of_rows(cast_tables, z_of_bands, targets_N, normaliser_N, cotangent):
        found = []
        for z_NK, wte_VK, local_N, size in _bands(z_of_bands, cast_tables, targets_N):
            gradient_VK = _table_gradient(
                wte_VK, z_NK, normaliser_N, local_N, chunks, kernels
            )
            is_real_V1 = (jnp.arange(wte_VK.shape[0]) < size)[:, None]
            found.append(jnp.where(is_real_V1, gradient_VK * cotangent, 0.0))
        return (jax.tree.unflatten(jax.tree.structure(cast_tables), found),)

    [of_tables] = of_rows(cast_tables, z_of_bands, targets_N, normaliser_N, cotangent)
    of_tables = jax.tree.map(lambda g, wte: g.astype(wte.dtype), of_tables, tables)
    return of_z, of_tables, None


_loss.defvjp(_forward, _backward)


def _bands(z_of_bands, tables: Head, targets_N):
    """Yields (z, table, targets as row numbers of it, number of real rows) per band."""
    for z_NK, band in zip(z_of_bands, tables, strict=True):
        yield z_NK, band.wte, targets_N - band.start, band.size


def _summarize(z_NK, wte_VK, size: int, chunks: int, kernels: str):
    """`low_rank_head.summarize`; for a high rank, its plain form in chunks."""
    form = head_kernels(kernels, wte_VK.shape[1], wte_VK.dtype)
    if form is not None:
        return form.summarize(z_NK, wte_VK, size)

    @by_device([True, False], [True, True])
    def of_rows(z_NK, wte_VK):
        def summarize(_, arrays):
            logits_nV = products(arrays[0], wte_VK, jnp.float32)
            normaliser_n = jax.nn.logsumexp(logits_nV, axis=1)
            p_nV = jnp.exp(logits_nV - normaliser_n[:, None]).astype(wte_VK.dtype)
            mean_nK = jnp.matmul(p_nV, wte_VK, preferred_element_type=jnp.float32)
            return None, (normaliser_n, mean_nK)

        return scan_chunks(summarize, None, chunks, z_NK)[1]

    return of_rows(z_NK, wte_VK[:size])


def _table_gradient(wte_VK, z_NK, normaliser_N, targets_N, chunks: int, kernels: str):
    """`low_rank_head.table_gradient`; for a high rank, its plain form in chunks."""
    form = head_kernels(kernels, wte_VK.shape[1], wte_VK.dtype)
    if form is not None:
        return form.table_gradient(wte_VK, z_NK, normaliser_N, targets_N)

    def add_chunk(total_VK, arrays):
        z_nK, normaliser_n, targets_n = arrays
        logits_nV = products(z_nK, wte_VK, jnp.float32)
        p_nV = jnp.exp(logits_nV - normaliser_n[:, None])
        error_nV = p_nV - jax.nn.one_hot(targets_n, wte_VK.shape[0])
        error_Vn = error_nV.astype(z_nK.dtype).T
        gradient_VK = jnp.matmul(error_Vn, z_nK, preferred_element_type=jnp.float32)
        return total_VK + gradient_VK, None

    zero_VK = jnp.zeros(wte_VK.shape, jnp.float32)
    return scan_chunks(add_chunk, zero_VK, chunks, z_NK, normaliser_N, targets_N)[0]
