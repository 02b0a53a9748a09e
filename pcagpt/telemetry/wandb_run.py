"""A run in Weights & Biases."""

import contextlib
import html
import io
import os
import re
import secrets
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pcagpt.errors import UserError, warn_once
from pcagpt.files import odd_kind, write_first, write_text

GROUP_FILE, _ID_FILE = "wandb_group", "wandb_id"


def import_wandb() -> ModuleType:
    """Imports the optional package wandb; UserError if it is not installed."""
    try:
        import PIL.Image  # noqa: F401 - wandb needs it for pictures.
        import wandb
    except ImportError as error:
        raise UserError(
            f"telemetry.wandb needs the package {error.name}, which is not installed: "
            "pip install 'pcagpt[wandb]', or --config.telemetry.wandb=False"
        ) from None
    return wandb


class WandbRun:
    """What one folder holds, as a run in W&B.

    All runs of a workdir are one group. The file `wandb_group` there has its name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        workdir: Path,
        project: str,
        job: str,
        config: Mapping[str, Any],
        continues: bool,
    ):
        """Starts a run, or continues that of the folder's wandb_id; says where it is.

        A moved folder continues its run, a copy begins a new one. Raises UserError if
        W&B does not start.
        """
        wandb = import_wandb()
        folder.mkdir(parents=True, exist_ok=True)
        known = _id_of(folder) if continues else ""
        own = folder.is_relative_to(workdir)
        name = folder.relative_to(workdir).as_posix() if own else folder.name
        try:
            self._run = wandb.init(
                project=project,
                group=_group(workdir),
                job_type=job,
                name=name,
                id=known or None,
                resume="allow" if known else None,
                dir=str(folder),
                config=dict(config),
                # W&B's capture of the console would break the progress bar.
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"W&B did not start: {reason}; log in with `wandb login`, correct "
                "telemetry.wandb_project, set WANDB_MODE=offline, or switch it off "
                "with --config.telemetry.wandb=False"
            ) from None
        try:
            place = os.fsencode(folder.resolve()).decode("utf-8", "replace")
            write_text(folder / _ID_FILE, f"{self._run.id}\n{place}\n")
        except OSError:
            self.close(has_failed=True)
            raise
        # W&B ignores entries with a step below its own counter, but a resumed run
        # writes such entries. So our step is a metric, and it is the x-axis of all
        # other metrics.
        self._run.define_metric("*", step_metric="step")
        if self._run.offline:
            # Its path ends in files/.
            kept = Path(self._run.dir).parent
            print(
                f"W&B of {name}, offline: {kept}; upload it with: "
                f"wandb sync {shlex.quote(str(kept))}",
                flush=True,
            )
        elif url := self._run.url:
            print(f"W&B of {name}: {url}", flush=True)

    def scalars(self, values: Mapping[str, float]) -> None:
        """Adds a point to each curve; `values` also has the step."""
        self._run.log(dict(values))

    def text(self, tag: str, text: str, step: int) -> None:
        """Adds plain text."""
        import wandb

        page = f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self._run.log({"step": step, tag: wandb.Html(page)})

    def table(self, tag: str, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
        """Adds a table."""
        import wandb

        data = [list(row) for row in rows]
        found = wandb.Table(columns=list(columns), data=data, allow_mixed_types=True)
        self._run.log({"step": 0, tag: found})

    def picture(self, tag: str, png: bytes) -> None:
        """Adds a PNG file as an image."""
        import PIL.Image
        import wandb

        with PIL.Image.open(io.BytesIO(png)) as image:
            self._run.log({"step": 0, tag: wandb.Image(image)})

    def session(self, values: Mapping[str, Any]) -> None:
        """Adds columns to the table of runs."""
        self._run.config.update(dict(values), allow_val_change=True)

    def end(self, numbers: Mapping[str, float]) -> None:
        """Sets the final numbers."""
        self._run.summary.update(dict(numbers))

    def close(self, has_failed: bool) -> None:
        """Ends the run."""
        self._run.finish(exit_code=1 if has_failed else 0)


def share_group(workdir: Path, other: Path) -> None:
    """Puts the runs of a folder into the group of a workdir, unless it has its own."""
    if not (other / GROUP_FILE).exists():
        write_text(other / GROUP_FILE, _group(workdir) + "\n")


def _group(workdir: Path) -> str:
    """The group of a workdir's runs; a new workdir gets a new one."""
    workdir.mkdir(parents=True, exist_ok=True)
    path, name = workdir / GROUP_FILE, workdir.resolve().name
    # A name may hold line breaks, and bytes that are no text.
    new = "".join(sign if _is_name(sign) else "_" for sign in name)
    if not path.exists():  # Another command may begin there at the same time.
        write_first(path, f"{new}-{secrets.token_hex(4)}\n")
    if known := _name_in(path):
        return known
    kind = odd_kind(path)
    problem = f"is {kind}" if kind else "holds no name of a group"
    raise UserError(f"{path} {problem}: remove it, to begin a new group")


def _id_of(folder: Path) -> str:
    """The id of a folder's run; '' if it has none, or the folder is a copy.

    wandb_id also holds the place that the folder had: a copy has the id of another
    folder that is still there.
    """
    known, place = _id_and_place(folder)
    if re.search(r"[/\\#?%:\s]", known):  # W&B would refuse it for ever.
        return ""
    if not place:  # Of an earlier version.
        return known
    with contextlib.suppress(OSError, ValueError):  # It is gone.
        if not folder.samefile(place) and known == _id_and_place(Path(place))[0]:
            warn_once(f"{folder} is a copy of {place}: it begins a new run in W&B")
            return ""
    return known


def _id_and_place(folder: Path) -> tuple[str, str]:
    known, _, place = _text_in(folder / _ID_FILE).partition("\n")
    return known if _is_name(known) else "", place


def _name_in(path: Path) -> str:
    """The name in a file; '' if it is missing, or not a line of text."""
    text = _text_in(path)
    return text if _is_name(text) else ""


def _text_in(path: Path) -> str:
    if not path.is_file():
        return ""
    return path.read_bytes().decode("utf-8", "replace").strip()


def _is_name(text: str) -> bool:
    return text.isprintable() and "\ufffd" not in text
