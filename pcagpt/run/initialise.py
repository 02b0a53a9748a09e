"""Imports initial weights: factor files, or the blocks of another run.

Precedence: a checkpoint of the run itself, then these imports, then random weights.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pcagpt import factorization, trees
from pcagpt.config import Settings
from pcagpt.config.schema import InitSettings
from pcagpt.data.meta import CorpusInfo
from pcagpt.errors import UserError
from pcagpt.factorization import FactorizedTable, factor_files
from pcagpt.model import (
    BLOCK_KNOBS,
    BandLeaves,
    GPTConfig,
    embedding,
    table_leaves,
    without_embedding,
)
from pcagpt.run import fingerprint
from pcagpt.run.origin import origin_of
from pcagpt.run.own_tokens import OwnTokens
from pcagpt.run.trained import Run

# {knob that names a file or run to start from: hash of its content}
IMPORTS: dict[str, Callable[[Path], str]] = {
    "init.import_wte_npy": factor_files.sha256,
    "init.import_scale_matrices_npz": factor_files.sha256,
    "init.import_bands": factor_files.sha256_of_bands,
    "init.blocks_from": fingerprint.of,
    "init.weights_from": fingerprint.of,
    "distill.teacher": fingerprint.of,
}

# What a table and its scale matrices have in common.
_RECIPE = (
    "method", "bands", "singular_value_split", "source_sha256", "calibration_tokens",
    "calibration_sha256", "statistics_sha256",
)  # fmt: skip

# {knob: (knob of the import that it freezes, path pattern of its parameters)}
FREEZES = {
    "import_wte_freeze": ("import_wte_npy", embedding.TABLES),
    "import_scale_matrices_freeze": ("import_scale_matrices_npz", embedding.SCALES),
}


def imported_paths(settings: Settings) -> dict[str, Path]:
    """{knob: path} of every file and run that a run starts from."""
    values = settings.flat()
    return {knob: Path(values[knob]) for knob in IMPORTS if values[knob]}


def import_hashes(settings: Settings, not_made: Collection[str] = ()) -> dict[str, str]:
    """{last part of a knob's name: hash of its import}, without the knobs `not_made`.

    Raises UserError if an import is missing or damaged.
    """
    return {
        knob.split(".")[1]: IMPORTS[knob](path)
        for knob, path in imported_paths(settings).items()
        if knob not in not_made
    }


def known_imports(
    settings: Settings, recorded: Mapping[str, Any] | None
) -> tuple[Settings, dict[str, str | None], list[str]]:
    """Hashes of the imports of a run, as far as they can be read.

    Args:
      settings: of the run.
      recorded: 'imported_sha256' in the record of the run, or None.

    Returns:
      The settings of `with_bands`; the `import_hashes`; the reasons why imports that
      exist cannot be read. The hash of an import that cannot be read is None. If the
      recorded hash matches by an older formula, that hash is returned.
    """
    hashes, damage = {}, []
    for knob, path in imported_paths(settings).items():
        name = knob.split(".")[1]
        old = hashes[name] = None
        try:
            if knob == "init.import_bands":
                settings, _ = with_bands(settings)
            elif IMPORTS[knob] is fingerprint.of:
                old = (recorded or {}).get(name)
            same = old and fingerprint.same(path, old)
            hashes[name] = old if same else IMPORTS[knob](path)
        except UserError as error:
            damage += [str(error)] if path.exists() else []
    return settings, hashes, damage


def frozen_patterns(init: InitSettings) -> tuple[str, ...]:
    """Path patterns of frozen parameters; UserError if their import is missing."""
    has_bands = bool(init.import_bands) and init.keep != "shape"
    patterns = []
    for freeze, (imported, pattern) in FREEZES.items():
        if not getattr(init, freeze):
            continue
        if not (has_bands or getattr(init, imported)):
            raise UserError(
                f"init.{freeze} is on but nothing is imported: set init.{imported}"
            )
        patterns.append(pattern)
    return tuple(patterns)


def with_bands(settings: Settings) -> tuple[Settings, FactorizedTable | None]:
    """Reads `init.import_bands`: (settings with its sizes and ranks, the table).

    Without that import, (the same settings, None).
    """
    if not settings.init.import_bands:
        return settings, None
    table = factor_files.read_bands(settings.init.import_bands)
    bands = {"model.band_sizes": table.sizes, "model.band_ranks": table.ranks}
    return settings.replace(bands), table


def check_rank(settings: Settings) -> None:
    """Raises UserError if `model.n_embd_wte` is not the size of `init.import_bands`.

    The folder and the result of the run state this rank: of a single band that is as
    large as the table. If all bands have full width, a larger rank is accepted, too.
    """
    _, table = with_bands(settings)
    given, one = settings.model.n_embd_wte or 0, (len(table.order), table.width, 1)
    rank = -(-table.parameters // factorization.budget_of_rank(*one))
    if given < rank or (given > rank and any(table.ranks)):
        raise UserError(
            f"model.n_embd_wte is {given or None}, but init.import_bands: "
            f"{settings.init.import_bands} is as large as a table of rank {rank}: set "
            f"--config.model.n_embd_wte={rank}"
        )


def mixed_origins(init: InitSettings) -> str | None:
    """A line if imports are known not to belong together.

    Factors and blocks may be of different models, and factors of two factorizations.
    """
    pair = [*filter(None, (init.import_wte_npy, init.import_scale_matrices_npz))]
    recipes = [made for path in pair if (made := origin_of(Path(path)).made)]
    found = {path: origin_of(path).models for path in _factors(init)}
    models = {path: of for path, of in found.items() if of}
    is_one = not models or bool(frozenset.intersection(*models.values()))
    if init.blocks_from:
        is_one = all(
            any(fingerprint.same(init.blocks_from, one) for one in of)
            for of in models.values()
        )
    named = [*map(str, models), *filter(None, [init.blocks_from])]
    if not is_one:
        return f"{' and '.join(named)} are not of one model"
    other = [
        name for name in _RECIPE if len({str(made.get(name)) for made in recipes}) > 1
    ]
    if not other:
        return None
    return (
        f"{' and '.join(pair)} are not of one factorization, because they differ in "
        f"{', '.join(other)}: their product is not the table of either"
    )


def start_of(settings: Settings) -> str:
    """The model that a run starts from, so that it needs the same tokens; or ''."""
    init = settings.init
    return init.weights_from or init.blocks_from or settings.model_path


def check_tokens(init: InitSettings, corpus: CorpusInfo, asked: str) -> None:
    """Raises UserError if the rows of imported factors are of other tokens.

    It also raises if nothing says which tokens these are. `asked` is the tokenizer that
    the person named, or 'auto'.
    """
    for tokens in tokens_of_factors(init):
        tokens.check_is_told(corpus, asked)
        tokens.check(corpus)


def tokens_of_factors(init: InitSettings) -> list[OwnTokens]:
    """The tokens of each import of factors whose origin is known."""
    known = {path: origin_of(path).tokens for path in _factors(init)}
    return [OwnTokens(at, of) for at, of in known.items() if of and "vocab_size" in of]


def _factors(init: InitSettings) -> list[Path]:
    """The imports that hold factors."""
    names = ("import_wte_npy", "import_scale_matrices_npz", "import_bands")
    return [Path(path) for name in names if (path := getattr(init, name))]


def imported_weights(
    init: InitSettings,
    table: FactorizedTable | None,
    config: GPTConfig,
    params: dict,
    seed: int,
) -> dict[str, np.ndarray]:
    """{parameter path: host array} of all imports.

    `table` is the one in `init.import_bands`, `params` are the random parameters of the
    model, and `seed` is for the random part of the controls (`init.keep`).

    Raises:
      UserError: a file or run does not fit the model.
    """
    new = {}
    imports_files = init.import_wte_npy or init.import_scale_matrices_npz
    if imports_files and len(config.bands) > 1:
        raise UserError(
            "init.import_* files hold one table for all tokens, but this model has "
            f"{len(config.bands)} bands: leave model.band_sizes empty"
        )
    if init.blocks_from:
        new |= _blocks(init.blocks_from, config, params)
    wpe_TD = new.get("wpe", params["wpe"])
    bands = [BandLeaves()] * len(config.bands)
    if table and init.keep != "shape":
        _check_bands(table, init.import_bands, config)
        if init.import_scale_matrices_freeze and not any(table.ranks):
            raise UserError(
                f"init.import_scale_matrices_freeze is on, but {init.import_bands} has "
                "no scale matrices, because all its bands have full width: leave it out"
            )
        new |= with_mean(table.mean, wpe_TD)
        bands = leaves_of(table, config.n_embd_wte_scale_tying)
    if init.import_wte_npy:
        bands = [bands[0]._replace(wte=_table(init.import_wte_npy, config))]
    if init.import_scale_matrices_npz:
        up, down, mean_D = _scales(init.import_scale_matrices_npz, config)
        new |= with_mean(mean_D, wpe_TD)
        bands = [bands[0]._replace(scale_up=up, scale_down=down)]
    if init.keep not in ("all", "shape"):
        bands = _controls(init.keep, config, bands, seed)
    return new | table_leaves(bands, config.bands[-1].padding)


def leaves_of(table: FactorizedTable, scale_tying: bool = True) -> list[BandLeaves]:
    """The parameters of a table, for a model with the same bands.

    `scale_tying`: the two scale matrices of the model are one parameter.
    """
    return [
        BandLeaves(wte, scale, None if scale_tying else scale)
        for wte, scale in table.bands
    ]


def with_mean(mean_D: np.ndarray | None, wpe_TD: np.ndarray) -> dict[str, np.ndarray]:
    """Position embeddings plus the mean row of a centred table.

    The head needs no mean: it would add one number to all logits, and softmax cancels
    it.
    """
    return {} if mean_D is None else {"wpe": (wpe_TD + mean_D).astype(np.float32)}


def _check_bands(table: FactorizedTable, folder: str, config: GPTConfig) -> None:
    """Raises UserError unless the model has the bands of a table from `folder`."""
    wanted = [(band.size, band.rank) for band in config.bands]
    own = list(zip(table.sizes, table.ranks, strict=True))
    if own != wanted or table.width != config.n_embd:
        raise UserError(
            f"init.import_bands: {folder} holds {table.sizes} tokens at the ranks "
            f"{table.ranks} of width {table.width}, but this model has the bands "
            f"{wanted} of width {config.n_embd}: leave init.import_bands out, or name "
            "bands that were made from such a model"
        )
    # A single band may be 0, such as that of tokens that never occur.
    is_used = [
        band.wte.any() and (band.scale is None or band.scale.any())
        for band in table.bands
    ]
    factor_files.check_not_zero([np.array(is_used)], f"init.import_bands: {folder}")


def _controls(
    keep: str, config: GPTConfig, bands: list[BandLeaves], seed: int
) -> list[BandLeaves]:
    """Random factors that keep one property of the imported ones."""
    random, controls = np.random.default_rng(seed), []
    for spec, (wte, up, down) in zip(config.bands, bands, strict=True):
        if wte is None or (spec.rank and up is None):
            raise UserError(
                f"init.keep is '{keep}': import both factors, or a table in bands"
            )
        made_VK, made_KD = factorization.control(wte, up, keep, random)
        controls.append(BandLeaves(made_VK, made_KD, None if down is None else made_KD))
    return controls


def _blocks(path: str, config: GPTConfig, params: Mapping[str, Any]) -> dict:
    """All weights of another run, except its embedding."""
    run = Run.open(path)
    theirs = {name: getattr(run.settings.model, name) for name in BLOCK_KNOBS}
    differing = [
        f"model.{name}={value}"
        for name, value in theirs.items()
        if value != getattr(config, name)
    ]
    if differing:
        raise UserError(
            f"init.blocks_from: the blocks of {path} are of another model: set "
            f"{', '.join(differing)}"
        )
    blocks = trees.flatten(without_embedding(run.weights["params"]))
    wanted = trees.flatten(without_embedding(params))
    missing = [path for path in wanted if path not in blocks]
    if missing:
        raise UserError(
            f"init.blocks_from: {path} lacks '{missing[0]}', which this model has: the "
            "two models differ in model.n_layer or model.bias"
        )
    # This call only checks the shapes.
    trees.replace(params, blocks, source=f"init.blocks_from={path}")
    return blocks


def _table(path: str, config: GPTConfig) -> np.ndarray:
    """The table of `init.import_wte_npy`."""
    table_VK = factor_files.read_table(path)
    band = config.bands[0]
    wanted = (band.size, band.rank or config.n_embd)
    if table_VK.shape != wanted:
        raise UserError(
            f"init.import_wte_npy: {path} is {table_VK.shape}, but this model needs "
            f"{wanted}: [vocabulary, model.n_embd_wte (if set) or model.n_embd]"
        )
    factor_files.check_not_zero([table_VK], f"init.import_wte_npy: {path}")
    return table_VK


def _scales(path: str, config: GPTConfig) -> factor_files.ScaleMatrices:
    """`init.import_scale_matrices_npz`; a model that ties them has no scale_down."""
    scales = factor_files.read_scale_matrices(path)
    shape, rank = scales.scale_up.shape, config.bands[0].rank
    if not rank:
        raise UserError(
            "init.import_scale_matrices_npz is set but the model has no scale matrices:"
            f" set model.n_embd_wte={shape[0]}"
        )
    if shape != (rank, config.n_embd):
        raise UserError(
            f"init.import_scale_matrices_npz: {path} is {shape}, but this model needs "
            f"{(rank, config.n_embd)}: [model.n_embd_wte, model.n_embd]"
        )
    ties = config.n_embd_wte_scale_tying
    if ties and not np.array_equal(scales.scale_up, scales.scale_down):
        raise UserError(
            f"{path} has two different scale matrices, but this model ties them: set "
            "model.n_embd_wte_scale_tying=False"
        )
    name = f"init.import_scale_matrices_npz: {path}"
    factor_files.check_not_zero([scales.scale_up, scales.scale_down], name)
    return scales._replace(scale_down=None) if ties else scales
