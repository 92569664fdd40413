"""What an artifact says about itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2


def check_identity(value: str) -> str:
    """``value``, or ValueError unless it can name a folder of the store."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", value):
        raise ValueError(f"{value!r} is no identity")
    return value


def check_file_name(value: str) -> str:
    """``value``, or ValueError unless it is a relative POSIX path that stays below the artifact."""
    path = PurePosixPath(value)
    inside = path.parts and not path.is_absolute() and ".." not in path.parts
    if not inside or str(path) != value or "\\" in value or value == MANIFEST:
        raise ValueError(f"{value!r} cannot be the name of a file in an artifact")
    return value


class FileRecord(BaseModel):
    """What a stored file must be: ``size`` in bytes, ``sha256`` in hex."""

    model_config = ConfigDict(frozen=True)

    size: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, what it was made from, and which files it has.

    Attributes:
        digest: SHA-256 of the file without it, as :meth:`text` writes it; manifests of version 1 have none.
        created: UTC, ISO 8601.
        files: by name, a relative POSIX path below the artifact.
        spec: the stage's resolved description, JSON data in the canonical form of ``identity.plain``.
        needs: identities of the artifacts it was made from, by slot.
        meta: what is known about the making and is no part of the identity (seconds, machine, versions …), JSON data.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    digest: str = ""
    schema_version: int = SCHEMA_VERSION
    identity: Annotated[str, AfterValidator(check_identity)]
    kind: str
    label: str
    created: str
    files: dict[Annotated[str, AfterValidator(check_file_name)], FileRecord]
    spec: dict[str, Any]
    needs: dict[str, tuple[str, ...]]
    meta: dict[str, Any]

    def text(self) -> str:
        """The manifest as its file holds it, in the present version, with the digest that no flipped bit escapes."""
        bare = self.model_copy(update={"digest": "", "schema_version": SCHEMA_VERSION}).model_dump_json(indent=2)
        return bare.replace('""', f'"{hashlib.sha256(bare.encode()).hexdigest()}"', 1)

    @classmethod
    def parse(cls, content: bytes) -> Manifest:
        """The manifest in a file.

        Raises:
            ValueError: when the file is not what :meth:`text` wrote, or cannot be a manifest.
        """
        manifest = cls.model_validate_json(content)
        found = hashlib.sha256(content.replace(manifest.digest.encode(), b"", 1)).hexdigest()
        if manifest.digest != (found if manifest.schema_version > 1 else ""):
            raise ValueError("the manifest is not what was written")
        return manifest
