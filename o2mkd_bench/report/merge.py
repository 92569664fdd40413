"""Results of one suite made in parts, on several machines or on several days, as one document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..core.errors import UserError
from .lines import Results, Row, same_protocol

# From the best: what one document knows of a cell that another has not reached.
_STANDINGS = ("done", "failed", "unresolved", "missing")
_HEAD = ("created", "machine", "versions", "git_commit")
_EXPECTED = ("dataset", "teacher", "column", "sampler", "steps", "seed")


def merge(documents: Sequence[Results]) -> dict[str, Any]:
    """Every cell of ``documents`` once, in the order in which they are first listed.

    A cell that several have is that of the first which finished it; what this lacks, a speed say, is the next one's.
    ``runs`` tells when and where the rows that are done were made, and how many each run gave.

    Raises:
        UserError: for results of several suites, of one dataset with several contents, or under several protocols.
    """
    names = list(dict.fromkeys(str(document.get("suite")) for document in documents))
    if len(names) > 1:
        raise UserError(f"results of the suites {' and '.join(names)} are no parts of one table; name those of one")
    ranked = {id(row): (rank, document) for rank, document in enumerate(documents) for row in document["rows"]}
    cells: dict[str, list[Row]] = {}
    for document in documents:
        for row in document["rows"]:
            cells.setdefault(row["cell"], []).append(row)
    rows, given = [], dict.fromkeys(range(len(documents)), 0)
    for found in cells.values():
        # stable: of two that stand alike, the document named first
        found.sort(key=lambda row: _STANDINGS.index(row["status"]))
        rows.append(_filled(found))
        if found[0]["status"] == "done":
            given[ranked[id(found[0])][0]] += 1
    # a plan made elsewhere says nothing of where the rows come from
    made = [document for rank, document in enumerate(documents) if given[rank]] or documents
    newest = max(made, key=lambda document: document.get("created") or "")
    return {
        **newest,
        "axes": _axes(documents),
        "datasets": _datasets(documents),
        "networks": {key: value for d in reversed(documents) for key, value in d.get("networks", {}).items()},
        "metrics": _metrics(documents),
        "references": _references(documents),
        "teachers": _first(documents, "teachers", _EXPECTED, "found"),
        "rows": rows,
        "runs": [run for rank, document in enumerate(documents) for run in _runs(document, given[rank])],
    }


def _filled(found: Sequence[Row]) -> dict[str, Any]:
    """The first row, with what it does not know from those behind it."""
    merged = dict(found[0])
    for row in found[1:]:
        merged |= {key: value for key, value in row.items() if merged.get(key) in (None, {}) and value is not None}
    if merged["status"] == "done":
        # why another run had not come so far
        merged["reason"] = found[0].get("reason")
    return merged


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


def _runs(document: Results, rows: int) -> Iterable[dict[str, Any]]:
    """The runs that a document is made of; itself, unless it is merged already."""
    if document.get("runs"):
        yield from document["runs"]
    elif rows:
        yield {**{key: document.get(key) for key in _HEAD}, "rows": rows}
