"""The table of a run of the benchmarks: ``python benchmarks/table.py results/bench`` reads its JSON files.

A reading that is not there is an empty cell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Readings = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table; ``bar`` is what is asked for, ``low`` and ``high`` its ends."""

    what: str
    value: float | None
    unit: str = ""
    low: float | None = None
    high: float | None = None

    def cells(self) -> list[str]:
        bar = f"≥ {self.low:g}" if self.low is not None else f"≤ {self.high:g}" if self.high is not None else ""
        shown = "" if self.value is None else f"{number(self.value)} {self.unit}".strip()
        return [self.what, shown, f"{bar} {self.unit}".strip() if bar else "", self._met() if bar else ""]

    def _met(self) -> str:
        if self.value is None:
            return ""
        met = (self.low is None or self.value >= self.low) and (self.high is None or self.value <= self.high)
        return "yes" if met else "**no**"


def number(value: float) -> str:
    """Four figures, and whole numbers in full."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def get(found: Readings, *path: str) -> Any:
    """What stands at a path, or None."""
    value: Any = found
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def sampling(found: Readings) -> Iterator[Row]:
    """Images a second of DDIM-50, and how near they are to the ceiling."""
    names = {
        "diffusers_fp32": "(a) diffusers, fp32",
        "diffusers_tf32": "(a) diffusers, fp32 with TF32 in convolutions, torch's default",
        "diffusers_bf16": "(a) diffusers, bf16",
        "by_hand": "(b) compiled network by hand",
        "ours": "(c) ours, one student",
        "ours_4": "(d) ours, K = 4",
    }
    rates: dict[str, dict[str, float | None]] = {}
    for part in ("batch_256", "batch_1024"):
        batch = get(found, part, "batch") or int(part.split("_")[1])
        rates[part] = {name: get(found, part, "images_per_second", name) for name in names}
        for name, text in names.items():
            if part == "batch_256" or name != "diffusers_fp32":
                yield Row(f"DDIM-50, batch {batch}: {text}", rates[part][name], "images/s")
        yield Row(f"batch {batch}: (c) / (b)", ratio(rates[part]["ours"], rates[part]["by_hand"]), "", 0.97)
        yield Row(f"batch {batch}: (d) / (c)", ratio(rates[part]["ours_4"], rates[part]["ours"]), "", 0.98)
    first = rates["batch_256"]
    yield Row("batch 256: (c) / (a fp32)", ratio(first["ours"], first["diffusers_fp32"]), "", 8)
    yield Row("batch 256: (c) / (a fp32 with TF32)", ratio(first["ours"], first["diffusers_tf32"]))
    yield Row("batch 256: (c) / (a bf16)", ratio(first["ours"], first["diffusers_bf16"]), "", 2.5)
    seconds = {name: get(found, "batch_1", "seconds", name) for name in ("diffusers_bf16", "by_hand", "ours")}
    for name, value in seconds.items():
        yield Row(f"batch 1: {names[name]}", None if value is None else 1e3 * value, "ms")
    yield Row("batch 1: (a bf16) / (c), in time", ratio(seconds["diffusers_bf16"], seconds["ours"]), "", 8)
    yield from ceiling(found, first)
    yield from profile(found)


def startup(found: Readings) -> Iterator[Row]:
    """Seconds from networks on the device to the first images, K of them, read side by side."""
    start = {k: get(found, "startup", "seconds", k) for k in ("K=1", "K=8")}
    for k, value in start.items():
        yield Row(f"start to first images, {k}", value, "s")
    yield Row("start, K = 8 / K = 1", ratio(start["K=8"], start["K=1"]), "", high=1.3)


def ceiling(found: Readings, rates: Mapping[str, float | None]) -> Iterator[Row]:
    """Operations a second against those of a large matrix product, at batch 256."""
    rate, flops = get(found, "ceiling", "matrix_flops"), get(found, "ceiling", "flops")
    yield Row("bf16 matrix product, 8192³", None if rate is None else rate / 1e12, "TFLOP/s")
    yield Row("operations of one evaluation", None if flops is None else flops / 1e9, "GFLOP")
    half, half_flops = get(found, "half_width", "images_per_second") or {}, get(found, "half_width", "flops")
    yield Row("half width, batch 256: (b)", half.get("by_hand"), "images/s")
    yield Row("half width, batch 256: (c)", half.get("ours"), "images/s")
    yield Row("half width (c) / full width (c)", ratio(half.get("ours"), rates["ours"]), "", 3)

    def share(images: float | None, operations: float | None) -> float | None:
        return ratio(None if images is None or operations is None else 100 * 50 * images * operations, rate)

    yield Row("(b): share of the matrix rate", share(rates["by_hand"], flops), "%")
    yield Row("(c): share of the matrix rate", share(rates["ours"], flops), "%", 50)
    yield Row("half width (c): share of the matrix rate", share(half.get("ours"), half_flops), "%")


def profile(found: Readings) -> Iterator[Row]:
    """Where the time of one call of the network goes."""
    for who, text in (("by_hand", "(b)"), ("ours", "(c)")):
        spent = get(found, "batch_256", "microseconds", who) or {}
        whole = sum(spent.values())
        for kind in ("convolutions", "products", "normalisation", "attention", "other"):
            yield Row(f"one call, {text}: {kind}", 100 * spent[kind] / whole if whole else None, "%")


def training(found: Readings) -> Iterator[Row]:
    """Student-images a second, seven students (single, K = 2, K = 4) and one."""
    ours = get(found, "ours_7", "images_per_second")
    plain, compiled = get(found, "plain", "seven"), get(found, "plain_compiled", "seven")
    bound, step = get(found, "bound", "seven"), get(found, "ours_7", "step_seconds")
    yield Row("1 student: plain eager bf16 loop", get(found, "plain", "single"), "images/s")
    yield Row("1 student: ours", get(found, "ours_1", "images_per_second"), "images/s")
    yield Row("1 student: bound", get(found, "bound", "single"), "images/s")
    yield Row("7 students: plain eager bf16 loop, one after the other", plain, "images/s")
    yield Row("7 students: the same loop compiled", compiled, "images/s")
    yield Row("7 students: ours, together", ours, "images/s")
    yield Row("7 students: bound", bound, "images/s")
    yield Row("7 students: ours / plain", ratio(ours, plain), "", 2.5)
    yield Row("7 students: ours / bound", ratio(ours, bound), "", 0.9)
    yield Row("7 students: ours / plain compiled", ratio(ours, compiled))
    share = ratio(get(found, "bound", "seconds", "teacher"), step)
    yield Row("7 students: the teacher's share of a step", None if share is None else 100 * share, "%")
    for name, text in (("single", "1 student"), ("seven", "7 students")):
        yield Row(f"{text}: bound, cuDNN's algorithms tried out", get(found, "tried", name), "images/s")
    for k, text in (("K=1", "the whole batch"), ("K=4", "a quarter of it")):
        spent = get(found, "bound", "parts", k) or {}
        seconds = get(found, "bound", "seconds", k)
        yield Row(f"one student's step, {text}", None if seconds is None else 1e3 * seconds, "ms")
        yield Row(f"one student's step, {text}: the host's part", spent.get("host"), "ms")
        for kind in ("convolutions", "products", "normalisation", "attention", "update", "other"):
            yield Row(f"one student's step, {text}: {kind}", spent.get(kind), "ms")
        yield Row(f"one student's step, {text}: kernels", spent.get("kernels"))


def scoring(found: Readings) -> Iterator[Row]:
    """Seconds from images to the number; weights are random, so the number is no FID."""
    images = get(found, "images") or 50_000
    for text, key in (("from nothing", "from nothing"), ("reference known", "cached")):
        for who, name in (("torch_fidelity", "torch-fidelity"), ("ours", "ours")):
            yield Row(f"scoring {images} images, {text}: {name}", get(found, who, "seconds", key), "s")
    yield Row("scoring, from nothing: torch-fidelity / ours, in time", get(found, "ratio_from_nothing"), "", 2)
    yield Row("scoring, reference known: torch-fidelity / ours, in time", get(found, "ratio_cached"), "", 2)
    yield Row("scoring: difference of the numbers", get(found, "difference"), "", high=0.01)
    yield Row("scoring: the same, relative", get(found, "relative_difference"), "", high=1e-4)
    yield Row("scoring: features, ours", get(found, "images_per_second"), "images/s")


def harness(found: Readings) -> Iterator[Row]:
    """Wall time in which no stage was in the making."""
    share, wall = get(found, "share"), get(found, "wall_seconds")
    yield Row("quickstart, " + ("whole" if get(found, "whole") else "an eighth of it"), wall, "s")
    yield Row("the harness's share of it", None if share is None else 100 * share, "%", high=1)


def overheads(found: Readings) -> Iterator[Row]:
    """pytest-benchmark's file."""
    # a finished suite of a thousand cells is recognised in two seconds
    bars = {"test_what_a_finished_run_does_before_it_ends": 2.0}
    for one in found.get("benchmarks", []):
        what = one["name"].removeprefix("test_").replace("_", " ")
        yield Row(what, one["stats"]["median"], "s", high=bars.get(one["name"]))


PARTS: Mapping[str, Callable[[Readings], Iterator[Row]]] = {
    "sampling": sampling,
    "startup": startup,
    "training": training,
    "scoring": scoring,
    "harness": harness,
    "overheads": overheads,
}


def render(folder: Path) -> str:
    """Markdown: one table, and what was left out or failed below it."""
    lines = ["| what | reading | bar | met |", "| --- | --- | --- | --- |"]
    notes: list[str] = []
    for name, rows in PARTS.items():
        path = folder / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        lines += ["| " + " | ".join(row.cells()) + " |" for row in rows(found)]
        if not found:
            notes.append(f"{name}: not read")
        if found.get("device") and name in ("sampling", "startup", "training"):
            notes.append(f"{name}: {found['device']}, torch {found['torch']}, CUDA {found['cuda']}, {found['date']}")
        for part, value in found.items():
            if isinstance(value, Mapping) and (reason := value.get("error") or value.get("left_out")):
                notes.append(f"{name}, {part}: {reason}")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


if __name__ == "__main__":
    print(render(Path(sys.argv[1])))
