"""Worker processes on this machine, one a slot; each GPU has as many slots as its share of the workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait

from pydantic import PositiveInt

from ..core.executor import Executor, Report, Site, Task
from ..core.machine import cores, threads
from ..core.options import Options, neutral

# Seconds that a worker has to keep its checkpoints after an interrupt: a step that compiles takes a while.
GRACE = 120.0

STDERR = 2


class LocalOptions(Options):
    """``workers``: how many processes; one a GPU, or one on the CPU, by default. More than GPUs share them evenly."""

    workers: PositiveInt | None = neutral(None)


@dataclass(eq=False)
class Slot:
    """A place for a worker process, which starts with its first task. ``gpu``: its UUID, empty for none."""

    gpu: str
    process: subprocess.Popen[bytes] | None = None
    link: Connection | None = None
    task: Task | None = None


class Local(Executor):
    """The default executor. A worker that dies takes its task with it, and nothing else."""

    def __init__(self, options: LocalOptions, site: Site) -> None:
        super().__init__(options, site)
        gpus = site.devices or ("",)
        self._slots = [Slot(gpus[place % len(gpus)]) for place in range(options.workers or len(gpus))]

    @property
    def hint(self) -> str:
        if self.site.devices or len(self._slots) * threads() <= cores():
            return ""
        return (
            f"{len(self._slots)} workers of {threads()} threads share {cores()} cores; OMP_NUM_THREADS="
            f"{self._share} would keep them out of each other's way"
        )

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def _share(self) -> int:
        """The cores of a worker."""
        return max(1, cores() // len(self._slots))

    def place(self, task: Task) -> bool:
        for slot in self._slots:
            if slot.task is None and self._fits(task, slot):
                self._start(slot)
                slot.task = task
                # to one that died while idle nothing can be said, which wait() reports
                with suppress(OSError):
                    _link(slot).send(task)
                return True
        return False

    def _fits(self, task: Task, slot: Slot) -> bool:
        """Whether nothing on the slot's device wants it alone, and ``task`` does not while it is shared."""
        others = [other.task for other in self._slots if other.gpu == slot.gpu and other.task is not None]
        return not others if task.alone else not any(other.alone for other in others)

    def wait(self, seconds: float) -> Sequence[Report]:
        live = [slot for slot in self._slots if slot.link is not None]
        heard = wait([_link(slot) for slot in live], seconds)
        return [report for slot in live if slot.link in heard for report in self._read(slot)]

    def _read(self, slot: Slot) -> list[Report]:
        """All that a worker has said, or how it ended."""
        found: list[Report] = []
        try:
            while _link(slot).poll():
                report: Report = _link(slot).recv()
                found.append(report)
                if report.event is None:
                    slot.task = None
        except (EOFError, OSError):
            task, how = slot.task, self._buried(slot)
            if task is not None:
                found.append(Report(task.number, lost=how))
        return found

    def _start(self, slot: Slot) -> None:
        if slot.process is not None:
            return
        ours, theirs = Pipe()
        environment = dict(os.environ)
        if slot.gpu:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
            # on the CPU the number of threads decides bits and is left to whoever asks; here more than cores only wait
            environment.setdefault("OMP_NUM_THREADS", str(self._share))
        call = [sys.executable, "-P", *_flags(), "-m", "o2mkd_bench.executors.worker", str(theirs.fileno())]
        # a group of its own: Ctrl-C reaches the run alone, and what a worker has started ends with it
        paths = [*self.site.path, *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        slot.process = subprocess.Popen(
            call,
            env=environment,
            stdin=subprocess.DEVNULL,
            # the run's own output is its table
            stdout=STDERR,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        slot.link = ours
        ours.send(self.site)

    def _buried(self, slot: Slot) -> str:
        """Forget the process of a slot; how it ended, as the end of a sentence."""
        process, link = slot.process, slot.link
        slot.process = slot.link = slot.task = None
        if link is not None:
            link.close()
        if process is None:
            return ""
        _kill(process)
        code = process.wait()
        if code >= 0:
            return f"ended with exit status {code}"
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def end(self, number: int) -> None:
        for slot in self._slots:
            if slot.task is not None and slot.task.number == number and slot.process is not None:
                _kill(slot.process)

    def stop(self) -> None:
        for slot in self._slots:
            if slot.link is not None:
                with suppress(OSError):
                    slot.link.send(None)
        deadline = time.monotonic() + GRACE
        for slot in self._slots:
            while slot.link is not None and time.monotonic() < deadline:
                # what they still say is read, as a full pipe would hold them up
                if wait([slot.link], 0.1):
                    self._read(slot)
        self.close()

    def close(self) -> None:
        for slot in self._slots:
            self._buried(slot)


def _link(slot: Slot) -> Connection:
    assert slot.link is not None
    return slot.link


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def _flags() -> list[str]:
    """The interpreter's options that a worker inherits: warnings that somebody asked for."""
    return [f"-W{option}" for option in sys.warnoptions]
