"""Sources of text and tokens: what is read, what is written, what is refused."""

import collections
import dataclasses
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from runs import json_of

from pcagpt import file_hashes, files
from pcagpt.data import (
    content,
    single_text,
    text_files,
    token_array,
    token_files,
    vocabulary,
)
from pcagpt.data import corpus as corpus_module
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.corpus import check_package, count_tokens, describe_corpus, open_corpus
from pcagpt.data.meta import SPLITS, present_splits
from pcagpt.data.sources import absolute_source, find_source, sotu_documents
from pcagpt.data.tokenizer import END_OF_TEXT, RANKS, load_tokenizer
from pcagpt.errors import UserError, explain, warn_once
from pcagpt.file_hashes import sha256_of_file

WIKI_LINES = [" \n", " = Title = \n", " \n", " The cat 's @-@ hat , naïve . \n", " \n"]


@pytest.fixture(scope="module")
def sotu(tmp_path_factory):
    """The embedded corpus, tokenized once."""
    return open_corpus("sotu", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cache(tmp_path):
    """A cache folder that does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """An empty folder for a source."""
    path = tmp_path / "my data"
    path.mkdir()
    return path


def write_tokens(folder, ids, split="train", stored="<u2", **meta):
    """Writes a token file and, if `meta` is given, meta.json."""
    np.asarray(ids).astype(stored).tofile(folder / f"{split}.bin")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta))


def refused(folder, cache, match, split="train", tokenizer="auto"):
    """Asserts that a folder is refused in one line and that nothing is written."""
    with pytest.raises(UserError, match=match) as error:
        open_corpus(str(folder), cache, tokenizer).tokens(split)
    assert "\n" not in str(error.value)
    assert not cache.exists()


@pytest.mark.parametrize("is_text", [False, True])
def test_a_split_that_is_the_train_split_is_named(is_text, folder, cache, caplog):
    for split in SPLITS:
        numbers = range(9) if split != "test" else range(9, 0, -1)
        write_tokens(folder, numbers, split)
        text = " ".join(map(str, numbers))
        if is_text:
            (folder / f"{split}.bin").unlink()
            (folder / f"{split}.txt").write_text(text)
    warn_once.cache_clear()
    for _ in range(2):
        open_corpus(str(folder), cache)
    (line,) = [one for one in caplog.messages if "its train split" in one]
    name = "my_data" if is_text else "my data"
    assert line.startswith(f"the val split of {name} is the same as its train split")


# The embedded corpus


def test_the_splits_of_sotu_are_as_declared_and_share_no_address(sotu):
    documents = {split: sotu_documents(split) for split in SPLITS}
    counts = {split: len(addresses) for split, addresses in documents.items()}
    assert counts == {"train": 189, "val": 11, "test": 11}
    assert len(set().union(*documents.values())) == 211
    meta = json_of(sotu.folder / "meta.json")
    assert meta == {
        "name": "sotu",
        "vocab_size": 4096,
        "dtype": "uint16",
        "tokenizer": "sotu4096",
        "tokenizer_sha256": RANKS["sotu4096"].sha256,
        "tokens": {"train": 2195114, "val": 166033, "test": 118490},
        "unknown_tokens": dict.fromkeys(SPLITS, 0),
        "unended_documents": dict.fromkeys(SPLITS, 0),
        "text_words": {s: sum(map(words_of, documents[s])) for s in SPLITS},
        "text_bytes": {s: len("".join(documents[s]).encode()) for s in SPLITS},
        "tokens_sha256": {s: sha256_of_file(sotu.folder / f"{s}.bin") for s in SPLITS},
    }
    assert {split: len(sotu.tokens(split)) for split in SPLITS} == meta["tokens"]
    some = sotu.tokens("val")[:8]
    some[:] += 1  # of an own copy
    assert (some == sotu.tokens("val")[:8] + 1).all()


def test_tokens_that_changed_since_their_text_was_tokenized_are_refused(folder, cache):
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text(f"A text for {split}, with some words.")
    made = open_corpus(str(folder), cache, "sotu4096")
    tokens = np.fromfile(made.folder / "val.bin", np.uint16)
    tokens[3] ^= 1
    tokens.tofile(made.folder / "val.bin")
    changed = open_corpus(str(folder), cache, "sotu4096")
    changed.tokens("train")
    with pytest.raises(UserError, match=r"val\.bin was changed .*: delete .* again"):
        changed.tokens("val")


@pytest.mark.parametrize("spoil", [os.remove, lambda file: os.truncate(file, 9)])
@pytest.mark.parametrize("name", ["meta.json", "val.bin"])
def test_tokens_that_pcagpt_made_and_that_are_not_whole_are_made_again_once_deleted(
    folder, cache, name, spoil
):
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text(f"A text for {split}, with some words.")
    made = open_corpus(str(folder), cache)
    spoil(made.folder / name)
    with pytest.raises(UserError, match=rf"{name} .*: delete the folder {made.folder}"):
        open_corpus(str(folder), cache).tokens("val")
    shutil.rmtree(made.folder)
    assert open_corpus(str(folder), cache).content == made.content


def test_sotu_puts_end_of_text_before_every_address(sotu):
    decoded = load_tokenizer("sotu4096").decode(sotu.tokens("val")[:].tolist())
    documents = sotu_documents("val")
    assert decoded == "".join(f"<|endoftext|>{text}" for text in documents)


def test_a_description_equals_the_opened_corpus(sotu):
    info = describe_corpus("sotu")
    for name in ("name", "splits", "vocab_size", "tokenizer", "tokenizer_sha256"):
        assert getattr(info, name) == getattr(sotu, name)
    info = describe_corpus("sotu", "gpt2")
    assert (info.vocab_size, info.tokenizer) == (50257, "gpt2")


def test_the_cache_folder_and_the_old_hash_are_those_of_earlier_runs(sotu):
    assert sotu.folder.name == "sotu-sotu4096-939c2a16e4b2"
    sha256 = "a096889e4ac1caf7403fd155f86cccde0c14c1cafe29e5465dd4a4eda2eecd23"
    assert sotu.changed_parts({"corpus_sha256": sha256}) == []
    assert sotu.changed_parts({"corpus_sha256": "other"}) == ["tokens"]
    assert sotu.changed_parts({}) is None


# What a corpus is


def contents(folder, cache):
    """The content of a corpus and its one hash."""
    corpus = open_corpus(str(folder), cache)
    return corpus.content, corpus.sha256


def test_the_content_depends_on_every_token_the_vocabulary_and_the_numbering(
    folder, cache
):
    ids = np.arange(600_000) % 7  # The old hash would sample 2 * 64 * 4096 of them.
    other, known = ids.copy(), {"vocab_size": 10, "stoi": {"a": 0, "b": 1}}
    other[4099] = 9
    found = []
    for train, val, meta in (
        (ids, ids, known),
        (other, ids, known),
        (ids, other, known),
        (ids, ids, known | {"vocab_size": 11}),
        (ids, ids, known | {"stoi": {"a": 1, "b": 0}}),
    ):
        write_tokens(folder, train, **meta)
        write_tokens(folder, val, "val")
        found.append(contents(folder, cache))
    assert len({sha256 for _, sha256 in found}) == 5
    first = {"corpus": found[0][0]}
    corpus = open_corpus(str(folder), cache)
    assert corpus.changed_parts(first) == ["tokenizer_sha256"]
    assert found[1][0]["train"] == found[2][0]["val"] != found[0][0]["train"]


def test_the_content_does_not_depend_on_place_spelling_or_width(
    folder, cache, tmp_path, monkeypatch
):
    write_tokens(folder, [1, 2, 3] * 50, vocab_size=10)
    wanted = contents(folder, cache)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    meta = {"name": "another", "vocab_size": 10, "dtype": "uint32"}
    write_tokens(moved, [1, 2, 3] * 50, stored="<u4", **meta)
    monkeypatch.chdir(tmp_path)
    for spelling in ("moved", "moved/", "./moved", moved):
        assert contents(spelling, cache) == wanted


def in_another_process(patch):
    """What this process remembers of files does not count."""
    patch.setattr(token_files, "content_of", content.content_of.__wrapped__)


def test_a_file_is_read_once_until_it_changes(folder, cache, monkeypatch):
    write_tokens(folder, [1, 2, 3], vocab_size=10)
    write_tokens(folder, [99], "test")  # Nobody asks for it here.
    monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", 0)
    wanted = open_corpus(str(folder), cache).tokens("train")[:].tolist()
    assert json.loads((folder / ".pcagpt-content.json").read_text()).keys() >= {
        "train.bin"
    }
    with monkeypatch.context() as patch:
        in_another_process(patch)
        patch.setattr(content, "_read", None)
        assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == wanted
    write_tokens(folder, [1, 2, 4])
    assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == [1, 2, 4]
    write_tokens(folder, [1, 2, 11])
    with pytest.raises(UserError, match="id 11 at position 2"):
        open_corpus(str(folder), cache).tokens("train")


def test_a_file_that_may_change_within_its_time_is_read_every_time(folder, cache):
    write_tokens(folder, [1, 2, 3], vocab_size=10)
    path = folder / "train.bin"
    status, before = path.stat(), contents(folder, cache)
    assert not (folder / ".pcagpt-content.json").exists()
    write_tokens(folder, [1, 2, 4])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert contents(folder, cache) != before


def test_a_read_only_folder_has_its_content_in_the_cache(folder, cache, monkeypatch):
    write_tokens(folder, [1, 2, 3], vocab_size=10)
    monkeypatch.setattr(file_hashes, "_SETTLED_SECONDS", 0)
    write = content.write_json

    def refuse(path, value):
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        write(path, value)

    monkeypatch.setattr(content, "write_json", refuse)
    wanted = contents(folder, cache)
    assert not (folder / ".pcagpt-content.json").exists()
    (file,) = cache.glob(".pcagpt-content-*.json")
    in_another_process(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(content, "_read", None)
        assert contents(folder, cache) == wanted
    file.write_text("{")
    assert contents(folder, cache) == wanted


# Tokens, words and bytes


def test_counting_never_converts_the_whole_file_and_is_done_once(
    folder, cache, monkeypatch
):
    tokens = np.arange(8_000_000) % 7
    write_tokens(folder, tokens, vocab_size=10)
    corpus = open_corpus(str(folder), cache)
    tracemalloc.start()
    count_V = corpus.count_tokens("train")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(tokens)  # an int64 copy takes 8 bytes per token
    assert count_V.dtype == np.int64
    assert count_V.tolist() == np.bincount(tokens, minlength=10).tolist()
    with monkeypatch.context() as patch:  # Each arm of an experiment asks.
        patch.setattr(corpus_module, "count_tokens", None)
        again = open_corpus(str(folder), cache).count_tokens("train")
    assert again.tolist() == count_V.tolist()
    write_tokens(folder, tokens[::-1] % 3, vocab_size=10)
    changed = open_corpus(str(folder), cache).count_tokens("train")
    assert changed[3:].sum() == 0 and changed.sum() == len(tokens)
    assert count_tokens(np.uint32([3, 1, 3]), 5).tolist() == [0, 1, 0, 2, 0]


def words_of(text):
    return len(text.split()) + text.count("\n")


@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_the_tokens_of_sotu_tell_the_size_of_its_text(sotu, chunk, monkeypatch):
    monkeypatch.setattr(token_array, "_CHUNK_TOKENS", chunk)
    earlier = dataclasses.replace(sotu, text_words={}, text_bytes={})
    assert earlier.text_size("val") == sotu.text_size("val")
    # Without a hash, the tokens may be those of another text.
    other = dataclasses.replace(sotu, hashes={}, text_bytes=dict.fromkeys(SPLITS, 7))
    assert other.text_size("val") == sotu.text_size("val")


def test_the_characters_of_a_meta_file_tell_the_size_of_a_text(folder, cache):
    text = "zwölf Wörter\n und <|endoftext|>mehr"
    texts = ["<|endoftext|>", *sorted(set(text))]
    tokens = CharacterTokenizer(tuple(texts)).encode(text)
    write_tokens(folder, tokens, "val", vocab_size=len(texts), itos=texts)
    of_text = text.replace("<|endoftext|>", " ")
    size = len(of_text.encode()) - 2  # The first character, and the end of a text.
    assert open_corpus(str(folder), cache).text_size("val") == (5, size)
    # An id that stands for other characters hides their number.
    texts[0] = "\ufffd"
    write_tokens(folder, tokens, "val", vocab_size=len(texts), itos=texts)
    assert open_corpus(str(folder), cache).text_size("val") is None


def test_end_of_text_separates_words_and_is_not_counted(folder, cache):
    encode = load_tokenizer("gpt2").encode
    tokens = encode("<|endoftext|>one two<|endoftext|>three\n", allowed_special="all")
    write_tokens(folder, tokens, "val")
    assert open_corpus(str(folder), cache).text_size("val") == (4, 13)


def test_the_bytes_of_a_first_token_which_is_not_predicted_are_not_counted(
    folder, cache
):
    write_tokens(folder, load_tokenizer("gpt2").encode("three two\n"), "val")
    assert open_corpus(str(folder), cache).text_size("val") == (3, 10 - len("three"))


def test_text_size_needs_a_known_tokenizer(folder, cache):
    write_tokens(folder, [1, 2], vocab_size=65, tokenizer="letters")
    corpus = open_corpus(str(folder), cache)
    assert corpus.tokenizer is None
    assert corpus.text_size("train") is None


# Folders of text


def test_text_folder_is_encoded_byte_for_byte(folder, cache):
    text = "".join(WIKI_LINES) + "no\r\nline end: 日本"
    (folder / "train.txt").write_bytes(text.encode())
    corpus = open_corpus(str(folder), cache)
    expected = [50256, *load_tokenizer("gpt2").encode_ordinary(text)]
    assert corpus.tokens("train")[:].tolist() == expected
    assert (corpus.name, corpus.tokenizer) == ("my_data", "gpt2")
    assert present_splits(corpus.folder) == ("train",)


def test_pieces_of_a_long_text_encode_as_the_whole_text(folder, cache):
    parts = ["it's", " we'll", " ", "\n", "  \n ", "\t", "\xa0", "\u3000", "\x1c", "語"]
    parts += [" a", "!?", "1234", " 56", "é", "\r\n", "\n\n", "'", "s"]
    text = "".join(random.Random(0).choices(parts, k=200_000))
    (folder / "train.txt").write_bytes(text.encode())
    tokens = open_corpus(str(folder), cache).tokens("train")
    assert tokens[1:].tolist() == load_tokenizer("gpt2").encode_ordinary(text)


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
    assert list(find_source(str(folder)).documents) == [split]


def test_several_files_of_a_split_are_joined_in_sorted_order(folder, cache):
    (folder / "train-b.txt").write_text("second")
    (folder / "train-a.txt").write_text("first")
    corpus = open_corpus(str(folder), cache)
    text = load_tokenizer("gpt2").decode(corpus.tokens("train")[:].tolist())
    assert text == "<|endoftext|>first<|endoftext|>second"
    # Other users can read the cached folder.
    assert corpus.folder.stat().st_mode == folder.stat().st_mode


def test_text_is_tokenized_once_until_it_or_the_tokenizer_changes(folder, cache):
    source = folder / "train.txt"
    source.write_text("one")
    first = open_corpus(str(folder), cache)
    written = (first.folder / "train.bin").stat().st_mtime_ns
    assert open_corpus(str(folder), cache) == first
    assert (first.folder / "train.bin").stat().st_mtime_ns == written
    assert open_corpus(str(folder), cache, "sotu4096").folder != first.folder
    source.write_text("two")
    changed = open_corpus(str(folder), cache)
    assert changed.folder != first.folder
    assert (
        load_tokenizer("gpt2").decode(changed.tokens("train")[:].tolist()[1:]) == "two"
    )


def test_tokenizing_at_the_same_time_leaves_one_whole_folder(folder, cache):
    (folder / "train.txt").write_text("some words to read\n" * 20_000)
    barrier = threading.Barrier(4)

    def open_together(_):
        barrier.wait()
        return open_corpus(str(folder), cache)

    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(open_together, range(4)))
    assert all(corpus == opened[0] for corpus in opened)
    assert list(cache.iterdir()) == [opened[0].folder]
    expected = load_tokenizer("gpt2").encode_ordinary("some words to read\n" * 20_000)
    assert opened[0].tokens("train")[1:].tolist() == expected


def test_what_a_killed_command_tokenized_is_removed_by_the_next_one(folder, cache):
    (folder / "train.txt").write_text("some words to read\n")
    script = f"""
import os
from pcagpt.data import corpus, tokenize

tokenize._encode = lambda *_: os._exit(9)
corpus.open_corpus({str(folder)!r}, {str(cache)!r})
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    (draft,) = cache.iterdir()
    assert re.fullmatch(r"\.[0-9a-f]{12}\.[0-9a-f]{8}\.partial", draft.name)
    corpus = open_corpus(str(folder), cache)
    assert list(cache.iterdir()) == [corpus.folder]


@pytest.mark.parametrize("later", [b"two", b"t\xe9o"])
def test_text_that_changes_while_it_is_tokenized_is_not_kept(
    folder, cache, later, monkeypatch
):
    source = folder / "train.txt"
    source.write_text("one")
    load = vocabulary.load

    def change(name):
        source.write_bytes(later)
        return load(name)

    with monkeypatch.context() as patch:
        patch.setattr(vocabulary, "load", change)
        refused(folder, cache, "text (my_data changed while it was read: run|.*UTF-8)")
    source.write_text("one")
    assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == [50256, 505]


@pytest.mark.parametrize("name", ["a" * 250, "猫" * 80])
def test_a_folder_with_the_longest_name_has_its_tokens_in_the_cache(
    tmp_path, cache, name
):
    (tmp_path / name).mkdir()
    (tmp_path / name / "train.txt").write_text("one")
    opened = open_corpus(str(tmp_path / name), cache)
    assert opened.tokens("train")[:].tolist() == [50256, 505]
    assert opened.name == name
    assert name.startswith(opened.folder.name.partition("-")[0])


def test_a_folder_with_the_name_of_a_known_corpus_is_not_taken_silently(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("sotu", "wikitext103"):
        assert find_source(name).notice == ""
        (tmp_path / name).mkdir()
        assert f"not the folder {name} here: give --config.data.source=./{name}" in (
            find_source(name).notice
        )


def test_end_of_text_in_a_text_is_one_token(folder, cache):
    (folder / "train.txt").write_text("one<|endoftext|>\ntwo<|endoftext|>")
    (folder / "val.txt").write_text("<|endoftext|>three")
    corpus = open_corpus(str(folder), cache)
    assert corpus.tokens("train")[:].tolist() == [50256, 505, 50256, 198, 11545, 50256]
    assert corpus.tokens("val")[:].tolist() == [50256, 15542]  # not twice


def test_old_token_files_of_a_text_with_marks_are_not_taken(folder, cache):
    """Earlier versions made seven tokens of `<|endoftext|>` and kept the mark."""
    names = set()
    for text in ("one", "one<|endoftext|>", "\ufeffone"):
        (folder / "train.txt").write_bytes(text.encode())
        names.add(open_corpus(str(folder), cache).folder.name)
    recipe = [1, hashlib.sha256(b"".join(_old_lines(folder))).hexdigest()]
    key = json.dumps([*recipe, RANKS["gpt2"].sha256]).encode()
    assert f"my_data-gpt2-{hashlib.sha256(key).hexdigest()[:12]}" not in names
    assert len(names) == 3


def _old_lines(folder):
    """What earlier versions hashed of a folder of text."""
    for path in sorted(folder.glob("*.txt")):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        yield f"{path.stem} {sha256}\n".encode()


def test_a_byte_order_mark_is_not_text(folder, cache):
    (folder / "train.txt").write_bytes(b"\xef\xbb\xbfone")
    assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == [50256, 505]
    (folder / "train.txt").write_bytes(b"\xef\xbb\xbf")
    refused(folder, folder / "cache", r"train\.txt is empty")


TEXT = "Crème brûlée, “naïve” café.\n" * 20


@pytest.mark.parametrize(
    ("content", "match"),
    [
        *(
            (TEXT.encode(name), f"is {said}, .*iconv -f {said} -t UTF-8 '/.*txt' > NEW")
            for name, said in (
                ("utf-16", "UTF-16"),
                ("utf-32", "UTF-32"),
                ("utf-16-le", "UTF-16LE"),
                ("utf-16-be", "UTF-16BE"),
                ("utf-32-le", "UTF-32LE"),
                ("utf-32-be", "UTF-32BE"),
            )
        ),
        (TEXT.encode("cp1252"), "byte 0xe8 in line 1; .*iconv -f CP1252 "),
        ("né\n".encode("latin1") * 9, "byte 0xe9 in line 1; .*iconv -f ISO-8859-1 "),
        ("Привет мир\n".encode("cp1251") * 9, "iconv -f ENCODING .*CP1251"),
        ("日本語の文章\n".encode("shift_jis") * 9, "iconv -f ENCODING .*SHIFT_JIS"),
        (
            TEXT.encode() + b"\xff\n",
            "0xff in line 21; the rest is UTF-8, .*iconv -c -f UTF-8",
        ),
        (
            "深い猫が走る。\n".encode("gb18030") + b"a" * 99,
            "iconv -f ENCODING .*GB18030",
        ),
        (
            "数据很重要，我们学习。\n".encode("utf-16-le") * 9,
            "iconv -f ENCODING .*UTF-16LE",
        ),
        (
            "Hi, 日本語の文章\n".encode("iso2022-jp") * 9,
            "is ISO-2022-JP, .*iconv -f ISO-2022-JP -t UTF-8",
        ),
        (
            "Hi, 한국어 문장\n".encode("iso2022_kr") * 9,
            "is ISO-2022-KR, .*iconv -f ISO-2022-KR -t UTF-8",
        ),
        ("né".encode()[:-1], "byte 0xc3 in line 1; .* truncated UTF-8.*head -c 1 "),
        ("abc猫".encode()[:-1], "truncated UTF-8: write it again, .*head -c 3 "),
        ("abc猫".encode()[:-2], "if it is truncated UTF-8, write it again; if it is W"),
        ("A bright day".encode("utf-16"), "is UTF-16, .*iconv -f UTF-16 -t UTF-8 "),
        (b"one\ntwo\0\n", r"NUL byte in line 2; .*tr -d '\\000' < '/.*txt' > NEW"),
        (
            gzip.compress(TEXT.encode(), mtime=0),
            "is not text, it is compressed: .*gunzip",
        ),
    ],
)
def test_text_that_is_not_plain_utf8_is_named_with_the_command_that_converts_it(
    folder, cache, content, match
):
    (folder / "train.txt").write_bytes(content)
    refused(folder, cache, match)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["train.txt", "train.bin"])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (LFS, "it is a Git LFS pointer: .* git lfs pull$"),
        (b"/annex/objects/SHA256E-s12--4d7a.txt\n", "a git-annex .* git annex get$"),
        (b"../.git/annex/objects/W/6/SHA256E-s12--4d7a", "is a git-annex pointer"),
        (b"\n<!DOCTYPE html>\n<title>404</title>", "is a web page, .*: download the"),
        (b"<HTML lang=en><body>Not found</body>", "is a web page"),
        (
            b'{"text": "One {1}."}\n{"text": "Two."}\n',
            "JSON lines: write only the texts",
        ),
        (b'{"text": "One."}', "it is JSON lines"),
        (b'[\n  {"text": "One."}\n]', "it is JSON: write only"),
    ],
)
def test_what_stands_for_a_file_is_not_taken_for_it(
    folder, cache, name, content, match
):
    (folder / name).write_bytes(content)
    refused(folder, cache, match)


def test_text_about_pointers_and_pages_is_text(folder, cache):
    marked = ["<!DOCTYPE html>", '{"a": 1}\n{"a": 2}\n']
    texts = [f"See {LFS.decode()}", "<html5", '{"a" is a set}\n{"b"}\n', '[{"a"}]']
    for text in [*texts, *("<|endoftext|>" + text for text in marked)]:
        (folder / "train.txt").write_text(text)
        open_corpus(str(folder), cache).tokens("train")


def test_a_text_of_many_blocks_is_checked_to_its_end(folder, cache, monkeypatch):
    monkeypatch.setattr(text_files, "_BLOCK_BYTES", 7)
    text = "Crème brûlée\n<|endoftext|>\n" * 3
    (folder / "train.txt").write_bytes(text.encode())
    assert text_files.check(folder / "train.txt")[1]
    (folder / "train.txt").write_bytes(text.encode() + b"one\n\0")
    refused(folder, cache, "NUL byte in line 8")
    (folder / "train.txt").write_bytes(text.encode() + b"one\n\xe8\n")
    refused(folder, cache, "byte 0xe8 in line 8")


def test_what_is_used_and_what_is_left_out_is_said(folder):
    for name in ("a.train.txt", "b train (1).txt", "val.raw", "notes.txt", "train.csv"):
        (folder / name).write_text("text\n")
    (folder / "._val.txt").write_bytes(b"\0")  # hidden
    (folder / "test").mkdir()
    assert find_source(str(folder)).notice == (
        f"text in {folder}: train from a.train.txt, 'b train (1).txt', val from "
        "val.raw; not read as text: notes.txt, test/, train.csv"
    )
    write_tokens(folder, [1], vocab_size=10)
    notice = find_source(str(folder)).notice
    assert notice.startswith(f"tokens in {folder}; not read as tokens: a.tr")
    assert find_source("sotu").notice == ""


@pytest.mark.parametrize("source", ["text", "tokens"])
def test_a_corpus_is_looked_for_once_when_it_is_opened(
    source, folder, cache, monkeypatch
):
    if source == "text":
        (folder / "train.txt").write_text("one")
    else:
        write_tokens(folder, [1], vocab_size=10)
    looked = []

    def counted(source):
        looked.append(source)
        return find_source(source)

    monkeypatch.setitem(open_corpus.__globals__, "find_source", counted)
    open_corpus(str(folder), cache)
    assert looked == [str(folder)]


def test_a_folder_may_be_called_like_a_home_folder(tmp_path, monkeypatch):
    """The command line expands ~ and advises ./~NAME for such a folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "~nobody-here"
    folder.mkdir()
    write_tokens(folder, [1], vocab_size=10)
    assert find_source("./~nobody-here").folder.resolve() == folder
    assert absolute_source("./~nobody-here") == str(folder)


def test_odd_names_are_quoted_in_the_lines_and_commands(folder):
    for name in ("a, b.train.txt", "val.txt", "line\nend", "résumé.md"):
        (folder / name).write_text("text\n")
    assert find_source(str(folder)).notice == (
        f"text in {folder}: train from 'a, b.train.txt', val from val.txt; not read as "
        r"text: 'line\nend', résumé.md"
    )
    (folder / "it's.train.txt").write_bytes(b"one\0")
    command = rf"""tr -d '\000' < '{folder}/it'"'"'s.train.txt' > NEW"""
    refused(folder, folder / "cache", re.escape(command))


def test_a_meta_file_may_begin_with_a_byte_order_mark(folder):
    write_tokens(folder, [1, 2, 3])
    (folder / "meta.json").write_bytes(b'\xef\xbb\xbf{"vocab_size": 65}')
    assert describe_corpus(str(folder)).vocab_size == 65


def test_what_is_in_the_place_of_a_split_is_named(folder):
    write_tokens(folder, [1, 2, 3], vocab_size=65)
    (folder / "val.bin").mkdir()
    (folder / "test.bin").symlink_to("nowhere")
    for split, words in (("val", "a folder"), ("test", "a link to nothing")):
        match = f"present: train; {split}.bin is {words}.*such as {split}.bin, or"
        with pytest.raises(UserError, match=match):
            describe_corpus(str(folder), splits=[split])


def test_tokens_of_an_earlier_version_are_found(folder, cache):
    """It took `<|endoftext|>` for ordinary text."""
    (folder / "train.txt").write_text("one<|endoftext|>")
    (folder / "val.txt").write_text("two")
    now = open_corpus(str(folder), cache)
    (earlier,) = now.older
    assert now.older_tokens({"corpus": now.content | {"train": "other"}}, cache) == ""
    shutil.copytree(now.folder, earlier)
    (earlier / "meta.json").unlink()
    counts = {"train": 9, "val": 2}
    ids = load_tokenizer("gpt2").encode_ordinary("one<|endoftext|>")
    meta = {"dtype": "uint16", "tokenizer": "gpt2", "tokens": counts}
    write_tokens(earlier, [50256, *ids], vocab_size=50257, **meta)
    record = {"corpus": open_corpus(str(earlier), cache).content}
    assert now.changed_parts(record) == ["train"]
    assert f"its tokens are in {earlier}, which" in now.older_tokens(record, cache)
    assert open_corpus(str(earlier), cache).changed_parts(record) == []


def test_a_missing_split_is_refused_before_anything_is_tokenized(folder, cache):
    (folder / "train.txt").write_text("text\n")
    for find in (describe_corpus, lambda *a: open_corpus(a[0], cache, *a[1:])):
        with pytest.raises(
            UserError, match=r"no 'val' split in /.*present: train\): add"
        ):
            find(str(folder), "auto", ["train", "val"])
    assert not cache.exists()


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
    text = load_tokenizer("gpt2").decode(corpus.tokens("val")[:].tolist())
    assert text == "<|endoftext|>" + "".join(WIKI_LINES)
    assert asked == [
        ("Salesforce/wikitext", "wikitext-103-raw-v1", split)
        for split in ("train", "validation", "test")
    ]
    assert open_corpus("wikitext103", cache) == corpus
    assert len(asked) == 3
    monkeypatch.setitem(sys.modules, "datasets", None)
    check_package("wikitext103", cache)  # Its tokens are there.


def test_wikitext_without_package_or_network_is_refused(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused("wikitext103", cache, r"pip install 'pcagpt\[datasets\]'")
    assert describe_corpus("wikitext103").vocab_size == 50257
    with pytest.raises(UserError, match="needs the package `datasets`"):
        check_package("wikitext103", cache)
    check_package("sotu", cache)

    def load_dataset(*_, **__):
        raise ConnectionError("no\nroute")

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    refused("wikitext103", cache, "needs the network once")


def test_a_full_disk_is_not_taken_for_a_lack_of_network(cache, monkeypatch):
    def load_dataset(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    with pytest.raises(OSError, match="No space left on device") as caught:
        open_corpus("wikitext103", cache)
    assert re.fullmatch(
        "the cache of .*`: .* or use another HF_HOME", explain(caught.value)
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_cache_folder_is_told_with_its_path_and_knob(
    number, folder, cache, monkeypatch
):
    def fail(_):
        raise OSError(number, os.strerror(number))

    (folder / "train.txt").write_text("text")
    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        open_corpus(str(folder), cache)
    line = explain(caught.value)
    assert line.startswith(f"{cache}: {os.strerror(number).lower()}: ")
    assert "use another --config.data.cache_dir" in line
    assert not cache.exists()


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null", "/dev/null/x"])
def test_a_cache_folder_that_cannot_be_made_is_told_with_its_knob(place, folder):
    (folder / "train.txt").write_text("text")
    with pytest.raises(OSError) as caught:
        open_corpus(str(folder), place)
    line = explain(caught.value)
    assert line.startswith(f"{place}: ")
    assert line.endswith(" as --config.data.cache_dir")


# Folders of token files


def test_token_folder_without_a_meta_file_holds_gpt2_tokens(folder, cache):
    write_tokens(folder, [31373, 995, 50256])
    (folder / "val.txt").write_text("Token files come before text.\n")
    corpus = open_corpus(str(folder), cache)
    assert (corpus.vocab_size, corpus.tokenizer) == (50257, "gpt2")
    assert corpus.folder == folder
    assert corpus.tokens("train")[:].tolist() == [31373, 995, 50256]
    assert not cache.exists()


def test_meta_json_gives_name_vocabulary_and_dtype(folder, cache):
    meta = {"name": "mine", "vocab_size": 70_001, "dtype": "uint32"}
    write_tokens(folder, [0, 70_000], stored="<u4", **meta)
    corpus = open_corpus(str(folder), cache)
    assert (corpus.name, corpus.tokenizer) == ("mine", None)
    assert corpus.tokens("train").dtype == np.uint32
    assert corpus.tokens("train")[:].tolist() == [0, 70_000]


def test_meta_pickle_of_nanogpt_is_read(folder):
    write_tokens(folder, [1, 2, 3])
    meta = {"vocab_size": 65, "itos": dict(enumerate("abc")), "stoi": {"a": 0}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    info = describe_corpus(str(folder))
    assert (info.vocab_size, info.tokenizer, info.characters) == (65, None, None)


@pytest.mark.parametrize(
    "known",
    [
        {"itos": {0: "a", 1: "\n", 2: "é"}},
        {"itos": {"0": "a", "2": "é", "1": "\n"}},
        {"itos": ["a", "\n", "é"]},
        {"stoi": {"é": 2, "a": 0, "\n": 1}},
        {"itos": ["a", "\n", "é"], "stoi": {"é": 2, "a": 0, "\n": 1}},
    ],
)
@pytest.mark.parametrize("name", ["meta.json", "meta.pkl"])
def test_the_characters_of_a_meta_file_are_known_in_the_order_of_ids(
    folder, name, known
):
    write_tokens(folder, [0, 1, 2])
    meta = {"vocab_size": 3, **known}
    stored = json.dumps(meta).encode() if name == "meta.json" else pickle.dumps(meta)
    (folder / name).write_bytes(stored)
    info = describe_corpus(str(folder))
    assert info.characters == ("a", "\n", "é")
    (folder / name).unlink()
    write_tokens(folder, [0, 1, 2], vocab_size=3, itos=["a", "é", "\n"])
    assert describe_corpus(str(folder)).tokenizer_sha256 != info.tokenizer_sha256


@pytest.mark.parametrize(
    ("known", "gaps"),
    [
        ({"itos": {0: "a", 2: "c"}}, "itos of its meta file has no text for ids 1, 3"),
        (
            {"stoi": {"a": 0, "b": 1, "c": 2}},
            "stoi of its meta file has no text for id 3",
        ),
        (
            {"itos": {0: "a", 1: "b", 2: "c", 3: b"d"}},
            "itos of its meta file has no text for id 3",
        ),
        (
            {"itos": [*"abcde"]},
            "itos of its meta file has texts for id 4, "
            "which its vocab_size 4 does not have",
        ),
        (
            {"itos": {1: "b", 2: "c", 3: "d", 4: "e", -1: "f"}},
            "itos of its meta file has no text for id 0, and texts for ids 4, -1, "
            "which its vocab_size 4 does not have",
        ),
        ({"itos": [*"abcd"]}, None),
        ({}, None),
    ],
)
def test_ids_without_a_text_are_named_once(folder, known, gaps, said):
    write_tokens(folder, [0, 1, 2])
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 4, **known}))
    found = [describe_corpus(str(folder)).characters for _ in range(2)]
    assert found == [tuple("abcd") if "itos" in known and not gaps else None] * 2
    line = f"{folder}: the {gaps}: its ids are not shown as text; correct "
    assert [one.startswith(line) for one in said()] == [True] * bool(gaps)


def test_of_many_ids_without_a_text_some_are_named(folder, said):
    write_tokens(folder, [1, 2, 3], vocab_size=65, itos=[*"abc"])
    describe_corpus(str(folder))
    (line,) = said()
    assert "has no text for ids 3, 4, 5, 6, 7, 8, 9, 10, ...: its ids" in line


def test_texts_that_contradict_each_other_are_refused(folder, cache):
    known = {"itos": ["a", "b"], "stoi": {"a": 1, "b": 0}}
    write_tokens(folder, [0, 1], vocab_size=2, **known)
    refused(folder, cache, r"meta.json gives id 1 two texts, 'b' and 'a'")
    write_tokens(folder, [0, 1], vocab_size=3, itos=["a", "b", "a"])
    refused(folder, cache, r"meta.json gives ids 0 and 2 the same text 'a': correct")
    no_text = ["", "\ufffd", "\ufffd", ""]
    write_tokens(folder, [0, 1], vocab_size=5, itos=[*no_text, "a"])
    assert len(open_corpus(str(folder), cache).characters) == 5
    write_tokens(folder, [0, 1], vocab_size=4, itos=no_text)
    assert open_corpus(str(folder), cache).characters is None


def test_tokenizer_may_be_given_for_a_folder_that_names_none(folder, cache):
    write_tokens(folder, [1, 2, 3], vocab_size=4096)
    assert open_corpus(str(folder), cache).tokenizer is None
    assert open_corpus(str(folder), cache, "sotu4096").tokenizer == "sotu4096"


@pytest.mark.parametrize(("stored", "vocab_size"), [("<u2", 65), ("<u4", 100_000)])
@pytest.mark.parametrize("meta", ["meta.json", "meta.pkl"])
def test_the_width_of_ids_is_that_of_the_file(folder, cache, stored, vocab_size, meta):
    ids = np.arange(1, 9000) % 65
    ids[:5000] = 0  # The beginning does not tell.
    ids[:5000:900] = 1  # It was filled.
    write_tokens(folder, ids, stored=stored)
    known = {"vocab_size": vocab_size}
    written = json.dumps(known).encode() if meta[-1] == "n" else pickle.dumps(known)
    (folder / meta).write_bytes(written)
    assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("stored", "meta", "match"),
    [
        ("<u4", {}, "either uint32 ids, or uint16 ids with 0 at every second place"),
        ("<u2", {"dtype": "uint32"}, "looks like uint16, not uint32: correct dtype"),
        ("<i8", {}, r"looks like int64, .*astype\('<u2'\)"),
        ("<i8", {"dtype": "uint32"}, "looks like int64"),
        (">u2", {}, "looks like big-endian uint16, not little-endian uint16"),
        (">u4", {"dtype": "uint32"}, "looks like big-endian uint32, not"),
        ("|u1", {}, "looks like uint8"),
        ("<f4", {}, "looks like float32"),
    ],
)
def test_ids_of_another_width_are_refused_by_its_name(
    folder, cache, stored, meta, match
):
    write_tokens(folder, np.arange(1, 6001) % 65, stored=stored, vocab_size=65, **meta)
    refused(folder, cache, match)


@pytest.mark.parametrize("vocab_size", [65_537, 256_000, 10**6])
def test_ids_of_a_vocabulary_beyond_uint16_are_uint32_unless_stated(
    folder, cache, vocab_size
):
    uniform = np.random.default_rng(0).random(20_000)
    ids = np.exp(uniform * np.log(vocab_size)).astype(int) - 1
    known = {"vocab_size": vocab_size}
    write_tokens(folder, ids, stored="<u4", **known)
    assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == ids.tolist()
    for stored, layout in (
        (">u4", "big-endian uint32"),
        (">i8", "big-endian int64"),
        ("<i8", "int64"),
        ("<f4", "float32"),
        ("<f8", "float64"),
    ):
        write_tokens(folder, ids, stored=stored, **known)
        refused(folder, cache, f"looks like {layout}, not little-endian uint32: write")
    for narrow in ("<u2", ">u2", "u1"):
        few = ids[:19_999] % 200
        write_tokens(folder, few, stored=narrow, **known)
        refused(folder, cache, "looks like|correct .*dtype .*in meta.json")
    for wide in (few, few[:9]):
        write_tokens(folder, wide, stored="<u4", dtype="uint16", **known)
        refused(folder, cache, "looks like uint32, not uint16: correct dtype")
    write_tokens(folder, few, stored="<u2", dtype="uint16", **known)
    assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == few.tolist()


DIGITS = np.stack([np.arange(3000) % 10 + 1, np.zeros(3000, int)], 1).ravel()


@pytest.mark.parametrize("meta", ["meta.json", "meta.pkl"])
def test_ids_of_either_width_are_refused_until_meta_json_states_it(folder, cache, meta):
    """Text such as '3 1 4 1', where a space has id 0, is like uint32 ids."""
    known = {"vocab_size": 11, "itos": dict(enumerate(" 0123456789"))}
    write_tokens(folder, DIGITS)
    write_tokens(folder, DIGITS[:40], "val")
    is_pickle = meta == "meta.pkl"
    written = pickle.dumps(known) if is_pickle else json.dumps(known).encode()
    (folder / meta).write_bytes(written)
    for split in ("train", "val"):
        refused(
            folder,
            cache,
            r"with 0 at every second place: say .*json.*\{\"dtype\": \"uint16",
            split,
        )
    for stated, ids in (
        ({"dtype": "uint16"}, DIGITS),
        ({"dtype": "uint32"}, DIGITS[::2]),
        ({"tokens": {"train": 6000, "val": 40}}, DIGITS),
        ({"tokens": {"train": 3000}}, DIGITS[::2]),
    ):
        whole = stated if is_pickle else known | stated
        (folder / "meta.json").write_text(json.dumps(whole))
        corpus = open_corpus(str(folder), cache)
        assert "".join(corpus.characters) == " 0123456789"
        assert corpus.tokens("train")[:].tolist() == ids.tolist()
        is_wide = len(ids) == 3000
        assert corpus.tokens("val")[:].tolist() == DIGITS[: 40 : 1 + is_wide].tolist()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_count_of_another_width_than_the_ids_is_named(folder, cache, split):
    known = {"vocab_size": 65, "tokens": {split: 3000}}
    for name in ("train", "val"):
        write_tokens(folder, np.arange(1, 6001) % 65, name, **known)
    refused(folder, cache, 'meta.json says 3000 tokens of 2 bytes; .*"tokens"', split)
    known |= {"vocab_size": 9}
    write_tokens(folder, np.arange(3000) % 10, split, stored="<u4", **known)
    refused(folder, cache, "holds id 9 at position 9, but the vocabulary size", split)


def test_a_stated_width_is_refused_if_the_count_is_that_of_wide_ids(
    folder, cache, caplog
):
    known = {"vocab_size": 65, "dtype": "uint16", "tokens": {"train": 3000}}
    write_tokens(folder, np.arange(3000) % 65, stored="<u4", **known)
    refused(folder, cache, "looks like uint32, not uint16: correct dtype in meta.json")
    assert not caplog.text


def test_a_stated_width_at_which_every_second_id_is_0_is_doubted(folder, cache, caplog):
    doubt = "has id 0 at every second place, like uint32 ids that are read as uint16"
    known = BARE | {"dtype": "uint16"}
    write_tokens(folder, np.arange(1, 6001), stored="<u4", **known)
    open_corpus(str(folder), cache).tokens("train")
    assert doubt in caplog.text
    for ids, more in (
        (np.arange(6000), {}),
        (DIGITS, {"tokens": {"train": len(DIGITS)}}),
    ):
        caplog.clear()
        write_tokens(folder, ids, **known, **more)
        open_corpus(str(folder), cache).tokens("train")
        assert doubt not in caplog.text


def test_all_splits_have_the_width_of_the_largest(folder, cache):
    write_tokens(folder, np.arange(1, 3001) % 11, vocab_size=11)
    write_tokens(folder, DIGITS[:12], "val")
    assert open_corpus(str(folder), cache).tokens("val")[:].tolist() == list(
        DIGITS[:12]
    )
    os.truncate(folder / "val.bin", 0)
    refused(folder, cache, r"val\.bin is empty: write", "val")
    write_tokens(folder, DIGITS[:40:2], "val", stored="<u4")  # It may be wide.
    refused(
        folder, cache, r"val\.bin looks like uint32, but .*train\.bin like u", "val"
    )
    write_tokens(folder, DIGITS, "val")  # It is long enough to be of another width.
    refused(folder, cache, "either uint32 ids, or uint16 ids", "val")
    wide = np.arange(1, 3001) * 33
    write_tokens(folder, wide, stored="<u4", vocab_size=100_000)
    write_tokens(folder, wide[:9], "val", stored="<u4")
    assert open_corpus(str(folder), cache).tokens("val")[:].tolist() == list(wide[:9])
    os.truncate(folder / "val.bin", 34)
    refused(folder, cache, r"val\.bin is truncated: it has 34 bytes", "val")
    write_tokens(folder, wide, stored="<u4", vocab_size=100_000, dtype="uint16")
    refused(folder, cache, "looks like uint32, not uint16: correct dtype")


def test_meta_json_beside_meta_pickle_is_believed_unless_they_differ(folder, cache):
    write_tokens(folder, [0, 1], vocab_size=2, tokenizer="letters")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 2, "itos": ["a"]}))
    assert open_corpus(str(folder), cache).characters is None
    (folder / "meta.pkl").write_bytes(b"junk")
    assert open_corpus(str(folder), cache).vocab_size == 2
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3}))
    refused(
        folder, cache, r"json gives vocab_size 2, but meta\.pkl beside it 3: correct"
    )
    write_tokens(folder, [0, 1], vocab_size=2, itos=["a", "b"])
    for itos, reason in (({1: "b"}, None), (["b", "a"], "id 0 the text 'a', but meta")):
        known = pickle.dumps({"vocab_size": 2, "itos": itos})
        (folder / "meta.pkl").write_bytes(known)
        if reason:
            refused(folder, cache, reason)
        else:
            assert open_corpus(str(folder), cache).characters == ("a", "b")


def text_ids(tokenizer="gpt2", split="val"):
    """Ids of real text, with the tokenizer 'letters' or one of RANKS."""
    text = "".join(sotu_documents(split))[:150_000]
    if tokenizer == "letters":
        letters = sorted(set(text))
        return [letters.index(letter) for letter in text]
    return load_tokenizer(tokenizer).encode_ordinary(text)


BARE = {"vocab_size": 65536}  # Every uint16 is an id: only statistics tell.


@pytest.mark.parametrize(
    ("tokenizer", "stored", "layout"),
    [
        ("gpt2", ">u2", "big-endian uint16"),
        ("sotu4096", ">u2", "big-endian uint16"),
        ("letters", ">u2", "big-endian uint16"),
        ("gpt2", ">u4", "big-endian uint32"),
        ("gpt2", ">i8", "big-endian int64"),
        ("letters", "u1", "uint8"),
        ("letters", "<f4", "float32"),
        ("letters", "<f2", "float16"),
        ("gpt2", "<f2", "float16"),
        ("gpt2", "<f4", "float32"),
        ("gpt2", "<f8", "float64"),
    ],
)
def test_ids_of_another_layout_are_refused_although_each_is_in_the_vocabulary(
    folder, cache, tokenizer, stored, layout
):
    ids = text_ids(tokenizer)
    write_tokens(folder, ids, stored=stored, **BARE)
    refused(folder, cache, f"looks like {layout}, not little-endian uint16: write .*")
    size = (folder / "train.bin").stat().st_size
    stated = {"dtype": "uint16", "tokens": {"train": size // 2}}
    (folder / "meta.json").write_text(json.dumps(BARE | stated))
    assert len(open_corpus(str(folder), cache).tokens("train")) == size // 2


def test_wide_ids_beyond_the_vocabulary_are_not_read_as_pairs(folder, cache):
    ids = np.array(text_ids()) + 30_000  # Some are above 65,535.
    for stored, cut in (("<u4", 0), ("<u4", 2), ("<i8", 0)):
        write_tokens(folder, ids, stored=stored, **BARE)
        file = folder / "train.bin"
        os.truncate(file, file.stat().st_size - cut)
        refused(folder, cache, "looks like u?int")


@pytest.mark.parametrize("chunk", [1000, 1 << 20])
def test_an_end_of_zeros_is_refused_with_the_command_that_cuts_it_off(
    chunk, folder, cache, monkeypatch
):
    monkeypatch.setattr(token_array, "_CHUNK_TOKENS", chunk)
    for tokenizer in ("letters", "gpt2"):
        ids = text_ids(tokenizer)
        for zeros in (1500, len(ids)):
            write_tokens(folder, [*ids, *[0] * zeros], **BARE)
            refused(folder, cache, f"{zeros:,} zeros after {len(ids):,} ids, .*: cut")
        command = rf"truncate -s {2 * len(ids)} '.*/my data/train\.bin'; or, if it"
        refused(folder, cache, command)
    write_tokens(folder, [0] * 5000, **BARE)
    refused(folder, cache, "ends in 5,000 zeros after 0 ids, .*: write its ids")


@pytest.mark.parametrize("stored", ["<u2", "<u4"])
@pytest.mark.parametrize(
    "holes",
    [[(0, 30)], [(31, 33)], [(20, 60), (80, 100)], [(5, 7), (30, 32), (70, 72)]],
)
def test_parts_that_were_not_filled_are_refused(
    holes, stored, folder, cache, monkeypatch
):
    ids = np.resize(text_ids(), 100_000) % 4000 + 1
    size = {"vocab_size": 100_000 if stored == "<u4" else 65_536}
    for start, stop in holes:
        ids[1000 * start : 1000 * stop] = 0
    for chunk in (1 << 12, 1 << 22):  # Holes go on in the next piece.
        monkeypatch.setattr(content, "_CHUNK_BYTES", chunk)
        write_tokens(folder, ids, stored=stored, **size)
        refused(folder, cache, r"at least [0-9,]+ zeros in a row near id .*not filled")
    meta = {"dtype": "uint16" if stored == "<u2" else "uint32"}
    write_tokens(folder, ids, stored=stored, **size, **meta, tokens={"train": 100_000})
    assert len(open_corpus(str(folder), cache).tokens("train")) == 100_000


def test_a_few_padded_documents_are_no_file_that_was_not_filled(folder, cache):
    for count in (4, 8, 17):
        documents = [
            [*text_ids()[: 900 + 190 * n], *[0] * (3196 - 190 * n)]
            for n in range(count)
        ]
        ids = np.concatenate(documents)
        write_tokens(folder, ids, **BARE)
        assert len(open_corpus(str(folder), cache).tokens("train")) == len(ids)
    for zeros, words in ((1023, None), (1088, "zeros in a row near id")):
        ids = np.array(text_ids())[:20_000] % 4000 + 1
        ids[3200 : 3200 + zeros] = 0
        write_tokens(folder, ids, **BARE)
        if words:
            refused(folder, cache, words)
        else:
            assert len(open_corpus(str(folder), cache).tokens("train")) == len(ids)


def test_long_series_of_zeros_are_found_over_the_borders_of_pieces(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(content, "_CHUNK_BYTES", 640)
    words = np.ones(64 * 1000, np.uint8)
    wanted = []
    for n in range(40):  # More than are kept; the longest are at the end.
        start = 64 * (9 + 20 * n)  # In the last block of a piece, and beyond it.
        stop = start + 64 * (1 + n // 3)
        words[start:stop] = 0
        wanted.append([start, stop])
    words.tofile(tmp_path / "train.bin")
    found = content._read(tmp_path / "train.bin").zeros
    assert len(found) == 32
    assert found == [one for one in wanted if one in found]
    assert found[-20:] == wanted[-20:]


def test_unusual_ids_are_not_taken_for_another_layout(folder, cache):
    random = np.random.default_rng(0)
    ids = np.array(text_ids("letters"))
    zipf = np.minimum(random.zipf(1.5, 40_000) - 1, 65_535)
    cases = [
        text_ids(),
        text_ids("sotu4096"),
        ids,
        np.where(ids == 2, 0, ids),
        [*ids, *[0] * 400],  # padding
        np.repeat(ids[:300], 300),
        np.tile([*ids[:90], *[0] * 2000], 30),  # padded documents
        np.arange(40_000),
        np.arange(1, 65_000) % 257,
        random.permutation(65_536)[zipf],
        *(random.integers(0, size, 40_000) for size in (2, 300, 4096, 50_257, 65_536)),
        load_tokenizer("gpt2").encode_ordinary(
            "日本語の文章です。今日は晴れ。\n" * 2000
        ),
        load_tokenizer("gpt2").encode_ordinary("é🙂 \r\n\t  x\n" * 3000),
    ]
    for ids in cases:
        write_tokens(folder, ids, **BARE)
        assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == list(ids)
    wide = np.array(text_ids()) * 2
    write_tokens(folder, wide, stored="<u4", vocab_size=100_600)
    assert open_corpus(str(folder), cache).tokens("train")[:].tolist() == wide.tolist()


def litdata_chunk(*items):
    """As litdata 0.2 writes them: a number, the places of the items, their bytes."""
    ends = itertools.accumulate(map(len, items), initial=4 * (len(items) + 2))
    places = np.array([len(items), *ends], "<u4")
    return b"".join([places.tobytes(), *items])


def npy(array):
    """The content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


TRUE_IDS = np.array(
    load_tokenizer("gpt2").encode_ordinary("It was a bright day. " * 99)
)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (npy(TRUE_IDS.astype("<u2")), r"it is a \.npy file: write its ids with tofile"),
        (npy(TRUE_IDS), r"it is a \.npy file"),
        (pickle.dumps(TRUE_IDS.tolist()), "it is a pickle"),
        (pickle.dumps(TRUE_IDS.tolist(), 2), "it is a pickle"),
        (gzip.compress(TRUE_IDS.tobytes(), mtime=0), "it is compressed"),
        (TEXT.encode(), r"it is text: name it train\.txt"),
        (b"It was a bright day", "it is text"),
        ("It was a bright day".encode("utf-16"), "in UTF-16: convert it with iconv -f"),
        ((20240520).to_bytes(4, "little") + bytes(1020), "it is llm.c's"),
        (b"LITPKDS" + struct.pack("<QBQ", 1, 8, 512) + bytes(1024), "it is lit-gpt's"),
        (litdata_chunk(TRUE_IDS.tobytes()), "it is a chunk of litdata: read its"),
        (litdata_chunk(*[bytes(range(2, 40))] * 9), "it is a chunk of litdata"),
    ],
)
@pytest.mark.parametrize("vocab_size", [None, 50257, 65536])
def test_what_is_no_token_file_is_refused_by_its_name(
    folder, cache, content, match, vocab_size
):
    (folder / "train.bin").write_bytes(content)
    if vocab_size:
        (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size}))
    refused(folder, cache, match)


@pytest.mark.parametrize("stated", [{"dtype": "uint16"}, {"tokens": {"train": 300}}])
def test_a_line_tells_that_uint16_holds_no_high_id(stated, folder, cache, said):
    """nanoGPT's scripts write uint16, whatever the tokenizer: high ids are others."""
    ids = np.arange(300, dtype=np.uint32) * 400
    ids.astype(np.uint16).tofile(folder / "train.bin")
    meta = {"vocab_size": 128_256} | stated
    (folder / "meta.json").write_text(json.dumps(meta))
    open_corpus(str(folder), cache).tokens("train")
    assert [line for line in said() if "holds no id above 65,535" in line]


def test_ids_of_other_tokenizers_do_not_pass_as_gpt2s(folder, cache):
    text = "".join(sotu_documents("val"))[:100_000]
    letters = sorted(set(text))
    for ids in (
        [letters.index(letter) for letter in text],
        list(text.encode()),
        load_tokenizer("sotu4096").encode_ordinary(text),
        np.random.default_rng(0).integers(0, 50257, 20_000),
    ):
        write_tokens(folder, ids)
        refused(folder, cache, "other ids than gpt2's, .*data.tokenizer=gpt2 if they")
        # Who says so is believed.
        assert len(open_corpus(str(folder), cache, "gpt2").tokens("train")) == len(ids)
    for other in (text, "日本語の文章です。\n" * 900, "é🙂 \r\n\t  x\n" * 3000):
        write_tokens(folder, load_tokenizer("gpt2").encode_ordinary(other))
        assert open_corpus(str(folder), cache).tokenizer == "gpt2"
        open_corpus(str(folder), cache).tokens("train")


# Refused sources


def test_one_text_file_is_cut_into_splits_at_lines(tmp_path, cache):
    lines = [f"Line {number} of é🙂.\n" for number in range(400)]
    file = tmp_path / "folder" / "input.txt"
    file.parent.mkdir()
    file.write_text("\ufeff" + "".join(lines), encoding="utf-8")
    (file.parent / "notes.md").write_text("not a text of the corpus")
    tokenizer, told = load_tokenizer("gpt2"), []
    for source in (file, file.parent):
        corpus = open_corpus(str(source), cache)
        texts = {
            split: tokenizer.decode(corpus.tokens(split)[:].tolist())
            for split in ("train", "val", "test")
        }
        told.append(texts)
    assert told[0] == told[1]
    notices = [find_source(str(source)).notice for source in (file, file.parent)]
    assert notices[1] == f"{notices[0]}; not read as text: notes.md"
    assert "".join(text.replace(END_OF_TEXT, "") for text in texts.values()) == (
        "".join(lines)
    )
    for text in texts.values():
        assert text.replace(END_OF_TEXT, "").endswith("\n")
    sizes = [text.count("Line") for text in texts.values()]
    assert [round(size / 20) for size in sizes] == [18, 1, 1]
    first = find_source(str(file)).fingerprints()
    file.write_text("".join(lines[1:]), encoding="utf-8")
    assert find_source(str(file)).fingerprints() != first


def test_a_known_corpus_tells_of_a_file_or_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_source("sotu").notice == ""
    (tmp_path / "sotu").write_text("my text")
    assert "not the file sotu here: give --config.data.source=./sotu for the file" in (
        find_source("sotu").notice
    )


def test_one_line_of_text_is_cut_between_characters(tmp_path):
    path = tmp_path / "line.txt"
    path.write_text("é🙂日" * 50, encoding="utf-8")
    places = single_text.parts(path)
    texts = ["".join(single_text.read_part(path, *place)) for place in places.values()]
    assert "".join(texts) == "é🙂日" * 50
    assert [len(text) for text in texts] == pytest.approx([135, 7.5, 7.5], abs=1)


@pytest.mark.parametrize("count", [1, 2, 15])
def test_lines_that_are_longer_than_a_split_are_cut(count, tmp_path):
    path = tmp_path / "lines.txt"
    text = ("é" * (1500 // count) + "\n") * count
    path.write_text(text, encoding="utf-8")
    places = single_text.parts(path)
    texts = ["".join(single_text.read_part(path, *place)) for place in places.values()]
    assert "".join(texts) == text
    assert [len(part) for part in texts] == pytest.approx([1350, 75, 75], abs=20)


def test_a_source_that_is_not_a_folder_is_refused(tmp_path, cache):
    refused(tmp_path / "nowhere", cache, "nowhere' does not exist: give 'sotu'")
    for name in ("train.bin", "lines.jsonl", "text"):
        (tmp_path / name).write_text("text\n" * 99)
        refused(tmp_path / name, cache, r"does not end in \.txt, \.raw, \.tok")
    (tmp_path / "link").symlink_to("nowhere")
    refused(tmp_path / "link", cache, "link' is a link to nothing")
    refused("", cache, r"data\.source is empty: .*\. is the current folder")


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("input.md", b"text", "nothing recognisable.*train.txt and val.txt"),
        ("input.txt", b"text", "too short to be cut into splits, val would be empty"),
        ("input.txt", b"caf\xe9\n" * 99, "not UTF-8: byte 0xe9 in line 1"),
        ("val.txt", b"", r"val\.txt is empty"),
        ("train+test.txt", b"text", "more than one split"),
        ("train.txt", b"fine\ncaf\xe9\n", "not UTF-8: byte 0xe9 in line 2"),
        ("train.bin", b"", r"train\.bin is empty: write its tokens again"),
        ("train.bin", b"\1\0\2", "truncated: it has 3 bytes, which must be a multiple"),
        ("train.bin", b"\1\0", r"train\.bin holds a single token: at least 2 are"),
        ("val.bin", b"\1\0", r"no 'train' split.*present: val"),
        (
            "train.bin",
            bytes([1, 0, 0, 0] * 99),
            r'json beside it: \{"vocab_size": 50257, "tokenizer": "gpt2", "dtype": "u',
        ),
    ],
)
def test_unusable_files_are_refused(folder, cache, name, content, match):
    (folder / name).write_bytes(content)
    refused(folder, cache, match)


@pytest.mark.parametrize("tokens", [None, 3, [3], "3", {"train": "3"}, {"train": -3}])
def test_a_meta_file_with_damaged_counts_is_refused(folder, cache, tokens):
    write_tokens(folder, [1, 2, 3], vocab_size=65, tokens=tokens)
    refused(folder, cache, r"meta\.json is damaged: 'tokens' must give")


def test_tokenizer_that_is_unknown_or_contradicts_meta_is_refused(folder, cache):
    (folder / "train.txt").write_text("text")
    refused(folder, cache, "unknown tokenizer 'bert'", tokenizer="bert")
    write_tokens(folder, [1], vocab_size=4096, tokenizer="sotu4096")
    refused(folder, cache, "unknown tokenizer 'bert'", tokenizer="bert")
    refused(folder, cache, "made by 'sotu4096', not 'gpt2'", tokenizer="gpt2")


def test_first_id_beyond_the_vocabulary_is_named(folder, cache):
    tokens = np.zeros(2_200_000, int)
    tokens[[1_200_000, 2_100_000]] = 65, 99
    write_tokens(folder, tokens, vocab_size=65)
    refused(folder, cache, "id 65 at position 1200000.*vocabulary size is 65")


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({"tokens": {"train": 4}}, "has 6 bytes, but meta.json says 4 tokens of 2"),
        ({"tokenizer": "sotu4096"}, "vocab_size 10, but tokenizer 'sotu4096' has 4096"),
        (
            {"vocab_size": 4096, "tokenizer": "sotu4096", "tokenizer_sha256": "00"},
            "another version of tokenizer 'sotu4096' made",
        ),
        *(
            ({"vocab_size": size}, "vocab_size .*must be a whole number from 1")
            for size in (0, "65", 65.0, True, None, 10**12)
        ),
        ({"dtype": "int64"}, "must be uint16 or uint32"),
        ({"dtype": ["uint16"]}, "must be uint16 or uint32"),
    ],
)
def test_meta_that_contradicts_the_files_is_refused(folder, cache, meta, match):
    write_tokens(folder, [1, 2, 3], **{"vocab_size": 10, **meta})
    refused(folder, cache, match)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("meta.json", content) for content in (b"{", b"\xff\xfe\x00", b"[1]", b"")),
        ("meta.pkl", b""),
        ("meta.pkl", b"junk"),
        ("meta.pkl", pickle.dumps({"a": 1})[:-3]),
        ("meta.pkl", pickle.dumps([65])),
        ("meta.pkl", pickle.dumps(collections.OrderedDict(vocab_size=65))),
        ("meta.pkl", b"\x80\x04\x95"),
    ],
)
def test_meta_file_that_is_not_a_plain_dict_is_refused(folder, cache, name, content):
    write_tokens(folder, [1])
    (folder / name).write_bytes(content)
    problem = (
        "damaged" if name == "meta.json" else r"refused.*dict of plain values \(\w"
    )
    refused(folder, cache, f"{name} is {problem}")


def test_pickle_that_asks_for_code_is_refused_and_not_run(folder, cache, tmp_path):
    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'hit')!r}, 'w')",)

    write_tokens(folder, [1])
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Attack()}))
    refused(folder, cache, r"meta\.pkl is refused.*asks for builtins\.exec")
    assert not (tmp_path / "hit").exists()


def test_ids_of_a_text_that_look_like_letters_are_used_once_it_is_tokenized(
    folder, cache
):
    for split in ("train", "val"):  # One id stands for it, again and again.
        (folder / f"{split}.txt").write_text("é" * 40_000 + split, "utf-8")
    corpus = open_corpus(str(folder), cache, "gpt2")
    assert len(set(corpus.tokens("train")[:1000].tolist())) < 3
    assert len(open_corpus(str(folder), cache, "gpt2").tokens("val")) > 1000
