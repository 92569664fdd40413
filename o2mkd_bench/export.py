"""From a finished cell to a folder that diffusers opens: denoisers, solver, code and a model card."""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .core.disk import guarded, renamed
from .core.errors import UserError
from .core.events import silent
from .core.intervals import cover
from .core.plan import Cell
from .core.program import Program
from .core.schedule import NoiseSchedule
from .core.session import Session
from .core.status import Survey
from .report.text import listed, markdown_text, si, si_listed
from .results import document

if TYPE_CHECKING:
    from torch import nn

    from .core.models import ModelFamily
    from .pipeline import O2MKDPipeline

Dtype = Literal["fp32", "bf16", "fp16"]
PAPER = "[arXiv 2410.04191](https://arxiv.org/abs/2410.04191)"


def export(session: Session, cell: Cell, folder: Path, dtype: Dtype = "fp32") -> Path:
    """Write ``cell`` to ``folder`` as a diffusers pipeline with its model card; the whole folder or nothing.

    Args:
        folder: not there yet, or empty.
        dtype: of the weights; a network is held in it as soon as it is read, and never twice.

    Raises:
        UserError: when the folder is taken, the cell is not finished, its networks are not such as diffusers opens and
            calls by itself, or their values do not fit into ``dtype``.
    """
    folder = folder.absolute()
    check_free(folder)
    if reason := unfinished(session, cell):
        raise UserError(f"{reason}; run its suite first")
    text = card(session, cell, folder.name, dtype)
    with guarded(folder.parent, "the folder", "name another DIR"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
            # a folder within, as the temporary one is closed to everybody else
            place = Path(made) / folder.name
            assemble(session, cell, dtype).save_pretrained(place)
            (place / "README.md").write_text(text, encoding="utf-8")
            if not renamed(place, folder):
                check_free(folder)
    return folder


def check_free(folder: Path) -> None:
    """Raise UserError unless ``folder`` is not there or empty."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; name a folder that is not there yet")
    elif folder.exists():
        raise UserError(f"{folder} is no folder; name one that is not there yet")


def unfinished(session: Session, cell: Cell) -> str:
    """Why ``cell`` cannot be exported; empty when its students, samples and scores are there.

    A speed reading is one machine's, and may be missing on this one.
    """
    survey = Survey(session.plan, session.store)
    standing = survey.standing(cell)
    name = f"cell {cell.identity[:8] or '(not known yet)'} ({cell.describe()}) is not finished: "
    if not cell.samples:
        return name + standing.reason
    students = session.plan.stages[cell.samples].needs["students"]
    needed = students if standing.status == "done" else (*students, cell.samples, *cell.scores)
    absent = [one for one in needed if not survey.present(one)]
    if not absent:
        return ""
    return name + (standing.reason or f"{session.plan.stages[absent[0]].label} is not in {session.store.address}")


def assemble(session: Session, cell: Cell, dtype: Dtype = "fp32") -> O2MKDPipeline:
    """The students of a finished cell and its solver as a pipeline, on the CPU.

    Raises:
        UserError: as :func:`export` does of networks and ``dtype``.
    """
    from .engine.denoiser import DTYPES
    from .engine.weights import narrow
    from .pipeline import O2MKDDenoiser, O2MKDPipeline, O2MKDScheduler
    from .stages.bench import Bench
    from .stages.latents import open_codec
    from .stages.samples import solver

    stage = session.plan.stages[cell.samples]
    spec, students = stage.spec, stage.needs["students"]
    bench = Bench(session.store, "cpu", silent, session.registry)
    opened: dict[str, Any] = {}
    for name in dict.fromkeys(students):
        label = session.plan.stages[name].label
        network = bench.denoiser(name, spec["weights"])
        check_alike(network, bench.family(bench.network(name)), spec["shape"], label)
        opened[name] = narrow(network, DTYPES[dtype], label)
    denoiser = O2MKDDenoiser([opened[name] for name in students], spec["edges"], spec["shape"])
    schedule = bench.schedule(students[0])
    program = solver(spec, schedule, session.registry)
    # experts that are called predict alike, or there would be no samples
    first = students[bisect_right(spec["edges"], program.lines[0].t)]
    scheduler = O2MKDScheduler(
        table(program, schedule),
        prediction_type=bench.network(first)["prediction"],
        clip=program.clip,
        start=program.start,
        **schedule.scheduler_config(),
    )
    if "codec" not in stage.needs:
        return O2MKDPipeline(denoiser, scheduler)
    parts = dict(open_codec(bench, stage).parts())
    for name in ("vae", "text_encoder"):
        parts[name] = narrow(parts[name], DTYPES[dtype], f"{name} of {stage.label}")
    return O2MKDPipeline(denoiser, scheduler, **parts, guidance_scale=spec.get("guidance"))


def check_alike(network: nn.Module, family: ModelFamily, shape: Sequence[int], label: str) -> None:
    """Raise UserError unless diffusers has the network's class and calls it as its family does."""
    import diffusers
    import torch

    name = type(network).__name__
    if getattr(diffusers, name, None) is not type(network):
        raise UserError(
            f"{label} is a {name}, which is no class of diffusers; only networks of its classes are exported"
        )
    x = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    t = torch.zeros(1, dtype=torch.int64)
    followed = family.condition_shape(network)
    condition = None if followed is None else torch.zeros(1, *followed)
    told = {} if condition is None else {"encoder_hidden_states": condition}
    with torch.no_grad():
        expected = family.forward(network, x, t, condition)
        try:
            alike = torch.allclose(network(x, t, **told, return_dict=False)[0], expected, atol=1e-5)
        except Exception:  # whatever a network raises that wants more than it was given
            alike = False
    if not alike:
        raise UserError(
            f"{label} is a {name} that is called with more than an image, a timestep and a text; only others are "
            "exported"
        )


def table(program: Program, schedule: NoiseSchedule) -> list[dict[str, Any]]:
    """The program as JSON data: each line with the schedule's values at its t, sums in the order they are taken in."""
    levels = [schedule.levels(line.t) for line in program.lines]
    return [
        {
            "t": line.t,
            "alpha": alpha,
            "sigma": sigma,
            "states": _pairs(line.states),
            "epsilon": _pairs(line.epsilon),
            "x0": _pairs(line.x0),
            "noise": float(line.noise),
        }
        for line, (alpha, sigma) in zip(program.lines, levels, strict=True)
    ]


def _pairs(terms: Mapping[int, float]) -> list[list[float]]:
    return [[j, float(coefficient)] for j, coefficient in terms.items()]


def card(session: Session, cell: Cell, name: str, dtype: Dtype) -> str:
    """The model card: what it is, where it comes from, what it scores, and how it is opened. Markdown."""
    results = document(session)
    row = next(row for row in results["rows"] if row["cell"] == cell.identity)
    made_by = f"o2mkd-bench {importlib.metadata.version('o2mkd-bench')}"
    if results["git_commit"]:
        made_by += f" (commit {results['git_commit']})"
    text = "codec" in session.plan.stages[cell.samples].needs
    parts = [
        f"---\nlibrary_name: diffusers\npipeline_tag: {'text-to' if text else 'unconditional'}-image"
        f"{'' if text else '-generation'}\n"
        "tags:\n- knowledge-distillation\n- o2mkd-bench\n---",
        f"# {markdown_text(name)}",
        _summary(row),
        "## How to open it",
        *_opening(name, dtype, 'prompt=["a photo of a church", "a photo of a cat"]' if text else "batch_size=4"),
        "## What it is",
        _grid(("", ""), _facts(row, dtype)),
        _grid(
            ("denoiser", "timesteps", "calls an image", "network", "parameters", "predicts"), _denoisers(session, cell)
        ),
        "## What it scores",
        *_scores(results, row),
        "## Where it comes from",
        f"Cell `{cell.identity}` of the suite `{markdown_text(results['suite'])}`, made by {made_by}.",
    ]
    return "\n\n".join(parts) + "\n"


def _summary(row: Mapping[str, Any]) -> str:
    teacher, data = markdown_text(row["teacher"]), markdown_text(row["dataset"])
    draws = f"It draws an image in {row['nfe']} network evaluations with {markdown_text(row['sampler'])}."
    if row["role"] == "teacher":
        return f"The diffusion model `{teacher}` on `{data}`, a teacher that others were distilled from. {draws}"
    what = "One student"
    if row["students"] > 1:
        what = f"{row['students']} students, each in charge of an interval of timesteps (O2MKD, {PAPER}),"
    by = markdown_text(row["method"])
    return f"{what} distilled from the diffusion model `{teacher}` on `{data}` by `{by}`. {draws}"


def _opening(name: str, dtype: Dtype, asked: str) -> list[str]:
    kinds = {"fp32": "", "bf16": ".to(torch.bfloat16)", "fp16": ".to(torch.float16)"}
    needs = "" if dtype == "fp32" else "import torch\n"
    return [
        "With diffusers alone. It runs the file `pipeline.py` of this folder, which is why it needs "
        "`trust_remote_code=True`; read the file first. On the Hub, the repository's id takes the place of the folder.",
        f"```python\n{needs}from diffusers import DiffusionPipeline\n\nfolder = {json.dumps(name)}\n"
        "pipeline = DiffusionPipeline.from_pretrained(\n"
        f"    folder, custom_pipeline=folder, trust_remote_code=True\n){kinds[dtype]}\n"
        f"images = pipeline({asked}).images\n```",
        "With o2mkd-bench installed, no code of this folder is run:",
        f"```python\n{needs}from o2mkd_bench.pipeline import O2MKDPipeline\n\n"
        f"pipeline = O2MKDPipeline.from_pretrained({json.dumps(name)}){kinds[dtype]}\n"
        f"images = pipeline({asked}).images\n```",
        '`pipeline.push_to_hub("owner/name")` uploads it with this card.',
    ]


def _facts(row: Mapping[str, Any], dtype: Dtype) -> list[tuple[str, str]]:
    """Name and value of what a row of the table says; what it does not know is left out."""
    speed = row.get("speed") or {}
    facts = {
        "dataset": row["dataset"],
        "teacher": row["teacher"],
        "student": row["student"],
        "method": row["method"],
        "wrapper": row["wrapper"],
        "budget": row["budget"],
        "images seen by each student": si_listed(row.get("images_per_student")),
        "images seen in all": si(row.get("images_total")),
        "optimiser steps of each student": listed(row.get("steps_per_student")),
        "batch": listed(row.get("batch_per_student")),
        "sampler": f"{row['sampler']}, {row['steps']} steps on a {row['spacing']} grid, clip {row['clip']}",
        "network evaluations an image": row["nfe"],
        "parameters": f"{si(row.get('params_total'))}, active at once {si(row.get('params_active'))}",
        "MACs an image": si(row.get("macs_per_image")),
        "guidance": row.get("guidance"),
        "weights": f"{row['weights']}, stored as {dtype}; scored in {row['precision']}",
        "seed": row["seed"],
        "images a second": f"{si(speed['images_per_second'])} on {speed.get('device')}" if speed else "",
    }
    return [(name, markdown_text(value)) for name, value in facts.items() if value not in ("", None)]


def _denoisers(session: Session, cell: Cell) -> Iterable[tuple[str, ...]]:
    stage = session.plan.stages[cell.samples]
    about = [session.store.read_json(name, "network.json") for name in stage.needs["students"]]
    timesteps = NoiseSchedule.from_scheduler_config(about[0]["schedule"]).timesteps
    for k, interval in enumerate(cover(stage.spec["edges"], timesteps)):
        cost = session.store.manifest(stage.needs["students"][k]).meta["cost"]
        network = about[k]["config"].get("_class_name", "")
        yield f"`denoiser/{k}`", str(interval), str(cell.calls[k]), network, si(cost["params"]), about[k]["prediction"]


# of a protocol: what has a column, and hashes, which results.json has
_TOLD = ("network", "sha256", "images", "reference", "reference_images", "reference_hash")


def _scores(results: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """A table with the columns' own names, and what they were measured with."""
    lines = []
    for entry in results["metrics"]:
        value = row["scores"].get(entry["column"])
        if entry["dataset"] == row["dataset"] and value is not None:
            known = entry["protocol"] or {}
            against = f"{known.get('reference')} ({known.get('reference_images')} images)"
            better = "higher" if entry["higher_is_better"] else "lower"
            rest = (f"{key} {told}" for key, told in known.items() if key not in _TOLD and told not in (None, ""))
            line = (f"{value:.6g}", better, known.get("network"), known.get("images"), against, "; ".join(rest))
            lines.append((f"`{entry['column']}`", *map(markdown_text, line)))
    head = ("column", "score", "better", "feature network", "images", "against", "how")
    found = [_grid(head, lines)] if lines else []
    return found + ([f"Not measured: {markdown_text(row['reason'])}."] if row["reason"] else [])


def _grid(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
