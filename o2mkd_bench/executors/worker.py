"""A worker process: ``python -m o2mkd_bench.executors.worker FD``, where FD is its end of a pipe to the run."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

from ..core.events import Event
from ..core.executor import Report, Site, Task
from ..core.interrupts import SIGNALS, passed_over


def main(descriptor: int) -> None:
    """Make what comes through the pipe until told to stop; die at once when the run is gone."""
    os.set_inheritable(descriptor, False)
    # it is ignored where the run was started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # a scheduler tells every process of a job; the run then tells us, and waits for our checkpoints
    for told in SIGNALS:
        if told != signal.SIGINT:
            signal.signal(told, passed_over)
    link: Connection = Connection(descriptor)
    site: Site = link.recv()
    tasks: queue.SimpleQueue[Task] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, tasks), daemon=True).start()
    # heavy imports come after, so that a run that is gone meanwhile is noticed
    from .work import Worker

    number = -1

    def observer(event: Event) -> None:
        link.send(Report(number, event=event))

    worker = Worker(site, observer)
    while True:
        task = tasks.get()
        number = task.number
        try:
            link.send(Report(number, outcome=worker.make(task)))
        except Exception as error:
            # a stage's own error never comes here
            if os.environ.get("O2MKD_TRACEBACK"):
                traceback.print_exc()
            link.send(Report(number, lost=f"met {type(error).__name__}: {error}"))


def _listen(link: Connection, tasks: queue.SimpleQueue[Task]) -> None:
    """Tasks to the main thread, which None interrupts; the whole process group ends with the run."""
    try:
        while (task := link.recv()) is not None:
            tasks.put(task)
        # a real signal, which also ends the wait for a task
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        link.recv()
    except (EOFError, OSError):
        os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except KeyboardInterrupt:
        # nothing may hold up what has kept its checkpoints
        os._exit(0)
