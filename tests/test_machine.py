"""What is recorded of the machine, and which device a run gets."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from o2mkd_bench.core import machine
from o2mkd_bench.core.errors import UserError

SMI = "NVIDIA H100 80GB HBM3, GPU-11aa\nNVIDIA A100-SXM4-40GB, GPU-22bb\nNVIDIA A100-SXM4-40GB, GPU-22cc\n"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No GPU, no mask, and nothing remembered from other tests."""
    caches = (machine._gpus, machine._cpu_model, machine._commit)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(subprocess, "run", says(None))
    yield
    for cache in caches:
        cache.cache_clear()


def says(text, program="nvidia-smi"):
    """A ``subprocess.run`` that knows one program only."""

    def run(command, **kwargs):
        if text is None or command[0] != program:
            raise FileNotFoundError(command[0])
        run.calls += 1
        return subprocess.CompletedProcess(command, 0, stdout=text, stderr="")

    run.calls = 0
    return run


@pytest.fixture
def gpus(monkeypatch):
    run = says(SMI)
    monkeypatch.setattr(subprocess, "run", run)
    return run


def test_record(gpus):
    record = machine.machine_record()
    assert json.loads(json.dumps(record)) == record
    assert record["python"] == platform.python_version()
    assert record["cores"] >= 1
    assert record["memory"] > 1 << 20
    assert record["gpus"] == ["NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB"]
    assert record["versions"]["numpy"].count(".") >= 1
    assert record["commit"] is None
    assert socket.gethostname() not in record.values()
    assert "hostname" not in record


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    assert list(machine.machine_record()["versions"]) == ["numpy"]


def test_record_needs_no_torch():
    code = "import sys; from o2mkd_bench.core import machine, store, transfer; assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert os.spawnve(os.P_WAIT, sys.executable, [sys.executable, "-c", code], environment) == 0


def test_memory_that_the_system_does_not_tell(monkeypatch):
    def unknown(name):
        raise ValueError(name)

    monkeypatch.setattr(os, "sysconf", unknown)
    assert machine.machine_record()["memory"] is None


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.machine_record()["cores"] == 7


# ---- commit ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    installed = tmp_path / "venv" / "lib" / "o2mkd_bench"
    for folder in (tmp_path / "o2mkd_bench", installed):
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("1")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "o2mkd_bench")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "--message", "first")
    return tmp_path


def git(folder, *arguments):
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_of_a_checkout(checkout):
    package = checkout / "o2mkd_bench"
    commit = git(checkout, "rev-parse", "HEAD")
    assert machine._commit(package) == commit
    (package / "code.py").write_text("2")
    assert machine._commit(package) == commit  # remembered: what runs is what was imported
    machine._commit.cache_clear()
    assert machine._commit(package) == f"{commit}-dirty"


def test_an_installed_copy_has_no_commit(checkout, tmp_path_factory):
    assert machine._commit(checkout / "venv" / "lib" / "o2mkd_bench") is None
    assert machine._commit(tmp_path_factory.mktemp("nowhere")) is None


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_without_a_gpu(monkeypatch):
    assert machine.resolve_device("auto") == "cpu"
    assert machine.resolve_device("cpu") == "cpu"
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=f"device '{device}' was asked for, but nvidia-smi shows no GPU; use cpu"):
            machine.resolve_device(device)


def test_a_driver_that_fails_is_no_gpu(monkeypatch):
    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(9, command)

    monkeypatch.setattr(subprocess, "run", fail)
    assert machine.resolve_device("auto") == "cpu"


def test_with_gpus(gpus):
    assert machine.resolve_device("auto") == "cuda:0"
    assert machine.resolve_device("cuda") == "cuda:0"
    assert machine.resolve_device("cuda:2") == "cuda:2"
    with pytest.raises(UserError, match="only 3 GPUs; use cuda:0 to cuda:2, or cpu"):
        machine.resolve_device("cuda:3")
    assert machine.device_name("cuda:0") == "NVIDIA H100 80GB HBM3"
    assert machine.device_name("cuda:1") == "NVIDIA A100-SXM4-40GB"
    assert gpus.calls == 1


@pytest.mark.parametrize(
    ("mask", "names"),
    [
        ("1,0", ["NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"]),
        ("GPU-11", ["NVIDIA H100 80GB HBM3"]),
        ("GPU-22bb, 0", ["NVIDIA A100-SXM4-40GB", "NVIDIA H100 80GB HBM3"]),
        ("0,9,1", ["NVIDIA H100 80GB HBM3"]),
        ("0,-1,1", ["NVIDIA H100 80GB HBM3"]),
        ("GPU-22", []),
        ("", []),
    ],
)
def test_the_mask_of_cuda_is_obeyed(gpus, monkeypatch, mask, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert machine.machine_record()["gpus"] == names
    assert machine.resolve_device("auto") == ("cuda:0" if names else "cpu")
    with pytest.raises(UserError, match="under CUDA_VISIBLE_DEVICES="):
        machine.device_name(f"cuda:{len(names)}")


@pytest.mark.parametrize("device", ["mps", "cuda:", "cuda:x", "cuda:-1", "CPU", ""])
def test_devices_that_are_not_known(gpus, device):
    with pytest.raises(UserError, match="is not known; use auto, cpu, cuda or cuda:N"):
        machine.resolve_device(device)


@pytest.mark.parametrize(("threads", "text"), [("1", "1 thread"), ("6", "6 threads"), ("", None), ("4,2", None)])
def test_the_cpu_is_named_with_its_threads(monkeypatch, threads, text):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setattr(machine, "cores", lambda: 12)
    monkeypatch.setattr(machine, "_cpu_model", lambda: "Fast CPU")
    assert machine.device_name("cpu") == f"Fast CPU, {text or '12 threads'}"


@pytest.mark.parametrize("cpuinfo", ["processor : 0\nmodel name\t:  Fast   CPU @ 3GHz \nflags : x\n", None, ""])
def test_cpu_model(monkeypatch, cpuinfo):
    def read(self, **kwargs):
        if cpuinfo is None:
            raise FileNotFoundError(self)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read)
    monkeypatch.setattr(subprocess, "run", says("Apple M9\n", program="sysctl"))
    assert machine._cpu_model() == ("Fast CPU @ 3GHz" if cpuinfo else "Apple M9")
