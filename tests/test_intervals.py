"""Intervals, exact covers, laws of t, and the built-in interval rules."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from o2mkd_bench import Interval, Law, NoiseSchedule, UserError
from o2mkd_bench.core.intervals import cover
from o2mkd_plugins.wrappers.intervals import snr, uniform

LINEAR = NoiseSchedule()


def test_intervals_are_half_open_also_for_real_timesteps():
    interval = Interval(10, 20)
    assert 10 in interval
    assert 19.999 in interval
    assert 20 not in interval
    assert 9.999 not in interval
    assert interval.width == 10
    assert str(interval) == "[10, 20)"


@pytest.mark.parametrize(("lo", "hi"), [(5, 5), (6, 5), (-1, 5)])
def test_empty_and_negative_intervals_are_refused(lo, hi):
    with pytest.raises(UserError, match=rf"\[{lo}, {hi}\) is empty"):
        Interval(lo, hi)


def test_a_cover_holds_every_timestep_exactly_once():
    intervals = cover([31, 303, 722], 1000)
    assert intervals[0] == Interval(0, 31)
    assert all(sum(t in i for i in intervals) == 1 for t in range(1000))
    assert cover([], 1000) == (Interval(0, 1000),)


@pytest.mark.parametrize("edges", [[0], [1000], [500, 500], [600, 500], [-3], [1200]])
def test_what_is_no_cover_is_refused_with_k_and_the_edges(edges):
    with pytest.raises(UserError) as caught:
        cover(edges, 1000)
    assert f"{len(edges) + 1} intervals with inner edges {edges}" in str(caught.value)


def test_widening_is_by_a_share_of_the_width_and_cut_to_the_axis():
    assert Interval(200, 300).widened(0.25, 1000) == Interval(175, 325)
    assert Interval(0, 100).widened(0.5, 1000) == Interval(0, 150)
    assert Interval(900, 1000).widened(1, 1000) == Interval(800, 1000)
    assert Interval(200, 300).widened(0, 1000) == Interval(200, 300)


def test_snr_edges_of_the_linear_schedule():
    assert snr(1, LINEAR) == []
    assert snr(2, LINEAR) == [303]
    assert snr(4, LINEAR) == [31, 303, 722]
    assert snr(8, LINEAR) == [7, 31, 110, 303, 536, 722, 872]


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("rule", [uniform, snr])
def test_rules_give_covers_for_every_schedule(kind, rule):
    schedule = NoiseSchedule(kind=kind)
    for students in range(1, 9):
        assert len(cover(rule(students, schedule), 1000)) == students


def test_uniform_edges():
    assert uniform(3, LINEAR) == [333, 667]
    assert uniform(4, NoiseSchedule(timesteps=8)) == [2, 4, 6]


def test_mass_of_the_uniform_law_is_the_share_of_the_width():
    law = Law.uniform(Interval(0, 1000))
    assert law.mass(Interval(0, 31)) == Fraction(31, 1000)
    assert Law.uniform(Interval(100, 200)).mass(Interval(150, 1000)) == Fraction(1, 2)
    assert Law.uniform(Interval(100, 200)).mass(Interval(300, 400)) == 0


def test_the_equal_law_gives_each_interval_the_same_mass_and_is_uniform_for_equal_widths():
    intervals = cover([31, 303, 722], 1000)
    law = Law.equal(intervals)
    assert [law.mass(i) for i in intervals] == [Fraction(1, 4)] * 4
    assert law.mass(Interval(0, 1000)) == 1
    assert Law.equal(cover([250, 500, 750], 1000)) == Law.uniform(Interval(0, 1000))


def test_a_law_survives_json():
    law = Law.equal(cover([31, 303], 1000))
    assert Law.from_spec(json.loads(json.dumps(law.spec()))) == law
