"""What a suite would do, and how far it is. Nothing is computed, and torch is imported for ``--memory`` alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.plan import SEMANTICS
from .common import (
    Device,
    Json,
    Only,
    Seed,
    Sets,
    StoreDir,
    SuiteFile,
    console,
    counted,
    grid,
    open_session,
    print_json,
    say_unmatched,
    styled,
)
from .watch import follow

if TYPE_CHECKING:
    from rich.table import Table

    from ..core.plan import Plan, Stage
    from ..core.session import Session
    from ..core.status import Standing, Survey
    from ..engine.memory import Estimate

COLOURS = {"done": "green", "failed": "red", "missing": "yellow", "unresolved": "magenta"}
_SHORTEST = 8


def plan(
    suite: SuiteFile,
    set_: Sets = None,
    only: Only = None,
    seed: Seed = None,
    device: Device = None,
    store: StoreDir = None,
    stages: Annotated[bool, typer.Option("--stages", help="List the stages one by one.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Reckon the GPU memory of each stage; needs torch.")] = False,
    json: Json = False,
) -> None:
    """Show the cells of a suite, the stages they share, and which of these are in the store.

    Example: `o2mkd-bench plan suites/quickstart.yaml --set "seeds=[0, 1, 2]"`
    """
    from ..core.status import Survey

    session = open_session(suite, store, sets=set_, only=only, seed=seed, device=device)
    survey = Survey(session.plan, session.store)
    missing = survey.missing()
    estimates = _estimates(session) if memory else {}
    if json:
        listed = [_stage_facts(stage, survey, missing) for stage in session.plan.stages.values()]
        listed = [
            {**facts, "memory_bytes": e.total} if (e := estimates.get(facts["stage"])) else facts for facts in listed
        ]
        cells = [_cell_facts(standing) for standing in survey.standings()]
        print_json({"suite": session.suite.name, "stages": listed, "cells": cells})
        return
    say_unmatched(session)
    out = console()
    standings = survey.standings()
    _print_headline(session, f"{counted(len(session.plan.stages), 'stage')}, {len(missing) or 'none'} to make")
    out.print(_stage_list(session.plan, survey, missing) if stages else _kinds(session.plan, survey, missing))
    if memory:
        out.print(_memory(session.plan, estimates) if estimates else " no stage with networks is known yet")
    _print_cells(session.plan, [(standing, _outlook(session.plan, standing, missing)) for standing in standings])
    _print_reasons([standing for standing in standings if standing.cell.unresolved or standing.cell.refused])


def status(
    suite: SuiteFile,
    set_: Sets = None,
    only: Only = None,
    seed: Seed = None,
    device: Device = None,
    store: StoreDir = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the run that is at it, then show the same.")] = False,
) -> None:
    """Show which cells are done, which failed and why, and what was made by another source of a plugin.

    Example: `o2mkd-bench status suites/quickstart.yaml --only method=feature`
    """
    from ..core.status import Survey

    session = open_session(suite, store, sets=set_, only=only, seed=seed, device=device)
    if watch:
        follow(session)
    survey = Survey(session.plan, session.store)
    standings = survey.standings()
    changed = survey.changed(session.registry)
    if json:
        cells = [_cell_facts(standing) for standing in standings]
        stale = [{"stage": stage.identity, "kind": stage.kind, "label": stage.label} for stage in changed]
        print_json({"suite": session.suite.name, "cells": cells, "changed": stale})
        return
    counts = Counter[str](standing.status for standing in standings)
    _print_headline(session, ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state]))
    _print_cells(session.plan, [(standing, standing.status) for standing in standings])
    _print_reasons(standings)
    _print_changed(changed)


def _print_headline(session: Session, said: str) -> None:
    out = console()
    out.print()
    out.print(styled(session.suite.name, "bold"), f" {counted(len(session.plan.cells), 'cell')}, {said}")
    out.print(f"store {session.store.address}", style="dim", soft_wrap=True)


def _kinds(plan: Plan, survey: Survey, missing: Mapping[str, Stage]) -> Table:
    """Stages by kind: how many, how many the store has, how many a run would make."""
    table = grid("stage", "all", "in store", "to make", right=("all", "in store", "to make"))
    for kind in SEMANTICS:
        names = [name for name, stage in plan.stages.items() if stage.kind == kind]
        if not names:
            continue
        todo = sum(name in missing for name in names)
        present = sum(survey.present(name) for name in names)
        table.add_row(kind, str(len(names)), str(present), styled(str(todo), "yellow" if todo else "dim"))
    return table


def _stage_list(plan: Plan, survey: Survey, missing: Mapping[str, Stage]) -> Table:
    table = grid("stage", "kind", "label", "state")
    length = _distinct(plan.stages)
    for name, stage in plan.stages.items():
        state = _state(name, survey, missing)
        table.add_row(name[:length], stage.kind, stage.label, styled(state, _SHADE[state]))
    return table


def _estimates(session: Session) -> dict[str, Estimate]:
    """What each stage takes of a GPU, where that can be reckoned."""
    from ..stages.memory import Memory

    memory = Memory(session.plan, session.registry)
    return {name: found for name, stage in session.plan.stages.items() if (found := memory.of(stage)) is not None}


def _memory(plan: Plan, estimates: Mapping[str, Estimate]) -> Table:
    """GB at the peak, and of these weights, moments and averages: a row for all stages of a kind that take the same."""
    table = grid("stage", "first of them", "all", "resident GB", "peak GB", right=("all", "resident GB", "peak GB"))
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, estimate in estimates.items():
        told = (plan.stages[name].kind, f"{estimate.resident / 1e9:.2f}", f"{estimate.total / 1e9:.2f}")
        rows.setdefault(told, []).append(plan.stages[name].label)
    for (kind, resident, total), labels in rows.items():
        table.add_row(kind, labels[0], str(len(labels)), resident, total)
    return table


_SHADE = {"in store": "green", "to make": "yellow", "not needed": "dim"}


def _state(name: str, survey: Survey, missing: Mapping[str, Stage]) -> str:
    """``not needed``: gone from the store, but so far only of use for what is there already."""
    if survey.present(name):
        return "in store"
    return "to make" if name in missing else "not needed"


def _outlook(plan: Plan, standing: Standing, missing: Mapping[str, Stage]) -> str:
    if standing.cell.unresolved or standing.cell.refused:
        return standing.status
    left = sum(name in missing for name in plan.closure(standing.cell.stages()))
    return f"{left} to make" if left else "done"


def _print_cells(plan: Plan, rows: Sequence[tuple[Standing, str]]) -> None:
    """A row a cell; labels that all cells share are said once above."""
    out = console()
    labels = [standing.cell.labels for standing, _ in rows]
    axes = list(labels[0]) if labels else []
    # that a teacher's row has no method, budget … makes no column worth its width
    found = {axis: list(dict.fromkeys(str(each[axis]) for each in labels if each[axis] != "")) for axis in axes}
    has_teacher = any(standing.cell.role == "teacher" for standing, _ in rows)
    varying = [axis for axis in axes if len(found[axis]) > 1 or (axis == "student" and has_teacher)]
    if same := [f"{axis} {found[axis][0]}" for axis in axes if axis not in varying and found[axis]]:
        out.print(f"everywhere: {', '.join(same)}", style="dim")
    table = grid("cell", *varying, "NFE", "state", right=("NFE", "seed", "steps"))
    length = _distinct([cell.identity for cell in plan.cells])
    for standing, state in rows:
        cell = standing.cell
        named = [_named(cell.role, axis, str(cell.labels[axis])) for axis in varying]
        style = "dim" if cell.role == "teacher" else ""
        shown = styled(state, COLOURS.get(state, "yellow"))
        table.add_row(cell.identity[:length], *named, str(cell.nfe or ""), shown, style=style)
    out.print(table)


def _named(role: str, axis: str, label: str) -> str:
    return "teacher" if role == "teacher" and axis == "student" else label


def _distinct(names: Sequence[str] | Mapping[str, Any]) -> int:
    """How many digits tell the identities apart; at least enough to be remembered as one word."""
    different = set(names)
    return next((n for n in range(_SHORTEST, 20) if len({name[:n] for name in different}) == len(different)), 20)


def _print_reasons(standings: Sequence[Standing]) -> None:
    out = console()
    reasons: Counter[tuple[str, str]] = Counter()
    for standing in standings:
        if standing.status in ("failed", "unresolved"):
            reasons[standing.status, standing.reason] += 1
        for reason in standing.empty:
            reasons["without a score", reason] += 1
    for (what, reason), cells in reasons.items():
        out.print(f" {counted(cells, 'cell')} {what}: {reason}", style="red" if what == "failed" else "yellow")


def _print_changed(changed: Sequence[Stage]) -> None:
    if not changed:
        return
    out = console()
    out.print(f" {counted(len(changed), 'stage')} made by another source of their plugins than is installed now:")
    for stage in changed:
        out.print(f"   {stage.kind} {stage.label}", style="yellow")
    out.print(" `run --rebuild-changed` makes them and what follows from them anew")


def _stage_facts(stage: Stage, survey: Survey, missing: Mapping[str, Stage]) -> dict[str, Any]:
    return {
        "stage": stage.identity,
        "kind": stage.kind,
        "label": stage.label,
        "state": _state(stage.identity, survey, missing),
        "needs": sorted(set(stage.inputs())),
    }


def _cell_facts(standing: Standing) -> dict[str, Any]:
    cell = standing.cell
    return {
        "cell": cell.identity,
        **cell.labels,
        "role": cell.role,
        "baseline_of": list(cell.baseline_of) or None,
        "nfe": cell.nfe,
        "calls": list(cell.calls),
        "stages": list(cell.stages()),
        "status": standing.status,
        "reason": standing.reason or "; ".join(standing.empty) or None,
    }
