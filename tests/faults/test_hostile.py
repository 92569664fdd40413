"""Files of others: weights, configs, archives, pictures, databases. One sentence each, and nothing of theirs is run."""

from __future__ import annotations

import copy
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMScheduler, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import TINY, call, one_sentence
from safetensors.torch import save_file
from test_bad_input import JUNK, Sandbox, examples, mutate, sandbox, spots

from o2mkd_bench.core.checkpoints import PICKLED, WEIGHTS

__all__ = ["sandbox"]


class Trap:
    """What unpickling this would do."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small diffusers pipeline for digits."""
    folder = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    network.save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "X"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def copied(folder: Path, to: Path) -> Path:
    for path in folder.rglob("*"):
        if path.is_file():
            (to / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (to / path.relative_to(folder)).write_bytes(path.read_bytes())
    return to


def suite(folder: Path, **changes: Any) -> Path:
    data = {**TINY, "methods": ["output"], "samplers": [{"ddim": {"steps": [2]}}], "wrappers": ["single"]}
    # as many as the widest of the networks that score them wants
    data |= {
        "students": [{"name": "same"}],
        "sampling": {"images": 20_480},
        "metrics": [{"fid": {"network": "inception"}}],
    }
    path = folder / "hostile.yaml"
    path.write_text(yaml.safe_dump({**data, "baselines": [], **changes}), encoding="utf-8")
    return path


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HOSTILE_WEIGHTS = {
    "a pickle": pickle.dumps(Trap()),
    "empty": b"",
    "a short header": b"\x08\0\0",
    "a header longer than the file": safetensors({}, length=1 << 20),
    "a header as long as memory": safetensors({}, length=1 << 62),
    "no JSON": safetensors(b"{" * 50),
    "JSON in JSON": safetensors(b"[" * 100_000),
    "another JSON": safetensors(["a"]),
    "a huge shape": safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, bytes(4)),
    "offsets beyond the end": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(4)),
    "offsets backwards": safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, bytes(4)),
    "tensors that overlap": safetensors({"a": ONE, "b": ONE}, bytes(4)),
    "an unknown type": safetensors({"a": {**ONE, "dtype": "X99"}}, bytes(4)),
    "a hole": safetensors({"a": {**ONE, "data_offsets": [4, 8]}}, bytes(8)),
}


@pytest.mark.parametrize("what", HOSTILE_WEIGHTS)
def test_weights_that_are_no_safetensors_are_refused_when_planned(pipeline: Path, tmp_path: Path, what: str) -> None:
    folder = copied(pipeline, tmp_path / "teacher")
    (folder / "unet" / WEIGHTS).write_bytes(HOSTILE_WEIGHTS[what])
    for verb in ("plan", "run"):
        words = [verb, suite(tmp_path, teachers=[{"name": "t", "path": str(folder)}]), "--store", tmp_path / "store"]
        ended = call(*words, *(["--out", tmp_path / "out"] if verb == "run" else []))
        assert ended.code == 2, ended.err
        assert "cannot be read as safetensors" in one_sentence(ended.err)
    assert not Path("sprung").exists()


@pytest.mark.parametrize("name", ["model.bin", "model.ckpt", "model.pt"])
def test_pickled_weights_are_never_read(pipeline: Path, tmp_path: Path, name: str) -> None:
    folder = copied(pipeline, tmp_path / "teacher")
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / name).write_bytes(pickle.dumps(Trap()))
    ended = call("plan", suite(tmp_path, teachers=[{"name": "t", "path": str(folder)}]))
    assert ended.code == 2
    assert "only pickled weights" in one_sentence(ended.err)
    assert not Path("sprung").exists()


def test_weights_from_before_safetensors_are_read_as_tensors_alone(pipeline: Path, tmp_path: Path) -> None:
    folder = copied(pipeline, tmp_path / "teacher")
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / PICKLED).write_bytes(pickle.dumps(Trap()))
    path = suite(tmp_path, teachers=[{"name": "t", "path": str(folder)}])
    ended = call("run", path, "--store", tmp_path / "store", "--out", tmp_path / "out", "--fail-fast")
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    assert any("cannot be read as weights alone" in line for line in ended.err.splitlines() if "FAILED" in line)
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.popitem(), "lacks"),
        (lambda state: state.update(more=torch.zeros(1)), "has left over more"),
        (lambda state: state.update({"conv_in.bias": torch.zeros(99)}), "in another shape conv_in.bias"),
        (lambda state: state["conv_in.bias"].fill_(float("nan")), "values of conv_in.bias are not finite"),
        (lambda state: state["conv_in.bias"].fill_(float("inf")), "values of conv_in.bias are not finite"),
    ],
)
def test_weights_of_another_network_fail_in_one_sentence(
    pipeline: Path, tmp_path: Path, change: Callable[[Any], Any], said: str
) -> None:
    folder = copied(pipeline, tmp_path / "teacher")
    state = {k: v.clone() for k, v in UNet2DModel.from_pretrained(folder / "unet").state_dict().items()}
    change(state)
    save_file(state, folder / "unet" / WEIGHTS)
    path = suite(tmp_path, teachers=[{"name": "t", "path": str(folder)}])
    ended = call("run", path, "--store", tmp_path / "store", "--out", tmp_path / "out", "--fail-fast")
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.err
    assert any(said in line for line in ended.err.splitlines() if "FAILED" in line), ended.err


JSONS = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")


@examples(1500)
@given(data=st.data())
def test_configs_with_anything_anywhere(pipeline: Path, sandbox: Sandbox, data: Any) -> None:
    folder = copied(pipeline, sandbox.folder / "teacher")
    for name in data.draw(st.lists(st.sampled_from(JSONS), min_size=1, max_size=2)):
        found = json.loads((pipeline / name).read_text(encoding="utf-8"))
        for _ in range(data.draw(st.integers(1, 2))):
            how = data.draw(st.sampled_from(["replace", "replace", "delete", "add", "nest", "rename"]))
            found = mutate(copy.deepcopy(found), data.draw(st.sampled_from(list(spots(found)))), how, data.draw(JUNK))
        (folder / name).write_text(json.dumps(found), encoding="utf-8")
    path = suite(sandbox.folder, teachers=[{"name": "t", "path": str(folder)}])
    sandbox.refused_or_done("plan", path, "--store", sandbox.folder / "store")


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize("text", [b"", b"\xff\xfe\0", b"[" * 100_000, b"[1]", b"1" * 5000, b'{"a": NaN}', b"{}"])
def test_configs_that_are_no_configs(pipeline: Path, sandbox: Sandbox, name: str, text: bytes) -> None:
    folder = copied(pipeline, sandbox.folder / "teacher")
    (folder / name).write_bytes(text)
    path = suite(sandbox.folder, teachers=[{"name": "t", "path": str(folder)}])
    sandbox.refused_or_done("plan", path, "--store", sandbox.folder / "store")


@pytest.mark.parametrize(
    "index", [{"weight_map": {"a": "../../../etc/passwd"}}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}, {}]
)
def test_an_index_names_only_files_beside_it(pipeline: Path, tmp_path: Path, index: Any) -> None:
    folder = copied(pipeline, tmp_path / "teacher")
    (folder / "unet" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    ended = call("plan", suite(tmp_path, teachers=[{"name": "t", "path": str(folder)}]))
    assert ended.code == 2
    assert "index.json" in one_sentence(ended.err)


# ---- data ------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def picture(size: int = 32) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def fails(suite: Path, folder: Path) -> str:
    """Why the first stage of a run failed, or the run was refused; nothing is left outside its folders."""
    ended = call("run", suite, "--store", folder / "store", "--out", folder / "out", "--fail-fast")
    assert ended.code in (1, 2), ended.err
    assert "Traceback" not in ended.err
    assert "bug" not in ended.err
    return next(line for line in ended.err.splitlines() if "FAILED" in line or line.startswith("error:"))


BOMBS = {
    "a header of 100,000 x 100,000 pixels": (png(100_000, 100_000), "pixels"),
    "a header of 9,000 x 9,000 pixels": (png(9000, 9000), "pixels"),
    "half a picture": (picture(64)[:60], "is not a readable image"),
    "text": (b"<script>", "is not a readable image"),
    "empty": (b"", "is not a readable image"),
}


@pytest.mark.parametrize("what", BOMBS)
def test_pictures_that_are_bombs_or_none(tmp_path: Path, what: str) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(12):
        (root / f"{number:02}.png").write_bytes(picture(16))
    (root / "a.png").write_bytes(BOMBS[what][0])
    options = {"root": str(root), "size": 8, "channels": 1, "test_fraction": 0.2}
    assert BOMBS[what][1] in fails(suite(tmp_path, datasets=[{"image_folder": options}]), tmp_path)


Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> Member:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info, data


def archive(path: Path, *members: Member, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


TARS: dict[str, Callable[[Path], Any]] = {
    "names that climb": lambda p: archive(p, member("../../train/a/x.png", b"x"), member("/tmp/test/a/x.png", b"x")),
    "links": lambda p: archive(
        p,
        member("train/a/x.png", kind=tarfile.SYMTYPE, link="/etc/passwd"),
        member("test/a/x.png", kind=tarfile.LNKTYPE),
    ),
    "devices": lambda p: archive(p, member("train/a/x.png", kind=tarfile.CHRTYPE), member("test/a/y.png")),
    "a bomb": lambda p: archive(p, member("train/a/x.png", bytes(1 << 22)), mode="w:xz"),
    "cut": lambda p: p.write_bytes(archive(p, member("train/a/x.png", picture()), mode="w:xz").read_bytes()[:-20]),
    "junk after a header": lambda p: p.write_bytes(archive(p, member("train/a/x.png", b"x")).read_bytes()[:600] + b"?"),
    "no tar": lambda p: p.write_bytes(lzma.compress(b"hello")),
}


@pytest.mark.parametrize("what", TARS)
def test_tars_that_want_out(tmp_path: Path, what: str) -> None:
    path = tmp_path / "cifar.tar.xz"
    TARS[what](path)
    said = fails(suite(tmp_path, datasets=[{"cifar10": {"root": str(path)}}]), tmp_path)
    assert "cifar.tar.xz" in said
    assert {p.name for p in tmp_path.iterdir()} <= {"cifar.tar.xz", "hostile.yaml", "out", "store"}


def test_batches_that_are_other_pickles(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(Trap()))
    said = fails(suite(tmp_path, datasets=[{"cifar10": {"root": str(tmp_path)}}]), tmp_path)
    assert "is not the published batch" in said
    assert not Path("sprung").exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 5000, bytes(16384)])
def test_databases_that_are_none(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("lmdb")
    folder = tmp_path / "church_outdoor_train_lmdb"
    folder.mkdir()
    (folder / "data.mdb").write_bytes(content)
    said = fails(suite(tmp_path, datasets=[{"lsun": {"root": str(tmp_path), "size": 8}}]), tmp_path)
    assert "lmdb" in said


def test_links_in_a_folder_of_pictures_are_followed_to_pictures_alone(tmp_path: Path) -> None:
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(3):
        (root / f"{number}.png").write_bytes(picture(16))
    (root / "circle").symlink_to(root)
    (root / "secret.png").symlink_to("/etc/passwd")
    os.mkfifo(root / "pipe.png")
    options = {"root": str(root), "size": 8, "channels": 1, "test_fraction": 0.4}
    assert "is not a readable image" in fails(suite(tmp_path, datasets=[{"image_folder": options}]), tmp_path)
