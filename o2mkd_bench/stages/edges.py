"""Where the intervals of ``intervals: auto`` end: by the error over t of the student of a shared warm-up."""

from __future__ import annotations

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ..core.edges import equal_shares
from ..core.mode import PLAIN
from ..core.plan import Stage
from ..core.store import Draft
from ..engine.denoiser import Call, Experts
from ..engine.philox import Philox
from .bench import Bench, Stopwatch, write_json
from .probe import Pictures, curve, followed, spread, teacher_of
from .train import build

AVERAGE = "ema/"
"""How the averaged weights are named in the training state of a warm-up."""


def make(stage: Stage, bench: Bench, draft: Draft) -> None:
    """``edges.json``: the K - 1 inner ``edges``, and the mean squared ``error`` at each timestep of ``t``.

    The difference is that of the two epsilon predictions, of the averaged weights, on training images.
    """
    spec, clock = stage.spec, Stopwatch()
    teacher = teacher_of(stage, bench)
    student = _student(stage, bench, teacher)

    def gap(x_t: Tensor, t: Tensor, noise: Tensor, condition: Tensor | None) -> Tensor:
        return student.predict(x_t, t, "epsilon", condition) - teacher.predict(x_t, t, "epsilon", condition)

    timesteps = len(teacher.tables.alpha)
    points = spread(spec["points"], timesteps)
    errors = curve(stage, bench, teacher.tables, points, _images(stage, bench), gap)
    edges = equal_shares(spec["students"], timesteps, points, errors)
    write_json(draft.dir / "edges.json", {"edges": edges, "t": points, "error": errors})
    draft.meta["seconds"] = clock.seconds()


def _student(stage: Stage, bench: Bench, teacher: Experts) -> Experts:
    """What the warm-up has become, from the training state that its experts continue."""
    about = stage.spec["network"]
    network = build(bench, about, stage.spec["seed"])
    with safe_open(bench.store.read(stage.needs["start"][0], "state.safetensors"), framework="pt") as file:
        names = [key for key in file.keys() if key.startswith(AVERAGE)]  # noqa: SIM118 - not a mapping
        network.load_state_dict({key.removeprefix(AVERAGE): file.get_tensor(key) for key in names})
    network.eval().requires_grad_(False)
    call = Call(bench.family(about), network, stage.spec["precision"], PLAIN, bench.tell)
    return Experts([call], [], [about["prediction"]], teacher.tables)


def _images(stage: Stage, bench: Bench) -> Pictures:
    """Training images, each at most once, and a noise for each; both by the seed, for nothing but this."""
    artifact = stage.needs["data"][0]
    path = bench.store.read(artifact, "train.npy")
    stored = np.load(path, mmap_mode="r", allow_pickle=False)
    philox = Philox.for_purpose(stage.spec["seed"], "edges")
    rank = philox.uniform(torch.arange(len(stored)), (1,), stream=1).flatten()
    rows = rank.argsort(stable=True)[: stage.spec["images"]].sort().values
    images = torch.from_numpy(stored[rows.numpy()]).to(bench.device)
    noise = philox.normal(rows.to(bench.device), images.shape[1:])
    return Pictures(images, noise, followed(bench, artifact, "train", rows.numpy()))
