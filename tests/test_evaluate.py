"""Evaluation: its numbers worked out in plain numpy, and the task 'evaluate'."""

import dataclasses
import functools
import hashlib
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import changed, execute, gpt_config, json_of, snapshot

from pcagpt import main, trees
from pcagpt.config import Settings
from pcagpt.data.batches import EvaluationBatches
from pcagpt.data.corpus import TextSize, open_corpus
from pcagpt.errors import UserError
from pcagpt.json_files import write_json
from pcagpt.model import GPT, HeadBand
from pcagpt.pipeline import evaluate as task
from pcagpt.pipeline import tasks
from pcagpt.run.checkpoint import save_weights
from pcagpt.run.evaluator import (
    Evaluator,
    TokenScores,
    score_tokens,
    summarize,
    target_cosines,
)
from pcagpt.run.folder import FolderState
from pcagpt.run.trained import Run
from pcagpt.sharding import placement, processes

pytestmark = pytest.mark.usefixtures("quick")
VOCAB, BLOCK_RANK = 21, 8
DENSE = gpt_config(
    vocab_size=VOCAB,
    vocab_multiple=8,
    block_size=BLOCK_RANK,
    n_layer=1,
    n_head=2,
    n_embd=8,
)
UNTIED = dataclasses.replace(DENSE, n_embd_wte=3, n_embd_wte_scale_tying=False)
BANDS = dataclasses.replace(
    UNTIED, n_embd_wte=0, band_sizes=(4, 7, 10), band_ranks=(0, 4, 2)
)
# Seven whole windows and one of four targets.
SPLIT = (
    np.random.default_rng(1).integers(0, VOCAB, 7 * BLOCK_RANK + 5).astype(np.uint16)
)
TEXT = TextSize(words=13, bytes=170)


@dataclasses.dataclass
class Tokens:
    """A corpus of a single split."""

    split: np.ndarray
    name: str = "tokens"
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None

    def tokens(self, split):
        return self.split

    def tokens_sha256(self, split):
        return hashlib.sha256(self.split.tobytes()).hexdigest()

    def text_size(self, split):
        return TEXT


@functools.cache
def variables_of(config):
    random = np.random.default_rng(0)
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)["params"]
    params = {
        path: jnp.asarray(
            random.normal(path.endswith("/scale"), 0.4, leaf.shape), jnp.float32
        )
        for path, leaf in trees.flatten(shapes).items()
    }
    constants = {}
    if len(config.bands) > 1:
        order = jnp.asarray(random.permutation(VOCAB), jnp.int32)
        constants = {"embed": {"position_of_token": order}}
    return {"params": trees.unflatten(params), "constants": constants}


@functools.cache
def hidden_of(config):
    """Final hidden states of the split's targets, in order: [n, D] float64."""
    hidden = jax.jit(functools.partial(GPT(config).apply, method="hidden"))
    ((inputs, targets),) = EvaluationBatches(SPLIT, BLOCK_RANK, 8)
    h_ND = np.asarray(hidden(variables_of(config), inputs), np.float64)
    return h_ND[targets.reshape(-1) >= 0]


def head_rows(config):
    """For each token its wte row, its scale_down (or None) and its row in D: lists."""
    flat = trees.flatten(variables_of(config)["params"])
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flat.items()}
    rows, scales, wide = [], [], []
    for number, band in enumerate(config.bands):
        wte = flat[f"embed/band_{number}/wte"]
        scale = flat.get(f"embed/band_{number}/scale_down")
        for row in wte[: band.size]:
            rows.append(row)
            scales.append(scale)
            wide.append(row if scale is None else row @ scale)
    order = np.arange(VOCAB)
    if len(config.bands) > 1:
        order = variables_of(config)["constants"]["embed"]["position_of_token"]
    return [[items[i] for i in order] for items in (rows, scales, wide)]


def cosine(a, b):
    return a @ b / math.sqrt(a @ a) / math.sqrt(b @ b)


def evaluated(config, batch_size, devices=(1, 1), chunks=1, tokens=SPLIT):
    mesh = placement.make_mesh(*devices)
    variables = variables_of(config)
    variables = jax.device_put(variables, placement.shardings(variables, mesh))
    corpus = Tokens(tokens)
    return Evaluator(GPT(config), mesh, corpus, "val", batch_size, chunks)(variables)


@pytest.mark.parametrize(
    "config", [DENSE, UNTIED, BANDS], ids=["dense", "untied", "bands"]
)
def test_every_number_is_that_of_plain_numpy(config):
    rows, scales, wide = head_rows(config)
    losses, cosines, cosines_d = [], [], []
    for h, target in zip(hidden_of(config), SPLIT[1:], strict=True):
        logits = np.array([h @ row for row in wide])
        losses.append(np.log(np.sum(np.exp(logits))) - logits[target])
        z = h if scales[target] is None else scales[target] @ h
        cosines.append(cosine(z, rows[target]))
        cosines_d.append(cosine(h, wide[target]))
    assert np.ptp(losses) > 2

    metrics, window_losses, target_losses = evaluated(config, 3, chunks=2)
    starts = range(0, len(losses), BLOCK_RANK)
    expected = [
        [sum(losses[s : s + BLOCK_RANK]), len(losses[s : s + BLOCK_RANK])]
        for s in starts
    ]
    assert window_losses.dtype == np.float64
    assert window_losses[-1, 1] == 4
    np.testing.assert_allclose(window_losses, expected, rtol=1e-6)
    of_target = np.zeros((SPLIT.max() + 1, 2))
    np.add.at(of_target, SPLIT[1:], [(loss, 1) for loss in losses])
    np.testing.assert_allclose(target_losses, of_target, rtol=1e-6)
    nats = sum(losses)
    place = 0.05 * (len(cosines) - 1)
    below = sorted(cosines)[math.floor(place) : math.floor(place) + 2]
    assert metrics == pytest.approx(
        {
            "loss": nats / 60,
            "perplexity": math.exp(nats / 60),
            "word_perplexity": math.exp(nats / TEXT.words),
            "bits_per_byte": nats / math.log(2) / TEXT.bytes,
            "ln_f_cosine": np.mean(cosines),
            "ln_f_cosine_p05": below[0] + (place % 1) * (below[1] - below[0]),
            "ln_f_cosine_d": np.mean(cosines_d),
            "tokens_predicted": 60,
        },
        rel=1e-5,
    )
    same = metrics["ln_f_cosine"] == metrics["ln_f_cosine_d"]
    assert same == (config is DENSE)


def test_the_result_does_not_depend_on_batch_size_chunks_or_devices():
    expected = evaluated(BANDS, 1)
    for batch_size, devices, chunks in ((3, (1, 1), 4), (16, (2, 4), 3)):
        found = evaluated(BANDS, batch_size, devices, chunks)
        np.testing.assert_allclose(
            found.window_losses, expected.window_losses, rtol=5e-7
        )
        np.testing.assert_allclose(
            found.target_losses, expected.target_losses, rtol=5e-7
        )
        assert found.metrics == pytest.approx(expected.metrics, rel=2e-6)


def test_padding_of_the_last_batch_and_window_counts_for_nothing():
    whole = evaluated(DENSE, 3)
    full_windows = evaluated(DENSE, 7, tokens=SPLIT[: 7 * BLOCK_RANK + 1])
    np.testing.assert_allclose(
        whole.window_losses[:7], full_windows.window_losses, rtol=1e-6
    )
    assert whole.metrics["tokens_predicted"] == 60
    assert whole.window_losses.shape == (8, 2)


def test_scores_are_zero_where_there_is_no_target():
    ((inputs, targets),) = EvaluationBatches(SPLIT, BLOCK_RANK, 8)
    targets = targets.copy()
    targets[:, ::3] = -1
    score = functools.partial(score_tokens, model=GPT(BANDS), chunks=2)
    score = placement.jit(score, placement.make_mesh(1, 1))
    for found in score(variables_of(BANDS), inputs, targets):
        assert (found.shape, found.dtype) == ((8, BLOCK_RANK), jnp.float32)
        np.testing.assert_array_equal(np.asarray(found) != 0, targets >= 0)


def test_cosines_are_in_float32_also_of_a_bfloat16_hidden_state():
    random = np.random.default_rng(2)
    h = jnp.asarray(random.normal(size=(9, 8)), jnp.bfloat16)
    wte = jnp.asarray(random.normal(size=(9, 8)), jnp.float32)
    found = target_cosines(h, (HeadBand(wte, None, 0, 9),), jnp.arange(9))
    pairs = zip(np.asarray(h, np.float64), np.asarray(wte, np.float64), strict=True)
    expected = [cosine(a, b) for a, b in pairs]
    for cosines in found:
        assert cosines.dtype == jnp.float32
        np.testing.assert_allclose(cosines, expected, rtol=1e-5, atol=1e-7)


# Formulas by hand, with made-up scores


def summary(losses, has_target=None, text=None):
    """Of rows of losses; cosines count up from 0 by 1/100."""
    losses = np.asarray(losses, np.float32)
    number = np.arange(losses.size, dtype=np.float32).reshape(losses.shape) / 100
    if has_target is None:
        has_target = np.ones(losses.shape)
    scores = TokenScores(losses, number, 2 * number)
    targets = np.where(has_target, np.arange(losses.size).reshape(losses.shape), -1)
    return summarize(scores, targets, text)


def test_missing_targets_inside_a_window_are_left_out():
    metrics, window_losses, target_losses = summary(
        [[1, 2, 3, 0], [0, 0, 5, 1]], [[1, 1, 1, 0], [0, 0, 1, 1]]
    )
    np.testing.assert_array_equal(window_losses, [[6, 3], [6, 2]])
    by_id = [[1, 1], [2, 1], [3, 1], [0, 0], [0, 0], [0, 0], [5, 1], [1, 1]]
    np.testing.assert_array_equal(target_losses, by_id)
    assert metrics["loss"] == 12 / 5
    assert metrics["tokens_predicted"] == 5
    # Cosines .00 .01 .02 .06 .07: the 5th percentile lies a fifth of the way up.
    assert metrics["ln_f_cosine"] == pytest.approx(0.16 / 5)
    assert metrics["ln_f_cosine_p05"] == pytest.approx(0.002)
    assert metrics["ln_f_cosine_d"] == pytest.approx(0.32 / 5)


def test_perplexities_and_bits_by_hand():
    losses = [[3 * math.log(2), 5 * math.log(2)]]
    metrics, *_ = summary(losses, text=TextSize(words=1, bytes=16))
    assert metrics["perplexity"] == pytest.approx(2**4)
    assert metrics["word_perplexity"] == pytest.approx(2**8)
    assert metrics["bits_per_byte"] == pytest.approx(0.5)
    for text in (None, TextSize(words=0, bytes=0)):
        metrics, *_ = summary(losses, text=text)
        assert metrics["word_perplexity"] is None
        assert metrics["bits_per_byte"] is None
    metrics, *_ = summary([[800, 800]])  # Too large for a float.
    assert (metrics["loss"], metrics["perplexity"]) == (800, math.inf)


def test_window_losses_are_summed_in_float64():
    losses = np.full((1, 4096), 1e-4)
    losses[0, 0] = 2.0**17
    window_losses = summary(losses).window_losses
    exact = np.sum(losses.astype(np.float32), dtype=np.float64)
    assert window_losses[0, 0] == pytest.approx(exact, rel=1e-15)


# The task


@pytest.fixture
def asked(finished_experiment, tmp_path):
    """A function: the config that evaluates a copy of a finished run."""

    def ask(run="gpt_baseline", below="", **overrides):
        copy = tmp_path / "runs" / run
        if not copy.exists():
            shutil.copytree(Path(finished_experiment.workdir) / run, copy)
        own = {"task": "evaluate", "workdir": str(tmp_path / "runs")}
        own |= {"model_path": str(copy / below), "data.source": ""}
        return changed(finished_experiment, **own | overrides)

    return ask


def evaluate(config):
    return task.evaluate(Settings.of(config))


def write_corpus(folder, vocab_size, tokenizer=None):
    """A folder of token files with a validation split only."""
    folder.mkdir()
    tokens = np.arange(400) % vocab_size
    tokens.astype(np.uint16).tofile(folder / "val.bin")
    meta = {"vocab_size": vocab_size, "tokenizer": tokenizer}
    meta = {name: value for name, value in meta.items() if value}
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.mark.parametrize("run", ["gpt_baseline", "gpt_pca_finetune_k8"])
def test_the_loss_on_the_validation_split_is_that_of_the_run_s_result(run, asked):
    config = asked(run)
    found = evaluate(config)
    wanted = json_of(Path(config.model_path) / "result.json")
    assert found["loss"] == wanted["val_loss"]
    for name in ("perplexity", "ln_f_cosine", "ln_f_cosine_p05", "ln_f_cosine_d"):
        assert found[name] == wanted[name]
    dtype = {"compute_dtype": wanted["resolved"]["compute_dtype"]}
    assert found["protocol"] == wanted["protocol"] | dtype
    assert found["tokens_predicted"] == wanted["protocol"]["tokens_predicted"]


def test_max_tokens_predicts_the_first_tokens_and_writes_a_file_of_its_own(asked):
    config = asked(**{"evaluate.max_tokens": 48})  # Three windows.
    run_dir, found = Path(config.model_path), evaluate(config)
    assert found["tokens_predicted"] == found["protocol"]["tokens_predicted"] == 48
    assert found["protocol"]["evaluated_tokens"] == 48
    assert "evaluated_tokens" not in evaluate(asked())["protocol"]
    losses, targets = np.load(run_dir / "val_window_losses.npy")[:3].sum(axis=0)
    assert (found["loss"], targets) == (pytest.approx(losses / 48, rel=1e-6), 48)
    assert found["loss"] != evaluate(asked())["loss"]
    names = {path.name for path in run_dir.glob("evaluation_*_step6.json")}
    assert {name.split("_val")[1] for name in names} == {
        "_first48_step6.json",
        "_step6.json",
    }
    before = snapshot(run_dir).keys()
    evaluate(asked(**{"evaluate.max_tokens": 10**6}))  # That is the whole split.
    assert snapshot(run_dir).keys() == before


@pytest.mark.parametrize("text", ["my own notes", '{"mine": 1}'])
def test_what_a_person_has_in_the_place_of_a_result_is_moved_aside(asked, text, capfd):
    run_dir = Path(asked().model_path)
    evaluate(asked())
    evaluate(asked())  # It replaces its own result.
    (plain,) = run_dir.glob("evaluation_*")
    plain.write_text(text)
    evaluate(asked())
    plain.write_text('{"protocol": {"tokens_sha256": "of another corpus"}}')
    evaluate(asked())
    (hashed,) = set(run_dir.glob("evaluation_*_step6_*.json")) - {plain}
    hashed.write_text(text)
    evaluate(asked())
    kept = [path.read_text() for path in run_dir.glob("evaluation_*.replaced-*")]
    assert kept == [text, text]
    out, err = capfd.readouterr()
    assert "was moved to" in err and "was moved to" not in out


def test_each_corpus_split_and_step_has_its_own_file_in_the_run_folder(asked, tmp_path):
    source = write_corpus(tmp_path / "other", vocab_size=50)
    wanted = {
        "corpus_val_step6": evaluate(asked()),
        "corpus_val_step3": evaluate(asked(below="ckpt/3")),
        "corpus_test_step6": evaluate(asked(split="test")),
        "other_val_step6": evaluate(asked(**{"data.source": source})),
    }
    run_dir = tmp_path / "runs" / "gpt_baseline"
    found = {
        path.stem.removeprefix("evaluation_"): json_of(path)
        for path in run_dir.glob("evaluation_*.json")
    }
    own = wanted["corpus_val_step6"]["protocol"]["corpus"]
    assert found == {
        name.replace("corpus", own): result for name, result in wanted.items()
    }
    assert len({result["loss"] for result in wanted.values()}) == 4
    assert {result["run"] for result in wanted.values()} == {"gpt_baseline"}
    assert wanted["corpus_test_step6"]["tokens_predicted"] == 900
    assert wanted["other_val_step6"]["tokens_predicted"] == 399
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    (logged,) = (x for x in lines if (x["step"], x["split"]) == (3, "val"))
    assert wanted["corpus_val_step3"]["loss"] == logged["loss"]


def test_corpora_of_one_name_have_files_of_their_own(asked, tmp_path, said):
    config, found = asked(), {}
    for number in (1, 2, 1):
        place = tmp_path / str(number)
        if not place.exists():
            place.mkdir()
            source = write_corpus(place / "corpus", vocab_size=40 + number)
        source = str(place / "corpus")
        found[number] = evaluate(changed(config, **{"data.source": source}))
    paths = (tmp_path / "runs" / "gpt_baseline").glob("evaluation_corpus_val_*.json")
    written = [json_of(path) for path in paths]
    assert sorted(result["loss"] for result in written) == sorted(
        result["loss"] for result in found.values()
    )
    assert not any(result["is_own_corpus"] for result in written)
    assert evaluate(config)["is_own_corpus"]
    lines = [line for line in said() if "another" in line]
    assert len(lines) == 2
    for number, line in enumerate(lines, 1):
        place = tmp_path / str(number) / "corpus"
        assert f"{place} is another corpus than the one that " in line


def test_another_corpus_is_named_as_the_person_named_it(asked, tmp_path, said):
    """Its tokens may be in a cache folder."""
    corpus = open_corpus(write_corpus(tmp_path / "cache", vocab_size=41), tmp_path)
    Run.open(asked().model_path).check_corpus(corpus, "my text")
    assert any(" my text is another corpus than the one" in f" {s}" for s in said())


def test_each_compute_dtype_has_a_file_of_its_own(asked):
    narrow, run_dir = {"model.compute_dtype": "bfloat16"}, Path(asked().model_path)
    found = [evaluate(asked()), evaluate(asked(**narrow))]
    losses = [one["loss"] for one in found]
    assert losses[0] != losses[1]
    assert [one["protocol"]["compute_dtype"] for one in found] == [
        *("float32", "bfloat16")
    ]
    before = snapshot(run_dir).keys()
    evaluate(asked(**narrow))
    paths = sorted(run_dir.glob("evaluation_*.json"))
    assert [json_of(path)["loss"] for path in paths] == losses
    assert snapshot(run_dir).keys() == before


def test_a_file_of_another_kind_does_not_cost_the_result(asked):
    config = asked()
    wanted = evaluate(config)
    (path,) = Path(config.model_path).glob("evaluation_*.json")
    path.write_text('{"protocol": "mine"}')
    assert evaluate(config)["loss"] == wanted["loss"]
    assert json_of(path)["loss"] == wanted["loss"]


def test_every_process_opens_the_step_that_the_first_one_found(asked, monkeypatch):
    path = asked().model_path
    record = {"model": {}, "vocab_size": 9}
    there = FolderState(Path(path), (), False, stored=record, stamps={"a": (1, 2)})
    monkeypatch.setattr(processes, "from_first", lambda find: find() and (there, 3))
    opened = Run.open(path)
    assert (opened.folder, opened.step, opened.record) == (Path(path), 3, record)
    assert opened.stamps == there.stamps


def test_a_lost_config_is_read_from_the_checkpoint(asked):
    config = asked()
    wanted = evaluate(config)["loss"]
    run_dir = Path(config.model_path)
    (run_dir / "config.json").unlink()
    assert evaluate(config)["loss"] == wanted
    # The record is that of the checkpoint that is named, not of the newest one.
    (run_dir / "result.json").unlink()
    path = run_dir / "ckpt/3/meta/metadata"
    (run_dir / "ckpt/3/digests.json").unlink()
    meta = json.loads(path.read_text())
    meta["config"]["vocab_size"] = 7
    path.write_text(json.dumps(meta))
    assert Run.open(run_dir / "ckpt/3").record["vocab_size"] == 7


@pytest.fixture
def own_corpus(asked, corpus_folder, tmp_path):
    """A config that evaluates a run on its own corpus, and that corpus."""
    config = asked()
    folder = Path(shutil.copytree(corpus_folder, tmp_path / "tokens"))
    path = Path(config.model_path) / "config.json"
    record = json_of(path)
    record["data"]["source"], record["corpus_source"] = "tokens", str(folder)
    write_json(path, record)
    return config, folder


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_the_run_s_own_corpus_must_be_what_it_was(own_corpus, split):
    config, folder = own_corpus  # Its own folder is found from another one.
    assert evaluate(config)["is_own_corpus"]
    tokens = np.fromfile(folder / f"{split}.bin", np.uint16)
    tokens[700] ^= 1
    tokens.tofile(folder / f"{split}.bin")
    before, measured = snapshot(Path(config.model_path)), changed(config, split=split)
    with pytest.raises(UserError, match=rf"\({split} changed\): restore it, or name"):
        evaluate(measured)
    assert snapshot(Path(config.model_path)) == before
    if split == "test":  # It decides nothing on another split.
        assert evaluate(config)["is_own_corpus"]
    named = changed(config, **{"data.source": str(folder)})
    assert evaluate(named)["is_own_corpus"] == (split == "test")
    assert not evaluate(changed(named, split=split))["is_own_corpus"]


def describe(config, **fields):
    """Changes the record of a run, and removes the copies in its checkpoints."""
    path = Path(config.model_path) / "config.json"
    write_json(path, json_of(path) | fields)
    for copy in path.parent.glob("ckpt/*/meta"):
        shutil.rmtree(copy)


def test_a_tokenizer_without_a_source_is_not_ignored(own_corpus):
    config, folder = own_corpus
    before = snapshot(folder)
    asked = changed(config, **{"data.tokenizer": "gpt2"})
    with pytest.raises(UserError, match="vocab_size 97, but tokenizer 'gpt2' has"):
        evaluate(asked)
    describe(config, tokenizer="sotu4096", vocab_size=60_000)
    for split in ("train", "val"):
        (folder / f"{split}.bin").unlink()
        (folder / f"{split}.txt").write_text("some text")
    (folder / "test.bin").unlink()
    with pytest.raises(UserError, match=r"set --config\.data\.tokenizer=sotu4096"):
        evaluate(asked)
    assert not list(Path(config.workdir).glob("data/*"))  # Nothing was tokenized.
    assert before.keys() - snapshot(folder).keys() == {
        f"{split}.bin" for split in ("train", "val", "test")
    }


@pytest.mark.parametrize("data", [{}, {"data": {}}])
def test_a_model_that_names_no_corpus_is_evaluated_only_on_one_that_is_named(
    data, own_corpus
):
    config, folder = own_corpus
    run = Run.open(config.model_path)
    record = {name: run.record[name] for name in ("model", "vocab_size")}
    model = run.folder.with_name("elsewhere")
    save_weights(model, run.weights)
    write_json(model / "config.json", record | data)
    config.model_path = str(model)
    before = snapshot(Path(config.workdir))
    message = "does not say what it was trained on: name a corpus as --config.data.sour"
    fisher = {"ranks": (4,), "factorize.method": "fisher"}
    for asked in (
        {},
        {"data.tokenizer": "gpt2"},
        {"task": "compress", "ranks": (4,)},
        {"task": "factorize"} | fisher,
    ):
        with pytest.raises(UserError, match=f"elsewhere {message}"):
            tasks.do(Settings.of(changed(config, **asked)), "a command")
    assert snapshot(Path(config.workdir)) == before
    result = evaluate(changed(config, **{"data.source": str(folder)}))
    assert result["is_own_corpus"] is None


def test_a_changed_corpus_of_text_is_named_by_its_text(own_corpus):
    config, folder = own_corpus
    for split in ("train", "val", "test"):
        (folder / f"{split}.bin").unlink()
        (folder / f"{split}.txt").write_text("Other text.")
    with pytest.raises(UserError, match=f"{folder} is no longer the corpus"):
        evaluate(config)


@pytest.mark.parametrize("own_cache", ["", "cache"])
def test_tokens_that_an_older_version_made_are_found_beside_the_run(
    own_corpus, own_cache, tmp_path
):
    config, folder = own_corpus
    older = tmp_path / own_cache if own_cache else Path(config.workdir) / "data"
    path = Path(config.model_path) / "config.json"
    record = json_of(path)
    record["data"]["cache_dir"] = own_cache and str(older)
    write_json(path, record)
    tokens = folder.rename(tmp_path / "older")
    folder.mkdir()
    for split in ("train", "val", "test"):
        (folder / f"{split}.txt").write_text("Some text.<|endoftext|>")
    now = open_corpus(str(folder), tmp_path / "other" / "data")
    shutil.copytree(tokens, older / now.older[0].name)
    elsewhere = changed(config, workdir=str(tmp_path / "other"))
    with pytest.raises(
        UserError, match=f"tokens are in {older}/.*, which can be given"
    ):
        evaluate(elsewhere)


def test_results_on_corpora_of_long_names_have_files(asked, tmp_path):
    config, found = asked(), set()
    for size in (40, 97):
        folder = Path(write_corpus(tmp_path / str(size), size))
        meta = {"vocab_size": 97, "name": "語" * 100}
        (folder / "meta.json").write_text(json.dumps(meta))
        evaluate(changed(config, **{"data.source": str(folder)}))
        paths = {*Path(config.model_path).glob("evaluation_*.json")}
        (new,) = paths - found
        assert new.name.startswith("evaluation_語語") and "_val_step6" in new.name
        found = paths


def test_tokens_that_are_numbered_in_another_way_are_refused(own_corpus):
    config, folder = own_corpus
    path = Path(config.model_path) / "config.json"
    record = json_of(path)
    for order, words in ((1, None), (-1, "numbers its tokens in another way")):
        letters = [chr(200 + number) for number in range(97)][::order]
        meta = {"vocab_size": 97, "itos": letters}
        (folder / "meta.json").write_text(json.dumps(meta))
        corpus = open_corpus(str(folder), folder)
        named = changed(config, **{"data.source": str(folder)})
        if words is None:
            record["corpus"] = corpus.content
            write_json(path, record)
            evaluate(named)
            continue
        with pytest.raises(UserError, match=words):
            evaluate(named)
        with pytest.raises(UserError, match="tokenizer_sha256 changed"):
            evaluate(config)


def test_what_does_not_fit_the_run_is_refused_and_nothing_written(asked, tmp_path):
    asked()
    wide = {"data.source": write_corpus(tmp_path / "wide", vocab_size=98)}
    narrow = {"data.source": write_corpus(tmp_path / "narrow", vocab_size=50)}
    before = snapshot(tmp_path / "runs")
    for knobs, words in (
        (wide, "ids up to 97, but the model .* 97 tokens"),
        (narrow | {"split": "test"}, "no 'test' split .*present: val"),
        ({"model.n_layer": 2}, "model.n_layer is 2, .* trained with 1"),
        ({"model.band_sizes": (90, 7)}, r"band_sizes is .* trained with \(\)"),
        ({"model.dropout": 0.5}, "model.dropout is 0.5, .* trained with 0.0"),
        ({"mesh.data": 3}, "evaluate.batch_size = 64 cannot be split over 3"),
    ):
        with pytest.raises(UserError, match=words) as error:
            evaluate(asked(**knobs))
        assert "\n" not in str(error.value)
    assert snapshot(tmp_path / "runs") == before


def test_tokens_of_another_tokenizer_are_refused(asked, tmp_path):
    config = asked()
    describe(config, tokenizer="gpt2", vocab_size=5000)
    config.data.source = write_corpus(tmp_path / "sotu", 4096, tokenizer="sotu4096")
    with pytest.raises(UserError, match="tokens of sotu4096, .* those of gpt2"):
        evaluate(config)


def test_tokens_of_a_larger_tokenizer_are_refused_by_the_name_of_the_own_one(
    asked, tmp_path
):
    config = asked()
    describe(config, tokenizer="sotu4096", vocab_size=4096)
    config.data.source = write_corpus(tmp_path / "text", 50257, tokenizer="gpt2")
    with pytest.raises(UserError, match=r"set --config\.data\.tokenizer=sotu4096"):
        evaluate(config)


def test_spare_token_ids_of_a_model_can_be_evaluated(tiny_config, tmp_path):
    """model.vocab_size, not the training corpus, says what a model knows."""
    steps = {"train.steps": 1, "train.warmup_steps": 0}
    run = execute(changed(tiny_config, **steps, **{"model.vocab_size": 120}))
    config = changed(tiny_config, task="evaluate", model_path=str(run))
    config.data.source = write_corpus(tmp_path / "wide", vocab_size=110)
    assert math.isfinite(evaluate(config)["loss"])


def test_the_devices_and_the_compute_dtype_are_those_of_the_command(asked):
    wanted = evaluate(asked("gpt_pca_k8"))["loss"]
    split = {"evaluate.batch_size": 32, "mesh.data": 2, "mesh.fsdp": 2}
    found = evaluate(asked("gpt_pca_k8", **split))
    assert found["loss"] == pytest.approx(wanted, rel=1e-6)
    assert found["device"].startswith("4 x")
    rounded = evaluate(asked("gpt_pca_k8", **{"model.compute_dtype": "bfloat16"}))
    assert 0 < abs(rounded["loss"] - wanted) < 0.01


@pytest.mark.parametrize("process", [0, 1])
def test_only_the_first_of_several_processes_prints_and_writes(
    process, asked, capfd, monkeypatch
):
    config = asked()
    before = snapshot(Path(config.model_path))
    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(tasks, "sample", lambda settings: ["one", "two"])
    main.run(Settings.of(config), "a command", print_only=False)
    main.run(Settings.of(changed(config, task="sample")), "a command", print_only=False)
    printed = capfd.readouterr().out
    if process == 0:
        assert json.loads(printed[: printed.index("}\none") + 1])["step"] == 6
        assert printed.endswith("one\n---\ntwo\n")
    else:
        assert printed == ""
    assert (snapshot(Path(config.model_path)) == before) == (process > 0)
