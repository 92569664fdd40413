"""Where a suite names plugins: names and options to validated uses, and every complaint with its place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import InstanceOf, TypeAdapter, ValidationError, WithJsonSchema

from . import source
from .blocks import Steps, printable
from .complaints import complaints, joined, near, unknown_key, wanted
from .errors import PluginError, UserError
from .options import Options
from .plugins import Plugin, Registry
from .source import Key, Node

Path = tuple[Key, ...]

KIND_OF_AXIS = {
    "datasets": "datasets",
    "methods": "kd_methods",
    "wrappers": "wrappers",
    "samplers": "samplers",
    "metrics": "metrics",
}
BESIDE = {
    "datasets": ("label",),
    "methods": ("label",),
    "wrappers": ("label", "training"),
    "samplers": ("label", "spacing", "clip", "training"),
    "metrics": ("label",),
}
"""What an entry of each axis may hold beside the plugin's name."""

_STEPS: TypeAdapter[tuple[int, ...]] = TypeAdapter(Steps)


@dataclass(frozen=True)
class Use:
    """A plugin as a suite uses it.

    Attributes:
        name: the plugin's registered name.
        label: as given, else the name as written and the options that were given, bear on results and are no default.
    """

    name: str
    options: Options
    plugin: Plugin
    label: str


PluginUse = Annotated[InstanceOf[Use], WithJsonSchema({})]


class Problems:
    """Everything wrong with one suite, each with its path."""

    def __init__(self, root: Node) -> None:
        self.root = root
        self.found: dict[Path, list[str]] = {}
        self.plugin: set[Path] = set()

    def add(self, path: Path, text: str, *, plugin: bool = False) -> None:
        self.found.setdefault(path, []).append(text)
        if plugin:
            self.plugin.add(path)

    def invalid(self, error: ValidationError, model: Any, path: Path = ()) -> None:
        """Add what pydantic found below ``path``; unknown keys first, as a misspelt key is also a missing one."""
        below = complaints(error, model)
        for place, text, missing in sorted(below, key=lambda found: not found[1].startswith("unknown key")):
            self.add(source.trace(self.root, (*path, *place), keep_last=missing), text)

    def error(self) -> UserError:
        """The first problem as one sentence, with the number of others; PluginError where a plugin is at fault."""
        path, texts = next(iter(self.found.items()))
        place = [str(source.locate(self.root, path)), source.show(self.root, path), joined(texts)]
        more = f" (and {len(self.found) - 1} more)" if len(self.found) > 1 else ""
        return (PluginError if path in self.plugin else UserError)(": ".join(filter(None, place)) + more)

    def check(self) -> None:
        """Raise :meth:`error` if anything was found."""
        if self.found:
            raise self.error()


class Uses:
    """Turns the plugin entries of raw data into :class:`Use`; what fails is added to ``problems``."""

    def __init__(self, registry: Registry, problems: Problems) -> None:
        self.registry = registry
        self.problems = problems

    def use(self, kind: str, entry: tuple[str, Any, Path], label: str | None = None) -> Use | None:
        """One plugin; ``entry`` is the name as written, the raw options and the path of both."""
        written, raw, path = entry
        try:
            plugin = self.registry.get(kind, written)
            if raw is not None and not isinstance(raw, Mapping):
                self.problems.add(path, wanted("a mapping of options", raw))
                return None
            options = plugin.parse(raw or {})
            decides = plugin.decides(options)
        except ValidationError as error:
            self.problems.invalid(error, plugin.options, path)
            return None
        except UserError as error:
            self.problems.add(path, str(error), plugin=isinstance(error, PluginError))
            return None
        label = label or written + _given(options, decides)
        if not label.isprintable():
            self.problems.add(path, wanted("text that can be printed", label))
            return None
        return Use(plugin.name, options, plugin, label)

    def entry(self, axis: str, raw: Any, path: Path) -> dict[str, Any] | None:
        """An entry of ``axis`` as ``{uses: [...], label: ..., **what stands beside}``, and ``steps`` for a sampler."""
        found = self._split(axis, raw, path)
        if found is None:
            return None
        entries, beside = found
        extra: dict[str, Any] = {}
        if axis == "samplers":
            entries, extra["steps"] = self._steps(entries[0])
        label = beside.pop("label", None)
        if label is not None and not isinstance(label, str):
            self.problems.add((*path, "label"), wanted("text (put it in quotes)", label))
            label = None
        elif label is not None:
            try:
                printable(label)
            except ValueError as error:
                self.problems.add((*path, "label"), str(error))
        uses = [self.use(KIND_OF_AXIS[axis], entry, label if len(entries) == 1 else None) for entry in entries]
        made = [use for use in uses if use is not None]
        return {"uses": made, "label": label or "+".join(use.label for use in made), **beside, **extra}

    def model(self, raw: Any, path: Path) -> Use | None:
        """The one model plugin that ``raw`` names."""
        if isinstance(raw, str):
            return self.use("models", (raw, None, path))
        if not isinstance(raw, Mapping) or len(raw) != 1:
            self.problems.add(path, wanted(f"one of {self._known('models')}, or {{name: {{options}}}}", raw))
            return None
        name, options = next(iter(raw.items()))
        return self.use("models", (name, options, (*path, name)))

    def _known(self, kind: str) -> str:
        return ", ".join(plugin.name for plugin in self.registry.all(kind)) or "none"

    def _is_known(self, kind: str, name: str) -> bool:
        try:
            return bool(self.registry.get(kind, name))
        except PluginError:
            return False

    def _split(self, axis: str, raw: Any, path: Path) -> tuple[list[tuple[str, Any, Path]], dict[str, Any]] | None:
        """The plugins an entry names, and what stands beside them."""
        if isinstance(raw, str):
            return [(raw, None, path)], {}
        kind = KIND_OF_AXIS[axis]
        beside = {key: raw[key] for key in BESIDE[axis] if key in raw} if isinstance(raw, Mapping) else {}
        names = [key for key in raw if key not in beside] if isinstance(raw, Mapping) else []
        if not names:
            self.problems.add(
                path, wanted(f"the name of a plugin ({self._known(kind)}), or {{name: {{options}}}}", raw)
            )
            return None
        strange = [name for name in names if not self._is_known(kind, name)]
        if len(names) > 1 and strange:
            others = [plugin.name for plugin in self.registry.all(kind)] if axis == "methods" else []
            known = list(dict.fromkeys([*BESIDE[axis], *others]))
            for name in strange:
                inside = "" if near(name, known) else "; a plugin's options go inside its own key"
                self.problems.add((*path, name), unknown_key(name, known) + inside)
            return None
        if len(names) > 1 and axis != "methods":
            self.problems.add(
                path, f"one entry names one plugin, this one {' and '.join(names)}; make an entry of each"
            )
            return None
        return [(name, raw[name], (*path, name)) for name in names], beside

    def _steps(self, entry: tuple[str, Any, Path]) -> tuple[list[tuple[str, Any, Path]], tuple[int, ...]]:
        """A sampler's entry without ``steps``, and the steps."""
        name, raw, path = entry
        if not self._is_known("samplers", name):
            return [entry], (1,)
        options = dict(raw) if isinstance(raw, Mapping) else {}
        if "steps" not in options:
            self.problems.add((*path, "steps"), f"this key is missing; write {{{name}: {{steps: [10, 20]}}}}")
            return [entry], (1,)
        try:
            steps = _STEPS.validate_python(options.pop("steps"))
        except ValidationError as error:
            self.problems.invalid(error, None, (*path, "steps"))
            steps = (1,)
        return [(name, options, path)], steps


def _given(options: Options, decides: Iterable[str]) -> str:
    """``(key=value, …)`` for those of the options that were given and decide a result."""
    names = [name for name in decides if name in options.model_fields_set]
    dumped = options.model_dump(mode="json", include=set(names))
    parts = [f"{n}={dumped[n] if isinstance(dumped[n], str) else json.dumps(dumped[n])}" for n in names]
    return f"({', '.join(parts)})" if parts else ""
