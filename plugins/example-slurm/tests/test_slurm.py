"""The contract of executors, on jobs that are processes of this machine; and what a scheduler does to one."""

# ruff: noqa: RUF012 - a contract's attributes are never changed

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from o2mkd_bench.testing import ExecutorContract


class TestSlurm(ExecutorContract):
    name = "slurm"
    options = {"cluster": "local", "jobs": 2}
    patience = 80.0


JOB = """
import sys, time
from pathlib import Path
from o2mkd_bench_slurm import job

class Worker:
    def __init__(self, site, observer): pass
    def make(self, task):
        try:
            print("at work", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("keeping", flush=True)
            sys.stdin.readline()
            print("kept", flush=True)
            raise

job.Worker = Worker
folder = Path(sys.argv[1])
job.make(None, None, folder / "said", folder / "stop")
"""


@pytest.fixture
def job(tmp_path: Path):
    call = [sys.executable, "-c", JOB, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(call, **pipes) as process:
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_told_to_end_keeps_its_checkpoints(job: subprocess.Popen, number: int) -> None:
    job.send_signal(number)
    assert job.stdout.readline() == "keeping\n"
    assert job.communicate("go on\n") == ("kept\n", None)
    assert job.returncode != 0


def test_a_job_at_its_checkpoints_is_not_cut_by_who_asked_for_them(job: subprocess.Popen, tmp_path: Path) -> None:
    (tmp_path / "stop").touch()
    assert job.stdout.readline() == "keeping\n"
    job.send_signal(signal.SIGTERM)
    assert job.communicate("go on\n") == ("kept\n", None)
