"""The metrics give torch-fidelity's numbers, under names that say which network they are from."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.error
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
import torch_fidelity
from pydantic import ValidationError
from safetensors.torch import save_file
from torch_fidelity import registry
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from o2mkd_bench.core.data import Images
from o2mkd_bench.core.errors import NetworkUnavailable, UserError
from o2mkd_bench.core.fingerprint import file_sha256
from o2mkd_bench.core.identity import resolved
from o2mkd_bench.engine.scoring import Metric, extract
from o2mkd_plugins.datasets.digits import Digits
from o2mkd_plugins.datasets.options import DigitsOptions
from o2mkd_plugins.metrics import distances, extractors, networks
from o2mkd_plugins.metrics import options as metric_options
from o2mkd_plugins.metrics.architectures import timm_architectures
from o2mkd_plugins.metrics.distances import frechet_distance, kernel_distance, precision_recall
from o2mkd_plugins.metrics.extractors import load_embedded, load_inception, load_network, load_timm
from o2mkd_plugins.metrics.fidelity import FrechetDistance, InceptionScore, KernelDistance, PrecisionRecall
from o2mkd_plugins.metrics.inception import FoldedInception
from o2mkd_plugins.metrics.options import (
    INCEPTION_SHA256,
    WEIGHTS,
    InceptionScoreOptions,
    KernelOptions,
    MetricOptions,
    PrecisionRecallOptions,
    check_images,
    check_neighbours,
    check_network,
    check_splits,
    check_subsets,
    fid_columns,
    inception_score_columns,
    kid_columns,
    network_id,
    precision_recall_columns,
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("O2MKD_INCEPTION_WEIGHTS", raising=False)


@pytest.fixture(scope="module")
def digits() -> Images:
    return Digits(DigitsOptions(), Path()).load()


def all_metrics(network: str = "embedded") -> list[Metric]:
    return [
        FrechetDistance(MetricOptions(network=network), "digits"),
        KernelDistance(KernelOptions(network=network, subsets=5, subset_size=100), "digits"),
        InceptionScore(InceptionScoreOptions(network=network), "digits"),
        PrecisionRecall(PrecisionRecallOptions(network=network), "digits"),
    ]


def score(generated: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """All metrics in the features of the digits network."""
    metrics = all_metrics()
    network = metrics[0].load(["features", "logits"])
    ours, theirs = extract(network, generated), extract(network, reference)
    return {column: value for metric in metrics for column, value in metric.compute(ours, theirs).items()}


class TensorSet(torch.utils.data.Dataset):
    def __init__(self, images: np.ndarray) -> None:
        self.images = torch.from_numpy(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def test_numbers_are_torch_fidelitys(digits: Images, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FEATURE_EXTRACTORS_REGISTRY, "embedded-digits", networks.DigitsExtractor)
    noisy = digits.train[:700] ^ 16
    theirs = torch_fidelity.calculate_metrics(
        input1=TensorSet(noisy),
        input2=TensorSet(digits.train),
        feature_extractor="embedded-digits",
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=5,
        kid_subset_size=100,
    )
    ours = score(noisy, digits.train)
    expected = {
        "fd_digits": theirs["frechet_inception_distance"],
        "kd_digits": theirs["kernel_inception_distance_mean"],
        "is_digits": theirs["inception_score_mean"],
        "precision_digits": theirs["precision"],
        "recall_digits": theirs["recall"],
    }
    assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert ours["fd_digits"] > 0.01


def test_a_set_is_no_distance_from_itself(digits: Images) -> None:
    values = score(digits.train, digits.train)
    assert values["fd_digits"] == pytest.approx(0, abs=1e-6)
    assert (values["precision_digits"], values["recall_digits"]) == (1, 1)


def test_real_digits_are_far_nearer_than_noise(digits: Images) -> None:
    network = load_embedded("digits", ["features"])
    metric = FrechetDistance(MetricOptions(network="embedded"), "digits")
    noise = np.random.default_rng(0).integers(0, 256, digits.test.shape, np.uint8)
    real, noisy, train = (extract(network, part) for part in (digits.test, noise, digits.train))
    near, far = (metric.compute(part, train)["fd_digits"] for part in (real, noisy))
    assert 0 < near < far / 20


@pytest.mark.parametrize("dataset", ["digits", "cifar10"])
def test_embedded_networks_are_what_their_records_say(dataset: str) -> None:
    record = json.loads((WEIGHTS / f"{dataset}.json").read_text())
    network = load_embedded(dataset, ["features", "logits"])
    assert network.sha256 == record["sha256"] == file_sha256(WEIGHTS / f"{dataset}.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (4, record["channels"], record["size"], record["size"]), np.uint8)
    found = extract(network, noise)
    assert found["features"].shape == (4, record["width"])
    assert found["logits"].shape == (4, 10)
    assert network.width == record["width"]
    assert record["test_accuracy"] > {"digits": 0.97, "cifar10": 0.75}[dataset]


def test_embedded_digits_recognise_digits() -> None:
    images, labels = Digits(DigitsOptions(), Path()).labelled()
    logits = extract(load_embedded("digits", ["logits"]), images.test)["logits"]
    reached = (logits.argmax(1).numpy() == labels["test"]).mean()
    assert reached == pytest.approx(json.loads((WEIGHTS / "digits.json").read_text())["test_accuracy"], abs=0.005)


def test_embedded_extractors_fit_torch_fidelitys_contract() -> None:
    extractor = networks.Cifar10Extractor("x", ["logits", "features"])
    logits, features = extractor(extractor.get_dummy_input_for_compile())
    assert (logits.shape, features.shape) == ((1, 10), (1, 128))
    assert extractor.can_be_compiled()
    assert extractor.get_default_feature_layer_for_metric("fid") == "features"
    assert extractor.get_default_feature_layer_for_metric("isc") == "logits"
    assert not any(p.requires_grad for p in extractor.parameters())


def test_embedded_network_takes_images_of_its_size_only() -> None:
    with pytest.raises(UserError, match="takes images of 1x8x8, not 1x16x16; use inception"):
        extract(load_embedded("digits", ["features"]), np.zeros((1, 1, 16, 16), np.uint8))
    with pytest.raises(UserError, match=r"exists for cifar10, digits, not for 'faces'"):
        load_network(MetricOptions(network="embedded"), "faces", ["features"])


def test_spoilt_embedded_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "digits.json").write_text((WEIGHTS / "digits.json").read_text())
    (tmp_path / "digits.safetensors").write_bytes(b"spoilt")
    monkeypatch.setattr(metric_options, "WEIGHTS", tmp_path)
    monkeypatch.setattr(extractors, "WEIGHTS", tmp_path)
    with pytest.raises(NetworkUnavailable, match="not what its record says"):
        load_embedded("digits", ["features"])


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("inception", ["fid", "kid", "is", "precision", "recall"]),
        ("embedded", ["fd_cifar10", "kd_cifar10", "is_cifar10", "precision_cifar10", "recall_cifar10"]),
        ("timm:vit.x_in1k", [f"{name}_vit.x_in1k" for name in ("fd", "kd", "is", "precision", "recall")]),
    ],
)
def test_columns_are_named_after_the_network(network: str, expected: list[str]) -> None:
    functions = (fid_columns, kid_columns, inception_score_columns, precision_recall_columns)
    options = MetricOptions(network=network)
    assert [column for columns in functions for column in columns(options, "cifar10")] == expected


def test_options_refuse_what_is_no_network() -> None:
    for wrong in ("vgg16", "timm:", "inception-v3"):
        with pytest.raises(ValidationError):
            MetricOptions(network=wrong)
    with pytest.raises(ValidationError, match="ships with its weights"):
        MetricOptions(network="embedded", weights="x")


def test_network_is_known_to_the_plan(tmp_path: Path) -> None:
    assert network_id(MetricOptions(), "digits") == {"network": "inception", "sha256": INCEPTION_SHA256}
    embedded = network_id(MetricOptions(network="embedded"), "digits")
    assert embedded == {"network": "embedded:digits", "sha256": file_sha256(WEIGHTS / "digits.safetensors")}
    with pytest.raises(UserError, match="not for 'faces'"):
        network_id(MetricOptions(network="embedded"), "faces")
    assert network_id(MetricOptions(network="timm:vit"), "digits") == {"network": "timm:vit", "sha256": None}
    (tmp_path / "w").write_bytes(b"w")
    local = MetricOptions(network="timm:vit", weights="w")
    assert network_id(local, "digits", tmp_path)["sha256"] == file_sha256(tmp_path / "w")
    with pytest.raises(UserError, match=r"metrics\.weights: .*absent is no file"):
        network_id(MetricOptions(network="timm:vit", weights="absent"), "digits", tmp_path)
    assert resolved(local) == {"network": "timm:vit"}  # the hash counts, not the path


def test_too_few_images_are_refused_before_anything_is_trained() -> None:
    check_images(MetricOptions(network="embedded"), "cifar10", 1280)
    check_images(MetricOptions(), "cifar10", 10)
    with pytest.raises(UserError, match=r"sampling\.images: 1279 images are too few"):
        check_images(MetricOptions(network="embedded"), "cifar10", 1279)


def test_images_that_a_metric_cannot_divide_are_refused_when_planned() -> None:
    check_subsets(KernelOptions(), "digits", 1000)
    with pytest.raises(UserError, match=r"metrics\.kid\.subset_size: subsets of 1000 .* the 999 of sampling\.images"):
        check_subsets(KernelOptions(), "digits", 999)
    check_splits(InceptionScoreOptions(), "digits", 10)
    with pytest.raises(UserError, match=r"metrics\.inception_score\.splits: the 9 of sampling\.images make no 10"):
        check_splits(InceptionScoreOptions(), "digits", 9)
    check_neighbours(PrecisionRecallOptions(), "digits", 4)
    with pytest.raises(UserError, match=r"metrics\.precision_recall\.neighbours: 3 neighbours need more than the 3"):
        check_neighbours(PrecisionRecallOptions(), "digits", 3)


def test_networks_that_cannot_be_are_refused_when_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_network(MetricOptions(), "digits")
    with pytest.raises(UserError, match=r"metrics\.weights: .*absent is no file"):
        check_network(MetricOptions(weights="absent"), "digits", tmp_path)
    (tmp_path / "w").write_bytes(b"w")
    with pytest.raises(UserError, match=r"metrics\.weights: .*w has sha256 .*not the 2015-12-05 Inception; name ano"):
        check_network(MetricOptions(weights="w"), "digits", tmp_path)
    for name, wrong in (("gone", "is no file"), ("w", "is not the 2015-12-05 Inception")):
        monkeypatch.setenv("O2MKD_INCEPTION_WEIGHTS", str(tmp_path / name))
        with pytest.raises(UserError, match=f"O2MKD_INCEPTION_WEIGHTS: .*{name} .*{wrong}"):
            check_network(MetricOptions(), "digits")
        check_network(MetricOptions(network="timm:resnet50.a1_in1k"), "digits")
    with pytest.raises(UserError, match=r"metrics\.network: timm has no model 'resnot50'; near it are resnet50"):
        check_network(MetricOptions(network="timm:resnot50"), "digits")
    with pytest.raises(UserError, match=r"timm has no model 'nope~'; timm\.list_models\(\) lists"):
        check_network(MetricOptions(network="timm:nope~"), "digits")


def test_architectures_are_those_that_timm_registers_and_known_without_it() -> None:
    assert timm_architectures() == set(timm.models._registry._model_entrypoints)
    code = (
        "import sys; from o2mkd_plugins.metrics.options import MetricOptions, check_network\n"
        "check_network(MetricOptions(network='timm:resnet50.a1_in1k'), 'digits')\n"
        "print(sorted({'torch', 'timm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b"[]"


def test_metrics_refuse_fewer_images_than_they_divide(digits: Images) -> None:
    features = extract(load_embedded("digits", ["features", "logits"]), digits.test[:9])
    frechet, kernel, inception, precision = all_metrics()
    with pytest.raises(UserError, match=r"kid\.subset_size: subsets of 100 do not fit into 9"):
        kernel.compute(features, features)
    with pytest.raises(UserError, match=r"inception_score\.splits: 9 images make no 10 splits"):
        inception.compute(features, features)
    three = {layer: value[:3] for layer, value in features.items()}
    with pytest.raises(UserError, match=r"neighbours: 3 neighbours need more than 9 generated and 3 reference"):
        precision.compute(features, three)
    assert set(frechet.compute(features, features)) == set(fid_columns(frechet.options, "digits"))


# --- the same numbers on CUDA ---


def gaussians(width: int, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated features, cut below zero as pooled ones are, of two sets that differ."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=draw) / width**0.5
    ours, theirs = (torch.randn(count, width, generator=draw) @ mix for count in (n, m))
    return (ours * 1.1 + 0.1).relu(), theirs.relu()


@pytest.mark.parametrize(
    ("width", "n", "m"), [(64, 500, 400), (64, 40, 500), (64, 40, 30), (64, 2, 2), (2048, 300, 200)]
)
def test_frechet_distance_is_torch_fidelitys(width: int, n: int, m: int) -> None:
    ours, theirs = gaussians(width, n, m)
    statistics = [fid_features_to_statistics(part.double()) for part in (ours, theirs)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(ours, theirs) == pytest.approx(expected, rel=1e-5, abs=1e-3)
    assert expected > 1


def test_frechet_distance_of_equal_features_is_zero() -> None:
    for n in (40, 500):
        ours, _ = gaussians(64, n, n)
        assert frechet_distance(ours, ours) == pytest.approx(0, abs=1e-5)


def test_kernel_distance_is_torch_fidelitys() -> None:
    ours, theirs = gaussians(64, 300, 200)
    found = kernel_distance(ours, theirs, subsets=7, size=50, seed=2020)
    expected = kid_features_to_metric(
        ours.double(), theirs.double(), kid_subsets=7, kid_subset_size=50, rng_seed=2020, verbose=False
    )["kernel_inception_distance_mean"]
    assert found == pytest.approx(expected, rel=1e-10)
    assert expected > 0.01


def test_precision_and_recall_are_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "ROWS", 70)
    ours, theirs = gaussians(64, 300, 200)
    ours = ours[:, :8]
    theirs = theirs[:, :8] + 0.5
    expected = prc_features_to_metric(ours, theirs, prc_neighborhood=3, verbose=False)
    assert precision_recall(ours, theirs, 3) == (expected["precision"], expected["recall"])
    assert 0 < expected["precision"] != expected["recall"] > 0


cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_scores_do_not_depend_on_where_they_are_taken(digits: Images, device: str) -> None:
    network = load_embedded("digits", ["features", "logits"])
    ours, theirs = (extract(network, part) for part in (digits.train[:700] ^ 16, digits.train))
    for metric in all_metrics():
        expected = metric.compute(ours, theirs)
        metric.device = device
        assert metric.compute(ours, theirs) == pytest.approx(expected, rel=1e-5, abs=2e-3)


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    script = Path(__file__).parents[1] / "tools" / "train_feature_net.py"
    spec = importlib.util.spec_from_file_location("train_feature_net", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_embedded_networks_can_be_trained_again(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tool.EPOCHS, "digits", 2)
    tool.main(["digits", "--out", str(tmp_path)])
    record = json.loads((tmp_path / "digits.json").read_text())
    assert record["sha256"] == file_sha256(tmp_path / "digits.safetensors")
    assert record["data"]["fingerprint"] == Digits(DigitsOptions(), Path()).info().fingerprint
    assert record["command"] == "python tools/train_feature_net.py digits"
    assert record["test_accuracy"] > 0.5
    again = networks.DigitsExtractor("x", ["logits"], str(tmp_path / "digits.safetensors"))
    assert again(again.get_dummy_input_for_compile())[0].shape == (1, 10)


def test_training_images_are_moved_and_mirrored_not_mixed(tool: ModuleType) -> None:
    torch.manual_seed(0)
    images = torch.arange(40.0).view(40, 1, 1, 1).expand(-1, 1, 6, 6) + torch.arange(6) / 10
    moved = tool.augment(images, flip=True, shift=1)
    centres = moved[:, 0, 2:4, 2:4].reshape(40, -1).mean(1).floor()
    torch.testing.assert_close(centres, torch.arange(40.0))
    slopes = (moved[:, 0, 3, 3] - moved[:, 0, 3, 2]).sign()
    assert set(slopes.tolist()) == {-1, 1}
    assert (tool.augment(images, flip=False, shift=0) == images).all()


# --- the 2015 Inception ---


@pytest.fixture(scope="module")
def untrained_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published form, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_fidelity.feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        torch.save(FeatureExtractorInceptionV3("x", ["2048"]).state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(untrained_inception: Path) -> None:
    network = load_inception(untrained_inception, ["2048", "logits_unbiased"], sha256=file_sha256(untrained_inception))
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 8), np.uint8)
    theirs = FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(untrained_inception)
    )
    ours = extract(network, images)
    for ours_, theirs_ in zip(ours.values(), theirs(torch.from_numpy(images)), strict=True):
        torch.testing.assert_close(ours_, theirs_)
    assert list(ours) == ["2048", "logits_unbiased"]
    assert network.width is None
    assert extract(network, images[:, :1])["2048"].shape == (2, 2048)


def lively(path: Path) -> FeatureExtractorInceptionV3:
    """The same network with statistics and scales that batch norm can be seen by."""
    network = FeatureExtractorInceptionV3("x", ["logits_unbiased", "2048"], feature_extractor_weights_path=str(path))
    draw = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            module.weight.uniform_(0.5, 1.5, generator=draw)
            module.bias.uniform_(-0.5, 0.5, generator=draw)
    network.train()(torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=draw))
    return network.eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_folded_inception_has_the_same_features(untrained_inception: Path, device: str) -> None:
    network = lively(untrained_inception)
    for height, width in ((32, 32), (5, 310)):
        images = np.random.default_rng(0).integers(0, 256, (2, 3, height, width), np.uint8)
        expected = network(torch.from_numpy(images))
        assert expected[1].std(dim=0).mean() > 0.01
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = FoldedInception(network).to(device)(torch.from_numpy(images).to(device))
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.cpu() - theirs).norm() < 1e-4 * theirs.norm()


def test_inception_on_cuda_is_the_folded_one_of_the_same_layers(untrained_inception: Path) -> None:
    network = load_inception(untrained_inception, ["2048"], sha256=file_sha256(untrained_inception))
    before = {name: value.clone() for name, value in network.extractor.state_dict().items()}
    fast = network.fast()
    assert isinstance(fast, FoldedInception)
    assert fast.get_requested_features_list() == ["2048"]
    assert len(fast(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))) == 1
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())
    assert all(torch.equal(before[name], value) for name, value in network.extractor.state_dict().items())


def test_other_weights_never_fill_the_fid_column(untrained_inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("O2MKD_INCEPTION_WEIGHTS", str(untrained_inception))
    for metric in all_metrics(network="inception"):
        with pytest.raises(NetworkUnavailable, match="is not the 2015-12-05 Inception"):
            metric.load(metric.layers())


def test_inception_weights_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "inception.pth"
    torch.save({"x": Trap()}, path)
    with pytest.raises(NetworkUnavailable, match="no PyTorch state dict of tensors alone"):
        load_inception(path, ["2048"], sha256=file_sha256(path))


def test_inception_without_a_network_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        NetworkUnavailable, match=r"(?s)not found at .*cache.*no route to host.*O2MKD_INCEPTION_WEIGHTS"
    ):
        load_network(MetricOptions(), "digits", ["2048"])
    with pytest.raises(NetworkUnavailable, match="is no file; set it to the weights of inception"):
        load_network(MetricOptions(weights="absent"), "digits", ["2048"], tmp_path)


def test_inception_is_downloaded_once_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append(hash_prefix)
        Path(path).write_bytes(b"not Inception")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        with pytest.raises(NetworkUnavailable, match="has sha256"):
            load_network(MetricOptions(), "digits", ["2048"])
    assert asked == [INCEPTION_SHA256]


# --- timm ---


def test_timm_networks_are_used_as_they_were_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    options = MetricOptions(network="timm:test_resnet", weights="w.safetensors")
    network = load_network(options, "digits", ["features", "logits"], tmp_path)
    assert network.sha256 == file_sha256(tmp_path / "w.safetensors")
    assert (network.name, network.resize, network.width) == ("timm:test_resnet", "bilinear 160", 96)
    # at the network's own size and of one colour, its own pipeline is normalisation alone
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 160, 160), np.uint8)
    found = extract(network, images)
    with torch.no_grad():
        expected = model((torch.from_numpy(images) / 255 - 0.5) / 0.5)
    torch.testing.assert_close(found["logits"], expected, rtol=1e-4, atol=1e-5)
    assert found["features"].shape == (2, 96)
    assert extract(network, images[:, :1, :8, :8])["logits"].shape == (2, 1000)
    assert network.extractor.can_be_compiled()
    assert [network.extractor.get_default_feature_layer_for_metric(m) for m in ("isc", "fid")] == ["logits", "features"]


def test_timm_weights_must_fit(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(NetworkUnavailable, match=r"timm's test_resnet could not be loaded from .*safetensors"):
        load_timm("test_resnet", ["features"], tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="timm has no model 'test_resnot'"):
        load_timm("test_resnot", ["features"])


def test_timm_hub_weights_are_hashed_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    torch.manual_seed(0)
    first = create("test_resnet")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: first)
    known = load_timm("test_resnet", ["features"]).sha256
    assert len(known) == 64
    assert load_timm("test_resnet", ["features"]).sha256 == known
    with torch.no_grad():
        next(first.parameters()).add_(1)
    assert load_timm("test_resnet", ["features"]).sha256 != known


def test_timm_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, pretrained: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(NetworkUnavailable, match=r"from the Hugging Face hub .*no route.*metrics\.weights"):
        load_timm("test_resnet", ["features"])
