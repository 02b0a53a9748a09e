import io
import json
import logging
import sys
import types

import jax
import numpy as np
import pytest
from runs import shown

from pcagpt.config.schema import TelemetrySettings
from pcagpt.telemetry import progress
from pcagpt.telemetry.metrics import Telemetry, read_metrics
from pcagpt.telemetry.progress import Progress


def start(folder, resume_step=None, **wanted):
    return Telemetry(
        folder,
        TelemetrySettings(**wanted),
        check_lock=lambda: None,
        resume_step=resume_step,
        workdir=folder.parent,
    )


def read_lines(folder):
    text = (folder / "metrics.jsonl").read_text("utf-8")

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_metrics_reach_the_file_at_once_and_tensorboard(tmp_path):
    with start(tmp_path / "run") as log:
        log.log(1, 64, "train", {"loss": np.float32(2.5), "flop_utilisation": None})
        log.log(1, 64, "val", {"loss": 2.75, "nan": float("nan"), "inf": -np.inf})
        log.log(2, 128, "val", {"tokens_predicted": 7})
        lines = read_lines(tmp_path / "run")
    assert lines == [
        {"step": 1, "tokens": 64, "split": "train", "loss": 2.5}
        | {"flop_utilisation": None},
        {"step": 1, "tokens": 64, "split": "val", "loss": 2.75}
        | {"nan": None, "inf": None},
        {"step": 2, "tokens": 128, "split": "val", "tokens_predicted": 7},
    ]
    found = shown(tmp_path / "run")
    assert [value.simple_value for value in found["train/loss", 1]] == [2.5]
    # TensorBoard opens on the first group of tags in the alphabet.
    (first, step), (loss,) = min(found.items())
    assert (first, step, loss.simple_value) == ("loss/val", 1, 2.75)
    # What is not measured, and what is always the same, has no curve.
    assert {tag for tag, _ in found} == {
        *("train/loss", "loss/val", "val/nan", "val/inf"),
    }


def test_resuming_drops_later_and_torn_lines_and_repeats_none(tmp_path):
    with start(tmp_path) as log:
        for step in (1, 2, 3):
            log.log(step, 64 * step, "train", {"loss": float(step)})
        log.log(2, 128, "val", {"loss": 9.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "spl')
    with start(tmp_path, resume_step=2) as log:
        log.log(2, 128, "val", {"loss": 9.0})  # logged already
        log.log(3, 192, "train", {"loss": 3.5})
    lines = [f"{e['step']} {e['split']} {e['loss']}" for e in read_lines(tmp_path)]
    assert lines == ["1 train 1.0", "2 train 2.0", "2 val 9.0", "3 train 3.5"]
    values = {
        key: [v.simple_value for v in found] for key, found in shown(tmp_path).items()
    }
    assert values == {
        ("train/loss", 1): [1.0],
        ("train/loss", 2): [2.0],
        ("train/loss", 3): [3.5],
        ("loss/val", 2): [9.0],
    }


def test_damaged_lines_are_left_out_with_one_warning_and_kept(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("pcagpt"), "propagate", True)
    with start(tmp_path, tensorboard=False) as log:
        for step in range(5):
            log.log(step, 64 * step, "train", {"loss": 2.5, "bits_per_byte": 1.5})
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    lines[0] = lines[0].replace(b"1.5", b'{"a": 1}')
    lines[1] = lines[1].replace(b"2.5", b"\xff.5")
    lines[2] = b"[1]"
    lines[3] = lines[3].replace(b"2.5", b"NaN")
    path.write_bytes(b"\n".join(lines))
    with start(tmp_path, tensorboard=False, resume_step=4):
        pass
    assert [line["step"] for line in read_lines(tmp_path)] == [4]
    record, _ = caplog.records
    assert "metrics.jsonl: damaged lines are left out: 1, 2, 3, 4" in record.message
    (kept,) = tmp_path.glob("metrics.jsonl.replaced-*")
    assert kept.read_bytes() == b"\n".join(lines)


@pytest.mark.parametrize(
    ("content", "is_torn"), [(b'{"step": 1, "lo', True), (b"\0\0\0", False)]
)
def test_only_the_first_half_of_a_line_is_taken_for_torn(
    content, is_torn, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("pcagpt"), "propagate", True)
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert bool(caplog.records) != is_torn


def test_a_new_run_in_an_old_folder_replaces_its_metrics(tmp_path):
    for loss in (1.0, 2.0):
        with start(tmp_path, tensorboard=False) as log:
            log.log(1, 64, "train", {"loss": loss})
    assert [line["loss"] for line in read_lines(tmp_path)] == [2.0]


def test_only_the_first_process_records_and_shows(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with start(tmp_path / "run", wandb=True) as log, Progress("label", 1) as bar:
        log.log(1, 64, "train", {"loss": 1.0})
        bar.update(1)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")


def test_without_tensorboard_a_folder_holds_only_metrics(tmp_path):
    with start(tmp_path, tensorboard=False) as log:
        log.text("config", "text", 0)
        assert not list(tmp_path.iterdir())
        log.log(1, 64, "train", {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    clock = types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock.now)
    return clock


class Terminal(io.StringIO):
    """What a person sees, escape codes included."""

    def isatty(self):
        return True


def test_a_log_file_gets_few_lines_with_all_readings(clock, capsys):
    with Progress("D gpt_baseline", total=2000, start=1000) as bar:
        clock.now += 30  # compilation
        for step in range(1001, 2001):
            clock.now += 1 / 16
            bar.update(step, loss=3.21, tokens_per_second=12345.6)
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in err.splitlines()]
    assert not out
    assert len(lines) == 9  # one at once, one per 10 of 62 s, and one at the end
    assert lines[0] == "D gpt_baseline 1,000/2,000 50% 0:00:00 --:-- left"
    readings = "loss 3.210 12,346 tok/s"
    assert lines[1] == f"D gpt_baseline 1,001/2,000 50% {readings} 0:00:30 --:-- left"
    # The time left does not count the 30 s of compilation.
    assert lines[2].startswith("D gpt_baseline 1,161/2,000 58% ")
    assert lines[2].endswith("0:00:40 00:53 left")
    assert lines[-1].startswith("D gpt_baseline 2,000/2,000 100% ")
    assert lines[-1].endswith("0:01:32 00:00 left")


def test_a_short_inner_bar_stays_out_of_the_log(clock, capsys):
    with Progress("outer", total=1) as outer:
        with Progress("short", total=2) as inner:
            inner.update(1)
            inner.update(2)
        with Progress("long", total=2) as inner:
            inner.update(1)
            clock.now += 4000
            inner.update(2)
        outer.update(1)
    labels = [line.split()[0] for line in capsys.readouterr().err.splitlines()]
    assert labels == ["outer", "long", "outer"]


def test_a_terminal_gets_bars_that_nest_and_leave_nothing_behind(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for label in ("first", "second"):
        with pytest.raises(KeyboardInterrupt), Progress(label, total=4) as outer:
            outer.update(1, loss=3.21, tokens_per_second=12345.6)
            with Progress("inner [b]", total=2) as inner:
                inner.update(2)
            outer.update(4, loss=2.5, tokens_per_second=12345.6)
            raise KeyboardInterrupt
        assert sys.stderr is terminal
    shown = terminal.getvalue()
    last = shown.rstrip("\n\x1b[?25h").splitlines()[-1]
    for word in ("second", "4/4", "100%", "loss 2.500", "12,346 tok/s", "left"):
        assert word in last
    assert "inner" not in last and "inner [b]" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 2  # the cursor


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with Progress("label", total=1) as bar:
        bar.update(1)
    assert sys.stderr.getvalue().startswith("label  0/1   0%")
    assert "\x1b" not in sys.stderr.getvalue()


def test_tracked_items_are_counted_after_their_use(clock):
    with Progress("label", total=5, start=3) as bar:
        steps = [(item, bar.step) for item in bar.track("ab")]
    assert steps == [("a", 3), ("b", 4)]
    assert bar.step == 5
