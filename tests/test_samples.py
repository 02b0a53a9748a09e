"""Samples in the reports: which models write, after what, and when they are kept."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import VOCAB_SIZE
from runs import changed, execute

from pcagpt.config import Settings
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.pipeline import compress as compress_task
from pcagpt.pipeline import samples
from pcagpt.pipeline.compress import compress
from pcagpt.run import fingerprint
from pcagpt.run.continuation import drawn_after
from pcagpt.run.generate import generate
from pcagpt.run.trained import Run

NAMES = ["D baseline", "A PCA-scratch", "B PCA-finetune", "C random-scratch"]
TOKENIZER = CharacterTokenizer(tuple(chr(0x4E00 + n) for n in range(VOCAB_SIZE)))


@pytest.fixture
def copied(finished_experiment, tmp_path):
    """The config of a copy of the finished experiment."""
    workdir = shutil.copytree(finished_experiment.workdir, tmp_path / "copy")
    return changed(finished_experiment, workdir=str(workdir))


@pytest.fixture
def readable(copied, monkeypatch):
    """The same; its tokens stand for characters."""
    monkeypatch.setattr(samples, "tokenizer_of", lambda run, settings: TOKENIZER)
    monkeypatch.setattr(samples, "TOKENS", 6)
    return copied


def results_of(config):
    execute(config)
    return json.loads((Path(config.workdir) / "results.json").read_text())


def test_d_and_the_arms_write_after_the_same_pieces_of_the_text(
    readable, corpus_folder
):
    results = results_of(readable)
    tokens = np.fromfile(corpus_folder / "val.bin", np.uint16)
    pieces = [tokens[start : start + 12] for start in (0, 334, 668)]
    shown = [TOKENIZER.decode(piece.tolist()) for piece in pieces]
    assert [sample["prompt"] for sample in results["samples"]] == shown
    model, variables = Run.open(Path(readable.workdir) / "gpt_baseline").load(
        Settings.of(readable).model
    )
    for sample, piece in zip(results["samples"], pieces, strict=True):
        assert list(sample["texts"]) == NAMES
        drawn = generate(model, variables, piece.astype(np.int32), 1, 1, 0.8)
        ids = [int(token[0]) for token in itertools.islice(drawn, 6)]
        assert sample["texts"]["D baseline"] == TOKENIZER.decode(ids)
        assert (sample["seed"], sample["temperature"]) == (1, 0.8)
        text = (Path(readable.workdir) / "report.md").read_text("utf-8")
        assert sample["texts"]["C random-scratch"] in text


def test_samples_are_kept_as_long_as_the_runs_are_the_same(readable, monkeypatch):
    first = results_of(readable)
    with monkeypatch.context() as patch:
        patch.setattr(samples, "drawn_after", None)  # Nothing may be drawn.
        assert results_of(readable)["samples"] == first["samples"]
    drawn = []

    def count(*arguments, **options):
        drawn.append(arguments)
        return drawn_after(*arguments, **options)

    monkeypatch.setattr(samples, "drawn_after", count)
    known = dict(first, samples_of=first["samples_of"] | {NAMES[1]: "another"})
    settings, workdir = Settings.of(readable), Path(readable.workdir)
    assert samples.experiment_samples(settings, workdir, first, known) == {
        name: first[name] for name in ("samples", "samples_of")
    }
    assert len(drawn) == 3 * len(NAMES)
    # A person has changed the file, which is no longer sealed.
    (workdir / "results.json").write_text(json.dumps(first | {"rows": []}))
    assert results_of(readable)["samples"] == first["samples"]
    assert len(drawn) == 2 * 3 * len(NAMES)


def test_bare_tokens_have_no_samples_and_no_warning(copied, capfd):
    results = results_of(copied)
    assert "samples" not in results
    assert "samples" not in capfd.readouterr().err


def test_a_lost_checkpoint_leaves_out_the_samples_and_says_so(readable, caplog):
    first = results_of(readable)
    (Path(readable.workdir) / "results.json").unlink()
    shutil.rmtree(Path(readable.workdir) / "gpt_pca_k8" / "ckpt")
    settings, workdir = Settings.of(readable), Path(readable.workdir)
    assert samples.experiment_samples(settings, workdir, first, {}) == {}
    assert "the report has no samples: " in caplog.text and "gpt_pca_k8" in caplog.text


def compressing(readable, workdir):
    """The config of a sweep of the baseline."""
    return changed(
        readable,
        task="compress",
        model_path=f"{readable.workdir}/gpt_baseline",
        workdir=str(workdir),
        ranks=(4, 8),
        **{"compress.methods": "svd,coded", "compress.bands": (1,)},
        **{"compress.bits": (8,), "compress.calibration_tokens": 512},
    )


def test_a_sweep_has_samples_of_d_and_of_its_models_of_one_size(readable, tmp_path):
    config = compressing(readable, tmp_path)
    folder = tmp_path / "compressed"
    for _ in range(2):  # A repeated sweep keeps them.
        compress(Settings.of(config), "a command")
        sweep = json.loads((folder / "sweep.json").read_text())
        for sample in sweep["samples"]:
            names = list(sample["texts"])
            assert names in (["D", f"best_coded_k{k}", f"best_k{k}"] for k in (4, 8))
        text = (folder / "report.md").read_text("utf-8")
        assert "### What do they write?" in text


def test_a_report_shows_no_samples_of_earlier_models(readable, tmp_path, monkeypatch):
    config = changed(compressing(readable, tmp_path), ranks=(8,))
    compress(Settings.of(config), "a command")
    path = tmp_path / "compressed/sweep.json"
    assert json.loads(path.read_text())["samples"]
    monkeypatch.setattr(compress_task, "samples_of", lambda *_, **__: {})
    compress(Settings.of(config), "a command")
    assert not {"samples", "samples_of"} & json.loads(path.read_text()).keys()
    text = (tmp_path / "compressed/report.md").read_text("utf-8")
    assert "### What do they write?" not in text


def test_a_sweep_names_the_commits_that_drew_its_samples(
    readable, tmp_path, monkeypatch
):
    config = changed(compressing(readable, tmp_path), ranks=(8,))
    draw = compress_task.samples_of
    sessions = ("one", False), ("two", True), ("three", True), ("four", False)
    for (commit, draws), known in zip(sessions, (1, 2, 2, 2), strict=True):
        of = draw if draws else lambda *_, **__: {}
        monkeypatch.setattr(compress_task, "samples_of", of)
        monkeypatch.setenv("PCAGPT_COMMIT", commit)
        compress(Settings.of(config), "a command")
        sweep = json.loads((tmp_path / "compressed/sweep.json").read_text())
        assert sweep["git_commit"] == ", ".join(("one", "two")[:known])
        assert bool(sweep.get("samples")) == draws


def test_a_sweep_of_a_checkpoint_has_samples_of_that_one(readable, tmp_path):
    run, measured = f"{readable.workdir}/gpt_baseline", []
    for number, path in enumerate((run, f"{run}/ckpt/6", f"{run}/ckpt/3")):
        config = compressing(readable, tmp_path / str(number))
        compress(Settings.of(changed(config, model_path=path, ranks=(8,))), "a command")
        folder = tmp_path / str(number) / "compressed"
        sweep = json.loads((folder / "sweep.json").read_text())
        measured.append(sweep["samples_of"]["D"])
        assert measured[-1] == fingerprint.of(path)
    assert measured[0] == measured[1] != measured[2]


def test_a_sweep_has_no_samples_of_models_that_are_not_in_its_rows(readable, tmp_path):
    config, written = changed(compressing(readable, tmp_path), ranks=(8,)), []
    for methods in ("svd,coded", "svd"):
        asked = changed(config, **{"compress.methods": methods})
        compress(Settings.of(asked), "a command")
        sweep = json.loads((tmp_path / "compressed/sweep.json").read_text())
        written.append(list(sweep["samples_of"]))
    assert (tmp_path / "compressed/best_coded_k8").is_dir()
    assert written == [["D", "best_coded_k8", "best_k8"], ["D", "best_k8"]]


def test_a_sweep_has_no_samples_of_the_models_of_another_d(readable, tmp_path):
    config = changed(compressing(readable, tmp_path), ranks=(8,))
    compress(Settings.of(config), "a command")
    earlier = {"model_path": f"{config.model_path}/ckpt/3", "compress.methods": "svd"}
    compress(Settings.of(changed(config, overwrite=True, **earlier)), "a command")
    folder = tmp_path / "compressed"
    assert (folder / "best_coded_k8").is_dir()
    sweep = json.loads((folder / "sweep.json").read_text())
    assert all(list(one["texts"]) == ["D", "best_k8"] for one in sweep["samples"])
