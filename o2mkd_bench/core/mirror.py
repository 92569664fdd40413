"""A store on object storage, by any URL that fsspec knows; what is read of it is kept on this machine.

Below the URL: ``artifacts/<id[:2]>/<id>/manifest.json``, the files of the artifact in a folder beside it that only the
manifest names, and ``failed/<id>.json``. Files come before the manifest, and the first manifest wins: whoever made the
same stage meanwhile drops what it had, and nobody ever reads files of two makers. Locks, scratch and the logs of runs
are this machine's own, so two machines may make one stage, and a training that moves to another machine starts anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from .disk import remove, renamed
from .errors import CorruptArtifact, StoreError, UserError
from .manifest import MANIFEST, Manifest, check_identity
from .store import Freed, Store, now

UPLOAD = "upload"
"""The key of a manifest's ``meta`` that names the folder of its files."""

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)")


def parse_url(text: str) -> str | None:
    """``text`` as a URL, also where a path has swallowed one of its slashes; None for a path."""
    found = _URL.fullmatch(text)
    if found is None:
        return None
    slashes = ":///" if found[1] in ("file", "local") else "://"
    return f"{found[1]}{slashes}{found[2]}"


class Mirror(Store):
    """The artifacts below ``url``, with ``root`` as the cache of this machine.

    Methods that write raise StoreError where the URL cannot be reached or written.
    """

    def __init__(self, url: str, root: Path) -> None:
        """Raises UserError when no file system for the URL is installed."""
        super().__init__(root)
        from fsspec.core import url_to_fs

        self.address = url
        try:
            self._fs, self._base = url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise UserError(f"--store {url}: {error}") from error

    # ---- reading -----------------------------------------------------------------------------------------------

    def has(self, id: str) -> bool:
        try:
            manifest = self.manifest(id)
            sizes = {self._file(manifest, name): file.size for name, file in manifest.files.items()}
            with self._reading():
                return all(self._fs.size(place) == size for place, size in sizes.items())
        except (CorruptArtifact, FileNotFoundError):
            return False

    def read(self, id: str, name: str) -> Path:
        try:
            return super().read(id, name)
        except CorruptArtifact:
            # not here yet, or that of another maker; what is wrong after this is wrong at the URL
            self._fetch(self.manifest(id), name)
            return super().read(id, name)

    def exists(self) -> bool:
        with self._reading():
            return bool(self._fs.exists(self._at("artifacts")))

    def verify(self) -> list[CorruptArtifact]:
        with self.guard():
            for place in self._places():
                remove(place)
        return super().verify()

    def failure(self, id: str) -> dict[str, Any] | None:
        try:
            with self._reading():
                text = self._fs.cat_file(self._at("failed", f"{check_identity(id)}.json"))
            record: dict[str, Any] = json.loads(text)
        except (FileNotFoundError, ValueError):
            return None
        return record

    def _manifest(self, id: str) -> bytes:
        with self._reading():
            found: bytes = self._fs.cat_file(self._at("artifacts", id[:2], check_identity(id), MANIFEST))
        return found

    def _places(self) -> list[Path]:
        with self._reading():
            names = self._fs.glob(self._at("artifacts", "*", "*", MANIFEST))
        return sorted(self._place(str(name).rsplit("/", 2)[1]) for name in names)

    def _fetch(self, manifest: Manifest, name: str) -> None:
        """Bring a file here, whole or not at all."""
        if name not in manifest.files:
            return
        with self.guard():
            place, draft = self._place(manifest.identity) / name, self._temporary(manifest.identity)
            for path in (place, draft):
                path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError), self._reading():
                self._fs.get_file(self._file(manifest, name), str(draft))
                draft.replace(place)

    # ---- writing -----------------------------------------------------------------------------------------------

    def _commit(self, folder: Path, manifest: Manifest) -> None:
        named = manifest.model_copy(update={"meta": {**manifest.meta, UPLOAD: uuid4().hex}})
        with self._writing():
            for name in named.files:
                self._fs.makedirs(self._file(named, name).rpartition("/")[0], exist_ok=True)
                self._fs.put_file(str(folder / name), self._file(named, name))
            if not self._create(named) and not self.has(named.identity):
                self.discard(named.identity, "incomplete")
                self._create(named)
            won = json.loads(self._manifest(named.identity))["meta"].get(UPLOAD) == named.meta[UPLOAD]
            if not won:
                self._fs.rm(self._folder(named), recursive=True)
        if won:
            # the next stage on this machine need not fetch it
            place = self._place(named.identity)
            remove(place)
            place.parent.mkdir(parents=True, exist_ok=True)
            renamed(folder, place)
        self.clear_failure(named.identity)

    def _create(self, manifest: Manifest) -> bool:
        """Put a manifest in its place; False where one stands there."""
        path = self._at("artifacts", manifest.identity[:2], manifest.identity, MANIFEST)
        try:
            self._fs.pipe_file(path, manifest.text().encode(), mode="create")
        except FileExistsError:
            return False
        return True

    def discard(self, id: str, reason: str) -> None:
        with self._writing():
            record = json.dumps({"identity": id, "reason": reason, "created": now()}, indent=2)
            self._put(self._at("corrupt", f"{check_identity(id)}-{uuid4().hex}.json"), record)
            self._drop(id)

    def fail(self, id: str, label: str, reason: str, category: str) -> None:
        record = {"identity": id, "label": label, "reason": reason, "category": category, "created": now()}
        with self._writing():
            self._put(self._at("failed", f"{check_identity(id)}.json"), json.dumps(record, indent=2))

    def clear_failure(self, id: str) -> None:
        with self._writing(), suppress(FileNotFoundError):
            self._fs.rm_file(self._at("failed", f"{check_identity(id)}.json"))

    def gc(self, keep: AbstractSet[str], dry_run: bool = False) -> Freed:
        """Remove artifacts not in ``keep``, damaged ones, records of damage, and this machine's leftovers.

        Files that no manifest names yet stay, as somebody may be bringing them.
        """
        ids, total = [], 0
        with self._writing():
            for place in self._places():
                if place.name in keep and self.has(place.name):
                    continue
                total += self._fs.du(self._at("artifacts", place.name[:2], place.name))
                ids.append(place.name)
                if not dry_run:
                    self._drop(place.name)
            total += sum(self._sweep(path, owner, dry_run) or 0 for path, owner in self._leftovers(keep))
        return Freed(tuple(ids), total)

    def _drop(self, id: str) -> None:
        """The manifest first, so that nobody meets an artifact half removed."""
        base = self._at("artifacts", id[:2], id)
        with suppress(FileNotFoundError):
            self._fs.rm_file(f"{base}/{MANIFEST}")
        with suppress(FileNotFoundError):
            self._fs.rm(base, recursive=True)
        with self.guard():
            remove(self._place(id))

    # ---- inside ------------------------------------------------------------------------------------------------

    def _at(self, *parts: str) -> str:
        return "/".join([self._base.rstrip("/"), *parts])

    def _folder(self, manifest: Manifest) -> str:
        return self._at("artifacts", manifest.identity[:2], manifest.identity, str(manifest.meta.get(UPLOAD, "")))

    def _file(self, manifest: Manifest, name: str) -> str:
        return f"{self._folder(manifest)}/{name}"

    def _put(self, path: str, text: str) -> None:
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, text.encode())

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """What is not there is not there; but nothing is made anew because nobody answers."""
        try:
            yield
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:
            raise self._trouble("read", error) from error

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise self._trouble("written", error) from error

    def _trouble(self, what: str, error: Exception) -> StoreError:
        told = " ".join(str(error).split()) or type(error).__name__
        return StoreError(
            f"the store {self.address} cannot be {what} ({told}); mend that, or choose another with --store"
        )


def open_store(address: str, root: Path) -> Store:
    """The store at a path or a URL; ``root``: the folder of a plain store, or the cache of one at a URL."""
    return Store(root) if parse_url(address) is None else Mirror(address, root)
