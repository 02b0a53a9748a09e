"""The torture campaign: a planted fault gets its outcome, and pcagpt survives it."""

import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from command_line import ROOT

from pcagpt.errors import UserError
from pcagpt.run import checkpoint

SCRIPTS = ROOT / "scripts"
SAME, REFUSED, WARNED = "same", "refused", "warned"
SKIPPED, UNCLEAR = "skipped", "unclear"
SILENT, LOST, TRACEBACK, HANG = "SILENT", "LOST", "TRACEBACK", "HANG"

# A program whose only input, d.json, is its own fault, as Python; `say` warns.
PROGRAM = """
import os, pathlib, signal, sys, time
def say(text):
    print(f"pcagpt: {text}", file=sys.stderr)
def refuse(text):
    say(text)
    sys.exit(2)
loss = 1
exec(pathlib.Path("runs/d.json").read_text())
print({"loss": loss, "seconds": time.time()}.__repr__().replace("'", '"'))
"""
FAULTS = {
    "the same result": ("", SAME),
    "the same result after a warning": ("say('d.json is damaged')", SAME),
    "refused by name": ("refuse('runs/d.json is damaged')", REFUSED),
    "refused by the name of its folder": ("refuse('runs is damaged')", REFUSED),
    "refused by another name": ("refuse('runs/good.json is damaged')", UNCLEAR),
    "refused without a name": ("refuse('this is wrong')", UNCLEAR),
    "refused in many lines": (
        "print(*'0123456789', sep='\\n', file=sys.stderr); refuse('d.json')",
        UNCLEAR,
    ),
    "refused without a word": ("sys.exit(2)", UNCLEAR),
    "another result after a warning": ("loss = 2; say('d.json is damaged')", WARNED),
    "another result": ("loss = 2", SILENT),
    "no result": ("sys.exit(0)", SILENT),
    "a file lost": ("os.remove('runs/good.json')", LOST),
    "a file lost and refused": ("os.remove('runs/good.json'); refuse('d.json')", LOST),
    "a checkpoint written again": (
        "pathlib.Path('runs/ckpt/2/w').write_text('other')",
        LOST,
    ),
    "an error": ("1 / 0", TRACEBACK),
    "another exit code": ("sys.exit(3)", TRACEBACK),
    "killed by the system": ("os.kill(os.getpid(), signal.SIGSEGV)", TRACEBACK),
    "no end": ("time.sleep(600)", HANG),
    "a thread without end": (
        "import threading; threading.Thread(target=time.sleep, args=(600,)).start()",
        HANG,
    ),
    "killed at its second file operation": (
        "open('runs/1', 'w').close(); open('runs/good.json').close(); loss = 2; "
        "open('runs/2', 'w').close()",
        TRACEBACK,
    ),
}
# Judges every fault, in a process of its own: this one may have started JAX.
JUDGE = """
import json, os, pathlib, random, signal, sys
from torture import children
from torture.case import Case
from torture.scene import COMMANDS, Command
folder = pathlib.Path(sys.argv[1])
scene = folder / "scene"
(scene / "runs/ckpt/2").mkdir(parents=True)
(scene / "runs/ckpt/2/w").write_text("weights")
(scene / "runs/good.json").write_text("{}")
(scene / "runs/d.json").write_text("")
COMMANDS["planted"] = Command("evaluate", {})
children.PROGRAM = "planted"
case = Case(folder / "case", random.Random(0), scene, limit=3)
found = {}
for name, (fault, _) in json.loads(sys.stdin.read()).items():
    def prepare():
        if "killed at" in name:
            kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
            children.at_file_operation(2, case.place, kill)
    case.copy()
    (case.place / "runs/d.json").write_text(fault)
    verdict = case.attempt("planted", damaged="runs/d.json", prepare=prepare)
    left = sorted(path.name for path in (case.place / "runs").iterdir())
    found[name] = verdict.outcome, verdict.why, left
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """{fault: (outcome, why, files that it left)}."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PROGRAM)
    path = os.pathsep.join([str(SCRIPTS), str(folder)])
    ended = subprocess.run(
        [sys.executable, "-c", JUDGE, str(folder)],
        input=json.dumps(FAULTS),
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_has_its_outcome(fault, verdicts):
    outcome, why, _ = verdicts[fault]
    assert outcome == FAULTS[fault][1], why


def test_a_silent_fault_is_described_by_what_differs(verdicts):
    assert verdicts["another result"][1] == "another loss (2, not 1)"


def test_a_kill_at_a_file_operation_comes_before_it(verdicts):
    _, why, left = verdicts["killed at its second file operation"]
    assert "exit code -9" in why
    assert "1" in left
    assert "2" not in left


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from torture import parts

    return parts


def test_what_this_machine_cannot_try_is_skipped_and_not_passed(
    parts, monkeypatch, tmp_path
):
    python = tmp_path / "python"  # Only its owner can enter pytest's folder.
    python.touch()
    monkeypatch.setattr(sys, "executable", str(python))
    hidden = parts.hidden_from_nobody()
    assert hidden == (str(python) if os.getuid() == 0 else "")
    monkeypatch.setattr(parts, "hidden_from_nobody", lambda: "/root/python")
    for number, fail in enumerate(parts.DISK):
        if fail in (parts._read_only, parts._unreadable):
            _, verdict = parts.disk(None, number)
            assert verdict.outcome == SKIPPED
            assert verdict.why == "user 65534 cannot read /root/python"


@pytest.fixture
def damage(parts):
    return parts.damage


def test_every_way_changes_every_file_that_it_is_for(damage, tmp_path):
    files = {
        "a.json": json.dumps({"a": {"b": 1.5}, "c": [1, 2]}, indent=1).encode(),
        "a.jsonl": b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.25}\n',
        "a.bin": np.arange(1, 4000, dtype=np.uint16).tobytes(),
    }
    np.save(tmp_path / "a.npy", np.ones((3, 4)))
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    files |= {name: (tmp_path / name).read_bytes() for name in ("a.npy", "a.npz")}
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        for way in damage.ways_for(path):
            for number in range(20):
                path.write_bytes(content)
                assert damage.WAYS[way](path, random.Random(number))
                changed = path.read_bytes() if path.exists() else None
                assert changed != content, (name, way, number)


def test_a_flip_changes_one_bit(damage, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    damage.flip(path, random.Random(0))
    assert sum(byte.bit_count() for byte in path.read_bytes()) == 1
    assert len(path.read_bytes()) == 100


@pytest.mark.parametrize("is_packed", [False, True])
def test_one_number_of_the_table_becomes_nan(damage, tmp_path, is_packed):
    weights = {"params": {"wpe": np.ones((3, 4))}, "constants": {}}
    if is_packed:
        band = {"codes": np.ones((5, 2), np.uint8), "scales": np.ones(8)}
        shared = {"mean": np.ones(4), "columns": np.ones(4)}
        weights["constants"]["embed"] = {"band_0": band, "directions": shared}
    else:
        weights["params"]["embed"] = {"band_0": {"wte": np.ones((5, 4))}}
    checkpoint.save_weights(tmp_path / "run", weights)
    saved = tmp_path / "run" / "ckpt" / "0"
    damage.save_nan(str(saved), 7)
    array = (
        "constants/embed/directions/mean" if is_packed else "params/embed/band_0/wte"
    )
    with pytest.raises(UserError, match=f"{array} holds nan"):
        checkpoint.load_weights(saved)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # It takes five minutes, and more beside other tests.
def test_the_short_campaign_finds_nothing(tmp_path):
    script = SCRIPTS / "torture.py"
    # 'disk' needs a Python that other users may read, which a machine may not have.
    parts = ("kills", "signals", "damages", "together", "inputs")
    only = [word for part in parts for word in ("--only", part)]
    ended = subprocess.run(
        [sys.executable, script, "--short", "--out", tmp_path / "torture", *only],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "torture" / "torture.json").read_text())
    assert {case["part"] for case in report["cases"]} >= {"kills", "together", "inputs"}
