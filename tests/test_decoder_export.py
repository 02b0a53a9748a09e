"""Compressed tables of other architectures leave as models that transformers loads."""

import itertools
import json
import math
import shlex
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra hf: torch, transformers")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from command_line import CONFIGS, THEIR_SIZES, call, tiny  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402
from test_decoder import CONFIGS as MODELS  # noqa: E402
from test_decoder import SIZES  # noqa: E402
from test_hugging_face_parity import loader_of, opened  # noqa: E402

import pcagpt  # noqa: E402
from pcagpt.compression import stored_tensors  # noqa: E402
from pcagpt.errors import UserError  # noqa: E402
from pcagpt.export.architecture import for_causal_lm  # noqa: E402
from pcagpt.export.formats import write_factored  # noqa: E402
from pcagpt.export.modeling_pcagpt import (  # noqa: E402
    CompressedEmbedding,
    CompressedHead,
)
from pcagpt.export.source import ExportedTable  # noqa: E402
from pcagpt.model import BandLeaves  # noqa: E402
from pcagpt.rows import Row, read_sweep  # noqa: E402
from pcagpt.run import other_decoder  # noqa: E402
from pcagpt.run.folder import read_record  # noqa: E402

# These two packages warn about themselves.
pytestmark = pytest.mark.filterwarnings("default")
FORMS = {
    "best_k4": ("hf", "hf-factored"),
    "best_coded_k8": ("hf", "coded"),
    "advised": ("hf", "hf-factored"),
}


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def swept(request, tmp_path_factory):
    """(folder of a model, workdir of a sweep of its table)."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[request.param]())
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    place = tmp_path_factory.mktemp(request.param)
    model.to(torch.bfloat16).save_pretrained(place / "model")
    tokens = np.random.default_rng(0).integers(0, 90, 700).astype(np.uint16)
    (place / "data").mkdir()
    for split in ("train", "val", "test"):
        tokens.tofile(place / "data" / f"{split}.bin")
    (place / "data/meta.json").write_text(json.dumps({"vocab_size": 90}))
    for words in (
        ["--config.compress.methods=pca,context,coded", "--config.ranks=4,8"],
        ["--config.compress.methods=packed", "--config.compress.max_bytes=7000"],
    ):
        outcome = call(
            f"--config={CONFIGS / 'compress.py'}",
            f"--config.model_path={place / 'model'}",
            f"--config.workdir={place}",
            f"--config.data.source={place / 'data'}",
            "--config.compress.bands=1,3",
            "--config.compress.calibration_tokens=320",
            "--config.train.batch_size=8",
            "--config.evaluate.batch_size=8",
            *words,
        )
        assert outcome.code == 0, outcome
    return place / "model", place


def test_an_export_has_the_data_of_a_tokenizer_and_names_its_code(
    swept, tmp_path, caplog
):
    model, workdir = swept
    data = ("source.spm", "tokenizer.model", "tokenizer.model.v3", "chat.jinja")
    own = [model / name for name in (*data, "tokenization_own.py")]
    for file in own:
        file.write_text("own")
    outcome = call(
        f"--config={CONFIGS / 'export.py'}",
        f"--config.model_path={workdir / 'compressed/best_k4'}",
        f"--config.workdir={tmp_path}",
    )
    for file in own:
        file.unlink()
    assert outcome.code == 0, outcome
    assert "tokenization_own.py is not in it" in caplog.text
    made = {file.name for file in (tmp_path / "exported/best_k4_hf").iterdir()}
    assert made >= {*data}
    assert "tokenization_own.py" not in made


@pytest.mark.parametrize("name", FORMS)
def test_an_export_has_the_loss_that_was_measured(name, swept):
    model, workdir = swept
    table = workdir / "compressed" / name
    # It is found from any working directory, and after a move of both.
    made = read_record(table)["compressed"]
    assert made["run"] == str(model.resolve())
    assert (table / made["run_from_here"]).resolve() == model.resolve()
    losses = {}
    for form in FORMS[name]:
        outcome = call(
            f"--config={CONFIGS / 'export.py'}",
            f"--config.model_path={table}",
            f"--config.workdir={workdir}",
            f"--config.format={form}",
        )
        assert outcome.code == 0, outcome
        made = workdir / "exported" / f"{name}_{form}"
        losses[form] = _loss(form, made, workdir)
    row = _row(workdir, json.loads((table / "config.json").read_text())["compressed"])
    for form, loss in losses.items():
        assert loss == pytest.approx(row.loss + row.added_loss, abs=2e-5), form
    card = (made / "README.md").read_text()
    assert f"{row.loss + row.added_loss:,.4f}" in card
    if row.recipe.is_factors:  # They have a mean.
        with safe_open(made / "model.safetensors", "pt") as file:
            names = [n for n in list(file.keys()) if "embed_tokens." in n]
            shapes = [file.get_slice(name).get_shape() for name in names]
        assert sum(map(math.prod, shapes)) == row.params
        assert f"| {row.params:,} | {row.memory:,} |" in card


def _row(workdir, made):
    advice = json.loads((workdir / "compressed/advice.json").read_text())
    rows = read_sweep(workdir / "compressed/sweep.json")["rows"]
    rows.append(Row.of(advice["chosen"], "advice.json"))
    (row,) = [row for row in rows if vars(row.recipe).items() <= made.items()]
    return row


def _loss(form, made, workdir):
    tokens = np.fromfile(workdir / "data/val.bin", np.uint16).astype(int)
    windows = [tokens[at : at + 17] for at in range(0, len(tokens) - 1, 16)]
    if form == "hf":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            made, dtype=torch.float32
        )
    else:
        model, _ = opened(form, made)
    model = model.float().eval()
    total = 0
    for window in windows:
        with torch.inference_mode():
            logits = model(torch.tensor(window[None, :-1])).logits[0]
        target = torch.tensor(window[1:])
        total += torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    return float(total) / (len(tokens) - 1)


CONFIG_OF = {
    # Its other matrices have the shape of the table.
    "square": lambda: transformers.LlamaConfig(
        **SIZES | {"vocab_size": 48, "intermediate_size": 48}
    ),
    # Its head has a bias.
    "phi": lambda: transformers.PhiConfig(
        **{name: v for name, v in SIZES.items() if name != "head_dim"}
    ),
    # Their embeddings have a scale that is no tensor.
    "biogpt": lambda: transformers.BioGptConfig(**SIZES),
    "xglm": lambda: transformers.XGLMConfig(
        vocab_size=90,
        max_position_embeddings=16,
        d_model=32,
        ffn_dim=48,
        num_layers=2,
        attention_heads=4,
    ),
    # Its table is narrower than its layers.
    "opt": lambda: transformers.OPTConfig(
        **SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16},
        do_layer_norm_before=False,
    ),
    # It has tensors of shape [].
    "apertus": lambda: transformers.ApertusConfig(
        **{name: v for name, v in SIZES.items() if name != "head_dim"}
    ),
    # Its table has a name that no other architecture uses.
    "openai-gpt": lambda: transformers.OpenAIGPTConfig(**GPT),
    # The bias of its head has two names.
    "bert-generation": lambda: transformers.BertGenerationConfig(
        **{name: v for name, v in SIZES.items() if name != "head_dim"}, is_decoder=True
    ),
    # Only the body is stored: config.json names a class without a head.
    "body": lambda: transformers.LlamaConfig(**SIZES),
}
GPT = {"vocab_size": 90, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
METHOD_OF = {"hf": "svd", "hf-factored": "packed", "coded": "coded"}


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(CONFIG_OF, ["hf", "hf-factored"]),
        ("apertus", "coded"),
        ("body", "coded"),
    ],
)
def test_an_export_keeps_all_other_weights(name, form, tmp_path):
    torch.manual_seed(0)
    config = CONFIG_OF[name]()
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    stored = model.base_model if name == "body" else model
    stored.save_pretrained(tmp_path / "model")
    table = model.get_input_embeddings().weight.detach().numpy()
    made = pcagpt.compress(
        tmp_path / "model",
        data=dict.fromkeys(("train", "val"), np.arange(400) % len(table)),
        max_bytes=table.nbytes,
        methods=METHOD_OF[form],
    )
    made.save(tmp_path / "small")
    ask = f"--config.model_path={tmp_path / 'small'}", f"--config.format={form}"
    words = f"--config={CONFIGS / 'export.py'}", *ask, f"--config.workdir={tmp_path}"
    assert call(*words, "--print_config").code == 0
    assert call(*words).code == 0
    found, report = opened(form, tmp_path / "exported" / f"small_{form}")
    assert not any(report.values())
    model.get_input_embeddings().weight.data.copy_(torch.as_tensor(made.dense()))
    tokens = torch.arange(16)[None]
    with torch.inference_mode():
        wanted, logits = (one.eval()(tokens).logits for one in (model, found))
    assert torch.allclose(logits, wanted, rtol=0, atol=1e-5 * wanted.abs().max())


def exported(form, place):
    """The export of the model in `place`, with a compressed table of 90 tokens."""
    tokens = dict.fromkeys(("train", "val"), np.arange(200) % 90)
    pcagpt.compress(
        place / "model", data=tokens, max_bytes=90 * 32 * 4, methods=METHOD_OF[form]
    ).save(place / "small")
    words = f"--config.model_path={place / 'small'}", f"--config.format={form}"
    made = call(
        f"--config={CONFIGS / 'export.py'}", *words, f"--config.workdir={place}"
    )
    assert made.code == 0, made
    return place / "exported" / f"small_{form}"


@pytest.mark.parametrize("form", METHOD_OF)
def test_an_export_ends_a_text_where_its_model_does(form, tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(MODELS["llama"]())
    model.generation_config.eos_token_id = [2, 67]  # config.json says 2 alone.
    model.save_pretrained(tmp_path / "model")
    found, _ = opened(form, exported(form, tmp_path))
    assert found.generation_config.eos_token_id == [2, 67]


@pytest.mark.parametrize("form", METHOD_OF)
def test_an_export_of_a_model_without_a_stated_type_opens_in_its_type(form, tmp_path):
    """transformers takes that of the first tensor, which is not the new table."""
    config = transformers.GPTNeoConfig(
        vocab_size=90,
        hidden_size=32,
        intermediate_size=48,
        num_layers=1,
        num_heads=2,
        attention_types=[[["global"], 1]],
        max_position_embeddings=16,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model/config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("dtype") == "bfloat16"
    path.write_text(json.dumps(stored))
    folder = exported(form, tmp_path)
    if form == "coded":
        found = loader_of(folder).load()
    else:
        found = transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True
        )
    assert found.dtype == torch.bfloat16
    assert "weights are in bfloat16" in (folder / "README.md").read_text()


TENSORS = {
    "": (["h.up.weight", "wte.weight"], "wte.weight"),
    "unknown_name": (["a.table.weight"], "a.table.weight"),
    "mamba": (["b.mixer.in_proj.weight", "b.embeddings.weight"], "b.embeddings.weight"),
    "stored_head": (["a.w.weight", "lm_head.weight"], "a.w.weight"),
    "only_the_head": (["lm_head.weight"], "lm_head.weight"),
    "input": (["backbone.embeddings.weight", "lm_head.weight"], "backbone"),
    "output": (["backbone.embeddings.weight", "lm_head.weight"], "lm_head.weight"),
    "output_of_an_unknown_name": (["wte.weight", "odd"], "odd"),
    "two": (["odd", "a.w.weight"], None),
    "none": ([], None),
}


@pytest.mark.parametrize("case", TENSORS)
def test_the_table_is_found_among_tensors_of_its_shape(case):
    tables, wanted = TENSORS[case]
    side = case.partition("_")[0] if case[:3] in ("inp", "out") else ""
    if wanted:
        found = stored_tensors.table_among(tables, side, "theirs")
        assert found.startswith(wanted)
        return
    with pytest.raises(UserError, match=f"^theirs: {len(tables)} of its tensors could"):
        stored_tensors.table_among(tables, side, "theirs")


@pytest.mark.parametrize("change", ["shapes", "value"])
def test_a_table_that_export_could_not_replace_is_refused_before_the_sweep(
    change, tmp_path, monkeypatch
):
    if change == "shapes":  # All its matrices have the shape of the table.
        config = transformers.OpenAIGPTConfig(**GPT | {"vocab_size": 32})
        line = r"of its tensors could be the token table \("
    else:
        config = transformers.OpenAIGPTConfig(**GPT)
        read = stored_tensors.read
        monkeypatch.setattr(
            stored_tensors,
            "read",
            lambda *given: {name: 2 * array for name, array in read(*given).items()},
        )
        line = "tokens_embed.weight is not the token table of its model"
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens = np.arange(100) % config.vocab_size
    with pytest.raises(UserError, match=line):
        pcagpt.compress(tmp_path, data={"train": tokens, "val": tokens}, max_bytes=900)


def test_a_table_of_another_width_than_config_json_says_is_refused(
    tmp_path, monkeypatch
):
    """Its config.json names the width in a way that we do not know."""
    monkeypatch.setattr(other_decoder, "_WIDTHS", ("hidden_size",))
    config = CONFIG_OF["opt"]()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokens = np.arange(100) % config.vocab_size
    line = r"its token table has 16 columns, its config.json says 32: such a model"
    with pytest.raises(UserError, match=line):
        pcagpt.compress(tmp_path, data={"train": tokens, "val": tokens}, max_bytes=900)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe", "Llama"])
def test_a_form_that_would_make_weights_random_is_refused(name, tmp_path):
    sizes = {n: v for n, v in SIZES.items() if n != "head_dim"}
    sizes |= {"num_local_experts": 3, "num_experts": 3, "moe_intermediate_size": 16}
    sizes |= {"shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{name}Config")(**sizes)
    source = source_of(config, tmp_path)
    (tmp_path / "made").mkdir()
    if name == "Llama":
        write_factored(tmp_path / "made", source)
        return
    with pytest.raises(UserError) as raised:
        write_factored(tmp_path / "made", source)
    line = str(raised.value)
    assert "reads model.layers.0.mlp.experts.down_proj from weights" in line
    assert line.endswith("give --config.format=hf")
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("name", ["Mixtral", "Llama"])
def test_the_printed_command_exports_a_mixture_of_experts(name, tmp_path):
    sizes = SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "model")
    corpus = tmp_path / "data"
    corpus.mkdir()
    for split in ("train", "val"):
        (np.arange(200) % 90).astype(np.uint16).tofile(corpus / f"{split}.bin")
    (corpus / "meta.json").write_text(json.dumps({"vocab_size": 90}))
    asked = {"model_path": tmp_path / "model", "workdir": tmp_path, "ranks": 4}
    asked |= {"compress.methods": "svd,packed", "compress.bands": 1}
    outcome = call(*tiny("compress.py", corpus, model=THEIR_SIZES, **asked))
    assert outcome.code == 0, outcome
    command = outcome.out.splitlines()[-1].removeprefix("export it: ")
    form = "hf-factored" if name == "Llama" else "hf"
    done = call(*shlex.split(command)[3:])
    assert done.code == 0, done
    assert [path.name.split("_")[-1] for path in (tmp_path / "exported").iterdir()] == [
        form
    ]


def source_of(config, folder):
    """A table of rank 2 for a new model."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    table = "model.embed_tokens.weight"
    del tensors[table]
    bands = (BandLeaves(np.ones((90, 2)), np.ones((2, 32))),)
    return types.SimpleNamespace(
        folder=folder,
        record={"architecture": type(model).__name__},
        architecture=type(model).__name__,
        table_name=table,
        table=ExportedTable(np.arange(90), bands, None),
        tensors=tensors,
        config=lambda: json.loads((folder / "config.json").read_text()),
        write_beside=lambda _: None,
    )


@pytest.mark.parametrize("blocks", [[], [[1, 0, 0, 0, 0, 0, 0]]])
def test_a_head_tells_the_type_of_the_table(blocks):
    """Mamba asks for it."""
    layout = {"sizes": [9], "ranks": [2], "blocks": blocks, "is_tied": True}
    embedding = CompressedEmbedding(layout | {"has_mean": False}, 32, 1.0)
    head = CompressedHead(embedding.to(torch.bfloat16), None)
    assert head.weight.dtype == torch.bfloat16
    assert not head.state_dict()


def test_a_config_with_an_infinite_number_is_read(tmp_path):
    sizes = {n: v for n, v in SIZES.items() if n != "head_dim"}
    config = transformers.BambaConfig(
        **sizes | {"num_hidden_layers": 1},
        time_step_limit=(0.0, float("inf")),
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    source = source_of(config, tmp_path)
    assert "Infinity" in (tmp_path / "config.json").read_text()
    assert for_causal_lm(source) == ("BambaForCausalLM", {})


ODD = {
    "unknown": ({"model_type": "odd"}, "transformers has no LlamaForCausalLM, so that"),
    "no_decoder": ({"model_type": "vit"}, "transformers has no LlamaForCausalLM, so"),
    "heads": (
        {"model_type": "llama", **SIZES, "num_attention_heads": 5},
        "transformers makes no .* not a multiple of the number of attention heads",
    ),
    "gpt2": (
        {"model_type": "gpt2", "n_embd": 30, "n_head": 4},
        "transformers makes no .* must be divisible by num_heads",
    ),
    "activation": (
        {"model_type": "llama", **SIZES, "hidden_act": "odd"},
        r"transformers makes no .*KeyError\('odd'\)",
    ),
    "no_type": ({}, "transformers makes no .* Should have a `model_type` key"),
    "part": (
        {"model_type": "llama4", "text_config": SIZES},
        "a Llama4ForCausalLM is only a part of what config.json describes, so that",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_a_model_that_transformers_would_not_open_is_refused(case, tmp_path):
    fields, line = ODD[case]
    source = source_of(transformers.LlamaConfig(**SIZES), tmp_path)
    source.config = lambda: fields
    with pytest.raises(UserError, match=f"^{line}.* give --config.format=hf$"):
        for_causal_lm(source)
