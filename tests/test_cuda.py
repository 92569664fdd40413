"""What must not depend on the device. Runs wherever there is a CUDA device."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_networks import SCHEDULE, Denoiser, Family, call, learn, setting
from toy import Events, run, suite

from o2mkd_bench import Line, Program
from o2mkd_bench.core.identity import canonical
from o2mkd_bench.core.mode import PLAIN, Mode
from o2mkd_bench.engine.denoiser import Call, Tables
from o2mkd_bench.engine.distil import Distil, Methods
from o2mkd_bench.engine.graphs import Graphs
from o2mkd_bench.engine.sample import auto_batch, sample_images
from o2mkd_bench.engine.shared import Teacher
from o2mkd_bench.stages.bench import Bench
from o2mkd_bench.stages.samples import draw
from o2mkd_bench.stages.speed import make as make_speed
from o2mkd_plugins.kd.options import OutputOptions, RelationOptions
from o2mkd_plugins.kd.output import OutputMatching
from o2mkd_plugins.kd.relation import Relation

CUDA = torch.device("cuda:0")
GRAPHS = Mode(cuda_graphs=True)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def sampling_stages(toy_run):
    return [stage for stage in toy_run.session.plan.stages.values() if stage.kind == "samples"]


def images_on_cuda(toy_run, stage, batch, mode=PLAIN, events=None, precision="fp32"):
    found = toy_run.session
    bench = Bench(found.store, "cuda:0", Events() if events is None else events, found.registry, mode)
    small = replace(stage, local={"batch": batch})
    spec = {**stage.spec, "precision": precision}
    return draw(bench, spec, stage.needs["students"], range(stage.spec["images"]), small).numpy().astype(int)


def stored_images(toy_run, stage):
    return np.load(toy_run.session.store.read(stage.identity, "images.npy")).astype(int)


def test_images_are_those_of_the_cpu_whatever_the_batch(toy_run):
    stages = sampling_stages(toy_run)
    assert len(stages) > 2
    for stage in stages:
        stored = stored_images(toy_run, stage)
        for batch in (97, 640):
            assert np.abs(images_on_cuda(toy_run, stage, batch) - stored).max() <= 1, (stage.label, batch)


def experts_stage(toy_run):
    """A sampling stage in which both of two experts are called."""
    return next(stage for stage in sampling_stages(toy_run) if len(stage.needs["students"]) == 2)


@pytest.mark.parametrize("mode", [GRAPHS, Mode("on"), Mode("on", True)])
def test_every_mode_draws_the_same_images(toy_run, mode):
    events = Events()
    stage = experts_stage(toy_run)
    # the last of the batches is padded
    found = images_on_cuda(toy_run, stage, 97, mode, events)
    assert np.abs(found - stored_images(toy_run, stage)).max() <= 1
    assert events.texts() == []
    assert [event.data["done"] for event in events if event.kind == "progress"] == [*range(97, 640, 97), 640]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", [PLAIN, Mode("on", True)])
def test_a_narrow_precision_is_less_than_a_level_away(toy_run, precision, mode):
    stage = experts_stage(toy_run)
    found = images_on_cuda(toy_run, stage, 640, mode, precision=precision)
    assert np.abs(found - stored_images(toy_run, stage)).mean() < 1


def test_a_full_memory_halves_the_batch_and_captures_anew(toy_run, monkeypatch):
    events, stage, fits = Events(), experts_stage(toy_run), []
    ask, fit = Graphs.ask, Graphs.fit

    def tight(self, k, x, t):
        if len(x) > 200:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return ask(self, k, x, t)

    monkeypatch.setattr(Graphs, "ask", tight)
    monkeypatch.setattr(Graphs, "fit", lambda self, batch: (fits.append(batch), fit(self, batch)))
    found = images_on_cuda(toy_run, stage, 640, GRAPHS, events)
    assert np.abs(found - stored_images(toy_run, stage)).max() <= 1
    assert fits == [640, 320, 160]
    assert [text.rpartition("with ")[2] for text in events.texts()] == [f"{n} images at a time" for n in (320, 160)]


def test_batch_auto_is_what_memory_holds(toy_run):
    stage = experts_stage(toy_run)
    found = images_on_cuda(toy_run, stage, "auto")
    assert np.abs(found - stored_images(toy_run, stage)).max() <= 1
    everything = torch.cuda.mem_get_info()[0]
    assert auto_batch(lambda n: torch.empty(n, everything // 80, dtype=torch.uint8, device="cuda"), CUDA) == 32


def test_images_arrive_pinned_and_in_order():
    indices = torch.arange(23, device=CUDA)
    program = Program((Line(999, x0={0: 1.0}),))
    done = []

    def noise_for(some, _):
        return (some.float() / 100).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    scale = float(SCHEDULE.alpha[999])
    found = sample_images(program, SCHEDULE, lambda x, t: x * (1 - scale) / float(SCHEDULE.sigma[999]), noise_for,
        indices, 3, on_batch=done.append)  # fmt: skip
    assert found.is_pinned()
    expected = torch.from_numpy(np.round(np.arange(23) / 100 * 127.5 + 127.5)).view(-1, 1, 1, 1)
    assert (found - expected).abs().max() <= 1
    assert done == [*range(3, 23, 3), 23]


def test_what_cannot_be_captured_is_said_and_called():
    class Waiting(Family):
        def forward(self, network, x, t, condition=None):
            return network(x, t) * float(t.sum() >= 0)

    said, x, t = [], torch.ones(3, 1, 8, 8, device=CUDA), torch.arange(3, device=CUDA)
    one = Call(Waiting(), Denoiser().to(CUDA).requires_grad_(False), "fp32")
    graphs = Graphs([one], said.append)
    expected = one(x, t)
    for _ in range(2):
        torch.testing.assert_close(graphs.ask(0, x, t), expected)
    (text,) = said
    assert "could not be captured" in text
    # and the device is as well as before
    other = Graphs([call(Denoiser().to(CUDA).requires_grad_(False))], pytest.fail)
    torch.testing.assert_close(other.ask(0, x, t), expected)


def test_frozen_weights_are_cast_and_trained_ones_are_not():
    x, t = torch.ones(3, 1, 8, 8, device=CUDA), torch.arange(3, device=CUDA)
    frozen, trained = Denoiser(4).to(CUDA).requires_grad_(False), Denoiser(4).to(CUDA)
    exact = call(trained)(x, t)
    for network, dtype in ((frozen, torch.bfloat16), (trained, torch.float32)):
        found = call(network, "bf16")(x, t)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert {p.dtype for p in network.parameters()} == {dtype}
        assert network.out.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, exact, rtol=0.05, atol=0.05)


def test_a_speed_reading_says_how_it_ran(toy_run, tmp_path):
    found = toy_run.session
    stage = next(s for s in found.plan.stages.values() if s.kind == "speed")
    stage = replace(stage, spec={**stage.spec, "compile": "off", "cuda_graphs": True})
    bench = Bench(found.store, "cuda:0", Events(), found.registry)
    make_speed(stage, bench, SimpleNamespace(dir=tmp_path, meta={}))
    said = json.loads((tmp_path / "speed.json").read_text())
    assert (said["compile"], said["cuda_graphs"], said["fallback"]) == ("off", True, None)
    assert said["peak_memory_mb"] > 0
    assert (len(said["readings"]["batch_seconds"]), len(said["readings"]["latency_seconds"])) == (7, 30)


def gradients(device):
    methods = {"output": OutputMatching(OutputOptions()), "relation": Relation(RelationOptions())}
    student, teacher = (copy.deepcopy(n).to(device) for n in (Denoiser(2, seed=1), Denoiser(4, seed=2).eval()))
    base = setting()
    here = replace(base, data=base.data.to(device), tables=Tables.of(SCHEDULE, torch.device(device)))
    objective = Distil(here, call(student), Methods(methods), Teacher(call(teacher), "epsilon"))
    loss, _ = learn(objective, 5, torch.arange(here.stream.batch))
    loss.backward()
    return torch.cat([p.grad.flatten().cpu() for p in student.parameters()])


def test_gradients_are_those_of_the_cpu():
    torch.backends.cudnn.allow_tf32 = False
    cpu, cuda = gradients("cpu"), gradients("cuda:0")
    assert float((cpu - cuda).norm() / cpu.norm()) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_whole_run_ends_in_finite_scores(tmp_path, precision):
    wrappers = ["single", {"o2mkd": {"students": 2}}]
    samplers = [{"ddim": {"steps": [2]}}, {"progressive": {"steps": [2], "start": 4}}]
    found = suite(device="cuda", precision=precision, store_dtype="fp16", wrappers=wrappers, samplers=samplers)
    results = run(found, tmp_path / "store", tmp_path / "out", Events())
    rows = results.document["rows"]
    assert len(rows) == 5
    assert {row["status"] for row in rows} == {"done"}, canonical([row["reason"] for row in rows])
    assert all(np.isfinite(row["scores"]["fd_digits"]) for row in rows)
    assert {row["speed"]["device"] for row in rows} == {torch.cuda.get_device_name()}
