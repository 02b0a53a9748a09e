"""Tokens of another tokenizer are decoded, and encoded again by the model's."""

import json
import re
import shutil

import gpt2_folders
import numpy as np
import pytest
import tokenizer_folders
import tokenizers
from command_line import call, refusal, tiny
from runs import snapshot
from tokenizer_folders import HARD_TEXT, SIZE, TEXT
from tokenizers import normalizers, pre_tokenizers

from pcagpt.config import Settings
from pcagpt.data import corpus, decoded, token_array, tokenize, vocabulary
from pcagpt.data.corpus import describe_corpus, open_corpus
from pcagpt.errors import UserError
from pcagpt.run.trained import Run

SMALL = {"n_layer": 2}
MARK = "<|endoftext|>"
DOCUMENTS = [TEXT * 3, HARD_TEXT, "naïve 日本語 🙂" * 40, TEXT]


@pytest.fixture(scope="session")
def byte_level(shared):
    return shared("byte_level", tokenizer_folders.byte_level) / "whole"


@pytest.fixture(scope="session")
def word_level(shared):
    return shared("word_level", tokenizer_folders.word_level)


@pytest.fixture(scope="session")
def byte_fallback(shared):
    return shared("byte_fallback", tokenizer_folders.byte_fallback)


@pytest.fixture(params=["sotu4096", "byte_level", "word_level", "byte_fallback"])
def tokenizer(request):
    """The name of a tokenizer."""
    if request.param == "sotu4096":
        return request.param
    return vocabulary.name_of(str(request.getfixturevalue(request.param)))


@pytest.fixture
def small(monkeypatch):
    """Documents lie in several parts, chunks and pieces."""
    monkeypatch.setattr(decoded, "_PART", 7)
    monkeypatch.setattr(token_array, "_CHUNK_TOKENS", 50)
    monkeypatch.setattr(tokenize, "_PIECE_CHARACTERS", 150)


def text_folder(folder, documents=DOCUMENTS):
    """A folder with a text file for each document."""
    folder.mkdir()
    for number, document in enumerate(documents):
        (folder / f"{number}.train.txt").write_bytes(document.encode())
    return folder


def token_folder(folder, name, documents=DOCUMENTS, **meta):
    """A folder of the tokens of documents; each ends as in nanoGPT's corpora."""
    folder.mkdir()
    encoding, ids = vocabulary.load(name), []
    for document in documents:
        ids += [*encoding.encode(document), encoding.eot_token]
    np.array(ids, np.uint16).tofile(folder / "train.bin")
    known = {"vocab_size": encoding.n_vocab, "tokenizer": name, "dtype": "uint16"}
    meta = known | {"tokens": {"train": len(ids)}} | meta
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.mark.usefixtures("small")
def test_gpt2s_tokens_become_those_of_the_text(tokenizer, tmp_path):
    folder = token_folder(tmp_path / "gpt2", "gpt2")
    found = open_corpus(str(folder), tmp_path / "cache", encode_as=tokenizer)
    text = text_folder(tmp_path / "text")
    same = open_corpus(str(text), tmp_path / "cache", tokenizer)
    assert found.tokens("train")[:].tolist() == same.tokens("train")[:].tolist()
    assert (found.tokenizer, found.vocab_size) == (tokenizer, same.vocab_size)
    assert found.tokens_sha256("train") == same.tokens_sha256("train")


@pytest.mark.usefixtures("small")
def test_tokens_of_any_tokenizer_become_gpt2s(tokenizer, tmp_path):
    # Not every tokenizer has a token for every character.
    documents = [TEXT * 3, TEXT] if "json" in tokenizer else DOCUMENTS
    folder = token_folder(tmp_path / "theirs", tokenizer, documents)
    found = open_corpus(str(folder), tmp_path / "cache", encode_as="gpt2")
    encoding = vocabulary.load("gpt2")
    ids = [[50256, *encoding.encode(document)] for document in documents]
    assert found.tokens("train")[:].tolist() == sum(ids, [])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ends_stand", ["before", "behind"])
def test_empty_documents_keep_their_end_of_text(tokenizer, ends_stand, tmp_path):
    gpt2, other = vocabulary.load("gpt2"), vocabulary.load(tokenizer)
    texts, ids, wanted = [TEXT, "", "", TEXT, TEXT * 9, "", TEXT, ""], [], []
    for text in texts:
        found = gpt2.encode(text)
        ids += [50256, *found] if ends_stand == "before" else [*found, 50256]
        wanted += [other.eot_token, *other.encode(text)]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    np.array(ids, np.uint16).tofile(folder / "train.bin")
    meta = {"vocab_size": 50257, "tokenizer": "gpt2", "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta))
    found = open_corpus(str(folder), tmp_path / "cache", encode_as=tokenizer)
    assert found.tokens("train")[:].tolist() == wanted


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("start", ["", MARK])
def test_marks_in_a_text_become_the_ends_that_token_files_have(
    tokenizer, start, tmp_path
):
    texts = [TEXT * 3, "", TEXT, TEXT * 9, f" {TEXT} ", "a"]
    # The same text as GPT-2's tokens, which end documents there.
    encoding = vocabulary.load("gpt2")
    ids = encoding.encode(MARK + MARK.join(texts), allowed_special={MARK})
    tokens, text = tmp_path / "gpt2", tmp_path / "text"
    tokens.mkdir()
    np.array(ids, np.uint16).tofile(tokens / "train.bin")
    meta = {"vocab_size": 50257, "tokenizer": "gpt2", "dtype": "uint16"}
    (tokens / "meta.json").write_text(json.dumps(meta))
    text.mkdir()
    (text / "train.txt").write_text(start + MARK.join(texts))
    same = open_corpus(str(tokens), tmp_path / "cache", encode_as=tokenizer)
    found = open_corpus(str(text), tmp_path / "cache", tokenizer)
    assert found.tokens("train")[:].tolist() == same.tokens("train")[:].tolist()
    assert sum(found.tokens("train")[:] == vocabulary.load(tokenizer).eot_token) == 6


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_character_of_several_tokens_may_lie_in_two_parts(kind, tmp_path, request):
    name = vocabulary.name_of(str(request.getfixturevalue(kind)))
    documents = [*DOCUMENTS, "日本語の文章です。" * 40, "\ufffd" * 40, "a\ufffd"]
    folder = token_folder(tmp_path / "theirs", name, documents)
    found = open_corpus(str(folder), tmp_path / "cache", encode_as="gpt2")
    text = vocabulary.load("gpt2").decode(found.tokens("train")[:].tolist())
    assert text.split("<|endoftext|>") == ["", *documents]


def test_characters_become_tokens(tmp_path):
    letters = sorted(set(TEXT))
    folder = tmp_path / "characters"
    folder.mkdir()
    ids = np.array([letters.index(letter) for letter in TEXT * 9], np.uint16)
    ids.tofile(folder / "train.bin")
    meta = {"vocab_size": len(letters), "itos": letters, "tokens": {"train": len(ids)}}
    (folder / "meta.json").write_text(json.dumps(meta | {"dtype": "uint16"}))
    found = open_corpus(str(folder), tmp_path / "cache", encode_as="gpt2")
    assert vocabulary.load("gpt2").decode(found.tokens("train")[1:]) == TEXT * 9


def test_tokens_that_the_model_knows_or_that_nobody_numbered_stay(tmp_path):
    folder = token_folder(tmp_path / "same", "gpt2")
    found = open_corpus(str(folder), tmp_path / "cache", encode_as="gpt2")
    assert found.folder == folder
    folder = token_folder(tmp_path / "bare", "gpt2", tokenizer=None)
    found = open_corpus(str(folder), tmp_path / "cache", encode_as="sotu4096")
    assert found.folder == folder
    assert not (tmp_path / "cache").exists()


def test_that_ids_without_a_text_are_lost_is_said(tmp_path, said):
    folder = tmp_path / "characters"
    folder.mkdir()
    np.array([2, 0, 3, 1] * 99, np.uint16).tofile(folder / "train.bin")
    meta = {"vocab_size": 4, "itos": ["", "\ufffd", "a", "b"], "dtype": "uint16"}
    (folder / "meta.json").write_text(json.dumps(meta))
    found = open_corpus(str(folder), tmp_path / "cache", encode_as="gpt2")
    text = vocabulary.load("gpt2").decode(found.tokens("train")[1:])
    assert text == "ab\ufffd" * 99
    (line,) = said()
    assert line.endswith("by gpt2; 2 of the ids stand for no text and are lost")


NOTHING = {"itos": [""] * vocabulary.load("gpt2").n_vocab}


@pytest.mark.parametrize(
    "meta", [{"tokenizer": "theirs"}, {"itos": {"1": "a"}}, NOTHING]
)
def test_tokens_without_a_text_are_refused(meta, tmp_path):
    folder = token_folder(tmp_path / "theirs", "gpt2", **{"tokenizer": None} | meta)
    with pytest.raises(UserError, match="does not tell their text: give the text"):
        describe_corpus(str(folder), encode_as="sotu4096")
    assert not (tmp_path / "cache").exists()


def test_tokens_are_encoded_once_until_they_change(tmp_path, monkeypatch):
    made = []
    write = corpus.write_token_folder
    monkeypatch.setattr(
        corpus, "write_token_folder", lambda *a: made.append(a[0]) or write(*a)
    )
    folder = token_folder(tmp_path / "gpt2", "gpt2")

    def opened(name="sotu4096"):
        return open_corpus(str(folder), tmp_path / "cache", encode_as=name).folder

    first = opened()
    assert (opened(), len(made)) == (first, 1)
    shutil.rmtree(folder)
    token_folder(folder, "gpt2", DOCUMENTS[:2])
    second = opened()
    monkeypatch.setattr(decoded, "_WAY", 1)  # that of an older version
    third = opened()
    assert len({first, second, third}) == 3 and made == [first, second, third]
    assert sorted((tmp_path / "cache").glob("gpt2-*")) == sorted(made)


def test_no_more_than_a_part_is_decoded_at_a_time(tmp_path, monkeypatch):
    folder, most = token_folder(tmp_path / "gpt2", "gpt2", [TEXT * 5000]), []
    encoding = vocabulary.load("gpt2")

    class Watched(type(encoding)):
        def __init__(self):
            self.__dict__ = encoding.__dict__

        def decode(self, ids):
            most.append(len(ids))
            return encoding.decode(ids)

    load = vocabulary.load
    monkeypatch.setattr(
        decoded.vocabulary, "load", lambda n: Watched() if n == "gpt2" else load(n)
    )
    open_corpus(str(folder), tmp_path / "cache", encode_as="sotu4096")
    assert len(most) > 5 and max(most) < decoded._PART + 99


@pytest.mark.parametrize("document", ["日" * 9000, "a" * 9000], ids=["日", "a"])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(
    document, word_level, monkeypatch
):
    monkeypatch.setattr(tokenize, "_PIECE_CHARACTERS", 200)
    monkeypatch.setattr(tokenize, "_LONGEST_PIECE", 1000)
    encode = vocabulary.load(str(word_level)).encode
    blocks = (document[start : start + 90] for start in range(0, 9000, 90))
    pieces = list(
        tokenize._pieces(blocks, lambda text: tokenize._checked_cut(encode, text))
    )
    texts = [piece.text for piece in pieces]
    assert "".join(texts) == document and max(map(len, texts)) < 3000


def test_a_space_that_a_tokenizer_marks_is_left_out_at_a_cut(word_level, monkeypatch):
    monkeypatch.setattr(tokenize, "_PIECE_CHARACTERS", 200)
    made = tokenizers.Tokenizer.from_file(str(word_level / "tokenizer.json"))
    both = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")  # As Llama 2's.
    made.normalizer = normalizers.Sequence(list(both))
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    text = "the people free " * 99

    def encode(text):
        return made.encode(text).ids

    pieces = list(
        tokenize._pieces([text], lambda text: tokenize._checked_cut(encode, text))
    )
    texts = [piece.text for piece in pieces]
    assert len(texts) > 1 and sum(map(encode, texts), []) == encode(text)
    assert "".join(piece.text + piece.left_out for piece in pieces) == text
    assert [piece.left_out for piece in pieces[:-1]] == [" "] * (len(pieces) - 1)


@pytest.mark.parametrize(
    ("normalizer", "end", "between"),
    [
        (normalizers.Strip(), ",", "\n"),
        (normalizers.Replace(tokenizers.Regex(r"\A\s+|\s+\z"), ""), ",", " "),
        (normalizers.StripAccents(), "", "\u0301"),
        (normalizers.BertNormalizer(), "", "\x01"),
        (normalizers.Nmt(), "", "\x01"),
    ],
    ids=["strip", "replace", "accents", "bert", "nmt"],
)
def test_a_text_is_not_cut_where_a_tokenizer_drops_all_around(normalizer, end, between):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    alphabet = ["\n", " ", ",", *"abcdefghijklmnopqrstuvwxyz"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, initial_alphabet=alphabet, show_progress=False
    )
    words = re.findall("[a-z]+", TEXT.lower()) * 9
    made.train_from_iterator(words, trainer)
    text = "".join(
        f"{word}{end}{between * (number % 9 * 20)}" for number, word in enumerate(words)
    )

    def encode(text):
        return made.encode(text).ids

    cuts = {
        tokenize._checked_cut(encode, text[:size]) for size in range(1200, 4000, 41)
    }
    assert len(cuts) > 5
    for stop, start in cuts - {None}:
        assert encode(text[:stop]) + encode(text[start:]) == encode(text)


# What commands make of it.


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with GPT-2's tokens and a model of another tokenizer."""
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    folder = token_folder(tmp_path / "place/tokens", "gpt2", [TEXT * 9])
    shutil.copy(folder / "train.bin", folder / "val.bin")
    return tmp_path / "place"


@pytest.fixture
def model(byte_level, tmp_path):
    made = gpt2_folders.write(tmp_path / "theirs", vocab_size=SIZE)
    shutil.copy(byte_level / "tokenizer.json", made)
    return made


@pytest.mark.usefixtures("quick")
def test_commands_encode_tokens_again_for_a_model_of_another_program(
    model, place, said
):
    before = [snapshot(model), snapshot(place / "tokens")]
    asked = {"model_path": model, "model": SMALL}
    outcome = call(*tiny("evaluate.py", "tokens", **asked))
    assert outcome.code == 0, outcome
    line = "the tokens in tokens are those of gpt2: they are decoded, and encoded again"
    assert sum(line in other for other in said()) == 1
    protocol = json.loads(outcome.out)["protocol"]
    assert protocol["tokenizer"] == str(model / "tokenizer.json")
    factorized = asked | {"ranks": 4, "factorize": {"method": "kl"}}
    swept = asked | {"ranks": 4, "compress": {"methods": "svd", "bits": 8, "bands": 1}}
    for config, knobs in (("factorize.py", factorized), ("compress.py", swept)):
        for _ in "again", "once more":
            outcome = call(*tiny(config, "tokens", **knobs))
            assert outcome.code == 0, outcome
    stored = json.loads(
        (place / "checkpoints/pca_factorized/metadata.json").read_text()
    )
    opened = open_corpus("tokens", place / "checkpoints/data", encode_as=str(model))
    assert stored["calibration_sha256"] == opened.tokens_sha256("train")
    # A compressed model needs the same tokens.
    made = place / "checkpoints/compressed/best_k4"
    outcome = call(*tiny("evaluate.py", "tokens", model_path=made, model=SMALL))
    assert outcome.code == 0, outcome
    (tokens,) = (place / "checkpoints/data").glob("tokens-*")
    hidden = ".pcagpt-content.json"
    after = [snapshot(model), snapshot(place / "tokens")]
    for one, other in zip(before, after, strict=True):
        assert one == {name: v for name, v in other.items() if hidden not in str(name)}


def test_a_run_of_ours_is_not_given_other_tokens(model, place, byte_level):
    record = {"data": {"source": "tokens"}, "tokenizer": str(byte_level)}
    run = Run(model, 0, {"model": {}, "vocab_size": SIZE} | record)
    assert run.tokens.encodes_as is None


def test_a_text_is_read_with_the_tokenizer_of_the_run(model, place):
    run = Run(model, 0, {"model": {}, "vocab_size": 4096, "tokenizer": "sotu4096"})
    (place / "input.txt").write_text("A line.\n" * 99)
    for source, asked, wanted in (
        ("input.txt", "auto", "sotu4096"),
        ("input.txt", "gpt2", "gpt2"),
        ("tokens", "auto", "auto"),
        ("", "auto", "auto"),
    ):
        given = Settings().replace({"data.source": source, "data.tokenizer": asked})
        assert run.tokens.with_tokenizer(given.data).tokenizer == wanted


def test_a_model_without_a_tokenizer_gets_no_tokens_of_another_unasked(model, place):
    gpt2_folders.write(model, vocab_size=60000)
    (model / "tokenizer.json").unlink()
    asked = {"model_path": model, "model": SMALL}
    line = refusal(*tiny("evaluate.py", "tokens", **asked), unchanged=[place])
    assert "has no tokenizer, and tokens has tokens of gpt2" in line
    told = {"data": {"tokenizer": "gpt2"}}
    assert call(*tiny("evaluate.py", "tokens", **asked, **told)).code == 0
    other = gpt2_folders.write(model.parent / "other", vocab_size=50257)
    for start, teacher in ((model, {}), (other, {"distill": {"teacher": model}})):
        knobs = {"init": {"weights_from": start}, "model": SMALL} | teacher
        line = refusal(*tiny("recover.py", "tokens", **knobs), unchanged=[model])
        assert f"{model} has no tokenizer, and tokens has tokens of gpt2" in line
    # A text gets the tokenizer of the start; nobody asked for the teacher's.
    for split in ("train", "val"):
        (place / "text").mkdir(exist_ok=True)
        (place / "text" / f"{split}.txt").write_text("A line of text.\n" * 99 + split)
    line = refusal(*tiny("recover.py", "text", **knobs), unchanged=[model])
    assert f"{model} has no tokenizer, and {other} has one: if both have" in line
    assert "set --config.data.tokenizer=gpt2, or put its tokenizer.json" in line
    assert call(*tiny("factorize.py", "tokens", **asked, ranks=4)).code == 0
    [table] = (place / "checkpoints").rglob("wte*k4.npy")
    sizes = {"n_embd_wte": 4, "vocab_size": 60000}
    knobs = {"init": {"import_wte_npy": table}, "model": SMALL | sizes}
    line = refusal(*tiny("pca_k128.py", "tokens", **knobs), unchanged=[model])
    assert f"{table} has no tokenizer, and tokens has tokens of gpt2: if" in line


@pytest.mark.usefixtures("quick")
def test_a_named_tokenizer_tells_the_tokens_of_a_teacher_and_its_student(model, place):
    teacher = gpt2_folders.write(model.parent / "teacher", vocab_size=SIZE)
    (place / "text").mkdir()
    for split in ("train", "val"):
        (place / "text" / f"{split}.txt").write_text(f"A line of {split}.\n" * 99)
    knobs = {"init": {"weights_from": model}, "distill": {"teacher": teacher}}
    knobs |= {"model": SMALL, "data": {}}
    line = refusal(*tiny("recover.py", "text", **knobs), unchanged=[teacher])
    own = model / "tokenizer.json"
    assert f"{teacher} has no tokenizer, and {model} has one: " in line
    assert f"set --config.data.tokenizer={own}, or put its tokenizer.json" in line
    knobs["data"] = {"tokenizer": "sotu4096"}  # It is not the student's.
    line = refusal(*tiny("recover.py", "text", **knobs), unchanged=[teacher])
    assert f"{model} knows those of {own}: set --config.data.tokenizer={own}," in line
    knobs["data"] = {"tokenizer": own}
    outcome = call(*tiny("recover.py", "text", **knobs))
    assert outcome.code == 0, outcome


TAKERS = {
    "evaluate.py": {},
    "compress.py": {"ranks": 4},
    "factorize.py": {"ranks": 4, "factorize": {"method": "kl"}},
    "pca_k128.py": {"ranks": 4},
    "recover.py": {},
}


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(one, marks=[pytest.mark.slow] * ("compress" in one))
        for one in TAKERS
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_model_too_small_for_gpt2s_tokens_asks_for_its_own(config, model, place):
    (place / "own").mkdir()
    own = (model / "tokenizer.json").rename(place / "own/tokenizer.json")
    (place / "text").mkdir()
    (place / "ids").mkdir()
    for split in ("train", "val"):
        (place / "text" / f"{split}.txt").write_text(f"A line of {split}.\n" * 99)
        ids = np.arange(2000, dtype=np.uint16) % SIZE
        (place / "ids" / f"{split}.bin").write_bytes(ids.tobytes())
    key = "init.weights_from" if config == "recover.py" else "model_path"
    asked = {key: model, "model": dict(SMALL)} | TAKERS[config]
    if config == "pca_k128.py":
        asked["model"]["n_embd_wte"] = asked.pop("ranks")
    for source in ("text", "tokens"):
        line = refusal(*tiny(config, source, **asked), unchanged=[model, place])
        assert line == (
            f"pcagpt: {model} has no tokenizer, and its {SIZE} rows are too few for "
            f"the 50,257 tokens of gpt2, which {source} has: put the model's "
            "tokenizer.json there, set --config.data.tokenizer=FILE, or give token "
            f'files of the model with a meta.json of {{"vocab_size": {SIZE}}}\n'
        )
    line = refusal(*tiny(config, "ids", **asked), unchanged=[model, place])
    assert "which ids is taken to have: put" in line or "add meta.json" in line
    # What the lines ask for.
    told = asked | {"data": {"tokenizer": own}, "workdir": "with-text"}
    outcome = call(*tiny(config, "text", **told))
    assert outcome.code == 0, outcome
    (place / "ids/meta.json").write_text(json.dumps({"vocab_size": SIZE}))
    outcome = call(*tiny(config, "ids", **asked, workdir="with-ids"))
    assert outcome.code == 0, outcome
