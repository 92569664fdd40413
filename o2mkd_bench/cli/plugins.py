"""What is installed: plugins, the schema of suites they make, this machine; and a first plugin of one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import Json, StoreDir, console, grid, print_json, styled

if TYPE_CHECKING:
    from rich.table import Table

    from ..core.plugins import Plugin, Registry

Kind = Annotated[
    str | None,
    typer.Argument(metavar="[KIND]", help="`samplers`, `kd_methods` …; all if left out.", show_default=False),
]

_SIGNS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "missing": ("✗", "bold red")}

new = typer.Typer(name="new", help="Write something new to start from.", add_completion=False)


def plugins(kind: Kind = None, json: Json = False) -> None:
    """List every plugin: what a suite may name, who brings it, and what kept one from loading.

    Example: `o2mkd-bench plugins samplers`
    """
    from ..core.plugins import registry

    found = registry()
    listed = found.all(_checked(kind))
    if json:
        broken = [vars(one) for one in found.broken]
        print_json({"plugins": [_facts(plugin, found) for plugin in listed], "broken": broken})
        return
    out = console()
    if listed:
        out.print(_table(listed, found))
    else:
        out.print(f"no {kind or ''} plugin is installed")
    for one in found.broken:
        out.print(
            f"{one.distribution} {one.distribution_version} ({one.module}) did not load: {one.error}", style="red"
        )


def schema(
    kind: Kind = None,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="One plugin of that kind.", show_default=False)
    ] = None,
) -> None:
    """Print the JSON schema of a suite, or of the options of plugins, for editors and programs.

    Example: `o2mkd-bench schema datasets image_folder`
    """
    from ..core.plugins import registry
    from ..core.schema import options_schemas, render, suite_schema

    wanted = _checked(kind)
    if wanted is None:
        found = suite_schema(registry())
    elif name is None:
        found = options_schemas(registry(), wanted)
    else:
        found = registry().get(wanted, name).options.model_json_schema()
    sys.stdout.write(render(found))


def doctor(store: StoreDir = None, json: Json = False) -> None:
    """Look at this machine: what is here, what is missing, and how to get it.

    Example: `o2mkd-bench doctor`
    """
    from ..core.quiet import quiet
    from ..core.session import store_at
    from ..doctor import examine

    quiet()
    checks = examine(store_at(store))
    if json:
        print_json([vars(check) for check in checks])
    else:
        table = grid("", "what", "found")
        for check in checks:
            found = styled(check.found, "")
            if check.mend:
                found.append(f"\n{check.mend}", "dim")
            table.add_row(styled(*_SIGNS[check.state]), check.name, found)
        console().print(table)
    if any(check.state == "missing" for check in checks):
        raise typer.Exit(1)


@new.callback()
def _new() -> None: ...


@new.command()
def plugin(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What a suite will call it.", show_default=False)],
    dir: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Where its folder is made.")] = Path(),
) -> None:
    """Write a plugin package that works, with a test, to start from.

    Example: `o2mkd-bench new plugin my-method --dir ~/code`
    """
    from ..scaffold import write_plugin

    print(write_plugin(name, dir))


def _checked(kind: str | None) -> str | None:
    from ..core.complaints import near
    from ..core.errors import UserError
    from ..core.hookspecs import KINDS

    if kind is not None and kind not in KINDS:
        raise UserError(f"no kind of plugin is called {kind!r}{near(kind, KINDS)} (known: {', '.join(KINDS)})")
    return kind


def _table(listed: Sequence[Plugin], found: Registry) -> Table:
    """One row a plugin; who brings it is a column only where that is not always ourselves."""
    from ..core.plugins import BUILTIN

    owners = [f"{one.distribution} {one.distribution_version}" for one in listed]
    mixed = any(one.distribution != BUILTIN for one in listed)
    table = grid("kind", "name", "v", "what it is", "paper", *(["from"] if mixed else []))
    if not mixed:
        table.caption, table.caption_justify = f"all of {owners[0]}", "left"
    before = ""
    for one, owner in zip(listed, owners, strict=True):
        if before and one.kind != before:
            table.add_section()
        write = _facts(one, found)["write"]
        note = f" (write {write})" if write != one.name else ""
        kind = one.kind if one.kind != before else ""
        table.add_row(kind, one.name, one.version, one.summary + note, one.paper, *([owner] if mixed else []))
        before = one.kind
    return table


def _facts(plugin: Plugin, registry: Registry) -> dict[str, Any]:
    """``write``: what a suite must write for it; more than the name where another distribution claims it too."""
    keys = ("kind", "name", "version", "summary", "paper", "distribution", "distribution_version", "target")
    facts = {key: getattr(plugin, key) for key in keys}
    return {**facts, "write": registry.written(plugin)}
