"""diffusers' ``UNet2DConditionModel``, as Stable Diffusion v1 has it, as a network family; torch-free until built."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from o2mkd_bench.core.complaints import near
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.models import Codec, ModelFamily
from o2mkd_bench.core.options import Options

from .levels import check_levels

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "UNet2DConditionModel"

# The arguments that networks on text-conditional latents of the Stable Diffusion line set, with the meaning an absent
# key has always had in a published config.json. Written out, so that a later diffusers builds the same network.
DEFAULTS: Mapping[str, Any] = {
    "sample_size": None,
    "in_channels": 4,
    "out_channels": 4,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "dual_cross_attention": False,
    "use_linear_projection": False,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
}

GIVEN = ("sample_size", "in_channels", "out_channels", "cross_attention_dim")

WITHOUT_TEXT = "text is read by the package transformers; install it with pip install 'o2mkd-bench[text]'"

TOKENS = 77
"""Length of CLIP's text encoder, hence of every condition."""

# Block removals of BK-SDM (arXiv 2305.15798): how many levels are left, and whether the middle is.
VARIANTS: Mapping[str, tuple[int, bool]] = {"bk_base": (0, True), "bk_small": (0, False), "bk_tiny": (1, False)}


class UNet2DCondition(ModelFamily):
    """The U-Net of latent diffusion (Rombach et al., arXiv 2112.10752), conditioned on text by cross-attention."""

    def teacher_config(self, options: Options, channels: int, size: int) -> dict[str, Any]:
        """Raises UserError: such teachers are not trained here."""
        raise UserError("a text-conditional latent teacher is not trained here; give a pipeline by path or hub")

    def student_config(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The teacher's architecture with dropout 0, then ``variant``, ``width``, ``blocks``, ``config`` in this order.

        ``variant``: ``bk_base`` keeps the first pair of residual block and attention of each level on the way down, the
        first and the last on the way up; ``bk_small`` takes the middle out too; ``bk_tiny`` also the innermost level
        (BK-SDM, arXiv 2305.15798). ``width`` multiplies channels, normalisation groups and attention heads alike.

        Raises:
            UserError: naming ``where``, when the result is no network, or not one for the teacher's latents.
        """
        config = complete(teacher, where) | {"dropout": 0.0}
        if (variant := student.get("variant")) is not None:
            config |= _removed(config, str(variant), where)
        if (width := student.get("width")) not in (None, 1):
            config |= _narrow(config, float(cast(float, width)), where)
        if (blocks := student.get("blocks")) is not None:
            config["layers_per_block"] = int(blocks)
        if explicit := student.get("config"):
            given = {key: config[key] for key in GIVEN}
            config = complete(config | dict(explicit), where)
            for key, value in given.items():
                if config[key] != value:
                    raise UserError(f"{where}.config: {key} is {config[key]}, the teacher's is {value}; leave it out")
        _check(config, where)
        return config

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """The network in training mode, float32.

        Raises:
            UserError: for keys that such networks have not.
        """
        from diffusers import UNet2DConditionModel

        arguments = complete(config, CLASS_NAME)
        del arguments["_class_name"]
        return cast("nn.Module", UNet2DConditionModel(**arguments))

    def forward(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The raw prediction, (B, C, h, w); ``t`` int64 or float (B,); ``condition`` (B, L, D) from a text encoder."""
        return cast("Tensor", network(x, t, encoder_hidden_states=condition, return_dict=False)[0])

    def roles(self, network: nn.Module) -> dict[str, str]:
        """``down.i`` and ``up.i`` in the order of evaluation, ``mid`` where there is one.

        ``up.-1`` is the finest, whatever the number of levels: a student with fewer meets its teacher there.
        """
        unet = cast(Any, network)
        downs, ups = len(unet.down_blocks), len(unet.up_blocks)
        found = {f"down.{i}": f"down_blocks.{i}" for i in range(downs)}
        if unet.mid_block is not None:
            found["mid"] = "mid_block"
        found |= {f"up.{i}": f"up_blocks.{i}" for i in range(ups)}
        return found | {f"up.{i - ups}": f"up_blocks.{i}" for i in range(ups)}

    def ready(self) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError(WITHOUT_TEXT)

    def condition_shape(self, network: nn.Module) -> tuple[int, ...] | None:
        return TOKENS, int(cast(Any, network).config.cross_attention_dim)

    def check_start(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> None:
        """A student may have fewer layers or levels, or no middle; its channels are its teacher's.

        Raises:
            UserError: naming ``where``, when they are not.
        """
        ours, theirs = complete(student, where), complete(teacher, where)
        levels = len(ours["block_out_channels"])
        same = [key for key in DEFAULTS if key not in _SHAPE]
        fewer = all(ours[key] == theirs[key][:levels] for key in ("block_out_channels", "down_block_types"))
        fewer &= ours["up_block_types"] == theirs["up_block_types"][-levels:]
        fewer &= ours["layers_per_block"] <= theirs["layers_per_block"]
        if not fewer or any(ours[key] != theirs[key] for key in same):
            raise UserError(
                f"{where}.init: a student of other channels has no place for its teacher's weights; give it width 1, "
                "a variant or fewer blocks, or init: scratch"
            )

    def inherited(self, network: nn.Module, teacher: Mapping[str, Any]) -> dict[str, str]:
        """On the way down the first layers of a level; on the way up the first ones and the last.

        That one's skip connection has the channels of the level above. Levels are counted from the finest.
        """
        ours, theirs = cast(Any, network).config, complete(teacher, CLASS_NAME)
        return {name: _source(name, ours, theirs) for name in network.state_dict()}

    def codec(self, folder: Path, place: Callable[[nn.Module], nn.Module]) -> Codec:
        from .codec import LatentCodec

        return LatentCodec(folder, place)

    def checkpoint_activations(self, network: nn.Module) -> None:
        """Every block computes its activations again in the backward pass."""
        cast(Any, network).enable_gradient_checkpointing()


# What may differ between a student and the teacher whose weights it takes.
_SHAPE = frozenset(
    {"down_block_types", "mid_block_type", "up_block_types", "block_out_channels", "layers_per_block", "dropout"}
)


def complete(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``config`` with every argument explicit, lists for tuples, and diffusers' own notes dropped.

    Raises:
        UserError: for another class, or a key that networks of this line do not have.
    """
    if (name := config.get("_class_name", CLASS_NAME)) != CLASS_NAME:
        raise UserError(f"{where}: _class_name is {name!r}; this family reads {CLASS_NAME} only")
    # diffusers writes every argument it has, most of them null in this line
    known = {key: value for key, value in config.items() if not key.startswith("_") and key not in _idle(config)}
    for key in known:
        if key not in DEFAULTS:
            hint = near(key, DEFAULTS) or "; networks of the Stable Diffusion v1 line do not set it"
            raise UserError(f"{where}: {CLASS_NAME} with the key {key!r} is not supported{hint}")
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in known.items()}
    return {"_class_name": CLASS_NAME, **DEFAULTS, **plain}


# Arguments outside DEFAULTS at the value that says nothing.
_NOTHING: Mapping[str, Any] = {
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "time_embedding_type": "positional",
}


def _idle(config: Mapping[str, Any]) -> set[str]:
    foreign = (key for key in config if key not in DEFAULTS)
    return {key for key in foreign if config[key] is None or _NOTHING.get(key, ...) == config[key]}


def _removed(config: Mapping[str, Any], variant: str, where: str) -> dict[str, Any]:
    """The keys that a block removal changes."""
    if variant not in VARIANTS:
        known = ", ".join(VARIANTS)
        raise UserError(f"{where}.variant: {variant!r} is no variant of {CLASS_NAME}; known are {known}")
    levels, middle = VARIANTS[variant]
    if levels >= len(config["block_out_channels"]):
        raise UserError(f"{where}.variant: the teacher has too few levels for {variant}; name another")
    if config["layers_per_block"] == 1:
        raise UserError(f"{where}.variant: the teacher has one layer a level, of which none can be removed")
    kept = slice(len(config["block_out_channels"]) - levels)
    return {
        "layers_per_block": 1,
        "mid_block_type": config["mid_block_type"] if middle else None,
        "block_out_channels": list(config["block_out_channels"])[kept],
        "down_block_types": list(config["down_block_types"])[kept],
        "up_block_types": list(config["up_block_types"])[levels:],
    }


def _narrow(config: Mapping[str, Any], width: float, where: str) -> dict[str, Any]:
    """The keys that ``width`` changes: a group and a head keep their channels.

    ``attention_head_dim`` of this class is, for historical reasons, the number of heads.
    """
    groups = config["norm_num_groups"]
    scale = Fraction(round(groups * width), groups)
    heads = config["attention_head_dim"]
    counts = [groups, *config["block_out_channels"], *(heads if isinstance(heads, Sequence) else [heads])]
    if scale <= 0 or abs(float(scale) - width) > 1e-6 or any((n * scale).denominator != 1 for n in counts):
        raise UserError(
            f"{where}: width {width:g} leaves fractions of the teacher's {groups} normalisation groups, "
            f"{heads} attention heads or {list(config['block_out_channels'])} channels; use a multiple of one part in "
            "the number of heads, such as 0.5"
        )
    return {
        "norm_num_groups": int(groups * scale),
        "block_out_channels": [int(c * scale) for c in config["block_out_channels"]],
        "attention_head_dim": [int(h * scale) for h in heads] if isinstance(heads, Sequence) else int(heads * scale),
    }


def _check(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless ``config`` is a network that diffusers builds as it is written."""
    check_levels(config, where)
    channels, heads = config["block_out_channels"], config["attention_head_dim"]
    levels = len(channels)
    each = heads if isinstance(heads, Sequence) else [heads] * levels
    if len(each) != levels or any(not h or c % h for c, h in zip(channels, each, strict=True)):
        raise UserError(
            f"{where}: attention_head_dim {heads}, the number of heads, does not divide block_out_channels "
            f"{list(channels)}; use a divisor of {math.gcd(*channels)}"
        )


def _source(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The teacher's name of a student's tensor."""
    parts = name.split(".")
    if parts[0] == "up_blocks":
        missing = len(theirs["block_out_channels"]) - len(ours["block_out_channels"])
        parts[1] = str(int(parts[1]) + missing)
        last = int(ours["layers_per_block"])
        if parts[2] in ("resnets", "attentions") and int(parts[3]) == last:
            parts[3] = str(int(theirs["layers_per_block"]))
    return ".".join(parts)
