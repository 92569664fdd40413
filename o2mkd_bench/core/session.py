"""What every verb begins with: a suite, a store, this machine, and the plan. Torch-free."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .blocks import TEACHER, any_match
from .build import build
from .checkpoints import download_hub, resolve_hub
from .complaints import near
from .errors import CorruptArtifact, UserError
from .machine import device_name, resolve_device
from .measures import Machine
from .mirror import Mirror, parse_url
from .mode import resolve_mode
from .plan import AXES, Plan
from .plugins import Registry
from .plugins import registry as default_registry
from .rules import names
from .store import Store
from .suite import Suite
from .training import at

STORE_VARIABLE = "O2MKD_STORE"


@dataclass(frozen=True)
class Session:
    """A suite ready to be planned, run or reported."""

    suite: Suite
    store: Store
    machine: Machine
    plan: Plan
    registry: Registry
    only: tuple[str, ...] = ()

    def again(self) -> Session:
        """Planned anew, with the edges that have been measured since.

        Raises:
            CorruptArtifact: when measured edges are damaged.
            UserError: as :func:`prepare` does.
        """
        only = [selection(text) for text in self.only]
        edges = partial(measured_edges, self.store)
        return replace(self, plan=build(self.suite, self.machine, _cached, only, self.registry, edges))


def measured_edges(store: Store, stage: str) -> list[int] | None:
    """What an ``edges`` stage has found; None while it is not made.

    Raises:
        CorruptArtifact: when its artifact is damaged.
    """
    if not store.has(stage):
        return None
    edges: list[int] = store.read_json(stage, "edges.json")["edges"]
    return edges


def _cached(repo: str, revision: str | None) -> Path | None:
    return resolve_hub(repo, revision)


def store_at(path: Path | None) -> Store:
    """``--store``, else ``O2MKD_STORE``, else ``.o2mkd/store`` in the working directory.

    Of a store at a URL this machine keeps what it has read below ``.o2mkd/cache``.

    Raises:
        UserError: for a URL that nothing installed can open.
    """
    text = str(path or os.environ.get(STORE_VARIABLE) or ".o2mkd/store")
    if (url := parse_url(text)) is None:
        return Store(Path(text))
    return Mirror(url, Path(".o2mkd/cache", hashlib.sha256(url.encode()).hexdigest()[:16]))


def existing_store(path: Path | None) -> Store:
    """As :func:`store_at`, for who only looks at what is there.

    Raises:
        UserError: for a folder that is no store, too.
    """
    store = store_at(path)
    if not store.exists():
        raise UserError(f"there is no store in {store.address}; name it with --store DIR or {STORE_VARIABLE}")
    return store


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
        UserError: as ``core.build.build`` and ``selection`` do, for a filter that leaves nothing but teachers, and,
            with ``download``, for a dataset that is not here and cannot be had.
    """

    def locate(repo: str, revision: str | None) -> Path | None:
        return _cached(repo, revision) or (download_hub(repo, revision) if download else None)

    def edges(stage: str) -> list[int] | None:
        # a run makes damaged ones anew; until then they are not known
        with suppress(CorruptArtifact):
            return measured_edges(place, stage)
        return None

    _check_only(suite, only)
    registry, place = default_registry(), store_at(store)
    machine, accept = this_machine(suite), [selection(text) for text in only]
    plan = build(suite, machine, _cached, accept, registry, edges)
    if download:
        # before anything is downloaded
        try:
            check_sources(plan, place, registry)
        except UserError as error:
            raise type(error)(at(suite, str(error))) from None
        if any(entry.hub for entry in suite.teachers):
            plan = build(suite, machine, locate, accept, registry, edges)
            check_sources(plan, place, registry)
    for text in only:
        axis, _, value = text.partition("=")
        # a teacher's row has no method, wrapper … and stays whatever is asked of those
        named = axis == "student" and TEACHER in _patterns(value)
        if not named and all(cell.labels[axis] == "" for cell in plan.cells):
            raise UserError(f"--only {text} leaves no cell; {axis} is one of {', '.join(names(suite)[axis])}")
    return Session(suite, place, machine, plan, registry, tuple(only))


def check_sources(plan: Plan, store: Store, registry: Registry) -> None:
    """Ask every dataset that is still to be decoded whether it can be, and every codec to be used likewise.

    Raises:
        UserError: when one cannot.
    """
    for name, stage in plan.stages.items():
        if store.has(name):
            continue
        if stage.kind == "data":
            plugin = registry.get("datasets", stage.spec["name"])
            with plugin.calling("ready()", stage.label):
                plugin.load()(plugin.parse(stage.local["options"]), Path(stage.local["base"])).ready()
        elif stage.kind == "codec":
            plugin = registry.get("models", stage.spec["family"]["name"])
            with plugin.calling("ready()", stage.label):
                plugin.load()().ready()


def _check_only(suite: Suite, only: Sequence[str]) -> None:
    """Raise UserError for filters on one axis of which each leaves something and all together nothing."""
    for axis, labels in suite.labels().items():
        mine = [text for text in only if text.partition("=")[0] == axis and "=" in text]
        left = [{label for label in labels if selection(text)({axis: label})} for text in mine]
        if all(left) and left and not set.intersection(*left):
            both = ",".join(text.partition("=")[2] for text in mine)
            raise UserError(
                f"{' '.join(f'--only {text}' for text in mine)} leaves no cell; join the values of one axis by commas: "
                f"--only {axis}={both}"
            )


def selection(text: str) -> Callable[[Mapping[str, Any]], bool]:
    """The predicate of one ``--only axis=pattern[,pattern…]`` on a cell's labels.

    A teacher's row has no student, method, wrapper or budget; it stays whatever is said about those.

    Raises:
        UserError: for an unknown axis, with the near miss.
    """
    axis, equals, value = text.partition("=")
    if not equals or axis not in AXES:
        raise UserError(f"--only {text}: write axis=pattern{near(axis, AXES)} (axes: {', '.join(AXES)})")
    patterns = _patterns(value)

    def accept(labels: Mapping[str, Any]) -> bool:
        return labels[axis] == "" or any_match(patterns, labels[axis])

    return accept


def _patterns(value: str) -> list[str]:
    # a label such as o2mkd(students=2, warmup=0.1) holds commas of its own
    return [value, *(part.strip() for part in value.split(","))]
