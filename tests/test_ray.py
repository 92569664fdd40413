"""Stages on a Ray cluster of two nodes on this machine, one of which is killed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from test_executors import GRID, artifacts, has_lock, placed_on
from toy import Events, run

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.events import Event
from o2mkd_bench.core.executor import Site
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.executors.choose import Placement
from o2mkd_bench.testing import ExecutorContract
from o2mkd_plugins.executors.options import RayOptions
from o2mkd_plugins.executors.ray import Ray

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="class")
def machine() -> Iterator[None]:
    """Ray on this machine alone, with two slots."""
    # one of its own, whatever else runs on this machine
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("machine")
class TestRay(ExecutorContract):
    name = "ray"
    patience = 60.0

    @pytest.mark.parametrize(
        ("devices", "asked", "given"), [((), None, "2"), (("GPU-a",), None, None), (("GPU-a",), "3", "3")]
    )
    def test_beside_a_gpu_threads_are_what_ray_gives(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], asked: Any, given: Any
    ) -> None:
        monkeypatch.setattr("o2mkd_bench.core.machine.cores", lambda: 2)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if asked:
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
        with closing(Ray(RayOptions(), Site(tmp_path, "cuda:0" if devices else "cpu", devices))) as executor:
            assert executor._common["runtime_env"]["env_vars"].get("OMP_NUM_THREADS") == given


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head that runs nothing, and two nodes of one slot."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def raylet(node: Any) -> int:
    found: int = node.all_processes["raylet"][0].process.pid
    return found


def test_a_node_killed_in_the_middle_costs_nothing_but_time(cluster: Any, tmp_path: Path) -> None:
    """The same artifacts as one process makes, though half of the cluster goes away while students train."""
    long = {**GRID, "budgets": [3072], "checkpoint_every": 1e-9}
    run(long, tmp_path / "plain" / "store", tmp_path / "plain" / "out", Events())
    events = Events()
    killed: list[str] = []
    work = tmp_path / "store" / "work"

    def kill(event: Event) -> None:
        training = event.kind == "progress" and "single seed 0" in event.label
        if training and not killed and (work / event.stage / "checkpoint.safetensors").exists():
            (worker,) = [pid for pid in processes() if has_lock(pid, event.stage)]
            (node,) = [one for one in cluster.worker_nodes if raylet(one) in ancestors(worker)]
            killed.append(event.label)
            cluster.remove_node(node, allow_graceful=False)

    events.until = kill
    results = placed_on(long, tmp_path, events, Placement("ray", {"address": cluster.address}))
    assert killed
    assert results.failed == 0
    assert any("its worker went away with its node; trying once more" in text for text in events.texts())
    assert any("going on at step" in text for text in events.texts())
    assert artifacts(tmp_path / "store") == artifacts(tmp_path / "plain" / "store")


def test_an_interrupt_keeps_checkpoints(cluster: Any, tmp_path: Path) -> None:
    """No checkpoint is due before it."""
    long = {**GRID, "budgets": [10_000_000], "checkpoint_every": 3600.0}

    def stop(event: Event) -> None:
        if event.kind == "progress" and "single seed 0" in event.label:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        placed_on(long, tmp_path, Events(stop), Placement("ray", {"address": cluster.address}))
    assert list((tmp_path / "store" / "work").glob("*/checkpoint.safetensors"))


def test_an_address_where_nobody_is_is_one_sentence(tmp_path: Path) -> None:
    plugin = registry().get("executors", "ray")
    with pytest.raises(UserError, match=r"--address 127.0.0.1:1: no Ray cluster can be joined there"):
        plugin.load()(plugin.parse({"address": "127.0.0.1:1"}), Site(tmp_path, "cpu"))
