"""From a run, a checkpoint or a bare table to the files of its factorization."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import changed, execute, snapshot, write_statistics

from pcagpt import config as knobs
from pcagpt import factorize
from pcagpt.errors import UserError
from pcagpt.factorize import files as factor_files
from pcagpt.pipeline import execute as experiment
from pcagpt.pipeline.factorize_job import FactorizeJob
from pcagpt.pipeline.plan import make_plan
from pcagpt.run import checkpoint


@pytest.fixture
def baseline_dir(finished_experiment):
    return Path(finished_experiment.workdir) / "gpt_baseline"


@pytest.fixture
def job(baseline_dir, tmp_path):
    """Rank 4 of D's table by SVD."""
    config = knobs.base()
    config.telemetry.tensorboard = False
    folder = tmp_path / "pca_factorized"
    return FactorizeJob(baseline_dir, folder, ranks=(4,), config=config)


def by(job, **factorize):
    """The same job with other knobs of its section."""
    named = {f"factorize.{name}": value for name, value in factorize.items()}
    return dataclasses.replace(job, config=changed(job.config, **named))


def product(folder, rank):
    """The table [V, d] that the files of a rank stand for."""
    scales = factor_files.read_scale_matrices(factor_files.scale_path(folder, rank))
    table = factor_files.read_table(factor_files.table_path(folder, rank))
    mean = 0 if scales.mean is None else scales.mean
    return mean + table @ scales.scale_up


def table_of(run_dir, step):
    params, _, _ = checkpoint.load_weights(run_dir / "ckpt" / str(step))
    return params["embed"]["band_0"]["wte"]


def test_a_run_is_factorized_by_its_real_rows_only(job, baseline_dir):
    metadata = dataclasses.replace(job, ranks=(32,)).write()
    stored = table_of(baseline_dir, 6)
    assert stored.shape == (128, 32)
    assert stored[97:].any()  # padding that would otherwise have its say
    np.testing.assert_allclose(product(job.folder, 32), stored[:97], atol=1e-6)
    assert (metadata["vocab_size"], metadata["n_embd"]) == (97, 32)
    assert metadata["step"] == 6


def test_a_chosen_checkpoint_is_factorized(job, baseline_dir):
    job = dataclasses.replace(job, source=baseline_dir / "ckpt" / "3", ranks=(32,))
    assert job.write()["step"] == 3
    wanted = table_of(baseline_dir, 3)[:97]
    np.testing.assert_allclose(product(job.folder, 32), wanted, atol=1e-6)
    assert not np.allclose(wanted, table_of(baseline_dir, 6)[:97], atol=1e-6)


def test_a_bare_table_is_factorized(job, tmp_path):
    table = np.random.default_rng(0).normal(size=(50, 6))
    np.save(tmp_path / "table.npy", table)
    job = dataclasses.replace(job, source=tmp_path / "table.npy", ranks=(2, 6))
    metadata = job.write()
    np.testing.assert_allclose(product(job.folder, 6), table, atol=1e-5)
    assert (metadata["vocab_size"], metadata["n_embd"]) == (50, 6)
    assert "step" not in metadata


def test_spectrum_and_metadata_are_those_of_the_table(job, baseline_dir):
    metadata = dataclasses.replace(job, ranks=(4, 16)).write()
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
    assert factor_files.read_metadata(job.folder) == metadata
    assert metadata["method"] == "svd"
    assert metadata["source"] == str(baseline_dir)


def test_a_centred_factorization_keeps_the_mean(job, baseline_dir):
    by(job, method="pca").write()
    scales = factor_files.read_scale_matrices(factor_files.scale_path(job.folder, 4))
    table = table_of(baseline_dir, 6)[:97]
    np.testing.assert_allclose(scales.mean, table.mean(axis=0), atol=1e-7)


def test_the_split_moves_the_singular_values_between_the_two_factors(job):
    job.write()
    whole = product(job.folder, 4)
    other = by(job, singular_value_split=1.0)
    other = dataclasses.replace(other, folder=job.folder / "other")
    other.write()
    np.testing.assert_allclose(product(other.folder, 4), whole, atol=1e-6)
    table = factor_files.read_table(factor_files.table_path(other.folder, 4))
    np.testing.assert_allclose(table.T @ table, np.eye(4), atol=1e-4)


# Again


def test_adding_a_rank_keeps_those_that_are_there(job):
    job.write()
    table = factor_files.table_path(job.folder, 4).read_bytes()
    more = dataclasses.replace(job, ranks=(4, 8))
    assert more.missing_ranks() == (8,)
    metadata = dataclasses.replace(job, ranks=(8,)).write()
    assert metadata["ranks"].keys() == {"4", "8"}
    assert factor_files.table_path(job.folder, 4).read_bytes() == table
    assert more.missing_ranks() == ()


def test_a_rank_whose_file_was_lost_is_missing(job):
    job.write()
    for path in (factor_files.table_path, factor_files.scale_path):
        path(job.folder, 4).unlink()
        assert job.missing_ranks() == (4,)
        job.write()
        assert job.missing_ranks() == ()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"method": "pca"}, "method"),
        ({"singular_value_split": 0.5}, "singular_value_split"),
    ],
)
def test_files_made_otherwise_are_refused_and_kept(other, words, job):
    job.write()
    before = snapshot(job.folder)
    other = by(job, **other)
    for action in (other.missing_ranks, other.write):
        with pytest.raises(UserError, match=rf"another factorization \({words} differ"):
            action()
    assert snapshot(job.folder) == before


def test_files_of_another_source_are_refused_and_kept(job, baseline_dir, tmp_path):
    job.write()
    before = snapshot(job.folder)
    other_run = tmp_path / "gpt_other"
    shutil.copytree(baseline_dir, other_run)
    (other_run / "result.json").write_text("{}")
    np.save(tmp_path / "table.npy", np.eye(5))
    for source in (baseline_dir / "ckpt/3", other_run, tmp_path / "table.npy"):
        other = dataclasses.replace(job, source=source)
        with pytest.raises(UserError, match="source_sha256 differ"):
            other.write()
    assert snapshot(job.folder) == before
    moved = dataclasses.replace(job, source=baseline_dir / "ckpt" / "6")
    assert moved.missing_ranks() == ()  # the same weights under another name


def test_overwrite_replaces_the_files_of_another_source(finished_experiment, tmp_path):
    for number in (1, 2):
        np.save(tmp_path / f"{number}.npy", np.diag([4.0, 3.0, 2.0]) * number)
    config = changed(
        finished_experiment,
        task="factorize",
        workdir=str(tmp_path / "runs"),
        model_path=str(tmp_path / "1.npy"),
        ranks=(1, 2),
    )
    folder = execute(config)
    other = changed(config, model_path=str(tmp_path / "2.npy"), ranks=(2,))
    with pytest.raises(UserError, match="another factorization"):
        execute(other)
    execute(changed(other, overwrite=True))
    np.testing.assert_allclose(product(folder, 2), np.diag([8.0, 6.0, 0]), atol=1e-5)
    assert not factor_files.table_path(folder, 1).exists()


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
    plan = make_plan(config)
    (line,) = experiment.describe(plan)
    assert line.split() == ["pca_factorized", "rank", "2,", "4", "done"]
    execute(config)
    assert snapshot(folder) == before


# What cannot be factorized


def test_a_model_that_is_factorized_already_is_refused(job, finished_experiment):
    low_rank = Path(finished_experiment.workdir) / "gpt_random_lowrank_k8"
    with pytest.raises(UserError, match="has a factorized embedding already"):
        dataclasses.replace(job, source=low_rank).write()
    assert not job.folder.exists()


def test_a_rank_above_the_table_s_is_refused(job, tmp_path):
    with pytest.raises(UserError, match=r"33: the table .* \(97, 32\), .* most 32"):
        dataclasses.replace(job, ranks=(4, 33)).write()
    np.save(tmp_path / "wide.npy", np.ones((3, 10)))
    with pytest.raises(UserError, match="at most 3"):
        dataclasses.replace(job, source=tmp_path / "wide.npy").write()
    assert not job.folder.exists()


def test_a_source_that_is_not_there_is_refused(job, tmp_path):
    for name in ("nothing", "nothing.npy"):
        with pytest.raises(UserError, match=f"{name} does not exist"):
            dataclasses.replace(job, source=tmp_path / name).write()
    assert not job.folder.exists()


def test_checkpoints_without_a_config_are_refused(job, baseline_dir, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(baseline_dir / "ckpt", bare / "ckpt")
    with pytest.raises(UserError, match="has no config.json: it is not a run's folder"):
        dataclasses.replace(job, source=bare).write()


def test_a_method_that_needs_statistics_is_refused_without_them(job, tmp_path):
    bare = dataclasses.replace(by(job, method="kl"), source=tmp_path / "table.npy")
    np.save(tmp_path / "table.npy", np.ones((97, 32)))
    with pytest.raises(UserError, match="holds none: name their file as"):
        bare.check(set())
    assert not job.folder.exists()
    named = by(job, method="kl", statistics=str(tmp_path / "statistics.npz"))
    with pytest.raises(UserError, match="holds none: name their file as"):
        named.check(set())
    write_statistics(tmp_path / "statistics.npz", 97, 32)
    named.check(set())
    named.write()
    with pytest.raises(UserError, match=r"\(method differ\)"):
        job.missing_ranks()
    write_statistics(tmp_path / "statistics.npz", 97, 32, seed=1)
    with pytest.raises(UserError, match=r"\(statistics_sha256 differ\)"):
        named.missing_ranks()


def test_every_method_has_files_of_its_own_to_show(job, tmp_path):
    write_statistics(tmp_path / "statistics.npz", 97, 32)
    for method in factorize.METHODS:
        one = by(job, method=method, statistics=str(tmp_path / "statistics.npz"))
        one = dataclasses.replace(one, folder=job.folder / method)
        assert one.write()["method"] == method
        assert one.missing_ranks() == ()
