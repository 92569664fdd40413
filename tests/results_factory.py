"""Synthetic results, shaped as a run leaves them; every number is a pure function of the cell and the seed."""

from __future__ import annotations

import copy
import hashlib
import zlib
from typing import Any

PROTOCOL = {
    "network": "resnet-digits",
    "sha256": "0123456789abcdef" * 4,
    "reference": "train",
    "reference_hash": "fedcba9876543210" * 4,
    "reference_images": 1497,
    "images": 1000,
    "rounding": "uint8 round",
    "resize": "none",
}
COST = {"teacher": 48_200_000, "half": 12_600_000, "quarter": 3_300_000}
PARAMS = {"teacher": 1_790_000, "half": 449_000, "quarter": 113_000}
LEVEL = {"none": 1.25, "output": 1.0, "attention": 0.94}


def jitter(*parts: Any) -> float:
    """A number in [-1, 1) that looks random."""
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:8], 16) / 2**31 - 1


def row(student: str, method: str, wrapper: str, *, steps: int, seed: int, **changes: Any) -> dict[str, Any]:
    """One finished row; an empty ``student`` makes a teacher's row."""
    size = student or "teacher"
    experts = 2 if wrapper.startswith("o2mkd") else 1
    score = 9 + 160 / steps**1.3
    score *= (
        {"teacher": 0.7, "half": 1.0, "quarter": 1.5}[size] * LEVEL.get(method, 1.0) * (0.88 if experts > 1 else 1.0)
    )
    score += 0.4 * jitter(student, method, wrapper, steps, seed)
    level = {"teacher": 0.0, "half": 0.3, "quarter": 0.5}[size] * LEVEL.get(method, 1.0) * (0.8 if experts > 1 else 1.0)
    images = 50_000
    found = {
        "cell": f"{zlib.crc32(repr((student, method, wrapper, steps)).encode()):08x}",
        "status": "done",
        "reason": None,
        "dataset": "digits",
        "teacher": "small",
        "student": student,
        "method": method,
        "wrapper": wrapper,
        "role": "student" if student else "teacher",
        "baseline_of": None,
        "sampler": "ddim",
        "steps": steps,
        "nfe": steps,
        "spacing": "trailing",
        "clip": "x0",
        "budget": "50k" if student else "",
        "seed": seed,
        "weights": "ema" if student else "raw",
        "students": experts,
        "edges": [500] if experts > 1 else [],
        "calls": [steps // 2, steps - steps // 2] if experts > 1 else [steps],
        "batch": 128,
        "batch_per_student": 128 / experts,
        "steps_per_student": [391] * experts,
        "images_per_student": images / experts if student else None,
        "images_total": images if student else None,
        "rounds_images": 0,
        "params_total": PARAMS[size] * experts,
        "params_active": PARAMS[size],
        "macs_per_image": COST[size] * steps,
        "train_seconds": 31.25 + jitter("s", seed, method),
        "device_seconds": 30.5,
        "precision": "fp32",
        "device": "cpu",
        "prediction": "epsilon",
        "scores": {"fd_digits": score},
        "speed": {
            "images_per_second": 6.1e9 / COST[size] / steps * (1 + 0.02 * jitter(size, steps)),
            "latency_ms_median": 1.2 * steps,
            "latency_ms_p90": 1.4 * steps,
            "batch": 128,
            "peak_memory_mb": 212.5,
            "device": "cpu",
            "compile": "off",
        },
        "probe": None,
        "samples": f"samples/{size}-{method}-{wrapper}-{steps}-{seed}.png",
    }
    if student:
        ts = list(range(25, 1000, 50))
        error = [level * ((t + 20) / 1000) ** -0.7 * 0.01 * (1 + 0.1 * jitter(t, seed, method)) for t in ts]
        found["probe"] = {"t": ts, "error": error}
    return {**found, **changes}


def failed(found: dict[str, Any], reason: str | None, status: str = "failed") -> dict[str, Any]:
    """The same cell as it stands when it could not be made."""
    empty = {"scores": {}, "speed": None, "probe": None, "samples": None, "device": None, "train_seconds": None}
    return {**found, **empty, "status": status, "reason": reason, "device_seconds": None}


def make(
    students: tuple[str, ...] = ("half", "quarter"),
    methods: tuple[str, ...] = ("none", "output", "attention"),
    wrappers: tuple[str, ...] = ("single", "o2mkd-2"),
    steps: tuple[int, ...] = (5, 10),
    seeds: tuple[int, ...] = (0, 1, 2),
) -> dict[str, Any]:
    """A whole document: teacher ladder, the grid, and one equal-total baseline a student and step count."""
    rows = [row("", "", "", steps=n, seed=s, students=1) for n in (4, 5, 8, 10, 15, 20, 50) for s in seeds]
    for student in students:
        for n in steps:
            rows += [row(student, m, w, steps=n, seed=s) for m in methods for w in wrappers for s in seeds]
            base = {"role": "baseline", "baseline_of": ["equal_total of o2mkd-2"]}
            longer = [row(student, "output", "single (total of o2mkd-2)", steps=n, seed=s, **base) for s in seeds]
            for found in longer:
                found["scores"] = {column: 0.93 * value for column, value in found["scores"].items()}
                found["probe"]["error"] = [0.9 * e for e in found["probe"]["error"]]
            rows += longer
    return {
        "schema_version": 1,
        "suite": "quickstart",
        "created": "2026-01-02T03:04:05Z",
        "machine": {"cpu": "Test CPU", "cores": 2, "python": "3.11", "memory": 2**34, "gpus": []},
        "versions": {"torch": "2.6.0"},
        "git_commit": "c0ffee" * 6 + "c0de",
        "axes": {"seed": list(seeds), "steps": list(steps)},
        "metrics": [{"column": "fd_digits", "higher_is_better": False, "protocol": dict(PROTOCOL)}],
        "references": [
            {"dataset": "digits", "what": "noise", "scores": {"fd_digits": 1234.0}},
            {"dataset": "digits", "what": "held-out real images", "scores": {"fd_digits": 2.31}},
        ],
        "rows": rows,
    }


def two_datasets(results: dict[str, Any]) -> dict[str, Any]:
    """``results`` beside the same grid on another dataset, with its own metric."""
    found = copy.deepcopy(results)
    for old in copy.deepcopy(results["rows"]):
        value = old["scores"].get("fd_digits")
        scores = {} if value is None else {"fid": value * 0.4, "is": 8 + value / 40}
        found["rows"].append({**old, "dataset": "cifar10", "teacher": "ddpm", "scores": scores})
    inception = {**PROTOCOL, "network": "inception-2015-12-05", "images": 50_000, "reference_images": 50_000}
    found["metrics"].append({"column": "fid", "higher_is_better": False, "dataset": "cifar10", "protocol": inception})
    found["metrics"].append({"column": "is", "higher_is_better": True, "dataset": "cifar10", "protocol": inception})
    found["references"].append({"dataset": "cifar10", "what": "noise", "scores": {"fid": 451.2}})
    return found
