"""A suite so small that all of it trains in seconds, and how to run it here or in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from o2mkd_bench.core.columns import TIMING_COLUMNS
from o2mkd_bench.core.events import Event
from o2mkd_bench.core.session import Session, prepare
from o2mkd_bench.core.suite import from_mapping
from o2mkd_bench.execute import Walk
from o2mkd_bench.report.frame import write_csv
from o2mkd_bench.results import document
from o2mkd_bench.runner import Results, mended
from o2mkd_bench.stages.bench import Bench

SUITE: dict[str, Any] = {
    "name": "toy",
    "datasets": ["digits"],
    "teachers": [
        {
            "name": "tiny",
            "train": {"model": {"unet2d": {"block_out_channels": [8, 16], "norm_num_groups": 4}}, "images": 512},
        }
    ],
    "students": [{"name": "half", "width": 0.5}],
    "methods": ["output"],
    "wrappers": ["single"],
    "samplers": [{"ddim": {"steps": [2]}}],
    "metrics": [{"fid": {"network": "embedded"}}],
    "baselines": [],
    "budgets": [256],
    "training": {"batch": 32, "lr": 1e-3, "group": 4},
    "sampling": {"images": 640, "batch": 320},
    "speed": {"batch": 4, "repeats": 1},
    "probe": {"points": 3, "images": 8},
}


def suite(**changes: Any) -> dict[str, Any]:
    """The toy suite with other values at its top level."""
    return {**SUITE, **changes}


class Events(list[Event]):
    """An observer that remembers; ``until`` may raise or kill."""

    def __init__(self, until: Callable[[Event], None] = lambda _: None) -> None:
        super().__init__()
        self.until = until

    def __call__(self, event: Event) -> None:
        self.append(event)
        self.until(event)

    def labels(self, kind: str) -> list[str]:
        return [event.label for event in self if event.kind == kind]

    def texts(self) -> list[str]:
        return [event.data["text"] for event in self if event.kind == "message"]


def session(mapping: Mapping[str, Any], store: Path, only: Sequence[str] = ()) -> Session:
    return prepare(from_mapping(mapping), store, only)


def walk_of(found: Session, observer: Callable[[Event], None], fail_fast: bool = False) -> Walk:
    return Walk(found.plan, Bench(found.store, found.machine.device, observer, found.registry), fail_fast)


def run(mapping: Mapping[str, Any], store: Path, out: Path, observer: Callable[[Event], None]) -> Results:
    """A run that writes ``results.csv`` alone, as drawing takes longer than all of the training."""
    found = session(mapping, store)
    walk = walk_of(found, observer)
    walk.run()
    results = mended(walk, lambda: Results(document(found), out))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(results.document, out / "results.csv")
    return results


def table(out: Path) -> str:
    """``results.csv`` without the columns that a clock decides."""
    import pandas as pd

    found = pd.read_csv(out / "results.csv", dtype=str, keep_default_na=False)
    return found.drop(columns=[name for name in TIMING_COLUMNS if name in found]).to_csv(index=False)


def spawn(mapping: Mapping[str, Any], store: Path, out: Path, kill_at: str = "") -> subprocess.Popen[str]:
    """A run in a process of its own, its events as JSON lines on stdout.

    ``kill_at``: ``kind label-part number``; the process kills itself at that event, counted from 1.
    """
    arguments = [json.dumps(dict(mapping)), str(store), str(out), kill_at]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, env=environment)


# two students, a warm-up and rounds: every kind of stage there is
EVERYTHING = suite(
    wrappers=["single", {"o2mkd": {"students": 2}}],
    samplers=[{"ddim": {"steps": [2]}}, {"progressive": {"steps": [2], "start": 4}}],
    include=[{"wrapper": "single", "sampler": "ddim"}, {"wrapper": "o2mkd*", "sampler": "progressive*"}],
)


@dataclass(frozen=True)
class ToyRun:
    suite: dict
    session: Session
    events: Events
    results: Results
    store: Path
    out: Path


def main() -> None:
    import signal

    mapping, store, out, kill_at = sys.argv[1:]
    kind, _, rest = kill_at.partition(" ")
    part, _, number = rest.rpartition(" ")
    seen = 0

    def observer(event: Event) -> None:
        nonlocal seen
        print(json.dumps([event.kind, event.label, {k: str(v) for k, v in event.data.items()}]), flush=True)
        if kill_at and event.kind == kind and part in event.label:
            seen += 1
            if seen == int(number):
                os.kill(os.getpid(), signal.SIGKILL)

    run(json.loads(mapping), Path(store), Path(out), observer)


if __name__ == "__main__":
    main()
