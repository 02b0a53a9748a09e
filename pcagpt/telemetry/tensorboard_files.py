"""Event files for TensorBoard, and the files of its embedding projector."""

import contextlib
import hashlib
import math
import re
import socket
import tempfile
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt.errors import UserError, naming
from pcagpt.file_hashes import sha256_of_file
from pcagpt.files import keep_copy, unused_name, write_file
from pcagpt.json_files import read_json, write_json

# TensorBoard opens on the group that is the first in the alphabet: this one alone.
VAL_LOSS = "loss/val"
# {category: {chart: [kind, patterns of tags]}}; a chart shows all runs.
_CHARTS = {
    "loss": {
        "validation loss of all models": ["Multiline", [f"{VAL_LOSS}$"]],
        "training loss of all models": ["Multiline", ["train/loss$"]],
    },
    "training": {
        "learning rate": ["Multiline", ["train/learning_rate$"]],
        "gradient norm": ["Multiline", ["train/gradient_norm$"]],
        "tokens per second": ["Multiline", ["train/tokens_per_second$"]],
    },
}
_SECOND = re.compile(r"events\.out\.tfevents\.(\d{10})\.")  # when a file was begun
_OURS = re.compile(r"\.\d{19}$")  # the ends of the names of our files
_TEXT_WIDTH = 100  # characters
_FLUSH_SECONDS = 30  # A person who looks on waits so long at most.
# Where TensorBoard looks for the projector's files in a run's folder.
_PROJECTOR = Path("plugins", "org_tensorflow_tensorboard_projector")
_OWN = "written.json"  # hashes of what `write_projector` wrote


class TensorBoard:
    """Event files of one folder, which is a run in TensorBoard."""

    def __init__(self, folder: Path, first_step: int):
        """Drops what older files of the folder have from `first_step` on."""
        # SummaryWriter would hand everything to a thread, which ends at an error, such
        # as a full disk. Whoever adds more would then wait forever.
        from tensorboardX import RecordWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        found = [*folder.glob("events.out.tfevents.*")]
        older = [path for path in found if _OURS.search(path.name)]
        self.is_new = not (older and first_step)
        if self.is_new:
            # TensorBoard would go on showing their columns and rows of HPARAMS: of
            # these, it keeps the first, also if a later file drops them.
            for path in older:  # Another command may do the same.
                path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._flushed = folder, time.monotonic()
        # TensorBoard reads files in the order of their names. The clock may be behind
        # that of the machine that wrote the last one.
        named = [int(name[1]) for path in found if (name := _SECOND.match(path.name))]
        second = max([int(time.time()), *(last + 1 for last in named)])
        # The end tells two writers apart that begin in the same second.
        name = f"{second}.{socket.gethostname()}.{time.time_ns()}"
        self._events = RecordWriter(str(folder / f"events.out.tfevents.{name}"))
        self._write(file_version="brain.Event:2")
        begin = SessionLog(status=SessionLog.START)
        self._write(session_log=begin, step=first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Adds a point to the curve of each tag."""
        from tensorboardX.summary import scalar

        for tag, value in values.items():
            self._add(scalar(tag, value), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Adds plain text, in lines of a limited width."""
        lines = [
            line
            for whole in text.splitlines()
            for line in textwrap.wrap(whole, _TEXT_WIDTH, break_on_hyphens=False)
            or [""]
        ]
        self._markdown(tag, textwrap.indent("\n".join(lines), "    "), step)

    def table(self, tag: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
        """Adds a table to the texts."""
        whole = [columns, ["---"] * len(columns), *rows]
        cells = ([str(cell).replace("|", r"\|") for cell in row] for row in whole)
        lines = (f"| {' | '.join(row)} |" for row in cells)
        self._markdown(tag, "\n".join(lines))

    def picture(self, tag: str, png: bytes) -> None:
        """Adds a PNG file as an image."""
        from tensorboardX.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(png[n : n + 4], "big") for n in (16, 20))
        image = Summary.Image(
            width=width, height=height, colorspace=4, encoded_image_string=png
        )
        self._add(Summary(value=[Summary.Value(tag=tag, image=image)]))

    def charts(self) -> None:
        """Adds the charts of the page 'Custom Scalars', which overlay all runs."""
        from tensorboardX.summary import custom_scalars

        self._add(custom_scalars(_CHARTS))

    def columns(self, examples: Mapping[str, Any]) -> None:
        """Names the columns of HPARAMS, for all runs below the folder above.

        `examples` has a value of each column; its type counts. The validation loss is
        one more column.
        """
        # `add_hparams` would name the columns of each run anew, and draw a chart for
        # each final number.
        named, _, _ = _hparams(examples, [VAL_LOSS])
        self._add(named)

    def session(self, values: Mapping[str, Any]) -> None:
        """Adds the run to HPARAMS; None is an empty cell."""
        _, begun, _ = _hparams(values, [])
        self._add(begun)

    def end_session(self, step: int) -> None:
        """Marks the run in HPARAMS as finished."""
        _, _, ended = _hparams({}, [])
        self._add(ended, step)

    def flush(self) -> None:
        """Returns when everything is on the disk."""
        with naming(self._folder):
            self._events.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Ends the file."""
        self.flush()
        with naming(self._folder):
            self._events.close()

    def _markdown(self, tag: str, text: str, step: int = 0) -> None:
        from tensorboardX import summary

        self._add(summary.text(tag, text), step)

    def _add(self, summary: Any, step: int = 0) -> None:
        self._write(summary=summary, step=step)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self.flush()

    def _write(self, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with naming(self._folder):
            event = Event(wall_time=time.time(), **content)
            self._events.write(event.SerializeToString())


def _hparams(values: Mapping[str, Any], metrics: Iterable[str]) -> tuple:
    """Summaries: the columns of HPARAMS, the begin of a run, its end."""
    from tensorboardX.summary import hparams

    plain = {
        name: value
        if isinstance(value, (bool, int, float, str, type(None)))
        else str(value)
        for name, value in values.items()
    }
    return hparams(plain, dict.fromkeys(metrics, 0.0))


def write_projector(
    folder: Path,
    tables: Mapping[str, np.ndarray],
    labels: Sequence[Sequence[Any]],
    header: Sequence[str],
) -> None:
    """Writes tables for the embedding projector; replaces those of the same name.

    A file that a person wrote or changed keeps a second name.

    Args:
      folder: a run in TensorBoard.
      tables: {name: rows [n, D]}; the names are words.
      labels: n tuples of text or numbers, one for each row.
      header: their names.
    """
    from tensorboardX.embedding import append_pbtxt, make_mat, make_tsv

    with tempfile.TemporaryDirectory() as made:
        for name, rows in tables.items():
            (Path(made) / name).mkdir()
            make_tsv(labels, f"{made}/{name}", header)
            make_mat(_rounded(rows), f"{made}/{name}")
            append_pbtxt(labels, None, made, name, 0, name)
        files = (path for path in Path(made).rglob("*") if path.is_file())
        contents = {str(path.relative_to(made)): path.read_bytes() for path in files}
    place = folder / _PROJECTOR
    own = _own_digests(place)
    digests = {n: hashlib.sha256(text).hexdigest() for n, text in contents.items()}
    place.mkdir(parents=True, exist_ok=True)
    # A command that is killed leaves files of several commands.
    begun = {name: [*own.get(name, []), sha256] for name, sha256 in digests.items()}
    write_json(place / _OWN, own | begun)
    for name, content in contents.items():
        path = place / name
        if path.parent.is_symlink():  # Its target is another folder of a person.
            path.parent.rename(unused_name(path.parent, "replaced"))
        path.parent.mkdir(exist_ok=True)
        if path.is_file() and sha256_of_file(path) not in begun[name]:
            keep_copy(path)
        write_file(path, lambda file, c=content: file.write(c))
    ended = {name: [sha256] for name, sha256 in digests.items()}
    write_json(place / _OWN, own | ended)


def _own_digests(place: Path) -> dict[str, list[str]]:
    """{file: hashes of what pcagpt wrote there}."""
    with contextlib.suppress(UserError):
        found = read_json(place / _OWN, "") or {}
        if all(isinstance(digests, list) for digests in found.values()):
            return found
    return {}


def _rounded(rows: np.ndarray) -> np.ndarray:
    """The rows with five digits of the largest value: files a third as long."""
    largest = float(np.abs(rows).max())
    digits = 4 - math.floor(math.log10(largest)) if largest else 0
    return np.asarray(rows, np.float64).round(digits)
