"""Students of one stream in training together: who fits, and what each leaves."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import Literal

import torch

from ..core.errors import UserError
from ..core.plan import Stage
from ..engine.compiled import one_line
from ..engine.loop import OUT_OF_MEMORY, Left, Member, train_together
from ..engine.shared import Source, Teacher
from .bench import Bench
from .train import begin, enlist, source_of, teacher_of

# Of what is free at the start: the rest is for activations and the teacher.
SHARE = 0.6
# Weights, gradient, two moments and the average in float32.
BYTES_PER_PARAMETER = 20

MEMINFO = Path("/proc/meminfo")


class Cohort:
    """Stages of one stream that train together, ``most`` of them at once.

    With ``auto`` as many as their weights, gradients, moments and averages leave room for.
    """

    def __init__(self, bench: Bench, most: int | Literal["auto"]) -> None:
        self.bench = bench
        self.most = most
        self._members: list[Member] = []
        self._stages: dict[Member, Stage] = {}
        self._bytes: dict[Member, int] = {}
        self._source: Source | None = None
        self._teacher: Teacher | None = None
        self._room = SHARE * free_memory(bench.device) if most == "auto" else float("inf")

    def admit(self, stage: Stage) -> bool:
        """Set ``stage`` up to train with the others from here on; False where there is no room for it now.

        Raises:
            UserError, CorruptArtifact: as what it is made from gives cause to.
        """
        if self.most != "auto" and len(self._members) >= self.most:
            return False
        try:
            return self._set_up(stage)
        except OUT_OF_MEMORY:
            if not self._members:
                raise
            return False

    def _set_up(self, stage: Stage) -> bool:
        if self._source is None:
            self._source = source_of(stage, self.bench)
        if self._teacher is None:
            self._teacher = teacher_of(stage, self.bench)
        network = begin(stage, self.bench)
        size = BYTES_PER_PARAMETER * sum(p.numel() for p in network.parameters())
        if self._members and sum(self._bytes.values()) + size > self._room:
            return False
        taught = self._teacher if "teacher" in stage.needs else None
        member = enlist(stage, self.bench, self._source, network, taught)
        self._members.append(member)
        self._stages[member], self._bytes[member] = stage, size
        return True

    def train(self) -> Generator[tuple[Stage, Left], None, None]:
        """Each stage when it leaves; others may be admitted then, and go on with those that stay."""
        if self._source is None:
            return
        with self.bench.store.guard():
            for left in train_together(self._source, self._members):
                del self._bytes[left.member]
                yield self._stages.pop(left.member), left
                # it holds the memory of a network
                del left

    def stages(self) -> list[Stage]:
        """Those in training."""
        return list(self._stages.values())


def free_memory(device: str) -> float:
    """Bytes that are free on the device; infinite where the system does not say.

    Raises:
        UserError: for a GPU that torch cannot use: no driver or an old one, a build for the CPU, another process alone
            on it, an MPS daemon that does not have it.
    """
    if device.startswith("cuda"):
        try:
            return float(torch.cuda.mem_get_info(device)[0])
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"device {device!r} is what nvidia-smi shows, but torch {torch.__version__} cannot use it "
                f"({one_line(error)}); mend that, or run with --device cpu"
            ) from None
    try:
        # what the file cache would give back counts as free
        text = MEMINFO.read_text(encoding="ascii")
    except OSError:
        return float("inf")
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return 1024.0 * int(found[1]) if found else float("inf")
