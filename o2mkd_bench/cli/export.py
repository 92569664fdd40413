"""A finished cell as a folder that diffusers opens."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .cells import CellName, CellSuite, choose, find_suite, near
from .common import Device, Seed, Sets, StoreDir, open_session


class Precision(StrEnum):
    """What the weights are stored as."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def export(
    cell: CellName,
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to; not there yet, or empty.", show_default=False)
    ],
    dtype: Annotated[Precision, typer.Option(help="What the weights are stored as.")] = Precision.fp32,
    suite: CellSuite = None,
    set_: Sets = None,
    seed: Seed = None,
    device: Device = None,
    store: StoreDir = None,
) -> None:
    """Write the students of a finished cell and their solver as a diffusers pipeline, with a model card.

    Example: `o2mkd-bench export 3fa9c1d2 digits-in-two-steps`
    """
    from ..core.errors import UserError
    from ..core.quiet import quiet
    from ..export import check_free, unfinished
    from ..export import export as write

    check_free(folder)
    session = open_session(suite or find_suite(cell), store, sets=set_, seed=seed, device=device)
    chosen = choose(session.plan, cell)
    if reason := unfinished(session, chosen):
        finished = {c.identity: c.describe() for c in session.plan.cells if not unfinished(session, c)}
        raise UserError(f"{reason}; of the finished ones{near(chosen.describe(), finished) or ' there is none'}")
    quiet()
    write(session, chosen, folder, dtype.value)
    print(f"{chosen.describe()} in {folder}; {folder / 'README.md'} says how to open it")
