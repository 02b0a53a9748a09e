"""Models of transformers are measured as their own code computes them."""

import contextlib
import copy
import itertools
import json
import shutil
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra hf: torch, transformers")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from command_line import CONFIGS as CONFIG_FILES  # noqa: E402
from command_line import THEIR_SIZES, refusal, tiny  # noqa: E402
from runs import snapshot  # noqa: E402

from pcagpt import coding  # noqa: E402
from pcagpt.compression import decoder, open_decoder  # noqa: E402
from pcagpt.compression.decoder import Decoder  # noqa: E402
from pcagpt.compression.open_decoder import open_model, own_torch  # noqa: E402
from pcagpt.config import Settings  # noqa: E402
from pcagpt.data.batches import EvaluationBatches  # noqa: E402
from pcagpt.data.characters import CharacterTokenizer  # noqa: E402
from pcagpt.data.vocabulary import ids_with_text  # noqa: E402
from pcagpt.errors import UserError, warn_once  # noqa: E402
from pcagpt.factorization.factor_files import read_bands  # noqa: E402
from pcagpt.pipeline import compress as compress_task  # noqa: E402
from pcagpt.pipeline import samples  # noqa: E402
from pcagpt.pipeline.compress import compress  # noqa: E402
from pcagpt.run.folder import read_record  # noqa: E402
from pcagpt.run.trained import Run  # noqa: E402

SIZES = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in SIZES.items() if k not in ("head_dim",)}
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=90, n_positions=16, n_embd=32, n_layer=2, n_head=4
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    for parameter in model.parameters():  # Norms that begin at 1 or 0 hide faults.
        parameter.data += 0.1 * torch.randn_like(parameter)
    place = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(place)
    return place


def own_loss(folder, tokens_BT, table=None):
    """Loss of each target in the model's own code, with another table if given."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if table is not None:
        model.get_input_embeddings().weight.data.copy_(torch.as_tensor(table))
        model.tie_weights()
    with torch.inference_mode():
        logits = model(torch.as_tensor(tokens_BT[:, :-1])).logits
    targets = torch.as_tensor(tokens_BT[:, 1:]).reshape(-1)
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets, reduction="none"
    )
    return losses.numpy()


def test_a_swapped_table_adds_the_loss_of_a_model_that_has_it(folder):
    chance = np.random.default_rng(0)
    tokens = chance.integers(0, 90, 16 * 3 + 1)
    model = Decoder(folder, 16)
    table = model.table_VD + 0.1 * chance.normal(size=(90, 32)).astype(np.float32)
    deciles = np.arange(90) % 10
    found = model.score(table, deciles, EvaluationBatches(tokens, 16, 2))
    windows = np.stack([tokens[i : i + 17] for i in range(0, 48, 16)])
    own, new = own_loss(folder, windows), own_loss(folder, windows, table)
    assert found.loss == pytest.approx(own.mean(), rel=1e-5)
    assert found.added_loss == pytest.approx((new - own).mean(), rel=1e-3, abs=1e-6)
    targets = tokens[1:]
    for decile, added in enumerate(found.added_loss_by_decile):
        chosen = deciles[targets] == decile
        assert added == pytest.approx((new - own)[chosen].mean(), rel=1e-3, abs=1e-5)
    means = (new - own).reshape(3, 16).mean(1)
    low, high = found.added_loss_interval
    assert (low + high) / 2 == pytest.approx(means.mean(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", decoder._LENGTHS)
def test_a_window_is_as_long_as_the_model_reads(name):
    config = types.SimpleNamespace(**{name: 16})
    assert decoder._longest(config, Path("model")) == 16
    assert decoder._longest(types.SimpleNamespace(), Path("model")) is None
    setattr(config, name, -1)  # XLNet has no limit.
    assert decoder._longest(config, Path("model")) is None
    for odd in (0, -5, "64", 3.5):
        setattr(config, name, odd)
        with pytest.raises(UserError, match=f"^model: .* reads {odd!r} tokens at a"):
            decoder._longest(config, Path("model"))


OF_ANOTHER_LENGTH = {
    "mpt": lambda: transformers.MptConfig(
        vocab_size=90, d_model=32, n_heads=4, n_layers=1, max_seq_len=16
    ),
    "whisper": lambda: transformers.WhisperConfig(
        vocab_size=90,
        d_model=32,
        decoder_layers=1,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_target_positions=16,
        pad_token_id=0,
    ),
}


@pytest.mark.parametrize("name", OF_ANOTHER_LENGTH)
def test_windows_are_of_the_length_that_a_config_has_by_another_name(name, tmp_path):
    config = OF_ANOTHER_LENGTH[name]()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = Decoder(tmp_path, 64)
    found = model.score(
        model.table_VD, np.zeros(90, int), EvaluationBatches(np.arange(49), 16, 2)
    )
    assert model.window == 16
    assert found.added_loss == 0


def test_the_model_is_as_before_after_a_swap(folder):
    model = Decoder(folder, 16)
    own = model.table_VD.copy()
    tokens = np.arange(33) % 90
    batches = EvaluationBatches(tokens, 16, 2)
    first = model.score(own * 1.1, np.zeros(90, int), batches)
    again = model.score(own * 1.1, np.zeros(90, int), batches)
    same = model.score(own, np.zeros(90, int), batches)
    assert first == again
    assert same.added_loss == same.kl == 0
    np.testing.assert_array_equal(model.table_VD, own)


def test_tokens_are_drawn_as_the_model_with_the_table_predicts_them(folder):
    chance = np.random.default_rng(2)
    table = Decoder(folder, 8).table_VD
    table = table + 0.1 * chance.normal(size=table.shape).astype(np.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    reference.get_input_embeddings().weight.data.copy_(torch.as_tensor(table))
    reference.tie_weights()
    ids = np.arange(200) < 80  # More than the table has rows; not all have a text.
    for temperature in (0, 0.8):
        model = Decoder(folder, 8)
        drawn = model.generate(table, np.array([3, 5, 7]), ids, 1, temperature)
        found = list(itertools.islice(drawn, 12))
        tokens = [3, 5, 7]
        for token in found:  # After 8 tokens, the first ones are no longer read.
            with torch.inference_mode():
                logits = reference(torch.as_tensor([tokens[-8:]])).logits[0, -1]
            logits = np.where(ids[: len(logits)], logits.numpy(), -np.inf)
            key = jax.random.fold_in(jax.random.key(1), len(tokens))
            scaled = jnp.asarray(logits) / (temperature or 1)
            drawn = jax.random.categorical(key, scaled[None])[0]
            assert token == (int(drawn) if temperature else int(logits.argmax()))
            tokens.append(token)
        np.testing.assert_array_equal(model.table_VD, Decoder(folder, 8).table_VD)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_hidden_states_of_the_model_itself_are_kept_for_the_next_table(
    folder, kept, monkeypatch
):
    monkeypatch.setattr(decoder, "WINDOWS_ON_CPU", 1)
    model = Decoder(folder, 16)
    batches = EvaluationBatches(np.arange(49) * 7 % 90, 16, 2)  # three windows
    tables = [scale * model.table_VD for scale in (1.1, 0.9)]
    wanted = [Decoder(folder, 16).score(t, np.zeros(90, int), batches) for t in tables]
    model._kept.free_bytes = kept * 16 * 32 * 4
    asked = []
    hidden = model._hidden
    monkeypatch.setattr(model, "_hidden", lambda t: asked.append(t) or hidden(t))
    found = [model.score(table, np.zeros(90, int), batches) for table in tables]
    assert found == wanted
    assert len(asked) == 2 * 3 + 3 + (3 - kept)


def test_statistics_are_those_of_the_model_itself(folder):
    tokens = np.random.default_rng(1).integers(0, 90, (2, 8))
    model = Decoder(folder, 16)
    found = model.statistics(np.ones(90) / 90, [tokens])
    reference = copy.deepcopy(model.model)
    hidden = []
    reference.get_output_embeddings().register_forward_pre_hook(
        lambda _, given: hidden.append(given[0].reshape(-1, 32))
    )
    with torch.inference_mode():
        logits = reference(torch.as_tensor(tokens)).logits.reshape(-1, 90)
    p, h, w = logits.softmax(-1), hidden[0], torch.as_tensor(model.table_VD)
    np.testing.assert_allclose(found.probability, p.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.hidden_mean, h.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.hidden_moment, h.T @ h / 16, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.context_moment, h.T @ (p @ w) / 16, rtol=1e-4, atol=1e-5
    )


@pytest.fixture
def default_float64():
    torch.set_default_dtype(torch.float64)
    yield
    assert torch.get_default_dtype() == torch.float64
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("folder", ["llama"], indirect=True)
def test_what_a_program_chose_for_torch_changes_nothing(folder, request):
    tokens = np.arange(33) % 90

    def found():
        model = Decoder(folder, 16)
        statistics = model.statistics(np.ones(90) / 90, [tokens[None, :16]])
        batches = EvaluationBatches(tokens, 16, 2)
        scores = model.score(1.1 * model.table_VD, np.zeros(90, int), batches)
        return scores, statistics.gradient_moment.tobytes()

    wanted = found()
    with torch.inference_mode():
        assert found() == wanted
    with torch.autocast("cpu", torch.bfloat16):
        assert found() == wanted
    request.getfixturevalue("default_float64")
    assert found() == wanted


PRODUCTS = (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture
def precision():
    """Sets what a program may choose: TF32 on a GPU, BF16 on a CPU that has it."""
    before = [at.fp32_precision for at in PRODUCTS]
    yield {
        "old": lambda: torch.set_float32_matmul_precision("medium"),
        "old_of_gpu": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
        "all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
        "gpu": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
        "cpu": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    }
    torch.set_float32_matmul_precision("highest")
    for at, value in zip(PRODUCTS, before, strict=True):
        at.fp32_precision = value


@pytest.mark.parametrize("chosen", ["old", "old_of_gpu", "all", "gpu", "cpu"])
def test_the_precision_of_products_is_float32_meanwhile(chosen, precision):
    precision[chosen]()
    before = [at.fp32_precision for at in PRODUCTS]
    with own_torch():
        assert {at.fp32_precision for at in PRODUCTS[1:]} == {"ieee"}
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
    assert [at.fp32_precision for at in PRODUCTS] == before
    if chosen.startswith("old"):
        assert torch.get_float32_matmul_precision() != "highest"


def test_layers_are_computed_again_for_the_gradient(folder, monkeypatch):
    """A layer then keeps its input only."""
    tokens = [np.random.default_rng(1).integers(0, 90, (2, 8))]
    model, frequency = Decoder(folder, 16), np.ones(90) / 90
    lists = (m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList))
    layers = next(lists)
    calls = []
    for layer in layers:
        first = next(layer.children())
        first.register_forward_hook(lambda module, *_: calls.append(module))
    found = model.statistics(frequency, tokens)
    assert len(layers) == SIZES["num_hidden_layers"]
    assert len(calls) == 2 * len(layers)
    assert not any("forward" in vars(layer) for layer in layers)
    monkeypatch.setattr(Decoder, "_recomputed_layers", contextlib.nullcontext)
    wanted = model.statistics(frequency, tokens)
    for name, value in found._asdict().items():
        np.testing.assert_array_equal(value, getattr(wanted, name), err_msg=name)


def test_the_gradient_moment_predicts_the_loss_of_noisy_rows(folder):
    """KL of a small error at the input is half of the error in the Fisher metric."""
    chance = np.random.default_rng(2)
    tokens, scale = chance.integers(0, 90, (64, 16)), 2e-3
    model = Decoder(folder, 16)
    found = model.statistics(np.ones(90) / 90, [tokens] * 12)
    table_VD = torch.as_tensor(model.table_VD)
    total = []
    for _ in range(12):
        rows = table_VD[torch.as_tensor(tokens).reshape(-1)]
        noisy = rows + scale * torch.as_tensor(
            chance.normal(size=rows.shape), dtype=torch.float32
        )
        logs = []
        for given in (rows, noisy):
            with torch.inference_mode(), model._embedding_of(given):
                places = torch.arange(len(rows)).reshape(64, 16)
                logs.append(model._log_probabilities(model._hidden(places), table_VD))
        total.append(float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()))
    predicted = 0.5 * scale**2 * np.trace(found.gradient_moment)
    assert np.mean(total) == pytest.approx(predicted, rel=0.1)


def spoil(folder, change):
    """Rewrites the weights of a folder, changed by `change`."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NORM = "model.norm.weight"


def absurd(folder):
    """The highest bit of the exponent of one weight is flipped."""

    def change(tensors):
        weights = tensors[f"{LAYER}.weight"]
        weights[3, 4] = 0.125
        weights.view(torch.int32)[3, 4] ^= 1 << 30

    spoil(folder, change)


def half_infinite(folder):
    def change(tensors):
        for name, tensor in tensors.items():
            tensors[name] = tensor.half()
        tensors[TABLE][3, 5] = float("inf")

    spoil(folder, change)


def set_config(**fields):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def add(tensor, name="lm_head.weight"):
    return lambda folder: spoil(folder, lambda tensors: tensors.update({name: tensor}))


def lose_shard(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def two_shards(folder):
    from safetensors.torch import load_file, save_file

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    (name, tensor), *_ = load_file(first).items()
    save_file(load_file(last) | {name: -tensor}, last, {"format": "pt"})


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def unfilled(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


def another_norm(change):
    return lambda folder: spoil(folder, change)


def write_code(folder):
    """Code of a model, which must not run."""
    text = f"open({str(folder / 'RAN')!r}, 'w')\n"
    for name in ("modeling_own.py", "configuration_own.py"):
        (folder / name).write_text(text)
    classes = {
        "AutoConfig": "configuration_own.A",
        "AutoModelForCausalLM": "modeling_own.B",
    }
    set_config(auto_map=classes, model_type="own")(folder)


def big_tokenizer(folder):
    vocab = {str(number): number for number in range(98)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))


LAYER, TABLE = "model.layers.0.self_attn.q_proj", "model.embed_tokens.weight"
SPOILT = {
    "no_weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "has a config.json, but no model.safetensors: download it",
    ),
    "lost_shard": (lose_shard, "which its model.safetensors.index.json names"),
    "two_shards": (two_shards, ".safetensors both hold model."),
    "cut": (cut, "transformers cannot open"),
    "unfilled": (unfilled, "like a download that was not finished: download it again"),
    "lacking": (
        another_norm(lambda tensors: tensors.pop(NORM)),
        f"theirs has no tensor {NORM}, which its config.json asks for: restore it",
    ),
    "infinite": (
        another_norm(lambda tensors: tensors[NORM].fill_(float("inf"))),
        f"theirs is damaged: {NORM} holds inf at (0,): all must be finite in float32 "
        "and at most 1,000,000",
    ),
    "absurd": (absurd, f"theirs is damaged: {LAYER}.weight holds 4.25"),
    "half_infinite": (half_infinite, f"{TABLE} holds inf at (3, 5): all must be fin"),
    "shape": (
        another_norm(lambda tensors: tensors.update({NORM: torch.ones(3)})),
        f"theirs: {NORM} is (3,), but its config.json asks for (32,): restore it, or",
    ),
    "padded": (
        set_config(vocab_size=90),
        f"theirs: {TABLE} is (97, 32), but its config.json asks for (90, 32): restore",
    ),
    "heads": (
        set_config(num_key_value_heads=4),
        "theirs: model.layers.0.self_attn.k_proj.weight is (16, 32), but its "
        "config.json asks for (32, 32): restore it",
    ),
    "packed": (
        lambda folder: spoil(
            folder,
            lambda t: t.update({f"{LAYER}.weight": torch.ones(32, 16).to(torch.uint8)}),
        ),
        "its weights are quantized (U8), which transformers does not read here",
    ),
    "two_tables": (
        add(torch.randn(97, 32)),
        f"{TABLE} is another table than lm_head.weight, although tie_word_embeddings",
    ),
    "two_spellings": (
        add(torch.zeros(32), "norm.weight"),
        "has two tensors for one parameter, model.norm.weight and norm.weight",
    ),
    "bias": (
        add(torch.ones(32), f"{LAYER}.bias"),
        f"has the tensor {LAYER}.bias, which the model of its config.json does not use",
    ),
    "adapter": (
        add(torch.ones(4, 32), "lm_head.lora_A.weight"),
        "has the tensor lm_head.lora_A.weight, which the model of its config.json does",
    ),
    "nested_adapter": (
        add(torch.ones(4, 32), "lm_head.lora_A.default.weight"),
        "has the tensor lm_head.lora_A.default.weight, which the model of its config",
    ),
    "layer": (
        add(torch.ones(32), "model.layers.2.input_layernorm.weight"),
        "has the tensor model.layers.2.input_layernorm.weight, which the model of its",
    ),
    "layer_norm": (
        add(torch.ones(8), "layers.0.self_attn.q_norm.weight"),
        "has the tensor layers.0.self_attn.q_norm.weight, which the model of its",
    ),
    "norm": (
        add(torch.ones(32), "model.embedding_norm.weight"),
        "has the tensor model.embedding_norm.weight, which the model of its config",
    ),
    "unknown_method": (
        set_config(quantization_config={"quant_method": "modelopt"}),
        "its weights are quantized (modelopt), which transformers does not read here",
    ),
    "integers": (
        lambda folder: spoil(
            folder, lambda t: t.update({NORM: t[NORM].to(torch.int8)})
        ),
        "its weights are quantized (I8), which transformers does not read here",
    ),
    "lost_head": (
        set_config(tie_word_embeddings=False),
        "has no tensor lm_head.weight",
    ),
    "big_tokenizer": (big_tokenizer, "its tokenizer has 98 tokens, but its table 97"),
    "code": (write_code, "transformers cannot open"),
    "not_whole_sizes": (
        set_config(num_attention_heads=5),
        "is not a multiple of the number of attention heads",
    ),
    "unknown": (set_config(model_type="unheard"), "transformers cannot open"),
    "encoder": (set_config(model_type="t5"), "transformers cannot open"),
}


def test_experts_of_integers_which_are_merged_are_refused(tmp_path):
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    config = transformers.MixtralConfig(**sizes, num_local_experts=2)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    Decoder(tmp_path, 16)
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    spoil(tmp_path, lambda t: t.update({expert: t[expert].to(torch.int8)}))
    with pytest.raises(UserError, match=r"weights are quantized \(I8\)"):
        Decoder(tmp_path, 16)


@pytest.fixture
def experts(tmp_path):
    """(folder, name) of a model and its bias that chooses experts: no parameter."""
    config = transformers.Glm4MoeConfig(
        **SIZES, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    transformers.Glm4MoeForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path, "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_buffer_of_the_files_with_an_absurd_value_is_refused(value, experts):
    folder, name = experts
    spoil(folder, lambda tensors: tensors[name].fill_(0.5))
    open_model(folder)
    spoil(folder, lambda tensors: tensors[name][2:].fill_(value))
    with pytest.raises(UserError, match=rf"{name} holds [^ ]+ at \(2,\): all must be"):
        open_model(folder)


def test_a_buffer_that_holds_a_mask_or_no_limit_is_no_damage(tmp_path):
    model = torch.nn.Module()
    model.attn, inf = torch.nn.Module(), torch.tensor(-np.inf)
    for name in ("masked_bias", "bias", "input_min"):
        model.attn.register_buffer(name, inf.clone())
    model.attn.register_buffer("computed", inf.clone(), persistent=False)
    open_decoder._check_values(model, tmp_path)
    model.attn.register_buffer("stored", inf.clone())
    with pytest.raises(UserError, match="attn.stored holds -inf"):
        open_decoder._check_values(model, tmp_path)


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_folder_that_is_not_a_whole_model_is_refused(
    spoilt, llama, corpus_folder, tmp_path
):
    spoil_it, words = SPOILT[spoilt]
    spoil_it(llama)
    knobs = {"model_path": llama, "workdir": tmp_path / "runs", "ranks": 4}
    asked = tiny("compress.py", corpus_folder, **knobs, model=THEIR_SIZES)
    line = refusal(*asked, unchanged=[llama])
    assert words in line
    assert not (tmp_path / "runs").exists() and not (llama / "RAN").exists()


@pytest.fixture
def llama(tmp_path):
    """A whole tied Llama of 97 tokens, which a test may spoil."""
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 97})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def write_zeros(file):
    """Writes zeros over the values of a file of weights, in place."""
    with file.open("r+b") as content:
        begin = 8 + int.from_bytes(content.read(8), "little")
        content.seek(begin)
        content.write(bytes(file.stat().st_size - begin))


def test_an_opened_model_does_not_change_with_its_file(llama):
    model = Decoder(llama, 16)
    values = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    write_zeros(llama / "model.safetensors")
    for name, parameter in model.model.named_parameters():
        assert torch.equal(parameter, values[name]), name
    assert model._head.weight is model._embedding.weight


def test_the_same_table_twice_is_one(llama):
    stored = Decoder(llama, 16).table_VD
    add(torch.as_tensor(stored))(llama)
    model = Decoder(llama, 16)
    assert model.sides == ()
    np.testing.assert_array_equal(model.table_VD, stored)


def test_a_bias_that_a_body_alone_does_not_use_is_refused(llama):
    model = transformers.AutoModel.from_pretrained(llama)
    model.save_pretrained(llama)
    add(torch.ones(32), f"{LAYER.removeprefix('model.')}.bias")(llama)
    with pytest.raises(UserError, match="q_proj.bias, which the model of its config"):
        Decoder(llama, 16)


def test_the_same_tensor_in_two_spellings_is_one(llama):
    stored = Decoder(llama, 16).table_VD
    spoil(llama, lambda tensors: tensors.update({"norm.weight": tensors[NORM].clone()}))
    np.testing.assert_array_equal(Decoder(llama, 16).table_VD, stored)


def test_tensors_of_modules_that_the_model_lacks_are_named(llama, caplog):
    warn_once.cache_clear()
    add(torch.ones(3), "eyes.0.weight")(llama)
    assert Decoder(llama, 16).table_VD.shape == (97, 32)
    assert "does not use 1 of the tensors, such as eyes.0.weight" in caplog.text


def test_buffers_that_follow_from_the_config_are_no_surplus(llama, caplog):
    warn_once.cache_clear()
    own = "model.layers.0.self_attn"
    for name in ("rotary_emb.inv_freq", "masked_bias", "k_scale", "attention.bias"):
        add(torch.ones(1), f"{own}.{name}")(llama)
    assert Decoder(llama, 16).table_VD.shape == (97, 32)
    assert "does not use" not in caplog.text


def test_code_in_the_folder_of_a_known_model_is_not_run(llama):
    write_code(llama)
    set_config(model_type="llama")(llama)
    assert type(Decoder(llama, 16).model) is transformers.LlamaForCausalLM
    assert not (llama / "RAN").exists()


def test_a_smaller_tokenizer_fits_a_padded_table(llama):
    vocab = {str(number): number for number in range(90)}
    (llama / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    run = Run.open(llama, any_architecture=True)
    assert run.record["tokenizer"] == str(llama / "tokenizer.json")
    assert run.record["vocab_size"] == 97


@pytest.mark.parametrize("name", ["get_input_embeddings", "get_output_embeddings"])
def test_a_model_without_a_table_that_can_be_found_is_refused(name, llama, monkeypatch):
    def fail(_):
        raise NotImplementedError

    monkeypatch.setattr(transformers.LlamaForCausalLM, name, fail)
    with pytest.raises(UserError, match="has no (embedding of tokens|table of the)"):
        Decoder(llama, 16)


def test_a_model_that_takes_no_embedded_tokens_is_refused(llama, monkeypatch):
    forward = transformers.LlamaModel.forward

    def plain(self, input_ids=None, use_cache=None, **others):
        others.pop("inputs_embeds", None)
        return forward(self, input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(transformers.LlamaModel, "forward", plain)
    with pytest.raises(UserError, match="does not compute logits from embedded tokens"):
        Decoder(llama, 16)


MORE = "reads more of a token than its row of the table, such as an embedding for each"


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_that_finds_ids_by_their_rows_is_refused(fails, llama, monkeypatch):
    """It reads another table of them; rows of places stand for other ids."""
    forward = transformers.LlamaModel.forward

    def find_ids(self, input_ids=None, inputs_embeds=None, **others):
        rows = self.embed_tokens.weight
        if inputs_embeds is None:
            inputs_embeds = rows[input_ids]
        is_row = (inputs_embeds[:, :, None] == rows).all(-1)
        if fails and is_row.sum() != inputs_embeds.shape[1]:
            raise RuntimeError("found twice")
        ids = is_row.float().argmax(-1)
        own = torch.sin(ids[..., None] + torch.arange(inputs_embeds.shape[-1]))
        return forward(self, inputs_embeds=inputs_embeds + own, **others)

    Decoder(llama, 16)
    monkeypatch.setattr(transformers.LlamaModel, "forward", find_ids)
    for window in (1, 16):
        with pytest.raises(UserError, match=f"LlamaForCausalLM {MORE}"):
            Decoder(llama, window)


@pytest.mark.parametrize("kind", ["Gemma3n", "Gemma4"])
def test_embeddings_for_each_layer_are_refused_before_they_are_computed(
    kind, tmp_path, monkeypatch
):
    per_layer = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 90}
    sizes = SIZES | per_layer | {"num_kv_shared_layers": 0, "intermediate_size": 48}
    config = getattr(transformers, f"{kind}TextConfig")(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    monkeypatch.setattr(Decoder, "_hidden", None)
    with pytest.raises(UserError, match=f"{kind}ForCausalLM {MORE}"):
        Decoder(tmp_path, 16)


def test_a_gemma_4_without_embeddings_for_each_layer_is_measured(tmp_path):
    sizes = SIZES | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    config = transformers.Gemma4TextConfig(**sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens_BT = np.array([[40, 30, 30, 20, 10]])
    found = Decoder(tmp_path, 16).statistics(np.ones(90) / 90, [tokens_BT])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        h_BTD = model.model(torch.as_tensor(tokens_BT)).last_hidden_state
    wanted = h_BTD.numpy().mean((0, 1))
    np.testing.assert_allclose(found.hidden_mean, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_of_which_transformers_names_no_body_is_refused(tmp_path):
    sizes = SIZES | {"num_local_experts": 2, "intermediate_size_mlp": 48}
    config = transformers.Llama4TextConfig(**sizes, attention_chunk_size=8)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    words = "does not say which part of Llama4ForCausalLM computes the hidden states"
    with pytest.raises(UserError, match=words):
        Decoder(tmp_path, 16)


def test_a_model_that_reads_the_tokens_it_predicts_is_refused(tmp_path):
    sizes = {"vocab_size": 90, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**SIZES | sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = Decoder(tmp_path, 16)
    model.model.forward = lambda input_ids, use_cache: types.SimpleNamespace(
        logits=model.model.lm_head(hidden(input_ids))
    )
    embed = model.model.get_input_embeddings()

    def hidden(input_ids):
        return embed(input_ids) + embed(input_ids).mean(1, keepdim=True)

    model._hidden = lambda tokens_BT: hidden(tokens_BT)[0]
    with pytest.raises(UserError, match="reads the tokens that it should predict"):
        model._check_head()


# Its tokens stand for characters.
TOKENIZER = CharacterTokenizer(tuple(chr(0x4E00 + n) for n in range(97)))


@pytest.fixture
def swept(corpus_folder, tmp_path, monkeypatch):
    """(settings, folder) of a sweep of a tiny Llama of the corpus's 97 tokens."""
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 97})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    settings = Settings().replace(
        {
            "task": "compress",
            "model_path": str(tmp_path / "llama"),
            "workdir": str(tmp_path / "runs"),
            "data.source": str(corpus_folder),
            "ranks": (16,),
            "compress.methods": "svd,context,coded",
            "compress.bands": (1, 2),
            "compress.bits": (8,),
            "compress.calibration_tokens": 512,
            "model.block_size": 16,
            "train.batch_size": 4,
            "evaluate.batch_size": 4,
            "mesh.data": 1,
            "telemetry.tensorboard": False,
        }
    )
    monkeypatch.setattr(samples, "TOKENS", 6)
    with monkeypatch.context() as patch:
        patch.setattr(samples, "tokenizer_of", lambda run, settings: TOKENIZER)
        compress(settings, "a command")
    return settings, tmp_path / "runs" / "compressed"


def test_a_sweep_of_another_architecture_writes_rows_and_tables(swept):
    settings, folder = swept
    sweep = json.loads((folder / "sweep.json").read_text())
    assert {row["method"] for row in sweep["rows"]} >= {"svd", "context", "coded"}
    assert all(np.isfinite(row["added_loss"]) for row in sweep["rows"])
    assert sweep["versions"]["transformers"] == transformers.__version__
    record = read_record(folder / "best_k16")
    assert record["architecture"] == "LlamaForCausalLM"
    best = min(
        (r for r in sweep["rows"] if r["bits"] == 32), key=lambda row: row["added_loss"]
    )
    assert record["compressed"]["method"] == best["method"]
    table = read_bands(folder / "best_k16" / "factors")
    model = Decoder(Path(settings.model_path), 16)
    assert table.dense().shape == model.table_VD.shape
    codes, _ = coding.read(folder / "best_coded_k16" / "table.pcat")
    assert codes.dense().shape == model.table_VD.shape


def test_a_model_that_is_overwritten_during_a_sweep_changes_no_row(
    swept, tmp_path, monkeypatch, caplog
):
    warn_once.cache_clear()
    settings, folder = swept
    own = shutil.copytree(settings.model_path, tmp_path / "theirs")
    score = Decoder.score

    def score_and_overwrite(*args):
        found = score(*args)
        write_zeros(own / "model.safetensors")
        return found

    monkeypatch.setattr(Decoder, "score", score_and_overwrite)
    asked = {"model_path": str(own), "workdir": str(tmp_path / "again")}
    compress(settings.replace(asked), "a command")
    rows = [
        [row | {"seconds": 0} for row in json.loads(file.read_text())["rows"]]
        for place in (folder, tmp_path / "again" / "compressed")
        for file in [place / "sweep.json"]
    ]
    assert rows[0] == rows[1]
    assert "theirs was replaced or changed after this command read it" in caplog.text


def test_a_model_that_is_overwritten_while_it_is_opened_is_refused(
    swept, tmp_path, monkeypatch
):
    settings, _ = swept
    own = shutil.copytree(settings.model_path, tmp_path / "theirs")
    tables_of = decoder.tables_of

    def overwrite_and_find(*args):
        write_zeros(own / "model.safetensors")
        return tables_of(*args)

    monkeypatch.setattr(decoder, "tables_of", overwrite_and_find)
    asked = {"model_path": str(own), "workdir": str(tmp_path / "again")}
    with pytest.raises(UserError, match="replaced or changed while this command"):
        compress(settings.replace(asked), "a command")
    assert not (tmp_path / "again" / "compressed").exists()


def test_only_export_takes_a_compressed_table(swept):
    _, folder = swept
    text = (folder / "report.md").read_text()
    assert "\nTo export " in text
    assert "configs/export.py" in text and "configs/sample.py" not in text
    words = f"--config.model_path={folder / 'best_k16'}", "--config.data.source=x"
    for name in ("evaluate", "compress"):
        line = refusal(f"--config={CONFIG_FILES / name}.py", *words, unchanged=[folder])
        assert "holds only the compressed table of a LlamaForCausalLM: export" in line


def test_a_second_sweep_measures_nothing_and_keeps_the_tables(swept, monkeypatch):
    settings, folder = swept
    before = snapshot(folder)
    written = json.loads((folder / "sweep.json").read_text())["samples"]
    for name in ("score", "statistics", "generate"):
        monkeypatch.setattr(Decoder, name, None)
    compress(settings, "a command")
    assert json.loads((folder / "sweep.json").read_text())["samples"] == written
    after = snapshot(folder)
    tables = [name for name in before if "best_" in str(name)]
    assert tables
    assert all(before[name] == after[name] for name in tables)


def test_d_and_the_tables_of_one_size_write_after_the_same_prompts(
    swept, corpus_folder
):
    settings, folder = swept
    found = json.loads((folder / "sweep.json").read_text())["samples"]
    model = Decoder(Path(settings.model_path), 16)
    coded, _ = coding.read(folder / "best_coded_k16" / "table.pcat")
    tables = {
        "D": model.table_VD,
        "best_coded_k16": coded.dense(),
        "best_k16": read_bands(folder / "best_k16" / "factors").dense(),
    }
    val = np.fromfile(corpus_folder / "val.bin", np.uint16)
    ids = ids_with_text(TOKENIZER)
    for sample, start in zip(found, (0, 334, 668), strict=True):
        prompt = val[start : start + 12]
        assert sample["prompt"] == TOKENIZER.decode(prompt.tolist())
        assert (sample["seed"], sample["temperature"]) == (1, 0.8)
        assert list(sample["texts"]) == list(tables)
        for name, table in tables.items():
            drawn = itertools.islice(model.generate(table, prompt, ids, 1, 0.8), 6)
            assert sample["texts"][name] == TOKENIZER.decode(list(drawn))
    assert "### What do they write?" in (folder / "report.md").read_text("utf-8")


def test_a_changed_table_leaves_out_the_samples_and_says_so(swept, caplog, monkeypatch):
    settings, folder = swept
    sweep = compress_task.sweep

    def sweep_and_change(*arguments, **options):
        models = sweep(*arguments, **options)
        record = read_record(folder / "best_k16")
        record["compressed"]["table_sha256"] = "another"
        (folder / "best_k16" / "config.json").write_text(json.dumps(record))
        return models

    monkeypatch.setattr(compress_task, "sweep", sweep_and_change)
    monkeypatch.setattr(samples, "tokenizer_of", lambda run, settings: TOKENIZER)
    compress(settings, "a command")
    assert "samples" not in json.loads((folder / "sweep.json").read_text())
    assert "the report has no samples: " in caplog.text
    assert "factors is another table than the one that the config.json" in caplog.text


def test_one_thread_at_a_time_opens_a_model(monkeypatch, tmp_path):
    """transformers prints, logs, and sets the process's dtype meanwhile."""
    level, stderr, inside = transformers.logging.get_verbosity(), sys.stderr, []

    def fail(*_, **__):
        inside.append(None)
        time.sleep(0.1)
        found = len(inside)
        inside.pop()
        raise ValueError(found)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)

    def opened(_):
        with pytest.raises(UserError) as caught:
            open_model(tmp_path)
        return str(caught.value)

    with ThreadPoolExecutor(3) as pool:
        told = set(pool.map(opened, range(3)))
    assert told == {f"transformers cannot open {tmp_path}: 1"}
    assert sys.stderr is stderr
    assert transformers.logging.get_verbosity() == level


def test_what_other_threads_print_while_a_model_opens_is_printed(
    monkeypatch, tmp_path, capsys
):
    def print_(text):
        print(text, file=sys.stderr)

    def fail(*_, **__):
        print_("of transformers")
        other = threading.Thread(target=print_, args=["of another thread"])
        other.start()
        other.join()
        kept.append(sys.stderr)
        raise ValueError("damaged")

    kept = []
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(UserError):
        open_model(tmp_path)
    print("of a log", file=kept[0])
    assert capsys.readouterr().err == "of another thread\nof a log\n"
