"""What verbs share: their options, how they open a suite, and how they print."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..core.session import Session

WIDTH = 110


def path(text: str) -> Path:
    """A path on the command line; an empty one, as of an unset variable, must not mean the working directory."""
    if not text:
        raise typer.BadParameter("it is empty; name a place, or leave the option out")
    return Path(text)


SuiteFile = Annotated[Path, typer.Argument(metavar="SUITE", help="The suite, a YAML file.", show_default=False)]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value for a key of the suite: `sampling.images=10k`; may be repeated.",
    ),
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        "--only",
        metavar="AXIS=PATTERN",
        help="Only cells with these labels: `method=output,feature`, or `student=teacher`; may be repeated.",
    ),
]
StoreDir = Annotated[
    Path | None,
    typer.Option(
        "--store",
        parser=path,
        metavar="DIR",
        help="Where stages are kept.",
        show_default="$O2MKD_STORE, else .o2mkd/store",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="`cpu`, `cuda`, `cuda:N` or `auto`.", show_default="the suite's"),
]
Seed = Annotated[int | None, typer.Option(min=0, help="One seed, in place of the suite's.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_session(
    suite: Path,
    store: Path | None,
    *,
    sets: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    seed: int | None = None,
    device: str | None = None,
    download: bool = False,
) -> Session:
    """The suite in a file, planned on this machine.

    Raises:
        UserError: when the suite, a filter or the device is wrong, or a filter leaves nothing.
    """
    from ..core.session import prepare
    from ..core.suite import load

    return prepare(load(suite, sets or (), seed, device), store, only or (), download)


def say_unmatched(session: Session) -> None:
    """Say on standard error which patterns of include and exclude mean nothing."""
    from ..core.rules import notes

    for text in notes(session.suite):
        print(f"note: {text}", file=sys.stderr)


def width() -> int:
    """Columns of the terminal; a fixed number where the output goes elsewhere."""
    return shutil.get_terminal_size((WIDTH, 24)).columns


def screen() -> int | None:
    """Columns that a table of results has; None, no limit, in a pipe or a file, unless ``COLUMNS`` says otherwise."""
    return width() if sys.stdout.isatty() or os.environ.get("COLUMNS") else None


def console() -> Console:
    """Standard output for tables: colours only on a terminal, and never a guess at what words mean."""
    from rich.console import Console

    return Console(file=sys.stdout, width=width(), highlight=False, markup=False, emoji=False)


def grid(*headers: str, right: Sequence[str] = ()) -> Table:
    """An empty table in the style of the results; the columns named in ``right`` hold numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for header in headers:
        is_number = header in right
        table.add_column(header, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    return table


def styled(text: str, style: str) -> Text:
    from rich.text import Text

    return Text(text, style)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False))


def bytes_text(size: int) -> str:
    """``1.5 MiB``."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(int(math.log(size, 1024)), len(units) - 1) if size >= 1 else 0
    scaled = size / 1024**power
    return f"{scaled:.{1 if power and scaled < 100 else 0}f} {units[power]}"


def counted(number: int, what: str) -> str:
    """``1 stage``, ``2 stages``."""
    return f"{number} {what}{'' if number == 1 else 's'}"
