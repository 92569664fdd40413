"""What a run has left, shown once more, and two of them side by side."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Device, Json, Only, Seed, Sets, StoreDir, open_session, path, screen

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..core.session import Session

RESULTS = "results.json"


class Format(StrEnum):
    """How a report is printed."""

    table = "table"
    csv = "csv"
    md = "md"
    latex = "latex"
    json = "json"


def report(
    what: Annotated[
        list[Path],
        typer.Argument(
            metavar="SUITE|DIR...", help="A suite, or a folder of its results; several merge.", show_default=False
        ),
    ],
    format: Annotated[Format, typer.Option("--format", help="What to print.")] = Format.table,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Write tables and pictures there; else nothing is written.",
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="AXIS=LABEL",
            help="Say of every line whether it is better than the one with this label: wrapper=single, method=output.",
            show_default="each baseline against what it is one of",
        ),
    ] = None,
    set_: Sets = None,
    only: Only = None,
    seed: Seed = None,
    device: Device = None,
    store: StoreDir = None,
) -> None:
    """Print the tables again: of a folder as they are, of several merged, of a suite anew from the store.

    Example: `o2mkd-bench report results/quickstart --format latex`
    """
    from ..core.errors import UserError

    if against is not None and format in (Format.csv, Format.latex):
        raise UserError(f"--against says nothing in {format.value}; use --format table, md or json")
    if against is not None and out is not None:
        raise UserError("--against is printed and never written; leave --out away")
    folders = [path for path in what if path.is_dir() or path.suffix == ".json"]
    absent = [path for path in what if not path.exists()]
    if absent and len(what) > 1:
        raise UserError(f"{absent[0]}: there is no such folder; several that are given are folders of results")
    if folders:
        if any(given is not None for given in (set_, only, seed, device, store)):
            raise UserError(
                f"{folders[0]} is a folder of results; --set, --only, --seed, --device and --store go with a suite"
            )
        if suites := [path for path in what if path not in folders]:
            raise UserError(f"{suites[0]} is no folder of results as {folders[0]} is; report one after the other")
        document = merged_results(what)
        if out is not None:
            from ..report.write import copied, write

            write(document, out, copied(document, [_folder(path) for path in what]))
    elif len(what) > 1:
        raise UserError(f"{what[1]} is a second suite; report one after the other, and merge their folders if need be")
    else:
        session = open_session(what[0], store, sets=set_, only=only, seed=seed, device=device)
        document = _assembled(session, out)
    sys.stdout.write(render(document, format, against))


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Folder of results.", show_default=False)],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another one.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare two results, cell by cell: scores, their differences, and the ratio of speeds.

    Example: `o2mkd-bench compare results/before results/after`
    """
    from ..report.compare import compare as side_by_side

    found = side_by_side(read_results(a), read_results(b), (str(a), str(b)))
    sys.stdout.write(found.as_json() if json else found.markdown())


def _assembled(session: Session, out: Path | None) -> dict[str, Any]:
    """The document of what is stored; its tables and pictures are written where ``out`` says, else nowhere."""
    if out is None:
        from ..results import document

        return document(session)
    from ..runner import report as written

    results = written(session, out)
    print(f"results in {results.out}", file=sys.stderr)
    return dict(results.document)


def read_results(path: Path) -> dict[str, Any]:
    """The document of a folder of results, or of the ``results.json`` in it.

    Raises:
        UserError: when it is neither.
    """
    from ..report.write import read

    return read(_folder(path))


def merged_results(paths: Sequence[Path]) -> dict[str, Any]:
    """One document of what :func:`read_results` finds in each of ``paths``.

    Raises:
        UserError: as that, and where they are no parts of one table.
    """
    from ..report.merge import merge

    documents = [read_results(path) for path in paths]
    return merge(documents) if len(documents) > 1 else documents[0]


def _folder(path: Path) -> Path:
    return path.parent if path.name == RESULTS else path


def render(document: Mapping[str, Any], format: Format, against: str | None = None) -> str:
    """The tables as text.

    Raises:
        UserError: when the results mix protocols in one column, or have nothing that ``against`` names.
    """
    from ..report import tables
    from ..report.lines import sections
    from ..report.verdicts import BASELINES, Beside, verdicts

    beside = BASELINES if against is None else Beside.parse(against, document)
    if against is not None and not any(verdicts(section, beside) for section in sections(document)):
        print(
            f"--against {against}: no line has two seeds in common with one that differs in nothing else",
            file=sys.stderr,
        )
    match format:
        case Format.csv:
            from ..report.frame import as_csv

            return as_csv(document)
        case Format.md:
            return tables.markdown(document, beside)
        case Format.latex:
            return tables.latex(document)
        case Format.json:
            return tables.as_json(document, beside)
        case Format.table:
            return tables.terminal(document, screen(), colour=coloured(), beside=beside)


def coloured() -> bool:
    """Whether standard output is a terminal that wants colours."""
    from rich.console import Console

    seen = Console(file=sys.stdout)
    return seen.is_terminal and not seen.no_color
