"""What ``--executor-option`` may set. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from o2mkd_bench import Options, neutral


class SlurmOptions(Options):
    """``gpus``, ``cpus``, ``memory`` (GB) and ``minutes`` are those of one job; ``jobs`` are most at once."""

    cluster: Literal["slurm", "local"] = neutral("slurm")
    jobs: PositiveInt = neutral(8)
    partition: str | None = neutral(None)
    account: str | None = neutral(None)
    qos: str | None = neutral(None)
    minutes: PositiveInt = neutral(240)
    gpus: NonNegativeInt = neutral(1)
    cpus: PositiveInt = neutral(8)
    memory: PositiveInt | None = neutral(None)
