"""The command line: help, mistakes in it, --print_config, exit codes, clean output."""

import os
import re
import subprocess
import sys

import pytest
from command_line import CONFIGS, ROOT, call, refusal, snapshot, tiny
from runs import quick_environment

from pcagpt import config as knobs
from pcagpt import errors
from pcagpt import main as main_module
from pcagpt.config import command_line
from pcagpt.pipeline import execute as experiment

DEMO = f"--config={CONFIGS / 'demo.py'}"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Called in an empty folder: configs/ and checkpoints/ are not beside it."""
    monkeypatch.chdir(tmp_path)


def process(*arguments, cache=None, **environment):
    """A true process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "pcagpt.main", *map(str, arguments)],
        env=quick_environment(cache) | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


# Help.


@pytest.mark.parametrize("flag", ["--help", "-h", "-help", "--helpfull"])
def test_help_is_shown_for_every_way_of_asking(flag):
    outcome = call(flag)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("How small can the token embedding")


def test_help_names_every_knob_with_its_default_and_meaning():
    text = call("--help").out
    flowing = " ".join(text.split())
    for path, knob in knobs.KNOBS.items():
        setting = knobs.override(path, knob.default).removeprefix("--config.")
        assert f"{setting} {knob.meaning}" in flowing
    assert max(map(len, text.splitlines())) <= 88


def test_help_names_every_config():
    text = call("--help").out
    for path in CONFIGS.glob("*.py"):
        assert f"--config=configs/{path.name}" in text


def test_mistakes_and_help_cost_no_import_of_jax():
    script = (
        "import sys; from pcagpt import main; main.main(['pcagpt', '--help']);"
        f"assert main.main(['pcagpt', '{DEMO}', '--config.train.steps=x']) == 2;"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT
    )


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no config: say --config=configs/demo.py, or --help"),
        (["--config.train.steps=3"], "no config: .*"),
        (["--config=nowhere.py"], "there is no config file 'nowhere.py': .*"),
        (["--config="], "there is no config file '': .*"),
        (["--config"], "there is no config file '': .*"),
        ([DEMO, DEMO], "--config is given twice, .*"),
        ([DEMO + ":64"], ".*demo.py takes no ':64': .*"),
        ([DEMO, "--config.train.stps=4"], "no knob 'train.stps': .* train.steps .*"),
        ([DEMO, "--config.steps=4"], "no knob 'steps': did you mean train.steps.*"),
        ([DEMO, "--noconfig.model.bais"], "no knob 'model.bais': .* model.bias.*"),
        ([DEMO, "--config.xyzzy=4"], r"no knob 'xyzzy' \(--help lists all\)"),
        ([DEMO, "--config.train=3"], "'train' is a section of 12 knobs: .*"),
        (
            [DEMO, "--config.train.steps=abc"],
            "train.steps is 'abc': it must be a whole number, as in "
            "--config.train.steps=5000",
        ),
        ([DEMO, "--config.train.steps=1.5"], "train.steps is '1.5': .* whole number.*"),
        ([DEMO, "--config.train.steps="], "train.steps is '': .* a whole number.*"),
        ([DEMO, "--config.train.steps"], "train.steps is '': .* a whole number.*"),
        ([DEMO, "--config.train.beta1=a"], "train.beta1 is 'a': .* a number, .*"),
        ([DEMO, "--config.model.bias=maybe"], ".*bias is 'maybe': .* True or False.*"),
        ([DEMO, "--config.ranks=8,x"], "ranks is '8,x': .* numbers with commas .*"),
        ([DEMO, "--config.model.n_embd_wte=x"], ".*wte is 'x': .* a whole number"),
        ([DEMO, "--steps=4"], "no flag --steps: did you mean --config.train.steps.*"),
        ([DEMO, "--print-config"], "no flag --print-config: .* --print_config, .*"),
        ([DEMO, "--print_config=maybe"], ".*print_config=maybe.*"),
        ([DEMO, "128"], "'128' is no flag: write --config.KNOB=VALUE"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained_in_one_line(
    arguments, line, tmp_path
):
    seen = refusal(*arguments, unchanged=[tmp_path])
    assert re.fullmatch(f"pcagpt: (there is )?{line}\n", seen)


def test_a_missing_config_lists_those_that_are_there(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    line = refusal("--config=configs/dmo.py", unchanged=[tmp_path])
    for path in CONFIGS.glob("*.py"):
        assert f"configs/{path.name}" in line


BASE = "from pcagpt.config import base\ndef get_config():\n    c = base()\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("x = 1\ndef get_config(:\n", "line 2: SyntaxError: invalid syntax"),
        ("import nope\n", "line 1: ModuleNotFoundError: No module named 'nope'"),
        (BASE + "    return c + d\n", "line 4: NameError: name 'd' is not defined"),
        (BASE + "    c.train.stps = 3\n", "line 4: there is no knob 'stps': did .*"),
        (BASE + "    c.train.steps = 'x'\n", "line 4: TypeError: .*'steps'.*"),
        ("get_confg = None\n", "defines no get_config()"),
        (BASE, "get_config() must return what pcagpt.config.base() gave it, .*"),
    ],
)
def test_an_error_inside_a_config_file_is_told_with_its_line(text, line, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    seen = refusal(f"--config={path}", unchanged=[tmp_path])
    line = line.replace("()", r"\(\)")
    assert re.fullmatch(f"pcagpt: {path}[,:]? {line}\n", seen)


# What is understood.


def test_later_flags_win_and_every_spelling_of_a_value_is_understood():
    words = ["--config.train.steps=3", "--config.train.steps", "4"]
    config, print_only = command_line.parse(
        ["pcagpt", *words, DEMO, "--noconfig.model.bias", "--config.overwrite"]
        + ["--config.ranks=8,16", "--config.seed", "7", "--print_config"]
    )
    assert config.train.steps == 4
    assert config.model.bias is False
    assert config.overwrite is True
    assert config.ranks == (8, 16)
    assert config.seed == 7
    assert print_only


def test_the_part_after_the_colon_goes_to_get_config():
    source = f"--config={CONFIGS / 'experiment.py'}"
    assert command_line.parse(["pcagpt", f"{source}:8,16"])[0].ranks == (8, 16)
    assert command_line.parse(["pcagpt", source])[0].ranks == (128,)


def test_one_call_leaves_nothing_behind_for_the_next():
    command_line.parse(["pcagpt", DEMO, "--config.train.steps=7", "--print_config"])
    config, print_only = command_line.parse(["pcagpt", DEMO])
    assert config.train.steps != 7
    assert not print_only


# Showing and doing.


def test_print_config_shows_knobs_and_plan_and_writes_nothing(corpus_folder, tmp_path):
    arguments = tiny("experiment.py:8,4", corpus_folder, workdir="runs")
    before = snapshot(tmp_path, corpus_folder)
    outcome = call(*arguments, "--print_config")
    assert (outcome.code, outcome.err) == (0, "")
    assert snapshot(tmp_path, corpus_folder) == before
    shown, plan = outcome.out.split("\n\n")
    for path in knobs.KNOBS:
        assert re.search(rf"^{path} ", shown, re.MULTILINE)
    assert re.search(r"^train.steps +2 +\(default 5000\)$", shown, re.MULTILINE)
    assert re.search(r"^train.beta1 +0.9$", shown, re.MULTILINE)
    assert [line.split()[:2] for line in plan.splitlines()] == [
        ["D", "gpt_baseline"],
        ["pca_factorized", "rank"],
        ["A", "gpt_pca_k8"],
        ["C", "gpt_random_lowrank_k8"],
        ["B", "gpt_pca_finetune_k8"],
        ["A", "gpt_pca_k4"],
        ["C", "gpt_random_lowrank_k4"],
        ["B", "gpt_pca_finetune_k4"],
    ]
    assert all(line.endswith("to do") for line in plan.splitlines())


@pytest.mark.usefixtures("quick")
def test_a_finished_run_is_shown_as_done_and_not_touched_again(corpus_folder, tmp_path):
    arguments = tiny("baseline.py", corpus_folder, workdir="runs")
    assert call(*arguments).code == 0
    before = snapshot(tmp_path)
    assert call(*arguments, "--print_config").out.endswith("  done\n")
    again = call(*arguments)
    assert (again.code, again.err) == (0, "")
    assert again.out.endswith("  done\n")
    assert snapshot(tmp_path) == before


def stop_with(exception, monkeypatch):
    def stop(*_):
        raise exception

    monkeypatch.setattr(experiment, "execute", stop)


@pytest.mark.parametrize(
    ("exception", "code", "line"),
    [
        (KeyboardInterrupt(), 1, "interrupted: the same command goes on .*"),
        (errors.Interrupted("stopped at step 3"), 1, "stopped at step 3"),
        (errors.UserError("two\nlines"), 2, "two lines"),
        (MemoryError(), 2, "the device's memory is exhausted: .*"),
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


# True processes.


def test_a_run_prints_its_plan_and_progress_and_no_library_s_messages(
    corpus_folder, compiled
):
    arguments = tiny("pca_k128.py", corpus_folder, model={"n_embd_wte": 4})
    ended = process(*arguments, cache=compiled)
    assert ended.returncode == 0, ended.stderr
    assert [line.split()[0] for line in ended.stdout.splitlines()] == [
        "D",
        "pca_factorized",
        "A",
        "factorizing",
    ]
    for line in ended.stderr.splitlines():
        assert re.fullmatch(r"[DA] gpt_\w+  \d/2 .* left", line), ended.stderr


def test_a_process_ends_with_exit_code_2_and_one_line_for_a_mistake():
    ended = process(DEMO, "--config.train.steps=abc")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.fullmatch("pcagpt: train.steps is 'abc': .*\n", ended.stderr)


def test_an_interrupt_while_libraries_are_imported_is_one_line(corpus_folder, tmp_path):
    # What is imported in place of jax interrupts, and swallows exceptions.
    (tmp_path / "jax.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    pass\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ended = process(*tiny("baseline.py", corpus_folder), PYTHONPATH=path)
    assert ended.returncode == 1
    assert re.fullmatch("pcagpt: interrupted: .*\n", ended.stderr)


def test_a_process_ends_with_exit_code_1_and_a_traceback_for_a_bug(tmp_path):
    (tmp_path / "ml_collections.py").write_text("raise RuntimeError('a bug')")
    ended = process(DEMO, PYTHONPATH=str(tmp_path))
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr


@pytest.mark.parametrize(
    ("set_by_person", "expected"),
    [({}, "cache/pcagpt/compilation"), ({"JAX_COMPILATION_CACHE_DIR": "/x"}, "/x")],
)
def test_compiled_programs_are_kept_unless_the_person_says_where(
    set_by_person, expected
):
    script = (
        "import os; from pcagpt import main; main.prepare_process();"
        "print(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    )
    env = {**os.environ, "XDG_CACHE_HOME": "cache"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    ended = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env=env | set_by_person,
    )
    assert ended.stdout == expected + "\n"


def test_memory_is_left_alone_where_glibc_refuses_a_high_threshold(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    calls = []

    class Library:
        def mallopt(self, parameter, value):
            calls.append((parameter, value))
            return 0

    monkeypatch.setattr(main_module.ctypes, "CDLL", lambda _: Library())
    main_module._keep_freed_memory()
    assert calls == [(-3, 2**30)]


def test_what_a_person_tells_glibc_is_left_alone(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setattr(main_module.ctypes, "CDLL", lambda name: pytest.fail(name))
    main_module._keep_freed_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_memory_of_one_step_serves_the_next():
    script = """
import ctypes, resource
from pcagpt import main
main.prepare_process()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
size = 256 << 20
def use():
    place = ctypes.c_void_p(libc.malloc(size))
    libc.memset(place, 1, ctypes.c_size_t(size))
    libc.free(place)
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    told = ("MALLOC_", "GLIBC_TUNABLES")
    ended = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if not k.startswith(told)},
    )
    assert int(ended.stdout) < 100  # 65,536 where the memory is given back.
