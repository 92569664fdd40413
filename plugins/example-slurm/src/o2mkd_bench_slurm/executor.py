"""Submits tasks, reads what their jobs say, and cancels them."""

from __future__ import annotations

import pickle
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from o2mkd_bench import Event, Executor
from o2mkd_bench.core.executor import Report, Site, Task

from .job import make
from .options import SlurmOptions

# Seconds between two looks at the jobs, and those that they have to keep checkpoints.
LOOK, GRACE = 0.25, 60.0


@dataclass
class Running:
    """A job, the file of what it says, and how far that was read."""

    job: Any
    said: Path
    place: int = 0

    def news(self, number: int) -> list[Report]:
        """Whole events that came since the last call."""
        if not self.said.exists():
            return []
        found = []
        with self.said.open("rb") as file:
            file.seek(self.place)
            while True:
                try:
                    event: Event = pickle.load(file)
                except (EOFError, pickle.UnpicklingError):
                    return found
                self.place = file.tell()
                found.append(Report(number, event=event))


class Slurm(Executor):
    """Each task is a job. Files of jobs lie beside the artifacts, in a folder that is gone when the run ends."""

    def __init__(self, options: SlurmOptions, site: Site) -> None:
        super().__init__(options, site)
        import submitit

        self._folder = site.store / "slurm" / uuid4().hex[:12]
        self._submitit = submitit
        self._jobs = submitit.AutoExecutor(folder=self._folder, cluster=options.cluster)
        asked = {
            "timeout_min": options.minutes,
            "cpus_per_task": options.cpus,
            "gpus_per_node": options.gpus if site.devices else 0,
            "mem_gb": options.memory,
            "slurm_partition": options.partition,
            "slurm_account": options.account,
            "slurm_qos": options.qos,
        }
        self._jobs.update_parameters(**{key: value for key, value in asked.items() if value is not None})
        self._running: dict[int, Running] = {}

    @property
    def slots(self) -> int:
        return self.options.jobs

    def place(self, task: Task) -> bool:
        alone = task.alone and not self.site.devices
        if len(self._running) >= self.slots or (alone and self._running):
            return False
        said = self._folder / f"{task.number}.events"
        job = self._jobs.submit(make, self.site, task, said, self._folder / "stop")
        self._running[task.number] = Running(job, said)
        return True

    def wait(self, seconds: float) -> Sequence[Report]:
        deadline = time.monotonic() + seconds
        while True:
            found: list[Report] = []
            for number, running in list(self._running.items()):
                # asked first, so that nothing is said between the last look and the end
                done = running.job.done()
                found += running.news(number)
                if done:
                    found.append(self._report(number, self._running.pop(number).job))
            if found or time.monotonic() >= deadline:
                return found
            time.sleep(min(LOOK, seconds))

    def _report(self, number: int, job: Any) -> Report:
        try:
            return Report(number, outcome=job.result())
        except self._submitit.core.utils.FailedJobError as error:
            return Report(number, lost=f"failed ({str(error).strip().splitlines()[-1]})")
        except self._submitit.core.utils.UncompletedJobError:
            gone = job.state in ("NODE_FAIL", "PREEMPTED", "BOOT_FAIL")
            return Report(number, lost=f"ended as {job.state}", blameless=gone)

    def end(self, number: int) -> None:
        if number in self._running:
            self._running[number].job.cancel(check=False)

    def stop(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "stop").touch()
        deadline = time.monotonic() + GRACE
        while self._running and time.monotonic() < deadline:
            self.wait(1.0)
        self.close()

    def close(self) -> None:
        for running in self._running.values():
            running.job.cancel(check=False)
        while any(not running.job.done() for running in self._running.values()):
            time.sleep(LOOK)
        self._running.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
