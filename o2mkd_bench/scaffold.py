"""A new third-party plugin from templates: a package that installs, passes its tests and runs its suite as it is."""

from __future__ import annotations

import importlib.util
import keyword
import re
import string
import sys
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from .core.errors import UserError
from .core.plugins import BUILTIN, registry

SUFFIX = ".tmpl"

# PEP 508, without dots: the name of the package follows from it
_NAME = re.compile(r"[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?")


def write_plugin(name: str, target: Path) -> Path:
    """Write the package ``name`` into a new folder of that name in ``target``, and give the folder back.

    ``my-method`` is what is installed and what a suite writes; Python imports it as ``my_method``.

    Raises:
        UserError: for a name that is no name of a package, or is taken; for a folder that is not empty or cannot be
            written.
    """
    words = {"name": name, "package": package_name(name)}
    folder = target / name
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not empty; give another name or folder")
        for path, content in _templates(files(__package__) / "templates" / "plugin"):
            place = folder / path.replace("/package/", f"/{words['package']}/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(string.Template(content).substitute(words), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); give another folder") from error
    return folder


def package_name(name: str) -> str:
    """What the package ``name`` is imported as.

    Raises:
        UserError: see :func:`write_plugin`.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"plugin name {name!r} is no name of a package; begin with a letter and use letters, digits, - and _, "
            "such as my-method"
        )
    package = re.sub(r"[-_]+", "_", name).lower()
    if keyword.iskeyword(package) or package in sys.stdlib_module_names:
        raise UserError(f"plugin name {name!r} means the module {package!r}, which is Python's own; add a word to it")
    if name in {p.name for p in registry().all("kd_methods") if p.distribution == BUILTIN}:
        raise UserError(f"plugin name {name!r} is a built-in KD method, which nothing shadows; add a word to it")
    if importlib.util.find_spec(package) is not None:
        raise UserError(f"plugin name {name!r} is taken: a package {package!r} is installed here; add a word to it")
    return package


def _templates(folder: Traversable, below: str = "") -> Iterator[tuple[str, str]]:
    """Path without suffix, and text, of every template."""
    for entry in sorted(folder.iterdir(), key=lambda e: e.name):
        if entry.is_dir():
            yield from _templates(entry, f"{below}{entry.name}/")
        elif entry.name.endswith(SUFFIX):
            yield below + entry.name.removesuffix(SUFFIX), entry.read_text(encoding="utf-8")
