"""The DiT family: architectures as data, networks, roles, checkpoints, and a suite from end to end."""

from __future__ import annotations

import copy
import csv
import inspect
import json
import math
import shutil

import huggingface_hub
import pytest
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, Transformer2DModel
from pydantic import ValidationError
from toy import Events, run, session, suite

from o2mkd_bench.core.checkpoints import download_hub, read_checkpoint, resolve_hub
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.engine.cost import network_cost
from o2mkd_bench.engine.taps import Taps, resolve
from o2mkd_bench.engine.weights import load_checkpoint, load_weights, save_weights
from o2mkd_plugins.models.dit import CLASS_NAME, DEFAULTS, OLD_KEYS, OLD_NAME, DiT, complete
from o2mkd_plugins.models.options import DiTOptions

FAMILY = DiT()
COMMIT = "0123456789abcdef0123456789abcdef01234567"

# config.json of facebook/DiT-XL-2-256, which is of the old class, without the keys that say nothing to a DiT
XL = {**DEFAULTS, "_class_name": OLD_NAME, "_diffusers_version": "0.12.0.dev0", "out_channels": 8}

TINY = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}


def tiny(**changes):
    """A complete config for images (1, 8, 8)."""
    return FAMILY.teacher_config(DiTOptions(**TINY), channels=1, size=8) | changes


def drawn(config, seed=0):
    """A network of ``config`` in which no weight is zero, so that every part of it matters."""
    torch.manual_seed(seed)
    network = FAMILY.build(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def inputs(batch=3, channels=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, 8, 8, generator=generator), torch.tensor([0, 5, 999])[:batch]


# --- architectures ---------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_diffusers():
    signature = inspect.signature(DiTTransformer2DModel.__init__).parameters
    assert {name: p.default for name, p in signature.items() if name != "self"} == DEFAULTS


def test_keys_of_the_old_class_alone_are_known():
    signature = inspect.signature(Transformer2DModel.__init__).parameters
    ours = {name: p.default for name, p in signature.items() if name not in DEFAULTS and name != "self"}
    assert {name: OLD_KEYS[name] for name in ours} == ours


def test_a_student_of_fewer_blocks_starts_from_those_it_stands_for(tmp_path):
    teacher = drawn(tiny(num_layers=5))
    config = FAMILY.student_config(tiny(num_layers=5), {"blocks": 2}, "s")
    FAMILY.check_start(tiny(num_layers=5), config, "s")
    student = FAMILY.build(config)
    save_weights(teacher, tmp_path / "teacher.safetensors")
    load_weights(student, tmp_path / "teacher.safetensors", FAMILY.inherited(student, tiny(num_layers=5)))
    ours, theirs = student.transformer_blocks, teacher.transformer_blocks
    # ceil((i + 1) * 5 / 2) - 1
    for block, its in enumerate((2, 4)):
        assert torch.equal(ours[block].ff.net[0].proj.weight, theirs[its].ff.net[0].proj.weight)
    assert torch.equal(student.proj_out_2.weight, teacher.proj_out_2.weight)
    for other in (tiny(num_layers=6), tiny(num_layers=5, num_attention_heads=4)):
        with pytest.raises(UserError, match=r"s\.init: a student of other blocks"):
            FAMILY.check_start(tiny(num_layers=5), other, "s")


@pytest.mark.parametrize(
    ("student", "heads", "blocks"),
    [
        ({}, 16, 28),
        ({"width": 1.0, "blocks": None, "config": None}, 16, 28),
        ({"width": 0.5}, 8, 28),
        ({"blocks": 14}, 16, 14),
        ({"width": 0.25, "blocks": 7}, 4, 7),
        ({"config": {"num_layers": 3}}, 16, 3),
    ],
)
def test_a_student_has_fewer_heads_or_fewer_blocks(student, heads, blocks):
    config = FAMILY.student_config(XL | {"dropout": 0.1}, student, "s")
    assert config == complete(XL, "s") | {"num_attention_heads": heads, "num_layers": blocks}
    assert config["_class_name"] == CLASS_NAME


def test_a_student_may_drop_the_learned_variance_of_its_teacher():
    assert FAMILY.student_config(XL, {"config": {"out_channels": None}}, "s")["out_channels"] == 4


@pytest.mark.parametrize(("width", "nearest"), [(0.3, "0.3125"), (0.01, "0.0625"), (9.0, "4")])
def test_a_width_between_heads_is_refused_with_one_that_works(width, nearest):
    with pytest.raises(UserError, match=rf"^students\.s: width .* heads of .* 72 channels; .* works is {nearest}$"):
        FAMILY.student_config(XL, {"width": width}, "students.s")
    FAMILY.student_config(XL, {"width": float(nearest)}, "students.s")


def test_heads_that_are_no_multiple_of_four_together_are_not_offered():
    with pytest.raises(UserError, match=r"gives 1 heads of .* 6 channels; the nearest width that works is 1$"):
        FAMILY.student_config(tiny(attention_head_dim=6), {"width": 0.5}, "s")


def test_a_third_may_be_written_as_a_float():
    config = FAMILY.student_config(tiny(num_attention_heads=3), {"width": 0.333333}, "s")
    assert config["num_attention_heads"] == 1


@pytest.mark.parametrize(
    ("student", "text"),
    [
        ({"blocks": 0}, "0 blocks are no network"),
        ({"config": {"in_channels": 1, "out_channels": 1}}, r"s\.config: in_channels is 1, the teacher's is 4"),
        ({"config": {"sample_size": 64}}, "sample_size is 64, the teacher's is 32"),
        ({"config": {"num_layer": 1}}, "no key 'num_layer' of value 1; did you mean 'num_layers'"),
        ({"config": {"qqq": 1}}, "keys are those of"),
        ({"config": {"cross_attention_dim": 64}}, "no key 'cross_attention_dim' of value 64"),
        ({"config": {"_class_name": "UNet2DModel"}}, "reads DiTTransformer2DModel only"),
        ({"config": {"patch_size": 3}}, "patches of 3 pixels do not tile images of 32"),
        ({"config": {"num_attention_heads": 1, "attention_head_dim": 6}}, "6 channels, .* multiple of 4"),
        ({"config": {"out_channels": 5}}, "5 output channels for 4; use 4, or 8"),
        ({"config": {"num_embeds_ada_norm": None}}, "num_embeds_ada_norm None is no DiT"),
        ({"config": {"norm_type": "ada_norm"}}, "norm_type 'ada_norm'"),
    ],
)
def test_a_student_that_is_no_network_is_refused(student, text):
    with pytest.raises(UserError, match=text):
        FAMILY.student_config(XL, student, "s")


def test_other_networks_of_the_old_class_are_refused():
    with pytest.raises(UserError, match=r"^t: a Transformer2DModel with norm_type 'ada_norm_single' is no DiT"):
        FAMILY.student_config(XL | {"norm_type": "ada_norm_single"}, {}, "t")
    with pytest.raises(UserError, match="no key 'caption_channels' of value 4096"):
        FAMILY.student_config(XL | {"caption_channels": 4096}, {}, "t")
    assert complete(XL | OLD_KEYS, "t") == complete(XL, "t")


def test_a_teacher_config_is_complete_and_builds_the_network_it_says():
    config = tiny()
    assert config.keys() == {"_class_name", *DEFAULTS}
    network = FAMILY.build(config)
    assert type(network) is DiTTransformer2DModel
    assert network.training
    assert {key: network.config[key] for key in DEFAULTS} == {key: config[key] for key in DEFAULTS}


def test_a_teacher_that_is_no_network_is_refused():
    with pytest.raises(UserError, match="do not tile images of 8"):
        FAMILY.teacher_config(DiTOptions(patch_size=3), 1, 8)
    with pytest.raises(UserError, match="multiple of 4"):
        FAMILY.teacher_config(DiTOptions(num_attention_heads=3, attention_head_dim=2), 1, 8)
    for wrong in ({"num_layers": 0}, {"num_embeds_ada_norm": -1}, {"dropout": 1.0}, {"width": 1}):
        with pytest.raises(ValidationError):
            DiTOptions(**wrong)


# --- networks --------------------------------------------------------------------------------------------------------


def test_without_a_condition_it_is_told_the_null_class():
    network, (x, t) = drawn(tiny(num_embeds_ada_norm=10)).eval(), inputs()
    with torch.no_grad():
        found = FAMILY.forward(network, x, t)
        null, three = (network(x, timestep=t, class_labels=torch.full((3,), c)).sample for c in (10, 3))
        assert torch.equal(found, null)
        assert torch.equal(FAMILY.forward(network, x, t, torch.full((3,), 3)), three)
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert not torch.allclose(null, three)


def test_a_network_without_classes_has_the_null_class():
    network = drawn(tiny(num_embeds_ada_norm=0))
    assert network.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 1
    assert FAMILY.forward(network, *inputs()).isfinite().all()


def test_of_a_learned_variance_the_first_half_is_taken():
    network, (x, t) = drawn(tiny(in_channels=3, out_channels=6)), inputs(channels=3)
    with torch.no_grad():
        found = FAMILY.forward(network, x, t)
        whole = network(x, timestep=t, class_labels=torch.zeros(3, dtype=torch.int64)).sample
    assert whole.shape == (3, 6, 8, 8)
    assert torch.equal(found, whole[:, :3])


def test_training_draws_nothing():
    """diffusers drops a tenth of the labels while training, in each block anew."""
    network, (x, t) = drawn(tiny(num_embeds_ada_norm=10)).train(), inputs()
    before = torch.get_rng_state()
    trained = FAMILY.forward(network, x, t, torch.full((3,), 3))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(trained, FAMILY.forward(network.eval(), x, t, torch.full((3,), 3)))


def test_what_it_computes_has_the_type_of_its_input():
    network, (x, t) = drawn(tiny()).to(torch.bfloat16), inputs()
    found = FAMILY.forward(network, x.to(torch.bfloat16), t)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), FAMILY.forward(drawn(tiny()), x, t), atol=0.2, rtol=0.1)


def test_it_compiles_to_one_graph():
    network, (x, t) = drawn(tiny()).eval(), inputs()
    compiled = torch.compile(lambda n, x, t: FAMILY.forward(n, x, t), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(network, x, t), FAMILY.forward(network, x, t))


def test_a_fresh_network_is_the_identity_in_every_block_and_learns_from_there():
    torch.manual_seed(0)
    network, (x, t) = FAMILY.build(tiny()), inputs()
    with Taps(network, {"first": "pos_embed", **FAMILY.roles(network)}) as taps:
        found = FAMILY.forward(network, x, t)
        seen = taps.take()
    assert not found.any()
    assert torch.equal(seen["last"].flatten(2).transpose(1, 2), seen["first"])
    for _ in range(3):
        (FAMILY.forward(network, x, t) - x).square().mean().backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.1 * parameter.grad
    assert all(p.grad.any() for name, p in network.named_parameters() if not name.endswith("to_k.bias"))


def test_build_draws_from_the_global_generator():
    first, second, other = (
        (torch.manual_seed(seed), FAMILY.build(tiny()).pos_embed.proj.weight.detach().clone())[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


# --- roles -----------------------------------------------------------------------------------------------------------


def test_features_are_what_the_blocks_put_out_as_images():
    network, (x, t) = drawn(tiny()), inputs()
    outputs = []
    network.transformer_blocks[0].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    # the average of a network in training is a copy of it
    for one in (network, copy.deepcopy(network)):
        with Taps(one, resolve(one, ["block.0", "mid", "last"], FAMILY.roles(one), "n")) as taps:
            FAMILY.forward(one, x, t)
            seen = taps.take()
        assert {f.shape for f in seen.values()} == {(3, 8, 4, 4)}
        # tokens are rows of patches
        assert torch.equal(seen["block.0"][1, :, 2, 3], outputs.pop()[1, 2 * 4 + 3])
        assert torch.equal(seen["mid"], seen["block.0"])


@pytest.mark.parametrize(
    ("depth", "places"),
    [(28, (6, 13, 20, 27)), (14, (3, 6, 10, 13)), (4, (0, 1, 2, 3)), (3, (0, 1, 2, 2)), (1, (0, 0, 0, 0))],
)
def test_places_are_the_same_share_of_any_depth(depth, places):
    with torch.device("meta"):
        roles = FAMILY.roles(FAMILY.build(tiny(num_layers=depth)))
    names = ("early", "mid", "late", "last")
    assert list(roles) == [*(f"block.{i}" for i in range(depth)), *names]
    assert tuple(roles[name] for name in names) == tuple(roles[f"block.{i}"] for i in places)


def test_features_leave_the_weights_of_diffusers_as_they_are(tmp_path):
    network = drawn(tiny())
    network.save_pretrained(tmp_path)
    theirs, (x, t) = DiTTransformer2DModel.from_pretrained(tmp_path), inputs()
    with torch.no_grad():
        assert torch.equal(theirs(x, timestep=t, class_labels=t * 0).sample, FAMILY.forward(network.eval(), x, t))


def test_checkpointed_activations_give_the_same_gradients_and_features():
    found = []
    for again in (False, True):
        network, (x, t) = drawn(tiny()), inputs()
        if again:
            FAMILY.checkpoint_activations(network)
        calls = []
        network.transformer_blocks[1].ff.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with Taps(network, {"mid": FAMILY.roles(network)["mid"]}) as taps:
            loss = FAMILY.forward(network, x, t).square().mean()
            loss = loss + taps.take()["mid"].square().mean()
        loss.backward()
        assert len(calls) == 1 + again
        found.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_cost_is_that_of_the_paper():
    """118.64 Gflops, a multiplication with its addition being one; diffusers embeds t and class in every block."""
    width, tokens = 1152, 16 * 16
    block = 12 * width**2 * tokens + 2 * tokens**2 * width + 6 * width**2
    embedding, ends = 256 * width + width**2, tokens * width * (16 + 32) + 2 * width**2
    cost = network_cost(FAMILY, FAMILY.student_config(XL, {}, "s"), channels=4, size=32)
    assert cost["macs"] == 28 * (block + embedding) + embedding + ends
    assert math.isclose(cost["macs"], 118.64e9, rel_tol=1e-3)
    half = network_cost(FAMILY, FAMILY.student_config(XL, {"blocks": 14}, "s"), channels=4, size=32)
    assert cost["macs"] - half["macs"] == 14 * (block + embedding)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A network with learned variance in a pipeline, published under the old class."""
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "pipeline"
    drawn(tiny(out_channels=2, num_embeds_ada_norm=10)).save_pretrained(folder / "transformer")
    DDPMScheduler(variance_type="learned_range").save_pretrained(folder / "scheduler")
    parts = {"transformer": ["diffusers", OLD_NAME], "scheduler": ["diffusers", "DDPMScheduler"], "vae": [None, None]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", **parts}))
    edit(folder / "transformer" / "config.json", _class_name=OLD_NAME, **OLD_KEYS)
    return folder


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_pipeline_is_read_and_its_network_loaded(pipeline):
    found = read_checkpoint(pipeline, "t")
    assert (found.family.name, found.folder) == ("dit", pipeline / "transformer")
    loaded, (x, t) = load_checkpoint(found, FAMILY), inputs()
    with torch.no_grad():
        theirs = DiTTransformer2DModel.from_pretrained(pipeline / "transformer")
        whole = theirs(x, timestep=t, class_labels=torch.full((3,), 10)).sample
        assert torch.equal(FAMILY.forward(loaded, x, t), whole[:, :1])
    edit(pipeline / "transformer" / "config.json", out_channels=None)
    assert FAMILY.student_config(read_checkpoint(pipeline, "t").model, {}, "s")["out_channels"] == 1
    edit(pipeline / "transformer" / "config.json", _class_name=CLASS_NAME, out_channels=3)
    with pytest.raises(UserError, match="has 3 output and 1 input channels"):
        read_checkpoint(pipeline, "t")
    edit(pipeline / "model_index.json", vae=["diffusers", "AutoencoderKL"])
    with pytest.raises(UserError, match="has a vae; use a pipeline of nothing but a unet or transformer and a sched"):
        read_checkpoint(pipeline, "t")


def test_a_repository_of_the_hub_is_read(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    asked = []

    def download(repo, revision, allow_patterns):
        names = [str(file.relative_to(pipeline)) for file in pipeline.rglob("*") if file.is_file()]
        names += ["vae/config.json", "transformer/diffusion_pytorch_model.bin"]
        asked.extend(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns))
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert download_hub("acme/dit") == pipeline
    assert set(asked) == {str(file.relative_to(pipeline)) for file in pipeline.rglob("*") if file.is_file()}
    home = tmp_path / "hub" / "models--acme--dit"
    shutil.copytree(pipeline, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(COMMIT)
    assert resolve_hub("acme/dit") == home / "snapshots" / COMMIT
    assert read_checkpoint(home / "snapshots" / COMMIT, "t").hash == read_checkpoint(pipeline, "t").hash


# --- from end to end -------------------------------------------------------------------------------------------------

DIT = {
    "name": "dit",
    "teachers": [{"name": "tiny", "train": {"model": {"dit": TINY}, "images": 256}}],
    "students": [{"name": "half", "width": 0.5}],
    "methods": ["output", {"feature": {"layers": ["mid", "last"]}}],
    "wrappers": ["single", {"o2mkd": {"students": 2}}],
}


def test_a_suite_of_dits_runs_to_its_table(tmp_path):
    events = Events()
    results = run(suite(**DIT), tmp_path / "store", tmp_path / "out", events)
    assert events.labels("failed") == []
    assert {row["status"] for row in results.document["rows"]} == {"done"}
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        rows = {(row["method"], row["wrapper"]): row for row in csv.DictReader(file)}
    teacher = rows["", ""]
    students = [row for key, row in rows.items() if key[0]]
    assert len(students) == 4
    assert all(math.isfinite(float(row["fd_digits"])) for row in rows.values())
    assert all(int(row["params_active"]) < int(teacher["params_active"]) for row in students)
    assert len({row["fd_digits"] for row in rows.values()}) == 5


def test_a_student_of_a_pretrained_dit_is_trained(pipeline, tmp_path):
    teacher = {"name": "given", "path": str(pipeline)}
    shallow = {"name": "shallow", "blocks": 1}
    small = suite(teachers=[teacher], students=[shallow], checkpoint_activations=True)
    found = run(small, tmp_path / "store", tmp_path / "out", Events()).document["rows"]
    assert {row["status"] for row in found} == {"done"}
    plan = session(small, tmp_path / "store").plan
    configs = {s.kind: s.spec["network"]["config"] for s in plan.stages.values() if s.kind in ("teacher", "student")}
    assert configs["teacher"]["_class_name"] == OLD_NAME
    assert configs["student"] == complete(configs["teacher"], "s") | {"num_layers": 1}
