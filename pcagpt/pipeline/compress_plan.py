"""What the task `compress` tries, and how long that takes."""

from pcagpt.compression.advise import methods_within
from pcagpt.compression.candidates import factor_methods, left_out, recipes
from pcagpt.compression.fit import Fit
from pcagpt.config import Settings, methods_of, override
from pcagpt.config.effort import effort_on, of_bare_table
from pcagpt.errors import UserError
from pcagpt.pipeline import estimate
from pcagpt.pipeline.execute import say
from pcagpt.rows import Recipe


def decide_effort(
    settings: Settings,
    platform: str,
    shape: tuple[int, int] | None = None,
    *,
    has_statistics: bool = False,
) -> Settings:
    """Fills in what `compress` leaves 0 or empty, for 'cpu' or another platform.

    A search for a bound has no ranks. A sweep on a CPU is a first look if methods and
    bands are unset, no table must keep a bound, and none is trained further. It
    measures only a part of the split, and tries fewer tables if the table is large.

    Args:
      settings: of any task; only those of `compress` change.
      platform: of the devices.
      shape: [V, D] of the model's table; None for a bare table.
      has_statistics: whether the statistics of a bare table's model are known.
    """
    if settings.task != "compress":
        return settings
    compress = settings.compress
    is_open = not (compress.methods or compress.bands)
    is_first_look = is_open and not (compress.bounds or compress.recover_ranks)
    effort = effort_on(platform, shape if is_first_look else None)
    given = settings.flat()
    if settings.is_of_bare_table:
        effort = of_bare_table(effort, has_statistics)
        if given["compress.methods"] == "all" and not has_statistics:
            given["compress.methods"] = ""
    decided = {
        "ranks": () if compress.bounds else effort.ranks,
        "compress.methods": ",".join(effort.methods),
        "compress.bands": effort.bands,
        "compress.calibration_tokens": effort.calibration_tokens,
        "evaluate.max_tokens": effort.max_tokens if is_first_look else 0,
    }
    return settings.replace({path: given[path] or decided[path] for path in decided})


def recipes_of(
    settings: Settings, shape: tuple[int, int], methods: list[str]
) -> list[Recipe]:
    """The recipes of a sweep of a table [V, D]; leaves out ranks that it cannot have.

    Raises UserError if none are left.
    """
    ranks, options = settings.ranks, settings.compress
    factors = factor_methods(methods)
    possible = [rank for rank in ranks if rank <= min(shape)]
    if not possible:
        fitting = tuple(rank for n in (4, 2) if (rank := min(shape) // n)) or (1,)
        raise UserError(
            f"ranks is {ranks}: the table of {settings.model_path} is {shape}, its "
            f"rank is at most {min(shape)}; give ranks that fit, as in "
            f"{override('ranks', fitting)}"
        )
    combinations = recipes(*shape, methods, possible, options.bands, options.bits)
    if factors and not any(recipe.rank for recipe in combinations):
        raise UserError(
            f"no table fits compress.bands {options.bands}: raise ranks, or list 1 in "
            "compress.bands"
        )
    if not combinations:
        raise UserError(
            f"compress.methods is '{options.methods}', but compress.bits is empty: "
            "name bits, such as --config.compress.bits=4"
        )
    if high := [str(rank) for rank in ranks if rank not in possible]:
        say(f"left out: rank {', '.join(high)}, too high for the table {shape}")
    single = left_out(methods, options.bands)
    made = {recipe.rank for recipe in combinations if recipe.is_factors}
    low = [str(rank) for rank in possible if rank not in made]
    if low and factors != single:
        say(
            f"left out: factors of rank {', '.join(low)}, too low for compress.bands "
            f"{options.bands}"
        )
    return combinations


def tell_left_out(methods: list[str], bands: tuple[int, ...]) -> None:
    """Prints the methods that can use none of these numbers of bands."""
    if single := left_out(methods, bands):
        say(f"left out: {', '.join(single)} (only one band): list 1 in compress.bands")


def amount_of(
    settings: Settings, shape: tuple[int, int], platform: str, devices: int
) -> str:
    """What a command would try for a table [V, D], and how long that takes.

    '26 tables to measure, each on at most 32,768 tokens of val: roughly 3 minutes on 1
    x cpu'. `devices` of `platform` measure the model. UserError if no table can be
    made.
    """
    compress, limit = settings.compress, settings.evaluate.max_tokens
    split = f"at most {limit:,} tokens of {settings.split}" if limit else settings.split
    is_bare, methods = settings.is_of_bare_table, methods_of(compress.methods)
    if compress.bounds:
        methods_within(compress, methods)
        tables, amount = Fit.TRIALS, "a search for one table"
        how = "" if is_bare else f"; each one that it tries is measured on {split}"
    else:
        tables = len(recipes_of(settings, shape, methods))
        amount = "1 table" if tables == 1 else f"{tables} tables"
        how = " to make" if is_bare else f" to measure, each on {split}"
    if is_bare:
        time = estimate.of_tables(tables, shape)
    else:
        calibration = compress.calibration_tokens
        model = settings.model
        time = estimate.of_sweep(
            tables, shape, model, calibration, limit, platform, devices
        )
    return ": ".join(filter(None, [f"{amount}{how}", time]))
