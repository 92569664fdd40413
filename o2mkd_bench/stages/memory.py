"""What the stages of a plan need of a GPU's memory, and the refusal of those that it has no room for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..core.errors import UserError
from ..core.identity import canonical
from ..core.plan import Plan, Stage
from ..core.plugins import Registry
from ..core.program import passes
from ..core.suite import Training
from ..engine.memory import Estimate, Network, Step, sampling, training

TRAINED = ("teacher", "state", "student", "round")
# drawing is not refused, as it goes on with half the batch
REFUSED = (*TRAINED, "speed")


class Memory:
    """Estimates by stage; those of equal networks and batches are made once, in about a second."""

    def __init__(self, plan: Plan, registry: Registry) -> None:
        self._plan = plan
        self._registry = registry
        self._known: dict[str, Estimate | None] = {}

    def of(self, stage: Stage) -> Estimate | None:
        """None for a stage without networks, or with some that cannot be reckoned; then nothing is known."""
        if stage.kind in TRAINED and "training" in stage.spec:
            return self._made(self._trained(stage), self._step)
        if stage.kind in ("samples", "speed"):
            return self._made(self._drawn(stage), self._pass)
        return None

    def _made(self, facts: Mapping[str, Any], estimate: Callable[[Mapping[str, Any]], Estimate]) -> Estimate | None:
        key = canonical(facts)
        if key not in self._known:
            try:
                self._known[key] = estimate(facts)
            except Exception:  # whatever a network raises that wants to see values
                self._known[key] = None
        return self._known[key]

    def _trained(self, stage: Stage) -> dict[str, Any]:
        spec = stage.spec
        about = Training.model_validate(spec["training"])
        batch = spec["batch"] if stage.kind == "round" else spec["job"]["batch"]
        part = min(about.micro_batch or batch, batch)
        return {
            "student": spec["network"],
            "teachers": [self._network(name) for slot in ("teacher", "before") for name in stage.needs.get(slot, ())],
            "methods": spec.get("methods", ()),
            # a round asks its teachers for no more than the student sees
            "batch": part if stage.kind == "round" else batch,
            "micro_batch": part,
            "precision": spec["precision"],
            "optimizer": about.optimizer,
            "checkpoint": stage.local["checkpoint_activations"],
        }

    def _step(self, facts: Mapping[str, Any]) -> Estimate:
        ours, theirs = self._features(facts["methods"])
        rest = {key: facts[key] for key in ("batch", "micro_batch", "precision", "optimizer", "checkpoint")}
        teachers = [self._opened(one, theirs) for one in facts["teachers"]]
        return training(Step(self._opened(facts["student"], ours), teachers, **rest))

    def _features(self, methods: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
        """What methods look at in the student and in the teacher."""
        plugins = [(self._registry.get("kd_methods", one["name"]), one["options"]) for one in methods]
        made = [plugin.load()(plugin.parse(options)) for plugin, options in plugins]
        ours, theirs = ([f for m in made for f in getattr(m, f"{side}_features")()] for side in ("student", "teacher"))
        return list(dict.fromkeys(ours)), list(dict.fromkeys(theirs))

    def _drawn(self, stage: Stage) -> dict[str, Any]:
        spec = stage.spec
        if stage.kind == "speed":
            networks, batch = stage.local["networks"], spec["batch"]
        else:
            networks = [self._network(name) for name in dict.fromkeys(stage.needs["students"])]
            batch = 1 if stage.local["batch"] == "auto" else stage.local["batch"]
        each = passes(spec.get("guidance"))
        return {"networks": networks, "batch": batch * each, "precision": spec["precision"]}

    def _pass(self, facts: Mapping[str, Any]) -> Estimate:
        return sampling([self._opened(one, ()) for one in facts["networks"]], facts["batch"], facts["precision"])

    def _network(self, name: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._plan.stages[name].spec["network"]
        return found

    def _opened(self, about: Mapping[str, Any], features: Sequence[str]) -> Network:
        family = self._registry.get("models", about["family"]["name"]).load()()
        return Network(family, about["config"], features)


def check(stages: Iterable[Stage], memory: Memory, free: float) -> None:
    """Ask of every stage whether ``free`` bytes hold it.

    Raises:
        UserError: when they do not, naming the key to change.
    """
    for stage in stages:
        estimate = memory.of(stage) if stage.kind in REFUSED else None
        if estimate is not None and estimate.total > free:
            raise UserError(
                f"{stage.kind} {stage.label} needs about {estimate.total / 1e9:.1f} GB of the device's memory, "
                f"which has {free / 1e9:.1f} GB free; {_mend(stage, estimate, free)}"
            )


def _mend(stage: Stage, estimate: Estimate, free: float) -> str:
    if estimate.resident > free:
        return "its networks alone do not fit: choose a smaller student, or another device"
    if stage.kind == "speed":
        return f"lower speed.batch (now {stage.spec['batch']})"
    about = Training.model_validate(stage.spec["training"])
    if estimate.teaching > estimate.learning:
        return f"lower training.batch (now {about.batch}), which its teacher sees at once"
    if not stage.local["checkpoint_activations"]:
        return "set checkpoint_activations: true"
    now = about.micro_batch or f"as large as training.batch, {about.batch}"
    return f"lower training.micro_batch (now {now})"
