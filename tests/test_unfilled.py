"""Weights with a hole, as a download that was not finished leaves, are refused.

`test_hugging_face.py` and `test_decoder.py` test files that end in zeros.
"""

import gpt2_folders
import numpy as np
import pytest

from pcagpt.errors import UserError
from pcagpt.factorization import factor_files
from pcagpt.run import hugging_face, nano_gpt
from pcagpt.unfilled import Place, refuse_holes, refuse_unfilled

HOLE = "bytes of zeros that begin or end within a row of .*: download it again"
MANY, WIDE = 3000, 768  # of a matrix with rows of 3 KiB
WIDER = {"n_embd": 256, "n_layer": 1}


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def positive(*shape):
    """Without a -0.0 in products with zeros."""
    return np.abs(random(*shape))


def with_zeros(change):
    found = random(MANY, WIDE)
    change(found)
    return found


def sparse(share):
    """Zeros at random, among them whole rows."""
    found = random(MANY, WIDE)
    found[np.random.default_rng(1).random(found.shape) < share] = 0
    found[500:700] = 0
    return found


def rounded_to_bfloat16(found):
    found.view(np.uint16)[:, ::2] = 0
    found[500:700] = 0


def one_column_of_five(found):
    found[:, np.arange(WIDE) % 5 > 0] = 0
    found[500:700] = 0
    found[499, 384:] = 0


def with_block(start, stop):
    """Zeros in some columns of some rows, each with 160 KB."""
    found = random(30, 40_000)
    found[10:20, start:stop] = 0
    return found


MEANT = {
    "all": lambda: np.zeros((MANY, WIDE), np.float32),
    "rows": lambda: with_zeros(lambda one: one[500:700].fill(0)),
    "last_rows": lambda: with_zeros(lambda one: one[900:].fill(0)),
    "all_but_one_row": lambda: positive(MANY, WIDE) * (np.arange(MANY) == 70)[:, None],
    "rows_after_a_zero": lambda: with_zeros(
        lambda one: (one[500:700].fill(0), one[499, -9:].fill(0), one[700, :9].fill(0))
    ),
    "rows_and_columns": lambda: with_zeros(
        lambda one: (one[500:700].fill(0), one[:, :200].fill(0), one[:, 600:].fill(0))
    ),
    "pruned_by_half": lambda: sparse(0.5),
    "mostly_pruned": lambda: sparse(0.95),
    "bfloat16": lambda: with_zeros(rounded_to_bfloat16),
    "lower_mask": lambda: np.tril(np.ones((256, 40_000), np.float32), 20_000),
    "upper_mask": lambda: np.triu(np.ones((40_000, 1024), np.uint8), -1),
    "identity": lambda: np.eye(200, 30_000, dtype=np.float32),
    "diagonal_of_blocks": lambda: np.kron(np.eye(4), positive(50, 8000)),
    "experts": lambda: positive(8, 300, 96) * (np.arange(8) % 3 > 0)[:, None, None],
    "a_number_in_the_first_zero_row": lambda: with_zeros(
        lambda one: (one[500:700].fill(0), one[500, 300:301].fill(1))
    ),
    "a_number_in_the_last_zero_row": lambda: with_zeros(
        lambda one: (one[500:700].fill(0), one[699, 300:301].fill(1))
    ),
    "numbers_in_the_first_zero_row": lambda: with_zeros(
        lambda one: (one[500:700].fill(0), one[500, :300:8].fill(np.pi))
    ),
    "a_short_row_before_zero_rows": lambda: with_zeros(
        lambda one: (one[500:700].fill(0), one[499, 5:].fill(0))
    ),
    "one_column_of_five": lambda: with_zeros(one_column_of_five),
    "block_at_the_left": lambda: with_block(0, 20_000),
    "block_at_the_right": lambda: with_block(20_000, 40_000),
    "block_in_the_middle": lambda: with_block(10_000, 30_000),
    "rows_padded_each": lambda: (
        positive(8, 40_000) * (np.arange(40_000) < [[9_000], [20_000]] * 4)
    ),
    "rank_1": lambda: (
        random(90_000, 1) * (np.arange(90_000) % 45_000 > 30_000)[:, None]
    ),
    "vector": lambda: np.r_[random(999), np.zeros(99_999), random(999)],
}


@pytest.mark.parametrize("meant", MEANT)
def test_zeros_that_a_program_wrote_are_no_hole(meant):
    refuse_holes("file", "table", MEANT[meant]())


@pytest.mark.parametrize("begin", [1 << 20, 1_234_567])
@pytest.mark.parametrize("size", [1 << 16, 1 << 20, 3_333_333])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16_in_float32"])
def test_zeros_that_begin_and_end_within_rows_are_a_hole(begin, size, dtype):
    found = random(MANY, WIDE)
    if dtype == "bfloat16_in_float32":
        found.view(np.uint16)[:, ::2] = 0
    elif dtype == "float16":
        found = found.astype(dtype)
    found.reshape(-1).view(np.uint8)[begin : begin + size] = 0
    with pytest.raises(UserError, match=HOLE):
        refuse_holes("file", "table", found)


@pytest.mark.parametrize(
    ("width", "dtype"), [(64, "float32"), (128, "float16"), (65, "float32")]
)
def test_a_hole_in_narrow_rows_is_found(width, dtype):
    found = random(6000, width).astype(dtype)
    found.reshape(-1)[int(1000.5 * width) : int(5000.5 * width)] = 0
    with pytest.raises(UserError, match=HOLE):
        refuse_holes("file", "table", found)


def test_less_than_64_kib_is_no_hole():
    found = random(MANY, WIDE)
    found.reshape(-1).view(np.uint8)[1_234_567 : 1_234_567 + 65_000] = 0
    refuse_holes("file", "table", found)
    found.reshape(-1).view(np.uint8)[1_234_567 : 1_234_567 + 65_536] = 0
    with pytest.raises(UserError, match=HOLE):
        refuse_holes("file", "table", found)


@pytest.mark.parametrize("shape", [(0, 8), (768, 0)])
def test_an_empty_tensor_among_zeros_does_no_harm(shape, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(random(30_000).tobytes() + bytes(200_000) + b"1" * 8)
    matrix, vector = Place((300, 100), 0, 120_000), Place((50_000,), 120_000, 320_000)
    empty, end = Place(shape, 200_000, 200_000), Place((2,), 320_000, 320_008)
    refuse_unfilled(path, {"one": matrix, "none": empty, "two": vector, "last": end})


@pytest.mark.parametrize("rows", [(500, 700.5), (500.5, 700), (500.2, 500.9)])
def test_one_end_within_a_row_is_enough(rows):
    found = random(800, 40_000 if rows[1] < 501 else WIDE)
    width = found.shape[1]
    found.reshape(-1)[int(rows[0] * width) : int(rows[1] * width)] = 0
    with pytest.raises(UserError, match="of table, like a download"):
        refuse_holes("file", "table", found)


def test_a_hole_over_several_tensors_is_found_in_the_file(tmp_path):
    path, bytes_of = tmp_path / "file", random(MANY * WIDE).tobytes()
    path.write_bytes(bytes_of[:800_000] + bytes(1_000_000) + bytes_of[1_800_000:])
    whole = {
        "whole": Place((200, 100), 900_000, 980_000),
        "vector": Place((205_000,), 980_000, 1_800_000),
    }
    end = {"end": Place((100, 1000), 1_800_000, 2_200_000)}
    refuse_unfilled(path, whole | end)
    with pytest.raises(UserError, match="within a row of first, like"):
        refuse_unfilled(path, {"first": Place((300, 750), 0, 900_000)} | whole | end)
    last = Place((100, 1000), 1_790_000, 2_190_000)
    with pytest.raises(UserError, match="within a row of last, like"):
        refuse_unfilled(path, whole | {"last": last})


def punch(path, share=0.25):
    """Makes a hole of 128 KiB behind the first part of a file."""
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * share))
        file.write(bytes(1 << 17))


def test_a_hole_in_any_file_of_a_model_is_refused(tmp_path):
    by_size = sorted(gpt2_folders.tensors(**WIDER).items(), key=lambda one: one[1].size)
    folder = gpt2_folders.write_shards(tmp_path / "shards", dict(by_size))
    gpt2_folders.write_config(folder, **WIDER)
    hugging_face.record_of(folder)
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        punch(path)
        with pytest.raises(UserError, match=f"{path.name} has 131,.*{HOLE}"):
            hugging_face.record_of(folder)
        path.write_bytes(content)


def test_a_hole_in_a_checkpoint_without_sums_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'pcagpt[hf]'")
    from test_nano_gpt import arguments, state, write

    torch.serialization.set_crc32_options(False)
    try:
        sizes = arguments(**WIDER)
        folder = write(torch, tmp_path / "out", state(torch, **WIDER), model_args=sizes)
    finally:
        torch.serialization.set_crc32_options(True)
    nano_gpt.record_of(folder)
    punch(folder / "ckpt.pt", share=0.5)
    with pytest.raises(UserError, match=f"ckpt.pt has .*{HOLE}"):
        nano_gpt.record_of(folder)
    punch(folder / "ckpt.pt")  # The begin of a record is in this hole.
    with pytest.raises(UserError, match=r"ckpt.pt cannot be read .*: restore it, or"):
        nano_gpt.record_of(folder)


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_hole_in_a_table_alone_is_refused(order, tmp_path):
    path = tmp_path / "table.npy"
    table = np.asarray(random(MANY, WIDE), order=order)
    np.save(path, table)
    np.testing.assert_array_equal(factor_files.read_table(path), table)
    punch(path)
    with pytest.raises(UserError, match=f"table.npy has 131,.*{HOLE}"):
        factor_files.read_table(path)
    np.save(path, table)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
        file.truncate(table.nbytes + 128)  # NumPy's header has 128 bytes.
    with pytest.raises(UserError, match=r"ends in .* of zeros.*download it again"):
        factor_files.read_table(path)


# Rows of a table, those of them that are zero: real paddings, and small ones.
PADDED = [
    (50_304, 47), (151_936, 293), (152_064, 421), (32_128, 28), (51_200, 905),
    (128, 28), (128, 63), (1000, 127),
]  # fmt: skip
UNFINISHED = [
    (1000, 900), (1000, 128), (4096, 1996), (4096, 2048), (128, 64), (100, 50),
    (20_000, 3000), (2, 1.5), (64, 33.5),
]  # fmt: skip


def end_never_written(path, rows, zeros):
    """A table in a file that a program made in full size and began to fill."""
    table = random(rows, 16)
    table.reshape(-1)[table.size - int(zeros * 16) :] = 0
    np.save(path, table)


@pytest.mark.parametrize(("rows", "zeros"), PADDED)
def test_rows_of_zeros_at_the_end_may_be_padding(rows, zeros, tmp_path, said):
    end_never_written(tmp_path / "table.npy", rows, zeros)
    factor_files.read_table(tmp_path / "table.npy")
    line = f"the last {zeros:,} of {rows:,} rows of its table are zero"
    assert [line in one for one in said()] == [True] * (zeros > rows // 100)


@pytest.mark.parametrize(("rows", "zeros"), UNFINISHED)
def test_a_small_table_that_was_mostly_not_written_is_refused(rows, zeros, tmp_path):
    path = tmp_path / "table.npy"
    end_never_written(path, rows, zeros)
    said = rf"again; if its last {int(zeros):,} of {rows:,} rows are meant to be zero"
    with pytest.raises(UserError, match=said):
        factor_files.read_table(path)
    np.save(path, np.load(path)[: rows - int(zeros)])  # As the line says.
    factor_files.read_table(path)


@pytest.mark.parametrize("begin", [500.5, 501])
def test_a_hole_in_a_gguf_file_is_refused(begin, tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install 'pcagpt[hf]'")
    from pcagpt.compression import open_decoder

    path, q8 = tmp_path / "file.gguf", gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.quantize(random(MANY, WIDE), q8)
    stored.reshape(-1)[int(begin * stored.shape[1]) : 700 * stored.shape[1]] = 0
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tensor("token_embd.weight", stored, raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if begin == 501:
        return open_decoder.check_filled(path)
    with pytest.raises(UserError, match=f"file.gguf has 162,.*{HOLE}"):
        open_decoder.check_filled(path)
