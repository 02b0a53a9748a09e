"""Sources of text and tokens: what is read, what is written, what is refused."""

import collections
import json
import pickle
import random
import sys
import threading
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from pcagpt.data import token_files
from pcagpt.data.corpus import count_tokens, describe_corpus, open_corpus
from pcagpt.data.sources import sotu_documents
from pcagpt.data.token_files import SPLITS
from pcagpt.data.tokenizer import load_tokenizer, tokenizer_sha256
from pcagpt.errors import UserError

WIKI_LINES = [" \n", " = Title = \n", " \n", " The cat 's @-@ hat , naïve . \n", " \n"]


@pytest.fixture(scope="module")
def sotu(tmp_path_factory):
    """Return the embedded corpus, tokenized once."""
    return open_corpus("sotu", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(tmp_path):
    """Return a cache folder that does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """Return an empty folder for a source."""
    path = tmp_path / "my data"
    path.mkdir()
    return path


def write_tokens(folder, ids, split="train", stored="<u2", **meta):
    """Write a token file and, when `meta` is given, meta.json."""
    np.asarray(ids).astype(stored).tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))


def write_pickle(folder, value):
    """Write a token file and a meta.pkl that holds `value`."""
    write_tokens(folder, [1, 2, 3])
    (folder / "meta.pkl").write_bytes(pickle.dumps(value))


def refused(folder, cache, match, split="train", **options):
    """Assert that a folder is refused in one line, with nothing written."""
    with pytest.raises(UserError, match=match) as error:
        open_corpus(str(folder), cache, **options).tokens(split)
    assert "\n" not in str(error.value)
    assert not cache.exists()


# The embedded corpus


def test_sotu_has_the_declared_splits(sotu):
    assert sotu.splits == SPLITS
    counts = {split: len(sotu.tokens(split)) for split in SPLITS}
    assert counts == {"train": 2195114, "val": 166033, "test": 118490}


def test_sotu_splits_share_no_address():
    documents = {split: sotu_documents(split) for split in SPLITS}
    counts = {split: len(addresses) for split, addresses in documents.items()}
    assert counts == {"train": 189, "val": 11, "test": 11}
    assert len(set().union(*documents.values())) == 211


def test_sotu_puts_end_of_text_before_every_address(sotu):
    encoding = load_tokenizer("sotu4096")
    decoded = encoding.decode(sotu.tokens("val").tolist())
    documents = sotu_documents("val")
    assert decoded == "".join(f"<|endoftext|>{text}" for text in documents)


def test_sotu_is_described_as_it_is_opened(sotu):
    info = describe_corpus("sotu")
    assert (info.name, info.vocab_size, info.tokenizer, info.splits) == (
        sotu.name,
        sotu.vocab_size,
        sotu.tokenizer,
        sotu.splits,
    )


def test_sotu_takes_another_tokenizer():
    info = describe_corpus("sotu", "gpt2")
    assert (info.vocab_size, info.tokenizer) == (50257, "gpt2")


def test_token_files_say_what_they_are(sotu):
    meta = json.loads((sotu.folder / "meta.json").read_text())
    assert meta == {
        "name": "sotu",
        "vocab_size": 4096,
        "dtype": "uint16",
        "tokenizer": "sotu4096",
        "tokenizer_sha256": tokenizer_sha256("sotu4096"),
        "tokens": {"train": 2195114, "val": 166033, "test": 118490},
    }


def test_tokens_are_read_only(sotu):
    tokens = sotu.tokens("val")
    assert tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 0


# Counts


def test_tokens_are_counted(folder, cache):
    write_tokens(folder, [3, 1, 3, 3], vocab_size=5)
    count_V = open_corpus(str(folder), cache).count_tokens("train")
    assert count_V.tolist() == [0, 1, 0, 3, 0]
    assert count_V.dtype == np.int64


def test_counting_never_converts_the_whole_map(tmp_path):
    path, tokens = tmp_path / "train.bin", np.arange(8_000_000) % 7
    tokens.astype(np.uint16).tofile(path)
    mapped = np.memmap(path, np.uint16, "r")
    tracemalloc.start()
    count_V = count_tokens(mapped, 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(tokens)  # an int64 copy takes 8 bytes per token
    assert count_V.tolist() == np.bincount(tokens, minlength=10).tolist()


def test_ids_are_checked_once_until_the_file_changes(folder, cache, monkeypatch):
    write_tokens(folder, [1, 2, 3], vocab_size=10)
    corpus = open_corpus(str(folder), cache)
    corpus.tokens("train")
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "chunks", None)
        open_corpus(str(folder), cache).tokens("train")
    write_tokens(folder, [1, 2, 3, 11])
    with pytest.raises(UserError, match="id 11 at position 3"):
        corpus.tokens("train")


def test_fingerprint_is_the_one_that_earlier_runs_recorded(sotu):
    sha256 = "a096889e4ac1caf7403fd155f86cccde0c14c1cafe29e5465dd4a4eda2eecd23"
    assert sotu.fingerprint() == sha256


def test_fingerprint_depends_on_tokens_and_vocabulary(folder, cache):
    found = set()
    for ids, vocab_size in (([1, 2], 10), ([1, 3], 10), ([1, 2], 11)):
        write_tokens(folder, [1], vocab_size=vocab_size)
        write_tokens(folder, ids, "val")
        found.add(open_corpus(str(folder), cache).fingerprint())
    assert len(found) == 3


# Words and bytes


@pytest.mark.parametrize("split", SPLITS)
def test_text_counts_of_sotu_are_those_of_its_text(sotu, split):
    documents = sotu_documents(split)
    words = sum(len(text.split()) + text.count("\n") for text in documents)
    assert sotu.text_size(split) == (words, len("".join(documents).encode()))


def test_end_of_text_parts_words_and_is_not_counted(folder, cache):
    encode = load_tokenizer("gpt2").encode
    tokens = encode("one two<|endoftext|>three\n", allowed_special="all")
    write_tokens(folder, tokens, "val")
    assert open_corpus(str(folder), cache).text_size("val") == (4, 13)


def test_text_counts_need_a_known_tokenizer(folder, cache):
    write_tokens(folder, [1, 2], vocab_size=65, tokenizer="letters")
    corpus = open_corpus(str(folder), cache)
    assert corpus.tokenizer is None
    assert corpus.text_size("train") is None


# Folders of text


def test_text_folder_is_encoded_byte_for_byte(folder, cache):
    text = "".join(WIKI_LINES) + "no\r\nline end: 日本"
    (folder / "train.txt").write_bytes(text.encode())
    corpus = open_corpus(str(folder), cache)
    encoding = load_tokenizer("gpt2")
    expected = [50256, *encoding.encode_ordinary(text)]
    assert corpus.tokens("train").tolist() == expected
    assert (corpus.name, corpus.tokenizer, corpus.splits) == (
        "my_data",
        "gpt2",
        ("train",),
    )


def test_long_text_encodes_as_a_whole_though_cut_in_pieces(folder, cache):
    parts = ["it's", " we'll", " ", "\n", "  \n ", "\t", "\xa0", "\u3000", "\x1c", "語"]
    parts += [" a", "!?", "1234", " 56", "é", "\r\n", "\n\n", "'", "s"]
    text = "".join(random.Random(0).choices(parts, k=200_000))
    (folder / "train.txt").write_bytes(text.encode())
    tokens = open_corpus(str(folder), cache).tokens("train")
    expected = load_tokenizer("gpt2").encode_ordinary(text)
    assert tokens[1:].tolist() == expected


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("wiki.train.raw", "train"),
        ("wiki.valid.tokens", "val"),
        ("VALIDATION.txt", "val"),
        ("my-val_part2.text", "val"),
        ("train01.txt", "train"),
        ("test.txt", "test"),
    ],
)
def test_split_is_a_word_of_the_file_name(folder, name, split):
    (folder / name).write_text("text\n")
    (folder / "trainers.txt").write_text("other\n")
    (folder / "train.csv").write_text("other\n")
    assert describe_corpus(str(folder)).splits == (split,)


def test_several_files_of_a_split_are_joined_in_sorted_order(folder, cache):
    (folder / "train-b.txt").write_text("second")
    (folder / "train-a.txt").write_text("first")
    tokens = open_corpus(str(folder), cache).tokens("train").tolist()
    text = load_tokenizer("gpt2").decode(tokens)
    assert text == "<|endoftext|>first<|endoftext|>second"


def test_describing_writes_nothing(folder, tmp_path):
    (folder / "val.txt").write_text("text\n")
    info = describe_corpus(str(folder), "sotu4096")
    assert (info.name, info.vocab_size, info.tokenizer) == ("my_data", 4096, "sotu4096")
    assert list(tmp_path.iterdir()) == [folder]


def test_text_is_tokenized_once_until_it_changes(folder, cache):
    source = folder / "train.txt"
    source.write_text("one")
    first = open_corpus(str(folder), cache)
    written = (first.folder / "train.bin").stat().st_mtime_ns
    again = open_corpus(str(folder), cache)
    assert again == first
    assert (again.folder / "train.bin").stat().st_mtime_ns == written
    source.write_text("two")
    changed = open_corpus(str(folder), cache)
    assert changed.folder != first.folder
    assert load_tokenizer("gpt2").decode(changed.tokens("train").tolist()[1:]) == "two"


def test_another_tokenizer_gets_a_folder_of_its_own(folder, cache):
    (folder / "train.txt").write_text("one")
    folders = {
        open_corpus(str(folder), cache, name).folder for name in ("gpt2", "sotu4096")
    }
    assert len(folders) == 2


def test_tokenizing_at_the_same_time_leaves_one_whole_folder(folder, cache):
    (folder / "train.txt").write_text("some words to read\n" * 20_000)
    barrier = threading.Barrier(4)

    def open_together(_):
        barrier.wait()
        return open_corpus(str(folder), cache)

    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_together, range(4)))
    assert len(set(opened)) == 1
    assert list(cache.iterdir()) == [opened[0].folder]
    expected = load_tokenizer("gpt2").encode_ordinary("some words to read\n" * 20_000)
    assert opened[0].tokens("train")[1:].tolist() == expected


def test_opening_does_not_read_the_test_split(folder, cache):
    write_tokens(folder, [1, 2, 3], vocab_size=10)
    write_tokens(folder, [11], "test")
    corpus = open_corpus(str(folder), cache)
    assert corpus.tokens("train").tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="id 11"):
        corpus.tokens("test")


# WikiText-103 through the optional package


def test_wikitext_is_byte_for_byte_its_file(cache, monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        # The hub's rows have "" for the blank lines.
        return [{"text": line if line.strip() else ""} for line in WIKI_LINES]

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    corpus = open_corpus("wikitext103", cache)
    text = load_tokenizer("gpt2").decode(corpus.tokens("val").tolist())
    assert text == "<|endoftext|>" + "".join(WIKI_LINES)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-103-raw-v1", split)
        for split in ("train", "validation", "test")
    ]
    assert open_corpus("wikitext103", cache) == corpus
    assert len(asked) == 3


def test_wikitext_without_its_package_says_how_to_install_it(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'pcagpt\[datasets\]'"):
        open_corpus("wikitext103", cache)
    assert not cache.exists()
    assert describe_corpus("wikitext103").vocab_size == 50257


def test_wikitext_without_network_is_one_clear_line(cache, monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no\nroute")

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(UserError, match="needs the network once") as error:
        open_corpus("wikitext103", cache)
    assert "\n" not in str(error.value)
    assert not cache.exists()


# Folders of token files


def test_token_folder_without_meta_is_gpt2s(folder, cache):
    write_tokens(folder, [31373, 995, 50256])
    corpus = open_corpus(str(folder), cache)
    assert (corpus.vocab_size, corpus.tokenizer, corpus.folder) == (
        50257,
        "gpt2",
        folder,
    )
    assert corpus.tokens("train").tolist() == [31373, 995, 50256]
    assert not cache.exists()


def test_meta_json_gives_name_vocabulary_and_dtype(folder, cache):
    meta = {"name": "mine", "vocab_size": 70_001, "dtype": "uint32"}
    write_tokens(folder, [0, 70_000], stored="<u4", **meta)
    corpus = open_corpus(str(folder), cache)
    assert (corpus.name, corpus.tokenizer) == ("mine", None)
    assert corpus.tokens("train").dtype == np.uint32
    assert corpus.tokens("train").tolist() == [0, 70_000]


def test_meta_pickle_of_nanogpt_is_read(folder, cache):
    letters = dict(enumerate("abc"))
    write_pickle(folder, {"vocab_size": 65, "itos": letters, "stoi": {"a": 0}})
    info = describe_corpus(str(folder))
    assert (info.vocab_size, info.tokenizer, info.splits) == (65, None, ("train",))


def test_token_files_count_where_text_lies_beside_them(folder):
    write_tokens(folder, [1, 2, 3])
    (folder / "val.txt").write_text("text\n")
    assert describe_corpus(str(folder)).splits == ("train",)


def test_tokenizer_may_be_named_for_a_folder_that_does_not_say(folder, cache):
    write_tokens(folder, [1, 2, 3], vocab_size=4096)
    assert open_corpus(str(folder), cache).tokenizer is None
    assert open_corpus(str(folder), cache, "sotu4096").tokenizer == "sotu4096"


# What is refused


def test_missing_folder_is_refused(tmp_path, cache):
    refused(tmp_path / "nowhere", cache, "nowhere' does not exist: give 'sotu'")


def test_file_in_place_of_a_folder_is_refused(tmp_path, cache):
    (tmp_path / "train.txt").write_text("text")
    refused(tmp_path / "train.txt", cache, "is a file")


def test_folder_with_nothing_recognisable_is_refused(folder, cache):
    (folder / "input.txt").write_text("text")
    refused(folder, cache, "nothing recognisable.*train.txt and val.txt")


def test_missing_split_is_refused(folder, cache):
    write_tokens(folder, [1, 2, 3])
    refused(folder, cache, r"no 'val' split.*present: train", split="val")


def test_empty_token_file_is_refused(folder, cache):
    write_tokens(folder, [])
    refused(folder, cache, r"train\.bin is empty")


def test_truncated_token_file_is_refused(folder, cache):
    (folder / "train.bin").write_bytes(b"\x01\x00\x02")
    refused(folder, cache, "truncated: 3 bytes is not a multiple of 2")


def test_token_file_shorter_than_its_meta_says_is_refused(folder, cache):
    write_tokens(folder, [1, 2, 3], vocab_size=10, tokens={"train": 4})
    refused(folder, cache, "has 6 bytes, but meta.json says 4 tokens of 2 bytes")


def test_first_id_beyond_the_vocabulary_is_named(folder, cache):
    tokens = np.zeros(2_200_000, int)
    tokens[[1_200_000, 2_100_000]] = 65, 99
    write_tokens(folder, tokens, vocab_size=65)
    refused(folder, cache, "id 65 at position 1200000.*vocabulary size is 65")


def test_wide_ids_without_meta_are_refused(folder, cache):
    write_tokens(folder, range(1, 100), stored="<u4")
    refused(folder, cache, "looks like uint32")


def test_unknown_tokenizer_is_refused(folder, cache):
    (folder / "train.txt").write_text("text")
    refused(folder, cache, "unknown tokenizer 'bert'", tokenizer="bert")


def test_unknown_tokenizer_for_token_files_is_refused(folder, cache):
    write_tokens(folder, [1], vocab_size=10)
    refused(folder, cache, "unknown tokenizer 'bert'", tokenizer="bert")


def test_tokenizer_that_contradicts_meta_is_refused(folder, cache):
    write_tokens(folder, [1], vocab_size=4096, tokenizer="sotu4096")
    refused(folder, cache, "made by 'sotu4096', not 'gpt2'", tokenizer="gpt2")


def test_vocabulary_that_contradicts_the_tokenizer_is_refused(folder, cache):
    write_tokens(folder, [1], vocab_size=50304, tokenizer="gpt2")
    refused(folder, cache, "vocab_size 50304, but tokenizer 'gpt2' has 50257")


def test_tokens_of_another_version_of_a_tokenizer_are_refused(folder, cache):
    meta = {"vocab_size": 4096, "tokenizer": "sotu4096", "tokenizer_sha256": "00"}
    write_tokens(folder, [1], **meta)
    refused(folder, cache, "another version of tokenizer 'sotu4096'")


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe\x00", b"[1]", b""])
def test_damaged_meta_json_is_refused(folder, cache, content):
    write_tokens(folder, [1])
    (folder / "meta.json").write_bytes(content)
    refused(folder, cache, r"meta\.json is damaged")


@pytest.mark.parametrize("value", [0, -5, "65", 65.0, True, None])
def test_vocabulary_size_must_be_a_positive_integer(folder, cache, value):
    write_tokens(folder, [1], vocab_size=value)
    refused(folder, cache, "vocab_size .*must be a positive integer")


@pytest.mark.parametrize("dtype", ["int64", "float32", ["uint16"]])
def test_unsupported_dtype_is_refused(folder, cache, dtype):
    write_tokens(folder, [1], vocab_size=10, dtype=dtype)
    refused(folder, cache, "must be uint16 or uint32")


def test_pickle_that_asks_for_code_is_refused_and_not_run(folder, cache, tmp_path):
    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'hit')!r}, 'w')",)

    write_pickle(folder, {"vocab_size": Attack()})
    refused(folder, cache, r"meta\.pkl is refused.*asks for builtins\.exec")
    assert not (tmp_path / "hit").exists()


@pytest.mark.parametrize(
    "value",
    [
        collections.OrderedDict(vocab_size=65),
        [65],
    ],
    ids=["ordered", "list"],
)
def test_pickle_of_other_than_plain_values_is_refused(folder, cache, value):
    write_pickle(folder, value)
    refused(folder, cache, r"meta\.pkl is refused.*plain values")


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"a": 1})[:-3]])
def test_damaged_pickle_is_refused(folder, cache, content):
    write_tokens(folder, [1])
    (folder / "meta.pkl").write_bytes(content)
    refused(folder, cache, r"meta\.pkl is refused")


def test_text_that_is_not_utf8_is_refused(folder, cache):
    (folder / "train.txt").write_bytes(b"fine\ncaf\xe9\n")
    refused(folder, cache, "not UTF-8: byte 0xe9 in line 2")


def test_empty_text_file_is_refused(folder, cache):
    (folder / "train.txt").write_text("text")
    (folder / "val.txt").write_text("")
    refused(folder, cache, r"val\.txt is empty")


def test_text_file_named_for_two_splits_is_refused(folder, cache):
    (folder / "train.test.txt").write_text("text")
    refused(folder, cache, "more than one split")
