"""Results of one suite made in parts, on several machines or on several days, as one document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ..core.errors import UserError
from ..core.plan import AXES
from .lines import CELL, Results, Row, same_protocol
from .text import finite

# From the best: what one document knows of a cell that another has not reached.
_STANDINGS = ("done", "failed", "unresolved", "missing")
# no more than a plan knows of a cell whose stages it cannot name
_LABELS = tuple(label for label in AXES if label != "wrapper")
_HEAD = ("created", "machine", "versions", "git_commit")
_EXPECTED = ("dataset", "teacher", "column", "sampler", "steps", "seed")
_SPENT = ("train_seconds", "device_seconds", "shared_with")
# what rows have in common whose speed is one, of whatever weights (docs/semantics.md)
_PROGRAM = (
    *("dataset", "teacher", "sampler", "steps", "networks", "edges", "calls"),
    *("prediction", "precision", "spacing", "clip", "guidance"),
)


def merge(documents: Sequence[Results]) -> dict[str, Any]:
    """Every cell of ``documents`` once, in the order in which they are first listed.

    A cell that several have is that of the first with the most scores of it; what this lacks, a speed say, is the next
    one's, and a speed that nobody read of it that of a cell that runs the same networks in the same way. It is the
    baseline of all that any of them says, and called what the suite calls it where one of them knows that. A row that
    has no identity yet gives way to those of its name that have one. ``runs`` tells when and where the rows that are
    done were made, and how many each run gave; a row's ``run`` is its place there.

    Raises:
        UserError: for results of several suites, of one dataset with several contents, or under several protocols.
    """
    names = list(dict.fromkeys(str(document.get("suite")) for document in documents))
    if len(names) > 1:
        raise UserError(f"results of the suites {' and '.join(names)} are no parts of one table; name those of one")
    owners = {id(row): document for document in documents for row in document["rows"]}
    rows, runs, made = [], _Runs(), []
    for found in _cells(documents):
        # stable: of two that stand alike, the document named first
        found.sort(key=lambda row: (_STANDINGS.index(row["status"]), -len(scored(row))))
        merged = _filled(found)
        if merged["status"] == "done":
            made.append(owners[id(found[0])])
            merged["run"] = runs.of(made[-1], found[0])
        rows.append(merged)
    _share_speeds(rows)
    # a plan made elsewhere says nothing of where the rows come from
    newest = max(made or documents, key=lambda document: document.get("created") or "")
    return {
        **newest,
        "axes": _axes(documents),
        "datasets": _datasets(documents),
        "networks": {key: value for d in reversed(documents) for key, value in d.get("networks", {}).items()},
        "metrics": _metrics(documents),
        "references": _references(documents),
        "teachers": _first(documents, "teachers", _EXPECTED, "found"),
        "teacher_steps": list(dict.fromkeys(n for document in documents for n in document.get("teacher_steps") or ())),
        "rows": rows,
        "runs": runs.told,
    }


def _cells(documents: Sequence[Results]) -> list[list[Row]]:
    """The rows of each cell."""
    every = [row for document in documents for row in document["rows"]]
    known: defaultdict[Hashable, dict[Hashable, None]] = defaultdict(dict)
    for row in every:
        for name in _names(row) if row["cell"] else ():
            known[name][row["cell"]] = None
    cells: dict[Hashable, list[Row]] = {}
    for row in every:
        if row["cell"]:
            cells.setdefault(row["cell"], []).append(row)
            continue
        names = _names(row)
        # it leaves its place in the order to them
        meant = [cell for name in names for cell in known[name]]
        for cell in meant or names[:1]:
            cells.setdefault(cell, [])
        if not meant:
            cells[names[0]].append(row)
    return list(cells.values())


def _names(row: Row) -> list[Hashable]:
    """What a row without an identity is known by: its labels, or those with what it is the baseline of."""
    labels = tuple(row.get(label) for label in _LABELS)
    return [(*labels, wrapper) for wrapper in (row.get("wrapper"), *(row.get("baseline_of") or ()))]


class _Runs:
    """The runs that made the rows of a merged document, each once."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def of(self, document: Results, row: Row) -> int:
        """The place of the run that made a row of ``document``; it made one more."""
        source = document["runs"][row.get("run") or 0] if document.get("runs") else document
        head = {key: source.get(key) for key in _HEAD}
        places = (place for place, run in enumerate(self.told) if {key: run[key] for key in _HEAD} == head)
        place = next(places, len(self.told))
        if place == len(self.told):
            self.told.append({**head, "rows": 0})
        self.told[place]["rows"] += 1
        return place


def _filled(found: Sequence[Row]) -> dict[str, Any]:
    """The first row, with what it does not know from those behind it."""
    merged = dict(found[0])
    for row in found[1:]:
        # seconds on another machine are of another training
        spent = _SPENT if merged.get("train_seconds") is not None else ()
        merged |= {
            key: value
            for key, value in row.items()
            if merged.get(key) in (None, {}) and value is not None and key not in spent
        }
    # as a baseline it has a name of what it stands beside
    own = next((row for row in found if row.get("role") != "baseline"), found[0])
    merged |= {key: own[key] for key in (*AXES, "role", "recipe") if own.get(key) is not None}
    # a slice does not plan the rows of all others
    of = dict.fromkeys(text for row in found for text in row.get("baseline_of") or ())
    merged["baseline_of"] = list(of) or None
    if merged["status"] == "done":
        # why another run had not come so far
        merged["reason"] = found[0].get("reason")
    else:
        merged.pop("run", None)
    return merged


def _share_speeds(rows: Sequence[dict[str, Any]]) -> None:
    """Give each row without a reading that of another seed of its line, else one of its device, of the same networks.

    So that no line comes to have speeds of two kinds.
    """
    of_line: dict[str, Any] = {}
    of_device: dict[tuple[Any, str], Any] = {}
    for row in rows:
        if speed := row.get("speed"):
            of_line.setdefault(_text(row, CELL + _PROGRAM), speed)
            of_device.setdefault((speed.get("device"), _text(row, _PROGRAM)), speed)
    for row in rows:
        if row.get("networks") and not row.get("speed"):
            own = of_line.get(_text(row, CELL + _PROGRAM))
            row["speed"] = own or of_device.get((row.get("device"), _text(row, _PROGRAM)))


def _text(row: Row, keys: Sequence[str]) -> str:
    return repr([row.get(key) for key in keys])


def scored(row: Row) -> set[str]:
    """The columns in which a row has a score."""
    return {column for column, value in (row.get("scores") or {}).items() if finite(value) is not None}


def _axes(documents: Sequence[Results]) -> dict[str, list[Any]]:
    axes: dict[str, dict[Any, None]] = {}
    for document in documents:
        for axis, labels in document.get("axes", {}).items():
            axes.setdefault(axis, {}).update(dict.fromkeys(labels))
    return {axis: list(labels) for axis, labels in axes.items()}


def _datasets(documents: Sequence[Results]) -> list[dict[str, Any]]:
    every = [entry for document in documents for entry in document.get("datasets", ())]
    for dataset in dict.fromkeys(entry["dataset"] for entry in every):
        entries = [entry for entry in every if entry["dataset"] == dataset]
        if len({entry.get("fingerprint") for entry in entries}) > 1:
            sources = " and ".join(dict.fromkeys(str(entry.get("source")) for entry in entries))
            raise UserError(f"dataset {dataset} has another content in {sources}; its results are not comparable")
        if len({entry["identity"] for entry in entries if entry.get("identity")}) > 1:
            raise UserError(
                f"dataset {dataset} was read with different options, and its results are not comparable; give it one "
                "label for each way of reading it"
            )
    return _first(documents, "datasets", ("dataset",), "images")


def _metrics(documents: Sequence[Results]) -> list[dict[str, Any]]:
    merged = _first(documents, "metrics", ("dataset", "column"), "protocol")
    known = {(entry.get("dataset"), entry["column"]): entry.get("protocol") or {} for entry in merged}
    for entry in (entry for document in documents for entry in document.get("metrics", ())):
        if protocol := entry.get("protocol"):
            same_protocol(entry["column"], known[entry.get("dataset"), entry["column"]], protocol)
    return merged


def _references(documents: Sequence[Results]) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for document in documents:
        for entry in document.get("references", ()):
            place = merged.setdefault((entry["dataset"], entry["what"]), {**entry, "scores": {}})
            place["scores"] = {**entry.get("scores", {}), **place["scores"]}
            place |= {key: value for key, value in entry.items() if key not in place}
    return list(merged.values())


def _first(documents: Sequence[Results], part: str, name: Sequence[str], wanted: str) -> list[dict[str, Any]]:
    """The entries of a part, each once: the first in which ``wanted`` is known, else the first."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in (entry for document in documents for entry in document.get(part, ())):
        key = tuple(entry.get(field) for field in name)
        if key not in merged or (not _known(merged[key].get(wanted)) and _known(entry.get(wanted))):
            merged[key] = entry
    return list(merged.values())


def _known(value: Any) -> bool:
    return any(item is not None for item in value.values()) if isinstance(value, Mapping) else value is not None
