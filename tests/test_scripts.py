"""The shell wrappers: the command lines they stand for, their help, their refusals."""

import os
import shutil
import subprocess
import sys

import pytest
from command_line import ROOT

from pcagpt import config as knobs
from pcagpt.config import command_line

RECORDER = """#!/bin/sh
[ "$1" = -c ] && exit 0
pwd >"$RECORD"
printf '%s\\n' "$@" >>"$RECORD"
exit 7
"""

WRAPPERS = {
    "train_baseline_gpt2.sh": ([], ["--config=configs/baseline.py"]),
    "run_pca_factorization.sh": (
        ["8,16"],
        [
            "--config=configs/factorize.py",
            "--config.model_path=checkpoints/gpt_baseline",
            "--config.ranks=8,16",
        ],
    ),
    "train_pca_compressed.sh": (
        ["64"],
        ["--config=configs/pca_k128.py", "--config.model.n_embd_wte=64"],
    ),
    "train_pca_finetune.sh": (
        ["64"],
        ["--config=configs/pca_finetune_k128.py", "--config.model.n_embd_wte=64"],
    ),
    "train_random_lowrank.sh": (
        ["64"],
        ["--config=configs/random_k128.py", "--config.model.n_embd_wte=64"],
    ),
    "run_all_experiments.sh": (["8,16"], ["--config=configs/experiment.py:8,16"]),
}
WITH_RANK = sorted(name for name, (arguments, _) in WRAPPERS.items() if arguments)
SCRIPTS = sorted(
    path.name for path in (ROOT / "scripts").glob("*.sh") if path.name != "launch.sh"
)


@pytest.fixture
def copy(tmp_path):
    """A repository of which there is nothing but the scripts."""
    shutil.copytree(ROOT / "scripts", tmp_path / "a copy" / "scripts")
    return tmp_path / "a copy"


def record_into(path):
    """Puts an interpreter there that only writes down how it is called."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECORDER)
    path.chmod(0o755)


@pytest.fixture
def shell(tmp_path):
    """Runs a script of a repository from elsewhere, with a python3 that records."""
    record_into(tmp_path / "bin" / "python3")
    (tmp_path / "elsewhere").mkdir()
    env = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env["RECORD"] = str(tmp_path / "record")

    def run(repository, script, *arguments, **environment):
        ended = subprocess.run(
            ["bash", str(repository / "scripts" / script), *arguments],
            cwd=tmp_path / "elsewhere",
            env={**env, **environment},
            capture_output=True,
            text=True,
        )
        record = tmp_path / "record"
        lines = record.read_text().splitlines() if record.exists() else []
        return ended, lines

    return run


@pytest.mark.parametrize("script", WRAPPERS)
def test_a_wrapper_gives_its_command_with_further_arguments(script, copy, shell):
    arguments, expected = WRAPPERS[script]
    further = ["--config.workdir=my runs", "--config.seed=2"]
    ended, record = shell(copy, script, *arguments, *further[: len(arguments) + 1])
    assert ended.returncode == 7, ended.stderr  # What python ended with.
    where, *words = record
    assert where == str(copy)
    assert words == ["-m", "pcagpt.main", *expected, *further[: len(arguments) + 1]]


@pytest.mark.parametrize("script", WRAPPERS)
def test_a_wrapper_s_command_is_one_that_can_be_given(script, copy, shell, monkeypatch):
    _, (_, *words) = shell(copy, script)
    monkeypatch.chdir(ROOT)
    config, _ = command_line.parse(["pcagpt", *words[2:]])
    knobs.validate(config)


@pytest.mark.parametrize(
    ("script", "default"),
    [
        ("run_pca_factorization.sh", "--config.ranks=64,128,256"),
        ("train_pca_compressed.sh", "--config.model.n_embd_wte=128"),
        ("train_pca_finetune.sh", "--config.model.n_embd_wte=128"),
        ("train_random_lowrank.sh", "--config.model.n_embd_wte=128"),
        ("run_all_experiments.sh", "--config=configs/experiment.py:128"),
    ],
)
def test_a_rank_that_is_not_given_has_a_default(script, default, copy, shell):
    _, record = shell(copy, script)
    assert record[-1] == default


def test_the_model_to_factorize_can_be_named(copy, shell):
    _, record = shell(copy, "run_pca_factorization.sh", "8", MODEL_PATH="a run")
    assert "--config.model_path=a run" in record


@pytest.mark.parametrize("rank", ["x", "0", "-4", "8,x", "8,,16", "8.5", "", "--x=1"])
@pytest.mark.parametrize("script", WITH_RANK)
def test_a_bad_rank_is_refused_in_one_line(script, rank, copy, shell):
    ended, record = shell(copy, script, rank)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith(f"{script}: the first argument is '{rank}', not a ")
    assert f"bash scripts/{script} " in ended.stderr
    assert record == []


@pytest.mark.parametrize("flag", ["--help", "-h"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_its_purpose_and_use_and_does_nothing(
    script, flag, copy, shell
):
    ended, record = shell(copy, script, flag)
    assert (ended.returncode, ended.stderr, record) == (0, "", [])
    assert f"bash scripts/{script}" in ended.stdout
    assert "#" not in ended.stdout
    assert not (copy / ".venv").exists()


def test_the_active_environment_comes_first_then_the_repository_s(
    copy, shell, tmp_path
):
    script = "train_baseline_gpt2.sh"
    active, own = tmp_path / "active", copy / ".venv"
    for environment in (active, own):
        record_into(environment / "bin" / "python")
        python = environment / "bin" / "python"
        text = python.read_text().replace("exit 7", f"exit {len(environment.name)}")
        python.write_text(text)
    assert shell(copy, script)[0].returncode == len(".venv")
    ended, _ = shell(copy, script, VIRTUAL_ENV=str(active))
    assert ended.returncode == len("active")


def test_without_an_installation_the_set_up_is_recommended(copy, shell, tmp_path):
    python = tmp_path / "bin" / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")
    ended, _ = shell(copy, "train_baseline_gpt2.sh")
    assert ended.returncode == 2
    assert "run bash scripts/setup.sh once" in ended.stderr


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "demo.sh",
            [["-m", "pcagpt.main", "--config=configs/demo.py", "--seed", "a b"]],
        ),
        (
            "test.sh",
            [
                ["-m", "ruff", "check", "."],
                ["-m", "ruff", "format", "--check", "."],
                ["-m", "pytest", "-n", "logical", "--maxprocesses", "4"]
                + ["--dist", "worksteal", "--seed", "a b"],
            ],
        ),
    ],
)
def test_demo_and_test_set_up_first_and_then_pass_their_arguments_on(
    script, expected, copy, shell, tmp_path
):
    (copy / "scripts" / "setup.sh").write_text("echo set up >>'../calls'\n")
    record_into(copy / ".venv" / "bin" / "python")
    (copy / ".venv" / "bin" / "python").write_text(
        '#!/bin/sh\nfor word in "$@"; do printf "%s|" "$word"; done >>../calls\n'
        "echo >>../calls\n"
    )
    ended, _ = shell(copy, script, "--seed", "a b")
    assert ended.returncode == 0, ended.stderr
    first, *calls = (tmp_path / "calls").read_text().splitlines()
    assert first == "set up"
    assert calls == ["".join(f"{word}|" for word in words) for words in expected]


def test_setup_refuses_a_python_that_is_too_old_or_does_not_run(copy, shell):
    ended, _ = shell(copy, "setup.sh", PYTHON="/bin/false")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "PYTHON is '/bin/false', which does not run as Python 3.11" in ended.stderr
    assert not (copy / ".venv").exists()


def test_setup_refuses_a_broken_environment_and_leaves_it(copy, shell):
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    ended, _ = shell(copy, "setup.sh")
    assert ended.returncode == 2
    assert "remove it (rm -r .venv)" in ended.stderr
    assert (copy / ".venv" / "bin" / "python").is_symlink()


def test_setup_does_nothing_where_all_is_installed(copy, shell):
    for name in ("pyproject.toml", "constraints.txt"):
        (copy / name).write_text("")
    (copy / ".venv" / "bin").mkdir(parents=True)
    python = copy / ".venv" / "bin" / "python"
    # A true Python that says what it was asked to do besides running scripts.
    python.write_text(
        '#!/bin/sh\n[ "$1" = -m ] && echo "asked for $2" && exit 0\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)
    first, _ = shell(copy, "setup.sh")
    assert first.returncode == 0, first.stderr
    assert "installing" in first.stdout
    log = copy / ".venv" / "pcagpt-install.log"
    assert log.read_text() == "asked for pip\n"
    log.unlink()
    again, _ = shell(copy, "setup.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert not log.exists()
    (copy / "constraints.txt").write_text("jax==0")
    changed, _ = shell(copy, "setup.sh")
    assert "installing" in changed.stdout


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.sh")))
def test_a_script_has_no_syntax_error(script):
    subprocess.run(["bash", "-n", script], check=True)
