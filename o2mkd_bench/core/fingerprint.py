"""Content hashes of local inputs, cached by path, size and time of modification."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import UserError


def cache_folder() -> Path:
    """Where this machine keeps what can be made again: ``O2MKD_BENCH_CACHE``, else ``~/.cache/o2mkd-bench``."""
    named = os.environ.get("O2MKD_BENCH_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "o2mkd-bench"


def content_hash(path: Path, cache: Path | None = None) -> str:
    """SHA-256, 64 hex digits, of a file, or of a folder: the relative names and contents of all files below it.

    The name of ``path`` itself does not count. ``cache`` is the JSON file that remembers hashes, by default
    ``fingerprints.json`` in :func:`cache_folder`; one that cannot be read or written costs time, nothing else.

    Raises:
        UserError: when ``path`` does not exist.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; correct the path")
    cache = cache or cache_folder() / "fingerprints.json"
    key, stamp = str(path.resolve()), _stamp(path)
    known = _read(cache).get(key)
    if isinstance(known, dict) and known.get("stamp") == stamp:
        return str(known["sha256"])
    found = _tree(path) if path.is_dir() else file_sha256(path)
    if _stamp(path) == stamp:  # a file that changed while it was read must not be remembered
        _remember(cache, key, {"stamp": stamp, "sha256": found})
    return found


def file_sha256(path: Path) -> str:
    """SHA-256 of one file, 64 hex digits, always read anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Relative POSIX names and paths of all files below ``folder``, sorted by name."""
    return iter(sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file()))


def _tree(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, path in _files(folder):
        # JSON keeps the border between a name and the next hash unambiguous
        digest.update(json.dumps([name, file_sha256(path)]).encode())
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    """Changes whenever a name, a size or a time of modification does."""
    files = _files(path) if path.is_dir() else iter([("", path)])
    seen = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in ((n, p.stat()) for n, p in files)]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def _read(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads(cache.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(cache: Path, key: str, entry: dict[str, str]) -> None:
    with suppress(OSError):
        cache.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=cache.parent, prefix=f".{cache.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({**_read(cache), key: entry}, file)
            os.replace(name, cache)
        except OSError:
            os.unlink(name)
            raise
