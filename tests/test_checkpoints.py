"""Pretrained teachers: diffusers folders, the Hub's local cache, weights on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file, save_file

from o2mkd_bench.core import checkpoints
from o2mkd_bench.core.checkpoints import PICKLED, download_hub, read_checkpoint, resolve_hub, weight_files
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.hookspecs import hookimpl
from o2mkd_bench.core.plugins import BUILTIN, Registry
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.engine.weights import load_checkpoint, load_weights, narrow, read_weights, save_weights
from o2mkd_plugins.models.options import UNet2DOptions
from o2mkd_plugins.models.unet2d import UNet2D

FAMILY = UNet2D()
WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = FAMILY.teacher_config(
    UNet2DOptions(block_out_channels=(8, 16), norm_num_groups=4, attention=(4,)), channels=1, size=8
)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def plugin_module(target="o2mkd_plugins.models.unet2d:UNet2D"):
    @hookimpl
    def register_models(register):
        register("unet2d", target, options=UNet2DOptions, class_name="UNet2DModel")

    return SimpleNamespace(api=1, register_models=register_models)


@pytest.fixture(autouse=True)
def plugins(monkeypatch, tmp_path):
    """A registry of its own and a fingerprint cache of its own."""
    found = Registry()
    found.add(plugin_module(), BUILTIN, "0", "builtin")
    assert not found.broken
    monkeypatch.setattr(checkpoints, "registry", lambda: found)
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path / "cache"))
    return found


@pytest.fixture
def network():
    torch.manual_seed(0)
    return FAMILY.build(CONFIG)


@pytest.fixture
def pipeline(network, tmp_path):
    """A pipeline as diffusers saves it."""
    folder = tmp_path / "pipeline"
    DDPMPipeline(network, DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")).save_pretrained(
        folder
    )
    return folder


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "drop"}))


def same(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_reading_imports_no_torch():
    code = "import sys, huggingface_hub, o2mkd_bench.core.checkpoints; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- folders ---------------------------------------------------------------------------------------------------------


def test_a_pipeline_is_read_and_its_network_loaded(pipeline, network):
    found = read_checkpoint(pipeline, "teachers.t")
    assert found.folder == pipeline / "unet"
    assert found.weights == (pipeline / "unet" / WEIGHTS,)
    assert found.schedule == NoiseSchedule(kind="squaredcos_cap_v2")
    assert (found.prediction, found.family.name) == ("sample", "unet2d")
    assert found.model["_class_name"] == "UNet2DModel"
    assert not {"_diffusers_version", "_name_or_path"} & {*found.model, *found.scheduler}
    loaded = load_checkpoint(found, found.family.load()())
    assert same(loaded, network)
    assert not loaded.training


def test_loading_leaves_the_global_generator_alone(pipeline):
    before = torch.get_rng_state()
    load_checkpoint(read_checkpoint(pipeline, "t"), FAMILY)
    assert torch.equal(before, torch.get_rng_state())


def test_a_flat_pipeline_is_read(pipeline):
    for part in ("unet", "scheduler"):
        for file in (pipeline / part).iterdir():
            shutil.move(file, pipeline / file.name)
        (pipeline / part).rmdir()
    found = read_checkpoint(pipeline, "t")
    assert (found.folder, found.prediction) == (pipeline, "sample")


def test_a_bare_network_is_read_with_a_scheduler_beside_it_or_in_the_suite(network, tmp_path):
    network.save_pretrained(tmp_path / "bare")
    with pytest.raises(
        UserError, match=r"teachers\.t: .* has no scheduler_config\.json, .* give `schedule` in the suite"
    ):
        read_checkpoint(tmp_path / "bare", "teachers.t")
    given = read_checkpoint(tmp_path / "bare", "t", schedule={"beta_schedule": "scaled_linear", "beta_end": 0.012})
    assert given.schedule == NoiseSchedule(kind="scaled_linear", beta_end=0.012)
    assert given.prediction == "epsilon"
    DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "bare")
    assert read_checkpoint(tmp_path / "bare", "t").prediction == "v_prediction"
    with pytest.raises(UserError, match="remove `schedule`"):
        read_checkpoint(tmp_path / "bare", "t", schedule={})


def test_a_sharded_network_in_half_precision_is_read_and_cast_up(network, tmp_path):
    network.half().save_pretrained(tmp_path / "bare", max_shard_size="20KB")
    found = read_checkpoint(tmp_path / "bare", "t", schedule={})
    assert len(found.weights) > 1
    loaded = load_checkpoint(found, FAMILY)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert same(loaded, network.float())


def test_the_hash_is_that_of_what_the_network_computes(pipeline, tmp_path):
    first = read_checkpoint(pipeline, "t").hash
    moved = tmp_path / "elsewhere"
    shutil.copytree(pipeline, moved)
    (moved / "README.md").write_text("hello")
    edit(moved / "unet" / "config.json", _diffusers_version="9")
    edit(moved / "scheduler" / "scheduler_config.json", clip_sample=False)
    assert read_checkpoint(moved, "other").hash == first
    seen = {first}
    edit(moved / "scheduler" / "scheduler_config.json", beta_end=0.03)
    seen.add(read_checkpoint(moved, "t").hash)
    edit(moved / "scheduler" / "scheduler_config.json", prediction_type="epsilon")
    seen.add(read_checkpoint(moved, "t").hash)
    edit(moved / "unet" / "config.json", freq_shift=0)
    seen.add(read_checkpoint(moved, "t").hash)
    state = load_file(moved / "unet" / WEIGHTS)
    save_file(state | {"conv_in.bias": state["conv_in.bias"] + 1}, moved / "unet" / WEIGHTS)
    seen.add(read_checkpoint(moved, "t").hash)
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("file", "changes", "text"),
    [
        ("unet/config.json", {"_class_name": "UNet3D"}, r"'UNet3D' of .*config\.json; known are UNet2DModel"),
        ("unet/config.json", {"_class_name": "drop"}, "class None"),
        ("unet/config.json", {"out_channels": 2}, "2 output and 1 input channels; a learned variance"),
        ("scheduler/scheduler_config.json", {"variance_type": "learned_range"}, "variance_type .* learned"),
        ("scheduler/scheduler_config.json", {"_class_name": "ScoreSdeVeScheduler"}, "'ScoreSdeVeScheduler' in"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type 'flow'"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine9"}, "beta_schedule 'cosine9'"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "has a vqvae"),
    ],
)
def test_what_cannot_be_run_is_refused(pipeline, file, changes, text):
    edit(pipeline / file, **changes)
    with pytest.raises(UserError, match=rf"^teachers\.t: .*{text}|^teachers\.t: {text}"):
        read_checkpoint(pipeline, "teachers.t")


def test_a_part_that_is_null_is_no_part(pipeline):
    edit(pipeline / "model_index.json", safety_checker=[None, None])
    read_checkpoint(pipeline, "t")


def test_folders_without_what_is_needed_are_refused(pipeline, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        read_checkpoint(tmp_path / "nowhere", "t")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_checkpoint(tmp_path, "t")
    (pipeline / "unet" / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        read_checkpoint(pipeline, "t")
    (pipeline / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_checkpoint(pipeline, "t")


def pickled(pipeline, saved):
    """A pipeline with ``saved`` in place of its weights."""
    (pipeline / "unet" / WEIGHTS).unlink(missing_ok=True)
    torch.save(saved, pipeline / "unet" / PICKLED)
    return pipeline


def test_weights_from_before_safetensors_are_read_as_tensors_alone(pipeline, network):
    found = read_checkpoint(pickled(pipeline, network.state_dict()), "t")
    assert found.weights == (pipeline / "unet" / PICKLED,)
    assert same(load_checkpoint(found, FAMILY), network)
    other = {name: value + 1 for name, value in network.state_dict().items()}
    assert read_checkpoint(pickled(pipeline, other), "t").hash != found.hash


class Runs:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("saved", ["code", "module", "nested", "cut"])
def test_what_is_not_weights_alone_is_refused_and_not_run(pipeline, network, tmp_path, saved):
    things = {"code": {"w": Runs(tmp_path / "ran")}, "module": network, "nested": {"state": network.state_dict()}}
    place = pickled(pipeline, things.get(saved, {})) / "unet" / PICKLED
    if saved == "cut":
        place.write_bytes(place.read_bytes()[:50])
    with pytest.raises(UserError, match=r"model\.bin (cannot be read as|holds more than).*safe_serialization") as error:
        load_checkpoint(read_checkpoint(pipeline, "t"), FAMILY)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_safetensors_come_before_pickles(pipeline):
    torch.save({}, pipeline / "unet" / PICKLED)
    assert read_checkpoint(pipeline, "t").weights == (pipeline / "unet" / WEIGHTS,)
    (pipeline / "unet" / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"only pickled weights \(diffusion_pytorch_model\.bin\); convert them"):
        weight_files(pipeline / "unet", "t")


def test_weight_files_are_found_or_refused(tmp_path):
    with pytest.raises(UserError, match="no weights; expected"):
        weight_files(tmp_path, "t")
    (tmp_path / "a.safetensors").touch()
    assert weight_files(tmp_path, "t") == (tmp_path / "a.safetensors",)
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(UserError, match=r"several weight files \(a\.safetensors, b\.safetensors\)"):
        weight_files(tmp_path, "t")
    (tmp_path / WEIGHTS).touch()
    assert weight_files(tmp_path, "t") == (tmp_path / WEIGHTS,)
    index = tmp_path / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "a.safetensors"}}))
    assert weight_files(tmp_path, "t") == (tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    for stray in ("gone.safetensors", f"../{tmp_path.name}/a.safetensors"):
        index.write_text(json.dumps({"weight_map": {"x": stray}}))
        with pytest.raises(UserError, match="copy it there"):
            weight_files(tmp_path, "t")


def test_a_class_that_two_plugins_read_is_refused_unless_one_is_built_in(pipeline, plugins, monkeypatch):
    plugins.add(plugin_module("other:Family"), "acme", "1", "acme")
    assert read_checkpoint(pipeline, "t").family.distribution == BUILTIN
    others = Registry()
    for name in ("acme", "zeta"):
        others.add(plugin_module("other:Family"), name, "1", name)
    monkeypatch.setattr(checkpoints, "registry", lambda: others)
    with pytest.raises(UserError, match="read by acme:unet2d and zeta:unet2d"):
        read_checkpoint(pipeline, "t")


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hugging Face cache; a function that puts a snapshot into it."""
    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))

    def put(source, repo="acme/tiny", commit=COMMIT, ref="main"):
        home = root / f"models--{repo.replace('/', '--')}"
        snapshot = home / "snapshots" / commit
        shutil.copytree(source, snapshot)
        (home / "refs").mkdir()
        (home / "refs" / ref).write_text(commit)
        return snapshot

    return put


def forbidden(*args, **kwargs):
    raise AssertionError("the network must not be asked")


def test_a_cached_repository_is_resolved_without_the_network(hub, pipeline, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", forbidden)
    snapshot = hub(pipeline)
    assert resolve_hub("acme/tiny") == snapshot
    assert resolve_hub("acme/tiny", COMMIT) == snapshot
    assert resolve_hub("acme/tiny", "v2") is None
    assert download_hub("acme/tiny") == snapshot
    assert read_checkpoint(snapshot, "t").hash == read_checkpoint(pipeline, "t").hash


def test_a_flat_repository_is_resolved(hub, pipeline):
    snapshot = hub(pipeline / "unet", ref="v2")
    assert resolve_hub("acme/tiny", "v2") == snapshot


def test_a_cached_config_without_weights_is_not_all_of_it(hub, pipeline):
    (pipeline / "unet" / WEIGHTS).unlink()
    hub(pipeline)
    assert resolve_hub("acme/tiny") is None


def test_what_is_not_cached_is_unresolved(hub):
    assert resolve_hub("acme/tiny") is None
    assert resolve_hub("acme/tiny", COMMIT) is None


def test_an_id_that_is_none_is_refused(hub):
    with pytest.raises(UserError, match="'a/b/c' is not of the form owner/name"):
        resolve_hub("a/b/c")


def test_a_download_asks_for_configs_and_safetensors_only(hub, tmp_path, monkeypatch):
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision)
        names = [
            *("model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"),
            *("README.md", "unet/diffusion_pytorch_model.bin", "text_encoder/model.safetensors", "run.py"),
        ]
        asked["files"] = list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns))
        for name in asked["files"]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert download_hub("acme/tiny", "v1") == tmp_path
    assert asked == {
        "repo": "acme/tiny",
        "revision": "v1",
        "files": ["model_index.json", "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"],
    }


def test_a_repository_of_pickles_alone_gives_those(hub, pipeline, network, tmp_path, monkeypatch):
    source, snapshot = pickled(pipeline, network.state_dict()), tmp_path / "snapshot"
    names = [file.relative_to(source).as_posix() for file in source.rglob("*") if file.is_file()]
    asked = []

    def download(repo, revision, allow_patterns):
        asked.append(list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns)))
        for name in asked[-1]:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert same(load_checkpoint(read_checkpoint(download_hub("acme/old"), "t"), FAMILY), network)
    assert [f"unet/{PICKLED}" in files for files in asked] == [False, True]


def test_a_download_that_fails_says_how_to_mend_it(hub, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        download_hub("acme/tiny", "v1")
    text = str(error.value)
    for part in ("'acme/tiny' at revision v1", "ConnectionError: no route", "HF_HOME", "`path:`"):
        assert part in text
    assert "`hf download acme/tiny --revision v1`" in text


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_survive_the_round_trip_and_equal_ones_make_equal_bytes(network, tmp_path):
    save_weights(network, tmp_path / "a.safetensors")
    other = FAMILY.build(CONFIG)
    assert not same(network, other)
    load_weights(other, tmp_path / "a.safetensors")
    assert same(network, other)
    save_weights(dict(reversed(other.state_dict().items())), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_half_precision_is_stored_as_such_and_integers_as_they_are(tmp_path):
    shared = torch.tensor([1.0, 1 / 3])
    state = {"w": shared, "tied": shared, "n": torch.tensor([70000])}
    save_weights(state, tmp_path / "w.safetensors", torch.float16)
    found = read_weights(tmp_path / "w.safetensors")
    assert torch.equal(found["w"], shared.half())
    assert torch.equal(found["tied"], shared.half())
    assert torch.equal(found["n"], state["n"])
    with pytest.raises(UserError, match=r"values of w do not fit into torch\.float16"):
        save_weights({"w": torch.tensor([70000.0])}, tmp_path / "w.safetensors", torch.float16)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("conv_in.bias"), r"a\.safetensors does not fit the network: it lacks conv_in\.bias;"),
        (lambda s: s.update(extra=torch.zeros(1)), "has left over extra;"),
        (lambda s: s.update({"conv_in.bias": torch.zeros(3)}), r"another shape conv_in\.bias \(3,\) for \(8,\);"),
        (lambda s: s.update({f"x{i}": torch.zeros(1) for i in range(9)}), "left over x0, x1, x2 and 6 more"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(network, tmp_path, change, text):
    state = network.state_dict()
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors")
    other = FAMILY.build(CONFIG)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(UserError, match=text):
        load_weights(other, tmp_path / "a.safetensors")
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_the_old_names_of_attention_are_read(network, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = network.state_dict()
    for key in list(state):
        for new, name in old.items():
            if f".{new}." in key:
                state[key.replace(f".{new}.", f".{name}.")] = state.pop(key)
    assert sum(".query." in key for key in state) > 0
    save_weights(state, tmp_path / "a.safetensors")
    other = FAMILY.build(CONFIG)
    load_weights(other, tmp_path / "a.safetensors")
    assert same(network, other)


def test_a_network_is_cast_as_a_whole_or_not_at_all(network):
    assert narrow(network, torch.bfloat16, "n") is network
    assert {value.dtype for value in network.state_dict().values()} == {torch.bfloat16}
    network.float().conv_out.bias.data[0] = 7e4
    with pytest.raises(UserError, match=r"^n: values of conv_out\.bias do not fit into torch\.float16"):
        narrow(network, torch.float16, "n")
    assert {value.dtype for value in network.state_dict().values()} == {torch.float32}


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"gone\.safetensors are missing"):
        read_weights(tmp_path / "gone.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"bad\.safetensors cannot be read as safetensors"):
        read_weights(tmp_path / "bad.safetensors")
    for name in "ab":
        save_weights({"w": torch.zeros(1), name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"b\.safetensors holds w, which another shard holds too"):
        read_weights([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
