"""A lock on a folder: who holds it, who waits, and whose lock is stale."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from pcagpt.errors import UserError
from pcagpt.run import lock
from pcagpt.run.lock import BEAT, STALE, Lock, held

HOLD = """
import sys, time
from pathlib import Path
from pcagpt.run import lock
lock.SHORTEST = lock.LONGEST = 600  # A second look would come too late for any test.
with lock.held(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path):
    """A run's folder that does not exist yet."""
    return tmp_path / "runs" / "gpt_baseline"


@pytest.fixture
def pauses(monkeypatch):
    """Pauses between two looks, which take no time."""
    found = []
    monkeypatch.setattr(lock.time, "sleep", found.append)
    return found


def lock_files(folder):
    return sorted(folder.parent.glob(".gpt_baseline.lock.*"))


def elsewhere(folder, age=0.0, **changes):
    """A lock file as a command on another machine writes it, renewed `age` s ago."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.parent / ".gpt_baseline.lock.0"
    owner = {
        "host": "other",
        "process": os.getpid(),
        "process_start": "1",
        "kernel": "another boot pid:[1]",
        "began": "2026-01-02 03:04:05",
        **changes,
    }
    path.write_text(json.dumps(owner))
    renewed = time.time() - age
    os.utime(path, (renewed, renewed))
    return path


@pytest.fixture
def want(folder):
    """A function: starts a process that holds the lock, or waits; gives its line."""
    processes = []

    def start():
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process, process.stdout.readline()

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# One holder


def test_a_lock_is_one_file_beside_the_folder_and_gone_afterwards(folder):
    with held(folder, pytest.fail) as check:
        (path,) = lock_files(folder)
        assert not folder.exists()
        check()
        owner = json.loads(path.read_text())
        assert owner["process"] == os.getpid()
        assert owner["host"]
    assert list(folder.parent.iterdir()) == []
    with pytest.raises(ZeroDivisionError), held(folder, pytest.fail):
        _ = 1 / 0
    assert list(folder.parent.iterdir()) == []


def test_locks_of_folders_whose_names_begin_alike_are_different(folder):
    with held(folder, pytest.fail):
        with held(folder.with_name("gpt_baseline.lock"), pytest.fail):
            pass
        with held(folder.with_name("gpt"), pytest.fail):
            pass


def test_of_many_threads_that_want_a_folder_one_at_a_time_holds_it(folder, monkeypatch):
    monkeypatch.setattr(lock, "LONGEST", 0.02)
    inside, most = [], []

    def work():
        with held(folder, lambda: None):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert most == [1] * 8
    assert lock_files(folder) == []


def test_two_that_come_at_the_same_moment_both_step_back(folder, monkeypatch):
    first, second = Lock(folder), Lock(folder)
    holders = Lock._holders

    def holders_and_come(self):
        found = holders(self)
        if self is first and not found:
            monkeypatch.setattr(Lock, "_holders", holders)
            lock.write_json(second._own, lock._this_process())
        return found

    monkeypatch.setattr(Lock, "_holders", holders_and_come)
    assert first.attempt() == ""
    assert lock_files(folder) == [second._own]
    second.release()
    assert first.attempt() is None
    first.release()


def test_a_folder_with_two_names_has_one_lock(folder):
    folder.mkdir(parents=True)
    link = folder.parent / "link"
    link.symlink_to(folder)
    with held(link, busy), pytest.raises(UserError, match="busy"), held(folder, busy):
        pass


# Waiting


def test_who_waits_says_once_for_whom_and_goes_on_after_it(folder, pauses, capsys):
    holder = Lock(folder)
    assert holder.attempt() is None
    looks = []

    def meanwhile():
        looks.append(1)
        if len(looks) == 3:
            holder.release()

    with held(folder, meanwhile) as check:
        check()
    assert len(looks) == len(pauses) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"waiting for {folder}: process {os.getpid()} on ")
    assert "holds it since 20" in line
    assert "takes over" not in line  # It is known to live.


@pytest.mark.parametrize("content", ["{}", "[]", '{"host": "a"}', "torn"])
def test_a_lock_that_does_not_say_who_holds_it_is_named(content, folder):
    path = elsewhere(folder)
    path.write_text(content)
    told = Lock(folder).attempt()
    assert told.startswith(f"a command that {path} does not name holds it, silent")


def test_who_waits_for_another_machine_learns_until_when(folder, pauses, capsys):
    path = elsewhere(folder, age=50)
    last = path.stat().st_mtime

    def at(seconds):
        return time.strftime("%H:%M:%S", time.localtime(seconds))

    with held(folder, path.unlink):
        (line,) = capsys.readouterr().out.splitlines()
    # The clocks may tick between two looks.
    since = line.partition(", silent since ")[2][:8]
    assert since in (at(last - 1), at(last), at(last + 1))
    assert f"this command takes over at {at(last + STALE)[:4]}" in line
    assert line.endswith("; Ctrl-C ends the wait")


def test_pauses_between_two_looks_grow_to_a_few_seconds(folder, pauses):
    path = elsewhere(folder)

    def meanwhile():
        if len(pauses) == 20:
            path.unlink()

    with held(folder, meanwhile):
        assert max(pauses) <= lock.LONGEST
        assert min(pauses[-5:]) >= lock.LONGEST / 2
        assert pauses[0] <= lock.SHORTEST


def test_what_is_found_while_waiting_can_end_the_wait(folder, pauses):
    path = elsewhere(folder)

    def refuse():
        raise UserError("another config")

    with pytest.raises(UserError, match="another config"), held(folder, refuse):
        pytest.fail("it was held")
    assert lock_files(folder) == [path]


def test_files_that_the_holder_removes_do_not_end_the_wait(folder, pauses):
    path = elsewhere(folder)

    def meanwhile():
        path.unlink()
        raise FileNotFoundError("config.json")

    with held(folder, meanwhile):
        pass


def test_an_interrupt_ends_the_wait_at_once(folder, want):
    _, said = want()
    assert said == "held\n"
    waiting, said = want()
    assert "waiting for" in said
    time.sleep(0.5)  # Python sees a signal just before a sleep only after it.
    waiting.send_signal(signal.SIGINT)
    _, errors = waiting.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert len(lock_files(folder)) == 1  # only the holder's


# Stale locks


def test_a_killed_holder_on_this_machine_blocks_nobody(folder, want):
    holder, _ = want()
    with pytest.raises(UserError, match="busy"), held(folder, busy):
        pass
    holder.kill()
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    # Its parent has not asked for it yet: there still is a process of that number.
    with held(folder, busy):
        assert len(lock_files(folder)) == 1


def busy():
    raise UserError("busy")


def test_a_stopped_holder_on_this_machine_keeps_its_lock(folder, want):
    holder, _ = want()
    holder.send_signal(signal.SIGSTOP)
    (path,) = lock_files(folder)
    os.utime(path, (0, 0))
    with pytest.raises(UserError, match="busy"), held(folder, busy):
        pass


def test_a_lock_that_was_copied_with_its_folder_counts_by_its_time(folder, want):
    want()
    (path,) = lock_files(folder)
    os.utime(path, (0, 0))
    moved = folder.parent.rename(folder.parent.with_name("moved")) / folder.name
    with pytest.raises(UserError, match="busy"), held(moved, busy):
        pass
    copy = folder.parent.with_name("copy") / folder.name
    shutil.copytree(moved.parent, copy.parent)
    (path,) = lock_files(copy)
    with held(copy, busy):
        assert not path.exists()
    path.write_bytes(lock_files(moved)[0].read_bytes())
    with pytest.raises(UserError, match="busy"), held(copy, busy):
        pass


def test_a_lock_of_the_release_before_names_no_place_and_holds(folder, want):
    want()
    (path,) = lock_files(folder)
    owner = json.loads(path.read_text())
    del owner["place"]
    lock.write_json(path, owner)
    os.utime(path, (0, 0))
    with pytest.raises(UserError, match="busy"), held(folder, busy):
        pass


def test_another_process_with_the_holders_number_does_not_hold_the_lock(folder):
    kernel = lock._kernel()
    path = elsewhere(folder, kernel=kernel, process_start=lock._start_of(os.getpid()))
    with pytest.raises(UserError, match="busy"), held(folder, busy):
        pass
    elsewhere(folder, kernel=kernel, process_start="1")
    with held(folder, busy):
        assert not path.exists()


@pytest.mark.parametrize(
    "changes",
    [{}, {"host": lock.socket.gethostname()}, {"kernel": None}, {"kernel": "x"}],
)
def test_a_lock_of_another_machine_lives_while_it_is_renewed(folder, changes):
    """Two machines can have one name, and may be unable to tell their kernels apart."""
    elsewhere(folder, STALE - 10, **changes)
    with pytest.raises(UserError, match="busy"), held(folder, busy):
        pass
    path = elsewhere(folder, STALE + 1, **changes)
    with held(folder, busy):
        assert not path.exists()


def test_the_servers_clock_decides_and_not_this_machines(folder, monkeypatch):
    elsewhere(folder, STALE + 1)
    own = lock._server_time(folder.parent)
    monkeypatch.setattr(lock, "_server_time", lambda _: own - 2)
    with pytest.raises(UserError, match="busy"), held(folder, busy):
        pass
    monkeypatch.setattr(lock.time, "time", lambda: own + 10 * STALE)
    with pytest.raises(UserError, match="busy"), held(folder, busy):
        pass


def test_a_lock_with_a_time_to_come_lives_while_it_is_renewed(
    folder, pauses, monkeypatch, capsys
):
    """The server's clock was put back after the command was killed."""
    path, begun, clock = elsewhere(folder, -3 * 24 * 3600), time.time(), [0.0]
    monkeypatch.setattr(lock.time, "monotonic", lambda: clock[0])

    def meanwhile():
        clock[0] += STALE - 1
        if len(pauses) < 2:
            os.utime(path, (begun, begun + 1000 + len(pauses)))
        assert len(pauses) < 5

    with held(folder, meanwhile):
        assert not path.exists()
    assert clock[0] == 4 * (STALE - 1)
    end = begun + STALE
    told = [time.strftime("%H:%M:%S", time.localtime(end + n)) for n in (0, 1, 2)]
    (line,) = capsys.readouterr().out.splitlines()
    assert line.partition("takes over at ")[2][:8] in told


def test_a_damaged_lock_file_counts_by_its_time_alone(folder):
    path = elsewhere(folder)
    odd = {**lock._this_process(), "process": "12"}
    beyond, less = odd | {"process": 10**20}, {"kernel": odd["kernel"]}
    for text in ("{", "[]", "", *map(json.dumps, (odd, beyond, less))):
        path.write_text(text)
        with pytest.raises(UserError, match="busy"), held(folder, busy):
            pass
    os.utime(path, (0, 0))
    with held(folder, busy):
        assert not path.exists()


def test_a_holder_renews_its_lock_until_it_gives_it_back(folder, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with held(folder, busy):
        (path,) = lock_files(folder)
        os.utime(path, (0, 0))
        give_up = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < give_up
            time.sleep(0.01)
    time.sleep(0.1)
    assert lock_files(folder) == []
    assert 5 * BEAT < STALE


def test_on_a_file_system_that_became_read_only_the_run_is_named(folder, monkeypatch):
    def fail(path, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="ckpt"),
        held(folder, busy),
    ):
        patch.setattr(lock.Path, "unlink", fail)
        fail(folder / "ckpt")


def test_a_holder_whose_lock_was_taken_learns_it_before_it_writes(folder):
    with held(folder, busy) as check:
        (path,) = lock_files(folder)
        path.unlink()
        other = elsewhere(folder)
        with pytest.raises(UserError, match="is gone: .* took over, or the folder"):
            check()
    assert lock_files(folder) == [other]
