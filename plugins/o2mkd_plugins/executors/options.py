"""Options of the built-in executors. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from o2mkd_bench import Options, neutral


class RayOptions(Options):
    """Where the cluster is, and what a stage takes of it.

    Attributes:
        address: as of ``ray.init``: ``auto``, ``host:port``, ``ray://host:port``; null starts Ray on this machine.
        workers: most stages at once; as many as there is room for by default.
        cpus, gpus: of a stage; several stages share a GPU where ``gpus`` is less than 1.
    """

    address: str | None = neutral(None)
    workers: PositiveInt | None = neutral(None)
    cpus: PositiveFloat = neutral(1.0)
    gpus: Annotated[float, Field(gt=0, le=1)] = neutral(1.0)
