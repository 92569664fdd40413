"""Everything that has a name in a suite, registered through the same entry points a third party uses."""

from __future__ import annotations

from o2mkd_bench.core.hookspecs import Register, hookimpl
from o2mkd_bench.executors.local import LocalOptions

from .datasets.options import (
    CelebAHQOptions,
    Cifar10Options,
    CocoOptions,
    DigitsOptions,
    ImageFolderOptions,
    LsunOptions,
)
from .executors.options import RayOptions
from .kd.options import FeatureOptions, OutputOptions, RelationOptions, TaskOptions
from .metrics import options as metrics
from .models.options import DiTOptions, UNet2DOptions
from .samplers.options import (
    DDIMOptions,
    DDPMOptions,
    DEISOptions,
    DiffusersOptions,
    DPMSolverOptions,
    PNDMOptions,
    ProgressiveOptions,
    SigmaOptions,
    UniPCOptions,
)
from .trackers.options import JsonLinesOptions, TensorBoardOptions, WandbOptions
from .wrappers.options import O2MKDOptions, SingleOptions

api = 1


@hookimpl
def register_kd_methods(register: Register) -> None:
    home = "o2mkd_plugins.kd"
    register(
        "none",
        f"{home}.none:NoTeacher",
        options=TaskOptions,
        paper="arXiv 2006.11239",
        summary="plain diffusion loss, no teacher",
        needs_teacher=False,
    )
    register(
        "output",
        f"{home}.output:OutputMatching",
        options=OutputOptions,
        paper="arXiv 1503.02531",
        summary="match the teacher's prediction",
    )
    register(
        "feature",
        f"{home}.feature:FeatureMatching",
        options=FeatureOptions,
        paper="arXiv 1412.6550, 1612.03928",
        summary="FitNets hints with adapters, or attention transfer",
    )
    register(
        "relation",
        f"{home}.relation:Relation",
        options=RelationOptions,
        paper="arXiv 1904.05068, 1907.09682",
        summary="RKD distance and angle, or similarity preserving",
    )


@hookimpl
def register_wrappers(register: Register) -> None:
    home = "o2mkd_plugins.wrappers"
    register("single", f"{home}.single:Single", options=SingleOptions, summary="one student for all timesteps")
    register(
        "o2mkd",
        f"{home}.o2mkd:O2MKD",
        options=O2MKDOptions,
        version="2",
        paper="arXiv 2410.04191",
        summary="K students, one an interval of timesteps, by a rule, by edges, or auto",
    )


@hookimpl
def register_intervals(register: Register) -> None:
    home = "o2mkd_plugins.wrappers.intervals"
    register("uniform", f"{home}:uniform", summary="equal width in t")
    register("snr", f"{home}:snr", summary="equal width in log-SNR")


@hookimpl
def register_samplers(register: Register) -> None:
    home = "o2mkd_plugins.samplers"
    register("ddpm", f"{home}.ddpm:DDPM", options=DDPMOptions, paper="arXiv 2006.11239", summary="ancestral sampling")
    register("ddim", f"{home}.ddim:DDIM", options=DDIMOptions, paper="arXiv 2010.02502", summary="DDIM with eta")
    register(
        "dpm_solver",
        f"{home}.dpm_solver:DPMSolver",
        options=DPMSolverOptions,
        paper="arXiv 2206.00927, 2211.01095",
        summary="DPM-Solver and DPM-Solver++, orders 1 to 3, single- and multistep",
    )
    register("euler", f"{home}.sigma:Euler", options=SigmaOptions, paper="arXiv 2206.00364", summary="Euler in sigma")
    register(
        "heun",
        f"{home}.sigma:Heun",
        options=SigmaOptions,
        paper="arXiv 2206.00364",
        summary="Heun in sigma, two evaluations a step",
    )
    register(
        "pndm",
        f"{home}.pndm:PNDM",
        options=PNDMOptions,
        paper="arXiv 2202.09778",
        summary="PNDM of order 4, warmed up by PLMS or Runge-Kutta",
    )
    register(
        "deis", f"{home}.deis:DEIS", options=DEISOptions, paper="arXiv 2204.13902", summary="DEIS, multistep in log rho"
    )
    register(
        "unipc",
        f"{home}.unipc:UniPC",
        options=UniPCOptions,
        paper="arXiv 2302.04867",
        summary="UniPC, predictor and corrector, orders 1 to 3",
    )
    register(
        "diffusers",
        f"{home}.scheduler:Scheduler",
        options=DiffusersOptions,
        summary="any linear scheduler of diffusers, traced into a program",
    )
    register(
        "progressive",
        f"{home}.progressive:Progressive",
        options=ProgressiveOptions,
        paper="arXiv 2202.00512",
        summary="progressive distillation: halve the steps, round by round",
    )


@hookimpl
def register_datasets(register: Register) -> None:
    home = "o2mkd_plugins.datasets"
    register("digits", f"{home}.digits:Digits", options=DigitsOptions, summary="1,797 real 8x8 digits of scikit-learn")
    register(
        "cifar10",
        f"{home}.cifar10:Cifar10",
        options=Cifar10Options,
        summary="CIFAR-10: downloaded, original batches, class folders or a tar of them",
    )
    register(
        "image_folder", f"{home}.image_folder:ImageFolder", options=ImageFolderOptions, summary="any folder of images"
    )
    register(
        "lsun",
        f"{home}.lsun:Lsun",
        options=LsunOptions,
        paper="arXiv 1506.03365",
        summary="a category of LSUN: the official lmdb, a folder of images, or a dataset of the Hub",
    )
    register(
        "celebahq",
        f"{home}.celebahq:CelebAHQ",
        options=CelebAHQOptions,
        paper="arXiv 1710.10196",
        summary="CelebA-HQ: a folder of images, or a dataset of the Hub",
    )
    register(
        "coco",
        f"{home}.coco:Coco",
        options=CocoOptions,
        paper="arXiv 1405.0312, 2305.15798",
        summary="MS-COCO with captions: pairs to train on, val2014 and its prompts to score with",
    )


@hookimpl
def register_models(register: Register) -> None:
    register(
        "unet2d",
        "o2mkd_plugins.models.unet2d:UNet2D",
        options=UNet2DOptions,
        summary="diffusers' UNet2DModel",
        class_name="UNet2DModel",
    )
    register(
        "dit",
        "o2mkd_plugins.models.dit:DiT",
        options=DiTOptions,
        paper="arXiv 2212.09748",
        summary="diffusers' DiTTransformer2DModel, told no class",
        class_name=("DiTTransformer2DModel", "Transformer2DModel"),
        learned_variance=True,
    )
    register(
        "unet2d_condition",
        "o2mkd_plugins.models.unet2d_condition:UNet2DCondition",
        paper="arXiv 2112.10752, 2305.15798",
        summary="diffusers' UNet2DConditionModel on latents and text, as Stable Diffusion v1 has it",
        class_name="UNet2DConditionModel",
        latent=True,
    )


@hookimpl
def register_metrics(register: Register) -> None:
    home = "o2mkd_plugins.metrics.fidelity"
    register(
        "fid",
        f"{home}:FrechetDistance",
        options=metrics.MetricOptions,
        paper="arXiv 1706.08500",
        summary="Fréchet distance of features",
        columns=metrics.fid_columns,
        network_id=metrics.network_id,
        check_images=metrics.check_images,
        check_network=metrics.check_network,
        higher_is_better=False,
    )
    register(
        "kid",
        f"{home}:KernelDistance",
        options=metrics.KernelOptions,
        paper="arXiv 1801.01401",
        summary="kernel distance of features",
        columns=metrics.kid_columns,
        network_id=metrics.network_id,
        check_images=metrics.check_subsets,
        check_network=metrics.check_network,
        higher_is_better=False,
    )
    register(
        "inception_score",
        f"{home}:InceptionScore",
        options=metrics.InceptionScoreOptions,
        paper="arXiv 1606.03498",
        summary="Inception score",
        columns=metrics.inception_score_columns,
        network_id=metrics.network_id,
        check_images=metrics.check_splits,
        check_network=metrics.check_network,
        higher_is_better=True,
    )
    register(
        "precision_recall",
        f"{home}:PrecisionRecall",
        options=metrics.PrecisionRecallOptions,
        paper="arXiv 1904.06991",
        summary="precision and recall of the feature manifolds",
        columns=metrics.precision_recall_columns,
        network_id=metrics.network_id,
        check_images=metrics.check_neighbours,
        check_network=metrics.check_network,
        higher_is_better=True,
    )

    register(
        "clip_score",
        "o2mkd_plugins.metrics.clip:ClipScore",
        options=metrics.ClipOptions,
        version="2",
        paper="arXiv 2104.08718",
        summary="CLIP score: the mean cosine of an image and the text that it was drawn from",
        columns=metrics.clip_columns,
        network_id=metrics.clip_id,
        needs_captions=True,
        higher_is_better=True,
    )


@hookimpl
def register_trackers(register: Register) -> None:
    register(
        "jsonl",
        "o2mkd_plugins.trackers.jsonl:JsonLines",
        options=JsonLinesOptions,
        summary="every event as a line of events.jsonl",
    )
    register(
        "tensorboard",
        "o2mkd_plugins.trackers.tensorboard:TensorBoard",
        options=TensorBoardOptions,
        summary="losses as TensorBoard shows them",
    )
    register(
        "wandb",
        "o2mkd_plugins.trackers.wandb:Wandb",
        options=WandbOptions,
        summary="losses in Weights & Biases, offline unless WANDB_MODE says otherwise",
    )


@hookimpl
def register_executors(register: Register) -> None:
    register(
        "local",
        "o2mkd_bench.executors.local:Local",
        options=LocalOptions,
        summary="worker processes on this machine, one a GPU",
    )
    register(
        "ray",
        "o2mkd_plugins.executors.ray:Ray",
        options=RayOptions,
        paper="arXiv 1712.05889",
        summary="tasks of a Ray cluster, or of one started here",
    )
