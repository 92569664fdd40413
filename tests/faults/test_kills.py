"""SIGKILL at any instant: the same command goes on, and ends with what an undisturbed run leaves."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from runs import CHECKPOINT_EVERY, Finished, artifacts, end, events, places, result, run, start

# Between the reading of the clock that the checkpoint goes by and that of the tracker.
SLACK = 0.25


class Storm:
    """Runs of one suite on one store, each killed after ``wait(its results folder)``, until one ends first."""

    def __init__(self, suite: Path, folder: Path, wait: Callable[[Path], None]) -> None:
        self.suite, self.wait = suite, wait
        self.store, self.out = folder / "store", folder / "out"
        self.kept: dict[str, tuple[int, int]] = {}
        self.kills = 0

    def survive(self, most: int) -> None:
        """Kill at most ``most`` runs, then let one end."""
        while True:
            process = start(*run(self.suite, self.store, self.out, "--tracker", "jsonl"))
            if self.kills < most:
                self.wait(self.out)
                # it may have ended before
                os.kill(process.pid, signal.SIGKILL)
            ended = end(process)
            self._nothing_made_again()
            if ended.code != -signal.SIGKILL:
                assert ended.code == 0, ended.err
                return
            self.kills += 1

    def _nothing_made_again(self) -> None:
        """What was finished is the same file on the disk that it was."""
        found = {name: os.stat(place / "manifest.json") for name, place in places(self.store).items()}
        now = {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}
        for name, stamp in self.kept.items():
            assert now[name] == stamp, f"{name} was made again"
        self.kept = now

    def attempts(self) -> list[list[dict[str, Any]]]:
        """The events of each run that came as far as to say what it would do."""
        parts: list[list[dict[str, Any]]] = []
        for event in events(self.out):
            if event["kind"] == "plan":
                parts.append([])
            parts[-1].append({**event, "at": datetime.fromisoformat(event["time"]).timestamp()})
        return parts


Loss = tuple[str, float, float, int]


def losses(attempts: list[list[dict[str, Any]]], kept: Mapping[str, tuple[int, int]]) -> list[Loss]:
    """For each training that a kill cut: its label, the seconds and steps to do again, and the longest step in seconds.

    A training that is not gone on with begins anew. ``kept``: as a storm has it at its end.
    """
    found = []
    for place, attempt in enumerate(attempts):
        done = {event["stage"] for event in attempt if event["kind"] == "done"}
        for stage in {event["stage"] for event in attempt if event["kind"] == "progress"} - done:
            seen = [e for e in attempt if e["kind"] == "progress" and e["stage"] == stage]
            if "loss" not in seen[0]:
                continue
            ahead = (e for other in attempts[place + 1 :] for e in other)
            later = [e for e in ahead if e["stage"] == stage]
            resumed = next((e for e in later if e["kind"] in ("message", "progress")), None)
            if resumed is None:
                # the kill came after it was stored and before anyone was told
                stored = kept[stage][1] / 1e9
                assert not later, f"{seen[0]['label']} was begun again without a step"
                assert stored < attempts[place + 1][0]["at"], f"{seen[0]['label']} was never gone on with"
                continue
            told = re.search(r"going on at step (\d+) of", str(resumed.get("text", "")))
            first = int(told[1]) if told else 0
            since = next((e["at"] for e in reversed(seen) if e["done"] <= first), seen[0]["at"])
            longest = max([b["at"] - a["at"] for a, b in pairwise(seen)], default=0.0)
            found.append((seen[0]["label"], seen[-1]["at"] - since, longest, seen[-1]["done"] - first))
    return found


def test_a_grid_survives_kills_at_random_instants(
    undisturbed: Finished, tmp_path: Path, everything: bool, figure: Callable[[str], None]
) -> None:
    wanted, draw = 50 if everything else 2, random.Random(20261123)

    def wait(out: Path) -> None:
        aimed = not everything or draw.random() < 0.5
        if aimed:
            # half of them, and the few of the sample, come when there is something to cut
            known, until = len(events(out)), time.monotonic() + 30
            while time.monotonic() < until and not any("loss" in event for event in events(out)[known:]):
                time.sleep(0.05)
        time.sleep(draw.uniform(0, 1) if aimed else draw.uniform(0.3, 10))

    storms: list[Storm] = []
    cut: list[Loss] = []
    while (left := wanted - sum(storm.kills for storm in storms)) > 0:
        storm = Storm(undisturbed.suite, tmp_path / str(len(storms)), wait)
        storm.survive(left)
        storms.append(storm)
        assert result(storm.out) == result(undisturbed.out)
        assert artifacts(storm.suite, storm.store) == artifacts(undisturbed.suite, undisturbed.store)
        attempts = storm.attempts()
        finished: list[str] = []
        for attempt in attempts:
            started = {event["stage"] for event in attempt if event["kind"] == "start"}
            assert started.isdisjoint(finished), "a finished stage was begun again"
            finished += [event["stage"] for event in attempt if event["kind"] == "done"]
        found = losses(attempts, storm.kept)
        for label, seconds, longest, _ in found:
            assert seconds <= CHECKPOINT_EVERY + longest + SLACK, label
        cut += found
    kills = sum(storm.kills for storm in storms)
    steps, worst = sum(loss[3] for loss in cut), max((loss[1] for loss in cut), default=0.0)
    figure(
        f"kills: {kills} survived by {len(storms)} runs of the grid, results equal to the undisturbed; {len(cut)} "
        f"trainings cut, {steps} steps done again, at most {worst:.2f} s (checkpoints every {CHECKPOINT_EVERY} s)"
    )
    assert kills == wanted
