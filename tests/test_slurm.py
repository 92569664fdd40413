"""The example executor: a third-party package, installed and tested as a stranger would."""

from __future__ import annotations

from pathlib import Path

import pytest
from plugin_install import install, pytest_in, python

EXAMPLE = Path(__file__).parents[1] / "plugins" / "example-slurm"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(EXAMPLE, tmp_path_factory.mktemp("slurm"))


def test_it_is_found_by_its_entry_point(site: Path) -> None:
    code = (
        "from o2mkd_bench.core.plugins import registry\n"
        "print(registry().get('executors', 'slurm').distribution, registry().broken)"
    )
    assert python(code, site).split() == ["o2mkd-bench-slurm", "[]"]


def test_its_own_tests_pass(site: Path) -> None:
    pytest.importorskip("submitit")
    done = pytest_in(EXAMPLE, site)
    assert done.returncode == 0, done.stdout
