"""From a run, a checkpoint or a bare table to the files of its factorization."""

import dataclasses
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import CONFIGS, call
from runs import changed, described, execute, snapshot, write_statistics

from pcagpt.config import Settings, command_line, validate
from pcagpt.errors import UserError
from pcagpt.factorization import factor_files
from pcagpt.json_files import write_json
from pcagpt.methods import METHODS
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.run import calibrate, checkpoint, fingerprint, trained
from pcagpt.run.folder import read_record, read_result, write_record


@pytest.fixture
def baseline_dir(finished_experiment, tmp_path):
    finished = Path(finished_experiment.workdir) / "gpt_baseline"
    return shutil.copytree(finished, tmp_path / "gpt_baseline")


@pytest.fixture
def job(baseline_dir, tmp_path):
    """Rank 4 of D's table by SVD."""
    settings = Settings().replace({"ranks": (4,), "telemetry.tensorboard": False})
    return FactorizeJob(tmp_path / "pca_factorized", settings, True, baseline_dir)


def by(job, source=None, **knobs):
    """The same job of another source, or with other knobs: by(job, ranks=(8,))."""
    paths = {n if n == "ranks" else f"factorize.{n}": v for n, v in knobs.items()}
    settings = job.settings.replace(paths)
    return dataclasses.replace(job, source=source or job.source, settings=settings)


def made(job):
    """Checks and does a job; returns the metadata that it wrote."""
    job.check(set())
    job.run()
    return factor_files.read_metadata(job.folder)


def product(folder, rank):
    """The table [V, d] that the files of a rank stand for."""
    scales = factor_files.read_scale_matrices(factor_files.scale_path(folder, rank))
    table = factor_files.read_table(factor_files.table_path(folder, rank))
    mean = 0 if scales.mean is None else scales.mean
    return mean + table @ scales.scale_up


def table_of(run_dir, step):
    weights = checkpoint.load_weights(run_dir / "ckpt" / str(step))
    return weights["params"]["embed"]["band_0"]["wte"]


def test_a_model_knob_that_the_run_does_not_have_is_refused(job, baseline_dir):
    asked = {"task": "factorize", "model_path": str(baseline_dir)}
    for knob, value in (("n_head", 4), ("n_embd_wte", 8)):
        settings = job.settings.replace(asked | {f"model.{knob}": value})
        with pytest.raises(UserError, match=f"model.{knob} is {value}, but .* trained"):
            dataclasses.replace(job, settings=settings).check(set())


def test_damaged_factors_are_written_again(job):
    made(job)
    path = factor_files.table_path(job.folder, 4)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert job.status().words == "to do"
    made(job)
    assert path.read_bytes() == content
    assert job.status().words == "done"


@pytest.mark.parametrize(
    ("bands", "name"),
    [
        (1, "wte_pca_k4.npy"),
        (1, "scale_mats_pca_k4.npz"),
        (1, "spectrum.npy"),
        (2, "bands_pca_k4/wte_band0.npy"),
    ],
)
def test_factors_that_a_person_changed_are_moved_aside(bands, name, job, said, capsys):
    job = by(job, bands=bands)
    made(job)
    path = job.folder / name
    path.write_bytes(b"mine")
    (path.parent / "wte_band0_backup.npy").write_bytes(b"a backup")
    whole = path if bands == 1 else path.parent
    made(by(job, ranks=(4, 8)))  # Spectrum and metadata are written again.
    (kept,) = job.folder.glob(f"{whole.name}.replaced-*")
    assert (kept if bands == 1 else kept / path.name).read_bytes() == b"mine"
    assert len(list(job.folder.rglob("wte_band0_backup.npy"))) == 1
    assert f"{whole} was moved to {kept.name}\n" in capsys.readouterr().out
    assert f"{whole} was changed, damaged or left unfinished" in said()[0]
    assert job.status().words == "done"


def test_a_folder_that_is_removed_meanwhile_ends_the_job(job, monkeypatch):
    write = factor_files.write

    def remove_and_write(folder, *given):
        shutil.rmtree(folder)
        write(folder, *given)  # It makes the folder again.

    monkeypatch.setattr(factor_files, "write", remove_and_write)
    with pytest.raises(UserError, match=f"{job.folder} was removed or replaced"):
        made(job)


def test_a_run_is_factorized_by_its_real_rows_only(job, baseline_dir):
    metadata = made(by(job, ranks=(32,)))
    stored = table_of(baseline_dir, 6)
    assert stored.shape == (128, 32)
    assert stored[97:].any()  # Padding rows that must not count.
    np.testing.assert_allclose(product(job.folder, 32), stored[:97], atol=1e-6)
    assert (metadata["vocab_size"], metadata["n_embd"]) == (97, 32)
    assert metadata["step"] == 6


def test_a_chosen_checkpoint_is_factorized(job, baseline_dir):
    job = by(job, source=baseline_dir / "ckpt" / "3", ranks=(32,))
    assert made(job)["step"] == 3
    wanted = table_of(baseline_dir, 3)[:97]
    np.testing.assert_allclose(product(job.folder, 32), wanted, atol=1e-6)
    assert not np.allclose(wanted, table_of(baseline_dir, 6)[:97], atol=1e-6)


def test_a_bare_table_is_factorized(job, tmp_path):
    table = np.random.default_rng(0).normal(size=(50, 6))
    np.save(tmp_path / "table.npy", table)
    metadata = made(by(job, source=tmp_path / "table.npy", ranks=(2, 6)))
    np.testing.assert_allclose(product(job.folder, 6), table, atol=1e-5)
    assert (metadata["vocab_size"], metadata["n_embd"]) == (50, 6)
    assert "step" not in metadata


def test_spectrum_and_metadata_are_those_of_the_table(job, baseline_dir):
    metadata = made(by(job, ranks=(4, 16)))
    table = table_of(baseline_dir, 6)[:97].astype(np.float64)
    singular_values = np.linalg.svd(table, compute_uv=False)
    spectrum = np.load(job.folder / "spectrum.npy")
    np.testing.assert_allclose(spectrum, singular_values, rtol=1e-4)
    shares = singular_values**2 / np.sum(singular_values**2)
    entropy = -np.sum(shares * np.log(shares))
    assert metadata["effective_rank"] == pytest.approx(np.exp(entropy), rel=1e-4)
    for rank in (4, 16):
        stated = metadata["ranks"][str(rank)]
        assert stated["energy_kept"] == pytest.approx(shares[:rank].sum(), rel=1e-4)
        error = np.linalg.norm(product(job.folder, rank) - table)
        assert stated["relative_error"] == pytest.approx(
            error / np.linalg.norm(table), rel=1e-3
        )
    assert metadata["method"] == "svd"
    assert metadata["source"] == str(baseline_dir)


@pytest.mark.parametrize(("bands", "marks"), [(1, [4, 8]), (2, [])])
def test_the_spectrum_marks_ranks_and_no_bands(bands, marks, job, monkeypatch):
    drawn, marked = "pcagpt.pipeline.factorize_job.spectrum_figure", []
    monkeypatch.setattr(drawn, lambda _, ranks: marked.extend(ranks))
    made(by(job, bands=bands, ranks=(4, 8)))
    assert marked == marks


def test_a_centred_factorization_keeps_the_mean(job, baseline_dir):
    made(by(job, method="pca"))
    scales = factor_files.read_scale_matrices(factor_files.scale_path(job.folder, 4))
    table = table_of(baseline_dir, 6)[:97]
    np.testing.assert_allclose(scales.mean, table.mean(axis=0), atol=1e-7)


def test_the_split_moves_the_singular_values_between_the_two_factors(job):
    made(job)
    other = by(job, singular_value_split=1.0)
    other = dataclasses.replace(other, folder=job.folder / "other")
    made(other)
    whole = product(job.folder, 4)
    np.testing.assert_allclose(product(other.folder, 4), whole, atol=1e-6)
    table = factor_files.read_table(factor_files.table_path(other.folder, 4))
    np.testing.assert_allclose(table.T @ table, np.eye(4), atol=1e-4)


@pytest.mark.usefixtures("quick")
def test_a_checkpoint_is_read_once_also_to_calibrate_on_it(
    job, corpus_folder, monkeypatch
):
    knobs = {"train.batch_size": 8, "compress.calibration_tokens": 128}
    knobs |= {"data.source": str(corpus_folder), "mesh.data": 1}
    job = by(job, method="kl")
    job = dataclasses.replace(job, settings=job.settings.replace(knobs))
    read, load = [], checkpoint.load_weights

    def counted(path):
        read.append(path)
        return load(path)

    monkeypatch.setattr(checkpoint, "load_weights", counted)
    assert made(job)["calibration_tokens"] == 128
    assert len(read) == 1


# Again


def test_adding_a_rank_keeps_those_that_are_there(job):
    made(job)
    table = factor_files.table_path(job.folder, 4).read_bytes()
    more = by(job, ranks=(4, 8))
    assert more.status().words == "to do"
    assert made(by(job, ranks=(8,)))["ranks"].keys() == {"4", "8"}
    assert factor_files.table_path(job.folder, 4).read_bytes() == table
    assert more.status().words == "done"


@pytest.mark.parametrize("path", [factor_files.table_path, factor_files.scale_path])
def test_a_rank_without_one_of_its_files_is_to_do(path, job):
    made(job)
    path(job.folder, 4).unlink()
    assert job.status().words == "to do"


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_lost_or_damaged_spectrum_is_written_again_beside_its_factors(is_lost, job):
    before = made(job)
    files = {path: path.stat().st_ino for path in job.folder.glob("*_k4.*")}
    path = job.folder / "spectrum.npy"
    content = path.read_bytes()
    path.unlink() if is_lost else path.write_bytes(content[:-8] + bytes(8))
    assert job.status().words == "to do"
    assert dataclasses.replace(job, is_target=False).status().words == "done"
    assert made(job) == before
    assert path.read_bytes() == content
    assert {path: path.stat().st_ino for path in job.folder.glob("*_k4.*")} == files
    assert len([*job.folder.glob("spectrum.npy.replaced-*")]) == (not is_lost)
    assert job.status().words == "done"


def test_files_of_an_earlier_version_still_count_as_done(job):
    metadata = made(job)
    del metadata["bands"]
    write_json(job.folder / "metadata.json", metadata)
    assert job.status().words == "done"


def test_the_automatic_number_of_calibration_tokens_is_the_same_on_every_device(job):
    calibrated = {"method": "kl", "calibration_batch_size": 32}
    metadata = made(job) | calibrated | {"calibration_tokens": 1_048_576}
    write_json(job.folder / "metadata.json", metadata)
    assert by(job, method="kl").status().words == "done"
    write_json(job.folder / "metadata.json", metadata | {"calibration_tokens": 1_000})
    with pytest.raises(UserError, match="compress.calibration_tokens=1000 to match"):
        by(job, method="kl").status()


@pytest.mark.usefixtures("quick")
def test_files_know_the_tokens_that_they_were_calibrated_on(
    job, corpus_folder, tmp_path
):
    folder = Path(shutil.copytree(corpus_folder, tmp_path / "corpus"))
    knobs = {"train.batch_size": 8, "compress.calibration_tokens": 128}
    knobs |= {"data.source": str(folder), "mesh.data": 1}
    job = by(job, method="kl")
    job = dataclasses.replace(job, settings=job.settings.replace(knobs))
    metadata = made(job)
    assert job.status().words == "done"
    for split in ("val", "train"):
        np.fromfile(folder / f"{split}.bin", "<u2")[::-1].tofile(
            folder / f"{split}.bin"
        )
        if split == "val":
            assert job.status().words == "done"  # The text is that of train.
    with pytest.raises(UserError, match=r"calibration_sha256 \(there"):
        job.status()
    del metadata["calibration_sha256"]  # As in files of an earlier version.
    write_json(job.folder / "metadata.json", metadata)
    assert job.status().words == "done"


@pytest.mark.usefixtures("quick")
def test_files_know_the_compute_dtype_of_their_statistics(job, corpus_folder):
    knobs = {"train.batch_size": 8, "compress.calibration_tokens": 128}
    knobs |= {"data.source": str(corpus_folder), "mesh.data": 1}
    plain = by(job, method="kl")
    plain = dataclasses.replace(plain, settings=plain.settings.replace(knobs))

    def of_dtype(dtype, **more):
        asked = {"model.compute_dtype": dtype}
        changed = plain.settings.replace(asked)
        return by(dataclasses.replace(plain, settings=changed), **more)

    metadata = made(of_dtype("bfloat16"))
    assert metadata["compute_dtype"] == "bfloat16"
    assert of_dtype("bfloat16").status().words == "done"
    with pytest.raises(
        UserError, match=r"compute_dtype \(there bfloat16, here float32"
    ):
        of_dtype("float32").status()
    assert "--config.model.compute_dtype=bfloat16" in str(
        of_dtype("bfloat16").missing_error()
    )
    # Unless a person asks for one, that of another device is accepted, but not mixed.
    assert plain.status().words == "done"
    with pytest.raises(UserError, match="use --config.model.compute_dtype=bfloat16"):
        of_dtype("auto", ranks=(4, 8)).status()
    # A preview on a CPU may be that of work on a GPU.
    preview = dataclasses.replace(of_dtype("auto", ranks=(4, 8)), is_preview=True)
    assert preview.status().words == "to do"
    del metadata["compute_dtype"]  # As in files of an earlier version.
    write_json(job.folder / "metadata.json", metadata)
    assert of_dtype("float32").status().words == "done"


def test_files_made_in_another_way_are_refused_and_kept(job, baseline_dir, tmp_path):
    made(job)
    before = snapshot(job.folder)
    other_run = Path(shutil.copytree(baseline_dir, tmp_path / "gpt_other"))
    shutil.rmtree(other_run / "ckpt/6")
    (other_run / "result.json").unlink()
    np.save(tmp_path / "table.npy", np.eye(5))
    for other, differing in (
        (by(job, method="pca"), "method"),
        (by(job, singular_value_split=0.5), "singular_value_split"),
        (by(job, bands=2), "bands"),
        (by(job, source=baseline_dir / "ckpt/3"), "source_sha256"),
        (by(job, source=other_run), "source_sha256"),
        (by(job, source=tmp_path / "table.npy"), "source_sha256"),
    ):
        with pytest.raises(
            UserError, match=rf"factorization, {differing} \(there [^()]*\): use"
        ):
            other.status()
    assert snapshot(job.folder) == before
    moved = by(job, source=baseline_dir / "ckpt" / "6")
    assert moved.status().words == "done"  # The same weights under another name.


def test_factors_of_a_lost_baseline_are_refused_before_a_new_one_is_trained(
    finished_experiment, tmp_path
):
    config = changed(finished_experiment, workdir=str(tmp_path / "runs"))
    shutil.copytree(finished_experiment.workdir, config.workdir)
    for run in ("gpt_baseline", "gpt_pca_k8"):
        shutil.rmtree(tmp_path / "runs" / run)
    before = snapshot(tmp_path / "runs")
    a = changed(config, task="train", arm="pca", **{"model.n_embd_wte": 8})
    with pytest.raises(UserError, match=r"pca_factorized holds another .*source_sha"):
        execute(a)
    assert snapshot(tmp_path / "runs") == before


def test_factors_stay_with_a_baseline_that_lost_its_result(
    finished_experiment, tmp_path
):
    config = changed(finished_experiment, workdir=str(tmp_path / "runs"))
    shutil.copytree(finished_experiment.workdir, config.workdir)
    baseline_dir = tmp_path / "runs/gpt_baseline"
    (baseline_dir / "result.json").unlink()  # As the error for a damaged one says.
    execute(config)
    assert read_result(baseline_dir)
    (baseline_dir / "result.json").unlink()
    shutil.rmtree(baseline_dir / "ckpt/6")
    with pytest.raises(UserError, match=f"of the end of {baseline_dir}, train that"):
        execute(config)


def test_factors_of_an_unfinished_baseline_are_refused_before_it_is_trained_on(
    job, baseline_dir
):
    (baseline_dir / "result.json").unlink()
    shutil.move(baseline_dir / "ckpt/6", baseline_dir.parent)
    made(job)
    with pytest.raises(UserError, match="source is not made yet.* train that first"):
        job.check({baseline_dir})
    shutil.move(baseline_dir.parent / "6", baseline_dir / "ckpt")
    with pytest.raises(UserError, match=r"source_sha256 \(there [^;]*overwrite=True$"):
        job.check({baseline_dir})


def test_a_wrong_source_is_named_before_what_overwrite_would_replace(
    job, finished_experiment
):
    made(job)
    low_rank = Path(finished_experiment.workdir) / "gpt_random_lowrank_k8"
    with pytest.raises(UserError, match="already has a factorized embedding"):
        by(job, source=low_rank).status()


def test_overwrite_replaces_the_files_of_another_source(job, tmp_path):
    for number in (1, 2):
        np.save(tmp_path / f"{number}.npy", np.diag([4.0, 3.0, 2.0]) * number)
    made(by(job, source=tmp_path / "1.npy", ranks=(1, 2)))
    other = by(job, source=tmp_path / "2.npy", ranks=(2,))
    with pytest.raises(UserError, match="another factorization"):
        other.status()
    settings = other.settings.replace({"overwrite": True})
    other = dataclasses.replace(other, settings=settings)
    assert other.status().words == "to do"
    job.folder.rename(tmp_path / "disk")
    job.folder.symlink_to(tmp_path / "disk")
    made(other)
    assert job.folder.is_symlink()  # The lock is beside its target.
    assert len([*tmp_path.glob("disk.replaced-*")]) == 1
    assert other.status().words == "done"
    expected = np.diag([8.0, 6.0, 0])
    np.testing.assert_allclose(product(job.folder, 2), expected, atol=1e-5)
    assert not factor_files.table_path(job.folder, 1).exists()


def test_the_task_writes_once_and_then_finds_all_done(finished_experiment, tmp_path):
    config = changed(
        finished_experiment,
        task="factorize",
        workdir=str(tmp_path / "runs"),
        model_path=f"{finished_experiment.workdir}/gpt_baseline/ckpt/3",
        ranks=(2, 4),
    )
    folder = execute(config)
    assert folder == tmp_path / "runs" / "pca_factorized"
    before = snapshot(folder)
    (line,) = described(config)
    assert line.split() == ["pca_factorized", "rank", "2,", "4", "done"]
    execute(config)
    assert snapshot(folder) == before


@pytest.mark.parametrize("bands", [1, 3])
def test_the_command_ends_with_the_error_or_the_ranks_of_its_bands(bands, tmp_path):
    table = np.random.default_rng(0).normal(size=(97, 16)).astype(np.float32)
    np.save(tmp_path / "table.npy", table)
    outcome = call(
        f"--config={CONFIGS / 'factorize.py'}",
        f"--config.model_path={tmp_path / 'table.npy'}",
        f"--config.workdir={tmp_path}",
        *("--config.ranks=8", f"--config.factorize.bands={bands}"),
        "--config.factorize.method=svd",
    )
    assert outcome.code == 0, outcome
    about, where, after = outcome.out.splitlines()[-3:]
    shown = {
        1: r"rank 8: relative error 0\.\d{4}",
        3: r"size of rank 8: bands of ranks ",
    }
    assert re.match(shown[bands], about), outcome.out
    assert where == f"factors: {tmp_path / 'pca_factorized'}"
    words = shlex.split(after.removeprefix("compress it: "))
    settings, _ = command_line.parse(words[2:])
    validate(settings)
    assert settings.model_path == str(tmp_path / "table.npy")
    assert settings.workdir == str(tmp_path)


@pytest.mark.parametrize("source", ["sotu", "my text"])
def test_the_next_command_names_the_text_that_was_asked_for(source, job):
    made(job)
    asked = {"source": source, "tokenizer": "its tokenizer.json", "cache_dir": "kept"}
    knobs = {f"data.{name}": value for name, value in asked.items()}
    job = dataclasses.replace(job, settings=job.settings.replace(knobs))
    words = shlex.split(job.found()[-1].removeprefix("compress it: "))
    settings, _ = command_line.parse(words[2:])
    assert dataclasses.asdict(settings.data) == asked


# What cannot be factorized


def test_what_cannot_be_factorized_is_refused(job, finished_experiment, tmp_path):
    np.save(tmp_path / "wide.npy", np.ones((3, 10)))
    bare = tmp_path / "bare"
    weights = {"params": {"wpe": np.ones((2, 2), np.float32)}}
    checkpoint.save_weights(bare, weights)  # It has no copy of a config.json.
    coded = shutil.copytree(job.source, tmp_path / "best_coded_k8")
    record = read_record(coded) | {"compressed": {"method": "coded", "run": "D"}}
    (coded / "config.json").unlink()
    write_record(coded, record)
    low_rank = Path(finished_experiment.workdir) / "gpt_random_lowrank_k8"
    for other, words in (
        (by(job, source=low_rank), "already has a factorized embedding"),
        (by(job, source=coded), "has a compressed table: give .* made from, D"),
        (by(job, ranks=(4, 33)), r"holds 33: the table .* \(97, 32\), .* most 32"),
        (by(job, source=tmp_path / "wide.npy"), "at most 3"),
        (by(job, source=tmp_path / "nothing"), "nothing does not exist"),
        (by(job, source=tmp_path / "nothing.npy"), "nothing.npy does not exist"),
        (by(job, source=bare), "has no config.json: it is not a run's folder"),
    ):
        assert other.status().words == "to do"
        with pytest.raises(UserError, match=words):
            other.check(set())
        with pytest.raises(UserError, match=words):
            other.run()
    assert not job.folder.exists()


def test_what_is_no_folder_is_refused_before_work(job):
    job.folder.symlink_to("nowhere")
    with pytest.raises(UserError, match="pca_factorized is a link to nothing: remove"):
        job.status()
    job.folder.unlink()
    job.folder.write_text("mine")
    with pytest.raises(UserError, match="pca_factorized is a file, not a folder: move"):
        job.status()


@pytest.mark.parametrize(
    ("table", "words"),
    [(np.zeros((9, 5)), "holds only zeros"), (np.ones((9, 5)), "holds the same row")],
)
def test_a_table_that_tells_no_tokens_apart_is_refused(
    table, words, job, baseline_dir, tmp_path, monkeypatch
):
    np.save(tmp_path / "table.npy", table)
    with pytest.raises(UserError, match=f"table.npy {words}.*: there is nothing to fa"):
        by(job, tmp_path / "table.npy", method="pca").check(set())
    monkeypatch.setattr(trained, "full_table", lambda _: np.resize(table, (97, 32)))
    with pytest.raises(UserError, match=f"table of .*/ckpt/6 {words}"):
        by(job, baseline_dir).run()
    assert not job.folder.exists()


def test_a_table_that_arithmetic_in_float32_loses_is_refused(job, tmp_path):
    np.save(tmp_path / "table.npy", -1e-31 * np.eye(9, 5))
    with pytest.raises(UserError, match=r"table.npy holds no value above 1e-31, but"):
        by(job, tmp_path / "table.npy").check(set())
    np.save(tmp_path / "table.npy", -2e-30 * np.eye(9, 5))
    by(job, tmp_path / "table.npy").check(set())


def test_statistics_that_leave_nothing_of_a_table_are_refused(job, tmp_path):
    path = tmp_path / "table.statistics.npz"
    np.save(tmp_path / "table.npy", np.eye(9, 5))
    write_statistics(path, 9, 5)
    known = calibrate.read(path, None)
    calibrate.write(path, known._replace(frequency=np.eye(1, 9)[0]), {})
    with pytest.raises(
        UserError, match="the table is 0 under the weights .* of 'freq'"
    ):
        by(job, tmp_path / "table.npy", method="freq").run()
    assert not job.folder.exists()


def test_a_rank_above_the_vocabulary_is_refused_before_the_baseline_is_trained(job):
    by(job, ranks=(4096,)).check_early({job.source})  # The tokens of sotu.
    too_high = by(job, ranks=(4097,))
    with pytest.raises(UserError, match=r"holds 4097: the table .* is \(97, 32\)"):
        too_high.check_early(set())
    with pytest.raises(UserError, match="holds 4097: the vocabulary has 4096 tokens"):
        too_high.check_early({job.source})


def test_a_method_that_needs_statistics_is_refused_without_them(job, tmp_path):
    np.save(tmp_path / "table.npy", np.ones((97, 32)))
    bare = by(job, source=tmp_path / "table.npy", method="kl")
    named = by(job, method="kl", statistics=str(tmp_path / "statistics.npz"))
    for other in (bare, named):
        with pytest.raises(UserError, match="does not exist.*: name their file as"):
            other.check(set())
    write_statistics(tmp_path / "statistics.npz", 96, 32)
    with pytest.raises(UserError, match=r"a table \(96, 32\), .* is \(97, 32\)"):
        named.check(set())
    assert not job.folder.exists()
    write_statistics(tmp_path / "statistics.npz", 97, 32)
    made(named)
    with pytest.raises(UserError, match=r"method \(there kl, here svd"):
        job.status()
    write_statistics(tmp_path / "statistics.npz", 97, 32, seed=1)
    with pytest.raises(UserError, match=r"factorization, statistics_sha256 \(there"):
        named.status()


def test_statistics_of_another_model_are_refused(job, baseline_dir, tmp_path):
    path = tmp_path / "statistics.npz"
    asked = by(job, method="kl", statistics=str(path))
    made_from_step_3 = by(asked, source=baseline_dir / "ckpt/3")
    write_statistics(path, 97, 32, checkpoint=fingerprint.of(baseline_dir))
    asked.check(set())
    with pytest.raises(
        UserError, match=r"npz was measured on another model .* at step 3 .* name their"
    ):
        made_from_step_3.check(set())
    write_statistics(path, 97, 32)  # It does not say.
    made_from_step_3.check(set())


def test_every_method_has_files_of_its_own_to_show(job, tmp_path):
    write_statistics(tmp_path / "statistics.npz", 97, 32)
    for method in METHODS:
        one = by(job, method=method, statistics=str(tmp_path / "statistics.npz"))
        one = dataclasses.replace(one, folder=job.folder / method)
        assert made(one)["method"] == method
        assert one.status().words == "done"
