"""Pictures: quality against speed, error against time, sample grids. The same results give the same bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .lines import Line, Metric, Results, lines, sections
from .text import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe & Ito, "Color universal design": told apart with every common colour blindness; black is the teacher's
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
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
_ACROSS = 3
_HEADING = "heading"
_RING: dict[str, Any] = {"marker": "o", "markersize": 3.5, "markerfacecolor": "white"}
_EDGE: dict[str, Any] = {"linestyle": (0, (4, 4)), "linewidth": 0.8, "alpha": 0.7}

Look = Mapping[Any, Any]


def _cycle(values: Sequence[Any], looks: Sequence[Any]) -> Look:
    return {value: looks[i % len(looks)] for i, value in enumerate(dict.fromkeys(values))}


@contextmanager
def _panels(count: int, path: Path, sharey: bool = False) -> Iterator[tuple[Figure, list[Axes]]]:
    """``count`` axes at most three a row; saved to ``path`` as PNG without dates or versions."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(count, _ACROSS)
    down = math.ceil(count / across)
    # not pyplot: it keeps figures alive and obeys the display and the settings file of whoever runs this
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(1.6 + 4.0 * across, 0.3 + 3.3 * down), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(down, across, squeeze=False, sharey=sharey).ravel()
        for spare in grid[count:]:
            spare.remove()
        yield figure, list(grid[:count])
        figure.savefig(path, format="png", metadata={"Software": None})


def _empty(axes: Axes, text: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, text, ha="center", va="center", color="#666666", transform=axes.transAxes)


@dataclass(frozen=True)
class Looks:
    """How lines look: colour, and a shape, by name; ``pale``: raw weights are drawn pale, beside EMA."""

    colours: Look
    shapes: Look
    sizes: Look
    pale: bool
    baselines: bool


def _looks(drawn: Sequence[Line], colour: str, shape: tuple[str, Sequence[Any]], sizes: Sequence[float]) -> Looks:
    def names(key: str) -> list[str]:
        return sorted(line.text(key) for line in drawn)

    return Looks(
        _cycle(names(colour), PALETTE),
        _cycle(names(shape[0]), shape[1]),
        _cycle(names("student"), sizes),
        pale={"raw", "ema"} <= set(names("weights")),
        baselines="baseline" in names("role"),
    )


def quality_vs_speed(results: Results, path: Path) -> None:
    """The first metric (log) against images/s (log), or MACs per image where nothing was timed; a panel a dataset.

    Colour: method; marker: wrapper, open for a baseline; size: student; the teacher's ladder of steps is a black line
    with its NFE beside it; bars are one standard deviation. Cells that differ only in steps are joined.

    Raises:
        UserError: when the results mix protocols in one column.
    """
    parts = sections(results)
    datasets = list(dict.fromkeys(part.dataset for part in parts))
    scored = [line for part in parts for line in part.lines if line.scores]
    students = [line for line in scored if not line.is_teacher]
    looks = _looks(students, "method", ("wrapper", MARKERS), (6.5, 4.5, 3.2, 8.5))
    with _panels(max(len(datasets), 1), path) as (figure, panels):
        for axes, dataset in zip(panels, datasets or [""], strict=True):
            mine = [line for line in scored if line["dataset"] == dataset]
            if not mine:
                _empty(axes, "no scores yet")
                continue
            _quality(axes, mine, next(part.metrics[0] for part in parts if part.dataset == dataset), looks)
            axes.set_title(dataset)
        _quality_legend(figure, looks, len(students) < len(scored))


def _quality(axes: Axes, mine: Sequence[Line], metric: Metric, looks: Looks) -> None:
    scored = [line for line in mine if metric.column in line.scores]
    timed = any(line.mean("images_per_second") for line in scored)
    key = "images_per_second" if timed else "macs_per_image"
    paths: defaultdict[tuple[str, ...], list[tuple[float, Line]]] = defaultdict(list)
    names = ("role", "teacher", "student", "method", "wrapper", "sampler", "budget", "weights", "spacing", "clip")
    for line in scored:
        if at := line.mean(key):
            paths[tuple(line.text(name) for name in names)].append((at, line))
    for points in paths.values():
        points.sort(key=lambda point: point[0])
        x, members = [at for at, _ in points], [line for _, line in points]
        scores = [line.scores[metric.column] for line in members]
        y, bars = [s.mean for s in scores], [s.sd or 0 for s in scores]
        axes.errorbar(x, y, yerr=bars, capsize=0, elinewidth=1, **_stroke(members[0], looks))
        if members[0].is_teacher:
            _steps(axes, members, (x, y), timed)
    axes.margins(0.08)
    axes.set_xscale("log")
    if all(line.scores[metric.column].mean > 0 for line in scored):
        axes.set_yscale("log")
    axes.set_xlabel("images/s  (more is better)" if timed else "MACs per image  (less is better)")
    axes.set_ylabel(f"{metric.column}  ({'higher' if metric.higher_is_better else 'lower'} is better)")
    _plain_ticks(axes)


def _stroke(line: Line, looks: Looks) -> dict[str, Any]:
    if line.is_teacher:
        return {"color": "black", "marker": ".", "markersize": 5, "linewidth": 1.2, "zorder": 2}
    colour, is_open = looks.colours[line.text("method")], line["role"] == "baseline"
    return {
        "color": colour,
        "marker": looks.shapes[line.text("wrapper")],
        "markersize": looks.sizes[line.text("student")],
        "markerfacecolor": "none" if is_open else colour,
        "markeredgecolor": colour if is_open else "white",
        "markeredgewidth": 1.2 if is_open else 0.5,
        "linewidth": 0.7,
        "alpha": _alpha(line, looks),
        "zorder": 3,
    }


def _alpha(line: Line, looks: Looks) -> float:
    return 0.35 if looks.pale and line["weights"] == "raw" else 1.0


def _steps(axes: Axes, members: Sequence[Line], at: tuple[Sequence[float], Sequence[float]], timed: bool) -> None:
    """NFE beside the ladder, on the side it leans away from: it rises with speed and falls with cost."""
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "right" if timed else "left", "fontsize": 7}
    for line, x, y in zip(members, *at, strict=True):
        axes.annotate(line.text("nfe"), (x, y), (-4 if timed else 4, 3), color="#444444", **style)


def _plain_ticks(axes: Axes) -> None:
    """Numbers as people write them, also between powers of ten where an axis spans few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() != "log":
            continue
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if decades < 0.9 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: si(float(f"{value:.3g}"))))
        axis.set_minor_formatter(NullFormatter())


def _heading(text: str) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="none", label=text, gid=_HEADING)


def _legend(figure: Figure, entries: Sequence[Line2D]) -> None:
    legend = figure.legend(handles=entries, loc="outside right upper")
    for entry, text in zip(entries, legend.get_texts(), strict=True):
        if entry.get_gid() == _HEADING:
            text.set_fontweight("bold")


def _entries(title: str, look: Look, style: Callable[[Any], dict[str, Any]]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    found = [Line2D([], [], label=str(value) or "none", **style(how)) for value, how in look.items()]
    return [_heading(title), *found] if found else []


def _quality_legend(figure: Figure, looks: Looks, teacher: bool) -> None:
    from matplotlib.lines import Line2D

    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none"}
    empty = {**grey, "marker": "s", "markerfacecolor": "white", "markeredgewidth": 1.2}
    entries = [
        *([Line2D([], [], color="black", marker=".", label="teacher, by NFE")] if teacher else []),
        *_entries("method", looks.colours, lambda look: {"color": look, "linewidth": 3}),
        *_entries("wrapper", looks.shapes, lambda look: {**grey, "marker": look}),
        *([Line2D([], [], label="open: baseline", **empty)] if looks.baselines else []),
        *_entries("student", looks.sizes, lambda look: {**grey, "marker": "o", "markersize": look}),
        *([Line2D([], [], color="#bbbbbb", linewidth=3, label="pale: raw weights")] if looks.pale else []),
    ]
    if entries:
        _legend(figure, entries)


def per_timestep(results: Results, path: Path) -> None:
    """The students' error against the teacher over training timesteps (log); a panel a dataset, teacher and method.

    Colour: wrapper, with open circles for a baseline; dashes: student; the mean over seeds where there are several.
    Dashed vertical lines: where one expert hands over to the next.
    """
    probed = [line for line in lines(results) if line["probe"] and line["probe"].get("t")]
    groups: defaultdict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in probed:
        groups[line.text("dataset"), line.text("teacher"), line.text("method")].append(line)
    looks = _looks(probed, "wrapper", ("student", DASHES), (3.5,))
    with _panels(max(len(groups), 1), path, sharey=len({key[0] for key in groups}) == 1) as (figure, panels):
        if not groups:
            _empty(panels[0], "no probes yet")
        for i, (axes, (key, mine)) in enumerate(zip(panels, groups.items(), strict=False)):
            _errors(axes, mine, looks)
            axes.set_title(" · ".join(part for part in key if part))
            axes.set_xlabel("training timestep")
            if i % _ACROSS == 0:
                axes.set_ylabel("student–teacher error")
        _errors_legend(figure, looks, any(line["edges"] for line in probed))


def _errors(axes: Axes, mine: Sequence[Line], looks: Looks) -> None:
    # samplers share a student, hence its probe
    one_each = {tuple(li.text(name) for name in ("student", "wrapper", "budget", "weights", "role")): li for li in mine}
    positive = False
    for line in one_each.values():
        t = line["probe"]["t"]
        errors = [row["probe"]["error"] for row in line.rows if row.get("probe") and row["probe"]["t"] == t]
        error = np.asarray(errors, dtype=np.float64).mean(axis=0)
        positive |= bool((error > 0).any())
        style: dict[str, Any] = {"color": looks.colours[line.text("wrapper")], "alpha": _alpha(line, looks)}
        style["linestyle"] = looks.shapes[line.text("student")]
        axes.plot(t, error, linewidth=1.4, **style, **(_RING if line["role"] == "baseline" else {}))
        for edge in line["edges"] or ():
            axes.axvline(edge, color=style["color"], zorder=1, **_EDGE)
    if positive:
        axes.set_yscale("log")
    _plain_ticks(axes)


def _errors_legend(figure: Figure, looks: Looks, experts: bool) -> None:
    from matplotlib.lines import Line2D

    entries = [
        *_entries("wrapper", looks.colours, lambda look: {"color": look, "linewidth": 2.5}),
        *(
            [Line2D([], [], color="#555555", linestyle="none", label="ringed: baseline", **_RING)]
            if looks.baselines
            else []
        ),
        *([Line2D([], [], color="#555555", label="change of expert", **_EDGE)] if experts else []),
        *_entries("student", looks.shapes, lambda look: {"color": "#333333", "linestyle": look}),
        *([Line2D([], [], color="#bbbbbb", linewidth=2.5, label="pale: raw weights")] if looks.pale else []),
    ]
    if entries:
        _legend(figure, entries)


def samples_grid(images: NDArray[np.uint8], path: Path, columns: int) -> None:
    """Images, uint8 (N, C, H, W) with C = 1 or 3, as one PNG, row by row; small ones enlarged to 64 pixels.

    Raises:
        ValueError: for another dtype or shape, or no images.
    """
    from PIL import Image

    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images) or columns < 1:
        raise ValueError(
            f"a grid takes uint8 (N, 1 or 3, H, W) and at least one column, not {images.dtype} {images.shape}"
        )
    gap = 2
    scale = max(1, math.ceil(64 / max(images.shape[2:])))
    large = images.repeat(scale, axis=2).repeat(scale, axis=3).transpose(0, 2, 3, 1)
    height, width = large.shape[1] + gap, large.shape[2] + gap
    across = min(columns, len(images))
    canvas = np.full(
        (math.ceil(len(images) / across) * height + gap, across * width + gap, large.shape[3]), 255, np.uint8
    )
    for i, image in enumerate(large):
        top, left = gap + i // across * height, gap + i % across * width
        canvas[top : top + height - gap, left : left + width - gap] = image
    Image.fromarray(canvas.squeeze(2) if canvas.shape[2] == 1 else canvas).save(path, format="PNG")
