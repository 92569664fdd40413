"""What stands in the repository beside the code agrees with the code: the schema, the suites, the README's table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.schema import SHIPPED, render, suite_schema
from o2mkd_bench.core.suite import load
from o2mkd_bench.report.tables import terminal
from o2mkd_bench.report.write import read

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted(ROOT.glob("suites/*.yaml"))


def test_the_shipped_schema_is_that_of_the_built_in_plugins() -> None:
    assert SHIPPED.read_text(encoding="utf-8") == render(suite_schema(registry(), builtin_only=True)), (
        "run python -m o2mkd_bench.core.schema"
    )


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_loads_and_names_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert (path.parent / first.partition("=")[2]).resolve() == SHIPPED.resolve()
    assert load(path).name == path.stem


def test_the_table_in_the_readme_is_the_committed_result() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(digits .*?)\n```", readme, re.DOTALL)
    assert shown is not None
    table = terminal(read(ROOT / "results" / "quickstart"), 100)
    assert [line.rstrip() for line in shown[1].splitlines()] == [line.rstrip() for line in table.rstrip().splitlines()]


def test_every_link_of_the_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
