"""Pictures: the same bytes for the same results, and the right things drawn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from results_factory import failed, make, row, two_datasets

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.report.canvas import wrapped
from o2mkd_bench.report.plots import PALETTE, per_timestep, quality_vs_speed, samples_grid

Draw = Callable[[dict[str, Any], Path], None]
WRAPPERS = ("o2mkd-2", "single", "single (total of o2mkd-2)")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Draw, dict[str, Any]], Figure]:
    """Runs a plot function and hands back its figure."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)

    def draw(plot: Draw, results: dict[str, Any]) -> Figure:
        plot(results, tmp_path / "picture.png")
        return figures[-1]

    return draw


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for found in figure.legends for text in found.get_texts()]


def curves(axes: Axes) -> list[Any]:
    """Lines of more than one point that are not interval edges."""
    return [line for line in axes.get_lines() if len(set(line.get_xdata())) > 1]


def rows_without(results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**results, "rows": [{**entry, **changes} for entry in results["rows"]]}


@pytest.mark.parametrize("plot", [quality_vs_speed, per_timestep])
def test_pictures_are_the_same_bytes_without_dates(plot: Draw, tmp_path: Path) -> None:
    results = make(students=("half",), methods=("none", "output"), seeds=(0, 1))
    plot(results, tmp_path / "a.png")
    plot(results, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        assert set(image.info) <= {"dpi"}


def test_settings_of_the_user_neither_count_nor_change(tmp_path: Path) -> None:
    results = make(students=("half",), methods=("none",), seeds=(0,))
    quality_vs_speed(results, tmp_path / "plain.png")
    backend = matplotlib.rcParams["backend"]
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        quality_vs_speed(results, tmp_path / "loud.png")
        assert matplotlib.rcParams["font.size"] == 30
        assert matplotlib.rcParams["backend"] == backend
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "loud.png").read_bytes()


def test_quality_has_the_ladder_and_a_colour_a_method(drawn: Callable[..., Figure]) -> None:
    figure = drawn(quality_vs_speed, make(students=("half",)))
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale(), axes.get_title()) == ("log", "log", "digits")
    assert axes.get_xlabel().startswith("images/s")
    assert axes.get_ylabel() == "fd_digits  (lower is better)"
    assert [text.get_text() for text in axes.texts][:7] == ["4", "5", "8", "10", "15", "20", "50"][::-1]
    assert {text.get_text() for text in axes.texts[7:]} == {"5", "10"}, "students have theirs where there is room"
    assert {"black", *PALETTE[:3]} == {line.get_color() for line in curves(axes)}
    methods = ["attention", "none", "output"]
    bold = ["method (colour)", "wrapper (shape)"]
    headed = [bold[0], *methods, bold[1], *WRAPPERS, "black edge: baseline"]
    assert legend(figure) == ["teacher (black)", *headed, "sampler: ddim", "numbers: NFE"]
    assert [t.get_text() for t in figure.legends[0].get_texts() if t.get_fontweight() == "bold"] == bold


def looks(line: Any) -> tuple[str, str]:
    return line.get_linestyle(), line.get_fillstyle()


def test_samplers_differ_in_line_and_fill(drawn: Callable[..., Figure]) -> None:
    one = make(students=("half",), methods=("none", "output"), seeds=(0,))
    other = [{**r, "sampler": "dpm_solver", "scores": {"fd_digits": r["scores"]["fd_digits"] / 2}} for r in one["rows"]]
    figure = drawn(quality_vs_speed, {**one, "rows": [*one["rows"], *other]})
    by_colour: dict[str, set[tuple[str, str]]] = {}
    for line in curves(figure.axes[0]):
        by_colour.setdefault(line.get_color(), set()).add(looks(line))
    assert by_colour == {colour: {("-", "full"), ("--", "bottom")} for colour in ("black", *PALETTE[:2])}
    handles = dict(zip(legend(figure), figure.legends[0].legend_handles, strict=True))
    assert {looks(handles[name]) for name in ("ddim", "dpm_solver")} == {("-", "full"), ("--", "bottom")}


def test_a_mark_of_the_legend_means_one_thing(drawn: Callable[..., Figure]) -> None:
    both = drawn(quality_vs_speed, make(seeds=(0,)))
    handles = dict(zip(legend(both), both.legends[0].legend_handles, strict=True))
    shapes = {handles[name].get_marker() for name in WRAPPERS}
    assert len(shapes) == 3
    assert handles["black edge: baseline"].get_marker() not in shapes
    # one method is told apart from nothing, and wrappers have the colours
    one = drawn(quality_vs_speed, make(students=("half",), methods=("output",), seeds=(0,)))
    assert "method: output" in legend(one)
    handles = dict(zip(legend(one), one.legends[0].legend_handles, strict=True))
    named = {(handles[name].get_marker(), handles[name].get_color()) for name in handles if name in WRAPPERS}
    assert len({colour for _, colour in named}) == 3
    assert named == {(line.get_marker(), line.get_color()) for line in curves(one.axes[0])} - {("o", "black")}


def test_quality_has_a_panel_a_student_with_the_teacher_in_each(drawn: Callable[..., Figure]) -> None:
    figure = drawn(quality_vs_speed, make(seeds=(0,)))
    assert [axes.get_title() for axes in figure.axes] == ["digits · half", "digits · quarter"]
    half, quarter = ([tuple(line.get_ydata()) for line in curves(axes)] for axes in figure.axes)
    ladder = [tuple(line.get_ydata()) for line in curves(figure.axes[0]) if line.get_color() == "black"]
    assert set(half) & set(quarter) == set(ladder)
    assert len(ladder) == 1
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert [axes.get_ylabel() for axes in figure.axes] == ["fd_digits  (lower is better)", ""]


@pytest.mark.parametrize("role", ["student", "baseline"])
def test_a_baseline_is_marked_whether_it_is_of_the_suite_or_beside_it(role: str, drawn: Callable[..., Figure]) -> None:
    rows = [row("half", "output", name, steps=5, seed=0) for name in ("single", "o2mkd-2")]
    rows[0] |= {"role": role, "baseline_of": ["o2mkd-2"]}
    results = {**make(seeds=(0,)), "rows": rows}
    figure = drawn(quality_vs_speed, results)
    edges = {line.get_marker(): line.get_markeredgecolor() for line in figure.axes[0].get_lines() if line.get_label()}
    handles = dict(zip(legend(figure), figure.legends[0].legend_handles, strict=True))
    assert edges[handles["single"].get_marker()] == "black"
    assert edges[handles["o2mkd-2"].get_marker()] == "white"
    figure = drawn(per_timestep, results)
    ringed = [line.get_color() for line in curves(figure.axes[0]) if line.get_marker() == "o"]
    handles = dict(zip(legend(figure), figure.legends[0].legend_handles, strict=True))
    assert ringed == [handles["single"].get_color()]
    assert "ringed: baseline" in handles


def test_labels_cover_neither_points_nor_each_other(drawn: Callable[..., Figure]) -> None:
    figure = drawn(quality_vs_speed, make(students=("half",), seeds=(0,)))
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 8
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    points = np.concatenate([axes.transData.transform(line.get_xydata()) for line in curves(axes)])
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())


@pytest.mark.parametrize("speeds", [(1010, 1013, 1016), (500, 505, 509), (97, 150, 180)])
def test_a_narrow_axis_has_ticks_that_differ(speeds: tuple[float, ...], drawn: Callable[..., Figure]) -> None:
    rows = [
        row("half", "output", f"w{n}", steps=5, seed=0, speed={"images_per_second": s}) for n, s in enumerate(speeds)
    ]
    (axes,) = drawn(quality_vs_speed, {**make(seeds=(0,)), "rows": rows}).axes
    low, high = axes.get_xlim()
    texts = [
        text.get_text() for at, text in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= at <= high
    ]
    assert len(texts) == len(set(texts)) >= 3


def long_names() -> dict[str, Any]:
    results = make(methods=("none", "output", "attention", "relation"), seeds=(0,))
    names = {"dataset": "lsun_church_outdoor_256", "teacher": "google/ddpm-ema-church-256"}
    for entry in results["rows"]:
        entry |= {**names, "method": entry["method"] and f"{entry['method']}_with_adapters_between_the_widths"}
        entry["wrapper"] = entry["wrapper"] and f"{entry['wrapper']} with options that take many more words to say"
    return results


def test_titles_break_between_words() -> None:
    assert wrapped("digits", "small", "output") == "digits · small · output"
    assert wrapped("lsun_church_outdoor_256", "google/ddpm-church-256", "", "a") == (
        "lsun_church_outdoor_256\ngoogle/ddpm-church-256 · a"
    )
    assert wrapped("attention_transfer_with_adapters_between_the_widths") == (
        "attention_transfer_with_adapters_between_\nthe_widths"
    )
    assert wrapped("digits", "x" * 50) == f"digits\n{'x' * 42}\n{'x' * 8}"
    assert wrapped("") == ""
    assert wrapped("x" * 1000).split("\n") == [*["x" * 42] * 5, "…"], "and a title never becomes the picture"


@pytest.mark.parametrize("plot", [quality_vs_speed, per_timestep])
def test_long_names_are_whole_and_apart(plot: Draw, drawn: Callable[..., Figure]) -> None:
    figure = drawn(plot, long_names())
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    boxes = [*titles, *(found.get_window_extent() for found in figure.legends)]
    assert not [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert all(figure.bbox.contains(*corner) for box in boxes for corner in box.corners())
    assert all(axes.get_position().width * figure.get_figwidth() > 3 for axes in figure.axes), "legends take no room"
    said = " ".join(" ".join([*legend(figure), *(axes.get_title() for axes in figure.axes)]).split())
    assert "lsun_church_outdoor_256" in said
    assert "o2mkd-2 with options that take many more words to say" in said
    assert "attention_with_adapters_between_the_widths" in said.replace(" ", "")


def test_quality_counts_macs_where_nothing_was_timed(drawn: Callable[..., Figure]) -> None:
    (axes,) = drawn(quality_vs_speed, rows_without(make(students=("half",), seeds=(0,)), speed=None)).axes
    assert axes.get_xlabel().startswith("MACs per image")
    ladder = next(line for line in axes.get_lines() if line.get_color() == "black")
    assert list(ladder.get_xdata()) == [48_200_000 * n for n in (4, 5, 8, 10, 15, 20, 50)]


def test_what_was_not_timed_is_named_beside_what_was(drawn: Callable[..., Figure]) -> None:
    whole = make(seeds=(0,))
    wrappers = list(dict.fromkeys(each["wrapper"] for each in whole["rows"] if each["wrapper"]))
    for each in whole["rows"]:
        each["speed"] = None if each["wrapper"] == wrappers[-1] else each["speed"]
    figure = drawn(quality_vs_speed, whole)
    said = legend(figure)
    assert f"output {wrappers[-1]}" in said[said.index("not timed, not drawn") :]
    assert wrappers[-1] not in said[: said.index("not timed, not drawn")]
    # many are counted
    for each in whole["rows"]:
        each["speed"] = each["speed"] if each["role"] == "teacher" else None
    *_, last = legend(drawn(quality_vs_speed, whole))
    names = {(each["method"], each["wrapper"]) for each in whole["rows"] if each["role"] != "teacher"}
    assert last == f"{len(names) - 3} more"


def test_budgets_are_panels_apart_in_their_order(drawn: Callable[..., Figure]) -> None:
    rows = [row("half", "none", "single", steps=n, seed=0, budget=b) for n in (5, 10) for b in ("16k", "128k")]
    figure = drawn(quality_vs_speed, {**make(seeds=(0,)), "rows": rows, "axes": {"budget": ["16k", "128k"]}})
    assert [axes.get_title() for axes in figure.axes] == ["digits · 16k", "digits · 128k"]
    assert [len(curves(axes)) for axes in figure.axes] == [1, 1]


def test_many_samplers_look_each_its_own_way(drawn: Callable[..., Figure]) -> None:
    rows = [row("half", "none", "single", steps=5, seed=0, sampler=f"s{n}") for n in range(8)]
    figure = drawn(quality_vs_speed, {**make(seeds=(0,)), "rows": rows})
    handles = dict(zip(legend(figure), figure.legends[0].legend_handles, strict=True))
    looks_of = [(handles[f"s{n}"].get_linestyle(), handles[f"s{n}"].get_fillstyle()) for n in range(8)]
    assert len(set(map(str, looks_of))) == 8


def test_raw_weights_are_pale_only_beside_ema(drawn: Callable[..., Figure]) -> None:
    rows = [row("half", "output", "single", steps=n, seed=0, weights=w) for n in (5, 10) for w in ("ema", "raw")]
    both = drawn(quality_vs_speed, {**make(seeds=(0,)), "rows": rows})
    assert {line.get_alpha() for line in curves(both.axes[0])} == {0.35, 1.0}
    assert "pale: raw weights" in legend(both)
    raw = drawn(quality_vs_speed, {**make(seeds=(0,)), "rows": rows[1::2]})
    assert {line.get_alpha() for line in curves(raw.axes[0])} == {1.0}


def test_scores_that_no_logarithm_takes_are_drawn_plainly(drawn: Callable[..., Figure]) -> None:
    zeros = rows_without(make(students=("half",), seeds=(0,)), scores={"fd_digits": 0.0})
    (axes,) = drawn(quality_vs_speed, zeros).axes
    assert axes.get_yscale() == "linear"


def test_each_dataset_has_its_panel_even_without_scores(drawn: Callable[..., Figure]) -> None:
    results = two_datasets(make(students=("half",), seeds=(0,)))
    assert [axes.get_title() for axes in drawn(quality_vs_speed, results).axes] == ["digits", "cifar10"]
    cifar = [failed(r, "boom") if r["dataset"] == "cifar10" else r for r in results["rows"]]
    figure = drawn(quality_vs_speed, {**results, "rows": cifar})
    assert [text.get_text() for text in figure.axes[1].texts] == ["no scores yet"]


def test_quality_refuses_mixed_protocols(tmp_path: Path) -> None:
    results = make(seeds=(0,))
    results["metrics"].append({"column": "fd_digits", "protocol": {"network": "other"}})
    with pytest.raises(UserError, match="two protocols"):
        quality_vs_speed(results, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("plot", "text"), [(quality_vs_speed, "no scores yet"), (per_timestep, "no probes yet")])
def test_nothing_to_draw_is_said(plot: Draw, text: str, drawn: Callable[..., Figure]) -> None:
    figure = drawn(plot, {**make(seeds=(0,)), "rows": []})
    assert [found.get_text() for axes in figure.axes for found in axes.texts] == [text]
    assert legend(figure) == []


def test_errors_have_a_panel_a_method_and_a_line_a_student(drawn: Callable[..., Figure]) -> None:
    figure = drawn(per_timestep, make())
    assert [axes.get_title() for axes in figure.axes] == [
        f"digits · small · {m}" for m in ("none", "output", "attention")
    ]
    # two students with two wrappers; with `output` a baseline each; step counts share a student
    assert [len(curves(axes)) for axes in figure.axes] == [4, 6, 4]
    edges = [line for line in figure.axes[0].get_lines() if line not in curves(figure.axes[0])]
    assert {tuple(line.get_xdata()) for line in edges} == {(500, 500)}
    assert {axes.get_yscale() for axes in figure.axes} == {"log"}
    assert "change of expert" in legend(figure)


def test_errors_of_several_budgets_are_panels_apart(drawn: Callable[..., Figure]) -> None:
    rows = [row("half", "none", "single", steps=5, seed=0, budget=budget) for budget in ("16k", "64k")]
    figure = drawn(per_timestep, {**make(seeds=(0,)), "rows": rows})
    assert [axes.get_title() for axes in figure.axes] == [f"digits · small · none · {b}" for b in ("16k", "64k")]
    assert [len(curves(axes)) for axes in figure.axes] == [1, 1]


def test_errors_are_the_mean_over_seeds(drawn: Callable[..., Figure]) -> None:
    rows = [
        row("half", "none", "single", steps=5, seed=seed, probe={"t": [10, 20], "error": error})
        for seed, error in enumerate([[1.0, 2.0], [3.0, 6.0]])
    ]
    figure = drawn(per_timestep, {**make(seeds=(0,)), "rows": rows})
    assert list(curves(figure.axes[0])[0].get_ydata()) == [2.0, 4.0]
    assert "change of expert" not in legend(figure)


def test_a_student_without_error_is_drawn_plainly(drawn: Callable[..., Figure]) -> None:
    rows = [row("half", "none", "single", steps=5, seed=0, probe={"t": [10, 20], "error": [0.0, None]})]
    assert drawn(per_timestep, {**make(seeds=(0,)), "rows": rows}).axes[0].get_yscale() == "linear"


def test_errors_of_more_panels_than_a_row_holds(drawn: Callable[..., Figure]) -> None:
    figure = drawn(per_timestep, make(students=("half",), methods=("a", "b", "c", "output"), seeds=(0,)))
    assert len(figure.axes) == 4


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_enlarges_without_smoothing(channels: int, mode: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, channels, 8, 8), dtype=np.uint8)
    samples_grid(images, tmp_path / "grid.png", 3)
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
        assert (image.mode, image.size) == (mode, (3 * 66 + 2, 2 * 66 + 2))
    second_row = pixels[68:132:8, 68:132:8]
    assert np.array_equal(second_row.reshape(8, 8, channels), images[4].transpose(1, 2, 0))
    assert (pixels[68:, 134:] == 255).all()
    assert (pixels[:2] == 255).all()


def test_grid_leaves_large_images_as_they_are(tmp_path: Path) -> None:
    samples_grid(np.zeros((1, 3, 70, 70), np.uint8), tmp_path / "grid.png", 8)
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (74, 74)


@pytest.mark.parametrize(
    ("images", "columns"),
    [
        (np.zeros((1, 3, 8, 8), np.float32), 1),
        (np.zeros((1, 2, 8, 8), np.uint8), 1),
        (np.zeros((3, 8, 8), np.uint8), 1),
        (np.zeros((0, 3, 8, 8), np.uint8), 1),
        (np.zeros((1, 3, 8, 8), np.uint8), 0),
    ],
)
def test_grid_refuses_what_is_no_grid_of_images(images: Any, columns: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a grid takes uint8"):
        samples_grid(images, tmp_path / "grid.png", columns)
