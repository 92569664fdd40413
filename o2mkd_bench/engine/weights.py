"""Weights on disk: loaded strictly, so that a half-loaded network cannot exist; written as safetensors alone."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..core.checkpoints import PICKLED, Checkpoint
from ..core.errors import UserError
from ..core.models import ModelFamily

# diffusers renamed the parts of its attention block in 0.15; files from before that, among them those of
# google/ddpm-cifar10-32, keep the old names.
ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def save_weights(weights: nn.Module | Mapping[str, Tensor], path: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a network's state as safetensors; equal tensors make equal bytes.

    Floating tensors are stored as ``dtype``, others as they are.

    Raises:
        UserError: when a finite value does not fit into ``dtype``.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    stored = {name: _cast(tensor, dtype, f"{path}: values of {name}") for name, tensor in sorted(state.items())}
    save_file(stored, path, metadata={"format": "pt"})


def read_weights(paths: Path | Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of one or several files as they are stored, on the CPU.

    Of a file named ``PICKLED`` nothing but tensors is read, and no code in it is run.

    Raises:
        UserError: for a file that is missing or no safetensors, or a tensor that two files hold.
    """
    state: dict[str, Tensor] = {}
    for path in [paths] if isinstance(paths, Path) else paths:
        try:
            shard = _unpickled(path) if path.name == PICKLED else load_file(path)
        except FileNotFoundError:
            raise UserError(f"the weights {path} are missing; put them there") from None
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read as safetensors ({error}); copy it again") from error
        if twice := sorted(state.keys() & shard.keys()):
            raise UserError(f"{path} holds {_some(twice)}, which another shard holds too; save the weights again")
        state |= shard
    return state


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict that torch has saved.

    Raises:
        UserError: for whatever else. FileNotFoundError: when it is not there.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    # torch's own errors are pages of advice, among it to load the file unsafely
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read as weights alone ({type(error).__name__}); {_CONVERT}") from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and type(v) is Tensor for k, v in found.items()):
        raise UserError(f"{path} holds more than named tensors; {_CONVERT}")
    return found


_CONVERT = "save the network anew with diffusers' save_pretrained(safe_serialization=True)"


def load_weights(network: nn.Module, paths: Path | Sequence[Path], names: Mapping[str, str] | None = None) -> None:
    """Copy stored weights into ``network``, cast to its dtypes and device; every key and shape must agree.

    Attention parts under the names that diffusers used before 0.15 are accepted.

    Args:
        names: of each tensor of ``network`` its name in the files, which may then hold others too.

    Raises:
        UserError: naming file, and the first few keys that are missing, left over or of another shape.
    """
    state = read_weights(paths)
    own = network.state_dict()
    for old in [key for key in state if key not in own]:
        if (new := _renamed(old)) in own and new not in state:
            state[new] = state.pop(old)
    if names is not None:
        state = {own_name: state[name] for own_name, name in names.items() if name in state}
    file = paths if isinstance(paths, Path) else " and ".join(str(p) for p in paths)
    faults = {
        "lacks": sorted(own.keys() - state.keys()),
        "has left over": sorted(state.keys() - own.keys()),
        "has in another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
            for key in sorted(own.keys() & state.keys())
            if own[key].shape != state[key].shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{fault} {_some(keys)}" for fault, keys in faults.items() if keys)
        raise UserError(f"{file} does not fit the network: it {told}; use the config.json that belongs to the weights")
    network.load_state_dict(state, strict=True)


def load_checkpoint(checkpoint: Checkpoint, family: ModelFamily) -> nn.Module:
    """The pretrained network in eval mode, float32, on the CPU; torch's global generator is left as it was.

    Raises:
        UserError: when the weights do not fit the config.
    """
    with torch.random.fork_rng(devices=[]):
        network = family.built(checkpoint.model)
    load_weights(network, checkpoint.weights)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{checkpoint.folder}: values of {name} are not finite; save the weights again")
    return network.eval()


def narrow(network: nn.Module, dtype: torch.dtype, where: str) -> nn.Module:
    """``network`` itself, its floating tensors cast to ``dtype``; ``where`` names it in an error.

    Raises:
        UserError: when a finite value does not fit; the network is as it was then.
    """
    for name, tensor in network.state_dict().items():
        _cast(tensor, dtype, f"{where}: values of {name}")
    # diffusers' own `to` warns of modules to be kept in float32, also where there are none
    return nn.Module.to(network, dtype)


def _cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A copy on the CPU, in ``dtype`` where it is floating; UserError, beginning with ``what``, when that overflows."""
    # one transfer of each: a device in use answers late, and a network has hundreds
    own = tensor.detach().cpu()
    # a copy, because safetensors refuses tensors that share memory
    found = own.to(dtype if own.is_floating_point() else own.dtype, copy=True)
    if own.is_floating_point() and not torch.equal(found.isfinite(), own.isfinite()):
        raise UserError(f"{what} do not fit into {dtype}; store the weights as torch.float32")
    return found.contiguous()


def _renamed(key: str) -> str:
    """``key`` with the part's present name: ``attentions.0.query.weight`` is ``attentions.0.to_q.weight`` now."""
    path, _, kind = key.rpartition(".")
    block, _, part = path.rpartition(".")
    return f"{block}.{ATTENTION.get(part, part)}.{kind}"


def _some(keys: Sequence[str], shown: int = 3) -> str:
    return ", ".join(keys[:shown]) + (f" and {len(keys) - shown} more" if len(keys) > shown else "")
