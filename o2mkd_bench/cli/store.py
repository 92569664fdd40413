"""The store of finished stages: look, tidy, check, carry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Json, StoreDir, bytes_text, console, counted, grid, open_session, print_json

app = typer.Typer(
    name="store",
    help="Look into the store of finished stages, tidy it, check it, carry it elsewhere.",
    add_completion=False,
)

DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")]
PartSize = Annotated[str, typer.Option(metavar="SIZE", help="Largest size of a file.")]


@app.command()
def ls(store: StoreDir = None, json: Json = False) -> None:
    """List what the store holds.

    Example: `o2mkd-bench store ls`
    """
    from ..core.session import existing_store

    place = existing_store(store)
    found = place.ls()
    sizes = {manifest.identity: sum(file.size for file in manifest.files.values()) for manifest in found}
    if json:
        print_json(
            [
                {
                    **manifest.model_dump(mode="json", include={"identity", "kind", "label", "created"}),
                    "bytes": sizes[manifest.identity],
                    "files": list(manifest.files),
                }
                for manifest in found
            ]
        )
        return
    out = console()
    if found:
        table = grid("artifact", "kind", "label", "size", "made", right=("size",))
        for manifest in found:
            size, made = bytes_text(sizes[manifest.identity]), manifest.created[:16].replace("T", " ")
            table.add_row(manifest.identity[:8], manifest.kind, manifest.label, size, made)
        out.print(table)
    held = f"{counted(len(found), 'artifact')}, {bytes_text(sum(sizes.values()))}"
    out.print(f"{held} in {place.address}", soft_wrap=True)


@app.command()
def gc(
    suites: Annotated[list[Path], typer.Argument(metavar="SUITE…", help="Suites to keep.", show_default=False)],
    dry_run: DryRun = False,
    device: Device = None,
    store: StoreDir = None,
) -> None:
    """Remove all that the named suites, as planned on this machine, do not need.

    Example: `o2mkd-bench store gc suites/*.yaml --dry-run`
    """
    from ..core.errors import UserError
    from ..core.runlog import at_work
    from ..core.session import existing_store

    place = existing_store(store)
    if not dry_run and (runs := at_work(place)):
        raise UserError(f"{', '.join(runs)} is at work in {place.address}, whose artifacts would go; wait for its end")
    keep: set[str] = set()
    for suite in suites:
        session = open_session(suite, store, device=device)
        for cell in session.plan.cells:
            if cell.unresolved:
                raise UserError(
                    f"{suite}: what it needs is not known ({cell.unresolved}); run it first, or leave gc be"
                )
        keep |= session.plan.stages.keys()
    freed = place.gc(keep, dry_run)
    verb = "would remove" if dry_run else "removed"
    print(f"{verb} {counted(len(freed.ids), 'artifact')}, {bytes_text(freed.bytes)}")


@app.command()
def verify(
    store: StoreDir = None,
    discard: Annotated[bool, typer.Option("--discard", help="Put damaged artifacts aside.")] = False,
) -> None:
    """Read every file in the store and compare it with its hash; exit code 1 where something is damaged.

    A run reads only what it needs; `--discard` makes it miss, and make anew, what else is damaged.

    Example: `o2mkd-bench store verify`
    """
    from ..core.session import existing_store

    place = existing_store(store)
    damaged = place.verify()
    for error in damaged:
        print(error)
        if discard:
            place.discard(error.identity, error.reason)
    if damaged:
        when = "" if discard else " as it meets them, and all after `store verify --discard`"
        print(
            f"{counted(len(damaged), 'artifact')} damaged; `run` of their suites makes them anew{when}", file=sys.stderr
        )
        raise typer.Exit(1)
    print(f"{counted(len(place.ls()), 'artifact')} sound")


@app.command()
def export(
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder.", show_default=False)],
    suites: Annotated[
        list[Path] | None, typer.Argument(metavar="[SUITE…]", help="What these need alone.", show_default=False)
    ] = None,
    part_size: PartSize = "16M",
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", metavar="KIND", help="Only these kinds, as `store ls` has them: `student,edges`; may be repeated."
        ),
    ] = None,
    state: Annotated[
        bool, typer.Option("--state", help="Training states too, which only a resumed run needs.")
    ] = False,
    device: Device = None,
    store: StoreDir = None,
) -> None:
    """Copy artifacts into a folder of files of limited size, for another machine.

    Example: `o2mkd-bench store export carried suites/quickstart.yaml --kind student`
    """
    from ..core.session import existing_store
    from ..core.transfer import export_artifacts, parse_size

    place = existing_store(store)
    size = parse_size(part_size)
    chosen = _kinds(kinds or (), state)
    stored = [manifest.identity for manifest in place.ls() if manifest.kind in chosen]
    if suites:
        plans = [open_session(suite, store, device=device).plan for suite in suites]
        wanted = {name for plan in plans for name, stage in plan.stages.items() if stage.kind in chosen}
        stored = [name for name in stored if name in wanted]
        if absent := len(wanted) - len(stored):
            print(f"{counted(absent, 'stage')} of {counted(len(wanted), 'stage')} not made yet", file=sys.stderr)
    print(f"exported {counted(len(export_artifacts(place, stored, dest, size)), 'artifact')} to {dest}")


def _kinds(given: Sequence[str], state: bool) -> set[str]:
    """The kinds of stages that are named, or all but training states; with ``state`` these too."""
    from ..core.complaints import not_allowed
    from ..core.errors import UserError
    from ..core.plan import SEMANTICS

    named = [word.strip() for text in given for word in text.split(",")]
    for word in named:
        if word not in SEMANTICS:
            raise UserError(f"--kind: {not_allowed(word, list(SEMANTICS))}")
    return set(named or SEMANTICS.keys() - {"state"}) | ({"state"} if state else set())


@app.command("import")
def import_(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="The folder of an export.", show_default=False)],
    store: StoreDir = None,
) -> None:
    """Take over what an export holds and the store lacks; everything is verified first.

    Example: `o2mkd-bench store import carried`
    """
    from ..core.session import store_at
    from ..core.transfer import import_artifacts

    place = store_at(store)
    print(f"imported {counted(len(import_artifacts(place, src)), 'artifact')} into {place.address}")
