"""What TensorBoard and W&B show: read back from the files that they get."""

import errno
import functools
import io
import json
import os
import pkgutil
import re
import shutil
import signal
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from conftest import VOCAB_SIZE
from runs import (
    BANDS,
    assert_equal,
    changed,
    execute,
    json_of,
    metrics,
    saved_state,
    shown,
    signal_at,
)
from tensorboardX import RecordWriter
from tensorboardX.proto import layout_pb2, plugin_hparams_pb2

from pcagpt.config import Settings
from pcagpt.config.schema import TelemetrySettings
from pcagpt.errors import Interrupted, UserError
from pcagpt.pipeline.compress import compress
from pcagpt.pipeline.token_rows import show_rows
from pcagpt.report import spectrum_figure
from pcagpt.run.hyperparameters import columns, hyperparameters
from pcagpt.run.trained import Run
from pcagpt.telemetry import tensorboard_files, wandb_run
from pcagpt.telemetry.boards import Boards
from pcagpt.telemetry.tensorboard_files import TensorBoard

pytestmark = pytest.mark.usefixtures("quick")
PROJECTOR = "plugins/org_tensorflow_tensorboard_projector"
TEXTS = [chr(0x4E00 + number) for number in range(VOCAB_SIZE)]
ARMS = ("gpt_baseline", "gpt_pca_k8")


def start(folder, job="train", first_step=0, **wanted):
    return Boards(
        folder,
        TelemetrySettings(**wanted),
        workdir=folder.parent,
        job=job,
        command="a command | of a person",
        config={"train": {"steps": 3}},
        first_step=first_step,
    )


def texts(folder):
    """{(tag, step): the Markdown that TensorBoard shows}, each only once."""
    found = {}
    for (tag, step), values in shown(folder).items():
        if tag.endswith("/text_summary"):
            (value,) = values
            (content,) = value.tensor.string_val
            found[tag.removesuffix("/text_summary"), step] = content.decode()
    return found


def hparams(folder, kind):
    """The content of 'experiment', 'session_start_info' or 'session_end_info'."""
    (found,) = [v for (tag, _), v in shown(folder).items() if tag.endswith(f"/{kind}")]
    (value,) = found
    data = plugin_hparams_pb2.HParamsPluginData()
    data.ParseFromString(value.metadata.plugin_data.content)
    return getattr(data, kind)


@pytest.fixture(scope="module")
def readable(corpus_folder, tmp_path_factory):
    """A corpus whose ids stand for characters."""
    folder = tmp_path_factory.mktemp("readable") / "corpus"
    shutil.copytree(corpus_folder, folder)
    meta = {"vocab_size": VOCAB_SIZE, "itos": dict(enumerate(TEXTS))}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def config(tiny_config, readable):
    """A tiny config of that corpus, with event files."""
    tiny_config.data.source = str(readable)
    tiny_config.telemetry.tensorboard = True
    return tiny_config


def test_texts_tables_and_figures_go_to_the_same_folder(tmp_path):
    figure, long = spectrum_figure([2.0, 1.0], [1]), "one  two\n\n" + "three " * 40
    with start(tmp_path) as boards:
        boards.text("sample", long, 3)
        boards.table("table", ["a", "b"], [[1, "x|y"]])
        boards.figure("spectrum", figure)
        boards.figure("nothing", None)
    found = texts(tmp_path)
    assert found["command", 0] == "    a command | of a person"
    assert found["table", 0] == "| a | b |\n| --- | --- |\n| 1 | x\\|y |"
    lines = found["sample", 3].splitlines()
    assert lines[:2] == ["    one  two", ""] and max(map(len, lines)) <= 104
    assert " ".join(found["sample", 3].split()) == " ".join(long.split())
    (value,) = shown(tmp_path)["spectrum", 0]
    with PIL.Image.open(io.BytesIO(value.image.encoded_image_string)) as image:
        assert (value.image.width, value.image.height) == image.size
    assert {tag for tag, _ in shown(tmp_path)} == {
        *("command/text_summary", "sample/text_summary", "table/text_summary"),
        "spectrum",
    }
    # A folder would be a second run in TensorBoard.
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_second_opening_replaces_what_the_first_one_showed(tmp_path):
    another = tmp_path / "events.out.tfevents.1795853731.host.77.0"
    another.touch()  # By another program.
    for number in range(2):
        with start(tmp_path) as boards:
            boards.figure("spectrum", spectrum_figure([2.0, 1.0], [1]))
            boards.columns({f"column_{number}": 1})
            boards.begin({}, {"train.batch_size": number}, {})
    found = shown(tmp_path)
    assert {len(values) for values in found.values()} == {1}
    assert found.keys() > {("command/text_summary", 0), ("spectrum", 0)}
    (column,) = hparams(tmp_path, "experiment").hparam_infos
    assert column.name == "column_1"
    row = hparams(tmp_path, "session_start_info").hparams
    assert row["train.batch_size"].number_value == 1
    assert another.exists()


def test_what_was_flushed_is_in_the_file(tmp_path):
    with start(tmp_path) as boards:
        boards.text("sample", "a text", 5)
        boards.flush()  # A kill after it loses nothing.
        assert ("sample/text_summary", 5) in shown(tmp_path)


def test_a_run_that_goes_on_by_a_clock_that_is_behind_is_shown_whole(
    tmp_path, monkeypatch
):
    now = time.time()
    for first_step in (0, 2, 4):
        monkeypatch.setattr(time, "time", lambda n=first_step: now - 1800 * n)
        with start(tmp_path, first_step=first_step) as boards:
            boards.text("sample", "kept", first_step)
            boards.text("sample", "dropped, except the last", first_step + 2)
    samples = {
        step: text for (tag, step), text in texts(tmp_path).items() if tag == "sample"
    }
    assert list(samples) == [0, 2, 4, 6]
    assert [text.split()[0] for text in samples.values()] == [*["kept"] * 3, "dropped,"]


def test_a_full_disk_ends_the_boards_with_an_error_at_once(tmp_path, soon):
    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, start(tmp_path) as boards:
        patch.setattr(RecordWriter, "write", fill)
        for step in range(20):  # More than a queue of SummaryWriter holds.
            with pytest.raises(OSError, match="No space left") as caught:
                boards.text("sample", "a text", step)
            assert caught.value.filename == str(tmp_path)


def test_rows_without_a_token_have_no_text(config):
    rows = VOCAB_SIZE + 5
    trained = execute(changed(config, **{"model.vocab_size": rows}))
    labels = []
    boards = types.SimpleNamespace(
        has_projector=True, projector=lambda _, given, __: labels.extend(given)
    )
    tables = dict.fromkeys("ab", lambda: np.ones((rows, 2)))
    statistics = types.SimpleNamespace(frequency=np.arange(1.0, rows + 1))
    show_rows(boards, Run.open(trained), Settings.of(config), statistics, tables)
    texts = {token: text for text, token, *_ in labels}
    assert (texts[VOCAB_SIZE - 1], texts[VOCAB_SIZE]) == (repr(TEXTS[-1]), "")


def test_a_resumed_run_is_described_on_a_board_that_is_new(tmp_path):
    with start(tmp_path, first_step=3) as boards:
        boards.begin({}, {"train.batch_size": 8}, {})
    row = hparams(tmp_path, "session_start_info").hparams
    assert row["train.batch_size"].number_value == 8


def test_the_columns_are_those_of_all_runs_of_the_workdir_so_far(config):
    execute(config)
    workdir = Path(config.workdir)
    more = {"arm": "random", "model.n_embd_wte": 8, "train.steps": 3}
    execute(changed(config, **more, **{"checkpoint.every": 3}))
    found = hparams(workdir / "experiment", "experiment")
    assert "train.steps" in [column.name for column in found.hparam_infos]


def test_bands_that_were_made_for_no_rank_have_none(config):
    """Neither on the board nor in result.json, nor in runs that start from them."""
    unread = {"arm": "random", "model.n_embd_wte": 64}
    run = execute(changed(config, **BANDS, **unread))
    further = {"init.weights_from": str(run), "arm": "pca_finetune"}
    for folder in (run, execute(changed(config, **further))):
        assert "rank" not in hparams(folder, "session_start_info").hparams
        assert json_of(folder / "result.json")["rank"] is None


def test_a_run_that_is_trained_anew_has_a_column_for_the_knob_that_changed(config):
    execute(config)
    again = {"train.weight_decay": 0.2, "overwrite": True}
    execute(changed(config, **again))
    found = hparams(Path(config.workdir) / "experiment", "experiment")
    names = [column.name for column in found.hparam_infos]
    assert "train.weight_decay" in names and "model.vocab_size" not in names


def test_only_the_first_process_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with start(tmp_path / "run", wandb=True) as boards:
        boards.text("config", "text", 0)
        boards.table("table", ["a"], [[1]])
        boards.figure("figure", spectrum_figure([2.0, 1.0], [1]))
        boards.begin({"a": 1}, {"a": 1}, {"b": 2})
        boards.columns({"a": 1})
        boards.projector({"before": np.ones((2, 3))}, [(1,), (2,)], ("id",))
        boards.flush()
        boards.end(3, {"loss": 1.0})
        assert not (boards.is_shown or boards.has_projector)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_columns_are_arm_sizes_and_the_knobs_in_which_runs_differ():
    one = Settings().to_dict()
    other = Settings().replace({"arm": "pca", "model.n_embd_wte": 8}).to_dict()
    always = ["arm", "params_embedding", "params_total", "rank"]
    assert list(columns([one])) == list(columns([one, other])) == always
    changes = {"train.steps": 7, "seed": 2, "init.weights_from": "a/path"}
    changes |= {"telemetry.every": 7, "workdir": "elsewhere", "model.vocab_size": 97}
    third = Settings().replace(changes).to_dict()
    found = columns([one, third])
    assert list(found) == [*always, "model.vocab_size", "seed", "train.steps"]
    assert found["model.vocab_size"] == 97  # None shows no type.
    del third["train"]["steps"]  # A record of a version without this knob.
    assert "train.steps" not in columns([one, third])
    assert hyperparameters(third)["train.steps"] == Settings().train.steps


def test_an_experiment_shows_curves_texts_pictures_and_one_table_of_runs(config):
    experiment = changed(config, task="experiment", **{"experiment.arms": "pca"})
    execute(experiment)
    workdir = Path(config.workdir)
    for name in ARMS:
        found, steps = shown(workdir / name), {}
        assert all(len(values) == 1 for values in found.values())
        for (tag, step), (value,) in found.items():
            if value.HasField("simple_value"):
                steps.setdefault(tag, []).append(step)
        # Final numbers are the ends of curves, and no charts of one dot.
        assert steps["loss/val"] == [0, 3, 6] and min(map(len, steps.values())) > 1
        assert [step for tag, step in texts(workdir / name) if tag == "sample"] == [
            *(0, 3, 6),
        ]
        assert texts(workdir / name)["command", 0] == "    a command"
        assert (
            f"| arm | {'pca' if 'pca' in name else 'baseline'} |"
            in (texts(workdir / name)["settings", 0])
        )
        # The charts of all runs: TensorBoard merges those that are equal.
        (layout,) = found["custom_scalars__config__", 0]
        charts = layout_pb2.Layout.FromString(layout.tensor.string_val[0]).category
        assert charts[0].chart[0].title == "validation loss of all models"
        assert list(charts[0].chart[0].multiline.tag) == ["loss/val$"]
        # TensorBoard takes the columns from whichever run has them.
        assert "_hparams_/experiment" not in {tag for tag, _ in found}
        assert hparams(workdir / name, "session_end_info").status == 1
    cells = [hparams(workdir / name, "session_start_info").hparams for name in ARMS]
    assert [one["arm"].string_value for one in cells] == ["baseline", "pca"]
    assert "rank" not in cells[0] and cells[1]["rank"].number_value == 8
    for one, name in zip(cells, ARMS, strict=True):
        result = json.loads((workdir / name / "result.json").read_text())
        for size in ("params_embedding", "params_total"):
            assert one[size].number_value == result[size]
    overview = workdir / "experiment"
    found = hparams(overview, "experiment")
    assert [column.name for column in found.hparam_infos] == [
        *("arm", "params_embedding", "params_total", "rank"),
    ]
    assert [metric.name.tag for metric in found.metric_infos] == ["loss/val"]
    assert {tag for tag, _ in shown(overview)} == {
        *("_hparams_/experiment", "command/text_summary", "table/text_summary"),
        "pareto",
    }
    assert texts(overview)["table", 0].splitlines()[-1].startswith("| A | PCA-scratch ")
    pictures = {tag for tag, _ in shown(workdir / "pca_factorized")}
    assert pictures == {"spectrum", "command/text_summary"}
    before = {path: path.stat().st_mtime_ns for path in overview.iterdir()}
    execute(experiment)  # Everything is done.
    assert before == {path: path.stat().st_mtime_ns for path in overview.iterdir()}


def projected(folder):
    """{name: (labels with their header, rows [n, D])} in the embedding projector."""
    place, found = folder / PROJECTOR, {}
    text = (place / "projector_config.pbtxt").read_text()
    stated = re.findall(r"""(tensor_name|tensor_path|metadata_path): "(.*)\"""", text)
    for at in range(0, len(stated), 3):
        one = dict(stated[at : at + 3])
        labels = (place / one["metadata_path"]).read_text("utf-8").splitlines()
        rows = np.loadtxt(place / one["tensor_path"], delimiter="\t")
        name, _, _ = one["tensor_name"].partition(":")
        assert name not in found
        found[name] = [line.split("\t") for line in labels], rows
    return found


def test_the_projector_has_the_most_frequent_tokens_before_and_after(
    config, readable, monkeypatch
):
    monkeypatch.setattr("pcagpt.pipeline.token_rows.SHOWN", 20)
    folder = Path(config.workdir) / "pca_factorized"
    execute(changed(config, arm="pca", **{"model.n_embd_wte": 8}))
    tokens = np.fromfile(readable / "train.bin", np.uint16)
    ids = np.argsort(-np.bincount(tokens, minlength=VOCAB_SIZE), kind="stable")[:20]
    assert list(projected(folder)) == ["before", "after_rank_8"]
    table = saved_state(Path(config.workdir) / "gpt_baseline")[
        "weights['params']['embed']['band_0']['wte']"
    ]
    factors = np.load(folder / "wte_pca_k8.npy")
    scale = np.load(folder / "scale_mats_pca_k8.npz")["scale_up"]
    wanted = {"before": table[ids], "after_rank_8": (factors @ scale)[ids]}
    for name, (labels, rows) in projected(folder).items():
        np.testing.assert_allclose(rows, wanted[name], atol=1e-5)
        assert labels[0] == ["token", "id", "place", "frequency"]
        assert labels[1][:3] == [repr(TEXTS[ids[0]]), str(ids[0]), "1"]
        assert len(labels) == 21
    # More ranks join the first ones.
    more = {"task": "factorize", "ranks": (4,), "data.source": ""}
    more |= {"model_path": f"{config.workdir}/gpt_baseline"}
    execute(changed(config, **more))
    assert list(projected(folder)) == ["before", "after_rank_4", "after_rank_8"]
    assert not list((folder / PROJECTOR).rglob("*.replaced-*"))


def project(folder, number):
    tables = {"before": np.full((2, 3), number)}
    tensorboard_files.write_projector(folder, tables, [(1, "a"), (2, "b")], "nt")


def test_a_killed_command_leaves_files_of_its_own_in_the_projector(
    tmp_path, monkeypatch
):
    for number in (1.0, 2.0, 3.0):
        project(tmp_path, number)
        with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):

            def killed(*_):
                raise KeyboardInterrupt

            context.setattr(tensorboard_files, "write_file", killed)
            project(tmp_path, number + 0.5)
    project(tmp_path, 4.0)
    assert not list(tmp_path.rglob("*.replaced-*"))
    assert projected(tmp_path)["before"][1].tolist() == [[4.0] * 3] * 2


def test_a_linked_folder_of_the_projector_is_not_written_to(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "tensors.tsv").write_text("7\n")
    place = tmp_path / "run" / PROJECTOR
    place.mkdir(parents=True)
    (place / "before").symlink_to(theirs)
    project(tmp_path / "run", 1.0)
    assert {path.name for path in theirs.iterdir()} == {"tensors.tsv"}
    assert (theirs / "tensors.tsv").read_text() == "7\n"
    (kept,) = place.glob("before.replaced-*")
    assert kept.readlink() == theirs


def test_what_a_person_changed_in_the_projector_is_kept(tmp_path):
    place = tmp_path / PROJECTOR
    write = functools.partial(project, tmp_path)
    write(1.0)
    write(2.0)
    assert not list(place.rglob("*.replaced-*"))
    theirs = {place / "before" / "metadata.tsv": "n\tmine\n1\tx\n2\ty\n"}
    theirs[place / "projector_config.pbtxt"] = "embeddings {}\n"
    for path, text in theirs.items():
        path.write_text(text)
    table, outside = place / "before" / "tensors.tsv", tmp_path / "outside.tsv"
    outside.write_text("7\t7\t7\n")
    table.unlink()
    table.symlink_to(outside)
    (place / "written.json").write_text("no JSON")
    write(2.0)
    write(3.0)
    assert outside.read_text() == "7\t7\t7\n"
    assert not (table.is_symlink() or list(place.rglob("tensors.tsv.replaced-*")))
    for path, text in theirs.items():
        (kept,) = place.rglob(f"{path.name}.replaced-*")
        assert kept.read_text() == text
    assert projected(tmp_path)["before"][1].tolist() == [[3.0] * 3] * 2


@pytest.mark.parametrize(
    ("last", "folder", "picture"),
    [
        ("pcagpt.factorization.factor_files.write", "pca_factorized", "spectrum"),
        ("pcagpt.pipeline.execute.write_report", "experiment", "pareto"),
    ],
)
def test_what_counts_as_done_is_shown_even_if_the_command_was_killed_then(
    last, folder, picture, finished_experiment, tiny_config, monkeypatch
):
    workdir = shutil.copytree(finished_experiment.workdir, tiny_config.workdir)
    shutil.rmtree(Path(workdir) / "pca_factorized")
    (Path(workdir) / "results.json").unlink()
    config = changed(tiny_config, task="experiment", **{"telemetry.tensorboard": True})
    write = pkgutil.resolve_name(last)

    def kill(*given):
        write(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(last, kill)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    execute(config)
    assert picture in {tag for tag, _ in shown(Path(workdir) / folder)}
    assert len(projected(Path(workdir) / "pca_factorized")) == 2


def test_a_sweep_shows_its_figure_and_its_best_tables(config, readable):
    execute(config)
    folder = Path(config.workdir) / "compressed"
    asked = {"task": "compress", "data.source": "", "ranks": (8,)}
    asked |= {"model_path": f"{config.workdir}/gpt_baseline"}
    asked |= {"compress.methods": "svd,coded", "compress.bands": (1,)}
    asked |= {"compress.bits": (), "compress.calibration_tokens": 512}
    compress(Settings.of(changed(config, **asked)), "a command")
    assert {tag for tag, _ in shown(folder)} == {"command/text_summary", "pareto"}
    found = projected(folder)
    assert list(found) == ["before", "after_best_coded_k8", "after_best_k8"]
    (_, before), *others = found.values()
    for labels, after in others:
        assert after.shape == before.shape == (VOCAB_SIZE, 32)
        assert not np.array_equal(after, before)
        assert labels[1][0] in map(repr, TEXTS)


def test_a_resumed_run_shows_nothing_twice(config, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at(patch, 4, signal.SIGTERM)
        with pytest.raises(Interrupted):
            execute(config)
    run_dir = execute(config)
    found = shown(run_dir)
    assert {key for key, values in found.items() if len(values) > 1} == set()
    assert [step for tag, step in texts(run_dir) if tag == "sample"] == [0, 3, 6]
    assert {tag: step for tag, step in found if tag.startswith("_hparams_")} == {
        "_hparams_/session_start_info": 0,
        "_hparams_/session_end_info": 7,
    }
    # Both commands are told.
    first, second = (step for tag, step in texts(run_dir) if tag == "command")
    assert first == 0 < second


def test_a_run_that_was_killed_before_its_result_ends_once(config, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pcagpt.training.loop.write_result", kill)
        with pytest.raises(KeyboardInterrupt):
            execute(config)
    found = shown(execute(config))
    assert {key for key, values in found.items() if len(values) > 1} == set()


def test_boards_change_no_loss_and_no_weight(config):
    found = []
    for is_shown in (True, False):
        asked = {"workdir": f"{config.workdir}/{is_shown}"}
        asked |= {"telemetry.tensorboard": is_shown, "model.dropout": 0.1}
        run_dir = execute(changed(config, **asked))
        found.append((metrics(run_dir), saved_state(run_dir)))
    (logged, state), (logged_alone, state_alone) = found
    assert logged == logged_alone
    assert_equal(state, state_alone)


def test_the_runs_of_other_versions_and_other_things_share_a_workdir(config):
    workdir = Path(config.workdir)
    for name, text in {
        "damaged": "{",
        "other": "[1]",
        "of_another_program": '{"model_type": "gpt2"}',
        "older": '{"arm": "pca", "model": {}, "train": {"steps": 3}}',
    }.items():
        (workdir / name).mkdir(parents=True)
        (workdir / name / "config.json").write_text(text)
    execute(config)
    found = hparams(workdir / "experiment", "experiment")
    assert "train.steps" in [column.name for column in found.hparam_infos]


@pytest.fixture
def wandb_home(tmp_path, monkeypatch):
    """W&B offline, without the account or the caches of whoever runs the tests."""
    wandb = pytest.importorskip("wandb")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_DIR", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "home").mkdir()
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


def offline_runs(folder):
    """[(folder of an offline run, all that its file has)], oldest first."""
    sys.modules["wandb"].teardown()  # Its process writes the rest.
    files = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    return [(path.parent, path.read_bytes()) for path in files]


def wandb_id(folder):
    return (folder / "wandb_id").read_text().splitlines()[0]


def test_wandb_shows_the_same_offline_and_says_how_to_upload_it(
    tmp_path, wandb_home, capsys
):
    run = tmp_path / "runs" / "gpt_baseline"
    with start(run, wandb=True, wandb_project="project-of-the-test") as boards:
        boards.begin({"train.steps": 3}, {"train.steps": 3}, {"params_total": 12345})
        boards.text("sample", "<one> two", 1)
        boards.table("table", ["a", "b"], [[1, "x"], ["y", None]])
        boards.figure("spectrum", spectrum_figure([2.0, 1.0], [1]))
        boards.end(3, {"val_loss": 1.25, "word_perplexity": None, "bad": float("nan")})
    ((folder, record),) = offline_runs(run)
    group = (run.parent / "wandb_group").read_text().strip()
    assert group.startswith("runs-")
    for word in (
        *(group, "project-of-the-test", "train", "gpt_baseline", "params_total"),
        *("command", "sample", "table", "spectrum", "final/val_loss", "12345"),
    ):
        assert word.encode() in record, word
    assert b"final/word_perplexity" not in record and b"final/bad" not in record
    media = {path.suffix for path in (folder / "files" / "media").rglob("*.*")}
    assert media == {".html", ".json", ".png"}
    pages = [path.read_text() for path in folder.rglob("sample_*.html")]
    assert len(pages) == 1 and "&lt;one&gt; two" in pages[0]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [
        f"W&B of gpt_baseline, offline: {folder}; upload it with: wandb sync {folder}"
    ]


def test_wandb_continues_the_run_of_a_folder_in_its_group(tmp_path, wandb_home):
    runs, found = tmp_path / "runs", {}
    for name, job, first_step in (
        *(("gpt_baseline", "train", 0), ("gpt_baseline", "train", 4)),
        *(("pca_factorized", "factorize", 0), ("pca_factorized", "factorize", 0)),
    ):
        with start(runs / name, job, first_step, wandb=True, tensorboard=False):
            pass
        run_id = wandb_id(runs / name)
        found.setdefault(name, []).append(run_id)
    group = (runs / "wandb_group").read_text().strip()
    for name, job in (("gpt_baseline", "train"), ("pca_factorized", "factorize")):
        first, second = found[name]
        assert first == second
        for folder, record in offline_runs(runs / name):
            assert first in folder.name
            assert group.encode() in record and job.encode() in record
    assert found["gpt_baseline"] != found["pca_factorized"]
    with start(runs / "gpt_baseline", wandb=True, tensorboard=False):
        pass  # A new run in an old folder.
    assert wandb_id(runs / "gpt_baseline") != first


def test_wandb_continues_the_run_of_a_moved_folder_but_not_that_of_a_copy(
    tmp_path, wandb_home, caplog
):
    def go_on(folder):
        with start(folder, "train", 4, wandb=True, tensorboard=False):
            return wandb_id(folder)

    first = go_on(tmp_path / "runs/gpt_baseline")
    moved = (tmp_path / "runs").rename(tmp_path / "moved") / "gpt_baseline"
    assert go_on(moved) == go_on(moved) == first
    (tmp_path / "linked").symlink_to("moved")
    assert go_on(tmp_path / "linked/gpt_baseline") == first
    assert "is a copy of" not in caplog.text
    copy = shutil.copytree(tmp_path / "moved", tmp_path / "copy") / "gpt_baseline"
    second = go_on(copy)
    assert second != first and f"{copy} is a copy of {moved}: it beg" in caplog.text
    assert (go_on(moved), go_on(copy)) == (first, second)
    shutil.rmtree(copy)
    copy = shutil.copytree(moved, copy)
    shutil.rmtree(moved)  # So it was moved.
    assert go_on(copy) == first
    (copy / "wandb_id").write_text(f"{first}\n")  # Of an earlier version.
    assert go_on(copy) == first


def test_a_damaged_name_of_wandb_is_named_and_a_damaged_id_begins_a_new_run(
    tmp_path, wandb_home
):
    folder, name = tmp_path / "compressed", tmp_path / "wandb_group"
    for bad in (b"\xff\xfe", b"", b"two\nlines"):
        name.write_bytes(bad)
        with pytest.raises(UserError, match="wandb_group holds no name of a group"):
            start(folder, "train", wandb=True, tensorboard=False)
    name.unlink()
    name.mkdir()
    with pytest.raises(UserError, match="wandb_group is a folder: remove it"):
        start(folder, "train", wandb=True, tensorboard=False)
    name.rmdir()
    name.symlink_to("nothing")
    with pytest.raises(UserError, match="wandb_group is a link to nothing: remove it"):
        start(folder, "train", wandb=True, tensorboard=False)
    name.unlink()
    for bad in (b"\xff\xfe", b"", b"a/b c"):
        folder.mkdir(exist_ok=True)
        (folder / "wandb_id").write_bytes(bad)
        with start(folder, "compress", wandb=True, tensorboard=False):
            pass
        assert re.fullmatch(r"\w+", wandb_id(folder))


def test_a_workdir_of_any_name_has_a_group(tmp_path):
    for name in ("two\nlines", os.fsdecode(b"\xff"), "a b é"):
        group = wandb_run._group(tmp_path / name)
        assert re.fullmatch(r"(two_lines|_|a b é)-\w{8}", group)
        assert wandb_run._group(tmp_path / name) == group


class Closing(wandb_run.WandbRun):
    """A run that only notes whether it was closed, and as failed."""

    def __init__(self, *_, **__):
        pass

    def text(self, *_):
        pass

    def close(self, has_failed):
        CLOSED.append(has_failed)


CLOSED = []


@pytest.mark.parametrize("name", ["__init__", "text", "close"])
def test_wandb_is_closed_if_tensorboard_fails(tmp_path, monkeypatch, name):
    end = TensorBoard.close

    def full(*arguments):
        if name == "close":
            end(*arguments)
        raise OSError(errno.ENOSPC, "full")

    CLOSED.clear()
    monkeypatch.setattr("pcagpt.telemetry.boards.import_wandb", lambda: None)
    monkeypatch.setattr("pcagpt.telemetry.boards.WandbRun", Closing)
    monkeypatch.setattr(TensorBoard, name, full)
    with pytest.raises(OSError, match="full"), start(tmp_path / "run", wandb=True):
        pass
    assert CLOSED == [True]


def test_two_commands_may_begin_in_one_workdir(tmp_path, monkeypatch):
    """Each sees a folder before and after the other has changed it."""
    link, unlink = os.link, Path.unlink
    monkeypatch.setattr(os, "link", lambda *a: [link(*a), link(*a)])
    group = wandb_run._group(tmp_path)
    assert group.startswith(tmp_path.name) and group == wandb_run._group(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["wandb_group"]
    with start(tmp_path / "experiment"):
        pass

    def twice(path, **how):
        unlink(path, missing_ok=True)
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", twice)
    with start(tmp_path / "experiment"):
        pass


class FakeRun:
    """A run of W&B that is online."""

    id, offline, url, summary = "an-id", False, "https://a-server/a-run", {}

    def __init__(self, logged):
        self.config = types.SimpleNamespace(update=lambda *_, **__: None)
        self.log = logged.append

    def define_metric(self, *_, **__):
        pass

    finish = define_metric


def test_all_jobs_of_an_experiment_are_one_group_in_wandb(config, monkeypatch, capsys):
    asked, logged = [], []

    def init(**options):
        asked.append(options)
        return FakeRun(logged)

    fake = types.SimpleNamespace(
        init=init,
        errors=types.SimpleNamespace(Error=RuntimeError),
        **dict.fromkeys(("Html", "Image"), lambda shown: shown),
        **dict.fromkeys(("Settings", "Table"), lambda **options: options),
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    telemetry = {"telemetry.wandb": True, "telemetry.tensorboard": False}
    config = changed(config, **telemetry)
    execute(changed(config, task="experiment", **{"experiment.arms": "pca"}))
    runs = [(one["name"], one["job_type"]) for one in asked]
    assert runs == [
        *(("gpt_baseline", "train"), ("pca_factorized", "factorize")),
        *(("gpt_pca_k8", "train"), ("experiment", "experiment")),
    ]
    tags = {tag for entry in logged for tag in entry}
    assert tags > {"command", "sample", "spectrum", "pareto", "table", "loss/val"}
    lines = [f"W&B of {name}: https://a-server/a-run" for name, _ in runs]
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("W&B")] == lines
    asked_of_a_sweep = {"task": "compress", "data.source": "", "ranks": (8,)}
    asked_of_a_sweep |= {"model_path": f"{config.workdir}/gpt_baseline"}
    asked_of_a_sweep |= {"compress.methods": "svd", "compress.bands": (1,)}
    asked_of_a_sweep |= {"compress.recover_ranks": (8,)}
    compress(Settings.of(changed(config, **asked_of_a_sweep)), "a command")
    assert (asked[4]["name"], asked[4]["job_type"]) == ("compressed", "compress")
    assert {one["job_type"] for one in asked[5:]} == {"train"} and len(asked) == 8
    assert len({one["group"] for one in asked}) == 1


def test_wandb_without_an_account_is_refused_in_one_line(
    tmp_path, wandb_home, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    with pytest.raises(UserError, match=r"W&B did not start.*WANDB_MODE=offline") as e:
        start(tmp_path / "run", wandb=True)
    assert "\n" not in str(e.value)
    assert not list((tmp_path / "run").glob("events.*"))


def test_a_wrong_project_of_wandb_is_named_with_its_knob(tmp_path, wandb_home):
    words = "W&B did not start: .*a/b.*correct telemetry.wandb_project"
    with pytest.raises(UserError, match=words):
        start(tmp_path / "run", wandb=True, wandb_project="a/b")


def test_work_that_is_done_is_shown_without_wandb_if_it_does_not_start(
    tmp_path, wandb_home, monkeypatch, said
):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "")
    with start(tmp_path / "compressed", "compress", wandb=True) as boards:
        boards.figure("pareto", spectrum_figure([2.0, 1.0], [1]))
    assert ("pareto", 0) in shown(tmp_path / "compressed")
    (line,) = said()
    assert line.startswith("W&B did not start")


def test_work_that_is_done_is_shown_without_wandb_if_its_files_cannot_be_written(
    tmp_path, monkeypatch, said
):
    denied = OSError(errno.EACCES, "Permission denied", "wandb_group")
    monkeypatch.setattr(wandb_run, "_group", lambda _: (_ for _ in ()).throw(denied))
    with start(tmp_path / "compressed", "compress", wandb=True) as boards:
        boards.figure("pareto", spectrum_figure([2.0, 1.0], [1]))
    assert ("pareto", 0) in shown(tmp_path / "compressed")
    (line,) = said()
    assert line.startswith("wandb_group: permission denied")
    with pytest.raises(OSError, match="Permission denied"):
        start(tmp_path / "run", wandb=True)


@pytest.mark.parametrize("package", ["wandb", "PIL.Image"])
def test_a_missing_package_of_wandb_says_how_to_install_it(
    package, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"pip install 'pcagpt\[wandb\]'"):
        start(tmp_path / "run", wandb=True)
    assert not (tmp_path / "run").exists()
