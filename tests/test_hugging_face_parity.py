"""The same numbers as transformers, for models that go in and models that come out.

Needs torch and transformers: pip install 'pcagpt[hf]'.
"""

import importlib.util
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from gpt2_folders import write
from talkers import PROMPT, TOKENS, write_talker
from test_export import MODELS, SMALL, V, run_export, write_run, write_small
from test_tokenizer_files import HARD_TEXT
from tokenizer_folders import byte_level

import pcagpt
from pcagpt import trees
from pcagpt.config.schema import ModelSettings
from pcagpt.data import hugging_face_tokenizer, in_transformers, vocabulary
from pcagpt.data.tokenizer import RANKS
from pcagpt.file_hashes import sha256_of_file
from pcagpt.json_files import read_json
from pcagpt.losses import cross_entropy
from pcagpt.run.generate import generate
from pcagpt.run.generation_files import FILE
from pcagpt.run.trained import Run

NEEDED = "pip install 'pcagpt[hf]'"
torch = pytest.importorskip("torch", reason=NEEDED)
transformers = pytest.importorskip("transformers", reason=NEEDED)
tokenizers = pytest.importorskip("tokenizers", reason=NEEDED)
# These two packages warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")

SHAPES = {
    "one_block": {
        "vocab_size": 97,
        "n_positions": 16,
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 1,
    },
    "deep": {
        "vocab_size": 211,
        "n_positions": 24,
        "n_embd": 48,
        "n_layer": 5,
        "n_head": 4,
    },
    "other_fields": {
        "vocab_size": 128,
        "n_positions": 32,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "activation_function": "gelu",
    },
}


def random_model(seed=0, **fields):
    """A GPT2LMHeadModel whose weights, biases too, are large enough to tell."""
    config = transformers.GPT2Config(
        bos_token_id=0, eos_token_id=0, attn_implementation="eager", **fields
    )
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=SHAPES)
def theirs(request):
    return random_model(**SHAPES[request.param])


@pytest.fixture
def folder(theirs, tmp_path):
    theirs.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def tokens_of(theirs, count=3):
    shape = count, theirs.config.n_positions
    return np.random.default_rng(0).integers(theirs.config.vocab_size, size=shape)


def of_ours(folder):
    """(model, variables) in float32 on the CPU."""
    return Run.open(folder).load(ModelSettings(compute_dtype="float32"))


def assert_relative(found, wanted, tolerance):
    """The largest difference is small beside the largest value."""
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


def test_logits_are_those_of_transformers(theirs, folder):
    tokens_BT = tokens_of(theirs)
    model, variables = of_ours(folder)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        wanted = theirs(torch.tensor(tokens_BT)).logits.numpy()
        assert_relative(model.apply(variables, tokens_BT), wanted, 1e-5)


def test_loss_and_the_gradient_of_the_table_are_those_of_transformers(theirs, folder):
    tokens_BT = tokens_of(theirs)
    model, variables = of_ours(folder)

    def loss(params):
        given = variables | {"params": params}
        h_ND = model.apply(given, tokens_BT[:, :-1], method="hidden")
        head = model.apply(given, method="head")
        targets_N = tokens_BT[:, 1:].reshape(-1)
        return cross_entropy(h_ND, head, targets_N, chunks=2) / targets_N.size

    found, gradients = jax.value_and_grad(loss)(variables["params"])
    given = torch.tensor(tokens_BT)
    wanted = theirs(given, labels=given).loss
    wanted.backward()
    assert float(found) == pytest.approx(wanted.item(), rel=1e-5)
    rows = theirs.config.vocab_size
    of_table = trees.flatten(gradients)["embed/band_0/wte"][:rows]
    assert_relative(of_table, theirs.transformer.wte.weight.grad.numpy(), 1e-5)


def greedy(theirs, prompt, count):
    """The likeliest continuation, by transformers."""
    given = torch.tensor([prompt])
    found = theirs.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        pad_token_id=0,
    )
    return found[0, len(prompt) :].tolist()


def test_the_likeliest_tokens_are_those_of_transformers(theirs, folder):
    prompt, count = [3, 1, 4, 1, 5], theirs.config.n_positions - 5
    # min_new_tokens keeps transformers from drawing the end of text, token 0.
    theirs.generation_config.eos_token_id = None
    drawn = generate(*of_ours(folder), np.array(prompt), 1, seed=0, temperature=0)
    found = [int(one[0]) for one in itertools.islice(drawn, count)]
    assert found == greedy(theirs, prompt, count)


# Models that come out.


OUT = {**MODELS, "gpt2 tokens": {"n_embd_wte": 4, "vocab_size": 50257}}


@pytest.fixture(params=OUT)
def exported(request, tmp_path):
    """(a run, its export)."""
    model = dict(OUT[request.param])
    vocab_size = model.pop("vocab_size", V)
    record = {"tokenizer": "gpt2"} if vocab_size > V else {}
    run = write_run(tmp_path / "run", vocab_size=vocab_size, record=record, **model)
    return run, run_export(run, tmp_path)


def test_transformers_loads_an_export_as_it_is_and_computes_the_same(exported):
    run, made = exported
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        made, output_loading_info=True
    )
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys"))
    assert theirs.lm_head.weight is theirs.transformer.wte.weight
    assert theirs.lm_head.weight.dtype == torch.float32
    tokens_BT = tokens_of(theirs)
    model, variables = of_ours(run)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        wanted_BTV = np.asarray(model.apply(variables, tokens_BT))
        given = torch.tensor(tokens_BT)
        found = theirs.eval()(given, labels=given)
    assert_relative(found.logits.numpy(), wanted_BTV, 1e-5)
    next_BT1 = tokens_BT[:, 1:, None]
    log_sums_BT = np.log(np.exp(wanted_BTV[:, :-1]).sum(axis=-1))
    chosen_BT = np.take_along_axis(wanted_BTV[:, :-1], next_BT1, axis=2)[..., 0]
    loss = float((log_sums_BT - chosen_BT).mean())
    assert found.loss.item() == pytest.approx(loss, rel=1e-5)


def test_an_export_continues_a_prompt_as_the_run_does(exported):
    run, made = exported
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made).eval()
    theirs.generation_config.eos_token_id = None
    prompt = [3, 1, 4, 1, 5]
    drawn = generate(*of_ours(run), np.array(prompt), 1, seed=0, temperature=0)
    found = [int(one[0]) for one in itertools.islice(drawn, 11)]
    assert found == greedy(theirs, prompt, 11)


@pytest.fixture(params=SMALL)
def small(request, tmp_path):
    """(a run with a compressed table, the form of its export, the export)."""
    run, form = write_small(request.param, tmp_path / "run")
    return run, form, run_export(run, tmp_path, form)


def loader_of(made):
    """The module load_coded of an export."""
    code = importlib.util.spec_from_file_location("loader", made / "load_coded.py")
    loader = importlib.util.module_from_spec(code)
    code.loader.exec_module(loader)
    return loader


def opened(form, made):
    """(the model of an export in transformers, what loading it reports)."""
    if form == "coded":
        return loader_of(made).load(dtype=torch.float32), {}
    return transformers.AutoModelForCausalLM.from_pretrained(
        made,
        trust_remote_code=True,
        dtype=torch.float32,
        output_loading_info=True,
    )


def test_a_coded_export_with_a_file_of_another_model_is_refused(tmp_path):
    run, form = write_small("coded", tmp_path / "run")
    made = run_export(run, tmp_path, form)
    for name in ("table.pcat", "others.safetensors", "config.json"):
        whole = (made / name).read_bytes()
        (made / name).write_bytes(whole + b" ")
        with pytest.raises(ValueError, match=f"{name} was changed .*export the model"):
            opened(form, made)
        (made / name).write_bytes(whole)
    opened(form, made)


def test_a_coded_export_opens_in_the_type_of_its_config(tmp_path):
    run, form = write_small("coded", tmp_path / "run")
    made = run_export(run, tmp_path, form)
    load = loader_of(made).load
    assert load().dtype == torch.float32
    config, record = (
        json.loads((made / name).read_text()) for name in ("config.json", "pcagpt.json")
    )
    (made / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    sha256 = sha256_of_file(made / "config.json")
    record["files"]["config.json"]["sha256"] = sha256
    (made / "pcagpt.json").write_text(json.dumps(record))
    assert load().dtype == torch.bfloat16
    assert load(dtype=torch.float32).dtype == torch.float32


def test_an_export_with_a_small_table_computes_the_same(small):
    run, form, made = small
    theirs, report = opened(form, made)
    assert not any(report.get(name) for name in ("missing_keys", "unexpected_keys"))
    tokens_BT = tokens_of(theirs)
    model, variables = of_ours(run)
    with jax.default_matmul_precision("highest"), torch.no_grad():
        wanted_BTV = np.asarray(model.apply(variables, tokens_BT))
        found = theirs.eval()(torch.tensor(tokens_BT)).logits.numpy()
    assert_relative(found, wanted_BTV, 1e-5)
    theirs.generation_config.eos_token_id = None
    prompt = [3, 1, 4, 1, 5]
    drawn = generate(model, variables, np.array(prompt), 1, seed=0, temperature=0)
    assert greedy(theirs, prompt, 11) == [
        int(one[0]) for one in itertools.islice(drawn, 11)
    ]


def test_the_gradient_of_the_factors_is_ours(tmp_path):
    run, form = write_small("bands", tmp_path / "run")
    theirs, _ = opened(form, run_export(run, tmp_path, form))
    tokens_BT = tokens_of(theirs)
    model, variables = of_ours(run)

    def loss(params):
        given = variables | {"params": params}
        h_ND = model.apply(given, tokens_BT[:, :-1], method="hidden")
        targets_N = model.apply(given, tokens_BT[:, 1:].reshape(-1), method=_columns)
        head = model.apply(given, method="head")
        return cross_entropy(h_ND, head, targets_N, chunks=2) / targets_N.size

    gradients = trees.flatten(jax.grad(loss)(variables["params"]))
    given = torch.tensor(tokens_BT)
    theirs.eval()(given, labels=given).loss.backward()
    for number, band in enumerate(theirs.transformer.wte.bands):
        for name, parameter in band.named_parameters():
            ours = gradients[f"embed/band_{number}/{name}"][: len(parameter)]
            assert_relative(ours, parameter.grad.numpy(), 1e-5)


def _columns(model, tokens_N):
    return model.embed.renumber(tokens_N)


def test_a_small_export_is_small_in_memory_and_saved_again(small, tmp_path):
    run, form, made = small
    theirs, _ = opened(form, made)
    if form == "coded":  # It is decoded.
        assert theirs.transformer.wte.weight is theirs.lm_head.weight
        return
    arrays = [*theirs.parameters(), *theirs.buffers()]
    held = sum(array.numel() * array.element_size() for array in arrays)
    assert held <= (made / "model.safetensors").stat().st_size
    assert not list(theirs.lm_head.parameters())
    tokens = torch.tensor(tokens_of(theirs))
    theirs.save_pretrained(tmp_path / "again")
    again, _ = opened(form, tmp_path / "again")
    assert torch.equal(again.eval()(tokens).logits, theirs.eval()(tokens).logits)


def test_transformers_refuses_a_small_export_without_its_code(tmp_path):
    run, form = write_small("bands", tmp_path / "run")
    made = run_export(run, tmp_path, form)
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForCausalLM.from_pretrained(made, trust_remote_code=False)


@pytest.fixture
def chat(tmp_path):
    """A model for chats: its texts end at tokens of its own, the first one soon."""
    byte_level(tmp_path)
    file, folder = tmp_path / "whole/tokenizer.json", tmp_path / "chat"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(file),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}<|im_end|>"
    tokenizer.save_pretrained(folder)
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = {"eos_token_id": end, "pad_token_id": pad}
    soon = write_talker(folder, vocab_size=len(tokenizer), bos_token_id=2, **ids)
    transformers.GenerationConfig(
        eos_token_id=[end, soon], pad_token_id=pad, temperature=0.7, do_sample=True
    ).save_pretrained(folder)
    return folder


def greedy_text(model, folder):
    """(text after a prompt, the template of a chat applied), by transformers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    given = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = {"do_sample": False, "temperature": None, "max_new_tokens": TOKENS}
    found = model.generate(given, attention_mask=torch.ones_like(given), **options)
    said = [{"role": "user", "content": "people"}]
    of_chat = tokenizer.apply_chat_template(said, tokenize=False)
    return tokenizer.decode(found[0, given.shape[1] :]), of_chat


@pytest.mark.parametrize("form", ["hf", "hf-factored", "coded"])
def test_an_export_writes_the_text_of_its_model_up_to_its_end(form, chat, tmp_path):
    model = chat
    if form != "hf":
        rows = read_json(chat / "config.json", "")["vocab_size"]
        data = dict.fromkeys(("train", "val"), np.arange(2000) % rows)
        methods, model = "coded" if form == "coded" else "svd", tmp_path / "small"
        limit = {"max_bytes": rows * 40, "methods": methods}  # Of 64 for the table
        pcagpt.compress(chat, data=data, **limit).save(model)
    made = run_export(model, tmp_path, form)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(chat)
    found = opened(form, made)
    found = found[0] if isinstance(found, tuple) else found
    text, of_chat = greedy_text(found, made)
    wanted, of_theirs = greedy_text(theirs, chat)
    assert of_chat == of_theirs
    if form == "hf":
        assert text == wanted
    generated = "".join(
        pcagpt.load(made).generate(PROMPT, temperature=0, max_tokens=TOKENS)
    )
    assert text.startswith(generated)
    settings = [one.generation_config.to_diff_dict() for one in (found, theirs)]
    assert settings[0] == settings[1]


def test_an_export_draws_texts_as_config_json_of_its_model_says(tmp_path):
    """As transformers does if there is no generation_config.json."""
    config = transformers.GenerationConfig().to_dict()
    # The ids have tests of their own; the version is that of the file.
    no_drawing = {"_from_model_config", "transformers_version"}
    left_out = {name for name in config if name.endswith("_id")} | no_drawing
    odd = dict.fromkeys(config.keys() - left_out, 1)
    write(tmp_path / "model", **odd, bos_token_id=1, eos_token_id=2)
    made = read_json(run_export(tmp_path / "model", tmp_path) / FILE, "")
    assert {name: made.get(name) for name in odd} == odd


END, WHOLE, CONFIG = "<|endoftext|>", "tokenizer.json", "tokenizer_config.json"


def first(number):
    """A rule of tokenizer.json that puts a token before each text."""
    token, text = {"SpecialToken": {"id": END, "type_id": 0}}, {"id": "A", "type_id": 0}
    parts = [token, {"Sequence": text}]
    texts = {END: {"id": END, "ids": [number], "tokens": [END]}}
    kind = {"type": "TemplateProcessing", "single": parts, "pair": parts}
    return {"post_processor": kind | {"special_tokens": texts}}


SURELY = "_for_bpe_even_though_it_will_corrupt_output"
AT_MOST = {"strategy": "LongestFirst", "direction": "Right", "stride": 0}
FILLED = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None}
FILLED |= {"pad_id": 1, "pad_type_id": 0, "pad_token": '"'}
ADDED = {"id": 4096, "content": "<pad>", "special": True}
ADDED |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
CLEANED = [f"clean_up_tokenization_spaces{more}" for more in ("", SURELY)]
# {what a person's files ask for: (file, fields, files that are removed)}
OWN_FIELDS = {
    "a_first_token": (WHOLE, first(4095), ()),
    "a_first_token_without_config": (WHOLE, first(4095), (CONFIG,)),
    "add_bos_token": (CONFIG, {"add_bos_token": True}, (WHOLE,)),
    "add_eos_token": (CONFIG, {"add_eos_token": True}, (WHOLE,)),
    "truncation": (WHOLE, {"truncation": AT_MOST | {"max_length": 5}}, ()),
    "padding": (WHOLE, {"padding": FILLED}, ()),
    "normalizer": (WHOLE, {"normalizer": {"type": "Lowercase"}}, ()),
    "added_token": (
        WHOLE,
        {"added_tokens": [{**ADDED, "id": 4095, "content": END}, ADDED]},
        (),
    ),
    "class": (CONFIG, {"tokenizer_class": "PreTrainedTokenizerFast"}, ()),
    "padding_side": (CONFIG, {"pad_token": END, "padding_side": "left"}, ()),
    "truncation_side": (CONFIG, {"truncation_side": "left", "model_max_length": 4}, ()),
    "spaces": (CONFIG, dict.fromkeys(CLEANED, True), ()),
    "chat": (CONFIG, {"chat_template": "{{ messages[0].content }}!"}, ()),
}


def said_by(folder):
    """What transformers makes of texts with the tokenizer of a folder."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(HARD_TEXT).input_ids
    asked = {"padding": tokenizer.pad_token is not None, "truncation": True}
    told = tokenizer.chat_template and tokenizer.apply_chat_template(
        [{"role": "user", "content": "people"}], tokenize=False
    )
    return (
        [ids, tokenizer(["The people", "free of"], **asked).input_ids],
        [tokenizer.decode(ids), tokenizer.decode(tokenizer("It is n't .").input_ids)],
        [told, tokenizer.model_max_length, tokenizer.special_tokens_map],
    )


@pytest.fixture(params=OWN_FIELDS)
def with_own_files(request, tmp_path):
    """A model with the tokens of the package, and more in its tokenizer's files."""
    folder, (name, fields, gone) = tmp_path / "model", OWN_FIELDS[request.param]
    write(folder, vocab_size=4100)
    hugging_face_tokenizer.write(folder, "sotu4096", 16)
    content = read_json(folder / name, "") | fields
    (folder / name).write_text(json.dumps(content))
    for other in gone:
        (folder / other).unlink()
    if name == WHOLE and CONFIG not in gone:
        # The class of GPT-2 reads less of it.
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        own = read_json(folder / CONFIG, "") | kind
        (folder / CONFIG).write_text(json.dumps(own))
    return folder


def test_an_export_keeps_what_the_tokenizers_own_files_ask_for(
    with_own_files, tmp_path
):
    made = run_export(with_own_files, tmp_path)
    assert said_by(made) == said_by(with_own_files)
    for name in (WHOLE, CONFIG):
        if (with_own_files / name).is_file():
            stored = read_json(with_own_files / name, "")
            assert read_json(made / name, "") == stored


@pytest.mark.parametrize("form", ["hf-factored", "coded"])
@pytest.mark.parametrize(
    "with_own_files", ["a_first_token_without_config", "add_bos_token"], indirect=True
)
def test_a_small_export_keeps_what_the_tokenizers_own_files_ask_for(
    form, with_own_files, tmp_path
):
    """Also if the folder of the model is gone."""
    data = dict.fromkeys(("train", "val"), np.arange(2000))
    methods, small = "coded" if form == "coded" else "svd", tmp_path / "small"
    limit = {"max_bytes": 4100 * 40, "methods": methods}
    pcagpt.compress(with_own_files, data=data, **limit).save(small)
    wanted = said_by(with_own_files)
    shutil.rmtree(with_own_files)
    made = run_export(small, tmp_path, form)
    assert said_by(made) == wanted
    if form == "hf-factored":
        assert said_by(run_export(made, tmp_path / "again")) == wanted


@pytest.mark.parametrize("name", RANKS)
def test_transformers_tokenizes_with_an_export_as_the_run_does(name, tmp_path):
    run = write_run(
        tmp_path / "run", vocab_size=RANKS[name].vocab_size, record={"tokenizer": name}
    )
    made, ours = run_export(run, tmp_path), vocabulary.load(name)
    texts = [HARD_TEXT, "The people of the United States<|endoftext|>\nOne"]

    def check(theirs):
        for text in texts:
            ids = theirs(text)["input_ids"]
            assert ids == ours.encode(text, allowed_special="all")
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        assert theirs.eos_token_id == ours.eot_token

    check(transformers.AutoTokenizer.from_pretrained(made))
    for form in (["tokenizer.json"], ["vocab.json", "merges.txt"]):  # Each is enough.
        rest = shutil.copytree(made, tmp_path / form[0])
        for file in form:
            (rest / file).unlink()
        check(transformers.AutoTokenizer.from_pretrained(rest))


def trained_tokenizer(path, kind):
    """A tokenizer.json as the package `tokenizers` saves it, without other files."""
    cuts, is_bytes = tokenizers.pre_tokenizers, kind != "metaspace"
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = cuts.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    if is_bytes:
        made.pre_tokenizer = cuts.ByteLevel(add_prefix_space=kind == "prefix")
        made.decoder = tokenizers.decoders.ByteLevel()
    if kind == "lowercase":
        made.normalizer = tokenizers.normalizers.Lowercase()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<|endoftext|>"],
        initial_alphabet=cuts.ByteLevel.alphabet() if is_bytes else [],
        show_progress=False,
    )
    made.train_from_iterator(["The people of the United States. Two people."], trainer)
    made.save(str(path))
    return made


@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("metaspace", None),
        ("metaspace", {"chat_template": "{{ messages }}"}),
        ("prefix", None),
        ("lowercase", None),
    ],
)
def test_transformers_obeys_a_tokenizer_json_without_a_class(kind, beside, tmp_path):
    """For GPT-2 it takes the vocabulary only, and cuts texts in GPT-2's way."""
    path = tmp_path / "tokenizer.json"
    ours = trained_tokenizer(path, kind)
    if beside:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    size = ours.get_vocab_size()
    run = write_run(tmp_path / "run", vocab_size=size, record={"tokenizer": str(path)})
    made = run_export(run, tmp_path / "w")
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    text = "The United  people of Two states"
    assert theirs(text)["input_ids"] == ours.encode(text).ids
    assert theirs.eos_token_id == ours.token_to_id("<|endoftext|>")
    assert theirs.chat_template == (beside or {}).get("chat_template")


@pytest.mark.parametrize(
    ("kind", "model", "is_told"),
    [
        ("metaspace", "qwen2", True),  # Its class is always Qwen2Tokenizer.
        ("metaspace", "gpt2", False),
        ("bytes", "qwen2", True),
        ("bytes", "llama", False),
    ],
)
def test_a_line_tells_if_the_kind_of_a_model_decides_its_tokens(
    kind, model, is_told, tmp_path, caplog
):
    trained_tokenizer(tmp_path / "tokenizer.json", kind)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    in_transformers.compare(tmp_path)
    told = [one.getMessage() for one in caplog.records if "pcagpt" in one.name]
    assert ["Qwen2Tokenizer" in line for line in told] == [True] * is_told


def test_a_line_tells_if_transformers_does_not_open_a_tokenizer(tmp_path, caplog):
    trained_tokenizer(tmp_path / "tokenizer.json", "bytes")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"extra_special_tokens": 5}')
    in_transformers.compare(tmp_path)
    assert "does not open" in caplog.text


NO_SPACES = {"lstrip": False, "rstrip": False, "single_word": False}
MARK = {"content": "<|endoftext|>", "special": True, "normalized": False}


@pytest.mark.parametrize(
    ("kind", "config", "is_told"),
    [
        ("bytes", None, False),
        ("metaspace", None, True),  # GPT-2's class is taken.
        ("prefix", None, True),
        ("lowercase", None, True),
        ("bytes", {"additional_special_tokens": ["<|user|>"]}, True),
        ("bytes", {"pad_token": "people"}, True),
        ("bytes", {"split_special_tokens": True}, True),
        ("bytes", {"added_tokens_decoder": {"1": MARK | NO_SPACES}}, False),
        (
            "bytes",
            {"added_tokens_decoder": {"1": MARK | NO_SPACES | {"rstrip": True}}},
            True,
        ),
        ("lowercase", {"tokenizer_class": "GPT2Tokenizer"}, True),
    ],
)
def test_a_line_tells_if_transformers_makes_other_tokens(
    kind, config, is_told, tmp_path, caplog
):
    trained_tokenizer(tmp_path / WHOLE, kind)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    if config:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
        (tmp_path / CONFIG).write_text(json.dumps(config))
    in_transformers.compare(tmp_path)
    told = [one for one in caplog.records if "other tokens of" in one.getMessage()]
    assert bool(told) == is_told


def test_a_line_tells_if_a_class_lowers_a_text(tmp_path, caplog):
    """As BertTokenizer does, if tokenizer_config.json does not forbid it."""
    marks = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    words = {text: at for at, text in enumerate([*marks, "The", "the", "people"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    made.add_special_tokens(marks)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=False)
    made.save(str(tmp_path / WHOLE))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    named = {"tokenizer_class": "BertTokenizer", "unk_token": "[UNK]"}
    for is_told in (False, True):
        config = named | {"do_lower_case": is_told, "strip_accents": None}
        (tmp_path / CONFIG).write_text(json.dumps(config))
        in_transformers.compare(tmp_path)
        assert ("other tokens of" in caplog.text) == is_told


def test_a_command_tells_it_when_it_opens_the_model(tmp_path, caplog):
    random_model(**SHAPES["one_block"] | {"vocab_size": 300}).save_pretrained(tmp_path)
    trained_tokenizer(tmp_path / WHOLE, "prefix")
    Run.open(tmp_path)
    assert "other tokens of" in caplog.text


def test_transformers_draws_no_id_without_a_text_with_an_export(tmp_path):
    run = write_run(tmp_path / "run", vocab_size=4200, record={"tokenizer": "sotu4096"})
    made = run_export(run, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(made)
    transformers.set_seed(0)
    drawn = model.generate(
        torch.zeros(50, 1, dtype=torch.int64),
        do_sample=True,
        top_k=0,
        max_new_tokens=6,
        eos_token_id=None,
    )
    assert drawn.max() < 4096
    assert read_json(made / FILE, "")["suppress_tokens"] == [*range(4096, 4200)]
    assert model(drawn).logits.shape[-1] == 4200
