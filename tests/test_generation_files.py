"""Where the texts of a model end: in samples, and in what is made from the model.

`test_hugging_face_parity.py` compares the texts of exports with those of the model.
"""

import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import CONFIGS, call, tiny
from gpt2_folders import write
from talkers import PROMPT, TOKENS, drawn, write_talker
from test_export import run_export
from tokenizer_folders import SIZE, byte_level

import pcagpt
from pcagpt.config import command_line
from pcagpt.data import hugging_face_tokenizer, vocabulary
from pcagpt.errors import UserError
from pcagpt.pipeline import samples
from pcagpt.run import checkpoint, continuation
from pcagpt.run import generate as generation
from pcagpt.run.folder import write_record
from pcagpt.run.generation_files import FIELD, FILE, ends, read, written
from pcagpt.run.identity import KEPT
from pcagpt.run.trained import Run
from pcagpt.training.sampler import sampler

pytestmark = pytest.mark.usefixtures("quick")
TEMPLATE = "{% for one in messages %}{{ one.content }}<|im_end|>{% endfor %}"


def put(path, **fields):
    path.write_text(json.dumps(fields))


def fields_of(path):
    found = json.loads(path.read_text())
    found.pop("sha256", None)
    return found


@pytest.fixture(scope="session")
def talkers(tmp_path_factory):
    """A GPT-2 with an end of its own, which comes within a text: (folder, that end).

    Its tokenizer has <|endoftext|>, too. The files do not name it.
    """
    place = tmp_path_factory.mktemp("talkers")
    byte_level(place)
    folder, config = place / "whole", {"vocab_size": SIZE}
    config |= {"bos_token_id": 2, "eos_token_id": SIZE - 1, "pad_token_id": 1}
    end = write_talker(folder, **config)
    put(
        folder / "generation_config.json",
        eos_token_id=[SIZE - 1, end],
        pad_token_id=1,
        temperature=0.7,
        do_sample=True,
        transformers_version="5.0.0",
    )
    put(folder / "tokenizer_config.json", eos_token="Ġ", chat_template=TEMPLATE)
    drawn = {"text-generation": {"do_sample": True, "max_length": 50}}
    config = fields_of(folder / "config.json")
    config |= {"prefix": "The ", "task_specific_params": drawn}
    put(folder / "config.json", **config)
    return folder, end


@pytest.fixture
def talker(talkers, tmp_path):
    """A copy of the folder that a test may change."""
    return shutil.copytree(talkers[0], tmp_path / "talker")


def until_end(folder, end):
    """The text up to the end."""
    kept = itertools.takewhile(lambda token: token != end, drawn(folder))
    return vocabulary.load(str(folder)).decode(kept)


# Which ids end a text.


NULL = {"eos_token_id": None}


@pytest.mark.parametrize(
    ("config", "own", "wanted"),
    [
        ({}, None, [0]),
        ({"eos_token_id": 5}, None, [5]),
        ({"eos_token_id": [5, 0]}, None, [5, 0]),
        ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, [6, 7]),
        ({"eos_token_id": 5}, {"temperature": 0.7}, [5]),
        ({"eos_token_id": 5}, NULL, [5]),
        (NULL, NULL, [0]),
        ({"eos_token_id": 50256}, None, [0]),
        ({"eos_token_id": 5}, {"eos_token_id": [97, -1]}, [5]),
        ({}, {"eos_token_id": [96, 97]}, [96]),
        ({}, {"eos_token_id": []}, [0]),
        ({"text_config": {"eos_token_id": 5}}, None, [5]),
    ],
)
def test_ids_of_a_models_files_end_its_texts(config, own, wanted, tmp_path):
    """<|endoftext|>, here 0, does so only if they name none."""
    put(tmp_path / "config.json", **config)
    if own is not None:
        put(tmp_path / FILE, **own)
    record = {FIELD: read(tmp_path, 97)}
    assert ends(record, 0) == wanted
    trained = [*wanted, *({0} - {*wanted})]
    assert ends(record | {"data": {}}, 0) == trained


@pytest.mark.parametrize(
    ("name", "value", "kept", "lost"),
    [
        ("bos_token_id", 97, None, ["97"]),
        ("eos_token_id", [5, 97, 50256], [5], ["97", "50256"]),
        ("pad_token_id", -1, None, ["-1"]),
        ("decoder_start_token_id", 97, None, ["97"]),
        ("forced_bos_token_id", 98, None, ["98"]),
        ("forced_eos_token_id", [98], None, ["98"]),
        ("suppress_tokens", [1, 97], [1], ["97"]),
        ("begin_suppress_tokens", [97, 2], [2], ["97"]),
        ("suppress_tokens", [96], [96], []),
        ("bad_words_ids", [[1], [2, 97]], [[1]], ["97"]),
        ("bad_words_ids", [[-1]], None, ["-1"]),
        ("sequence_bias", [[[1], 99], [[98], 1.5]], [[[1], 99]], ["98"]),
    ],
)
@pytest.mark.parametrize("file", ["config.json", FILE])
def test_ids_beyond_the_table_are_named_once(
    file, name, value, kept, lost, tmp_path, said
):
    folder = write(tmp_path / "model")
    fields = json.loads((folder / file).read_text()) if file != FILE else {}
    put(folder / file, **fields | {name: value})
    record = Run.open(folder).record
    assert record[FIELD][FILE].get(name) == kept
    warnings = [one for one in said() if "has none for" in one]
    assert len(warnings) == bool(lost)
    for line in warnings:
        named = ", ".join(f"{name} {one}" for one in lost)
        assert f"{folder}: its table of 97 rows has none for {named}: " in line


def test_an_export_names_the_ids_that_it_leaves_out(talker, tmp_path, said):
    put(talker / FILE, eos_token_id=SIZE, suppress_tokens=[*range(SIZE, SIZE + 9)])
    found = fields_of(run_export(talker, tmp_path) / FILE)
    (line,) = [line for line in said() if "left out of exports" in line]
    assert f"none for eos_token_id {SIZE}, suppress_tokens {SIZE}, " in line
    assert f"{SIZE + 6}, ...: these ids end no text" in line
    assert found["eos_token_id"] == fields_of(talker / "config.json")["eos_token_id"]
    assert "suppress_tokens" not in found


def test_older_records_and_those_of_characters_end_as_they_did():
    assert ends({}, 7) == ends({"data": {}}, 7) == [7]
    assert ends({"data": {}}, None) == []
    ids = {"bos_token_id": 7, "eos_token_id": 7}
    assert written({"data": {}}, 7) == {
        "config.json": ids,
        FILE: {"_from_model_config": True} | ids,
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is damaged .*: restore it, or remove it, so that config.json counts$"),
        ('{"eos_token_id": "x"}', "eos_token_id is 'x': it must be a token id, a li"),
        ('{"pad_token_id": [1.5]}', r"pad_token_id is \[1.5\]: it must be a token id"),
    ],
)
def test_damaged_settings_are_named_in_one_line(text, words, talker):
    (talker / FILE).write_text(text)
    with pytest.raises(UserError, match=rf"{FILE}:? {words}"):
        Run.open(talker)


# Samples.


def test_edited_settings_of_a_run_are_refused_and_lost_ones_read_back(talker, tmp_path):
    record = Run.open(talker).record | {"run_id": "own"}
    run = tmp_path / "run"
    checkpoint.save_weights(run, checkpoint.load_weights(talker), record)
    write_record(run, {name: of for name, of in record.items() if name not in KEPT})
    assert {name: Run.open(run).record.get(name) for name in KEPT} == {
        name: record.get(name) for name in KEPT
    }
    edited = record[FIELD] | {FILE: record[FIELD][FILE] | {"eos_token_id": [9]}}
    write_record(run, record | {FIELD: edited})
    with pytest.raises(UserError, match=r"contradicts .*generation.gen.*9.* there"):
        Run.open(run)


def test_generate_and_sample_stop_at_the_models_own_end(talkers):
    folder, end = talkers
    text = until_end(folder, end)
    options = {"max_tokens": TOKENS, "temperature": 0}
    assert "".join(pcagpt.load(folder).generate(PROMPT, **options)) == text
    words = f"--config.model_path={folder}", f"--config.sample.prompt={PROMPT}"
    words += f"--config.sample.tokens={TOKENS}", "--config.sample.temperature=0"
    asked = call(f"--config={CONFIGS / 'sample.py'}", *words)
    assert asked.code == 0, asked
    assert asked.out == f"{PROMPT}{text}\n"


def test_a_gpu_that_draws_several_tokens_unasked_stops_at_the_end(talkers, monkeypatch):
    folder, end = talkers
    reads, read_next = [], generation._read_next
    monkeypatch.setattr(generation.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(generation, "CALL_SECONDS", 0)  # Each call is short.
    monkeypatch.setattr(
        generation, "_read_next", lambda *given: reads.append(1) or read_next(*given)
    )
    options = {"max_tokens": TOKENS, "temperature": 0}
    text = "".join(pcagpt.load(folder).generate(PROMPT, **options))
    monkeypatch.undo()
    assert text == until_end(folder, end)
    before = drawn(folder).index(end)  # The prompt gives the first of these.
    assert len(reads) == -(-before // generation.TOKENS_UNASKED)


def test_samples_of_reports_stop_at_the_models_own_end(talkers, monkeypatch):
    folder, end = talkers
    prompt = np.array(vocabulary.load(str(folder)).encode(PROMPT))
    monkeypatch.setattr(continuation, "TEMPERATURE", 0)
    monkeypatch.setattr(samples, "PROMPT_TOKENS", len(prompt))
    words = f"--config={CONFIGS / 'sample.py'}", f"--config.model_path={folder}"
    settings, _ = command_line.parse(["pcagpt", *words])
    text = np.tile(prompt, samples.PROMPTS)
    found = samples.samples_of({"D": folder}, settings, lambda: text, {})["samples"]
    texts = [one["texts"]["D"] for one in found]
    assert texts == [until_end(folder, end)] * samples.PROMPTS


# What is made from such a model.


@pytest.mark.parametrize("form", ["hf", "hf-factored", "coded"])
def test_exports_keep_ends_padding_and_settings(form, talker, tmp_path):
    model, options = talker, {"max_bytes": 3000}
    if form != "hf":
        ids = np.arange(2000) % SIZE
        options["methods"] = "coded" if form == "coded" else "svd"
        model = tmp_path / "small"
        pcagpt.compress(talker, data={"train": ids, "val": ids}, **options).save(model)
    made = run_export(model, tmp_path / "work", form)
    again = run_export(made, tmp_path / "again", "hf")
    for folder in (made, again):
        config, own = (
            fields_of(folder / "config.json"),
            fields_of(talker / "config.json"),
        )
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        for name in (*ids, "prefix", "task_specific_params"):
            assert config[name] == own[name]
        found = fields_of(folder / FILE)
        assert {"bos_token_id": None} | fields_of(talker / FILE) == found
        stated = fields_of(talker / "tokenizer_config.json")
        stated["tokenizer_class"] = "PreTrainedTokenizerFast"  # It obeys the file.
        assert fields_of(folder / "tokenizer_config.json") == stated


def test_a_line_tells_that_an_export_has_no_code_of_its_tokenizer(
    talker, tmp_path, caplog
):
    put(talker / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", None]})
    run_export(talker, tmp_path)
    assert "an export has no code of its tokenizer" in caplog.text


def test_an_export_is_made_again_after_the_settings_changed(talker, tmp_path):
    run_export(talker, tmp_path)
    put(talker / FILE, eos_token_id=9)
    made = run_export(talker, tmp_path, "hf", "--config.overwrite=True")
    assert fields_of(made / FILE)["eos_token_id"] == 9


def test_a_model_that_names_no_end_gets_none_in_exports(talker, tmp_path):
    put(talker / FILE, _from_model_config=True)
    put(talker / "config.json", **fields_of(talker / "config.json") | NULL)
    made = run_export(talker, tmp_path)
    for name in ("config.json", FILE):
        assert fields_of(made / name)["eos_token_id"] is None


def test_settings_of_generation_in_config_json_are_kept(talker, tmp_path):
    (talker / FILE).unlink()
    drawing = {"temperature": 0.3, "top_k": 9, "bad_words_ids": [[5]], "min_p": 0.1}
    config = fields_of(talker / "config.json") | drawing | {"top_p": None}
    put(talker / "config.json", **config)
    assert fields_of(run_export(talker, tmp_path) / FILE) == {
        "_from_model_config": True,
        **{"bos_token_id": 2, "eos_token_id": SIZE - 1, "pad_token_id": 1},
        **drawing,
    }


def test_a_run_that_is_trained_further_keeps_the_ends_and_learns_another(
    talker, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for split in ("train", "val"):
        (tmp_path / f"text/{split}.txt").write_text("The people, 1790! " * 200)
    start = {"init": {"weights_from": talker}, "telemetry": {"sample_tokens": 0}}
    sizes = {"n_layer": 2, "block_size": 32}
    done = call(*tiny("recover.py", tmp_path / "text", **start, model=sizes))
    assert done.code == 0, done
    (record,) = (tmp_path / "checkpoints").glob("*/config.json")
    run = Run.open(record.parent)
    assert run.record[FIELD] == Run.open(talker).record[FIELD]
    own = fields_of(talker / FILE)["eos_token_id"]
    assert run.tokens.ends(vocabulary.load(run.record["tokenizer"])) == [*own, 0]
    made = run_export(record.parent, tmp_path)
    found = fields_of(made / FILE)
    assert (found["eos_token_id"], found["temperature"]) == ([*own, 0], 0.7)


def test_a_repeated_sweep_renews_the_settings_of_its_models(talker, tmp_path):
    asked = {"model_path": talker, "ranks": 4, "workdir": tmp_path}
    asked["model"] = {"n_layer": 2, "block_size": 32}
    ids = np.arange(2000, dtype=np.uint16) % 291  # The tokenizer has these.
    (tmp_path / "tokens").mkdir()
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"tokens/{split}.bin")
    words = tiny("compress.py", tmp_path / "tokens", **asked)
    words += [f"--config.data.tokenizer={talker}", "--config.compress.methods=svd"]
    words += ["--config.compress.bands=1"]
    for end in (5, 6):
        put(talker / FILE, eos_token_id=end)
        done = call(*words)
        assert done.code == 0, done
        record = fields_of(tmp_path / "compressed/best_k4/config.json")
        assert record[FIELD][FILE]["eos_token_id"] == end


def test_a_sample_while_training_stops_at_the_models_own_end(monkeypatch, talkers):
    folder, _ = talkers
    seen, record = [], Run.open(folder).record
    corpus = SimpleNamespace(
        characters=None, tokenizer=str(folder), tokens=lambda split: np.arange(5, 20)
    )
    settings = SimpleNamespace(telemetry=SimpleNamespace(sample_tokens=5))
    setup = SimpleNamespace(corpus=corpus, model=None, settings=settings)
    module = "pcagpt.training.sampler"
    monkeypatch.setattr(f"{module}.drawn_after", lambda *_: ())
    monkeypatch.setattr(f"{module}.written", lambda *given: seen.append(given[-2]))
    sampler(setup, record)({})
    assert seen == [record[FIELD][FILE]["eos_token_id"]]


def test_a_packaged_tokenizer_keeps_its_template_and_padding(tmp_path):
    folder = write(tmp_path / "model", vocab_size=4096)
    hugging_face_tokenizer.write(folder, "sotu4096", 16)
    config = fields_of(folder / "tokenizer_config.json")
    config |= {"pad_token": "<|endoftext|>", "padding_side": "left"}
    put(folder / "tokenizer_config.json", **config)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert Run.open(folder).record["tokenizer"] == "sotu4096"
    made = run_export(folder, tmp_path)
    assert fields_of(made / "tokenizer_config.json") == config
    assert (made / "chat_template.jinja").read_text() == TEMPLATE
