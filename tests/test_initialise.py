"""What a run starts from: imported factors, another run's blocks, and freezing."""

import dataclasses
import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import (
    assert_equal,
    changed,
    execute,
    gpt_config,
    job,
    json_of,
    setup,
    start,
)

from pcagpt import trees
from pcagpt.config import Settings
from pcagpt.config.schema import InitSettings
from pcagpt.data.corpus import open_corpus
from pcagpt.errors import UserError
from pcagpt.factorization import BandFactors, FactorizedTable, factor_files
from pcagpt.json_files import write_json
from pcagpt.model import GPT
from pcagpt.run import checkpoint, fingerprint, initialise
from pcagpt.run.folder import read_record, write_record
from pcagpt.training import loop

pytestmark = pytest.mark.usefixtures("quick")
MODEL = gpt_config(
    vocab_size=97, block_size=16, n_layer=1, n_head=2, n_embd=32, n_embd_wte=8
)


def leaves(run_dir, step=""):
    """{path: array} of a checkpoint's parameters."""
    weights = checkpoint.load_weights(run_dir / "ckpt" / str(step))
    return trees.flatten(weights["params"])


def template(config=MODEL):
    tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
    shapes = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens)["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def imported(config=MODEL, params=None, **init):
    """{path: array} of all imports."""
    init = InitSettings(**init)
    _, table = initialise.with_bands(Settings(init=init))
    params = params or template(config)
    return initialise.imported_weights(init, table, config, params, seed=1)


def refusal(config=MODEL, **init):
    """The one line with which an import is refused."""
    with pytest.raises(UserError) as caught:
        imported(config, **init)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def d_dir(finished_experiment):
    return Path(finished_experiment.workdir) / "gpt_baseline"


@pytest.fixture
def factors(tmp_path):
    """Writes table.npy and scales.npz; returns the knobs that import them."""

    def write(table=None, **scales):
        random = np.random.default_rng(0)
        table = random.normal(size=(97, 8)) if table is None else table
        up = random.normal(size=(8, 32)).astype(np.float32)
        np.save(tmp_path / "table.npy", table)
        np.savez(tmp_path / "scales.npz", **{"scale_up": up, "scale_down": up} | scales)
        return {
            "import_wte_npy": str(tmp_path / "table.npy"),
            "import_scale_matrices_npz": str(tmp_path / "scales.npz"),
        }

    return write


# Where A, B and C start


@pytest.fixture
def started(finished_experiment, tmp_path):
    """A function: the weights that a run of the finished experiment started from."""

    def parameters(arm):
        config = changed(
            finished_experiment, task="train", arm=arm, **{"model.n_embd_wte": 8}
        )
        state, _ = start(setup(config), tmp_path / arm)
        return trees.flatten(jax.tree.map(np.asarray, state.params))

    return parameters


def test_arms_start_from_the_factors_d_s_blocks_or_random_weights(
    finished_experiment, d_dir, started
):
    a, b, c = map(started, ("pca", "pca_finetune", "random"))
    d, folder = leaves(d_dir), d_dir.parent / "pca_factorized"
    table, scales = (
        np.load(path(folder, 8))
        for path in (factor_files.table_path, factor_files.scale_path)
    )
    for params in (a, b):
        np.testing.assert_array_equal(params["embed/band_0/wte"][:97], table)
        assert not params["embed/band_0/wte"][97:].any()
        scale_up = params["embed/band_0/scale_up"]
        np.testing.assert_array_equal(scale_up, scales["scale_up"])
        assert "embed/band_0/scale_down" not in params  # tied: one leaf

    def others(params):
        return {n: leaf for n, leaf in params.items() if not n.startswith("embed/")}

    assert {name.split("/")[0] for name in others(b)} == {"wpe", "block_0", "ln_f"}
    assert_equal(others(b), others(d))
    assert_equal(others(a), others(c))
    kernel = "block_0/attn/qkv/kernel"
    assert not np.array_equal(a[kernel], d[kernel])


@pytest.mark.parametrize("method", ["svd", "pca"])
def test_b_at_full_rank_starts_at_the_loss_of_d(
    method, finished_experiment, d_dir, tmp_path
):
    shutil.copytree(d_dir, tmp_path / "gpt_baseline")
    config = changed(
        finished_experiment,
        workdir=str(tmp_path),
        **{"factorize.method": method, "factorize.singular_value_split": 0.5},
    )
    execute(changed(config, task="factorize", ranks=(32,), model_path=str(d_dir)))
    b = setup(
        changed(config, task="train", arm="pca_finetune", **{"model.n_embd_wte": 32})
    )
    state, _ = start(b, tmp_path / "b")
    found = b.validation(state.variables).window_losses
    wanted = np.load(d_dir / "val_window_losses.npy")
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


@pytest.mark.parametrize("from_run", [False, True])
def test_the_mean_of_a_centred_factorization_is_added_to_every_position(
    from_run, d_dir, factors
):
    mean = np.arange(32, dtype=np.float32)
    blocks = {"blocks_from": str(d_dir)} if from_run else {}
    params = template() | {"wpe": np.ones((16, 32), np.float32)}
    found = imported(params=params, **factors(mean=mean), **blocks)
    before = leaves(d_dir)["wpe"] if from_run else params["wpe"]
    np.testing.assert_array_equal(found["wpe"], before + mean)


def test_blocks_can_be_taken_from_any_checkpoint(d_dir):
    found, wanted = imported(blocks_from=str(d_dir / "ckpt/3")), leaves(d_dir, 3)
    assert len(found) == len(trees.flatten(template())) - 2
    assert_equal(found, {path: wanted[path] for path in found})
    newest, third, sixth = (
        initialise.import_hashes(Settings().replace({"init.blocks_from": str(path)}))
        for path in (d_dir, d_dir / "ckpt/3", d_dir / "ckpt/6")
    )
    assert newest == sixth != third


def test_a_table_for_the_baseline_is_imported_at_full_width(factors):
    dense = dataclasses.replace(MODEL, n_embd_wte=0)
    table = np.random.default_rng(0).normal(size=(97, 32)).astype(np.float16)
    found = imported(dense, import_wte_npy=factors(table)["import_wte_npy"])
    assert list(found) == ["embed/band_0/wte"]
    assert found["embed/band_0/wte"].shape == (128, 32)
    np.testing.assert_array_equal(found["embed/band_0/wte"][:97], table)


def test_an_untied_model_takes_two_different_scale_matrices(factors):
    untied = dataclasses.replace(MODEL, n_embd_wte_scale_tying=False)
    down = np.full((8, 32), 2.0)
    found = imported(untied, **factors(scale_down=down))
    np.testing.assert_array_equal(found["embed/band_0/scale_down"], down)
    assert not np.array_equal(found["embed/band_0/scale_up"], down)


def test_bands_hold_the_tokens_by_falling_count(tiny_config, tmp_path):
    bands = {"model.band_sizes": (10, 87), "model.band_ranks": (0, 8)}
    made = setup(changed(tiny_config, arm="random", **bands))
    state, _ = start(made, tmp_path / "run")
    counts = np.bincount(np.asarray(made.corpus.tokens("train")), minlength=97)
    order = np.argsort(state.constants["embed"]["position_of_token"])
    np.testing.assert_array_equal(order, np.argsort(-counts, kind="stable"))


def test_an_unknown_property_to_keep_is_not_taken_for_all(factors):
    with pytest.raises(KeyError, match="some"):
        imported(keep="some", **factors())


# Freezing


def test_a_frozen_table_stays_as_it_was_imported(tiny_config, factors, tmp_path):
    tiny_config.update_from_flattened_dict(
        {"arm": "pca", "model.n_embd_wte": 8, "model.n_embd_wte_scale_tying": False}
        | {"train.weight_decay": 0.5, "init.import_wte_freeze": True}
        | {f"init.{name}": path for name, path in factors().items()}
    )
    made = setup(tiny_config)
    state, shardings = start(made, tmp_path / "run")
    before = trees.flatten(jax.tree.map(np.array, state.params))
    step = loop.compile_step(made, state, shardings, None)
    state, _ = step(state, made.batch(0), None)
    after = trees.flatten(state.params)
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same == {"embed/band_0/wte"}
    table = np.load(tiny_config.init.import_wte_npy).astype(np.float32)
    np.testing.assert_array_equal(after["embed/band_0/wte"][:97], table)


def test_a_freeze_without_its_import_is_refused():
    for freeze, (name, _) in initialise.FREEZES.items():
        with pytest.raises(UserError, match=rf"init.{freeze} is on but .*{name}"):
            initialise.frozen_patterns(InitSettings(**{freeze: True}))
    assert initialise.frozen_patterns(InitSettings()) == ()


# What does not fit


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (np.zeros((97, 9)), r"(97, 9), but this model needs (97, 8)"),
        (np.zeros((128, 8)), r"(128, 8), but this model needs (97, 8)"),
        (np.zeros((97, 8), np.int32), "has dtype int32: floating point is needed"),
        (np.full((97, 8), np.nan), "holds nan at (0, 0): all must be finite"),
        (np.zeros(97), "has shape (97,): 2 dimensions are needed"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(table, words, factors):
    message = refusal(import_wte_npy=factors(table)["import_wte_npy"])
    assert "table.npy" in message
    assert words in message


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        (
            {"scale_up": np.zeros((9, 32)), "scale_down": np.zeros((9, 32))},
            "is (9, 32), but this model needs (8, 32)",
        ),
        ({"scale_down": np.zeros((7, 32))}, "scale_down (7, 32)"),
        ({"scale_down": np.zeros((8, 32))}, "two different scale matrices, but this"),
        ({"scale_up": np.zeros((8, 32), int)}, "'scale_up' has dtype int64"),
        ({"scale_up": np.full((8, 32), np.inf)}, "'scale_up' holds inf at (0, 0)"),
        ({"mean": np.zeros(31)}, "mean (31,)"),
        ({"mean": np.full(32, np.nan)}, "'mean' holds nan at (0,)"),
    ],
)
def test_scale_matrices_that_do_not_fit_are_refused(scales, words, factors):
    path = factors(**scales)["import_scale_matrices_npz"]
    message = refusal(import_scale_matrices_npz=path)
    assert "scales.npz" in message
    assert words in message


def test_factors_of_zeros_are_refused(factors, tmp_path):
    zeros = {name: np.zeros((8, 32), np.float32) for name in ("scale_up", "scale_down")}
    for name, path in factors(np.zeros((97, 8)), **zeros).items():
        assert f"init.{name}: {path} holds only zeros" in refusal(**{name: path})
    band = BandFactors(np.zeros((97, 8), np.float32), np.eye(8, 32, dtype=np.float32))
    factor_files.write_bands(tmp_path, FactorizedTable.of_one_band(band))
    message = refusal(import_bands=str(tmp_path))
    assert f"init.import_bands: {tmp_path} holds only zeros" in message


def test_scale_matrices_without_one_of_the_two_are_refused(tmp_path):
    np.savez(tmp_path / "half.npz", scale_up=np.zeros((8, 32)))
    message = refusal(import_scale_matrices_npz=str(tmp_path / "half.npz"))
    assert "half.npz has no array 'scale_down', only ['scale_up']" in message


@pytest.mark.parametrize("name", ["import_wte_npy", "import_scale_matrices_npz"])
def test_missing_damaged_and_swapped_files_are_refused(name, factors, tmp_path):
    path = tmp_path / f"given.{name[-3:]}"
    for content, words in (
        (None, "does not exist"),
        (b"no array", "is not a readable array file"),
        (b"PK\x03\x04 cut off", "is not a "),
    ):
        if content is not None:
            path.write_bytes(content)
        message = refusal(**{name: str(path)})
        assert str(path) in message
        assert words in message
    [other] = [path for knob, path in factors().items() if knob != name]
    assert f"is not a .{name[-3:]} file" in refusal(**{name: other})


def test_scale_matrices_for_a_model_without_are_refused(factors):
    dense = dataclasses.replace(MODEL, n_embd_wte=0)
    path = factors()["import_scale_matrices_npz"]
    message = refusal(dense, import_scale_matrices_npz=path)
    assert "has no scale matrices: set model.n_embd_wte=8" in message


def test_files_of_one_table_are_refused_by_a_model_of_several_bands(factors):
    banded = dataclasses.replace(MODEL, band_sizes=(10, 87), band_ranks=(8, 4))
    message = refusal(banded, **factors())
    assert "this model has 2 bands: leave model.band_sizes empty" in message


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"n_layer": 2}, "set model.n_layer=1"),
        ({"bias": False}, "set model.bias=True"),
        ({"block_size": 8}, "set model.block_size=16"),
        ({"n_embd": 16}, "set model.n_embd=32"),
        ({"n_head": 4, "n_layer": 2}, "set model.n_layer=1, model.n_head=2"),
    ],
)
def test_blocks_of_another_model_are_refused(other, words, d_dir):
    message = refusal(dataclasses.replace(MODEL, **other), blocks_from=str(d_dir))
    assert "init.blocks_from" in message
    assert str(d_dir) in message
    assert words in message


def test_blocks_of_a_model_of_other_tokens_are_refused(
    tiny_config, d_dir, corpus_folder, factors, tmp_path
):
    source = Path(shutil.copytree(d_dir, tmp_path / "source"))
    corpus = Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))
    for folder, order in ((source, 1), (corpus, -1)):
        itos = [chr(200 + number) for number in range(97)][::order]
        meta = json.dumps({"vocab_size": 97, "itos": itos})
        (corpus / "meta.json").write_text(meta)
        if folder == source:
            content = open_corpus(str(corpus), corpus).content
            write_record(source, read_record(source) | {"corpus": content})
    knobs = {f"init.{name}": path for name, path in factors().items()}
    knobs |= {"init.blocks_from": str(source), "data.source": str(corpus)}
    knobs |= {"arm": "pca_finetune", "model.n_embd_wte": 8}
    with pytest.raises(UserError, match="numbers its tokens in another way"):
        job(changed(tiny_config, **knobs)).check(set())


def test_factors_of_a_model_of_other_tokens_are_refused(
    tiny_config, corpus_folder, d_dir, tmp_path
):
    corpus = Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))
    itos = [chr(200 + number) for number in range(97)]
    meta = {"vocab_size": 97, "itos": itos}
    (corpus / "meta.json").write_text(json.dumps(meta))
    source = Path(shutil.copytree(d_dir, tmp_path / "source"))
    content = open_corpus(str(corpus), corpus).content
    stated = {"corpus": content, "characters": itos}
    write_record(source, record := read_record(source) | stated)
    knobs = {"task": "factorize", "model_path": str(source), "data.source": ""}
    folder = execute(changed(tiny_config, **knobs))
    bands = tmp_path / "model" / "factors"
    factor_files.write_bands(bands, factor_files.read(folder, 8, False))
    made = {"step": 6, "fingerprint": fingerprint.of(source)}
    write_record(bands.parent, {**record, "compressed": made})
    rows = str(factor_files.table_path(folder, 8))
    scales = str(factor_files.scale_path(folder, 8))
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    metadata = json_of(older / "metadata.json")
    assert metadata.pop("tokens")["characters"] == itos
    write_json(older / "metadata.json", metadata)
    table = str(factor_files.table_path(older, 8))
    arm = {"arm": "pca", "model.n_embd_wte": 8, "data.source": str(corpus)}
    for order, words in ((1, None), (-1, "numbers its tokens in another way than")):
        (corpus / "meta.json").write_text(json.dumps(meta | {"itos": itos[::order]}))
        for init in (
            {"import_wte_npy": rows},
            {"import_scale_matrices_npz": scales},
            {"import_bands": str(bands)},
            {"import_wte_npy": str(bands / "wte_band0.npy")},
            {"import_wte_npy": table},
        ):
            knobs = arm | {f"init.{name}": path for name, path in init.items()}
            asked = job(changed(tiny_config, **knobs))
            with pytest.raises(UserError, match=words) if words else nullcontext():
                asked.check(set())
    shutil.rmtree(source)  # Nothing is known of its tokens any more.
    asked.check(set())


def test_more_blocks_than_the_model_has_are_refused(d_dir, monkeypatch):
    deeper = template(dataclasses.replace(MODEL, n_layer=2))
    monkeypatch.setattr(checkpoint, "load_weights", lambda _: {"params": deeper})
    message = refusal(blocks_from=str(d_dir))
    assert f"init.blocks_from={d_dir} holds 'block_1/" in message
    assert "the two models differ in model.n_layer" in message


def test_an_import_that_does_not_fit_leaves_an_overwritten_run_as_it_was(
    tiny_config, factors, finished_experiment
):
    shutil.copytree(finished_experiment.workdir, tiny_config.workdir)
    run_dir = Path(tiny_config.workdir) / "gpt_pca_k8"
    before = leaves(run_dir)
    tiny_config.update_from_flattened_dict(
        {"arm": "pca", "model.n_embd_wte": 8, "overwrite": True}
        | {f"init.{name}": p for name, p in factors(np.zeros((97, 4))).items()}
    )
    with pytest.raises(UserError, match="but this model needs"):
        execute(tiny_config)
    assert_equal(leaves(run_dir), before)
    assert (run_dir / "result.json").exists()


def test_an_import_that_changes_after_its_check_stops_the_run(tiny_config, factors):
    knobs = {f"init.{name}": path for name, path in factors().items()}
    asked = job(changed(tiny_config, arm="pca", **{"model.n_embd_wte": 8}, **knobs))
    checked = asked.check(set())
    factors(np.ones((97, 8)))
    with pytest.raises(UserError, match="import of import_wte_npy was changed"):
        asked.run(checked)
    assert asked.status().words == "to do"


def test_factors_and_blocks_of_different_models_are_noticed(d_dir, tmp_path, factors):
    folder, bands = d_dir.parent / "pca_factorized", tmp_path / "model" / "factors"
    table = str(factor_files.table_path(folder, 8))
    step_3, unknown = str(d_dir / "ckpt/3"), factors()["import_scale_matrices_npz"]
    made = {"step": 3, "fingerprint": fingerprint.of(step_3)}
    write_record(bands.parent, {"run_id": "a", "compressed": made})
    for init, words in (
        ({"import_wte_npy": table}, None),
        ({"import_wte_npy": table, "blocks_from": str(d_dir)}, None),
        ({"import_scale_matrices_npz": unknown, "blocks_from": step_3}, None),
        ({"import_bands": str(bands), "blocks_from": step_3}, None),
        ({"import_wte_npy": table, "blocks_from": step_3}, "k8.npy and .*/3 are not"),
        ({"import_bands": str(bands), "blocks_from": str(d_dir)}, "factors and .* are"),
        ({"import_bands": str(bands), "import_wte_npy": table}, "k8.npy and .* are"),
    ):
        said = initialise.mixed_origins(InitSettings(**init))
        assert re.search(words, said) if words else said is None


@pytest.mark.parametrize("how", ["method", "singular_value_split", "none"])
def test_factors_of_two_factorizations_are_noticed(how, d_dir, tmp_path):
    folder = d_dir.parent / "pca_factorized"
    other = shutil.copytree(folder, tmp_path / "other")
    metadata = json_of(other / factor_files.METADATA_FILE)
    if how != "none":
        metadata[how] = {"method": "pca", "singular_value_split": 1.0}[how]
    write_json(other / factor_files.METADATA_FILE, metadata)
    said = initialise.mixed_origins(
        InitSettings(
            import_wte_npy=str(factor_files.table_path(folder, 8)),
            import_scale_matrices_npz=str(factor_files.scale_path(other, 8)),
        )
    )
    if how == "none":
        assert said is None
    else:
        assert f"are not of one factorization, because they differ in {how}:" in said


def test_the_files_of_a_factorization_are_imported_and_hashed(d_dir):
    folder = d_dir.parent / "pca_factorized"
    init = {
        "import_wte_npy": str(factor_files.table_path(folder, 8)),
        "import_scale_matrices_npz": str(factor_files.scale_path(folder, 8)),
    }
    assert imported(**init).keys() == {"embed/band_0/wte", "embed/band_0/scale_up"}
    knobs = {f"init.{name}": path for name, path in init.items()}
    hashes = initialise.import_hashes(Settings().replace(knobs))
    assert hashes.keys() == init.keys()
    assert len(set(hashes.values())) == 2
