"""The process: errors of the system, the environment, signals and the end."""

import ast
import contextlib
import contextvars
import ctypes
import errno
import os
import re
import signal
import subprocess
import sys

import jax
import pytest
from command_line import CONFIGS, ROOT, call, refusal, tiny
from runs import assert_equal, quick_environment, saved_state

from pcagpt import process
from pcagpt.errors import Interrupted, explain, unreadable
from pcagpt.pipeline import execute, tasks
from pcagpt.run import checkpoint
from pcagpt.run.checkpoint import Checkpoints
from pcagpt.sharding import processes
from pcagpt.telemetry import progress
from pcagpt.telemetry.progress import Progress


def python(*words, **options):
    """Runs Python in a process of its own."""
    environment = quick_environment() | {"PYTHONPATH": str(ROOT)}
    environment |= options.pop("environment", {})
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env={name: value for name, value in environment.items() if value is not None},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120}
        | options,
    )


# Errors of the system.


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on device: free some space, .*"),
        (OSError(errno.EROFS, "x", "a/b"), "a/b: read-only file system: .*"),
        (PermissionError(errno.EACCES, "x", b"a"), "a: permission denied: change .*"),
        (OSError(errno.EMFILE, "x", "a"), "a: too many open files: .*ulimit -n .*"),
        (FileNotFoundError(errno.ENOENT, "x"), "the current folder: no such file .*"),
        (OSError(errno.EIO, "x", "a"), "a: input/output error"),
        (
            ValueError(
                'RESOURCE_EXHAUSTED: Error writing "p" in OCDBT database at local file '
                '"/r/": Error writing local file "/r/m": No space left on device '
                "[os_error_code='28'] [source locations='x.cc:1']"
            ),
            "/r/m: no space left on device: .*",
        ),
        (
            ValueError(
                'NOT_FOUND: Error opening "zarr" driver: Error reading Byte range [0, '
                "195) of local file \"/r/d/78\" [tensorstore_spec='{}']"
            ),
            "/r/d/78: no such file .*: it was removed, .*",
        ),
        (
            ValueError(
                "No ArrayMetadata found for process_index=0 in the checkpoint "
                "directory: /r/20.tmp/optimizer.tmp. But input PyTree contains"
            ),
            "/r/20.tmp/optimizer.tmp: no such file .*: it was removed, .*",
        ),
    ],
)
def test_an_error_of_the_system_is_told_with_path_and_remedy(error, line):
    assert re.fullmatch(line, explain(error))


def test_a_file_that_is_missing_is_not_unreadable():
    words = "Error reading local file \"/r/m\": Denied [os_error_code='{}']"
    for number in (errno.EACCES, errno.EIO, errno.EMFILE):
        for error in (OSError(number, "x", "/r/m"), ValueError(words.format(number))):
            assert str(unreadable(error)).startswith("/r/m: ")
    for number in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
        for error in (OSError(number, "x", "/r/m"), ValueError(words.format(number))):
            assert unreadable(error) is None
    assert unreadable(ValueError("damaged")) is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError("28"),
        RuntimeError("RESOURCE_EXHAUSTED"),
        RuntimeError("NOT_FOUND: no registered platform"),
        OSError("a bug"),
        KeyError(),
    ],
)
def test_a_bug_is_not_explained(error):
    assert explain(error) is None


def stop_with(error, monkeypatch):
    def stop(*_):
        raise error

    monkeypatch.setattr(execute, "execute", stop)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory", "raise train.loss_chunks"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA_VISIBLE_DEVICES= "),
        ("CUDA error: out of memory", "CUDA_VISIBLE_DEVICES= "),
        ("[enforce fail] . DefaultCPUAllocator: can't allocate", "main memory is"),
    ],
)
def test_exhausted_memory_is_no_bug(text, words, corpus_folder, monkeypatch, tmp_path):
    stop_with(RuntimeError(text), monkeypatch)
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path)
    assert words in refusal(*arguments, unchanged=[tmp_path])


def test_a_full_disk_ends_a_command_in_one_line(corpus_folder, monkeypatch, tmp_path):
    stop_with(OSError(errno.ENOSPC, "x", "runs/a"), monkeypatch)
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path)
    told = refusal(*arguments, unchanged=[tmp_path])
    assert "runs/a: no space left" in told
    assert told.endswith("saved is kept, and the same command goes on from it\n")


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_before_the_first_save_says_that_nothing_is_saved(
    corpus_folder, monkeypatch, tmp_path, failing
):
    saves, save = [], Checkpoints.save

    def full(self, *args):
        saves.append(args)
        if len(saves) == failing:
            self._manager.wait_until_finished()
            raise OSError(errno.EDQUOT, "x", "runs/a")
        save(self, *args)

    monkeypatch.setattr(Checkpoints, "save", full)
    saving = {"every": 1}
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path, checkpoint=saving)
    told = call(*arguments).err
    nothing = "nothing of gpt_baseline is saved yet, and the same command starts it"
    assert (nothing in told, "whatever is saved" in told) == (
        failing == 1,
        failing == 2,
    )


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "x", "runs/a"), "runs/a: no space left"),
        (MemoryError(), "main memory is exhausted"),
    ],
)
@pytest.mark.parametrize(
    "words", [["export.py"], ["compress.py", "--config.compress.max_bytes=9"]]
)
def test_only_a_command_that_goes_on_says_so(words, error, line, monkeypatch):
    def stop(*_):
        raise error

    monkeypatch.setattr(tasks, "do", stop)
    given = f"--config=configs/{words[0]}", "--config.model_path=a", *words[1:]
    told = refusal(*given, unchanged=[])
    assert line in told and "saved" not in told


def test_files_and_folders_in_each_other_s_place_are_one_line(corpus_folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "file/runs", "link", "x" * 300, "exp[lr=3e-4]/runs"):
        arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path / name)
        refusal(*arguments, unchanged=[corpus_folder])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="about Linux")
def test_output_that_cannot_be_written_is_one_line_and_an_exit_code(
    corpus_folder, tmp_path
):
    train = tiny("baseline.py", corpus_folder, workdir=tmp_path)
    for arguments in (["--help"], train):  # The last text, and one before the work.
        with open("/dev/full", "w") as full:
            ended = python("-m", "pcagpt.main", *arguments, stdout=full)
        assert ended.returncode == 2
        said = "pcagpt: stdout cannot be .*No space left.*\n"
        assert re.fullmatch(said, ended.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="about Linux")
def test_a_full_log_does_not_end_the_work(corpus_folder, tmp_path):
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path / "runs")
    with open("/dev/full", "w") as full:
        ended = python("-m", "pcagpt.main", *arguments, stderr=full)
    *_, found, following = ended.stdout.splitlines()
    assert (ended.returncode, found[:9]) == (0, "val loss ")
    assert "configs/compress.py" in following
    assert (tmp_path / "runs" / "gpt_baseline" / "result.json").exists()


def without_reader(*arguments):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return python("-m", "pcagpt.main", *arguments, stdout=writing)
    finally:
        os.close(writing)


def test_a_reader_that_ends_before_the_work_is_one_line_and_an_exit_code(
    corpus_folder, tmp_path
):
    ended = without_reader(*tiny("baseline.py", corpus_folder, workdir=tmp_path))
    assert ended.returncode == 2
    assert re.fullmatch("pcagpt: broken pipe: .*\n", ended.stderr)


def test_a_reader_may_end_before_the_last_text_does(corpus_folder, tmp_path):
    plan = *tiny("baseline.py", corpus_folder, workdir=tmp_path), "--print_config"
    for arguments in (["--help"], plan):
        ended = without_reader(*arguments)
        assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="about Linux's limits")
def test_a_limit_that_stops_a_checkpoint_is_one_line_and_no_process_stays(
    corpus_folder, tmp_path
):
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path / "runs")
    limited = "import resource, runpy, sys; sys.argv.pop(0)\n"
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
    limited += "runpy.run_module('pcagpt.main', run_name='__main__')"
    ended = python("-c", limited, "pcagpt", *arguments)
    assert ended.returncode == 2, ended.stderr
    told = [line for line in ended.stderr.splitlines() if not line.endswith(" left")]
    assert len(told) == 1, ended.stderr
    assert re.fullmatch("pcagpt: .*file too large: .*", told[0])


def test_the_process_ends_although_a_thread_waits_for_ever():
    script = """
import threading
from pcagpt import process
threading.Thread(target=threading.Event().wait).start()
process.end(2)
"""
    assert python("-c", script, timeout=30).returncode == 2


WRITER = """
import errno, threading, time
from pcagpt import process
process.prepare()
def write():
    raise OSError(errno.ENOSPC, "x", "events")
threading.Thread(target=write).start()
time.sleep(60)
"""
ABORTS = """
import os, threading, time
from pcagpt import process
process.end_with_others()
for _ in range(2):
    threading.Thread(target=os.abort).start()
time.sleep(60)
"""


def test_a_thread_that_the_system_stops_ends_the_process():
    ended = python("-c", WRITER, timeout=30)
    assert ended.returncode == 2
    assert re.fullmatch("pcagpt: events: no space left on device: .*\n", ended.stderr)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="about Linux")
@pytest.mark.parametrize(("script", "code"), [(WRITER, 2), (ABORTS, 1)])
def test_a_process_that_cannot_say_why_still_ends(script, code):
    with open("/dev/full", "w") as full:
        assert python("-c", script, stderr=full, timeout=30).returncode == code


# Other processes.


def test_an_abort_of_jax_is_one_line_although_the_main_thread_waits():
    ended = python("-c", ABORTS, timeout=30)
    assert ended.returncode == 1
    assert re.fullmatch(
        "pcagpt: another process of this run .* what is saved\n", ended.stderr
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "UNKNOWN: Gloo all-reduce failed: [external/gloo/tcp/pair.cc:538] Read "
            "error [127.0.0.1]:306: Connection reset by peer",
            "Gloo all-reduce failed: Read error [127.0.0.1]:306: Connection reset by "
            "peer",
        ),
        ("INTERNAL: a bug", None),
    ],
)
def test_an_error_of_communication_counts_as_the_end_of_another_process(
    text, reason, corpus_folder, monkeypatch
):
    told = []
    error = RuntimeError(text)
    stop_with(error, monkeypatch)
    monkeypatch.setattr(process, "say_others_ended", told.append)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match=re.escape(text)):
        call(*tiny("baseline.py", corpus_folder))
    assert told == ([reason] if reason else [])


# The environment.


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("XLA_FLAGS", "--xla_foo=1", "XLA_FLAGS is '--xla_foo=1': Unknown flag .*"),
        ("XLA_FLAGS", "foo", "XLA_FLAGS is 'foo': Could not open file .*"),
        ("JAX_PLATFORMS", "cuda", "JAX finds no device with JAX_PLATFORMS='cuda'.*"),
        ("JAX_PLATFORMS", "nonsense", "JAX finds no device .*'nonsense'.*"),
        ("JAX_LEGACY_PRNG_KEY", "foo", "JAX refuses its environment .*"),
    ],
)
def test_an_environment_that_jax_lacks_is_one_line(
    variable, value, line, corpus_folder, tmp_path
):
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path / "runs")
    ended = python("-m", "pcagpt.main", *arguments, environment={variable: value})
    if value == "cuda" and ended.returncode == 0:
        pytest.skip("this machine has one")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(f"pcagpt: {line}\n", ended.stderr)
    assert not (tmp_path / "runs").exists()


def test_flags_are_tried_once_and_good_ones_accepted(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    tried, run = [], subprocess.run

    def counted(command, **options):
        tried.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    for function in (processes.open_devices, processes._check_flags):
        function.cache_clear()
    for _ in range(2):
        processes.open_devices()
    assert len(tried) == 1


UNFIT = {
    "JAX_ENABLE_X64": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_DISABLE_JIT": "1",
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_TRANSFER_GUARD": "disallow",
}


def test_variables_that_change_numbers_or_stop_commands_are_not_heeded(
    corpus_folder, tmp_path
):
    wanted, found = (
        python(
            *("-m", "pcagpt.main"),
            *tiny("baseline.py", corpus_folder, workdir=tmp_path / name),
            environment=environment,
        )
        for name, environment in (("plain", {}), ("unfit", UNFIT))
    )
    assert (wanted.returncode, found.returncode) == (0, 0), found.stderr
    says = "is ignored: it would change the numbers or stop the command"
    told = [line for line in found.stderr.splitlines() if "JAX_" in line]
    assert sorted(told) == sorted(f"pcagpt: {k}={v} {says}" for k, v in UNFIT.items())
    assert_equal(
        *(saved_state(tmp_path / one / "gpt_baseline") for one in ("plain", "unfit"))
    )


def test_a_flipped_bit_in_a_compiled_program_is_seen(tmp_path):
    # With this package, JAX would write programs without a checksum.
    (tmp_path / "zstandard.py").write_text("raise SystemExit('it was imported')")
    script = """
import sys, zlib
sys.path.insert(0, sys.argv[1])
from pcagpt import process
process.prepare()
from jax._src import compilation_cache
whole = compilation_cache.compress_executable(bytes(999))
assert compilation_cache.decompress_executable(whole) == bytes(999)
for bit in range(8 * len(whole)):
    flipped = bytearray(whole)
    flipped[bit // 8] ^= 1 << bit % 8
    try:
        assert compilation_cache.decompress_executable(bytes(flipped)) == bytes(999)
    except zlib.error:
        pass
"""
    ended = python("-c", script, tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_values_of_such_variables_that_do_no_harm_are_heeded_without_a_word():
    script = """
import os
from pcagpt import process
process.prepare()
print({k: v for k, v in os.environ.items() if k in process._NOT_HEEDED})
"""
    harmless = {"JAX_ENABLE_X64": "0", "JAX_NUMPY_RANK_PROMOTION": "warn"}
    harmless["JAX_TRANSFER_GUARD"] = "log"
    ended = python("-c", script, environment=harmless)
    assert ast.literal_eval(ended.stdout) == harmless
    assert ended.stderr == ""


def test_any_text_can_be_shown_on_an_ascii_terminal():
    script = "from pcagpt import process; process.prepare(); print('caf\u00e9')"
    ended = python("-c", script, environment={"PYTHONIOENCODING": "ascii"})
    assert ended.stdout == "caf\\xe9\n"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_signs_of_numbers_are_readable_on_every_terminal(stream, encoding):
    signs = "\u22120.0152 \u00b1 0.0010, \u2013, 5.91\u00d7, 5c98\u2026"
    script = (
        "import sys; from pcagpt import process; process.prepare(); "
        f"print({signs!a}, file=sys.{stream})"
    )
    settings = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    ended = python("-c", script, environment=settings)
    plain = "-0.0152 +/- 0.0010, -, 5.91x, 5c98..."
    shown = plain if encoding == "ascii" else signs
    assert getattr(ended, stream) == f"{shown}\n"


def test_a_closed_stream_s_number_is_not_given_to_a_file(tmp_path):
    script = """
import os, sys
from pcagpt import process
process.prepare()
print(open(sys.argv[1], "w").fileno(), sys.stderr is None)
"""
    close = "import os, sys; os.close(2); os.execv(sys.executable, sys.argv[1:])"
    words = [sys.executable, "-c", script, tmp_path / "file"]
    ended = python("-c", close, *words)
    number, is_none = ended.stdout.split()
    assert int(number) > 2
    assert is_none == "False"


@pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="needs root")
def test_a_user_without_home_and_name_gets_help():
    script = """
import os, runpy, sys
sys.argv = ["pcagpt", "--help"]
from pcagpt import process
os.setuid(12345)
process.prepare()
print(os.environ.get("JAX_COMPILATION_CACHE_DIR"))
"""
    nothing = {"HOME": None, "XDG_CACHE_HOME": None, "JAX_COMPILATION_CACHE_DIR": None}
    ended = python("-c", script, environment=nothing)
    assert (ended.stdout, ended.stderr) == ("None\n", "")


# Signals.


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 1), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75)],
)
def test_a_signal_outside_training_is_one_line_and_its_code(
    number, code, corpus_folder, monkeypatch
):
    monkeypatch.setattr(execute, "execute", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    outcome = call(*tiny("baseline.py", corpus_folder))
    assert outcome.code == code
    assert re.fullmatch("pcagpt: interrupted: run the same command .*\n", outcome.err)
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGUSR1, 75)],
)
def test_a_signal_that_a_library_turns_into_an_error_is_one_line_and_its_code(
    number, code, corpus_folder, monkeypatch
):
    def compile_or_fail(*_):
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            raise RuntimeError("INTERNAL: a callback failed") from None

    monkeypatch.setattr(execute, "execute", compile_or_fail)
    outcome = call(*tiny("baseline.py", corpus_folder))
    assert outcome.code == code
    assert re.fullmatch("pcagpt: interrupted: run the same command .*\n", outcome.err)


def test_libraries_do_not_swallow_a_signal(corpus_folder, monkeypatch):
    def swallow(*_):
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(execute, "execute", swallow)
    assert call(*tiny("baseline.py", corpus_folder)).code == 1


def test_a_signal_while_progress_closes_is_one_line(corpus_folder, monkeypatch):
    close = Progress.__exit__

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        close(*arguments)

    def work(*_):
        with Progress("work", 1):
            pass

    monkeypatch.setattr(Progress, "__exit__", interrupted)
    monkeypatch.setattr(execute, "execute", work)
    outcome = call(*tiny("baseline.py", corpus_folder))
    progress._open_bars.clear()
    assert outcome.code == 1
    *_, last = outcome.err.splitlines()
    assert last.startswith("pcagpt: interrupted: run the same command")


# A moment in the life of a command: what is replaced by a signal before it.
MOMENTS = {
    "while it imports": "sys.addaudithook("
    "lambda event, a: event == 'import' and a[0] == 'pcagpt.config' and send())",
    "before main": "at(process, 'prepare')",
    "before its end": "at(process, 'end')",
    "while threads end": "threading._register_atexit(send)",
    "at exit": "prepare = process.prepare\n"
    "process.prepare = lambda: (prepare(), atexit.register(send))",
}
COMMAND = """
import atexit, os, runpy, signal, sys, threading
from pcagpt import process
number = signal.Signals(int(sys.argv[1]))
def send():
    os.kill(os.getpid(), number)
def at(module, name):
    was = getattr(module, name)
    setattr(module, name, lambda *arguments: (send(), was(*arguments)))
exec(sys.argv[2])
sys.argv = ["pcagpt", "--help"]
runpy.run_module("pcagpt.main", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGUSR1, 75)],
)
def test_a_signal_at_any_moment_is_one_line_and_its_code(number, code, moment):
    ended = python("-c", COMMAND, str(int(number)), MOMENTS[moment])
    assert (ended.returncode, ended.stderr) == (code, "pcagpt: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_when_all_is_done_changes_nothing(number):
    """Registered before pcagpt's own function: Python calls it later."""
    ended = python("-c", COMMAND, str(int(number)), "atexit.register(send)")
    assert (ended.returncode, ended.stderr) == (0, "")


# Starts a command as a shell on a terminal does: SIGHUP has a given handler.
ON_TERMINAL = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.mark.parametrize(
    ("handler", "steps", "code"), [("SIG_DFL", 100_000, 1), ("SIG_IGN", 400, 0)]
)
def test_a_closed_terminal_saves_and_ends_training_unless_nohup_ignores_it(
    handler, steps, code, corpus_folder, tmp_path
):
    terminal, end = os.openpty()
    train = tiny("baseline.py", corpus_folder, workdir=tmp_path, train={"steps": steps})
    started = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL, handler, "-m", "pcagpt.main", *train],
        env=quick_environment() | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
        **dict.fromkeys(("stdin", "stdout", "stderr"), end),
    )
    os.close(end)
    said = b""
    while b"loss" not in said:  # A bar shows it during training.
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert started.wait(120) == code
    run_dir = tmp_path / "gpt_baseline"
    assert checkpoint.exists(run_dir)
    assert (run_dir / "result.json").exists() == (code == 0)


def test_a_signal_while_an_object_is_freed_ends_the_process():
    script = """
import os, signal
from pcagpt import process
process.prepare()
class Freed:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGUSR1)
with process.interrupted_by_signals("stopped"):
    Freed()
"""
    ended = python("-c", script)
    assert (ended.returncode, ended.stderr) == (75, "pcagpt: stopped\n")


def test_a_second_signal_ends_the_process_at_once():
    script = """
import os, signal
from pcagpt import process
with process.interrupted_by_signals("stopped"):
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
"""
    ended = python("-c", script)
    assert (ended.returncode, ended.stderr) == (75, "pcagpt: stopped\n")


@pytest.mark.parametrize("name", ["sample.py", "evaluate.py"])
def test_a_task_that_saves_nothing_does_not_promise_to_continue(name, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "do", stop)
    outcome = call(f"--config={CONFIGS / name}", "--config.model_path=run")
    assert (outcome.code, "nothing was saved" in outcome.err) == (1, True)


def test_a_search_for_a_bound_does_not_promise_to_continue(monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "do", stop)
    compress = f"--config={CONFIGS / 'compress.py'}", "--config.model_path=run"
    assert "again to continue" in call(*compress).err
    outcome = call(*compress, "--config.compress.max_bytes=2600")
    assert (outcome.code, "only the model's statistics" in outcome.err) == (1, True)


def test_what_training_raises_has_the_code_of_its_signal(corpus_folder, monkeypatch):
    stop_with(Interrupted("saved", signal.SIGUSR1), monkeypatch)
    assert call(*tiny("baseline.py", corpus_folder)).code == 75


def test_a_signal_while_libraries_are_imported_ends_at_once(corpus_folder, tmp_path):
    (tmp_path / "jax.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "except BaseException:\n    pass\n"
    )
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path / "runs")
    ended = python("-m", "pcagpt.main", *arguments, environment=paths)
    assert ended.returncode == 75
    assert re.fullmatch("pcagpt: interrupted: .*\n", ended.stderr)


def test_a_signal_while_jax_opens_devices_ends_at_once(corpus_folder, tmp_path):
    """JAX logs what a plugin of a device raises, and goes on without this device."""
    (plugins := tmp_path / "jax_plugins" / "slow").mkdir(parents=True)
    (plugins / "__init__.py").write_text(
        "import os, signal\ndef initialize(): os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    arguments = tiny("baseline.py", corpus_folder, workdir=tmp_path / "runs")
    ended = python("-m", "pcagpt.main", *arguments, environment=paths)
    assert ended.returncode == 75
    assert re.fullmatch("pcagpt: interrupted: .*\n", ended.stderr)


# The rest.


def test_the_handler_of_interrupts_is_given_back_after_the_imports():
    before = signal.getsignal(signal.SIGINT)
    with process.ended_by_signals("ended"):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_process_keeps_compiled_programs_and_shows_warnings_as_its_own():
    script = """
import logging, os
from pcagpt import process
for given in ({}, {"JAX_COMPILATION_CACHE_DIR": "/x"}):
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    os.environ.update(given, XDG_CACHE_HOME="cache")
    process.prepare()
    print(os.environ["JAX_COMPILATION_CACHE_DIR"])
    logging.getLogger("pcagpt").handlers[1:] = []
logging.getLogger("pcagpt.run").warning("a file is damaged")
"""
    ended = python("-c", script)
    assert ended.stdout.split() == ["cache/pcagpt/compilation", "/x"]
    assert ended.stderr == "pcagpt: a file is damaged\n"


@pytest.mark.parametrize(
    ("variable", "accepted", "expected"),
    [
        ("OTHER", 1, [(-3, 2**30), (-1, 2**31 - 1), (-8, 1)]),
        ("OTHER", 0, [(-3, 2**30)]),  # An older glibc refuses this threshold.
        ("MALLOC_ARENA_MAX", 1, []),
    ],
)
def test_memory_is_kept_unless_glibc_or_the_person_objects(
    variable, accepted, expected, monkeypatch
):
    calls = []

    class Library:
        def mallopt(self, *arguments):
            calls.append(arguments)
            return accepted

    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, "4")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library())
    process._keep_freed_memory()
    assert calls == expected


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_memory_of_one_step_serves_the_next():
    script = """
import ctypes, os, resource
from pcagpt import process
os.environ.clear()
process._keep_freed_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
faults = []
for _ in range(2):
    place = ctypes.c_void_p(libc.malloc(256 << 20))
    libc.memset(place, 1, 256 << 20)
    libc.free(place)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[1] - faults[0])
"""
    assert int(python("-c", script).stdout) < 100  # 65,536 if not kept


def test_the_last_of_several_threads_gives_the_programs_hook_back(monkeypatch):
    own = sys.__unraisablehook__
    monkeypatch.setattr(sys, "unraisablehook", own)
    # Each context is that of a thread.
    contexts = [contextvars.copy_context() for _ in range(2)]
    stacks = [contextlib.ExitStack() for _ in contexts]
    for context, stack in zip(contexts, stacks, strict=True):
        context.run(stack.enter_context, process.as_guest(False))
    contexts[0].run(stacks[0].close)
    assert sys.unraisablehook is not own
    contexts[1].run(stacks[1].close)
    assert sys.unraisablehook is own
