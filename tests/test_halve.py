"""Progressive distillation: the target against two DDIM steps written out in float64."""

import numpy as np
import pytest
import torch
from tiny_networks import SCHEDULE, TABLES, call, learn, setting, wide
from torch import nn

from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.core.intervals import Interval
from o2mkd_bench.engine.denoiser import Experts
from o2mkd_bench.engine.halve import Halve

FINE = time_grid("trailing", 8)
GRID = FINE[::2]
ALPHA, SIGMA = SCHEDULE.alpha, SCHEDULE.sigma


class Bend(nn.Module):
    """A denoiser that is no straight line, in numpy too."""

    def __init__(self, gain):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x, t):
        return torch.tanh(self.gain * x + t.view(-1, 1, 1, 1) / 1000)

    def numpy(self, x, t):
        return np.tanh(self.gain.item() * x + t / 1000)


class Table(nn.Module):
    """``x`` times a number for each t."""

    def __init__(self, factors):
        super().__init__()
        self.register_buffer("factors", torch.zeros(1000))
        for t, factor in factors.items():
            self.factors[t] = factor

    def forward(self, x, t):
        return wide(self.factors[t]) * x


def predict(network, prediction, x, t, clip):
    """x0 and epsilon at one t, float64."""
    raw = network.numpy(x, t)
    epsilon = raw if prediction == "epsilon" else SIGMA[t] * x + ALPHA[t] * raw
    x0 = (x - SIGMA[t] * epsilon) / ALPHA[t]
    if clip != "none":
        x0 = np.clip(x0, -1, 1)
    if clip == "x0+epsilon":
        epsilon = (x - ALPHA[t] * x0) / SIGMA[t]
    return x0, epsilon


def two_steps(networks, edges, predictions, x, t, clip):
    """The x0 that takes ``x`` in one DDIM step to where two of the networks' steps take it."""
    place = FINE.index(t)
    levels = [(ALPHA[i], SIGMA[i]) for i in FINE] + [(1.0, 0.0)]
    z = x
    for k in (place, place + 1):
        owner = int(np.searchsorted(edges, FINE[k], side="right"))
        x0, epsilon = predict(networks[owner], predictions[owner], z, FINE[k], clip)
        z = levels[k + 1][0] * x0 + levels[k + 1][1] * epsilon
    alpha, sigma = levels[place + 2]
    return (z - sigma / SIGMA[t] * x) / (alpha - sigma / SIGMA[t] * ALPHA[t])


def on_grid(s, step, rows):
    """x_t and t of a batch whose t counts entries of the grid."""
    batch = s.stream.batch_at(step)
    t = torch.tensor(sorted(GRID))[batch.t[rows]]
    x0, noise = s.stream.images(batch, s.data)[rows], s.stream.noise(batch, s.data.shape[1:])[rows]
    alpha, sigma = (wide(torch.from_numpy(v)[t]) for v in (ALPHA, SIGMA))
    return (alpha * x0.double() + sigma * noise.double()).numpy(), t.tolist()


def expected_loss(student, prediction, targets, x, times):
    total = 0.0
    for x_i, t, target in zip(x, times, targets, strict=True):
        found, _ = predict(student, prediction, x_i, t, "none")
        total += max(1.0, (ALPHA[t] / SIGMA[t]) ** 2) * np.square(found - target).mean()
    return total / len(times)


@pytest.mark.parametrize("clip", ["none", "x0", "x0+epsilon"])
@pytest.mark.parametrize("predictions", [("epsilon", "epsilon"), ("v_prediction", "v_prediction")])
def test_loss_is_that_of_two_steps_written_out(clip, predictions):
    # 700 lies between the two fine steps of a coarse one: the step crosses into the neighbour's interval
    edges, networks = [700], [Bend(0.3), Bend(0.8)]
    student = Bend(0.5)
    s = setting(batch=8, entries=4, prediction="v_prediction")
    before = Experts([call(n) for n in networks], edges, predictions, TABLES)
    objective = Halve(s, call(student), before, GRID, FINE, clip)
    rows = torch.tensor([0, 1, 2, 4, 5, 7])
    loss, terms = learn(objective, 2, rows, objective.source())
    x, times = on_grid(s, 2, rows)
    assert min(times) == min(GRID), "the last step, to sigma 0, is among them"
    assert {(a < 700) != (b < 700) for a, b in zip(FINE[::2], FINE[1::2], strict=True)} == {True, False}
    targets = [two_steps(networks, edges, predictions, x_i, t, clip) for x_i, t in zip(x, times, strict=True)]
    expected = expected_loss(student, "v_prediction", targets, x, times)
    assert loss.item() == pytest.approx(expected, rel=2e-4)
    assert torch.equal(terms["x0"], loss)
    loss.backward()
    assert student.gain.grad is not None
    assert all(n.gain.grad is None for n in networks), "the round before is not trained"


@pytest.mark.parametrize("clip", ["none", "x0"])
def test_convert_learns_the_round_before_in_another_type(clip):
    teacher, student = Bend(0.3), Bend(0.5)
    s = setting(batch=8, entries=4, prediction="v_prediction")
    objective = Halve(s, call(student), Experts([call(teacher)], [], ["epsilon"], TABLES), GRID, (), clip)
    rows = torch.arange(8)
    x, times = on_grid(s, 0, rows)
    targets = [predict(teacher, "epsilon", x_i, t, clip)[0] for x_i, t in zip(x, times, strict=True)]
    loss, _ = learn(objective, 0, rows, objective.source())
    assert loss.item() == pytest.approx(expected_loss(student, "v_prediction", targets, x, times), rel=2e-4)


def gaussian(spread):
    """Epsilon over x of the exact denoiser of N(0, spread^2), by t."""
    return {t: SIGMA[t] / (ALPHA[t] ** 2 * spread**2 + SIGMA[t] ** 2) for t in range(1000)}


def test_the_exact_halved_student_of_a_gaussian_has_no_loss():
    teacher = gaussian(0.5)
    levels = [(ALPHA[i], SIGMA[i]) for i in FINE] + [(1.0, 0.0)]
    factors = {}
    for place in range(0, 8, 2):
        t, scale = FINE[place], 1.0
        for k in (place, place + 1):
            c = teacher[FINE[k]]
            x0 = (1 - SIGMA[FINE[k]] * c) / ALPHA[FINE[k]]
            scale *= levels[k + 1][0] * x0 + levels[k + 1][1] * c
        alpha, sigma = levels[place + 2]
        x0 = (scale - sigma / SIGMA[t]) / (alpha - sigma / SIGMA[t] * ALPHA[t])
        factors[t] = (1 - ALPHA[t] * x0) / SIGMA[t]
    losses = {}
    for name, student in (("halved", factors), ("teacher", teacher)):
        s = setting(batch=8, entries=4)
        before = Experts([call(Table(teacher))], [], ["epsilon"], TABLES)
        objective = Halve(s, call(Table(student)), before, GRID, FINE, "none")
        losses[name] = float(learn(objective, 0, torch.arange(8), objective.source())[0])
    assert losses["halved"] < 1e-6
    assert losses["teacher"] > 1e-3, "two steps of a Gaussian's denoiser are not one"


def test_a_teacher_whose_paths_are_straight_is_its_own_student():
    point = {t: 1 / SIGMA[t] for t in range(1000)}
    s = setting(batch=8, entries=4)
    before = Experts([call(Table(point))], [], ["epsilon"], TABLES)
    objective = Halve(s, call(Table(point)), before, GRID, FINE, "x0")
    assert float(learn(objective, 0, torch.arange(8), objective.source())[0]) < 1e-6


def test_an_expert_learns_its_own_entries_only():
    s = setting(batch=8, entries=4, interval=Interval(1, 3))
    seen = []
    student = Bend(0.5)
    student.register_forward_hook(lambda module, inputs, out: seen.extend(inputs[1].tolist()))
    objective = Halve(s, call(student), Experts([call(Bend(0.3))], [], ["epsilon"], TABLES), GRID, FINE, "x0")
    batch = s.stream.batch_at(0)
    learn(objective, 0, s.stream.rows_in(batch, s.interval), objective.source())
    assert set(seen) == set(sorted(GRID)[1:3])


def test_a_round_that_does_not_halve_is_refused():
    s = setting(batch=8, entries=4)
    with pytest.raises(PluginError, match="not every second entry"):
        Halve(s, call(Bend(0.5)), Experts([call(Bend(0.3))], [], ["epsilon"], TABLES), FINE[1::2], FINE, "x0")
