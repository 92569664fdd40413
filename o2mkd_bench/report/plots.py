"""Pictures: quality against speed, error against time, sample grids. The same results give the same bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .canvas import ACROSS, Label, empty, entries, heading, labelled, legend, panels, wrapped
from .lines import Line, Metric, Results, budgets, lines, sections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# Okabe & Ito, "Color universal design": told apart with every common colour blindness; black is the teacher's
# the second eight are for grids so large that colours would come again
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#666666"),
    *("#00324E", "#7A1F00", "#74C476", "#7B3294", "#F7DC6F", "#1B1B1B", "#FDAE8B", "#B0B0D8"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "d")
DASHES = ("-", "--", ":", "-.")
# a line and a fill each: points that nothing joins still say who drew them
_LINES: Sequence[Any] = ("-", "--", ":", "-.", (0, (6, 2, 1, 2, 1, 2)))
_FILLS = ("full", "bottom", "left", "top", "right")
SAMPLERS = tuple((line, _FILLS[(i + turn) % 5]) for turn in range(5) for i, line in enumerate(_LINES))
_RING: dict[str, Any] = {"marker": "o", "markersize": 3.5, "markerfacecolor": "white"}
_EDGE: dict[str, Any] = {"linestyle": (0, (4, 4)), "linewidth": 0.8, "alpha": 0.7}
# names of what is not drawn
_ABSENT = 4
# no wrapper's
_NEUTRAL: dict[str, Any] = {"color": "#555555", "marker": "h", "markersize": 6.5}

Look = Mapping[Any, Any]


def _cycle(values: Sequence[Any], looks: Sequence[Any]) -> Look:
    return {value: looks[i % len(looks)] for i, value in enumerate(dict.fromkeys(values))}


@dataclass(frozen=True)
class Looks:
    """How lines look: colour by the names of ``coloured``, and a shape; ``pale``: raw weights are pale, beside EMA."""

    coloured: str
    colours: Look
    shapes: Look
    samplers: Look
    pale: bool
    baselines: bool


def _looks(drawn: Sequence[Line], colour: str, shape: tuple[str, Sequence[Any]], samplers: Sequence[str] = ()) -> Looks:
    def names(key: str) -> list[str]:
        return sorted(line.text(key) for line in drawn)

    return Looks(
        colour,
        _cycle(names(colour), PALETTE),
        _cycle(names(shape[0]), shape[1]),
        _cycle(sorted(samplers), SAMPLERS),
        pale={"raw", "ema"} <= set(names("weights")),
        baselines=any(line.is_baseline for line in drawn),
    )


def quality_vs_speed(results: Results, path: Path) -> None:
    """The first metric (log) against images/s (log), or MACs per image where nothing was timed.

    A panel a dataset, and a student and a budget where a dataset has several, each with the teacher. Where some were
    timed, those that were not are named beside it. Colour: method, or wrapper where there is one method, black for the
    teacher; marker: wrapper, with a black edge for a baseline; line and fill: sampler. Points have their NFE beside
    them where there is room; bars are one standard deviation. Cells that differ only in steps are joined.

    Raises:
        UserError: when the results mix protocols in one column.
    """
    parts = sections(results)
    scored = [line for part in parts for line in part.lines if line.scores]
    timed = {line["dataset"] for line in scored if line.mean("images_per_second")}
    untimed = [li for li in scored if li["dataset"] in timed and not li.mean("images_per_second")]
    scored = [li for li in scored if li["dataset"] not in timed or li.mean("images_per_second")]
    students = [line for line in scored if not line.is_teacher]
    colour = "method" if len({line["method"] for line in students}) > 1 else "wrapper"
    looks = _looks(students, colour, ("wrapper", MARKERS), samplers=[line.text("sampler") for line in scored])
    groups: dict[tuple[str, ...], list[Line]] = {}
    places = budgets(results)
    for dataset in dict.fromkeys(part.dataset for part in parts) or [""]:
        groups |= _panels(dataset, [line for line in scored if line["dataset"] == dataset], places)
    shared = len({key[0] for key in groups}) == 1
    with panels(len(groups), path, sharey=shared) as (figure, every):
        for i, (axes, (key, mine)) in enumerate(zip(every, groups.items(), strict=True)):
            if not mine:
                empty(axes, "no scores yet")
                continue
            metric = next(part.metrics[0] for part in parts if part.dataset == key[0])
            _quality(axes, mine, metric, looks, key[0] in timed)
            axes.set_title(wrapped(*key))
            if shared and i % ACROSS:
                axes.set_ylabel("")
        _quality_legend(figure, looks, scored, untimed)


def _panels(dataset: str, mine: Sequence[Line], places: Mapping[str, int]) -> dict[tuple[str, ...], list[Line]]:
    """The lines of each panel of a dataset, by its title; ``places``: the order of budgets."""
    teachers = [line for line in mine if line.is_teacher]
    students = [line for line in mine if not line.is_teacher]
    apart = [key for key in ("student", "budget") if len({line.text(key) for line in students}) > 1]
    found: dict[tuple[str, ...], list[Line]] = {} if students else {(dataset,): teachers}
    for line in sorted(students, key=lambda line: (line.text("student"), places[line.text("budget")])):
        found.setdefault((dataset, *(line.text(key) for key in apart)), [*teachers]).append(line)
    return found


def _quality(axes: Axes, mine: Sequence[Line], metric: Metric, looks: Looks, timed: bool) -> None:
    scored = [line for line in mine if metric.column in line.scores]
    key = "images_per_second" if timed else "macs_per_image"
    paths: defaultdict[tuple[str, ...], list[tuple[float, Line]]] = defaultdict(list)
    names = ("role", "teacher", "student", "method", "wrapper", "sampler", "budget", "weights", "spacing", "clip")
    for line in scored:
        if at := line.mean(key):
            paths[tuple(line.text(name) for name in names)].append((at, line))
    labels = []
    for points in paths.values():
        points.sort(key=lambda point: point[0])
        x, members = [at for at, _ in points], [line for _, line in points]
        scores = [line.scores[metric.column] for line in members]
        y, bars = [s.mean for s in scores], [s.sd or 0 for s in scores]
        axes.errorbar(x, y, yerr=bars, capsize=0, elinewidth=1, **_stroke(members[0], looks))
        # a teacher's ladders are read step by step, students in clusters
        group = " ".join(members[0].text(name) for name in names) if members[0].is_teacher else ""
        labels += [Label(li.text("nfe"), at, group) for li, at in zip(members, zip(x, y, strict=True), strict=True)]
    axes.margins(0.08)
    axes.set_xscale("log")
    if all(line.scores[metric.column].mean > 0 for line in scored):
        axes.set_yscale("log")
    axes.set_xlabel("images/s  (more is better)" if timed else "MACs per image  (less is better)")
    axes.set_ylabel(f"{metric.column}  ({'higher' if metric.higher_is_better else 'lower'} is better)")
    labelled(axes, labels, left=timed)


def _stroke(line: Line, looks: Looks) -> dict[str, Any]:
    dashes, fill = looks.samplers[line.text("sampler")]
    style = {"linestyle": dashes, "fillstyle": fill, "markerfacecoloralt": "white"}
    if line.is_teacher:
        return {**style, "color": "black", "marker": "o", "markersize": 4.5, "linewidth": 1.2, "zorder": 2}
    colour = looks.colours[line.text(looks.coloured)]
    return {
        **style,
        "color": colour,
        "marker": looks.shapes[line.text("wrapper")],
        "markersize": 5.5,
        "markeredgecolor": "black" if line.is_baseline else "white" if fill == "full" else colour,
        "markeredgewidth": 1.0 if line.is_baseline else 0.6,
        "linewidth": 0.8,
        "alpha": _alpha(line, looks),
        "zorder": 3,
    }


def _alpha(line: Line, looks: Looks) -> float:
    return 0.35 if looks.pale and line["weights"] == "raw" else 1.0


def _quality_legend(figure: Figure, looks: Looks, drawn: Sequence[Line], untimed: Sequence[Line]) -> None:
    from matplotlib.lines import Line2D

    names = (f"{line.text('method')} {line.text('wrapper')}".strip() or "teacher" for line in untimed)
    absent = list(dict.fromkeys(names))
    shown = absent if len(absent) <= _ABSENT else [*absent[: _ABSENT - 1], f"{len(absent) - _ABSENT + 1} more"]
    grey: dict[str, Any] = {"color": "#555555", "linestyle": "none"}
    teacher = Line2D([], [], color="black", marker="o", markersize=4.5, label="teacher (black)")
    edged = {**grey, "marker": "h", "markersize": 6.5, "markeredgecolor": "black", "markeredgewidth": 1.2}
    found = [
        *([teacher] if any(line.is_teacher for line in drawn) else []),
        *_told_apart(looks, drawn, grey),
        *([Line2D([], [], label="black edge: baseline", **{**edged, "color": "#cccccc"})] if looks.baselines else []),
        *entries("sampler", "line, fill", looks.samplers, lambda look: {**_NEUTRAL, **_drawn_by(look)}),
        *([Line2D([], [], color="#bbbbbb", linewidth=3, label="pale: raw weights")] if looks.pale else []),
        *([heading("numbers: NFE", bold=False)] if looks.samplers else []),
        *([heading("not timed, not drawn")] if shown else []),
        *(heading(text, bold=False) for text in shown),
    ]
    legend(figure, found)


def _told_apart(looks: Looks, drawn: Sequence[Line], grey: dict[str, Any]) -> list[Line2D]:
    methods = sorted({line.text("method") for line in drawn if not line.is_teacher})
    bars = {name: looks.colours.get(name) for name in methods}
    marks = {name: {**grey, "marker": shape} for name, shape in looks.shapes.items()}
    means = "shape"
    if looks.coloured == "wrapper":
        marks = {name: {**mark, "color": looks.colours[name]} for name, mark in marks.items()}
        means = "colour, shape"
    return [
        *entries("method", "colour", bars, lambda colour: {"color": colour, "linewidth": 3}),
        *entries("wrapper", means, marks, lambda mark: mark),
    ]


def _drawn_by(look: tuple[Any, str]) -> dict[str, Any]:
    return {"linestyle": look[0], "fillstyle": look[1], "markerfacecoloralt": "white", "linewidth": 1.0}


def per_timestep(results: Results, path: Path) -> None:
    """The students' error against the teacher over training timesteps (log).

    A panel a dataset, teacher, method, and budget where there are several.

    Colour: wrapper, with open circles for a baseline; dashes: student; the mean over seeds where there are several.
    Dashed vertical lines: where one expert hands over to the next.
    """
    probed = [line for line in lines(results) if line["probe"] and line["probe"].get("t")]
    groups: defaultdict[tuple[str, ...], list[Line]] = defaultdict(list)
    several = len({line["budget"] for line in probed}) > 1
    for line in probed:
        key = ("dataset", "teacher", "method", *(["budget"] if several else []))
        groups[tuple(map(line.text, key))].append(line)
    looks = _looks(probed, "wrapper", ("student", DASHES))
    with panels(max(len(groups), 1), path, sharey=len({key[0] for key in groups}) == 1) as (figure, every):
        if not groups:
            empty(every[0], "no probes yet")
        for i, (axes, (key, mine)) in enumerate(zip(every, groups.items(), strict=False)):
            _errors(axes, mine, looks)
            axes.set_title(wrapped(*key))
            axes.set_xlabel("training timestep")
            if i % ACROSS == 0:
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
        axes.plot(t, error, linewidth=1.4, **style, **(_RING if line.is_baseline else {}))
        for edge in line["edges"] or ():
            axes.axvline(edge, color=style["color"], zorder=1, **_EDGE)
    if positive:
        axes.set_yscale("log")


def _errors_legend(figure: Figure, looks: Looks, experts: bool) -> None:
    from matplotlib.lines import Line2D

    ringed = Line2D([], [], color="#555555", linestyle="none", label="ringed: baseline", **_RING)
    found = [
        *entries("wrapper", "colour", looks.colours, lambda look: {"color": look, "linewidth": 2.5}),
        *([ringed] if looks.baselines else []),
        *([Line2D([], [], color="#555555", label="change of expert", **_EDGE)] if experts else []),
        *entries("student", "line", looks.shapes, lambda look: {"color": "#333333", "linestyle": look}),
        *([Line2D([], [], color="#bbbbbb", linewidth=2.5, label="pale: raw weights")] if looks.pale else []),
    ]
    legend(figure, found)


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
