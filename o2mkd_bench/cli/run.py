"""Make what a suite lacks, and print the table."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.quiet import quiet
from .common import Device, Json, Only, Seed, Sets, StoreDir, SuiteFile, open_session, path, say_unmatched

if TYPE_CHECKING:
    from ..executors.choose import Placement


def run(
    suite: SuiteFile,
    set_: Sets = None,
    only: Only = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="DIR",
            help="Where tables and pictures go.",
            show_default="results/<suite>, or -2, … beside it where that has rows to lose",
        ),
    ] = None,
    store: StoreDir = None,
    device: Device = None,
    seed: Seed = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    rebuild_changed: Annotated[
        bool, typer.Option("--rebuild-changed", help="Remake what another source of a plugin made.")
    ] = False,
    tracker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Tell a tracker of every event: `jsonl`, `tensorboard`, `wandb`, `{NAME: {OPTION: VALUE}}`.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Worker processes on this machine.", show_default="one a GPU"),
    ] = None,
    executor: Annotated[str, typer.Option(metavar="NAME", help="Who makes the stages: `local`, `ray` …")] = "local",
    address: Annotated[
        str | None, typer.Option(metavar="URL", help="Where the executor's cluster is.", show_default=False)
    ] = None,
    executor_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the executor; may be repeated."),
    ] = None,
    json: Json = False,
) -> None:
    """Make what a suite still lacks, and print its table.

    Stop it when you like: the same command goes on where it stopped. A cell that fails stops no other.

    Example: `o2mkd-bench run suites/quickstart.yaml --set sampling.images=2k --only method=output,feature`
    """
    from ..core.interrupts import exit_code, twice
    from ..runner import results_folder, run_session
    from .observers import Trackers, together
    from .progress import display
    from .report import Format, render

    given = {"workers": workers, "address": address}
    placement = placed(executor, executor_option or (), {key: value for key, value in given.items() if value})
    session = open_session(suite, store, sets=set_, only=only, seed=seed, device=device, download=True)
    if not json:
        say_unmatched(session)
    quiet()
    try:
        with (
            twice(),
            display(sys.stderr) as progress,
            Trackers(tracker or (), out or results_folder(session.suite), session.registry, progress.say) as told,
        ):
            results = run_session(
                session,
                out,
                together(progress, told),
                fail_fast=fail_fast,
                rebuild_changed=rebuild_changed,
                placement=placement,
            )
    except KeyboardInterrupt as error:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(exit_code(error)) from None
    sys.stdout.write(render(results.document, Format.json if json else Format.table))
    sys.stdout.flush()
    print(f"{progress.summary()}; tables and pictures are in {results.out}", file=sys.stderr)
    if results.failed:
        raise typer.Exit(1)


def placed(executor: str, options: Sequence[str], given: Mapping[str, object]) -> Placement:
    """What the command line says of who makes the stages.

    Raises:
        UserError: for an option that is no ``key=value``, or given twice.
    """
    from ..core.errors import UserError
    from ..executors.choose import Placement

    found: dict[str, object] = {}
    for text in options:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UserError(f"--executor-option {text}: write KEY=VALUE")
        found[key] = value
    for key in given.keys() & found.keys():
        raise UserError(f"--executor-option {key}={found[key]}: --{key} {given[key]} says it, too; give one of them")
    return Placement(executor, {**found, **given})
