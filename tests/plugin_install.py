"""Install a plugin's source folder beside the tests' own environment, without a download."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def install(source: Path, folder: Path) -> Path:
    """``pip install --target`` of a copy of ``source``; the folder to be put on PYTHONPATH."""
    copy = shutil.copytree(source, folder / "source")
    site = folder / "site"
    call = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*call, "--no-build-isolation", "--no-index", "--target", str(site), str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return site


def environment(site: Path) -> dict[str, str]:
    """This process's, with ``site`` first on the path."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def python(code: str, site: Path, *arguments: str) -> str:
    """What ``code`` prints in a process that has a plugin installed."""
    call = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=environment(site))
    assert done.returncode == 0, done.stderr
    return done.stdout


def pytest_in(plugin: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """The plugin's own tests, in a process that has it installed."""
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={plugin}", "tests"]
    return subprocess.run(call, capture_output=True, text=True, check=False, env=environment(site), cwd=plugin)
