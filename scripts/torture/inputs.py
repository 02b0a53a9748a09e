"""Bad inputs made by hypothesis: knobs, token files, meta files, arrays and JSON.

One case is a series of examples of one kind, most of them in one process.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from torture import children, damage
from torture.case import Case
from torture.children import Ended
from torture.judge import (
    BAD,
    HANG,
    SAME,
    SILENT,
    TRACEBACK,
    Reference,
    Verdict,
    judge,
    worst,
)
from torture.scene import COMMANDS, REPOSITORY, VOCAB_SIZE, WIDTH

IN_PROCESS, AS_COMMANDS = 50, 10  # examples of a case
REFUSE = Reference(2, None, [], [], 0)  # A command that must be refused.
ANY = Reference(0, None, [], [], 0)  # One that may be accepted.

_TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
_NUMBERS = st.one_of(
    st.integers(-3, 5), st.sampled_from([2**31, 2**63, -(2**70), 10**30]), st.floats()
)
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXT),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner),
    max_leaves=6,
)
_ODD = ["", "nan", "inf", "1e999", "None", "True", "1,,2", "/dev/null", "/", "a" * 300]
_CONFIGS = ["baseline", "experiment", "pca_k128", "factorize", "evaluate", "compress"]


def inputs(case: Case, index: int) -> tuple[str, Verdict]:
    """A series of examples of one kind; every fifth one as real commands."""
    kind, real = list(KINDS)[index % len(KINDS)], index % 5 == 4
    count, number = AS_COMMANDS if real else IN_PROCESS, case.random.randrange(1 << 30)
    case.copy("corpus", "runs", "table.npy", "table.statistics.npz")
    log, verdicts = case.folder / "examples.jsonl", []
    arguments = (str(case.folder), kind, count, real, number, case.limit)
    try:
        children.in_child(_series, *arguments, limit=count * case.limit)
    except RuntimeError as error:
        outcome = HANG if "exit code -6" in str(error) else TRACEBACK
        begun = case.folder / "begun.json"
        words = begun.read_text() if begun.exists() else "before the first example"
        verdicts.append(Verdict(outcome, f"{error}: {words}"))
    written = log.read_text() if log.exists() else ""
    lines = [json.loads(line) for line in written.splitlines()]
    verdicts += [Verdict(line["outcome"], line["why"]) for line in lines]
    found = worst(verdicts)
    counts = dict(Counter(verdict.outcome for verdict in verdicts))
    what = f"{kind}, {'real commands' if real else 'in one process'}"
    return what, Verdict(found.outcome, found.why, counts)


def _series(
    folder: str, kind: str, count: int, real: bool, number: int, limit: float
) -> None:
    """Runs examples; writes a line of JSON for each into examples.jsonl."""
    log, begun = (Path(folder) / name for name in ("examples.jsonl", "begun.json"))
    os.chdir(Path(folder) / "place")
    call, done = _as_command if real else _in_process(), []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        for name in ("bad", "new"):
            shutil.rmtree(name, ignore_errors=True)
        os.mkdir("bad")
        words, expected = KINDS[kind](data.draw, Path("bad"))
        begun.write_text(json.dumps(words))
        ended = call(words, limit)
        verdict = judge(ended, expected)
        if verdict.outcome == SAME and re.search(r"\b(NaN|Infinity)\b", ended.out):
            verdict = Verdict(SILENT, "it prints NaN or Infinity")
        if verdict.outcome in BAD:
            shutil.copytree("bad", Path(folder) / f"bad-{len(done)}")
        why = f"example {len(done)}: {verdict.why}"
        line = {"outcome": verdict.outcome, "why": why, "words": words}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        done.append(words)

    log.touch()
    one()


class _TooLong(BaseException):
    """The time limit of one example in this process."""


def _in_process() -> Callable[[list[str], float], Ended]:
    """A function that calls pcagpt.main.main here and captures what it says."""
    from pcagpt import main, process

    process.prepare()

    def stop(*_: Any) -> None:
        raise _TooLong

    signal.signal(signal.SIGALRM, stop)

    def call(words: list[str], limit: float) -> Ended:
        out, err, began = io.StringIO(), io.StringIO(), time.monotonic()
        code, hung = 1, False
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main.main(["pcagpt", *words])
        except _TooLong:
            hung = True
        except BaseException:
            err.write(traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seconds = time.monotonic() - began
        return Ended(code, out.getvalue(), err.getvalue(), seconds, hung)

    return call


def _as_command(words: list[str], limit: float) -> Ended:
    """Runs `python -m pcagpt.main WORD...` as anyone would."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pcagpt.main", *words]
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    try:
        ended = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            timeout=limit,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return Ended(1, "", "", limit, True)
    seconds = time.monotonic() - began
    return Ended(ended.returncode, ended.stdout, ended.stderr, seconds, False)


# Each kind draws an input, writes its files into the folder, and returns the words of a
# command that reads it, and what is expected of that command.


def _knobs(draw: Callable, _: Path) -> tuple[list[str], Reference]:
    """One to three knobs with values of any type; only the plan is asked for."""
    from pcagpt.config import KNOBS

    config, expected = draw(st.sampled_from(_CONFIGS)), ANY
    words = [f"--config={REPOSITORY}/configs/{config}.py", "--print_config"]
    lists = st.lists(_NUMBERS, max_size=3).map(lambda found: ",".join(map(str, found)))
    values = st.one_of(_NUMBERS.map(str), _TEXT, st.sampled_from(_ODD), lists)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*KNOBS, "train.step", "model"]))
        value = draw(values)
        words.append(f"--config.{name}={value}")
        is_real = name in KNOBS and KNOBS[name].type is float
        if name not in KNOBS or (is_real and value in ("nan", "inf", "1e999")):
            expected = REFUSE
    return words, expected


def _on_corpus(folder: Path) -> list[str]:
    return [*COMMANDS["evaluate"].words, f"--config.data.source={folder}"]


def _tokens(draw: Callable, folder: Path) -> tuple[list[str], Reference]:
    """A token file of other things than tokens, or of ids that the model lacks."""
    shutil.copytree("corpus", folder, dirs_exist_ok=True)
    path, ids = folder / "val.bin", np.fromfile("corpus/val.bin", np.uint16)
    arrays, archive, beyond = io.BytesIO(), io.BytesIO(), ids.copy()
    np.save(arrays, ids)
    np.savez_compressed(archive, ids)
    beyond[draw(st.integers(0, len(ids) - 1))] = draw(st.integers(VOCAB_SIZE, 65535))
    foreign = [
        path.read_bytes() + b"\1",
        beyond.tobytes(),
        *(ids.astype(dtype).tobytes() for dtype in (">u2", "<i8", "<u4")),
        np.random.default_rng(0).normal(size=400).tobytes(),
        arrays.getvalue(),
        archive.getvalue(),
        pickle.dumps(ids.tolist()),
        ids[:1].tobytes(),
    ]
    text = st.text(min_size=100, max_size=300).map(str.encode)
    content = draw(st.one_of(st.sampled_from(foreign), text, st.binary(max_size=300)))
    path.write_bytes(content)
    # Few random bytes can be tokens that the model knows.
    found = np.frombuffer(content[: len(content) // 2 * 2], "<u2")
    plausible = 2 <= len(found) <= 150 and found.max() < VOCAB_SIZE
    return _on_corpus(folder), ANY if plausible and len(content) % 2 == 0 else REFUSE


def _meta(draw: Callable, folder: Path) -> tuple[list[str], Reference]:
    """A meta.json of any shape, or a meta.pkl of any bytes."""
    shutil.copytree("corpus", folder, dirs_exist_ok=True)
    keys = ["vocab_size", "dtype", "tokenizer", "tokens", "name", "stoi", "itos"]
    meta = draw(st.dictionaries(st.sampled_from(keys), _JSON, max_size=4))
    if draw(st.booleans()):
        meta = {"vocab_size": VOCAB_SIZE, "tokenizer": "sotu4096"} | meta
    odd = st.one_of(
        _JSON.map(json.dumps), _TEXT, st.sampled_from(["[" * 5000, "\ufeff{}"])
    )
    text = draw(st.one_of(st.just(json.dumps(meta)), odd))
    size = meta.get("vocab_size")
    is_good = text == json.dumps(meta) and type(size) is int and size > 0
    (folder / "meta.json").write_text(text, "utf-8")
    if draw(st.integers(0, 9)) == 0:
        (folder / "meta.json").unlink()
        pickled = st.one_of(st.binary(max_size=60), _JSON.map(pickle.dumps))
        (folder / "meta.pkl").write_bytes(draw(pickled))
        is_good = True  # A pickle can be good.
    return _on_corpus(folder), ANY if is_good else REFUSE


def _array(draw: Callable, shape: tuple[int, ...]) -> tuple[Any, bool]:
    """An array of this shape or a bad one, and whether it is good."""
    array = np.random.default_rng(draw(st.integers(0, 9))).normal(size=shape)
    bad = array.copy()
    bad.flat[draw(st.integers(0, array.size - 1))] = draw(
        st.sampled_from((np.nan, -np.inf, 1e300))
    )
    other = draw(st.lists(st.integers(0, 6), max_size=4))
    dtype = draw(st.sampled_from(("i4", "c16", "U5", "?", "M8[s]", "S3")))
    choices = (array, bad, array.astype(dtype), np.zeros(other), array[:0], [{"a": 1}])
    number = draw(st.integers(0, len(choices) - 1))
    good = number == 0 or (number == 3 and len(other) == len(shape))
    return np.asarray(choices[number]), good


def _damage(draw: Callable, path: Path) -> bool:
    """One time in three damages a file as in the part 'damages'; True if it did."""
    if draw(st.integers(0, 2)):
        return False
    way = draw(st.sampled_from(("truncate", "zero page", "flip", "shape")))
    chance = random.Random(draw(st.integers(0, 2**30)))
    if way == "shape":
        path.write_bytes(path.read_bytes()[:8] + chance.randbytes(chance.randrange(99)))
    else:
        damage.WAYS[way](path, chance)
    return True


def _npy(draw: Callable, folder: Path) -> tuple[list[str], Reference]:
    """A bare table to factorize."""
    path = folder / "table.npy"
    array, good = _array(draw, (40, WIDTH))
    np.save(path, array, allow_pickle=True)
    damaged = _damage(draw, path)
    words = [*COMMANDS["factorize a table"].words, f"--config.model_path={path}"]
    return [*words, "--config.factorize.method=svd"], ANY if good or damaged else REFUSE


def _npz(draw: Callable, folder: Path) -> tuple[list[str], Reference]:
    """A file of statistics. A method may read only some of its arrays."""
    path = folder / "statistics.npz"
    with np.load("table.statistics.npz") as archive:
        arrays = dict(archive)
    name = draw(st.sampled_from(sorted(arrays.keys() - {"protocol"})))
    arrays[name], _ = _array(draw, arrays[name].shape)
    if draw(st.integers(0, 5)) == 0:
        del arrays[name]
    np.savez(path, **arrays)
    _damage(draw, path)
    words = COMMANDS["factorize a table"].words
    return [*words, f"--config.factorize.statistics={path}"], ANY


def _json(draw: Callable, folder: Path) -> tuple[list[str], Reference]:
    """A JSON file of a run or of a factorization: other JSON, or of another shape."""
    name = draw(st.sampled_from(("config.json", "result.json", "metadata.json")))
    if name == "metadata.json":
        path = folder / "pca_factorized" / name
        words = COMMANDS["factorize"].words
    else:
        path = folder / "gpt_baseline" / name
        words = COMMANDS["train"].words
        if name == "config.json":
            model_path = f"--config.model_path={path.parent}"
            words = [*COMMANDS["evaluate"].words, model_path]
    shutil.copytree(f"runs/{path.parent.name}", path.parent)
    if draw(st.booleans()):
        path.write_text(draw(st.one_of(_JSON.map(json.dumps), _TEXT)), "utf-8")
    else:
        damage.reshape(path, random.Random(draw(st.integers(0, 2**30))))
    return [*words, f"--config.workdir={folder}"], ANY


def _coded(draw: Callable, folder: Path) -> tuple[list[str], Reference]:
    """A coded table with another header or other words, or damaged: is made again."""
    from pcagpt.coding.file import HEADER_BYTES, MAGIC

    shutil.copytree("runs/compressed", folder / "compressed")
    path = folder / "compressed/best_coded_k4/table.pcat"
    if not _damage(draw, path):
        start = len(MAGIC) + 4
        end, content = start + HEADER_BYTES, path.read_bytes()
        header, words = content[start:end], content[end:-32]
        if draw(st.booleans()):
            known = json.loads(header)
            odd = st.dictionaries(st.sampled_from(sorted(known)), _JSON, min_size=1)
            header = json.dumps(known | draw(odd)).encode()[:HEADER_BYTES]
            header = header.ljust(HEADER_BYTES)
        else:
            words = draw(st.binary(max_size=99))
        content = content[:start] + header + words
        path.write_bytes(content + hashlib.sha256(content).digest())  # It is sealed.
    words = [*COMMANDS["compress"].words, f"--config.workdir={folder}"]
    return [*words, "--config.compress.methods=coded"], ANY


KINDS: dict[str, Callable[[Callable, Path], tuple[list[str], Reference]]] = {
    "knobs": _knobs,
    "token files": _tokens,
    "meta": _meta,
    "npy": _npy,
    "npz": _npz,
    "JSON of runs": _json,
    "coded tables": _coded,
}
