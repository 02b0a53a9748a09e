"""What is exported: a model's tensors in the names of transformers, and its table.

Shape letters: V vocabulary, D model width, K rank.
"""

import functools
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from pcagpt import coding, trees
from pcagpt.compression import stored_tensors
from pcagpt.compression.codes import KINDS, Codes
from pcagpt.compression.read_table import read_table
from pcagpt.config import Settings
from pcagpt.data import hugging_face_tokenizer, vocabulary
from pcagpt.data.tokenizer import RANKS
from pcagpt.data.tokenizer_settings import CONFIG
from pcagpt.data.vocabulary_files import DAMAGED
from pcagpt.errors import UserError, warn_once
from pcagpt.factorization import BandFactors, FactorizedTable
from pcagpt.file_hashes import sha256_of_file
from pcagpt.json_files import read_json
from pcagpt.methods import CODED
from pcagpt.model import (
    BandLeaves,
    PackedBand,
    SharedArrays,
    token_order,
)
from pcagpt.run import (
    exported,
    generation_files,
    hugging_face,
    hugging_face_files,
    other_decoder,
)
from pcagpt.run.folder import read_record
from pcagpt.run.gpt2_names import PREFIX, TABLE
from pcagpt.run.own_tokens import OwnTokens, sha256_of_texts
from pcagpt.run.trained import Run

# Files of a model's folder that come along: config of generation, tokenizer, licence.
# Its own files are written anew; it may be an export itself.
_OWN = (hugging_face.CONFIG, hugging_face.INDEX, exported.FILE)
_BESIDE = (
    "*.json", "*.txt", "*.model", "*.model.v*", "*.spm", "*.jinja", "*.tiktoken",
    "LICENSE*",
)  # fmt: skip


class ExportedTable(NamedTuple):
    """A table in bands; the head of a band may have a scale matrix of its own."""

    order: np.ndarray  # [V], the token at each position
    bands: tuple[BandLeaves, ...]
    mean: np.ndarray | None  # [D], added to each row

    @property
    def is_tied(self) -> bool:
        """Whether input and head have the same table."""
        return all(band.scale_down is None for band in self.bands)

    @property
    def is_full(self) -> bool:
        """Whether it is one full table, without factors."""
        return len(self.bands) == 1 and self.bands[0].scale_up is None

    def table(self) -> FactorizedTable:
        """The table of the input."""
        bands = tuple(BandFactors(band.wte, band.scale_up) for band in self.bands)
        return FactorizedTable(self.order.astype(np.int32), bands, self.mean)

    def dense(self) -> np.ndarray:
        """The table of the input by token id: float32 [V, D]."""
        return self.table().dense()


class Source(Protocol):
    """A model that can be exported.

    folder: where it is; record: how it was made; identity: what tells it from others;
    architecture: the class of transformers; table_name: of its table among tensors;
    coded: the file of a coded table, or None;
    tokenizer_sha256: None without a tokenizer of a name; tokens: `OwnTokens.identity`.
    """

    folder: Path
    record: dict[str, Any]
    identity: dict[str, Any]
    architecture: str
    table_name: str
    table: ExportedTable | Codes
    coded: Path | None
    tokenizer_sha256: str | None
    tokens: dict[str, Any]

    @property
    def tensors(self) -> dict[str, np.ndarray]:
        """{name: array} of all weights but the table."""

    def config(self) -> dict[str, Any]:
        """config.json of transformers."""

    def write_beside(self, folder: Path) -> None:
        """Writes the tokenizer and the settings of generation."""

    def check_unchanged(self) -> None:
        """Raises UserError if the model was replaced since it was opened."""


def open_source(settings: Settings) -> Source:
    """The model in `model_path`; UserError if it cannot be exported."""
    folder = Path(settings.model_path)
    record = read_record(folder) if folder.is_dir() else None
    # Such a table has no ckpt/, which `Run.open` needs and compares with the record.
    if record and "architecture" in record:
        return DecoderSource(folder, record, settings.data.tokenizer)
    return RunSource(Run.asked(settings), settings.data.tokenizer)


def _told(tokens: OwnTokens, name: str | None) -> dict[str, Any]:
    """The identity of tokens, with a tokenizer that was asked for.

    Its path stays here, because an export may be published.
    """
    own = tokens.identity
    if name:
        own |= {"tokenizer": name, "tokenizer_sha256": vocabulary.describe(name).sha256}
    return own | {"tokenizer": own["tokenizer"] if own["tokenizer"] in RANKS else None}


class RunSource:
    """A run: a GPT-2 of our own or of another program; implements `Source`."""

    architecture, table_name = hugging_face.ARCHITECTURES[0], PREFIX + TABLE

    def __init__(self, run: Run, tokenizer: str):
        self.run, self.folder, self.record = run, run.folder, run.record
        self.identity = {"step": run.step, "fingerprint": run.fingerprint}
        self._tokenizer = run.tokens.tokenizer_name(tokenizer)
        self.tokenizer_sha256 = None
        if texts := self.record.get("characters"):
            self.tokenizer_sha256 = sha256_of_texts(texts)
        elif self._tokenizer:
            self.tokenizer_sha256 = vocabulary.describe(self._tokenizer).sha256
        self.tokens = _told(run.tokens, self._tokenizer)
        self.check_unchanged = run.check_unchanged
        self._config = run.config(run.settings.model)
        self._variables = run.variables(self._config)

    @functools.cached_property
    def table(self) -> ExportedTable | coding.PackedTable:
        """The table as the run stores it; the mean of a centred one is in `wpe`."""
        config, constants = self._config, self._variables["constants"]
        order_V = token_order(constants, config.vocab_size)
        of_bands = [f"band_{number}" for number in range(len(config.bands))]
        if config.band_blocks:
            shared = SharedArrays(**constants["embed"]["directions"])
            return coding.PackedTable(
                order_V,
                tuple(
                    PackedBand(
                        shared=shared,
                        blocks=band.blocks,
                        start=band.start,
                        size=band.size,
                        **constants["embed"][name],
                    )
                    for name, band in zip(of_bands, config.bands, strict=True)
                ),
            )
        bands = []
        for name, band in zip(of_bands, config.bands, strict=True):
            leaves = BandLeaves(**self._variables["params"]["embed"][name])
            down = leaves.scale_down
            if down is not None and np.array_equal(down, leaves.scale_up):
                down = None
            rows = leaves.wte[: band.size]
            bands.append(leaves._replace(wte=rows, scale_down=down))
        return ExportedTable(order_V, tuple(bands), None)

    @functools.cached_property
    def coded(self) -> Path | None:
        """The coded file of the run's table; UserError if it holds another table."""
        if (self.record.get("compressed") or {}).get("method") != CODED:
            return None
        path = self.folder / KINDS[CODED].file
        if not np.array_equal(coding.read(path)[0].dense(), self.run.table()):
            raise UserError(
                f"{path} is another table than the one of {self.folder}: compress the "
                "model again"
            )
        return path

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """As `Source.tensors`."""
        return hugging_face_files.tensors(trees.flatten(self._variables["params"]))

    def config(self) -> dict[str, Any]:
        """As `Source.config`."""
        more = self._generation[hugging_face.CONFIG]
        return hugging_face_files.config(
            self.run.settings.model, self._config.vocab_size, more
        )

    @functools.cached_property
    def _generation(self) -> dict[str, dict[str, Any]]:
        if not self._tokenizer:
            return generation_files.written(self.record, None)
        tokenizer = vocabulary.load(self._tokenizer)
        known = np.flatnonzero(vocabulary.ids_with_text(tokenizer))
        textless = np.setdiff1d(np.arange(self._config.vocab_size), known).tolist()
        return generation_files.written(self.record, tokenizer.eot_token, textless)

    def write_beside(self, folder: Path) -> None:
        """As `Source.write_beside`."""
        name = generation_files.FILE
        hugging_face_files.write_config(folder, self._generation[name], name)
        if texts := self.record.get("characters"):
            hugging_face_tokenizer.write_characters(folder, texts)
        elif self._tokenizer:
            kept = self.record.get(generation_files.FIELD) or {}
            own = kept.get(generation_files.TOKENIZER) or {}
            length, own = self._config.block_size, own.get(self._tokenizer)
            hugging_face_tokenizer.write(folder, self._tokenizer, length, own)
            named = read_json(folder / CONFIG, DAMAGED) or {}
            if named.get("auto_map"):
                warn_once(
                    f"{self.folder}: an export has no code of its tokenizer, which "
                    f"auto_map in {CONFIG} names: copy it, or remove the field"
                )


class DecoderSource:
    """The compressed table of a model of another architecture; implements `Source`.

    The other weights are in the folder of the original model. So is its tokenizer, or
    the table's record names one, or `tokenizer` does.
    """

    def __init__(self, folder: Path, record: dict[str, Any], tokenizer: str):
        self.folder, self.record = folder, record
        made = record.get("compressed") or {}
        self.architecture = record["architecture"]
        if not made.get("run"):
            raise other_decoder.refusal(folder, self.architecture)
        places = (made["run"], folder / made.get("run_from_here", made["run"]))
        there = [path for place in places if (path := Path(place).resolve()).exists()]
        if not there:
            raise UserError(
                f"{folder} is a table of the model in {made['run']}, which is gone: "
                "restore that folder, or compress the model again"
            )
        for place in there:
            self.original = Run.open(place, any_architecture=True)
            if self.original.is_at(made.get("fingerprint")):
                break
        else:
            raise UserError(
                f"{folder} is a table of another model than the one in "
                f"{self.original.folder}: compress that one, or restore the first"
            )
        self.table, self.coded = read_table(folder, made), None
        identity = {"table_sha256": made.get("table_sha256")}
        if isinstance(found := self.table, FactorizedTable):
            bands = tuple(BandLeaves(band.wte, band.scale) for band in found.bands)
            self.table = ExportedTable(found.order, bands, found.mean)
        else:
            path = folder / KINDS[made["method"]].file
            self.coded = path if made["method"] == CODED else None
            identity = {"table_sha256": sha256_of_file(path)}
        self.identity = {"fingerprint": self.original.fingerprint, **identity}
        self.tokenizer_sha256 = own = self.original.record.get("tokenizer_sha256")
        is_named = tokenizer != "auto" or record.get("tokenizer")
        is_told = not own and (is_named or record.get("characters"))
        if not is_told and record.get("tokenizer_sha256") not in (None, own):
            raise UserError(
                f"{self.original.folder} has another tokenizer than when {folder} was "
                "made from it: restore it, or compress the model again"
            )
        tokens = self.original.tokens if own else OwnTokens(folder, record)
        name = tokens.tokenizer_name(tokenizer)
        self._tokenizer = None if own else name  # Its own files are copied.
        self._characters = None if own else record.get("characters")
        if self._tokenizer:
            self.tokenizer_sha256 = vocabulary.describe(self._tokenizer).sha256
        elif self._characters:
            self.tokenizer_sha256 = record.get("tokenizer_sha256")
        self.tokens = _told(tokens, name)
        self.check_unchanged = self.original.check_unchanged
        self.table_name, self._names = self._find_table()

    def _find_table(self) -> tuple[str, dict[str, Path]]:
        """(name of the table, {name: file} of the other tensors without its copies)."""
        if not self.original.folder.is_dir():
            raise UserError(
                f"{self.original.folder} is a GGUF file: only models in folders with "
                "safetensors are exported"
            )
        side = self.record["compressed"].get("side")
        names, tables = stored_tensors.find(self.original.folder)
        table = stored_tensors.table_among(tables, side, self.original.folder)
        copies = {table}
        if not side and len(tables) > 1:  # A head that is stored, too.
            values = stored_tensors.read(names, tables)
            equal = (np.array_equal(values[table], values[name]) for name in tables)
            copies = {name for name, same in zip(tables, equal, strict=True) if same}
        return table, {name: at for name, at in names.items() if name not in copies}

    @functools.cached_property
    def tensors(self) -> dict[str, np.ndarray]:
        """As `Source.tensors`: those of the original, in their own types."""
        return stored_tensors.read(self._names, self._names)

    def config(self) -> dict[str, Any]:
        """As `Source.config`: that of the original, with its type added if it has none.

        Without it, transformers takes the type of a tensor, which may be the new table.
        """
        folder = self.original.folder
        stored = read_json(folder / hugging_face.CONFIG, "") or {}
        if not (stored.get("dtype") or stored.get("torch_dtype")):
            stored["dtype"] = stored_tensors.dtype_of(folder)
        return stored | {
            "tie_word_embeddings": not self.record["compressed"].get("side")
        }

    def write_beside(self, folder: Path) -> None:
        """As `Source.write_beside`: copies the small files of the original.

        Instead of files of a tokenizer that the original lacks, it writes that one.
        Code is not copied: a line names it.
        """
        code = sorted(path.name for path in self.original.folder.glob("*.py"))
        if code:
            warn_once(
                f"{self.original.folder}: an export has no code of its model, so "
                f"{', '.join(code)} is not in it: if its tokenizer needs this, copy it"
            )
        is_written = self._characters or self._tokenizer
        left_out = (*_OWN, *(hugging_face_tokenizer.FILES if is_written else ()))
        for pattern in _BESIDE:
            for path in self.original.folder.glob(pattern):
                if path.is_file() and path.name not in left_out:
                    shutil.copyfile(path, folder / path.name)
        if self._characters:
            hugging_face_tokenizer.write_characters(folder, self._characters)
        elif self._tokenizer:
            length = self.config().get("max_position_embeddings")
            hugging_face_tokenizer.write(folder, self._tokenizer, length)
