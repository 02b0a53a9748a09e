"""Checkpoints: which are kept, what happens to damaged ones, and reading them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import changed, execute, metrics, saved_state, setup, start

from pcagpt import array_files, files, json_files
from pcagpt.errors import Unreadable, UserError
from pcagpt.json_files import write_json
from pcagpt.model import BLOCK_KNOBS
from pcagpt.run import checkpoint, digests, fingerprint
from pcagpt.run import folder as folder_module
from pcagpt.run.checkpoint import Checkpoints
from pcagpt.run.folder import write_record
from pcagpt.run.trained import Run
from pcagpt.sharding import processes

# Orbax is still reading other arrays when it gives up on a damaged one.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)

ITEMS = {
    "weights": {
        "params": {"embed": {"wte": np.arange(6, dtype=np.float32).reshape(3, 2)}},
        "constants": {"position": np.array([2, 0, 1], np.int32)},
    },
    "optimizer": {
        "state": {"moment": np.full(4, 0.5, np.float32)},
        "step": np.array(0, np.int32),
    },
}


def items_at(step):
    return jax.tree.map(lambda array: jax.numpy.asarray(array + step), ITEMS)


def save(run_dir, losses, keep_last=1):
    """Saves a checkpoint at each step of {step: validation loss or None}."""
    with Checkpoints(run_dir, keep_last) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, items_at(step), {"at": step}, loss)
        checkpoints.wait()


def test_a_last_save_that_was_removed_does_not_count_as_saved(tmp_path):
    with Checkpoints(tmp_path, keep_last=1) as checkpoints:
        checkpoints.save(1, items_at(1), {})
        checkpoints.wait()
        shutil.rmtree(tmp_path / "ckpt" / "1")
        with pytest.raises(FileNotFoundError, match="ckpt/1"):
            checkpoints.wait()


def test_an_old_checkpoint_is_taken_away_whole_before_its_files_are_deleted(
    tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_empty", lambda _: None)
        save(tmp_path, {1: None, 2: None})
    assert (tmp_path / "ckpt" / ".deleted" / "1" / digests.FILE).exists()
    assert checkpoint.steps(tmp_path) == [2]
    save(tmp_path, {3: None})
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["3"]


def test_what_a_person_put_into_an_old_checkpoint_is_kept(tmp_path, said):
    save(tmp_path, {1: 1.0})
    old = tmp_path / "ckpt" / "1"
    (old / "notes.txt").write_text("the best one")
    (old / "weights" / "mine").mkdir()
    (old / "weights" / "mine" / "plot.txt").write_text("a plot")
    (old / "link").symlink_to(tmp_path)
    save(tmp_path, {2: 0.5, 3: 0.4, 4: 0.3})
    assert checkpoint.steps(tmp_path) == [4] and tmp_path.exists()
    (kept,) = (tmp_path / "ckpt").glob("1.replaced-*")
    assert (kept / "notes.txt").read_text() == "the best one"
    assert (kept / "weights" / "mine" / "plot.txt").read_text() == "a plot"
    assert (kept / "link").readlink() == tmp_path
    names = {str(file.relative_to(kept)) for file in kept.rglob("*")}
    assert names == {
        "notes.txt",
        "link",
        "weights",
        "weights/mine",
        "weights/mine/plot.txt",
    }
    (line,) = said()
    assert line.startswith(f"{old} is deleted") and line.endswith(str(kept))


@pytest.mark.parametrize(
    ("owner", "name"), [(digests, "_stored"), (checkpoint, "read_weights")]
)
def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_damaged(
    owner, name, tmp_path, monkeypatch
):
    save(tmp_path, {1: None, 2: None}, keep_last=2)
    newest = tmp_path / "ckpt" / "2"
    read, kept = getattr(owner, name), tmp_path / "kept"

    def delete_and_read(folder):
        if folder == newest:
            folder.rename(kept)
        return read(folder)

    monkeypatch.setattr(owner, name, delete_and_read)
    found = checkpoint.load_weights(tmp_path)
    assert_same(found, items_at(1)["weights"])
    kept.rename(newest)
    with pytest.raises(UserError, match="ckpt/2 was deleted while"):
        checkpoint.load_weights(newest)


def test_a_run_that_is_replaced_while_it_is_read_is_read_anew(tmp_path, monkeypatch):
    run, new = tmp_path / "run", tmp_path / "new"
    for place, step in ((run, 1), (new, 2)):
        save(place, {step: None})
        (place / "ckpt" / str(step)).rename(place / "ckpt" / "0")
    read = checkpoint.read_weights

    def replace_and_fail(folder):
        if not new.exists():
            return read(folder)
        run.rename(tmp_path / "old")
        new.rename(run)
        raise ValueError("the trees have different structures")

    monkeypatch.setattr(checkpoint, "read_weights", replace_and_fail)
    assert_same(checkpoint.load_weights(run), items_at(2)["weights"])


def test_a_run_that_deletes_its_newest_checkpoint_is_opened_at_the_next(
    trained, tmp_path, monkeypatch, said
):
    run_dir = shutil.copytree(trained, tmp_path / "run")
    (run_dir / "result.json").unlink()  # It still trains.
    read = folder_module.read_updates

    def delete_and_read(path):
        if path.name == "2":
            path.rename(tmp_path / "deleted")
        return read(path)

    monkeypatch.setattr(folder_module, "read_updates", delete_and_read)
    assert Run.open(run_dir).step == 1
    assert said() == []


def template(tree):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device),
        tree,
    )


def restore(run_dir, items=ITEMS):
    """What is restored, (items, meta) or None, and the newest step then."""
    with Checkpoints(run_dir, keep_last=1) as checkpoints:
        return checkpoints.restore_latest(template(items)), checkpoints.latest_step


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def damage(run_dir, step, item="weights"):
    """Cuts every file of an item of a checkpoint to half its length."""
    for path in (run_dir / "ckpt" / str(step) / item).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("losses", "keep_last", "kept"),
    [
        ({1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}, 1, [2, 4]),
        ({1: 3.0, 2: 1.0, 3: 0.5}, 2, [2, 3]),
        ({1: 1.0, 2: None, 3: 2.0, 4: None}, 1, [1, 4]),
        ({1: None, 2: None, 3: None}, 2, [2, 3]),
    ],
)
def test_the_last_and_the_best_are_kept(losses, keep_last, kept, tmp_path):
    save(tmp_path, losses, keep_last)
    assert checkpoint.steps(tmp_path) == kept


def test_the_best_is_kept_after_a_restart(tmp_path):
    save(tmp_path, {1: 3.0, 2: 1.0})
    save(tmp_path, {3: 2.0, 4: 2.5})
    assert checkpoint.steps(tmp_path) == [2, 4]


def test_the_newest_checkpoint_is_restored_if_there_is_one(tmp_path):
    assert restore(tmp_path) == (None, None)
    save(tmp_path, {1: 3.0, 2: 4.0})
    (tmp_path / "ckpt" / "3.orbax-checkpoint-tmp").mkdir()  # a save that was killed
    (items, meta), latest = restore(tmp_path)
    assert (latest, meta) == (2, {"at": 2})
    assert_same(items, items_at(2))
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert {path.name for path in (tmp_path / "ckpt").iterdir()} == {"1", "2"}


@pytest.mark.parametrize("item", ["weights", "optimizer", "meta"])
def test_a_damaged_checkpoint_is_reported_and_replaced_by_the_one_before(
    item, tmp_path, said
):
    save(tmp_path, {1: 3.0, 2: 4.0})
    damage(tmp_path, 2, item)
    (items, meta), latest = restore(tmp_path)
    assert (latest, meta) == (1, {"at": 1})
    assert_same(items, items_at(1))
    (message,) = said()
    assert f"{tmp_path}/ckpt/2 is damaged" in message
    assert "falling back to the one before" in message
    kept = tmp_path / "ckpt" / message.rpartition(" ")[2]
    assert kept.name.startswith("2.damaged-")
    save(tmp_path, {2: 2.0})
    assert restore(tmp_path)[1] == 2
    assert checkpoint.steps(tmp_path) == [2]
    assert {path.name for path in kept.iterdir()} >= {*checkpoint.ITEMS, digests.FILE}


def test_when_all_are_damaged_one_line_says_so_and_none_is_deleted(tmp_path):
    save(tmp_path, {1: 3.0, 2: 4.0})
    damage(tmp_path, 1)
    damage(tmp_path, 2)
    with pytest.raises(
        UserError,
        match=f"every checkpoint .* damaged .*: delete {tmp_path} .*overwrite=True",
    ):
        restore(tmp_path)
    assert checkpoint.steps(tmp_path) == [1, 2]


def test_a_checkpoint_without_its_optimizer_is_called_incomplete(tmp_path):
    save(tmp_path, {1: 3.0})
    shutil.rmtree(tmp_path / "ckpt/1/optimizer")
    with pytest.raises(UserError, match=r"or incomplete \(.*/optimizer/.*: No such fi"):
        restore(tmp_path)


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("is_older", [False, True])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError("no memory"), "no memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "Out of memory"),
        (RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection reset"), "Gloo"),
        (OSError(5, "x", "/a"), "/a: input/output error"),
        (KeyError("a bug"), "a bug"),
    ],
)
def test_only_an_error_that_damage_can_cause_counts_as_damage(
    error, says, is_older, tmp_path, monkeypatch
):
    save(tmp_path, {1: 3.0, 2: 4.0})
    if is_older:
        for step in (1, 2):
            (tmp_path / f"ckpt/{step}/digests.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(processes, "lost_process", lambda error: "Gloo" in str(error))
        patch.setattr(ocp.CheckpointManager, "restore", failing(error))
        patch.setattr(ocp.Checkpointer, "restore", failing(error))
        kind = Unreadable if isinstance(error, OSError) else type(error)
        if is_older and isinstance(error, KeyError):  # Nothing proved the files.
            kind = UserError
        for read in (restore, checkpoint.load_weights):
            with pytest.raises(kind, match=says) as caught:
                read(tmp_path)
            assert type(caught.value) is kind
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert restore(tmp_path)[1] == 2


def test_a_checkpoint_of_another_shape_is_an_error_and_kept(tmp_path):
    save(tmp_path, {1: 3.0, 2: 4.0})
    wider = {"params": {"embed": {"wte": np.zeros((3, 4), np.float32)}}}
    with pytest.raises(ValueError, match="not compatible with the stored shape"):
        restore(tmp_path, ITEMS | {"weights": ITEMS["weights"] | wider})
    assert checkpoint.steps(tmp_path) == [1, 2]


# Finding


@pytest.mark.parametrize(
    ("below", "step"), [("", 4), ("ckpt", 4), ("ckpt/2", 2), ("ckpt/4/", 4)]
)
def test_a_path_names_a_run_its_checkpoints_or_one_of_them(below, step, tmp_path):
    save(tmp_path / "run", {1: 3.0, 2: 1.0, 4: 2.0})
    run_dir = tmp_path / "run"
    assert checkpoint.find(f"{run_dir}/{below}") == (run_dir, step)
    assert_same(checkpoint.load_weights(run_dir / below), items_at(step)["weights"])


def test_a_path_that_is_no_run_is_refused_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "run", {1: 3.0})
    for name, message in (
        ("nothing", "nothing does not exist: give the folder of a run"),
        ("file", "file is not a folder: give the folder of a run"),
        ("empty", "empty holds no finished checkpoint"),
        ("run/ckpt/7", "7 does not exist"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            checkpoint.find(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["step_9", "9.mine", "09", "9²", "٩"])
def test_a_persons_copy_beside_the_checkpoints_is_no_checkpoint(name, tmp_path):
    save(tmp_path, {1: 3.0, 2: 4.0})
    shutil.copytree(tmp_path / "ckpt/2", tmp_path / "ckpt" / name)
    (tmp_path / "ckpt/7").write_text("notes")
    assert checkpoint.steps(tmp_path) == [1, 2]
    assert checkpoint.find(tmp_path) == (tmp_path, 2)
    assert restore(tmp_path)[1] == 2
    with pytest.raises(UserError, match=f"{name} holds no finished checkpoint"):
        checkpoint.find(tmp_path / "ckpt" / name)


# Weights only


def test_loaded_weights_are_those_of_the_run_with_padding(finished_experiment):
    run_dir = Path(finished_experiment.workdir) / "gpt_baseline"
    found = checkpoint.load_weights(run_dir)
    params = found["params"]
    assert found["constants"] == {}
    assert params["embed"]["band_0"]["wte"].shape == (128, 32)  # 97 and padding
    assert params.keys() == {"embed", "wpe", "block_0", "ln_f"}
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))


def test_weights_are_loaded_with_constants_and_damaged_ones_refused(tmp_path):
    save(tmp_path, {5: 1.0})
    assert_same(checkpoint.load_weights(tmp_path), items_at(5)["weights"])
    damage(tmp_path, 5)
    with pytest.raises(
        UserError, match="can be read .*weights.*repeat the command"
    ) as caught:
        checkpoint.load_weights(tmp_path)
    assert "\n" not in str(caught.value)


def test_damage_of_weights_that_were_saved_alone_is_seen(tmp_path):
    checkpoint.save_weights(tmp_path, items_at(5)["weights"])
    files = [p for p in (tmp_path / "ckpt/0/weights").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="changed or damaged"):
        checkpoint.load_weights(tmp_path / "ckpt/0")


# Damage


def damages(content):
    """A content with one flipped bit, its first half, and none."""
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    return (bytes(flipped), content[: len(content) // 2], None)


def listed(run_dir, step):
    """The files of a checkpoint that its digests list, and the list itself."""
    folder = run_dir / "ckpt" / str(step)
    names = json.loads((folder / "digests.json").read_text())["files"]
    return [folder / name for name in (*names, "digests.json")]


def test_damage_of_any_file_is_seen_and_the_checkpoint_before_is_taken(tmp_path, said):
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    save(run_dir, {1: 3.0, 2: 4.0})
    for path in listed(run_dir, 2):
        item = path.relative_to(run_dir / "ckpt/2").parts[0]
        if item == "metrics":
            continue
        for content in damages(path.read_bytes()):
            if (item, content) == ("digests.json", None):
                continue  # A checkpoint of an older version.
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(run_dir, copy)
            damaged = copy / path.relative_to(run_dir)
            damaged.unlink()
            if content is not None:
                damaged.write_bytes(content)
            is_of_weights = item in ("weights", "digests.json")
            assert checkpoint.find(copy)[1] == (1 if is_of_weights else 2)
            if is_of_weights:
                with pytest.raises(UserError, match=f"ckpt/2.*{damaged.name}"):
                    checkpoint.load_weights(copy / "ckpt/2")
                assert_same(checkpoint.load_weights(copy), items_at(1)["weights"])
            if item == "meta":
                with pytest.raises(UserError, match="meta/metadata"):
                    checkpoint.read_saved_meta(copy, 2)
            assert digests.damage(copy / "ckpt/2", item)
    assert "falling back to the one before, step 1" in said()[-1]


@pytest.mark.parametrize(
    "name",
    ["digests.json", "meta/metadata", "weights/manifest.ocdbt", "metrics/metrics"],
)
def test_a_checkpoint_that_may_not_be_read_is_not_damaged_and_stays(
    name, tmp_path, monkeypatch
):
    save(tmp_path, {1: 3.0, 2: 4.0})

    def refuse(path, *arguments):
        if f"{path}".endswith(f"ckpt/2/{name}"):
            raise PermissionError(13, "Permission denied", f"{path}")
        return open(path, *arguments)

    for module in (files, json_files):
        monkeypatch.setattr(module, "open", refuse, raising=False)
    with pytest.raises(UserError, match=f"ckpt/2/{name}: permission denied: change"):
        restore(tmp_path)
    if name in ("digests.json", "weights/manifest.ocdbt"):
        with pytest.raises(UserError, match=f"{name}: permission denied: change"):
            checkpoint.find(tmp_path)
    monkeypatch.undo()
    assert restore(tmp_path)[1] == 2


def test_a_damaged_list_of_digests_is_named_and_says_what_leaving_it_out_means(
    tmp_path, said
):
    save(tmp_path, {1: 3.0, 2: 4.0})
    path = tmp_path / "ckpt/2/digests.json"
    content = json.loads(path.read_text())
    content["files"]["weights/_METADATA"]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    damage = f"{path} is damaged (its content was changed since"
    unchecked = "delete it to read the checkpoint unchecked"
    assert checkpoint.find(tmp_path)[1] == 1
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / "result.json", {"status": "done", "steps": 2})
    with pytest.raises(UserError, match="step 2, is damaged") as caught:
        fingerprint.of(tmp_path)
    for message in (said()[0], str(caught.value)):
        assert damage in message
        assert unchecked in message
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "ckpt", whole / "ckpt")
    (whole / "ckpt/2/digests.json").unlink()
    assert checkpoint.find(whole)[1] == restore(whole)[1] == 2
    assert restore(tmp_path)[1] == 1
    assert f"{damage}" in said()[-1]
    assert f"{unchecked}): falling back" in said()[-1]


@pytest.mark.parametrize(
    "name", ["_METADATA", "manifest.ocdbt", "_sharding", "d", "", ".."]
)
def test_damaged_weights_without_digests_are_named_and_those_before_are_taken(
    name, tmp_path, said
):
    save(tmp_path, {1: 3.0, 2: 4.0})
    folder = tmp_path / "ckpt/2"
    (folder / "digests.json").unlink()
    damaged = folder / "weights" / name
    if name == "..":  # What is left when a command is killed in the midst.
        shutil.rmtree(folder)
        folder.mkdir()
    elif name:
        for path in damaged.glob("*") if damaged.is_dir() else [damaged]:
            os.truncate(path, path.stat().st_size // 3)
    else:
        shutil.rmtree(damaged)
    with pytest.raises(UserError, match=f"{folder}/weights") as caught:
        checkpoint.load_weights(folder)
    assert "NoneType" not in str(caught.value)
    assert_same(checkpoint.load_weights(tmp_path), items_at(1)["weights"])
    assert restore(tmp_path)[1] == 1
    assert f"{folder}/weights" in said()[0]


def test_checkpoints_that_are_moved_aside_in_one_second_have_two_names(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(files.time, "strftime", str)
    for _ in range(2):
        save(tmp_path, {1: 3.0, 2: 4.0})
        damage(tmp_path, 2)
        assert restore(tmp_path)[1] == 1
        shutil.rmtree(tmp_path / "ckpt/1")
    assert len(list(tmp_path.glob("ckpt/2.damaged-*/weights"))) == 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("item", ["weights", "optimizer"])
def test_values_that_are_not_finite_are_not_restored(item, value, tmp_path, said):
    save(tmp_path, {1: 3.0})
    items = items_at(2)
    items[item] = jax.tree.map(
        lambda x: np.full(x.shape, np.float32(value)), items[item]
    )
    with Checkpoints(tmp_path, keep_last=2) as checkpoints:
        checkpoints.save(2, items, {"at": 2})
        checkpoints.wait()
    if item == "weights":
        with pytest.raises(UserError, match=f"holds {value} at"):
            checkpoint.load_weights(tmp_path / "ckpt/2")
    assert restore(tmp_path)[1] == 1
    assert "not finite" in said()[-1]


@pytest.mark.parametrize("name", ["metrics/metrics", "_CHECKPOINT_METADATA"])
@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"{"])
def test_damaged_notes_on_a_checkpoint_lose_only_themselves(
    name, content, tmp_path, said
):
    save(tmp_path, {1: 3.0, 2: 4.0})
    (tmp_path / "ckpt/2" / name).write_bytes(content)
    assert restore(tmp_path)[1] == 2
    assert f"ckpt/2/{name}" in said()[0]
    item, *file = name.split("/")
    kept = tmp_path / "ckpt/2" / "/".join([f"{item}.damaged", *file])
    assert kept.read_bytes() == content


def test_the_best_checkpoint_stays_the_best_if_its_digests_are_damaged(tmp_path):
    save(tmp_path, {1: 1.0, 2: 3.0})
    (tmp_path / "ckpt/1/digests.json").write_text("{")
    save(tmp_path, {3: 2.0, 4: 2.5})
    assert checkpoint.steps(tmp_path) == [1, 4]


def test_a_checkpoint_without_digests_is_one_of_an_older_version(tmp_path):
    save(tmp_path, {1: 3.0})
    (tmp_path / "config.json").write_text("{}")
    known = fingerprint.of(tmp_path)
    (tmp_path / "ckpt/1/digests.json").unlink()
    assert restore(tmp_path)[1] == 1
    assert fingerprint.of(tmp_path) == known


def test_weights_larger_than_their_files_are_refused_before_memory_is_taken(
    tmp_path, monkeypatch
):
    save(tmp_path, {1: 3.0})
    monkeypatch.setattr(array_files, "_ALWAYS_ALLOWED", 0)
    monkeypatch.setattr(array_files, "_LARGEST_RATIO", 0.001)
    with pytest.raises(UserError, match="declares arrays of 36 bytes"):
        checkpoint.load_weights(tmp_path)


# Fingerprints


def test_a_fingerprint_is_that_of_the_weights(tmp_path):
    run_dir = tmp_path / "run"
    save(run_dir, {1: 1.0, 2: 2.0})
    (run_dir / "config.json").write_text(json.dumps({"model": {"n_head": 2}}))
    one, two = (fingerprint.of(run_dir / f"ckpt/{n}") for n in (1, 2))
    assert one != two == fingerprint.of(run_dir)
    # The same numbers, at another time and place.
    save(tmp_path / "again", {2: 5.0})
    shutil.copy(run_dir / "config.json", tmp_path / "again")
    write_json(tmp_path / "again" / "result.json", {"seconds": 3, "steps": 2})
    assert fingerprint.of(tmp_path / "again") == two
    (run_dir / "config.json").write_text(json.dumps({"model": {"n_head": 4}}))
    assert fingerprint.of(run_dir) != two


def test_a_fingerprint_contains_knobs_that_the_weights_do_not_show(
    tmp_path, monkeypatch
):
    """A default does not enter: a hash of a version without the knob stays."""
    save(tmp_path, {1: 1.0})
    model = {"n_head": 2, "n_layer": 1, "dropout": 0.0}
    write_record(tmp_path, {"model": model})
    arrays = digests.arrays(tmp_path / "ckpt" / "1")
    text = json.dumps({"arrays": arrays, "n_head": 2}, sort_keys=True)
    older = hashlib.sha256(text.encode()).hexdigest()
    # As if it were a knob of the blocks.
    monkeypatch.setattr(fingerprint, "BLOCK_KNOBS", (*BLOCK_KNOBS, "dropout"))
    assert fingerprint.of(tmp_path) == older
    write_record(tmp_path, {"model": model | {"dropout": 0.5}})
    assert fingerprint.of(tmp_path) != older


def test_a_fingerprint_of_an_older_version_still_counts(tmp_path):
    save(tmp_path, {1: 1.0})
    (tmp_path / "config.json").write_text("{}")
    manifest = (tmp_path / "ckpt/1/weights/manifest.ocdbt").read_bytes()
    unfinished = hashlib.sha256(b"step 1\n{}" + manifest).hexdigest()
    assert fingerprint.same(tmp_path, unfinished)
    (tmp_path / "result.json").write_text('{"steps": 1}')
    finished = hashlib.sha256(b'step 1\n{"steps": 1}').hexdigest()
    assert fingerprint.same(tmp_path, finished)
    assert fingerprint.same(tmp_path, fingerprint.of(tmp_path))
    for other in (unfinished, "", None):
        assert not fingerprint.same(tmp_path, other)


def test_a_finished_run_without_its_last_checkpoint_is_not_started_from(tmp_path):
    save(tmp_path, {1: 1.0, 2: 2.0})
    (tmp_path / "config.json").write_text("{}")
    write_json(tmp_path / "result.json", {"status": "done", "steps": 2})
    damage(tmp_path, 2)
    with pytest.raises(
        UserError,
        match=r"last checkpoint .* step 2, is damaged or .* \(.*weights.*\): delete",
    ):
        fingerprint.of(tmp_path)
    assert fingerprint.of(tmp_path / "ckpt/1")


# Other numbers of devices


def restart(run_dir, workdir, at):
    """Copies a finished run back to a checkpoint, without its result."""
    copy = Path(workdir) / run_dir.name
    shutil.copytree(run_dir, copy)
    (copy / "result.json").unlink()
    for step in checkpoint.steps(copy):
        if step > at:
            shutil.rmtree(copy / "ckpt" / str(step))
    return copy


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_what_any_number_of_devices_saves_any_other_restores(tiny_config, tmp_path):
    counts = (1, 2, 4, 8)
    on = {n: setup(changed(tiny_config, **{"mesh.fsdp": n})) for n in counts}
    for saving in counts:
        run_dir = tmp_path / f"{saving}"
        state, _ = start(on[saving], run_dir)
        wanted = jax.tree.map(np.asarray, state.checkpoint_items)
        assert len(leaf_of(state.checkpoint_items).sharding.device_set) == saving
        with Checkpoints(run_dir, keep_last=1) as checkpoints:
            checkpoints.save(1, state.checkpoint_items, {"history": {}})
            checkpoints.wait()
        for restoring in counts:
            found, _ = start(on[restoring], run_dir)
            assert len(leaf_of(found.checkpoint_items).sharding.device_set) == restoring
            assert_same(found.checkpoint_items, wanted)


def leaf_of(items):
    """An array that 'fsdp' splits."""
    return items["weights"]["params"]["embed"]["band_0"]["wte"]


@pytest.mark.usefixtures("quick")
def test_a_run_saved_on_8_devices_resumes_on_1_with_the_same_numbers(
    tiny_config, tmp_path
):
    on_8 = changed(
        tiny_config,
        **{"mesh.data": 2, "mesh.fsdp": 4, "checkpoint.keep_last": 2},
    )
    run_dir = execute(on_8)
    params = checkpoint.load_weights(run_dir / "ckpt/3")["params"]
    assert params["embed"]["band_0"]["wte"].shape == (128, 32)

    moved_dir = restart(run_dir, tmp_path / "moved", at=3)
    on_1 = {"mesh.data": 1, "mesh.fsdp": 1, "workdir": str(tmp_path / "moved")}
    assert execute(changed(on_8, **on_1)) == moved_dir
    stays, moves = saved_state(run_dir), saved_state(moved_dir)
    assert stays.keys() == moves.keys()
    for name, array in stays.items():
        np.testing.assert_allclose(moves[name], array, rtol=1e-4, atol=1e-6)
    seen = [(m["step"], m["split"], m["loss"]) for m in metrics(run_dir)]
    for (step, split, loss), line in zip(seen, metrics(moved_dir), strict=True):
        assert (line["step"], line["split"]) == (step, split)
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
