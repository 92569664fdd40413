"""Run a suite from Python: ``o2mkd_bench.run("suites/quickstart.yaml").frame()``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .core.errors import CorruptArtifact
from .core.events import Event, Observer, silent
from .core.runlog import RunLog
from .core.session import Session, prepare
from .core.suite import Suite, from_mapping, load
from .executors.choose import Placement, choose

if TYPE_CHECKING:
    import pandas as pd

    from .execute import Walk

T = TypeVar("T")

HERE = Placement()


@dataclass(frozen=True)
class Results:
    """What a run leaves: the document behind ``results.json``, and where it was written.

    ``kept``: where no folder was named, which ones were left as they are, in one sentence; empty for none.
    """

    document: Mapping[str, Any]
    out: Path
    kept: str = ""

    @property
    def failed(self) -> int:
        """How many cells failed."""
        return sum(row["status"] == "failed" for row in self.document["rows"])

    def frame(self) -> pd.DataFrame:
        """One row a cell and seed, with the columns of ``results.csv``."""
        from .report.frame import frame

        return frame(self.document)


def run(
    suite: str | Path | Mapping[str, Any] | Suite,
    *,
    out: Path | str | None = None,
    store: Path | str | None = None,
    only: Sequence[str] = (),
    observer: Observer = silent,
    placement: Placement = HERE,
    **options: bool,
) -> Results:
    """Make what a suite still lacks, write the tables, and give them back.

    Args:
        suite: a YAML file, the same as a mapping, or a loaded suite.
        out: folder for tables and pictures; if None, ``results/<suite>``, or beside it where that has rows to lose.
        store: folder of finished stages; ``O2MKD_STORE`` or ``.o2mkd/store`` if None.
        only: ``axis=pattern`` filters on cells.
        observer: is told every event of the run.
        placement: the executor that makes the stages; by default a process for each GPU, or this one for one device.
        options: ``fail_fast`` stops at the first failure, ``rebuild_changed`` remakes what other plugin sources made.

    Raises:
        UserError: when the suite, the device or the store is at fault. A cell that fails is a row that says why.
    """
    if isinstance(suite, Mapping):
        suite = from_mapping(suite)
    elif not isinstance(suite, Suite):
        suite = load(Path(suite))
    session = prepare(suite, None if store is None else Path(store), only, download=True)
    return run_session(session, None if out is None else Path(out), observer, placement=placement, **options)


def results_folder(suite: Suite) -> Path:
    """``results/<suite>`` of the working directory: what trackers append to, and tables go to while nothing is lost."""
    return Path("results") / suite.name


def run_session(
    session: Session,
    out: Path | None,
    observer: Observer = silent,
    *,
    fail_fast: bool = False,
    rebuild_changed: bool = False,
    placement: Placement = HERE,
) -> Results:
    """``run`` for a session that is already prepared."""
    from .report.write import check_folder

    # before the work, not after it
    check_folder(out or results_folder(session.suite))
    with RunLog(session.store, session.suite.name, observer) as log:
        with walking(session, log, fail_fast, placement) as walk:
            if rebuild_changed:
                discard_changed(session)
                session = _again(session, walk)
            session = settled(session, walk)
            walk.run()
            results = mended(walk, lambda: report(session, out))
            if results.kept:
                walk.bench.tell(results.kept)
        log(Event("end", data={"failed": results.failed, "made": len(walk.made)}))
    return results


@contextmanager
def walking(session: Session, observer: Observer, fail_fast: bool, placement: Placement) -> Iterator[Walk]:
    """The walk that makes a session's stages: here, or through an executor, which is closed at the end."""
    from .execute import Walk
    from .executors.dispatch import Dispatch
    from .stages.bench import Bench

    bench = Bench(session.store, session.machine.device, observer, session.registry, session.machine.mode)
    if bench.device.startswith("cuda"):
        check_memory(session)
    executor = choose(session, placement, fail_fast)
    if executor is None:
        yield Walk(session.plan, bench, fail_fast)
        return
    with closing(executor):
        if executor.hint:
            bench.tell(executor.hint)
        yield Dispatch(session.plan, bench, fail_fast, executor=executor, limit=session.suite.time_limit)


def check_memory(session: Session) -> None:
    """Whether the device holds each stage that is still to be made.

    Raises:
        UserError: when it does not, naming the key to change.
    """
    from .core.status import Survey
    from .stages.cohort import free_memory
    from .stages.memory import Memory, check

    # asking a GPU takes some of its memory for as long as the process lives
    if missing := Survey(session.plan, session.store).missing().values():
        check(missing, Memory(session.plan, session.registry), free_memory(session.machine.device))


def settled(session: Session, walk: Walk) -> Session:
    """``session``, and with it ``walk``, planned with all edges that can be measured.

    They come before everything else, so that those who need them train together with the rest of the grid.
    """
    while waiting := [name for name in session.plan.awaited() if name not in walk.failed]:
        number = sum(bool(cell.unresolved and cell.measured) for cell in session.plan.cells)
        walk.bench.tell(f"edges that {number} cells wait for are measured first")
        walk.run(waiting)
        if not any(session.store.has(name) for name in waiting):
            break
        session = _again(session, walk)
    return session


def _again(session: Session, walk: Walk) -> Session:
    found = mended(walk, session.again)
    walk.plan = found.plan
    return found


def discard_changed(session: Session) -> None:
    """Discard what another source of a plugin made, and what follows from it: its identity would not tell."""
    from .core.status import Survey

    survey = Survey(session.plan, session.store)
    stale = {stage.identity for stage in survey.changed(session.registry)}
    for name, stage in session.plan.stages.items():
        if name in stale or not stale.isdisjoint(stage.inputs()):
            stale.add(name)
            if survey.present(name):
                session.store.discard(name, "made by, or from what was made by, another source of a plugin")


def mended(walk: Walk, read: Callable[[], T]) -> T:
    """``read``, again after every damaged artifact it meets has been made anew."""
    while True:
        try:
            return read()
        except CorruptArtifact as damage:
            walk.repair(damage)


def report(session: Session, out: Path | None) -> Results:
    """Write the tables anew from what is stored: to ``out``, else to the default folder or one beside it."""
    from .report.place import place
    from .report.plots import samples_grid
    from .report.write import write
    from .results import document, pictures

    found = document(session)
    out, kept = place(found, results_folder(session.suite)) if out is None else (out, "")
    write(found, out, lambda folder: pictures(session, folder, lambda images, path: samples_grid(images, path, 8)))
    return Results(found, out, kept)
