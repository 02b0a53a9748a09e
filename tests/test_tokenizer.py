"""The packaged vocabularies: ids, round trips, integrity, origin."""

import importlib.util
from pathlib import Path

import pytest

from pcagpt.data import tokenizer
from pcagpt.data.tokenizer import RANKS, load_tokenizer
from pcagpt.errors import UserError

ROOT = Path(__file__).parent.parent
HARD_TEXT = "don't  stop\n\n 1,234 × naïve 日本語 🙂\t\r\n<|endoftext|>\x00 end  "


def test_gpt2_gives_the_published_ids():
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("hello world") == [31373, 995]
    assert (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    assert RANKS["gpt2"].sha256.startswith("306cd27f03c1a714")


def test_sotu4096_has_gpt2s_bytes_first_and_end_of_text_last():
    gpt2, sotu = load_tokenizer("gpt2"), load_tokenizer("sotu4096")
    assert (sotu.n_vocab, sotu.eot_token) == (4096, 4095)
    assert sotu.encode("<|endoftext|>", allowed_special="all") == [4095]
    first = [sotu.decode_single_token_bytes(rank) for rank in range(256)]
    assert first == [gpt2.decode_single_token_bytes(rank) for rank in range(256)]
    assert len(sotu.encode(" the United States")) == 3


@pytest.mark.parametrize("name", RANKS)
def test_any_text_survives_encoding_and_decoding(name):
    encoding = load_tokenizer(name)
    assert encoding.decode(encoding.encode_ordinary(HARD_TEXT)) == HARD_TEXT
    assert load_tokenizer(name) is encoding  # built once


def test_unknown_tokenizer_is_refused_with_the_known_names():
    with pytest.raises(UserError, match="unknown tokenizer 'gpt3'.*gpt2, sotu4096"):
        load_tokenizer("gpt3")


def test_damaged_or_missing_rank_file_is_refused_and_left_alone(tmp_path, monkeypatch):
    damaged = tmp_path / "gpt2.tiktoken"
    damaged.write_bytes((tokenizer.ASSETS / damaged.name).read_bytes()[:-1])
    monkeypatch.setattr(tokenizer, "ASSETS", tmp_path)
    load_tokenizer.cache_clear()
    with pytest.raises(UserError, match="damaged.*git checkout -- pcagpt/assets/gpt2"):
        load_tokenizer("gpt2")
    assert damaged.exists()
    with pytest.raises(UserError, match=r"sotu4096\.tiktoken is missing.*git checkout"):
        load_tokenizer("sotu4096")


@pytest.mark.slow
def test_training_script_makes_the_packaged_ranks(tmp_path, monkeypatch, capsys):
    path = ROOT / "scripts" / "train_bpe.py"
    spec = importlib.util.spec_from_file_location("train_bpe", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = tmp_path / "made.tiktoken"
    monkeypatch.setattr("sys.argv", [str(path), "--output", str(made)])
    script.main()
    packaged = tokenizer.ASSETS / "sotu4096.tiktoken"
    assert made.read_bytes() == packaged.read_bytes()
    assert RANKS["sotu4096"].sha256 in capsys.readouterr().out
