"""Make what a suite lacks, and print the table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .common import Device, Json, Only, Seed, Sets, StoreDir, SuiteFile, open_session
from .quiet import quiet


def run(
    suite: SuiteFile,
    set_: Sets = None,
    only: Only = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where tables and pictures go.", show_default="results/<suite>"),
    ] = None,
    store: StoreDir = None,
    device: Device = None,
    seed: Seed = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    rebuild_changed: Annotated[
        bool, typer.Option("--rebuild-changed", help="Remake what another source of a plugin made.")
    ] = False,
    tracker: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Tell a tracker of every event: `jsonl`.")
    ] = None,
    json: Json = False,
) -> None:
    """Make what a suite still lacks, and print its table.

    Stop it when you like: the same command goes on where it stopped. A cell that fails stops no other.

    Example: `o2mkd-bench run suites/quickstart.yaml --set sampling.images=2k --only method=output,feature`
    """
    from ..runner import results_folder, run_session
    from .observers import Trackers, together
    from .progress import display
    from .report import Format, render

    session = open_session(suite, store, sets=set_, only=only, seed=seed, device=device, download=True)
    folder = out or results_folder(session.suite)
    quiet()
    try:
        with display(sys.stderr) as progress, Trackers(tracker or (), folder, session.registry, progress.say) as told:
            results = run_session(
                session, folder, together(progress, told), fail_fast=fail_fast, rebuild_changed=rebuild_changed
            )
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    sys.stdout.write(render(results.document, Format.json if json else Format.table))
    sys.stdout.flush()
    print(f"{progress.summary()}; tables and pictures are in {folder}", file=sys.stderr)
    if results.failed:
        raise typer.Exit(1)
