"""Teachers that exist already: diffusers folders on this machine and repositories of the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from .disk import read_text
from .errors import UserError
from .fingerprint import content_hash
from .identity import identity
from .plugins import BUILTIN, Plugin, registry
from .schedule import NoiseSchedule, Prediction

WEIGHTS = "diffusion_pytorch_model.safetensors"
# of a JSON file beside weights; the index of a sharded network names every tensor
LARGEST = 64 << 20
INDEX = f"{WEIGHTS}.index.json"
PICKLED = "diffusion_pytorch_model.bin"
"""Weights from before safetensors; the engine reads the tensors in them and runs nothing else."""
CODEC = ("vae", "text_encoder", "tokenizer")
"""The parts that make a pipeline one of latents and text; what else Stable Diffusion's has, no image needs."""
SCHEDULER = "scheduler_config.json"
DENOISERS = ("unet", "transformer")
"""What a pipeline calls its denoiser, and the folder it lies in."""

# Schedulers of diffusers whose networks see integer timesteps and x_t = alpha_t x0 + sigma_t noise. The others scale
# the input, or count time otherwise, and a network trained with them would be fed the wrong thing in silence.
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained denoiser and the noise schedule it was trained with.

    Attributes:
        folder: where its ``config.json`` lies.
        family: the model plugin that reads the class named there.
        model: ``config.json`` without diffusers' private notes, ``_class_name`` kept.
        scheduler: ``scheduler_config.json`` likewise.
        schedule, prediction: what ``scheduler`` means.
        weights: safetensors files, which together hold every tensor once, or one of the name ``PICKLED``.
        hash: of everything that decides what the network computes: config, schedule, prediction type, weights.
        codec: for a network that works on latents, the files of what stands between them and pixels, and between
            captions and conditions, by name below the pipeline; else none.
        pixels: side of the images that it draws, through its codec where it has one.
    """

    folder: Path
    family: Plugin
    model: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    schedule: NoiseSchedule
    prediction: Prediction
    weights: tuple[Path, ...]
    hash: str
    codec: Mapping[str, Path] = field(default_factory=dict)
    pixels: int | None = None


def read_checkpoint(path: Path, where: str, *, schedule: Mapping[str, Any] | None = None) -> Checkpoint:
    """Read a diffusers folder: a pipeline, or a bare network.

    A pipeline has ``unet/`` or ``transformer/``, and ``scheduler/``, below it, or both flat.

    ``where``: the suite's key, for errors. ``schedule``: the keys of a ``scheduler_config.json``, for a bare network
    without one.

    Raises:
        UserError: when something is missing or of a kind that cannot be run.
    """
    if not path.is_dir():
        raise UserError(f"{where}: there is no folder {path}; give the path of a diffusers pipeline or network")
    latent = _is_latent(path, where)
    if not latent:
        _check_pipeline(path, where)
    folder = next((path / name for name in DENOISERS if (path / name).is_dir()), path)
    model = _config(folder / "config.json", where)
    class_name = model.get("_class_name")
    family = _family(class_name, folder / "config.json", where)
    _check_latent(family, latent, path, where)
    codec = codec_files(path, where) if latent else {}
    # such a family leaves a network's variance out, where it has learned one
    learned = bool(family.traits.get("learned_variance", False))
    _check_channels(model, folder / "config.json", learned, where)
    scheduler = _scheduler(path, folder, schedule, learned, where)
    noise = NoiseSchedule.from_scheduler_config(scheduler, where)
    prediction = scheduler.get("prediction_type", "epsilon")
    weights = weight_files(folder, where, pickled=True)
    _check_headers([*weights, *codec.values()], where)
    facts = {
        "model": model,
        "schedule": noise.scheduler_config(),
        "prediction": prediction,
        "weights": [content_hash(file) for file in weights],
    }
    return Checkpoint(
        folder=folder,
        family=family,
        model=model,
        scheduler=scheduler,
        schedule=noise,
        prediction=cast(Prediction, prediction),
        weights=weights,
        hash=identity(facts),
        codec=codec,
        pixels=_pixels(model, codec, where),
    )


def codec_files(path: Path, where: str) -> dict[str, Path]:
    """What a pipeline's autoencoder, text encoder and tokenizer are made from, by name below it.

    Raises:
        UserError: when something is missing, or weights are there as pickles only.
    """
    found = {f"vae/{name}": path / "vae" / name for name in ("config.json", WEIGHTS)}
    encoder = path / "text_encoder"
    text = encoder / "model.safetensors"
    found |= {f"text_encoder/{file.name}": file for file in (encoder / "config.json", text)}
    found |= {f"tokenizer/{file.name}": file for file in sorted((path / "tokenizer").glob("*")) if file.is_file()}
    for file in found.values():
        if not file.is_file():
            raise UserError(f"{where}: {file} is missing; save the whole pipeline with safe_serialization=True")
    if not any(name in found for name in ("tokenizer/vocab.json", "tokenizer/tokenizer.json")):
        raise UserError(f"{where}: {path / 'tokenizer'} holds no vocabulary; save the whole pipeline")
    return found


def weight_files(folder: Path, where: str, pickled: bool = False) -> tuple[Path, ...]:
    """The safetensors files of a network's folder: the shards of its index, else the one file.

    ``pickled``: where there are none, the file ``PICKLED`` will do.

    Raises:
        UserError: when there are none, several that no index joins, or a shard is missing.
    """
    if (folder / INDEX).is_file():
        mapped = _json(folder / INDEX, where).get("weight_map")
        if not isinstance(mapped, dict) or not all(isinstance(name, str) for name in mapped.values()):
            raise UserError(f"{where}: {folder / INDEX} has no weight_map of names to files; copy or save it again")
        names = sorted(set(mapped.values()))
        if strays := [n for n in names if Path(n).name != n or not (folder / n).is_file()]:
            raise UserError(f"{where}: {folder / INDEX} names {strays[0]}, which is not in {folder}; copy it there")
        found = [folder / name for name in names]
    elif (folder / WEIGHTS).is_file():
        found = [folder / WEIGHTS]
    else:
        found = sorted(folder.glob("*.safetensors"))
    if not found and pickled and (folder / PICKLED).is_file():
        found = [folder / PICKLED]
    if not found:
        others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")]
        mend = "convert them to safetensors (diffusers: save_pretrained with safe_serialization=True)"
        reason = f"only pickled weights ({others[0].name}); {mend}" if others else f"no weights; expected {WEIGHTS}"
        raise UserError(f"{where}: {folder} has {reason}")
    if len(found) > 1 and not (folder / INDEX).is_file():
        several = ", ".join(file.name for file in found)
        raise UserError(f"{where}: {folder} has several weight files ({several}); keep one, or name it {WEIGHTS}")
    return tuple(found)


def _check_headers(files: Iterable[Path], where: str) -> None:
    """Raise UserError unless safetensors begin as such do, and hold what their headers say; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    for file in (file for file in files if file.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{where}: {file} cannot be read as safetensors ({error}); copy it again") from error


def resolve_hub(repo: str, revision: str | None = None) -> Path | None:
    """The snapshot of ``repo`` in the local Hugging Face cache, without the network.

    None where something of its config or its weights must be downloaded.

    Raises:
        UserError: when ``repo`` is no repository id.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    for name in (*(f"{name}/config.json" for name in DENOISERS), "config.json"):
        try:
            found = try_to_load_from_cache(repo, name, cache_dir=constants.HF_HUB_CACHE, revision=revision)
        except ValueError as error:
            raise UserError(f"hub id {repo!r} is not of the form owner/name; correct it ({error})") from error
        if isinstance(found, str):
            network = Path(found).parent
            snapshot = network.parent if "/" in name else network
            return snapshot if _has_weights(network) and _has_codec(snapshot) else None
    return None


def download_hub(repo: str, revision: str | None = None) -> Path:
    """The local snapshot of ``repo``, downloaded when the cache has not all of it; configs and safetensors only.

    A repository without safetensors gives its ``PICKLED`` weights.

    Raises:
        UserError: when it is not cached and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    if folder := resolve_hub(repo, revision):
        return folder
    names = ["config.json", "diffusion_pytorch_model*.safetensors", INDEX]
    parts = [f"{part}/{name}" for part in DENOISERS for name in names]
    wanted = ["model_index.json", *names, SCHEDULER, *parts, f"scheduler/{SCHEDULER}"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if not any(_has_weights(folder / part) for part in (*DENOISERS, "")):
            wanted += [PICKLED, *(f"{part}/{PICKLED}" for part in DENOISERS)]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
        if _is_latent(folder, repo):
            # of several precisions the one without a variant in its name
            codec = ["*/config.json", f"vae/{WEIGHTS}", "text_encoder/model.safetensors", "tokenizer/*"]
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[*wanted, *codec]))
        return folder
    except Exception as error:  # the client lets through errors of its transport, which changed twice so far
        at = f" at revision {revision}" if revision else ""
        command = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"teacher {repo!r}{at} is not in the local Hugging Face cache and could not be fetched ({reason}); run "
            f"`{command}` on a machine with network, bring its cache here and set HF_HOME to it, or give the teacher "
            "as `path:`"
        ) from error


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder, "cache", pickled=True))
    except UserError:
        return False


def _has_codec(folder: Path) -> bool:
    """Whether a pipeline has all of a codec, or needs none."""
    try:
        return not _is_latent(folder, "cache") or bool(codec_files(folder, "cache"))
    except UserError:
        return False


def _parts(path: Path, where: str) -> set[str]:
    """The parts that a pipeline's index names; none for a folder without one."""
    index = path / "model_index.json"
    found = _json(index, where) if index.is_file() else {}
    return {key for key, value in found.items() if isinstance(value, list) and any(value)}


def _is_latent(path: Path, where: str) -> bool:
    """Whether a pipeline draws latents from text, as Stable Diffusion's does."""
    return _parts(path, where).issuperset(CODEC)


def _check_latent(family: Plugin, latent: bool, path: Path, where: str) -> None:
    """Raise UserError for a network on latents without a codec, or a codec beside a network on pixels."""
    if latent and not family.traits.get("latent"):
        raise UserError(
            f"{where}: the pipeline {path} has a text_encoder and a vae, but its network is read by "
            f"{family.name}, which works on pixels; use a pipeline of nothing but a unet and a scheduler"
        )
    if family.traits.get("latent") and not latent:
        raise UserError(
            f"{where}: {path} holds a network that works on latents; give the whole pipeline with its "
            f"{', '.join(CODEC)} and model_index.json"
        )


def _pixels(model: Mapping[str, Any], codec: Mapping[str, Path], where: str) -> int | None:
    size = model.get("sample_size")
    if not codec or not isinstance(size, int):
        return size if isinstance(size, int) else None
    levels = _json(codec["vae/config.json"], where).get("block_out_channels", [0])
    if not isinstance(levels, list) or not 0 < len(levels) < 16:
        raise UserError(
            f"{where}: block_out_channels of {codec['vae/config.json']} is no list of levels; copy it again"
        )
    # each level of the autoencoder but the last halves the side
    return size << (len(levels) - 1)


def _check_pipeline(path: Path, where: str) -> None:
    """Raise UserError for a pipeline with parts beside network and scheduler that is none of those known."""
    index = path / "model_index.json"
    parts = _parts(path, where)
    if more := sorted(parts - {*DENOISERS, "scheduler"}):
        raise UserError(
            f"{where}: the pipeline {index} has a {more[0]}; use a pipeline of nothing but a {' or '.join(DENOISERS)} "
            "and a scheduler"
        )


def _family(class_name: Any, file: Path, where: str) -> Plugin:
    """The model plugin that reads networks of ``class_name``; a built-in comes before others."""
    plugins = registry().all("models")
    claims = [p for p in plugins if class_name in _classes(p)]
    if len(claims) == 1 or (claims and claims[0].distribution == BUILTIN):
        return claims[0]
    if claims:
        names = " and ".join(f"{p.distribution}:{p.name}" for p in claims)
        raise UserError(
            f"{where}: the class {class_name!r} of {file} is read by {names}; "
            "leave one of them out by O2MKD_BENCH_PLUGINS"
        )
    known = ", ".join(sorted({name for p in plugins for name in _classes(p)}))
    raise UserError(f"{where}: no model plugin reads the class {class_name!r} of {file}; known are {known or 'none'}")


def _classes(plugin: Plugin) -> tuple[str, ...]:
    """The diffusers classes that a model plugin reads."""
    named = plugin.traits.get("class_name") or ()
    return (named,) if isinstance(named, str) else tuple(named)


def _check_channels(model: Mapping[str, Any], file: Path, learned: bool, where: str) -> None:
    """Raise UserError unless a network predicts what it sees, and perhaps as much again for a ``learned`` variance."""
    seen, given = model.get("in_channels", 3), model.get("out_channels", 3)
    # where there may be more than it sees, null means just that many
    if given != seen and not (learned and given in (None, 2 * seen)):
        raise UserError(
            f"{where}: {file} has {given} output and {seen} input channels; a learned variance is not supported, use a "
            "network that predicts as many as it gets"
        )


def _scheduler(path: Path, folder: Path, given: Mapping[str, Any] | None, learned: bool, where: str) -> dict[str, Any]:
    """The scheduler's config, from the folder or as given by the suite, checked for what cannot be run."""
    files = [f for f in (path / "scheduler" / SCHEDULER, path / SCHEDULER, folder / SCHEDULER) if f.is_file()]
    if files and given is not None:
        raise UserError(f"{where}: the schedule is that of {files[0]}; remove `schedule` from the suite")
    if not files and given is None:
        raise UserError(
            f"{where}: {path} has no {SCHEDULER}, and weights do not tell their noise schedule; put the file there or "
            "give `schedule` in the suite"
        )
    config = _config(files[0], where) if files else dict(given or {})
    source = files[0] if files else f"{where}.schedule"
    if (name := config.get("_class_name", "DDPMScheduler")) not in SCHEDULERS:
        raise UserError(
            f"{where}: scheduler class {name!r} in {source} is not known; use one of {', '.join(SCHEDULERS)}"
        )
    if not learned and str(config.get("variance_type", "fixed_small")).startswith("learned"):
        raise UserError(f"{where}: variance_type in {source} is a learned one, which is not supported; use a fixed one")
    if (kind := config.get("prediction_type", "epsilon")) not in get_args(Prediction):
        raise UserError(f"{where}: prediction_type {kind!r} in {source}; use one of {', '.join(get_args(Prediction))}")
    return config


def _config(file: Path, where: str) -> dict[str, Any]:
    """A diffusers config without its private notes (version, origin), the class name kept."""
    return {key: value for key, value in _json(file, where).items() if key == "_class_name" or not key.startswith("_")}


def _json(file: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(read_text(file, LARGEST))
    except FileNotFoundError:
        raise UserError(f"{where}: {file} is missing; give the path of a diffusers pipeline or network") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: {file} cannot be read as JSON ({error}); copy or save it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: {file} is no JSON object; copy or save it again")
    return found
