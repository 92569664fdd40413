"""Data and networks of the smoke suites, tiny, in the formats of the real ones.

python -m o2mkd_bench.testing.systems DIR
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

TRAIN, TEST = 72, 12
SIZE = 32
# timm's smallest; 640 images are ten times its width
FEATURES = "test_vit"

# The architecture of google/ddpm-church-256 and google/ddpm-celebahq-256 but for sizes and channels.
UNET: dict[str, Any] = {
    "sample_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (8, 8, 16, 16, 32, 32),
    "down_block_types": (*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 4,
}


def build(root: Path) -> None:
    """Write everything below ``root``: the data, teachers and feature networks of all smoke suites."""
    from . import tiny_sd

    lsun(root / "lsun")
    celebahq(root / "celebahq")
    for seed, name in enumerate(("church", "ema-church", "celebahq", "ema-celebahq")):
        teacher(root / f"ddpm-{name}-256", seed)
    tiny_sd.build(root)
    features(root / "features.safetensors")


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    """A scene of its own: sky, ground, and a tower somewhere in between, RGB of ``size`` (width, height)."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(number)
    sky, ground, tower = (tuple(int(c) for c in rng.integers(0, 256, 3)) for _ in range(3))
    width, height = size
    image = Image.new("RGB", size, sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 2 // 3, width, height), fill=ground)
    left = int(rng.integers(0, width // 2))
    draw.rectangle((left, int(rng.integers(0, height // 2)), left + width // 3, height * 3 // 4), fill=tower)
    return image


def lsun(root: Path) -> None:
    """``church_outdoor_train_lmdb`` and ``church_outdoor_val_lmdb``: JPEG of unlike shapes under keys of hex digits."""
    for split, first, count in (("train", 0, TRAIN), ("val", TRAIN, TEST)):
        images = [picture(number, (SIZE + 8 + number % 9, SIZE)) for number in range(first, first + count)]
        write_lmdb(root / f"church_outdoor_{split}_lmdb", images)


def write_lmdb(folder: Path, images: list[Image.Image]) -> None:
    """An lmdb as the LSUN export has it."""
    import lmdb

    folder.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(folder), map_size=1 << 26) as env, env.begin(write=True) as transaction:
        for number, image in enumerate(images):
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=75)
            transaction.put(f"{number * 2654435761 % 2**32:08x}".encode(), encoded.getvalue())


def celebahq(root: Path) -> None:
    """A folder of numbered PNG of twice the size."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(TRAIN + TEST):
        picture(1000 + number, (2 * SIZE, 2 * SIZE)).save(root / f"{number:05}.png")


def teacher(folder: Path, seed: int) -> None:
    """A diffusers pipeline of a U-Net with fresh weights and the schedule of DDPM."""
    import diffusers
    import torch

    untyped: Any = diffusers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = untyped.UNet2DModel(**UNET)
    untyped.DDPMPipeline(unet, untyped.DDPMScheduler()).save_pretrained(folder)


def features(file: Path) -> None:
    """Weights of the feature network, drawn: what it sees means nothing, but it sees the same everywhere."""
    import timm
    import torch
    from safetensors.torch import save_file

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model(FEATURES, pretrained=False)
    save_file(network.state_dict(), file)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m o2mkd_bench.testing.systems DIR")
    build(Path(sys.argv[1]))
