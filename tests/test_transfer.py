"""Exports carry artifacts whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.store import Store
from o2mkd_bench.core.transfer import export_artifacts, import_artifacts, parse_size

A, B = "a" * 20, "b" * 20


@pytest.fixture
def store(tmp_path):
    """Two artifacts of some kilobytes."""
    store = Store(tmp_path / "here")
    for id, kind in ((A, "student"), (B, "scores")):
        with store.writing(id, kind, f"label {id[0]}", {"width": 0.5}, {}) as draft:
            (draft.dir / "deep").mkdir()
            (draft.dir / "deep" / "weights").write_bytes(bytes(range(256)) * 40)
            (draft.dir / f"{'long' * 40}.json").write_text(json.dumps({"id": id}))
            draft.meta["seconds"] = 1.5
    return store


@pytest.fixture
def there(tmp_path):
    return Store(tmp_path / "there")


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "export"


def rehash(dest, name="part-0000"):
    """Make the index agree with a part that was tampered with."""
    data = (dest / name).read_bytes()
    index = json.loads((dest / "index.json").read_text())
    index["parts"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (dest / "index.json").write_text(json.dumps(index))


def members(dest):
    with tarfile.open(dest / "part-0000") as tar:
        return [(m, tar.extractfile(m).read() if m.isreg() else None) for m in tar]


def repack(dest, content):
    """Write the only part anew from pairs of a member and its bytes."""
    with tarfile.open(dest / "part-0000", "w") as tar:
        for member, data in content:
            member.size = len(data or b"")
            tar.addfile(member, io.BytesIO(data or b""))
    rehash(dest)


@pytest.mark.parametrize("part_size", [1000, 10240, 1 << 20])
def test_round_trip(store, there, dest, part_size):
    assert export_artifacts(store, [A, B, A], dest, part_size) == [A, B]
    index = json.loads((dest / "index.json").read_text())
    parts = sorted(p.name for p in dest.glob("part-*"))
    assert parts == sorted(index["parts"])
    sizes = [(dest / name).stat().st_size for name in parts]
    assert all(size == part_size for size in sizes[:-1])
    assert 0 < sizes[-1] <= part_size
    assert {*index["artifacts"][A]} == {"manifest.json", *store.manifest(A).files}

    assert import_artifacts(there, dest) == [A, B]
    assert there.verify() == []
    for id in (A, B):
        assert there.manifest(id) == store.manifest(id)
        assert there.read(id, "deep/weights").read_bytes() == store.read(id, "deep/weights").read_bytes()
    assert import_artifacts(there, dest) == []


def test_equal_artifacts_give_equal_bytes(store, tmp_path):
    for name in ("one", "two"):
        export_artifacts(store, [A, B], tmp_path / name, 7000)
    assert [p.read_bytes() for p in sorted((tmp_path / "one").iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "two").iterdir())
    ]


def test_an_export_of_nothing_is_an_export(store, there, dest):
    assert export_artifacts(store, [], dest, 1000) == []
    assert import_artifacts(there, dest) == []


def test_what_is_there_is_skipped_and_what_is_wrecked_is_made_good(store, there, dest):
    export_artifacts(store, [A, B], dest, 1 << 20)
    import_artifacts(there, dest)
    there.read(A, "deep/weights").write_bytes(b"short")
    assert import_artifacts(there, dest) == [A]
    assert there.verify() == []


# ---- what cannot be exported -----------------------------------------------------------------------------------------


def test_absent_and_damaged_artifacts_are_not_exported(store, dest):
    with pytest.raises(UserError, match=r"artifact dddd: .* run its suite again or leave it out"):
        export_artifacts(store, [A, "dddd"], dest, 1000)
    assert list(dest.iterdir()) == []
    store.read(B, "deep/weights").write_bytes(bytes(10240))
    with pytest.raises(UserError, match="deep/weights is not what the manifest says"):
        export_artifacts(store, [A, B], dest, 100_000)
    assert list(dest.iterdir()) == []


def test_an_export_does_not_mix_with_what_is_there(store, dest):
    export_artifacts(store, [A], dest, 1000)
    with pytest.raises(UserError, match="is not empty; name a new one"):
        export_artifacts(store, [B], dest, 1000)


def test_part_size_must_be_positive(store, dest):
    with pytest.raises(UserError, match="at least 1 byte"):
        export_artifacts(store, [A], dest, 0)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(store, dest, monkeypatch):
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"the export folder .*export is on a full disk; .* name another folder"):
        export_artifacts(store, [A], dest, 1000)
    assert list(dest.iterdir()) == []


def test_a_store_that_cannot_take_an_import_says_so(store, there, dest, monkeypatch):
    export_artifacts(store, [A], dest, 1000)
    mkdir = Path.mkdir

    def refuse(self, *args, **kwargs):
        if self.is_relative_to(there.root):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="--store DIR"):
        import_artifacts(there, dest)


# ---- what cannot be imported -----------------------------------------------------------------------------------------


def test_missing_and_damaged_parts_are_named_before_anything_is_committed(store, there, dest):
    export_artifacts(store, [A, B], dest, 4096)
    last = sorted(dest.glob("part-*"))[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1] + b"!")
    with pytest.raises(UserError, match=f"{last.name} is not what index.json says; copy it again"):
        import_artifacts(there, dest)
    last.unlink()
    with pytest.raises(UserError, match=rf"{last.name} cannot be read \(No such file or directory\); copy it again"):
        import_artifacts(there, dest)
    assert there.ls() == []
    last.write_bytes(content)
    assert import_artifacts(there, dest) == [A, B]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no index of an export"),
        ('{"parts": {"../part-0000": {"size": 1, "sha256": ""}}, "artifacts": {}}', "is no index of an export"),
        ('{"parts": {}, "artifacts": {"../up": {}}}', "is no index of an export"),
        ('{"format": 2, "parts": {}, "artifacts": {}}', "by a newer o2mkd-bench"),
        (None, "name the folder of an export"),
    ],
)
def test_bad_indexes(there, dest, text, message):
    dest.mkdir()
    if text is not None:
        (dest / "index.json").write_text(text)
    with pytest.raises(UserError, match=message):
        import_artifacts(there, dest)


def test_a_stream_that_is_no_tar(store, there, dest):
    export_artifacts(store, [A], dest, 1 << 20)
    (dest / "part-0000").write_bytes(b"no tar " * 1000)
    rehash(dest)
    with pytest.raises(UserError, match=r"is damaged .*; export it again"):
        import_artifacts(there, dest)


@pytest.mark.parametrize("size", [100, 512, 3000])
def test_a_stream_that_ends_too_early(store, there, dest, size):
    export_artifacts(store, [A], dest, 1 << 20)
    part = dest / "part-0000"
    part.write_bytes(part.read_bytes()[:size])
    rehash(dest)
    with pytest.raises(UserError, match=r"is damaged .*; export it again"):
        import_artifacts(there, dest)
    assert there.ls() == []


def change(name, data):
    def apply(content):
        return [(m, data if m.name.endswith(name) else d) for m, d in content]

    return apply


def rename(old, new):
    def apply(content):
        for member, _ in content:
            member.name = member.name.replace(old, new)
        return content

    return apply


def link(content):
    content[1][0].type = tarfile.SYMTYPE
    content[1][0].linkname = "/etc/hostname"
    return content


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (change("weights", bytes(10240)), "deep/weights is not what the manifest says"),
        (change("manifest.json", b"{}"), "does not begin with its manifest"),
        (lambda content: content[1:], "does not begin with its manifest"),
        (lambda content: content[:-1], f"{'long' * 40}.json is not what the manifest says"),
        (lambda content: [], "it is in no part"),
        (link, "deep/weights is no file of its manifest"),
        (rename("deep/weights", "../../../escape"), "escape is no file of its manifest"),
        (rename(A, B), "it is not in index.json"),
        (rename(A, "/" + A), "it is not in index.json"),
    ],
)
def test_tampered_streams(store, there, dest, tamper, message):
    export_artifacts(store, [A], dest, 1 << 20)
    repack(dest, tamper(members(dest)))
    with pytest.raises(UserError, match=message):
        import_artifacts(there, dest)
    assert there.ls() == []
    assert not list((there.root / "tmp").glob("*"))


def sealed(manifest):
    """What a hostile hand would write: a manifest that is whole in itself."""
    bare = json.dumps({**manifest, "digest": ""} if manifest else {})
    return bare.replace('""', f'"{hashlib.sha256(bare.encode()).hexdigest()}"', 1).encode()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda manifest: None, "manifest.json is not what index.json says"),
        (lambda manifest: {**manifest, "identity": B}, f"its manifest is that of {B}"),
        (lambda manifest: {**manifest, "files": {}}, "its manifest and index.json disagree"),
        (lambda manifest: {}, "its manifest is damaged"),
    ],
)
def test_tampered_manifests(store, there, dest, edit, message):
    export_artifacts(store, [A], dest, 1 << 20)
    content = members(dest)
    new = edit(json.loads(content[0][1]))
    text = content[0][1].replace(b"student", b"teacher") if new is None else sealed(new)
    repack(dest, change("manifest.json", text)(content))
    if new is not None:
        index = json.loads((dest / "index.json").read_text())
        index["artifacts"][A]["manifest.json"] = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
        (dest / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        import_artifacts(there, dest)
    assert there.ls() == []


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("16M", 16 << 20),
        (" 16 mib ", 16 << 20),
        ("1.5K", 1536),
        ("2GB", 2 << 30),
        ("1T", 1 << 40),
        ("10B", 10),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "16X", "M", "1e3", "0.1", "nan"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="is not understood"):
        parse_size(text)
