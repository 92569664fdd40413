"""The contract of executors: they place tasks on workers and report what became of them. Torch-free."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .events import Event
from .mode import Mode
from .options import Options
from .plan import Stage


@dataclass(frozen=True)
class Site:
    """What a worker must know beside its tasks; it can be pickled.

    Attributes:
        store: the root of the store, which every worker must see under this path; the cache of one at a URL.
        device: a torch device name, as the plan was made for; a worker sees one GPU, ``cuda:0``, or none.
        devices: the UUIDs of the GPUs of this machine that may be used; () on the CPU.
        mode: how networks are run.
        fail_fast: whether a worker stops at its first failure.
        path: ``sys.path`` of the run, so that a worker finds the same plugins.
        address: the URL of the store, where it has one.
    """

    store: Path
    device: str
    devices: tuple[str, ...] = ()
    mode: Mode = field(default_factory=Mode)
    fail_fast: bool = False
    path: tuple[str, ...] = ()
    address: str = ""


@dataclass(frozen=True)
class Task:
    """Stages that one worker makes together.

    Attributes:
        number: its own among all tasks of a run.
        names: identities of the stages to be made, in the plan's order.
        stages: these and all that they are made from, so that a damaged input can be made anew.
        alone: whether nothing else may run on the device meanwhile, as for a speed reading.
    """

    number: int
    names: tuple[str, ...]
    stages: tuple[Stage, ...]
    alone: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a task ended beside what its events have told.

    Attributes:
        failed: identity to the reason, also for inputs that were damaged and could not be made anew.
        held: stages that another process is at; they are to be tried again.
        broken: why the store cannot be written, where it cannot.
    """

    failed: dict[str, str] = field(default_factory=dict)
    held: tuple[str, ...] = ()
    broken: str = ""


@dataclass(frozen=True)
class Report:
    """Something that became known of a task: an ``event`` of it, its ``outcome``, or how it was ``lost``.

    Attributes:
        lost: how its worker ended, the end of a sentence: ``was ended by SIGKILL``.
        blameless: whether what was lost is no fault of the task's, as when its machine went away.
    """

    task: int
    event: Event | None = None
    outcome: Outcome | None = None
    lost: str = ""
    blameless: bool = False


class Executor(ABC):
    """An executor plugin. One thread calls it; each task it takes is reported to an end, by an outcome or as lost.

    A worker makes a task with ``o2mkd_bench.executors.work.Worker`` and passes on every event it is told. Nothing but
    the store carries results, and its locks let no stage be made twice at once.
    """

    def __init__(self, options: Options, site: Site) -> None:
        """Raises UserError when there is no place to run at. Workers may start later."""
        self.options = options
        self.site = site

    @property
    def hint(self) -> str:
        """What the user might do better, one sentence that is said when the run begins; empty by default."""
        return ""

    @property
    @abstractmethod
    def slots(self) -> int:
        """How many tasks can run at once, at least 1; students that share a teacher pass are divided among them."""

    @abstractmethod
    def place(self, task: Task) -> bool:
        """Start ``task``; False where there is no room for it now."""

    @abstractmethod
    def wait(self, seconds: float) -> Sequence[Report]:
        """What became known, in order for each task; () when nothing did for ``seconds``."""

    @abstractmethod
    def end(self, number: int) -> None:
        """Kill the worker of a task, which is reported as lost, unless it was reported meanwhile."""

    @abstractmethod
    def stop(self) -> None:
        """Let all tasks keep their checkpoints and end, and wait for them; nothing is placed or reported after."""

    @abstractmethod
    def close(self) -> None:
        """Give everything back; tasks that still run are killed. It may be called twice."""
