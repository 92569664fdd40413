"""Which layer may import which, and what answers without the heavy libraries."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import o2mkd_bench
import o2mkd_plugins

HOUSE = Path(o2mkd_bench.__file__).parent
PLUGINS = Path(o2mkd_plugins.__file__).parent
HEAVY = ("torch", "diffusers", "torchvision", "timm", "pandas", "matplotlib", "sklearn", "PIL")


def imported(path: Path, package: str, everywhere: bool = True) -> set[str]:
    """Modules that a file imports, in full; ``everywhere`` also inside functions. Not those for type checkers only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    checked = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skip = {id(inner) for block in checked for inner in ast.walk(block)}
    if not everywhere:
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        skip |= {id(inner) for function in functions for inner in ast.walk(function)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def modules(folder: Path, root: Path) -> list[tuple[Path, str]]:
    """Python files below ``folder``, each with the dotted name of the package it lies in."""
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]
    own = [f for f in files if "templates" not in f.parts]
    return [(f, ".".join([root.name, *f.parent.relative_to(root).parts])) for f in own]


def below(name: str, *tops: str) -> bool:
    return any(name == top or name.startswith(f"{top}.") for top in tops)


def test_the_scan_sees_relative_absolute_and_inner_imports(tmp_path):
    file = tmp_path / "x.py"
    text = "import a.b\nfrom ..c import d\nfrom . import e\ndef f():\n    import g\nif TYPE_CHECKING:\n    import h\n"
    file.write_text(text, encoding="utf-8")
    found = {"a.b", "top.c", "top.c.d", "top.sub", "top.sub.e"}
    assert imported(file, "top.sub") == {*found, "g"}
    assert imported(file, "top.sub", everywhere=False) == found


UPWARD = {
    "core": ("engine", "stages", "report", "cli", "executors", "runner", "results", "execute", "testing"),
    "engine": ("stages", "report", "cli", "executors", "runner", "results", "execute", "testing"),
    "stages": ("report", "cli", "executors", "runner", "results", "execute", "testing"),
    "report": ("engine", "stages", "cli", "executors", "runner", "results", "execute", "testing"),
    "executors": ("report", "cli", "runner", "testing"),
    "execute.py": ("report", "cli", "runner", "testing"),
    "results.py": ("engine", "stages", "report", "cli", "execute", "runner", "testing"),
    "runner.py": ("cli", "testing"),
    "export.py": ("cli", "executors", "runner", "execute", "testing"),
    "cli": ("testing",),
}


@pytest.mark.parametrize("layer", UPWARD)
def test_arrows_go_downward(layer):
    banned = tuple(f"o2mkd_bench.{name}" for name in UPWARD[layer])
    files = modules(HOUSE / layer, HOUSE)
    assert files
    wrong = {str(f): sorted(n for n in imported(f, p) if below(n, *banned)) for f, p in files}
    assert not {f: names for f, names in wrong.items() if names}


def test_the_house_never_imports_its_plugins():
    for file, package in modules(HOUSE, HOUSE):
        assert not [n for n in imported(file, package) if below(n, "o2mkd_plugins")], file


def test_core_never_imports_torch_not_even_inside_a_function():
    for file, package in modules(HOUSE / "core", HOUSE):
        assert not [n for n in imported(file, package) if below(n, "torch", "diffusers", "pandas", "matplotlib")], file


def test_nothing_but_itself_imports_testing():
    for root in (HOUSE, PLUGINS):
        for file, package in modules(root, root):
            if "testing" not in file.parts and file.name != "testing.py":
                assert not [n for n in imported(file, package) if below(n, "o2mkd_bench.testing")], file


def fresh(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter holds after ``code``."""
    tail = f"\nimport sys\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    paths = [str(HOUSE.parent), str(PLUGINS.parent)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


PLAN = """
from pathlib import Path
from o2mkd_bench.core.session import prepare
from o2mkd_bench.core.status import Survey
from o2mkd_bench.core.suite import from_mapping
suite = from_mapping({
    "name": "x", "device": "cpu", "datasets": ["digits"],
    "teachers": [{"name": "t", "train": {"model": "unet2d", "images": 1000}}],
    "students": [{"name": "half", "width": 0.5}], "methods": ["none", "output", "feature", "relation"],
    "wrappers": ["single", "o2mkd"], "budgets": [2000],
    "samplers": [{"ddim": {"steps": 4}}, {"ddpm": {"steps": 4}}, {"dpm_solver": {"steps": 4}},
                 {"progressive": {"steps": 4, "start": 8}}],
    "metrics": [{m: {"network": "inception"}} for m in ("fid", "kid", "inception_score", "precision_recall")],
})
session = prepare(suite, Path("store"))
assert len(session.plan.cells) > 20
assert {s.status for s in Survey(session.plan, session.store).standings()} == {"missing"}
"""


def test_planning_and_status_leave_the_heavy_libraries_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fresh(PLAN) == set()


def test_declarations_leave_the_heavy_libraries_out():
    assert (
        fresh("from o2mkd_bench.core.plugins import registry\nassert registry().all() and not registry().broken")
        == set()
    )


# what is called at plan time must be importable then; methods, metrics and trackers are not
PLAN_TIME = ("wrappers", "intervals", "samplers", "datasets", "models")


def test_targets_called_at_plan_time_leave_the_heavy_libraries_out():
    load = "from o2mkd_bench.core.plugins import registry\n"
    load += f"[p.load() for k in {PLAN_TIME!r} for p in registry().all(k) if p.distribution == 'o2mkd-bench']"
    assert fresh(load) == set()
