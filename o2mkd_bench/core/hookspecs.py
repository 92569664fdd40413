"""The whole plugin contract on one page.

A plugin is a module named by an entry point of group ``o2mkd_bench``. It says ``api = 1`` and implements any of the
hooks below; each is handed ``register`` and only declares::

    from o2mkd_bench import Options, hookimpl

    api = 1

    class HuberOptions(Options):
        delta: float = 0.1

    @hookimpl
    def register_kd_methods(register):
        register("huber", "my_package.huber:Huber", options=HuberOptions, version="1", paper="…")

Everything but the target is known without importing it, so the declaring module must not import torch.

``register(name, target, *, options=Options, version="1", paper="", summary="", **traits)``

- ``name``: what a suite writes; where two distributions claim it, ``distribution:name``.
- ``target``: ``"package.module:Attribute"``, imported on first use.
- ``options``: a subclass of :class:`o2mkd_bench.Options`; unknown keys are errors.
- ``version``: part of the identity of everything the plugin makes; raise it when results change.
- ``traits``: what a kind wants to know at plan time; the hooks below list them.
"""

from __future__ import annotations

from typing import Any, Protocol

import pluggy

from .options import Options

GROUP = "o2mkd_bench"
API = 1

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class Register(Protocol):
    """What every hook is handed."""

    def __call__(
        self,
        name: str,
        target: str,
        *,
        options: type[Options] = Options,
        version: str = "1",
        paper: str = "",
        summary: str = "",
        **traits: Any,
    ) -> None: ...


class HookSpecs:
    """One hook a kind."""

    @hookspec
    def register_kd_methods(self, register: Register) -> None:
        """KD methods. Target: a subclass of ``o2mkd_bench.engine.kd.KDMethod``.

        Trait ``needs_teacher`` (default True): False for a loss that never looks at the teacher.
        """

    @hookspec
    def register_wrappers(self, register: Register) -> None:
        """Wrappers. Target: a torch-free subclass of ``o2mkd_bench.core.jobs.Wrapper``, called at plan time."""

    @hookspec
    def register_intervals(self, register: Register) -> None:
        """Interval rules. Target: a torch-free function ``(students: int, schedule: NoiseSchedule) -> list[int]``
        that gives the K - 1 inner edges; called at plan time."""

    @hookspec
    def register_samplers(self, register: Register) -> None:
        """Samplers. Target: a torch-free subclass of ``o2mkd_bench.core.program.Sampler``.

        A suite gives a sampler its ``steps`` beside the plugin's own options.
        """

    @hookspec
    def register_datasets(self, register: Register) -> None:
        """Datasets. Target: a torch-free subclass of ``o2mkd_bench.core.data.DatasetSource``."""

    @hookspec
    def register_models(self, register: Register) -> None:
        """Network families, for teachers and students. Target: a subclass of ``o2mkd_bench.core.models.ModelFamily``
        whose module is torch-free.

        Traits: ``class_name``: the diffusers class, or a tuple of several, in a ``config.json`` that this family reads;
        ``learned_variance``: True where its networks may give a variance beside epsilon; ``latent``: True where they
        draw latents of images, from text.
        """

    @hookspec
    def register_metrics(self, register: Register) -> None:
        """Metrics. Target: a subclass of ``o2mkd_bench.engine.scoring.Metric``.

        Traits, of which the last three may be left out; functions are torch-free and take a dataset plugin's name:

        - ``columns(options, dataset) -> tuple[str, ...]``: the columns it fills.
        - ``higher_is_better``: a bool.
        - ``network_id(options, dataset, base) -> dict``: the feature network for identities, its name under
          ``network``; metrics with equal networks are scored together. ``base``: the folder of the suite.
        - ``check_images(options, dataset, images)``: raises UserError for a number of images that is too small.
        - ``check_network(options, dataset, base)``: raises UserError for a network that cannot be had anywhere, and
          for files that are named and are not there or not the right ones.
        - ``needs_captions``: True for a metric of images drawn from text; others are refused when it is planned.
        """

    @hookspec
    def register_trackers(self, register: Register) -> None:
        """Trackers. Target: a class ``(options, out: Path)`` whose instances are called with every
        ``o2mkd_bench.Event`` of a run and closed with ``close()`` at its end."""

    @hookspec
    def register_executors(self, register: Register) -> None:
        """Executors. Target: a subclass of ``o2mkd_bench.core.executor.Executor`` whose module is torch-free."""


BASES = {
    "kd_methods": "o2mkd_bench.engine.kd.KDMethod",
    "wrappers": "o2mkd_bench.core.jobs.Wrapper",
    "samplers": "o2mkd_bench.core.program.Sampler",
    "datasets": "o2mkd_bench.core.data.DatasetSource",
    "models": "o2mkd_bench.core.models.ModelFamily",
    "metrics": "o2mkd_bench.engine.scoring.Metric",
    "executors": "o2mkd_bench.core.executor.Executor",
}
"""What a target must be derived from, where that is a class."""

TRAITS = {
    "kd_methods": ("needs_teacher",),
    "models": ("class_name", "learned_variance", "latent"),
    "metrics": ("columns", "higher_is_better", "network_id", "check_images", "check_network", "needs_captions"),
}
"""What a kind knows of."""

KINDS = tuple(name.removeprefix("register_") for name in vars(HookSpecs) if name.startswith("register_"))
