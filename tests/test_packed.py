"""Packed tables: fixed-width codes, which a model reads in place."""

import gc
import json
import weakref

import jax
import numpy as np
import pytest
from runs import gpt_config

from pcagpt import coding
from pcagpt.coding.packed import _basis, choices, pack
from pcagpt.coding.widths import CHOICES, Widths, levels_of
from pcagpt.compression.codes import KINDS
from pcagpt.errors import UserError
from pcagpt.factorization import BudgetTooSmall, Weighting, second_order_loss
from pcagpt.losses import token_losses
from pcagpt.model import (
    BLOCK_RANK,
    GPT,
    WIDTHS,
    BandSpec,
    token_order,
    weight_bytes,
)
from pcagpt.training.step import Teacher

V, D = 3000, 20  # The width is no multiple of a block, the bands none of a tile.
RANDOM = np.random.default_rng(7)
BASIS = np.linalg.qr(RANDOM.normal(size=(D, D)))[0]
TABLE = (RANDOM.normal(size=(V, D)) * np.arange(1, D + 1) ** -0.8 @ BASIS + 0.3).astype(
    np.float32
)
WEIGHTS = RANDOM.permutation(1 / np.arange(1, V + 1))
HIDDEN = RANDOM.normal(size=(4 * D, D)) * np.linspace(0.3, 3, D)
MEAN = WEIGHTS @ TABLE / WEIGHTS.sum()
FULL = Weighting(
    WEIGHTS,
    HIDDEN.T @ HIDDEN / len(HIDDEN),
    MEAN,
    (TABLE - MEAN) @ RANDOM.normal(size=(D, D)) * 0.3,
)

DESCRIPTION = coding.Description("packed", "a" * 64, "b" * 64, 0.1, None)


@pytest.fixture(scope="module")
def prepared():
    return coding.prepare(TABLE, FULL)


@pytest.fixture(scope="module", params=[1, 5], ids=["one band", "five bands"])
def packed(request, prepared):
    return pack(prepared, request.param, 42_000)


def model_of(packed):
    """(a model with a packed table, its variables)."""
    config = gpt_config(
        vocab_size=V,
        n_embd=D,
        n_head=2,
        band_sizes=packed.sizes,
        band_ranks=(0,) * len(packed.sizes),
        band_blocks=packed.blocks,
    )
    model = GPT(config)
    variables = model.init(jax.random.key(0), np.zeros((1, 4), np.int32))
    shapes = jax.tree.map(np.shape, variables["constants"])
    assert shapes == jax.tree.map(np.shape, packed.constants)
    return model, variables | {"constants": packed.constants}


def embed(model, variables, tokens):
    return model.apply(variables, tokens, method=lambda self, ids: self.embed(ids))


def test_lookup_and_head_read_what_the_table_stands_for(packed):
    model, variables = model_of(packed)
    dense = packed.dense()
    rows = embed(model, variables, np.arange(V))
    np.testing.assert_allclose(rows, dense, atol=1e-6)
    h = RANDOM.normal(size=(6, D)).astype(np.float32)
    logits = h @ dense.T
    found = model.apply(variables, h, method="logits")
    np.testing.assert_allclose(found, logits, atol=1e-5)
    targets = RANDOM.integers(0, V, 6)
    columns = model.apply(variables, targets, method="renumber")
    losses = token_losses(h, model.apply(variables, method="head"), columns)
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), targets]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_the_token_order_is_read_from_its_model(packed):
    np.testing.assert_array_equal(token_order(packed.constants, V), packed.order)


def test_it_can_teach_a_model_in_bands(packed):
    model, variables = model_of(packed)
    order = RANDOM.permutation(V)
    bands = BandSpec(0, 1000, 0, 4), BandSpec(1000, V - 1000, 8, 2)
    head = Teacher.aligned(model, variables, bands, order).head
    assert [band.wte.shape for band in head] == [(1000, D), (V - 1000 + 8, D)]
    rows = np.concatenate([band.wte[: band.size] for band in head])
    np.testing.assert_allclose(rows, packed.dense()[order], atol=1e-6)


def test_its_file_is_readable_with_numpy_alone(packed, tmp_path):
    path = tmp_path / "table.npz"
    coding.write_packed(path, packed, DESCRIPTION)
    assert path.stat().st_size == coding.packed_bytes(packed)
    arrays = np.load(path)
    order = arrays.get("order", np.arange(V))
    dense, start = np.empty((V, D), np.float32), 0
    for band, blocks in enumerate(arrays["blocks"]):
        codes, values, byte, level = arrays[f"codes_{band}"], [], 0, 0
        for width, count in zip(WIDTHS, blocks, strict=True):
            for _ in range(count):
                own = codes[:, byte : byte + width]
                bits = np.unpackbits(own[:, :, None], axis=2, bitorder="little")
                numbers = (bits << np.arange(width)[:, None]).sum(axis=1)
                values.append(arrays["levels"][level + numbers])
                byte += width
            level += 2**width
        values = np.concatenate(values, axis=1) * arrays[f"scales_{band}"]
        rows = values @ arrays["basis"][: values.shape[1]] * arrays["columns"]
        dense[order[start : start + len(rows)]] = rows + arrays["mean"]
        start += len(rows)
    np.testing.assert_allclose(dense, packed.dense(), atol=1e-6)


def test_a_file_gives_back_the_table(packed, tmp_path):
    path = tmp_path / "table.npz"
    coding.write_packed(path, packed, DESCRIPTION)
    found, description = coding.read_packed(path)
    assert description == DESCRIPTION
    assert (found.sizes, found.blocks) == (packed.sizes, packed.blocks)
    np.testing.assert_array_equal(found.dense(), packed.dense())


def test_every_flipped_byte_and_every_cut_of_a_file_is_refused(packed, tmp_path):
    path = tmp_path / "table.npz"
    coding.write_packed(path, packed, DESCRIPTION)
    content, wanted = path.read_bytes(), packed.dense()
    places = RANDOM.choice(len(content), 200, replace=False)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << RANDOM.integers(8)
        path.write_bytes(damaged)
        try:
            found, description = coding.read_packed(path)
        except UserError as error:
            assert str(path) in str(error)
        else:  # Times and attributes in the archive mean nothing.
            assert description == DESCRIPTION
            np.testing.assert_array_equal(found.dense(), wanted)
    for end in (0, 10, 500, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match="table.npz"):
            coding.read_packed(path)


@pytest.mark.parametrize(
    "change",
    [
        {"codes_0": np.zeros((3, 2), np.uint8)},
        {"scales_0": np.zeros(3, np.float32)},
        {"basis": np.zeros((8, 3), np.int8)},
        {"levels": np.zeros(3, np.float32)},
        {"mean": np.full(D, np.nan, np.float32)},
        {"order": np.zeros(V, np.int32)},
        {"order": np.arange(V, dtype=np.float32)},
        {"blocks": np.zeros((0, 7), np.uint16)},
        # 10^13 tokens in no bytes.
        {"blocks": np.zeros((1, 7), np.uint16), "codes_0": np.zeros((10**13, 0), "u1")},
        {"blocks": np.zeros((1, 7), np.uint16)},
        {"blocks": np.zeros((1, 3), np.uint16)},
        {"description": np.frombuffer(b"{}", np.uint8)},
        {"description": np.frombuffer(b"[", np.uint8)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arrays_that_do_not_fit_together_are_refused(prepared, tmp_path, change):
    path = tmp_path / "table.npz"
    coding.write_packed(path, pack(prepared, 5, 42_000), DESCRIPTION)
    np.savez(path, **dict(np.load(path)) | change)
    with pytest.raises(UserError, match="is damaged"):
        coding.read_packed(path)


def test_fields_of_a_later_version_are_left_out(prepared, tmp_path):
    path = tmp_path / "table.npz"
    coding.write_packed(path, pack(prepared, 5, 42_000), DESCRIPTION)
    arrays = dict(np.load(path))
    said = json.loads(arrays["description"].tobytes()) | {"later": 1}
    text = json.dumps(said).encode()
    np.savez(path, **arrays | {"description": np.frombuffer(text, np.uint8)})
    assert coding.read_packed(path)[1] == DESCRIPTION


@pytest.mark.parametrize(("bands", "largest"), [(1, 60_000), (5, 90_000)])
def test_more_bytes_never_add_loss_and_a_file_fills_its_budget(
    prepared, bands, largest
):
    losses = []
    for most in (30_000, 36_000, 42_000, largest):
        made = pack(prepared, bands, most)
        assert 0.9 * most < coding.packed_bytes(made) <= most
        losses.append(second_order_loss(TABLE, made.dense(), FULL))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.02 * losses[0]


@pytest.mark.parametrize("bands", [1, 5])
def test_more_bytes_never_add_predicted_loss(prepared, bands):
    _, _, widths = choices(prepared, bands)
    sizes = np.geomspace(widths.bytes_of(np.inf), 90_000, 8).astype(int).tolist()
    found = [widths.within_bytes(most) for most in sizes]
    assert all(c.bytes <= most for c, most in zip(found, sizes, strict=True))
    assert (np.diff([choice.error for choice in found]) <= 0).all()
    assert found[-1].error < 0.01 * found[0].error


@pytest.mark.parametrize("bands", [1, 5])
def test_the_bytes_that_a_loss_takes_are_estimated(prepared, bands):
    for most in (36_000, 50_000, 70_000):
        made = pack(prepared, bands, most)
        loss = second_order_loss(TABLE, made.dense(), FULL)
        found = coding.estimated_packed_bytes(prepared, bands, loss)
        assert found == pytest.approx(coding.packed_bytes(made), rel=0.15)


def test_bands_and_the_context_term_pay(prepared):
    def loss(prepared, bands, most=42_000):
        dense = pack(prepared, bands, most).dense()
        return second_order_loss(TABLE, dense, FULL)

    # Without the order of the tokens, which takes much of so small a table.
    assert loss(prepared, 5) < 0.8 * loss(prepared, 1, 42_000 - 4 * V)
    without = coding.prepare(TABLE, FULL._replace(contexts=None))
    assert loss(prepared, 5) < 0.9 * loss(without, 5)


def test_a_budget_without_room_for_any_code_is_refused(prepared):
    make, estimate = KINDS["packed"].make, KINDS["packed"].estimate
    with pytest.raises(BudgetTooSmall, match="cannot hold a packed table") as caught:
        make(prepared, 5, 15_000)
    least = estimate(prepared, 5, np.inf)
    assert str(caught.value).endswith(f"the smallest takes {least:,}")
    # The file has fewer bytes than the choice of widths reckons with.
    assert choices(prepared, 5)[2].within_bytes(least).bytes > least
    assert make(prepared, 5, least)[1] == least
    with pytest.raises(BudgetTooSmall):
        make(prepared, 5, least - 1)


def test_tiny_values_have_the_relative_error_of_others():
    def error(scale):
        table, weighting = TABLE * np.float32(scale), FULL._replace(contexts=None)
        weighting = weighting._replace(mean=MEAN * scale)
        dense = pack(coding.prepare(table, weighting), 5, 42_000).dense()
        return np.linalg.norm((dense - table) / np.float32(scale))

    assert error(1e-20) == pytest.approx(error(1), rel=1e-3)


def test_every_band_has_codes(prepared):
    """Orbax stores no empty arrays; the rarest band would have none at this size."""
    made = pack(prepared, 12, 27_000)
    assert min(band.codes.size for band in made.bands) > 0


def test_what_does_not_depend_on_the_size_is_computed_once(monkeypatch):
    prepared, made = coding.prepare(TABLE, FULL), []

    def counted(*arguments):
        made.append(arguments)
        return levels_of(*arguments)

    monkeypatch.setattr("pcagpt.coding.packed.levels_of", counted)
    for most in (36_000, 42_000):
        pack(prepared, 5, most)
    coding.estimated_packed_bytes(prepared, 5, np.inf)
    assert len(made) == 1
    pack(coding.prepare(2 * TABLE, FULL), 5, 42_000)
    pack(prepared, 1, 42_000)
    assert len(made) == 3


def test_a_table_that_was_packed_is_not_kept_in_memory():
    prepared = coding.prepare(TABLE + 1, FULL)
    coding.estimated_packed_bytes(prepared, 5, np.inf)
    table = weakref.ref(prepared.table_VD)
    del prepared
    gc.collect()
    assert table() is None


def test_levels_of_a_gaussian_are_those_of_lloyd_and_max():
    values = RANDOM.normal(size=(64, 4000)) * np.geomspace(1, 1e-3, 64)[:, None]
    levels, errors = levels_of(values, np.split(np.arange(4000), 20))
    assert np.ptp(levels[1]) / 2 == pytest.approx(0.798, rel=0.02)  # sqrt(2 / pi)
    assert np.ptp(levels[2]) / 2 == pytest.approx(1.510, rel=0.03)
    assert CHOICES[:5].tolist() == [0, 1, 2, 3, 4]
    known = [1, 0.3634, 0.1175, 0.03454, 0.009497]
    np.testing.assert_allclose(errors[:5], known, rtol=0.02)


def test_widths_are_the_cheapest_choice_within_the_bytes():
    """All choices of two blocks in two bands are tried."""
    values = RANDOM.normal(size=(16, 60)) * np.repeat([3.0, 0.5], BLOCK_RANK)[:, None]
    weights = np.repeat([5.0, 1.0], 30)
    bands = [np.arange(30), np.arange(30, 60)]
    errors = 0.3 ** CHOICES.astype(float)
    energy = np.array(
        [
            [np.square(v[:, t]).sum(axis=0) @ weights[t] for v in np.split(values, 2)]
            for t in bands
        ]
    )
    most = 3000 + 500
    widths = Widths(values, weights, bands, errors).within_bytes(most).widths
    assert (np.diff(widths, axis=1) <= 0).all()

    def used(widths):
        codes = (30 * widths + 4 * BLOCK_RANK * (widths > 0)).sum()
        rows = BLOCK_RANK * (widths > 0).any(axis=0).sum()
        return codes + rows * 16 + 4 * (60 + 32 + sum(2**w for w in WIDTHS))

    def loss(widths):
        return (energy * errors[np.searchsorted(CHOICES, widths)]).sum()

    every = np.array(np.meshgrid(*[CHOICES] * 4)).reshape(4, -1).T.reshape(-1, 2, 2)
    every = every[(every[:, :, 0] > 0).all(axis=1)]
    assert used(widths) <= most
    # A price finds the best table of its own size, but does not fill every byte.
    smaller = [other for other in every if used(other) <= used(widths)]
    assert loss(widths) <= min(map(loss, smaller)) + 1e-9


def test_a_band_with_its_energy_in_late_directions_is_decoded():
    is_rare = np.arange(V) >= V // 2
    table = RANDOM.normal(size=(V, 2 * BLOCK_RANK)).astype(np.float32)
    table[~is_rare, BLOCK_RANK:] /= 100
    table[is_rare, :BLOCK_RANK] /= 100
    prepared = coding.prepare(table, Weighting(np.where(is_rare, 1 / 64, 1.0)))
    widths = choices(prepared, 2)[2].within_bytes(42_000).widths
    assert (np.diff(widths, axis=1) <= 0).all()
    error = pack(prepared, 2, 42_000).dense() - table
    for tokens in (is_rare, ~is_rare):
        assert np.linalg.norm(error[tokens]) < 0.2 * np.linalg.norm(table[tokens])


def test_the_steps_of_the_basis_are_finer_where_the_metric_weighs_more():
    """Those of the columns cost the same, so none is far from the best one."""
    random = np.random.default_rng(0)
    scales = np.geomspace(1, 1000, D)
    rows, metric = random.normal(size=(8, D)) / scales, np.diag(scales**2)
    made = _basis(rows, metric)
    np.testing.assert_allclose(made.columns, 1 / scales)
    error = made.dense() - rows
    assert np.abs(error * scales).max() < 0.51 * np.abs(rows * scales).max() / 127


def test_its_bytes_are_those_that_a_model_is_built_for(packed):
    model, variables = model_of(packed)
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    assert weight_bytes(model.config) == packed.memory + others


def test_the_dense_table_never_exists_while_the_head_computes(prepared, monkeypatch):
    monkeypatch.setattr("pcagpt.model.packed.TILE", 64)  # The table is small.
    packed = pack(prepared, 2, 42_000)
    model, variables = model_of(packed)
    h = np.zeros((2, D), np.float32)
    head = jax.jit(lambda variables, h: model.apply(variables, h, method="logits"))
    memory = head.lower(variables, h).compile().memory_analysis()
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(variables["params"]))
    assert memory.argument_size_in_bytes < packed.memory + others + 1000
    # The logits of both bands and of all, and some tiles.
    assert memory.temp_size_in_bytes < 0.5 * TABLE.nbytes
