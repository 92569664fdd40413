"""The loop: which samples, what is noted, what is said, and what a kill cannot change."""

import math

import pytest
import torch
from torch import nn

from o2mkd_bench.core.blocks import Training
from o2mkd_bench.core.errors import Diverged, StageFailed
from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.engine.learner import Course, Learner
from o2mkd_bench.engine.loop import LOGS, Objective, Watch, train
from o2mkd_bench.engine.stream import Stream

ALL = Interval(0, 1000)
LOW = Interval(0, 40)
STREAM = Stream(0, Law.uniform(ALL), 8, 100, False, 4)


class Pull(Objective):
    """The weights follow t, through dropout; ``seen`` is what it was asked for."""

    def __init__(self, network, bad_at=None, value=math.nan):
        self.network, self.bad_at, self.value, self.seen = network, bad_at, value, []

    def loss(self, batch, rows, step):
        self.seen.append((step, batch.t[rows].tolist()))
        out = self.network(batch.t[rows].float().view(-1, 1) / 1000)
        value = (out - 1).square().mean()
        if step == self.bad_at:
            value = value * self.value
        return value, {"part": value / 2}


def make(steps=12, offset=0, **training):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    settings = Training(**{"lr": 0.01, **training}).model_dump()
    return Learner(network, settings, Course(steps, offset, offset + steps)), Pull(network)


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.network.parameters()])


def test_an_expert_is_asked_for_its_own_samples_only_and_from_where_it_starts():
    learner, pull = make(offset=5)
    log = train(learner, pull, STREAM, LOW, Watch())
    expected = []
    for step in range(5, 17):
        t = STREAM.batch_at(step).t
        inside = t[t < 40].tolist()
        expected += [(step, inside)] if inside else []
    assert pull.seen == expected
    assert 0 < len(expected) < 12, "some steps have no sample here"
    assert log.images == sum(len(t) for _, t in expected)
    assert learner.position == 12


def test_the_curve_holds_the_steps_it_names():
    learner, pull = make()
    log = train(learner, pull, STREAM, ALL, Watch())
    assert [entry["step"] for entry in log.curve] == list(range(12))
    assert all(entry["part"] == entry["loss"] / 2 for entry in log.curve)
    few, objective = make(steps=3 * LOGS)
    assert len(train(few, objective, STREAM, LOW, Watch()).curve) <= LOGS + 1


def test_dropout_depends_on_seed_and_step_alone():
    results = []
    for disturb in (1, 2):
        learner, pull = make()
        torch.manual_seed(disturb)
        before = torch.random.get_rng_state()
        train(learner, pull, STREAM, ALL, Watch())
        assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator is left alone"
        results.append(weights(learner))
    assert torch.equal(*results)


class Stop(Exception):
    pass


@pytest.mark.parametrize("interval", [ALL, LOW], ids=["all", "expert"])
@pytest.mark.parametrize("stop", [1, 4, 11])
def test_a_run_killed_anywhere_ends_as_one_that_was_not(tmp_path, interval, stop):
    whole, objective = make()
    log = train(whole, objective, STREAM, interval, Watch())

    said, reached = [], []
    watch = Watch(say=said.append, checkpoint=tmp_path / "c.safetensors", every=0.0)

    def until(done, total, images, loss):
        reached.append(done)
        if done == stop:
            raise Stop

    watch.progress = until
    first, objective = make()
    with pytest.raises(Stop):
        train(first, objective, STREAM, interval, watch)
    watch.progress = lambda done, *_: reached.append(done)
    second, objective = make()
    resumed = train(second, objective, STREAM, interval, watch)
    assert reached == [*range(1, stop + 1), *range(stop, 13)]
    assert said == ([f"going on at step {stop - 1} of 12"] if stop > 1 else [])
    assert resumed.data() == log.data()
    assert torch.equal(weights(whole), weights(second))
    for name, value in whole.ema.module.state_dict().items():
        assert torch.equal(value, second.ema.module.state_dict()[name])


def test_checkpoints_are_written_when_due_and_seconds_add_up(tmp_path):
    now = iter(range(1000))
    learner, pull = make(steps=4)
    watch = Watch(checkpoint=tmp_path / "c.safetensors", every=2.0, clock=lambda: float(next(now)))
    first = train(learner, pull, STREAM, ALL, watch)
    again, pull = make(steps=4)
    second = train(again, pull, STREAM, ALL, watch)
    assert len(pull.seen) < 4, "the last checkpoint is gone on from"
    assert second.seconds > 0
    assert second.data() == first.data()


def test_an_unreadable_checkpoint_is_said_and_passed_over(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"not a state")
    said = []
    learner, pull = make()
    train(learner, pull, STREAM, ALL, Watch(say=said.append, checkpoint=tmp_path / "c.safetensors"))
    assert len(said) == 1
    assert "cannot be read" in said[0]
    whole, objective = make()
    train(whole, objective, STREAM, ALL, Watch())
    assert torch.equal(weights(whole), weights(learner))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_stage(value):
    learner, _ = make()
    with pytest.raises(Diverged, match=r"the loss is (nan|inf) at step 3; lower the learning rate") as caught:
        train(learner, Pull(learner.network, 3, value), STREAM, ALL, Watch())
    assert isinstance(caught.value, StageFailed)


def test_weights_that_are_not_finite_are_not_stored():
    learner, _ = make(steps=2 * LOGS, clip=None)
    # a step whose loss is not looked at, and after which no sample falls to this expert's interval any more
    last = next(s for s in range(2 * LOGS - 2, 0, -1) if s % 2 and (STREAM.batch_at(s).t < 5).any())
    learner.course = Course(last + 2, 0, 2 * LOGS)
    learner.skip()
    with pytest.raises(Diverged):
        train(learner, Pull(learner.network, last), STREAM, Interval(0, 5), Watch())


def test_an_objective_has_no_adapters_unless_it_says_so():
    assert Pull(nn.Linear(1, 1)).adapters() is None
