"""Features by module path or role, from a network that knows nothing of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.errors import UserError


def resolve(network: nn.Module, wanted: Sequence[str], roles: Mapping[str, str], where: str) -> dict[str, str]:
    """Module paths of the features ``wanted``, each a role or a module path.

    Args:
        roles: the network's roles to module paths, as ``ModelFamily.roles`` gives them.
        where: the network in words, ``"teacher"`` or ``"student"``, for the error.

    Raises:
        UserError: naming the missing role or path, near misses and the roles that exist.
    """
    paths = {name: roles.get(name, name) for name in wanted}
    _check(network, paths, roles, where)
    return paths


class Taps:
    """Collects what named modules put out while the context is open; the hooks are gone when it closes.

    >>> with Taps(network, {"mid": "mid_block"}, "teacher") as taps:
    ...     prediction = network(x, t)
    ...     features = taps.take()

    Of a module that runs more than once the last output counts, of a tuple or mapping its first tensor.

    Raises:
        UserError: for a path that names no module of ``network``.
    """

    def __init__(self, network: nn.Module, paths: Mapping[str, str], where: str = "network") -> None:
        _check(network, paths, {}, where)
        self._network, self._paths, self._where = network, dict(paths), where
        self._seen: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, path in self._paths.items():
            self._handles.append(self._network.get_submodule(path).register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._seen.clear()

    def take(self) -> dict[str, Tensor]:
        """The features since the last call by name, float32, in the order asked for; forgets them.

        Raises:
            UserError: for a module that the forward pass did not run.
        """
        for name, path in self._paths.items():
            if name not in self._seen:
                raise UserError(
                    f"the {self._where}'s feature {name!r} (module {path!r}) took no part in the forward pass; "
                    "choose another layer"
                )
        features = {name: self._seen[name].float() for name in self._paths}
        self._seen.clear()
        return features

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def collect(module: nn.Module, inputs: Any, output: Any) -> None:
            self._seen[name] = self._first_tensor(output, name)

        return collect

    def _first_tensor(self, output: Any, name: str) -> Tensor:
        parts: Iterable[Any] = output.values() if isinstance(output, Mapping) else output
        candidates = parts if isinstance(output, Mapping | tuple | list) else (output,)
        for value in candidates:
            if isinstance(value, Tensor):
                return value
        raise UserError(
            f"the {self._where}'s feature {name!r} (module {self._paths[name]!r}) puts out no tensor; "
            "choose another layer"
        )


def shapes(
    network: nn.Module, paths: Mapping[str, str], forward: Callable[[], object], where: str = "network"
) -> dict[str, torch.Size]:
    """The shape of each feature, batch included, by one dry run of ``forward``, which must call ``network``.

    The run is without gradient and with every module in ``eval()``; the modes are put back.

    Raises:
        UserError: as :class:`Taps` does.
    """
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad(), Taps(network, paths, where) as taps:
            forward()
            return {name: feature.shape for name, feature in taps.take().items()}
    finally:
        for module in training:
            module.training = True


def _check(network: nn.Module, paths: Mapping[str, str], roles: Mapping[str, str], where: str) -> None:
    modules = {path for path, _ in network.named_modules() if path}
    for name, path in paths.items():
        if path in modules:
            continue
        what = repr(name) if name == path else f"{name!r} (module {path!r})"
        near = difflib.get_close_matches(path, [*roles, *modules], n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        known = f"its roles are {', '.join(roles)}" if roles else "name a module path of the network"
        raise UserError(f"the {where} has no feature {what}; {hint}{known}")
