"""README.md and its pages are true: commands wrote their figures, and theirs run."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from command_line import CONFIGS, ROOT, call, commands, tiny_knobs, unread
from runs import quick_environment

from pcagpt.json_files import write_json
from pcagpt.rows import read_sweep

sys.path.insert(0, str(ROOT / "scripts"))
from bench import report

SCRIPT = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
sys.path.remove(str(ROOT / "scripts"))

PUBLISHED = ROOT / "checkpoints" / "published"
PAGES = {name: (ROOT / name).read_text("utf-8") for name in SCRIPT["PAGES"]}
README = PAGES["README.md"]
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.join(words) for words in commands("\n".join(BLOCKS))]

# The commands use rank 128, so the model needs that width.
SMALL_SWEEP = {"compress.methods": "svd,context", "compress.bands": "1,3"}
# A python of .venv that answers what demo.sh asks when all packages are installed.
INSTALLED = f"""#!/bin/sh
[ "$1" = -m ] && [ "$2" = pip ] && exit 0
exec '{sys.executable}' "$@"
"""


def test_results_of_each_page_are_those_of_the_published_files():
    assert TEXT.count("<!-- results of ") == 12
    for name, page in PAGES.items():
        assert SCRIPT["updated"](page) == page, name


def test_another_number_in_a_result_would_be_noticed():
    for kind in SCRIPT["KINDS"]:
        block = re.search(rf"<!-- {kind} of .*?<!-- end -->", TEXT, re.DOTALL)[0]
        changed = re.sub(r"\d(?=[^\d]*<!-- end)", "x", block)
        assert changed != block and SCRIPT["updated"](changed) == block


@pytest.mark.parametrize(
    ("systems", "words", "versions"),
    [
        (["pcagpt"], "200 steps", "JAX 1"),
        (["pcagpt", "decode"], "200 steps and 32 tokens decoded", "JAX 1"),
        (
            ["decode", "decode-torch", "decode-transformers"],
            "32 tokens decoded",
            "JAX 1, PyTorch 2, transformers 3",
        ),
    ],
)
def test_how_a_bench_was_measured_tells_steps_from_tokens(systems, words, versions):
    rows = [
        {"system": name, "steps": 32 if "decode" in name else 200, "rounds_ms": [1.0]}
        for name in systems
    ]
    bench = {"rows": rows, "versions": {"jax": 1, "torch": 2, "transformers": 3}}
    bench |= {"device": "cpu", "git_commit": "abc1234", "command": "bench"}
    text = SCRIPT["measured"]([bench])
    assert text.startswith(f"Medians of 1 rounds of {words}. cpu, {versions}, commit")


def test_a_block_of_a_folder_with_a_dash_or_a_dot_is_written():
    KINDS, said = SCRIPT["KINDS"], []
    block = "<!-- results of my-model_1.5b/val -->\nold\n<!-- end -->"
    KINDS["results"], before = lambda folder: said.append(folder), KINDS["results"]
    try:
        assert "old" not in SCRIPT["updated"](block)
    finally:
        KINDS["results"] = before
    assert said == [PUBLISHED / "my-model_1.5b/val"]


def test_readme_is_short_and_has_no_long_table():
    lines = README.splitlines()
    assert len(lines) <= 250
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        assert len(table.splitlines()) - 2 <= 8, table


def test_what_readme_says_of_its_experiments_is_what_their_files_say():
    def of(*names):
        return json.loads(PUBLISHED.joinpath(*names).read_text("utf-8"))

    def verdicts(name):
        lines = SCRIPT["KINDS"]["questions"](PUBLISHED / name).splitlines()[2:]
        cells = [re.findall(r"(held|exceeded|did not hold)(?= \|)", x) for x in lines]
        return [set(found) for found in cells]

    text = " ".join(README.split())
    train = of("gpt2_small_hour", "gpt_baseline", "config.json")["train"]
    sizes = train["steps"], train["batch_size"]
    assert "GPT-2 small, {:,} steps of {} × 1,024 tokens".format(*sizes) in text
    results = of("gpt2_small_hour", "results.json")
    assert len({row["seed"] for row in results["rows"]}) == 1
    assert "one seed, one H200" in text and "1 x NVIDIA H200" in results["device"]
    assert results["protocol"]["window"] == 1024
    d, d_plus, a, b, _ = results["rows"]
    assert f"D's loss is {d['val_loss']:.3f}" in text
    each = d["tokens_seen"] / d["params_total"]
    assert f"after {each:.1f} tokens for each of its parameters" in text
    assert d_plus["tokens_seen"] == b["tokens_seen"] == d["tokens_seen"] / 10
    assert f"is {a['compression_embedding']:.2f} times smaller than D's" in text
    assert "Short runs gave other answers about D" in text
    assert verdicts("demo") == verdicts("gpt2_small_wikipedia")
    assert verdicts("demo") != verdicts("gpt2_small_hour")[:4]
    assert "gave the same answers over three seeds at this share of rank and" in text
    assert (
        len({row["seed"] for row in of("gpt2_proxy_hour", "results.json")["rows"]}) == 3
    )
    assert verdicts("gpt2_proxy_hour")[:5] == verdicts("gpt2_small_hour")
    assert verdicts("gpt2_proxy_ranks")[1] == {"did not hold", "held"}
    for name in ("val", "test"):
        assert "rows_left" not in of("smollm2_135m", name, "sweep.json")


def test_what_the_results_say_of_a_repeated_run_is_what_its_file_says():
    page = " ".join(PAGES["checkpoints/published/RESULTS.md"].split())
    found = []
    for name in ("again", "."):
        path = PUBLISHED / "gpt2_small_hour" / name / "results.json"
        d, d_plus = json.loads(path.read_text("utf-8"))["rows"][:2]
        found.append(
            (
                d,
                SCRIPT["with_interval"](
                    d_plus["added_loss"], d_plus["added_loss_interval"], 3
                ),
            )
        )
    (again, more), (first, less) = found
    losses = f"{again['val_loss']:.4f} instead of {first['val_loss']:.4f}"
    assert f"D ended at {losses}, and D+ minus D was {more} instead of {less}" in page


def test_samples_stand_side_by_side(tmp_path):
    sweep = json.loads((PUBLISHED / "smollm2_135m/val/sweep.json").read_text("utf-8"))
    texts = {"D": "a | b", "best_coded_k128": "d", "best_coded_k256": "a | c"}
    sample = {"prompt": "The *people*", "seed": 1, "temperature": 0.8, "texts": texts}
    write_json(tmp_path / "sweep.json", sweep | {"samples": [sample, sample]})
    first, _, *rows = SCRIPT["KINDS"]["samples"](tmp_path).splitlines()
    assert first == "| Prompt | D writes | best_coded_k256 writes |"
    assert rows == ["| The &#42;people&#42; | a &#124; b | a &#124; c |"] * 2


def test_the_table_of_codes_has_every_row_of_both_splits():
    folder = PUBLISHED / "gpt2_small_table"
    lines = SCRIPT["codes_table"](folder).partition("\n\n")[0].splitlines()
    shown = [line.split(" | ")[1] for line in lines if line.startswith("| ")][2:]
    own, other = (
        read_sweep(folder / split / "sweep.json")["rows"] for split in ("val", "test")
    )
    assert shown == [f"{row.bytes:,}" for row in sorted(own, key=lambda r: r.bytes)]
    # Each command calibrated by itself, so the statistics differ by rounding.
    tested = {row.recipe: row.bytes for row in other}
    assert tested == pytest.approx({row.recipe: row.bytes for row in own}, rel=1e-4)


def test_the_chart_has_the_best_rows_of_both_models():
    chart = runpy.run_path(str(ROOT / "scripts" / "readme_chart.py"))
    (panel,) = chart["figure"](PUBLISHED).panels
    drawn = {}
    for point in panel["data"]["values"]:
        drawn.setdefault(point["of"], set()).add(round(point["Added loss"], 9))
    assert "checkpoints/published/bits.png" in README
    for folder, (model, _) in chart["MODELS"].items():
        rows = read_sweep(PUBLISHED / folder / "sweep.json")["rows"]
        for method in ("coded", "context"):
            losses = {round(r.added_loss, 9) for r in rows if r.method == method}
            found = drawn[f"{method}, {model}"]
            assert found <= losses and min(losses) in found
            assert method != "coded" or found == losses
        assert drawn[f"GPTQ, {model}"]
    # Two files of one size: only the better one is drawn.
    assert len(drawn["packed, SmolLM2-135M"]) == 4


def test_a_sweep_without_further_training_has_no_table_of_it(tmp_path):
    published = PUBLISHED / "gpt2_small_compression"
    sweep = json.loads((published / "sweep.json").read_text("utf-8"))
    found = sweep.pop("recovered")
    assert len(found) == 3
    for name, content in (("without", sweep), ("empty", sweep | {"recovered": []})):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "sweep.json", content)
        text = SCRIPT["compression_tables"](tmp_path / name)
        assert "| svd |" in text and "trained further" not in text


def test_speed_table_shows_the_numbers_of_the_benchmark(tmp_path):
    names = ("system", "model", "devices", "batch", "tokens_per_step", "rounds_ms")
    names += ("ms_per_step", "tokens_per_second", "utilisation", "peak_bytes", "steps")
    ours = "pcagpt", "D", 1, 32, 32768, 3 * [62.254], 62.254, 526_341.5, 0.4546, None
    peer = "torch", "D", 1, 32, 32768, 3 * [78.8], 78.8, 415_838, None, 38_220_000_000
    rows = [dict(zip(names, (*row, 50), strict=True)) for row in (ours, peer)]
    (tmp_path / "bench.json").write_text(json.dumps(report(rows)))
    lines = SCRIPT["speed_table"](tmp_path).splitlines()
    assert "| pcagpt | D | 1 | 32 | 62.25 | 526,342 | 45.5% | – |" in lines
    assert "| torch | D | 1 | 32 | 78.80 | 415,838 | – | 38.2 |" in lines
    assert "| D, batch 32: pcagpt / torch | 1.266 | 1.266 | 1.266 |" in lines
    assert "Medians of 3 rounds of 50 steps. 1 x cpu, JAX 0." in lines[-3]
    assert lines[-1].startswith("    python scripts/bench.py")


def test_scaling_table_has_columns_for_each_machine(tmp_path):
    def write(gpus, commit, systems):
        rows = [
            {
                "system": system,
                "model": model,
                "batch": batch,
                "devices": devices,
                "tokens_per_step": 32768 * devices,
                "rounds_ms": rounds,
                "tokens_per_second": 250_000 * devices,
                "peak_bytes": None if system == "fsdp" else 12_570_000_000,
                "steps": 30,
            }
            for system, model, batch, devices, rounds in systems
        ]
        made = json.loads(json.dumps(report(rows)))
        told = {"device": f"{gpus} x GPU", "git_commit": commit, "command": commit}
        path = tmp_path / f"{gpus}_gpus.json"
        path.write_text(json.dumps(made | told))

    one = "pcagpt", "D", 32, 1, [50.0, 50.0, 50.0]
    split = "fsdp", "D", 32, 2, [62.5, 100.0, 50.0]
    write(16, "later", [one, ("data-parallel", "D", 32, 16, [80.0, 80.0, 80.0])])
    write(2, "early", [one, split, ("fsdp", "k8", 64, 2, [50.0, 50.0, 50.0])])
    lines = SCRIPT["scaling_table"](tmp_path).splitlines()
    assert lines == [
        "| System | Model | Batch per GPU | 2 GPUs: tokens/s | Efficiency | GB per GPU "
        "| 16 GPUs: tokens/s | Efficiency | GB per GPU |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| pcagpt | D | 32 | 250,000 on 1 | – | 12.6 | 250,000 on 1 | – | 12.6 |",
        "| fsdp | D | 32 | 500,000 | 0.800 (0.500 to 1.000) | – | – | – | – |",
        "| fsdp | k8 | 64 | 500,000 | – | – | – | – | – |",
        "| data-parallel | D | 32 | – | – | – | 4,000,000 | 0.625 (0.625 to 0.625) "
        "| 12.6 |",
        "",
        "Medians of 3 rounds of 30 steps. 2 x GPU and 16 x GPU, "
        f"JAX {jax.__version__}, commit `early` and `later`, by",
        "",
        "    early",
        "    later",
    ]


@pytest.mark.parametrize("name", PAGES)
def test_local_links_and_pictures_exist(name):
    targets = re.findall(r"\]\(([^)#]*)(?:#([^)]+))?\)", PAGES[name])
    local = [target for target in targets if "://" not in target[0]]
    assert name != "README.md" or len(local) > 10
    for path, anchor in local:
        place = (ROOT / name).parent / path
        assert place.exists(), path
        if anchor:
            heads = re.findall(r"^#+ (.*)$", place.read_text("utf-8"), re.MULTILINE)
            assert anchor in [head.lower().replace(" ", "-") for head in heads]


@pytest.fixture
def clone(tmp_path):
    """The repository's scripts and configs, an environment, and a corpus to name."""
    clone, random = tmp_path / "clone", np.random.default_rng(0)
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, clone / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, clone)
    python = clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(INSTALLED)
    python.chmod(0o755)
    (clone / "FOLDER").mkdir()
    for split in ("train", "val", "test"):
        tokens = random.integers(0, 130, 400).astype(np.uint16)
        tokens.tofile(clone / "FOLDER" / f"{split}.bin")
    meta = {"vocab_size": 4096, "tokenizer": "sotu4096"}
    (clone / "FOLDER" / "meta.json").write_text(json.dumps(meta))
    return clone


def shrunken(line):
    """The words of a command with sizes of a test; its own words come first."""
    config = re.search(r"configs/(\w+\.py)|$", line)[1]
    if config is None:
        config = "factorize.py" if "pca_factorization" in line else "experiment.py"
    has_no_corpus = config in ("sample.py", "export.py")
    overrides = {} if has_no_corpus else {"data.source": "FOLDER"}
    overrides |= tiny_knobs(config) | {"model.n_embd": 128}
    overrides |= SMALL_SWEEP if "configs/compress.py" in line else {}
    words = shlex.split(line)
    given = dict(re.findall(r"--config\.([\w.]+)=(\S+)", line))
    if config == "factorize.py":  # By svd, which measures nothing.
        given["factorize.method"] = "svd"
    command = [f"--config={CONFIGS / config}"]
    command += [f"--config.{knob}={value}" for knob, value in given.items()]
    for knob in unread(command):
        overrides.pop(knob, None)
    return words + [f"--config.{k}={v}" for k, v in overrides.items()]


def in_bash(words, clone, compiled):
    """Runs a script of the clone as a person would; returns what it printed."""
    environment = quick_environment(compiled)
    environment.pop("VIRTUAL_ENV", None)  # The clone has its own.
    ended = subprocess.run(
        words,
        cwd=clone,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def runs_made(folder):
    """The names of the finished runs in a folder."""
    return {path.parent.name for path in folder.glob("*/result.json")}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_script_of_the_readme_does_what_its_name_says(clone, compiled):
    lines = [line for line in COMMANDS if line.startswith("bash scripts/")]
    lines.remove("bash scripts/test.sh")  # It runs this test.
    made = {}
    for line in lines:
        in_bash(shrunken(line), clone, compiled)
        made[line.split()[1]] = runs_made(clone / "checkpoints")
    arms = {"gpt_pca_k128", "gpt_pca_finetune_k128", "gpt_random_lowrank_k128"}
    assert runs_made(clone / "checkpoints" / "demo") == {
        "gpt_baseline",
        *(arm.replace("128", "32") for arm in arms),
    }
    assert made["scripts/train_baseline_gpt2.sh"] == {"gpt_baseline"}
    tables = sorted((clone / "checkpoints" / "pca_factorized").glob("*.npy"))
    assert {"wte_pca_k64.npy", "wte_pca_k128.npy"} < {path.name for path in tables}
    for script, arm in {
        "scripts/train_pca_compressed.sh": "gpt_pca_k128",
        "scripts/train_pca_finetune.sh": "gpt_pca_finetune_k128",
        "scripts/train_random_lowrank.sh": "gpt_random_lowrank_k128",
    }.items():
        assert arm in made[script]
    assert made["scripts/run_all_experiments.sh"] == {"gpt_baseline", *arms}
    for folder in ("checkpoints", "checkpoints/demo"):
        assert "</html>" in (clone / folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_every_command_of_the_readme_runs_and_a_second_run_finds_nothing_to_do(
    clone, monkeypatch
):
    monkeypatch.chdir(clone)
    lines = [line for line in COMMANDS if line.startswith("python -m pcagpt.main")]
    lines.sort(key=lambda line: "configs/demo.py" not in line)  # demo.sh runs first.
    assert len(lines) > 8
    for line in lines:
        words = shrunken(line)[3:]
        if "--config.model.n_embd_wte=64" in words:  # It changes an existing run.
            words.append("--config.workdir=other")
        outcome = call(*words)
        assert outcome.code == 0, (line, outcome)
        if "configs/evaluate.py" not in line and "configs/sample.py" not in line:
            again = call(*words)
            assert again.code == 0, (line, again)
            assert "to do" not in again.out, (line, again)
    made = runs_made(clone / "checkpoints")
    for rank in (64, 128):
        assert {f"gpt_pca_k{rank}", f"gpt_random_lowrank_k{rank}"} < made
    assert runs_made(clone / "other") == {"gpt_baseline", "gpt_pca_k64"}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_the_example_from_python_runs_after_the_demo(clone, monkeypatch, capfd):
    monkeypatch.chdir(clone)
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in example.splitlines() if line]) == 10
    line = "python -m pcagpt.main --config=configs/baseline.py"
    done = call(*shrunken(line)[3:], "--config.workdir=checkpoints/demo")
    assert done.code == 0, done
    capfd.readouterr()
    exec(example, {})
    shown = capfd.readouterr()
    assert shown.err == ""
    *_, cost, shapes = shown.out.splitlines()
    assert re.fullmatch(r"\d{5,6} bytes add -?0\.\d{4} nats \(.*\)", cost)
    assert shapes == "(4096, 32) (32, 128)"
    words = ("--config.model_path=small", "--config.data.source=FOLDER")
    assert call("--config=configs/evaluate.py", *words).code == 0


def test_other_commands_of_the_readme_are_listed_here():
    lines = {line for block in BLOCKS for line in block.splitlines() if line.strip()}
    run = {shlex.join(words) for line in lines for words in commands(line)}
    assert run == set(COMMANDS)
    others = [line for line in lines if not commands(line)]
    assert others == ["source .venv/bin/activate"]
