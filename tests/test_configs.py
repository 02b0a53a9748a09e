"""Every config does its task; every command that is written down can be given."""

import ast
import json
import math
import re
import shutil

import numpy as np
import pytest
from command_line import CONFIGS, ROOT, call, commands, refusal, tiny
from runs import json_of

from pcagpt.config import command_line, validate
from pcagpt.errors import UserError

RUN = {"model_path": "gpt_baseline"}
FROM_RUN = {"init.weights_from": "gpt_baseline", "data.source": "corpus"}
FACTORS = ["D gpt_baseline", "pca_factorized rank 128"]
ARMS = ["A gpt_pca_k128", "C gpt_random_lowrank_k128", "B gpt_pca_finetune_k128"]
# {config: (knobs that it needs, its plan)}. test_readme.py runs all of them.
ALL = {
    "baseline.py": ({}, ["D gpt_baseline"]),
    "compress.py": (RUN | {"ranks": 8}, ["compress gpt_baseline at step 2"]),
    "demo.py": ({}, [line.replace("128", "32") for line in FACTORS + ARMS]),
    "evaluate.py": (RUN, ["evaluate gpt_baseline at step 2"]),
    "experiment.py": ({}, FACTORS + ARMS),
    "export.py": (RUN, ["export gpt_baseline at step 2"]),
    "gpt2_small_hour.py": ({}, [*FACTORS, "D+ gpt_baseline_continued", *ARMS]),
    "factorize.py": (RUN | {"ranks": 8}, ["pca_factorized rank 8"]),
    "pca_finetune_k128.py": ({}, [*FACTORS, "B gpt_pca_finetune_k128"]),
    "pca_k128.py": ({}, [*FACTORS, "A gpt_pca_k128"]),
    "random_k128.py": ({}, ["C gpt_random_lowrank_k128"]),
    "recover.py": (FROM_RUN, ["D+ gpt_continued_from_gpt_baseline"]),
    "sample.py": (RUN, ["sample gpt_baseline at step 2"]),
}
# The line that follows the plan of a command that may take long.
AMOUNTS = {
    "baseline.py": "1 run to train: roughly ",
    "compress.py": "10 tables to measure, each on at most 32,768 tokens of val",
    "demo.py": "4 runs to train: roughly ",
    "experiment.py": "4 runs to train: roughly ",
    "gpt2_small_hour.py": "5 runs to train: roughly ",
    "pca_finetune_k128.py": "2 runs to train: roughly ",
    "pca_k128.py": "2 runs to train: roughly ",
    "random_k128.py": "1 run to train: roughly ",
    "recover.py": "1 run to train: roughly ",
}


@pytest.fixture
def run_dir(trained, corpus_folder, tmp_path, monkeypatch):
    """The current folder holds a finished baseline and its corpus."""
    shutil.copytree(corpus_folder, tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "gpt_baseline")


def test_every_config_is_in_the_table():
    assert sorted(ALL) == sorted(path.name for path in CONFIGS.glob("*.py"))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.usefixtures("run_dir")
def test_every_config_plans_its_task(name):
    needed, plan = ALL[name]
    words = [f"--config.{path}={value}" for path, value in needed.items()]
    outcome = call(f"--config={CONFIGS / name}", *words, "--print_config")
    assert outcome.code == 0, outcome
    lines = outcome.out.split("\n\n")[1].splitlines()
    if name in AMOUNTS:
        assert lines.pop().startswith(AMOUNTS[name])
    for line, expected in zip(lines, plan, strict=True):
        assert " ".join(line.split()).startswith(expected)


@pytest.mark.parametrize(
    "name", ["baseline.py", "pca_k128.py", "pca_finetune_k128.py", "random_k128.py"]
)
def test_the_docstring_of_a_config_names_the_letter_of_its_model(name):
    docstring = ast.get_docstring(ast.parse((CONFIGS / name).read_text()))
    letter = ALL[name][1][-1][0]
    assert docstring.startswith(f"{letter}, ")


@pytest.mark.parametrize("name", ALL)
def test_every_config_is_a_small_change_of_the_base(name):
    tree = ast.parse((CONFIGS / name).read_text())
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert function.name == "get_config"
    first, last = function.body[1], function.body[-1]  # After the docstring.
    assert last.end_lineno - first.lineno + 1 <= 30


def test_a_size_that_the_config_lacks_is_named_in_one_line(tmp_path):
    line = refusal("--config=configs/gpt2_small_hour.py:medium", unchanged=[tmp_path])
    assert "give one of small, proxy instead of medium" in line


# The tasks that train nothing.


@pytest.mark.usefixtures("quick")
def test_evaluate_writes_beside_the_run_what_it_prints(run_dir, corpus_folder):
    outcome = call(*tiny("evaluate.py", corpus_folder, model_path=run_dir))
    assert outcome.code == 0, outcome
    (written,) = run_dir.glob("evaluation_*_val_step2.json")
    assert json_of(written) == json.loads(outcome.out)
    assert outcome.err.splitlines()[-1] == f"written to {written}"
    assert math.isfinite(json.loads(outcome.out)["loss"])


def test_factorize_writes_a_table_and_scale_matrices(run_dir, corpus_folder, tmp_path):
    asked = {"model_path": run_dir, "ranks": 4, "workdir": tmp_path}
    outcome = call(*tiny("factorize.py", corpus_folder, **asked))
    assert outcome.code == 0, outcome
    assert np.load("pca_factorized/wte_pca_k4.npy").shape == (97, 4)
    scales = np.load("pca_factorized/scale_mats_pca_k4.npz")
    assert scales["scale_up"].shape == scales["scale_down"].shape == (4, 16)


# Commands that are written down.


def check_command(words):
    """Raises UserError, or fails, unless a documented command can be given."""
    words = [word for word in words if word != "..."]
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file(), words[1]
        overrides = [word for word in words if word.startswith("--config.")]
        command_line.parse(["pcagpt", "--config=configs/demo.py", *overrides])
        return
    settings, _ = command_line.parse(["pcagpt", *words[3:]])
    validate(settings)


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


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "checkpoints/README.md",
    "configs/README.md",
    "pcagpt/compression/README.md",
    "pcagpt/export/README.md",
    "scripts/README.md",
    "tests/README.md",
]


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
