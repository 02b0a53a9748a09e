"""Product quantization: centroids, bytes and what the sample sees."""

import numpy as np
import pytest

from pcagpt.factorization import product_quantize

RANDOM = np.random.default_rng(0)
FLAT = np.ones(3000)
TABLE = RANDOM.normal(size=(3000, 10)).astype(np.float32)


@pytest.mark.parametrize("parts", [1, 3, 5])
def test_a_row_decodes_to_its_nearest_centroids(parts):
    stored = product_quantize(TABLE, parts, FLAT)
    dense, start = stored.dense(), 0
    assert (stored.codes.dtype, stored.codes.shape) == (np.uint8, (3000, parts))
    for book, codes in zip(stored.codebooks, stored.codes.T, strict=True):
        columns = slice(start, start := start + book.shape[1])
        centroids = book.astype(np.float32)
        np.testing.assert_array_equal(dense[:, columns], centroids[codes])
        distances = np.square(TABLE[:, None, columns] - centroids).sum(axis=2)
        chosen = np.take_along_axis(distances, codes[:, None].astype(int), 1)[:, 0]
        np.testing.assert_allclose(chosen, distances.min(axis=1), atol=1e-5)
    assert (start, dense.dtype, dense.shape) == (10, np.float32, TABLE.shape)


def test_bytes_are_those_of_codes_and_codebooks():
    stored = product_quantize(TABLE, 3, FLAT)
    assert [book.shape for book in stored.codebooks] == [(256, 4), (256, 3), (256, 3)]
    assert {book.dtype for book in stored.codebooks} == {np.dtype(np.float16)}
    assert stored.bytes == 3 * 3000 + 2 * 256 * 10


def test_shorter_vectors_lose_less():
    losses = [
        np.square(product_quantize(TABLE, parts, FLAT).dense() - TABLE).mean()
        for parts in (2, 4, 5, 10)
    ]
    assert (np.diff(losses) < 0).all()
    assert losses[-1] < 1e-3


def test_fewer_different_rows_than_centroids_come_back():
    """Equal rows are equal starts of k-means; those without tokens do no harm."""
    table = np.repeat(TABLE[:20].astype(np.float16), 150, axis=0)
    stored = product_quantize(table, 2, FLAT)
    np.testing.assert_allclose(stored.dense(), table, atol=2e-3)


def test_few_tokens_have_few_centroids():
    stored = product_quantize(TABLE[:7], 2, FLAT[:7])
    assert stored.bytes == 7 * 2 + 2 * 7 * 10
    np.testing.assert_allclose(stored.dense(), TABLE[:7], rtol=1e-3)


def test_likely_tokens_lose_less():
    table = RANDOM.normal(size=(20_000, 4)).astype(np.float32)
    table[:5000] += 9
    weights = np.where(np.arange(20_000) < 5000, 20.0, 1.0)
    error = [
        np.square(product_quantize(table, 1, w).dense() - table)[:5000].mean()
        for w in (weights, np.ones(20_000))
    ]
    assert error[0] < 0.8 * error[1]


def test_values_beyond_float16_are_cut_to_its_range():
    stored = product_quantize(1e6 * TABLE[:600], 3, FLAT[:600])
    dense = stored.dense()
    assert np.isfinite(dense).all()
    assert np.abs(dense).max() == np.finfo(np.float16).max
    assert (np.sign(dense) == np.sign(TABLE[:600])).mean() > 0.7
