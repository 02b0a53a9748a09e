"""A folder of finished and unfinished work, and the commands that read it.

corpus/    token files of 4,096 ids with a known tokenizer, and their meta.json
runs/      a finished experiment (D, A, C, B), statistics, an evaluation, and a sweep
           with factors, coded and packed tables
stopped/   D as if killed after a save: checkpoints 2 and 4 of 6 steps
banded/    a factorization in three bands
table.npy, table.statistics.npz   a bare table with its statistics
new/       does not exist: commands write there
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.config import command_line
from pcagpt.config.tasks import TASKS, readers_of
from pcagpt.config.unread import read_if
from torture import children

REPOSITORY = Path(__file__).resolve().parent.parent.parent
VOCAB_SIZE, WIDTH, STEPS, LIMIT = 4096, 16, 6, 600

_CORPUS = {"data.source": "corpus"}
_MODEL = {
    "model.n_layer": 1,
    "model.n_head": 2,
    "model.n_embd": WIDTH,
    "model.block_size": 16,
}
_QUICK = {
    "train.steps": STEPS,
    "train.warmup_steps": 1,
    "train.batch_size": 4,
    "train.loss_chunks": 1,
    "evaluate.batch_size": 64,
    "evaluate.every": 2,
    "checkpoint.every": 2,
    "checkpoint.keep_last": 3,
    "telemetry.every": 1,
    "telemetry.tensorboard": False,
    "finetune.steps_share": 0.5,
    "compress.calibration_tokens": 256,
    "mesh.data": 1,
}
# What clocks, commits and chance decide, and what follows from it.
_VARIES = {
    "checkpoint", "command", "corpus_source", "created",
    "flop_utilisation", "git_commit", "imported_sha256", "run_id", "seconds", "sha256",
    "source_sha256", "statistics_sha256", "tokens_per_second",
}  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A command line in the scene; `result` is what it makes, "" what it prints."""

    config: str
    knobs: dict[str, Any]
    result: str = ""

    @property
    def words(self) -> list[str]:
        """Its arguments."""
        path = REPOSITORY / "configs" / f"{self.config}.py"
        task = self.config if self.config in TASKS else "train"
        values = {k: v for k, v in _QUICK.items() if task in readers_of(k)[0]}
        if not TASKS[task].model:  # Otherwise the run has them.
            values |= _CORPUS | ({} if self.config == "recover" else _MODEL)
        words = {k: f"--config.{k}={v}" for k, v in (values | self.knobs).items()}
        settings, _ = command_line.parse(["", f"--config={path}", *words.values()])
        for knob, is_read, _ in read_if(settings, {task}):
            if not is_read and knob not in self.knobs:
                words.pop(knob, None)
        return [f"--config={path}", *words.values()]


_D = "runs/gpt_baseline"
_BEST, _BANDS = "runs/compressed/best_k4", "banded/pca_factorized/bands_pca_k4"
_CODED, _PACKED = "runs/compressed/best_coded_k4", "runs/compressed/best_packed_k4"
_OTHER_RATE = {"train.learning_rate": 0.002}
_ARM = {"workdir": "new", "model.n_embd_wte": 4}
_FACTORS = {"workdir": "new", "ranks": 4, "factorize.method": "context"}
_FACTORS_OF_D = _FACTORS | {"model_path": _D}
_SWEEP = {
    "model_path": _D,
    "ranks": "2,4",
    "compress.methods": "context,coded,packed",
    "compress.bits": "8",
    "compress.bands": "1",
    "evaluate.max_tokens": 200,
}
_RECOVER = {"workdir": "new", "init.weights_from": _BEST, "distill.teacher": _D}
COMMANDS = {
    "train": Command("baseline", {"workdir": "new"}, "new/gpt_baseline"),
    "train at another rate": Command(
        "baseline", {"workdir": "new"} | _OTHER_RATE, "new/gpt_baseline"
    ),
    "A": Command("pca_k128", _ARM, "new/gpt_pca_k4"),
    "B": Command("pca_finetune_k128", _ARM, "new/gpt_pca_finetune_k4"),
    "resume": Command("baseline", {"workdir": "stopped"}, "stopped/gpt_baseline"),
    "resume at another rate": Command(  # This one must be refused.
        "baseline", {"workdir": "stopped"} | _OTHER_RATE, "stopped/gpt_baseline"
    ),
    "report": Command(
        "experiment", {"workdir": "runs", "ranks": 4}, "runs/results.json"
    ),
    "A at rank 3": Command(
        "pca_k128", {"workdir": "runs", "model.n_embd_wte": 3}, "runs/gpt_pca_k3"
    ),
    "train on bands": Command(
        "pca_k128", _ARM | {"init.import_bands": _BANDS}, "new/gpt_pca_k4"
    ),
    "recover": Command("recover", _RECOVER, "new/gpt_pca_distill_from_best_k4"),
    "evaluate": Command("evaluate", {"model_path": _D}),
    "evaluate A": Command("evaluate", {"model_path": "runs/gpt_pca_k4"}),
    "evaluate stopped": Command("evaluate", {"model_path": "stopped/gpt_baseline"}),
    "evaluate best": Command("evaluate", {"model_path": _BEST}),
    "evaluate coded": Command("evaluate", {"model_path": _CODED}),
    "evaluate packed": Command("evaluate", {"model_path": _PACKED}),
    "sample": Command("sample", {"model_path": _D, "sample.tokens": 8}),
    "factorize": Command("factorize", _FACTORS_OF_D, "new/pca_factorized"),
    "factorize a table": Command(
        "factorize", _FACTORS | {"model_path": "table.npy"}, "new/pca_factorized"
    ),
    "compress": Command("compress", _SWEEP | {"workdir": "runs"}, "runs/compressed"),
    "compress anew": Command("compress", _SWEEP | {"workdir": "new"}, "new/compressed"),
}


def build(scene: Path) -> None:
    """Makes the scene; RuntimeError if a command fails."""
    scene.mkdir()
    _write_corpus(scene / "corpus")
    in_bands = Command(
        "factorize", _FACTORS_OF_D | {"workdir": "banded", "factorize.bands": 3}
    )
    making = (COMMANDS[name] for name in ("report", "evaluate", "compress"))
    for command in (*making, in_bands):
        log = scene.with_name("making")
        ended = children.start(command.words, scene, log).wait(LIMIT)
        if ended.code:
            raise RuntimeError(f"the scene cannot be made: {ended.err[-2000:]}")
    stopped = scene / "stopped/gpt_baseline"
    shutil.copytree(scene / _D, stopped)
    shutil.rmtree(stopped / f"ckpt/{STEPS}")
    for name in ("*.np[yz]", "evaluation_*", "result.json"):
        for path in stopped.glob(name):
            path.unlink()
    children.in_child(_write_bare_table, str(scene))


def _write_corpus(folder: Path) -> None:
    """Token files of ids that are Zipf-like, with some order to learn."""
    folder.mkdir()
    chance = np.random.default_rng(0)
    for split, length in (("train", 6001), ("val", 1003), ("test", 901)):
        tokens = np.minimum(chance.zipf(1.3, length) - 1, VOCAB_SIZE - 1)
        tokens[1::2] = (tokens[::2][: length // 2] * 3 + 1) % VOCAB_SIZE
        tokens.astype(np.uint16).tofile(folder / f"{split}.bin")
    meta = {"vocab_size": VOCAB_SIZE, "tokenizer": "sotu4096"}
    (folder / "meta.json").write_text(json.dumps(meta))


def _write_bare_table(scene: str) -> None:
    """The table of D as a bare file, with D's statistics beside it."""
    from pcagpt.run.trained import Run

    place = Path(scene)
    np.save(place / "table.npy", Run.open(place / _D).table())
    (statistics,) = (place / _D).glob("statistics_*.npz")
    shutil.copy2(statistics, place / "table.statistics.npz")


def result(command: Command, place: Path, out: str) -> Any:
    """What a command made or printed, as JSON without what varies between two runs.

    Arrays are hashed: those of files, and of the newest checkpoint of each run with its
    optimizer. Raises an error of any type if something cannot be read.
    """
    if not command.result:
        return _stripped(json.loads(out[out.index("{") :])) if "{" in out else out

    def read(path: Path) -> str:  # Records name folders by their whole path.
        return path.read_text("utf-8").replace(str(place), "")

    made = place / command.result
    if made.is_file():
        return _stripped(json.loads(read(made)))
    found: dict[str, Any] = {}
    for path in sorted(made.rglob("*")):
        name = str(path.relative_to(made))
        if "ckpt" in path.parts or path.name.startswith("evaluation_"):
            continue
        if path.suffix == ".json":
            found[name] = _stripped(json.loads(read(path)))
        elif path.suffix == ".jsonl":
            lines = read(path).splitlines()
            found[name] = [_stripped(json.loads(line)) for line in lines]
        elif path.suffix in (".npy", ".npz"):
            arrays = arrays_of(path)
            # The protocol of statistics has hashes of results, with their timings.
            arrays.pop("protocol", None)
            found[name] = {key: _hash(array) for key, array in arrays.items()}
        elif path.suffix == ".pcat":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    runs = [str(path.parent) for path in made.rglob("ckpt")]
    return found | children.in_child(_saved_arrays, runs)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file; that of a .npy file has the name ""."""
    loaded = np.load(path)
    return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)


def _saved_arrays(runs: list[str]) -> dict[str, dict[str, str]]:
    """Hashes of the arrays of each run's newest checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    from pcagpt.run.checkpoint import FOLDER, steps

    found = {}
    for run in runs:
        newest = (Path(run) / FOLDER / str(max(steps(Path(run))))).absolute()
        arrays = found[f"{Path(run).name}, checkpoint {newest.name}"] = {}
        with ocp.PyTreeCheckpointer() as checkpointer:
            for item in ("weights", "optimizer"):
                if not (newest / item).exists():
                    continue
                saved = checkpointer.metadata(newest / item).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), saved)
                arguments = ocp.args.PyTreeRestore(restore_args=as_numpy)
                tree = checkpointer.restore(newest / item, args=arguments)
                for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                    arrays[item + jax.tree_util.keystr(path)] = _hash(leaf)
    return found


def _stripped(value: Any) -> Any:
    """JSON without what varies."""
    if isinstance(value, dict):
        return {k: _stripped(v) for k, v in value.items() if k not in _VARIES}
    return [_stripped(entry) for entry in value] if isinstance(value, list) else value


def _hash(array: Any) -> str:
    array = np.asarray(array)
    text = f"{array.dtype}{array.shape}".encode()
    return hashlib.sha256(text + array.tobytes()).hexdigest()[:16]
