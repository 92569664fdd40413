"""Columns of tables for people: what stands in them, and how wide they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from .text import markdown_text

Align = Literal["left", "right"]
T = TypeVar("T")


@dataclass(frozen=True)
class Text:
    """What stands in one place of a table."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Column(Generic[T]):
    """``fill`` gives what stands in a line; ``names``: it is part of how a line is called."""

    header: str
    align: Align
    fill: Callable[[T], Text]
    names: bool = False

    def width(self, lines: Sequence[T]) -> int:
        """Places on a screen that its header and every one of ``lines`` fit in."""
        from rich.cells import cell_len

        return max(map(cell_len, [self.header, *(self.fill(line).text for line in lines)]))


def plain(header: str, fill: Callable[[T], str], align: Align = "right", names: bool = False) -> Column[T]:
    """A column in which nothing is bold."""
    return Column(header, align, lambda line: Text(fill(line)), names)


def blocks(shown: Sequence[Column[T]], lines: Sequence[T], width: int | None) -> list[list[Column[T]]]:
    """Columns so divided that each block fits in ``width``, all of them beginning with those that name a line.

    One block holds everything where that fits, and where the names beside another column do not.
    """
    # beside its text a column takes a blank and a border, and the table begins with one
    sizes = [column.width(lines) + 2 for column in shown]
    names = [column for column in shown if column.names]
    named = 1 + sum(size for column, size in zip(shown, sizes, strict=True) if column.names)
    rest = [(column, size) for column, size in zip(shown, sizes, strict=True) if not column.names]
    most = max((size for _, size in rest), default=0)
    if width is None or 1 + sum(sizes) <= width or named + most > width:
        return [list(shown)]
    found: list[list[Column[T]]] = []
    left = 0
    for column, size in rest:
        if size > left:
            found.append([*names])
            left = width - named
        found[-1].append(column)
        left -= size
    return found


def markdown_table(shown: Sequence[Column[T]], lines: Sequence[T]) -> str:
    """A pipe table."""
    from tabulate import tabulate

    rows = [[_markdown(column.fill(line)) for column in shown] for line in lines]
    headers = [markdown_text(column.header) for column in shown]
    align = [column.align for column in shown]
    return tabulate(rows, headers, tablefmt="pipe", colalign=align, disable_numparse=True)


def _markdown(cell: Text) -> str:
    return f"**{markdown_text(cell.text)}**" if cell.bold else markdown_text(cell.text)
