"""Teachers that exist already: diffusers folders on this machine and repositories of the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
SCHEDULER = "scheduler_config.json"

# What a pipeline calls its denoiser, and the folder it lies in.
DENOISERS = ("unet", "transformer")

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
        weights: safetensors files, which together hold every tensor once.
        hash: of everything that decides what the network computes: config, schedule, prediction type, weights.
    """

    folder: Path
    family: Plugin
    model: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    schedule: NoiseSchedule
    prediction: Prediction
    weights: tuple[Path, ...]
    hash: str


@dataclass(frozen=True)
class HubRef:
    """A repository of the Hub as the local cache knows it.

    Attributes:
        revision: branch, tag or commit as asked for; None: the main branch.
        commit: the 40 hex digits, None as long as nobody has looked them up.
        folder: the local snapshot with config and all weights, None when something must be downloaded.
    """

    repo: str
    revision: str | None
    commit: str | None
    folder: Path | None


def read_checkpoint(
    path: Path, where: str, *, schedule: Mapping[str, Any] | None = None, cache: Path | None = None
) -> Checkpoint:
    """Read a diffusers folder: a pipeline, or a bare network.

    A pipeline has ``unet/`` or ``transformer/``, and ``scheduler/``, below it, or both flat.

    ``where``: the suite's key, for errors. ``schedule``: the keys of a ``scheduler_config.json``, for a bare network
    without one. ``cache``: where content hashes are remembered.

    Raises:
        UserError: when something is missing or of a kind that cannot be run; weights in pickles are never read.
    """
    if not path.is_dir():
        raise UserError(f"{where}: there is no folder {path}; give the path of a diffusers pipeline or network")
    _check_pipeline(path, where)
    folder = next((path / name for name in DENOISERS if (path / name).is_dir()), path)
    model = _config(folder / "config.json", where)
    class_name = model.get("_class_name")
    family = _family(class_name, folder / "config.json", where)
    # such a family leaves a network's variance out, where it has learned one
    learned = bool(family.traits.get("learned_variance", False))
    _check_channels(model, folder / "config.json", learned, where)
    scheduler = _scheduler(path, folder, schedule, learned, where)
    noise = NoiseSchedule.from_scheduler_config(scheduler, where)
    prediction = scheduler.get("prediction_type", "epsilon")
    weights = weight_files(folder, where)
    _check_headers(weights, where)
    facts = {
        "model": model,
        "schedule": noise.scheduler_config(),
        "prediction": prediction,
        "weights": [content_hash(file, cache) for file in weights],
    }
    return Checkpoint(folder, family, model, scheduler, noise, cast(Prediction, prediction), weights, identity(facts))


def weight_files(folder: Path, where: str) -> tuple[Path, ...]:
    """The safetensors files of a network's folder: the shards of its index, else the one file.

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
    if not found:
        others = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.ckpt")]
        mend = "convert them to safetensors (diffusers: save_pretrained with safe_serialization=True)"
        reason = f"only pickled weights ({others[0].name}); {mend}" if others else f"no weights; expected {WEIGHTS}"
        raise UserError(f"{where}: {folder} has {reason}")
    if len(found) > 1 and not (folder / INDEX).is_file():
        several = ", ".join(file.name for file in found)
        raise UserError(f"{where}: {folder} has several weight files ({several}); keep one, or name it {WEIGHTS}")
    return tuple(found)


def _check_headers(files: Sequence[Path], where: str) -> None:
    """Raise UserError unless every file begins as safetensors do, and holds what its header says; no tensor is read."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise UserError(f"{where}: {file} cannot be read as safetensors ({error}); copy it again") from error


def resolve_hub(repo: str, revision: str | None = None) -> HubRef:
    """What the local Hugging Face cache knows of ``repo``, without the network.

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
            return HubRef(repo, revision, snapshot.name, snapshot if _has_weights(network) else None)
    pinned = revision is not None and re.fullmatch("[0-9a-f]{40}", revision)
    return HubRef(repo, revision, revision if pinned else None, None)


def download_hub(repo: str, revision: str | None = None) -> Path:
    """The local snapshot of ``repo``, downloaded when the cache has not all of it; configs and safetensors only.

    Raises:
        UserError: when it is not cached and cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    if folder := resolve_hub(repo, revision).folder:
        return folder
    names = ["config.json", "diffusion_pytorch_model*.safetensors", INDEX]
    parts = [f"{part}/{name}" for part in DENOISERS for name in names]
    wanted = ["model_index.json", *names, SCHEDULER, *parts, f"scheduler/{SCHEDULER}"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
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
        return bool(weight_files(folder, "cache"))
    except UserError:
        return False


def _check_pipeline(path: Path, where: str) -> None:
    """Raise UserError for a pipeline with parts beside network and scheduler, such as one that works on latents."""
    index = path / "model_index.json"
    if not index.is_file():
        return
    parts = {key for key, value in _json(index, where).items() if isinstance(value, list) and any(value)}
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
