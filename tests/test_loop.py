"""The loop: which samples, what is noted, what is said, and what a kill cannot change."""

import math
from pathlib import Path

import pytest
import torch
from tiny_networks import TABLES
from torch import nn

from o2mkd_bench.core import disk
from o2mkd_bench.core.blocks import Training
from o2mkd_bench.core.errors import Diverged, SharedChanged, StageFailed
from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.engine.learner import Course, Learner
from o2mkd_bench.engine.ledger import Ledger
from o2mkd_bench.engine.loop import LOGS, Log, Member, Watch, parts, train, train_together
from o2mkd_bench.engine.shared import Objective, Source
from o2mkd_bench.engine.stream import Stream

ALL = Interval(0, 1000)
LOW = Interval(0, 40)
STREAM = Stream(0, Law.uniform(ALL), 8, 100, False, 4)
SOURCE = Source(STREAM, torch.zeros(100, 1, 2, 2, dtype=torch.uint8), TABLES)


class Pull(Objective):
    """The weights follow t, through dropout; ``seen`` is what it was asked for."""

    def __init__(self, network, bad_at=None, value=math.nan):
        self.network, self.bad_at, self.value, self.seen = network, bad_at, value, []

    def loss(self, view, rows, step, part=0):
        t = view.take(rows).t
        self.seen.append((step, t.tolist()))
        out = self.network(t.float().view(-1, 1) / 1000)
        value = (out - 1).square().mean()
        if step == self.bad_at:
            value = value * self.value
        return value, {"part": value / 2, "whole": value.detach().new_ones(())}


def make(steps=12, offset=0, **training):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    settings = Training(**{"lr": 0.01, **training}).model_dump()
    return Learner(network, settings, Course(steps, offset, offset + steps)), Pull(network)


def weights(learner):
    return torch.cat([p.detach().flatten() for p in learner.network.parameters()])


def test_an_expert_is_asked_for_its_own_samples_only_and_from_where_it_starts():
    learner, pull = make(offset=5)
    log = train(SOURCE, Member(learner, pull, LOW))
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
    log = train(SOURCE, Member(learner, pull, ALL))
    assert [entry["step"] for entry in log.curve] == list(range(12))
    assert all(entry["part"] == entry["loss"] / 2 for entry in log.curve)
    few, objective = make(steps=3 * LOGS)
    assert len(train(SOURCE, Member(few, objective, LOW)).curve) <= LOGS + 1


@pytest.mark.parametrize(("steps", "apart"), [(12, 1), (120, 2), (1600, 16), (3200, 16), (100_000, 500)])
def test_losses_of_short_trainings_are_not_looked_at_all_the_time(steps, apart):
    member = Member(*make(steps=steps), LOW)
    noted = []
    for position in (*range(2 * apart + 1), steps - 1):
        member.learner.position = position
        noted += [position] if member.noted else []
    assert noted == [0, apart, 2 * apart, steps - 1]


def test_dropout_depends_on_seed_and_step_alone():
    results = []
    for disturb in (1, 2):
        learner, pull = make()
        torch.manual_seed(disturb)
        before = torch.random.get_rng_state()
        train(SOURCE, Member(learner, pull, ALL))
        assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator is left alone"
        results.append(weights(learner))
    assert torch.equal(*results)


class Stop(Exception):
    pass


@pytest.mark.parametrize("interval", [ALL, LOW], ids=["all", "expert"])
@pytest.mark.parametrize("stop", [1, 4, 11])
def test_a_run_killed_anywhere_ends_as_one_that_was_not(tmp_path, interval, stop):
    whole, objective = make()
    log = train(SOURCE, Member(whole, objective, interval))

    said, reached = [], []
    watch = Watch(say=said.append, checkpoint=tmp_path / "c.safetensors", every=0.0)

    def until(done, total, images, loss):
        reached.append(done)
        if done == stop:
            raise Stop

    watch.progress = until
    first, objective = make()
    with pytest.raises(Stop):
        train(SOURCE, Member(first, objective, interval, watch))
    watch.progress = lambda done, *_: reached.append(done)
    second, objective = make()
    resumed = train(SOURCE, Member(second, objective, interval, watch))
    assert reached == [*range(1, stop + 1), *range(stop, 13)]
    assert said == ([f"going on at step {stop - 1} of 12"] if stop > 1 else [])
    assert resumed.data() == log.data()
    assert torch.equal(weights(whole), weights(second))
    for name, value in whole.ema.module.state_dict().items():
        assert torch.equal(value, second.ema.module.state_dict()[name])


@pytest.mark.parametrize("cut", ["write_synced", "replace"])
def test_a_kill_while_a_checkpoint_takes_its_place_leaves_the_one_before(tmp_path, monkeypatch, cut):
    place = tmp_path / "c"
    for text in ("one", "two"):
        (tmp_path / "fresh").write_text(text)
        disk.keep(tmp_path / "fresh", place)
    (tmp_path / "fresh").write_text("three")
    replace = Path.replace

    def stop(path, *to):
        if cut == "write_synced" or path.name == "fresh":
            raise Stop
        return replace(path, *to)

    with monkeypatch.context() as patch:
        patch.setattr(*((disk, "write_synced") if cut == "write_synced" else (Path, "replace")), stop)
        with pytest.raises(Stop):
            disk.keep(tmp_path / "fresh", place)
    assert place.read_text() == "two"
    assert disk.kept(place)
    disk.keep(tmp_path / "fresh", place)
    assert disk.kept(place)


def test_checkpoints_are_written_when_due_and_seconds_add_up(tmp_path):
    now = iter(range(1000))
    learner, pull = make(steps=4)
    watch, clock = Watch(checkpoint=tmp_path / "c.safetensors", every=2.0), lambda: float(next(now))
    first = train(SOURCE, Member(learner, pull, ALL, watch), clock)
    again, pull = make(steps=4)
    second = train(SOURCE, Member(again, pull, ALL, watch), clock)
    assert len(pull.seen) < 4, "the last checkpoint is gone on from"
    assert second.seconds > 0
    assert second.data() == first.data()


@pytest.mark.parametrize("damage", ["flip", "truncate", "another's", "no note"])
def test_a_damaged_checkpoint_is_said_and_passed_over(tmp_path, damage):
    saved, other = tmp_path / "one" / "c.safetensors", tmp_path / "two"
    saved.parent.mkdir()
    learner, pull = make()
    train(SOURCE, Member(learner, pull, ALL, Watch(checkpoint=saved, every=0.0)))
    content = bytearray(saved.read_bytes())
    if damage == "flip":
        content[-1] ^= 4
        saved.write_bytes(content)
    elif damage == "truncate":
        saved.write_bytes(content[:-1])
    elif damage == "another's":
        saved = saved.parent.rename(other) / saved.name
    else:
        saved.with_name(f"{saved.name}.sha256").unlink()
    said = []
    learner, pull = make()
    train(SOURCE, Member(learner, pull, ALL, Watch(say=said.append, checkpoint=saved)))
    assert said == ["the checkpoint is damaged; training from the start"]
    whole, objective = make()
    train(SOURCE, Member(whole, objective, ALL))
    assert torch.equal(weights(whole), weights(learner))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_stage(value):
    learner, _ = make()
    told = r"the loss is (nan|inf) at step 3 \(by part\); lower the learning rate"
    with pytest.raises(Diverged, match=told) as caught:
        train(SOURCE, Member(learner, Pull(learner.network, 3, value), ALL))
    assert isinstance(caught.value, StageFailed)
    fresh, _ = make()
    with pytest.raises(Diverged, match=r"at step 0 \(by part\); nothing was learned yet, so look at the method"):
        train(SOURCE, Member(fresh, Pull(fresh.network, 0, value), ALL))


def test_weights_that_are_not_finite_are_not_stored():
    low, horizon = Interval(0, 5), 3 * LOGS
    few = [len(STREAM.rows_in(STREAM.batch_at(step), low)) for step in range(horizon)]
    # a step whose loss is not looked at, and after which no sample falls to this expert's interval any more
    last = next(s for s in range(horizon - 2, 2 * LOGS, -1) if s % 2 and few[s] and not few[s + 1])
    learner, _ = make(steps=horizon, clip=None)
    learner.course = Course(last + 2, 0, horizon)
    with pytest.raises(Diverged, match=f"the weights are not finite after step {last + 2}"):
        train(SOURCE, Member(learner, Pull(learner.network, last), low))


def test_an_objective_has_no_adapters_unless_it_says_so():
    assert Pull(nn.Linear(1, 1)).adapters() is None


# --- several members


def crew(*intervals, steps=12, offsets=None, watch=lambda: Watch()):
    found = []
    for interval, offset in zip(intervals, offsets or [0] * len(intervals), strict=True):
        learner, pull = make(steps, offset)
        found.append(Member(learner, pull, interval, watch()))
    return found


def same(one, other):
    assert torch.equal(weights(one.learner), weights(other.learner))
    assert one.log.data() == other.log.data()
    for name, value in one.learner.ema.module.state_dict().items():
        assert torch.equal(value, other.learner.ema.module.state_dict()[name])


def alone(interval, **options):
    (member,) = crew(interval, **options)
    train(SOURCE, member)
    return member


def test_together_each_ends_as_it_would_alone():
    members = crew(ALL, LOW, Interval(40, 1000))
    everyone = list(members)
    left = list(train_together(SOURCE, members))
    assert [one.member for one in left] == everyone
    assert members == []
    for member, interval in zip(everyone, (ALL, LOW, Interval(40, 1000)), strict=True):
        same(member, alone(interval))
    assert [m.log.shared_with for m in everyone] == [2, 2, 2]


def test_those_behind_catch_up_and_those_who_join_are_waited_for():
    members = crew(ALL, ALL, offsets=[0, 5], steps=8)
    early, late = members
    joined = []
    for left in train_together(SOURCE, members):
        if left.member is early:
            joined += crew(ALL, offsets=[8], steps=4)
            members.extend(joined)
    steps = [[step for step, _ in m.objective.seen] for m in (early, late, *joined)]
    assert steps == [list(range(8)), list(range(5, 13)), list(range(8, 12))]
    assert [m.log.shared_with for m in (early, late, *joined)] == [1, 1, 1]


def test_one_view_a_step_serves_everyone(monkeypatch):
    asked = []
    at = Source.at
    monkeypatch.setattr(
        Source, "at", lambda self, batch, who: asked.append((batch.step, len(who))) or at(self, batch, who)
    )
    list(train_together(SOURCE, crew(ALL, ALL, ALL)))
    assert asked == [(step, 3) for step in range(12)]


@pytest.mark.parametrize("error", [ValueError("a method's"), OSError("a file"), math.nan])
def test_a_member_that_fails_leaves_and_the_others_go_on(error):
    members = crew(ALL, ALL)
    bad, good = members
    if isinstance(error, float):
        bad.objective.bad_at, expected = 3, Diverged
    else:
        bad.objective.loss, expected = raising(error), type(error)
    first, second = train_together(SOURCE, members)
    assert first.member is bad
    assert isinstance(first.error, expected)
    assert not first.parked
    assert (second.member, second.error) == (good, None)
    same(good, alone(ALL))


def test_nobody_goes_on_from_what_another_has_changed():
    members = crew(ALL, ALL, ALL)
    members[1].objective.loss = raising(SharedChanged("written into"), at=2, after=members[1].objective.loss)
    left = list(train_together(SOURCE, [*members]))
    assert [one.member for one in left] == members
    assert all(isinstance(one.error, SharedChanged) and not one.parked for one in left)
    assert [member.step for member in members] == [3, 2, 2]


def raising(error, at=0, after=None):
    """A loss that raises at its call number ``at``; the others are those of ``after``."""
    calls = iter(range(1000))

    def loss(*arguments):
        if next(calls) == at:
            raise error
        return after(*arguments)

    return loss


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()])
def test_without_memory_beside_others_a_member_is_parked_and_goes_on_later(tmp_path, error):
    path = tmp_path / "c.safetensors"
    members = crew(ALL, ALL)
    parked, other = members
    parked.watch.checkpoint = path
    parked.objective.loss = raising(error, 5, parked.objective.loss)
    first, second = train_together(SOURCE, members)
    assert (first.member, first.parked, first.error) == (parked, True, None)
    assert (second.member, second.error) == (other, None)
    (again,) = crew(ALL, watch=lambda: Watch(checkpoint=path))
    train(SOURCE, again)
    assert again.objective.seen[0][0] == 5
    same(again, other)
    assert again.log.shared_with == 1
    (single,) = crew(ALL)
    single.objective.loss = raising(error)
    with pytest.raises(type(error)):
        train(SOURCE, single)


def test_what_ran_out_of_memory_within_an_update_is_not_saved(tmp_path, monkeypatch):
    members = crew(ALL, ALL)
    members[0].watch.checkpoint = tmp_path / "c.safetensors"
    members[0].learner.update = raising(torch.OutOfMemoryError("full"))
    first, _ = train_together(SOURCE, members)
    assert first.parked
    assert not (tmp_path / "c.safetensors").exists()


def test_a_teacher_that_finds_no_memory_costs_one_member_its_place(monkeypatch):
    at, tries = Source.at, []

    def full(self, batch, who):
        tries.append(len(who))
        if len(who) > 1:
            raise torch.OutOfMemoryError("full")
        return at(self, batch, who)

    monkeypatch.setattr(Source, "at", full)
    members = crew(ALL, ALL, ALL)
    everyone = list(members)
    left = list(train_together(SOURCE, members))
    assert [(one.member, one.parked) for one in left] == [
        (everyone[2], True), (everyone[1], True), (everyone[0], False)
    ]  # fmt: skip
    assert tries == [3, 2, *[1] * 12]


def test_what_fails_for_all_fails_all_who_were_there(monkeypatch):
    members = crew(ALL, ALL, ALL, offsets=[0, 0, 12], steps=4)
    everyone = list(members)
    at = Source.at
    monkeypatch.setattr(Source, "at", lambda s, b, who: 1 / 0 if len(who) > 1 else at(s, b, who))
    left = list(train_together(SOURCE, members))
    assert [one.member for one in left] == everyone
    assert [type(one.error) for one in left] == [ZeroDivisionError, ZeroDivisionError, type(None)]


def test_seconds_are_shared_out_and_nothing_is_lost():
    now = iter(range(10_000))
    read = []

    def clock():
        read.append(float(next(now)))
        return read[-1]

    members = crew(ALL, ALL, Interval(0, 1), steps=6)
    everyone = list(members)
    list(train_together(SOURCE, members, clock))
    assert all(m.log.seconds > 0 for m in everyone)
    entered, closed = 3, 1
    assert sum(m.log.seconds for m in everyone) == pytest.approx(read[-1] - read[0] - entered, abs=closed + 1)


def test_on_a_device_that_computes_on_its_own_only_exact_steps_are_measured(monkeypatch):
    waits, now = [], [0.0]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(now[0]))
    ledger = Ledger(torch.device("cuda"), lambda: now[0])
    one, other = Log(), Log()
    ledger.open()
    for step in range(5):
        ledger.begin([one, other], exact=step == 0)
        for call, spent in ((ledger.share, 2.0), (lambda: ledger.own(0), 1.0), (lambda: ledger.own(1), 5.0)):
            now[0] += spent
            call()
    assert len(waits) == 3, "the first step alone"
    assert (one.seconds, other.seconds) == (2.0, 6.0)
    ledger.close()
    assert (one.seconds, other.seconds) == (10.0, 30.0), "the others in the same proportion"
    ledger.open()
    ledger.begin([other], exact=False)
    now[0] += 3
    ledger.own(0)
    ledger.close()
    assert (one.seconds, other.seconds) == (10.0, 33.0), "who is new is measured at once"


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [
        (range(12), None, [12]),
        (range(12), 12, [12]),
        (range(12), 8, [8, 4]),
        (range(12), 5, [4, 4, 4]),
        (range(12), 1, [4, 4, 4]),
        ([2, 3, 4, 5, 6, 7, 8], 6, [6, 1]),
        ([3, 4, 5, 6, 7], 4, [1, 4]),
    ],
)
def test_parts_end_where_a_group_does(rows, most, expected):
    rows = torch.tensor(list(rows))
    found = parts(rows, 4, most)
    assert [len(part) for part in found] == expected
    assert torch.equal(torch.cat(found), rows)


def test_in_parts_the_step_is_that_of_the_whole():
    whole, halves, single = crew(ALL, ALL, ALL, steps=3)
    for member in (whole, halves, single):
        member.learner.network[1].p = 0.0
    halves.micro_batch, single.micro_batch = 4, 8
    for member in (whole, halves, single):
        train(SOURCE, member)
    same(whole, single)
    assert [len(t) for _, t in halves.objective.seen] == [4] * 6
    torch.testing.assert_close(weights(halves.learner), weights(whole.learner), rtol=1e-5, atol=1e-6)
    for a, b in zip(halves.log.curve, whole.log.curve, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
