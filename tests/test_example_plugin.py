"""The example: a third-party package, installed, tested and run as a stranger would."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from plugin_install import environment, install, pytest_in, python

EXAMPLE = Path(__file__).parents[1] / "plugins" / "example-huber"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return install(EXAMPLE, tmp_path_factory.mktemp("example"))


def command(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-c", "from o2mkd_bench.cli import main; main()", *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=False, env=environment(site), cwd=cwd)


def test_it_is_found_by_its_entry_point(site):
    code = (
        "from o2mkd_bench.core.plugins import registry\n"
        "found = registry()\n"
        "print([(p.kind, p.name, p.distribution) for p in found.all() if 'example' in p.distribution], found.broken)\n"
        "print(found.get('samplers', 'o2mkd-bench-example:heun').load().__name__)\n"
    )
    assert python(code, site).splitlines() == [
        "[('kd_methods', 'huber', 'o2mkd-bench-example'), ('samplers', 'heun', 'o2mkd-bench-example')] []",
        "Heun",
    ]


def test_its_own_tests_pass(site):
    done = pytest_in(EXAMPLE, site)
    assert done.returncode == 0, done.stdout


def test_its_suite_fills_a_table(site, tmp_path):
    suite = str(EXAMPLE / "suites" / "huber.yaml")
    done = command(site, "run", suite, "--out", str(tmp_path / "out"), "--store", str(tmp_path / "store"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    own = [row for row in rows if row["method"] == "huber"]
    cells = {(row["wrapper"].partition("(")[0], row["sampler"], row["nfe"]): row for row in own}
    assert set(cells) == {(wrapper, *run) for wrapper in ("single", "o2mkd") for run in (("ddim", 9), ("heun", 9))}
    for row in cells.values():
        assert row["status"] == "done"
        assert math.isfinite(row["scores"]["fd_digits"])
    assert cells["o2mkd", "heun", 9]["students"] == 2
    assert sum(cells["o2mkd", "heun", 9]["calls"]) == 9
