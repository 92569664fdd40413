"""Bringing files to the disk for good, and saying in one sentence why they cannot be brought there."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import StoreError
from .manifest import FileRecord, check_file_name

# beside what is forbidden: a limit on the size of files, a broken disk, a path that no file system takes
UNWRITABLE = frozenset(
    (errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
)


# how safetensors and numpy say that a file could not be written
_SERIALIZING = re.compile(r"(?<!de)serializing: .*\(os error (\d+)\)")
_CUT_SHORT = re.compile(r"\d+ requested and \d+ written")


@contextmanager
def guarded(place: Path, what: str, elsewhere: str) -> Iterator[None]:
    """Turn "cannot write below ``place``" into one StoreError that names the place and the mend.

    Libraries that write on their own account report a full disk in words; those are understood too.
    """
    try:
        yield
    except Exception as error:
        code = _trouble(error, place)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(f"{what} {place} is on a full disk; free space there or {elsewhere}") from error
        if code in UNWRITABLE or (code == errno.ENOENT and not place.is_dir()):
            reason = os.strerror(code).lower()
            raise StoreError(f"{what} {place} cannot be written ({reason}); make it writable or {elsewhere}") from error
        if code in (errno.ENOTDIR, errno.EEXIST) and not place.is_dir():
            raise StoreError(f"{what} {place} is not a folder; {elsewhere}") from error
        raise


def ready(folder: Path, what: str, elsewhere: str) -> Path:
    """``folder``, absolute, made where need be and written to once, so that work begins only where it can end.

    Raises:
        StoreError: as :func:`guarded`.
    """
    folder = folder.absolute()
    with guarded(folder, what, elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def _trouble(error: Exception, place: Path) -> int | None:
    """The errno of an error that is about ``place``, a folder above it or something below it; else None."""
    if not isinstance(error, OSError) or error.errno is None:
        said = _SERIALIZING.search(str(error))
        full = os.strerror(errno.ENOSPC) in str(error) or _CUT_SHORT.fullmatch(str(error))
        return int(said[1]) if said else errno.ENOSPC if full else None
    if isinstance(error.filename, str | bytes | os.PathLike):
        path = Path(os.path.abspath(os.fsdecode(error.filename)))
        if not (path.is_relative_to(place) or place.is_relative_to(path)):
            return None
    return error.errno


def seal(folder: Path) -> dict[str, FileRecord]:
    """Bring every file and folder below ``folder`` to the disk; what the files are, by name.

    Raises:
        ValueError: for links and other things that are no plain files, and for names an artifact cannot hold.
    """
    records = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{name} is no plain file and cannot be stored")
        if path.is_dir():
            sync(path)
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            records[check_file_name(name)] = FileRecord(size=os.fstat(file.fileno()).st_size, sha256=digest)
    return records


def write_synced(path: Path, text: str) -> None:
    """Write a text file, UTF-8, and bring it to the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def keep(fresh: Path, place: Path) -> None:
    """Put the file ``fresh``, which is on the disk, in its ``place``; :func:`kept` notices what happens to it there.

    A kill at any moment leaves the file that was there, or this one, and a note that knows both.
    """
    note = _note(place)
    known = note.read_text(encoding="utf-8").split()[-1:] if note.exists() else []
    draft = note.with_name(f"{note.name}.part")
    write_synced(draft, "\n".join([*known, _mark(fresh, place)]))
    draft.replace(note)
    fresh.replace(place)


def kept(place: Path) -> bool:
    """Whether the file in ``place`` is what :func:`keep` has put there."""
    try:
        return _mark(place, place) in _note(place).read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return False


def _note(place: Path) -> Path:
    return place.with_name(f"{place.name}.sha256")


def _mark(path: Path, place: Path) -> str:
    """The hash of a file that lies, or will lie, in ``place``; that of one stage is never taken for another's."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha256(place.parent.name.encode())).hexdigest()


def read_text(path: Path, limit: int = 1 << 20) -> str:
    """A text file in UTF-8 of at most ``limit`` bytes, so that neither a device nor a mistake fills the memory.

    Raises:
        OSError, UnicodeDecodeError: also for a file that is larger.
    """
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit >> 10} KiB", str(path))
    return content.decode("utf-8")


def sync(folder: Path) -> None:
    """Bring the entries of ``folder`` to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def renamed(folder: Path, place: Path) -> bool:
    """Whether ``folder`` took its place; False where something that is no empty folder stands there."""
    try:
        folder.rename(place)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder with all in it, where there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
