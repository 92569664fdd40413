"""TensorBoard and Weights & Biases, offline: what they would show is what the events said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.events import Event
from o2mkd_bench.core.plugins import registry

HOSTILE = "../../<b>half/häßlich seed 0"


def tracker(name: str, out: Path) -> Any:
    plugin = registry().get("trackers", name)
    return plugin.load()(plugin.parse({}), out)


def tell(show: Any) -> None:
    """A stage that trains, one that fails, and the end."""
    show(Event("plan", data={"stages": 2, "reused": 0}))
    show(Event("start", "a" * 20, HOSTILE))
    for step in (1, 2, 3):
        show(Event("progress", "a" * 20, HOSTILE, {"done": step, "total": 3, "images": step * 8, "loss": 1 / step}))
    show(Event("progress", "b" * 20, "samples", {"done": 1, "total": 2}))
    show(Event("done", "a" * 20, HOSTILE))
    show(Event("failed", "b" * 20, "samples", {"reason": "no memory", "category": "memory"}))
    show(Event("end", data={"made": 1, "failed": 1}))
    show.close()


def test_tensorboard_has_a_curve_a_stage(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(tracker("tensorboard", tmp_path / "out"))
    (folder,) = (tmp_path / "out" / "tensorboard").iterdir()
    assert folder.name == "b-half-häßlich-seed-0-aaaaaaaa"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = EventAccumulator(str(folder))
    found.Reload()
    tensors = {tag: [(one.step, one.tensor_proto.float_val[0]) for one in found.Tensors(tag)] for tag in ("loss",)}
    assert tensors["loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_wandb_keeps_everything_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    show = tracker("wandb", tmp_path / "out")
    assert show._run.settings.mode == "offline"
    logged: list[dict[str, Any]] = []
    real = show._run.log
    monkeypatch.setattr(show._run, "log", lambda data: (logged.append(data), real(data)))
    tell(show)
    assert logged == [{f"{HOSTILE}/step": step, f"{HOSTILE}/loss": 1 / step} for step in (1, 2, 3)]
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0
    assert wandb.run is None


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_whose_package_is_absent_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [one for one in sys.modules if one.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(UserError, match=rf"--tracker {name} needs .* pip install 'o2mkd-bench\[{name}\]'"):
        tracker(name, tmp_path)
