"""More images from a finished cell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cells import CellName, CellSuite, choose, find_suite
from .common import Device, Seed, Sets, StoreDir, counted, open_session, path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Fewer images are drawn before a compiler is done.
WORTH_COMPILING = 2048
OTHER_PICTURES = frozenset(
    (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".pdf", ".svg", ".eps", ".ps")
)


def sample(
    cell: CellName,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="How many images.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FILE.png|DIR",
            help="A grid; or a folder for it and each image.",
            show_default="CELL.png",
        ),
    ] = None,
    suite: CellSuite = None,
    set_: Sets = None,
    seed: Seed = None,
    device: Device = None,
    store: StoreDir = None,
) -> None:
    """Draw images with the trained students of a cell. Image i is the same in every run.

    Example: `o2mkd-bench sample 3fa9c1d2 --n 64 --out digits.png`
    """
    from ..core.errors import UserError
    from ..core.quiet import quiet

    session = open_session(suite or find_suite(cell), store, sets=set_, seed=seed, device=device)
    chosen = choose(session.plan, cell)
    stage = session.plan.stages[chosen.samples]
    for name in stage.inputs():
        if not session.store.has(name):
            label = session.plan.stages[name].label
            raise UserError(f"cell {cell} cannot draw: {label} is not in {session.store.address}; run its suite first")
    for name in stage.needs.get("prompts", ()):
        if n > (count := session.store.manifest(name).meta["prompts"]):
            raise UserError(f"--n {n}: cell {cell} draws from {counted(count, 'prompt')}, one an image; ask for fewer")
    place = out or Path(f"{chosen.identity[:8]}.png")
    # drawing takes longer than to find out that there is no place for the images
    check_place(place)
    quiet()
    from ..core.events import Event
    from ..core.mode import PLAIN
    from ..stages.bench import Bench
    from ..stages.samples import draw
    from .progress import display

    with display(sys.stderr) as progress:
        progress(Event("plan", data={"stages": 1, "reused": 0}))
        progress(Event("start", stage.identity, chosen.describe()))
        mode = session.machine.mode if n >= WORTH_COMPILING else PLAIN
        bench = Bench(session.store, session.machine.device, progress, session.registry, mode)
        images = draw(bench, stage.spec, stage.needs["students"], range(n), stage).numpy()
        progress(Event("done", stage.identity, chosen.describe()))
    save(images, place)
    print(f"{counted(n, 'image')} in {place}")


def check_place(out: Path) -> None:
    """Make the folder that images go to.

    Raises:
        UserError: when it cannot be made or written, and for a file that is no PNG.
    """
    from ..core.disk import ready
    from ..core.errors import UserError

    if out.suffix.lower() in OTHER_PICTURES:
        raise UserError(f"--out {out}: a grid is written as PNG; name a file that ends in .png, or a folder")
    if is_grid(out) and out.is_dir():
        raise UserError(f"--out {out}: this is a folder, and a name that ends in .png is a file's; name another")
    ready(out.parent if is_grid(out) else out, "--out:", "name another")


def is_grid(out: Path) -> bool:
    """Whether ``out`` is a file for a grid of all images, and no folder."""
    return out.suffix.lower() == ".png"


def save(images: NDArray[np.uint8], out: Path) -> None:
    """A grid as one PNG; where ``out`` is a folder, ``grid.png`` and one PNG an image in it."""
    from ..report.plots import samples_grid

    is_file = is_grid(out)
    samples_grid(images, out if is_file else out / "grid.png", 8)
    if not is_file:
        from PIL import Image

        for number, image in enumerate(images):
            pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            Image.fromarray(pixels).save(out / f"{number:05d}.png")
