"""Tokenizers that a person names for a model that lost its own."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pcagpt.data import lost_tokenizer
from pcagpt.data.meta import CorpusInfo
from pcagpt.data.vocabulary_files import letters_of
from pcagpt.errors import UserError
from pcagpt.run.own_tokens import OwnTokens
from pcagpt.run.trained import Run

tokenizer_folders = pytest.importorskip(
    "tokenizer_folders", reason="needs the extra hf"
)
ROWS = 5000
OTHER = r"id \d is .*came with the model \(.* ids differ\): name the model's own"


@pytest.fixture
def right(tmp_path):
    """A tokenizer.json that is not the model's folder's."""
    folder = tmp_path / "right"
    folder.mkdir()
    tokenizer_folders.byte_level(folder)
    return folder / "whole" / "tokenizer.json"


def ids(file):
    return json.loads(file.read_text())["model"]["vocab"]


@pytest.fixture
def wrong(right, tmp_path):
    """The same tokens with other ids."""
    content = json.loads(right.read_text())
    texts = sorted(content["model"]["vocab"], key=ids(right).get)
    texts = [*texts[:3], *texts[53:], *texts[3:53]]
    content["model"]["vocab"] = {text: number for number, text in enumerate(texts)}
    (tmp_path / "wrong").mkdir()
    found = tmp_path / "wrong" / "tokenizer.json"
    found.write_text(json.dumps(content))
    return found


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama"
    folder.mkdir()
    table = np.random.default_rng(0).normal(size=(ROWS, 8)).astype(np.float32)
    save_file({"model.embed_tokens.weight": table}, folder / "model.safetensors")
    sizes = {"vocab_size": ROWS, "hidden_size": 8}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(named | sizes))
    return folder


def in_vocab(folder, right):
    (folder / "vocab.json").write_text(json.dumps(ids(right)))


def in_lines(folder, right):
    texts = sorted(ids(right), key=ids(right).get)
    texts[1] = "\u2028"  # It ends no line. Only one other text is no refusal.
    (folder / "vocab.txt").write_text("\n".join(texts) + "\n", "utf-8")


def in_added_tokens(folder, right):
    some = dict(list(ids(right).items())[3:9])
    (folder / "added_tokens.json").write_text(json.dumps(some))


def in_settings(folder, right):
    some = list(ids(right).items())[3:9]
    decoder = {str(number): {"content": text} for text, number in some}
    content = json.dumps({"added_tokens_decoder": decoder})
    (folder / "tokenizer_config.json").write_text(content)


@pytest.mark.parametrize("state", [in_vocab, in_lines, in_added_tokens, in_settings])
def test_what_is_left_of_a_models_tokenizer_refuses_another_one(
    state, llama, right, wrong, said
):
    state(llama, right)
    tokens = Run.open(llama, any_architecture=True).tokens
    assert tokens.record["tokenizer"] is None
    corpus = CorpusInfo("text", ("val",), ROWS, None)
    assert tokens.tokenizer_name(str(right)) == str(right)
    tokens.check_is_told(corpus, str(right))
    # One text of `in_lines` is another one.
    assert len(said()) == (state is in_lines)
    with pytest.raises(UserError, match=OTHER):
        tokens.tokenizer_name(str(wrong))
    with pytest.raises(UserError, match=OTHER):
        tokens.check_is_told(corpus, str(wrong))


def test_the_tokens_of_a_gguf_file_refuse_another_tokenizer(right, wrong, tmp_path):
    for package in ("gguf", "transformers"):
        pytest.importorskip(package, reason="needs the extra hf")
    import gguf_files

    file = tmp_path / "own.gguf"
    # No program here knows how this one cuts a text.
    gguf_files.write(file, right, says={"pre": "a-new-cut"})
    tokens = Run.open(file, any_architecture=True).tokens
    assert tokens.record["tokenizer"] is None
    assert tokens.tokenizer_name(str(right)) == str(right)
    with pytest.raises(UserError, match=OTHER):
        tokens.tokenizer_name(str(wrong))


def test_a_smaller_tokenizer_with_the_same_first_ids_is_refused(llama, right, said):
    in_vocab(llama, right)
    content = json.loads(right.read_text())
    vocab = content["model"]["vocab"]
    lost = sorted(vocab, key=vocab.get)[-40:]
    content["model"]["vocab"] = {t: n for t, n in vocab.items() if t not in lost}
    right.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"is '' in .*\(40 of .* ids differ"):
        lost_tokenizer.check_is_models(llama, str(right))


@pytest.mark.parametrize("field", ["run", "run_from_here"])
def test_a_compressed_table_knows_the_files_of_its_model(
    field, llama, right, wrong, tmp_path
):
    in_vocab(llama, right)
    folder = tmp_path / "advised"
    folder.mkdir()
    path = {"run": str(llama), "run_from_here": "../llama"}[field]
    record = {"vocab_size": ROWS, "tokenizer": None, "compressed": {field: path}}
    tokens = OwnTokens(folder, record)
    assert tokens.tokenizer_name(str(right)) == str(right)
    with pytest.raises(UserError, match=OTHER):
        tokens.tokenizer_name(str(wrong))


def test_few_other_texts_are_a_line_and_rows_without_a_token_are_none(
    llama, right, said
):
    texts = {number: text for text, number in ids(right).items()}
    texts |= {7: "<unused>", 9: f" {texts[9]}"}
    vocab = {text: number for number, text in texts.items()}
    (llama / "vocab.json").write_text(json.dumps(vocab))
    lost_tokenizer.check_is_models(llama, str(right))
    (line,) = said()
    assert line.startswith("id 7 is ") and "(1 of " in line


@pytest.mark.parametrize("write", [str, lambda text: letters_of(text.encode())])
def test_a_corpus_of_characters_is_compared_with_a_models_vocabulary(
    write, llama, said
):
    characters = ("", "\n", " ", "é", *"abcdefghij")
    vocab = {write(text): number for number, text in enumerate(characters) if text}
    vocab["<pad>"] = len(characters)  # No corpus has it.
    (llama / "vocab.json").write_text(json.dumps(vocab))
    tokens = Run.open(llama, any_architecture=True).tokens
    corpus = CorpusInfo("text", ("val",), ROWS, None, characters=characters)
    tokens.check_is_told(corpus, "auto")
    assert not said()
    other = (*characters[:4], *characters[:3:-1])
    corpus = dataclasses.replace(corpus, characters=other)
    with pytest.raises(UserError, match=r"id 4 is 'j' in text, and .*\(10 of 13"):
        tokens.check_is_told(corpus, "auto")


def test_token_files_that_lost_their_meta_file_are_told(tmp_path):
    tokens = OwnTokens(tmp_path, {"vocab_size": 12, "characters": list("abcdefghijkl")})
    corpus = CorpusInfo("copy", ("val",), 50257, "gpt2", is_assumed=True)
    with pytest.raises(UserError, match=r"copy has no meta file.* knows 12 tokens"):
        tokens.check(corpus)


def test_a_gguf_file_without_tokens_takes_a_tokenizer(tmp_path, right, monkeypatch):
    (tmp_path / "own.gguf").touch()

    def refuse(file):
        raise UserError(f"{file} has no tokenizer")

    monkeypatch.setattr(lost_tokenizer.gguf_header, "tokenizer_fields", refuse)
    lost_tokenizer.check_is_models(tmp_path / "own.gguf", str(right))


def test_odd_numbers_of_added_tokens_do_no_harm(llama, right, said):
    decoder = {"9" * 5000: {"content": "a"}, "x": {"content": "b"}, "3": 7}
    content = json.dumps({"added_tokens_decoder": decoder})
    (llama / "tokenizer_config.json").write_text(content)
    lost_tokenizer.check_is_models(llama, str(right))
    assert not said()


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
        "tekken.json",
        "added_tokens.json",
        "tokenizer_config.json",
    ],
)
def test_what_cannot_be_compared_is_named(name, llama, right, said):
    (llama / name).write_bytes(b"\x0a\x0e\xff")
    lost_tokenizer.check_is_models(llama, str(right))
    (line,) = said()
    assert line.startswith(f"{llama / name} is of the tokenizer of {llama}, and could")
