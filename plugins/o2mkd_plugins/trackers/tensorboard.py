"""Losses as TensorBoard shows them: a run a stage, so that the students of a grid lie in one plot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from o2mkd_bench import Event, UserError

from .options import TensorBoardOptions


class TensorBoard:
    """Writes below ``tensorboard/`` of the results; ``tensorboard --logdir results/<suite>/tensorboard`` shows it."""

    def __init__(self, options: TensorBoardOptions, out: Path) -> None:
        try:
            from tensorboard.summary import Writer
        except ImportError as error:
            mend = "install it with pip install 'o2mkd-bench[tensorboard]'"
            raise UserError(f"--tracker tensorboard needs TensorBoard; {mend}") from error
        self._open, self._folder = Writer, out / "tensorboard"
        self._writers: dict[str, Any] = {}

    def __call__(self, event: Event) -> None:
        if event.kind == "progress" and "loss" in event.data:
            if event.stage not in self._writers:
                self._writers[event.stage] = self._open(str(self._folder / folder_name(event)))
            step = int(event.data["done"])
            for name in ("loss", "images"):
                if name in event.data:
                    self._writers[event.stage].add_scalar(name, float(event.data[name]), step)
        elif event.kind in ("done", "failed") and event.stage in self._writers:
            self._writers.pop(event.stage).close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def folder_name(event: Event) -> str:
    """A stage's label as the name of one folder, whatever is in it, and different for different stages."""
    label = re.sub(r"[^\w=-]+", "-", event.label).strip("-")[:150]
    return f"{label}-{event.stage[:8]}"
