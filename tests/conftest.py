"""One toy run that many tests look at."""

import os
import signal

import pytest
from toy import EVERYTHING, Events, ToyRun, run, session

from o2mkd_bench.core.interrupts import SIGNALS, passed_over


@pytest.fixture(autouse=True, scope="session")
def every_signal():
    """What tests start hears every signal, though tests in the background of a shell do not."""
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, passed_over)


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
