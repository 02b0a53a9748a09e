"""What a model writes while it trains."""

import dataclasses

import jax
import numpy as np
import pytest
import tokenizer_folders
from conftest import VOCAB_SIZE
from runs import changed, job, setup, start

from pcagpt.data import vocabulary
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.corpus import Corpus
from pcagpt.run import continuation
from pcagpt.training.sampler import sampler

pytestmark = pytest.mark.usefixtures("quick")
TEXTS = tuple(chr(0x4E00 + number) for number in range(VOCAB_SIZE))


@pytest.fixture
def config(tiny_config, monkeypatch):
    """A config whose tokens stand for characters."""
    opened = Corpus.__init__

    def of_characters(self, *arguments, **values):
        opened(self, *arguments, **values | {"characters": TEXTS})

    monkeypatch.setattr(Corpus, "__init__", of_characters)
    return tiny_config


def written(config):
    """(the shown prompt, what follows it) of a new run."""
    made = setup(config)
    state, _ = start(made, job(config).folder)
    before = jax.tree.map(np.asarray, state.variables)
    write = sampler(made, {})
    text = write(state.variables)
    assert write(state.variables) == text
    jax.tree.map(np.testing.assert_array_equal, before, state.variables)
    return text.split(" »")


def test_a_sample_continues_the_beginning_of_the_validation_text(config, corpus_folder):
    prompt, text = written(changed(config, **{"telemetry.sample_tokens": 20}))
    tokens = np.fromfile(corpus_folder / "val.bin", np.uint16)[:12]
    assert prompt == CharacterTokenizer(TEXTS).decode(tokens.tolist())
    assert len(text) == 20 and set(text) <= set(TEXTS)
    _, longer = written(changed(config, **{"telemetry.sample_tokens": 24}))
    assert longer.startswith(text) and len(longer) == 24
    _, other = written(changed(config, **{"telemetry.sample_tokens": 20, "seed": 2}))
    assert other != text  # Other weights.


def test_a_model_on_several_devices_writes_the_same(config):
    alone = written(config)
    assert written(changed(config, **{"mesh.data": 2, "mesh.fsdp": 2})) == alone


def test_there_are_no_samples_without_text_or_on_several_processes(
    config, tiny_config, corpus_folder, monkeypatch
):
    made = setup(config)
    assert sampler(made, {})
    assert not sampler(setup(changed(config, **{"telemetry.sample_tokens": 0})), {})
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        assert not sampler(made, {})
    monkeypatch.undo()
    assert not sampler(setup(tiny_config), {})


def test_a_lost_tokenizer_does_not_stop_the_training(tiny_config, said):
    made = setup(tiny_config)
    corpus = dataclasses.replace(made.corpus, tokenizer="a/lost/tokenizer.json")
    assert not sampler(dataclasses.replace(made, corpus=corpus), {})
    (line,) = said()
    assert line.startswith("no samples are shown while training: ")


def test_a_character_that_the_prompt_cuts_is_written_whole(shared):
    folder = shared("byte_fallback", tokenizer_folders.byte_fallback)
    tokenizer = vocabulary.load(str(folder))
    prompt, drawn = np.split(np.array(tokenizer.encode("日本 the 語")), [2])
    text = continuation.written(prompt, drawn.tolist(), tokenizer, (), 99)
    assert text == "日本 the 語"
    text = continuation.written(prompt, drawn.tolist(), tokenizer, (), len(drawn) - 1)
    assert text == "日本 the "
