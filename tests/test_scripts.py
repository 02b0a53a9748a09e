"""The shell scripts: the commands they stand for, their help, and their refusals."""

import os
import shutil
import subprocess
import sys

import pytest
from command_line import ROOT

from pcagpt.config import command_line, validate

RECORDER = """#!/bin/sh
[ "$1" = -c ] && exit 0
pwd >"$RECORD"
printf '%s\\n' "$@" >>"$RECORD"
exit 7
"""

# The rank that a test gives to each wrapper, and the words that python then gets.
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
WITH_RANK = [name for name, (arguments, _) in WRAPPERS.items() if arguments]
SCRIPTS = sorted(
    path.name for path in (ROOT / "scripts").glob("*.sh") if path.name != "launch.sh"
)


@pytest.fixture
def copy(tmp_path):
    """A repository that holds nothing but the scripts; its path has a space."""
    shutil.copytree(ROOT / "scripts", tmp_path / "a copy" / "scripts")
    return tmp_path / "a copy"


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def shell(tmp_path):
    """Runs a script from another folder, with a python3 that records its arguments."""
    write_program(tmp_path / "bin" / "python3", RECORDER)
    (tmp_path / "elsewhere").mkdir()
    record = tmp_path / "record"
    env = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
    env["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env["RECORD"] = str(record)

    def run(repository, script, *arguments, **environment):
        ended = subprocess.run(
            ["bash", str(repository / "scripts" / script), *arguments],
            cwd=tmp_path / "elsewhere",
            env={**env, **environment},
            capture_output=True,
            text=True,
        )
        return ended, record.read_text().splitlines() if record.exists() else []

    return run


@pytest.mark.parametrize("script", WRAPPERS)
def test_a_wrapper_runs_its_command_and_passes_further_arguments_on(
    script, copy, shell
):
    arguments, expected = WRAPPERS[script]
    further = ["--config.workdir=my runs", "--config.seed=2"]
    ended, (folder, *words) = shell(copy, script, *arguments, *further)
    assert ended.returncode == 7, ended.stderr  # The exit code of python.
    assert folder == str(copy)
    assert words == ["-m", "pcagpt.main", *expected, *further]


@pytest.mark.parametrize("script", WRAPPERS)
def test_a_wrapper_without_arguments_has_the_defaults_and_a_valid_command(
    script, copy, shell, monkeypatch
):
    _, (_, *words) = shell(copy, script)
    ranks = {"run_pca_factorization.sh": "64,128,256"}.get(script, "128")
    separator = ":" if script == "run_all_experiments.sh" else "="
    if script in WITH_RANK:
        assert words[-1].rpartition(separator)[-1] == ranks
    monkeypatch.chdir(ROOT)
    settings, _ = command_line.parse(["pcagpt", *words[2:]])
    validate(settings)


def test_the_model_to_factorize_can_be_named(copy, shell):
    _, record = shell(copy, "run_pca_factorization.sh", "8", MODEL_PATH="a run")
    assert "--config.model_path=a run" in record


@pytest.mark.parametrize("script", WITH_RANK)
def test_a_bad_rank_is_refused_in_one_line(script, copy, shell):
    for rank in ("x", "0", "8,,16", "8.5", "", "--x=1"):
        ended, record = shell(copy, script, rank)
        assert (ended.returncode, ended.stdout, record) == (2, "", [])
        assert ended.stderr.count("\n") == 1
        assert f"{script}: the first argument is '{rank}', not a " in ended.stderr
        assert f"bash scripts/{script} " in ended.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_purpose_and_does_nothing(script, copy, shell):
    for flag in ("--help", "-h"):
        ended, record = shell(copy, script, flag)
        assert (ended.returncode, ended.stderr, record) == (0, "", [])
        assert f"bash scripts/{script}" in ended.stdout
        assert "#" not in ended.stdout
    assert not (copy / ".venv").exists()


def test_the_active_environment_comes_first_then_the_repository_s(
    copy, shell, tmp_path
):
    script, active = "train_baseline_gpt2.sh", tmp_path / "active"
    write_program(active / "bin" / "python", "#!/bin/sh\nexit 3\n")
    write_program(copy / ".venv" / "bin" / "python", "#!/bin/sh\nexit 4\n")
    assert shell(copy, script)[0].returncode == 4
    assert shell(copy, script, VIRTUAL_ENV=str(active))[0].returncode == 3


def test_a_wrapper_without_an_installation_recommends_the_set_up(copy, shell, tmp_path):
    write_program(tmp_path / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    ended, _ = shell(copy, "train_baseline_gpt2.sh")
    assert ended.returncode == 2
    assert "run bash scripts/setup.sh once" in ended.stderr


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("demo.sh", ["-m pcagpt.main --config=configs/demo.py --seed <a b>"]),
        (
            "test.sh",
            [
                "-m ruff check .",
                "-m ruff format --check .",
                "-m pytest -n logical --maxprocesses 4 --dist worksteal --seed <a b>",
            ],
        ),
    ],
)
def test_demo_and_test_set_up_first_and_then_pass_their_arguments_on(
    script, expected, copy, shell, tmp_path
):
    (copy / "scripts" / "setup.sh").write_text("echo set up >>../calls\n")
    record_words = """#!/bin/sh
for word in "$@"; do
  case $word in *' '*) word="<$word>" ;; esac
  line="$line $word"
done
echo "${line# }" >>../calls
"""
    write_program(copy / ".venv" / "bin" / "python", record_words)
    ended, _ = shell(copy, script, "--seed", "a b")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "calls").read_text().splitlines() == ["set up", *expected]


def test_setup_refuses_a_python_that_does_not_run(copy, shell):
    ended, _ = shell(copy, "setup.sh", PYTHON="/bin/false")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "PYTHON is '/bin/false', which does not run as Python 3.11" in ended.stderr
    assert not (copy / ".venv").exists()


def test_setup_refuses_a_broken_environment_and_leaves_it(copy, shell):
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/nowhere/python")
    ended, _ = shell(copy, "setup.sh")
    assert ended.returncode == 2
    assert "remove it (rm -r .venv)" in ended.stderr
    assert python.is_symlink()


def test_setup_installs_once_and_again_when_the_pins_change(copy, shell):
    for name in ("pyproject.toml", "constraints.txt"):
        (copy / name).write_text("")
    # A real Python that installs nothing.
    write_program(
        copy / ".venv" / "bin" / "python",
        '#!/bin/sh\n[ "$1" = -m ] && echo "asked for $2" && exit 0\n'
        f'exec "{sys.executable}" "$@"\n',
    )
    first, _ = shell(copy, "setup.sh")
    assert first.returncode == 0, first.stderr
    assert "installing" in first.stdout
    log = copy / ".venv" / "pcagpt-install.log"
    assert log.read_text() == "asked for pip\n"
    again, _ = shell(copy, "setup.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    (copy / "constraints.txt").write_text("jax==0")
    assert "installing" in shell(copy, "setup.sh")[0].stdout
