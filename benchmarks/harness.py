"""The harness's own share of a run: wall time in which no stage was being made.

``python benchmarks/harness.py --json harness.json``; a quickstart of an eighth of its size, or ``--whole``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from o2mkd_bench.core.events import Event

START = time.perf_counter()
SUITE = Path(__file__).parent.parent / "suites" / "quickstart.yaml"
ENDS = ("done", "reused", "failed")


class Busy:
    """An observer that adds up the time in which at least one stage is in the making, and remembers when that was."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.first = self.last = START
        self.failed: list[str] = []
        self._running: set[str] = set()
        self._since = 0.0

    def __call__(self, event: Event) -> None:
        now = time.perf_counter()
        if event.kind == "start":
            if not self._running:
                self._since = now
                self.first = now if self.seconds == 0 else self.first
            self._running.add(event.stage)
        elif event.kind in ENDS and event.stage in self._running:
            self._running.remove(event.stage)
            if not self._running:
                self.seconds += now - self._since
                self.last = now
        if event.kind == "failed":
            self.failed.append(event.label)


def suite(whole: bool, device: str) -> dict[str, Any]:
    """The quickstart, by default with an eighth of the images."""
    found: dict[str, Any] = yaml.safe_load(SUITE.read_text(encoding="utf-8")) | {"device": device}
    if not whole:
        found["teachers"][0]["train"]["images"] = "10k"
        found |= {"budgets": ["4k"]}
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", default="cpu")
    options.add_argument("--whole", action="store_true", help="the quickstart as it is")
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()

    from o2mkd_bench import run

    busy = Busy()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        run(suite(arguments.whole, arguments.device), store=out / "store", out=out / "results", observer=busy)
    end = time.perf_counter()
    wall = end - START
    found = {"benchmark": "harness", "suite": "quickstart", "whole": arguments.whole, "device": arguments.device}
    found |= {"wall_seconds": wall, "stage_seconds": busy.seconds, "share": 1 - busy.seconds / wall}
    found |= {"before_seconds": busy.first - START, "after_seconds": end - busy.last, "failed": busy.failed}
    print(json.dumps(found, indent=1))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
