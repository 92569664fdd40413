"""What stands below a table: protocols, references, the machine, what failed, and how to read it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .lines import CELL, TIMED, Line, Metric, Results, Section
from .teachers import beside, expected
from .text import decimals, finite, listed, si
from .verdicts import RULE

BASELINE = "†"
VARIES = ("steps", "budget", "weights", "spacing", "clip", "guidance", "precision")
"""What gets a column of its own only where it differs between lines; else one note says it for all."""

_SPEED = dict(zip(TIMED, ("at batch ", "compile ", "on "), strict=True))
_MACHINE = ("cpu", "cores", "platform", "python", "torch")
_NAMED = 4

NO_SPREAD = "n = 1: no spread, nothing is bold"


def values(lines: Iterable[Line], key: str) -> list[Any]:
    """The different values of ``key``, in order; those of students only, where a student has one."""
    every = list(lines)
    own = [line[key] for line in every if not line.is_teacher and line[key] not in (None, "")]
    return list(dict.fromkeys(own or [line[key] for line in every if line[key] not in (None, "")]))


def varying(sections: Sequence[Section]) -> list[str]:
    """The keys of :data:`VARIES` that a table must show in a column for its lines to be told apart."""
    every = [line for section in sections for line in section.lines]
    found = [key for key in VARIES if len(values(every, key)) > 1]
    if "steps" in found and all(line["steps"] in (None, line["nfe"]) for line in every):
        found.remove("steps")
    return found


def notes(results: Results, sections: Sequence[Section], judged: bool = False) -> list[str]:
    """Footnotes as plain sentences, the most needed first; ``judged``: whether verdicts are shown."""
    every = [line for section in sections for line in section.lines]
    found = [*_reading(every), *_protocols(sections), *_references(results, sections), *expected(results)]
    return [
        *found,
        *beside(results, sections),
        *_baselines(every),
        *([RULE] if judged else []),
        *_settings(sections),
        *_namesakes(every),
        *_rounds(every),
        *_sharing(every),
        *_timed(every),
        *_machine(results, every),
        *_gaps(every),
    ]


def _reading(every: Sequence[Line]) -> list[str]:
    counts = [score.n for line in every for score in line.scores.values() if not line.is_teacher]
    found = []
    if any(n > 1 for n in counts):
        found.append(
            "mean ± sample standard deviation over n seeds; bold: within one standard deviation of the best student "
            "of that dataset and NFE (teachers do not compete)"
        )
    if 1 in counts:
        found.append(NO_SPREAD)
    return found


def _protocols(sections: Sequence[Section]) -> list[str]:
    found: dict[str, list[str]] = {}
    for section in sections:
        for metric in section.metrics:
            datasets = found.setdefault(_protocol(metric, section.dataset), [])
            if section.dataset not in datasets:
                datasets.append(section.dataset)
    several = len({section.dataset for section in sections}) > 1
    return [f"{text} ({', '.join(datasets)})" if several else text for text, datasets in found.items()]


def _protocol(metric: Metric, dataset: str) -> str:
    protocol = dict(metric.protocol(dataset))
    better = "higher" if metric.higher_is_better else "lower"
    network = f"network {protocol.pop('network', 'unknown')}"
    if digest := protocol.pop("sha256", None):
        network += f" (sha256 {str(digest)[:12]})"
    reference = f"against {protocol.pop('reference', 'unknown')}"
    inner = [f"{protocol.pop('reference_images')} images"] if protocol.get("reference_images") is not None else []
    inner += [f"hash {str(protocol.pop('reference_hash'))[:12]}"] if protocol.get("reference_hash") else []
    reference += f" ({', '.join(inner)})" if inner else ""
    parts = [f"{better} is better", network, reference]
    if (images := protocol.pop("images", None)) is not None:
        parts.append(f"{images} generated images")
    if rounding := protocol.pop("rounding", None):
        parts.append(str(rounding))
    parts += [f"{key} {value}" for key, value in protocol.items() if isinstance(value, str | int | float)]
    return f"{metric.column}: {'; '.join(parts)}"


def _references(results: Results, sections: Sequence[Section]) -> list[str]:
    """Where the scale begins and ends: noise, held-out real images, and the teacher at its best."""
    found = []
    for dataset in dict.fromkeys(section.dataset for section in sections):
        given = [entry for entry in results.get("references", ()) if entry.get("dataset") == dataset]
        for metric in {m.column: m for s in sections if s.dataset == dataset for m in s.metrics}.values():
            scale = [
                (_counted(e, metric.protocol(dataset)), v)
                for e in given
                if (v := finite((e.get("scores") or {}).get(metric.column))) is not None
            ]
            scale += _best_teachers(metric, [s for s in sections if s.dataset == dataset])
            if scale:
                places = decimals(value for _, value in scale)
                said = ", ".join(f"{what} {value:.{places}f}" for what, value in scale)
                found.append(f"scale of {metric.column} on {dataset}: {said}")
    return found


def _counted(reference: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """What was scored, with its number of images where that is not the protocol's: a score depends on it."""
    images = reference.get("images")
    return f"{reference['what']} ({images})" if images not in (None, protocol.get("images")) else str(reference["what"])


def _best_teachers(metric: Metric, sections: Sequence[Section]) -> list[tuple[str, float]]:
    found = []
    for section in sections:
        lines = [line for line in section.lines if line.is_teacher and metric.column in line.scores]
        if lines:
            best = metric.best(lines)
            found.append((f"teacher {section.teacher} at best ({best['nfe']} NFE)", best.scores[metric.column].mean))
    return found


def _baselines(every: Sequence[Line]) -> list[str]:
    labels = dict.fromkeys(str(label) for line in every for label in line["baseline_of"] or ())
    return [f"{BASELINE} baselines: {', '.join(labels)}"] if labels else []


def _settings(sections: Sequence[Section]) -> list[str]:
    every = [line for section in sections for line in section.lines]
    shown = varying(sections)
    said = [f"{key} {values(every, key)[0]}" for key in VARIES[1:] if key not in shown and values(every, key)]
    return [f"all students: {', '.join(said)}"] if said else []


def _namesakes(every: Sequence[Line]) -> list[str]:
    """Lines that a table shows under one name, though their cells differ, with the first digits of these."""
    groups: defaultdict[tuple[str, ...], list[Line]] = defaultdict(list)
    for line in every:
        groups[tuple(line.text(key) for key in (*CELL, "precision", "nfe", "role", "baseline_of"))].append(line)
    return [
        f"{label(same[0])}: {len(same)} lines of this name differ in what the table does not show; "
        f"cells {' and '.join(map(_cells, same))}"
        for same in groups.values()
        if len(same) > 1
    ]


def _cells(line: Line) -> str:
    known = [str(row["cell"])[:8] for row in line.rows if row.get("cell")]
    return ", ".join(known) or "not known yet"


def _sharing(every: Sequence[Line]) -> list[str]:
    most = max((row.get("shared_with") or 0 for line in every for row in line.rows), default=0)
    said = f"up to {most + 1} students trained on one pass of their teacher; its seconds are shared out equally"
    return [said] if most else []


def _rounds(every: Sequence[Line]) -> list[str]:
    said = "total images count those of step distillation's rounds; batch, steps and each student's images do not"
    return [said] if any(row.get("rounds_images") for line in every for row in line.rows) else []


def _timed(every: Sequence[Line]) -> list[str]:
    several = [label(line) for line in every if len(line.timed) > 1]
    said = f"no speed: {_named(several)}: seeds were timed on different devices or in different ways"
    return [said] if several else []


def _machine(results: Results, every: Sequence[Line]) -> list[str]:
    # a row that nobody has made names the device of whoever planned it
    made = [row["device"] for line in every for row in line.rows if row["status"] == "done" and row.get("device")]
    devices = list(dict.fromkeys(made)) or values(every, "device")
    speeds = [row["speed"] for line in every for row in line.rows if row.get("speed")]
    found = [f"device: {listed(devices, ' and ')}"] if devices else []
    known = {**(results.get("machine") or {}), **(results.get("versions") or {})}
    said = ", ".join(f"{key} {known[key]}" for key in _MACHINE if known.get(key) is not None)
    found += [f"machine: {said}"] if said else []
    speed = [f"{what}{text}" for key, what in _SPEED.items() if (text := _different(speeds, key))]
    found += [f"speed {', '.join(speed)}"] if speed else []
    return ["; ".join(found)] if found else []


def _different(speeds: Sequence[Mapping[str, Any]], key: str) -> str:
    return listed(list(dict.fromkeys(speed[key] for speed in speeds if speed.get(key) is not None)), " and ")


def _gaps(every: Sequence[Line]) -> list[str]:
    rows = [row for line in every for row in line.rows]
    counts = Counter(row["status"] for row in rows)
    gaps = [f"{number} {status}" for status, number in sorted(counts.items()) if status != "done"]
    found = [f"{' and '.join(gaps)} of {len(rows)} rows"] if gaps else []
    for status in sorted(counts):
        for reason in dict.fromkeys(reason for line in every for reason in line.reasons(status)):
            who = list(dict.fromkeys(label(line) for line in every if reason in line.reasons(status)))
            what = "empty columns" if status == "done" else status
            found.append(f"{what}: {_named(who)}: {reason}")
    return found


def _named(who: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = [f"and {len(who) - _NAMED} more"] if len(who) > _NAMED else []
    return ", ".join([*who[:_NAMED], *more])


def label(line: Line) -> str:
    """A cell in a few words: ``digits half output o2mkd ddim 10``."""
    names = ("role", "teacher") if line.is_teacher else ("student", "method", "wrapper")
    said = [line.text(key) for key in ("dataset", *names, "sampler", "steps")]
    return " ".join(part for part in said if part)


def count(line: Line) -> str:
    """How many seeds a line's scores stand on: ``3``, or ``2 of 3`` where some failed, are missing, or lack a score."""
    scored = min((score.n for score in line.scores.values()), default=line.done)
    return str(scored) if scored == len(line.rows) else f"{scored} of {len(line.rows)}"


def si_pair(one: float | None, other: float | None) -> str:
    """``12.4M / 6.2M``; empty where both are missing."""
    return "" if one is None and other is None else f"{si(one) or '?'} / {si(other) or '?'}"
