"""Jobs and wrappers: what each option of O2MKD means for batch, steps and images, to the last image."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from pydantic import ValidationError

from o2mkd_bench import Interval, Job, Law, Lift, NoiseSchedule, UserError
from o2mkd_bench.core.errors import PluginError
from o2mkd_bench.core.jobs import baseline_batch, baseline_steps, check_jobs, lineage, total_images
from o2mkd_plugins.wrappers.intervals import snr, uniform
from o2mkd_plugins.wrappers.o2mkd import O2MKD
from o2mkd_plugins.wrappers.options import O2MKDOptions, SingleOptions
from o2mkd_plugins.wrappers.single import Single

T = 1000
WHOLE = Interval(0, T)
RULES = {
    "uniform": uniform,
    "snr": snr,
    "thirds": lambda students, schedule: [100, 400],
    "halves": lambda students, schedule: [250.5],
    "broken": lambda students, schedule: 1 // 0,
}


def rule(name):
    if name not in RULES:
        raise PluginError(f"no intervals plugin is called {name!r}; did you mean 'uniform'?")
    return RULES[name]


LIFT = Lift(NoiseSchedule(), rule, "s.yaml: wrappers.o2mkd")


def plain(steps=100, batch=120):
    return Job("student", WHOLE, WHOLE, Law.uniform(WHOLE), batch, steps, steps, student={"width": 0.5})


def lift(steps=100, batch=120, **options):
    return O2MKD(O2MKDOptions(**options)).wrap(plain(steps, batch), LIFT)


def experts(jobs):
    return [job for job in jobs if job.serves is not None]


def test_a_warm_up_and_k_experts_that_continue_it():
    warmup, low, high = lift(warmup=0.3)
    assert (warmup.role, warmup.serves, warmup.trains, warmup.steps, warmup.start) == (
        "warmup",
        None,
        WHOLE,
        30,
        "scratch",
    )
    assert [low.role, high.role] == ["expert-0", "expert-1"]
    assert [low.serves, high.serves] == [Interval(0, 500), Interval(500, 1000)]
    assert {(j.start, j.offset, j.horizon, j.steps) for j in (low, high)} == {("warmup", 30, 100, 70)}
    assert low.batch * low.law.mass(low.trains) == 60
    assert low.student == {"width": 0.5}


def test_experts_begin_their_moments_anew():
    warmup, *rest = lift(warmup=0.3, restart=0.1)
    assert warmup.restart == 0
    assert [job.restart for job in rest] == [7, 7]
    assert rest[0].spec()["restart"] == 7
    assert [job.restart for job in lift(warmup=0.3, restart=1e-4)[1:]] == [1, 1]


@pytest.mark.parametrize("options", [{"restart": 0}, {"students": 1}, {"init": "scratch"}, {"warmup": 0}])
def test_who_has_no_moments_of_other_timesteps_goes_on_with_them(options):
    assert all(job.restart == 0 and "restart" not in job.spec() for job in lift(**options))


@pytest.mark.parametrize("init", ["teacher", "scratch"])
def test_without_a_shared_start_there_is_no_warm_up(init):
    jobs = lift(init=init, warmup=0.3)
    assert [j.start for j in jobs] == [init, init]
    assert {(j.offset, j.steps, j.horizon) for j in jobs} == {(0, 100, 100)}


def test_a_warm_up_of_nothing_is_none():
    assert [(j.role, j.start) for j in lift(warmup=0)] == [("expert-0", "scratch"), ("expert-1", "scratch")]


def test_a_warm_up_leaves_at_least_a_step_to_the_experts():
    assert [j.steps for j in lift(steps=3, warmup=0.99)] == [2, 1, 1]


@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.77])
@pytest.mark.parametrize("batch", ["share", "full"])
@pytest.mark.parametrize("budget", ["total", "per_student"])
@pytest.mark.parametrize("allocation", ["width", "equal"])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_one_student_is_the_unlifted_job_in_pieces(warmup, batch, budget, allocation, overlap):
    jobs = lift(students=1, warmup=warmup, expert_batch=batch, budget=budget, allocation=allocation, overlap=overlap)
    job, position = plain(), 0
    for piece in jobs:
        assert (piece.trains, piece.law, piece.batch, piece.horizon) == (WHOLE, job.law, job.batch, job.horizon)
        assert piece.offset == position
        assert piece.pace() == 1
        position += piece.steps
    assert position == job.steps
    assert total_images(jobs) == job.images


OPTIONS = list(
    itertools.product(
        ["uniform", "snr", (100, 400, 450)], ["width", "equal"], ["share", "full"], [0.0, 0.3], [0.0, 0.25]
    )
)


@pytest.mark.parametrize(("intervals", "allocation", "batch", "warmup", "overlap"), OPTIONS)
def test_all_students_together_see_the_budget_up_to_whole_steps(intervals, allocation, batch, warmup, overlap):
    job = plain(1000, 120)
    options = {"intervals": intervals, "allocation": allocation, "expert_batch": batch, "warmup": warmup}
    jobs = lift(1000, 120, students=4, overlap=overlap, **options)
    assert isinstance(total_images(jobs), Fraction)
    # each expert may miss less than one of its own steps
    slack = sum((j.images / j.steps for j in experts(jobs)), Fraction(0))
    assert 0 <= job.images - total_images(jobs) < slack


@pytest.mark.parametrize(("intervals", "allocation", "batch", "warmup", "overlap"), OPTIONS)
def test_each_lineage_sees_the_budget_per_student(intervals, allocation, batch, warmup, overlap):
    job = plain(1000, 120)
    options = {"intervals": intervals, "allocation": allocation, "expert_batch": batch, "warmup": warmup}
    jobs = lift(1000, 120, students=4, overlap=overlap, budget="per_student", **options)
    for expert in experts(jobs):
        line = lineage(jobs, expert)
        assert [j.role for j in line] == (["warmup", expert.role] if warmup else [expert.role])
        assert 0 <= job.images - total_images(line) < expert.images / expert.steps


def test_share_splits_the_batch_and_keeps_the_steps():
    jobs = lift(init="scratch", students=2, intervals=(250,))
    assert [(j.steps, j.batch, j.batch * j.law.mass(j.trains)) for j in jobs] == [(100, 120, 30), (100, 120, 90)]


def test_full_keeps_the_batch_and_splits_the_steps():
    jobs = lift(init="scratch", students=2, intervals=(250,), expert_batch="full")
    assert [(j.steps, j.batch * j.law.mass(j.trains)) for j in jobs] == [(25, 120), (75, 120)]
    assert [j.law for j in jobs] == [Law.uniform(Interval(0, 250)), Law.uniform(Interval(250, 1000))]
    # every expert's learning rate runs to its end, and all of them end at one horizon
    assert [j.pace() for j in jobs] == [3, 1]


@pytest.mark.parametrize("batch", ["share", "full"])
def test_equal_allocation_gives_every_expert_as_many_images(batch):
    jobs = lift(init="scratch", students=2, intervals=(250,), allocation="equal", expert_batch=batch)
    assert [j.images for j in jobs] == [6000, 6000]


def test_width_allocation_gives_images_by_width():
    jobs = lift(init="scratch", students=2, intervals=(250,))
    assert [j.images for j in jobs] == [3000, 9000]


def test_an_overlap_widens_training_and_not_serving():
    low, high = lift(init="scratch", overlap=0.1)
    assert (low.trains, low.serves) == (Interval(0, 550), Interval(0, 500))
    assert (high.trains, high.serves) == (Interval(450, 1000), Interval(500, 1000))


def test_where_a_job_serves_is_no_part_of_what_it_is():
    job = lift()[1]
    assert replace(job, serves=Interval(0, 10), role="other").spec() == job.spec()
    assert replace(job, trains=Interval(0, 10)).spec() != job.spec()


def test_options_that_cannot_be_are_refused():
    for wrong in ({"students": 0}, {"warmup": 1.0}, {"overlap": -0.1}, {"init": "random"}, {"student": 2}):
        with pytest.raises(ValidationError):
            O2MKDOptions(**wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"students": 4, "batch": 3}, r"expert 0 on \[0, 250\) would get less than one image a step"),
        ({"students": 4, "steps": 3, "expert_batch": "full", "warmup": 0}, "less than one step"),
        ({"students": 3, "intervals": (500,)}, r"intervals: 3 students need 2 inner edges, \[500\] are 1"),
        ({"students": 4, "intervals": "thirds"}, r"intervals: 4 students need 3 inner edges, \[100, 400\] are 2"),
        ({"students": 3, "intervals": (500, 400)}, r"3 intervals with inner edges \[500, 400\]"),
        ({"intervals": "unifrm"}, "intervals: no intervals plugin is called 'unifrm'; did you mean 'uniform'"),
        ({"intervals": "halves"}, "the rule 'halves' failed: TypeError"),
        ({"intervals": "broken"}, "the rule 'broken' failed: ZeroDivisionError"),
    ],
)
def test_layouts_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=rf"^s\.yaml: wrappers\.o2mkd.*{message}"):
        lift(**options)


def test_a_rule_of_somebody_else_sets_the_edges():
    assert [j.serves for j in lift(students=3, intervals="thirds", warmup=0)] == [
        Interval(0, 100),
        Interval(100, 400),
        Interval(400, 1000),
    ]


def test_o2mkd_of_o2mkd_is_refused_in_one_sentence_that_says_so():
    for job in lift():
        with pytest.raises(UserError, match=rf"wrappers\.o2mkd: O2MKD of O2MKD is not possible.*{job.role}"):
            O2MKD(O2MKDOptions()).wrap(job, LIFT)


def test_single_is_the_job_itself_or_so_many_times_as_long():
    assert Single(SingleOptions()).wrap(plain(), LIFT) == (plain(),)
    (longer,) = Single(SingleOptions(scale=2.5)).wrap(plain(), LIFT)
    assert (longer.steps, longer.horizon) == (250, 250)
    with pytest.raises(UserError, match=r"scale: 0\.001 of 100 steps is no step"):
        Single(SingleOptions(scale=0.001)).wrap(plain(), LIFT)


def test_the_control_follows_the_joint_law_of_equally_treated_experts():
    (control,) = Single(SingleOptions(students=2, intervals=(250,))).wrap(plain(), LIFT)
    joint = {j.law for j in lift(init="scratch", intervals=(250,), allocation="equal")}
    assert {control.law} == joint
    assert control.images == plain().images


def test_the_control_with_normalised_losses_differs_in_its_loss_alone():
    options = {"students": 3, "intervals": (250, 600), "normalise": True, "scale": 2}
    (control,) = Single(SingleOptions(**options)).wrap(plain(), LIFT)
    (longer,) = Single(SingleOptions(scale=2)).wrap(plain(), LIFT)
    assert control == replace(longer, normalise=(250, 600))
    assert control.spec() == {**longer.spec(), "normalise": [250, 600]}
    (by_rule,) = Single(SingleOptions(students=2, intervals="snr", normalise=True)).wrap(plain(), LIFT)
    assert by_rule.normalise == (snr(2, NoiseSchedule())[0],)


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("normalise", {"normalise": True}),
        ("normalise", {"normalise": True, "students": 2}),
        ("normalise", {"normalise": True, "intervals": "uniform"}),
        ("students", {"students": 2}),
        ("intervals", {"intervals": "snr"}),
        ("intervals", {"intervals": "auto"}),
    ],
)
def test_no_control_is_the_plain_student_by_another_name(key, options):
    with pytest.raises(UserError, match=rf"wrappers\.o2mkd\.{key}: it goes with the intervals .*give students of at"):
        Single(SingleOptions(**options)).wrap(plain(), LIFT)


def test_what_is_not_set_enters_no_identity():
    spec = {"trains", "law", "batch", "steps", "offset", "horizon", "pace"}
    assert set(plain().spec()) == spec
    assert all(set(job.spec()) == spec for job in lift(restart=0))


GENERALISTS = list(
    itertools.product(
        [(250,), "uniform"], ["width", "equal"], ["share", "full"], ["total", "per_student"], [0.0, 0.3], [0.0, 0.2]
    )
)


@pytest.mark.parametrize(("intervals", "allocation", "batch", "budget", "warmup", "overlap"), GENERALISTS)
def test_without_specialising_each_student_sees_as_much_as_its_twin(
    intervals, allocation, batch, budget, warmup, overlap
):
    options = {"intervals": intervals, "allocation": allocation, "expert_batch": batch, "budget": budget}
    options |= {"warmup": warmup, "overlap": overlap}
    twins, jobs = lift(1000, **options), lift(1000, specialise=False, **options)
    check_jobs(jobs, T, "w")
    for twin, job in zip(twins, jobs, strict=True):
        assert (job.images, job.steps, job.pace()) == (twin.images, twin.steps, twin.pace())
        assert (job.role, job.serves, job.start, job.offset) == (twin.role, twin.serves, twin.start, twin.offset)
    assert jobs[:-2] == twins[:-2], "the warm-up is the same stage"
    edges = [Interval(0, 250), Interval(250, T)]
    law = Law.equal(edges) if (allocation, intervals) == ("equal", (250,)) else Law.uniform(WHOLE)
    assert [(job.trains, job.law, job.stream) for job in experts(jobs)] == [(WHOLE, law, 1), (WHOLE, law, 2)]
    assert all(isinstance(job.batch, int) for job in jobs)
    for rule in ("equal_total", "per_student"):
        assert baseline_steps(jobs, rule, 120) == baseline_steps(twins, rule, 120)


def test_a_share_without_specialising_is_whole_images():
    jobs = lift(init="scratch", intervals=(250,), specialise=False)
    assert [(job.batch, job.steps, job.images, job.spec()["stream"]) for job in jobs] == [
        (30, 100, 3000, 1),
        (90, 100, 9000, 2),
    ]
    message = r"o2mkd\.specialise: expert 0 on \[0, 303\) gets 36\.36 images a step.*use expert_batch: full"
    with pytest.raises(UserError, match=message):
        lift(intervals="snr", specialise=False)
    assert [job.batch for job in lift(intervals="snr", specialise=False, expert_batch="full")] == [120] * 3
    assert [job.batch for job in lift(intervals="snr", specialise=False, allocation="equal")] == [120, 60, 60]


def test_a_job_continues_one_with_its_running_means():
    warmup, low, high = (replace(job, normalise=(500,)) for job in lift())
    check_jobs((warmup, low, high), T, "w")
    with pytest.raises(UserError, match=r"w: expert-1 continues warmup, whose running means.*give both the same"):
        check_jobs((warmup, low, replace(high, normalise=())), T, "w")


def test_baselines_see_what_the_lifted_jobs_see():
    total, each = lift(1000), lift(1000, budget="per_student", warmup=0.25)
    assert baseline_steps(total, "equal_total", 120) == 1000
    assert baseline_steps(total, "per_student", 120) == 300 + 350
    assert baseline_steps(each, "per_student", 120) == 1000
    assert baseline_steps(each, "equal_total", 120) == 250 + 2 * 750
    assert [baseline_batch(jobs, "per_student", 120) for jobs in (total, each)] == [120, 120]
    assert [baseline_batch(jobs, "equal_batch", 120) for jobs in (total, each)] == [60, 60]
    assert baseline_steps(total, "equal_batch", 60) == 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "warmpu"}, "expert-0 starts from 'warmpu', which is no job before it"),
        ({"role": "warmup"}, "two jobs have the role 'warmup'"),
        ({"start": "scratch"}, "expert-0 starts from scratch and has no moments to begin anew"),
        ({"steps": 0}, "expert-0 would train 0 steps"),
        ({"serves": Interval(0, 400)}, r"\[0, 400\), \[500, 1000\) do not cover \[0, 1000\) exactly once"),
        ({"serves": Interval(0, 600), "trains": Interval(0, 600)}, "do not cover"),
        ({"serves": Interval(0, 600)}, r"expert-0 serves \[0, 600\) and trains \[0, 500\); let it train all"),
        ({"trains": Interval(2000, 5000)}, r"expert-0 trains \[2000, 5000\), of which its law has nothing"),
        ({"steps": 10.5}, r"expert-0 has steps 10\.5; make it an int"),
        ({"horizon": np.int64(3)}, "expert-0 has horizon .*; make it an int"),
        ({"offset": -1}, "an offset, stream or restart below 0"),
        ({"offset": 10**6}, "begins at 1000000 of a horizon of"),
        ({"serves": (0, 500)}, r"expert-0 serves \(0, 500\); make it an Interval, or None"),
        ({"role": ["a"]}, r"a job has role \['a'\]"),
        ({"student": None}, "expert-0 has the student None; make it a mapping"),
        ({"law": None}, "a law of t that is a NoneType; make it a Law"),
        ({"law": Law((0, 1000), (Fraction(2),))}, "with masses 2; make them fractions from 0 on that add up to 1"),
        ({"law": Law((0, 500, 1000), (Fraction(2), Fraction(-1)))}, "with masses 2, -1"),
        ({"law": Law((0, 500, 1000), (Fraction(1),))}, "with 1 masses between 3 ends"),
        (
            {"law": Law((0, 5000), (Fraction(1),))},
            r"with ends \(0, 5000\); make them ints that rise between 0 and 1000",
        ),
        ({"normalise": (3000,)}, r"make it a tuple of ints that rise in \(0, 1000\)"),
        ({"normalise": (500, 250)}, r"normalise \(500, 250\)"),
        ({"normalise": 500}, "normalise 500"),
        ({"serves": None}, "the 1 intervals"),
    ],
)
def test_a_wrapper_is_held_to_its_contract(change, message):
    warmup, low, high = lift()
    with pytest.raises(UserError, match=message):
        check_jobs((warmup, replace(low, **change), high), T, "w")
    check_jobs((warmup, low, high), T, "w")


def test_who_serves_is_no_start():
    warmup, low, high = lift()
    with pytest.raises(UserError, match="expert-1 starts from expert-0, which serves; start from one that does not"):
        check_jobs((warmup, low, replace(high, start="expert-0")), T, "w")
    with pytest.raises(UserError, match=r"a dict is among the jobs, which is no o2mkd_bench\.Job"):
        check_jobs((warmup, low, {"role": "x"}), T, "w")
    with pytest.raises(UserError, match="has an edge that is no whole number; use // for /"):
        Interval(0, 500.0)


def test_no_intervals_are_no_cover():
    with pytest.raises(UserError, match="the 0 intervals none do not cover"):
        check_jobs((), T, "w")
