"""The codec of a Stable Diffusion pipeline: AutoencoderKL, CLIP's text encoder, CLIP's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.models import Codec

if TYPE_CHECKING:
    from torch import Tensor


class LatentCodec(Codec):
    """Latents are the mean of the posterior times ``scaling_factor``; conditions the last hidden state of all tokens.

    The mean, not a sample: an image's latents are then one array, and sampling noise is what the diffusion adds.
    """

    def __init__(self, folder: Path) -> None:
        """``folder``: with ``vae``, ``text_encoder`` and ``tokenizer``; only safetensors are read.

        Raises:
            UserError: when the package transformers is missing, or a part cannot be opened.
        """
        try:
            from transformers import CLIPTextModel, CLIPTokenizer
        except ModuleNotFoundError as error:
            raise UserError(
                "captions are embedded by the package transformers; install it with pip install 'o2mkd-bench[text]'"
            ) from error
        from diffusers import AutoencoderKL

        here: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
        try:
            self.vae: Any = AutoencoderKL.from_pretrained(folder / "vae", **here)
            self.text: Any = CLIPTextModel.from_pretrained(folder / "text_encoder", **here)
            self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(f"the pipeline below {folder} cannot be opened ({reason}); save it again") from error
        self.parts = (self.vae, self.text)

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
