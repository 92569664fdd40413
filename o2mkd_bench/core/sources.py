"""Which plugin sources an artifact was made by: not part of its identity, but said when they have changed."""

from __future__ import annotations

import hashlib
import importlib.util
from contextlib import suppress
from functools import cache
from pathlib import Path

from .errors import PluginError
from .plan import Stage
from .plugins import BUILTIN, Plugin, Registry, registry


def sources(stage: Stage, registry: Registry) -> dict[str, str]:
    """``kind:name`` of each plugin that makes ``stage``, to the first 16 hex digits of its module's SHA-256."""
    spec = stage.spec
    named: list[tuple[str, str]] = []
    if stage.kind in ("data", "latents", "prompts"):
        named.append(("datasets", spec["name"]))
    if stage.kind == "codec":
        named.append(("models", spec["family"]["name"]))
    if "sampler" in spec:
        named.append(("samplers", spec["sampler"]["name"]))
    named += [("kd_methods", m["name"]) for m in spec.get("methods", ())]
    named += [("metrics", m["name"]) for m in spec.get("metrics", ())]
    if stage.kind == "speed":
        named += [("models", about["family"]["name"]) for about in stage.local["networks"]]
    if isinstance(spec.get("network"), dict) and "family" in spec["network"]:
        named.append(("models", spec["network"]["family"]["name"]))
    return {f"{kind}:{name}": module_hash(registry.get(kind, name).target.partition(":")[0]) for kind, name in named}


def owner(file: str) -> Plugin | None:
    """A third party's plugin whose module ``file`` is; None for anybody else's."""
    for plugin in registry().all():
        with suppress(PluginError):
            if plugin.distribution != BUILTIN and _source(plugin.target.partition(":")[0]) == Path(file):
                return plugin
    return None


@cache
def module_hash(module: str) -> str:
    """The first 16 hex digits of the SHA-256 of a module's source file.

    Raises:
        PluginError: when there is no such file.
    """
    return hashlib.sha256(_source(module).read_bytes()).hexdigest()[:16]


def _source(module: str) -> Path:
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise PluginError(f"the module {module} of a plugin cannot be found: {error}") from None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        raise PluginError(f"the module {module} of a plugin has no source file; reinstall its package")
    return Path(found.origin)
