"""Models of transformers are measured as their own code computes them."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra hf: torch, transformers")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from runs import snapshot  # noqa: E402

from pcagpt import coding  # noqa: E402
from pcagpt.compress.decoder import Decoder  # noqa: E402
from pcagpt.config import Settings  # noqa: E402
from pcagpt.data.batches import EvaluationBatches  # noqa: E402
from pcagpt.errors import UserError  # noqa: E402
from pcagpt.factorize.factor_files import read_bands  # noqa: E402
from pcagpt.pipeline.compress import compress  # noqa: E402
from pcagpt.run.folder import read_record  # noqa: E402

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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop(NORM), f"has no tensor {NORM} of the shape"),
        (lambda tensors: tensors[NORM].fill_(float("inf")), f"{NORM} holds values"),
        (
            lambda tensors: tensors.update({NORM: torch.ones(3)}),
            "transformers cannot open|has no tensor",
        ),
    ],
    ids=["missing", "infinite", "another shape"],
)
def test_a_folder_whose_weights_are_not_whole_is_refused(change, words, tmp_path):
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(UserError, match=words):
        Decoder(tmp_path, 16)


def test_a_file_that_was_cut_is_refused(tmp_path):
    config = transformers.LlamaConfig(**SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="transformers cannot open"):
        Decoder(tmp_path, 16)


@pytest.fixture
def swept(corpus_folder, tmp_path):
    """(settings, folder) of a sweep of a tiny Llama of the corpus's 97 tokens."""
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 97})
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


def test_a_second_sweep_measures_nothing_and_keeps_the_tables(swept, monkeypatch):
    settings, folder = swept
    before = snapshot(folder)
    monkeypatch.setattr(Decoder, "score", None)
    monkeypatch.setattr(Decoder, "statistics", None)
    compress(settings, "a command")
    after = snapshot(folder)
    tables = [name for name in before if "best_" in str(name)]
    assert tables
    assert all(before[name] == after[name] for name in tables)
