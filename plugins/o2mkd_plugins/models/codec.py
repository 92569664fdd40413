"""The codec of a Stable Diffusion pipeline: AutoencoderKL, CLIP's text encoder, CLIP's tokenizer."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.models import Codec

from .unet2d_condition import WITHOUT_TEXT

if TYPE_CHECKING:
    from torch import Tensor, nn


class LatentCodec(Codec):
    """Latents are the mean of the posterior times ``scaling_factor``; conditions the last hidden state of all tokens.

    The mean, not a sample: an image's latents are then one array, and noise is what the diffusion adds.
    """

    def __init__(self, folder: Path, place: Callable[[nn.Module], nn.Module]) -> None:
        """``folder``: with ``vae``, ``text_encoder`` and ``tokenizer``; of weights only safetensors are read.

        Each part is opened when it is first needed, which raises UserError when that cannot be.
        """
        self._folder = folder
        self._place = place

    @cached_property
    def vae(self) -> Any:
        from diffusers import AutoencoderKL

        # diffusers gives today's names to the attention parts of old files
        return self._place(opened(AutoencoderKL, self._folder / "vae", low_cpu_mem_usage=False))

    @cached_property
    def text(self) -> Any:
        return self._place(opened(transformers().CLIPTextModel, self._folder / "text_encoder"))

    @cached_property
    def tokenizer(self) -> Any:
        return transformers().CLIPTokenizer.from_pretrained(self._folder / "tokenizer", local_files_only=True)

    def parts(self) -> Mapping[str, Any]:
        return {"vae": self.vae, "text_encoder": self.text, "tokenizer": self.tokenizer}

    def encode(self, images: Tensor) -> Tensor:
        pixels = images.float() / 127.5 - 1
        found: Tensor = self.vae.encode(pixels).latent_dist.mode() * self.vae.config.scaling_factor
        return found

    def decode(self, latents: Tensor) -> Tensor:
        found: Tensor = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        return found

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Cut at the encoder's length, and filled up to it by the tokenizer's own padding."""
        length = self.text.config.max_position_embeddings
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        found: Tensor = self.text(tokens.input_ids.to(self.text.device))[0]
        return found


def transformers() -> Any:
    """The optional package.

    Raises:
        UserError: when it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise UserError(WITHOUT_TEXT) from error


def opened(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of ``kind``, a class of diffusers or transformers, from a folder's safetensors, in float32.

    Raises:
        UserError: when it cannot be read, or a weight is missing.
    """
    import torch
    from safetensors import SafetensorError

    with _without_bars():
        try:
            model, found = kind.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                torch_dtype=torch.float32,
                **options,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"{folder} cannot be opened as a {kind.__name__} ({reason}); save it again") from error
    # both libraries draw what is missing at random
    if missing := sorted([*found["missing_keys"], *map(str, found["mismatched_keys"])]):
        raise UserError(f"{folder} lacks {missing[0]} for a {kind.__name__}; save it again")
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Neither library draws a progress bar for a file that is on this machine."""
    known = sys.modules.get("transformers")
    bars = None if known is None else known.utils.logging
    drawn = bars is not None and bars.is_progress_bar_enabled()
    if bars is not None:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if drawn and bars is not None:
            bars.enable_progress_bar()
