"""Content hashes of local inputs, cached by path, size and time of modification."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        UserError: when ``path`` does not exist, or something of it cannot be read, which is named.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; correct the path")
    cache = cache or cache_folder() / "fingerprints.json"
    with _readable(path):
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


def files_below(folder: Path) -> list[tuple[str, Path]]:
    """Relative POSIX names and paths of all files below ``folder``, sorted by name; links to folders are not followed.

    Raises:
        UserError: when a folder cannot be read, which must not pass for one that holds nothing.
    """

    def forbidden(error: OSError) -> None:
        raise error

    with _readable(folder):
        walked = os.walk(folder, onerror=forbidden)
        paths = [Path(place, name) for place, _, names in walked for name in names]
        return sorted((p.relative_to(folder).as_posix(), p) for p in paths if p.is_file())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """An OSError as a UserError that names what cannot be read, ``path`` where the error does not say."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename or os.fspath(path))
        raise UserError(f"{name} cannot be read ({error.strerror}); mend that, or take it away") from error


def _tree(folder: Path) -> str:
    digest = hashlib.sha256()
    for name, path in files_below(folder):
        # JSON keeps the border between a name and the next hash unambiguous
        digest.update(json.dumps([name, file_sha256(path)]).encode())
    return digest.hexdigest()


def _stamp(path: Path) -> str:
    """Changes whenever a name, a size or a time of modification does."""
    files = files_below(path) if path.is_dir() else [("", path)]
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
