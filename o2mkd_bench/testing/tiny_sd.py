"""A tiny MS-COCO, Stable Diffusion and CLIP, in the formats of the real ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# as many prompts as ten times the width of the feature network
TRAIN, VAL = 48, 640
SIZE = 32
# The autoencoder halves twice, the real one three times: the coarsest level must be halved from two pixels, as the
# gradient of a bf16 convolution that halves a single one is now and then NaN on the CPU (torch 2.15).
LATENT = SIZE // 4
COLOURS = {"red": (200, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 200), "white": (235, 235, 235)}
THINGS = ("square", "circle")
WORDS = ("a", "photo", "of", "on", "the", "and", "grass", *COLOURS, *THINGS)

# The architecture of CompVis/stable-diffusion-v1-4 but for sizes and channels.
UNET: dict[str, Any] = {
    "sample_size": LATENT,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 16, 16),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE: dict[str, Any] = {
    "block_out_channels": (4, 4, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 2,
    "sample_size": SIZE,
    "scaling_factor": 0.18215,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def build(root: Path) -> None:
    """Write ``coco``, ``stable-diffusion`` and ``clip`` below ``root``."""
    coco(root / "coco")
    pipeline(root / "stable-diffusion")
    clip(root / "clip")


def coco(root: Path) -> None:
    """``train2014``, ``val2014`` and ``annotations``: JPEG of unlike shapes, two captions each."""
    for split, first, count in (("train2014", 0, TRAIN), ("val2014", TRAIN, VAL)):
        (root / split).mkdir(parents=True, exist_ok=True)
        images, notes = [], []
        for number in range(first, first + count):
            name = f"COCO_{split}_{number:012}.jpg"
            image, caption = scene(number)
            image.save(root / split / name, quality=90)
            images.append({"id": number, "file_name": name})
            # the caption of the lowest id does not come first
            notes += [{"id": 2 * number + 1, "image_id": number, "caption": f"the {caption}"}]
            notes += [{"id": 2 * number, "image_id": number, "caption": f"a photo of {caption}"}]
        (root / "annotations").mkdir(exist_ok=True)
        data = json.dumps({"images": images, "annotations": notes})
        (root / "annotations" / f"captions_{split}.json").write_text(data, encoding="utf-8")


def scene(number: int) -> tuple[Image.Image, str]:
    """A thing on grass, RGB, and what it is in words."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(number)
    colour, thing = list(COLOURS)[number % len(COLOURS)], THINGS[number // len(COLOURS) % len(THINGS)]
    size = (SIZE + int(rng.integers(0, 12)), SIZE + int(rng.integers(0, 12)))
    image = Image.new("RGB", size, (60, 120 + int(rng.integers(0, 40)), 50))
    left, top = (int(v) for v in rng.integers(2, SIZE // 2, 2))
    draw = ImageDraw.Draw(image)
    box = (left, top, left + SIZE // 3, top + SIZE // 3)
    (draw.rectangle if thing == "square" else draw.ellipse)(box, fill=COLOURS[colour])
    return image, f"a {colour} {thing} on grass"


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Byte-pair encoding of CLIP's form: letters, letters that end a word, and the merges that make ``WORDS``."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            parts = [parts[0] + parts[1], *parts[2:]]
            if merge not in merges:
                merges.append(merge)
                tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, merges


def tokenizer(folder: Path) -> Any:
    """A CLIPTokenizer of the vocabulary, its files in ``folder``."""
    package = importlib.import_module("transformers")
    folder.mkdir(parents=True, exist_ok=True)
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    made = package.CLIPTokenizer.from_pretrained(folder, model_max_length=77)
    made.save_pretrained(folder)
    return made


def pipeline(folder: Path) -> None:
    """A Stable Diffusion pipeline with fresh weights, its tokenizer real."""
    import torch

    diffusers, package = (importlib.import_module(name) for name in ("diffusers", "transformers"))
    words = tokenizer(folder / "tokenizer")
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = package.CLIPTextConfig(vocab_size=len(words), max_position_embeddings=77, **TEXT, **ends)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = {
            "unet": diffusers.UNet2DConditionModel(**UNET),
            "vae": diffusers.AutoencoderKL(**VAE),
            "text_encoder": package.CLIPTextModel(config),
        }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    diffusers.PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index: dict[str, list[str | None]] = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"scheduler": ["diffusers", "PNDMScheduler"], "safety_checker": [None, None]}
    text = json.dumps({"_class_name": "StableDiffusionPipeline", **index})
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def clip(folder: Path) -> None:
    """A CLIP of both towers with fresh weights: what it sees means nothing, but it sees the same everywhere."""
    import torch

    package = importlib.import_module("transformers")
    words = tokenizer(folder)
    ends = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    text = {**TEXT, **ends, "vocab_size": len(words), "max_position_embeddings": 77}
    vision = {**TEXT, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = package.CLIPModel(package.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
