"""What the pictures are drawn on: panels, plain ticks, legends, labels that overlap nothing."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .text import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

ACROSS = 3
"""Panels in a row."""

_STYLE: Any = {
    "font.size": 9,
    # a name with $ is a name
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
_PANEL = (4.2, 3.3)
_TALLEST = 60.0
"""Inches that a legend gets at most: a picture has 65535 pixels a side."""
_LINE = 0.17
"""Inches that a further line of a title takes."""
_LABELS = "labels"
_TITLE, _ENTRY = 42, 44
"""Characters in a line of a title, and of a legend."""
_LINES = 6
"""Lines of one name at most."""
_FONT = 6.5
_CLOSE = 18.0
"""How near points of a picture are, in points, that one label serves."""


@contextmanager
def panels(count: int, path: Path, sharey: bool = False) -> Iterator[tuple[Figure, list[Axes]]]:
    """``count`` axes at most :data:`ACROSS` a row; saved to ``path`` as PNG without dates or versions."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(count, ACROSS)
    down = math.ceil(count / across)
    # not pyplot: it keeps figures alive and obeys the display and the settings file of whoever runs this
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(dpi=150, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        grid = figure.subplots(down, across, squeeze=False, sharey=sharey).ravel()
        for spare in grid[count:]:
            spare.remove()
        used = list(grid[:count])
        yield figure, used
        taller = down * _LINE * max(axes.get_title().count("\n") for axes in used)
        sides = [found.get_window_extent(canvas.get_renderer()) for found in figure.legends]  # type: ignore[no-untyped-call]
        beside = max((side.width / figure.dpi + 0.2 for side in sides), default=0.0)
        least = max((side.height / figure.dpi + 0.2 for side in sides), default=0.0)
        figure.set_size_inches(_PANEL[0] * across + beside, max(0.3 + _PANEL[1] * down + taller, min(least, _TALLEST)))
        for axes in used:
            _plain_ticks(axes)
        # the layout says where points are, and with that where labels have room
        figure.draw_without_rendering()
        for axes in used:
            _place(axes)
        figure.savefig(path, format="png", metadata={"Software": None})


def wrapped(*parts: str) -> str:
    """The title ``part · part · part``, broken between parts, and inside of one that is longer than a panel."""
    found = [""]
    for part in filter(None, parts):
        if len(part) <= _TITLE:
            _append(found, part, " · " if found[-1] else "")
            continue
        found.append("")
        for word in re.findall(r"[^-_/ ]+[-_/ ]*|[-_/ ]+", part):
            for piece in textwrap.wrap(word, _TITLE, drop_whitespace=False):
                _append(found, piece, "")
    said = [line.strip() for line in found if line]
    return "\n".join(said if len(said) <= _LINES else [*said[: _LINES - 1], "…"])


def _append(found: list[str], text: str, between: str) -> None:
    """Put ``text`` at the end of the last line where it fits, else on a line of its own."""
    if len(found[-1]) + len(between) + len(text) <= _TITLE:
        found[-1] += between + text
    else:
        found.append(text)


def empty(axes: Axes, text: str) -> None:
    """Say why there is nothing to see."""
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#666666", transform=axes.transAxes)


def _plain_ticks(axes: Axes) -> None:
    """Numbers as people write them, also between powers of ten where an axis spans few of them."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        values = _ticks(axis)
        texts = [si(float(f"{value:.3g}")) for value in values]
        if len(set(texts)) < len(texts):
            texts = [f"{value:.6g}" for value in values]
        axis.set_major_locator(FixedLocator(values))
        axis.set_major_formatter(FixedFormatter(texts))
        axis.set_minor_formatter(NullFormatter())


def _ticks(axis: Axis) -> list[float]:
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.9 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    for locator in (LogLocator(subs=subs), MaxNLocator(5)):
        found = [float(value) for value in locator.tick_values(low, high) if low <= value <= high]
        if len(found) >= 3:
            break
    return found


def heading(text: str, bold: bool = True) -> Line2D:
    """A line of a legend that has no mark."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=text, gid="heading" if bold else None)


def entries(title: str, means: str, look: Mapping[Any, Any], style: Callable[[Any], dict[str, Any]]) -> list[Line2D]:
    """A legend's lines for names and how each looks; ``means``: what tells them apart.

    One name alone is told apart from nothing, and only named.
    """
    from matplotlib.lines import Line2D

    names = {str(value) or "none": how for value, how in look.items()}
    if len(names) < 2:
        return [heading(_filled(f"{title}: {name}"), bold=False) for name in names]
    found = [Line2D([], [], label=_filled(name), **style(how)) for name, how in names.items()]
    return [heading(f"{title} ({means})"), *found]


def _filled(name: str) -> str:
    return textwrap.fill(name, _ENTRY, max_lines=_LINES, placeholder=" …")


def legend(figure: Figure, found: Sequence[Line2D]) -> None:
    """``found`` beside the panels, headings bold."""
    if not found:
        return
    drawn = figure.legend(handles=found, loc="outside right upper", handlelength=3.2)
    for entry, text in zip(found, drawn.get_texts(), strict=True):
        if entry.get_gid() == "heading":
            text.set_fontweight("bold")


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point; of those of one ``group`` that say the same close together, one is written."""

    text: str
    at: tuple[float, float]
    group: str = ""


def labelled(axes: Axes, labels: Sequence[Label], left: bool) -> None:
    """Leave ``labels`` to be placed when all is drawn, on the ``left`` above their points rather than on the right."""
    setattr(axes, _LABELS, (labels, left))


def _place(axes: Axes) -> None:
    """Write each label where it covers no point and no other label, best where it covers no line; else not at all."""
    labels, left = getattr(axes, _LABELS, ((), False))
    points = _in_points(axes, [label.at for label in labels])
    lines = _along(axes)
    room = _Box(*(axes.get_window_extent().get_points() * 72 / axes.figure.dpi).ravel())
    taken: list[_Box] = []
    said: list[tuple[Label, float, float]] = []
    for label, (x, y) in zip(labels, points, strict=True):
        if any(_same(label, other) and math.hypot(x - u, y - v) < _CLOSE for other, u, v in said):
            continue
        wide, high = 0.62 * _FONT * len(label.text), 0.75 * _FONT
        sides = [(right * (wide / 2 + 5), up * (high / 2 + 4)) for right, up in _sides(left)]
        boxes = [(_Box.around(x + dx, y + dy, wide, high), (dx, dy)) for dx, dy in sides]
        free = [
            (box.covers(lines, 0.5), box, middle)
            for box, middle in boxes
            if box.within(room) and not any(box.meets(one) for one in taken) and not box.covers(points, 3.5)
        ]
        if free:
            _, box, middle = min(free, key=lambda one: one[0])
            taken.append(box)
            said.append((label, x, y))
            style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center_baseline"}
            text = axes.annotate(label.text, label.at, middle, color="#444444", fontsize=_FONT, **style)
            text.set_in_layout(False)


def _same(one: Label, other: Label) -> bool:
    return (one.text, one.group) == (other.text, other.group)


class _Box(NamedTuple):
    """A rectangle of a picture, in points."""

    x0: float
    y0: float
    x1: float
    y1: float

    @classmethod
    def around(cls, x: float, y: float, wide: float, high: float) -> _Box:
        return cls(x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)

    def within(self, room: _Box) -> bool:
        return room.x0 <= self.x0 and self.x1 <= room.x1 and room.y0 <= self.y0 and self.y1 <= room.y1

    def meets(self, other: _Box) -> bool:
        return self.x0 <= other.x1 and other.x0 <= self.x1 and self.y0 <= other.y1 and other.y0 <= self.y1

    def covers(self, points: NDArray[np.float64], margin: float) -> int:
        """How many of ``points`` are in it, or nearer to it than ``margin``."""
        low, high = np.asarray(self[:2]) - margin, np.asarray(self[2:]) + margin
        return int(((points > low) & (points < high)).all(axis=1).sum())


def _sides(left: bool) -> list[tuple[float, float]]:
    first = -1 if left else 1
    return [(first, 1), (0, 1.4), (first, 0), (-first, -1), (0, -1.4), (-first, 0), (-first, 1), (first, -1)]


def _in_points(axes: Axes, at: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    found = axes.transData.transform(np.asarray(at, dtype=np.float64).reshape(-1, 2))
    return np.asarray(found * 72 / axes.figure.dpi, dtype=np.float64)


def _along(axes: Axes) -> NDArray[np.float64]:
    """Points on the curves of ``axes``, some 64 between two of theirs."""
    share = np.linspace(0, 1, 64)[:, None]
    found = [np.empty((0, 2))]
    for line in axes.get_lines():
        corners = _in_points(axes, np.column_stack(line.get_data()))  # type: ignore[arg-type]
        found += [a + share * (b - a) for a, b in itertools.pairwise(corners)]
    return np.concatenate(found)
