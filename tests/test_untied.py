"""The tables of an untied model are compressed one by one; the other one stays."""

import itertools
import json
import re
import shlex

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra hf: torch, transformers")
transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from command_line import CONFIGS as CONFIG_FILES  # noqa: E402
from command_line import THEIR_SIZES, call, refusal, tiny  # noqa: E402
from runs import snapshot  # noqa: E402
from test_hugging_face_parity import opened  # noqa: E402

from pcagpt.compression.decoder import Decoder  # noqa: E402
from pcagpt.compression.open_decoder import tables_of  # noqa: E402
from pcagpt.compression.sides import INPUT, OUTPUT  # noqa: E402
from pcagpt.config.schema import COMPRESS_BOUNDS  # noqa: E402
from pcagpt.data.batches import EvaluationBatches  # noqa: E402
from pcagpt.errors import UserError  # noqa: E402
from pcagpt.factorization.factor_files import read_bands  # noqa: E402
from pcagpt.json_files import write_json  # noqa: E402
from pcagpt.run.folder import read_record  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "phi": transformers.PhiConfig,  # Its head has a bias.
    "gpt2": transformers.GPT2Config,
}


def write(folder, kind="llama", **changes):
    """A random model whose tables differ."""
    torch.manual_seed(0)
    config = CONFIGS[kind](**SIZES | changes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # Norms and biases that begin at 1 or 0.
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write(tmp_path_factory.mktemp("untied"))


def own_loss(folder, tokens_BT, side=None, table=None):
    """Loss of each target in the model's own code, with another table on a side."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if side is not None:
        of = model.get_output_embeddings, model.get_input_embeddings
        of[side == INPUT]().weight.data.copy_(torch.as_tensor(table))
    with torch.inference_mode():
        logits = model(torch.as_tensor(tokens_BT[:, :-1])).logits
    targets = torch.as_tensor(tokens_BT[:, 1:]).reshape(-1)
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets, reduction="none"
    )
    return losses.numpy()


@pytest.mark.parametrize("side", [INPUT, OUTPUT])
def test_a_swapped_table_adds_the_loss_of_a_model_that_has_it(folder, side):
    chance = np.random.default_rng(0)
    tokens = chance.integers(0, 97, 16 * 3 + 1)
    whole = Decoder(folder, 16)
    assert whole.sides == (INPUT, OUTPUT)
    model = whole.of_side(side)
    own = model.table_VD.copy()
    table = own + 0.1 * chance.normal(size=own.shape).astype(np.float32)
    batches = EvaluationBatches(tokens, 16, 2)
    found = model.score(table, np.zeros(97, int), batches)
    windows = np.stack([tokens[i : i + 17] for i in range(0, 48, 16)])
    before, after = own_loss(folder, windows), own_loss(folder, windows, side, table)
    assert found.loss == pytest.approx(before.mean(), rel=1e-5)
    added = (after - before).mean()
    assert abs(added) > 1e-4
    assert found.added_loss == pytest.approx(added, rel=1e-3, abs=1e-6)
    parts = {INPUT: found.added_loss_input, OUTPUT: found.added_loss_head}
    assert parts.pop(side) == found.added_loss and parts.popitem()[1] == 0
    np.testing.assert_array_equal(model.table_VD, own)
    same = model.score(own, np.zeros(97, int), batches)
    assert same.added_loss == same.kl == 0


@pytest.mark.parametrize("side", [INPUT, OUTPUT])
def test_tokens_are_drawn_with_a_table_on_one_side(folder, side):
    model = Decoder(folder, 16).of_side(side)
    noise = np.random.default_rng(0).normal(size=model.table_VD.shape)
    table = model.table_VD + noise.astype(np.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    of = reference.get_output_embeddings, reference.get_input_embeddings
    of[side == INPUT]().weight.data.copy_(torch.as_tensor(table))
    tokens = [3, 5, 7]
    for token in itertools.islice(
        model.generate(table, tokens, np.ones(97, bool), 1, 0), 9
    ):
        with torch.inference_mode():
            logits = reference(torch.as_tensor([tokens])).logits[0, -1]
        assert token == int(logits.argmax())
        tokens = [*tokens, token]


def test_statistics_of_the_head_are_of_its_own_table(folder):
    tokens = np.random.default_rng(1).integers(0, 97, (2, 8))
    model = Decoder(folder, 16)
    found = model.statistics(np.ones(97) / 97, [tokens])
    hidden = []
    head = model.model.get_output_embeddings()
    head.register_forward_pre_hook(
        lambda _, given: hidden.append(given[0].reshape(-1, 32))
    )
    with torch.inference_mode():
        logits = model.model(torch.as_tensor(tokens)).logits.reshape(-1, 97)
    p, h, w = logits.softmax(-1), hidden[0], head.weight
    np.testing.assert_allclose(found.probability, p.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.hidden_moment, h.T @ h / 16, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.context_moment, h.T @ (p @ w).detach() / 16, rtol=1e-4, atol=1e-5
    )


def test_the_gradient_moment_predicts_the_loss_of_noisy_input_rows(folder):
    chance = np.random.default_rng(2)
    tokens, scale = chance.integers(0, 97, (64, 16)), 2e-3
    model = Decoder(folder, 16)
    found = model.statistics(np.ones(97) / 97, [tokens] * 12)
    rows = model._embedding.weight[torch.as_tensor(tokens).reshape(-1)]
    total = []
    for _ in range(12):
        noise = scale * torch.as_tensor(chance.normal(size=rows.shape))
        logs = []
        for given in (rows, rows + noise.float()):
            with torch.inference_mode(), model._embedding_of(given):
                hidden = model._hidden(torch.arange(len(rows)).reshape(64, 16))
                logs.append(model._log_probabilities(hidden, model._head.weight))
        total.append(float((logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()))
    predicted = 0.5 * scale**2 * np.trace(found.gradient_moment)
    assert np.mean(total) == pytest.approx(predicted, rel=0.1)


def test_tables_of_two_shapes_are_refused(llama, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head = torch.nn.Linear(32, 90, bias=False)
    with pytest.raises(UserError, match=r"input table is \(97, 32\), its output"):
        tables_of(model, llama)


def asked(corpus_folder, model, workdir, **knobs):
    compress = {"methods": "svd,context,coded", "bands": "1,2", "bits": 8}
    compress |= {"calibration_tokens": 512} | knobs.pop("compress", {})
    known = {"model_path": model, "workdir": workdir, "ranks": 16, **knobs}
    if compress.keys() & set(COMPRESS_BOUNDS):
        known.pop("ranks")
    known |= {"evaluate": {"batch_size": 4}, "compress": compress, "model": THEIR_SIZES}
    return tiny("compress.py", corpus_folder, **known)


@pytest.fixture(scope="module")
def swept(corpus_folder, llama, tmp_path_factory):
    """(what was printed, the workdir, what it held) of a sweep."""
    workdir = tmp_path_factory.mktemp("runs")
    outcome = call(*asked(corpus_folder, llama, workdir))
    assert outcome.code == 0, outcome
    return outcome, workdir, snapshot(workdir)


def test_both_sides_share_the_memory_for_hidden_states(llama):
    model = Decoder(llama, 16)
    sides = [model.of_side(side) for side in (INPUT, OUTPUT)]
    model._kept.free_bytes = 3 * 16 * 32 * 4  # of three windows
    for number, one in enumerate(sides):  # They score two windows each.
        batches = EvaluationBatches(np.arange(33) * (number + 3) % 97, 16, 2)
        one.score(1.1 * one.table_VD, np.zeros(97, int), batches)
    assert len(model._kept) == 3
    assert model._kept.free_bytes == 0


def test_the_plan_counts_the_tables_to_measure_for_each_token_table(
    corpus_folder, llama, tmp_path
):
    outcome = call(*asked(corpus_folder, llama, tmp_path), "--print_config")
    assert outcome.code == 0, outcome
    last = outcome.out.splitlines()[-1]
    assert re.fullmatch(
        # PyTorch uses one device.
        r"for each token table that it has: \d+ tables to measure, .* on 1 x cpu, .*",
        last,
    )


def test_a_sweep_of_each_table_is_in_a_folder_of_its_own(swept, llama):
    outcome, workdir, _ = swept
    assert f"{llama} is untied: its tables are compressed one by one" in outcome.out
    folder, decoder = workdir / "compressed", Decoder(llama, 16)
    assert not (folder / "sweep.json").exists()
    for side, other in ((INPUT, OUTPUT), (OUTPUT, INPUT)):
        sweep = json.loads((folder / side / "sweep.json").read_text())
        assert sweep["protocol"]["side"] == side
        unchanged = {INPUT: "added_loss_head", OUTPUT: "added_loss_input"}[side]
        uncounted = {INPUT: "second_order_head", OUTPUT: "second_order_input"}[side]
        assert {row[unchanged] for row in sweep["rows"]} == {0.0}
        assert {row[uncounted] for row in sweep["rows"]} == {0.0}
        assert {row["method"] for row in sweep["rows"]} >= {"svd", "context", "coded"}
        report = (folder / side / "report.md").read_text()
        assert f"is the model with its own {side} table" in report
        assert f"Its {other} table is another one, which stays as it is" in report
        assert read_record(folder / side / "best_k16")["compressed"]["side"] == side
        table = read_bands(folder / side / "best_k16/factors").dense()
        own = decoder.of_side(side).table_VD
        kept = 1 - np.square(table - own).sum() / np.square(own).sum()
        assert 0.4 < kept < 1
    # The statistics of both are measured once.
    assert len(list((workdir / "measured").rglob("statistics_*.npz"))) == 1


def test_a_second_sweep_measures_nothing(swept, llama, corpus_folder, monkeypatch):
    _, workdir, before = swept
    monkeypatch.setattr(Decoder, "score", None)
    monkeypatch.setattr(Decoder, "statistics", None)
    assert call(*asked(corpus_folder, llama, workdir)).code == 0
    after = snapshot(workdir)
    tables = [name for name in before if "best_" in str(name)]
    assert tables and all(before[name] == after[name] for name in tables)


def test_a_folder_of_the_second_table_is_checked_before_the_first_is_measured(
    swept, llama, corpus_folder, tmp_path
):
    _, workdir, _ = swept
    sweep = json.loads((workdir / "compressed/output/sweep.json").read_text())
    sweep["protocol"]["side"] = "input"
    place = tmp_path / "runs/compressed/output"
    place.mkdir(parents=True)
    write_json(place / "sweep.json", sweep)
    words = asked(corpus_folder, llama, tmp_path / "runs")
    line = call(*words).err
    assert f"{place}/sweep.json holds other numbers" in line
    assert not (tmp_path / "runs/compressed/input").exists()


@pytest.mark.parametrize("bound", ["max_bytes=6000", "max_added_loss=0.05"])
def test_a_bound_holds_for_each_table(bound, llama, corpus_folder, tmp_path):
    name, value = bound.split("=")
    words = asked(corpus_folder, llama, tmp_path, compress={name: value})
    outcome = call(*words)
    assert outcome.code == 0, outcome
    for side in (INPUT, OUTPUT):
        place = tmp_path / "compressed" / side
        chosen = json.loads((place / "advice.json").read_text())["chosen"]
        assert chosen[{"max_bytes": "bytes"}.get(name, "added_loss")] <= float(value)
        assert read_record(place / "advised")["compressed"]["side"] == side
        assert f"table: {place}/advised" in outcome.out
        assert re.search(f"^{side} table: .* numbers in ", outcome.out, re.MULTILINE)
    commands = printed(outcome)
    assert [call(*words).code for words in commands] == [0, 0]


def test_further_training_of_an_untied_model_is_refused(llama, corpus_folder, tmp_path):
    words = asked(corpus_folder, llama, tmp_path, compress={"recover_ranks": 16})
    line = refusal(*words, unchanged=[llama])
    assert "compress.recover_ranks is set, but" in line
    assert not (tmp_path / "compressed/input/sweep.json").exists()


def test_an_untied_gpt2_is_compressed_so_too(corpus_folder, tmp_path):
    model = write(tmp_path / "gpt2", "gpt2")
    words = asked(corpus_folder, model, tmp_path, compress={"methods": "svd"})
    outcome = call(*words)
    assert outcome.code == 0, outcome
    for side in (INPUT, OUTPUT):
        assert (tmp_path / "compressed" / side / "sweep.json").exists()


def export(table, workdir, form="hf"):
    """The folder of a table's model."""
    ask = f"--config.model_path={table}", f"--config.workdir={workdir}"
    words = f"--config={CONFIG_FILES / 'export.py'}", *ask, f"--config.format={form}"
    assert call(*words).code == 0
    side = read_record(table)["compressed"]["side"]
    return workdir / "exported" / f"{table.name}_{side}_{form}"


def printed(outcome):
    """The arguments of each command to export that was printed."""
    lines = re.findall("^export it: .* pcagpt.main (.*)$", outcome.out, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_both_printed_commands_export(swept):
    outcome, workdir, _ = swept
    for side in (INPUT, OUTPUT):
        word = "(none is )?recommended"
        assert re.search(f"^{side} table: {word}", outcome.out, re.MULTILINE)
    commands = printed(outcome)
    assert len(commands) == 2
    for _ in range(2):
        assert [call(*words).code for words in commands] == [0, 0]
    made = [path.name for path in (workdir / "exported").iterdir()]
    assert {name.split("_")[-2] for name in made} == {INPUT, OUTPUT}
    assert len(made) == 2


def test_a_later_advice_is_exported_beside_an_earlier_one(
    llama, corpus_folder, tmp_path
):
    made = []
    for most in (6000, 7000, 6000):
        compress = {"max_bytes": most, "methods": "coded"}
        commands = printed(
            call(*asked(corpus_folder, llama, tmp_path, compress=compress))
        )
        for words in commands:
            outcome = call(*words)
            assert outcome.code == 0, outcome
            made.append(outcome.out.split()[0])
    first, second, third = made[:2], made[2:4], made[4:]
    assert first == third
    for path, later, side in zip(first, second, (INPUT, OUTPUT), strict=True):
        assert path == str(tmp_path / f"exported/advised_{side}_coded")
        assert re.fullmatch(rf"{path}_[0-9a-f]{{8}}", later)


def test_a_coded_table_of_a_side_is_exported_as_its_file(swept, llama, tmp_path):
    tokens = torch.arange(16)[None]
    for side in (INPUT, OUTPUT):
        table = swept[1] / "compressed" / side / "best_coded_k16"
        logits = []
        for form in ("hf", "coded"):
            model, _ = opened(form, export(table, tmp_path, form))
            with torch.inference_mode():
                logits.append(model.eval()(tokens).logits)
        assert torch.equal(*logits)


@pytest.mark.parametrize("side", [INPUT, OUTPUT])
def test_an_export_has_one_table_replaced(swept, llama, side, tmp_path):
    (table, *_) = sorted((swept[1] / "compressed" / side).glob("best_k*"))
    made = export(table, tmp_path)
    found, own = (
        transformers.AutoModelForCausalLM.from_pretrained(one).state_dict()
        for one in (made, llama)
    )
    dense = torch.as_tensor(read_bands(table / "factors").dense())
    names = {INPUT: "model.embed_tokens.weight", OUTPUT: "lm_head.weight"}
    for name, tensor in own.items():
        assert torch.equal(found[name], dense if name == names[side] else tensor), name
    line = refusal(
        f"--config={CONFIG_FILES / 'export.py'}",
        f"--config.model_path={table}",
        f"--config.workdir={tmp_path}",
        "--config.format=hf-factored",
        unchanged=[tmp_path],
    )
    assert "two tables" in line


def test_the_two_tables_of_a_model_are_compressed_one_after_the_other(
    swept, llama, corpus_folder, tmp_path
):
    place, done = swept[1] / "compressed", []
    for side, left in ((INPUT, [OUTPUT]), (OUTPUT, [])):
        (table, *_) = sorted((place / side).glob("best_k*"))
        made = export(table, tmp_path / side)
        done.append(side)
        origin = json.loads((made / "pcagpt.json").read_text())
        assert [one["side"] for one in origin["compressed"]] == done
        words = asked(corpus_folder, made, tmp_path / f"after {side}")
        if not left:
            line = refusal(*words, unchanged=[made])
            assert f"{made} has a compressed table: give the model that it" in line
            continue
        assert call(*words).code == 0
        place = tmp_path / f"after {side}/compressed"
        assert sorted(path.name for path in place.iterdir()) == left
    card = (made / "README.md").read_text()
    for side in done:
        assert f"table compressed without training: side {side}, method " in card
    assert "| Added by the output table |" in card
    assert "The input table is compressed in both, so the loss that it adds is" in card
    assert "| output table, as factors |" in card
    assert "| other weights, with the input table in full |" in card
