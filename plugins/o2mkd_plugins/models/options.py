"""What a suite may say about a teacher's network; torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from o2mkd_bench.core.options import Options

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D"]
Positive = Annotated[int, Field(gt=0, le=65_536)]
Layers = Annotated[int, Field(gt=0, le=1000)]


class UNet2DOptions(Options):
    """A diffusers ``UNet2DModel`` trained from scratch.

    Attributes:
        block_out_channels: channels of each resolution level, the finest first.
        layers_per_block: residual blocks a level.
        down_block_types, up_block_types: diffusers' block classes, one a level; None: plain blocks, and attention
            where ``attention`` says so.
        attention: image resolutions (pixels) at which levels have attention; the middle block always has it.
        attention_head_dim: channels of one attention head.
        norm_num_groups: groups of every normalisation.
        dropout: of the residual blocks, while training.
    """

    block_out_channels: tuple[Positive, ...] = Field((32, 64), min_length=1, max_length=16)
    layers_per_block: Layers = 1
    down_block_types: tuple[DownBlock, ...] | None = None
    up_block_types: tuple[UpBlock, ...] | None = None
    attention: tuple[Positive, ...] = ()
    attention_head_dim: Positive = 8
    norm_num_groups: Positive = 8
    dropout: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _consistent(self) -> UNet2DOptions:
        if (self.down_block_types is None) != (self.up_block_types is None):
            raise ValueError("down_block_types and up_block_types go together: give both or neither")
        if self.down_block_types is None or self.up_block_types is None:
            return self
        if self.attention:
            raise ValueError("attention and explicit block types exclude each other: drop one of them")
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ValueError(
                f"block_out_channels has {levels} levels: give down_block_types and up_block_types as many"
            )
        return self


class DiTOptions(Options):
    """A diffusers ``DiTTransformer2DModel`` trained from scratch.

    Attributes:
        num_attention_heads: heads of every block; with ``attention_head_dim`` they make its channels.
        attention_head_dim: channels of one head.
        num_layers: transformer blocks.
        patch_size: pixels along the side of what becomes one token.
        num_embeds_ada_norm: classes beside that for "none", which alone is trained without labels.
        dropout: of attention and feed-forward layers, while training.
    """

    num_attention_heads: Positive = 4
    attention_head_dim: Positive = 16
    num_layers: Layers = 4
    patch_size: Positive = 2
    num_embeds_ada_norm: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
