"""What this machine has, what it lacks, and how to get it. Nothing here raises, whatever is broken."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .core.fingerprint import cache_folder
from .core.machine import PACKAGES, machine_record
from .core.plugins import registry
from .core.store import Store

INCEPTION_VARIABLE = "O2MKD_INCEPTION_WEIGHTS"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


@dataclass(frozen=True)
class Check:
    """One thing looked at. ``missing`` is required and not there; ``note`` limits what can be done; ``mend``: how."""

    name: str
    state: Literal["ok", "note", "missing"]
    found: str
    mend: str = ""


def examine(store: Store) -> list[Check]:
    """Look at everything a run may need, in the order in which one would mend it."""
    return [
        Check("python", "ok", f"{platform.python_version()} on {platform.platform()}"),
        _packages(),
        _torch(),
        _devices(),
        _store(store),
        _inception(),
        *_plugins(),
    ]


def _packages() -> Check:
    versions = machine_record()["versions"]
    absent = [name for name in PACKAGES if name not in versions]
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    if absent:
        return Check("packages", "missing", f"{', '.join(absent)} not installed", f"pip install {' '.join(absent)}")
    return Check("packages", "ok", found)


def _torch() -> Check:
    try:
        torch = importlib.import_module("torch")
        total = float(torch.ones(2).sum())
    except Exception as error:
        return Check("torch", "missing", f"{type(error).__name__}: {error}", "install it anew: see pytorch.org")
    assert total == 2
    cuda = torch.version.cuda
    built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    return Check("torch", "ok", f"{torch.__version__}, {built}, threads {torch.get_num_threads()}")


def _devices() -> Check:
    record = machine_record()
    cpu = f"{record['cpu']}, {record['cores']} cores"
    gpus: list[str] = record["gpus"]
    seen = _cuda_count()
    if not gpus:
        return Check("devices", "note", f"{cpu}; no GPU", "everything runs on the CPU, only slower")
    if seen < len(gpus):
        mend = "install a torch built for this driver's CUDA: see pytorch.org"
        return Check("devices", "note", f"{cpu}; {', '.join(gpus)}, of which torch sees {seen}", mend)
    return Check("devices", "ok", f"{cpu}; {', '.join(f'cuda:{i} {name}' for i, name in enumerate(gpus))}")


def _cuda_count() -> int:
    try:
        count: int = importlib.import_module("torch").cuda.device_count()
    except Exception:
        return 0
    return count


def _store(store: Store) -> Check:
    name = f"store {store.address}"
    try:
        present = store.ls()
        used = sum(file.size for manifest in present for file in manifest.files.values())
        # a store is made by the first run: the nearest folder above is what must be writable
        place = next(folder for folder in (store.root, *store.root.parents) if folder.is_dir())
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free
    except Exception as error:
        return Check(name, "missing", f"{type(error).__name__}: {error}", "choose another: --store DIR or O2MKD_STORE")
    # of a store at a URL this is the disk of what was read from it
    here = "" if store.address == str(store.root) else " here for copies"
    found = f"{len(present)} artifacts, {used / 2**20:.1f} MiB; {free / 2**30:.0f} GiB free{here}"
    return Check(name, "ok", found)


def _inception() -> Check:
    """Whether FID can be had; every other column can without."""
    given = os.environ.get(INCEPTION_VARIABLE)
    path = Path(given).expanduser() if given else cache_folder() / INCEPTION_FILE
    name = "Inception weights"
    mend = f"a run that asks for fid downloads them; offline, put the file there or name it in {INCEPTION_VARIABLE}"
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return Check(name, "note", f"{path}: {error.strerror}", mend)
    if not digest.startswith(Path(INCEPTION_FILE).stem.rpartition("-")[2]):
        return Check(name, "note", f"{path} is another file (sha256 {digest[:8]}…)", mend)
    return Check(name, "ok", str(path))


def _plugins() -> list[Check]:
    found = registry()
    owners = dict.fromkeys(f"{plugin.distribution} {plugin.distribution_version}" for plugin in found.all())
    state: Literal["ok", "missing"] = "ok" if owners else "missing"
    mend = "" if owners else "install o2mkd-bench with pip: its own plugins come through entry points"
    first = Check("plugins", state, f"{len(found.all())} of {', '.join(owners) or 'nobody'}", mend)
    broken = [
        Check(f"plugin {one.distribution}", "note", one.error, f"update or remove {one.distribution}")
        for one in found.broken
    ]
    return [first, *broken]
