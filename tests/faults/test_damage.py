"""Every file that a run leaves, damaged in turn: it is noticed, said, and never used."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import Finished, artifacts, call, one_sentence, places, plan, result, run

from o2mkd_bench.core.errors import CorruptArtifact, UserError
from o2mkd_bench.core.manifest import MANIFEST
from o2mkd_bench.core.plan import Plan
from o2mkd_bench.core.store import Store
from o2mkd_bench.core.transfer import export_artifacts, import_artifacts

FAULTS = ("flip", "truncate", "delete", "swap")


def damage(path: Path, fault: str, other: Path, place: int) -> None:
    """``place``: which byte is flipped, counted on from the start again where the file is shorter."""
    content = path.read_bytes()
    if fault == "flip":
        changed = bytearray(content)
        changed[place % len(changed)] ^= 1 << place % 8
        path.write_bytes(changed)
    elif fault == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "delete":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


def pairs(store: Path) -> Iterator[tuple[str, Path, Path]]:
    """Every file of a store with its artifact, and another file of that name, else any other, with other content."""
    every = sorted(path for place in places(store).values() for path in place.rglob("*") if path.is_file())
    for identity, place in sorted(places(store).items()):
        for path in sorted(p for p in place.rglob("*") if p.is_file()):
            others = sorted(every, key=lambda other, name=path.name: other.name != name)
            content = path.read_bytes()
            yield identity, path, next(other for other in others if other.read_bytes() != content)


def noticed(store: Store, identity: str) -> bool:
    """Whether an artifact counts as absent, or its files cannot be read, once a process looks anew."""
    try:
        for name in store.manifest(identity).files:
            store.read(identity, name)
    except (CorruptArtifact, UserError):
        return True
    return False


def test_every_damaged_file_of_an_artifact_is_noticed_when_it_is_read(
    undisturbed: Finished, tmp_path: Path, everything: bool, figure: Callable[[str], None]
) -> None:
    copy = Path(shutil.copytree(undisturbed.store, tmp_path / "store"))
    tried = 0
    for number, (identity, path, other) in enumerate(pairs(copy)):
        # one fault a file in the sample
        for fault in FAULTS if everything else FAULTS[number % 4 :][:1]:
            kept = {file: file.read_bytes() for file in (path, other)}
            damage(path, fault, other, 7919 * number)
            assert noticed(Store(copy), identity), f"{fault} of {path}"
            if fault == "swap":
                assert noticed(Store(copy), next(n for n in places(copy) if n in other.parts)), f"{fault} of {other}"
            for file, content in kept.items():
                file.write_bytes(content)
            assert not noticed(Store(copy), identity)
            tried += 1
    figure(f"damage: {tried} damaged files of {len(places(copy))} artifacts, all noticed when read")


def victims(found: Plan, store: Path) -> dict[tuple[str, str], tuple[str, str | None]]:
    """For each kind of stage and file name: a stage, and one made from it that can be made anew at little cost."""
    chosen: dict[tuple[str, str], tuple[str, str | None]] = {}
    for identity, place in places(store).items():
        stage = found.stages[identity]
        readers = [s for s in found.stages.values() if identity in s.inputs()]
        cheap = min(readers, key=lambda s: (s.kind not in ("samples", "probe", "score"), s.identity), default=None)
        for path in place.iterdir():
            chosen.setdefault((stage.kind, path.name), (identity, cheap.identity if cheap else None))
    return chosen


def forget(found: Plan, store: Path, identity: str) -> None:
    """Remove an artifact and all that was made from it."""
    gone = {identity}
    for name, stage in found.stages.items():
        if not gone.isdisjoint(stage.inputs()):
            gone.add(name)
    for name, place in places(store).items():
        if name in gone:
            shutil.rmtree(place)


def test_a_run_never_uses_a_damaged_file(
    undisturbed: Finished, tmp_path: Path, everything: bool, figure: Callable[[str], None]
) -> None:
    """The damaged artifact has a reader to be made; what nobody reads is found by ``store verify``."""
    found = plan(undisturbed.suite, undisturbed.store)
    cases = sorted(victims(found, undisturbed.store).items())
    # those that leave a file of the same size in the sample
    chosen = [(case, fault) for case in cases for fault in FAULTS]
    if not everything:
        chosen = [(cases[len(cases) * number // 2], fault) for number, fault in enumerate(("flip", "swap"))]
    made = 0
    for number, ((what, (identity, reader)), fault) in enumerate(chosen):
        copy = Path(shutil.copytree(undisturbed.store, tmp_path / f"store-{number}"))
        if reader is not None:
            forget(found, copy, reader)
        path = places(copy)[identity] / what[1]
        others = [p for i, p in places(copy).items() if i != identity and (p / what[1]).exists()]
        other = (others[0] if others else places(copy)[identity]) / (what[1] if others else MANIFEST)
        damage(path, fault, other, 104_729 * number)
        ended = call(*run(undisturbed.suite, copy, tmp_path / "out"))
        if ended.code == 2:
            # a manifest that claims to be of another version is refused
            assert "newer o2mkd-bench" in ended.err
            continue
        assert ended.code == 0, ended.err
        verified = call("store", "verify", "--discard", "--store", copy)
        if verified.code:
            # what the run had no need to read
            again = call(*run(undisturbed.suite, copy, tmp_path / "out"))
            assert again.code == 0, again.err
            assert call("store", "verify", "--store", copy).code == 0
        assert result(tmp_path / "out") == result(undisturbed.out), (what, fault)
        whole = artifacts(undisturbed.suite, undisturbed.store)
        for name in places(copy):
            if name in whole:
                assert Store(copy).manifest(name).files == whole[name], (what, fault)
        shutil.rmtree(copy)
        made += 1
    figure(f"damage: {made} runs over a damaged file, results equal to the undisturbed; {len(chosen) - made} refused")


def test_a_damaged_export_is_never_taken_over(
    undisturbed: Finished, tmp_path: Path, everything: bool, figure: Callable[[str], None]
) -> None:
    ids = [m.identity for m in Store(undisturbed.store).ls() if m.kind == "score"]
    export_artifacts(Store(undisturbed.store), ids, tmp_path / "whole", 16 * 1024)
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    tried = 0
    for number, name in enumerate(files):
        for fault in FAULTS:
            copy = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"carried-{number}-{fault}"))
            other = next(copy / n for n in files if (copy / n).read_bytes() != (copy / name).read_bytes())
            damage(copy / name, fault, other, 15_485_863 * number)
            there = Store(tmp_path / f"store-{number}-{fault}")
            with pytest.raises(UserError):
                import_artifacts(there, copy)
            assert there.ls() == []
            tried += 1
    figure(f"damage: {tried} damaged exports, all refused")


def test_a_damaged_table_is_one_sentence(undisturbed: Finished, tmp_path: Path) -> None:
    out = Path(shutil.copytree(undisturbed.out, tmp_path / "out"))
    document = (out / "results.json").read_text(encoding="utf-8")
    for text in (document[: len(document) // 2], "", "[]", '{"schema_version": 1, "rows": [1]}'):
        (out / "results.json").write_text(text, encoding="utf-8")
        ended = call("report", out)
        assert ended.code == 2
        assert one_sentence(ended.err)
