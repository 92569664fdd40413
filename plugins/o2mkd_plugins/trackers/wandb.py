"""A run of Weights & Biases: losses by stage, and what failed. Offline unless ``WANDB_MODE`` says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from o2mkd_bench import Event, UserError

from .options import WandbOptions


class Wandb:
    """Writes below ``wandb/`` of the results; ``wandb sync`` uploads what was logged offline.

    Project, name and entity are those of ``WANDB_PROJECT``, ``WANDB_NAME`` and ``WANDB_ENTITY``.
    """

    def __init__(self, options: WandbOptions, out: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            mend = "install it with pip install 'o2mkd-bench[wandb]'"
            raise UserError(f"--tracker wandb needs Weights & Biases; {mend}") from error
        out.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", "o2mkd-bench")
        # a run must never wait for somebody to log in
        mode = os.environ.get("WANDB_MODE", "offline")
        quiet = wandb.Settings(silent=True, console="off")
        self._run = wandb.init(project=project, dir=str(out), mode=mode, settings=quiet)  # type: ignore[arg-type]
        self._known: set[str] = set()
        self._failed = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "progress" and "loss" in event.data:
            step = f"{event.label}/step"
            if event.label not in self._known:
                self._known.add(event.label)
                self._run.define_metric(step, hidden=True)
                self._run.define_metric(f"{event.label}/loss", step_metric=step)
            self._run.log({step: int(event.data["done"]), f"{event.label}/loss": float(event.data["loss"])})
        elif event.kind == "failed":
            self._failed += 1
            self._run.summary[f"failed/{event.label}"] = str(event.data["reason"])
        elif event.kind == "end":
            self._run.summary["made"] = event.data["made"]

    def close(self) -> None:
        self._run.finish(exit_code=1 if self._failed else 0)
