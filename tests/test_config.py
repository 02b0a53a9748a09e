"""The knobs: declared once, checked alone and together."""

import pytest
from ml_collections import ConfigDict

from pcagpt import config as knobs
from pcagpt.errors import UserError

CPU, OTHER_GPU = knobs.Hardware("cpu"), knobs.Hardware("gpu")
NVIDIA = knobs.Hardware("gpu", has_kernels=True)


def set_knob(config, path, value):
    section, _, name = path.rpartition(".")
    (config[section] if section else config)[name] = value


def changed(**sections):
    """The base config with `model={"n_head": 5}, seed=3` and the like."""
    config = knobs.base()
    for name, value in sections.items():
        if isinstance(value, dict):
            config[name].update(value)
        else:
            config[name] = value
    return config


def test_the_base_config_is_valid_and_holds_every_declared_default():
    config = knobs.base()
    knobs.validate(config)
    defaults = {path: knob.default for path, knob in knobs.KNOBS.items()}
    assert knobs.flat(config) == defaults


def test_every_knob_has_a_meaning_and_a_type():
    for path, knob in knobs.KNOBS.items():
        assert knob.meaning, path
        assert knob.type in (int, float, bool, str, tuple), path


def test_a_knob_that_is_not_declared_cannot_be_set():
    with pytest.raises(AttributeError, match="stps"):
        knobs.base().train.stps = 3


def test_every_call_returns_a_config_of_its_own():
    knobs.base().train.steps = 7
    assert knobs.base().train.steps != 7


def test_open_knobs_keep_their_type():
    config = knobs.base()
    config.model.n_embd_wte = 64
    with pytest.raises(TypeError):
        config.model.n_embd_wte = "many"


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("task", "trian", "one of train, experiment, factorize, compress, evaluate"),
        ("arm", "D", "one of baseline, continued, pca"),
        ("split", "dev", "one of train, val, test"),
        ("seed", -1, "from 0 to 4294967295"),
        ("ranks", (8, 0), "ranks holds 0: it must be at least 1"),
        ("ranks", ("8", 16), "ranks is '8,16': it must be whole numbers"),
        ("ranks", (True,), "ranks is 'True': it must be whole numbers"),
        ("experiment.seeds", (1, -1), "experiment.seeds holds -1"),
        ("model.n_embd_wte", 0, "at least 1"),
        ("model.n_layer", 0, "at least 1"),
        ("model.block_size", -4, "at least 1"),
        ("model.vocab_size", 0, "at least 1"),
        ("model.dropout", 1.0, "at least 0 and below 1"),
        ("model.attention", "flash", "one of auto, xla, cudnn"),
        ("model.compute_dtype", "float16", "one of auto, float32, bfloat16"),
        ("train.steps", 0, "at least 1"),
        ("train.learning_rate", 0.0, "positive"),
        ("train.learning_rate", float("nan"), "positive"),
        ("train.learning_rate", float("inf"), "positive"),
        ("train.schedule", "step", "one of constant, linear, cosine"),
        ("train.warmup_steps", -1, "at least 0"),
        ("train.final_learning_rate_share", 1.1, "from 0 to 1"),
        ("train.beta2", 1.0, "at least 0 and below 1"),
        ("finetune.steps_share", 0.0, "above 0 and at most 1"),
        ("factorize.singular_value_split", 2.0, "from 0 to 1"),
        ("checkpoint.keep_last", 0, "at least 1"),
        ("mesh.data", -2, "at least -1"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_its_name(path, value, words):
    config = knobs.base()
    set_knob(config, path, value)
    with pytest.raises(UserError) as refused:
        knobs.validate(config)
    assert str(refused.value).startswith(f"{path} ")
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("seed", 2**32 - 1),
        ("model.dropout", 0.0),
        ("finetune.steps_share", 1.0),
        ("train.warmup_steps", 0),
        ("train.gradient_clip", 0.0),
        ("train.final_learning_rate_share", 0.0),
        ("mesh.data", -1),
    ],
)
def test_a_value_at_the_end_of_its_range_is_accepted(path, value):
    config = knobs.base()
    set_knob(config, path, value)
    knobs.validate(config)


RANDOM = {"arm": "random"}
BANDS = {"band_sizes": (100, 400), "band_ranks": (64, 0)}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"n_head": 7}}, "model.n_head = 7 does not divide"),
        (
            {"train": {"batch_size": 10, "accumulation": 4}},
            "train.accumulation = 4 does not divide train.batch_size = 10",
        ),
        ({**RANDOM, "model": {"n_embd_wte": 769}}, "model.n_embd = 768"),
        ({"task": "experiment", "ranks": (8, 769)}, "ranks holds 769"),
        ({"task": "experiment", "ranks": ()}, "ranks is empty"),
        ({"task": "experiment", "ranks": (8, 8)}, "each may appear once"),
        ({"task": "experiment", "model": {"n_embd_wte": 8}}, "--config.ranks=8"),
        ({"experiment": {"seeds": (1, 2, 1)}}, "each may appear once"),
        ({"arm": "pca"}, "the pca model needs a rank"),
        (RANDOM, "the random model needs a rank"),
        ({"model": {"n_embd_wte": 64}}, "the baseline's table is full"),
        ({**RANDOM, "model": {"band_sizes": (9, 9)}}, "give every band both"),
        ({**RANDOM, "model": {**BANDS, "band_ranks": (64, 800)}}, "holds 800"),
        ({"arm": "pca", "model": BANDS}, "only the random model"),
        (
            {"compress": {"max_params": 9, "max_bytes": 9}},
            "compress.max_params and compress.max_bytes are both set",
        ),
        ({"task": "evaluate"}, "model_path is empty: name the run to evaluate"),
        ({"task": "factorize"}, "model_path is empty: name the run to factorize"),
    ],
)
def test_knobs_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(UserError) as refused:
        knobs.validate(changed(**values))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        {**RANDOM, "model": BANDS},
        {**RANDOM, "model": {"n_embd_wte": 768}},
        {"task": "factorize", "model_path": "x.npy", "ranks": (1000,)},
        {"task": "experiment", "ranks": (64, 1, 768)},
    ],
)
def test_ranks_and_bands_that_fit_are_accepted(values):
    knobs.validate(changed(**values))


def test_an_override_reads_back_as_the_value_it_was_made_of():
    assert knobs.override("ranks", (64, 128)) == "--config.ranks=64,128"
    assert knobs.override("model.bias", False) == "--config.model.bias=False"


def test_ranks_are_read_from_a_list_with_commas():
    assert knobs.ranks_of("64") == (64,)
    assert knobs.ranks_of("64,128") == (64, 128)
    with pytest.raises(UserError, match="'64,x' is not a list of ranks"):
        knobs.ranks_of("64,x")


def model_section(**values):
    return ConfigDict({**knobs.base().model.to_dict(), **values})


def test_the_vocabulary_is_the_corpus_s_unless_the_model_has_a_larger_one():
    assert knobs.model_settings(model_section(), 97, CPU)["vocab_size"] == 97
    section = model_section(vocab_size=200)
    assert knobs.model_settings(section, 97, CPU)["vocab_size"] == 200
    with pytest.raises(UserError, match="model.vocab_size is 200, .* up to 200"):
        knobs.model_settings(section, 201, CPU)


def test_bands_must_hold_the_whole_vocabulary():
    section = model_section(band_sizes=(10, 80), band_ranks=(8, 0))
    assert knobs.model_settings(section, 90, CPU)["band_ranks"] == (
        8,
        None,
    )
    with pytest.raises(UserError, match="add up to 90: .* 97"):
        knobs.model_settings(section, 97, CPU)


@pytest.mark.parametrize(
    ("hardware", "asked", "expected"),
    [
        (CPU, {}, ("float32", "xla", "xla")),
        (NVIDIA, {}, ("bfloat16", "cudnn", "pallas")),
        (OTHER_GPU, {}, ("bfloat16", "cudnn", "xla")),
        (knobs.Hardware("tpu"), {}, ("float32", "xla", "xla")),
        (NVIDIA, {"compute_dtype": "float32"}, ("float32", "xla", "xla")),
        (NVIDIA, {"attention": "xla"}, ("bfloat16", "xla", "pallas")),
        (NVIDIA, {"kernels": "xla"}, ("bfloat16", "cudnn", "xla")),
        (CPU, {"compute_dtype": "bfloat16"}, ("bfloat16", "xla", "xla")),
        (CPU, {"kernels": "pallas"}, ("float32", "xla", "pallas")),
    ],
)
def test_auto_takes_what_the_device_does_best(hardware, asked, expected):
    settings = knobs.model_settings(model_section(**asked), 97, hardware)
    chosen = settings["compute_dtype"], settings["attention"], settings["kernels"]
    assert chosen == expected


@pytest.mark.parametrize(
    ("hardware", "dtype"),
    [
        (OTHER_GPU, "bfloat16"),
        (NVIDIA, "float32"),
        (knobs.Hardware("tpu"), "bfloat16"),
    ],
)
def test_kernels_where_they_do_not_run_are_refused(hardware, dtype):
    section = model_section(kernels="pallas", compute_dtype=dtype)
    with pytest.raises(UserError, match="leave model.kernels=auto"):
        knobs.model_settings(section, 97, hardware)


def test_cudnn_attention_in_float32_is_refused():
    section = model_section(attention="cudnn", compute_dtype="float32")
    with pytest.raises(UserError, match="model.compute_dtype=bfloat16"):
        knobs.model_settings(section, 97, NVIDIA)
