"""What a worker does, wherever it runs: walk over the stages of a task."""

from __future__ import annotations

import sys

from ..core.errors import StoreError
from ..core.events import Observer
from ..core.executor import Outcome, Site, Task
from ..core.mirror import open_store
from ..core.plan import Plan
from ..core.plugins import registry
from ..core.quiet import quiet
from ..execute import Walk
from ..stages.bench import Bench


class Worker:
    """Makes the tasks of a site, one after the other; ``observer`` is told every event."""

    def __init__(self, site: Site, observer: Observer) -> None:
        quiet()
        # seconds that no stage should be charged for
        import torch  # noqa: F401

        sys.path[:] = list(dict.fromkeys([*site.path, *sys.path]))
        device = "cuda:0" if site.devices else site.device
        self.site = site
        self.bench = Bench(open_store(site.address, site.store), device, observer, registry(), site.mode)

    def make(self, task: Task) -> Outcome:
        """Make the stages of ``task`` that are missing, and whatever they are made from that is damaged."""
        walk = Walk(Plan({stage.identity: stage for stage in task.stages}), self.bench, self.site.fail_fast)
        try:
            held = walk.work_off([walk.plan.stages[name] for name in task.names], wait=False)
        except StoreError as error:
            return Outcome(broken=str(error))
        return Outcome(dict(walk.failed), tuple(stage.identity for stage in held))
