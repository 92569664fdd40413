"""Text-conditional latent models: the family, its codec, guidance, and a whole run on a tiny Stable Diffusion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from o2mkd_bench import run
from o2mkd_bench.cli.door import main
from o2mkd_bench.core.checkpoints import download_hub, read_checkpoint, resolve_hub
from o2mkd_bench.core.errors import NetworkUnavailable, UserError
from o2mkd_bench.core.events import silent
from o2mkd_bench.core.models import Codec, ModelFamily
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.session import check_sources, prepare
from o2mkd_bench.core.sources import sources
from o2mkd_bench.core.store import Store
from o2mkd_bench.core.suite import from_mapping
from o2mkd_bench.engine.cost import network_cost
from o2mkd_bench.engine.finish import finished
from o2mkd_bench.engine.guidance import Guided
from o2mkd_bench.engine.sample import run_program
from o2mkd_bench.engine.weights import load_weights, save_weights
from o2mkd_bench.export import export
from o2mkd_bench.pipeline import O2MKDPipeline
from o2mkd_bench.stages.bench import Bench
from o2mkd_bench.stages.latents import open_codec
from o2mkd_bench.stages.samples import Painter, noise_source, solver
from o2mkd_bench.stages.speed import _painter
from o2mkd_plugins.models.unet2d_condition import UNet2DCondition, complete

transformers = pytest.importorskip("transformers")
from o2mkd_bench.testing import tiny_sd  # noqa: E402
from o2mkd_plugins.metrics.clip import ClipScore  # noqa: E402
from o2mkd_plugins.metrics.options import ClipOptions, clip_id  # noqa: E402
from o2mkd_plugins.models.codec import LatentCodec  # noqa: E402

FAMILY = UNet2DCondition()
# config.json of CompVis/stable-diffusion-v1-4
SD = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.2.2",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
PROMPTS = 24


@pytest.fixture(scope="session")
def systems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("systems")
    saved = tiny_sd.TRAIN, tiny_sd.VAL
    tiny_sd.TRAIN, tiny_sd.VAL = 20, PROMPTS
    try:
        tiny_sd.build(root)
    finally:
        tiny_sd.TRAIN, tiny_sd.VAL = saved
    return root


@pytest.fixture
def pipeline(systems: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(systems / "stable-diffusion", tmp_path / "sd"))


def suite_of(systems: Path, **changes: object) -> dict[str, object]:
    coco = {"root": str(systems / "coco"), "size": 32, "scored": 16, "prompts": PROMPTS, "test_fraction": 0.1}
    mapping: dict[str, object] = {
        "name": "tiny-sd",
        "device": "cpu",
        "datasets": [{"coco": coco, "label": "coco"}],
        "teachers": [{"name": "sd", "path": str(systems / "stable-diffusion")}],
        "students": [{"name": "tiny", "variant": "bk_tiny", "init": "teacher"}],
        "methods": ["output"],
        "wrappers": ["single"],
        "samplers": [{"pndm": {"steps": 3, "offset": 1}, "spacing": "leading"}],
        "metrics": [{"clip_score": {"weights": str(systems / "clip")}}],
        "budgets": [32],
        "training": {"batch": 8},
        "sampling": {"images": 8, "batch": 3, "guidance": 7.5},
        "speed": {"enabled": False},
        "probe": {"points": 2, "images": 2},
        "baselines": [],
    }
    return mapping | changes


# --- the family ---


@pytest.mark.parametrize(
    ("student", "millions"),
    [
        ({}, 859.52),
        ({"variant": "bk_base"}, 579.38),
        ({"variant": "bk_small"}, 482.35),
        ({"variant": "bk_tiny"}, 323.38),
    ],
)
def test_sizes_are_those_that_bk_sdm_publishes(student: dict[str, str], millions: float) -> None:
    # 0.86, 0.58, 0.49 and 0.33 B in arXiv 2305.15798
    config = FAMILY.student_config(SD, student, "s")
    with torch.device("meta"):
        network = FAMILY.build(config)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize("variant", ["bk_base", "bk_small", "bk_tiny"])
def test_a_removed_student_has_its_teachers_weights(variant: str, tmp_path: Path) -> None:
    teacher = FAMILY.build({**SD, **tiny_sd.UNET})
    config = FAMILY.student_config({**SD, **tiny_sd.UNET}, {"variant": variant}, "s")
    student = FAMILY.build(config)
    FAMILY.check_start({**SD, **tiny_sd.UNET}, config, "s")
    save_weights(teacher, tmp_path / "teacher.safetensors")
    names = FAMILY.inherited(student, {**SD, **tiny_sd.UNET})
    load_weights(student, tmp_path / "teacher.safetensors", names)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert all(torch.equal(ours[name], theirs[names[name]]) for name in ours)
    first = 1 if variant == "bk_tiny" else 0
    # as in the code of BK-SDM: the last layer of a level on the way up is the teacher's last
    name = "resnets.1.conv1.weight"
    assert names[f"up_blocks.0.{name}"] == f"up_blocks.{first}.{name.replace('1.', '2.', 1)}"
    assert names["down_blocks.1.attentions.0.proj_in.weight"] == "down_blocks.1.attentions.0.proj_in.weight"
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 77, 16)
    assert FAMILY.forward(student, x, t, condition).shape == x.shape


def test_width_keeps_the_channels_of_groups_and_heads() -> None:
    config = FAMILY.student_config(SD, {"width": 0.5}, "s")
    assert (config["block_out_channels"], config["norm_num_groups"], config["attention_head_dim"]) == (
        [160, 320, 640, 640],
        16,
        4,
    )


@pytest.mark.parametrize(
    ("student", "text"),
    [
        ({"width": 0.3}, "width 0.3 leaves fractions"),
        ({"variant": "bk_huge"}, "no variant of UNet2DConditionModel; known are bk_base"),
        ({"config": {"cross_attention_dim": 5}}, "cross_attention_dim is 5, the teacher's is 768"),
        ({"config": {"layers_per_blok": 1}}, "did you mean 'layers_per_block'"),
        ({"blocks": 0}, "a level of 0 blocks is none"),
        ({"config": {"block_out_channels": [320, 640]}}, "has 2 levels; give as many down_block_types"),
        ({"config": {"norm_num_groups": 7}}, "norm_num_groups 7 does not divide .* a divisor of 320"),
        ({"config": {"attention_head_dim": 3}}, "attention_head_dim 3, the number of heads, does not divide"),
        ({"config": {"attention_head_dim": [8, 8]}}, "does not divide"),
    ],
)
def test_what_is_no_student_is_refused(student: dict[str, object], text: str) -> None:
    with pytest.raises(UserError, match=text):
        FAMILY.student_config(SD, student, "students.s")


def test_blocks_cannot_be_removed_from_what_has_none() -> None:
    for changes in ({"layers_per_block": 1}, {"block_out_channels": [320]}):
        with pytest.raises(UserError, match=r"layer a level|too few levels"):
            FAMILY.student_config({**SD, **changes}, {"variant": "bk_tiny"}, "s")


def test_other_channels_have_no_place_for_the_teachers_weights() -> None:
    with pytest.raises(UserError, match="no place for its teacher's weights"):
        FAMILY.check_start(SD, FAMILY.student_config(SD, {"width": 0.5}, "s"), "s")
    with pytest.raises(UserError, match="cannot start from the weights"):
        ModelFamily.check_start(FAMILY, SD, FAMILY.student_config(SD, {"width": 0.5}, "s"), "s")
    # SD leaves out keys that its student's config says
    ModelFamily.check_start(FAMILY, SD, FAMILY.student_config(SD, {}, "s"), "s")


def test_another_class_is_refused() -> None:
    with pytest.raises(UserError, match="reads UNet2DConditionModel only"):
        complete({"_class_name": "UNet2DModel"}, "t")
    # what diffusers writes of arguments that are not in use
    assert complete({**SD, "class_embed_type": None, "conv_in_kernel": 3}, "t") == complete(SD, "t")


def test_a_teacher_is_not_trained_here() -> None:
    with pytest.raises(UserError, match="give a pipeline by path or hub"):
        FAMILY.teacher_config(ClipOptions(), 4, 8)


def test_cost_counts_the_cross_attention() -> None:
    config = FAMILY.student_config({**SD, **tiny_sd.UNET}, {}, "s")
    wider = {**config, "cross_attention_dim": 32}
    assert network_cost(FAMILY, wider, 4, 8)["macs"] > network_cost(FAMILY, config, 4, 8)["macs"]


def test_roles_meet_at_the_finest_level() -> None:
    for variant in (None, "bk_tiny"):
        network = FAMILY.build(FAMILY.student_config({**SD, **tiny_sd.UNET}, {"variant": variant}, "s"))
        roles = FAMILY.roles(network)
        assert network.get_submodule(roles["up.-1"]) is network.up_blocks[-1]
        assert ("mid" in roles) == (variant is None)


# --- the codec ---


def test_the_codec_is_that_of_diffusers(systems: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = systems / "stable-diffusion"
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    ours = LatentCodec(folder, lambda part: part.eval())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        bound, free = theirs.encode_prompt(["a red circle", "grass " * 100], "cpu", 1, True)
        assert torch.equal(ours.embed(["a red circle", "grass " * 100]), bound)
        assert torch.equal(ours.embed(["", ""]), free)
        pixels = theirs.image_processor.preprocess(images.float() / 255)
        latents = ours.encode(images)
        torch.testing.assert_close(latents, theirs.vae.encode(pixels).latent_dist.mean * 0.18215)
        assert torch.equal(ours.decode(latents), theirs.vae.decode(latents / 0.18215)[0])


def test_the_tokenizer_knows_words(systems: Path) -> None:
    tokenizer = LatentCodec(systems / "stable-diffusion", lambda part: part).tokenizer
    assert tokenizer.tokenize("A red circle") == ["a</w>", "red</w>", "circle</w>"]


def test_a_missing_weight_is_never_drawn(pipeline: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part, file in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        path = pipeline / part / f"{file}.safetensors"
        state = load_file(path)
        state.pop(sorted(state)[0])
        save_file(state, path, metadata={"format": "pt"})
        codec = LatentCodec(pipeline, lambda module: module)
        with pytest.raises(UserError, match=r"lacks|cannot be opened"):
            _ = codec.text if part == "text_encoder" else codec.vae


def test_a_damaged_file_is_one_sentence(pipeline: Path) -> None:
    (pipeline / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be opened as a AutoencoderKL"):
        _ = LatentCodec(pipeline, lambda module: module).vae


def test_what_is_made_of_captions_knows_its_plugins_sources(systems: Path, tmp_path: Path) -> None:
    plan = prepare(from_mapping(suite_of(systems)), tmp_path).plan
    kinds = {stage.kind: set(sources(stage, registry())) for stage in plan.stages.values()}
    assert kinds["latents"] == kinds["prompts"] == {"datasets:coco"}
    assert kinds["codec"] == {"models:unet2d_condition"}


def test_without_transformers_a_run_does_not_begin(
    monkeypatch: pytest.MonkeyPatch, systems: Path, tmp_path: Path
) -> None:
    session = prepare(from_mapping(suite_of(systems)), tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"o2mkd-bench\[text\]"):
        check_sources(session.plan, Store(tmp_path), registry())


# --- guidance and what is done after ---


class Echo:
    """A router that answers with the mean of each row's condition, and notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, float]] = []
        self.fitted = 0

    def fit(self, batch: int) -> None:
        self.fitted = batch

    def __call__(self, x: torch.Tensor, t: float, condition: torch.Tensor) -> torch.Tensor:
        self.asked.append((len(x), t))
        return torch.ones_like(x) * condition.float().mean((1, 2)).view(-1, 1, 1, 1)


@pytest.mark.parametrize(("guidance", "rows"), [(None, 1), (1.0, 1), (7.5, 2), (0.0, 2)])
def test_guidance_is_one_call_of_twice_the_batch(guidance: float | None, rows: int) -> None:
    router, conditions = Echo(), np.arange(5, dtype=np.float16)[:, None, None] * np.ones((1, 2, 3), np.float16)
    null = torch.full((2, 3), -1.0, dtype=torch.float16)
    guided = Guided(router, conditions, null, guidance)
    guided.prompt(torch.tensor([4, 0, 2]))
    guided.fit(3)
    found = guided(torch.zeros(3, 1, 2, 2), 7)[:, 0, 0, 0]
    g = 1.0 if guidance is None else guidance
    assert found.tolist() == [-1 + g * (value + 1) for value in (4, 0, 2)]
    assert (router.asked, router.fitted) == ([(3 * rows, 7)], 3 * rows)


def test_speeds_are_read_at_any_batch() -> None:
    call = SimpleNamespace(network=torch.nn.Linear(1, 1))
    painter = _painter(SimpleNamespace(calls=[call]), (2, 3), 3000, 7.5)
    assert isinstance(painter, Guided)
    painter.prompt(torch.arange(3000))


def test_more_images_than_prompts_are_refused(
    systems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = tmp_path / "suite.json"
    suite.write_text(json.dumps(suite_of(systems)))
    results = run(suite_of(systems), out=tmp_path / "out", store=tmp_path / "store")
    (cell,) = [row["cell"] for row in results.document["rows"] if row["role"] == "student"]
    for n, code in ((PROMPTS + 1, 2), (1, 0)):
        words = [
            "sample",
            cell,
            "-n",
            n,
            "--suite",
            suite,
            "--store",
            tmp_path / "store",
            "--out",
            tmp_path / "one.png",
        ]
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        assert stopped.value.code == code
        told = capsys.readouterr().err
        assert (f"draws from {PROMPTS} prompts, one an image; ask for fewer" in told) == (code == 2)


def test_a_codec_under_another_name_is_refused(pipeline: Path) -> None:
    vae = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match=r"vae/diffusion_pytorch_model\.safetensors is missing"):
        read_checkpoint(pipeline, "teachers.t")


def test_images_are_finished_as_pillow_does(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8)
    found = finished(images, ["jpeg 75", "resize 6 bicubic", "jpeg 75"])
    for one, image in zip(found, images, strict=True):
        # as BK-SDM does: saved, resized by Pillow's default, saved again with its default quality
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "a.jpg")
        Image.open(tmp_path / "a.jpg").resize((6, 6)).save(tmp_path / "a.jpg")
        assert np.array_equal(one.permute(1, 2, 0).numpy(), np.asarray(Image.open(tmp_path / "a.jpg")))
    assert torch.equal(finished(images, []), images)
    with pytest.raises(UserError, match="cannot be finished by 'blur 3'"):
        finished(images, ["blur 3"])


# --- checkpoints ---


def test_a_latent_pipeline_is_read(systems: Path) -> None:
    found = read_checkpoint(systems / "stable-diffusion", "t")
    assert (found.family.name, found.pixels) == ("unet2d_condition", 32)
    assert {name.partition("/")[0] for name in found.codec} == {"vae", "text_encoder", "tokenizer"}
    assert found.schedule.kind == "scaled_linear"


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("vae/diffusion_pytorch_model.safetensors", "is missing; save the whole pipeline"),
        ("text_encoder/model.safetensors", "is missing; save the whole pipeline"),
        ("tokenizer", "holds no vocabulary"),
        ("model_index.json", "works on latents; give the whole pipeline"),
    ],
)
def test_half_a_pipeline_is_refused(pipeline: Path, damage: str, text: str) -> None:
    path = pipeline / damage
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=text):
        read_checkpoint(pipeline, "teachers.t")


def test_a_pixel_network_beside_a_codec_is_refused(pipeline: Path) -> None:
    (pipeline / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(UserError, match="works on pixels"):
        read_checkpoint(pipeline, "t")


def test_the_hub_gives_the_codec_too(systems: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    source = systems / "stable-diffusion"
    names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
    names += [
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/model.fp16.safetensors",
        "safety_checker/model.safetensors",
    ]
    snapshot = tmp_path / "models--acme--sd" / "snapshots" / ("0" * 40)

    def download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, snapshot / name)
        return str(snapshot)

    def cached(repo: str, name: str, **_: object) -> str | None:
        return str(snapshot / name) if (snapshot / name).is_file() else None

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert resolve_hub("acme/sd") is None
    assert read_checkpoint(download_hub("acme/sd"), "t").pixels == 32
    assert resolve_hub("acme/sd") == snapshot
    (snapshot / "text_encoder" / "model.safetensors").unlink()
    assert resolve_hub("acme/sd") is None


# --- plans ---


def test_a_guided_evaluation_counts_twice(systems: Path, tmp_path: Path) -> None:
    def nfe(**sampling: object) -> tuple[int, ...]:
        mapping = suite_of(systems, sampling={"images": 8, **sampling})
        plan = prepare(from_mapping(mapping), tmp_path).plan
        (cell,) = [c for c in plan.cells if c.role == "teacher"]
        return cell.nfe, *cell.calls, "guidance" in plan.stages[cell.samples].spec

    # three steps of PLMS are four evaluations
    assert nfe() == (4, 4, False)
    assert nfe(guidance=1) == (4, 4, True)
    assert nfe(guidance=7.5) == (8, 8, True)


def test_latents_are_not_clipped_unless_asked(systems: Path, tmp_path: Path) -> None:
    for sampling, clip in (({}, "none"), ({"clip": "x0"}, "x0")):
        mapping = suite_of(systems, sampling={"images": 8, **sampling}, samplers=[{"ddim": {"steps": 2}}])
        assert {cell.facts["clip"] for cell in prepare(from_mapping(mapping), tmp_path).plan.cells} == {clip}


def test_plans_that_cannot_be(systems: Path, tmp_path: Path) -> None:
    digits = {
        "datasets": ["digits"],
        "teachers": [{"name": "t", "train": {"model": {"unet2d": {"block_out_channels": [8]}}, "images": 64}}],
        "students": [{"name": "s"}],
        "metrics": [{"fid": {"network": "embedded"}}],
    }
    pixels = suite_of(systems, **digits, sampling={"images": 640, "guidance": 2})
    pixels["budgets"] = [64]
    many = suite_of(systems, sampling={"images": PROMPTS + 1})
    other = suite_of(systems)
    other["datasets"] = [{"coco": {**other["datasets"][0]["coco"], "size": 64}, "label": "coco"}]
    uncaptioned = suite_of(systems, datasets=[{"image_folder": {"root": str(systems / "coco"), "size": 32}}])
    trained = suite_of(systems, teachers=digits["teachers"], students=digits["students"])
    for mapping, text in (
        (pixels, "draws from no text"),
        (many, "need as many prompts"),
        (other, "has captioned images of 64 pixels"),
        (uncaptioned, "has no captions"),
        (trained, "is for teachers that draw from text"),
    ):
        with pytest.raises(UserError, match=text):
            prepare(from_mapping(mapping), tmp_path)


def test_the_real_suite_plans_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from o2mkd_bench.core.suite import load

    monkeypatch.delenv("COCO_ROOT", raising=False)
    path = Path(__file__).resolve().parents[1] / "suites" / "coco30k.yaml"
    suite = load(path)
    assert all(cell.unresolved for cell in prepare(suite, tmp_path).plan.cells)
    with pytest.raises(UserError, match=r"coco\.root is empty; unpack"):
        prepare(suite, tmp_path, download=True)


# --- the whole path ---


def test_images_are_those_of_diffusers(systems: Path, tmp_path: Path) -> None:
    """Same prompts, same noise, same guidance, Stable Diffusion's own scheduler: the teacher's row, unfinished."""
    from diffusers import StableDiffusionPipeline

    mapping = suite_of(systems, include=[{"student": "none"}], students=[{"name": "none"}])
    coco = mapping["datasets"][0]["coco"]
    mapping["datasets"] = [{"coco": {**coco, "protocol": "clean", "scored": 32}, "label": "coco"}]
    results = run({k: v for k, v in mapping.items() if k != "include"}, out=tmp_path / "out", store=tmp_path / "store")
    assert results.failed == 0
    plan = prepare(from_mapping({k: v for k, v in mapping.items() if k != "include"}), tmp_path / "store").plan
    store = Store(tmp_path / "store")
    cell = next(c for c in plan.cells if c.role == "teacher")
    ours = np.load(store.read(cell.samples, "images.npy"))
    prompts = store.read_json(plan.stages[cell.samples].needs["prompts"][0], "captions.json")[:8]
    folder = systems / "stable-diffusion"
    theirs = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)
    theirs.set_progress_bar_config(disable=True)
    latents = noise_source(0, (4, 8, 8))(torch.arange(8), 0)
    found = theirs(prompts, num_inference_steps=3, guidance_scale=7.5, latents=latents, output_type="np").images
    expected = (found * 255).round().transpose(0, 3, 1, 2)
    # conditions are stored as float16
    assert np.abs(ours.astype(int) - expected).max() <= 1


def test_a_whole_run(systems: Path, tmp_path: Path) -> None:
    mapping = suite_of(
        systems,
        methods=["output", {"feature": {"layers": ["up.-1"]}}],
        wrappers=["single", {"o2mkd": {"students": 2}, "label": "k2"}],
        samplers=[{"pndm": {"steps": 2, "offset": 1}, "spacing": "leading"}, {"ddim": {"steps": 2}}],
        speed={"batch": 2, "repeats": 1},
    )
    results = run(mapping, out=tmp_path / "out", store=tmp_path / "store")
    rows = results.document["rows"]
    assert {row["status"] for row in rows} == {"done"}
    assert len(rows) == 2 + 2 * 2 * 2
    assert all(-1 <= row["scores"]["clip_score"] <= 1 for row in rows)
    assert {row["nfe"] for row in rows} == {6, 4}
    assert all(row["speed"]["images_per_second"] > 0 and row["guidance"] == 7.5 for row in rows)
    assert {row["clip"] for row in rows} == {"none"}
    protocol = results.document["metrics"][0]["protocol"]
    assert protocol["rounding"] == "uint8 round; jpeg 75; resize 16 bicubic; jpeg 75"
    store = Store(tmp_path / "store")
    (latents,) = [m for m in store.ls() if m.kind == "latents"]
    shapes = {name: np.load(store.read(latents.identity, name)).shape for name in latents.files}
    assert shapes == {
        "train.npy": (18, 4, 8, 8),
        "train.text.npy": (18, 77, 16),
        "test.npy": (2, 4, 8, 8),
        "test.text.npy": (2, 77, 16),
    }
    # the first of the training images, whose caption of the lowest id is not the first one of the file
    codec = LatentCodec(systems / "stable-diffusion", lambda part: part.eval())
    with torch.no_grad():
        text = codec.embed([f"a photo of {tiny_sd.scene(0)[1]}"])[0].half()
    assert torch.equal(torch.from_numpy(np.load(store.read(latents.identity, "train.text.npy"))[0]), text)
    again = run(mapping, out=tmp_path / "out", store=tmp_path / "store")
    assert again.document["rows"][3]["scores"] == rows[3]["scores"]


def test_measured_edges_and_rounds_follow_the_text(systems: Path, tmp_path: Path) -> None:
    mapping = suite_of(
        systems,
        wrappers=[{"o2mkd": {"students": 2, "intervals": "auto"}, "label": "auto"}],
        samplers=[{"progressive": {"steps": 2, "start": 4}}],
        budgets=[64],
    )
    results = run(mapping, out=tmp_path / "out", store=tmp_path / "store")
    assert results.failed == 0
    assert {row["status"] for row in results.document["rows"]} == {"done"}


def test_students_trained_together_or_alone_are_equal(systems: Path, tmp_path: Path) -> None:
    mapping = suite_of(
        systems, methods=["output", "none"], metrics=[{"clip_score": {"weights": str(systems / "clip")}}]
    )
    made = []
    for cohort in (1, "auto"):
        store = tmp_path / str(cohort)
        run({**mapping, "cohort": cohort}, out=tmp_path / "out", store=store)
        students = [m for m in Store(store).ls() if m.kind == "student"]
        made.append({m.identity: m.files["ema.safetensors"].sha256 for m in students})
    assert made[0] == made[1]
    assert len(made[0]) == 2


# --- the CLIP score ---


def test_the_clip_score_is_that_of_transformers(systems: Path) -> None:
    metric = ClipScore(ClipOptions(weights=str(systems / "clip")), "coco")
    network = metric.load(metric.layers())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    metric.captions = ["a red circle", "grass", "a red circle"]
    features = network.extractor.convert_features_tuple_to_dict(network.extractor(images))
    model = transformers.CLIPModel.from_pretrained(systems / "clip")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(systems / "clip")
    tokens = tokenizer(metric.captions, padding=True, return_tensors="pt")
    pixels = (images / 255 - network.extractor.mean) / network.extractor.std
    with torch.no_grad():
        logits = model(**tokens, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
    assert metric.compute(features, {}) == {"clip_score": pytest.approx(float(logits.diagonal().mean()), abs=1e-5)}
    assert network.name == "clip:laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
    metric.captions = ()
    with pytest.raises(UserError, match="have 0 captions"):
        metric.compute(features, {})


def test_missing_clip_weights_leave_the_column_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ClipOptions(weights=str(tmp_path))
    with pytest.raises(NetworkUnavailable, match=r"holds no model\.safetensors"):
        clip_id(options, "coco")
    assert clip_id(ClipOptions(), "coco")["sha256"] is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NetworkUnavailable, match="the CLIP of clip_score"):
        ClipScore(options, "coco").load(("image",))
    import huggingface_hub

    def refuse(repo: str, **_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(NetworkUnavailable, match="could not be fetched"):
        ClipScore(ClipOptions(), "coco").load(("image",))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(tmp_path / "nothing"))
    with pytest.raises(NetworkUnavailable, match=r"has no model\.safetensors"):
        ClipScore(ClipOptions(), "coco").load(("image",))


# --- the export ---


def test_an_exported_cell_draws_the_images_of_the_harness(systems: Path, tmp_path: Path) -> None:
    coco = suite_of(systems)["datasets"][0]["coco"]
    mapping = suite_of(
        systems,
        datasets=[{"coco": {**coco, "protocol": "clean", "scored": 32}, "label": "coco"}],
        wrappers=[{"o2mkd": {"students": 2}}],
    )
    run(mapping, out=tmp_path / "out", store=tmp_path / "store")
    session = prepare(from_mapping(mapping), tmp_path / "store")
    (cell,) = [c for c in session.plan.cells if c.role == "student"]
    stage = session.plan.stages[cell.samples]
    bench = Bench(session.store, "cpu", silent, session.registry)
    router = bench.router(stage.needs["students"], stage.spec["edges"], "ema", "fp32")
    schedule = bench.schedule(stage.needs["students"][0])
    painter, indices = Painter.of(bench, router, stage), torch.arange(4)
    painter.prompt(indices)
    program, noise = solver(stage.spec, schedule, session.registry), noise_source(0, (4, 8, 8))(indices, 0)
    last = run_program(program, schedule, painter.denoise, noise, lambda i: pytest.fail("no noise is asked for"))
    with torch.no_grad():
        expected = (open_codec(bench, stage).decode(last) / 2 + 0.5).clamp(0, 1)
    prompts = session.store.read_json(stage.needs["prompts"][0], "captions.json")[:4]

    folder = export(session, cell, tmp_path / "exported")
    assert {"vae", "text_encoder", "tokenizer", "denoiser", "scheduler"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.rglob("*.bin"))
    opened = O2MKDPipeline.from_pretrained(folder)
    assert len(opened.denoiser.experts) == 2
    images = opened(latents=noise, prompt=prompts, output_type="pt").images
    torch.testing.assert_close(images, expected, atol=1e-4, rtol=0)
    scored = np.load(session.store.read(cell.samples, "images.npy"))[:4].astype(int)
    assert np.abs((images * 255).round().numpy().astype(int) - scored).max() <= 1
    stranger = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert torch.equal(stranger(latents=noise, prompt=prompts, output_type="pt").images, images)
    free = opened(latents=noise, prompt=prompts, guidance_scale=1, output_type="pt").images
    assert not torch.allclose(free, images, atol=1e-3)
    assert len(opened(prompt="a red circle").images) == 1
    with pytest.raises(ValueError, match="give a prompt"):
        opened(2)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-to-image" in card
    assert "pipeline(prompt=[" in card


def test_a_codec_that_diffusers_does_not_know_is_not_exported() -> None:
    with pytest.raises(UserError, match="LatentCodec is no codec that diffusers knows"):
        Codec.parts(LatentCodec(Path(), lambda part: part))
