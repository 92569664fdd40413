"""One compilation an architecture, one graph an expert; and what happens where there can be none."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_networks import Denoiser, Family
from torch import nn
from toy import Events

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.mode import PLAIN, Mode
from o2mkd_bench.engine import compiled
from o2mkd_bench.engine.denoiser import Call
from o2mkd_bench.engine.graphs import Captured, Graphs
from o2mkd_bench.engine.router import Router
from o2mkd_bench.stages.bench import Bench
from o2mkd_bench.stages.samples import draw
from o2mkd_bench.stages.speed import as_run, measured
from o2mkd_bench.testing.tiny import config, family

ON = Mode(compile="on")
PATHS = {"mid": "mid_block", "first": "down_blocks.0"}


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs torch.compile has made, by a backend that runs them as they are."""
    made = []

    def backend(graph, inputs, **_):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    return made


def refuse(monkeypatch, error):
    def backend(graph, inputs, **_):
        raise error

    monkeypatch.setattr(compiled, "BACKEND", backend)


def unet(seed, width=1.0):
    torch.manual_seed(seed)
    return family().build(config(width))


def batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) * 7


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class TestCompiled:
    def test_networks_of_an_architecture_share_a_graph(self, graphs):
        x, t = batch(3)
        for seed in range(3):
            network = unet(seed).eval().requires_grad_(False)
            # a family of its own for each, as stages have
            close(Call(family(), network, "fp32", ON)(x, t), Call(family(), network, "fp32")(x, t))
        assert len(graphs) == 1
        Call(family(), unet(0, width=0.5).eval().requires_grad_(False), "fp32", ON)(x, t)
        assert len(graphs) == 2

    def test_features_and_gradients(self, graphs):
        x, t = batch(3)
        for seed in range(2):
            plain, fast = (Call(family(), unet(seed), "fp32", mode) for mode in (PLAIN, ON))
            found = []
            for call in (plain, fast):
                value, features = call.tapped(PATHS, "student")(x, t)
                assert list(features) == list(PATHS)
                (value.square().mean() + sum(feature.square().mean() for feature in features.values())).backward()
                found.append((value, features, [p.grad for p in call.network.parameters()]))
                assert not any(module._forward_hooks for module in call.network.modules())
            close(*(list(one[1].values()) for one in found))
            close(found[1][0], found[0][0])
            close(found[1][2], found[0][2])
        assert len(graphs) == 1

    def test_a_call_with_hooks_and_one_without_do_not_mix(self, graphs):
        x, t = batch(2)
        call = Call(Family(), Denoiser().eval(), "fp32", ON)
        one, other = call.tapped({"a": "mid"}, "student"), call.tapped({"b": "out"}, "student")
        for _ in range(2):
            expected = call.eager(x, t)
            assert set(one(x, t)[1]) == {"a"}
            assert set(other(x, t)[1]) == {"b"}
            close(call(x, t), expected)
        assert len(graphs) == 3

    def test_no_features_are_the_call_itself(self, graphs):
        x, t = batch(2)
        call = Call(Family(), Denoiser().eval(), "fp32", ON)
        value, features = call.tapped({}, "teacher")(x, t)
        assert features == {}
        assert torch.equal(value, call(x, t))
        assert len(graphs) == 1

    def test_many_ways_to_call_stay_compiled(self, graphs):
        x, t = batch(2)
        network = Denoiser()
        for precision in ("fp32", "bf16", "fp16"):
            for gradient in (True, False):
                for training in (True, False):
                    network.train(training)
                    call = Call(Family(), network, precision, ON)
                    with torch.set_grad_enabled(gradient):
                        before = len(graphs)
                        call(x, t)
                        after = len(graphs)
                        call(x, t)
                    assert len(graphs) == after <= before + 1
        assert len(graphs) > 4
        from torch._dynamo import config as dynamo

        assert dynamo.recompile_limit >= 64
        assert dynamo.accumulated_recompile_limit >= 4096

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize(("trained", "count"), [(True, 1), (False, 2)])
    def test_batch_sizes_of_training_share_a_graph(self, graphs, trained, count):
        # a frozen network's first size, often the only one, has a graph of its own
        call = Call(Family(), Denoiser().eval().requires_grad_(trained), "fp32", ON)
        for size in (3, 4, 5, 9):
            x, t = batch(size)
            close(call(x, t), call.eager(x, t))
        assert len(graphs) == count

    @pytest.mark.parametrize("trained", [True, False])
    def test_a_slice_is_no_other_graph(self, graphs, trained):
        # experts see parts of a batch, and a run that goes on begins in the middle of the stream
        call = Call(Family(), Denoiser().eval().requires_grad_(trained), "fp32", ON)
        x, t = batch(12)
        for start in (4, 0, 8):
            close(call(x[start : start + 4], t[start : start + 4]), call.eager(x, t)[start : start + 4])
        assert len(graphs) == 1

    def test_a_captured_batch_size_has_a_graph_of_its_own(self, graphs):
        call = Call(Family(), Denoiser().eval().requires_grad_(False), "fp32", ON)
        router = Graphs([call], pytest.fail, None)
        for count, size in enumerate((3, 4, 5, 9), 1):
            router.fit(size)
            x, t = batch(size)
            close(router.ask(0, x, t), call.eager(x, t))
            assert len(graphs) == count

    def test_a_compiler_that_fails_is_said_once_and_the_numbers_are_right(self, monkeypatch):
        refuse(monkeypatch, ValueError("no compiler\nin this house"))
        said = []
        x, t = batch(2)
        calls = [Call(Family(), Denoiser(seed=seed), "fp32", ON, said.append) for seed in range(2)]
        for call in calls:
            assert torch.equal(call(x, t), call.eager(x, t))
            assert torch.equal(call(x, t), call.eager(x, t))
            assert call.fallback == "ValueError: no compiler"
        assert said == ["Denoiser could not be compiled and runs uncompiled (ValueError: no compiler)"]

    def test_by_default_a_warning_says_it(self, monkeypatch):
        refuse(monkeypatch, ValueError())
        x, t = batch(2)
        with pytest.warns(UserWarning, match=r"runs uncompiled \(ValueError\)"):
            Call(Family(), Denoiser(), "fp32", ON)(x, t)

    def test_a_compiler_without_memory_is_no_fallback(self, monkeypatch):
        refuse(monkeypatch, torch.OutOfMemoryError("while tuning"))
        call = Call(Family(), Denoiser(), "fp32", ON, pytest.fail)
        with pytest.raises(torch.OutOfMemoryError, match="while tuning"):
            call(*batch(2))
        assert call.fallback is None

    def test_the_networks_own_mistakes_are_no_fallback(self, graphs):
        class Broken(Family):
            def forward(self, network, x, t, condition=None):
                raise KeyError("broken")

        said = []
        call = Call(Broken(), Denoiser(), "fp32", ON, said.append)
        with pytest.raises(KeyError, match="broken"):
            call(*batch(2))
        assert (said, call.fallback) == ([], None)

    def test_a_layer_that_does_not_run_is_the_users_mistake(self, graphs):
        network = Denoiser()
        network.spare = nn.Identity()
        said = []
        ask = Call(Family(), network, "fp32", ON, said.append).tapped({"x": "spare"}, "student")
        with pytest.raises(UserError, match="took no part"):
            ask(*batch(2))
        assert said == []

    def test_the_real_compiler(self):
        x, t = batch(2)
        call = Call(Family(), Denoiser(), "fp32", ON)
        close(call(x, t), call.eager(x, t))
        assert call.fallback is None

    def test_off_is_the_network_and_nothing_else(self):
        x, t = batch(2)
        call = Call(family(), unet(0).eval(), "bf16")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = call.network(x, t).sample
        assert torch.equal(call(x, t), expected.float())
        assert call.fallback is None


class Recorder:
    """A capture without CUDA, that notes what was asked of it."""

    def __init__(self, error=None):
        self.pools = []
        self.replays = 0
        self.error = error

    def __call__(self, run, pool, device):
        if self.error is not None:
            raise self.error
        self.pools.append(pool)
        output = run().clone()

        def replay():
            self.replays += 1
            output.copy_(run())

        return Captured(replay, output, pool or object())


class TestGraphs:
    def make(self, capture, count=2):
        said, sizes = [], []

        def call(factor):
            def ask(x, t):
                sizes.append(len(x))
                return factor * x + t.view(-1, 1, 1, 1)

            return ask

        return Graphs([call(k + 2.0) for k in range(count)], said.append, capture), said, sizes

    def test_each_call_is_captured_once_in_one_pool(self):
        capture = Recorder()
        graphs, said, sizes = self.make(capture)
        graphs.fit(4)
        x, t = batch(4)
        kept = [graphs.ask(k, x, t) for k in (0, 1, 0, 1)]
        for k, value in zip((0, 1, 0, 1), kept, strict=True):
            assert torch.equal(value, (k + 2) * x + t.view(-1, 1, 1, 1)), "an answer outlives what comes after it"
        assert capture.pools[0] is None
        assert len(capture.pools) == 2
        assert capture.pools[1] is not None
        assert capture.replays == 4
        assert (said, graphs.reason) == ([], None)
        assert set(sizes) == {4}

    @pytest.mark.parametrize("capture", [Recorder(), None])
    def test_fewer_images_are_padded_and_more_refused(self, capture):
        graphs, _, sizes = self.make(capture)
        for size in (5, 2, 5, 1):
            x, t = batch(size, seed=size)
            assert torch.equal(graphs.ask(0, x, t), 2 * x + t.view(-1, 1, 1, 1))
        with pytest.raises(ValueError, match="6 images do not fit a batch of 5"):
            graphs.ask(0, *batch(6))
        assert set(sizes) == {5}

    def test_another_size_is_captured_anew(self):
        capture = Recorder()
        graphs, _, sizes = self.make(capture)
        for size in (4, 4, 2, 2):
            graphs.fit(size)
            assert len(graphs.ask(0, *batch(size))) == size
        assert capture.pools == [None, None]
        assert set(sizes) == {4, 2}

    def test_what_cannot_be_captured_is_called_and_said_once(self):
        graphs, said, _ = self.make(Recorder(RuntimeError("waits for the device\nsee elsewhere")))
        x, t = batch(3)
        for k in (0, 1, 0):
            assert torch.equal(graphs.ask(k, x, t), (k + 2) * x + t.view(-1, 1, 1, 1))
        assert graphs.reason == "RuntimeError: waits for the device"
        assert said == [
            "a CUDA graph could not be captured; every call is launched instead (RuntimeError: waits for the device)"
        ]

    def test_a_full_memory_is_no_fallback(self):
        graphs, said, _ = self.make(Recorder(torch.OutOfMemoryError()))
        with pytest.raises(torch.OutOfMemoryError):
            graphs.ask(0, *batch(3))
        assert (said, graphs.reason) == ([], None)

    def test_a_router_sends_each_t_to_its_graph(self):
        calls = [Call(Family(), Denoiser(seed=seed), "fp32") for seed in range(2)]
        capture = Recorder()
        router = Router(calls, (500,), Graphs(calls, pytest.fail, capture))
        router.fit(4)
        for size, t in ((4, 100), (3, 900), (2, 499), (4, 500)):
            x, _ = batch(size)
            expected = calls[t >= 500](x, torch.full((size,), t))
            close(router(x, t), expected)
        assert len(capture.pools) == 2


class TestStages:
    def bench(self, toy_run, mode, events):
        return Bench(toy_run.session.store, "cpu", events, toy_run.session.registry, mode)

    def stage(self, toy_run, kind):
        return next(s for s in toy_run.session.plan.stages.values() if s.kind == kind)

    def test_compiled_images_are_the_plain_ones(self, toy_run, graphs):
        stage = self.stage(toy_run, "samples")
        images = []
        for mode, size in ((PLAIN, 5), (ON, 3), (ON, "auto")):
            events = Events()
            one = replace(stage, local={"batch": size})
            images.append(draw(self.bench(toy_run, mode, events), one.spec, one.needs["students"], range(5), one))
            assert events.texts() == []
        assert all((found.int() - images[0].int()).abs().max() <= 1 for found in images[1:])
        # five of a batch of three, and five at once: padded, so no third size
        assert len(graphs) == 2

    def test_a_full_memory_is_said(self, toy_run, graphs, monkeypatch):
        stage = replace(self.stage(toy_run, "samples"), local={"batch": 4})
        events = Events()
        ask = Graphs.ask

        def tight(self, k, x, t):
            if len(x) > 1:
                raise torch.OutOfMemoryError
            return ask(self, k, x, t)

        monkeypatch.setattr(Graphs, "ask", tight)
        found = draw(self.bench(toy_run, ON, events), stage.spec, stage.needs["students"], range(4), stage)
        assert len(found) == 4
        begin = f"{stage.label}: out of memory; going on with "
        assert events.texts() == [f"{begin}2 images at a time", f"{begin}1 image at a time"]
        assert [event.data["done"] for event in events if event.kind == "progress"] == [1, 2, 3, 4]

    def test_a_compiler_that_fails_is_said_of_its_stage(self, toy_run, monkeypatch):
        refuse(monkeypatch, ValueError("no compiler"))
        stage = self.stage(toy_run, "samples")
        events = Events()
        draw(self.bench(toy_run, ON, events), stage.spec, stage.needs["students"], range(2), stage)
        (text,) = events.texts()
        assert text.startswith(f"{stage.label}: UNet2DModel could not be compiled")

    def test_experts_say_it_of_none(self, toy_run, monkeypatch):
        refuse(monkeypatch, ValueError("no compiler"))
        events = Events()
        stage = self.stage(toy_run, "student")
        bench = self.bench(toy_run, ON, events)
        experts = bench.experts([stage.identity], [], "ema", "fp32")
        plain = bench.experts([stage.identity], [], "ema", "fp32", PLAIN)
        x, t = batch(2)
        assert torch.equal(experts.predict(x, t, "epsilon"), plain.predict(x, t, "epsilon"))
        (text,) = events.texts()
        assert text.startswith("UNet2DModel could not be compiled")

    @pytest.mark.parametrize(
        ("reasons", "graph", "expected"),
        [
            ([None, None], None, ("max", True, None)),
            (["A: b", "A: b"], None, ("off", True, "A: b")),
            ([None, "A: b"], "C: d", ("off", False, "A: b; C: d")),
        ],
    )
    def test_a_reading_says_how_it_ran(self, reasons, graph, expected):
        calls = [SimpleNamespace(fallback=reason) for reason in reasons]
        router = SimpleNamespace(calls=calls, graphs=SimpleNamespace(reason=graph))
        found = as_run(router, Mode("max", True))
        assert (found["compile"], found["cuda_graphs"], found["fallback"]) == expected

    def test_a_plain_reading_has_nothing_to_say(self):
        router = SimpleNamespace(calls=[SimpleNamespace(fallback=None)], graphs=None)
        assert as_run(router, PLAIN) == {"compile": "off", "cuda_graphs": False, "fallback": None}

    def test_on_the_cpu_no_memory_is_read(self):
        calls = []
        found, memory = measured(lambda: calls.append(1), 2, "cpu")
        assert (len(found), len(calls), memory) == (2, 3, None)


class TestFamily:
    def test_checkpointed_activations_give_the_same_gradients(self):
        x, t = batch(2)
        gradients = []
        for checkpointed in (False, True):
            network = unet(0)
            if checkpointed:
                family().checkpoint_activations(network)
            assert network.is_gradient_checkpointing is checkpointed
            family().forward(network, x, t).square().mean().backward()
            gradients.append([p.grad for p in network.parameters()])
        close(*gradients)

    def test_a_family_that_cannot_says_so(self):
        with pytest.raises(UserError, match="checkpoint_activations: networks of class Identity cannot; leave"):
            super(type(family()), family()).checkpoint_activations(nn.Identity())

    def test_by_default_nothing_is_to_be_optimised(self):
        network = nn.Identity()
        assert super(type(family()), family()).optimise(network) is network
