"""The folder a run leaves: tables, pictures, and the document they all come from."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..core.disk import guarded, ready
from ..core.errors import UserError
from .frame import write_csv
from .lines import Results
from .plots import per_timestep, quality_vs_speed
from .shape import complaint
from .tables import markdown
from .text import finite

SCHEMA_VERSION = 1
_WHOSE = ("the results folder", "choose another with --out DIR")
PICTURE = re.compile(r"samples/[^/]+\.png")
# whose the files beside their place are: this machine's, then the process'
_OURS = f".report-{re.sub(r'[^A-Za-z0-9]', '_', platform.node())}-"
RUN_KEYS = ("schema_version", "suite", "created", "machine", "versions", "git_commit")


def write(results: Results, out: Path, pictures: Callable[[Path], None] | None = None) -> None:
    """Fill ``out`` with results.json, run.json, results.csv, results.md, quality_vs_speed.png and per_timestep.png.

    Every file is written beside its place and moved there when whole, so that a reader, and a run cut short, find
    the old file or the new one; results.json comes last. ``pictures(folder)`` may add files of its own, under the
    paths they shall have in ``out`` (sample grids: ``samples/….png``). Pictures of rows that were in ``out`` and are no
    more are removed.

    Raises:
        UserError: when the results mix protocols in one column, or the folder cannot be written; ``out`` is then as it
            was.
    """
    out = check_folder(out)
    with guarded(out, *_WHOSE):
        _write(results, out, pictures)


def check_folder(out: Path) -> Path:
    """``out``, absolute, made where need be.

    Raises:
        UserError: when it cannot be written.
    """
    return ready(out, *_WHOSE)


def _write(results: Results, out: Path, pictures: Callable[[Path], None] | None) -> None:
    _clear_away(out)
    stale = _pictures_in(out) - _pictures(results)
    with tempfile.TemporaryDirectory(prefix=f"{_OURS}{os.getpid()}-", dir=out) as name:
        folder = Path(name)
        if pictures is not None:
            pictures(folder)
        write_csv(results, folder / "results.csv")
        (folder / "results.md").write_text(markdown(results), encoding="utf-8", newline="\n")
        quality_vs_speed(results, folder / "quality_vs_speed.png")
        per_timestep(results, folder / "per_timestep.png")
        parts = {"runs": results["runs"]} if results.get("runs") else {}
        _write_json({key: results.get(key) for key in RUN_KEYS} | parts, folder / "run.json")
        _write_json(results, folder / "results.json")
        for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.name == "results.json"):
            place = out / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    for name in stale:
        (out / name).unlink(missing_ok=True)


def copied(results: Results, folders: Sequence[Path]) -> Callable[[Path], None]:
    """For :func:`write`: the sample grids that rows name, each from the first of ``folders`` that has it."""

    def pictures(into: Path) -> None:
        (into / "samples").mkdir()
        for name in _pictures(results):
            if found := next((folder / name for folder in folders if (folder / name).is_file()), None):
                shutil.copyfile(found, into / name)

    return pictures


def _clear_away(out: Path) -> None:
    """Remove what runs on this machine that were killed while they wrote have left."""
    for path in out.glob(f"{_OURS}*-*"):
        pid = path.name.removeprefix(_OURS).partition("-")[0]
        if pid.isdecimal() and not _is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        # a signal of 0 is no question there
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _pictures(results: Results) -> set[str]:
    """The sample grids that rows name; only those below ``samples/``, whatever a document says."""
    named = {str(row.get("samples") or "") for row in results["rows"]}
    return {name for name in named if PICTURE.fullmatch(name)}


def _pictures_in(out: Path) -> set[str]:
    try:
        return _pictures(read(out))
    except UserError:
        return set()


def read(folder: Path) -> dict[str, Any]:
    """The document in ``folder/results.json``.

    Raises:
        UserError: when it is not there, is no results document, or was written by a newer version.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is not there; name a folder that a run has written its results to") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); write it again with a run of its suite") from None
    version = results.get("schema_version") if isinstance(results, dict) else None
    if not isinstance(version, int) or not isinstance(results.get("rows"), list):
        raise UserError(f"{path} is no results document (it lacks schema_version or rows); name the folder of a run")
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema_version {version} and this version reads {SCHEMA_VERSION}; "
            f"{'upgrade o2mkd-bench' if version > SCHEMA_VERSION else 'write it again with a run of its suite'}"
        )
    if wrong := complaint(results):
        raise UserError(f"{path} is no results document ({wrong}); write it again with a run of its suite")
    return dict(results)


def _write_json(document: Any, path: Path) -> None:
    text = json.dumps(_jsonable(document), indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def _jsonable(value: Any) -> Any:
    """NaN and infinity, which JSON does not know, become null."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return finite(value) if isinstance(value, float) else value
