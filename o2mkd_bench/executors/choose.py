"""Which executor a run has, and whether it needs one at all."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.executor import Executor, Site
from ..core.machine import gpus_like
from ..core.session import Session
from .held import Held

LOCAL = "local"


@dataclass(frozen=True)
class Placement:
    """What a run asks for.

    Attributes:
        executor: name of the plugin.
        options: of the plugin, as of ``--executor-option``.
    """

    executor: str = LOCAL
    options: Mapping[str, Any] = field(default_factory=dict)


def choose(session: Session, placement: Placement, fail_fast: bool) -> Executor | None:
    """The executor; None where one process with one device does all, as nothing else was asked for.

    Raises:
        UserError: for an executor that is not known or cannot run here, and for options that it does not have.
    """
    devices = gpus_like(session.suite.device)
    asked = placement.executor != LOCAL or placement.options or session.suite.time_limit is not None
    if not asked and len(devices) < 2:
        return None
    plugin = session.registry.get("executors", placement.executor)
    make = plugin.load()
    options = plugin.asked(placement.options, f"--executor {placement.executor}")
    machine = session.machine
    site = Site(
        session.store.root, machine.device, devices, machine.mode, fail_fast, tuple(sys.path), session.store.address
    )
    with plugin.calling("the class", f"--executor {placement.executor}"):
        return Held(make(options, site))
