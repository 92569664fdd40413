"""What runs in a job: one task, whose events go to a file that the run reads while it grows."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from pathlib import Path
from types import FrameType

from o2mkd_bench import Event
from o2mkd_bench.core.executor import Outcome, Site, Task
from o2mkd_bench.executors.work import Worker

PAUSE = 0.5
"""Seconds between two looks at whether the run wants its jobs to end."""


def make(site: Site, task: Task, said: Path, stop: Path) -> Outcome:
    """Make ``task``; events are pickled one after the other into ``said``; the file ``stop`` interrupts.

    Pickles are read by the run that has written this job, and by nobody else.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def ended(number: int, frame: FrameType | None) -> None:
        # scancel and preemption leave some seconds for checkpoints; a run that stops has asked for them already
        if not stop.exists():
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, ended)
    threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    with said.open("ab", buffering=0) as file:

        def observer(event: Event) -> None:
            file.write(pickle.dumps(event))

        return Worker(site, observer).make(task)


def _listen(stop: Path) -> None:
    while not stop.exists():
        time.sleep(PAUSE)
    os.kill(os.getpid(), signal.SIGINT)
