"""Trackers: plugins that are told of every event of a run, and can never stop it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import call, methodcaller
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import UserError
from ..core.events import Event, Observer
from ..core.plugins import Registry


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers named; one that raises is said so once, and told nothing more."""

    def __init__(self, names: Sequence[str], out: Path, registry: Registry, say: Callable[[str], None]) -> None:
        """``names``: each a name, or ``{name: {option: value}}`` as in a suite.

        Raises:
            PluginError: for a name that no tracker has, and for one that cannot be loaded.
            UserError: for options that it does not have.
        """
        plugins = [(name, registry.get("trackers", name), given) for name, given in map(_use, dict.fromkeys(names))]
        loaded = [(name, plugin.load(), plugin.asked(given, f"--tracker {name}")) for name, plugin, given in plugins]
        self._say = say
        self._live: dict[str, Any] = {}
        for name, make, options in loaded:
            self._try(name, partial(make, options, out), keep=True)

    def __call__(self, event: Event) -> None:
        for name, tracker in list(self._live.items()):
            self._try(name, partial(call, tracker, event))

    def __exit__(self, *_: object) -> None:
        for name, tracker in list(self._live.items()):
            self._try(name, partial(methodcaller("close"), tracker))

    def _try(self, name: str, act: Callable[[], Any], keep: bool = False) -> None:
        try:
            made = act()
        except (Exception, SystemExit) as error:
            self._live.pop(name, None)
            self._say(f"warning: tracker {name} failed and is told nothing more: {type(error).__name__}: {error}")
        else:
            if keep:
                self._live[name] = made


def _use(text: str) -> tuple[str, Mapping[str, Any]]:
    """The name and the options that ``--tracker`` gives."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    match found:
        case str():
            return found, {}
        case dict() if len(found) == 1 and isinstance(options := next(iter(found.values())), dict):
            return str(next(iter(found))), options
    raise UserError(f"--tracker {text}: write NAME, or {{NAME: {{OPTION: VALUE}}}} in quotes")


def together(*observers: Observer) -> Observer:
    """One observer that tells all of them, in order."""

    def tell(event: Event) -> None:
        for observer in observers:
            observer(event)

    return tell
