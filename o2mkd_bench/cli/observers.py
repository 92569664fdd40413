"""Trackers: plugins that are told of every event of a run, and can never stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from ..core.events import Event, Observer
from ..core.plugins import Registry


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers named; one that raises is said so once, and told nothing more."""

    def __init__(self, names: Sequence[str], out: Path, registry: Registry, say: Callable[[str], None]) -> None:
        """Raises PluginError for a name that no tracker has, and for one that cannot be loaded."""
        plugins = [(name, registry.get("trackers", name)) for name in dict.fromkeys(names)]
        loaded = [(name, plugin.load(), plugin.parse({})) for name, plugin in plugins]
        self._say = say
        self._live: dict[str, Any] = {}
        for name, make, options in loaded:
            self._try(name, partial(make, options, out), keep=True)

    def __call__(self, event: Event) -> None:
        for name, tracker in list(self._live.items()):
            self._try(name, partial(tracker, event))

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._live.items()):
            self._try(name, tracker.close)

    def _try(self, name: str, act: Callable[[], Any], keep: bool = False) -> None:
        try:
            made = act()
        except Exception as error:
            self._live.pop(name, None)
            self._say(f"warning: tracker {name} failed and is told nothing more: {type(error).__name__}: {error}")
        else:
            if keep:
                self._live[name] = made


def together(*observers: Observer) -> Observer:
    """One observer that tells all of them, in order."""

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    return tell
