"""Of which model and tokens the files of a table, or of its factors, are.

metadata.json   of a factorization; of a table without its model, what is known of it
pcagpt.json     of an export
config.json     of a compressed model
"""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

from pcagpt.array_files import read_npy
from pcagpt.errors import UserError
from pcagpt.factorization import factor_files
from pcagpt.json_files import check_fields, read_json
from pcagpt.run import exported, fingerprint
from pcagpt.run.folder import choose, read_record
from pcagpt.run.own_tokens import OwnTokens


class Origin(NamedTuple):
    """What is known of a file of a table.

    made: how it was made, {} if unknown; models: fingerprints of the model that it is
    of, and of the one that this was compressed from; tokens: as `OwnTokens.identity`,
    or None.
    """

    made: dict[str, Any]
    models: frozenset[str]
    tokens: dict[str, Any] | None

    @property
    def stored(self) -> dict[str, Any]:
        """The fields for metadata.json of what is made from the file."""
        if not (self.models or self.tokens):
            return {}
        return {"models": sorted(self.models), "tokens": self.tokens}


def origin_of(path: Path) -> Origin:
    """The origin of a factor file, a table or a folder of bands."""
    if (path.parent / factor_files.ORDER_FILE).exists():  # One file of a band
        path = path.parent
    is_bands = (path / factor_files.ORDER_FILE).exists()
    for folder in [path, path.parent] if is_bands else [path.parent]:
        for read in (_of_metadata, _of_export, _of_record):
            with contextlib.suppress(UserError):  # It may be another program's.
                if found := read(folder):
                    return found
    return Origin({}, frozenset(), None)


def _of_metadata(folder: Path) -> Origin | None:
    path = folder / factor_files.METADATA_FILE
    made = read_json(path, "") or {}
    if {"ranks", "unfinished"} & made.keys():
        made = factor_files.read_metadata(folder) or {}
    check_fields(made, {"models": (list, None), "tokens": (dict, None)}, path, "")
    models, tokens = made.get("models"), made.get("tokens")
    if models is not None:
        return Origin(made, frozenset(map(str, models)), tokens)
    if "ranks" not in made:
        return None
    source, sha256 = made.get("source"), made.get("source_sha256")
    if "step" not in made or not sha256:  # of a bare table
        return Origin(made, frozenset(), tokens)
    # Older metadata do not state the tokens, but name the model.
    with contextlib.suppress(UserError):
        if not tokens and source and fingerprint.same(source, sha256):
            tokens = choose(source)[0].stored
    return Origin(made, frozenset([sha256]), tokens)


def _of_export(folder: Path) -> Origin | None:
    path = folder / exported.FILE
    if not (found := read_json(path, "")):
        return None
    fields = {"fingerprint": (str,), "compressed": (list, None), "tokens": (dict, None)}
    check_fields(found, fields, path, "")
    *_, made = found.get("compressed") or [{}]
    tokens, sha256 = found.get("tokens"), found.get("tokenizer_sha256")
    tables = [*folder.glob(factor_files.ORDER_FILE), *folder.glob("*.npy")]
    if not tokens and sha256 and tables:  # An older version states no vocab_size.
        tokens = {"vocab_size": len(read_npy(tables[0])), "tokenizer_sha256": sha256}
    models = {found["fingerprint"], made.get("fingerprint")} - {None}
    return Origin(made, frozenset(models), tokens)


def _of_record(folder: Path) -> Origin | None:
    record = read_record(folder) or {}
    if not (made := record.get("compressed")):
        return None
    models = frozenset(filter(None, [made.get("fingerprint")]))
    return Origin(made, models, OwnTokens(folder, record).identity)
