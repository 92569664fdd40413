"""The store keeps its promises through crashes, races, damage and disks that cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from o2mkd_bench.core.errors import CorruptArtifact, UserError
from o2mkd_bench.core.store import Manifest, Store

A, B, C = "a" * 20, "b" * 20, "c" * 20


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def put(store, id=A, content="one", kind="student", label="a student"):
    with store.writing(
        id, kind, label, {"width": 0.5, "edges": (1, 2)}, {"teacher": (B,), "students": [B, C]}
    ) as draft:
        (draft.dir / "deep").mkdir()
        (draft.dir / "deep" / "weights").write_text(content)
        (draft.dir / "scores.json").write_text('{"fid": 3.5}')
        draft.meta["seconds"] = 1.5


def tree(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*"))


def start(root, code):
    """A process that runs ``code`` with ``store`` and ``A`` at hand; its standard streams are pipes."""
    head = f"""
import os, signal, sys
from o2mkd_bench.core import store as module
store, A = module.Store({str(root)!r}), {A!r}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process):
    process.communicate(timeout=60)
    return process.returncode


# ---- reading and writing ---------------------------------------------------------------------------------------------


def test_round_trip(store):
    assert not store.has(A)
    put(store)
    assert store.has(A)
    manifest = store.manifest(A)
    assert (manifest.identity, manifest.kind, manifest.label) == (A, "student", "a student")
    assert manifest.spec == {"width": 0.5, "edges": [1, 2]}
    assert manifest.needs == {"teacher": (B,), "students": (B, C)}
    assert manifest.meta == {"seconds": 1.5}
    assert manifest.created.endswith("+00:00")
    assert {name: file.size for name, file in manifest.files.items()} == {"deep/weights": 3, "scores.json": 12}
    assert store.read(A, "deep/weights").read_text() == "one"
    assert store.read_json(A, "scores.json") == {"fid": 3.5}
    assert store.read(A, "scores.json") == store.root / "artifacts" / "aa" / A / "scores.json"
    assert list((store.root / "tmp").iterdir()) == []


def test_meta_may_hold_numbers_that_json_does_not_know(store):
    with store.writing(A, "scores", "scores", {}, {}) as draft:
        draft.meta["fid"] = float("nan")
    assert store.manifest(A).meta == {"fid": "NaN"}


def test_an_exception_leaves_nothing(store):
    def fail_halfway():
        with store.writing(A, "student", "", {}, {}) as draft:
            (draft.dir / "weights").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert not store.has(A)
    assert list((store.root / "tmp").iterdir()) == []


def test_links_and_a_manifest_of_ones_own_are_refused(store):
    with pytest.raises(ValueError, match="link is no plain file"), store.writing(A, "k", "", {}, {}) as draft:
        (draft.dir / "link").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="cannot be the name"), store.writing(A, "k", "", {}, {}) as draft:
        (draft.dir / "manifest.json").write_text("{}")
    assert not store.has(A)


@pytest.mark.parametrize(("spec", "needs"), [({"t": float("nan")}, {}), ({"t": object()}, {}), ({}, {"teacher": B})])
def test_a_wrong_description_is_refused_before_the_work(store, spec, needs):
    entered = []
    with pytest.raises(ValueError, match=r"identity|tuple"), store.writing(A, "k", "", spec, needs) as draft:
        entered.append(draft)
    assert entered == []


@pytest.mark.parametrize("id", ["", "../up", "a/b", "-a", "a.b", "é"])
def test_what_cannot_be_an_identity_is_refused(store, id):
    with pytest.raises(ValueError, match="is no identity"):
        store.has(id)
    with pytest.raises(ValueError, match="is no identity"):
        store.work(id)


def test_the_first_of_two_writers_wins(store):
    with store.writing(A, "student", "late", {}, {}) as draft:
        (draft.dir / "weights").write_text("late")
        put(store, content="early")
    assert store.manifest(A).label == "a student"
    assert store.read(A, "deep/weights").read_text() == "early"
    assert store.verify() == []


@pytest.mark.parametrize("wreck", ["folder", "file"])
def test_a_wreck_in_the_place_is_put_aside(store, wreck):
    place = store.root / "artifacts" / "aa" / A
    place.parent.mkdir(parents=True)
    if wreck == "folder":
        place.mkdir()
        (place / "deep").write_text("no manifest here")
    else:
        place.write_text("no folder at all")
    assert not store.has(A)
    put(store)
    assert store.read(A, "deep/weights").read_text() == "one"
    assert len(list((store.root / "corrupt").glob(f"{A}-*.json"))) == 1


def test_a_rename_that_fails_for_another_reason_is_told(store, monkeypatch):
    def rename(self, target):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="cross-device"):
        put(store)
    assert not store.has(A)


# ---- damage ----------------------------------------------------------------------------------------------------------


def test_damage_is_found_when_read_and_only_once_looked_for(store):
    put(store)
    path = store.read(A, "deep/weights")
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert store.has(A)
    assert store.read(A, "deep/weights") == path  # same path, size and mtime: verified before in this process
    with pytest.raises(CorruptArtifact, match="deep/weights is not what the manifest says"):
        Store(store.root).read(A, "deep/weights")
    assert [error.identity for error in store.verify()] == [A]
    store.discard(A, "bit rot")
    assert not store.has(A)
    record = json.loads(next((store.root / "corrupt").glob("*.json")).read_text())
    assert (record["identity"], record["reason"]) == (A, "bit rot")
    put(store)
    assert store.verify() == []


def test_a_changed_file_is_verified_again(store):
    put(store)
    store.read(A, "deep/weights").write_text("longer than before")
    assert not store.has(A)
    with pytest.raises(CorruptArtifact):
        store.read(A, "deep/weights")


def test_missing_files_and_artifacts(store):
    with pytest.raises(CorruptArtifact, match="manifest cannot be read"):
        store.read(A, "deep/weights")
    put(store)
    with pytest.raises(CorruptArtifact, match="has no file"):
        store.read(A, "../../secret")
    store.read(A, "deep/weights").unlink()
    assert not store.has(A)
    with pytest.raises(CorruptArtifact, match="deep/weights cannot be read"):
        store.read(A, "deep/weights")


def test_discard_of_nothing_is_nothing(store):
    store.discard(A, "not there")
    assert list((store.root / "corrupt").iterdir()) == []


def edit_manifest(store, **changes):
    """Another manifest, whole in itself."""
    path = store.root / "artifacts" / "aa" / A / "manifest.json"
    bare = json.dumps({**json.loads(path.read_text()), **changes, "digest": ""})
    path.write_text(bare.replace('""', f'"{hashlib.sha256(bare.encode()).hexdigest()}"', 1))


def test_damaged_manifests(store):
    put(store)
    edit_manifest(store, identity=B)
    with pytest.raises(CorruptArtifact, match=f"is that of {B}"):
        store.manifest(A)
    edit_manifest(store, identity=A, files={"../up": {"size": 1, "sha256": ""}})
    with pytest.raises(CorruptArtifact, match="manifest is damaged"):
        store.manifest(A)
    assert not store.has(A)
    assert [error.identity for error in store.verify()] == [A]


@pytest.mark.parametrize("name", ["/abs", "a/../b", "a//b", "./a", "a\\b", "", ".", "manifest.json"])
def test_file_names_stay_inside(name):
    record = {"size": 1, "sha256": ""}
    fields = {"identity": A, "kind": "k", "label": "", "created": "", "spec": {}, "needs": {}, "meta": {}}
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        Manifest(files={name: record}, **fields)


def test_every_flipped_bit_of_a_manifest_is_noticed(store):
    put(store)
    path = store.root / "artifacts" / "aa" / A / "manifest.json"
    content = path.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises((CorruptArtifact, UserError)):
            store.manifest(A)
    path.write_bytes(content)
    assert store.has(A)


def test_manifests_of_version_1_have_no_digest_and_are_read(store):
    put(store)
    path = store.root / "artifacts" / "aa" / A / "manifest.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**found, "schema_version": 1}.items() if k != "digest"}))
    assert store.has(A)
    path.write_text(json.dumps({k: v for k, v in found.items() if k != "digest"}))
    assert not store.has(A)


def test_a_store_of_a_newer_version_is_not_overwritten(store):
    put(store)
    edit_manifest(store, schema_version=99)
    with pytest.raises(UserError, match="newer o2mkd-bench"):
        store.has(A)


# ---- scratch, failures, listing, garbage -----------------------------------------------------------------------------


def test_work_survives_until_dropped(store):
    (store.work(A) / "step").write_text("7")
    assert (Store(store.root).work(A) / "step").read_text() == "7"
    store.drop_work(A)
    store.drop_work(A)
    assert list((store.root / "work").iterdir()) == []


def test_failures_are_remembered_until_success(store):
    assert store.failure(A) is None
    store.fail(A, "a student", "loss is NaN", "numerics")
    store.fail(A, "a student", "out of memory", "memory")
    record = store.failure(A)
    assert record.pop("created").endswith("+00:00")
    assert record == {"identity": A, "label": "a student", "reason": "out of memory", "category": "memory"}
    put(store)
    assert store.failure(A) is None
    store.fail(B, "", "", "")
    store.clear_failure(B)
    store.clear_failure(B)
    assert store.failure(B) is None


def test_ls_is_sorted_and_passes_over_what_is_not_complete(store):
    assert store.ls() == []
    put(store, C, kind="teacher")
    put(store, B, label="z")
    put(store, A, label="a")
    (store.root / "artifacts" / "dd" / ("d" * 20)).mkdir(parents=True)
    (store.root / "artifacts" / "lost+found").mkdir()
    (store.root / "artifacts" / ".DS_Store").write_text("")
    assert [m.identity for m in store.ls()] == [A, B, C]


def test_gc_frees_what_nobody_wants(store):
    for id in (A, B):
        put(store, id)
        store.work(id)
    (store.work(C) / "step").write_text("7")  # wanted and not made yet
    put(store, "e" * 20)
    store.discard("e" * 20, "bit rot")
    orphan = store.root / "tmp" / f"{A}-{'0' * 32}"
    orphan.mkdir()
    (orphan / "half").write_text("12345")
    (store.root / "tmp" / "not-ours").write_text("")
    (store.root / "artifacts" / "dd" / ("d" * 20)).mkdir(parents=True)
    before = tree(store.root)

    planned = store.gc({A, C, "d" * 20}, dry_run=True)
    assert tree(store.root) == before
    freed = store.gc({A, C, "d" * 20})
    assert freed == planned
    assert freed.ids == (B, "d" * 20)
    artifact = sum(p.stat().st_size for p in (store.root / "artifacts" / "aa" / A).rglob("*") if p.is_file())
    assert freed.bytes > 2 * artifact + 5  # B, the discarded one with its reason, the orphaned draft
    assert [m.identity for m in store.ls()] == [A]
    assert [p.name for p in (store.root / "work").iterdir()] == [C]
    assert [p.name for p in (store.root / "tmp").iterdir()] == ["not-ours"]
    assert list((store.root / "corrupt").iterdir()) == []


def test_gc_leaves_alone_what_is_locked_or_being_written(store):
    put(store)
    with store.lock(A), store.writing(B, "student", "", {}, {}) as draft:
        (draft.dir / "weights").write_text("in the making")
        assert store.gc(set()).ids == ()
        assert store.gc(set(), dry_run=True).ids == ()
    assert store.has(A)
    assert store.has(B)
    assert store.gc(set()).ids == (A, B)


def test_gc_of_a_store_that_is_not_there(tmp_path):
    assert Store(tmp_path / "none").gc({A}).ids == ()
    assert not (tmp_path / "none").exists()


# ---- locks and processes ---------------------------------------------------------------------------------------------


def test_locks_exclude(store):
    held = store.try_lock(A)
    with held:
        assert store.try_lock(A) is None
        with pytest.raises(TimeoutError), store.lock(A, timeout=0.01):
            pass
        with store.lock(B):
            pass
    with store.lock(A):
        assert store.try_lock(A) is None
    with store.try_lock(A):
        pass


def test_a_killed_process_leaves_no_lock_and_no_artifact(store):
    process = start(
        store.root,
        """
        with store.lock(A), store.writing(A, "student", "", {}, {}) as draft:
            (draft.dir / "weights").write_text("half")
            print("writing", flush=True)
            sys.stdin.read()
        """,
    )
    assert process.stdout.readline() == "writing\n"
    assert store.try_lock(A) is None
    assert store.gc(set()).bytes == 0
    process.kill()
    finish(process)
    assert not store.has(A)
    assert store.verify() == []
    assert len(list((store.root / "tmp").iterdir())) == 1
    with store.lock(A, timeout=30):
        put(store)
    assert store.gc({A}).bytes == 4
    assert store.verify() == []


@pytest.mark.parametrize(
    ("function", "when", "whole"),
    [
        ("seal", "before", False),
        ("write_synced", "before", False),
        ("write_synced", "after", False),
        ("renamed", "before", False),
        ("renamed", "after", True),
    ],
)
def test_a_kill_at_any_moment_of_the_commit_leaves_all_or_nothing(store, function, when, whole):
    process = start(
        store.root,
        f"""
        kept = module.{function}
        def killing(*arguments):
            if {when!r} == "after":
                kept(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        module.{function} = killing
        with store.writing(A, "student", "", {{}}, {{}}) as draft:
            (draft.dir / "weights").write_text("whole")
        """,
    )
    assert finish(process) == -signal.SIGKILL
    assert store.has(A) == whole
    assert store.verify() == []
    put(store)
    assert store.has(A)
    assert store.verify() == []
    store.gc({A})
    assert list((store.root / "tmp").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="names open files through /proc")
def test_everything_is_on_the_disk_before_the_rename(store, monkeypatch):
    """Files before the manifest, the manifest before the folder, the folder before its new name."""
    done = []
    fsync, rename = os.fsync, Path.rename

    def spy(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")).partition("-")[0])
        fsync(descriptor)

    def move(self, target):
        done.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(Path, "rename", move)
    put(store)
    assert done == ["deep", "weights", "scores.json", "manifest.json", A, "rename", "aa", "artifacts"]


def test_of_two_processes_one_wins_and_nothing_is_mixed(store):
    code = """
        with store.writing(A, "student", sys.argv[0], {}, {}) as draft:
            for name in "abc":
                (draft.dir / name).write_text(str(os.getpid()))
            print("ready", flush=True)
            sys.stdin.read()
        """
    processes = [start(store.root, code) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.close()
    for process in processes:
        assert process.wait(timeout=60) == 0
        process.stdout.close()
    contents = {store.read(A, name).read_text() for name in "abc"}
    assert len(contents) == 1
    assert contents <= {str(p.pid) for p in processes}
    assert store.verify() == []
    assert list((store.root / "tmp").iterdir()) == []


# ---- disks that cannot be written ------------------------------------------------------------------------------------

WRITES = {
    "writing": put,
    "work": lambda store: store.work(A),
    "drop_work": lambda store: store.drop_work(C),
    "fail": lambda store: store.fail(A, "", "", ""),
    "clear_failure": lambda store: store.clear_failure(C),
    "discard": lambda store: store.discard(C, ""),
    "lock": lambda store: store.lock(A).__enter__(),
    "try_lock": lambda store: store.try_lock(A),
    "gc": lambda store: store.gc(set()),
}


@pytest.fixture
def frozen(store, monkeypatch):
    """A store with something in it, and a way to make every change to the file system fail."""
    put(store, C)
    store.work(C)
    store.fail(C, "", "", "")
    shutil.rmtree(store.root / "locks")
    opened = os.open

    def freeze(code):
        def refuse(path, *args, **kwargs):
            raise OSError(code, os.strerror(code), os.fspath(path))

        def open_to_read(path, flags, *args, **kwargs):
            return refuse(path) if flags & (os.O_CREAT | os.O_WRONLY) else opened(path, flags, *args, **kwargs)

        for name in ("mkdir", "rename", "replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, refuse)
        monkeypatch.setattr(os, "open", open_to_read)

    store.freeze = freeze
    return store


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_store_that_cannot_be_written_is_one_sentence(frozen, write, code):
    frozen.freeze(code)
    with pytest.raises(UserError) as caught:
        WRITES[write](frozen)
    text = str(caught.value)
    assert str(frozen.root) in text
    assert os.strerror(code).lower() in text
    assert "--store DIR" in text


def test_a_read_only_store_can_be_read(frozen):
    frozen.freeze(errno.EROFS)
    assert frozen.has(C)
    assert not frozen.has(A)
    assert frozen.read(C, "deep/weights").read_text() == "one"
    assert [m.identity for m in frozen.ls()] == [C]
    assert frozen.verify() == []
    assert frozen.failure(C) is not None
    assert frozen.gc(set(), dry_run=True).ids == (C,)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(store, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"is on a full disk; free space there or choose another with --store DIR"):
        put(store)
    with pytest.raises(UserError, match="full disk"):
        store.fail(A, "", "", "")
    monkeypatch.undo()
    assert not store.has(A)
    assert store.failure(A) is None
    assert not any(p.is_dir() for p in (store.root / "tmp").iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "full disk"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "file too large"),
        (OSError("40960 requested and 8872 written"), "full disk"),
        (OSError(errno.EFBIG, "File too large"), "file too large"),
    ],
)
def test_a_library_that_reports_a_full_disk_in_words_is_understood(store, error, said):
    with pytest.raises(UserError, match=said), store.guard():
        raise error


def test_a_library_that_could_not_read_is_not_understood_as_a_full_disk(store):
    with pytest.raises(RuntimeError), store.guard():
        raise RuntimeError("Error while deserializing: I/O error: No such file or directory (os error 2)")


def test_troubles_elsewhere_are_not_blamed_on_the_store(store, tmp_path):
    with pytest.raises(PermissionError), store.writing(A, "", "", {}, {}):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "data.tar"))
    with pytest.raises(FileExistsError), store.writing(A, "", "", {}, {}) as draft:
        draft.dir.mkdir()


def test_a_store_that_is_a_file(tmp_path):
    (tmp_path / "store").write_text("")
    for place in (tmp_path / "store", tmp_path / "store" / "below"):
        store = Store(place)
        assert not store.has(A)
        with pytest.raises(UserError, match="is not a folder; choose another with --store DIR"):
            put(store)
