"""What a suite may say about the built-in metrics, and what the plan must know of them. Torch-free.

Column names follow the network: ``fid``, ``kid``, ``is``, ``precision`` and ``recall`` belong to the 2015 Inception
alone; any other network puts its own name behind ``fd``, ``kd``, ``is``, ``precision`` and ``recall``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from o2mkd_bench import Options, neutral
from o2mkd_bench.core.errors import NetworkUnavailable, UserError
from o2mkd_bench.core.fingerprint import content_hash
from o2mkd_bench.engine.scoring import check_width

from .architectures import check_timm

WEIGHTS = Path(__file__).parent / "weights"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
CLIP_WEIGHTS = "model.safetensors"
INCEPTION_VARIABLE = "O2MKD_INCEPTION_WEIGHTS"


class MetricOptions(Options):
    """Options of every built-in metric.

    Attributes:
        network: ``inception`` (the 2015-12-05 weights), ``embedded`` (the small network that ships for the dataset),
            or ``timm:NAME``.
        weights: a file with the weights of ``inception`` or of a timm network; without one they are downloaded
            on first use.
    """

    network: str = Field("inception", pattern=r"^(inception|embedded|timm:\S+)$")
    weights: str | None = neutral(None)

    @model_validator(mode="after")
    def _embedded_is_whole(self) -> MetricOptions:
        if self.network == "embedded" and self.weights:
            raise ValueError("an embedded network ships with its weights; remove 'weights'")
        return self


class KernelOptions(MetricOptions):
    """Options of the kernel distance: the mean over ``subsets`` random subsets of ``subset_size`` images."""

    subsets: int = Field(100, ge=1)
    subset_size: int = Field(1000, ge=2)


class InceptionScoreOptions(MetricOptions):
    """Options of the Inception score: the mean over ``splits`` parts of the images."""

    splits: int = Field(10, ge=1)


class PrecisionRecallOptions(MetricOptions):
    """Options of precision and recall: balls reach to the ``neighbours``-th nearest image."""

    neighbours: int = Field(3, ge=1)


class ClipOptions(Options):
    """Options of the CLIP score.

    Attributes:
        network: a CLIP of transformers by its id on the Hub; BK-SDM and most others take ViT-g-14 of LAION.
        weights: the folder of a local copy; without one it is downloaded on first use.
    """

    network: str = Field("laion/CLIP-ViT-g-14-laion2B-s34B-b88K", pattern=r"^[\w.-]+(/[\w.-]+)?$")
    weights: str | None = neutral(None)


def fid_columns(options: MetricOptions, dataset: str) -> tuple[str, ...]:
    return (_column("fid", "fd", options, dataset),)


def kid_columns(options: MetricOptions, dataset: str) -> tuple[str, ...]:
    return (_column("kid", "kd", options, dataset),)


def inception_score_columns(options: MetricOptions, dataset: str) -> tuple[str, ...]:
    return (_column("is", "is", options, dataset),)


def precision_recall_columns(options: MetricOptions, dataset: str) -> tuple[str, ...]:
    return tuple(_column(name, name, options, dataset) for name in ("precision", "recall"))


def _column(standard: str, other: str, options: MetricOptions, dataset: str) -> str:
    if options.network == "inception":
        return standard
    return f"{other}_{dataset if options.network == 'embedded' else options.network.removeprefix('timm:')}"


def network_id(options: MetricOptions, dataset: str, base: Path = Path()) -> dict[str, Any]:
    """What the network is, for identities: its name and the hash of its weights.

    The hash is None for weights from a hub, which the model's name with its tag stands for; the protocol of each
    score holds it once they are there.

    Raises:
        UserError: when no network is embedded for the dataset, or a file of timm weights does not exist.
    """
    if options.network == "inception":
        return {"network": "inception", "sha256": INCEPTION_SHA256}
    if options.network == "embedded":
        return {"network": f"embedded:{dataset}", "sha256": embedded_record(dataset)["sha256"]}
    path = weights_path(options, base)
    return {"network": options.network, "sha256": None if path is None else content_hash(path)}


def check_images(options: MetricOptions, dataset: str, images: int) -> None:
    """Refuse too few images before anything is trained, where the feature width is known without loading the network.

    Raises:
        UserError: naming ``sampling.images``.
    """
    if options.network == "embedded":
        check_width(int(embedded_record(dataset)["width"]), images)


def check_subsets(options: KernelOptions, dataset: str, images: int) -> None:
    """As :func:`check_images`, and every subset must fit into them."""
    check_images(options, dataset, images)
    what = f"subsets of {options.subset_size} do not fit into the {images} of sampling.images"
    _check_enough("kid.subset_size", options.subset_size, images, what)


def check_splits(options: InceptionScoreOptions, dataset: str, images: int) -> None:
    """As :func:`check_images`, and every split must have one of them."""
    check_images(options, dataset, images)
    what = f"the {images} of sampling.images make no {options.splits} splits"
    _check_enough("inception_score.splits", options.splits, images, what)


def check_neighbours(options: PrecisionRecallOptions, dataset: str, images: int) -> None:
    """As :func:`check_images`, and each must have as many neighbours."""
    check_images(options, dataset, images)
    what = f"{options.neighbours} neighbours need more than the {images} of sampling.images"
    _check_enough("precision_recall.neighbours", options.neighbours + 1, images, what)


def _check_enough(key: str, least: int, images: int, what: str) -> None:
    if images < least:
        raise UserError(f"metrics.{key}: {what}; lower it or raise sampling.images")


def check_network(options: MetricOptions, dataset: str, base: Path = Path()) -> None:
    """Refuse a network that nobody has, and a file that is named for the Inception and is not it.

    Raises:
        UserError: naming ``metrics.network``. NetworkUnavailable for the file.
    """
    if options.network.startswith("timm:"):
        check_timm(options.network.removeprefix("timm:"))
    path = weights_path(options, base)
    if options.network == "inception" and path is not None and (found := content_hash(path)) != INCEPTION_SHA256:
        key = "metrics.weights" if options.weights else INCEPTION_VARIABLE
        raise NetworkUnavailable(
            f"{key}: {path} has sha256 {found[:12]}… and not {INCEPTION_SHA256[:12]}…, so it is not the 2015-12-05 "
            "Inception; name another file, or none to have it downloaded"
        )


def embedded_record(dataset: str) -> dict[str, Any]:
    """The record beside the weights of the network embedded for ``dataset``.

    Raises:
        UserError: when there is none.
    """
    known = sorted(path.stem for path in WEIGHTS.glob("*.json"))
    if dataset not in known:
        raise UserError(
            f"metrics: network 'embedded' exists for {', '.join(known)}, not for {dataset!r}; "
            "use inception or timm:NAME"
        )
    record: dict[str, Any] = json.loads((WEIGHTS / f"{dataset}.json").read_text(encoding="utf-8"))
    return record


def weights_path(options: MetricOptions, base: Path = Path()) -> Path | None:
    """The file that the option, or for Inception the environment, names; None when neither does.

    Raises:
        NetworkUnavailable: when it does not exist.
    """
    variable = os.environ.get(INCEPTION_VARIABLE) if options.network == "inception" else None
    if options.weights:
        path, key = base / Path(options.weights).expanduser(), "metrics.weights"
    elif variable:
        path, key = Path(variable).expanduser(), INCEPTION_VARIABLE
    else:
        return None
    if not path.is_file():
        raise NetworkUnavailable(f"{key}: {path} is no file; set it to the weights of {options.network}")
    return path


def clip_columns(options: ClipOptions, dataset: str) -> tuple[str, ...]:
    return ("clip_score",)


def clip_id(options: ClipOptions, dataset: str, base: Path = Path()) -> dict[str, Any]:
    """What the network of a CLIP score is, for identities; as :func:`network_id`."""
    folder = clip_folder(options, base)
    sha256 = None if folder is None else content_hash(folder / CLIP_WEIGHTS)
    return {"network": f"clip:{options.network}", "sha256": sha256}


def clip_folder(options: ClipOptions, base: Path = Path()) -> Path | None:
    """The folder that the option names; None when it names none.

    Raises:
        NetworkUnavailable: when there are no weights in it.
    """
    if not options.weights:
        return None
    folder = base / Path(options.weights).expanduser()
    if not (folder / CLIP_WEIGHTS).is_file():
        raise NetworkUnavailable(f"metrics.weights: {folder} holds no {CLIP_WEIGHTS}; set it to a CLIP of transformers")
    return folder
