"""A distilled cell as a diffusers pipeline: denoisers that share the timesteps between them, and their solver.

A copy of this file lies in every exported folder, to be opened where o2mkd-bench is not: it needs torch and diffusers
alone. ``O2MKDPipeline.from_pretrained(folder)`` opens such a folder, and so does
``DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)``.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import inspect
import os
import tempfile
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, upload_folder

MODULE = "pipeline"
CARD = "README.md"
# read at once: diffusers runs the code of every folder from one file, which the next folder's overwrites
SOURCE = Path(__file__).read_text(encoding="utf-8")

HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")


class O2MKDDenoiser(ModelMixin, ConfigMixin):
    """K denoisers seen as one: each answers for its interval of training timesteps (arXiv 2410.04191).

    On disk each is a diffusers model of its own, in the folders ``0`` (least noisy interval) to ``K - 1``.
    """

    config_name = "config.json"  # type: ignore[assignment]

    def __init__(self, experts: Sequence[ModelMixin], edges: Sequence[int], shape: Sequence[int]) -> None:
        """``edges``: the K - 1 inner edges, rising; an edge belongs to the noisier interval. ``shape``: (C, H, W).

        Raises:
            ValueError: unless there is one denoiser more than edges, and the edges rise strictly.
        """
        super().__init__()
        if len(experts) != len(edges) + 1 or any(b <= a for a, b in pairwise(edges)):
            raise ValueError(f"{len(experts)} denoisers do not fit the inner edges {list(edges)}")
        self.register_to_config(edges=list(edges), shape=list(shape))
        self.edges = tuple(edges)
        self.experts: Any = torch.nn.ModuleList(experts)

    def route(self, timestep: torch.Tensor | float) -> int:
        """The number of the denoiser in charge of ``timestep``: one number, or one an image.

        Raises:
            ValueError: when several would be in charge.
        """
        times = timestep.flatten().tolist() if isinstance(timestep, torch.Tensor) else [timestep]
        found = {bisect_right(self.edges, t) for t in times}
        if len(found) != 1:
            raise ValueError(f"the timesteps of one call lie in {len(found)} intervals; call once for each interval")
        return found.pop()

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, *args: Any, return_dict: bool = True, **kwargs: Any
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """The prediction of the denoiser in charge for ``sample`` (B, C, H, W); other arguments are handed to it."""
        expert = self.experts[self.route(timestep)]
        found = expert(sample, timestep, *args, return_dict=False, **kwargs)[0]
        return UNet2DOutput(sample=found) if return_dict else (found,)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write the denoisers, each as diffusers writes a model, and what joins them."""
        self.save_config(save_directory)
        for k, expert in enumerate(self.experts):
            expert.save_pretrained(
                os.path.join(save_directory, str(k)),
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str = "", **kwargs: Any
    ) -> O2MKDDenoiser:
        """Open what :meth:`save_pretrained` wrote, in eval mode; arguments are those of diffusers' models."""
        hub = {key: kwargs[key] for key in HUB if key in kwargs}
        config: Any = cls.load_config(pretrained_model_name_or_path, subfolder=subfolder, **hub)
        experts = []
        for k in range(len(config["edges"]) + 1):
            place = f"{subfolder}/{k}" if subfolder else str(k)
            about: Any = cls.load_config(pretrained_model_name_or_path, subfolder=place, **hub)
            made = getattr(diffusers, about["_class_name"])
            experts.append(made.from_pretrained(pretrained_model_name_or_path, subfolder=place, **kwargs))
        return cls(experts, config["edges"], config["shape"]).eval()


class O2MKDScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A solver written as a table of numbers.

    Line i takes the prediction for ``states[i]`` at timestep ``t``, which makes ``epsilon[i]`` and ``x0[i]`` known, and
    gives ``states[i + 1] = sum a_j * states[j] + sum e_j * epsilon[j] + sum b_j * x0[j] + noise * fresh``, all of it in
    float32. Any sampler whose coefficients depend on the noise schedule and the timesteps alone can be written so.
    """

    order = 1

    def __init__(
        self,
        program: Sequence[Mapping[str, Any]],
        prediction_type: str = "epsilon",
        clip: str = "x0",
        start: float = 1.0,
        num_train_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        trained_betas: Sequence[float] | None = None,
    ) -> None:
        """The betas are for other schedulers, made ``from_config`` of this one; the program holds what it needs.

        Args:
            program: lines with ``t``, the schedule's ``alpha`` and ``sigma`` there, ``states``, ``epsilon`` and ``x0``
                as lists of pairs (j, coefficient) in the order in which they are added, and ``noise``.
            prediction_type: what the network predicts: ``epsilon``, ``v_prediction`` or ``sample``.
            clip: ``none``; ``x0`` clamps x0 to [-1, 1] and keeps epsilon; ``x0+epsilon`` derives epsilon anew from it.
            start: standard deviation of ``states[0]``.
        """
        self.register_to_config(
            program=[dict(line) for line in program],
            prediction_type=prediction_type,
            clip=clip,
            start=start,
            num_train_timesteps=num_train_timesteps,
            beta_schedule=beta_schedule,
            beta_start=beta_start,
            beta_end=beta_end,
            trained_betas=None if trained_betas is None else list(trained_betas),
        )
        self.init_noise_sigma = start
        self._lines, self._prediction, self._clip, self._trained = program, prediction_type, clip, num_train_timesteps
        self._terms = {kind: [dict(line[kind]) for line in program] for kind in ("states", "epsilon", "x0")}
        self._last = {kind: {j: i for i, line in enumerate(lines) for j in line} for kind, lines in self._terms.items()}
        self.set_timesteps()

    def __len__(self) -> int:
        return self._trained

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """Begin anew. ``timesteps`` is where the network is evaluated, in order: int64 (evaluations,).

        Raises:
            ValueError: for another number of evaluations than the program has.
        """
        lines = self._lines
        if num_inference_steps not in (None, len(lines)):
            raise ValueError(
                f"this solver evaluates its network {len(lines)} times, not {num_inference_steps}; leave "
                "num_inference_steps out, or put another scheduler into the pipeline"
            )
        self.num_inference_steps = len(lines)
        self.timesteps = torch.tensor([line["t"] for line in lines], device=device)
        self._step = 0
        self._known: dict[str, dict[int, torch.Tensor]] = {kind: {} for kind in self._terms}

    @property
    def step_index(self) -> int:
        """How many evaluations are done."""
        return self._step

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """``sample`` as it is; other schedulers scale it."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor | float,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """The state after this evaluation, computed in float32, in the dtype of ``sample``.

        Args:
            model_output: what the network says of ``sample`` at ``timestep``, (B, C, H, W).
            timestep: the next entry of ``timesteps``.
            sample: the state before it.
            generator: draws the fresh noise, where the line adds some.
            variance_noise: that noise itself, standard normal (B, C, H, W).

        Raises:
            ValueError: when ``timestep`` is not the next one.
        """
        i, lines = self._step, self._lines
        if i == len(lines) or float(timestep) != lines[i]["t"]:
            due = "the program has ended" if i == len(lines) else f"timestep {lines[i]['t']} comes next"
            raise ValueError(f"step {i} at timestep {float(timestep):g}: {due}; call set_timesteps to begin anew")
        x, line = sample.float(), lines[i]
        x0, epsilon = self._clean(model_output.float(), x, line["alpha"], line["sigma"])
        total = torch.zeros_like(x)
        for kind, value in (("states", x), ("epsilon", epsilon), ("x0", x0)):
            self._add(kind, value, total)
        if line["noise"]:
            if variance_noise is None:
                variance_noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
            total.add_(variance_noise, alpha=line["noise"])
        self._step += 1
        found = total.to(sample.dtype)
        return SchedulerOutput(prev_sample=found) if return_dict else (found,)

    def _clean(
        self, output: torch.Tensor, x: torch.Tensor, alpha: float, sigma: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x0 and epsilon as the lines see them, from a prediction of any type."""
        match self._prediction:
            case "v_prediction":
                epsilon = sigma * x + alpha * output
            case "sample":
                epsilon = (x - alpha * output) / sigma
            case _:
                epsilon = output
        x0 = (x - sigma * epsilon) / alpha
        if self._clip != "none":
            x0 = x0.clamp(-1, 1)
        if self._clip == "x0+epsilon":
            epsilon = (x - alpha * x0) / sigma
        return x0, epsilon

    def _add(self, kind: str, value: torch.Tensor, total: torch.Tensor) -> None:
        """Add this line's terms of one kind, ``value`` being its newest; keep what a later line refers to."""
        i, last, known = self._step, self._last[kind], self._known[kind]
        if i in last:
            known[i] = value
        for j, coefficient in self._terms[kind][i].items():
            total.add_(known[j], alpha=coefficient)
            if last[j] == i:
                del known[j]


class O2MKDPipeline(DiffusionPipeline):
    """Draws images with a denoiser and its solver; any scheduler of diffusers that predicts alike can take its place.

    What is written by :meth:`save_pretrained` or :meth:`push_to_hub` brings this file and the model card along.
    """

    model_cpu_offload_seq = "text_encoder->denoiser->vae"  # type: ignore[assignment]
    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers' own attribute

    def __init__(
        self,
        denoiser: O2MKDDenoiser,
        scheduler: SchedulerMixin,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        guidance_scale: float | None = None,
    ) -> None:
        """``vae``, ``text_encoder``, ``tokenizer``: for denoisers of latents that follow text all of them, else none.

        ``guidance_scale``: of classifier-free guidance, where a call does not say another.
        """
        super().__init__()
        self.register_modules(
            denoiser=denoiser, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(guidance_scale=guidance_scale)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images. States stay float32 whatever the dtype of the denoiser.

        Args:
            batch_size: how many; the number of prompts, or of ``latents``, where those are given.
            num_inference_steps: for a scheduler that asks for it; the solver exported here has its own number.
            generator: draws the noise; one for all images, or one an image.
            latents: the initial noise, standard normal (B, C, H, W).
            prompt: one text an image, for a pipeline with a text encoder, and for no other.
            guidance_scale: g of e_u + g (e_c - e_u); with 1 the text alone is asked.
            output_type: ``pil``; ``np`` for float32 (B, H, W, C); ``pt`` for float32 (B, C, H, W), both in [0, 1].
            return_dict: False for a tuple in place of an ``ImagePipelineOutput``.

        Raises:
            ValueError: for a prompt without a text encoder, or the other way round.
        """
        device = self._execution_device
        guidance = self.config["guidance_scale"] if guidance_scale is None else guidance_scale
        passes = 1 if guidance in (None, 1) else 2
        texts = [prompt] if isinstance(prompt, str) else prompt
        follow = self._follow(texts, passes, device)
        batch_size = batch_size if texts is None else len(texts)
        self.scheduler.set_timesteps(num_inference_steps)
        x = latents
        if x is None:
            shape = (batch_size, *self.denoiser.config.shape)
            x = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        x = x.to(device, torch.float32) * self.scheduler.init_noise_sigma
        takes = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in takes else {}
        # kept on the host: which denoiser is in charge must be known without waiting for the device
        for t in self.progress_bar(self.scheduler.timesteps.cpu()):
            seen = self.scheduler.scale_model_input(x, t)
            rows = torch.cat([seen] * passes) if follow else seen
            predicted = self.denoiser(rows.to(self.denoiser.dtype), t, **follow, return_dict=False)[0].float()
            if follow and passes == 2:
                free, bound = predicted.chunk(2)
                predicted = free + guidance * (bound - free)
            x = self.scheduler.step(predicted, t, x, **extra, return_dict=False)[0]
        if self.vae is not None:
            x = self.vae.decode((x / self.vae.config.scaling_factor).to(self.vae.dtype), return_dict=False)[0].float()
        self.maybe_free_model_hooks()
        images: Any = (x / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _follow(self, texts: Sequence[str] | None, passes: int, device: torch.device) -> dict[str, torch.Tensor]:
        """What the denoisers are told beside image and timestep: the texts, and before them as many empty ones."""
        if (texts is None) != (self.text_encoder is None):
            raise ValueError("give a prompt" if texts is None else "this pipeline draws from no text; leave prompt out")
        if texts is None:
            return {}
        length = self.text_encoder.config.max_position_embeddings
        asked = [*([""] * len(texts) if passes == 2 else []), *texts]
        tokens = self.tokenizer(asked, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        states = self.text_encoder(tokens.input_ids.to(device))[0]
        # the precision in which the denoisers were shown conditions
        return {"encoder_hidden_states": states.half().to(self.denoiser.dtype)}

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As diffusers does; the parts that are classes of this file come from it, however it was imported."""
        own = {
            name: (__name__, value[1])
            for name, value in config_dict.items()
            if isinstance(value, list | tuple) and value[0] == MODULE
        }
        return super().extract_init_dict({**config_dict, **own}, **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the pipeline; ``push_to_hub`` and what goes with it are arguments of :meth:`push_to_hub`."""
        folder = Path(save_directory)
        parts = [name for name, part in self.components.items() if type(part).__module__ == __name__]
        for name in parts:
            # the file that will lie beside it, not the name under which this one happens to be imported
            self.register_to_config(**{name: (MODULE, type(getattr(self, name)).__name__)})
        super().save_pretrained(folder, safe_serialization, variant, max_shard_size)
        # the Hub wants the code of a part in the part's own folder
        for place in (folder, *(folder / name for name in parts)):
            (place / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
        card = Path(self.name_or_path or "") / CARD
        if self.name_or_path and card.is_file() and card.resolve() != (folder / CARD).resolve():
            (folder / CARD).write_text(card.read_text(encoding="utf-8"), encoding="utf-8")
        if push_to_hub:
            _upload(folder, kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> str:
        """Upload to a repository of the Hub, made where there is none: what :meth:`save_pretrained` writes.

        diffusers' own would put an empty model card in the place of the one with the results.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant)
            return _upload(Path(folder), repo_id, commit_message, private, token, create_pr)


def _upload(
    folder: Path,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
) -> str:
    repo = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    message = commit_message or f"Upload {O2MKDPipeline.__name__}"
    return upload_folder(repo_id=repo, folder_path=folder, token=token, commit_message=message, create_pr=create_pr)
