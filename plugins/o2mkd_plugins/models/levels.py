"""What all U-Nets of diffusers ask of their levels; torch-free."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from o2mkd_bench.core.errors import UserError


def check_levels(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError unless blocks, channels and normalisation groups of ``config`` fit each other."""
    channels, groups, layers = (config[key] for key in ("block_out_channels", "norm_num_groups", "layers_per_block"))
    levels = len(channels)
    if {len(config["down_block_types"]), len(config["up_block_types"])} != {levels}:
        raise UserError(
            f"{where}: block_out_channels {list(channels)} has {levels} levels; give as many down_block_types and "
            "up_block_types"
        )
    if any(n < 1 for n in (layers if isinstance(layers, Sequence) else [layers])):
        raise UserError(f"{where}: a level of {layers} blocks is none; give blocks, or layers_per_block, of at least 1")
    if not groups or any(c % groups for c in channels):
        raise UserError(
            f"{where}: norm_num_groups {groups} does not divide block_out_channels {list(channels)}; "
            f"use a divisor of {math.gcd(*channels)}"
        )
