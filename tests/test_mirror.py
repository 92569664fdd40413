"""A store at a URL: manifest last, checksums, never a mix of two makers, and a cache that is never trusted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from test_executors import placed
from toy import Events, run, session
from toy import suite as toy_suite

from o2mkd_bench.core.errors import CorruptArtifact, StoreError, UserError
from o2mkd_bench.core.mirror import Mirror, open_store, parse_url
from o2mkd_bench.core.session import store_at
from o2mkd_bench.core.store import Store

ID = "ab" * 10
FILES = {"a.txt": "first", "sub/b.txt": "second"}


@pytest.fixture
def memory() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield found
    found.store.clear()


@pytest.fixture
def one(memory: Any, tmp_path: Path) -> Mirror:
    return Mirror("memory://bucket/runs", tmp_path / "one")


@pytest.fixture
def two(memory: Any, tmp_path: Path) -> Mirror:
    """The same store from another machine."""
    return Mirror("memory://bucket/runs", tmp_path / "two")


def write(store: Store, files: dict[str, str] = FILES, id: str = ID) -> None:
    with store.writing(id, "data", "label", {"x": 1}, {}) as draft:
        for name, text in files.items():
            (draft.dir / name).parent.mkdir(exist_ok=True)
            (draft.dir / name).write_text(text)


def content(store: Store, id: str = ID) -> dict[str, str]:
    return {name: store.read(id, name).read_text() for name in store.manifest(id).files}


def objects(memory: Any) -> dict[str, bytes]:
    return {name: memory.cat_file(name) for name in memory.find("bucket")}


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("s3://bucket/a b", "s3://bucket/a b"),
        ("s3:/bucket/a", "s3://bucket/a"),
        ("memory:/x", "memory://x"),
        ("file:///tmp/x", "file:///tmp/x"),
        ("file:/tmp/x", "file:///tmp/x"),
        (".o2mkd/store", None),
        ("/tmp/s3:/x", None),
        ("c:/x", None),
    ],
)
def test_urls_are_told_from_paths(text: str, url: str | None) -> None:
    assert parse_url(text) == url


def test_one_machine_writes_and_another_reads(one: Mirror, two: Mirror, memory: Any) -> None:
    assert not two.has(ID)
    write(one)
    assert one.has(ID)
    assert two.has(ID)
    assert content(one) == content(two) == FILES
    assert [manifest.identity for manifest in two.ls()] == [ID]
    assert not two.verify()
    assert two.read(ID, "a.txt").is_relative_to(two.root)


def test_the_manifest_comes_last(one: Mirror, two: Mirror, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    put, pipe = memory.put_file, memory.pipe_file

    def noted(what: Any) -> Any:
        def call(first: str, second: Any, *rest: Any, **words: Any) -> Any:
            order.append(str(second if what is put else first).rsplit("/", 1)[-1])
            assert not two.has(ID)
            return what(first, second, *rest, **words)

        return call

    monkeypatch.setattr(one._fs, "put_file", noted(put))
    monkeypatch.setattr(one._fs, "pipe_file", noted(pipe))
    write(one)
    assert order == ["a.txt", "b.txt", "manifest.json"]


def test_what_was_not_finished_is_not_there(one: Mirror, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(one._fs, "pipe_file", killed)
        with pytest.raises(KeyboardInterrupt):
            write(one)
    assert objects(memory)
    assert not one.has(ID)
    with pytest.raises(CorruptArtifact, match="manifest cannot be read"):
        one.manifest(ID)
    write(one)
    assert content(one) == FILES


def test_of_two_makers_the_first_wins_and_nothing_is_mixed(one: Mirror, two: Mirror, memory: Any) -> None:
    with two.writing(ID, "data", "label", {"x": 1}, {}) as draft:
        (draft.dir / "a.txt").write_text("late")
        (draft.dir / "c.txt").write_text("late")
        write(one)
    assert content(one) == content(two) == FILES
    assert {name.rsplit("/", 1)[-1] for name in objects(memory)} == {"a.txt", "b.txt", "manifest.json"}


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "manifest.json"])
@pytest.mark.parametrize("deed", ["flip", "truncate", "delete", "swap"])
def test_all_damage_is_noticed_by_who_reads_anew(one: Mirror, two: Mirror, memory: Any, name: str, deed: str) -> None:
    write(one)
    write(one, {"a.txt": "other", "sub/b.txt": "others"}, "cd" * 10)
    (path,) = [place for place in objects(memory) if place.endswith(name) and ID in place]
    (other,) = [place for place in objects(memory) if place.endswith(name) and ID not in place]
    whole = memory.cat_file(path)
    if deed == "delete":
        memory.rm_file(path)
    else:
        bad = {"flip": bytes([whole[0] ^ 1]) + whole[1:], "truncate": whole[:-1], "swap": memory.cat_file(other)}
        memory.pipe_file(path, bad[deed])
    with pytest.raises(CorruptArtifact):
        content(two)
    if deed != "delete" or name != "manifest.json":
        assert two.verify()
    two.discard(ID, "damaged")
    assert not one.has(ID)
    write(two)
    assert content(one) == content(two) == FILES


def test_a_damaged_cache_is_fetched_again(one: Mirror, two: Mirror) -> None:
    write(one)
    path = two.read(ID, "a.txt")
    path.write_bytes(b"x")
    assert content(two) == FILES
    with pytest.raises(CorruptArtifact, match="it has no file c"):
        two.read(ID, "c.txt")


def test_a_wreck_is_made_anew(one: Mirror, memory: Any) -> None:
    write(one)
    (path,) = [place for place in objects(memory) if place.endswith("a.txt")]
    memory.rm_file(path)
    write(one)
    assert content(one) == FILES


def test_failures_are_known_to_all_until_the_artifact_is_there(one: Mirror, two: Mirror) -> None:
    one.fail(ID, "label", "no memory", "memory")
    record = two.failure(ID)
    assert record is not None
    assert record["reason"] == "no memory"
    write(two)
    assert one.failure(ID) is None


def test_gc_leaves_what_is_kept(one: Mirror, two: Mirror, memory: Any) -> None:
    write(one)
    write(one, id="cd" * 10)
    before = objects(memory)
    assert two.gc({ID}, dry_run=True).ids == ("cd" * 10,)
    assert objects(memory) == before
    freed = two.gc({ID})
    assert freed.ids == ("cd" * 10,)
    assert freed.bytes > 10
    assert two.has(ID)
    assert not one.has("cd" * 10)
    assert len(objects(memory)) == 3


def test_nobody_answering_is_not_nothing_there(one: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would make everything anew when the network is down."""
    write(one)

    def silent(*_: Any, **__: Any) -> None:
        raise TimeoutError("no answer")

    for name in ("cat_file", "put_file", "glob"):
        monkeypatch.setattr(one._fs, name, silent)
    for ask in (lambda: one.has(ID), lambda: one.failure(ID), one.ls):
        with pytest.raises(StoreError, match=r"store memory://bucket/runs cannot be read \(no answer\)"):
            ask()
    with pytest.raises(StoreError, match=r"cannot be written \(no answer\)"):
        write(one, id="cd" * 10)


def test_a_url_that_nothing_opens_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--store nosuch://x: Protocol not known: nosuch"):
        Mirror("nosuch://x", tmp_path)


def test_a_store_is_opened_by_what_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert type(store_at(tmp_path / "x")) is Store
    found = store_at(Path("memory://bucket/x"))
    assert isinstance(found, Mirror)
    assert found.address == "memory://bucket/x"
    assert found.root.is_relative_to(tmp_path / ".o2mkd" / "cache")
    assert type(open_store("", tmp_path)) is Store
    assert not list(tmp_path.iterdir())


SMALL = toy_suite(speed={"enabled": False}, probe={"enabled": False})


def test_a_run_leaves_at_a_url_what_it_leaves_in_a_folder(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = Path("memory://bucket/toy")
    run(SMALL, url, tmp_path / "out", Events())
    run(SMALL, tmp_path / "plain", tmp_path / "out", Events())
    found = session(SMALL, url).store
    plain = {m.identity: m.files for m in Store(tmp_path / "plain").ls()}
    assert {m.identity: m.files for m in found.ls()} == plain
    events = Events()
    run(SMALL, url, tmp_path / "out", events)
    assert not events.labels("start")


def test_workers_share_a_store_at_a_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("o2mkd_bench.report.write.write", lambda *_: None)
    monkeypatch.setattr("toy.prepare", _at(f"file://{tmp_path}/remote"))
    results = placed(SMALL, tmp_path, Events(), 2)
    assert results.failed == 0
    assert list((tmp_path / "remote" / "artifacts").glob("*/*/manifest.json"))


def _at(url: str) -> Any:
    from o2mkd_bench.core.session import prepare

    return lambda suite, store, only: prepare(suite, Path(url), only)
