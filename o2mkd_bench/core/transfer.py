"""Carrying artifacts from one store to another, as one tar stream cut into parts of limited size.

An export is a folder with ``part-0000``, ``part-0001`` … and, written last, ``index.json``. The parts in order are a
plain tar: for each artifact ``<id>/manifest.json`` and then its files.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .disk import guarded, sync, write_synced
from .errors import CorruptArtifact, UserError
from .manifest import MANIFEST, FileRecord, Manifest, check_identity
from .store import Store

if TYPE_CHECKING:
    from typing_extensions import Buffer

INDEX = "index.json"
FORMAT = 1


class Index(BaseModel):
    """What an export holds. ``artifacts``: per identity its files by name, ``manifest.json`` included."""

    model_config = ConfigDict(frozen=True)

    format: int = FORMAT
    parts: dict[Annotated[str, Field(pattern=r"^part-\d{4,}$")], FileRecord]
    artifacts: dict[Annotated[str, AfterValidator(check_identity)], dict[str, FileRecord]]


def parse_size(text: str) -> int:
    """Bytes of ``"16M"``, ``"1.5 GiB"``, ``"4096"``; K, M, G and T are powers of 1024.

    Raises:
        UserError: for anything else, and for less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])I?)?B?\s*", text.upper())
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise UserError(f"size {text!r} is not understood; write a positive number with K, M, G or T, such as 16M")
    return size


def export_artifacts(store: Store, ids: Iterable[str], dest: Path, part_size: int) -> list[str]:
    """Write artifacts into the folder ``dest``, in files of at most ``part_size`` bytes; equal stores give equal bytes.

    Returns:
        the identities exported, each once.

    Raises:
        UserError: when an artifact is absent or damaged, or ``dest`` is not empty or cannot be written.
    """
    if part_size < 1:
        raise UserError(f"parts of {part_size} bytes hold nothing; give a part size of at least 1 byte")
    dest = dest.absolute()
    chosen: dict[str, dict[str, FileRecord]] = {}
    with guarded(dest, "the export folder", "name another folder"):
        dest.mkdir(parents=True, exist_ok=True)
        if any(dest.iterdir()):
            raise UserError(f"the export folder {dest} is not empty; name a new one")
        parts = _Parts(dest, part_size)
        try:
            with tarfile.open(fileobj=parts, mode="w|") as tar:
                for id in dict.fromkeys(ids):
                    chosen[id] = _pack(store, id, tar)
            parts.complete()
            write_synced(dest / INDEX, Index(parts=parts.done, artifacts=chosen).model_dump_json(indent=2))
            sync(dest)
        except BaseException as error:
            parts.drop()
            if isinstance(error, CorruptArtifact):
                raise UserError(f"{error} (store {store.address}); run its suite again or leave it out") from error
            raise
    return list(chosen)


def import_artifacts(store: Store, src: Path) -> list[str]:
    """Take over every artifact of an export that the store does not have.

    All parts are verified before the first artifact is committed, and every file of an artifact before that one is.

    Returns:
        the identities that came in.

    Raises:
        UserError: naming the part or the file that is missing or damaged.
    """
    index = _read_index(src)
    for name, part in index.parts.items():
        _check_part(src / name, part)
    came, seen = [], set()
    try:
        with (
            _Joined([src / name for name in index.parts]) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for id, members in groupby(tar, key=lambda member: member.name.partition("/")[0]):
                seen.add(id)
                if id not in index.artifacts:
                    raise CorruptArtifact(id, f"it is not in {INDEX}")
                if not store.has(id):
                    _unpack(store, id, index.artifacts[id], tar, members)
                    came.append(id)
        for id in index.artifacts.keys() - seen:
            raise CorruptArtifact(id, "it is in no part")
    except (CorruptArtifact, tarfile.TarError) as error:
        raise UserError(f"the export {src} is damaged ({error}); export it again") from error
    return came


def _pack(store: Store, id: str, tar: tarfile.TarFile) -> dict[str, FileRecord]:
    """Append one artifact to the stream; what each of its members is."""
    manifest = store.manifest(id)
    text = manifest.text().encode()
    tar.addfile(_member(f"{id}/{MANIFEST}", len(text)), io.BytesIO(text))
    for name, file in manifest.files.items():
        with store.read(id, name).open("rb") as content:
            tar.addfile(_member(f"{id}/{name}", file.size), content)
    return {MANIFEST: FileRecord(size=len(text), sha256=hashlib.sha256(text).hexdigest()), **manifest.files}


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size = size
    return member


def _unpack(
    store: Store, id: str, files: dict[str, FileRecord], tar: tarfile.TarFile, members: Iterator[tarfile.TarInfo]
) -> None:
    """Commit the artifact whose members come next in the stream."""
    manifest = _unpack_manifest(id, files.get(MANIFEST), tar, next(members))
    if manifest.files != {name: file for name, file in files.items() if name != MANIFEST}:
        raise CorruptArtifact(id, f"its manifest and {INDEX} disagree")
    with store.adopting(manifest) as folder:
        for member in members:
            name = member.name.partition("/")[2]
            if name not in manifest.files or not member.isreg():
                raise CorruptArtifact(id, f"{name} is no file of its manifest")
            tar.extract(member.replace(name=name, mtime=time.time(), deep=False), folder, filter="data")


def _unpack_manifest(id: str, expected: FileRecord | None, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Manifest:
    content = tar.extractfile(member) if member.name == f"{id}/{MANIFEST}" else None
    if content is None or expected is None or member.size != expected.size:
        raise CorruptArtifact(id, "it does not begin with its manifest")
    text = content.read()
    if hashlib.sha256(text).hexdigest() != expected.sha256:
        raise CorruptArtifact(id, f"{MANIFEST} is not what {INDEX} says")
    try:
        manifest = Manifest.parse(text)
    except ValueError as error:
        raise CorruptArtifact(id, "its manifest is damaged") from error
    if manifest.identity != id:
        raise CorruptArtifact(id, f"its manifest is that of {manifest.identity}")
    return manifest


def _read_index(src: Path) -> Index:
    try:
        index = Index.model_validate_json((src / INDEX).read_bytes())
    except OSError as error:
        raise UserError(f"{src / INDEX} cannot be read ({error.strerror}); name the folder of an export") from error
    except ValidationError as error:
        raise UserError(f"{src / INDEX} is no index of an export, or is damaged; copy the export again") from error
    if index.format > FORMAT:
        raise UserError(f"{src} was exported by a newer o2mkd-bench (format {index.format}); update o2mkd-bench")
    return index


def _check_part(path: Path, expected: FileRecord) -> None:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"part {path} cannot be read ({error.strerror}); copy it again") from error
    if digest != expected.sha256:
        raise UserError(f"part {path} is not what {INDEX} says; copy it again")


class _Parts(io.BufferedIOBase):
    """A stream that is cut into files of at most ``limit`` bytes as it is written; ``done`` says what they are."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.done: dict[str, FileRecord] = {}
        self._folder, self._limit = folder, limit
        self._file: BinaryIO | None = None
        self._hash, self._size = hashlib.sha256(), 0
        self._failed = False

    def write(self, data: Buffer) -> int:
        # tarfile flushes once more on its way out of an error
        if not self._failed:
            self._failed = True
            self._cut(memoryview(data))
            self._failed = False
        return memoryview(data).nbytes

    def _cut(self, rest: memoryview) -> None:
        while rest:
            if self._file is None:
                self._file = (self._folder / self._name()).open("xb")
                self._hash, self._size = hashlib.sha256(), 0
            piece, rest = rest[: self._limit - self._size], rest[self._limit - self._size :]
            self._file.write(piece)
            self._hash.update(piece)
            self._size += len(piece)
            if self._size == self._limit:
                self.complete()

    def complete(self) -> None:
        """Close the part that is being written and bring it to the disk."""
        if self._file is None:
            return
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self.done[self._name()] = FileRecord(size=self._size, sha256=self._hash.hexdigest())
        self._file = None

    def drop(self) -> None:
        """Remove what was written; closing may fail where writing did."""
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        for name in [*self.done, self._name(), INDEX]:
            (self._folder / name).unlink(missing_ok=True)

    def _name(self) -> str:
        return f"part-{len(self.done):04d}"


class _Joined(io.BufferedIOBase):
    """The parts as one stream for reading."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = iter(paths)
        self._file: BinaryIO | None = None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()

    def read(self, size: int | None = -1) -> bytes:
        """At most ``size`` bytes, none only at the end."""
        while True:
            if self._file is not None:
                if data := self._file.read(-1 if size is None else size):
                    return data
                self._file.close()
            path = next(self._paths, None)
            if path is None:
                return b""
            self._file = path.open("rb")
