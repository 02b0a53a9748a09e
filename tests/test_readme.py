"""The figures in README.md are those that a command wrote."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "update_readme.py"))
README = (ROOT / "README.md").read_text("utf-8")


def test_result_tables_are_those_of_the_published_results():
    assert README.count("<!-- results of ") == 2
    assert SCRIPT["updated"](README) == README


def test_local_links_and_pictures_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if "://" not in target]
    assert len(local) > 3
    assert [target for target in local if not (ROOT / target).exists()] == []
