"""Text in pieces: whole characters, nothing lost, and no stop string."""

import random

import pytest
import tokenizer_folders

from pcagpt.data import vocabulary
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.text_stream import texts_of, until
from pcagpt.data.tokenizer import load_tokenizer

TEXT = "A naïve café in 東京, ☃ and 👩‍🚀!\n"


@pytest.fixture(params=["gpt2", "sotu4096", "byte_level", "byte_fallback"])
def tokenizer(request, shared):
    """A tokenizer in which a character may have several tokens."""
    if hasattr(tokenizer_folders, request.param):
        folder = shared(request.param, getattr(tokenizer_folders, request.param))
        within = folder / "whole" if request.param == "byte_level" else folder
        return vocabulary.load(str(within))
    return load_tokenizer(request.param)


def one_by_one(ids):
    return ([token] for token in ids)


def test_pieces_of_a_text_are_whole_characters_and_together_the_text(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert any("\ufffd" in tokenizer.decode([token]) for token in ids)
    pieces = list(texts_of(one_by_one(ids), tokenizer.decode))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 10 and all(pieces)


def test_a_piece_comes_as_soon_as_its_characters_are_whole():
    encoding = load_tokenizer("gpt2")
    ids = iter(encoding.encode("a b ☃"))  # The last character has two tokens.
    pieces = texts_of(one_by_one(ids), encoding.decode)
    assert [next(pieces), next(pieces)] == ["a", " b"]
    assert len(list(ids)) > 1
    assert list(pieces) == []


def test_a_character_that_the_end_cuts_is_left_out(tokenizer):
    ids = tokenizer.encode("ok 東")
    whole, cut = (
        list(texts_of(one_by_one(some), tokenizer.decode)) for some in (ids, ids[:-1])
    )
    assert ("".join(whole), "".join(cut).strip()) == ("ok 東", "ok")


def test_texts_of_parts_are_together_what_decoding_all_of_them_gives(tokenizer):
    chance, letters = random.Random(0), "a 東京🚀\ufffd"

    def text_of(ids, before=()):
        size = chance.choice([1, 2, 5, 20])
        parts = (ids[start : start + size] for start in range(0, len(ids), size))
        end = yield from texts_of(parts, tokenizer.decode, before)
        yield end

    for _ in range(300):
        ids = tokenizer.encode("".join(chance.choices(letters, k=30)))
        if chance.random() < 0.5:  # Bytes that are no characters.
            chance.shuffle(ids)
        whole, at = tokenizer.decode(ids), chance.randrange(len(ids))
        assert "".join(text_of(ids)) == whole
        before = tokenizer.decode(ids[:at]).removesuffix("\ufffd")
        assert before + "".join(text_of(ids[at:], ids[:at])) == whole


@pytest.mark.parametrize("size", [1, 5, 20])
def test_no_number_of_tokens_without_text_loses_a_part_of_a_character(size):
    decode = CharacterTokenizer(("a", "\ufffd", "")).decode
    ids = [0, 1, *[2] * 40, 0]
    parts = (ids[start : start + size] for start in range(0, len(ids), size))
    assert "".join(texts_of(parts, decode)) == decode(ids) == "a\ufffda"


def test_a_tokenizer_that_drops_the_first_space_keeps_it_after_other_tokens():
    words = ["▁the", "▁peo", "ple", "▁of"]

    def decode(ids):
        return "".join(words[token] for token in ids).replace("▁", " ").lstrip(" ")

    def text_of(ids, before=()):
        return "".join(texts_of(one_by_one(ids), decode, before))

    assert text_of([0, 1, 2, 3]) == "the people of"
    assert text_of([1, 2, 3], before=[0]) == " people of"


def test_characters_of_a_corpus_are_their_own_pieces():
    tokenizer = CharacterTokenizer(("a", "b", "é"))
    assert list(texts_of(one_by_one([0, 2, 1]), tokenizer.decode)) == ["a", "é", "b"]


@pytest.mark.parametrize(
    ("pieces", "stop", "found"),
    [
        (["ab", "cd"], ["bc"], ["a"]),
        (["ab", "x", "bc"], ["bc"], ["a", "bx"]),
        (["aab"], ["ab"], ["a"]),
        (["a", "a", "b", "c"], ["aab"], []),
        (["one\n", "\n two"], ["\n\n"], ["one"]),
        (["xy"], [], ["xy"]),
        (["a", "b"], ["bcd"], ["a", "b"]),
        (["stop"], ["stop"], []),
        (["to st", "op"], ["top", "st"], ["to "]),
        (["aaabaabbaab"], ["ba", "aba", "b"], ["aaa"]),
        (["xaba"], ["ba", "aba"], ["x"]),
    ],
)
def test_a_stop_string_ends_the_text_and_is_never_shown(pieces, stop, found):
    assert list(until(pieces, stop)) == found


def test_the_text_before_a_stop_string_is_whole_however_it_is_cut():
    chance = random.Random(1)
    for _ in range(2000):
        text = "".join(chance.choice("ab") for _ in range(chance.randrange(12)))
        stops = [
            "".join(chance.choice("ab") for _ in range(chance.randrange(1, 4)))
            for _ in range(chance.randrange(1, 4))
        ]
        pieces, at = [], 0
        while at < len(text):
            size = chance.randrange(1, 4)
            pieces.append(text[at : at + size])
            at += size
        shown = list(until(pieces, stops))
        whole = "".join(shown)
        assert whole == "".join(until(text, stops)), (pieces, stops)
        assert text.startswith(whole) and not any(stop in whole for stop in stops)
        if len(stops) == 1:
            assert whole == text.partition(stops[0])[0], (pieces, stops)
        assert all(shown)


def test_nothing_is_read_after_a_stop_string():
    pieces = iter(["a", ".", "b"])
    assert list(until(pieces, ["."])) == ["a"]
    assert list(pieces) == ["b"]
