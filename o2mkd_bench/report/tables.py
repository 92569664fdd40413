"""Tables for people and papers, derived from the results and from nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .columns import Align, Column, T, Text, blocks, markdown_table, plain
from .lines import CELL, Line, Metric, Results, Section, sections
from .notes import BASELINE, count, notes, si_pair, varying
from .text import decimals, listed, markdown_text, shared, si, si_listed, spread
from .verdicts import BASELINES, Beside, verdicts
from .verdicts import columns as verdict_columns

if TYPE_CHECKING:
    from rich.table import Table

_REASON = 56
_FIRST = "≈"
_EACH = ("calls", "images_per_student", "batch_per_student", "steps_per_student")
_ENDLESS = 1 << 14
"""Columns of the console that tables are printed on: it must never be what they are fitted to."""
_STYLES = {"failed": "red", "missing": "yellow", "unresolved": "yellow", "better": "green", "worse": "red"}


def columns(section: Section, extra: Sequence[str], full: bool = True) -> list[Column[Line]]:
    """The columns of a section's table, all of them or a compact choice.

    ``extra``: keys that differ between lines, and must be seen for lines to be told apart.
    """

    def named(key: str, fill: Callable[[Line], str] | None = None, align: Align = "left") -> Column[Line]:
        return plain(key, fill or (lambda line: line.text(key)), align, names=True)

    found = [
        named("student", lambda line: "teacher" if line.is_teacher else line.text("student")),
        named("method"),
        named("wrapper", _wrapper),
        named("sampler"),
        *(named(key) for key in extra),
        named("NFE", lambda line: str(line["nfe"] or ""), "right"),
        *(_scores(section, metric, i == 0, full) for i, metric in enumerate(section.metrics)),
        plain("images/s" if full else "img/s", lambda line: si(line.mean("images_per_second"))),
    ]
    cost: Column[Line] = plain("MACs/image" if full else "MACs", lambda line: si(line.mean("macs_per_image")))
    if not full:
        return [*found, cost, plain("images", lambda line: si(line.mean("images_total"))), plain("n", count)]
    return [
        *found,
        plain("params (total / active)", lambda li: si_pair(li.mean("params_total"), li.mean("params_active"))),
        cost,
        plain("train images (each / total)", _images),
        plain("batch×steps (each)", _batches),
        plain("calls (each)", lambda line: _about(line, ("calls",), listed(line["calls"]))),
        plain("n", count),
    ]


def _wrapper(line: Line) -> str:
    return f"{line.text('wrapper')} {BASELINE if line.is_baseline else ''}".strip()


def _images(line: Line) -> str:
    total = line.mean("images_total")
    each = _about(line, ("images_per_student",), si_listed(line["images_per_student"]))
    return "" if total is None else f"{each or '?'} / {si(total)}"


def _batches(line: Line) -> str:
    batch, steps = shared(line["batch_per_student"]), shared(line["steps_per_student"])
    if steps is None:
        return ""
    sides = [f"({text})" if ", " in (text := listed(side)) else text for side in (batch, steps)]
    return _about(line, ("batch_per_student", "steps_per_student"), f"{sides[0] or '?'}×{sides[1]}")


def _about(line: Line, keys: Sequence[str], text: str) -> str:
    """What the first seed has, marked where others differ."""
    return f"{_FIRST} {text}" if any(map(line.differs, keys)) else text


def _scores(section: Section, metric: Metric, first: bool, full: bool) -> Column[Line]:
    """A metric's column; the ``first`` one also says what failed or is missing, and with ``full`` why."""
    column = metric.column
    places = decimals(line.scores[column].mean for line in section.lines if column in line.scores)

    def fill(line: Line) -> Text:
        if score := line.scores.get(column):
            return Text(spread(score.mean, score.sd, places), score.bold)
        if not first or line.done:
            return Text("")
        reasons = line.reasons(line.standing) if full else []
        text = ": ".join([line.standing, *reasons[:1]])
        return Text(text if len(text) <= _REASON else text[: _REASON - 1] + "…")

    return Column(metric.header, "right", fill)


def markdown(results: Results, beside: Beside = BASELINES) -> str:
    """All tables as one Markdown page; ``beside``: which lines the verdicts compare, here and below.

    Raises:
        UserError: when one column mixes protocols, here and in every function below.
    """
    parts = sections(results)
    extra = varying(parts)
    judged = [verdicts(section, beside) for section in parts]
    page = [f"# {markdown_text(results.get('suite', 'results'))}", ""]
    for section, found in zip(parts, judged, strict=True):
        table = markdown_table(columns(section, extra), section.lines)
        page += [f"## {markdown_text(section.dataset)}, teacher {markdown_text(section.teacher)}", "", table, ""]
        if found:
            page += [f"### {markdown_text(beside.title)}", "", markdown_table(verdict_columns(found, extra), found), ""]
    below = [*notes(results, parts, any(judged)), *_measured(parts), *_made(results)]
    page += [f"- {markdown_text(note)}" for note in below]
    return "\n".join(page) + "\n"


def _measured(parts: Sequence[Section]) -> list[str]:
    every = [line for section in parts for line in section.lines]
    said = f"{_FIRST} of the first seed; its intervals were measured, and those of other seeds differ"
    return [said] if any(line.differs(key) for line in every for key in _EACH) else []


def _made(results: Results) -> list[str]:
    runs = sorted(results.get("runs") or [results], key=lambda run: run.get("created") or "")
    dates = [run["created"] for run in runs if run.get("created")]
    commits = dict.fromkeys(str(run["git_commit"])[:12] for run in runs if run.get("git_commit"))
    said = [f"made {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"] if dates else []
    said += [f"in {len(runs)} runs"] if len(runs) > 1 else []
    said += [f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"] if commits else []
    return [", ".join(said)] if said else []


_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"±": "$\\pm$", "×": "$\\times$", "↓": "$\\downarrow$", "↑": "$\\uparrow$", "†": "$\\dagger$", "…": "\\dots{}"},
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{"<": "$<$", ">": "$>$", "|": "$|$"},
}


def latex(results: Results) -> str:
    """One ``table*`` for each dataset and teacher, with the compact columns; needs the package ``booktabs``."""
    parts = sections(results)
    extra = varying(parts)
    page = []
    for section in parts:
        shown = columns(section, extra, full=False)
        rows = [" & ".join(_latex(column.fill(line)) for column in shown) + r" \\" for line in section.lines]
        page += [
            r"\begin{table*}[t]",
            r"\centering",
            rf"\caption{{{_tex(section.dataset)}, teacher {_tex(section.teacher)}.}}",
            rf"\begin{{tabular}}{{{''.join(column.align[0] for column in shown)}}}",
            r"\toprule",
            " & ".join(_tex(column.header) for column in shown) + r" \\",
            *[r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", r"\end{table*}", ""],
        ]
    return "\n".join([*page, *(f"% {note}" for note in notes(results, parts))]) + "\n"


def _latex(cell: Text) -> str:
    return rf"\textbf{{{_tex(cell.text)}}}" if cell.bold else _tex(cell.text)


def _tex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)


def as_json(results: Results, beside: Beside = BASELINES) -> str:
    """The lines of the tables as JSON text: cells, scores with mean, sd, n and bold, and the footnotes."""
    parts = sections(results)
    judged = [verdicts(section, beside) for section in parts]
    tables = [
        {
            "dataset": section.dataset,
            "teacher": section.teacher,
            "metrics": [asdict(metric) for metric in section.metrics],
            "lines": [_line(line) for line in section.lines],
            "verdicts": [verdict.data() for verdict in found],
        }
        for section, found in zip(parts, judged, strict=True)
    ]
    document = {"suite": results.get("suite"), "tables": tables, "notes": notes(results, parts, any(judged))}
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _line(line: Line) -> dict[str, Any]:
    means = ("images_per_second", "params_total", "params_active", "macs_per_image", "images_total")
    return {
        **{key: line[key] for key in (*CELL, "role", "nfe", "baseline_of", "calls", "edges")},
        "scores": {column: asdict(score) for column, score in line.scores.items()},
        **{key: line.mean(key) for key in means},
        "differs": [key for key in ("calls", "edges") if line.differs(key)],
        "rows": len(line.rows),
        "done": line.done,
        "reasons": {status: line.reasons(status) for status in dict.fromkeys(row["status"] for row in line.rows)},
    }


def terminal(results: Results, width: int | None = 110, colour: bool = False, beside: Beside = BASELINES) -> str:
    """The compact tables and their footnotes as text, with ANSI styles if ``colour``; None for ``width`` is no limit.

    Nothing in a table is cut or wrapped: one that is wider stands in blocks below each other, see ``blocks``.
    """
    import io

    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text as Styled

    parts = sections(results)
    console = Console(
        file=io.StringIO(), width=_ENDLESS, force_terminal=colour, color_system="standard" if colour else None
    )
    extra = varying(parts)
    judged = [verdicts(section, beside) for section in parts]
    for section, found in zip(parts, judged, strict=True):
        console.print(Styled.assemble((section.dataset, "bold"), "  teacher ", (section.teacher, "bold")))
        for shown in blocks(columns(section, extra, full=False), section.lines, width):
            console.print(_rich(shown, section.lines, _group, lambda line: "dim" if line.is_teacher else ""))
        if found:
            console.print(Styled(beside.title, style="bold"))
            for part in blocks(verdict_columns(found, extra), found, width):
                console.print(_rich(part, found, lambda verdict: _group(verdict.line)))
    footnotes = Table.grid(padding=(0, 1))
    for note in notes(results, parts, any(judged)):
        footnotes.add_row(Styled("·", style="dim"), Styled(note, style="dim"))
    console.print(Padding(footnotes, (0, 1)), width=width)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _group(line: Line) -> Any:
    """What lines between two rules have in common."""
    return line.is_teacher or line["nfe"]


def _rich(
    shown: Sequence[Column[T]], lines: Sequence[T], group: Callable[[T], Any], style: Callable[[T], str] = lambda _: ""
) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text as Styled

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0))
    for column in shown:
        table.add_column(Styled(column.header), justify=column.align, no_wrap=True)
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        ends = after is None or group(line) != group(after)
        table.add_row(*(_styled(column.fill(line)) for column in shown), style=style(line), end_section=ends)
    return table


def _styled(cell: Text) -> Any:
    from rich.text import Text as Styled

    return Styled(cell.text, style="bold green" if cell.bold else _STYLES.get(cell.text, ""))
