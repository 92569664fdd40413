"""MS-COCO (Lin et al., arXiv 1405.0312): captioned images to train on, and prompts to draw from.

Drawn images are compared with those of val2014; each is drawn from the caption of one of them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from o2mkd_bench.core.data import CaptionedSource, Captions, DatasetInfo, Pairs, Split
from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.fingerprint import content_hash
from o2mkd_bench.core.identity import identity

from .archives import held_out
from .options import CocoOptions
from .pictures import Square, decode, planes

KEY = "datasets.coco"
VAL = "val2014"
PROTOCOL = 1
"""Part of what prompts are; raised when the same files and options give others."""

ADVICE = (
    "unpack http://images.cocodataset.org/zips/val2014.zip and train2014.zip, and "
    "http://images.cocodataset.org/annotations/annotations_trainval2014.zip, into one folder and set root to it"
)
# What a plan is made for while nothing is on this machine.
PROMISED = {name: f"published {name}" for name in ("val2014", "train2014", "annotations")}


@dataclass(frozen=True)
class Example:
    """An image file and one caption."""

    file: Path
    text: str


class Coco(CaptionedSource):
    """``splits``: the images that drawn ones are compared with, and held-out training images, both at the scored size.

    ``pairs``: one caption an image, that of the lowest id; a share of the images, evenly spread, is held out.

    ``protocol`` says how images are brought to the scored size. ``bk_sdm``: both kinds squashed by Pillow's ``resize``
    (bicubic), drawn ones stored as JPEG of quality 75 before and after (arXiv 2305.15798 and its code). ``clean``: the
    shorter side resized by Lanczos and the centre cut out, nothing stored.
    """

    options: CocoOptions

    def info(self) -> DatasetInfo:
        o = self.options
        if o.root:
            compared = f"{VAL} of {len(self._files)} images"
            hashes = {name: content_hash(path) for name, path in self._inputs().items()}
        else:
            compared, hashes = "published archives of MS-COCO, not on this machine", dict(PROMISED)
        # until 2026-11-30 every so-manieth was held out, which is another set for some shares
        held = {"held_out": o.test_fraction, "spread": "evenly"}
        real = {"images": hashes.pop(VAL), "train": hashes[_TRAIN], **held}
        captions_of_val = hashes.pop("annotations")
        asked = {"from": hashes.pop("prompts", captions_of_val), "count": o.prompts, "seed": o.seed}
        how = "squashed by bicubic" if o.protocol == "bk_sdm" else str(self._square(o.scored))
        captions = Captions(
            pairs=identity({**hashes, **held}),
            prompts=identity({**asked, "protocol": PROTOCOL}),
            count=o.prompts,
            size=o.size,
            finish=self._finish(),
        )
        return DatasetInfo(identity(real), f"{compared}; decoded by Pillow, {how}", 3, o.scored, False, captions)

    def ready(self) -> None:
        if not self.options.root:
            raise UserError(f"{KEY}.root is empty; {ADVICE}")
        self._inputs()

    def splits(self) -> dict[str, Split]:
        self.ready()
        held = [example.file for example in self._examples("test")]
        found = {"train": self._files, "test": held}
        return {name: Split(len(files), (self._scored(file) for file in files)) for name, files in found.items()}

    def pairs(self) -> dict[str, Pairs]:
        self.ready()
        square = self._square(self.options.size)
        return {name: _pairs(self._examples(name), square) for name in ("train", "test")}

    def prompts(self) -> list[str]:
        """Those of ``metadata`` in their order, else one of each image, of images drawn by the seed.

        Raises:
            UserError: when there are fewer than asked for.
        """
        self.ready()
        wanted = self.options.prompts
        if self.options.metadata:
            found = [row["text"] for row in _table(self._path("metadata", self.options.metadata))]
        else:
            every = _captioned(self._annotations(VAL), self._root / VAL)
            order = np.random.Generator(np.random.PCG64(self.options.seed)).permutation(len(every))
            found = [every[i].text for i in order[:wanted]]
        if len(found) < wanted:
            raise UserError(f"{KEY}.prompts: {wanted} are asked for and there are {len(found)}; lower it")
        return found[:wanted]

    def _finish(self) -> tuple[str, ...]:
        o = self.options
        if o.protocol == "bk_sdm":
            return "jpeg 75", f"resize {o.scored} bicubic", "jpeg 75"
        return () if o.scored == o.size else (f"resize {o.scored} lanczos",)

    def _square(self, size: int) -> Square:
        return Square(size, 3, "lanczos")

    def _scored(self, file: Path) -> NDArray[np.uint8]:
        if self.options.protocol == "clean":
            return self._square(self.options.scored).array(file, str(file))
        # Pillow's default filter, as in the code of BK-SDM
        side = self.options.scored
        return planes(decode(file, 3, str(file)).resize((side, side)))

    @cached_property
    def _root(self) -> Path:
        return self._path("root", self.options.root)

    def _path(self, key: str, value: str) -> Path:
        path = self.base / Path(value).expanduser()
        if not path.exists():
            raise UserError(f"{KEY}.{key}: there is no {path}; {ADVICE}")
        return path

    def _inputs(self) -> dict[str, Path]:
        """All that is read, by name; what scores compare with is under ``val2014``.

        Raises:
            UserError: for what is missing.
        """
        o = self.options
        found = {VAL: self._root / VAL, "annotations": self._annotations(VAL)}
        if o.train:
            found[_TRAIN] = self._path("train", o.train)
        else:
            found |= {_TRAIN: self._root / _TRAIN, "train captions": self._annotations(_TRAIN)}
        if o.metadata:
            found["prompts"] = self._path("metadata", o.metadata)
        for path in found.values():
            if not path.exists():
                raise UserError(f"{KEY}.root: there is no {path}; {ADVICE}")
        return found

    def _annotations(self, split: str) -> Path:
        return self._root / "annotations" / f"captions_{split}.json"

    @cached_property
    def _files(self) -> list[Path]:
        """The images that drawn ones are compared with, all of them, by name."""
        files = sorted((self._inputs()[VAL]).glob("*.jpg"))
        if len(files) < 2:
            raise UserError(f"{KEY}.root: {self._root / VAL} holds {len(files)} .jpg images; {ADVICE}")
        return files

    def _examples(self, split: str) -> list[Example]:
        """The captioned images of a split; those held out are evenly spread."""
        o = self.options
        if o.train:
            folder = self._path("train", o.train)
            found = [Example(folder / row["file_name"], row["text"]) for row in _table(_metadata_of(folder))]
        else:
            found = _captioned(self._annotations(_TRAIN), self._root / _TRAIN)
        held = held_out(len(found), o.test_fraction, KEY)
        return [example for example, out in zip(found, held, strict=True) if out == (split == "test")]


_TRAIN = "train2014"


def _pairs(examples: Sequence[Example], square: Square) -> Pairs:
    def read() -> Iterator[tuple[NDArray[np.uint8], str]]:
        for example in examples:
            yield square.array(example.file, str(example.file)), example.text

    return Pairs(len(examples), read())


def _captioned(annotations: Path, folder: Path) -> list[Example]:
    """Every image of a COCO captions file with its caption of the lowest id, by image id.

    Raises:
        UserError: for a file that is none.
    """
    try:
        data: Mapping[str, Any] = json.loads(annotations.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        first: dict[int, tuple[int, str]] = {}
        for note in data["annotations"]:
            mine = (note["id"], note["caption"].strip())
            first[note["image_id"]] = min(mine, first.get(note["image_id"], mine))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{KEY}.root: {annotations} is no COCO captions file ({reason}); unpack it again") from error
    return [Example(folder / names[image], first[image][1]) for image in sorted(first) if image in names]


def _metadata_of(folder: Path) -> Path:
    found = [path for path in (folder / "metadata.csv", folder / "metadata.jsonl") if path.is_file()]
    if not found:
        raise UserError(f"{KEY}.train: {folder} has neither metadata.csv nor metadata.jsonl; a row: file_name, text")
    return found[0]


def _table(path: Path) -> list[dict[str, str]]:
    """Rows of a metadata.csv or metadata.jsonl, each with a ``text``.

    Raises:
        UserError: for a file that is neither.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
        return [
            {key: str(row[key]) for key in ("file_name", "text") if key != "file_name" or key in row} for row in lines
        ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{KEY}: {path} is no table with a column text ({error}); write it anew") from error
