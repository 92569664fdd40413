"""What every stage works with: the store, the device, the observers, and how to open other stages' artifacts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.events import Event, Observer
from ..core.mode import PLAIN, Mode
from ..core.models import ModelFamily
from ..core.plan import Stage
from ..core.plugins import Registry
from ..core.schedule import NoiseSchedule
from ..core.store import Store

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..engine.compiled import Say
    from ..engine.denoiser import Experts
    from ..engine.router import Router


@dataclass(frozen=True)
class Bench:
    """The place where stages are made; ``device`` is a torch device name."""

    store: Store
    device: str
    observer: Observer
    registry: Registry
    mode: Mode = PLAIN

    def family(self, network: Mapping[str, Any]) -> ModelFamily:
        """The plugin that builds and calls a network, from what its artifact says of it."""
        made: ModelFamily = self.registry.get("models", network["family"]["name"]).load()()
        return made

    def network(self, artifact: str) -> dict[str, Any]:
        """What a trained artifact says of its network: family, config, schedule, prediction."""
        found: dict[str, Any] = self.store.read_json(artifact, "network.json")
        return found

    def denoiser(self, artifact: str, weights: str) -> nn.Module:
        """The trained network of an artifact, in eval mode, float32, on the device, no gradients."""
        import torch

        from ..engine.weights import load_weights

        about = self.network(artifact)
        with torch.random.fork_rng(devices=[]):
            network = self.family(about).built(about["config"])
        load_weights(network, self.store.read(artifact, f"{weights}.safetensors"))
        return self.place(network.eval().requires_grad_(False))

    def place(self, network: nn.Module) -> nn.Module:
        """``network`` on the device, where float32 is float32 from here on: TF32 would keep 10 bits of 23."""
        import torch

        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        return network.to(self.device)

    def router(
        self, artifacts: Sequence[str], edges: Sequence[int], weights: str, precision: str, say: Say | None = None
    ) -> Router:
        """The networks of ``artifacts`` as one denoiser for sampling, in this bench's mode.

        ``say`` is told where that cannot be; by default everybody is.
        """
        about = self.network(artifacts[0])
        return self.assemble(about, self._networks(artifacts, weights), edges, precision, say)

    def assemble(
        self,
        about: Mapping[str, Any],
        networks: Sequence[nn.Module],
        edges: Sequence[int],
        precision: str,
        say: Say | None = None,
    ) -> Router:
        """Frozen networks of the family that ``about`` names, on the device, as one denoiser for sampling."""
        from ..engine.denoiser import Call
        from ..engine.graphs import Graphs, capture
        from ..engine.router import Router

        family, say = self.family(about), say or self.tell
        calls = [Call(family, network, precision, self.mode, say) for network in networks]
        if self.mode == PLAIN:
            return Router(calls, edges)
        return Router(calls, edges, Graphs(calls, say, capture if self.mode.cuda_graphs else None))

    def experts(
        self, artifacts: Sequence[str], edges: Sequence[int], weights: str, precision: str, mode: Mode | None = None
    ) -> Experts:
        """The networks of ``artifacts`` as one denoiser for batches with mixed t; ``mode``: this bench's by default."""
        import torch

        from ..engine.denoiser import Call, Experts, Tables

        about = [self.network(artifact) for artifact in artifacts]
        family, mode = self.family(about[0]), mode or self.mode
        calls = [Call(family, network, precision, mode, self.tell) for network in self._networks(artifacts, weights)]
        tables = Tables.of(self.schedule(artifacts[0]), torch.device(self.device))
        return Experts(calls, edges, [one["prediction"] for one in about], tables)

    def _networks(self, artifacts: Sequence[str], weights: str) -> list[nn.Module]:
        opened = {artifact: self.denoiser(artifact, weights) for artifact in dict.fromkeys(artifacts)}
        return [opened[artifact] for artifact in artifacts]

    def schedule(self, artifact: str) -> NoiseSchedule:
        """The noise schedule a trained artifact belongs to."""
        return NoiseSchedule.from_scheduler_config(self.network(artifact)["schedule"])

    def images(self, data: str, split: str = "train") -> Tensor:
        """Decoded images of a data artifact, uint8 (N, C, H, W), or latents, float16, in a mapped file.

        Memory may not hold them.
        """
        import numpy as np
        import torch

        # copy on write: torch takes no read-only arrays, and nothing writes
        array = np.load(self.store.read(data, f"{split}.npy"), mmap_mode="c", allow_pickle=False)
        return torch.from_numpy(array)

    def conditions(self, data: str, split: str = "train") -> Path | None:
        """The file of the conditions that belong to the latents of an artifact; None for images, which have none."""
        name = f"{split}.text.npy"
        return self.store.read(data, name) if name in self.store.manifest(data).files else None

    def tell(self, text: str) -> None:
        """Tell the observers something, in words, that is about no one stage."""
        self.observer(Event("message", data={"text": text}))

    def say(self, stage: Stage, text: str) -> None:
        """Tell the observers something about a stage, in words."""
        self.observer(Event("message", stage.identity, stage.label, {"text": f"{stage.label}: {text}"}))

    def progress(self, stage: Stage, done: int, total: int, **data: Any) -> None:
        """Tell the observers how far a stage is."""
        self.observer(Event("progress", stage.identity, stage.label, {"done": done, "total": total, **data}))


def write_json(path: Path, data: Any) -> None:
    """JSON with sorted keys: equal data, equal bytes."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


class Stopwatch:
    """Wall seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def seconds(self) -> float:
        return time.monotonic() - self._start
