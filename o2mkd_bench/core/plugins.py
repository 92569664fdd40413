"""Who registered what. One broken plugin stops nobody but those who need it."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import pluggy
from pydantic import ValidationError

from .complaints import complaints, near
from .errors import CorruptArtifact, PluginError, UserError
from .hookspecs import API, BASES, GROUP, KINDS, TRAITS, HookSpecs
from .identity import resolved
from .options import Options

BUILTIN = "o2mkd-bench"


@dataclass(frozen=True)
class Plugin:
    """One registered name. ``load`` imports the target; all the rest is known without it.

    Attributes:
        kind: one of ``KINDS``.
        options, version, paper, summary, traits: as given to ``register``, see ``hookspecs``.
        distribution: the installed package it comes from, in its normalised name.
    """

    kind: str
    name: str
    target: str
    options: type[Options]
    version: str
    paper: str
    summary: str
    distribution: str
    distribution_version: str
    traits: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The name that means this plugin whatever else is installed: third parties' with their distribution."""
        return self.name if self.distribution == BUILTIN else f"{self.distribution}:{self.name}"

    @contextmanager
    def calling(
        self, what: str, where: str, *passing: type[Exception], tell: Callable[[str], str] = str
    ) -> Iterator[None]:
        """What is called of the plugin inside ends well, or in a sentence that names it; ``passing`` goes by.

        ``tell``: what to make of a UserError's text, such as putting the place before it.

        Raises:
            PluginError: for what is no UserError, and no damage of the store.
        """
        try:
            yield
        except UserError as error:
            if (text := tell(str(error))) == str(error):
                raise
            raise type(error)(text) from error
        except CorruptArtifact:
            raise
        except passing:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{where}: {what} of plugin {self.kind}:{self.key} failed: {type(error).__name__}: {error}"
            ) from error

    def load(self) -> Any:
        """The target itself.

        Raises:
            PluginError: when the target cannot be imported, or is not what its kind asks for.
        """
        module, _, attribute = self.target.partition(":")
        try:
            target = getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"plugin {self.kind}:{self.name} of {self.distribution} cannot load its target {self.target!r}: "
                f"{type(error).__name__}: {error}"
            ) from error

        if wrong := self._complaint(target):
            raise PluginError(f"plugin {self.kind}:{self.name} of {self.distribution}: {self.target} {wrong}")
        return target

    def _complaint(self, target: Any) -> str:
        """What is wrong with a target, in words; empty where nothing is."""
        base = BASES.get(self.kind)
        if base is None:
            return "" if callable(target) else "is nothing that can be called; name a class or a function"
        # by name: some of these need torch, and a target that is none of them need not
        if not inspect.isclass(target) or base not in {f"{c.__module__}.{c.__qualname__}" for c in target.__mro__}:
            return f"is no subclass of {base}; derive it from that"
        absent = sorted(getattr(target, "__abstractmethods__", ()))
        return f"has no {' and no '.join(absent)}; define what {base} leaves open" if absent else ""

    def parse(self, options: Mapping[str, Any]) -> Options:
        """Validated options.

        Raises:
            pydantic.ValidationError: for unknown keys and wrong values.
            PluginError: for options whose own validation fails otherwise.
        """
        try:
            return self.options.model_validate(dict(options))
        except (ValidationError, UserError):
            raise
        except Exception as error:
            raise PluginError(
                f"the options of plugin {self.kind}:{self.key} cannot be read: {type(error).__name__}: {error}; "
                "correct the plugin"
            ) from error

    def decides(self, options: Options) -> dict[str, Any]:
        """What of ``options`` enters identities.

        Raises:
            PluginError: for values that are no JSON data.
        """
        try:
            return resolved(options)
        except Exception as error:
            # a default that cannot be made fails here too
            raise PluginError(
                f"an option of plugin {self.kind}:{self.key} decides no identity ({type(error).__name__}: {error}); "
                "make it, and its default, a number, a text, a list or a mapping of these"
            ) from error

    def asked(self, options: Mapping[str, Any], where: str) -> Options:
        """Validated options of the command line.

        Raises:
            UserError: for the first that is wrong, with ``where`` before it.
        """
        try:
            return self.parse(options)
        except ValidationError as error:
            path, text, _ = complaints(error, self.options)[0]
            known = list(self.options.model_fields)
            if len(path) == 1 and path[0] not in known:
                text = f"it has no such option{near(str(path[0]), known)}"
            key = ".".join(map(str, path))
            raise UserError(f"{where}: {key}: {text} (options: {', '.join(known) or 'none'})") from error


@dataclass(frozen=True)
class BrokenPlugin:
    """A distribution whose plugin could not be loaded, and why."""

    distribution: str
    distribution_version: str
    module: str
    error: str


class Registry:
    """Plugins by kind and name, added one module at a time.

    Attributes:
        broken: modules that could not be loaded or declared something wrong; nothing of them is registered.
    """

    def __init__(self) -> None:
        self._plugins: dict[tuple[str, str], list[Plugin]] = {}
        self.broken: list[BrokenPlugin] = []

    def add(self, module: ModuleType | Any, distribution: str, version: str, name: str) -> None:
        """Call every hook of one plugin module; a failure goes to ``broken`` and nothing of the module is registered.

        Args:
            distribution, version: of the installed package; ``name``: of the module, for messages.
        """
        found: list[Plugin] = []
        try:
            api = getattr(module, "api", None)
            if api != API:
                raise PluginError(
                    f"{name} declares api = {api!r}, this o2mkd-bench offers api = {API}; update one of them"
                )
            manager = pluggy.PluginManager(GROUP)
            manager.add_hookspecs(HookSpecs)
            manager.register(module, name=name)
            manager.check_pending()
            for kind in KINDS:
                getattr(manager.hook, f"register_{kind}")(register=self._register(kind, distribution, version, found))
        except (Exception, SystemExit) as error:
            text = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            self.broken.append(BrokenPlugin(distribution, version, name, text))
            return
        for plugin in found:
            self._plugins.setdefault((plugin.kind, plugin.name), []).append(plugin)

    def _register(self, kind: str, distribution: str, dist_version: str, found: list[Plugin]) -> Callable[..., None]:
        def register(
            name: str,
            target: str,
            *,
            options: type[Options] = Options,
            version: str = "1",
            paper: str = "",
            summary: str = "",
            **traits: Any,
        ) -> None:
            if not isinstance(name, str) or not re.fullmatch(r"[^\s:]+", name):
                raise PluginError(f"the name of a plugin of {kind} is {name!r}; make it a word without colons")
            if not isinstance(paper, str) or not isinstance(summary, str):
                raise PluginError(f"the paper or the summary of {kind}:{name} is no text; put it in quotes")
            if not (inspect.isclass(options) and issubclass(options, Options)):
                raise PluginError(
                    f"the options of {kind}:{name} are no subclass of o2mkd_bench.Options; derive them from it"
                )
            if strange := sorted(traits.keys() - set(TRAITS.get(kind, ()))):
                known = ", ".join(TRAITS.get(kind, ())) or "none"
                raise PluginError(f"{kind}:{name} has the trait {strange[0]!r}; {kind} have these traits: {known}")
            if options.model_config.get("extra") != "forbid":
                raise PluginError(f"the options of {kind}:{name} take unknown keys; leave extra as Options has it")
            switches = ("needs_teacher", "needs_captions", "latent", "learned_variance")
            for trait in switches:
                if not isinstance(traits.get(trait, False), bool):
                    raise PluginError(f"{kind}:{name} has {trait} {traits[trait]!r}; make it True or False")
            classes = traits.get("class_name", "")
            if not all(isinstance(one, str) for one in (classes if isinstance(classes, tuple | list) else [classes])):
                raise PluginError(f"{kind}:{name} has the class_name {classes!r}; make it a text, or a tuple of texts")
            if not isinstance(target, str) or ":" not in target:
                raise PluginError(f"the target of {kind}:{name} is {target!r}; write it as 'package.module:Attribute'")
            earlier = self._plugins.get((kind, name), [])
            if any(p.kind == kind and p.name == name for p in found) or distribution in {
                p.distribution for p in earlier
            }:
                raise PluginError(f"{kind}:{name} is registered twice by {distribution}; give one of them another name")
            found.append(
                Plugin(kind, name, target, options, str(version), paper, summary, distribution, dist_version, traits)
            )

        return register

    def all(self, kind: str | None = None) -> list[Plugin]:
        """Every plugin, built-ins first, in order of kind and name."""
        plugins = [p for group in self._plugins.values() for p in group if kind in (None, p.kind)]
        return sorted(plugins, key=lambda p: (KINDS.index(p.kind), p.distribution != BUILTIN, p.name))

    def get(self, kind: str, name: str) -> Plugin:
        """The plugin a suite means by ``name`` or by ``distribution:name``.

        A built-in is never shadowed; a name that two other plugins claim must be written with its distribution.

        Raises:
            PluginError: for an unknown or ambiguous name; near misses and broken plugins are named.
        """
        owner, _, short = name.rpartition(":")
        claims = self._plugins.get((kind, short), [])
        if owner:
            claims = [p for p in claims if p.distribution == normalised(owner)]
        builtin = [p for p in claims if p.distribution == BUILTIN]
        if builtin or len(claims) == 1:
            return (builtin or claims)[0]
        if claims:
            count = "two" if len(claims) == 2 else str(len(claims))
            names = " or ".join(f"{p.distribution}:{short}" for p in claims)
            raise PluginError(f"{kind} {short!r} is claimed by {count} plugins; write {names}")
        plugins = self.all(kind)
        # one that shares its name is told by its distribution
        known = [p.name if self._plugins[kind, p.name][0] is p else p.key for p in plugins]
        hint = near(short, [p.name for p in plugins])
        broken = "".join(f"; plugin {b.distribution} did not load: {b.error}" for b in self.broken)
        raise PluginError(f"no {kind} plugin is called {name!r}{hint} (known: {', '.join(known) or 'none'}){broken}")

    def written(self, plugin: Plugin) -> str:
        """What a suite writes for ``plugin``: more than its name where another distribution claims that too."""
        try:
            clear = self.get(plugin.kind, plugin.name) is plugin
        except PluginError:
            clear = False
        return plugin.name if clear else plugin.key


def entry_points() -> Iterable[importlib.metadata.EntryPoint]:
    """The entry points of everything installed here that says it is a plugin."""
    return importlib.metadata.entry_points(group=GROUP)


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The registry of this process. ``O2MKD_BENCH_PLUGINS`` (comma-separated distributions) limits third parties."""
    found = Registry()
    allowed = os.environ.get("O2MKD_BENCH_PLUGINS")
    names = None if allowed is None else {BUILTIN, *(normalised(n.strip()) for n in allowed.split(","))}
    seen: set[tuple[str, str]] = set()
    for entry in sorted(entry_points(), key=lambda e: (_distribution(e) != BUILTIN, _distribution(e), e.name)):
        distribution = _distribution(entry)
        version = entry.dist.version if entry.dist else "0"
        if (distribution, entry.value) in seen or (names is not None and distribution not in names):
            continue
        seen.add((distribution, entry.value))
        try:
            module = entry.load()
        except (Exception, SystemExit) as error:
            found.broken.append(BrokenPlugin(distribution, version, entry.value, f"{type(error).__name__}: {error}"))
            continue
        found.add(module, distribution, version, entry.value)
    return found


def normalised(distribution: str) -> str:
    """The one spelling of a distribution's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _distribution(entry: importlib.metadata.EntryPoint) -> str:
    return normalised(entry.dist.name) if entry.dist else "unknown"
