"""Tokenizers in files: the same ids as the programs that they come from."""

import base64
import json
import re
import shutil
import sys
from pathlib import Path

import gpt2_folders
import numpy as np
import pytest
import tokenizer_folders
import tokenizers
from command_line import CONFIGS, call, refusal, tiny
from runs import json_of, snapshot
from tokenizer_folders import HARD_TEXT, SIZE, TEXT
from tokenizers import normalizers, pre_tokenizers

import pcagpt
from pcagpt import file_hashes, json_files
from pcagpt.data import (
    file_tokenizer,
    hugging_face_tokenizer,
    packaged_tokenizers,
    tokenize,
    tokenizer_files,
    tokenizer_settings,
    vocabulary,
    vocabulary_files,
)
from pcagpt.data.corpus import open_corpus
from pcagpt.data.meta import read_meta
from pcagpt.data.tokenizer import ASSETS, RANKS, load_tokenizer
from pcagpt.errors import UserError, warn_once
from pcagpt.file_hashes import sha256_of_file
from pcagpt.run.trained import Run


@pytest.fixture(scope="session")
def byte_level(shared):
    return shared("byte_level", tokenizer_folders.byte_level)


@pytest.fixture(scope="session")
def word_level(shared):
    return shared("word_level", tokenizer_folders.word_level)


# Which tokenizer a file holds.


@pytest.fixture(scope="session")
def gpt2_merges():
    """The merges of GPT-2, as merges.txt has them."""
    encoding = load_tokenizer("gpt2")
    tokens = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    pairs = hugging_face_tokenizer._merges(list(tokens))
    return [" ".join(map(vocabulary_files.letters_of, pair)) for pair in pairs]


def test_merges_that_change_later_are_noticed(gpt2_merges, tmp_path, monkeypatch):
    monkeypatch.setattr(file_hashes, "is_settled", lambda _: True)
    vocab = json.dumps(packaged_tokenizers.ids_by_text_of("gpt2"))
    (tmp_path / "vocab.json").write_text(vocab)
    for merges, name in ((gpt2_merges, "gpt2"), ([], str(tmp_path / "vocab.json"))):
        (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        assert vocabulary.in_folder(tmp_path) == name


def test_a_tokenizer_is_parsed_few_times(byte_level, tmp_path, monkeypatch):
    """It takes seconds for some."""
    path = shutil.copy(byte_level / "whole/tokenizer.json", tmp_path)
    parsed, parse = [], json_files.parse_json
    monkeypatch.setattr(file_hashes, "is_settled", lambda _: True)
    monkeypatch.setattr(
        json_files, "parse_json", lambda *given: parsed.append(1) or parse(*given)
    )
    name = vocabulary.name_of(str(path))
    vocabulary.describe(name)
    vocabulary.load(name)
    vocabulary.drops_characters(name)
    # Its tokens, its merges (for what they lack, and for a known name), its settings.
    assert len(parsed) <= 4


def test_the_files_of_gpt2_have_its_name(gpt2_merges, tmp_path):
    vocab = packaged_tokenizers.ids_by_text_of("gpt2")
    known = {"!": 0, "Ċ": 198, "Ġthe": 262, "<|endoftext|>": 50256}
    assert {text: vocab[text] for text in known} == known
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert vocabulary.in_folder(tmp_path) is None  # Without its merges.
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *gpt2_merges]))
    assert vocabulary.in_folder(tmp_path) == "gpt2"
    cut = "\n".join(["#version: 0.2", *gpt2_merges[:20_000], ""])
    (tmp_path / "merges.txt").write_text(cut)
    assert vocabulary.in_folder(tmp_path) == str(tmp_path / "vocab.json")
    model = {"type": "BPE", "vocab": vocab, "merges": gpt2_merges}
    whole = {
        "model": model,
        "added_tokens": [{"id": 50256, "content": "<|endoftext|>"}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "normalizer": None,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert vocabulary.in_folder(tmp_path) == "gpt2"
    pairs = {"model": model | {"merges": [one.split() for one in gpt2_merges]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | pairs))
    assert vocabulary.in_folder(tmp_path) == "gpt2"
    end = whole["added_tokens"][0]
    for change in (
        {"model": model | {"merges": gpt2_merges[:20_000]}},
        {"model": model | {"merges": None}},
        {"model": model | {"ignore_merges": True}},
        {"added_tokens": []},
        {"added_tokens": [end | {"rstrip": True}]},
        {"pre_tokenizer": whole["pre_tokenizer"] | {"use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"added_tokens": [{"id": 50257, "content": "[PAD]"}]},
        {"added_tokens": [end, {"id": vocab["ing"], "content": "ing"}]},
    ):
        (tmp_path / "tokenizer.json").write_text(json.dumps(whole | change))
        assert vocabulary.in_folder(tmp_path) == str(tmp_path / "tokenizer.json")
    ranks = shutil.copy(ASSETS / "sotu4096.tiktoken", tmp_path / "some.tiktoken")
    assert vocabulary.name_of(str(ranks)) == "sotu4096"
    assert vocabulary.describe(str(ranks)) == RANKS["sotu4096"]


def test_a_tokenizer_json_gives_the_ids_of_its_program(byte_level):
    file = byte_level / "whole/tokenizer.json"
    theirs, ours = tokenizers.Tokenizer.from_file(str(file)), vocabulary.load(str(file))
    for text in (TEXT, HARD_TEXT, "one<|endoftext|>two"):
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert (ours.n_vocab, ours.eot_token) == (theirs.get_vocab_size(), 0)
    assert vocabulary.describe(str(file)).vocab_size == ours.n_vocab


def test_a_vocabulary_with_merges_gives_the_same_ids(byte_level):
    whole, parts = (
        vocabulary.load(str(byte_level / name)) for name in ("whole", "parts")
    )
    for text in (TEXT, HARD_TEXT, "one<|endoftext|>two"):
        assert parts.encode(text) == whole.encode(text)
        assert parts.decode(parts.encode(text)) == text
    assert (parts.n_vocab, parts.eot_token) == (whole.n_vocab, whole.eot_token)


@pytest.mark.parametrize(
    "names",
    [["truncation"], ["padding"], ["model"], ["truncation", "padding", "model"]],
)
def test_what_a_file_asks_for_does_not_change_the_ids_of_a_text(
    names, byte_level, tmp_path
):
    plain = json.loads((byte_level / "whole/tokenizer.json").read_text())
    cut = {"max_length": 4, "stride": 0, "strategy": "LongestFirst"}
    filled = {"pad_id": 0, "pad_token": "<|endoftext|>", "pad_type_id": 0}
    filled |= {"strategy": "BatchLongest", "direction": "Right"}
    asked = {
        "truncation": cut | {"direction": "Right"},
        "padding": filled | {"pad_to_multiple_of": None},
        "model": plain["model"] | {"dropout": 0.9},
    }
    made = plain | {name: asked[name] for name in names}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    ours = vocabulary.load(str(tmp_path / "tokenizer.json"))
    plain = vocabulary.load(str(byte_level / "whole/tokenizer.json"))
    assert ours.encode(TEXT) == plain.encode(TEXT)
    assert ours.encode_batch([TEXT, "a"]) == plain.encode_batch([TEXT, "a"])
    # Text that an earlier version tokenized as asked is not taken for this tokenizer's.
    file = tmp_path / "tokenizer.json"
    assert vocabulary.describe(str(file)).sha256 != sha256_of_file(file)


def test_the_end_of_text_in_the_config_beside_is_part_of_the_tokenizer(
    word_level, tmp_path
):
    folder, found = shutil.copytree(word_level, tmp_path / "own"), set()
    for end in ("<s>", "</s>"):
        text = json.dumps({"eos_token": end})
        (folder / "tokenizer_config.json").write_text(text)
        found.add(vocabulary.describe(str(folder / "tokenizer.json")).sha256)
    assert len(found) == 2


def test_special_tokens_map_names_the_end_of_text_as_in_transformers(
    word_level, tmp_path
):
    folder = shutil.copytree(word_level, tmp_path / "own")
    file = str(folder / "tokenizer.json")
    ids = vocabulary.load(file).whole()["added_tokens"]
    id_of = {one["content"]: one["id"] for one in ids}
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<unk>"}')
    assert vocabulary.load(file).eot_token == id_of["<unk>"]
    config = {"eos_token": "</s>", "added_tokens_decoder": {}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert vocabulary.load(file).eot_token == id_of["</s>"]


END = "<|endoftext|>"
PLAIN = {"content": END, "lstrip": False, "special": True}
ADDED = PLAIN | {"__type": "AddedToken"}
OTHER = "another special token: "
NO_END = dict.fromkeys(("bos_token", "eos_token", "unk_token"))
CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"


@pytest.mark.parametrize(
    ("place", "content", "words"),
    [
        (CONFIG, {}, None),
        (CONFIG, {"eos_token": END, "bos_token": ADDED, "unk_token": None}, None),
        (CONFIG, NO_END | {"added_tokens_decoder": {"0": PLAIN}}, None),
        (CONFIG, {"add_bos_token": False}, None),
        (MAP, {"eos_token": END}, None),
        (CONFIG, {"eos_token": "</s>"}, f"{OTHER}.*</s>"),
        (
            CONFIG,
            {"eos_token": ADDED | {"lstrip": True}},
            OTHER + ".*lstrip",
        ),
        (
            CONFIG,
            {"additional_special_tokens": ["</s>"]},
            f"{OTHER}.*</s>",
        ),
        (CONFIG, {"added_tokens_decoder": {"1": {"content": "</s>"}}}, "token: .*</s>"),
        (CONFIG, NO_END, r"has no special token <\|endoftext\|>"),
        (MAP, {"pad_token": "</s>"}, f"{OTHER}.*</s>"),
        ("added_tokens.json", {"</s>": 1}, "how </s> is cut, which added_tokens"),
    ],
)
def test_a_vocabulary_with_other_special_tokens_is_refused(
    place, content, words, byte_level, tmp_path
):
    """transformers finds each special token in a text before it cuts the rest."""
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(byte_level / "parts", tmp_path / "own")
    vocab = json.loads((folder / "vocab.json").read_text())
    (token,) = (text for text, number in vocab.items() if number == 1)
    vocab = {text: number for text, number in vocab.items() if number != 1}
    vocab |= {"</s>": 1, token: max(vocab.values()) + 1}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / place).write_text(json.dumps(content))
    text = f"The end. </s>The start {END}. {TEXT}"
    wanted = transformers.GPT2Tokenizer.from_pretrained(folder)(text).input_ids
    if not words:
        assert vocabulary.load(str(folder)).encode(text) == wanted
        return
    with pytest.raises(UserError, match=rf"own/vocab\.json .*{words}.*save it as"):
        vocabulary.load(str(folder))


def test_a_vocabulary_without_the_end_of_text_is_refused(byte_level, tmp_path):
    folder = shutil.copytree(byte_level / "parts", tmp_path / "own")
    vocab = json.loads((folder / "vocab.json").read_text())
    del vocab[END]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(UserError, match=r"has no special token <\|endoftext"):
        vocabulary.load(str(folder))


PARTS = ("whole", "parts")


@pytest.mark.parametrize(
    ("name", "beside", "words"),
    [
        (
            "parts",
            {"tokenizer_class": "Qwen2TokenizerFast"},
            "is of Qwen2TokenizerFa",
        ),
        ("parts", {"tokenizer_class": "GPT2TokenizerFast"}, None),
        ("whole", {"tokenizer_class": "Qwen2TokenizerFast"}, None),
        (
            "whole",
            {"added_tokens_decoder": {"9": {"content": "<new>"}}},
            "lacks the tok",
        ),
        ("whole", {"added_tokens_decoder": {"0": {"content": "<|endoftext|>"}}}, None),
        (
            "whole",
            {"added_tokens_decoder": {"7": {"content": "<|endoftext|>"}}},
            r"has the token <\|endoftext\|> as 0, and tokenizer_config.json as 7: save",
        ),
        *((name, {"add_prefix_space": True}, "puts no space") for name in PARTS),
        *((name, {"add_prefix_space": False}, None) for name in PARTS),
    ],
)
def test_a_tokenizer_of_another_kind_than_its_file_is_refused(
    name, beside, words, byte_level, tmp_path
):
    folder = shutil.copytree(byte_level / name, tmp_path / "own")
    (folder / "tokenizer_config.json").write_text(json.dumps(beside))
    file = vocabulary.in_folder(folder)
    if not words:
        assert vocabulary.load(file).encode(TEXT)
        return
    with pytest.raises(UserError, match=f"own/.*json {words}"):
        vocabulary.load(file)


@pytest.mark.parametrize("name", PARTS)
def test_added_tokens_beside_a_tokenizer_must_be_in_it(name, byte_level, tmp_path):
    folder = shutil.copytree(byte_level / name, tmp_path / "own")
    file = vocabulary.in_folder(folder)
    for added, words in (
        ({"<|endoftext|>": 0}, None),
        ({"<|endoftext|>": 7}, r"as 0, and added_tokens.json as 7"),
        ({"<new>": 300}, "lacks the token <new>, which added_tokens.json adds"),
    ):
        (folder / "added_tokens.json").write_text(json.dumps(added))
        if not words:
            assert vocabulary.load(file).encode(TEXT)
            continue
        with pytest.raises(UserError, match=words):
            vocabulary.load(file)


def test_added_tokens_that_transformers_does_not_read_are_no_matter(
    byte_level, tmp_path
):
    folder = shutil.copytree(byte_level / "whole", tmp_path / "own")
    (folder / "added_tokens.json").write_text('{"<new>": 300}')
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {}}')
    assert vocabulary.load(str(folder)).encode(TEXT)


@pytest.mark.parametrize("change", [{"added_tokens": 5}, {"merges": [5]}])
def test_a_damaged_tokenizer_like_gpt2s_is_refused(change, gpt2_merges, tmp_path):
    vocab = packaged_tokenizers.ids_by_text_of("gpt2")
    end = [{"id": 50256, "content": "<|endoftext|>"}]
    made = {"pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": end} | change
    model = {"type": "BPE", "vocab": vocab, "merges": gpt2_merges} | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(made | {"model": model}))
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        vocabulary.load(vocabulary.in_folder(tmp_path))


@pytest.mark.parametrize("later", ["{}", '{"model": 5}'])
def test_a_tokenizer_that_changes_while_it_is_read_ends_in_no_traceback(
    later, gpt2_merges, tmp_path, monkeypatch
):
    path = tmp_path / "tokenizer.json"
    end = [{"id": 50256, "content": "<|endoftext|>", "special": True}]
    made = {"pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": end}
    path.write_text(
        json.dumps(made | {"model": {"merges": gpt2_merges, "type": "BPE"}})
    )
    merges_of = packaged_tokenizers._merges_of_gpt2s_kind
    assert merges_of(path) == gpt2_merges
    before = packaged_tokenizers.fields_of(path)
    path.write_text(later)
    monkeypatch.setattr(packaged_tokenizers, "fields_of", lambda _: before)
    assert merges_of(path) is None


@pytest.mark.parametrize("name", PARTS)
def test_merges_that_were_cut_off_are_noticed(name, byte_level, tmp_path, caplog):
    folder = shutil.copytree(byte_level / name, tmp_path / "own")
    whole = json.loads((byte_level / "whole/tokenizer.json").read_text())
    merges = whole["model"]["merges"]
    count, place = len(merges), "merges.txt" if name == "parts" else "tokenizer.json"
    for kept in (count, count - 1, (count + 1) // 2, count // 2 - 1, 0):
        whole["model"]["merges"] = merges[:kept]
        lines = ["#version: 0.2", *(" ".join(one) for one in merges[:kept]), ""]
        text = "\n".join(lines) if name == "parts" else json.dumps(whole)
        (folder / place).write_text(text)
        warn_once.cache_clear()
        caplog.clear()
        said = f"no merge makes {count - kept} of {count} tokens"
        for read in (vocabulary.describe, vocabulary.load):
            if 2 * kept < count:
                words = re.escape(f"{folder / place} is damaged ({said})")
                with pytest.raises(UserError, match=words):
                    read(str(folder))
            else:
                assert read(str(folder))
        lines = [one for one in caplog.messages if one.startswith(f"{folder / place}:")]
        assert [said in one for one in lines] == [True] * (count / 2 <= kept < count)


def test_gpt2_with_other_files_beside_is_not_taken_for_gpt2(gpt2_merges, tmp_path):
    vocab = json.dumps(packaged_tokenizers.ids_by_text_of("gpt2"))
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *gpt2_merges]))
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(UserError, match="no space before a text, unlike tokenizer_c"):
        vocabulary.load(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        *(
            ({"model_type": f"{name}2"}, f"is of {name}2, which cuts text in another w")
            for name in tokenizer_settings._OTHER_CUTS
        ),
        ({"tokenizer_class": "CTRLTokenizer"}, "is of CTRLTokenizer, which cuts"),
        ({"model_type": "gpt2", "x": float("inf")}, None),
    ],
)
def test_a_vocabulary_of_another_kind_of_model_is_refused(
    config, words, byte_level, tmp_path
):
    folder = shutil.copytree(byte_level / "parts", tmp_path / "own")
    (folder / "config.json").write_text(json.dumps(config))
    file = str(folder / "vocab.json")
    for read in (vocabulary.describe, vocabulary.load):
        if words:
            with pytest.raises(UserError, match=words):
                read(file)
        else:
            assert read(file)


def test_the_class_of_the_tokenizer_goes_before_the_class_in_the_model(
    byte_level, tmp_path
):
    folder = shutil.copytree(byte_level / "parts", tmp_path / "own")
    kinds = "GPT2Tokenizer", "CTRLTokenizer"
    for own, of_model in (kinds, kinds[::-1]):
        for name, kind in (("tokenizer_config", own), ("config", of_model)):
            content = json.dumps({"tokenizer_class": kind})
            (folder / f"{name}.json").write_text(content)
        if own == "GPT2Tokenizer":
            assert vocabulary.load(str(folder)).encode(TEXT)
            continue
        with pytest.raises(UserError, match="is of CTRLTokenizer, which cuts"):
            vocabulary.load(str(folder))


def test_a_vocabulary_without_a_letter_for_each_byte_is_no_gpt2_s(byte_level, tmp_path):
    folder = shutil.copytree(byte_level / "parts", tmp_path / "own")
    ids = json.loads((folder / "vocab.json").read_text())
    words = {"a</w>": len(ids), **{text: n for text, n in ids.items() if text != "Ġ"}}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "config.json").write_text('{"model_type": "blenderbot-small"}')
    for read in (vocabulary.describe, vocabulary.load):
        with pytest.raises(UserError, match="has no token Ġ, so it cuts text in anoth"):
            read(str(folder))


def test_a_relative_path_in_a_meta_file_is_beside_it(
    byte_level, word_level, tmp_path, monkeypatch
):
    monkeypatch.chdir(word_level)
    file = str(shutil.copy(byte_level / "whole/tokenizer.json", tmp_path))
    size = vocabulary.describe(file).vocab_size
    meta = {"vocab_size": size, "dtype": "uint16", "tokenizer": "tokenizer.json"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert read_meta(tmp_path, "auto").tokenizer == file
    # A run may be opened from another working directory than it was made in.
    monkeypatch.chdir(tmp_path.parent)
    folder = tmp_path.relative_to(tmp_path.parent)
    assert read_meta(folder, "auto").tokenizer == file
    assert read_meta(folder, file).tokenizer == file
    # Nothing is taken from the working directory, even if it fits.
    (tmp_path / "inside").mkdir()
    shutil.copy(tmp_path / "meta.json", tmp_path / "inside")
    monkeypatch.chdir(tmp_path)
    assert read_meta(tmp_path / "inside", "auto").tokenizer is None


def test_a_rank_file_gives_its_ranks_and_then_the_end_of_text(tmp_path):
    lines = (ASSETS / "sotu4096.tiktoken").read_bytes().splitlines()[:1000]
    (tmp_path / "mine.tiktoken").write_bytes(b"\n".join(lines))
    mine = vocabulary.load(str(tmp_path / "mine.tiktoken"))
    assert (mine.n_vocab, mine.eot_token) == (1001, 1000)
    assert mine.decode(mine.encode(HARD_TEXT)) == HARD_TEXT
    token, rank = lines[700].split()
    assert mine.encode(base64.b64decode(token).decode()) == [int(rank)]


def test_the_end_of_text_may_be_named_in_the_config_beside(word_level):
    assert vocabulary.load(str(word_level)).eot_token == 1


def test_the_end_of_text_may_be_named_in_the_config_of_the_model(word_level, tmp_path):
    file = shutil.copy(word_level / "tokenizer.json", tmp_path)
    config, lost = tmp_path / "config.json", vocabulary.describe(file)
    for stated, end in ((1, 1), ([50256, 1], 1), (5, None), (50256, None)):
        config.write_text(json.dumps({"eos_token_id": stated}))
        assert vocabulary.load(file).eot_token == end, stated
        same = word_level if end else file
        wanted = vocabulary.describe(str(same)).sha256 if end else lost.sha256
        assert vocabulary.describe(file).sha256 == wanted
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<unk>"}')
    config.write_text('{"eos_token_id": 1}')
    assert vocabulary.load(file).eot_token == 0


def test_the_mark_of_a_text_is_the_end_of_the_tokenizer_only_if_allowed(word_level):
    found = vocabulary.load(str(word_level))
    one, two = found.encode("one"), found.encode("two")
    text = "one<|endoftext|>two<|endoftext|>"
    assert found.encode(text, allowed_special={"<|endoftext|>"}) == [*one, 1, *two, 1]
    assert 1 not in found.encode(text)


# What a file serves.


def test_text_is_tokenized_as_a_whole_where_cuts_change_the_ids(
    word_level, tmp_path, monkeypatch
):
    folder = tmp_path / "text"
    folder.mkdir()
    long = TEXT * 2000
    (folder / "train.txt").write_text(long)
    corpus = open_corpus(str(folder), tmp_path / "cache", str(word_level))
    theirs = tokenizers.Tokenizer.from_file(str(word_level / "tokenizer.json"))
    assert corpus.tokens("train")[:].tolist() == [1, *theirs.encode(long).ids]
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer_files, "load", None)  # It is not needed.
        words = 2000 * (len(TEXT.split()) + TEXT.count("\n"))
        size = 2000 * len(TEXT.encode())
        assert corpus.text_size("train") == (words, size)
    again = open_corpus(str(folder), tmp_path / "cache", str(word_level))
    assert (again.folder, again.tokenizer) == (corpus.folder, corpus.tokenizer)


@pytest.mark.parametrize(
    ("parts", "drops"),
    [
        ([], False),
        ([normalizers.NFC()], False),
        ([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")], False),  # Llama 2's
        ([normalizers.Strip()], True),
        ([normalizers.NFKC(), normalizers.Replace(tokenizers.Regex(" +"), " ")], True),
        ([normalizers.Replace("x", ""), normalizers.Lowercase()], True),
    ],
    ids=["none", "nfc", "llama2", "strip", "spaces", "removed"],
)
def test_cached_tokens_of_earlier_versions_are_made_again(
    parts, drops, byte_level, place
):
    made = tokenizers.Tokenizer.from_file(str(byte_level / "whole/tokenizer.json"))
    made.normalizer = normalizers.Sequence(parts)
    made.save("tokenizer.json")
    now = open_corpus("text", place / "cache", "tokenizer.json")
    assert len(now.older) == 1 + drops  # They lost characters; others had odd cuts.
    for number, earlier in enumerate(now.older, 1):
        shutil.copytree(now.folder, earlier)
        tokens = np.roll(np.fromfile(earlier / "train.bin", "<u2"), number)
        tokens.tofile(earlier / "train.bin")
        meta = json.loads((earlier / "meta.json").read_text())
        for name in ("tokens_sha256", "unknown_tokens", "unended_documents", "sha256"):
            del meta[name]
        (earlier / "meta.json").write_text(json.dumps(meta))
        again = open_corpus("text", place / "cache", "tokenizer.json")
        assert again.folder == now.folder
        record = {"corpus": open_corpus(str(earlier), place / "cache").content}
        assert str(earlier) in now.older_tokens(record, place / "cache")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a text."""
    place = tmp_path / "place"
    (place / "text").mkdir(parents=True)
    for split in ("train", "val"):
        (place / "text" / f"{split}.txt").write_text(TEXT * 9)
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def folder(byte_level, tmp_path):
    """A model with its own tokenizer."""
    made = gpt2_folders.write(tmp_path / "theirs", vocab_size=SIZE)
    shutil.copy(byte_level / "whole/tokenizer.json", made)
    return made


SMALL = {"n_layer": 2}


def swap_two_tokens(file):
    """Edits a tokenizer.json: the last two tokens get the id of the other."""
    whole = json.loads(file.read_text())
    ids = whole["model"]["vocab"]
    one, other = list(ids)[-2:]
    ids[one], ids[other] = ids[other], ids[one]
    file.write_text(json.dumps(whole))


@pytest.mark.usefixtures("quick")
def test_a_model_with_a_tokenizer_is_evaluated_compressed_and_sampled_with_it(
    folder, place
):
    before = snapshot(folder)
    asked = {"model_path": folder, "model": SMALL}
    outcome = call(*tiny("evaluate.py", "text", **asked))
    assert outcome.code == 0, outcome
    protocol = json.loads(outcome.out)["protocol"]
    assert protocol["tokenizer"] == str(folder / "tokenizer.json")
    swept = asked | {"ranks": 4, "compress": {"methods": "svd", "bits": 8, "bands": 1}}
    assert call(*tiny("compress.py", "text", **swept)).code == 0
    made = place / "checkpoints/compressed/best_k4"
    for model in (folder, made):
        knobs = {"model_path": model, "sample.prompt": "The", "sample.tokens": 5}
        words = [f"--config.{knob}={value}" for knob, value in knobs.items()]
        outcome = call(f"--config={CONFIGS / 'sample.py'}", *words)
        assert outcome.code == 0 and outcome.out.startswith("The"), outcome
    assert snapshot(folder) == before
    # The compressed model names the tokenizer by its path, and has its hash.
    swap_two_tokens(folder / "tokenizer.json")
    for config, *knobs in (
        ("sample.py", "--config.sample.prompt=The"),
        ("export.py",),
        ("evaluate.py", "--config.data.source=text"),
    ):
        words = f"--config={CONFIGS / config}", f"--config.model_path={made}", *knobs
        line = refusal(*words, unchanged=[made])
        assert "tokenizer" in line and str(made) in line


def config_of(**fields):
    return "tokenizer_config.json", json.dumps(fields)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("vocab.json", "{}", True),
        ("merges.txt", "a b", True),
        ("added_tokens.json", "{}", True),
        ("spiece.model", "x", True),
        ("vocab.txt", "x", True),
        ("tokenizer.json", None, True),
        ("vocab.json", None, True),
        ("merges.txt", None, True),
        ("tokenizer_config.json", None, True),
        ("vocab.txt", None, True),
        (*config_of(tokenizer_class="TokenizersBackend"), True),
        (*config_of(eos_token="</s>"), True),
        (*config_of(add_prefix_space=True), True),
        ("special_tokens_map.json", '{"eos_token": "</s>"}', True),
        (*config_of(tokenizer_class="GPT2Tokenizer", eos_token=END), False),
        (*config_of(model_max_length=1024), False),
        ("generation_config.json", "{}", False),
    ],
)
def test_gpt2s_tokens_are_not_taken_where_a_tokenizer_was_lost(
    name, content, named, tmp_path, caplog
):
    """`content` is None for a link to nothing."""
    sizes = {"vocab_size": 50257, "n_embd": 2, "n_head": 1, "n_layer": 1}
    folder = gpt2_folders.write(tmp_path / "theirs", **sizes)
    path = folder / name
    path.symlink_to("nowhere") if content is None else path.write_text(content)
    if named:
        with pytest.raises(UserError, match=rf"^{path} is .*download"):
            Run.open(folder)
        return
    warn_once.cache_clear()
    assert Run.open(folder).record["tokenizer"] == "gpt2"
    assert caplog.messages == [
        f"{folder} has no tokenizer: the 50,257 rows of its table are taken for "
        "GPT-2's tokens"
    ]


@pytest.mark.usefixtures("quick")
def test_a_run_that_was_trained_on_it_finds_its_tokenizer_by_hash(
    byte_level, folder, place, monkeypatch
):
    moved = shutil.copytree(byte_level / "whole", place / "mine")
    knobs = {"data": {"tokenizer": "mine"}, "init": {"weights_from": folder}}
    outcome = call(*tiny("recover.py", "text", **knobs, model=SMALL))
    assert outcome.code == 0, outcome
    (run,) = (place / "checkpoints").glob("gpt_*")
    assert json_of(run / "config.json")["tokenizer"] == str(moved / "tokenizer.json")
    (place / "below").mkdir()
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir(place / "below")
        run_of = f"--config={CONFIGS / 'evaluate.py'}", f"--config.model_path={run}"
        outcome = call(*run_of)
    assert outcome.code == 0, outcome
    moved.rename(place / "elsewhere")
    ask = f"--config={CONFIGS / 'sample.py'}", f"--config.model_path={run}"
    line = refusal(*ask, unchanged=[run])
    assert "is gone: restore it" in line and "--config.data.tokenizer" in line
    outcome = call(
        *ask, "--config.data.tokenizer=elsewhere", "--config.sample.tokens=3"
    )
    assert outcome.code == 0, outcome
    other = "--config.data.tokenizer=gpt2"
    assert "was trained on tokens of" in refusal(*ask, other, unchanged=[run])
    # An edited file is told in one line, which is true of every command.
    shutil.copytree(place / "elsewhere", moved)
    swap_two_tokens(moved / "tokenizer.json")
    text, tokenizer = "--config.data.source=text", "--config.data.tokenizer=mine"
    changed = f"{moved}/tokenizer.json is another tokenizer now than the one of {run}"
    for command in (ask, run_of, (*run_of, text), (*ask, tokenizer)):
        assert changed in refusal(*command, unchanged=[place])
    old = "--config.data.tokenizer=elsewhere"
    assert call(*run_of, old).code == call(*run_of, text, old).code == 0


# What is refused.


@pytest.mark.usefixtures("quick")
def test_a_teacher_whose_tokenizer_was_edited_is_refused_also_on_bare_ids(
    folder, place
):
    knobs = {"init": {"weights_from": folder}, "model": SMALL}
    assert call(*tiny("recover.py", "text", **knobs)).code == 0
    (run,) = (place / "checkpoints").glob("gpt_*")
    for split in ("train", "val"):
        ids = np.arange(600, dtype=np.uint16) % SIZE
        (place / "bare").mkdir(exist_ok=True)
        ids.tofile(place / "bare" / f"{split}.bin")
    (place / "bare" / "meta.json").write_text(json.dumps({"vocab_size": SIZE}))
    taught = {"init": {"weights_from": run}, "distill": {"teacher": folder}}
    command = tiny("recover.py", "bare", **taught, model=SMALL)
    outcome = call(*command, "--config.workdir=before")
    assert outcome.code == 0, outcome
    swap_two_tokens(folder / "tokenizer.json")
    line = refusal(*command, "--config.workdir=after", unchanged=[folder, run])
    assert f"{folder} numbers its tokens in another way than {run}: restore" in line
    assert not (place / "after").exists()


def test_a_tokenizer_with_more_tokens_than_the_table_is_refused(folder, place):
    gpt2_folders.write(folder)
    asked = {"model_path": folder, "model": SMALL}
    line = refusal(*tiny("evaluate.py", "text", **asked), unchanged=[folder, place])
    assert "tokens, but its table 97 rows: give both" in line


def test_an_export_has_the_chat_template(folder, place):
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    words = f"--config={CONFIGS / 'export.py'}", f"--config.model_path={folder}"
    assert call(*words).code == 0
    made = place / "checkpoints/exported/theirs_hf"
    assert (made / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.usefixtures("quick")
def test_added_tokens_may_have_no_row_if_the_text_has_none(folder, place):
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    size = len(whole["model"]["vocab"])
    gpt2_folders.write(folder, vocab_size=size)
    pad = {"id": size, "content": "[PAD]", "special": True, "normalized": False}
    pad |= {"single_word": False, "lstrip": False, "rstrip": False}
    whole["added_tokens"] = [*whole.get("added_tokens", ()), pad]
    before = call(*tiny("evaluate.py", "text", model_path=folder, model=SMALL)).out
    file.write_text(json.dumps(whole))
    assert vocabulary.describe(str(file)).vocab_size == size + 1
    asked = {"model_path": folder, "model": SMALL}
    outcome = call(*tiny("evaluate.py", "text", **asked))
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["loss"] == json.loads(before)["loss"]
    swept = asked | {"ranks": 4, "compress": {"methods": "context", "bands": 1}}
    assert call(*tiny("compress.py", "text", **swept)).code == 0
    words = f"--config={CONFIGS / 'sample.py'}", f"--config.model_path={folder}"
    for prompt, code in (("The", 0), ("The [PAD]", 2)):
        ask = f"--config.sample.prompt={prompt}", "--config.sample.tokens=5"
        assert call(*words, *ask).code == code
    model = pcagpt.load(folder)
    for use in (model.loss, model.logits, model.generate):
        with pytest.raises(UserError, match=f"^token id {size} is unknown"):
            use("The [PAD]")
    assert "".join(model.generate("The", max_tokens=5, seed=3))
    text = place / "text/val.txt"
    text.write_text(text.read_text() + " [PAD] The")
    outcome = call(*tiny("evaluate.py", "text", **asked))
    assert outcome.code == 2
    said = f"the val split of text has the added token with id {size}, but {folder}"
    assert said in outcome.err.splitlines()[-1]


@pytest.mark.usefixtures("quick")
def test_ids_between_those_of_a_tokenizer_are_not_drawn_and_have_no_text(tmp_path):
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 90}, "a")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = gpt2_folders.write(tmp_path / "theirs")
    tokenizer.save(str(folder / "tokenizer.json"))
    drawn = {"model_path": folder, "sample.prompt": "b", "sample.tokens": 99}
    words = [f"--config.{knob}={value}" for knob, value in drawn.items()]
    outcome = call(f"--config={CONFIGS / 'sample.py'}", *words)
    assert len(outcome.out.split()) == 100, outcome
    model = pcagpt.load(folder)
    assert len("".join(model.generate("b", max_tokens=99)).split()) == 99
    assert model.decode([1, 90, 2]) == "b d c"
    for use in (model.decode, model.generate):
        with pytest.raises(UserError, match="^token id 50 is unknown: the tokenizer"):
            use([1, 50, 2])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("config", ["pca_k128.py", "pca_finetune_k128.py"])
def test_an_arm_gets_the_tokenizer_of_its_d_and_no_other(
    config, folder, word_level, place
):
    sizes = {"model_path": folder, "model": SMALL | {"n_embd_wte": 4}}
    other = sizes | {"data": {"tokenizer": word_level}}
    line = refusal(*tiny(config, "text", **other), unchanged=[folder])
    assert f"tokens of {word_level}/tokenizer.json, but the model of" in line
    outcome = call(*tiny(config, "text", **sizes))
    assert outcome.code == 0, outcome
    (run,) = (place / "checkpoints").glob("gpt_*")
    record = json_of(run / "config.json")
    assert record["tokenizer"] == str(folder / "tokenizer.json")


def test_without_the_package_the_line_says_how_to_install_it(
    folder, place, monkeypatch
):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    asked = {"model_path": folder, "model": SMALL}
    line = refusal(*tiny("evaluate.py", "text", **asked), unchanged=[folder, place])
    assert "can only be used with the package `tokenizers`: pip install" in line
    ids = np.arange(SIZE, dtype=np.uint16)
    (place / "ids").mkdir()
    ids.tofile(place / "ids/val.bin")
    (place / "ids/meta.json").write_text(json.dumps({"vocab_size": SIZE}))
    outcome = call(*tiny("evaluate.py", "ids", **asked))
    assert outcome.code == 0, outcome


RANK_LINES = [base64.b64encode(bytes([n])) + b" %d" % n for n in range(256)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", b"{", "tokenizer.json is damaged"),
        ("tokenizer.json", b"{}", "it has no vocabulary"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}', "it has no vocabulary"),
        ("tokenizer.json", b'{"model": {"vocab": [[]]}}', "it has no vocabulary"),
        ("mine.tiktoken", b"no ranks", "must have lines of base64 tokens"),
        ("mine.tiktoken", b"\n".join(RANK_LINES[1:]), "must have lines of base64"),
        ("mine.tiktoken", b"\n".join(RANK_LINES[:9]), "must have lines of base64"),
        ("tokenizer.model", b"", "unknown tokenizer"),
    ],
)
def test_a_damaged_or_unknown_file_is_refused(name, content, words, place):
    (place / name).write_bytes(content)
    asked = {"data": {"tokenizer": name}}
    assert words in refusal(*tiny("baseline.py", "text", **asked), unchanged=[place])


@pytest.mark.parametrize("name", PARTS)
def test_two_texts_of_one_id_are_refused(name, byte_level, tmp_path):
    folder = shutil.copytree(byte_level / name, tmp_path / "own")
    file = Path(vocabulary.in_folder(folder))
    content = json.loads(file.read_text())
    ids = content if name == "parts" else content["model"]["vocab"]
    ids.update({text: number % 200 for text, number in ids.items()})
    file.write_text(json.dumps(content))
    for read in (vocabulary.describe, vocabulary.load):
        with pytest.raises(UserError, match=r"damaged \(id \d+ has two texts, "):
            read(str(file))


def test_a_tokenizer_without_its_token_for_unknown_text_is_refused(place):
    made = {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}}
    (place / "tokenizer.json").write_text(json.dumps(made))
    asked = {"data": {"tokenizer": "tokenizer.json"}}
    line = refusal(*tiny("baseline.py", "text", **asked), unchanged=[])
    assert "tokenizer.json is damaged" in line
    assert "Missing [UNK] token from the vocabulary" in line


# Text without a token.

LETTERS = {text: number for number, text in enumerate("abcdefgh ▁Ġ.|<>")}
BPE = {"type": "BPE", "vocab": LETTERS | {"ab": 15}, "merges": ["a b"]}
UNIGRAM = {"type": "Unigram", "vocab": [[text, -1.0] for text in LETTERS]}
WORDS = {"vocab": {"[UNK]": 0, "a": 1, "b": 2}, "unk_token": "[UNK]"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
ACCENTS = {
    "type": "Sequence",
    "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
MARK = {"id": 16, "content": "<|x|>", "special": True, "normalized": False}
MARK |= {"single_word": False, "lstrip": False, "rstrip": False}


def write_whole(file, model, **parts):
    """A tokenizer.json of a model and other parts."""
    file.write_text(json.dumps({"model": model} | parts))
    return str(file)


@pytest.mark.parametrize("model", [BPE, UNIGRAM | {"unk_id": None}], ids=["bpe", "uni"])
@pytest.mark.parametrize(
    ("parts", "kept", "lacked"),
    [
        ({}, "ab a. ▁", "é"),
        ({}, "ab a. ▁", "\n"),
        ({"normalizer": ACCENTS}, "áb â", "ß"),
        ({"normalizer": {"type": "Lowercase"}}, "AB a", "É"),
        ({"normalizer": {"type": "NFD"}}, "ab", "é"),
        ({"pre_tokenizer": {"type": "WhitespaceSplit"}}, "ab\n\ta", "\u200b"),
        ({"pre_tokenizer": METASPACE}, "ab a", "日"),
        ({"pre_tokenizer": BYTES | {"use_regex": True}}, "ab a", "\n"),
        ({"normalizer": {"type": "ByteLevel"}}, "ab a", "é"),
        ({"added_tokens": [MARK]}, "a<|x|>b", "x"),
    ],
    ids=str,
)
def test_a_character_without_a_token_is_refused(parts, kept, lacked, model, tmp_path):
    file = write_whole(tmp_path / "tokenizer.json", model, **parts)
    ours, theirs = vocabulary.load(file), tokenizers.Tokenizer.from_file(file)
    assert ours.encode(kept) == theirs.encode(kept).ids == ours.encode_batch([kept])[0]
    text = f"{kept}{lacked}a"
    line = f"{file} has no token for {lacked!r}, as in {text!r}: leave it out"
    for encode in (ours.encode, lambda text: ours.encode_batch(["a", text])):
        with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
            encode(text)
    # An export has the tokenizer as it was.
    assert ours.whole() == json.loads(theirs.to_str())


@pytest.mark.parametrize(
    "model",
    [
        BPE | {"unk_token": "."},
        UNIGRAM | {"unk_id": LETTERS["."]},
        WORDS | {"type": "WordLevel"},
        WORDS | {"type": "WordPiece", "continuing_subword_prefix": "##"}
        | {"max_input_chars_per_word": 9},
    ],
    ids=["bpe", "unigram", "words", "pieces"],
)  # fmt: skip
def test_tokens_for_unknown_text_are_counted_once(model, place, caplog):
    parts = {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    file = write_whole(place / "tokenizer.json", model, **parts)
    (place / "text/val.txt").write_text("a é b a")
    (place / "text/train.txt").write_text("a b a b")
    said = "tokens of text stand for text that "
    for _ in range(2):  # Also if the text was tokenized before.
        warn_once.cache_clear()
        caplog.clear()
        corpus = open_corpus("text", place / "cache", file)
        (line,) = [line for line in caplog.messages if "stand for" in line]
        assert line.startswith(said) and "(1 of the 4 in val): a loss" in line
    unknown = corpus.tokens("val")[:][1]
    assert unknown == vocabulary.load(file).unknown
    assert corpus.unknown == {"train": 0, "val": 1}


@pytest.mark.parametrize(
    ("train", "count"),
    [(["a b"], 0), (["a b", "b a", "a"], 2), (["a <|endoftext|> b <|endoftext|>"], 2)],
)
def test_ends_of_documents_without_a_token_are_counted(train, count, place, caplog):
    parts = {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    model = WORDS | {"type": "WordLevel"}
    file = write_whole(place / "tokenizer.json", model, **parts)
    (place / "text/val.txt").write_text("a b")
    (place / "text/train.txt").unlink()
    for number, text in enumerate(train):
        (place / f"text/train.{number}.txt").write_text(text)
    for _ in range(2):  # Also if the text was tokenized before.
        warn_once.cache_clear()
        caplog.clear()
        corpus = open_corpus("text", place / "cache", file)
        assert corpus.unended == {"train": count, "val": 0}
        # <|endoftext|> is letters. The first token, an "a", is not predicted.
        size = len("".join(train).encode()) - 1
        assert corpus.text_size("train") == (len(" ".join(train).split()), size)
        lines = [line for line in caplog.messages if "ends of documents" in line]
        said = f"ends of documents of text have no token ({count} in train), because"
        assert [line.partition(" nothing")[0] for line in lines] == [said] * (count > 0)


def test_words_and_bytes_of_a_text_are_those_before_it_is_cut(
    word_level, place, monkeypatch
):
    monkeypatch.setattr(tokenize, "_PIECE_CHARACTERS", 200)
    made = tokenizers.Tokenizer.from_file(str(word_level / "tokenizer.json"))
    # A cut leaves out the space that stands for the mark, as for Llama 2.
    both = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence(list(both))
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    made.save("tokenizer.json")
    shutil.copy(word_level / "tokenizer_config.json", ".")
    text = f"{'the people free ' * 99}end{END}of{END}\nthe text"
    (place / "text/train.txt").write_text(text)
    corpus = open_corpus("text", place / "cache", "tokenizer.json")
    size = len(text.replace(END, "").encode())
    assert corpus.text_size("train") == (3 * 99 + 4 + 1, size)


def test_what_lacks_a_token_in_several_splits_is_told_in_one_line(place, caplog):
    parts = {"pre_tokenizer": {"type": "WhitespaceSplit"}}
    file = write_whole(place / "tokenizer.json", WORDS | {"type": "WordLevel"}, **parts)
    (place / "text/train.txt").write_text("a é b <|endoftext|> é")
    (place / "text/val.txt").write_text("é <|endoftext|> b")
    open_corpus("text", place / "cache", file)
    told = [line for line in caplog.messages if " token" in line]
    assert len(told) == 2
    assert "(1 in train, 1 in val), because" in told[0]
    assert re.search(r"\(\d of the \d+ in train, \d of the \d+ in val\): a", told[1])


def test_a_text_with_a_character_without_a_token_is_not_tokenized(folder, place):
    text = "ab a.\n" * 20_000
    has_lines = BPE | {"vocab": BPE["vocab"] | {"\n": 16}}
    file = write_whole(folder / "tokenizer.json", has_lines)
    (place / "text/train.txt").write_text(text)
    (place / "text/val.txt").write_text(text)
    theirs = tokenizers.Tokenizer.from_file(file).encode(text).ids
    corpus = open_corpus("text", place / "cache", file)
    assert corpus.tokens("train")[:].tolist() == theirs
    (place / "text/val.txt").write_text(f"{text}ab é{text}")
    with pytest.raises(UserError, match="no token for 'é', as in "):
        open_corpus("text", place / "cache", file)
    asked = {"model_path": folder, "model": {"n_layer": 2}}
    line = refusal(*tiny("evaluate.py", "text", **asked), unchanged=[folder, place])
    assert line.startswith(
        f"pcagpt: the val split of text: {file} has no token for 'é'"
    )


def test_a_cut_within_a_special_token_refuses_no_text(place):
    """The text around a place to cut begins within one; its letters have no token."""
    mark = MARK | {"content": f"<{'xy ' * 30}>"}
    file = write_whole(place / "tokenizer.json", BPE, added_tokens=[mark])
    text = f"ab a. {mark['content']} ab " * 2_000
    (place / "text/train.txt").write_text(text)
    (place / "text/val.txt").write_text("ab")
    corpus = open_corpus("text", place / "cache", file)
    theirs = tokenizers.Tokenizer.from_file(file).encode(text).ids
    assert corpus.tokens("train")[:].tolist() == theirs


def test_ranks_for_another_pattern_are_refused(tmp_path, monkeypatch):
    file = tmp_path / "cl100k_base.tiktoken"
    file.write_bytes(b"\n".join(RANK_LINES))
    vocabulary.load(str(file))
    other = {sha256_of_file(file): "cl100k_base"}
    monkeypatch.setattr(vocabulary_files, "_OTHER_PATTERNS", other)
    with pytest.raises(UserError, match="cl100k_base, which cuts text in another way"):
        vocabulary.load(str(file))


def test_a_nano_gpt_folder_with_a_meta_file_has_its_characters(tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'pcagpt[hf]'")
    import test_nano_gpt

    folder = test_nano_gpt.write(torch, tmp_path / "out")
    meta = {"vocab_size": 97, "itos": [chr(32 + n) for n in range(97)]}
    (folder / "meta.json").write_text(json.dumps(meta))
    assert Run.open(folder).record["characters"] == tuple(meta["itos"])


def test_an_alarm_of_the_program_is_no_damage_of_a_file(tmp_path):
    with pytest.raises(TimeoutError), file_tokenizer.naming(tmp_path):
        raise TimeoutError
