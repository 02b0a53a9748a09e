"""Slurm and Kubernetes, as far as they can be tried without a cluster."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import ROOT
from jax._src.clusters import ClusterEnv

from pcagpt.config import command_line, validate

yaml = pytest.importorskip("yaml")

# A step that records its arguments, and ends as a run does after a signal.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$RECORD/srun"
trap 'exit 75' USR1
trap 'exit 1' TERM
touch "$RECORD/started"
for _ in {1..100}; do [[ ${CODE-} ]] && exit "$CODE"; sleep 0.1; done
"""
RECORDER = """#!/usr/bin/env bash
echo "$@" >>"$RECORD/${0##*/}"
wc -l <"$RECORD/${0##*/}"
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs a script in a copy of the scripts, with a stand-in for Slurm's commands.

    Returns exit code and errors. The job gets the signal when its step has started.
    """
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    for name, text in {"srun": SRUN, "scontrol": RECORDER, "sbatch": RECORDER}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)

    def run(*words, number=None, **environment):
        own = {
            "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            "RECORD": str(tmp_path),
            "VIRTUAL_ENV": sys.prefix,
            "SLURM_JOB_ID": "17",
        }
        with subprocess.Popen(
            ["bash", *words],
            cwd=copy,
            env=os.environ | own | environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as job:
            while number and not (tmp_path / "started").exists():
                time.sleep(0.05)
            if number:
                job.send_signal(number)
            _, said = job.communicate(timeout=30)
        return job.returncode, said

    return run


@pytest.mark.parametrize(
    ("number", "code", "requeued"),
    [(signal.SIGUSR1, 75, "requeue 17\n"), (signal.SIGTERM, 1, None)],
)
def test_a_signal_to_the_job_goes_to_its_processes_and_75_requeues(
    number, code, requeued, slurm, tmp_path
):
    words = ("scripts/slurm.sbatch", "--config=configs/demo.py")
    assert slurm(*words, number=number) == (code, "")
    record = tmp_path / "scontrol"
    assert (record.read_text() if record.exists() else None) == requeued
    words = (tmp_path / "srun").read_text().splitlines()
    assert words[-4:] == [
        *("-m", "pcagpt.main", "--config=configs/demo.py"),
        "--config.distributed.enabled=True",
    ]


@pytest.mark.parametrize("code", [0, 1, 2])
def test_other_codes_are_those_of_the_job(code, slurm, tmp_path):
    assert slurm("scripts/slurm.sbatch", CODE=str(code)) == (code, "")
    assert not (tmp_path / "scontrol").exists()


def test_an_array_has_every_rank_arm_and_seed_once_and_the_report_last(
    slurm, tmp_path, monkeypatch
):
    further = ["--config.workdir=my runs", "--config.train.steps=7"]
    array = ("scripts/slurm_array.sh", "8,16", "pca,random", "1,2", *further)
    assert slurm(*array) == (0, "")
    submitted = (tmp_path / "sbatch").read_text().splitlines()
    assert [line.split()[:-2] for line in submitted] == [
        ["--parsable", "--array=1-2"],
        ["--parsable", "--array=1-8", "--dependency=afterok:1"],
        ["--parsable", "--array=1-1", "--dependency=afterok:2"],
    ]
    monkeypatch.chdir(ROOT)
    asked = []
    for line in submitted:
        file = line.split()[-1]
        count = len((tmp_path / "copy" / file).read_text().splitlines())
        for number in range(1, count + 1):
            task = {"CODE": "0", "SLURM_ARRAY_TASK_ID": str(number)}
            assert slurm(*line.split()[-2:], **task) == (0, "")
            words = (tmp_path / "srun").read_text().splitlines()
            words = words[words.index("pcagpt.main") + 1 :]
            settings, _ = command_line.parse(["pcagpt", *words])
            validate(settings)
            assert settings.task == "experiment"
            assert (settings.workdir, settings.train.steps) == ("my runs", 7)
            made = settings.experiment
            asked.append((settings.ranks, made.arms, made.seeds))
    assert asked[:2] == [((8, 16), "", (1,)), ((8, 16), "", (2,))]
    combinations = [
        ((rank,), arm, (seed,))
        for rank in (8, 16)
        for arm in ("pca", "random")
        for seed in (1, 2)
    ]
    assert asked[2:-1] == combinations
    assert asked[-1] == ((8, 16), "pca,random", (1, 2))


def test_an_array_without_seeds_is_refused(slurm, tmp_path):
    for words in ([], ["8"], ["8", "pca"], ["x", "pca", "1"]):
        code, said = slurm("scripts/slurm_array.sh", *words)
        assert (code, said.count("\n")) == (2, 1)
        assert said.endswith("bash scripts/slurm_array.sh 64,128 pca,random 1,2\n")
    assert not (tmp_path / "sbatch").exists()


def test_jax_finds_the_processes_of_the_slurm_job(monkeypatch):
    step = {
        "SLURM_JOB_ID": "4100",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    found = ClusterEnv.auto_detect_unset_distributed_params(*[None] * 5, 1)
    assert found == ("gpu07:61444", 16, 9, [1])
    lines = (ROOT / "scripts/slurm.sbatch").read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    tasks, gpus = (
        next(o.partition("=")[2] for o in options if o.startswith(name))
        for name in ("--ntasks-per-node", "--gpus-per-node")
    )
    assert tasks == gpus  # JAX gives each process one GPU.


# What JobSet's schema (v1alpha2) allows, as far as the manifest needs it.
JOBSET = {
    "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
    "failurePolicy": {
        "maxRestarts": int,
        "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}],
    },
    "replicatedJobs": [
        {
            "name": str,
            "replicas": int,
            "template": {
                "spec": {
                    "parallelism": int,
                    "completions": int,
                    "completionMode": str,
                    "backoffLimit": int,
                    "podFailurePolicy": {
                        "rules": [
                            {
                                "action": str,
                                "onExitCodes": {
                                    "containerName": str,
                                    "operator": str,
                                    "values": [int],
                                },
                            }
                        ]
                    },
                    "template": {"spec": dict},
                }
            },
        }
    ],
}


def misfits(value, schema, path=""):
    """Where a value has a field or type that the schema lacks."""
    if isinstance(schema, type):
        return [] if isinstance(value, schema) else [path]
    if isinstance(schema, list):
        return [m for v in value for m in misfits(v, schema[0], path)]
    unknown = [f"{path}.{name}" for name in value.keys() - schema.keys()]
    known = value.keys() & schema.keys()
    return unknown + [m for k in known for m in misfits(value[k], schema[k], k)]


def test_the_jobset_has_known_fields_and_what_jax_asks_for(monkeypatch):
    text = (ROOT / "scripts/jobset.yaml").read_text()
    *_, role, binding, jobset = yaml.safe_load_all(text)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert misfits({"parallelism": "2", "x": 1}, {"parallelism": int}) == [
        ".x",
        "parallelism",
    ]
    assert not misfits(jobset["spec"], JOBSET)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert replicated["replicas"] == 1  # JAX counts the pods of one job.
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # As podFailurePolicy demands.
    assert pod["serviceAccountName"] == binding["subjects"][0]["name"]
    allowed = {name for rule in role["rules"] for name in rule["resources"]}
    assert allowed == {"pods", "services", "jobs"}
    (container,) = pod["containers"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]
    monkeypatch.chdir(ROOT)
    settings, _ = command_line.parse(["pcagpt", *container["args"]])
    validate(settings)
    assert settings.distributed.enabled
    assert shlex.join(container["command"]) == "python -m pcagpt.main"
