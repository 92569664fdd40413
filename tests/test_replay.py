"""Passes that are replayed: which, from when on, and what is said where there can be none."""

import pytest
import torch
from tiny_networks import Denoiser, Family

from o2mkd_bench.core.mode import Mode
from o2mkd_bench.engine.denoiser import Call
from o2mkd_bench.engine.replay import Replay


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
        found = []
        for network, ask in zip(networks, (plain, fast), strict=True):
            value, features = ask(x, t)
            values = [value, *features.values()]
            if trained:
                torch.stack([v.square().mean() for v in values]).sum().backward()
                values += [p.grad for p in network.parameters()]
                for p in network.parameters():
                    p.data.sub_(0.1 * p.grad)
                network.zero_grad(set_to_none=True)
            found.append([v.detach().clone() for v in values])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert len(fast._known) == 2
