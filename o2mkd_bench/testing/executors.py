"""The contract of executors: the same artifacts as in one process, and a lost worker costs one stage."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest

from ..core.events import Event
from ..core.executor import Executor, Site
from ..core.machine import gpus_like, resolve_device
from ..core.plan import Plan, Stage
from ..core.plugins import registry
from ..core.store import Store
from ..executors.dispatch import Dispatch
from ..stages.bench import Bench
from .contract import Contract

_PLUGIN = '''
import os, signal, time, warnings
from contextlib import suppress
from pathlib import Path
import numpy as np
from o2mkd_bench import DatasetInfo, DatasetSource, Images, Options, hookimpl

api = 1

class LaboratoryOptions(Options):
    number: int
    deed: str = ""

class Laboratory(DatasetSource):
    """One image; before it is given, something is done."""

    def info(self):
        return DatasetInfo(f"{self.options.number}", "made up", 1, 4, False)

    def load(self):
        first = not (once := self.base / f"tried-{self.options.number}").exists()
        once.touch()
        deed = self.options.deed
        if deed == "die" or (deed == "die once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if deed == "raise":
            raise ValueError("no such thing")
        if deed == "warn":
            warnings.warn_explicit("noise", UserWarning, "x.py", 1, module="torch.nn")
            warnings.warn("a word")
        if deed == "hang":
            time.sleep(600)
        while deed == "deaf":
            with suppress(KeyboardInterrupt):
                time.sleep(600)
        if deed == "burn":
            end = time.process_time() + 1.0
            while time.process_time() < end:
                sum(range(1000))
        if deed.startswith("multiply"):
            import torch
            square = torch.ones(8192, 8192, dtype=torch.bfloat16, device="cuda")
            for _ in range(int(deed.split()[1])):
                square @ square
            torch.cuda.synchronize()
        image = np.full((1, 1, 4, 4), self.options.number % 256, np.uint8)
        return Images(image, image)

@hookimpl
def register_datasets(register):
    register("laboratory", "o2mkd_laboratory:Laboratory", options=LaboratoryOptions)
'''


class Laboratory:
    """Stages that do what they are told to in the worker that makes them: a plugin package in a folder of its own."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        self.device = device
        self.site = folder / "site"
        info = self.site / "o2mkd_laboratory-1.dist-info"
        info.mkdir(parents=True)
        (self.site / "o2mkd_laboratory.py").write_text(_PLUGIN, encoding="utf-8")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: o2mkd-laboratory\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[o2mkd_bench]\nlaboratory = o2mkd_laboratory\n")
        self.plan = Plan()
        self.store = Store(folder / "store")
        self.events: list[Event] = []
        self.until: Callable[[Event], None] = lambda _: None

    def stage(self, number: int, deed: str = "", after: tuple[Stage, ...] = ()) -> Stage:
        """A stage of the plan named after its deed, made after others; ``number`` tells it from others."""
        made = Stage.make(
            "data",
            deed or str(number),
            {"name": "laboratory", "fingerprint": str(number), "channels": 1, "size": 4},
            {"after": tuple(one.identity for one in after)},
            {"options": {"number": number, "deed": deed}, "base": str(self.folder), "source": "made up"},
        )
        self.plan.add(made)
        return made

    def observer(self, event: Event) -> None:
        self.events.append(event)
        self.until(event)

    def run(self, make: Callable[[Site], Executor], limit: float | None = None, fail_fast: bool = False) -> Dispatch:
        """Make all that is missing through an executor; the walk that did it."""
        device, path = resolve_device(self.device), (str(self.site), *sys.path)
        site = Site(self.store.root, device, gpus_like(self.device), fail_fast=fail_fast, path=path)
        bench = Bench(self.store, device, self.observer, registry())
        with closing(make(site)) as executor:
            walk = Dispatch(self.plan, bench, fail_fast, executor=executor, limit=limit)
            walk.run(self.plan.stages)
        return walk

    def content(self) -> dict[str, bytes]:
        """Every file of every artifact, by its place, less the manifests, which say when and where it was made."""
        root = self.store.root / "artifacts"
        files = [path for path in root.rglob("*") if path.is_file() and path.name != "manifest.json"]
        return {str(path.relative_to(root)): path.read_bytes() for path in files}


class ExecutorContract(Contract):
    """Subclass with ``name`` and ``options`` of an executor that can run here, on at least two slots.

    Attributes:
        patience: seconds it takes at most until a worker is there.
    """

    kind = "executors"
    base = Executor
    loaded_by_plan = True
    patience: ClassVar[float] = 60.0

    def make(self, site: Site) -> Executor:
        made: Executor = self.plugin.load()(self.parsed, site)
        return made

    @pytest.fixture
    def laboratory(self, tmp_path: Path) -> Laboratory:
        return Laboratory(tmp_path)

    def test_has_a_slot(self, laboratory: Laboratory) -> None:
        site = Site(laboratory.store.root, "cpu")
        with closing(self.make(site)) as executor:
            assert executor.slots >= 1
            assert not executor.wait(0.0)

    def test_makes_each_stage_once_after_what_it_is_made_from(self, laboratory: Laboratory) -> None:
        first = laboratory.stage(0)
        second = [laboratory.stage(number, after=(first,)) for number in (1, 2, 3)]
        last = laboratory.stage(4, after=tuple(second))
        walk = laboratory.run(self.make)
        assert not walk.failed
        assert sorted(walk.made) == sorted(laboratory.plan.stages)
        assert (walk.made[0], walk.made[-1]) == (first.identity, last.identity)
        for name in laboratory.plan.stages:
            kinds = [event.kind for event in laboratory.events if event.stage == name]
            assert kinds == ["start", "done"]
        assert len(laboratory.content()) == 2 * len(laboratory.plan.stages)
        assert not laboratory.run(self.make).made
        # an executor whose workers outlive a run hears them in the next one
        late = laboratory.stage(5)
        assert laboratory.run(self.make).made == [late.identity]

    def test_a_failure_stops_only_what_needs_it(self, laboratory: Laboratory) -> None:
        bad = laboratory.stage(0, "raise")
        heir, other = laboratory.stage(1, after=(bad,)), laboratory.stage(2)
        walk = laboratory.run(self.make)
        assert "no such thing" in walk.failed[bad.identity]
        assert walk.failed[heir.identity] == "needs raise, which failed"
        assert walk.made == [other.identity]

    def test_the_first_failure_ends_the_rest_where_that_was_asked_for(self, laboratory: Laboratory) -> None:
        bad, hanging = laboratory.stage(0, "raise"), laboratory.stage(1, "hang")
        walk = laboratory.run(self.make, fail_fast=True)
        assert list(walk.failed) == [bad.identity]
        with laboratory.store.lock(hanging.identity, timeout=self.patience):
            assert not laboratory.store.has(hanging.identity)

    def test_a_dead_worker_costs_one_stage(self, laboratory: Laboratory) -> None:
        bad, other = laboratory.stage(0, "die"), laboratory.stage(1)
        walk = laboratory.run(self.make)
        assert list(walk.failed) == [bad.identity]
        assert "its worker" in walk.failed[bad.identity]
        assert walk.made == [other.identity]
        record = laboratory.store.failure(bad.identity)
        assert record is not None
        assert record["category"] == "died"

    def test_what_a_dead_worker_was_at_is_tried_once_more(self, laboratory: Laboratory) -> None:
        stage = laboratory.stage(0, "die once")
        walk = laboratory.run(self.make)
        assert walk.made == [stage.identity]
        assert [event.kind for event in laboratory.events if event.stage] == ["start", "message", "start", "done"]

    def test_a_stage_that_hangs_is_ended_at_its_limit(self, laboratory: Laboratory) -> None:
        bad, other = laboratory.stage(0, "hang"), laboratory.stage(1)
        walk = laboratory.run(self.make, limit=self.patience / 10)
        assert walk.failed == {bad.identity: f"took longer than time_limit: {self.patience / 10:g} and was ended"}
        assert walk.made == [other.identity]

    def test_an_interrupt_ends_every_worker_and_frees_every_lock(self, laboratory: Laboratory) -> None:
        stage = laboratory.stage(0, "hang")

        def interrupted(event: Event) -> None:
            if event.kind == "start":
                raise KeyboardInterrupt

        laboratory.until = interrupted
        with pytest.raises(KeyboardInterrupt):
            laboratory.run(self.make)
        with laboratory.store.lock(stage.identity, timeout=self.patience):
            assert not laboratory.store.has(stage.identity)
        assert laboratory.store.failure(stage.identity) is None
