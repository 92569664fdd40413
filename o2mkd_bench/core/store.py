"""Artifacts under their identity: written atomically, manifest last, verified when read, locked between processes.

Layout below the root: ``artifacts/<id[:2]>/<id>/`` (files and ``manifest.json``), ``work/<id>/`` (scratch of a stage in
progress), ``locks/``, ``failed/<id>.json``, ``tmp/`` (drafts), ``corrupt/`` and ``runs/`` (logs). Nothing is created
before the first write, so a store that is mounted read-only can be read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from .disk import guarded, remove, renamed, seal, sync, write_synced
from .errors import CorruptArtifact, StoreError, UserError
from .identity import plain
from .manifest import MANIFEST, SCHEMA_VERSION, Manifest, check_identity

__all__ = ["Draft", "Freed", "Manifest", "Store"]

_WHOLE = r"([A-Za-z0-9][A-Za-z0-9_-]*)"
_NUMBERED = _WHOLE + r"-[0-9a-f]{32}(?:\.json)?"


@dataclass
class Draft:
    """An artifact being written: put files into ``dir``, and facts about the making into ``meta``."""

    dir: Path
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Freed:
    """What a garbage collection removed, or would: identities of artifacts, and bytes with leftovers included."""

    ids: tuple[str, ...]
    bytes: int


class Store:
    """The artifacts below ``root``. Every method that writes raises UserError when the place cannot be written."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.address = str(self.root)
        self._verified: set[tuple[str, int, int, str]] = set()

    # ---- reading -----------------------------------------------------------------------------------------------

    def has(self, id: str) -> bool:
        """Whether the artifact is there by its manifest and the sizes of its files; nothing is hashed."""
        try:
            manifest = self.manifest(id)
            place = self._place(id)
            return all(os.stat(f"{place}/{name}").st_size == file.size for name, file in manifest.files.items())
        except (CorruptArtifact, OSError):
            return False

    def manifest(self, id: str) -> Manifest:
        """The manifest alone; the files are not looked at.

        Raises:
            CorruptArtifact: when it is absent, no manifest, or that of another artifact.
            UserError: when a newer o2mkd-bench wrote it.
        """
        try:
            content = self._manifest(id)
        except OSError as error:
            raise CorruptArtifact(id, f"its manifest cannot be read ({error.strerror})") from error
        try:
            manifest = Manifest.parse(content)
        except ValueError as error:
            raise CorruptArtifact(id, "its manifest is damaged") from error
        if manifest.schema_version > SCHEMA_VERSION:
            raise UserError(
                f"the store {self.address} was written by a newer o2mkd-bench (manifests of version "
                f"{manifest.schema_version}); update o2mkd-bench or choose another store with --store DIR"
            )
        if manifest.identity != id:
            raise CorruptArtifact(id, f"its manifest is that of {manifest.identity}")
        return manifest

    def read(self, id: str, name: str) -> Path:
        """The path of one file, its content verified on the first read in this process.

        Raises:
            CorruptArtifact: when the file or the artifact is missing, or is not what the manifest says.
        """
        expected = self.manifest(id).files.get(name)
        if expected is None:
            raise CorruptArtifact(id, f"it has no file {name}")
        path = self._place(id) / name
        try:
            with path.open("rb") as file:
                stat = os.fstat(file.fileno())
                key = (str(path), stat.st_size, stat.st_mtime_ns, expected.sha256)
                if key in self._verified:
                    return path
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CorruptArtifact(id, f"{name} cannot be read ({error.strerror})") from error
        if digest != expected.sha256:
            raise CorruptArtifact(id, f"{name} is not what the manifest says")
        self._verified.add(key)
        return path

    def read_json(self, id: str, name: str) -> Any:
        """The content of one JSON file, verified like :meth:`read`."""
        return json.loads(self.read(id, name).read_text(encoding="utf-8"))

    def exists(self) -> bool:
        """Whether something was ever written here."""
        return any(os.path.isdir(self.root / part) for part in ("artifacts", "locks"))

    def ls(self) -> list[Manifest]:
        """The manifests of all complete artifacts, by kind, label and identity."""
        found = [self.manifest(place.name) for place in self._places() if self.has(place.name)]
        return sorted(found, key=lambda m: (m.kind, m.label, m.identity))

    def verify(self) -> list[CorruptArtifact]:
        """Read every file of every artifact anew; the first trouble of each damaged one."""
        self._verified.clear()
        found = []
        for place in self._places():
            try:
                for name in self.manifest(place.name).files:
                    self.read(place.name, name)
            except CorruptArtifact as error:
                found.append(error)
        return found

    # ---- writing -----------------------------------------------------------------------------------------------

    @contextmanager
    def writing(
        self, id: str, kind: str, label: str, spec: Mapping[str, Any], needs: Mapping[str, Sequence[str]]
    ) -> Iterator[Draft]:
        """A draft that becomes the artifact on clean exit and leaves nothing behind on an exception.

        Where another process committed the same identity meanwhile, its artifact stays and this one is dropped.

        Raises:
            ValueError: at once for a ``spec`` or ``needs`` that is no JSON data; on exit for links and other things
                that are no plain files, and for a file named ``manifest.json``.
        """
        # made before the work is done, so that a wrong spec does not cost a training
        fields = {"identity": id, "kind": kind, "label": label, "spec": plain(spec), "needs": needs}
        manifest = Manifest.model_validate({**fields, "created": "", "files": {}, "meta": {}})
        with self._draft(id) as folder:
            draft = Draft(folder)
            yield draft
            made = {"created": now(), "files": seal(folder), "meta": draft.meta}
            self._commit(folder, manifest.model_copy(update=made))

    @contextmanager
    def adopting(self, manifest: Manifest) -> Iterator[Path]:
        """An empty folder that becomes the artifact of ``manifest``, which was made elsewhere, on clean exit.

        Raises:
            CorruptArtifact: when the folder then does not hold exactly the files of the manifest.
        """
        with self._draft(manifest.identity) as folder:
            yield folder
            found = seal(folder)
            for name in sorted(found.keys() | manifest.files.keys()):
                if found.get(name) != manifest.files.get(name):
                    raise CorruptArtifact(manifest.identity, f"{name} is not what the manifest says")
            self._commit(folder, manifest)

    def discard(self, id: str, reason: str) -> None:
        """Move the artifact to ``corrupt/``, with the reason beside it, so that it counts as absent."""
        with self.guard():
            target = self.root / "corrupt" / f"{id}-{uuid4().hex}"
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._place(id).rename(target)
            except FileNotFoundError:
                return
            record = {"identity": id, "reason": reason, "created": now()}
            write_synced(target.with_suffix(".json"), json.dumps(record, indent=2))

    def work(self, id: str) -> Path:
        """The scratch folder of a stage in progress, which survives a kill; created when absent.

        What the stage writes there it writes under :meth:`guard`.
        """
        with self.guard():
            folder = self.root / "work" / check_identity(id)
            folder.mkdir(parents=True, exist_ok=True)
            return folder

    def drop_work(self, id: str) -> None:
        """Remove the scratch folder, if there is one."""
        with self.guard():
            remove(self.root / "work" / check_identity(id))

    def fail(self, id: str, label: str, reason: str, category: str) -> None:
        """Record why the stage could not be made; the last failure stands until the artifact is committed."""
        with self.guard():
            record = {"identity": id, "label": label, "reason": reason, "category": category, "created": now()}
            final, draft = self._failure(id), self._temporary(id)
            for path in (final, draft):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(draft, json.dumps(record, indent=2))
            draft.replace(final)

    def failure(self, id: str) -> dict[str, Any] | None:
        """``identity``, ``label``, ``reason``, ``category`` and ``created`` of the last failure, if there is one."""
        try:
            record: dict[str, Any] = json.loads(self._failure(id).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record

    def clear_failure(self, id: str) -> None:
        with self.guard():
            remove(self._failure(id))

    def gc(self, keep: AbstractSet[str], dry_run: bool = False) -> Freed:
        """Remove artifacts not in ``keep``, incomplete ones, drafts nobody writes, and everything in ``corrupt/``.

        The logs of runs that have ended go too.

        Scratch folders stay for stages in ``keep`` that are not made yet. What another process has locked stays.
        """
        ids, total = [], 0
        with self.guard():
            for place in self._places():
                if place.name in keep and self.has(place.name):
                    continue
                size = self._sweep(place, place.name, dry_run)
                if size is not None:
                    ids.append(place.name)
                    total += size
            total += sum(self._sweep(path, owner, dry_run) or 0 for path, owner in self._leftovers(keep))
        return Freed(tuple(ids), total)

    # ---- locks and troubles ------------------------------------------------------------------------------------

    @contextmanager
    def lock(self, id: str, timeout: float = -1) -> Iterator[None]:
        """Hold the artifact's lock against all other processes; that of a killed process is free.

        Raises:
            TimeoutError: when it is still held elsewhere after ``timeout`` seconds (-1: wait for ever).
        """
        with self._hold(check_identity(id), timeout):
            yield

    def try_lock(self, id: str) -> AbstractContextManager[Any] | None:
        """The lock, held already and released on leaving the ``with``; None when it is held elsewhere."""
        try:
            return self._hold(check_identity(id), timeout=0)
        except TimeoutError:
            return None

    def guard(self) -> AbstractContextManager[None]:
        """A full, read-only or forbidden store raises UserError from here, naming it and the mend."""
        return guarded(self.root, "the store", "choose another with --store DIR")

    def _hold(self, name: str, timeout: float) -> ExitStack:
        with self.guard():
            path = self.root / "locks" / f"{name}.lock"
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path, timeout=timeout, thread_local=False)
            try:
                lock.acquire()
            except Timeout as error:
                raise TimeoutError(f"{path} is held by another process") from error
        held = ExitStack()
        held.callback(lock.release)
        return held

    # ---- inside ------------------------------------------------------------------------------------------------

    def _manifest(self, id: str) -> bytes:
        return (self._place(id) / MANIFEST).read_bytes()

    def _place(self, id: str) -> Path:
        return self.root / "artifacts" / id[:2] / check_identity(id)

    def _temporary(self, id: str) -> Path:
        return self.root / "tmp" / f"{check_identity(id)}-{uuid4().hex}"

    def _failure(self, id: str) -> Path:
        return self.root / "failed" / f"{check_identity(id)}.json"

    def _places(self) -> list[Path]:
        shelves = _inside(self.root / "artifacts", r"(\w\S?)")
        return [place for shelf, start in shelves for place, id in _inside(shelf, _WHOLE) if id.startswith(start)]

    def _leftovers(self, keep: AbstractSet[str]) -> list[tuple[Path, str]]:
        """What gc may remove beside artifacts, each with the identity whose lock guards it."""
        work = _inside(self.root / "work", _WHOLE)
        return [
            *_inside(self.root / "tmp", _NUMBERED),
            *_inside(self.root / "corrupt", _NUMBERED),
            *_inside(self.root / "runs", _WHOLE),
            *((path, id) for path, id in work if id not in keep or self.has(id)),
        ]

    @contextmanager
    def _draft(self, id: str) -> Iterator[Path]:
        folder = self._temporary(id)
        # held by us or by the caller: either way gc in another process sees that the draft is alive
        with self.guard(), self.try_lock(id) or nullcontext():
            try:
                folder.mkdir(parents=True)
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, folder: Path, manifest: Manifest) -> None:
        """Put a sealed draft in its place unless a complete artifact is there."""
        write_synced(folder / MANIFEST, manifest.text())
        sync(folder)
        place = self._place(manifest.identity)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not renamed(folder, place):
            # two that both find a wreck must not discard what the other has just put there
            with self._hold(f"{manifest.identity}.commit", timeout=-1):
                if not self.has(manifest.identity):
                    self.discard(manifest.identity, "incomplete")
                    renamed(folder, place)
        sync(place.parent)
        sync(place.parent.parent)
        self.clear_failure(manifest.identity)

    def _sweep(self, path: Path, owner: str, dry_run: bool) -> int | None:
        """Bytes freed by removing ``path``; None where the lock of its owner is held."""
        untouched = dry_run and not (self.root / "locks" / f"{owner}.lock").exists()
        held = nullcontext() if untouched else self.try_lock(owner)
        if held is None:
            return None
        with held:
            size = sum(p.lstat().st_size for p in [path, *path.rglob("*")] if p.is_file())
            if not dry_run:
                # out of sight first, so that nobody meets an artifact half removed
                grave = self._temporary(owner)
                grave.parent.mkdir(exist_ok=True)
                path.rename(grave)
                remove(grave)
        return size


def now() -> str:
    """This moment, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _inside(folder: Path, names: str) -> list[tuple[Path, str]]:
    """Entries with the identity each one's name begins with, in order of name; what is not ours is passed over."""
    try:
        found = [(path, re.fullmatch(names, path.name)) for path in sorted(folder.iterdir())]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        reason = str(error.strerror).lower()
        raise StoreError(
            f"the store's folder {folder} cannot be read ({reason}); make it readable or choose another store with "
            "--store DIR"
        ) from error
    return [(path, match[1]) for path, match in found if match]
