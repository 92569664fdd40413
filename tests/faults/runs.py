"""The quickstart's grid in a size that takes seconds, run through the command line, and what its results are."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from o2mkd_bench.cli import main
from o2mkd_bench.core.columns import TIMING_COLUMNS
from o2mkd_bench.core.manifest import MANIFEST
from o2mkd_bench.core.session import prepare
from o2mkd_bench.core.store import Store
from o2mkd_bench.core.suite import load

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "suites" / "quickstart.yaml"
PROGRAM = [sys.executable, "-c", "from o2mkd_bench.cli import main; main()"]
# what a training stage may lose to a kill, seconds
CHECKPOINT_EVERY = 0.25

TINY: dict[str, Any] = {
    "extends": str(QUICKSTART),
    "name": "tiny",
    "teachers": [
        {
            "name": "small",
            "train": {"model": {"unet2d": {"block_out_channels": [8, 16], "norm_num_groups": 4}}, "images": 1920},
        }
    ],
    # without the control, which is one more student of a kind that is there already
    "wrappers": ["single", {"o2mkd": {"students": 2}}],
    "budgets": [1280],
    "training": {"batch": 32, "group": 8},
    "sampling": {"images": 640, "batch": 320},
    "speed": {"batch": 4, "repeats": 1},
    "probe": {"points": 2, "images": 8},
    "checkpoint_every": CHECKPOINT_EVERY,
}
# every kind of stage of the grid, once or twice
SAMPLE: dict[str, Any] = {
    "methods": ["output"],
    "samplers": [{"ddim": {"steps": [2]}}, {"progressive": {"steps": 2, "start": 4}, "label": "progressive"}],
    "include": [{"wrapper": "single*", "sampler": "ddim"}, {"wrapper": "o2mkd*", "sampler": "progressive"}],
    "baselines": [],
    "budgets": [640],
    "teachers": [{"name": "small", "train": {**TINY["teachers"][0]["train"], "images": 960}}],
}


@dataclass(frozen=True)
class Finished:
    """A suite, its store, and the results of running it."""

    suite: Path
    store: Path
    out: Path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def write_suite(folder: Path, whole: bool, changes: Mapping[str, Any] | None = None) -> Path:
    """The whole grid, or a sample of it, as a file in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **({} if whole else SAMPLE), **(changes or {})}), encoding="utf-8")
    return path


def start(*words: object, program: Sequence[str] = PROGRAM, **environment: str) -> subprocess.Popen[str]:
    """A command in a process of its own, its output kept."""
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment}
    command = [*program, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", env=inherited)


def call(*words: object) -> Ended:
    """A command in this process, which has torch already."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


def end(process: subprocess.Popen[str], seconds: float = 600) -> Ended:
    out, err = process.communicate(timeout=seconds)
    return Ended(process.returncode, out, err)


def run(suite: Path, store: Path, out: Path, *more: object) -> list[object]:
    """The words of a run."""
    return ["run", suite, "--store", store, "--out", out, *more]


def finished(folder: Path, whole: bool) -> Finished:
    made = Finished(write_suite(folder, whole), folder / "store", folder / "out")
    ended = end(start(*run(made.suite, made.store, made.out)))
    assert ended.code == 0, ended.err
    return made


def result(out: Path) -> dict[str, str]:
    """What a run leaves, by name, apart from what a clock decides: the table, and the pictures by hash."""
    found = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    pictures = {name: hashlib.sha256(p.read_bytes()).hexdigest() for name, p in found.items() if "samples/" in name}
    table = pd.read_csv(found.pop("results.csv"), dtype=str, keep_default_na=False)
    timing = [name for name in TIMING_COLUMNS if name in table]
    document = json.loads(found["results.json"].read_text(encoding="utf-8"))
    facts = [
        {key: value for key, value in row.items() if key not in (*TIMING_COLUMNS, "speed")} for row in document["rows"]
    ]
    return {"table": table.drop(columns=timing).to_csv(index=False), "rows": json.dumps(facts), **pictures}


def plan(suite: Path, store: Path) -> Any:
    return prepare(load(suite), store).plan


def artifacts(suite: Path, store: Path) -> dict[str, Any]:
    """The files of what is stored of a suite, by identity, with their hashes; those of speeds depend on a clock."""
    stages, found = plan(suite, store).stages, Store(store)
    kept = [name for name, stage in stages.items() if stage.kind != "speed" and found.has(name)]
    return {name: found.manifest(name).files for name in kept}


def places(store: Path) -> dict[str, Path]:
    """The folder of every complete artifact by identity."""
    found = (path.parent for path in (store / "artifacts").glob(f"*/*/{MANIFEST}"))
    return {place.name: place for place in found}


def events(out: Path) -> list[dict[str, Any]]:
    """What the tracker of a run, or of several one after the other, has written."""
    path = out / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def one_sentence(text: str, start: str = "error: ") -> str:
    """``text`` without its start and end, once it is known to be one line that is no traceback."""
    assert "Traceback" not in text, text
    assert text.startswith(start), text
    assert text.endswith("\n"), text
    assert text.count("\n") == 1, text
    return text[len(start) :].strip()


def labels(found: Sequence[Mapping[str, Any]], kind: str) -> list[str]:
    return [event["label"] for event in found if event["kind"] == kind]
