"""The contract of executors, on jobs that are processes of this machine."""

# ruff: noqa: RUF012 - a contract's attributes are never changed

from o2mkd_bench.testing import ExecutorContract


class TestSlurm(ExecutorContract):
    name = "slurm"
    options = {"cluster": "local", "jobs": 2}
    patience = 80.0
