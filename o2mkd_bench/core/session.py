"""What every verb begins with: a suite, a store, this machine, and the plan. Torch-free."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .blocks import any_match
from .build import build
from .checkpoints import download_hub, resolve_hub
from .errors import UserError
from .machine import device_name, resolve_device
from .measures import Machine
from .mode import resolve_mode
from .plan import AXES, Plan
from .plugins import Registry
from .plugins import registry as default_registry
from .store import Store
from .suite import Suite

STORE_VARIABLE = "O2MKD_STORE"


@dataclass(frozen=True)
class Session:
    """A suite ready to be planned, run or reported."""

    suite: Suite
    store: Store
    machine: Machine
    plan: Plan
    registry: Registry


def store_at(path: Path | None) -> Store:
    """``--store``, else ``O2MKD_STORE``, else ``.o2mkd/store`` in the working directory."""
    return Store(path or Path(os.environ.get(STORE_VARIABLE) or ".o2mkd/store"))


def this_machine(suite: Suite) -> Machine:
    """What speed readings of ``suite`` depend on here.

    Raises:
        UserError: when the device is not here, or cannot run as the suite asks.
    """
    resolved = resolve_device(suite.device)
    torch = importlib.metadata.distribution("torch")
    versions = {"torch": torch.version}
    if resolved != "cpu":
        versions["cuda"] = _cuda(torch)
    mode = resolve_mode(suite.compile, suite.cuda_graphs, resolved)
    return Machine(resolved, device_name(resolved), versions, mode)


def _cuda(torch: importlib.metadata.Distribution) -> str:
    """The CUDA version that torch was built with, read without importing torch."""
    text = Path(str(torch.locate_file("torch/version.py"))).read_text(encoding="utf-8")
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return found[1] if found else "none"


def prepare(suite: Suite, store: Path | None = None, only: Sequence[str] = (), download: bool = False) -> Session:
    """Plan ``suite`` on this machine; ``download`` fetches hub teachers that are not here yet.

    Raises:
        UserError: as ``core.build.build`` and ``selection`` do, and for a filter that leaves nothing but teachers.
    """

    def locate(repo: str, revision: str | None) -> Path | None:
        return resolve_hub(repo, revision).folder or (download_hub(repo, revision) if download else None)

    registry = default_registry()
    machine = this_machine(suite)
    plan = build(suite, machine, locate, [selection(text) for text in only], registry)
    for text in only:
        axis = text.partition("=")[0]
        # a teacher's row has no method, wrapper … and stays whatever is asked of those
        if all(cell.labels[axis] == "" for cell in plan.cells):
            known = ", ".join(suite.labels()[axis])
            raise UserError(f"--only {text} leaves no cell; {axis} is one of {known}")
    return Session(suite, store_at(store), machine, plan, registry)


def selection(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """The predicate of one ``--only axis=pattern[,pattern…]`` on a cell's labels.

    A teacher's row has no student, method, wrapper or budget; it stays whatever is said about those.

    Raises:
        UserError: for an unknown axis, with the near miss.
    """
    axis, equals, value = text.partition("=")
    if not equals or axis not in AXES:
        near = difflib.get_close_matches(axis, AXES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"--only {text}: write axis=pattern; {hint}the axes are {', '.join(AXES)}")
    # a label such as o2mkd(students=2, warmup=0.1) holds commas of its own
    patterns = [value, *(part.strip() for part in value.split(","))]

    def accept(labels: Mapping[str, Any]) -> bool:
        return labels[axis] == "" or any_match(patterns, labels[axis])

    return accept
