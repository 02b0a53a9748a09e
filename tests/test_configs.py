"""Every config does its task, tiny; every command that is written down can be given."""

import ast
import json
import math
import re
import shutil

import numpy as np
import pytest
from command_line import CONFIGS, ROOT, call, commands, tiny
from runs import quick_compiles

from pcagpt import arms
from pcagpt import config as knobs
from pcagpt.compress.effort import CPU
from pcagpt.config import command_line
from pcagpt.errors import UserError
from pcagpt.run import folder as run_folder

ALL = sorted(path.name for path in CONFIGS.glob("*.py"))

RANK = 4
MODELS = {
    "baseline.py": "baseline",
    "pca_k128.py": "pca",
    "pca_finetune_k128.py": "pca_finetune",
    "random_k128.py": "random",
}
RECOVERY = "recover.py"  # Goes on from a run that has to be named.
RUN_NAMES = {
    "baseline": "gpt_baseline",
    "pca": f"gpt_pca_k{RANK}",
    "random": f"gpt_random_lowrank_k{RANK}",
    "pca_finetune": f"gpt_pca_finetune_k{RANK}",
}


def load(name):
    return command_line.parse(["pcagpt", f"--config={CONFIGS / name}"])[0]


@pytest.fixture(scope="session")
def trained(corpus_folder, compiled, tmp_path_factory):
    """The folder of a finished baseline: not to be written to."""
    workdir = tmp_path_factory.mktemp("trained_baseline")
    with quick_compiles(compiled):
        assert call(*tiny("baseline.py", corpus_folder, workdir=workdir)).code == 0
    return workdir / "gpt_baseline"


@pytest.fixture(scope="session")
def factorized(corpus_folder, compiled, tmp_path_factory):
    """The folder of a finished model of rank 4: not to be written to."""
    workdir = tmp_path_factory.mktemp("trained_factorized")
    arguments = tiny(
        "random_k128.py", corpus_folder, workdir=workdir, model={"n_embd_wte": RANK}
    )
    with quick_compiles(compiled):
        assert call(*arguments).code == 0
    return workdir / RUN_NAMES["random"]


def check_run(run_dir, arm):
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["arm"]) == ("done", arm)
    assert result["steps"] in (1, 2)
    assert math.isfinite(result["val_loss"])


def check_factors(folder):
    assert np.load(folder / f"wte_pca_k{RANK}.npy").shape == (97, RANK)
    scales = np.load(folder / f"scale_mats_pca_k{RANK}.npz")
    assert scales["scale_up"].shape == scales["scale_down"].shape == (RANK, 16)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ALL)
def test_every_config_does_its_task_in_two_shrunken_steps(
    name, trained, factorized, corpus_folder, tmp_path
):
    config, settings = load(name), {"workdir": tmp_path / "runs"}
    run_names = RUN_NAMES
    run_dir = tmp_path / "runs" / "gpt_baseline"
    if config.task in ("factorize", "compress", "evaluate", "sample"):
        shutil.copytree(trained, run_dir)
        settings["model_path"] = run_dir
    if config.task == "sample":  # What the ids of the tiny corpus might stand for.
        record = run_folder.read_config(run_dir) | {"tokenizer": "sotu4096"}
        run_folder.write_config(run_dir, record)
    if config.task in ("factorize", "compress", "experiment"):
        settings["ranks"] = RANK
    if config.model.n_embd_wte is not None:
        settings["model"] = {"n_embd_wte": RANK}
    if name == RECOVERY:
        settings["init"] = {"weights_from": factorized}
        settings["distill"] = {"teacher": trained}
        run_names = {config.arm: f"gpt_pca_distill_from_{factorized.name}"}
    outcome = call(*tiny(name, corpus_folder, **settings))
    assert outcome.code == 0, outcome
    if config.task == "train":
        arm = "pca_distill" if name == RECOVERY else config.arm
        check_run(tmp_path / "runs" / run_names[config.arm], arm)
    elif config.task == "experiment":
        for arm, folder in RUN_NAMES.items():
            check_run(tmp_path / "runs" / folder, arm)
        check_factors(tmp_path / "runs" / "pca_factorized")
        results = json.loads((tmp_path / "runs" / "results.json").read_text())
        assert [row["letter"] for row in results["rows"]] == ["D", "A", "B", "C"]
        assert "</html>" in (tmp_path / "runs" / "report.html").read_text()
    elif config.task == "factorize":
        check_factors(tmp_path / "runs" / "pca_factorized")
    elif config.task == "compress":
        sweep = json.loads((tmp_path / "runs/compressed/sweep.json").read_text())
        methods = CPU.methods.split(",")
        assert {row["method"] for row in sweep["rows"]} == {"baseline", *methods}
        assert (tmp_path / f"runs/compressed/best_k{RANK}/ckpt/0").is_dir()
    elif config.task == "sample":
        assert len(outcome.out) > 200
    else:
        assert config.task == "evaluate"
        (written,) = run_dir.glob(f"evaluation_*_{config.split}_step2.json")
        assert json.loads(written.read_text()) == json.loads(outcome.out)
        assert math.isfinite(json.loads(outcome.out)["loss"])


@pytest.mark.parametrize("name", ALL)
def test_every_config_is_a_small_change_of_the_base(name):
    tree = ast.parse((CONFIGS / name).read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert function.name == "get_config"
    first, last = function.body[1], function.body[-1]  # After the docstring.
    assert last.end_lineno - first.lineno + 1 <= 30


@pytest.mark.parametrize("name", ALL)
def test_every_config_is_valid_as_it_is(name):
    config = load(name)
    if config.task in ("factorize", "compress", "evaluate", "sample"):
        config.model_path = "RUN"
    if name == RECOVERY:
        config.init.weights_from = "RUN"
    knobs.validate(config)


@pytest.mark.parametrize(("name", "arm"), MODELS.items())
def test_the_config_that_is_named_for_a_model_trains_it(name, arm):
    config, entry = load(name), arms.ARMS[arm]
    assert (config.task, config.arm) == ("train", arm)
    docstring = ast.get_docstring(ast.parse((CONFIGS / name).read_text()))
    assert docstring.startswith(f"{entry.letter}, ")


def check_command(words):
    """Raises UserError, or fails, unless a documented command can be given."""
    words = [word for word in words if word != "..."]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words[1]
        overrides = [word for word in words if word.startswith("--config.")]
        command_line.parse(["pcagpt", "--config=configs/demo.py", *overrides])
        return
    config, _ = command_line.parse(["pcagpt", *words[3:]])
    knobs.validate(config)


@pytest.mark.parametrize("name", ALL)
def test_the_docstring_of_every_config_holds_its_command(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = ast.get_docstring(ast.parse((CONFIGS / name).read_text()))
    found = commands(text)
    assert any(
        word.split(":")[0] == f"--config=configs/{name}" for c in found for word in c
    )
    for command in found:
        check_command(command)
    for override in re.findall(r"--config\.[\w.]+=[^\s:]+(?<![.,])", text):
        words = [f"--config=configs/{name}", override]
        command_line.parse(["pcagpt", *words])


PAGES = ["README.md", "CONTRIBUTING.md", "checkpoints/README.md"]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_documentation_can_be_given(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}\S.*$", text, re.MULTILINE)
    for command in commands("\n".join([*blocks, *indented])):
        check_command(command)


@pytest.mark.parametrize(
    "line",
    [
        "python -m pcagpt.main --config=configs/nowhere.py",
        "python -m pcagpt.main --config=configs/demo.py --config.train.stps=3",
        "python -m pcagpt.main --config=configs/demo.py --config.ranks=0",
        "$ python -m pcagpt.main \\\n    --config=configs/demo.py --print-config",
        "bash scripts/nowhere.sh 128",
        "bash scripts/demo.sh --config.train.stps=3",
    ],
)
def test_a_documented_command_that_cannot_be_given_would_be_noticed(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    (command,) = commands(f"Say this:\n    {line}  # and wait\n")
    with pytest.raises((UserError, AssertionError)):
        check_command(command)
