"""Which module may import which."""

import ast
from pathlib import Path

import pcagpt

ROOT = Path(pcagpt.__file__).parent

# A module imports only from rows above its own; within a package, from each other.
# Names of folders stand for all modules in them.
ROWS = (
    "errors arms layout",
    "kernels",
    "params model factorize quantize losses config tokenizer interrupt",
    "corpus data optim sharding checkpoint telemetry factor_files run_folder "
    "provenance command_line search",
    "evaluate trained_run warm_start meter train_step statistics table_swap generate",
    "train evaluate_run sample_run report subject",
    "train_run factorize_run compress",
    "plan",
    "experiment",
    "main",
)
ROW = {name: row for row, names in enumerate(ROWS) for name in names.split()}
VERSION = ""  # pcagpt itself, which holds no more than that


def part_of(module):
    """'pcagpt.report.plots' -> 'report'; 'pcagpt' -> ''."""
    return (module.split(".") + [""])[1]


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports_of(path):
    """Full names of all that a file imports of the project, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == "pcagpt"}


def test_every_module_has_a_row_and_every_row_its_modules():
    assert {part_of(module) for module in MODULES} - {VERSION} == set(ROW)
    assert len(ROW) == sum(len(names.split()) for names in ROWS)


def test_modules_import_only_from_rows_above_their_own():
    wrong = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in imports_of(path)
        if part_of(name) not in {VERSION, part_of(module)}
        and ROW[part_of(name)] >= ROW.get(part_of(module), -1)
    ]
    assert not wrong


def test_no_two_modules_import_each_other():
    """Along any chain of imports; __init__ re-exports for others, not for its own."""
    above = {module: imports_of(path) - {module} for module, path in MODULES.items()}
    while above:
        free = {module for module, names in above.items() if not names & above.keys()}
        assert free, f"a circle among {sorted(above)}"
        above = {m: names for m, names in above.items() if m not in free}


def test_config_files_import_the_declared_knobs_alone():
    files = sorted((ROOT.parent / "configs").glob("*.py"))
    assert files
    for path in files:
        assert imports_of(path) <= {"pcagpt.config"}, path
