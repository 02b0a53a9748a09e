"""The command line: help, mistakes in it, --print_config, exit codes, clean output."""

import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile

import jax
import pytest
from command_line import CONFIGS, ROOT, call, refusal, tiny
from runs import changed, overrides, plan, quick_environment, snapshot

from pcagpt import config as knobs
from pcagpt import errors
from pcagpt.config import command_line
from pcagpt.config.schema import ModelSettings
from pcagpt.config.tasks import TASKS
from pcagpt.json_files import read_json, write_json
from pcagpt.methods import METHODS
from pcagpt.model import training_flops_per_token
from pcagpt.pipeline import estimate, execute, tasks, train_job
from pcagpt.run import provenance
from pcagpt.run.trained import Run

DEMO = f"--config={CONFIGS / 'demo.py'}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The current folder is empty: configs/ and checkpoints/ are not in it."""
    monkeypatch.chdir(tmp_path)


def python(*arguments, cache=None, modules=ROOT):
    """Runs Python in a process of its own; `modules` come first in imports."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=quick_environment(cache) | {"PYTHONPATH": f"{modules}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def process(*arguments, **options):
    """Runs the command line in a process of its own."""
    return python("-m", "pcagpt.main", *map(str, arguments), **options)


# Help.


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_every_spelling_of_help_shows_the_help(flag):
    outcome = call(flag)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("How small can the token embedding")


def test_help_names_every_config_and_every_knob_with_default_and_meaning():
    text = call("--help").out
    for path in CONFIGS.glob("*.py"):
        assert f"--config=configs/{path.name}" in text
    flowing = " ".join(text.split())
    for path, knob in knobs.KNOBS.items():
        setting = knobs.override(path, knob.default).removeprefix("--config.")
        assert f"{setting} {knob.meaning}" in flowing
    assert max(map(len, text.splitlines())) <= 88


def test_help_and_methods_keep_their_words_without_docstrings():
    code = "from pcagpt import main, methods as m; print(m.METHODS['pca'].words)"
    words = f"{code}; main.main(['', '--help'])"
    assert python("-OO", "-c", words).stdout.startswith(
        "Principal components: SVD after subtracting the mean row\n"
        "How small can the token embedding"
    )


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no config: give --config=configs/demo.py, or --help"),
        (
            ["--config=nowhere.py"],
            "config file 'nowhere.py' does not exist: give a file, or one of .*demo.*",
        ),
        (["--config"], "config file '' does not exist: .*"),
        ([DEMO, DEMO], "--config is given twice, .*"),
        ([DEMO + ":64"], ".*demo.py takes no ':64': .*"),
        ([DEMO, "--config.train.stps=4"], ".* no knob 'train.stps': .* train.steps .*"),
        ([DEMO, "--config.steps=4"], ".* no knob 'steps': did you mean train.steps.*"),
        ([DEMO, "--noconfig.model.bais"], ".* no knob 'model.bais': .* model.bias.*"),
        ([DEMO, "--config.xyzzy=4"], r".* no knob 'xyzzy' \(--help lists all\)"),
        ([DEMO, "--config.task=0"], "task is '0': it must be one of train, .*"),
        ([DEMO, "--config.train=3"], "'train' is a section: .* --config.train.steps.*"),
        (
            [DEMO, "--config.train.steps=abc"],
            "train.steps is 'abc': it must be a whole number, as in "
            "--config.train.steps=5000",
        ),
        ([DEMO, "--config.train.steps=1.5"], "train.steps is '1.5': .* whole number.*"),
        ([DEMO, "--config.train.steps"], "train.steps is '': .* a whole number.*"),
        ([DEMO, "--config.train.beta1=a"], "train.beta1 is 'a': .* a number, .*"),
        ([DEMO, "--config.model.bias=maybe"], ".*bias is 'maybe': .* True or False.*"),
        ([DEMO, "--config.ranks=8,x"], "ranks is '8,x': .* numbers separated by .*"),
        ([DEMO, "--config.model.n_embd_wte=x"], ".*wte is 'x': .* a whole number"),
        ([DEMO, "--config.ranks=8,0"], "ranks holds 0: it must be at least 1"),
        ([f"--config={CONFIGS / 'experiment.py'}:64,x"], "'64,x' is not a list of .*"),
        ([DEMO, "--steps=4"], ".* no flag --steps: .* --config.train.steps.*"),
        ([DEMO, "--print-config"], ".* no flag --print-config: .* --print_config .*"),
        ([DEMO, "--print_config=maybe"], ".*print_config=maybe.*"),
        ([DEMO, "128"], "'128' is not a flag: write --config.KNOB=VALUE"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained_in_one_line(
    arguments, line, tmp_path
):
    seen = refusal(*arguments, unchanged=[tmp_path])
    assert re.fullmatch(f"pcagpt: {line}\n", seen)


def test_a_missing_config_lists_those_that_are_there(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    line = refusal("--config=configs/dmo.py", unchanged=[tmp_path])
    for path in CONFIGS.glob("*.py"):
        assert re.search(rf"\b{path.stem}\b", line)


BASE = "from pcagpt.config import base\ndef get_config():\n    c = base()\n"
OTHER = (
    "from ml_collections import ConfigDict\n"
    "def get_config():\n    return ConfigDict({'task': 'train'})\n"
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\ndef get_config(:\n", ", line 2: SyntaxError: invalid syntax"),
        (BASE + "    return c + d\n", ", line 4: NameError: name 'd' is not defined"),
        (BASE + "    c.train.stps = 3\n", ", line 4: there is no knob 'stps': did .*"),
        (BASE + "    c.train.steps = 'x'\n", ", line 4: TypeError: .*'steps'.*"),
        ("get_confg = None\n", r" defines no get_config\(\)"),
        (BASE, r": get_config\(\) must return pcagpt.config.base\(\), .*"),
        (OTHER, r": get_config\(\) must return pcagpt.config.base\(\), .*"),
    ],
)
def test_an_error_inside_a_config_file_is_told_with_its_line(text, line, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    seen = refusal(f"--config={path}", unchanged=[tmp_path])
    assert re.fullmatch(f"pcagpt: {path}{line}\n", seen)


# What is understood.


def test_later_flags_win_and_every_spelling_of_a_value_is_understood():
    words = ["--config.train.steps=3", "--config.train.steps", "4"]
    settings, print_only = command_line.parse(
        ["pcagpt", *words, DEMO, "--noconfig.model.bias", "--config.overwrite"]
        + ["--config.ranks=8,16", "--config.seed", "7", "--print_config"]
    )
    assert settings.train.steps == 4
    assert settings.model.bias is False
    assert settings.overwrite is True
    assert settings.ranks == (8, 16)
    assert settings.seed == 7
    assert print_only


def test_the_part_after_the_colon_goes_to_get_config():
    source = f"--config={CONFIGS / 'experiment.py'}"
    assert command_line.parse(["pcagpt", f"{source}:8,16"])[0].ranks == (8, 16)
    assert command_line.parse(["pcagpt", source])[0].ranks == (128,)


def test_one_call_leaves_nothing_behind_for_the_next():
    command_line.parse(["pcagpt", DEMO, "--config.train.steps=7", "--print_config"])
    settings, print_only = command_line.parse(["pcagpt", DEMO])
    assert settings.train.steps != 7
    assert not print_only


# Showing and doing.


def test_print_config_shows_knobs_and_plan_and_writes_nothing(corpus_folder, tmp_path):
    arguments = tiny("experiment.py:8,4", corpus_folder, workdir="runs")
    before = snapshot(tmp_path), snapshot(corpus_folder)
    outcome = call(*arguments, "--print_config")
    assert (outcome.code, outcome.err) == (0, "")
    assert (snapshot(tmp_path), snapshot(corpus_folder)) == before
    shown, text = outcome.out.split("\n\n")
    for path in knobs.KNOBS:
        assert re.search(rf"^{path} ", shown, re.MULTILINE)
    assert re.search(r"^train.steps +2 +\(default 5000\)$", shown, re.MULTILINE)
    assert re.search(r"^train.beta1 +0.9$", shown, re.MULTILINE)
    *folders, work = text.splitlines()
    # The mesh has one of the devices.
    assert re.fullmatch(
        "7 runs to train: roughly a minute on 1 x cpu, without evaluations", work
    )
    assert [line.split()[:2] for line in folders] == [
        ["D", "gpt_baseline"],
        ["pca_factorized", "rank"],
        ["A", "gpt_pca_k8"],
        ["C", "gpt_random_lowrank_k8"],
        ["B", "gpt_pca_finetune_k8"],
        ["A", "gpt_pca_k4"],
        ["C", "gpt_random_lowrank_k4"],
        ["B", "gpt_pca_finetune_k4"],
    ]
    assert all(line.endswith("to do") for line in folders)


@pytest.mark.parametrize(
    ("minutes", "words"),
    [(0.2, "a minute"), (12, "12 minutes"), (89, "89 minutes"), (150, "2 hours")],
)
def test_a_time_is_estimated_from_the_speed_of_the_devices(minutes, words, monkeypatch):
    speed = estimate.CORE_FLOPS * len(os.sched_getaffinity(0))
    devices = provenance.device(2)
    assert estimate.time_of(60 * minutes * speed, 2) == f"roughly {words} on {devices}"
    monkeypatch.delattr(os, "sched_getaffinity")  # As on macOS.
    assert estimate.time_of(1.0, 2) == f"roughly a minute on {devices}"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert estimate.time_of(1.0, 2) is None  # Its peak is not known.
    monkeypatch.setattr(provenance, "peak_flops", lambda count: 1e14 * count)
    speed = estimate.SHARE_OF_PEAK * 1e14 * 2
    assert estimate.time_of(60 * minutes * speed, 2) == f"roughly {words} on {devices}"


def test_the_time_of_a_sweep_grows_with_all_that_it_depends_on(monkeypatch):
    monkeypatch.setattr(estimate, "speed_of", lambda devices, share: devices * 2e12)
    monkeypatch.setattr(estimate, "SECONDS_PER_TABLE", 60.0)
    monkeypatch.setattr(estimate, "SECONDS_PER_NUMBER", 60e-6)
    model = ModelSettings(n_layer=1, n_embd=1_000)
    devices = provenance.device(3)

    def time(tables, rows, calibration, measured, platform="cpu"):
        shape = (rows, 1_000)
        numbers = calibration, measured
        return estimate.of_sweep(tables, shape, model, *numbers, platform, 3)

    # A table of 1,000 numbers is made in a minute.
    assert time(10, 1, 0, 1) == f"roughly 10 minutes on {devices}"
    # With 12 million numbers in the block, a million tokens of calibration take
    # 6 * 12e6 / 6e12 s * 1e6 = 12 s.
    assert time(0, 0, 50_000_000, 1) == f"roughly 10 minutes on {devices}"
    # The heads have two tables of 6 million numbers.
    monkeypatch.setattr(estimate, "SECONDS_PER_NUMBER", 0.0)
    assert time(2, 6_000, 0, 15_000_000) == f"roughly 6 minutes on {devices}"
    more = ", plus 10 minutes per million tokens of the split"
    assert time(75, 6_000, 0, 0) == f"roughly 75 minutes on {devices}{more}"
    assert time(1, 1, 1, 1, platform="cuda") is None


def test_what_is_trained_already_is_not_in_the_estimate(finished_experiment):
    run = next(job for job in plan(finished_experiment).jobs if job.label[0] == "A")
    assert run.flops() == 0
    anew = {"overwrite": True, "train.learning_rate": 0.1, "train.steps": 3}
    anew = plan(changed(finished_experiment, **anew)).jobs
    config = Run.open(run.folder).config(run.settings.model)
    tokens = 3 * run.settings.train.batch_size * config.block_size
    expected = tokens * training_flops_per_token(config)
    assert next(job for job in anew if job.label[0] == "A").flops() == expected


def test_print_config_tells_of_a_package_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    arguments = tiny("baseline.py", "wikitext103", workdir=tmp_path / "runs")
    line = refusal(*arguments, "--print_config", unchanged=[tmp_path])
    assert "pip install 'pcagpt[datasets]'" in line


def test_every_task_has_a_function_that_does_it():
    assert tasks.DOES.keys() == TASKS.keys()


def test_a_finished_run_is_shown_as_done_and_not_touched_again(
    trained, corpus_folder, tmp_path
):
    shutil.copytree(trained.parent, tmp_path / "runs")
    arguments = tiny("baseline.py", corpus_folder, workdir="runs")
    before = snapshot(tmp_path)
    assert call(*arguments, "--print_config").out.endswith("  done\n")
    again = call(*arguments)
    assert (again.code, again.err) == (0, "")
    done, loss, following = again.out.splitlines()
    assert done.endswith("  done")
    assert re.fullmatch(r"val loss \d\.\d{4}, perplexity [\d.]+: runs/\w+", loss)
    assert following == (
        "compress it: python -m pcagpt.main --config=configs/compress.py "
        "--config.model_path=runs/gpt_baseline --config.workdir=runs"
    )
    assert snapshot(tmp_path) == before


def test_a_finished_run_whose_result_lacks_numbers_is_still_shown(
    trained, corpus_folder, tmp_path
):
    folder = tmp_path / "runs" / trained.name
    shutil.copytree(trained, folder)
    result = read_json(folder / "result.json", "")
    arguments = tiny("baseline.py", corpus_folder, workdir="runs")
    for loss, shown in (({"val_loss": 712.5}, "712.5000"), ({}, "–")):
        del result["val_loss"]
        write_json(folder / "result.json", result | loss | {"perplexity": None})
        result["val_loss"] = 0
        outcome = call(*arguments)
        assert outcome.code == 0, outcome
        assert f"val loss {shown}, perplexity –: runs/" in outcome.out


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be written into any workdir."""

    def fail(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "w")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    monkeypatch.setattr(execute, "write_report", fail)
    monkeypatch.setattr(train_job, "open_corpus", fail)


@pytest.mark.usefixtures("read_only")
def test_what_writes_nothing_needs_no_writable_workdir(
    trained, corpus_folder, tmp_path, said
):
    arguments = tiny("baseline.py", corpus_folder, workdir=trained.parent)
    outcome = call(*arguments)
    assert (outcome.code, outcome.err) == (0, "")
    assert "  done\n" in outcome.out
    assert "gpt_baseline is not compared with its corpus: [Errno 30] Re" in outcome.out
    arguments = tiny("experiment.py:8", corpus_folder, workdir=tmp_path / "runs")
    *_, last, _, told = call(*arguments, "--print_config").out.splitlines()
    assert last.endswith("to do")
    line = refusal(*arguments, unchanged=[tmp_path])
    assert f"{tmp_path} is not a writable folder" in line
    assert line == told.replace("this command would stop", "pcagpt") + "\n"
    (tmp_path / "file").touch()
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path / "file")
    line = refusal(*arguments, "--print_config", unchanged=[tmp_path])
    assert "file is not a writable folder" in line


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize(
    ("name", "stops"),
    [("compress", True), ("export", True), ("evaluate", False), ("baseline", False)],
)
def test_the_plan_says_whether_a_read_only_workdir_stops_the_command(
    name, stops, trained, corpus_folder
):
    arguments = [f"--config={CONFIGS / name}.py", f"--config.model_path={trained}"]
    if name == "compress":
        arguments.append("--config.ranks=8")
    if name == "baseline":  # It is done.
        arguments = tiny("baseline.py", corpus_folder, workdir=trained.parent)
    outcome = call(*arguments, "--print_config")
    assert outcome.code == 0, outcome
    assert ("\nthis command would stop: workdir is " in outcome.out) == stops


@pytest.mark.usefixtures("read_only")
def test_a_finished_experiment_needs_no_writable_workdir(finished_experiment, said):
    words = overrides(finished_experiment)
    outcome = call(f"--config={CONFIGS / 'experiment.py'}:8", *words)
    assert outcome.code == 0
    assert outcome.out.count("done") == 5
    workdir = finished_experiment.workdir
    assert said() == [f"the report in {workdir} is not renewed: Read-only file system"]


def stop_with(exception, monkeypatch):
    def stop(*_):
        raise exception

    monkeypatch.setattr(execute, "execute", stop)


@pytest.mark.parametrize(
    ("exception", "code", "line"),
    [
        (KeyboardInterrupt(), 1, "interrupted: run the same command again .*"),
        (errors.Interrupted("stopped at step 3"), 1, "stopped at step 3"),
        (errors.UserError("two\nlines"), 2, "two lines"),
        (MemoryError(), 2, "this machine's main memory is exhausted: .*"),
    ],
)
def test_what_stops_a_run_is_one_line_and_an_exit_code(
    exception, code, line, corpus_folder, monkeypatch
):
    stop_with(exception, monkeypatch)
    outcome = call(*tiny("baseline.py", corpus_folder))
    assert outcome.code == code
    assert re.fullmatch(f"pcagpt: {line}\n", outcome.err)


@pytest.mark.parametrize("exception", [RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_is_not_disguised_as_a_mistake(exception, corpus_folder, monkeypatch):
    stop_with(exception, monkeypatch)
    with pytest.raises(type(exception), match="a bug"):
        call(*tiny("baseline.py", corpus_folder))


# The process.


@pytest.mark.slow
def test_a_run_prints_its_plan_and_progress_and_no_library_s_messages(
    corpus_folder, compiled
):
    arguments = tiny("pca_k128.py", corpus_folder, model={"n_embd_wte": 4})
    ended = process(*arguments, cache=compiled)
    assert ended.returncode == 0, ended.stderr
    *jobs, tokens, made, loss, following = ended.stdout.splitlines()
    assert [line.split()[0] for line in jobs] == ["D", "pca_factorized", "A"]
    assert "holds bare token ids: to sample its models, set --config.data" in tokens
    assert made.startswith("factorizing")
    assert loss.startswith("val loss ") and "gpt_pca_k4" in loss
    assert following.startswith("sample it: ")
    for line in ended.stderr.splitlines():
        assert re.fullmatch(r"[DA] gpt_\w+  \d/2 .* left", line), ended.stderr


def test_help_and_mistakes_end_a_process_before_jax_is_imported(tmp_path):
    (tmp_path / "jax.py").write_text("raise RuntimeError('jax is imported')")
    asked = process("--help", modules=tmp_path)
    assert (asked.returncode, asked.stderr) == (0, "")
    assert f"some of {', '.join(METHODS)}" in " ".join(asked.stdout.split())
    for knob, value in (("train.steps", "abc"), ("compress.methods", "svd,nmf")):
        mistaken = process(DEMO, f"--config.{knob}={value}", modules=tmp_path)
        assert (mistaken.returncode, mistaken.stdout) == (2, "")
        assert re.fullmatch(f"pcagpt: {knob} is '{value}': .*\n", mistaken.stderr)


def test_without_its_packages_the_program_says_how_to_install_them(tmp_path):
    (tmp_path / "absl").mkdir()
    missing = "raise ModuleNotFoundError('No module', name='absl')"
    (tmp_path / "absl" / "__init__.py").write_text(missing)
    ended = process(DEMO, modules=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"pcagpt: {sys.executable} has no package 'absl': run 'bash scripts/setup.sh' "
        "once, then 'source .venv/bin/activate'\n"
    )
    # An installed package has no scripts beside it.
    shutil.copytree(ROOT / "pcagpt", tmp_path / "pcagpt")
    ended = process(DEMO, modules=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "no package 'absl': install pcagpt again with pip, which" in ended.stderr


def test_a_bug_ends_a_process_with_exit_code_1_and_a_traceback(tmp_path):
    (tmp_path / "ml_collections.py").write_text("raise RuntimeError('a bug')")
    ended = process(DEMO, modules=tmp_path)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


def test_a_current_folder_that_was_removed_is_told_before_anything_starts(
    corpus_folder, tmp_path, monkeypatch, capsys
):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    words = tiny("baseline.py", corpus_folder, workdir=tmp_path / "w")
    outcome = call(*words)
    assert outcome.code == 2
    assert outcome.err.startswith("pcagpt: the current folder: no such file or dir")
    assert not (tmp_path / "w").exists()


def test_an_interrupt_while_libraries_are_imported_is_one_line(corpus_folder, tmp_path):
    # What is imported in place of jax interrupts, and swallows exceptions.
    (tmp_path / "jax.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    pass\n"
    )
    ended = process(*tiny("baseline.py", corpus_folder), modules=tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch("pcagpt: interrupted: .*\n", ended.stderr)
    assert ended.stdout == ""
