"""What dispatch costs, and what a second worker gains: the bars of executors, on stages that do nothing or burn a core.

    python benchmarks/dispatch.py                  # worker processes of this machine
    python benchmarks/dispatch.py --executor ray   # a local Ray, started for this

One thread a worker on all sides. The stages are real ones with artifacts in a store, of a plugin that exists only here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"

from o2mkd_bench.core.executor import Executor, Site
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.testing.executors import Laboratory

BARS = {"local": 20.0, "ray": 50.0}
SPEED_UP = 1.9


def executor(name: str, workers: int, site: Site) -> Executor:
    plugin = registry().get("executors", name)
    made: Executor = plugin.load()(plugin.parse({"workers": workers}), site)
    return made


def laboratory(folder: str) -> Laboratory:
    """Its store in memory where there is such a place: what a disk takes to synchronise is no dispatch."""
    return Laboratory(Path(folder))


def overhead(name: str, stages: int, workers: int) -> float:
    """Milliseconds a stage that does nothing, from when all workers are warm to the last one's end."""
    with scratch() as folder:
        lab = laboratory(folder)
        warm = [lab.stage(number) for number in range(workers)]
        rest = [lab.stage(number, after=tuple(warm)) for number in range(workers, stages + workers)]
        ends: list[float] = []
        lab.until = lambda event: ends.append(time.perf_counter()) if event.kind == "done" else None
        walk = lab.run(lambda site: executor(name, workers, site))
        assert len(walk.made) == len(warm) + len(rest)
        return 1e3 * (ends[-1] - ends[workers - 1]) / stages


def seconds(name: str, stages: int, workers: int) -> float:
    """Seconds for stages of one second of computing each, workers warm."""
    with scratch() as folder:
        lab = laboratory(folder)
        warm = [lab.stage(number) for number in range(workers)]
        for number in range(workers, stages + workers):
            lab.stage(number, "burn", after=tuple(warm))
        ends: list[float] = []
        lab.until = lambda event: ends.append(time.perf_counter()) if event.kind == "done" else None
        lab.run(lambda site: executor(name, workers, site))
        return ends[-1] - ends[workers - 1]


def bare(total: int, processes: int) -> float:
    """Seconds that processes without any of ours take for as much computing: what this machine can give just now."""
    code = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: sum(range(1000))"
    start = time.perf_counter()
    running = [
        subprocess.Popen([sys.executable, "-c", code.format(total / processes)], start_new_session=True)
        for _ in range(processes)
    ]
    for process in running:
        process.wait()
    return time.perf_counter() - start


def scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", default="local", choices=sorted(BARS))
    parser.add_argument("--stages", type=int, default=1000, help="trivial stages")
    parser.add_argument("--burn", type=int, default=12, help="stages of one second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    costs = [overhead(given.executor, given.stages, 2) for _ in range(given.rounds)]
    bar = BARS[given.executor]
    print(
        f"{given.executor}: {min(costs):.1f} ms a stage (median {median(costs):.1f}), bar {bar:.0f}: {min(costs) < bar}"
    )
    gains, most = [], []
    for _ in range(given.rounds):
        one, two = (seconds(given.executor, given.burn, workers) for workers in (1, 2))
        gains.append(one / two)
        most.append(bare(given.burn, 1) / bare(given.burn, 2))
        print(
            f"{given.executor}: {given.burn} stages in {one:.2f} s with one worker, {two:.2f} s with two",
            file=sys.stderr,
        )
    print(
        f"{given.executor}: two workers are {max(gains):.2f} x as fast as one, bar {SPEED_UP}: {max(gains) >= SPEED_UP}"
    )
    print(f"two bare processes are {max(most):.2f} x as fast as one: less than 2 where others use this machine")
    if given.json:
        found = {
            "executor": given.executor,
            "stages": given.stages,
            "ms_a_stage": costs,
            "speed_up": gains,
            "bare": most,
        }
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
