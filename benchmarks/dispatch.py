"""What dispatch costs, and what a second worker gains: the bars of executors, on stages that do nothing or burn a core.

    python benchmarks/dispatch.py                  # worker processes of this machine
    python benchmarks/dispatch.py --executor ray   # a local Ray, started for this
    python benchmarks/dispatch.py --device cuda    # a worker on each of two GPUs against one worker on one of them

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.executor import Executor, Site
from o2mkd_bench.core.machine import device_name, gpus_like
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.testing.executors import Laboratory

BARS = {"local": 20.0, "ray": 50.0}
SPEED_UP = 1.9

# Stages of about a second: of a core, or of an H200, in products of matrices
DEEDS = {"cpu": ("burn", ""), "cuda": ("multiply 600", "multiply 1")}


def executor(name: str, workers: int, site: Site) -> Executor:
    plugin = registry().get("executors", name)
    made: Executor = plugin.load()(plugin.parse({"workers": workers}), site)
    return made


@contextmanager
def laboratory(device: str) -> Iterator[Laboratory]:
    """Its store in memory where there is such a place: what a disk takes to synchronise is no dispatch."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        yield Laboratory(Path(folder), device)


def seconds(name: str, stages: int, workers: int, device: str = "cpu", deed: str = "", first: str = "") -> float:
    """Seconds from when all workers are warm, by a stage that does ``first`` each, to the end of ``stages`` more."""
    with laboratory(device) as lab:
        warm = [lab.stage(number, first) for number in range(workers)]
        for number in range(workers, stages + workers):
            lab.stage(number, deed, after=tuple(warm))
        ends: list[float] = []
        lab.until = lambda event: ends.append(time.perf_counter()) if event.kind == "done" else None
        walk = lab.run(lambda site: executor(name, workers, site))
        assert len(walk.made) == workers + stages, walk.failed
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


def overhead(name: str, stages: int, rounds: int) -> dict[str, Any]:
    """Milliseconds that stages which do nothing take each."""
    costs = [1e3 * seconds(name, stages, 2) / stages for _ in range(rounds)]
    best, bar = min(costs), BARS[name]
    print(f"{name}: {best:.1f} ms a stage (median {median(costs):.1f}), bar {bar:.0f}: {best < bar}")
    return {"stages": stages, "ms_a_stage": costs}


def gain(name: str, stages: int, rounds: int, device: str) -> dict[str, Any]:
    """How much faster two workers are than one, on stages of a second; on the CPU beside two bare processes."""
    gains, most = [], []
    for _ in range(rounds):
        one, two = (seconds(name, stages, workers, device, *DEEDS[device]) for workers in (1, 2))
        gains.append(one / two)
        if device == "cpu":
            most.append(bare(stages, 1) / bare(stages, 2))
        print(f"{name}: {stages} stages in {one:.2f} s with one worker, {two:.2f} s with two", file=sys.stderr)
    print(f"{name}: two workers are {max(gains):.2f} x as fast as one, bar {SPEED_UP}: {max(gains) >= SPEED_UP}")
    if most:
        print(f"two bare processes are {max(most):.2f} x as fast as one: less than 2 where others compute too")
    return {"speed_up": gains, "bare": most}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", default="local", choices=sorted(BARS))
    parser.add_argument("--device", default="cpu", choices=sorted(DEEDS))
    parser.add_argument("--stages", type=int, default=1000, help="trivial stages, on the CPU alone")
    parser.add_argument("--burn", type=int, default=12, help="stages of one second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found: dict[str, Any] = {"executor": given.executor}
    if given.device == "cpu":
        found |= overhead(given.executor, given.stages, given.rounds)
    else:
        try:
            found |= {"device": device_name("cuda"), "gpus": len(gpus_like("cuda"))}
        except UserError as error:
            parser.error(str(error))
        if found["gpus"] < 2:
            parser.error("two workers need two GPUs of one model, and there is one")
    found |= gain(given.executor, given.burn, given.rounds, given.device)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
