"""Coded tables: transform, integers, entropy coder, file and search."""

import hashlib
import importlib.util
import json
import runpy
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT
from constriction import stream

from pcagpt import coding
from pcagpt.coding import coder
from pcagpt.coding.basis import LARGEST, quantize_basis
from pcagpt.coding.coder import Reader, Writer
from pcagpt.coding.distribution import Distribution, frequencies
from pcagpt.coding.encode import estimate, prepare
from pcagpt.coding.file import HEADER_BYTES
from pcagpt.coding.fit import fit
from pcagpt.coding.quantize import ROUNDING, class_steps, step_classes, symbols_of
from pcagpt.coding.transform import (
    Coefficients,
    coefficient_chunks,
    coefficients,
    karhunen_loeve,
)
from pcagpt.errors import UserError
from pcagpt.factorization import (
    BudgetTooSmall,
    Statistics,
    Weighting,
    chunks,
    second_order_loss,
)

V, D = 300, 24
RANDOM = np.random.default_rng(5)
BASIS = np.linalg.qr(RANDOM.normal(size=(D, D)))[0]
TABLE = (RANDOM.normal(size=(V, D)) * np.arange(1, D + 1) ** -0.8 @ BASIS + 0.3).astype(
    np.float32
)
HIDDEN = RANDOM.normal(size=(4 * D, D)) * np.linspace(0.3, 3, D)
METRIC = HIDDEN.T @ HIDDEN / len(HIDDEN)
WEIGHTS = 1 / np.arange(1, V + 1)
MEAN = WEIGHTS @ TABLE / WEIGHTS.sum()
CONTEXTS = (TABLE - MEAN) @ RANDOM.normal(size=(D, D)) * 0.3
FULL = Weighting(WEIGHTS, METRIC, MEAN, CONTEXTS)
WEIGHTINGS = {
    "none": Weighting(),
    "mean": Weighting(mean=MEAN),
    "weights": Weighting(WEIGHTS, mean=MEAN),
    "metric": Weighting(WEIGHTS, METRIC, MEAN),
    "contexts": FULL,
}
DESCRIPTION = coding.Description("context", "a" * 64, "b" * 64, 0.0123456789, None)
each_weighting = pytest.mark.parametrize(
    "weighting", WEIGHTINGS.values(), ids=WEIGHTINGS
)


def loss_of(made, table=TABLE, weighting=FULL):
    """Second-order loss of a coded table."""
    return second_order_loss(table, made.table.dense(), weighting)


def written(path, table=TABLE, weighting=FULL, step=0.1):
    """A file of a table, and what was coded."""
    made = coding.at_step(prepare(table, weighting), step)
    coding.write(path, made.table, DESCRIPTION)
    return made


@each_weighting
def test_a_file_gives_back_every_integer_and_every_bit(weighting, tmp_path):
    made = written(tmp_path / "table.pcat", weighting=weighting)
    found, description = coding.read(tmp_path / "table.pcat")
    np.testing.assert_array_equal(found.symbols, made.table.symbols)
    np.testing.assert_array_equal(found.classes, made.table.classes)
    np.testing.assert_array_equal(found.dense(), made.table.dense())
    assert found.dense().dtype == np.float32
    assert description == DESCRIPTION
    assert made.bytes == (tmp_path / "table.pcat").stat().st_size


def test_a_loss_that_is_measured_later_does_not_change_the_size(tmp_path):
    made = written(tmp_path / "table.pcat")
    known = coding.Description("context", predicted_loss=1e-300, measured_loss=-1 / 3)
    assert len(coding.to_bytes(made.table, made.words, known)) == made.bytes


# Transform


def test_the_errors_of_coefficients_are_those_of_the_weighting():
    synthesis = karhunen_loeve(TABLE, FULL)
    np.testing.assert_allclose(synthesis @ METRIC @ synthesis.T, np.eye(D), atol=1e-10)
    values, contexts, left_out = coefficients(TABLE, FULL, synthesis, MEAN)
    np.testing.assert_allclose(values.T @ synthesis + MEAN, TABLE, atol=1e-4)
    np.testing.assert_allclose(left_out, 0, atol=1e-4)
    error = RANDOM.normal(size=values.shape)
    shift = np.einsum("kv,kv->v", error, contexts)
    expected = WEIGHTS @ (np.square(error).sum(axis=0) + shift**2) / 2
    dense = TABLE + error.T @ synthesis
    found = second_order_loss(TABLE, dense, FULL)
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_loss_weighting_mixes_the_shares_of_the_head_and_the_input():
    probability, frequency = np.array([0.7, 0.3]), np.array([0.5, 0.5])
    hidden, gradient = np.diag([2.0, 1.0]), np.diag([0.1, 0.4])
    statistics = Statistics(
        frequency, probability, np.zeros(2), hidden, gradient, np.zeros((2, 2))
    )
    found = coding.loss_weighting(np.eye(2), statistics)
    smoothed = np.array([0.6, 0.4]) + 0.005 * 0.5
    ratio = (smoothed[0] / smoothed[1]) ** 0.65
    assert found.token_weights.sum() == pytest.approx(smoothed.sum())
    assert found.token_weights[0] / found.token_weights[1] == pytest.approx(ratio)
    np.testing.assert_allclose(found.metric, np.diag([2.2, 1.8]))
    assert found.contexts.shape == (2, 2)


def test_directions_are_uncorrelated_and_fall_in_energy():
    synthesis = karhunen_loeve(TABLE, FULL)
    values = coefficients(TABLE, FULL, synthesis, MEAN).values
    moment = values * WEIGHTS @ values.T
    energy = moment.diagonal()
    assert (np.diff(energy) < 0).all()
    np.testing.assert_allclose(moment - np.diag(energy), 0, atol=1e-3 * energy[-1])


def test_coefficients_of_few_directions_are_the_best_ones():
    synthesis = karhunen_loeve(TABLE, FULL)[:5] + RANDOM.normal(size=(5, D)) * 0.02
    values, _, left_out = coefficients(TABLE, FULL, synthesis, MEAN)
    error = values.T @ synthesis + MEAN - TABLE
    np.testing.assert_allclose(error @ METRIC @ synthesis.T, 0, atol=1e-3)
    shift = np.einsum("vd,vd->v", error, CONTEXTS)
    np.testing.assert_allclose(left_out, shift, atol=1e-3)


# Integers


def test_without_weights_symbols_are_uniform_quantization_in_the_klt():
    synthesis = karhunen_loeve(TABLE, Weighting())
    made = coefficients(TABLE, Weighting(), synthesis, np.zeros(D))
    basis = np.linalg.svd(TABLE.astype(np.float64))[2]
    expected = np.floor(np.abs(TABLE @ basis.T) / 0.11 + ROUNDING)
    steps = class_steps(step_classes(np.ones(V)), 0.11)
    np.testing.assert_array_equal(np.abs(symbols_of(made, steps)).T, expected)


def test_contexts_move_what_is_rounded_as_worked_out_by_hand():
    # Row 1, step 1, contexts (1, 1): the weak 0.8 becomes 1, so s = 0.2. The strong
    # 1.56 aims at 1.56 - 0.2 / (1 + 1) = 1.46 and becomes 1 instead of 2.
    # Row 2, step 1/2, contexts (1, -2), s = 0.4 from what is left out: the weak 0.6
    # aims at 0.6 + 0.4 * 2 / (1 + 5) = 0.73 and becomes 1 (0.5), so
    # s = 0.4 + (-0.1)(-2) = 0.6. The strong 0.3 aims at 0.3 - 0.6 / 2 = 0.
    values = np.array([[1.56, 0.3], [0.8, 0.6]], np.float32)
    contexts = np.array([[1, 1], [1, -2]], np.float32)
    steps, left_out = np.array([1, 0.5]), np.array([0, 0.4])
    made = symbols_of(Coefficients(values, contexts, left_out), steps)
    np.testing.assert_array_equal(made, [[1, 0], [1, 1]])
    plain = symbols_of(Coefficients(values, None, None), steps)
    np.testing.assert_array_equal(plain, [[2, 1], [1, 1]])


def test_contexts_lower_the_loss_that_counts_them():
    with_contexts = prepare(TABLE, FULL)
    without = prepare(TABLE, FULL._replace(contexts=None))
    for step in (0.05, 0.2):
        found, plain = (
            coding.at_step(with_contexts, step),
            coding.at_step(without, step),
        )
        assert loss_of(found) < 0.95 * loss_of(plain)


def test_rows_are_coded_chunk_by_chunk_as_they_are_together(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK", 128)
    prepared = prepare(TABLE, FULL)
    made = coding.at_step(prepared, 0.1).table
    *synthesis_KD, mean_D = made.basis.dense()
    kept_DC = estimate(prepared, 0.1).kept_DC
    place_V = np.unique(made.classes, return_inverse=True)[1]
    arguments = TABLE, FULL, np.array(synthesis_KD), mean_D
    together = coefficients(*arguments)
    for rows, part in coefficient_chunks(*arguments):
        for one, all_ in zip(part, together, strict=True):
            np.testing.assert_array_equal(one, all_[..., rows], strict=True)
    whole = symbols_of(
        together,
        class_steps(made.classes, 0.1),
        kept_DC[kept_DC.any(axis=1)][:, place_V],
    )
    np.testing.assert_array_equal(made.symbols, whole)


def peak_of(work):
    """Bytes that exist at the same time while a function works, or after it."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_coding_a_table_takes_little_more_memory_than_the_table():
    random = np.random.default_rng(0)
    table = random.normal(size=(40_000, 128)) * np.geomspace(1, 1e-3, 128)
    weighting = Weighting(1 / np.arange(1, 40_001), contexts=table)
    prepared = prepare(table.astype(np.float32), weighting)
    size, finest = prepared.table_VD.nbytes, prepared.smallest_step
    assert peak_of(lambda: coding.at_step(prepared, 64 * finest)) < 1.6 * size
    assert peak_of(lambda: estimate(prepared, finest)) < 2 * size


def test_few_large_tables_of_frequencies_are_kept():
    largest = [Distribution(15, scale) for scale in range(128)]  # 1/2 MiB each
    peak = peak_of(lambda: sum(len(frequencies(one)) for one in largest))
    assert peak < 48 * 2**20


def test_values_between_the_dead_zone_and_half_a_step_become_zero():
    values = np.array([[0.52, 0.58, -0.52, -0.58, 1.52, 1.58]], np.float32)
    symbols = symbols_of(Coefficients(values, None, None), np.ones(6))
    np.testing.assert_array_equal(symbols, [[0, 1, 0, -1, 1, 2]])


def test_steps_follow_the_root_of_the_weights_within_limits():
    weights = np.array([900.0, 1.0, 0.25, 0.3, 0.0])
    classes = step_classes(weights)
    assert classes.tolist() == [-8, 0, 2, 2, 12]
    steps = class_steps(np.arange(-3, 4), 0.5)
    np.testing.assert_allclose(steps, 0.5 * 2.0 ** (np.arange(-3, 4) / 2), rtol=1e-15)


def test_the_error_of_the_basis_is_that_of_its_steps():
    rows = karhunen_loeve(TABLE, FULL)
    steps = 2.0 ** -np.linspace(9, 5, D)
    basis = quantize_basis(rows, METRIC, steps)
    error = basis.dense() - rows
    cost = np.einsum("kd,kd->k", error @ METRIC, error)
    # Within the factor 2 of steps that are powers of two, and chance.
    ratio = cost / (D * steps**2 / 12)
    assert 0.8 < ratio.mean() < 1.3
    # Rounding without compensation is worse in the metric for the same integers' steps.
    plain = np.rint(np.ldexp(rows, -basis.rows[:, None] - basis.columns))
    plain = np.ldexp(plain, basis.rows[:, None] + basis.columns) - rows
    assert np.einsum("kd,kd->", plain @ METRIC, plain) > 1.2 * cost.sum()


def test_compensation_never_moves_an_integer_beyond_what_is_coded(tmp_path):
    near_singular = np.array([[1, 1], [1, 1 + 1e-5]])
    weighting = Weighting(metric=near_singular.T @ near_singular)
    table = np.random.default_rng(0).normal(size=(V, 2)).astype(np.float32)
    step = 2 * prepare(table, weighting).smallest_step
    made = written(tmp_path / "table.pcat", table, weighting, step)
    found, _ = coding.read(tmp_path / "table.pcat")
    np.testing.assert_array_equal(found.dense(), made.table.dense())
    assert np.abs(made.table.basis.integers).max() > LARGEST  # It moved.
    nothing = coding.at_step(prepare(table, weighting), 1e4)
    lost = loss_of(made, table, weighting)
    assert lost < 1e-6 * loss_of(nothing, table, weighting)


# Entropy coder


@pytest.mark.parametrize(
    "distribution",
    [
        Distribution(1),
        Distribution(5, 20, -3, 2),
        Distribution(9, 70, 8, 6),
        Distribution(15, 127, 1023, 0),
    ],
)
def test_frequencies_are_what_the_coder_uses(distribution):
    found = frequencies(distribution)
    assert found.dtype == np.int64 and (found > 0).all() and found.sum() == 2**24
    shares = (found - 1).astype(np.float64)
    coder_model = stream.model.Categorical(shares, perfect=False)
    for place in {0, len(found) // 2, int(np.argmax(found)), len(found) - 1}:
        encoder = stream.queue.RangeEncoder()
        encoder.encode(np.full(20000, place, np.int32), coder_model)
        bits = 20000 * (24 - np.log2(found[place]))
        assert abs(encoder.num_bits() - bits) <= 64 + 1e-4 * bits


@pytest.mark.parametrize("deviation", [0.2, 0.5, 1, 5, 50])
@pytest.mark.parametrize(
    "draw", [RANDOM.normal, RANDOM.laplace], ids=["normal", "laplace"]
)
def test_rows_cost_little_more_than_their_entropy(draw, deviation):
    values = draw(deviation / 3, deviation, 30000)
    values = np.copysign(np.floor(np.abs(values) + 0.4), values).astype(np.int16)
    (found,) = fit([values])
    bits = (24 - np.log2(frequencies(found)))[values + 2**found.reach - 1].mean()
    shares = np.unique(values, return_counts=True)[1] / len(values)
    entropy = -(shares * np.log2(shares)).sum()
    assert bits < 1.02 * entropy + 0.003


def test_rows_of_any_kind_come_back():
    rows = [
        np.zeros(7), np.full(40, 9), RANDOM.normal(0, 40, 500), [32767, -32767], [5], []
    ]  # fmt: skip
    rows = [np.array(row).astype(np.int16) for row in rows]
    writer = Writer()
    writer.rows(rows)
    writer.row(rows[2])
    writer.rows([])
    words = writer.words()
    reader = Reader(words)
    for row, found in zip(rows, reader.rows([len(row) for row in rows]), strict=True):
        if not row.any():
            assert found is None
        else:
            np.testing.assert_array_equal(found, row)
    np.testing.assert_array_equal(reader.row(500), rows[2])
    assert reader.rows([]) == []
    reader.end()
    with pytest.raises(ValueError, match="end"):
        Reader(words).end()


@pytest.mark.parametrize("value", [2**15, -(2**15), -(2**31)])
def test_a_value_that_no_reader_accepts_is_not_coded(value):
    row = np.array([1, value], np.int32)
    for code in (Writer().row, lambda row: Writer().rows([row])):
        with pytest.raises(ValueError, match="above 32,767"):
            code(row)


def test_a_decoder_that_goes_astray_is_noticed_at_the_end(monkeypatch):
    writer = Writer()
    writer.row(np.arange(5))
    with monkeypatch.context() as patch:
        patch.setattr(coder, "_SENTINEL", 77)
        reader = Reader(writer.words())
    reader.row(5)
    with pytest.raises(ValueError, match="end"):
        reader.end()


def test_rows_of_zeros_cost_next_to_nothing():
    empty, writer = Writer(), Writer()
    empty.rows([])
    writer.rows([np.zeros(5000, np.int16)] * 1000)
    assert writer.words().nbytes <= empty.words().nbytes + 4


def test_bytes_are_those_of_the_entropy_and_side_information():
    table = RANDOM.normal(size=(4000, D)) * np.arange(1, D + 1) ** -0.8 @ BASIS
    made = coding.at_step(prepare(table.astype(np.float32), Weighting()), 0.2)
    values = 0.0
    for row in made.table.symbols:
        counts = np.unique(row, return_counts=True)[1]
        values -= (counts * np.log2(counts / counts.sum())).sum() / 8
    writer = Writer()  # Without symbols: header, classes, basis.
    writer.rows(made.table.basis.integers)
    side = writer.words().nbytes + HEADER_BYTES + 100
    assert 0.97 < made.bytes / (values + side) < 1.03
    assert values > 5 * side


# Dense tables


def test_bits_do_not_depend_on_the_order_of_sums(monkeypatch):
    made = coding.at_step(prepare(TABLE, FULL), 0.01).table
    dense = made.dense()
    monkeypatch.setattr(chunks, "CHUNK", 7)
    np.testing.assert_array_equal(made.dense(), dense)
    order = RANDOM.permutation(len(made.symbols))
    rows = np.append(order, len(order))
    basis = made.basis._replace(
        integers=made.basis.integers[rows], rows=made.basis.rows[rows]
    )
    shuffled = coding.CodedTable(made.symbols[order], made.classes, made.step, basis)
    np.testing.assert_array_equal(shuffled.dense(), dense)


def test_sums_that_float64_would_round_are_refused(tmp_path):
    made = coding.at_step(prepare(TABLE, FULL), 0.1).table
    rows = made.basis.rows.copy()
    rows[0] += 60
    made = coding.CodedTable(
        made.symbols, made.classes, made.step, made.basis._replace(rows=rows)
    )
    with pytest.raises(ValueError, match="exact sums"):
        made.dense()
    coding.write(tmp_path / "table.pcat", made, DESCRIPTION)
    with pytest.raises(UserError, match=r"damaged .*exact sums"):
        coding.read(tmp_path / "table.pcat")


def test_the_stand_alone_reader_gives_the_same_bits(tmp_path, monkeypatch):
    path = ROOT / "scripts" / "read_coded_table.py"
    assert len(path.read_text().splitlines()) <= 100
    spec = importlib.util.spec_from_file_location("read_coded_table", path)
    reader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reader)
    for name, weighting in WEIGHTINGS.items():
        for step in (0.003, 0.1, 100.0):
            made = written(tmp_path / name, weighting=weighting, step=step)
            np.testing.assert_array_equal(
                reader.read(tmp_path / name), made.table.dense()
            )
    content = bytearray((tmp_path / "none").read_bytes())
    content[-40] ^= 1
    (tmp_path / "none").write_bytes(content)
    with pytest.raises(SystemExit, match="damaged"):
        reader.read(tmp_path / "none")
    monkeypatch.setattr(sys, "argv", [str(path), "nowhere.pcat", "table.npy"])
    with pytest.raises(SystemExit, match=r"python scripts/read_coded_table\.py table"):
        runpy.run_path(str(path), run_name="__main__")


def test_the_file_of_an_older_version_gives_the_same_bits():
    coded, _ = coding.read(Path(__file__).parent / "fixtures" / "coded_table_1.pcat")
    dense = coded.dense()
    assert dense.shape == (40, 8)
    digest = hashlib.sha256(dense.astype("<f4").tobytes()).hexdigest()
    assert digest == FIXTURE_DIGEST


FIXTURE_DIGEST = "e65349bf79ab738cf776ba8a57de8f48f523d10eef8886c3b4f566ed744c79e5"


# Damage


def refused(path, content, words):
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        coding.read(path)
    assert "\n" not in str(caught.value)


def sealed(content):
    return content + hashlib.sha256(content).digest()


def test_a_flipped_bit_anywhere_is_refused(tmp_path):
    path = tmp_path / "table.pcat"
    written(path)
    content = path.read_bytes()
    for place in np.unique(np.linspace(0, len(content) - 1, 250).astype(int)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        refused(path, bytes(damaged), "damaged|no coded table|later pcagpt")


def test_a_file_that_ends_early_or_late_is_refused(tmp_path):
    path = tmp_path / "table.pcat"
    written(path)
    content = path.read_bytes()
    for length in [0, 1, 8, 12, 40, 300, 600, len(content) - 4, len(content) - 1]:
        refused(path, content[:length], "damaged|no coded table")
        refused(path, sealed(content[:length]), "damaged|no coded table")
    refused(path, content + b"\0\0\0\0", "damaged")
    with pytest.raises(UserError, match="No such file"):
        coding.read(tmp_path / "other")


def test_words_of_another_table_are_refused(tmp_path):
    path = tmp_path / "table.pcat"
    written(path)
    content = bytearray(path.read_bytes()[:-32])
    for place in range(12 + HEADER_BYTES, len(content), 97):
        damaged = content.copy()
        damaged[place] ^= 0x55
        refused(path, sealed(bytes(damaged)), "damaged")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [2**40, 768]}, "memory"),
        ({"shape": [10**18, 10**18]}, "memory"),
        ({"shape": [300, 2**40]}, "memory"),
        ({"shape": [-1, 24]}, "damaged"),
        ({"shape": [300]}, "damaged"),
        ({"shape": [300, True]}, "damaged"),
        ({"shape": None}, "damaged"),
        ({"dtype": "float64"}, "damaged"),
        ({"directions": 25}, "damaged"),
        ({"directions": -1}, "damaged"),
        ({"step": 0.0}, "damaged"),
        ({"step": "1"}, "damaged"),
        ({"method": 1}, "damaged"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(changes, words, tmp_path):
    path = tmp_path / "table.pcat"
    written(path)
    content = path.read_bytes()
    end = 12 + HEADER_BYTES
    header = json.dumps(json.loads(content[12:end]) | changes).encode()
    changed = content[:12] + header.ljust(HEADER_BYTES) + content[end:-32]
    refused(path, sealed(changed), words)


def test_a_file_of_a_later_version_is_refused(tmp_path):
    path = tmp_path / "table.pcat"
    written(path)
    content = bytearray(path.read_bytes()[:-32])
    content[8] = 2
    refused(path, sealed(bytes(content)), "version 2.*later pcagpt")


# Search


def test_a_target_of_bytes_is_met_closely():
    prepared = prepare(TABLE, FULL)
    # The estimate for the largest is far too small.
    for most in (2000, 5000, 8000):
        made = coding.within_bytes(prepared, most)
        assert 0.97 * most < made.bytes <= most


@pytest.mark.parametrize("shape", [(97, 16), (65, 64), (700, 8)])
def test_more_bytes_never_add_loss(shape):
    """The estimates of small tables are far off. Eight sizes up to the finest steps."""
    random = np.random.default_rng(2)
    table = random.normal(size=shape) * np.arange(1, shape[1] + 1) ** -0.8
    weights = 1 / np.arange(1, shape[0] + 1)
    contexts = table @ random.normal(size=(shape[1], shape[1])) * 0.3
    weighting = Weighting(weights, np.eye(shape[1]), None, contexts)
    prepared = prepare(table.astype(np.float32), weighting)
    empty = coding.at_step(prepared, prepared.largest_step).bytes
    finest = coding.at_step(prepared, prepared.smallest_step).bytes
    losses = []
    for most in np.linspace(empty, finest, 9)[1:].round().astype(int).tolist():
        made = coding.within_bytes(prepared, most)
        assert 0.95 * most <= made.bytes <= most
        losses.append(loss_of(made, table, weighting))
    assert (np.diff(losses) < 0).all()


@each_weighting
def test_the_bytes_that_a_loss_takes_are_estimated(weighting):
    prepared = prepare(TABLE, weighting)
    for most in (1500, 3000, 5000):
        made = coding.within_bytes(prepared, most)
        loss = loss_of(made, weighting=weighting)
        found = coding.estimated_bytes(prepared, loss)
        assert found == pytest.approx(made.bytes, rel=0.12)


def test_losses_that_no_step_leads_to_take_the_bytes_of_the_nearest():
    prepared = prepare(TABLE, FULL)
    empty = coding.at_step(prepared, prepared.largest_step)
    assert coding.estimated_bytes(prepared, 1e9) == empty.bytes
    bits = estimate(prepared, prepared.smallest_step).bits
    assert coding.estimated_bytes(prepared, 0.0) == round(empty.bytes + bits / 8)
    zeros = prepare(np.zeros((V, D), np.float32), Weighting())
    made = coding.within_bytes(zeros, 10**9)
    assert loss_of(made, np.zeros((V, D)), Weighting()) == 0
    assert coding.estimated_bytes(zeros, 0.1) == made.bytes


@pytest.mark.parametrize("weighting", [Weighting(), FULL], ids=["none", "full"])
def test_finer_steps_take_more_bytes_and_lose_less(weighting):
    prepared = prepare(TABLE, weighting)
    made = [coding.at_step(prepared, 2.0**-n) for n in range(0, 8, 2)]
    assert (np.diff([m.bytes for m in made]) > 0).all()
    losses = [loss_of(m, weighting=weighting) for m in made]
    assert (np.diff(losses) < 0).all()


def test_estimates_are_close_to_what_encoding_gives():
    prepared = prepare(TABLE, FULL)
    smallest = coding.at_step(prepared, prepared.largest_step).bytes
    for step in (0.02, 0.1):
        found, made = estimate(prepared, step), coding.at_step(prepared, step)
        assert found.loss == pytest.approx(loss_of(made), rel=0.1)
        assert found.bits / 8 == pytest.approx(made.bytes - smallest, rel=0.15)


def test_heavy_tokens_count_more_in_the_energy_of_a_direction():
    table = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    weights = np.ones(300)
    weights[:5] = 1000
    prepared = coding.prepare(table, Weighting(token_weights=weights))
    steps_N = 0.1 * prepared.steps_N
    found = estimate(prepared, 0.1)
    _, place_N = np.unique(prepared.classes_V[prepared.tokens_N], return_inverse=True)
    symbols_DN = symbols_of(prepared.sampled, steps_N, found.kept_DC[:, place_N])
    each_N = weights[prepared.tokens_N] / weights.mean() * prepared.shares_N
    wanted_D = (symbols_DN.astype(float) ** 2) @ (each_N * prepared.steps_N**2)
    np.testing.assert_allclose(found.energy_D, wanted_D, rtol=1e-5)


def test_a_budget_below_the_side_information_is_refused():
    prepared = prepare(TABLE, FULL)
    with pytest.raises(BudgetTooSmall, match="cannot hold a coded table") as caught:
        coding.within_bytes(prepared, 500)
    assert "\n" not in str(caught.value)
    smallest = coding.at_step(prepared, prepared.largest_step)
    assert coding.within_bytes(prepared, smallest.bytes).bytes == smallest.bytes


# Unusual tables


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_table_with_a_value_that_is_no_entry_is_refused(value):
    table = TABLE.copy()
    table[3, 4] = value
    with pytest.raises(UserError, match=r"\(3, 4\)"):
        prepare(table, FULL)


@pytest.mark.parametrize("weights", [np.zeros(V), -WEIGHTS, WEIGHTS * np.nan])
def test_weights_that_weigh_nothing_are_refused(weights):
    with pytest.raises(UserError, match="weights of the tokens"):
        prepare(TABLE, FULL._replace(token_weights=weights))


@pytest.mark.parametrize(
    "table",
    [
        np.zeros((V, D)),  # zero everywhere
        np.ones((V, D)),  # constant
        np.where(np.arange(V)[:, None] % 3, TABLE, 0),  # rows of zeros
        np.kron(np.ones((V // D + 1, 1)), np.eye(D))[:V],  # equal eigenvalues
        np.round(TABLE),  # ties of roundings
        TABLE[:5],  # fewer tokens than directions
        TABLE[:1],
        TABLE[:, :1],
    ],
    ids=["zero", "constant", "zero rows", "equal", "ties", "few", "one", "narrow"],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_unusual_tables_are_coded(table, weighted, tmp_path):
    table = table.astype(np.float32)
    rows, width = table.shape
    weighting = Weighting()
    if weighted:
        weights = WEIGHTS[:rows] * (np.arange(rows) % 4 != 1)  # Unseen tokens.
        metric = METRIC[:width, :width]
        mean = weights @ table / weights.sum()
        weighting = Weighting(weights, metric, mean, CONTEXTS[:rows, :width])
    made = written(tmp_path / "t", table, weighting, step=1e-3)
    dense = coding.read(tmp_path / "t")[0].dense()
    np.testing.assert_array_equal(dense, made.table.dense())
    nothing = coding.at_step(prepare(table, weighting), 1e4)
    most = 1e-3 * loss_of(nothing, table, weighting) + 1e-9
    assert loss_of(made, table, weighting) < most


def test_a_token_that_was_never_seen_is_codes():
    weights = np.where(np.arange(V) % 4 == 1, 0, WEIGHTS)
    made = coding.at_step(prepare(TABLE, Weighting(weights)), 1e-3)
    assert np.abs(made.table.dense() - TABLE)[1::4].max() < 0.3


def test_a_singular_metric_leaves_out_what_it_does_not_see():
    metric = METRIC.copy()
    metric[:, :6] = metric[:6] = 0
    weighting = FULL._replace(metric=metric, contexts=None)
    made = coding.at_step(prepare(TABLE, weighting), 1e-3)
    assert len(made.table.symbols) <= D - 6
    assert loss_of(made, weighting=weighting) < 1e-4


def test_words_are_the_same_each_time():
    one, two = (coding.at_step(prepare(TABLE, FULL), 0.1) for _ in range(2))
    np.testing.assert_array_equal(one.words, two.words)
