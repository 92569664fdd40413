"""diffusers' ``UNet2DModel`` as a network family; torch-free until a network is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from o2mkd_bench.core.complaints import near
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.models import ModelFamily
from o2mkd_bench.core.options import Options

from .levels import check_levels
from .options import UNet2DOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "UNet2DModel"

# Every argument of UNet2DModel with the meaning an absent key has always had in a published config.json. Written out,
# so that a later diffusers with other defaults builds the same network from the same file.
DEFAULTS: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}

# What the DDPM networks of Ho et al. (arXiv 2006.11239) set otherwise in their published config.json.
DDPM = {"freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6}

# What the data and the noise schedule decide; a student cannot choose it.
GIVEN = ("sample_size", "in_channels", "out_channels")


class UNet2D(ModelFamily):
    """The U-Net of DDPM (Ho et al., arXiv 2006.11239) as diffusers builds it, unconditional."""

    student_keys = ("width", "blocks", "config")

    def teacher_config(self, options: Options, channels: int, size: int) -> dict[str, Any]:
        """A complete config for images (channels, size, size).

        Raises:
            UserError: when a level would have a fraction of a pixel, ``attention`` names a resolution that no level
                has, or groups or heads do not divide the channels.
        """
        options = cast(UNet2DOptions, options)
        levels = len(options.block_out_channels)
        resolutions = [size // 2**i for i in range(levels)]
        if missing := [r for r in options.attention if r not in resolutions]:
            raise UserError(
                f"attention: no level has resolution {missing[0]}; with {levels} levels on images of {size} pixels "
                f"there are {', '.join(map(str, resolutions))}"
            )
        attends = [r in options.attention for r in resolutions]
        down = options.down_block_types or ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends]
        up = options.up_block_types or ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
        config = {
            "_class_name": CLASS_NAME,
            **DEFAULTS,
            **DDPM,
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "down_block_types": list(down),
            "up_block_types": list(up),
            "block_out_channels": list(options.block_out_channels),
            "layers_per_block": options.layers_per_block,
            "attention_head_dim": options.attention_head_dim,
            "norm_num_groups": options.norm_num_groups,
            "dropout": options.dropout,
        }
        _check(config, "the teacher's network")
        return config

    def student_config(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The teacher's architecture with dropout 0, then ``width``, ``blocks`` and ``config`` in this order.

        ``width`` multiplies channels and normalisation groups alike, so that a group keeps its number of channels, and
        keeps the channels of an attention head. ``blocks`` is ``layers_per_block``. ``config`` holds keys of a
        diffusers config, some or all of them; what it names wins.

        Raises:
            UserError: naming ``where``, when the result is no network, or not one for the teacher's images.
        """
        config = complete(teacher, where) | {"dropout": 0.0}
        _check(config, where)
        width, blocks, explicit = (student.get(key) for key in ("width", "blocks", "config"))
        if width is not None and width != 1:
            config |= _narrow(config, float(width), where)
        if blocks is not None:
            config["layers_per_block"] = int(blocks)
        if explicit:
            given = {key: config[key] for key in GIVEN}
            config = complete(config | dict(explicit), where)
            for key, value in given.items():
                if config[key] != value:
                    raise UserError(f"{where}.config: {key} is {config[key]}, the teacher's is {value}; leave it out")
        _check(config, where)
        return config

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """The network in training mode, float32; ``config`` as :meth:`student_config` or a ``config.json`` gives it.

        Raises:
            UserError: for keys that are not UNet2DModel's.
        """
        from diffusers import UNet2DModel

        arguments = complete(config, CLASS_NAME)
        del arguments["_class_name"]
        return cast("nn.Module", UNet2DModel(**arguments))

    def forward(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The raw prediction, (B, C, H, W); ``t`` int64 or float (B,); ``condition`` must be None."""
        return cast("Tensor", network(x, t, class_labels=condition, return_dict=False)[0])

    def roles(self, network: nn.Module) -> dict[str, str]:
        """``down.i`` and ``up.i`` in the order of evaluation, ``mid`` between them where there is one.

        A down block gives a tuple; its first tensor is the feature.
        """
        unet = cast(Any, network)
        found = {f"down.{i}": f"down_blocks.{i}" for i in range(len(unet.down_blocks))}
        if unet.mid_block is not None:
            found["mid"] = "mid_block"
        return found | {f"up.{i}": f"up_blocks.{i}" for i in range(len(unet.up_blocks))}

    def optimise(self, network: nn.Module) -> nn.Module:
        """A twin with fused normalisations in half precision; in float32, the reference, ``network`` itself."""
        import torch

        if next(network.parameters()).dtype not in (torch.float16, torch.bfloat16):
            return network
        from .fused import fuse

        return fuse(network)

    def checkpoint_activations(self, network: nn.Module) -> None:
        """Every block computes its activations again in the backward pass."""
        cast(Any, network).enable_gradient_checkpointing()


def complete(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``config`` with every argument of UNet2DModel explicit and diffusers' own notes dropped.

    Raises:
        UserError: for another class, an unknown key, or a class-conditional network.
    """
    if (name := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise UserError(f"{where}: _class_name is {name!r}; this family reads {CLASS_NAME} only")
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in known:
        if key not in DEFAULTS:
            hint = near(key, DEFAULTS) or f"; the keys are those of diffusers' {CLASS_NAME}"
            raise UserError(f"{where}: {CLASS_NAME} has no key {key!r}{hint}")
    full = {"_class_name": CLASS_NAME, **DEFAULTS, **known}
    if full["class_embed_type"] is not None or full["num_class_embeds"] is not None:
        raise UserError(f"{where}: the network is class-conditional, which is not supported; use an unconditional one")
    return full


def _narrow(config: Mapping[str, Any], width: float, where: str) -> dict[str, Any]:
    """The keys that ``width`` changes; channels and groups in the same exact ratio."""
    groups = config["norm_num_groups"]
    scale = Fraction(round(groups * width), groups)
    if scale <= 0 or abs(groups * width - groups * scale) > 1e-4 or not _fits(config, scale):
        possible = [s for k in range(1, 4 * groups + 1) if _fits(config, s := Fraction(k, groups))]
        nearest = min(possible, key=lambda s: abs(s - width))
        channels = ", ".join(f"{c * width:g}" for c in config["block_out_channels"])
        raise UserError(
            f"{where}: width {width:g} gives channels {channels}, which whole groups of the teacher's "
            f"{config['block_out_channels'][0] // groups} channels and heads of its {config['attention_head_dim']} do "
            f"not fill; the nearest width that works is {float(nearest):.6g}"
        )
    scaled = ("norm_num_groups", "attn_norm_num_groups", "time_embedding_dim")
    return {
        "block_out_channels": [int(c * scale) for c in config["block_out_channels"]],
        **{key: int(config[key] * scale) for key in scaled if config[key] is not None},
    }


def _fits(config: Mapping[str, Any], scale: Fraction) -> bool:
    """Whether every scaled channel count is whole, and attention heads and groups divide it where they must."""
    whole = [config[key] * scale for key in ("attn_norm_num_groups", "time_embedding_dim") if config[key] is not None]
    whole += [config["norm_num_groups"] * scale, *(c * scale for c in config["block_out_channels"])]
    if any(n.denominator != 1 for n in whole):
        return False
    head = config["attention_head_dim"]
    return head is None or all(c * scale % head == 0 for c in _attending(config))


def _attending(config: Mapping[str, Any]) -> list[int]:
    """Channels of the levels that have attention, the middle block's last."""
    channels = list(config["block_out_channels"])
    found = [c for c, block in zip(channels, config["down_block_types"], strict=True) if "Attn" in block]
    found += [c for c, block in zip(reversed(channels), config["up_block_types"], strict=True) if "Attn" in block]
    middle = config["mid_block_type"] is not None and config["add_attention"]
    return found + ([channels[-1]] if middle else [])


def _check(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless ``config`` is a network that diffusers builds as it is written."""
    check_levels(config, where)
    channels, head, size = (config[key] for key in ("block_out_channels", "attention_head_dim", "sample_size"))
    levels = len(channels)
    for side in size if isinstance(size, (list, tuple)) else [size]:
        if side is not None and side % 2 ** (levels - 1):
            raise UserError(
                f"{where}: images of {side} pixels cannot be halved {levels - 1} times; use fewer levels than {levels}"
            )
    if head is not None and any(c % head for c in _attending(config)):
        raise UserError(
            f"{where}: attention_head_dim {head} does not divide block_out_channels {list(channels)} where there is "
            f"attention; use a divisor of {math.gcd(*_attending(config))}"
        )
