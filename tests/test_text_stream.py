"""Text in pieces: whole characters, nothing lost, and no stop string."""

import random

import pytest

from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.tokenizer import load_tokenizer
from pcagpt.run.text_stream import texts_of, until

TEXT = "A naïve café in 東京, ☃ and 👩‍🚀!\n"


def test_pieces_of_a_text_are_whole_characters_and_together_the_text():
    encoding = load_tokenizer("sotu4096")
    ids = encoding.encode(TEXT)
    assert any("\ufffd" in encoding.decode([token]) for token in ids)
    pieces = list(texts_of(ids, encoding.decode))
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 10 and all(pieces)


def test_a_piece_comes_as_soon_as_its_characters_are_whole():
    encoding = load_tokenizer("gpt2")
    ids = iter(encoding.encode("a b ☃"))  # The last character has two tokens.
    pieces = texts_of(ids, encoding.decode)
    assert [next(pieces), next(pieces)] == ["a", " b"]
    assert len(list(ids)) > 1
    assert list(pieces) == []


def test_a_character_that_the_end_cuts_is_left_out():
    encoding = load_tokenizer("sotu4096")
    ids = encoding.encode("ok 東")
    assert "".join(texts_of(ids, encoding.decode)) == "ok 東"
    assert "".join(texts_of(ids[:-1], encoding.decode)).strip() == "ok"


@pytest.mark.parametrize("name", ["gpt2", "sotu4096"])
def test_bytes_that_are_no_characters_are_shown_as_decoding_all_of_them_does(name):
    encoding, chance = load_tokenizer(name), random.Random(0)
    for _ in range(200):
        ids = [chance.randrange(300) for _ in range(chance.randrange(1, 40))]
        whole = encoding.decode(ids)
        found = "".join(texts_of(iter(ids), encoding.decode))
        assert whole.startswith(found)
        assert set(whole[len(found) :]) <= {"\ufffd"}


def test_a_tokenizer_that_drops_the_first_space_keeps_it_after_other_tokens():
    words = ["▁the", "▁peo", "ple", "▁of"]

    def decode(ids):
        return "".join(words[token] for token in ids).replace("▁", " ").lstrip(" ")

    assert "".join(texts_of([0, 1, 2, 3], decode)) == "the people of"
    assert "".join(texts_of([1, 2, 3], decode, before=[0])) == " people of"


@pytest.mark.parametrize("character", ["é", "☃", "🚀"])
def test_bytes_that_a_tokenizer_shows_one_by_one_become_one_character(character):
    parts = list(character.encode())

    def decode(ids):  # As tokenizers with a fallback to bytes do.
        octets = bytes(parts[token] for token in ids)
        try:
            return octets.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(octets)

    ids = [*range(len(parts))] * 2
    assert list(texts_of(ids, decode)) == [character, character]


def test_characters_of_a_corpus_are_their_own_pieces():
    tokenizer = CharacterTokenizer(("a", "b", "é"))
    assert list(texts_of([0, 2, 1], tokenizer.decode)) == ["a", "é", "b"]


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
