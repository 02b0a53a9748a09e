"""Recipes, candidates, and the search for a table that fits a bound."""

import dataclasses
import math

import numpy as np
import pytest

from pcagpt.compression import fit as fit_module
from pcagpt.compression.candidates import (
    Candidate,
    Compressor,
    best_factors,
    quantized,
    recipes,
)
from pcagpt.compression.fit import Fit, Trial
from pcagpt.compression.rivals import MAKERS
from pcagpt.config import Settings, methods_of
from pcagpt.factorization import (
    BandFactors,
    BudgetTooSmall,
    FactorizedTable,
    SecondOrder,
    Statistics,
    quantize,
)
from pcagpt.methods import CODED, CODES, METHODS, OWN_TABLE, PACKED, RIVALS
from pcagpt.pipeline.compress_plan import decide_effort, recipes_of
from pcagpt.rows import Recipe, SwapScores

SWEEP = Settings(task="compress", ranks=())
LARGE = (49_152, 576)  # SmolLM2-135M's table

# Recipes


def test_recipes_are_all_that_fit_and_the_most_useful_come_first():
    tried = recipes(1000, 20, ["svd", "fisher", "kl"], [4, 8], [1, 3], [8])
    assert [(r.method, r.bands, r.rank, r.bits) for r in tried] == [
        *(("kl", 3, 4, 32), ("kl", 3, 8, 32)),
        *(("svd", 1, 4, 32), ("svd", 1, 8, 32)),
        *(("baseline", 1, 0, 8), ("kl", 3, 4, 8), ("kl", 3, 8, 8)),
        *(("fisher", 3, 4, 32), ("fisher", 3, 8, 32)),
        *(("kl", 1, 4, 32), ("kl", 1, 8, 32)),
        *(("fisher", 1, 4, 32), ("fisher", 1, 8, 32)),
    ]
    assert {r.budget for r in tried if r.rank == 4} == {4 * 1020}
    # Rank 2 cannot pay for the order of the tokens and rank 1 in each of three bands.
    assert recipes(1000, 20, ["kl"], [2], [3], []) == []


@pytest.mark.parametrize("methods", [["kl", "svd"], ["svd", "kl"]])
def test_methods_of_one_band_are_left_out_of_a_sweep_in_bands_only(methods):
    tried = recipes(1000, 20, methods, [8], [3], [8])
    assert {recipe.method for recipe in tried} == {"kl", "baseline"}
    of_svd = {r.bits for r in recipes(1000, 20, ["svd"], [8], [1, 3], [8]) if r.rank}
    assert of_svd == {32, 8}


@pytest.mark.parametrize(
    ("vocab_size", "width", "rank", "bands"), [(70, 32, 4, 12), (65, 384, 2, 7)]
)
def test_ranks_are_tried_in_all_bands_that_a_small_vocabulary_has(
    vocab_size, width, rank, bands
):
    """`Factorizer.of_rank` makes these tables. There are fewer bands than asked for."""
    (recipe,) = recipes(vocab_size, width, ["kl"], [rank], [bands], [])
    assert (recipe.bands, recipe.rank) == (bands, rank)
    table, make = compressor(vocab_size, width)
    assert make(recipe).table.parameters <= recipe.budget
    assert recipes(vocab_size, width, ["kl"], [rank - 1], [bands], []) == []


def test_rivals_are_tried_at_the_bits_asked_for_and_factors_at_four_or_more():
    tried = recipes(1000, 20, ["pq", "kl", "gptq"], [4], [1], [5, 3])
    assert [(r.method, r.rank, r.bits, r.budget) for r in tried] == [
        *(("baseline", 0, 5, 20_000), ("baseline", 0, 3, 20_000)),
        *(("gptq", 0, 5, 20_000), ("gptq", 0, 3, 20_000)),
        # Vectors of 6, 4 and 3 of the 20 columns.
        *(("pq", 0, 8, 4000), ("pq", 0, 8, 5000), ("pq", 0, 8, 7000)),
        *(("kl", 4, 5, 4080), ("kl", 4, 32, 4080)),
    ]
    alone = recipes(1000, 20, ["gptq"], [4], [1], [4])
    assert alone == [Recipe("gptq", 1, 20_000, 0, 4)]
    assert recipes(1000, 20, [CODED], [4], [1], [4]) == [Recipe(CODED, 1, 4080, 4, 0)]


def test_every_rival_can_be_made_and_is_named():
    assert MAKERS.keys() == RIVALS.keys()
    table, make = compressor()
    for recipe in recipes(300, 6, [*RIVALS], [1], [1], [8, 4]):
        made = make(recipe)
        assert made.table.ranks == (0,)
        assert 0 < made.bytes < table.nbytes
        most = 0.11 if recipe.method == "pq" else {8: 0.004, 4: 0.08}[recipe.bits]
        assert 0 < relative_error(made.dense, table) < most


def test_open_knobs_depend_on_the_device_and_explicit_ones_do_not():
    cpu, gpu = (decide_effort(SWEEP, platform) for platform in ("cpu", "gpu"))
    assert gpu.compress.methods.split(",") == [*METHODS, *CODES, *RIVALS]
    assert cpu.ranks == gpu.ranks == (32, 64, 128, 256)
    assert gpu.compress.bands == (1, 7, 12)
    assert gpu.compress.calibration_tokens == 1_048_576
    assert gpu.evaluate.max_tokens == 0
    assert set(cpu.compress.methods.split(",")) < {*METHODS, *CODES}
    assert set(cpu.compress.bands) < {1, 7, 12}
    assert cpu.compress.calibration_tokens < 100_000
    assert 0 < cpu.evaluate.max_tokens < 100_000
    explicit = SWEEP.replace(
        {
            "ranks": (128,),
            "compress.methods": "kl",
            "compress.bands": (2,),
            "compress.calibration_tokens": 7,
            "evaluate.max_tokens": 8,
        }
    )
    for shape in None, (50_257, 768):
        assert decide_effort(explicit, "cpu", shape) == explicit


def test_a_large_table_has_fewer_rows_and_tokens_on_a_cpu():
    small, large = (50_257, 128), LARGE
    first, few = (decide_effort(SWEEP, "cpu", shape) for shape in (small, large))
    assert first == decide_effort(SWEEP, "cpu")
    assert decide_effort(SWEEP, "gpu", large) == decide_effort(SWEEP, "gpu")
    assert few.evaluate.max_tokens < first.evaluate.max_tokens
    amounts = [
        len(recipes_of(chosen, large, methods_of(chosen.compress.methods)))
        for chosen in (first, few)
    ]
    assert amounts == [34, 6]
    narrow = (163_840, 64)  # Its rank is less than those of a large table.
    assert decide_effort(SWEEP, "cpu", narrow) == first


@pytest.mark.parametrize(
    "asked",
    [
        {"compress.recover_ranks": (64,)},
        {"compress.methods": "svd"},
        {"compress.bands": (1,)},
        {"compress.max_params": 3_000_000},
        {"compress.max_added_loss": 0.1},
    ],
    ids=str,
)
def test_what_needs_factors_of_a_large_table_has_them_on_a_cpu(asked):
    settings = SWEEP.replace(asked)
    decided = decide_effort(settings, "cpu", (50_257, 768))
    assert decided == decide_effort(settings, "cpu")
    # So that it may replace the first look; see `check_file`.
    first_look = decide_effort(SWEEP, "cpu", (50_257, 768))
    tokens = first_look.compress.calibration_tokens
    assert tokens == decided.compress.calibration_tokens
    methods = methods_of(decided.compress.methods)
    assert best_factors(methods, decided.compress.bands)


@pytest.mark.parametrize(
    "choice",
    [
        {"compress.recover_ranks": (8,)},
        {"compress.max_added_loss": 0.1},
        {"compress.max_bytes": 1000},
        {"compress.methods": "kl"},
        {"compress.bands": (2,)},
    ],
    ids=str,
)
def test_what_is_no_first_look_is_measured_on_the_whole_split(choice):
    for tokens in 0, 20_480:
        asked = SWEEP.replace(choice | {"compress.calibration_tokens": tokens})
        assert decide_effort(asked, "cpu", LARGE).evaluate.max_tokens == 0


def test_a_first_look_stays_one_with_other_calibration_tokens():
    asked = SWEEP.replace({"compress.calibration_tokens": 20_480})
    for shape, tokens in (None, 32_768), (LARGE, 16_384):
        decided = decide_effort(asked, "cpu", shape)
        assert decided.evaluate.max_tokens == tokens
        plain = decide_effort(SWEEP, "cpu", shape)
        assert decided == plain.replace({"compress.calibration_tokens": 20_480})


# Bounds. In this world the loss is a power of the budget. Two bands are better than
# one, and five are too many for small budgets.

TABLE = (990, 10)  # 1,000 values per rank, 9,900 in all
UNIT = 10_000  # the budget at which a single band has loss 1


def scores(added_loss):
    zero = dict.fromkeys(("added_loss_input", "added_loss_head", "kl"), 0.0)
    means = {"loss": 5.0, "added_loss": added_loss, "top1_agreement": 1.0} | zero
    return SwapScores(**means, added_loss_by_decile=[])


def world(
    exponent=1.0,
    factor=1.0,
    least=2000,
    table=TABLE,
    bands=(1, 2, 5),
    methods=("kl",),
    estimate=1.0,
    rounding=1e-9,
):
    """A `Fit` of this world.

    factor scales the loss, estimate the estimated bytes, rounding the loss of few bits.
    """

    def make(recipe):
        if recipe.bands == 5 and recipe.budget < least:
            raise BudgetTooSmall
        gain = {1: 1.0, 2: 0.5, 5: 0.6}[recipe.bands]
        loss = gain * (recipe.budget / UNIT) ** -exponent
        if recipe.method == "baseline":
            loss = rounding * 2 ** (32 - recipe.bits)
        wte = np.zeros((1, recipe.budget - 3), np.int8)
        stored = FactorizedTable.of_one_band(BandFactors(wte, None))
        size = recipe.budget * recipe.bits // 8
        if recipe.method in (CODED, PACKED):
            size, loss = recipe.budget, loss / 100
        return Candidate(recipe, stored, None, wte, size, SecondOrder(loss, 0), 0.0)

    def measure(candidate):
        return scores(factor * candidate.second_order.head**1.1)

    def codes_bytes(method, bands, added_loss):
        return estimate * UNIT * (100 * added_loss) ** (-1 / exponent)

    return Fit(make, codes_bytes, measure, methods, bands, table)


@pytest.mark.parametrize("exponent", [0.5, 1.5, 3.0])
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.5])
def test_the_smallest_table_within_a_loss_is_found_in_a_few_trials(bound, exponent):
    fit = world(exponent, 1.7, table=(4000, 3000))
    needed = UNIT * (0.5 / (bound / 1.7) ** (1 / 1.1)) ** (1 / exponent)
    chosen = fit.within_loss(bound)
    assert chosen.scores.added_loss <= bound
    assert chosen.candidate.recipe.bands == 2
    assert chosen.candidate.table.parameters <= 1.35 * needed
    assert len(fit.trials) <= Fit.TRIALS
    last = fit.trials[-1]
    if len(fit.trials) > 2:
        assert last.predicted == pytest.approx(last.scores.added_loss, rel=0.01)


def test_a_loss_that_no_table_keeps_has_no_table():
    assert world(factor=1e9).within_loss(1e-3) is None


def test_of_tables_of_one_size_the_one_that_adds_less_is_found():
    fit = world()
    made = fit._own_table(8)
    fit.trials = [Trial(made, scores(added), None) for added in (0.3, 0.1, 0.2, 0.9)]
    assert fit._smallest(0.5) == fit.trials[1]


@pytest.mark.parametrize("bound", [1e-12, 1e-7, 1e-3, 1.0])
def test_a_bound_of_any_size_is_met_in_a_few_steps(bound):
    values = []

    def value(budget):
        values.append(1e9 * bound * budget**-1.5)
        return values[-1]

    fit_module.search(value, bound, (1e3, 1e7, 1e9), -1.2, 0.1, 6)
    assert 0.9 * bound <= values[-1] <= bound
    assert len(values) <= 4


def test_a_table_that_several_budgets_give_is_measured_and_listed_once():
    fit, budgets = world(methods=(CODED,), table=(4000, 3000), estimate=9.0), []
    make, measure, measured = fit._make, fit._measure, []

    def make_of_few_sizes(recipe):
        budgets.append(recipe.budget)
        return make(
            dataclasses.replace(recipe, budget=4 ** round(math.log(recipe.budget, 4)))
        )

    fit._make = make_of_few_sizes
    fit._measure = lambda made: measured.append(made) or measure(made)
    fit.within_loss(0.001)
    sizes = [trial.candidate.bytes for trial in fit.trials]
    assert len(sizes) == len(set(sizes)) == len(measured) < len(budgets)


def test_a_coded_file_is_searched_by_its_bytes():
    """Losses are those of 'kl' with a single band and 32 bits, divided by 100."""
    fit = world(1.5, 1.7, table=(4000, 3000), methods=["kl", CODED])
    chosen = fit.within_loss(0.001)
    assert chosen.candidate.recipe.method == CODED
    assert 0.0009 <= chosen.scores.added_loss <= 0.001
    assert {trial.candidate.recipe.method for trial in fit.trials} == {CODED}
    fit = world(methods=["kl", CODED])
    chosen = fit.within_bytes(20_000, [32, 8])
    assert chosen.candidate.recipe.method == CODED
    assert chosen.candidate.bytes == 20_000
    assert {t.candidate.recipe.method for t in fit.trials} >= {"kl", CODED}
    fit = world(methods=[CODED])
    assert fit.within_bytes(20_000, [32, 8]) and len(fit.trials) == 1


def test_the_full_table_in_few_bits_is_tried_for_a_loss_where_it_is_smaller():
    def found(bits, methods=("kl", CODED)):
        fit = world(factor=5.0, methods=methods, rounding=2e-11)
        recipe = fit.within_loss(0.008, bits).candidate.recipe
        return recipe.method, recipe.bits

    assert found([]) == found([8], methods=(CODED,)) == (CODED, 0)
    assert found([8, 4]) == found([4, 8]) == ("baseline", 8)  # 4 bits add too much.
    assert found([8], methods=(CODED, OWN_TABLE)) == ("baseline", 8)
    small = world(1.5, 1.7, table=(4000, 3000), methods=["kl", CODED])
    small.within_loss(0.001, [8, 4])
    assert {trial.candidate.recipe.method for trial in small.trials} == {CODED}


@pytest.mark.parametrize("estimate", [1e-9, 0.5, 1.0, 2.0, 1e9])
def test_the_search_for_a_coded_file_begins_at_its_estimated_bytes(estimate):
    fit = world(1.5, table=(4000, 3000), methods=[CODED], estimate=estimate)
    chosen = fit.within_loss(0.001)
    assert 0.0009 <= chosen.scores.added_loss <= 0.001
    first = fit.trials[0].candidate.bytes
    estimated = estimate * UNIT * 0.1 ** (-1 / 1.5)
    assert first == pytest.approx(np.clip(estimated, 7000, 48_000_000), rel=1e-3)
    assert len(fit.trials) <= (Fit.TRIALS if abs(np.log(estimate)) > 1 else 3)


def test_budgets_that_are_too_small_for_any_bands_are_passed_over():
    fit = world(0.7, 20.0, least=3000, bands=(5,))
    chosen = fit.within_loss(20.0)
    assert chosen.scores.added_loss <= 20.0
    never = world(least=10**9, bands=(5,))
    assert never.within_loss(1.0) is None
    assert never.trials == []


def test_a_packed_table_has_the_number_of_bands_that_loses_least():
    for bands, least, best in (((1, 5), 0, 5), ((1, 2, 5), 0, 2), ((1, 5), 10**9, 1)):
        fit = world(methods=[PACKED], bands=bands, least=least)
        assert fit.within_bytes(20_000, []).candidate.recipe.bands == best
        assert len(fit.trials) == 1


def test_a_bound_puts_only_methods_that_weight_tokens_into_bands():
    """Two bands would lose less."""
    for search in (("within_loss", 1.0), ("within_bytes", 20_000, [32, 8])):
        for methods, bands in ((["kl", "svd"], 1), (["svd", "kl"], 2)):
            fit = world(methods=methods)
            getattr(fit, search[0])(*search[1:])
            tried = [trial.candidate.recipe for trial in fit.trials]
            assert {r.bands for r in tried if r.method in methods} == {bands}
    fit = world(methods=["kl", "svd"], bands=(2,))  # None of them is for 'svd'.
    assert fit.within_bytes(20_000, [32]).candidate.recipe.method == "kl"


def test_an_error_is_not_a_budget_that_is_too_small():
    def fail(_):
        raise ValueError("operands could not be broadcast")

    with pytest.raises(ValueError, match="broadcast"):
        Fit(fail, None, None, ["kl"], (5,), TABLE).within_loss(1.0)


def test_a_bound_on_size_is_used_up():
    fit = world()
    chosen = fit.within_bytes(4 * 5000, [32])
    assert 4900 <= chosen.candidate.table.parameters <= 5000
    assert len(fit.trials) == 1
    for bits, most in ((32, 4 * 5000), (8, 5000), (4, 4000)):
        chosen = world().within_bytes(most, [bits])
        assert chosen.candidate.recipe.bits == bits
        assert 0.97 * most < chosen.candidate.bytes <= most
    assert world().within_bytes(4 * 900, [32]) is None  # Rank 1 stores 1,000 values.


def test_fewer_bits_and_the_full_table_are_options_for_a_bound_on_bytes():
    def tried(fit):
        recipes = [trial.candidate.recipe for trial in fit.trials]
        return {(recipe.method, recipe.bits) for recipe in recipes}

    fit = world()
    chosen = fit.within_bytes(9900, [32, 8, 4]).candidate.recipe
    assert (chosen.method, chosen.bits) == ("baseline", 8)
    in_bands = {("kl", 32), ("kl", 8), ("kl", 4)}
    assert tried(fit) == in_bands | {("baseline", 8), ("baseline", 4)}
    fit = world()
    fit.within_bytes(6000, [32, 8, 4])
    assert tried(fit) == in_bands | {("baseline", 4)}
    fit = world()
    fit.within_bytes(6000, [32, 3])  # Only the full table has so few bits.
    assert tried(fit) == {("kl", 32), ("baseline", 3)}


# Candidates


def test_a_quantized_table_in_bands_counts_the_order_of_its_tokens():
    random = np.random.default_rng(0)
    bands = tuple(BandFactors(random.normal(size=(n, 4)), None) for n in (3, 5))
    order = np.array([7, 0, 3, 1, 2, 4, 5, 6], np.int32)
    table, size = quantized(FactorizedTable(order, bands, None), 8)
    assert table.parameters == 8 * 4 + 8
    assert size == sum(quantize(band.wte, 8).bytes for band in bands) + 4 * 8


def compressor(vocab_size=300, width=6, **options):
    """A table of uneven rows and its compressor."""
    random = np.random.default_rng(0)
    table = (random.normal(size=(vocab_size, width)) * np.arange(width, 0, -1)).astype(
        np.float32
    )
    flat, eye = np.full(vocab_size, 1 / vocab_size), np.eye(width)
    statistics = Statistics(
        random.dirichlet(np.full(vocab_size, 0.1)), flat, np.zeros(width), eye, eye, eye
    )
    return table, Compressor(table, statistics, **options)


def relative_error(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_a_budget_beyond_the_full_rank_is_the_full_rank():
    table, make = compressor()
    made = make(Recipe("kl", 1, 10_000, 0))
    assert made.table.parameters == 6 * (300 + 6)
    np.testing.assert_allclose(made.dense, table, atol=1e-5)


@pytest.mark.parametrize(("method", "is_kept"), [(CODED, True), (PACKED, False)])
def test_only_codes_that_a_sweep_surely_needs_again_are_kept(method, is_kept):
    _, make = compressor()
    recipe = Recipe(method, 1, 6000, 0, 0)
    made, again = make(recipe).codes, make(recipe).codes
    assert (made is again) == is_kept
    assert made.sha256 == again.sha256


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_table_of_few_bits_is_the_rounded_table(bits, bands):
    _, make = compressor()
    rounded, whole = (make(Recipe("freq", bands, 1000, 0, b)) for b in (bits, 32))
    most = {8: 0.006, 4: 0.1}[bits]
    assert 0 < relative_error(rounded.dense, whole.dense) < most
    assert rounded.bytes < whole.bytes == 4 * whole.stored["params"]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_mean_counts_unless_position_embeddings_hold_it(bits, bands):
    recipe = Recipe("freq", bands, 4 * 306, 4, bits)
    apart, held = (compressor(stores_mean=of)[1](recipe) for of in (True, False))
    assert apart.table.mean.shape == (6,) and apart.sha256 == held.sha256
    less = {"params": 6, "bytes": 4 * 6, "memory": 4 * 6}
    for name, size in less.items():
        assert apart.stored[name] == held.stored[name] + size, name
    assert held.stored["params"] == held.table.parameters


def test_a_table_with_its_mean_fills_a_bound_and_does_not_exceed_it():
    table, make = compressor()
    measure = lambda made: scores(sum(made.second_order))  # noqa: E731
    for bound in range(1300, 4 * table.size, 97):
        fit = Fit(make, make.codes_bytes, measure, ["freq"], (1,), table.shape)
        found = fit.within_bytes(bound, [32])
        values = found.candidate.table.parameters + 6
        assert found.candidate.bytes == 4 * values <= bound
        assert 4 * (values + 306) > bound or found.candidate.table.ranks == (6,)
    assert fit.least_bytes([32]) == 4 * (306 + 6)
    fit = Fit(make, make.codes_bytes, measure, ["freq"], (1,), table.shape)
    assert fit.within_bytes(4 * (306 + 6) - 1, [32]) is None


def test_estimated_bytes_save_measurements_of_coded_tables():
    """Added loss is here the second-order loss; each bound takes a search."""
    table, make = compressor()

    def measurements(codes_bytes):
        def measure(candidate):
            return scores(sum(candidate.second_order))

        fits = [
            Fit(make, codes_bytes, measure, [CODED], (1,), table.shape)
            for _ in range(2)
        ]
        for fit, bound in zip(fits, (0.03, 0.1), strict=True):
            chosen = fit.within_loss(bound)
            assert chosen.scores.added_loss <= bound
        return sum(len(fit.trials) for fit in fits)

    assert measurements(make.codes_bytes) < measurements(lambda *_: table.size // 6)


def test_no_measurement_of_packed_tables_is_lost_to_budgets_that_are_too_small():
    table, make = compressor()
    refused = []

    def counted(recipe):
        try:
            return make(recipe)
        except BudgetTooSmall:
            refused.append(recipe)
            raise

    def measure(candidate):
        return scores(sum(candidate.second_order))

    for bound in (0.3, 1.0):
        fit = Fit(counted, make.codes_bytes, measure, [PACKED], (1, 3), table.shape)
        chosen = fit.within_loss(bound)
        assert 0.5 * bound <= chosen.scores.added_loss <= bound
    assert not [recipe for recipe in refused if recipe.bands == 1]


@pytest.mark.parametrize(
    "methods", [[CODED], [PACKED], ["kl"], [OWN_TABLE], [PACKED, "kl"]], ids=",".join
)
@pytest.mark.parametrize("bands", [(1, 3), (3,)])
def test_the_smallest_bound_on_bytes_is_known(methods, bands):
    table, make = compressor(2000, 16)
    shape = table.shape

    def found(most):
        fit = Fit(make, make.codes_bytes, lambda _: scores(1.0), methods, bands, shape)
        return fit.within_bytes(most, [32, 8, 4])

    fit = Fit(make, make.codes_bytes, None, methods, bands, shape)
    least = fit.least_bytes([32, 8, 4])
    assert found(least).candidate.bytes <= least
    assert found(least - 1) is None


def test_the_smallest_bound_is_known_where_a_small_vocabulary_has_fewer_bands():
    table, make = compressor(70, 16)

    def fit():
        return Fit(make, None, lambda _: scores(1.0), ["kl"], (12,), table.shape)

    least = fit().least_bytes([32])
    assert fit().within_bytes(least, [32]).candidate.bytes <= least
    assert fit().within_bytes(least - 1, [32]) is None
