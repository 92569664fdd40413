"""From a plan and a store to the results document: everything the tables are made of."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from .core.identity import canonical, decisive, identity
from .core.jobs import Job, lineage, total_images
from .core.machine import machine_record, named_device
from .core.plan import Cell, Trained
from .core.session import Session
from .core.status import Standing, Survey
from .core.uses import Use

SCHEMA_VERSION = 1


def document(session: Session) -> dict[str, Any]:
    """The content of ``results.json``.

    Raises:
        CorruptArtifact: when a stored score, speed, probe or loss is damaged.
    """
    survey = Survey(session.plan, session.store)
    record = machine_record()
    rows = [_row(session, survey, survey.standing(cell)) for cell in session.plan.cells]
    return {
        "schema_version": SCHEMA_VERSION,
        "suite": session.suite.name,
        "suite_path": None if session.suite.path is None else str(session.suite.path),
        "description": session.suite.description,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {**record, "device": session.machine.name},
        "versions": record["versions"],
        "git_commit": record["commit"],
        "axes": {axis: list(labels) for axis, labels in session.suite.labels().items()},
        "datasets": _datasets(session, survey),
        "networks": _networks(session, survey),
        "metrics": _metrics(session, survey),
        "references": _references(session, survey),
        "teacher_steps": list(session.suite.sampling.teacher_steps),
        "teachers": _teachers(session, survey),
        "rows": rows,
    }


def _datasets(session: Session, survey: Survey) -> list[dict[str, Any]]:
    """What each dataset was read from, with the hash of its content, and the identity of what was read."""
    found = []
    for name, stage in session.plan.stages.items():
        if stage.kind == "data":
            meta = session.store.manifest(name).meta if survey.present(name) else {}
            found.append(
                {
                    "dataset": stage.label.removeprefix("data "),
                    "plugin": stage.spec["name"],
                    "source": stage.local["source"],
                    "fingerprint": stage.spec["fingerprint"],
                    "identity": name,
                    "images": {split: meta.get(split) for split in ("train", "test")},
                }
            )
    return found


def _networks(session: Session, survey: Survey) -> dict[str, dict[str, Any]]:
    """Every architecture that a row's ``networks`` names: its config, parameters, and MACs of one evaluation."""
    found: dict[str, dict[str, Any]] = {}
    for cell in session.plan.cells:
        if cell.trained is None:
            continue
        for name, config in zip(cell.trained.students, cell.trained.configs, strict=True):
            key = identity(config)
            if key not in found and survey.present(name):
                found[key] = {**session.store.manifest(name).meta["cost"], "config": dict(config)}
    return found


def _metrics(session: Session, survey: Survey) -> list[dict[str, Any]]:
    """Each dataset's columns, which way is better, and the protocol of the first score there is."""
    found = []
    for use in session.suite.datasets:
        for metric in session.suite.metrics:
            traits = metric.plugin.traits
            for column in traits["columns"](metric.options, use.name):
                found.append(
                    {
                        "dataset": use.label,
                        "column": column,
                        "higher_is_better": traits["higher_is_better"],
                        "protocol": _protocol(session, survey, use.label, column, metric),
                    }
                )
    return found


def _deciding(metric: Use) -> dict[str, Any]:
    """The options that a metric's numbers depend on; the network is told by its own name and hash."""
    options = {key: value for key, value in decisive(metric.options).items() if key != "network"}
    scalar = str | int | float | None
    return {
        f"{metric.plugin.key}.{key}": value if isinstance(value, scalar) else canonical(value)
        for key, value in options.items()
    }


def _protocol(session: Session, survey: Survey, dataset: str, column: str, metric: Use) -> dict[str, Any] | None:
    # of the rows first: their images may have been finished in a way that neither noise nor real ones are
    stored = [name for c in session.plan.cells if c.labels["dataset"] == dataset for name in c.scores]
    stored += [r["score"] for r in session.plan.references if r["dataset"] == dataset]
    for name in stored:
        if survey.present(name):
            content = session.store.read_json(name, "scores.json")
            if column in content["scores"]:
                known = content["protocol"]
                return {
                    "network": known["network"],
                    "sha256": known["sha256"],
                    "reference": known["reference"],
                    "reference_hash": known["reference_fingerprint"],
                    "reference_images": known["reference_count"],
                    # the held-out split has its own size; the rows' number of images is the protocol's
                    "images": session.suite.sampling.images,
                    "rounding": known["rounding"],
                    "resize": known["resize"],
                    **_deciding(metric),
                }
    return None


def _references(session: Session, survey: Survey) -> list[dict[str, Any]]:
    """Scores of noise and of held-out real images, one entry a dataset and kind."""
    merged: dict[tuple[str, str], dict[str, Any]] = {}
    for reference in session.plan.references:
        key = (reference["dataset"], reference["what"])
        entry = merged.setdefault(key, {"dataset": key[0], "what": key[1], "scores": {}})
        if survey.present(reference["score"]):
            content = session.store.read_json(reference["score"], "scores.json")
            entry["scores"] |= content["scores"]
            entry["images"] = content["protocol"]["images"]
    return list(merged.values())


def _teachers(session: Session, survey: Survey) -> list[dict[str, Any]]:
    """What teachers should score and what they do, and their epsilon loss at a few timesteps."""
    return [
        {
            "dataset": one.dataset,
            "teacher": one.teacher,
            "column": one.column,
            "expected": one.value,
            "tolerance": one.tolerance,
            "found": (found := one.found(session.store)),
            "as_expected": None if found is None else not one.complaint(found),
            "sampler": one.sampler,
            "steps": one.steps,
            "seed": one.seed,
            "loss": session.store.read_json(one.loss, "loss.json") if survey.present(one.loss) else None,
        }
        for one in session.plan.expectations
    ]


def _row(session: Session, survey: Survey, standing: Standing) -> dict[str, Any]:
    cell, store = standing.cell, session.store
    done = {name for name in cell.stages() if survey.present(name)}
    scores: dict[str, float] = {}
    for name in cell.scores:
        if name in done:
            scores |= store.read_json(name, "scores.json")["scores"]
    row: dict[str, Any] = {
        "cell": cell.identity,
        "recipe": cell.recipe or None,
        "status": standing.status,
        "reason": standing.reason or "; ".join(standing.empty) or None,
        **cell.labels,
        "role": cell.role,
        "baseline_of": list(cell.baseline_of) or None,
        "nfe": cell.nfe,
        "calls": list(cell.calls),
        "device": _device(session, cell) if cell.samples in done else session.machine.name,
        **cell.facts,
        "scores": scores,
        "speed": store.read_json(cell.speed, "speed.json") if cell.speed in done else None,
        "probe": store.read_json(cell.probe, "probe.json") if cell.probe in done else None,
        "samples": f"samples/{picture_name(cell)}" if cell.samples in done else None,
    }
    if cell.trained is not None:
        row |= training_facts(cell.trained) | _costs(survey, cell, cell.trained)
    return row


def _device(session: Session, cell: Cell) -> str:
    """The model of what drew a row's images, which may have been another machine's."""
    meta = session.store.manifest(cell.samples).meta
    return named_device(meta["device"], meta["machine"], meta["threads"])


def training_facts(trained: Trained) -> dict[str, Any]:
    """Batch, steps and images of every student, from the jobs alone."""
    facts: dict[str, Any] = {
        "students": len(trained.students),
        "networks": [identity(config) for config in trained.configs],
        "edges": list(trained.edges),
        "prediction": trained.prediction,
    }
    if trained.jobs:
        serving = [job for job in trained.jobs if job.serves is not None]
        lines = [lineage(trained.jobs, job) for job in serving]
        facts |= {
            "batch": serving[0].batch,
            "batch_per_student": [round(_mean_batch(line), 1) for line in lines],
            "steps_per_student": [sum(job.steps for job in line) for line in lines],
            "images_per_student": [round(float(total_images(line))) for line in lines],
            "images_total": round(float(total_images(trained.jobs))) + trained.rounds_images,
            "rounds_images": trained.rounds_images,
            "rounds": [f"{r.kind} {len(r.grid)}" for r in trained.rounds],
        }
    return facts


def _mean_batch(line: tuple[Job, ...]) -> float:
    """Images of one optimiser step, on average over a lineage: a warm-up has a larger batch than its experts."""
    return float(total_images(line)) / sum(job.steps for job in line)


def _costs(survey: Survey, cell: Cell, trained: Trained) -> dict[str, Any]:
    """Parameters, MACs and seconds, where the students are there."""
    if not all(survey.present(name) for name in trained.students):
        return {}
    metas = [survey.store.manifest(name).meta for name in trained.students]
    called = [(meta["cost"], calls) for meta, calls in zip(metas, cell.calls, strict=True)]
    seconds, shared_with = _seconds(survey, trained.students)
    return {
        "params_total": sum(cost["params"] for cost, _ in called),
        "params_active": max((cost["params"] for cost, calls in called if calls), default=0),
        "macs_per_image": sum(cost["macs"] * calls for cost, calls in called),
        "train_seconds": seconds if trained.jobs else None,
        "device_seconds": seconds if trained.jobs and str(metas[0].get("device", "")).startswith("cuda") else None,
        "shared_with": shared_with if trained.jobs else None,
    }


def _seconds(survey: Survey, names: tuple[str, ...]) -> tuple[float, int]:
    """Training seconds of these artifacts and of what they continue, each counted once.

    Also with how many other students one of them at most shared a pass of its teacher: then these seconds hold equal
    parts of what was done for all.
    """
    total, most, seen, queue = 0.0, 0, set(), list(names)
    while queue:
        name = queue.pop()
        if name in seen or not survey.present(name):
            continue
        seen.add(name)
        manifest = survey.store.manifest(name)
        if manifest.kind in ("state", "student", "round"):
            total += manifest.meta.get("seconds", 0.0)
            most = max(most, manifest.meta.get("shared_with", 0))
            queue += [n for slot in ("start", "before") for n in manifest.needs.get(slot, ())]
    return total, most


def picture_name(cell: Cell) -> str:
    """A file name for a cell's picture that a person can read."""
    words = [str(v) for v in cell.labels.values() if v not in ("", None)]
    return re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(words)).strip("-").lower()[:150] + f"-{cell.identity[:6]}.png"


def pictures(session: Session, out: Path, draw: Any, count: int = 64) -> None:
    """``samples/*.png``: the first images of every finished cell; image i has the same noise in every picture."""
    import numpy as np

    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    for cell in session.plan.cells:
        if cell.samples and session.store.has(cell.samples):
            path = folder / picture_name(cell)
            images = np.load(session.store.read(cell.samples, "images.npy"), mmap_mode="r", allow_pickle=False)
            draw(np.asarray(images[:count]), path)
