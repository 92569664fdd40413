"""What stands in the repository beside the code agrees with the code: the schema, the suites, the README's table."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.schema import SHIPPED, render, suite_schema
from o2mkd_bench.core.session import prepare, selection
from o2mkd_bench.core.suite import load
from o2mkd_bench.report.tables import terminal
from o2mkd_bench.report.write import read

ROOT = Path(__file__).resolve().parents[1]
SUITES = sorted(ROOT.glob("suites/*.yaml"))
PAGES = ("README.md", "results.md")
TUNING = ROOT / "results" / "cifar" / "tuning.yaml"


def test_the_shipped_schema_is_that_of_the_built_in_plugins() -> None:
    assert SHIPPED.read_text(encoding="utf-8") == render(suite_schema(registry(), builtin_only=True)), (
        "run python -m o2mkd_bench.core.schema"
    )


def names_of(path: Path) -> set[str]:
    """What a suite may be called: as its file, or as the suite that it extends and is a variant of."""
    if path == TUNING:
        return {"cifar-tuning"}
    extended = yaml.safe_load(path.read_text(encoding="utf-8")).get("extends")
    return {path.stem} if extended is None else {path.stem, Path(extended).stem}


@pytest.mark.parametrize("path", [*SUITES, TUNING], ids=lambda path: path.stem)
def test_every_suite_loads_and_names_the_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# yaml-language-server: \$schema=(\S+)", first)
    assert (path.parent / first.partition("=")[2]).resolve() == SHIPPED.resolve()
    assert load(path).name in names_of(path)


def test_the_tuning_of_cifar_stays_away_from_the_headline() -> None:
    headline, tuning = load(ROOT / "suites" / "cifar.yaml"), load(TUNING)
    assert set(tuning.seeds).isdisjoint(headline.seeds)
    lifts = [entry.use.plugin.load().lifts for entry in tuning.wrappers]
    assert lifts.count(True) == lifts.count(False)


def test_every_slice_of_cifar_is_a_part_of_its_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # from the Hub, as this plan needs neither the data nor the teacher
    for name in ("CIFAR10_ROOT", "WORK", "OUT", "STUDENTS", "REHEARSE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("SUITE", "suites/cifar.yaml")
    monkeypatch.setenv("SEEDS", "2")
    script = ROOT / "results" / "cifar" / "run.sh"
    listed = subprocess.run(["bash", script, "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    commands = [shlex.split(line) for line in listed if line.startswith("o2mkd-bench run suites/cifar.yaml ")]
    labels = [cell.labels for cell in prepare(load(ROOT / "suites" / "cifar.yaml", seed=2), tmp_path).plan.cells]
    reached: set[int] = set()
    for command in commands:
        filters = [selection(value) for flag, value in itertools.pairwise(command) if flag == "--only"]
        meant = {i for i, cell in enumerate(labels) if cell["student"] and all(accept(cell) for accept in filters)}
        # the teacher's own slices, and those of another seed, have no student of this one
        assert meant or "seed=0" in command, command
        # speeds are no rows: they come with students of a few steps, or once the rows are there
        if not Path(command[command.index("--out") + 1]).name.startswith("speed"):
            reached |= meant
    assert reached == {i for i, cell in enumerate(labels) if cell["student"]}


def test_a_slice_that_is_cut_still_gives_a_table(tmp_path: Path) -> None:
    program, said = tmp_path / "bin" / "o2mkd-bench", tmp_path / "said"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >>{said}\n[ "$1" != run ]\n', encoding="utf-8")
    program.chmod(0o755)
    (tmp_path / "warm").touch()
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "WORK": str(tmp_path)}
    environment |= {"OUT": str(tmp_path / "out"), "SEEDS": "0 1"}
    script = ["bash", str(ROOT / "results" / "cifar" / "run.sh"), "headline-quarter"]
    assert subprocess.run(script, env=environment, capture_output=True, check=False).returncode == 1
    calls = [shlex.split(line) for line in said.read_text(encoding="utf-8").splitlines()]
    cut, anew = (next(call[1:] for call in calls if call[0] == name and "--only" in call) for name in ("run", "report"))
    assert cut == [*anew, "--workers", "2"]


@pytest.mark.parametrize("name", ["cifar", "knobs", "restart"])
def test_a_mean_and_its_spread_in_a_readme_stand_in_the_results_beside_it(name: str) -> None:
    spread = re.compile(r"\d+\.\d+ ± \d+\.\d+")
    told, there = (set(spread.findall((ROOT / "results" / name / file).read_text("utf-8"))) for file in PAGES)
    assert told
    assert told <= there


def test_the_table_in_the_readme_is_the_committed_result() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(digits .*?)\n```", readme, re.DOTALL)
    assert shown is not None
    table = terminal(read(ROOT / "results" / "quickstart"), 100)
    assert [line.rstrip() for line in shown[1].splitlines()] == [line.rstrip() for line in table.rstrip().splitlines()]


def test_the_readings_in_the_readme_of_the_benchmarks_are_the_committed_ones() -> None:
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"\| what \| reading \| bar \| met \|\n.*?(?=\n\n)", page, re.DOTALL)
    assert shown is not None
    table = (ROOT / "results" / "bench" / "table.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in shown[0].splitlines() if line not in table] == []
    # those of the harness itself need no GPU, and are told apart
    rows = [line for line in table if line.startswith("| ") and not re.match(r"\| (quickstart|the harness)", line)]
    assert rows == shown[0].splitlines()


@pytest.mark.parametrize(("asked", "student"), [((), "quarter"), (("output", "half"), "half")])
def test_errors_over_t_are_told_seed_by_seed(asked: tuple[str, ...], student: str) -> None:
    script = [sys.executable, str(ROOT / "results" / "cifar" / "errors.py"), "o2mkd-4", "single", *asked]
    told = subprocess.run(script, capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition(":")[0] for line in told] == ["seed 0", "seed 1", "seed 2"]
    rows = [r for r in read(ROOT / "results" / "cifar")["rows"] if r["student"] == student and r["probe"]]
    row, base = (next(r for r in rows if r["wrapper"] == wrapper) for wrapper in ("o2mkd-4", "single"))
    assert f"  {row['probe']['t'][-1]} {row['probe']['error'][-1] / base['probe']['error'][-1]:.2f}" in told[0]


def test_every_link_of_the_readme_leads_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
