"""The model and the tokens that files of a table are of, wherever they were written."""

import json

import numpy as np
import pytest
from command_line import CONFIGS, call
from test_export import MODELS, V, run_export, write_run, write_table_of_another
from tokenizer_folders import word_level

from pcagpt.config.schema import InitSettings
from pcagpt.data import vocabulary
from pcagpt.data.corpus import describe_corpus
from pcagpt.errors import UserError
from pcagpt.factorization import factor_files
from pcagpt.json_files import write_json
from pcagpt.run import initialise
from pcagpt.run.folder import read_record, write_record
from pcagpt.run.origin import origin_of

pytestmark = pytest.mark.usefixtures("quick")
TEXTS = [chr(200 + number) for number in range(V)]
KNOBS = {".npy": "import_wte_npy", ".npz": "import_scale_matrices_npz"}


def corpus_of(folder, texts):
    folder.mkdir()
    for split in ("train", "val"):
        np.arange(V, dtype=np.uint16).tofile(folder / f"{split}.bin")
    (folder / "meta.json").write_text(json.dumps({"vocab_size": V, "itos": texts}))
    return describe_corpus(str(folder))


def made_by(config, source, workdir, *words):
    words = (f"--config.workdir={workdir}", *words)
    asked = f"--config={CONFIGS / config}", f"--config.model_path={source}", *words
    outcome = call(*asked)
    assert outcome.code == 0, outcome


def exported(name, tmp_path, seed=0, is_older=False):
    """(the run, the folder of its files) of a model in `MODELS`."""
    record = {"characters": TEXTS, "tokenizer_sha256": "of a meta file"}
    run = write_run(tmp_path / name, seed=seed, record=record, **MODELS[name])
    folder = run_export(run, tmp_path, "npz")
    if is_older:
        found = json.loads((folder / "pcagpt.json").read_text())
        assert found.pop("tokens")["characters"] == TEXTS
        write_json(folder / "pcagpt.json", found)
    return run, folder


def written(how, tmp_path):
    """(the model, the files that one of the places that write tables wrote)."""
    if how == "another architecture":
        table = write_table_of_another(tmp_path / "another")
        told = {"characters": TEXTS, "tokenizer_sha256": "of a meta file"}
        write_record(table, read_record(table) | told)
        return table.parent / "theirs", run_export(table, tmp_path, "npz")
    name, _, of_table = how.partition(", ")
    model, folder = exported(name, tmp_path, is_older=of_table == "older")
    if of_table == "factorized":
        words = "--config.ranks=4", "--config.factorize.method=svd"
        made_by("factorize.py", folder / "wte.npy", tmp_path, *words)
        return model, tmp_path / "pca_factorized"
    if of_table in ("compressed", "advised"):
        words = ["--config.compress.methods=svd", "--config.compress.bands=1"]
        is_advised = of_table == "advised"
        bound = f"compress.max_bytes={V * 40}" if is_advised else "ranks=4"
        words += [f"--config.{bound}"]
        made_by("compress.py", folder / "wte.npy", tmp_path, *words)
        (found,) = (tmp_path / "compressed_table").glob("*/factors")
        return model, found
    return model, folder


@pytest.mark.parametrize(
    "how",
    [
        "full", "one rank", "bands", "another architecture", "full, older",
        "one rank, older", "bands, older", "full, factorized", "full, compressed",
        "full, advised",
    ],
)  # fmt: skip
def test_each_file_of_a_table_tells_its_tokens_and_its_model(how, tmp_path):
    same = corpus_of(tmp_path / "same", TEXTS)
    other = corpus_of(tmp_path / "other", TEXTS[::-1])
    model, folder = written(how, tmp_path)
    stranger = write_run(tmp_path / "stranger", seed=1)
    inits = [
        {KNOBS[path.suffix]: str(path)}
        for path in sorted(folder.glob("*.np[yz]"))
        if path.name.startswith(("wte", "scale"))
    ]
    if (folder / factor_files.ORDER_FILE).exists():
        inits.append({"import_bands": str(folder)})
    assert inits
    for init in inits:
        alone = InitSettings(**init)
        initialise.check_tokens(alone, same, "auto")
        with pytest.raises(UserError, match="numbers its tokens in another way than"):
            initialise.check_tokens(alone, other, "auto")
        if how != "another architecture":  # Its blocks are not of GPT-2.
            own = InitSettings(**init, blocks_from=str(model))
            assert initialise.mixed_origins(own) is None
        said = initialise.mixed_origins(InitSettings(**init, blocks_from=str(stranger)))
        assert said.endswith(f"{stranger} are not of one model")


def test_a_renamed_table_and_one_beside_another_form_keep_their_model(tmp_path):
    _, folder = exported("full", tmp_path, is_older=True)
    known = origin_of(folder / "wte.npy")
    table = (folder / "wte.npy").rename(folder / "table.npy")
    assert origin_of(table) == known
    assert known.tokens["vocab_size"] == V
    table.unlink()  # As in an export that has no arrays.
    assert origin_of(folder / "model.safetensors") == known._replace(tokens=None)


def test_factors_of_two_exports_are_noticed(tmp_path):
    _, first = exported("one rank", tmp_path / "first")
    _, second = exported("one rank", tmp_path / "second", seed=1)

    def said(wte, scales):
        table, up = wte / "wte_pca_k4.npy", scales / "scale_mats_pca_k4.npz"
        return initialise.mixed_origins(
            InitSettings(import_wte_npy=str(table), import_scale_matrices_npz=str(up))
        )

    assert said(first, first) is None
    assert said(first, second).endswith("npz are not of one model")


def test_an_export_of_a_compressed_model_belongs_to_the_first_model_too(tmp_path):
    run, _ = exported("one rank", tmp_path)
    made = {"run": "d", "step": 3, "fingerprint": "of d", "method": "svd"}
    write_record(run, read_record(run) | {"compressed": made})
    path = run_export(run, tmp_path / "again", "npz") / "wte_pca_k4.npy"
    assert "of d" in origin_of(path).models
    factor_files.write_bands(run / "factors", factor_files.read(path.parent, 4, False))
    init = {"import_wte_npy": str(path), "import_bands": str(run / "factors")}
    assert initialise.mixed_origins(InitSettings(**init)) is None


def test_an_export_keeps_no_path_of_a_tokenizer(tmp_path):
    (tmp_path / "own").mkdir()
    word_level(tmp_path / "own")
    file, run = tmp_path / "own/tokenizer.json", write_run(tmp_path / "run")
    made = run_export(run, tmp_path, "npz", f"--config.data.tokenizer={file}")
    tokens = json.loads((made / "pcagpt.json").read_text())["tokens"]
    assert tokens["tokenizer"] is None
    assert tokens["tokenizer_sha256"] == vocabulary.describe(str(file)).sha256
