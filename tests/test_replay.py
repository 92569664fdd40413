"""Passes that are replayed: which, from when on, and what is said where there can be none."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_networks import Denoiser, Family
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from o2mkd_bench.core.mode import Mode
from o2mkd_bench.engine.denoiser import Call
from o2mkd_bench.engine.graphs import Captured
from o2mkd_bench.engine.replay import Graphed, Replay, recorded


def inputs(size):
    return torch.ones(size, 1, 8, 8), torch.arange(size)


class Recorder:
    """Stands in for CUDA: what is recorded answers with the inputs' size, negative."""

    def __init__(self, error=None):
        self.sizes, self.trained, self.error = [], [], error

    def __call__(self, ask, trained, x, t):
        if self.error is not None:
            raise self.error
        self.sizes.append(len(x))
        self.trained.append(trained)
        return lambda x, t: (-torch.ones(len(x)), {})


def launched(x, t):
    return torch.ones(len(x)), {"a": x}


def test_a_size_is_recorded_when_it_comes_the_third_time():
    record = Recorder()
    replay = Replay(launched, None, pytest.fail, record)
    signs = [float(replay(*inputs(size))[0][0]) for size in (4, 2, 4, 4, 2, 4, 2)]
    assert signs == [1, 1, 1, -1, 1, -1, -1]
    assert record.sizes == [4, 2]
    assert replay.reason is None


def test_sizes_that_keep_changing_are_launched():
    record = Recorder()
    replay = Replay(launched, None, pytest.fail, record)
    for size in (1, 2, 3, 4, 5):
        for _ in range(3):
            value, _ = replay(*inputs(size))
    assert record.sizes == [1, 2, 3, 4]
    assert value.tolist() == [1] * 5


def test_what_cannot_be_recorded_is_said_once_and_launched():
    said = []
    replay = Replay(launched, None, said.append, Recorder(RuntimeError("waits for the device\nmore")))
    for _ in range(5):
        value, features = replay(*inputs(2))
    assert value.tolist() == [1, 1]
    assert list(features) == ["a"]
    (text,) = said
    assert replay.reason == "RuntimeError: waits for the device"
    assert text.endswith(f"({replay.reason})")


def test_running_out_of_memory_is_not_hidden():
    replay = Replay(launched, None, pytest.fail, Recorder(torch.OutOfMemoryError("no")))
    for _ in range(2):
        replay(*inputs(2))
    with pytest.raises(torch.OutOfMemoryError):
        replay(*inputs(2))


def test_only_a_device_replays():
    call = Call(Family(), Denoiser(), "fp32", Mode(cuda_graphs=True), pytest.fail, replay=True)
    assert not isinstance(call.tapped({}, "student"), Replay)


class Line:
    """Stands in for graphs of ``w * x`` and its twice: what is replayed computes from and to the same memory."""

    def __init__(self, constant=False):
        self.x, self.w = torch.zeros(2), torch.nn.Parameter(torch.tensor([2.0, 3.0]))
        once, twice, gradient = torch.zeros(2), torch.zeros(2), torch.zeros(2)
        given = [torch.full((2,), 9.0), None if constant else torch.full((2,), 9.0)]

        def there():
            once.copy_(self.w.detach() * self.x)
            twice.copy_(2 * once)

        def back():
            gradient.copy_(self.x * (given[0] if constant else given[0] + 2 * given[1]))

        forward, backward = Captured(there, (once, twice), None), Captured(back, (gradient, None), None)
        self.ask = Graphed(forward, backward, given, [self.w, torch.nn.Parameter(torch.zeros(1))])

    def __call__(self, *x):
        self.x.copy_(torch.tensor(x))
        return self.ask()


def test_a_graph_of_the_way_back_leaves_gradients_at_the_parameters():
    line = Line()
    for x in ((1.0, 2.0), (-3.0, 5.0)):
        once, twice = line(*x)
        assert once.tolist() == [2 * x[0], 3 * x[1]]
        (once.square().sum() + 4 * twice.sum()).backward()
        torch.testing.assert_close(line.w.grad, (2 * line.w.detach() * line.x + 8) * line.x)
        line.w.grad = None


def test_what_no_loss_asks_for_has_no_part_in_the_gradient():
    line = Line()
    for part, scale in ((0, 1), (1, 2)):
        line(1.0, 2.0)[part].sum().backward()
        assert line.w.grad.tolist() == [scale, 2 * scale]
        line.w.grad = None


@pytest.mark.parametrize("order", [1, -1])
def test_gradients_of_a_graph_are_added_to_others(order):
    line = Line()
    for _ in range(2):
        terms = [line(1.0, 2.0)[0].sum(), (5 * line.w).sum()][::order]
        sum(terms).backward()
        assert line.w.grad.tolist() == [6, 7]
        line.w.grad = None


def test_what_is_not_trained_stays_a_constant():
    once, twice = Line(constant=True)(1.0, 2.0)
    assert once.requires_grad
    assert not twice.requires_grad


def test_where_nobody_wants_gradients_there_are_none():
    with torch.no_grad():
        once, _ = Line()(1.0, 2.0)
    assert not once.requires_grad


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on the CPU: the operations seen are done again from and to the same memory."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        self.seen.append((operation, args, kwargs or {}, found))
        return found

    def replay(self):
        for operation, args, kwargs, first in self.seen:
            again = operation(*args, **kwargs)
            for place, value in zip(tree_leaves(first), tree_leaves(again), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


def recording(run, pool, _):
    with Recording() as graph:
        output = run()
    return Captured(torch.no_grad()(graph.replay), output, pool)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Graphs without CUDA."""
    monkeypatch.setattr("o2mkd_bench.engine.replay.capture", recording)
    monkeypatch.setattr("o2mkd_bench.engine.replay.record", recording)
    monkeypatch.setattr("o2mkd_bench.engine.replay.warmed_up", lambda run: run())
    monkeypatch.setattr("o2mkd_bench.engine.replay._Pool.of", lambda *_: SimpleNamespace(handle=None))
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("paths", [{}, {"mid": "mid"}])
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_recorded_gives_the_same_values_and_gradients(paths, trained):
    networks = [Denoiser(4).requires_grad_(trained) for _ in range(2)]
    plain, fast = (Call(Family(), network, "fp32").tapped(paths, "student") for network in networks)
    fast = Replay(fast, networks[1] if trained else None, pytest.fail)
    for step in range(6):
        torch.manual_seed(step)
        x, t = torch.randn(5, 1, 8, 8), torch.randint(1000, (5,))
        torch.testing.assert_close(
            *(pass_and_step(n, ask, x, t) for n, ask in zip(networks, (plain, fast), strict=True))
        )
    assert len(fast._known) == 1


class Turned(torch.nn.Module):
    """Its gradient lies in memory row by row, its weight does not."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.eye(8).t())

    def forward(self, x, t):
        return x * self.weight


@pytest.mark.usefixtures("on_the_cpu")
def test_gradients_lie_in_memory_as_parameters_do():
    network = Turned()
    ask = recorded(Call(Family(), network, "fp32").tapped({}, "student"), network, *inputs(3))
    ask(*inputs(3))[0].sum().backward()
    assert network.weight.grad.stride() == network.weight.stride() == (1, 8)
    assert torch.equal(network.weight.grad, torch.full((8, 8), 3.0))


def pass_and_step(network, ask, x, t):
    """What a pass gives and, of a network in training, the gradients, after which it makes a step."""
    value, features = ask(x, t)
    values = [value, *features.values()]
    if any(p.requires_grad for p in network.parameters()):
        torch.stack([v.square().mean() for v in values]).sum().backward()
        values += [p.grad for p in network.parameters()]
        for p in network.parameters():
            p.data.sub_(0.1 * p.grad)
        network.zero_grad(set_to_none=True)
    return [v.detach().clone() for v in values]


CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("paths", [{}, {"mid": "mid"}])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("size", [pytest.param((6, 3), marks=CUDA), pytest.param((8, 5), marks=CUDA)])
def test_on_a_device_values_and_gradients_are_the_same(paths, trained, size):
    device = torch.device("cuda:0")
    torch.backends.cudnn.allow_tf32 = False
    networks = [Denoiser(4).to(device).requires_grad_(trained) for _ in range(2)]
    plain = Call(Family(), networks[0], "fp32").tapped(paths, "student")
    call = Call(Family(), networks[1], "fp32", Mode(cuda_graphs=True), pytest.fail, replay=True)
    fast = call.tapped(paths, "student")
    assert isinstance(fast, Replay)
    for step in range(12):
        torch.manual_seed(step)
        n = size[step % 2]
        x, t = torch.randn(n, 1, 8, 8, device=device), torch.randint(1000, (n,), device=device)
        found = [pass_and_step(n, ask, x, t) for n, ask in zip(networks, (plain, fast), strict=True)]
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert len(fast._known) == 2
