"""The task compress on a token table without its model."""

import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import CONFIGS, call, refusal
from runs import changed, snapshot, write_statistics

import pcagpt
from pcagpt.compression import sweep, table_sweep
from pcagpt.compression.bare_table import BareTable
from pcagpt.compression.candidates import Compressor
from pcagpt.compression.codes import KINDS
from pcagpt.compression.sides import seen_by
from pcagpt.config import Settings
from pcagpt.factorization import Factorizer, factor_files
from pcagpt.factorization.factor_files import read_bands
from pcagpt.factorization.table import sha256_of_arrays
from pcagpt.methods import FREE, METHODS
from pcagpt.pipeline.compress import compress
from pcagpt.report.bare_table import best_rows
from pcagpt.rows import ErrorRow, Recipe, read_sweep
from pcagpt.run import calibrate
from pcagpt.run.calibrate import SIDES
from pcagpt.run.trained import Run

pytestmark = pytest.mark.usefixtures("quick")
V, D = 600, 16
WEIGHTED = [name for name in METHODS if name not in FREE]


@pytest.fixture
def table(tmp_path):
    """A file of a table whose singular values fall."""
    random = np.random.default_rng(0)
    values = random.normal(size=(V, D)) * np.linspace(2, 0.1, D)
    np.save(tmp_path / "table.npy", values.astype(np.float32))
    return tmp_path / "table.npy"


def asked(table, *words):
    workdir = table.parent / "runs"
    ask = f"--config.model_path={table}", f"--config.workdir={workdir}"
    return f"--config={CONFIGS / 'compress.py'}", *ask, *words


RANKS = "--config.ranks=10,12"
QUICK = "--config.compress.methods=svd", "--config.ranks=10"


@pytest.mark.parametrize("config", ["compress.py", "factorize.py", None])
def test_a_table_with_fewer_rows_than_columns_may_be_transposed(config, table, said):
    """It is taken as it is: a model of characters may have such a table."""
    knobs = {"compress.py": QUICK, "factorize.py": ["--config.factorize.method=svd"]}
    for values, is_asked in ((np.load(table), False), (np.load(table).T, True)):
        np.save(table, values)
        name = table if config else "the table"
        if config:
            words = asked(table, *knobs[config], "--config.ranks=10")[1:]
            words += "--config.overwrite=True", f"--config={CONFIGS / config}"
            outcome = call(*words)
            assert outcome.code == 0, outcome
        else:
            pcagpt.factorize(values, 10)
        line = f"{name} has 16 rows and 600 columns, and each row is taken for a token"
        assert [one for one in said() if one.startswith(line)] == [
            f"{line}: is it transposed? If so, give its transpose, table.T"
        ] * is_asked


def folder_of(table):
    return table.parent / "runs/compressed_table"


def errors_of(table):
    return read_sweep(folder_of(table) / "errors.json", ErrorRow)


def rows_of(table):
    return errors_of(table)["rows"]


def read(folder, row):
    """(the table in a folder, its hash), stored as a row says."""
    if not row["bits"]:
        kind = KINDS[row["method"]]
        assert (folder / kind.file).stat().st_size == row["bytes"]
        found, _ = kind.read(folder / kind.file)
    else:
        found = read_bands(folder / "factors")
    return found.dense(), found.sha256


def error_of(found, own):
    return np.linalg.norm(found - own) / np.linalg.norm(own)


# A sweep


@pytest.mark.parametrize("makes_another", [False, True])
def test_a_folder_that_is_moved_meanwhile_is_noticed(makes_another, table, monkeypatch):
    folder, row, made = folder_of(table), BareTable.row, []

    def row_and_move(self, candidate):
        made.append(candidate)
        if len(made) == 7:
            folder.rename(folder.with_name("moved"))
            if makes_another:
                folder.mkdir()
        return row(self, candidate)

    monkeypatch.setattr(BareTable, "row", row_and_move)
    outcome = call(*asked(table, RANKS, "--config.compress.methods=svd,baseline"))
    assert outcome.code == 2
    assert f"{folder} was removed or replaced while this command" in outcome.err
    assert not folder.exists() or not list(folder.iterdir())


def test_every_table_has_its_size_and_error(table):
    outcome = call(*asked(table, RANKS))
    assert outcome.code == 0, outcome
    rows, own = rows_of(table), np.load(table)
    methods = {"svd", "pca", "coded", "packed", "baseline"}
    assert {row.method for row in rows} == methods
    assert {row.bands for row in rows} == {1}
    assert {row.rank for row in rows if row.method == "coded"} == {10, 12}
    assert {row.bits for row in rows if row.method == "pca"} == {32, 8, 4}
    (svd,) = [row for row in rows if (row.method, row.rank) == ("svd", 10)]
    values = np.square(np.linalg.svd(own, compute_uv=False))
    share = values[:10].sum() / values.sum()
    assert svd.energy_kept == pytest.approx(share, rel=1e-5)
    assert svd.relative_error == pytest.approx(np.sqrt(1 - share), rel=1e-5)
    assert (svd.params, svd.bytes) == (10 * (V + D), 40 * (V + D))
    assert all(row.estimated_loss is None for row in rows)


def test_the_last_lines_tell_the_best_tables_a_next_command_and_what_is_missing(table):
    outcome = call(*asked(table, RANKS))
    folder, best = folder_of(table), best_rows(errors_of(table))
    _, _, found = outcome.out.partition("best for their bytes, by relative error:\n")
    *lines, where, command, lacking = found.splitlines()
    assert [line.split(": ")[1].split(" bytes")[0] for line in lines] == [
        f"{row.bytes:,}" for row in best
    ]
    assert all(
        f"relative error {row.relative_error:.4g}, energy kept " in line
        for row, line in zip(best, lines, strict=True)
    )
    assert where == f"the best of each kind and rank, none rounded: {folder}/best_*"
    words = command.removeprefix("compress it: python -m pcagpt.main ").split()
    words[0] = f"--config={CONFIGS / 'compress.py'}"
    assert call(*words, f"--config.workdir={table.parent / 'next'}").code == 0
    assert lacking == (
        "not measured: loss, which needs the model itself as model_path; not tried: "
        f"{', '.join(WEIGHTED)}, which need its statistics as "
        f"{table.parent}/table.statistics.npz"
    )


def test_errors_name_the_commits_under_which_they_were_measured(table, monkeypatch):
    def commits(commit, *words):
        monkeypatch.setenv("PCAGPT_COMMIT", commit)
        assert call(*asked(table, *QUICK, *words)).code == 0
        return errors_of(table)["git_commit"]

    assert commits("one") == "one"
    assert commits("two") == "one"  # It measured nothing.
    assert commits("three", "--config.ranks=12") == "one, three"
    shutil.rmtree(folder_of(table) / "best_k10")
    assert commits("four") == "one, three, four"  # It was made and measured again.


def test_the_report_says_that_there_is_no_loss_and_lists_the_best_tables(table):
    assert call(*asked(table, RANKS)).code == 0
    folder, rows = folder_of(table), rows_of(table)
    text = (folder / "report.md").read_text()
    assert "**No loss was measured**" in text
    assert "Added" not in text and "Estimate" not in text
    best = best_rows(errors_of(table))
    for row in rows:
        is_beaten = any(
            other.bytes <= row.bytes
            and other.relative_error <= row.relative_error
            and other != row
            for other in rows
        )
        is_smaller = row.bytes < 4 * V * D
        assert (not is_beaten and is_smaller) == (row in best)
        assert f"| {row.bytes:,} | " in text
        assert f"| {row.relative_error:.4g} | {100 * row.energy_kept:.2f}% |" in text
    page = (folder / "report.html").read_text()
    assert "{: title=" not in page  # All cells became tables.
    assert (folder / "plots/errors.png").stat().st_size > 10_000


def test_the_best_table_of_each_kind_and_rank_is_written(table):
    assert call(*asked(table, RANKS)).code == 0
    folder, own, best = folder_of(table), np.load(table), {}
    for row in rows_of(table):
        known = best.get(row.model_name)
        if known is None or row.relative_error < known.relative_error:
            best[row.model_name] = row
    del best[None]
    kinds = ("best", "best_coded", "best_packed")
    names = {f"{kind}_k{rank}" for kind in kinds for rank in (10, 12)}
    assert best.keys() == names == {path.name for path in folder.glob("best_*")}
    for name, row in best.items():
        dense_VD, sha256 = read(folder / name, vars(row))
        assert sha256 == row.table_sha256
        assert error_of(dense_VD, own) == pytest.approx(row.relative_error, rel=1e-5)
    before = snapshot(folder / "best_k10"), snapshot(folder / "best_coded_k10")
    (folder / "best_packed_k10/table.npz").write_bytes(b"damaged")
    assert call(*asked(table, RANKS)).code == 0
    assert before == (
        snapshot(folder / "best_k10"),
        snapshot(folder / "best_coded_k10"),
    )
    row = best["best_packed_k10"]
    assert read(folder / row.model_name, vars(row))[1] == row.table_sha256
    assert len(list(folder.glob("*.replaced-*"))) == 1


@pytest.mark.parametrize("name", ["write_table_report", "replace_table"])
def test_the_best_tables_are_told_on_a_full_disk(table, monkeypatch, name):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(table_sweep, name, fail)
    outcome = call(*asked(table, *QUICK))
    assert (outcome.code, "no space left" in outcome.err) == (2, True)
    assert "best for their bytes" in outcome.out
    assert "energy kept" in outcome.out.splitlines()[-1]


def test_a_table_that_was_measured_is_told_if_it_cannot_be_saved(table, monkeypatch):
    written = []

    def fail(path, _):
        written.append(path)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(sweep, "write_json", fail)
    outcome = call(*asked(table, *QUICK))
    assert (outcome.code, len(written)) == (2, 1)
    told = outcome.out.partition("not saved:\n")[2]
    assert re.match(r"\w+.* numbers in .* bytes, .*\nbands: .*\nrelative error", told)


def test_an_interrupted_sweep_makes_only_what_is_missing(table, monkeypatch):
    assert call(*asked(table, "--config.ranks=10")).code == 0
    first = {row.recipe: row for row in rows_of(table)}
    assert call(*asked(table, RANKS)).code == 0
    both = {row.recipe: row for row in rows_of(table)}
    assert first.items() < both.items()
    monkeypatch.setattr(BareTable, "row", None)
    assert call(*asked(table, RANKS)).code == 0


@pytest.mark.parametrize("words", [QUICK, ["--config.compress.max_bytes=6000"]])
def test_results_of_another_table_are_replaced_only_when_asked(table, words):
    assert call(*asked(table, *words)).code == 0
    np.save(table, 1 / (1 + np.square(np.load(table))))
    line = refusal(*asked(table, *words), unchanged=[table.parent])
    assert "holds other numbers, table_sha256 (there " in line
    assert call(*asked(table, *words, "--config.overwrite=True")).code == 0
    assert list(folder_of(table).glob("*.replaced-*"))


def test_a_table_under_another_protocol_is_replaced_only_when_asked(table):
    words = asked(table, "--config.compress.max_bytes=8000")
    assert call(*words).code == 0
    words += ("--config.factorize.singular_value_split=0.5",)
    line = refusal(*words, unchanged=[table.parent])
    assert "holds other numbers, singular_value_split (there 0.0, here 0.5" in line
    assert call(*words, "--config.overwrite=True").code == 0
    assert list(folder_of(table).glob("advised.replaced-*"))
    assert call(*words).code == 0


def test_a_folder_of_a_person_is_moved_aside_only_when_asked(table):
    (place := folder_of(table) / "best_k10").mkdir(parents=True)
    (place / "notes.txt").write_text("mine")
    line = refusal(*asked(table, *QUICK), unchanged=[table.parent])
    assert "best_k10 holds something other than a compressed table" in line
    assert call(*asked(table, *QUICK, "--config.overwrite=True")).code == 0
    (kept,) = folder_of(table).glob("best_k10.replaced-*")
    assert (kept / "notes.txt").read_text() == "mine"


def test_events_for_tensorboard_have_the_figure_unless_they_are_off(table):
    off = "--config.telemetry.tensorboard=False"
    assert call(*asked(table, *QUICK, off)).code == 0
    assert not list(folder_of(table).glob("events.*"))
    assert call(*asked(table, *QUICK)).code == 0
    (events,) = folder_of(table).glob("events.*")
    assert b"errors" in events.read_bytes()


def test_singular_value_split_and_bands_reach_the_tables(table):
    split = "--config.factorize.singular_value_split=1.0"
    packed = "--config.compress.methods=svd,packed", "--config.compress.bands=1,2"
    assert call(*asked(table, "--config.ranks=10", split, *packed)).code == 0
    assert errors_of(table)["protocol"]["singular_value_split"] == 1.0
    scale = read_bands(folder_of(table) / "best_k10/factors").bands[0].scale
    assert np.linalg.norm(scale, axis=1)[0] > 10  # At 0, the rows have norm 1.
    found = {(row.method, row.bands) for row in rows_of(table)}
    assert found == {("svd", 1), ("packed", 1), ("packed", 2), ("baseline", 1)}


# With statistics of the model


def test_with_statistics_the_tables_are_those_of_a_sweep_of_the_model(
    finished_experiment, tmp_path
):
    trained = Path(finished_experiment.workdir) / "gpt_baseline"
    run = Run.open(shutil.copytree(trained, tmp_path / "gpt_baseline"))
    config = changed(
        finished_experiment,
        task="compress",
        workdir=str(tmp_path),
        model_path=str(run.folder),
        ranks=(4, 8),
        **{"data.source": "", "compress.methods": "svd,fisher,context,coded,packed"},
        **{"compress.bands": (1, 3), "compress.calibration_tokens": 512},
    )
    compress(Settings.of(config), "a command")
    swept = read_sweep(tmp_path / "compressed/sweep.json")["rows"]
    (measured,) = run.results_in(str(tmp_path)).glob("statistics_step6_*.npz")
    np.save(tmp_path / "table.npy", run.table())
    shutil.copy(measured, tmp_path / "table.statistics.npz")
    methods = "--config.compress.methods=svd,fisher,context,coded,packed"
    words = methods, "--config.compress.bands=1,3", "--config.ranks=4,8"
    outcome = call(*asked(tmp_path / "table.npy", *words))
    assert outcome.code == 0, outcome
    rows = {row.recipe: row for row in rows_of(tmp_path / "table.npy")}
    assert rows.keys() == {row.recipe for row in swept}
    for row in swept:
        found = rows[row.recipe]
        # The position embeddings of the model hold the mean.
        mean = 4 * run.table_shape[1] * (row.method in ("fisher", "context"))
        assert (found.bytes, found.memory) == (row.bytes + mean, row.memory + mean)
        assert found.table_sha256 == row.table_sha256
        estimate = row.second_order_head + row.second_order_input
        assert found.estimated_loss == pytest.approx(estimate, rel=1e-9)
    unsure = "Their file does not say which table they are of"
    report = (tmp_path / "runs/compressed_table/report.md").read_text()
    assert "not checked" not in outcome.out and unsure not in report
    # The table of another model of the same shape, here of an earlier step.
    np.save(tmp_path / "table.npy", Run.open(run.folder / "ckpt/3").table())
    factorize = f"--config={CONFIGS / 'factorize.py'}", "--config.ranks=4"
    factorize += "--config.factorize.method=context", f"--config.workdir={tmp_path}"
    named = f"--config.model_path={tmp_path / 'table.npy'}"
    for ask in (asked(tmp_path / "table.npy", *words), (*factorize, named)):
        line = refusal(*ask, "--config.overwrite=True", unchanged=[tmp_path])
        assert "table.statistics.npz has statistics of another table (" in line


@pytest.mark.parametrize("side", SIDES)
def test_a_table_of_an_untied_model_is_weighted_by_its_own_side(side, tmp_path):
    tables = np.random.default_rng(0).normal(size=(2, 40, 8)).astype(np.float32)
    own, path = tables[SIDES.index(side)], tmp_path / "table.npy"
    np.save(path, own)
    sums = [*map(sha256_of_arrays, tables)]
    write_statistics(tmp_path / "table.statistics.npz", 40, 8, tables_sha256=sums)
    of_model = calibrate.read(tmp_path / "table.statistics.npz")
    bare = BareTable.read(path)
    recipe = Recipe("fisher", 1, 4 * 48, 4)
    wanted = Compressor(own, of_model, side=side)(recipe)
    found = bare.compressor(recipe)
    np.testing.assert_array_equal(found.dense, wanted.dense)
    assert bare.row(found).estimated_loss == sum(wanted.second_order) > 0
    assert bare.is_checked
    ask = f"--config={CONFIGS / 'factorize.py'}", "--config.factorize.method=fisher"
    ask += f"--config.model_path={path}", f"--config.workdir={tmp_path}"
    assert call(*ask, "--config.ranks=4").code == 0
    made = factor_files.read(tmp_path / "pca_factorized", 4, False).dense()
    weighted, _ = Factorizer(own, "fisher", seen_by(side, of_model)).of_rank(4, 1)
    np.testing.assert_allclose(made, weighted.dense(), atol=1e-5)


def test_statistics_allow_all_methods_and_choose_by_the_estimate(table):
    beside = table.parent / "table.statistics.npz"
    write_statistics(beside, V, D)
    ranks = "--config.ranks=6,10"
    plan = call(*asked(table, ranks), "--print_config").out.splitlines()
    outcome = call(*asked(table, ranks))
    assert outcome.code == 0, outcome
    rows = rows_of(table)
    assert {row.method for row in rows} >= {*METHODS, *KINDS, "baseline"}
    assert {row.bands for row in rows} == {1, 7}
    # The plan does not know which sizes are too small.
    tried = len(rows) + outcome.out.count("left out: rank ")
    assert plan[-2] == f"{tried} tables to make: roughly a minute"
    last = "; not checked: whether the statistics are of this table's model"
    assert plan[-1] == outcome.out.splitlines()[-1] and plan[-1].endswith(last)
    assert "best for their bytes, by the estimate:" in outcome.out
    text = (folder_of(table) / "report.md").read_text()
    assert "**No loss was measured**" in text
    assert "Their file does not say which table they are of" in text
    assert "| Energy kept | Estimate |" in text
    finding = text.split("## Finding")[1].split("\n- **")[0]
    assert "The relative error and the energy count all tokens" in finding
    factors = [row for row in rows if row.model_name == "best_k10"]
    chosen = read_bands(folder_of(table) / "best_k10/factors").sha256
    (best,) = {row.method for row in factors if row.table_sha256 == chosen}
    assert best == min(factors, key=lambda row: row.estimated_loss).method
    assert best != min(factors, key=lambda row: row.relative_error).method
    # A search goes by the estimate, too.
    assert call(*asked(table, "--config.compress.max_bytes=9000")).code == 0
    advice = json.loads((folder_of(table) / "advised/advice.json").read_text())
    estimates = [trial["estimated_loss"] for trial in advice["trials"]]
    assert advice["chosen"]["estimated_loss"] == min(estimates)
    # Numbers with and without statistics are not mixed.
    beside.unlink()
    line = refusal(*asked(table, ranks), unchanged=[table.parent])
    assert "statistics_sha256 (there " in line and "here None)" in line


def test_statistics_that_do_not_fit_are_refused(table):
    beside = table.parent / "table.statistics.npz"
    write_statistics(beside, V, D + 1)
    for words in ([], ["--print_config"]):
        line = refusal(*asked(table, *QUICK, *words), unchanged=[table.parent])
        assert f"statistics of a table ({V}, {D + 1}), but the table of" in line
    beside.write_bytes(b"damaged")
    line = refusal(*asked(table, *QUICK), unchanged=[table.parent])
    assert str(calibrate.beside(table)) in line


# A bound


def test_a_bound_is_one_on_all_that_is_stored(table):
    bound = 6 * (V + D)  # Without the mean, rank 6 would fit.
    words = "--config.compress.methods=pca", f"--config.compress.max_params={bound}"
    outcome = call(*asked(table, *words))
    assert outcome.code == 0, outcome
    folder = folder_of(table) / "advised"
    chosen = json.loads((folder / "advice.json").read_text())["chosen"]
    made = read_bands(folder / "factors")
    assert made.ranks == (5,) and made.mean.shape == (D,)
    stored = made.bands[0].wte.nbytes + made.bands[0].scale.nbytes + made.mean.nbytes
    assert chosen["bytes"] == chosen["memory"] == 4 * chosen["params"] == stored


@pytest.mark.parametrize("method", ["", "coded", "packed", "svd"])
def test_the_best_table_within_a_bound_is_written(table, method):
    words = "--config.compress.max_bytes=6000", f"--config.compress.methods={method}"
    outcome = call(*asked(table, *words))
    assert outcome.code == 0, outcome
    folder = folder_of(table) / "advised"
    chosen = json.loads((folder / "advice.json").read_text())["chosen"]
    assert chosen["bytes"] <= 6000
    error = error_of(read(folder, chosen)[0], np.load(table))
    assert chosen["relative_error"] == pytest.approx(error, rel=1e-5)
    assert f"relative error {error:.4g}, energy kept " in outcome.out
    assert f"\ntable: {folder}\nnot measured: loss, which " in outcome.out
    before = snapshot(table.parent)
    assert call(*asked(table, *words)).code == 0
    assert snapshot(table.parent) == before
    assert call(*asked(table, "--config.compress.max_bytes=5500")).code == 0
    (earlier,) = folder.parent.glob("advised.replaced-*")
    assert json.loads((earlier / "advice.json").read_text())["chosen"] == chosen


def test_a_bound_on_numbers_gives_factors(table):
    assert call(*asked(table, "--config.compress.max_params=3000")).code == 0
    folder = folder_of(table) / "advised"
    chosen = json.loads((folder / "advice.json").read_text())["chosen"]
    assert chosen["params"] <= 3000 and chosen["method"] == "pca"
    assert (folder / "factors").is_dir()


def test_factors_of_a_table_of_tiny_numbers_have_the_same_error(table):
    found = []
    for unit in (1, 1e-25):
        np.save(table, (unit * np.load(table)).astype(np.float32))
        assert call(*asked(table, *QUICK, "--config.overwrite=True")).code == 0
        (row,) = [r for r in rows_of(table) if (r.method, r.bits) == ("svd", 32)]
        found.append(row.relative_error)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_a_bound_that_no_table_fits_is_refused(table):
    outcome = call(*asked(table, "--config.compress.max_bytes=10"))
    assert outcome.code == 2
    last = outcome.err.splitlines()[-1]
    assert last.startswith("pcagpt: no table fits compress.max_bytes = 10: raise it to")
    assert not list(folder_of(table).glob("*"))


# The plan, and what is refused


def test_the_plan_counts_the_tables_and_says_what_is_missing(table):
    outcome = call(*asked(table, RANKS), "--print_config")
    assert outcome.code == 0, outcome
    what, amount, lacking = outcome.out.splitlines()[-3:]
    assert what == f"compress {table}, a table ({V}, {D}) without its model"
    assert not folder_of(table).exists()
    done = call(*asked(table, RANKS))
    assert amount == f"{len(rows_of(table))} tables to make: roughly a minute"
    assert lacking == done.out.splitlines()[-1]
    bound = call(*asked(table, "--config.compress.max_bytes=6000"), "--print_config")
    assert bound.out.splitlines()[-2] == "a search for one table: roughly a minute"


NEEDS_MODEL = "a table without its model has no text and no loss: leave it out"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("compress.max_added_loss=0.1", NEEDS_MODEL),
        ("compress.recover_ranks=2", NEEDS_MODEL),
        ("compress.calibration_tokens=9", NEEDS_MODEL),
        ("evaluate.max_tokens=9", NEEDS_MODEL),
        ("data.source=corpus", NEEDS_MODEL),
        ("data.tokenizer=gpt2", NEEDS_MODEL),
        ("model.compute_dtype=float32", NEEDS_MODEL),
        ("mesh.data=1", NEEDS_MODEL),
        ("split=test", NEEDS_MODEL),
        ("compress.methods=svd,context", "'context' needs statistics of the model"),
        ("compress.methods=context", "give them as .*/table.statistics.npz, or"),
        ("compress.methods=gptq", "'gptq' only serves for comparison"),
        ("ranks=99", r"ranks is \(99,\): the table of .* its rank is at most 16"),
        ("model_path=nothing.npy", "nothing.npy does not exist"),
    ],
)
def test_what_needs_the_model_or_fits_no_table_is_refused(table, word, said):
    for words in ([], ["--print_config"]):
        line = refusal(*asked(table, f"--config.{word}", *words), unchanged=[])
        assert re.search(said, line), line
    assert not list(folder_of(table).glob("*"))


def test_all_methods_are_those_that_the_table_is_enough_for(table):
    found = [
        call(*asked(table, *words, "--print_config")).out.splitlines()[-2]
        for words in ([RANKS], [RANKS, "--config.compress.methods=all"])
    ]
    assert found[0] == found[1]
    assert found[0].endswith(" tables to make: roughly a minute")


def one_row(values):
    return values[:1]


def one_large_row(values):
    values[5] = 9e5  # More than the largest scale of 4 bits can hold.
    return values


@pytest.mark.parametrize("change", [one_row, one_large_row])
def test_a_table_without_spread_and_one_beyond_float16_are_compressed(table, change):
    np.save(table, change(np.load(table)))
    words = "--config.compress.methods=svd,coded", "--config.ranks=1"
    outcome = call(*asked(table, *words))
    assert outcome.code == 0, outcome
    assert all(np.isfinite(row.relative_error) for row in rows_of(table))
