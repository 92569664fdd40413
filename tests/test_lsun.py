"""LSUN and CelebA-HQ: read from where they are published, one image at a time, and refused in one sentence."""

from __future__ import annotations

import hashlib
import io
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from o2mkd_bench.cli import main
from o2mkd_bench.core.data import DatasetInfo, Split, StreamedSource
from o2mkd_bench.core.errors import StageFailed, StoreError, UserError
from o2mkd_bench.core.fingerprint import content_hash
from o2mkd_bench.core.identity import resolved
from o2mkd_bench.core.options import Options
from o2mkd_bench.core.session import prepare
from o2mkd_bench.core.store import Draft
from o2mkd_bench.core.suite import Suite, load
from o2mkd_bench.stages import data as data_stage
from o2mkd_bench.testing import DatasetContract, systems
from o2mkd_plugins.datasets import lsun
from o2mkd_plugins.datasets.celebahq import CelebAHQ
from o2mkd_plugins.datasets.digits import Digits
from o2mkd_plugins.datasets.lsun import Lsun
from o2mkd_plugins.datasets.options import CelebAHQOptions, DigitsOptions, LsunOptions

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789" * 4


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("O2MKD_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hub"))
    for name in ("LSUN_ROOT", "CELEBAHQ_ROOT"):
        monkeypatch.delenv(name, raising=False)


def flat(value: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def church(**options: object) -> Lsun:
    return Lsun(LsunOptions(**{"size": 32, **options}), Path())


def faces(**options: object) -> CelebAHQ:
    return CelebAHQ(CelebAHQOptions(**{"size": 32, **options}), Path())


def folder(root: Path, count: int, size: tuple[int, int] = (40, 32)) -> Path:
    root.mkdir(parents=True)
    for number in range(count):
        flat(10 * number, size).save(root / f"{number}.png")
    return root


def levels(images: NDArray[np.uint8]) -> list[int]:
    return images[:, 0, 16, 16].tolist()


# --- the official export ---


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export of eight training and two validation images, whose keys are out of the images' order."""
    pytest.importorskip("lmdb")
    root = tmp_path / "lsun"
    systems.write_lmdb(root / "church_outdoor_train_lmdb", [flat(20 * number) for number in range(8)])
    systems.write_lmdb(root / "church_outdoor_val_lmdb", [flat(200), flat(220)])
    return root


def sorted_by_key(values: list[int]) -> list[int]:
    return [value for _, value in sorted((number * 2654435761 % 2**32, value) for number, value in enumerate(values))]


def test_the_export_is_read_in_the_order_of_its_keys(export: Path) -> None:
    source = church(root=str(export))
    images = source.load()
    assert images.train.shape == (8, 3, 32, 32)
    assert levels(images.train) == sorted_by_key([20 * number for number in range(8)])
    assert levels(images.test) == sorted_by_key([200, 220])
    info = source.info()
    assert info.source.startswith("LSUN lmdb of 8 train and 2 test images; decoded by Pillow, shorter side to 32")
    assert (info.channels, info.size, info.flip) == (3, 32, True)


def test_one_lmdb_alone_gives_both_splits(export: Path) -> None:
    alone = export / "church_outdoor_train_lmdb"
    images = church(root=str(alone), test_fraction=0.25).load()
    every = sorted_by_key([20 * number for number in range(8)])
    assert levels(images.test) == [every[3], every[7]]
    assert levels(images.train) == [v for i, v in enumerate(every) if i not in (3, 7)]
    assert church(root=str(alone)).info().fingerprint == content_hash(alone / "data.mdb")
    # without a validation set the same data lie a folder higher
    for file in (export / "church_outdoor_val_lmdb").iterdir():
        file.unlink()
    assert church(root=str(export)).info().fingerprint == content_hash(alone / "data.mdb")


def test_reading_changes_nothing_on_the_disk(export: Path) -> None:
    for lock in export.rglob("lock.mdb"):
        lock.unlink()
    before = sorted(path.as_posix() for path in export.rglob("*"))
    source = church(root=str(export))
    fingerprint = source.info().fingerprint
    source.load()
    assert sorted(path.as_posix() for path in export.rglob("*")) == before
    assert church(root=str(export)).info().fingerprint == fingerprint


def test_what_is_cut_out_is_the_centre(tmp_path: Path) -> None:
    pytest.importorskip("lmdb")
    stripes = np.zeros((32, 64, 3), np.uint8)
    stripes[:, 16:48] = 200
    systems.write_lmdb(tmp_path / "one_train_lmdb", [Image.fromarray(stripes)] * 2)
    images = church(root=str(tmp_path), category="one", test_fraction=0.5).load()
    # JPEG, so not to the level
    assert images.train.min() > 190


def test_a_damaged_export_is_named(export: Path) -> None:
    (export / "church_outdoor_train_lmdb" / "data.mdb").write_bytes(b"no lmdb" * 1000)
    with pytest.raises(UserError, match=r"datasets\.lsun\.root: .*train_lmdb cannot be read as an lmdb .*unpack"):
        church(root=str(export)).info()


def test_a_damaged_image_is_named_by_its_key(tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "lsun"), map_size=1 << 20) as env, env.begin(write=True) as transaction:
        transaction.put(b"00c0ffee", b"no image")
        transaction.put(b"01", b"no image")
    with pytest.raises(UserError, match=r"lsun:00c0ffee is not a readable image"):
        church(root=str(tmp_path / "lsun"), test_fraction=0.5).load()


def test_a_missing_lmdb_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    (tmp_path / "data.mdb").touch()
    with pytest.raises(UserError, match=r"needs the package lmdb; install it with pip install 'o2mkd-bench\[lsun\]'"):
        church(root=str(tmp_path)).info()


# --- a folder ---


def test_a_folder_of_images_will_do(tmp_path: Path) -> None:
    root = folder(tmp_path / "images", 5)
    for source in (church(root=str(root), test_fraction=0.4), faces(root=str(root), test_fraction=0.4)):
        images = source.load()
        assert (levels(images.train), levels(images.test)) == ([0, 10, 30], [20, 40])
        assert source.info().fingerprint == content_hash(root)
        assert source.info().source.startswith("folder of 5 images; decoded by Pillow")


def test_faces_shrink_as_the_published_ones_did(tmp_path: Path) -> None:
    checks = np.indices((64, 64)).sum(axis=0) % 2 * 200
    (tmp_path / "faces").mkdir()
    for name in "ab":
        Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "faces" / f"{name}.png")
    # the mean of two by two pixels
    images = faces(root="faces", test_fraction=0.5)
    images.base = tmp_path
    np.testing.assert_array_equal(images.load().train, np.full((1, 3, 32, 32), 100, np.uint8))
    assert "by box" in images.info().source


def test_how_images_are_made_is_part_of_their_identity_and_where_they_lie_is_not() -> None:
    where = {"root": "a", "hub": "owner/name", "revision": COMMIT, "train_split": "all", "column": "picture"}
    assert resolved(LsunOptions(**where)) == resolved(CelebAHQOptions(**where)) == {}
    assert resolved(LsunOptions(size=128, resample="box")) == {"size": 128, "resample": "box"}


# --- nothing here ---


def test_a_plan_of_churches_needs_none_and_a_run_says_where_they_are() -> None:
    info = church().info()
    assert info.fingerprint == f"sha256:{lsun.ARCHIVES['church_outdoor']}"
    with pytest.raises(
        UserError, match=r"root is empty .*fetch http://dl\.yf\.io/lsun/scenes/church_outdoor_train_lmdb"
    ):
        church().ready()
    with pytest.raises(UserError, match="root is empty"):
        church().splits()
    with pytest.raises(UserError, match=r"root is empty .*cat_train_lmdb\.zip"):
        church(category="cat").info()
    with pytest.raises(UserError, match=r"datasets\.celebahq\.root is empty and .*30,000 images"):
        faces().info()


def test_wrong_roots_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"datasets\.lsun\.root: there is no folder .*absent; fetch http"):
        church(root=str(tmp_path / "absent")).info()
    with pytest.raises(UserError, match=r"holds neither church_outdoor_train_lmdb nor images; fetch http"):
        church(root=str(tmp_path)).info()
    (tmp_path / "church_outdoor_val_lmdb").mkdir()
    (tmp_path / "church_outdoor_val_lmdb" / "data.mdb").touch()
    with pytest.raises(UserError, match="holds church_outdoor_val_lmdb alone"):
        church(root=str(tmp_path)).info()
    with pytest.raises(UserError, match=r"datasets\.celebahq\.root: .*holds 0 images"):
        faces(root=str(tmp_path)).info()
    with pytest.raises(UserError, match=r"datasets\.lsun\.test_fraction: 0\.05 of 4 images is not one image"):
        church(root=str(folder(tmp_path / "four", 4))).load()


@pytest.mark.parametrize(
    ("name", "variable", "mend"),
    [
        ("celebahq", "CELEBAHQ_ROOT", "set it to a folder with the 30,000 images"),
        ("lsun_church", "LSUN_ROOT", "fetch http://dl.yf.io/lsun/scenes/church_outdoor_train_lmdb.zip, unpack it"),
    ],
)
def test_a_run_without_its_data_is_refused_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    variable: str,
    mend: str,
) -> None:
    monkeypatch.setenv(variable, str(tmp_path / "absent"))
    store = tmp_path / "store"
    with pytest.raises(SystemExit) as left:
        main(["run", str(ROOT / "suites" / f"{name}.yaml"), "--store", str(store), "--device", "cpu"])
    assert left.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert f".root: there is no folder {tmp_path / 'absent'}; {mend}" in said
    assert not store.exists()


@pytest.mark.parametrize("name", ["lsun_church", "celebahq"])
def test_a_run_asks_for_its_data_before_its_teachers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("o2mkd_bench.core.session.download_hub", lambda *_: pytest.fail("downloaded"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = r"datasets\.(lsun\.root is empty|celebahq\.hub: .* needs the package datasets)"
    with pytest.raises(UserError, match=rf"{name}\.yaml: {said}"):
        prepare(load(ROOT / "suites" / f"{name}.yaml", device="cpu"), tmp_path / "store", download=True)


# --- the Hub ---


class Rows:
    """What these plugins use of the package ``datasets``: rows of dicts, one column an encoded image."""

    def __init__(self, rows: list[dict[str, Any]], encoded: bool = False) -> None:
        self.rows, self.encoded = rows, encoded
        self.column_names = list(rows[0])

    def select_columns(self, names: list[str]) -> Rows:
        return Rows([{name: row[name] for name in names} for row in self.rows])

    def cast_column(self, name: str, feature: object) -> Rows:
        assert feature == ("image", False)
        return Rows(self.rows, encoded=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.encoded, "images are decoded by the plugin"
        return iter(self.rows)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A stand-in for ``datasets`` with a dataset that it holds in its cache; lists what was asked for."""
    asked: list[dict[str, Any]] = []
    on_disk = tmp_path / "1.png"
    flat(60).save(on_disk)

    def row(value: int) -> dict[str, Any]:
        encoded = io.BytesIO()
        flat(value).save(encoded, "PNG")
        return {"image": {"bytes": encoded.getvalue(), "path": None}, "label": 0}

    splits = {
        "train": Rows([row(0), {"image": {"bytes": None, "path": str(on_disk)}, "label": 1}, row(90)]),
        "validation": Rows([row(200)]),
    }

    def load_dataset(repo: str, revision: str, split: str) -> Rows:
        asked.append({"repo": repo, "revision": revision, "split": split})
        if repo != "owner/name":
            raise ConnectionError("no route\nto host")
        return splits[split]

    module = ModuleType("datasets")
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    module.Image = lambda decode: ("image", decode)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    for repo in ("owner___name", "owner___gone"):
        (tmp_path / "hub" / repo / "default" / "0.0.0" / COMMIT).mkdir(parents=True)
    return asked


PINNED = {"hub": "owner/name", "revision": COMMIT}


def test_a_dataset_of_the_hub(hub: list[dict[str, Any]]) -> None:
    source = faces(**PINNED, test_split="validation")
    images = source.load()
    assert (levels(images.train), levels(images.test)) == ([0, 60, 90], [200])
    assert {one["split"] for one in hub} == {"train", "validation"}
    assert {(one["repo"], one["revision"]) for one in hub} == {("owner/name", COMMIT)}
    halves = church(**PINNED, test_fraction=0.34).load()
    assert (levels(halves.train), levels(halves.test)) == ([0, 60], [90])


def test_a_plan_of_the_hub_asks_nobody(hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    info = faces(**PINNED, test_split="validation").info()
    assert info.fingerprint == f"hub:owner/name@{COMMIT}:train+validation:image"
    assert info.source.startswith("Hugging Face dataset owner/name, train+validation; decoded by Pillow")
    assert faces(**PINNED).info().fingerprint != info.fingerprint
    assert hub == []


def test_a_commit_says_which_images_of_the_hub() -> None:
    with pytest.raises(ValidationError, match="hub and revision go together"):
        CelebAHQOptions(hub="owner/name")
    with pytest.raises(ValidationError, match="revision"):
        CelebAHQOptions(hub="owner/name", revision="main")


def test_troubles_with_the_hub_are_one_sentence(
    hub: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"celebahq\.column: owner/name has no column 'picture'; .* image, label"):
        faces(**PINNED, column="picture").load()
    with pytest.raises(
        UserError, match=r"owner/gone is .* fetched at 0123.*\(ConnectionError: no route to host\); set"
    ):
        faces(hub="owner/gone", revision=COMMIT).load()

    def dataset_info(self: object, repo: str, revision: str, timeout: float) -> None:
        assert timeout < 2
        if repo == "owner/absent":
            raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    faces(hub="owner/there", revision=COMMIT).ready()
    hub.clear()
    with pytest.raises(
        UserError, match=r"owner/absent is .*OSError: offline\); set datasets\.celebahq\.root to a copy"
    ):
        faces(hub="owner/absent", revision=COMMIT).load()
    assert hub == [], "nothing is waited for that is not there"
    monkeypatch.delitem(sys.modules, "datasets")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"needs the package datasets; install it with pip install 'o2mkd-bench\[hub\]'"
    ):
        faces(**PINNED).ready()


# --- the stage that stores them ---


class Source(StreamedSource):
    """Splits as a test makes them."""

    made: Mapping[str, Split]

    def info(self) -> DatasetInfo:
        return DatasetInfo("f", "made here", 3, 4, flip=False)

    def splits(self) -> dict[str, Split]:
        return dict(self.made)


def array(value: int) -> NDArray[np.uint8]:
    return np.full((3, 4, 4), value, np.uint8)


def store(source: Source, place: Path) -> tuple[Draft, list[tuple[int, int]]]:
    place.mkdir(parents=True, exist_ok=True)
    draft, told = Draft(place), []
    plugin = SimpleNamespace(load=lambda: lambda options, base: source, parse=lambda options: options)
    bench = SimpleNamespace(
        registry=SimpleNamespace(get=lambda kind, name: plugin),
        progress=lambda stage, done, total: told.append((done, total)),
    )
    spec = {"name": "made", "fingerprint": "f", "channels": 3, "size": 4}
    stage = SimpleNamespace(label="data made", spec=spec, local={"options": {}, "base": "", "source": "made here"})
    data_stage.make(stage, bench, draft)  # type: ignore[arg-type]
    return draft, told


def source_of(train: Split, test: Split | None = None) -> Source:
    source = Source(Options(), Path())
    source.made = {"train": train, "test": test or Split(1, [array(9)])}
    return source


def test_no_more_than_one_image_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_stage, "_NOTED", 10)
    alive: list[weakref.ref[Any]] = []
    most = 0

    def images() -> Iterator[NDArray[np.uint8]]:
        nonlocal most
        for number in range(40):
            image = array(number)
            alive.append(weakref.ref(image))
            most = max(most, sum(one() is not None for one in alive))
            yield image

    draft, told = store(source_of(Split(40, images())), tmp_path / "draft")
    # the one that is being made and the one that was handed over before it
    assert most <= 2
    assert told == [(10, 41), (20, 41), (30, 41), (40, 41)]
    assert draft.meta == {"source": "made here", "train": 40, "test": 1}
    whole = io.BytesIO()
    np.save(whole, np.stack([array(number) for number in range(40)]))
    assert (tmp_path / "draft" / "train.npy").read_bytes() == whole.getvalue()


def test_arrays_of_a_small_dataset_are_what_numpy_saves(tmp_path: Path) -> None:
    digits = Digits(DigitsOptions(), Path())
    images = digits.load()
    for name, split in digits.splits().items():
        assert split.count == len(getattr(images, name))
        np.testing.assert_array_equal(np.stack(list(split.images)), getattr(images, name))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        (Split(2, [array(1)]), "train has 1 images, declared are 2"),
        (Split(1, [array(1).astype(np.float32)]), r"image 0 of train is float32 \(3, 4, 4\), declared are uint8"),
        (Split(2, [array(1), array(1)[:1]]), r"image 1 of train is uint8 \(1, 4, 4\)"),
    ],
)
def test_a_source_that_gives_other_than_it_declares(tmp_path: Path, train: Split, said: str) -> None:
    with pytest.raises(StageFailed, match=said):
        store(source_of(train), tmp_path)


def test_data_that_changed_since_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Source, "info", lambda self: DatasetInfo("g", "", 3, 4, flip=False))
    with pytest.raises(StageFailed, match="changed while the run was going on"):
        store(source_of(Split(1, [array(1)])), tmp_path)


def test_a_disk_without_room_is_named_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    never = (pytest.fail("decoded") for _ in range(1))
    with pytest.raises(StoreError, match=r"200000001 images take 9\.6 GB .* has 1\.0 GB left; .*--store DIR"):
        store(source_of(Split(200_000_000, never)), tmp_path)  # type: ignore[arg-type]


# --- the suites ---


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lmdb")
    root = tmp_path_factory.mktemp("systems")
    systems.build(root)
    return root


class TestLsun(DatasetContract):
    name = "lsun"
    options = {"root": "lsun", "size": 32}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _built(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TestLsun, "folder", built)


class TestCelebAHQ(DatasetContract):
    name = "celebahq"
    options = {"root": "celebahq", "size": 32, "test_fraction": 0.15}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def _built(self, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TestCelebAHQ, "folder", built)


def test_systems_are_built_alike(built: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    systems.build(again)

    def hashes(root: Path) -> dict[str, str]:
        files = [path for path in root.rglob("*") if path.is_file() and path.name != "lock.mdb"]
        return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    assert hashes(again) == hashes(built)
    assert len({hashes(built)[f"ddpm-{name}-256/unet/diffusion_pytorch_model.safetensors"] for name in NAMES}) == 4


NAMES = ("church", "ema-church", "celebahq", "ema-celebahq")


@pytest.mark.parametrize("name", ["lsun_church", "celebahq"])
def test_a_suite_is_planned_without_data_and_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    plan = prepare(load(ROOT / "suites" / f"{name}.yaml", device="cpu"), tmp_path).plan
    assert plan.cells
    assert {cell.unresolved.partition(" is not ")[0] for cell in plan.cells} == {
        f"hub teacher google/ddpm-{kind}{name.removeprefix('lsun_')}-256" for kind in ("", "ema-")
    }
    students = [cell.labels for cell in plan.cells if cell.role == "student"]
    assert {labels["teacher"] for labels in students} == {f"ddpm-ema-{name.removeprefix('lsun_')}-256"}


@pytest.mark.parametrize("name", ["lsun_church", "celebahq"])
def test_a_smoke_suite_is_its_twin_but_for_sizes_and_places(
    name: str, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SYSTEMS_ROOT", str(built))
    real, smoke = (load(ROOT / "suites" / f"{name}{twin}.yaml", device="cpu") for twin in ("", "_smoke"))
    assert smoke.labels() | {"steps": ()} == real.labels() | {"steps": ()}
    assert [use.name for use in smoke.metrics] == [use.name for use in real.metrics]
    for key in sorted(set(Suite.model_fields) - SIZES):
        assert getattr(smoke, key) == getattr(real, key), key
    assert smoke.training.model_copy(update={"batch": real.training.batch}) == real.training
    plan = prepare(smoke, tmp_path).plan
    assert {cell.unresolved for cell in plan.cells} == {""}
    # the single student has what the others have in all, and no second one is trained for that
    small = {f"single (batch of o2mkd-{k})" for k in (2, 4)}
    assert {cell.labels["wrapper"] for cell in plan.cells if cell.baseline_of} == {"single"} | small
    assert {len(cell.trained.students) for cell in plan.cells if cell.trained} == {1, 2, 4}


SIZES = {
    *("description", "datasets", "teachers", "samplers", "metrics", "budgets"),
    *("training", "sampling", "speed", "probe"),
}
