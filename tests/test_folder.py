"""Run folders: what is done is skipped, and a run with other settings is refused."""

import copy
import errno
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import (
    changed,
    described,
    execute,
    job,
    metrics,
    plan,
    signal_at,
    snapshot,
)

from pcagpt.config import Settings
from pcagpt.errors import Interrupted, UserError
from pcagpt.json_files import write_json
from pcagpt.report.read import read_row
from pcagpt.run import checkpoint
from pcagpt.run.folder import (
    look,
    read_record,
    read_result,
    read_window_losses,
    replacing,
    write_record,
    write_result,
)
from pcagpt.run.identity import changed_fields, identity

pytestmark = pytest.mark.usefixtures("quick")
OTHER = {"train.gradient_clip": 0.5}  # another run
PUBLISHED = Path(__file__).parent.parent / "checkpoints" / "published"


@pytest.fixture
def copied(finished_experiment, tiny_config):
    """tiny_config with a copy of the finished experiment as its workdir."""
    shutil.copytree(finished_experiment.workdir, tiny_config.workdir)
    return tiny_config


def pca(config):
    """The config of A."""
    return changed(config, arm="pca", **{"model.n_embd_wte": 8})


def finetuned(config):
    """The config of B."""
    return changed(config, arm="pca_finetune", **{"model.n_embd_wte": 8})


def status(config):
    return job(config).status().words


def statuses(config):
    """The status of each job that is needed, as it is shown."""
    return [line.split("  ")[-1] for line in described(config)]


# Finished runs


def test_a_finished_run_is_skipped_and_not_a_file_is_touched(copied):
    before = snapshot(Path(copied.workdir))
    execute(copied)
    execute(pca(copied))
    execute(changed(copied, overwrite=True))
    assert snapshot(Path(copied.workdir)) == before


def test_a_finished_run_does_not_need_its_prerequisites_any_more(copied):
    assert statuses(pca(copied)) == ["done"]
    for folder in ("pca_factorized", "gpt_baseline"):
        shutil.rmtree(Path(copied.workdir) / folder)
        assert statuses(pca(copied)) == ["done"]
    before = snapshot(Path(copied.workdir))
    execute(pca(copied))
    assert snapshot(Path(copied.workdir)) == before


@pytest.mark.parametrize("is_target", [True, False])
def test_a_status_reads_each_file_of_a_run_once(copied, is_target, monkeypatch):
    run, read = plan(finetuned(copied)).jobs[-1 if is_target else 0], []
    reading = look.__globals__

    def counted(what):
        function = reading[what]

        def count(path, *arguments, **options):
            if path.is_relative_to(run.folder):
                read.append((what, path.name))
            return function(path, *arguments, **options)

        monkeypatch.setitem(reading, what, count)

    for what in ("read_json", "read_updates"):
        counted(what)
    assert run.status().words == "done"
    assert len(read) == len(set(read)) == 2 + len(checkpoint.steps(run.folder))


def test_the_plan_says_what_is_done_and_what_is_not(copied):
    assert statuses(copied) == ["done"]
    shutil.rmtree(Path(copied.workdir) / "gpt_pca_k8")
    assert statuses(pca(copied)) == ["done", "done", "to do"]
    assert statuses(changed(copied, overwrite=True, seed=7)) == ["to do"]


def test_a_half_finished_run_is_never_taken_for_a_finished_one(copied):
    run_dir = job(copied).folder
    wanted = read_result(run_dir)
    write_json(run_dir / "result.json", {**wanted, "status": "failed"})
    assert read_result(run_dir) is None
    assert status(copied) == "resumes at step 6"
    (run_dir / "result.json").unlink()
    assert read_result(run_dir) is None
    assert status(copied) == "resumes at step 6"
    shutil.rmtree(run_dir / "ckpt")
    assert status(copied) == "to do"


def test_a_damaged_result_is_refused_by_its_name(copied):
    (job(copied).folder / "result.json").write_text('{"status": "do')
    with pytest.raises(
        UserError, match=r"gpt_baseline.result.json is damaged .*: delete it"
    ):
        status(copied)


@pytest.mark.parametrize("is_damaged", [True, False])
def test_a_finished_run_without_a_readable_checkpoint_is_not_done(copied, is_damaged):
    run_dir = job(copied).folder
    if is_damaged:
        for path in (run_dir / "ckpt").glob("*/weights/_METADATA"):
            path.write_bytes(path.read_bytes() + b" ")
        lack = r"can be read \(.*ckpt/6/weights/_METADATA was changed or damaged .*\)"
    else:
        shutil.rmtree(run_dir / "ckpt")
        lack = "finished checkpoint"
    lack = f"gpt_baseline is finished, but holds no .*{lack}"
    before = snapshot(Path(copied.workdir))
    with pytest.raises(UserError, match=f"{lack}: .*overwrite=True, .*trains it again"):
        status(copied)
    shutil.rmtree(Path(copied.workdir) / "gpt_pca_finetune_k8")
    with pytest.raises(UserError, match=f"{lack}: .*move .*gpt_baseline away to train"):
        execute(finetuned(copied))
    assert before.items() >= snapshot(Path(copied.workdir)).items()
    execute(changed(copied, overwrite=True))
    assert status(copied) == "done"
    (kept,) = run_dir.parent.glob("gpt_baseline.replaced-*")
    assert read_result(kept)


# Other settings


def test_a_run_with_other_settings_is_refused_with_old_and_new_values(copied):
    before = snapshot(Path(copied.workdir))
    other = changed(copied, **{"train.learning_rate": 1e-3, "model.dropout": 0.1})
    with pytest.raises(UserError) as caught:
        execute(other)
    message = str(caught.value)
    assert "gpt_baseline was trained with another config" in message
    assert "train.learning_rate (was 0.0006, now 0.001)" in message
    assert "model.dropout (was 0.0, now 0.1)" in message
    assert "--config.overwrite=True" in message
    assert "\n" not in message
    assert message.count("(was") == 2
    assert snapshot(Path(copied.workdir)) == before


def test_a_stopped_run_is_refused_with_other_settings(tiny_config, monkeypatch):
    signal_at(monkeypatch, 2, 15)
    with pytest.raises(Interrupted):
        execute(tiny_config)
    with pytest.raises(UserError, match=r"seed \(was 1, now 2\)"):
        status(changed(tiny_config, seed=2))
    assert status(tiny_config) == "resumes at step 3"


def test_overwrite_discards_the_run_and_trains_it_anew(copied):
    run_dir = job(copied).folder
    (run_dir / "left over").write_text("")
    before = read_result(run_dir)
    other = changed(copied, overwrite=True, **OTHER)
    assert status(other) == "to do"
    execute(other)
    assert status(changed(copied, **OTHER)) == "done"
    assert not (run_dir / "left over").exists()
    assert read_result(run_dir)["run_id"] != before["run_id"]
    assert [line["step"] for line in metrics(run_dir)].count(6) == 2
    assert checkpoint.steps(run_dir) == [3, 6]


def test_overwriting_a_run_leaves_its_prerequisites_and_other_ranks_alone(copied):
    workdir = Path(copied.workdir)
    factors = {"task": "factorize", "model_path": f"{workdir}/gpt_baseline"}
    execute(changed(copied, ranks=(4,), **factors))
    baseline = snapshot(workdir / "gpt_baseline")
    execute(changed(pca(copied), overwrite=True, **OTHER))
    assert status(changed(pca(copied), **OTHER)) == "done"
    assert snapshot(workdir / "gpt_baseline") == baseline
    tables = sorted(path.name for path in (workdir / "pca_factorized").glob("wte*"))
    assert tables == ["wte_pca_k4.npy", "wte_pca_k8.npy"]


def test_other_tokens_are_refused_for_a_resumed_run_and_for_an_arm_beside_it(
    tiny_config, tmp_path
):
    folder = Path(shutil.copytree(tiny_config.data.source, tmp_path / "tokens"))
    tiny_config.data.source = str(folder)
    run_dir = execute(tiny_config)
    tokens = np.fromfile(folder / "train.bin", np.uint16)
    tokens[::-1].tofile(folder / "train.bin")
    with pytest.raises(UserError, match="gpt_baseline was trained on other tokens"):
        execute(pca(tiny_config))
    assert not (Path(tiny_config.workdir) / "gpt_pca_k8").exists()
    (run_dir / "result.json").unlink()
    with pytest.raises(UserError, match="gpt_baseline was trained on other tokens"):
        execute(tiny_config)
    tokens.tofile(folder / "train.bin")
    execute(tiny_config)
    assert read_result(run_dir)["steps"] == 6


@pytest.fixture
def own_corpus(copied, tmp_path):
    """A config whose corpus can be changed, of a finished run."""
    folder = Path(shutil.copytree(copied.data.source, tmp_path / "tokens"))
    return changed(copied, **{"data.source": str(folder)}), folder


def reverse(path):
    """Changes a token file, but not its size, its first tokens or its counts."""
    tokens = np.fromfile(path, np.uint16)
    tokens[500:520] = tokens[500:520][::-1]
    tokens.tofile(path)


def test_a_finished_run_is_not_done_for_another_corpus(own_corpus):
    config, folder = own_corpus
    execute(config)
    before = snapshot(Path(config.workdir))
    for split in ("train", "val"):
        path = folder / f"{split}.bin"
        content = path.read_bytes()
        reverse(path)
        assert path.read_bytes() != content
        with pytest.raises(UserError, match=rf"other tokens .*\({split} differ\)"):
            execute(config)
        assert status(changed(config, overwrite=True)) == "to do"
        path.write_bytes(content)
    execute(config)
    assert status(changed(config, overwrite=True)) == "done"
    assert snapshot(Path(config.workdir)) == before


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("part", [None, "train"])
def test_a_run_whose_record_forgot_its_corpus_is_refused_another_one(
    own_corpus, part, is_finished
):
    config, folder = own_corpus
    run_dir = job(config).folder
    record = read_record(run_dir)
    record["corpus"] = part and record["corpus"] | {part: None}
    write_record(run_dir, record)
    if not is_finished:
        (run_dir / "result.json").unlink()
    reverse(folder / "train.bin")
    before = snapshot(Path(config.workdir))
    with pytest.raises(UserError, match=r"other tokens .*\(train differ\)"):
        execute(config)
    assert snapshot(Path(config.workdir)) == before


def test_the_plan_says_that_a_run_is_done_on_other_tokens(own_corpus, tmp_path):
    config, folder = own_corpus
    assert described(config)[0].endswith("  done")
    reverse(folder / "train.bin")
    (line,) = described(config)
    assert line.endswith(f"  done, on other tokens than {folder} holds now")
    text = tmp_path / "text"
    text.mkdir()
    for split in ("train", "val"):
        (text / f"{split}.txt").write_text("Text. " * 99)
    (line,) = described(changed(config, **{"data.source": str(text)}))
    assert line.endswith(f"  done, {text} is not tokenized yet")


def test_a_prerequisite_made_meanwhile_from_other_tokens_is_refused(own_corpus):
    """Also if its settings differ, which a prerequisite's may."""
    config, folder = own_corpus
    other = changed(config, **{"train.beta1": 0.8})
    baseline = plan(pca(other)).jobs[0]
    assert baseline.status().words == "done"
    baseline.run()
    reverse(folder / "train.bin")
    with pytest.raises(UserError, match="gpt_baseline was trained on other tokens"):
        baseline.run()


def test_the_spelling_and_the_place_of_a_corpus_decide_nothing(
    own_corpus, tmp_path, monkeypatch
):
    config, folder = own_corpus
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "moved")
    for source in ("tokens", "tokens/", "./tokens", "../" + f"{tmp_path.name}/moved"):
        execute(changed(config, **{"data.source": source}))
        assert status(changed(config, **{"data.source": source})) == "done"


def test_a_finished_run_whose_corpus_is_gone_is_done_and_that_is_said(
    own_corpus, capsys
):
    config, folder = own_corpus
    shutil.rmtree(folder)
    execute(config)
    assert "gpt_baseline is not compared with its corpus: " in capsys.readouterr().out


def test_a_run_of_an_earlier_version_knows_its_corpus_by_the_old_hash(own_corpus):
    config, folder = own_corpus
    run_dir = job(config).folder
    record = read_record(run_dir)
    del record["corpus"]
    for meta in run_dir.glob("ckpt/*/meta"):  # Their copies know it, too.
        shutil.rmtree(meta)
    old = "1d62"
    write_record(run_dir, record | {"corpus_sha256": old})
    with pytest.raises(UserError, match=r"other tokens .*\(tokens differ\)"):
        execute(config)
    old = job(config).corpus()._sampled_sha256()
    write_record(run_dir, record | {"corpus_sha256": old})
    execute(config)
    write_record(run_dir, record)  # The oldest knew its path alone.
    with pytest.raises(UserError, match=r"data.source \(was .*, now .*tokens\)"):
        execute(config)


def test_knobs_that_do_not_change_the_numbers_do_not_change_the_run(copied):
    for knob in (
        {"telemetry.every": 5},
        {"telemetry.tensorboard": True},
        {"evaluate.every": 2},
        {"evaluate.batch_size": 4},
        {"checkpoint.every": 2},
        {"checkpoint.keep_last": 5},
        {"mesh.data": 2},
        {"mesh.fsdp": 2},
        {"data.cache_dir": "elsewhere"},
        {"build_prerequisites": False},
        {"ranks": (4,)},
        {"model.compute_dtype": "bfloat16"},
        {"model.attention": "xla"},
        {"model.kernels": "xla"},
    ):
        assert status(changed(copied, **knob)) == "done", knob
        assert status(changed(pca(copied), **knob)) == "done", knob


def test_a_record_of_an_earlier_version_is_the_same_run(copied):
    """Its device knobs once counted, and it lacks the knobs that came later."""
    run_dir = job(copied).folder
    record = read_record(run_dir)
    record["model"] |= {"compute_dtype": "auto", "kernels": "pallas"}
    record["model"]["attention"] = "cudnn"
    del record["init"]["weights_from"], record["distill"], record["train"]["beta1"]
    write_record(run_dir, record)
    (run_dir / "result.json").unlink()
    assert status(copied) == "resumes at step 6"
    with pytest.raises(UserError, match=r"train.beta1 \(was 0.9, now 0.5\)"):
        status(changed(copied, **{"train.beta1": 0.5}))


def test_published_records_are_the_runs_of_their_settings():
    paths = sorted(PUBLISHED.glob("*/gpt_*/config.json"))
    assert len(paths) > 5
    for path in paths:
        stored = read_record(path.parent)
        moved = {"workdir": "elsewhere", "model.kernels": "xla", "mesh.fsdp": 4}
        settings = Settings.of(stored).replace(moved)
        record = {**settings.to_dict(), "imported_sha256": stored["imported_sha256"]}
        assert changed_fields(stored, record) == []
        record["train"]["steps"] += 1
        assert len(changed_fields(stored, record)) == 1


def test_a_folder_of_runs_can_be_moved(copied, tmp_path):
    moved = changed(copied, workdir=str(tmp_path / "moved"))
    Path(copied.workdir).rename(moved.workdir)
    for config in (moved, pca(moved), finetuned(moved)):
        assert status(config) == "done"


def test_imports_with_other_content_count_as_other_settings(copied):
    a, b = pca(copied), finetuned(copied)
    assert status(a) == status(b) == "done"
    workdir = Path(copied.workdir)
    shutil.rmtree(workdir / "gpt_baseline" / "ckpt" / "6")
    (workdir / "gpt_baseline" / "result.json").unlink()
    with pytest.raises(UserError, match=r"imported_sha256\.blocks_from \(was"):
        status(b)
    for name, path in (
        ("import_wte_npy", workdir / "pca_factorized" / "wte_pca_k8.npy"),
        (
            "import_scale_matrices_npz",
            workdir / "pca_factorized" / "scale_mats_pca_k8.npz",
        ),
    ):
        content = path.read_bytes()
        path.write_bytes(content + b" ")
        metadata = path.with_name("metadata.json").rename(path.with_suffix(".json"))
        with pytest.raises(
            UserError, match=rf"256\.{name} \(was \w{{12}}…, now \w{{12}}…\): use"
        ):
            status(a)
        metadata.rename(path.with_name("metadata.json"))
        path.write_bytes(content)


def test_damaged_imports_stop_only_what_is_computed_from_them(
    copied, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("pcagpt"), "propagate", True)
    factors = Path(copied.workdir) / "pca_factorized"
    table, metadata = factors / "wte_pca_k8.npy", factors / "metadata.json"
    for path, damaged in (
        (table, table.read_bytes()[:-9]),
        *((metadata, text) for text in (b"{}", b"[]", metadata.read_bytes()[:-9])),
    ):
        content = path.read_bytes()
        path.write_bytes(damaged)
        caplog.clear()
        assert statuses(pca(copied)) == ["done"]
        assert "is not compared with" in caplog.text
        assert f"{path.name}" in caplog.text
        with pytest.raises(UserError, match=r"train.beta1 \(was 0.9, now 0.5\)"):
            status(changed(pca(copied), **{"train.beta1": 0.5}))
        path.write_bytes(content)
    last = Path(copied.workdir) / "gpt_baseline" / "ckpt" / "6"
    last.rename(factors / "6")
    assert statuses(finetuned(copied)) == ["done"]
    assert "gpt_baseline, step 6, is damaged" in caplog.text
    (factors / "6").rename(last)
    table.unlink()
    run_dir = job(pca(copied)).folder
    (run_dir / "result.json").unlink()
    alone = changed(pca(copied), build_prerequisites=False)
    with pytest.raises(UserError, match="lacks rank 8 and build_prerequisites is off"):
        execute(alone)


# Files


def test_every_section_that_numbers_depend_on_is_in_the_identity(tiny_config):
    found = identity(tiny_config.to_dict())
    assert {name.split(".")[0] for name in found} == {
        "arm", "seed", "model", "corpus", "train", "distill", "init",
        "imported_sha256",
    }  # fmt: skip
    assert found["model.n_embd"] == 32
    other = changed(tiny_config, seed=7).to_dict()
    assert identity(tiny_config.to_dict()) != identity(other)


def test_a_share_without_a_teacher_is_no_part_of_the_identity(tiny_config):
    """Older versions took it, and it had no effect."""
    for teacher, is_same in (("", True), ("RUN", False)):
        one = changed(tiny_config, **{"distill.teacher": teacher}).to_dict()
        other = one | {"distill": one["distill"] | {"share": 0.5}}
        assert (changed_fields(one, other) == []) == is_same


@pytest.mark.parametrize(
    ("model", "knob", "other", "is_same"),
    [
        ({}, "n_embd_wte_scale_tying", False, True),  # There is nothing to tie.
        ({"n_embd_wte": 4}, "n_embd_wte_scale_tying", False, False),
        ({"band_sizes": (50, 47), "band_ranks": (0, 4)}, "n_embd_wte", 8, True),
        ({"n_embd_wte": 4}, "n_embd_wte", 8, False),
    ],
)
def test_a_model_knob_without_effect_is_no_part_of_the_identity(
    model, knob, other, is_same, tiny_config
):
    """Older versions took it."""
    given = {f"model.{name}": value for name, value in model.items()}
    one = changed(tiny_config, **given).to_dict()
    two = one | {"model": one["model"] | {knob: other}}
    assert (changed_fields(two, one) == []) == is_same


def test_an_identity_survives_being_written_and_read(tiny_config, tmp_path):
    bands = {"model.band_sizes": (50, 47), "model.band_ranks": (0, 4)}
    record = changed(tiny_config, **bands).to_dict()
    write_record(tmp_path, record)
    assert identity(read_record(tmp_path)) == identity(record)
    assert changed_fields(read_record(tmp_path), record) == []


def test_an_import_that_cannot_be_read_is_compared_in_no_way_and_changes_nothing():
    model = {"band_sizes": [50, 47], "band_ranks": [0, 4]}
    stored = {"model": model, "imported_sha256": {"import_bands": "1d62"}}
    now = {"model": {name: [] for name in model}, "corpus": None}
    before = copy.deepcopy(stored)
    unread = now | {"imported_sha256": {"import_bands": None}}
    assert changed_fields(stored, unread) == []
    assert stored == before
    known = now | {"imported_sha256": {"import_bands": "ab"}}
    assert len(changed_fields(stored, known)) == 3


def test_a_result_is_written_after_the_window_losses(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("the disk is full")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="full"):
        write_result(tmp_path, {"status": "done"}, np.zeros((1, 2)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_has_no_record_and_no_result(tmp_path):
    assert read_record(tmp_path) is None
    assert read_result(tmp_path) is None


# Damage


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": []}, "'model' is not a section"),
        ({"model": {"n_layer": "2"}}, "'model.n_layer' is '2'"),
        ({"model": {"n_layer": 0}}, "model.n_layer is 0"),
        ({"model": {"n_layer": True}}, "'model.n_layer' is True"),
        ({"model": {"n_head": 7}}, "does not divide"),
        ({"model": {"band_sizes": [3], "band_ranks": []}}, "give every band both"),
        ({"model": {"band_sizes": [3.5], "band_ranks": [1]}}, "whole numbers"),
        ({"train": {"learning_rate": None}}, "'train.learning_rate' is None"),
        ({"vocab_size": "97"}, "'vocab_size' is '97'"),
        ({"imported_sha256": [1]}, r"'imported_sha256' is \[1\]"),
    ],
)
def test_a_record_of_another_shape_is_refused(change, says, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(change))
    with pytest.raises(UserError, match=f"config.json is damaged .*{says}") as caught:
        read_record(tmp_path)
    assert "\n" not in str(caught.value)


def test_window_losses_that_changed_since_the_result_are_refused(tmp_path):
    windows = np.array([[3.0, 2.0], [4.0, 2.0]])
    write_result(tmp_path, {"status": "done"}, windows)
    np.testing.assert_array_equal(read_window_losses(tmp_path), windows)
    np.save(tmp_path / "val_window_losses.npy", windows * 2)
    with pytest.raises(UserError, match="val_window_losses.npy was changed"):
        read_window_losses(tmp_path)
    # Results of older versions have no hash.
    write_json(tmp_path / "result.json", {"status": "done"})
    np.testing.assert_array_equal(read_window_losses(tmp_path), windows * 2)


def test_every_published_record_and_result_is_read():
    records = list(PUBLISHED.rglob("config.json"))
    assert records
    for path in records:
        assert read_record(path.parent)
        if (path.parent / "result.json").exists():
            assert read_row(path.parent)["letter"]


def test_an_error_of_the_system_names_the_folder_and_not_its_temporary_name(tmp_path):
    for error in (
        OSError(errno.ENOSPC, "x"),
        OSError(errno.ENOSPC, "x", f"{tmp_path}/.run.partial/a/b"),
        ValueError(
            f"Error: local file \"{tmp_path}/.run.partial/a\" [os_error_code='28']"
        ),
    ):
        with pytest.raises(OSError) as caught, replacing(tmp_path / "run"):
            raise error
        assert caught.value.errno == errno.ENOSPC
        assert caught.value.filename == f"{tmp_path}/run"
        assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="a bug"), replacing(tmp_path / "run"):
        raise ValueError("a bug")


def test_a_new_folder_gets_its_name_only_if_nobody_removed_it(tmp_path):
    place = tmp_path / "run"
    with (
        pytest.raises(UserError, match=r"run\.partial was removed"),
        replacing(place) as written,
    ):
        shutil.rmtree(written)
        (written / "new").mkdir(parents=True)
    assert list(tmp_path.iterdir()) == []
    (place / "old").mkdir(parents=True)
    with replacing(place) as written:
        (written / "new").mkdir()
    assert [path.name for path in place.iterdir()] == ["new"]
    (kept,) = tmp_path.glob("run.replaced-*")
    assert [path.name for path in kept.iterdir()] == ["old"]
