"""The UNet2D family: architectures as data, networks, roles."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from pydantic import ValidationError

from o2mkd_bench.core.errors import UserError
from o2mkd_plugins.models.options import UNet2DOptions
from o2mkd_plugins.models.unet2d import DEFAULTS, UNet2D, complete

FAMILY = UNet2D()

# config.json of google/ddpm-cifar10-32, as far as it differs from DEFAULTS
CIFAR = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "dropout": 0.1,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in FAMILY.build(config).parameters())


def tiny(**options):
    options = {"block_out_channels": (8, 16), "norm_num_groups": 4, **options}
    return FAMILY.teacher_config(UNet2DOptions(**options), channels=1, size=8)


def test_defaults_are_those_of_diffusers():
    signature = inspect.signature(UNet2DModel.__init__).parameters
    ours = {key: tuple(value) if isinstance(value, list) else value for key, value in DEFAULTS.items()}
    assert ours == {name: p.default for name, p in signature.items() if name != "self"}


def test_importing_the_family_does_not_import_torch():
    code = "import sys, o2mkd_plugins.models.unet2d, o2mkd_plugins.models.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("student", "millions"),
    [
        ({"width": 0.75}, 20.12),
        ({"width": 0.625}, 13.98),
        ({"width": 0.5}, 8.95),
        ({"width": 0.25}, 2.25),
        ({"blocks": 1}, 24.28),
        ({"width": 0.5, "blocks": 1}, 6.08),
    ],
)
def test_students_of_the_ddpm_of_cifar10_have_the_known_sizes(student, millions):
    assert parameters(CIFAR) == 35_746_307
    assert round(parameters(FAMILY.student_config(CIFAR, student, "students.s")) / 1e6, 2) == millions


def test_a_group_keeps_its_channels_and_a_head_too():
    teacher = CIFAR | {"attention_head_dim": 8, "attn_norm_num_groups": 16, "time_embedding_dim": 512}
    config = FAMILY.student_config(teacher, {"width": 0.25}, "s")
    assert config["block_out_channels"] == [32, 64, 64, 64]
    assert (config["norm_num_groups"], config["attn_norm_num_groups"], config["time_embedding_dim"]) == (8, 4, 128)
    assert config["attention_head_dim"] == 8


def test_a_student_without_wishes_is_the_teacher_without_dropout():
    for student in ({}, {"width": 1.0, "blocks": None, "config": None}, {"blocks": 2}):
        assert FAMILY.student_config(CIFAR, student, "s") == complete(CIFAR, "s") | {"dropout": 0.0}
    assert FAMILY.student_config(CIFAR, {"config": {"dropout": 0.2}}, "s")["dropout"] == 0.2


def test_an_explicit_config_wins_over_width_and_blocks():
    student = {"width": 0.5, "blocks": 3, "config": {"layers_per_block": 1, "dropout": 0.1}}
    config = FAMILY.student_config(CIFAR, student, "s")
    assert (config["block_out_channels"][0], config["layers_per_block"], config["dropout"]) == (64, 1, 0.1)


@pytest.mark.parametrize(("width", "nearest"), [(0.3, "0.3125"), (0.01, "0.03125"), (-1.0, "0.03125")])
def test_a_width_between_groups_is_refused_with_one_that_works(width, nearest):
    with pytest.raises(UserError) as error:
        FAMILY.student_config(CIFAR, {"width": width}, "students.small")
    assert "students.small" in str(error.value)
    assert f"{256 * width:g}" in str(error.value)
    assert str(error.value).endswith(f"works is {nearest}")
    FAMILY.student_config(CIFAR, {"width": float(nearest)}, "students.small")


def test_a_width_that_splits_an_attention_head_is_refused():
    with pytest.raises(UserError, match=r"heads of its 64 .* nearest width that works is 0\.25"):
        FAMILY.student_config(CIFAR | {"attention_head_dim": 64}, {"width": 0.125}, "s")


def test_a_width_that_splits_a_group_of_the_middle_attention_is_refused():
    with pytest.raises(UserError, match=r"nearest width that works is 0\.0625"):
        FAMILY.student_config(CIFAR | {"attn_norm_num_groups": 16}, {"width": 0.03125}, "s")


def test_a_third_may_be_written_as_a_float():
    teacher = tiny(block_out_channels=(12, 24), norm_num_groups=6, attention_head_dim=4)
    config = FAMILY.student_config(teacher, {"width": 1 / 3}, "s")
    assert (config["block_out_channels"], config["norm_num_groups"]) == ([4, 8], 2)


@pytest.mark.parametrize(
    ("student", "text"),
    [
        ({"blocks": 0}, "a level of 0 blocks"),
        ({"config": {"in_channels": 1}}, "s.config: in_channels is 1, the teacher's is 3"),
        ({"config": {"sample_size": 64}}, "sample_size is 64, the teacher's is 32"),
        ({"config": {"layer_per_block": 1}}, "did you mean 'layers_per_block'"),
        ({"config": {"qqq": 1}}, "keys are those of"),
        ({"config": {"_class_name": "UNet2DConditionModel"}}, "reads UNet2DModel only"),
        ({"config": {"num_class_embeds": 10}}, "class-conditional"),
        ({"config": {"block_out_channels": [32, 64]}}, "2 levels"),
        ({"config": {"block_out_channels": [48, 64, 64, 64]}}, r"norm_num_groups 32 .* divisor of 16"),
        ({"config": {"norm_num_groups": None}}, "norm_num_groups None"),
        ({"config": {"attention_head_dim": 24}}, r"attention_head_dim 24 .* divisor of 256"),
    ],
)
def test_a_student_that_is_no_network_is_refused(student, text):
    with pytest.raises(UserError, match=text):
        FAMILY.student_config(CIFAR, student, "s")


def test_a_teacher_config_is_complete_and_builds_the_network_it_says():
    config = tiny(attention=(4,), dropout=0.1)
    assert config.keys() == {"_class_name", *DEFAULTS}
    assert config["down_block_types"] == ["DownBlock2D", "AttnDownBlock2D"]
    assert config["up_block_types"] == ["AttnUpBlock2D", "UpBlock2D"]
    network = FAMILY.build(config)
    assert {key: network.config[key] for key in DEFAULTS} == {key: config[key] for key in DEFAULTS}


def test_a_teacher_may_name_its_blocks():
    config = tiny(
        down_block_types=("AttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "AttnUpBlock2D"), attention=()
    )
    assert config["down_block_types"] == ["AttnDownBlock2D", "DownBlock2D"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"attention": (5,)}, r"no level has resolution 5; .* there are 8, 4"),
        ({"block_out_channels": (8,) * 5}, "8 pixels cannot be halved 4 times"),
        ({"norm_num_groups": 3}, "use a divisor of 8"),
        ({"attention_head_dim": 3}, "use a divisor of 16"),
    ],
)
def test_a_teacher_that_is_no_network_is_refused(options, text):
    with pytest.raises(UserError, match=text):
        tiny(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"down_block_types": ("DownBlock2D", "DownBlock2D")},
        {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
        {
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("UpBlock2D",) * 2,
            "attention": (4,),
        },
        {"block_out_channels": ()},
        {"block_out_channels": (0,)},
        {"dropout": 1.0},
        {"width": 1},
    ],
)
def test_options_that_contradict_themselves_are_refused(options):
    with pytest.raises(ValidationError):
        UNet2DOptions(**options)


def test_forward_gives_what_diffusers_gives():
    torch.manual_seed(0)
    network = FAMILY.build(tiny()).eval()
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999])
    with torch.no_grad():
        prediction = FAMILY.forward(network, x, t)
        assert torch.equal(prediction, network(x, t).sample)
    assert (prediction.shape, prediction.dtype) == (x.shape, x.dtype)


def test_build_draws_from_the_global_generator():
    first, second, other = (
        (torch.manual_seed(seed), FAMILY.build(tiny()).conv_in.weight.detach().clone())[1] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_roles_name_modules_whose_first_tensor_is_the_feature():
    network = FAMILY.build(tiny()).eval()
    roles = FAMILY.roles(network)
    assert list(roles) == ["down.0", "down.1", "mid", "up.0", "up.1"]
    shapes = {}

    def keep(role):
        def hook(module, inputs, output):
            shapes[role] = tuple((output[0] if isinstance(output, tuple) else output).shape[1:])

        return hook

    for role, path in roles.items():
        network.get_submodule(path).register_forward_hook(keep(role))
    with torch.no_grad():
        FAMILY.forward(network, torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long))
    assert shapes == {
        "down.0": (8, 4, 4),
        "down.1": (16, 4, 4),
        "mid": (16, 4, 4),
        "up.0": (16, 8, 8),
        "up.1": (8, 8, 8),
    }


def test_a_network_without_a_middle_block_has_no_such_role():
    network = FAMILY.build(tiny() | {"mid_block_type": None})
    assert "mid" not in FAMILY.roles(network)


def test_a_student_of_its_teachers_shape_starts_from_it_whatever_a_published_config_leaves_out():
    whole = FAMILY.student_config(CIFAR, {}, "s")
    FAMILY.check_start(CIFAR, whole, "s")
    with pytest.raises(UserError, match=r"s\.init: a student of another shape"):
        FAMILY.check_start(CIFAR, FAMILY.student_config(whole, {"width": 0.5}, "s"), "s")
