"""Stages as tasks of a Ray cluster. Ray itself is imported when a run asks for it."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Sequence
from typing import Any

from o2mkd_bench import Event, Executor, UserError
from o2mkd_bench.core.executor import Outcome, Report, Site, Task
from o2mkd_bench.core.machine import threads
from o2mkd_bench.executors.work import Worker

from .options import RayOptions

# Seconds between two looks at what workers say, those they have to keep checkpoints, those a cluster stays as it is.
LOOK, GRACE, FRESH = 0.5, 20.0, 1.0
PATIENCE = 10.0


class Ear:
    """An actor beside the run that hears what workers say, in order for each task."""

    def __init__(self) -> None:
        self._heard: list[tuple[int, Event]] = []

    def tell(self, number: int, event: Event) -> None:
        self._heard.append((number, event))

    def hear(self) -> list[tuple[int, Event]]:
        heard, self._heard = self._heard, []
        return heard


class Hand:
    """One worker process of Ray: what it makes its tasks with, kept from one to the next."""

    made: Hand | None = None

    def __init__(self, site: Site, ear: Any) -> None:
        self.site, self.ear, self.number, self.last = site, ear, -1, None
        self.worker = Worker(site, self._tell)

    def _tell(self, event: Event) -> None:
        import ray

        self.last = self.ear.tell.remote(self.number, event)
        if event.kind != "progress":
            # a worker that dies now has still said what it was at
            ray.get(self.last)

    def make(self, task: Task) -> Outcome:
        import ray

        self.number, self.last = task.number, None
        # Ray cancels by an interrupt, and ignores those that are not its own
        signal.signal(signal.SIGINT, signal.default_int_handler)
        outcome = self.worker.make(task)
        if self.last is not None:
            # whoever sees the outcome has heard all that came before it
            ray.get(self.last)
        return outcome


def make(site: Site, ear: Any, task: Task) -> Outcome:
    """The function that Ray runs."""
    if Hand.made is None or Hand.made.site != site:
        Hand.made = Hand(site, ear)
    # a process of Ray may outlive the run, and the next one has an ear of its own
    Hand.made.ear = ear
    return Hand.made.make(task)


class Ray(Executor):
    """A worker that crashes costs one stage; a node that goes away costs time, and is held against no stage."""

    def __init__(self, options: RayOptions, site: Site) -> None:
        super().__init__(options, site)
        try:
            import ray
        except ImportError as error:
            raise UserError("--executor ray needs Ray; install it with pip install 'o2mkd-bench[ray]'") from error
        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            _start(options.address)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._ear = ray.remote(Ear).options(num_cpus=0, scheduling_strategy=here).remote()
        # where CPUs compute the number of threads decides bits; beside a GPU Ray gives a task as many as it has CPUs
        own = bool(site.devices) and "OMP_NUM_THREADS" not in os.environ
        variables = {} if own else {"OMP_NUM_THREADS": str(threads())}
        if path := os.environ.get("PYTHONPATH"):
            variables["PYTHONPATH"] = path
        self._make = ray.remote(make)
        self._common = {"max_retries": 0, "runtime_env": {"env_vars": variables}}
        self._running: dict[Any, int] = {}
        self._read, self._size = float("-inf"), 1

    @property
    def slots(self) -> int:
        """As many stages as the cluster has room for now; a cluster may grow and shrink."""
        now = time.monotonic()
        if now - self._read > FRESH:
            total, each = self._ray.cluster_resources(), self._demand(alone=False)
            room = min(total.get(name, 0.0) / share for name, share in _named(each).items())
            self._read, self._size = now, max(1, min(int(room), self.options.workers or int(room)))
        return self._size

    def _demand(self, alone: bool) -> dict[str, float]:
        """What Ray sets aside for a task: a share of a GPU, or CPUs; for one that is alone, all that a node has."""
        if self.site.devices:
            return {"num_cpus": 0 if alone else self.options.cpus, "num_gpus": 1.0 if alone else self.options.gpus}
        if not alone:
            return {"num_cpus": self.options.cpus}
        return {"num_cpus": max(node["Resources"].get("CPU", 0.0) for node in self._ray.nodes() if node["Alive"])}

    def place(self, task: Task) -> bool:
        if len(self._running) >= self.slots:
            return False
        ref = self._make.options(**self._common, **self._demand(task.alone)).remote(self.site, self._ear, task)
        self._running[ref] = task.number
        return True

    def wait(self, seconds: float) -> Sequence[Report]:
        if not self._running:
            time.sleep(seconds)
            return ()
        refs = list(self._running)
        self._ray.wait(refs, timeout=min(seconds, LOOK), fetch_local=False)
        ended, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
        # all that was said before they ended has been heard by now
        found = [Report(number, event=event) for number, event in self._ray.get(self._ear.hear.remote())]
        return [*found, *(self._report(ref, self._running.pop(ref)) for ref in ended)]

    def _report(self, ref: Any, number: int) -> Report:
        errors = self._ray.exceptions
        try:
            return Report(number, outcome=self._ray.get(ref))
        except (errors.NodeDiedError, errors.ObjectLostError):
            return Report(number, lost="went away with its node", blameless=True)
        except errors.OutOfMemoryError:
            return Report(number, lost="was ended by Ray as memory ran out")
        except (errors.WorkerCrashedError, errors.TaskCancelledError):
            return Report(number, lost="crashed")
        except errors.RayTaskError as error:
            return Report(number, lost=f"met {type(error.cause).__name__}: {error.cause}")

    def end(self, number: int) -> None:
        for ref, running in self._running.items():
            if running == number:
                self._ray.cancel(ref, force=True)

    def stop(self) -> None:
        self._cancel(force=False, seconds=GRACE)
        self.close()

    def close(self) -> None:
        if not self._ray.is_initialized():
            return
        self._cancel(force=True, seconds=GRACE)
        self._running.clear()
        self._ray.kill(self._ear)
        if self._ours:
            self._ray.shutdown()

    def _cancel(self, force: bool, seconds: float) -> None:
        refs = list(self._running)
        for ref in refs:
            self._ray.cancel(ref, force=force)
        if refs:
            ended, _ = self._ray.wait(refs, num_returns=len(refs), timeout=seconds, fetch_local=False)
            for ref in ended:
                del self._running[ref]


def _start(address: str | None) -> None:
    """Join the cluster at ``address``, or start one on this machine; Ray's own output stays out of the run's."""
    import ray

    try:
        host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
        if colon:
            # Ray itself would try for ten minutes
            socket.create_connection((host, int(port)), timeout=PATIENCE).close()
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--address {address}: no Ray cluster can be joined there ({told})") from error


def _named(demand: dict[str, float]) -> dict[str, float]:
    """A demand under the names that the cluster's resources have, less what is not asked for."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    return {names[key]: share for key, share in demand.items() if share}
