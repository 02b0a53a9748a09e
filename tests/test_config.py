"""The knobs: declared once, frozen, checked alone and together."""

import dataclasses
import os
import shutil
import types
from pathlib import Path

import gpt2_folders
import pytest
from command_line import CONFIGS

import pcagpt
from pcagpt.config import (
    KNOBS,
    Settings,
    base,
    command_line,
    override,
    ranks_of,
    validate,
)
from pcagpt.config.checks import wrong_type
from pcagpt.config.knobs import PATH
from pcagpt.config.schema import InitSettings
from pcagpt.errors import UserError
from pcagpt.pipeline import plan
from pcagpt.run.trained import Run


def test_defaults_are_the_same_in_settings_and_config_files_and_are_valid():
    defaults = {path: knob.default for path, knob in KNOBS.items()}
    assert Settings().flat() == defaults
    assert Settings.of(base()) == Settings()
    validate(Settings())


def test_every_knob_has_a_meaning_and_a_type():
    for path, knob in KNOBS.items():
        assert knob.meaning, path
        assert knob.type in (int, float, bool, str, tuple), path


def test_settings_cannot_be_changed_but_copied_with_other_values():
    settings = Settings()
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.train.steps = 3
    copy = settings.replace({"train.steps": 3, "train.beta1": 0.5, "seed": 2})
    assert (copy.train.steps, copy.train.beta1, copy.seed) == (3, 0.5, 2)
    assert copy.train.batch_size == settings.train.batch_size
    assert settings == Settings()
    with pytest.raises(TypeError, match="stps"):
        settings.replace({"train.stps": 3})


def test_a_section_can_be_replaced_as_a_whole():
    settings = Settings().replace({"init.keep": "std", "init.blocks_from": "x"})
    replaced = settings.replace({"init": InitSettings(), "init.weights_from": "y"})
    assert replaced.init == InitSettings(weights_from="y")
    assert settings.replace({"init.weights_from": "y", "init": InitSettings()}) == (
        replaced  # The order does not count.
    )


def test_an_older_run_s_record_gets_defaults_and_loses_unknown_names():
    record = {"seed": 3, "ranks": [8, 16], "train": {"steps": 7}, "corpus_sha256": "x"}
    expected = {"seed": 3, "ranks": (8, 16), "train.steps": 7}
    assert Settings.of(record) == Settings().replace(expected)


def test_a_config_file_can_set_only_declared_knobs_to_values_of_their_type():
    config = base()
    with pytest.raises(AttributeError, match="stps"):
        config.train.stps = 3
    config.model.n_embd_wte = 64
    with pytest.raises(TypeError):
        config.model.n_embd_wte = "many"
    with pytest.raises(TypeError):
        base().distributed.coordinator_address = 8
    assert base().model.n_embd_wte is None


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("task", "trian", "'trian': it must be one of train, experiment, factorize"),
        ("seed", -1, "is -1: it must be from 0 to 4294967295"),
        ("ranks", (8, 0), "holds 0: it must be at least 1"),
        ("ranks", ("8", 16), "is '8,16': it must be whole numbers"),
        ("ranks", (True,), "is 'True': it must be whole numbers"),
        ("model.n_layer", 0, "at least 1"),
        ("model.n_embd_wte", 0, "at least 1"),
        ("model.dropout", 1.0, "at least 0 and below 1"),
        ("train.learning_rate", 0.0, "positive"),
        ("train.learning_rate", float("nan"), "positive"),
        ("train.learning_rate", float("inf"), "positive"),
        ("train.weight_decay", float("inf"), "it must be finite and at least 0"),
        ("train.warmup_steps", -1, "at least 0"),
        ("train.final_learning_rate_share", 1.1, "from 0 to 1"),
        ("finetune.steps_share", 0.0, "above 0 and at most 1"),
        ("mesh.data", -2, "-1, or at least 1"),
        ("mesh.data", 0, "-1, or at least 1"),
        ("init.keep", "some", "one of all, std"),
        ("sample.tokens", 2**63, "the largest is 9223372036854775807"),
        ("sample.temperature", 1e300, "is 1e+300: the largest is 3e+38"),
        ("train.weight_decay", 1e39, "is 1e+39: the largest is 3e+38"),
        ("ranks", (8, 10**20), "holds 100000000000000000000: the largest is"),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_by_name(path, value, words):
    with pytest.raises(UserError) as refused:
        validate(Settings().replace({path: value}))
    assert str(refused.value).startswith(f"{path} ")
    assert words in str(refused.value)


@pytest.mark.parametrize("path", [p for p, k in KNOBS.items() if k.type is tuple])
def test_the_example_in_an_error_is_a_value_that_the_knob_takes(path):
    example = str(wrong_type(path, "")).partition(f"as in --config.{path}=")[2]
    rule = KNOBS[path].rule
    assert all(rule.holds(int(number)) for number in example.split(","))


def test_values_at_the_end_of_their_range_are_accepted():
    ends = {
        "seed": 2**32 - 1,
        "model.dropout": 0.0,
        "train.warmup_steps": 0,
        "train.gradient_clip": 0.0,
        "train.final_learning_rate_share": 0.0,
        "mesh.data": -1,
        "train.batch_size": 2**63 - 1,
        "train.weight_decay": 3e38,
    }
    validate(Settings().replace(ends))


RANDOM, EXPERIMENT = {"arm": "random"}, {"task": "experiment"}
BANDS = {"model.band_sizes": (100, 400), "model.band_ranks": (64, 0)}
WEIGHTS = {"init.weights_from": "RUN"}
A = {"arm": "pca", "model.n_embd_wte": 8}
COMPRESS = {"task": "compress", "model_path": "RUN"}
FACTORIZE = {"task": "factorize", "model_path": "RUN"}
CONTEXT = {"factorize.method": "context"}
MEASURED = {
    "data.source": "corpus",
    "train.batch_size": 3,
    "train.loss_chunks": 3,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "model.compute_dtype": "float32",
    "model.attention": "xla",
    "model.kernels": "xla",
    "compress.calibration_tokens": 7,
}
CALIBRATION = {"compress.calibration_tokens": 7}
NAMED = {"data.tokenizer": "gpt2", "data.cache_dir": "cache"}
NO_BOARD = {"telemetry.tensorboard": False}
FOR_FACTORS = {
    "factorize.method": "svd",
    "factorize.bands": 12,
    "factorize.singular_value_split": 0.5,
    "factorize.statistics": "x.npz",
}
SHARES = {
    "finetune.steps_share",
    "finetune.learning_rate_share",
    "scratch.pca_learning_rate_share",
    "scratch.random_learning_rate_share",
}


@pytest.mark.parametrize(
    "values",
    [
        {"arm": "shuffled", "init.keep": "rows", "init.import_wte_npy": "x"},
        {"init.import_bands": "x", "init.import_wte_freeze": True},
        RANDOM | {"init.import_bands": "x", "init.keep": "shape"},
        RANDOM | {"factorize.bands": 3, "init.keep": "shape"},
        {"arm": "pca_finetune", "init.blocks_from": "x", "init.import_wte_npy": "y"},
        {"arm": "pca_distill", "distill.teacher": "x", "distill.share": 0.5},
    ],
    ids=str,
)
def test_imports_that_an_arm_starts_from_are_accepted(values):
    validate(Settings().replace(A | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model.n_head": 7}, "model.n_head = 7 does not divide model.n_embd = 768"),
        (
            {"train.batch_size": 10, "train.accumulation": 4},
            "train.accumulation = 4 does not divide train.batch_size = 10",
        ),
        (RANDOM | {"model.n_embd_wte": 769}, "model.n_embd_wte holds 769"),
        (EXPERIMENT | {"ranks": (8, 769)}, "ranks holds 769"),
        (EXPERIMENT | {"ranks": ()}, "ranks is empty"),
        (EXPERIMENT | {"ranks": (8, 8)}, "each may appear once"),
        ({"experiment.seeds": (1, 2, 1)}, "experiment.seeds is (1, 2, 1): each may"),
        ({"compress.bands": (1, 7, 7)}, "compress.bands is (1, 7, 7): each may"),
        ({"compress.bits": (8, 8)}, "compress.bits is (8, 8): each may"),
        ({"compress.methods": "kl,kl"}, "compress.methods is ('kl', 'kl'): each may"),
        ({"experiment.arms": "pca,pca"}, "experiment.arms is ('pca', 'pca'): each may"),
        ({"experiment.arms": "pca,svd"}, "holds 'svd': the arms besides D are "),
        ({"experiment.arms": "baseline"}, "experiment.arms holds 'baseline'"),
        (EXPERIMENT | {"model.n_embd_wte": 8}, "set its ranks with --config.ranks"),
        (
            EXPERIMENT | {"init.import_bands": "x"},
            "init.import_bands is set for an exp",
        ),
        (EXPERIMENT | {"distill.teacher": "x"}, "distill.teacher is set for an exp"),
        (EXPERIMENT | WEIGHTS, "init.weights_from is set for an experiment"),
        (EXPERIMENT | {"init.blocks_from": "x"}, "init.blocks_from is set for an exp"),
        (EXPERIMENT | {"init.keep": "rows"}, "controls with experiment.arms"),
        (A | {"init.keep": "rows"}, "use --config.arm=shuffled"),
        (A | {"init.keep": "shape"}, "use --config.arm=random with init.import_bands"),
        (A | {"init.blocks_from": "x"}, "use --config=configs/pca_finetune_k128.py"),
        (A | {"arm": "shuffled", "init.keep": "std"}, "use --config.arm=random_std"),
        (A | RANDOM | {"init.keep": "shape"}, "random with init.import_bands"),
        (A | RANDOM | {"init.import_wte_npy": "x"}, "use --config=configs/pca_k128.py"),
        ({"init.import_bands": "x"}, "the baseline model does not read it"),
        ({"init.blocks_from": "x"}, "use --config=configs/pca_finetune_k128.py"),
        ({"distill.teacher": "x"}, "use --config.arm=pca_distill, or configs/recover"),
        (A | {"distill.teacher": "x"}, "the pca model does not read it"),
        (
            A | {"arm": "pca_finetune", "distill.teacher": "x"},
            "pca_finetune model does",
        ),
        ({"distill.share": 0.5}, "distill.share is set, but no model has a teacher"),
        (EXPERIMENT | {"distill.share": 0.5}, "but no model has a teacher"),
        (COMPRESS | {"distill.share": 0.5}, "only train, experiment, compress with"),
        (A | {"factorize.statistics": "x"}, "needs none: choose one of "),
        (A | {"ranks": (64,)}, "ranks is (64,), but one model is trained"),
        (RANDOM, "the random model needs a rank, --config.model.n_embd_wte=128"),
        (
            {"arm": "pca_finetune"},
            "the pca_finetune model needs a run to start from, "
            "--config.init.weights_from=RUN, or a rank, --config.model.n_embd_wte=128",
        ),
        ({"model.n_embd_wte": 64}, "model.n_embd_wte is 64, but D has a full table"),
        (RANDOM | {"model.band_sizes": (9, 9)}, "give every band both"),
        (RANDOM | BANDS | {"model.band_ranks": (64, 800)}, "band_ranks holds 800"),
        ({"arm": "pca"} | BANDS, "only the random model"),
        (RANDOM | BANDS | {"factorize.bands": 3}, "band_sizes and factorize.bands are"),
        (RANDOM | BANDS | {"init.import_bands": "x"}, "and init.import_bands are both"),
        *(
            (A | knob | {"init.import_wte_npy": "x"}, "and init.import_wte_npy are")
            for knob in ({"factorize.bands": 7}, {"factorize.method": "context"})
        ),
        (
            EXPERIMENT | {"factorize.bands": 7, "init.import_wte_npy": "x"},
            "factorize.bands and init.import_wte_npy are both set",
        ),
        (
            A | {"factorize.bands": 7, "init.import_bands": "x"},
            "factorize.bands and init.import_bands are both set",
        ),
        (WEIGHTS | {"factorize.bands": 7}, "factorize.bands and init.weights_from are"),
        (
            A | {"init.import_bands": "x", "init.import_scale_matrices_npz": "y"},
            "init.import_bands and init.import_scale_matrices_npz are both set",
        ),
        *(
            (
                EXPERIMENT | {"experiment.arms": "random", path: value},
                f"{path} is set, but the random model does not read it: use --config=",
            )
            for path, value in (
                ("init.import_wte_npy", "x"),
                ("init.import_wte_freeze", True),
            )
        ),
        (WEIGHTS | {"arm": "pca"}, "init.weights_from is set for arm pca"),
        (WEIGHTS | {"init.keep": "std"}, "init.keep is set beside init.weights_from"),
        (
            {"compress.max_params": 9, "compress.max_bytes": 9},
            "compress.max_params and compress.max_bytes are both set",
        ),
        (
            {"compress.max_bytes": 9, "compress.recover_ranks": (8,)},
            "compress.recover_ranks is set beside compress.max_bytes",
        ),
        (
            {"compress.methods": "coded", "compress.max_params": 9},
            "compress.max_params is set, but coded and packed tables have as many",
        ),
        (
            {"compress.methods": "gptq, pq", "compress.max_bytes": 9},
            "compress.max_bytes is set, but tables of gptq, pq alone are only for "
            "comparison: add coded, packed or a method that makes factors",
        ),
        (
            {"compress.methods": "baseline", "compress.max_bytes": 9},
            "tables of baseline alone are only for comparison",
        ),
        (
            {"task": "sample", "compress.calibration_tokens": 9, "model_path": "x"},
            "compress.calibration_tokens is set for task sample",
        ),
        (
            {"distributed.num_processes": 2},
            "num_processes is set, but only several processes read it: add --config.d",
        ),
        (
            {"train.schedule": "constant", "train.final_learning_rate_share": 0.5},
            "train.final_learning_rate_share is set, but train.schedule is 'constant'",
        ),
        (
            COMPRESS | {"compress.max_bytes": 9, "ranks": (77,)},
            "ranks is set, but compress.max_bytes is set, too, and does not read it",
        ),
        (
            COMPRESS | {"compress.max_bytes": 9, "telemetry.tensorboard": False},
            "telemetry.tensorboard is set, but compress.max_bytes is set, too",
        ),
        (
            COMPRESS | {"compress.max_params": 9, "compress.bits": (4,)},
            "compress.bits is set, but compress.max_params is set, too",
        ),
        *(
            (task | {knob: value}, f"{knob} is set, but no statistics are measured")
            for task in (
                FACTORIZE,
                FACTORIZE | CONTEXT | {"factorize.statistics": "x.npz"},
                FACTORIZE | CONTEXT | {"model_path": "x.npy"},
            )
            for knob, value in MEASURED.items()
        ),
        *(
            (task | {knob: value}, f"{knob} is set, but no statistics are measured")
            for task in (
                FACTORIZE | NO_BOARD,
                FACTORIZE | {"model_path": "x.npy"},
            )
            for knob, value in NAMED.items()
        ),
        *(
            (task | CALIBRATION, "calibration_tokens is set, but no statistics are")
            for task in (
                {},
                A,
                EXPERIMENT,
                EXPERIMENT | CONTEXT | {"factorize.statistics": "x.npz"},
                RANDOM | {"model.n_embd_wte": 8},
                WEIGHTS,
            )
        ),
        *(
            (task | {"named": (knob,), knob: value}, f"{knob} is set, but no table is")
            for task in ({}, RANDOM | {"model.n_embd_wte": 8})
            for knob, value in FOR_FACTORS.items()
            if not (task and knob == "factorize.bands")
        ),
        (
            FACTORIZE | {"model_path": "x.npy", "model.dropout": 0.1},
            "model.dropout is set, but a table without its model does not read it",
        ),
        *(
            (WEIGHTS | {f"scratch.{arm}_learning_rate_share": 0.7}, "a run from init.w")
            for arm in ("pca", "random")
        ),
        (
            WEIGHTS | {"arm": "pca_distill", "distill.share": 0.5},
            "distill.share is set, but no model has a teacher",
        ),
        *(
            (arm | {knob: 0.7}, f"{knob} is set, but the {name} model does not read it")
            for name, arm, knobs in (
                ("baseline", {}, SHARES),
                ("pca", A, SHARES - {"scratch.pca_learning_rate_share"}),
                ("random", A | RANDOM, SHARES - {"scratch.random_learning_rate_share"}),
            )
            for knob in sorted(knobs)
        ),
        ({"workdir": ""}, "workdir is empty: give --config.workdir=FOLDER; . is"),
        ({"task": "evaluate"}, "model_path is empty: name the run to evaluate"),
        ({"task": "factorize"}, "model_path is empty: name the run to factorize"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(UserError) as refused:
        validate(Settings().replace(values))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        FACTORIZE | CONTEXT | MEASURED | NAMED | NO_BOARD,
        FACTORIZE | NAMED,
        EXPERIMENT | CONTEXT | CALIBRATION,
        A | CONTEXT | CALIBRATION,
        RANDOM | CONTEXT | CALIBRATION | {"model.n_embd_wte": 8, "factorize.bands": 3},
        FACTORIZE | {"data.source": ""},
        A | {"arm": "pca_finetune", "finetune.steps_share": 1.0},
        WEIGHTS | {"finetune.steps_share": 0.7, "finetune.learning_rate_share": 0.7},
        A | {"scratch.pca_learning_rate_share": 0.7},
        EXPERIMENT | dict.fromkeys(SHARES, 0.7),
        COMPRESS | {"ranks": ()},
        COMPRESS | {"ranks": (), "compress.max_added_loss": 0.1},
        COMPRESS | {"compress.max_bytes": 9, "compress.bits": (4,)},
    ],
)
def test_knobs_that_another_value_makes_read_are_accepted(values):
    validate(Settings().replace(values))


@pytest.mark.parametrize(
    "values",
    [
        RANDOM | BANDS,
        RANDOM | BANDS | {"model.n_embd_wte": 1000},
        RANDOM | {"model.n_embd_wte": 768},
        {"task": "factorize", "model_path": "x.npy", "ranks": (1000,)},
        EXPERIMENT | {"ranks": (64, 1, 768)},
        EXPERIMENT | {"init.import_wte_npy": "x", "init.import_wte_freeze": True},
        EXPERIMENT | {"factorize.bands": 7, "factorize.method": "context"},
        A | {"init.import_wte_npy": "x", "init.import_scale_matrices_npz": "y"},
        WEIGHTS | {"arm": "pca_finetune"},
        WEIGHTS | BANDS | {"arm": "pca_finetune"},
        WEIGHTS | {"distill.teacher": "x", "distill.share": 0.5},
        EXPERIMENT | {"experiment.arms": "pca,pca_distill", "distill.share": 0.5},
        COMPRESS | {"compress.recover_ranks": (8,), "distill.share": 0.5},
        A | {"factorize.statistics": "x", "factorize.method": "kl"},
    ],
)
def test_knobs_that_fit_together_are_accepted(values):
    validate(Settings().replace(values))


def test_an_override_is_written_as_the_command_line_reads_it():
    assert override("ranks", (64, 128)) == "--config.ranks=64,128"
    assert override("model.bias", False) == "--config.model.bias=False"


def test_ranks_are_read_from_a_list_with_commas():
    assert ranks_of("64") == (64,)
    assert ranks_of("64,128") == (64, 128)
    with pytest.raises(UserError, match="'64,x' is not a list of ranks"):
        ranks_of("64,x")


def test_every_path_is_expanded_and_no_folder_is_called_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from pcagpt.config import base\n"
        "def get_config():\n"
        "    c = base()\n    c.workdir = '~/runs'\n    return c\n"
    )
    paths = [path for path, knob in KNOBS.items() if knob.rule is PATH]
    assert {"workdir", "model_path", "data.source", "data.cache_dir"} < set(paths)
    assert {"distill.teacher", "factorize.statistics"} < set(paths)
    assert sum(path.startswith("init.") for path in paths) == 5
    words = [f"--config.{path}=~/x" for path in paths if path != "workdir"]
    settings, _ = command_line.parse(["pcagpt", "--config=~/mine.py", *words])
    for path in paths:
        wanted = "runs" if path == "workdir" else "x"
        assert settings.flat()[path] == str(tmp_path / wanted)
    for name in ("~nobody-here/x", "~"):
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        with pytest.raises(UserError, match="there is no such home folder"):
            command_line.parse(["pcagpt", f"--config={name}/x.py"])


def parse(*words):
    return command_line.parse(["pcagpt", f"--config={CONFIGS / 'demo.py'}", *words])


@pytest.mark.parametrize(
    "name", [name for name, knob in KNOBS.items() if knob.type is not bool]
)
def test_the_example_for_a_knob_without_a_value_has_a_value(name):
    with pytest.raises(UserError) as refused:
        parse(f"--config.{name}")
    _, shown, example = str(refused.value).partition(", as in ")
    if shown:
        parse(example)
        assert not example.endswith("=")


@pytest.mark.parametrize(
    ("name", "knob"),
    [
        ("train.lr", "train.learning_rate"),
        ("lr", "train.learning_rate"),
        ("batch_size", "train.batch_size or evaluate.batch_size"),
        ("train.max_iters", "train.steps"),
        ("train.n_steps", "train.steps"),
        ("model.d_model", "model.n_embd"),
        ("model.n_ctx", "model.block_size"),
        ("out_dir", "workdir"),
        ("rank", "ranks or model.n_embd_wte"),
    ],
)
def test_a_name_of_other_programs_leads_to_the_knob(name, knob):
    with pytest.raises(UserError, match=rf"'{name}': did you mean {knob}\? \("):
        parse(f"--config.{name}=3")


def test_every_synonym_is_of_a_knob_and_no_knob_itself():
    known = command_line._SYNONYMS
    assert known.keys() <= KNOBS.keys()
    assert not KNOBS.keys() & set(" ".join(known.values()).split())


@pytest.mark.parametrize("words", [["demo"], ["--config=demo"], ["--config", "demo"]])
def test_a_config_has_a_short_name_in_any_folder(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings, _ = command_line.parse(["pcagpt", *words, "--config.seed=3"])
    assert (settings.workdir, settings.seed) == ("checkpoints/demo", 3)


def test_a_short_name_takes_an_argument_and_a_person_s_file_comes_first(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings, _ = command_line.parse(["pcagpt", "experiment:16,32"])
    assert settings.ranks == (16, 32)
    config = "from pcagpt.config import base as get_config\n"
    Path("configs").mkdir()
    Path("configs/demo.py").write_text(config)
    for word in ("--config=configs/demo.py", "configs/demo.py"):
        settings, _ = command_line.parse(["pcagpt", word])
        assert settings.workdir == "checkpoints"
    Path("demo").write_text("not Python")
    for word in ("--config=demo", "demo"):
        settings, _ = command_line.parse(["pcagpt", word])
        assert settings.workdir == "checkpoints/demo"


def test_only_a_config_is_run_for_a_bare_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("own.py", "one.txt", "word"):
        config = f"from pcagpt.config import base as get_config\nprint('{name}')\n"
        Path(name).write_text(config)
    command_line.parse(["pcagpt", "own.py"])
    for name in ("one.txt", "word"):
        with pytest.raises(UserError):
            command_line.parse(["pcagpt", name])
    assert capsys.readouterr().out == "own.py\n"


def test_an_installed_package_has_its_configs_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_line, "_CONFIGS", (Path("none"), tmp_path / "share"))
    with pytest.raises(UserError, match="no config"):
        command_line.parse(["pcagpt", "demo"])
    shutil.copytree(CONFIGS, tmp_path / "share")
    assert command_line.parse(["pcagpt", "demo"])[0].task == "experiment"


def test_the_last_of_repeated_words_counts():
    for earlier in (
        ["--config.ranks=4,8"],
        ["-config.ranks=4,8"],
        ["--config.ranks", "8"],
    ):
        for later in (["--config.ranks=4"], ["-config.ranks", "4"]):
            settings, _ = parse(*earlier, "--config.seed=2", *later)
            assert (settings.ranks, settings.seed) == ((4,), 2)


def test_whole_numbers_can_be_short():
    for text, value in (("1e3", 1000), ("1.5e3", 1500), ("1_000", 1000)):
        assert parse(f"--config.train.steps={text}")[0].train.steps == value
    with pytest.raises(
        UserError, match=r"steps is '1\.5e0': it must be a whole number"
    ):
        parse("--config.train.steps=1.5e0")
    with pytest.raises(UserError, match="steps is 1000000000000000000000000000000: "):
        validate(parse("--config.train.steps=1e30")[0])


def checked(config, *words):
    """The settings of a command line, after all checks that need no files."""
    settings, _ = command_line.parse(["pcagpt", config, *words])
    validate(settings)
    return settings


@pytest.mark.parametrize(
    ("config", "words", "refused"),
    [
        ("compress", ["compress.max_bytes=100000", "ranks=128"], "ranks"),
        (
            "compress",
            ["compress.max_bytes=9", "telemetry.tensorboard=True"],
            "telemetry.tensorboard",
        ),
        ("compress", ["model_path=x.npy", "data.source=sotu"], "data.source"),
        ("compress", ["checkpoint.every=1000"], "checkpoint.every"),
        ("sample", ["train.steps=5000"], "train.steps"),
        ("random_k128", ["ranks=128", "model.n_embd_wte=8"], "ranks"),
        (
            "pca_k128",
            ["factorize.method=svd", "init.import_bands=x"],
            "factorize.method",
        ),
    ],
)
def test_a_named_knob_that_is_not_read_is_refused_at_its_default_too(
    config, words, refused
):
    words = [f"--config.{word}" for word in ("model_path=RUN", *words)]
    if config.endswith("k128"):
        del words[0]
    with pytest.raises(UserError, match=f"^{refused} "):
        checked(config, *words)
    validate(command_line.parse(["pcagpt", config, *words])[0].replace({"named": ()}))


def test_a_named_default_that_is_not_the_run_s_own_value_is_refused(tmp_path):
    run = Run.open(gpt2_folders.write(tmp_path / "model"))
    settings = Settings()
    assert run.settings.model.n_layer != settings.model.n_layer
    run.check_model(settings)
    with pytest.raises(UserError, match=r"^model\.n_layer is 12, but"):
        run.check_model(settings.replace({"named": frozenset({"model.n_layer"})}))
    trained = types.SimpleNamespace(
        settings=Settings().replace({"train.steps": 7}),
        record={"train": {}},
        folder="RUN",
    )
    plan._check_own_budget(settings, trained)
    with pytest.raises(UserError, match=r"^train\.steps is 5000, but RUN"):
        named = settings.replace({"named": frozenset({"train.steps"})})
        plan._check_own_budget(named, trained)


def test_a_named_knob_may_ask_for_nothing_or_take_back_what_a_config_file_sets(
    tmp_path,
):
    words = ["--config.model_path=RUN", "--config.compress.max_bytes=9"]
    checked("compress", *words, "--config.telemetry.wandb=False")
    (tmp_path / "mine.py").write_text(
        "from pcagpt.config import base\n"
        "def get_config():\n"
        "    c = base()\n    c.task = 'compress'\n    c.ranks = (8,)\n    return c\n"
    )
    mine = f"--config={tmp_path / 'mine.py'}"
    with pytest.raises(UserError, match="^ranks is set"):
        checked(mine, *words)
    assert checked(mine, *words, "--config.ranks=128").named == {
        *("model_path", "compress.max_bytes"),
    }


@pytest.mark.parametrize(
    "values",
    [
        {"task": "evaluate", "model_path": "D", "model.n_embd": 32},
        A | {"model_path": "D", "model.n_embd_wte": 800},
        {"arm": "pca_finetune", "init.weights_from": "B", "model.n_embd": 32},
    ],
    ids=str,
)
def test_sizes_are_not_compared_with_defaults_if_a_model_decides_them(values):
    validate(Settings().replace(values))


def test_a_word_that_is_no_utf8_is_refused():
    with pytest.raises(UserError, match="is not UTF-8: write it in UTF-8$"):
        command_line.parse(["pcagpt", "--config.workdir=a\udcff"])


def test_a_path_that_leads_to_a_place_that_is_no_utf8_is_refused(tmp_path, monkeypatch):
    bad, words = tmp_path / "bad\udcffcwd", "bad.udcffcwd.* is not UTF-8: write it"
    bad.mkdir()
    (tmp_path / "link").symlink_to(bad)
    config = f"--config={CONFIGS / 'baseline.py'}"
    with pytest.raises(UserError, match=words):
        command_line.parse(["pcagpt", config, f"--config.workdir={tmp_path / 'link'}"])
    with pytest.raises(UserError, match=words):
        pcagpt.load(tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    for own in ("link", "a\udcff"):  # The current folder is not to blame.
        with pytest.raises(UserError, match="^'.* is not UTF-8: write it in UTF-8$"):
            pcagpt.load(own)
    monkeypatch.chdir(bad)
    words = f"^the current folder: .*{words}.*, or go to another"
    with pytest.raises(UserError, match=words):  # The workdir is relative.
        command_line.parse(["pcagpt", config])
    with pytest.raises(UserError, match=words):
        pcagpt.load("run")


def test_utf8_that_the_locale_cannot_read_names_the_locale():
    word = "--config.sample.prompt=é".encode().decode("ascii", "surrogateescape")
    with pytest.raises(UserError, match="locale cannot .*: set LC_ALL=C.UTF-8$"):
        command_line.parse(["pcagpt", word])
