"""diffusers' ``DiTTransformer2DModel`` as a network family; torch-free until a network is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from o2mkd_bench.core.complaints import near
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.models import ModelFamily
from o2mkd_bench.core.options import Options

from .options import DiTOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASS_NAME = "DiTTransformer2DModel"

# The class under which facebook/DiT-XL-2-256 was published; diffusers opens such files as DiTs by their norm_type.
OLD_NAME = "Transformer2DModel"

# Every argument of DiTTransformer2DModel, written out, so that a later diffusers with other defaults builds the same
# network from the same file.
DEFAULTS: Mapping[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}

# What a config of the old class says beside, in the one form that a DiT has.
OLD_KEYS: Mapping[str, Any] = {
    "attention_type": "default",
    "caption_channels": None,
    "cross_attention_dim": None,
    "double_self_attention": False,
    "interpolation_scale": None,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "use_additional_conditions": None,
    "use_linear_projection": False,
}

# What the data decide; a student cannot choose it.
GIVEN = ("sample_size", "in_channels")

# Roles that mean the same at any depth: the block at which this share of the blocks is done.
PLACES = {"early": 0.25, "mid": 0.5, "late": 0.75}


class DiT(ModelFamily):
    """The diffusion transformer (Peebles & Xie, arXiv 2212.09748) as diffusers builds it.

    A DiT is told a class with every call. Without one it is told the null class, which classifier-free guidance takes
    for "no class" and which lies behind the others, at index ``num_embeds_ada_norm``: images drawn so are
    unconditional, and a network trained so learns that class alone.

    A network that learned its variance puts out twice the channels; the first half is the prediction, and the variance
    is that of the sampler.
    """

    student_keys = ("width", "blocks", "config")

    def teacher_config(self, options: Options, channels: int, size: int) -> dict[str, Any]:
        """A complete config for images (channels, size, size).

        Raises:
            UserError: when the patches do not tile the image, or the channels of all heads are no multiple of 4.
        """
        chosen = cast(DiTOptions, options).model_dump()
        config = {"_class_name": CLASS_NAME, **DEFAULTS, **chosen}
        config |= {"sample_size": size, "in_channels": channels, "out_channels": channels}
        _check(config, "the teacher's network")
        return config

    def student_config(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The teacher's architecture with dropout 0, then ``width``, ``blocks`` and ``config`` in this order.

        ``width`` multiplies the number of attention heads, which keep their channels. ``blocks`` is the number of
        transformer blocks. ``config`` holds keys of a diffusers config, some or all of them; what it names wins. The
        output that a learned variance had stays, so that a student can start from its teacher; ``out_channels`` in
        ``config`` drops it.

        Raises:
            UserError: naming ``where``, when the result is no network, or not one for the teacher's images.
        """
        config = complete(teacher, where) | {"dropout": 0.0}
        _check(config, where)
        width, blocks, explicit = (student.get(key) for key in ("width", "blocks", "config"))
        if width is not None and width != 1:
            config["num_attention_heads"] = _heads(config, float(width), where)
        if blocks is not None:
            config["num_layers"] = int(blocks)
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

        Every block begins as the identity and the output as zero (adaLN-Zero, section 3.2 of the paper), which
        diffusers leaves to who trains. Labels are never dropped at random.

        Raises:
            UserError: for keys that are not DiTTransformer2DModel's.
        """
        from diffusers import DiTTransformer2DModel
        from torch import nn

        arguments = complete(config, CLASS_NAME)
        del arguments["_class_name"]
        network: Any = DiTTransformer2DModel(**arguments)
        side = arguments["sample_size"] // arguments["patch_size"]
        for block in network.transformer_blocks:
            # diffusers would draw anew in every block whether a class is dropped, and from torch's global generator
            block.norm1.emb.class_embedder.dropout_prob = 0.0
            block.feature = nn.Unflatten(2, (side, side))
            block.register_forward_hook(_show)
        for layer in (*(b.norm1.linear for b in network.transformer_blocks), network.proj_out_1, network.proj_out_2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        return cast("nn.Module", network)

    def forward(self, network: nn.Module, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The raw prediction, (B, C, H, W), without a learned variance.

        Args:
            t: int64 or float (B,).
            condition: classes, int64 (B,), below ``num_embeds_ada_norm``, or that for none; None: none for all.
        """
        import torch

        if condition is None:
            null = cast(Any, network).config.num_embeds_ada_norm
            condition = torch.full((len(x),), null, dtype=torch.int64, device=x.device)
        found: Tensor = network(x, timestep=t, class_labels=condition, return_dict=False)[0]
        return found[:, : x.shape[1]]

    def roles(self, network: nn.Module) -> dict[str, str]:
        """``block.i`` in the order of evaluation, and ``early``, ``mid``, ``late`` and ``last``.

        These are the blocks at which a quarter, half, three quarters and all of the blocks are done, and mean the same
        in a student with fewer. Features are tokens laid out as images, (B, channels, height, width) in patches.
        """
        depth = len(cast(Any, network).transformer_blocks)
        places = {role: math.ceil(share * depth) - 1 for role, share in (*PLACES.items(), ("last", 1.0))}
        blocks = {f"block.{i}": i for i in range(depth)} | places
        return {role: f"transformer_blocks.{i}.feature" for role, i in blocks.items()}

    def check_start(self, teacher: Mapping[str, Any], student: Mapping[str, Any], where: str) -> None:
        """A student may have fewer blocks; all else is its teacher's.

        Raises:
            UserError: naming ``where``, when it is not.
        """
        ours, theirs = complete(student, where), complete(teacher, where)
        same = [key for key in DEFAULTS if key not in ("num_layers", "dropout")]
        if ours["num_layers"] > theirs["num_layers"] or any(ours[key] != theirs[key] for key in same):
            raise UserError(
                f"{where}.init: a student of other blocks has no place for its teacher's weights; give it width 1 and "
                "at most as many blocks, or init: scratch"
            )

    def inherited(self, network: nn.Module, teacher: Mapping[str, Any]) -> dict[str, str]:
        """Each block takes the last of the teacher's blocks that it stands for: roles mean the same in both."""
        ours, theirs = len(cast(Any, network).transformer_blocks), complete(teacher, CLASS_NAME)["num_layers"]
        return {name: _source(name, ours, theirs) for name in network.state_dict()}

    def checkpoint_activations(self, network: nn.Module) -> None:
        """Every block computes its activations again in the backward pass."""
        cast(Any, network).enable_gradient_checkpointing()


def complete(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``config`` with every argument of DiTTransformer2DModel explicit and diffusers' own notes dropped.

    Raises:
        UserError: for another class, or an unknown key.
    """
    name = config.get("_class_name", CLASS_NAME)
    if name not in (CLASS_NAME, OLD_NAME):
        raise UserError(f"{where}: _class_name is {name!r}; this family reads {CLASS_NAME} only")
    if name == OLD_NAME and config.get("norm_type") != DEFAULTS["norm_type"]:
        raise UserError(
            f"{where}: a {OLD_NAME} with norm_type {config.get('norm_type')!r} is no DiT; use one with "
            f"{DEFAULTS['norm_type']}"
        )
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    for key in [key for key in known if key not in DEFAULTS]:
        if name == OLD_NAME and key in OLD_KEYS and known[key] == OLD_KEYS[key]:
            del known[key]
            continue
        hint = near(key, DEFAULTS) or f"; the keys are those of diffusers' {CLASS_NAME}"
        raise UserError(f"{where}: {CLASS_NAME} has no key {key!r} of value {known[key]!r}{hint}")
    full = {"_class_name": CLASS_NAME, **DEFAULTS, **known}
    if full["out_channels"] is None:
        full["out_channels"] = full["in_channels"]
    return full


def _source(name: str, ours: int, theirs: int) -> str:
    """The teacher's name of a student's tensor."""
    parts = name.split(".")
    if parts[0] == "transformer_blocks":
        parts[1] = str(math.ceil((int(parts[1]) + 1) * theirs / ours) - 1)
    return ".".join(parts)


def _show(block: Any, inputs: Any, output: Tensor) -> None:
    """A block's tokens (B, N, C) as an image, for whoever listens at its ``feature``; a view, it costs nothing."""
    block.feature(output.transpose(1, 2))


def _heads(config: Mapping[str, Any], width: float, where: str) -> int:
    """The teacher's number of heads times ``width``."""
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    fitting = [n for n in range(1, 4 * heads + 1) if n * head % 4 == 0]
    nearest = min(fitting, key=lambda n: abs(n - heads * width))
    if abs(nearest - heads * width) > 1e-4:
        raise UserError(
            f"{where}: width {width:g} gives {heads * width:g} heads of the teacher's {head} channels; the nearest "
            f"width that works is {nearest / heads:.6g}"
        )
    return nearest


def _check(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless ``config`` is a network that diffusers builds as it is written."""
    size, patch, layers = (config[key] for key in ("sample_size", "patch_size", "num_layers"))
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    seen, given = config["in_channels"], config["out_channels"]
    if size % patch:
        raise UserError(f"{where}: patches of {patch} pixels do not tile images of {size}; use a divisor of {size}")
    if heads * head % 4:
        raise UserError(
            f"{where}: {heads} heads of {head} channels are {heads * head} channels, which the positions of two "
            "directions in sine and cosine do not fill; use a multiple of 4"
        )
    if layers < 1:
        raise UserError(f"{where}: {layers} blocks are no network; use at least one")
    if given not in (seen, 2 * seen):
        raise UserError(
            f"{where}: {given} output channels for {seen}; use {seen}, or {2 * seen} for a learned variance"
        )
    norm, classes = config["norm_type"], config["num_embeds_ada_norm"]
    if norm != DEFAULTS["norm_type"] or classes is None:
        raise UserError(
            f"{where}: norm_type {norm!r} with num_embeds_ada_norm {classes} is no DiT; use {DEFAULTS['norm_type']} "
            "and a number of classes"
        )
