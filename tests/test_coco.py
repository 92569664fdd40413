"""MS-COCO with captions: what is compared, what trains, what is drawn from, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.testing import DatasetContract
from o2mkd_bench.testing.tiny_sd import coco, scene
from o2mkd_plugins.datasets.coco import Coco
from o2mkd_plugins.datasets.options import CocoOptions

VAL = 6


def tiny(root: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("o2mkd_bench.testing.tiny_sd.TRAIN", 10)
        patch.setattr("o2mkd_bench.testing.tiny_sd.VAL", VAL)
        coco(root)
    return root


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tiny(tmp_path / "coco")


def source(root: Path | str, **options: object) -> Coco:
    given = {"size": 32, "scored": 16, "prompts": VAL, "test_fraction": 0.2, **options}
    return Coco(CocoOptions(root=str(root), **given), Path())


class TestCoco(DatasetContract):
    name = "coco"

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _tiny(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tiny(tmp_path_factory.mktemp("coco"))
        cls.options = {"root": str(folder), "size": 32, "scored": 16, "prompts": VAL, "test_fraction": 0.2}


def test_real_images_are_squashed_or_cropped(root: Path) -> None:
    first = sorted((root / "val2014").iterdir())[0]
    squashed = np.asarray(Image.open(first).resize((16, 16))).transpose(2, 0, 1)
    images = source(root).load()
    assert np.array_equal(images.train[0], squashed)
    assert (len(images.train), len(images.test)) == (VAL, 2)
    assert not np.array_equal(source(root, protocol="clean").load().train[0], squashed)


def test_protocols_say_what_is_done_to_drawn_images(root: Path) -> None:
    def finish(**options: object) -> tuple[str, ...]:
        captions = source(root, **options).info().captions
        assert captions is not None
        return captions.finish

    assert finish() == ("jpeg 75", "resize 16 bicubic", "jpeg 75")
    assert finish(protocol="clean") == ("resize 16 lanczos",)
    assert finish(protocol="clean", scored=32) == ()


def test_pairs_have_the_caption_of_the_lowest_id(root: Path) -> None:
    pairs = source(root).pairs()
    found = list(pairs["train"].pairs)
    assert [len(found), pairs["train"].count, pairs["test"].count] == [8, 8, 2]
    assert [text for _, text in found[:4]] == [f"a photo of {scene(i)[1]}" for i in range(4)]
    assert {image.shape for image, _ in found} == {(3, 32, 32)}


def test_prompts_are_drawn_by_the_seed(root: Path) -> None:
    drawn = [source(root, prompts=4, seed=seed).prompts() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 4
    assert set(drawn[0]) <= {f"a photo of {scene(10 + i)[1]}" for i in range(VAL)}
    with pytest.raises(UserError, match="7 are asked for and there are 6"):
        source(root, prompts=7).prompts()


def test_prompts_may_be_given(root: Path, tmp_path: Path) -> None:
    table = tmp_path / "metadata.csv"
    table.write_text('file_name,text\na.jpg,"two, words"\nb.jpg,one\n', encoding="utf-8")
    assert source(root, metadata=str(table), prompts=2).prompts() == ["two, words", "one"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_captioned_folder_trains_instead(root: Path, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "laion"
    folder.mkdir()
    rows = []
    for number in range(5):
        Image.new("RGB", (40, 33), (number, 0, 0)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "text": f"red {number}"})
    lines = (
        [json.dumps(row) for row in rows]
        if form == "jsonl"
        else ["file_name,text", *map(",".join, map(dict.values, rows))]
    )
    (folder / f"metadata.{form}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    pairs = source(root, train=str(folder)).pairs()
    assert [(int(image[0, 0, 0]), text) for image, text in pairs["test"].pairs] == [(4, "red 4")]
    assert [text for _, text in pairs["train"].pairs] == [f"red {i}" for i in range(4)]


def test_each_fingerprint_is_that_of_its_own(root: Path) -> None:
    def hashes(**options: object) -> tuple[str, str, str]:
        info = source(root, **options).info()
        assert info.captions is not None
        return info.fingerprint, info.captions.pairs, info.captions.prompts

    before = hashes()
    assert [a == b for a, b in zip(before, hashes(seed=1), strict=True)] == [True, True, False]
    assert [a == b for a, b in zip(before, hashes(test_fraction=0.5), strict=True)] == [False, False, True]
    captions = root / "annotations" / "captions_val2014.json"
    captions.write_text(captions.read_text().replace("photo", "picture"))
    assert [a == b for a, b in zip(before, hashes(), strict=True)] == [True, True, False]


def test_a_plan_needs_no_data_and_a_run_does() -> None:
    absent = source("")
    assert "not on this machine" in absent.info().source
    with pytest.raises(UserError, match=r"^datasets\.coco\.root is empty; unpack http"):
        absent.ready()


@pytest.mark.parametrize(
    ("remove", "text"),
    [
        ("annotations/captions_val2014.json", r"there is no .*captions_val2014\.json; unpack"),
        ("train2014", "there is no .*train2014; unpack"),
        ("val2014", "there is no .*val2014; unpack"),
    ],
)
def test_what_is_missing_is_named(root: Path, remove: str, text: str) -> None:
    (root / remove).rename(root / "away")
    with pytest.raises(UserError, match=text):
        source(root).ready()


def test_wrong_files_are_one_sentence(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no /nowhere"):
        source("/nowhere").info()
    (root / "annotations" / "captions_train2014.json").write_text("[]")
    with pytest.raises(UserError, match="is no COCO captions file"):
        source(root).pairs()
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"neither metadata\.csv nor metadata\.jsonl"):
        source(root, train=str(empty)).pairs()
    (empty / "metadata.csv").write_text("file_name,caption\na,b\n")
    with pytest.raises(UserError, match="no table with a column text"):
        source(root, train=str(empty)).pairs()
    (empty / "metadata.csv").write_text("file_name,text\na,b\n")
    with pytest.raises(UserError, match=r"test_fraction: 0\.2 of 1 images is not one image"):
        source(root, train=str(empty)).pairs()
    for path in sorted((root / "val2014").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match=r"holds 1 \.jpg images"):
        source(root).info()
