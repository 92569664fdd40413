"""An executor for o2mkd-bench. This module only declares it, so it must not import torch, nor submitit."""

from __future__ import annotations

from o2mkd_bench import hookimpl

from .options import SlurmOptions

api = 1


@hookimpl
def register_executors(register):
    register(
        "slurm",
        "o2mkd_bench_slurm.executor:Slurm",
        options=SlurmOptions,
        version="1",
        summary="stages as Slurm jobs, through submitit",
    )
