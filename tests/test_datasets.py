"""Datasets read what they say they read, in one order, and refuse what is not theirs."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import cache_folder, content_hash, file_sha256
from o2mkd_bench.core.identity import resolved
from o2mkd_plugins.datasets import cifar10
from o2mkd_plugins.datasets.cifar10 import Cifar10
from o2mkd_plugins.datasets.digits import Digits
from o2mkd_plugins.datasets.image_folder import ImageFolder
from o2mkd_plugins.datasets.options import Cifar10Options, DigitsOptions, ImageFolderOptions


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path / "cache"))


def paint(path: Path, value: int, size: tuple[int, int] = (32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, value // 2)).save(path)


def class_folders(root: Path, per_class: int = 6) -> Path:
    """Three classes; the red value tells class, split and number."""
    for split, count in (("train", per_class), ("test", per_class // 3)):
        for c, name in enumerate(("bird", "cat", "dog")):
            for i in range(count):
                paint(root / split / name / f"{i:04}.png", 60 * c + i + (30 if split == "test" else 0))
    return root


# --- content hashes ---


def test_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert content_hash(path) == file_sha256(path) == hashlib.sha256(b"abc").hexdigest()


def test_hash_of_a_folder_depends_on_names_and_contents_not_on_where_it_is(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return content_hash(tmp_path / name)

    first = tree("one", {"a": "1", "sub/b": "2"})
    assert tree("two", {"sub/b": "2", "a": "1"}) == first
    assert tree("three", {"a": "1", "sub/c": "2"}) != first
    assert tree("four", {"a": "1", "sub/b": "3"}) != first
    assert tree("five", {"a": "1", "b": "2"}) != first


def test_hash_is_remembered_until_size_or_time_change(tmp_path: Path) -> None:
    path, cache = tmp_path / "a", tmp_path / "known.json"
    path.write_bytes(b"abc")
    honest = content_hash(path, cache)
    known = json.loads(cache.read_text())
    known[str(path)]["sha256"] = "remembered"
    cache.write_text(json.dumps(known))
    assert content_hash(path, cache) == "remembered"
    os.utime(path, ns=(1, 1))
    assert content_hash(path, cache) == honest


@pytest.mark.parametrize("text", ["{broken", "[]", '{"x": 1}'])
def test_hash_survives_a_spoilt_cache(tmp_path: Path, text: str) -> None:
    path, cache = tmp_path / "a", tmp_path / "known.json"
    path.write_bytes(b"abc")
    cache.write_text(text)
    assert content_hash(path, cache) == hashlib.sha256(b"abc").hexdigest()


def test_hash_needs_no_writable_cache(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert content_hash(path, path / "known.json") == hashlib.sha256(b"abc").hexdigest()  # below a file: no folder
    (tmp_path / "taken").mkdir()
    assert content_hash(path, tmp_path / "taken") == hashlib.sha256(b"abc").hexdigest()  # a folder cannot be replaced
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "taken"]


def test_hash_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        content_hash(tmp_path / "absent")


def test_cache_folder_is_in_the_home_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("O2MKD_BENCH_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "o2mkd-bench"


# --- digits ---


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    source = Digits(DigitsOptions(), Path())
    images, labels = source.labelled()
    theirs = load_digits()
    assert images.train.shape == (1498, 1, 8, 8)
    assert images.test.shape == (299, 1, 8, 8)
    assert images.train.dtype == images.test.dtype == np.uint8
    np.testing.assert_array_equal(images.test[:, 0], np.round(theirs.images[5::6] * 255 / 16).astype(np.uint8))
    np.testing.assert_array_equal(labels["test"], theirs.target[5::6])
    np.testing.assert_array_equal(source.load().train, images.train)
    info = source.info()
    assert (info.channels, info.size, info.flip) == (1, 8, False)
    assert len(info.fingerprint) == 64


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="install scikit-learn"):
        Digits(DigitsOptions(), Path()).info()


# --- CIFAR-10 ---


def cifar(root: Path | str | None = None, **options: object) -> Cifar10:
    return Cifar10(Cifar10Options(root=None if root is None else str(root), **options), Path())


def test_class_folders_and_their_tar_give_the_same_images(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images")
    (root / "train" / "notes.txt").write_text("no image")
    archive = tmp_path / "images.tar.xz"
    with tarfile.open(archive, "w:xz") as tar:
        for path in sorted(root.rglob("*.png"), reverse=True):  # the order of members must not matter
            tar.add(path, f"some/prefix/{path.relative_to(root)}")
    folder, tarred = cifar(root), cifar(archive)
    (ours, labels), (theirs, _) = folder.labelled(), tarred.labelled()
    np.testing.assert_array_equal(ours.train, theirs.train)
    np.testing.assert_array_equal(ours.test, theirs.test)
    assert ours.train.shape == (18, 3, 32, 32)
    assert ours.train[:, 0, 0, 0].tolist() == [60 * c + i for c in range(3) for i in range(6)]
    assert labels["test"].tolist() == [0, 0, 1, 1, 2, 2]
    assert folder.info().source == "class folders of images"
    assert tarred.info().source == "tar of class folders of images"
    assert folder.info().fingerprint == content_hash(root)
    assert tarred.info().fingerprint == file_sha256(archive)
    assert folder.info().flip
    assert not cifar(root, flip=False).info().flip


def test_limit_takes_classes_in_turn(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images")
    images, labels = cifar(root, limit=10).labelled()
    assert labels["train"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert images.train[:, 0, 0, 0].tolist() == [0, 60, 120, 1, 61, 121, 2, 62, 122, 3]
    assert labels["test"].tolist() == [0, 1]


def test_where_the_images_are_is_no_part_of_an_identity(tmp_path: Path) -> None:
    assert resolved(Cifar10Options(root="a", cache="b")) == {}
    assert resolved(ImageFolderOptions(root="a", size=8)) == {"size": 8}


def original_batches(folder: Path, monkeypatch: pytest.MonkeyPatch, payload: object = None) -> Path:
    """Six batches of two images in the form of the original, with their checksums published."""
    folder.mkdir(parents=True)
    published = {}
    for b, name in enumerate(cifar10.BATCH_MD5):
        batch = payload or {
            b"data": np.stack([np.full(3072, 10 * b + i, np.uint8) for i in range(2)]),
            b"labels": [9 - b, 0],
            b"filenames": [b"x_1.png", b"x_%d.png" % b],
        }
        data = pickle.dumps(batch, protocol=3)
        (folder / name).write_bytes(data)
        published[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(cifar10, "BATCH_MD5", published)
    return folder


@pytest.mark.parametrize("inside", [True, False])
def test_original_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    folder = original_batches(tmp_path / "data" / cifar10.FOLDER, monkeypatch)
    source = cifar(folder if inside else folder.parent)
    images, labels = source.labelled()
    # class 0 first, by file name x_0 … x_4, then the classes 5 … 9 of batches 4 … 0
    assert images.train[:, 0, 0, 0].tolist() == [1, 11, 21, 31, 41, 40, 30, 20, 10, 0]
    assert labels["train"].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    assert images.test[:, 0, 0, 0].tolist() == [51, 50]
    assert source.info().fingerprint == cifar().info().fingerprint


def test_a_changed_batch_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = original_batches(tmp_path / "data", monkeypatch)
    with (folder / "data_batch_3").open("ab") as file:
        file.write(b"!")
    with pytest.raises(UserError, match=r"data_batch_3 is not the published batch .*pickle"):
        cifar(folder).load()
    (folder / "data_batch_1").unlink()
    (folder / "data_batch_1").mkdir()
    with pytest.raises(UserError, match="neither cifar-10-batches-py"):
        cifar(folder).load()


def test_batches_may_build_arrays_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = original_batches(tmp_path / "data", monkeypatch, payload={b"data": os.getcwd})
    with pytest.raises(pickle.UnpicklingError, match="getcwd is not allowed"):
        cifar(folder).load()


def test_download_is_planned_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10.Cifar10, "_download", lambda self: pytest.fail("info must not download"))
    info = cifar("").info()
    assert info.fingerprint == "md5:c58f30108f718f92721af3b95e74349a"
    assert info.source == "original CIFAR-10 batches"


def test_download_goes_to_the_cache_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def download(url: str, root: str, md5: str) -> None:
        asked.append(md5)
        original_batches(Path(root) / cifar10.FOLDER, monkeypatch)

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    for _ in range(2):
        assert len(cifar().load().train) == 10
    assert asked == [cifar10.ARCHIVE_MD5]
    assert (tmp_path / "cache" / "cifar10" / cifar10.FOLDER).is_dir()
    assert len(cifar(cache=str(tmp_path / "elsewhere")).load().test) == 2
    assert len(asked) == 2


def test_download_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(url: str, root: str, md5: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    with pytest.raises(UserError, match=r"datasets\.cifar10\.root is empty.*no route to host.*set it to a copy"):
        cifar().load()


def test_wrong_roots_of_cifar10_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"datasets\.cifar10\.root: .*absent does not exist"):
        cifar(tmp_path / "absent").info()
    (tmp_path / "file").write_text("no tar")
    with pytest.raises(UserError, match="is no tar file"):
        cifar(tmp_path / "file").info()
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="neither cifar-10-batches-py nor the folders train and test"):
        cifar(tmp_path).info()
    (tmp_path / "test").mkdir()
    with pytest.raises(UserError, match="holds no train/<class>"):
        cifar(tmp_path).load()


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    paint(class_folders(tmp_path) / "train" / "cat" / "big.png", 0, (64, 32))
    with pytest.raises(UserError, match=r"big\.png is 64x32 and CIFAR-10 is 32x32"):
        cifar(tmp_path).load()


# --- a folder of images ---


def folder(root: Path, **options: object) -> ImageFolder:
    return ImageFolder(ImageFolderOptions(**{"root": str(root), "size": 16, **options}), Path())


def test_image_folder_is_recursive_and_sorted(tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i, name in enumerate(("b/1.png", "a/2.JPG", "c.webp", "a/1.bmp", "d.png")):
        paint(root / name, 40 * i, (20 + 8 * i, 24))
    (root / "notes.txt").write_text("no image")
    source = folder(root, test_fraction=0.4)
    images = source.load()
    assert images.train.shape == (3, 3, 16, 16)
    # sorted: a/1.bmp, a/2.JPG, b/1.png, c.webp, d.png; of every five the third and fifth are test
    np.testing.assert_allclose(images.train[:, 0, 8, 8], [120, 40, 80], atol=3)
    np.testing.assert_allclose(images.test[:, 0, 8, 8], [0, 160], atol=3)
    info = source.info()
    assert info.source == "folder of 5 images, shorter side to 16 by lanczos, centre crop"
    assert (info.channels, info.size, info.fingerprint) == (3, 16, content_hash(root))


@pytest.mark.parametrize("name", ["test", "val", "validation"])
def test_folders_of_splits_are_splits(name: str, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for i in range(6):
        paint(root / "train" / "deep" / f"{i}.png", 10 * i)
        paint(root / "extra" / f"{i}.png", 255)
    assert folder(root).info().fingerprint == content_hash(root)
    for i in range(2):
        paint(root / name / f"{i}.png", 200 + 10 * i)
    source = folder(root)
    np.testing.assert_allclose(source.load().train[:, 0, 8, 8], [0, 10, 20, 30, 40, 50], atol=3)
    np.testing.assert_allclose(source.load().test[:, 0, 8, 8], [200, 210], atol=3)
    info = source.info()
    assert info.source.startswith(f"folder of 6 images in train and 2 images in {name}, shorter side to 16")
    # other splits of the same files are other data
    assert info.fingerprint != content_hash(root)
    (root / "train").rename(root / "swap")
    (root / name).rename(root / "train")
    (root / "swap").rename(root / name)
    assert folder(root).info().fingerprint != info.fingerprint


def test_image_folder_keeps_the_centre(tmp_path: Path) -> None:
    stripes = np.zeros((8, 16), np.uint8)
    stripes[:, 4:12] = 200
    for name in "ab":
        Image.fromarray(stripes).save(tmp_path / f"{name}.png")
    small = folder(tmp_path, size=8, channels=1, test_fraction=0.5, flip=False)
    assert not small.info().flip
    np.testing.assert_array_equal(small.load().train, np.full((1, 1, 8, 8), 200, np.uint8))
    halved = folder(tmp_path, size=4, channels=3, test_fraction=0.5, resample="box").load()
    np.testing.assert_array_equal(halved.test, np.full((1, 3, 4, 4), 200, np.uint8))


def test_image_folder_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"datasets\.image_folder\.root: .*absent is not a folder"):
        folder(tmp_path / "absent").info()
    with pytest.raises(UserError, match="holds 0 images"):
        folder(tmp_path).info()
    for name in "ab":
        paint(tmp_path / f"{name}.png", 1)
    with pytest.raises(UserError, match=r"test_fraction: 0\.1 of 2 images is not one image"):
        folder(tmp_path).load()
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"a\.png is not a readable image"):
        folder(tmp_path, test_fraction=0.5).load()
    with pytest.raises(ValidationError):
        ImageFolderOptions(root="x", size=16, test_fraction=1.0)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_a_picture_of_more_than_8_bits_is_refused(kind: type, tmp_path: Path) -> None:
    for name in "ab":
        Image.fromarray(np.full((16, 16), 3000, kind)).save(tmp_path / f"{name}.tif")
        (tmp_path / f"{name}.tif").rename(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"a\.png has more than 8 bits a channel \(mode .*\); convert it to 8 bits"):
        folder(tmp_path, test_fraction=0.5).load()


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.png", "below/b.png", "below/c.png"):
        paint(tmp_path / name, 1)

    def forbidden(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if Path(path).name == name:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *rest, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", forbidden(Path.open, "b.png"))
        with pytest.raises(UserError, match=r"below/b\.png cannot be read \(Permission denied\)"):
            folder(tmp_path).info()
    for name in (tmp_path.name, "below"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", forbidden(os.scandir, name))
            with pytest.raises(UserError, match=rf"image_folder\.root: .*{name} cannot be read \(Permission denied\)"):
                folder(tmp_path).info()


def test_relative_roots_start_at_the_suite(tmp_path: Path) -> None:
    class_folders(tmp_path / "images")
    assert Cifar10(Cifar10Options(root="images"), tmp_path).info().size == 32
    assert len(ImageFolder(ImageFolderOptions(root="images", size=8), tmp_path).load().test) == 6


def test_tar_members_that_are_no_files_are_passed_over(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images")
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(root, ".")
        link = tarfile.TarInfo("train/cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
        extra = tarfile.TarInfo("train/readme.png")  # not in a class
        extra.size = 3
        tar.addfile(extra, io.BytesIO(b"abc"))
    assert cifar(archive).load().train.shape == (18, 3, 32, 32)
