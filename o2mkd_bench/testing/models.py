"""What a model family promises: architectures as data, and networks that only look at what they are given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.identity import canonical
from ..core.models import ModelFamily
from .contract import Contract

_PLANNED = """
family = target()
teacher = family.teacher_config(parsed, {channels}, {size})
for student in json.loads({students!r}):
    family.student_config(teacher, student, "students.s")
"""


class ModelContract(Contract):
    """Subclass with the ``name`` and ``options`` of a family whose teachers are trained from scratch.

    Attributes:
        channels, size: of the images.
        students: entries of ``students:`` that are tried.
    """

    kind = "models"
    base = ModelFamily
    loaded_by_plan = True
    channels: ClassVar[int] = 1
    size: ClassVar[int] = 8
    students: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"width": 0.5})

    def planned(self) -> str:
        given = {"channels": self.channels, "size": self.size, "students": json.dumps([dict(s) for s in self.students])}
        return _PLANNED.format(**given)

    @property
    def family(self) -> ModelFamily:
        made: ModelFamily = self.plugin.load()()
        return made

    @property
    def teacher(self) -> dict[str, Any]:
        return self.family.teacher_config(self.parsed, self.channels, self.size)

    @property
    def configs(self) -> list[dict[str, Any]]:
        """Of the teacher, and of each student."""
        teacher = self.teacher
        return [teacher, *(self.family.student_config(teacher, dict(s), "students.s") for s in self.students)]

    def built(self, config: Mapping[str, Any]) -> nn.Module:
        torch.manual_seed(0)
        return self.family.build(config).eval()

    def given(self, network: nn.Module) -> tuple[Tensor, ...]:
        """States, timesteps, and conditions where the family follows some, of three images."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, self.channels, self.size, self.size, generator=generator)
        shape = self.family.condition_shape(network)
        condition = () if shape is None else (torch.randn(3, *shape, generator=generator),)
        return x, torch.tensor([0, 500, 999]), *condition

    def test_configs_are_data_and_always_the_same(self) -> None:
        assert [canonical(config) for config in self.configs] == [canonical(config) for config in self.configs]

    def test_configs_are_for_the_images(self) -> None:
        for config in self.configs:
            assert (config["in_channels"], config["sample_size"]) == (self.channels, self.size)

    def test_a_student_leaves_what_it_is_derived_from(self) -> None:
        teacher = self.teacher
        kept = deepcopy(teacher)
        for student in self.students:
            given = deepcopy(dict(student))
            self.family.student_config(teacher, given, "students.s")
            assert given == student
            assert teacher == kept

    def test_students_read_the_keys_that_are_declared(self) -> None:
        for student in self.students:
            assert set(student) <= set(self.family.student_keys)

    def test_networks_are_float32_and_leave_their_config(self) -> None:
        for config in self.configs:
            kept = deepcopy(config)
            network = self.built(config)
            assert config == kept
            assert {p.dtype for p in network.parameters()} == {torch.float32}

    def test_weights_come_from_the_global_generator(self) -> None:
        first, second = (self.built(self.teacher).state_dict() for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    def test_forward_gives_the_shape_and_writes_into_nothing(self) -> None:
        for config in self.configs:
            network = self.built(config)
            given = self.given(network)
            kept = [value.clone() for value in given]
            with torch.no_grad():
                found = self.family.forward(network, *given)
            assert (found.shape, found.dtype) == (given[0].shape, given[0].dtype)
            assert bool(torch.isfinite(found).all())
            assert all(torch.equal(value, before) for value, before in zip(given, kept, strict=True))

    def test_an_image_does_not_depend_on_the_others(self) -> None:
        network = self.built(self.teacher)
        given = self.given(network)
        with torch.no_grad():
            together = self.family.forward(network, *given)
            alone = self.family.forward(network, *(value[1:2] for value in given))
        torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)

    def test_gradients_reach_the_weights(self) -> None:
        network = self.built(self.teacher).train()
        self.family.forward(network, *self.given(network)).square().sum().backward()  # type: ignore[no-untyped-call]
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        assert grads
        assert all(bool(torch.isfinite(grad).all()) for grad in grads)

    def test_roles_are_modules(self) -> None:
        for config in self.configs:
            network = self.built(config)
            known = {path for path, _ in network.named_modules()}
            assert set(self.family.roles(network).values()) <= known
