"""Which package may import which, as CONTRIBUTING.md says."""

import ast
import re
from pathlib import Path

import pcagpt

ROOT = Path(pcagpt.__file__).parent

# The table of CONTRIBUTING.md: a package or module imports from those before it.
TABLE = (
    (ROOT.parent / "CONTRIBUTING.md").read_text("utf-8").partition("in `pcagpt/`")[2]
)
NAMES = [
    name
    for line in TABLE.partition("\n\n")[0].splitlines()[2:]
    for name in re.findall(r"`(\w+)(?:\.py|/)`", line.split("|")[1])
]
ROW = {name: row for row, name in enumerate(NAMES)}
# These do not import each other, either.
APART = ({"config", "model", "factorization", "data", "telemetry"}, {"losses", "rows"})


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path.read_text("utf-8") for path in ROOT.rglob("*.py")}
del MODULES["pcagpt"]  # It names what `api` has, and imports it only when it is used.


def package_of(module):
    """'pcagpt.report.plots' -> 'report'; 'pcagpt' -> ''."""
    return (module.split(".") + [""])[1]


def imports_of(source):
    """Full names of the project's modules that a source imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return {name for name in found if name.split(".")[0] == "pcagpt"}


def wrong_arrows(modules):
    """Imports, as 'a imports b', that do not go to a row above."""
    return [
        f"{module} imports {name}"
        for module, source in modules.items()
        for name in imports_of(source)
        if (own := package_of(module)) != (other := package_of(name)) and other
        if not own or ROW[other] >= ROW[own] or any({own, other} <= g for g in APART)
    ]


def test_every_package_has_exactly_one_row():
    assert {package_of(module) for module in MODULES} == set(ROW)
    assert len(ROW) == len(NAMES)


def test_packages_import_only_from_those_before_them():
    assert not wrong_arrows(MODULES)


def test_an_import_from_a_lower_row_or_a_package_apart_is_found():
    sources = {
        "pcagpt.model.gpt": "import pcagpt.run.folder",
        "pcagpt.sharding.inside": "def f():\n    from pcagpt import kernels",
        "pcagpt.data.corpus": "from pcagpt.config import schema",
        "pcagpt.main": "from pcagpt.files import read_json",
    }
    assert wrong_arrows(sources) == [
        "pcagpt.model.gpt imports pcagpt.run.folder",
        "pcagpt.sharding.inside imports pcagpt.kernels",
        "pcagpt.data.corpus imports pcagpt.config.schema",
    ]


def test_no_modules_import_each_other_in_a_circle():
    above = {m: imports_of(source) - {m} for m, source in MODULES.items()}
    while above:
        free = {module for module, names in above.items() if not names & above.keys()}
        assert free, f"a circle among {sorted(above)}"
        above = {m: names for m, names in above.items() if m not in free}


def test_config_files_import_only_the_declared_knobs():
    files = sorted((ROOT.parent / "configs").glob("*.py"))
    assert files
    for path in files:
        assert imports_of(path.read_text("utf-8")) <= {"pcagpt.config"}, path
