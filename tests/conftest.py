"""One toy run that many tests look at."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from toy import Events, run, session, suite

from o2mkd_bench.core.session import Session
from o2mkd_bench.runner import Results

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


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The number of threads is part of what a speed reading is made on."""
    import torch

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory, one_thread) -> ToyRun:
    """A finished run with every kind of stage; copy the store before changing it."""
    folder = tmp_path_factory.mktemp("toy")
    events = Events()
    results = run(EVERYTHING, folder / "store", folder / "out", events)
    return ToyRun(EVERYTHING, session(EVERYTHING, folder / "store"), events, results, folder / "store", folder / "out")
