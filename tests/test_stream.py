"""The training stream: exact shares for intervals, the law of t, and purity."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from o2mkd_bench.core.errors import UserError
from o2mkd_bench.core.intervals import Interval, Law, cover
from o2mkd_bench.engine.stream import Stream

UNIFORM = Law.uniform(Interval(0, 1000))
SKEWED = Law((0, 30, 700, 1000), (Fraction(1, 3), Fraction(1, 2), Fraction(1, 6)))


def stream(**changes) -> Stream:
    values = {"seed": 0, "law": UNIFORM, "batch": 24, "count": 50, "flip": True, "fingerprint": "abc"}
    return Stream(**{**values, **changes})


@pytest.mark.parametrize(
    ("students", "timesteps"), [(1, 1000), (2, 1000), (4, 1000), (8, 1000), (3, 999), (8, 24), (12, 12), (1, 7)]
)
def test_uniform_intervals_get_exactly_their_share(students, timesteps):
    source = stream(law=Law.uniform(Interval(0, timesteps)))
    width = timesteps // students
    parts = cover([width * k for k in range(1, students)], timesteps)
    for step in range(200):
        batch = source.batch_at(step)
        rows = [source.rows_in(batch, part) for part in parts]
        assert [len(r) for r in rows] == [24 // students] * students
        assert torch.cat(rows).tolist() == list(range(24))


@pytest.mark.parametrize("law", [UNIFORM, SKEWED, Law.uniform(Interval(100, 350))])
def test_each_sample_lies_in_its_quantile_slice(law):
    source = stream(law=law)
    for step in range(50):
        for i, t in enumerate(source.batch_at(step).t.tolist()):
            below = law.mass(Interval(law.ends[0], t)) if t > law.ends[0] else 0
            upto = law.mass(Interval(law.ends[0], t + 1))
            # [F(t), F(t + 1)) and [i / B, (i + 1) / B) have a common part
            assert below < Fraction(i + 1, 24)
            assert upto > Fraction(i, 24)


def test_mass_of_a_skewed_law():
    source = stream(law=SKEWED, batch=24)
    t = torch.stack([source.batch_at(step).t for step in range(500)])
    assert t.min() >= 0
    assert t.max() < 1000
    # slices of the three pieces: 8, 12 and 4 of 24, exactly
    assert ((t < 30).sum(1) == 8).all()
    assert ((t >= 700).sum(1) == 4).all()
    first = t[t < 30]
    assert first.unique().tolist() == list(range(30))
    assert abs(first.float().mean() - 14.5) < 0.3
    inside = t[(t >= 30) & (t < 700)].float()
    assert abs(inside.mean() - 364.5) < 5


def test_a_piece_without_mass_is_never_visited():
    law = Law((0, 10, 20, 30), (Fraction(1, 2), Fraction(0), Fraction(1, 2)))
    source = stream(law=law)
    t = torch.cat([source.batch_at(step).t for step in range(100)])
    assert not ((t >= 10) & (t < 20)).any()
    assert t.unique().tolist() == [*range(10), *range(20, 30)]


def test_batches_are_pure_and_differ():
    later, earlier = stream().batch_at(8), stream().batch_at(7)
    again = stream()
    for name in ("index", "t", "flip", "groups"):
        assert torch.equal(getattr(again.batch_at(7), name), getattr(earlier, name))
        assert torch.equal(getattr(again.batch_at(8), name), getattr(later, name))
    assert not torch.equal(earlier.index, later.index)
    assert not torch.equal(earlier.t, later.t)
    assert not torch.equal(stream(seed=1).batch_at(7).index, earlier.index)


def test_a_step_is_the_same_whichever_steps_were_asked_for_before():
    source = stream()
    alone = {step: stream().batch_at(step) for step in (0, 31, 32, 40, (1 << 31) - 1)}
    for step in (40, 0, 31, 32, (1 << 31) - 1, 40, 0):
        found = source.batch_at(step)
        assert found.step == step
        assert torch.equal(found.host_t, found.t)
        for name in ("index", "t", "flip", "groups"):
            assert torch.equal(getattr(found, name), getattr(alone[step], name))


def test_the_numbers_of_a_step_are_these():
    batch = stream(batch=6, count=1000).batch_at(33)
    assert batch.index.tolist() == [72, 941, 138, 464, 964, 187]
    assert batch.t.tolist() == [3, 191, 461, 520, 744, 908]
    assert batch.flip.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("law", [UNIFORM, SKEWED])
@pytest.mark.parametrize("interval", [(0, 1000), (0, 30), (29, 31), (100, 101), (700, 1000), (990, 5000)])
def test_rows_of_an_interval_are_all_that_lie_in_it(law, interval):
    source = stream(law=law)
    for step in range(40):
        batch = source.batch_at(step)
        rows = [i for i, t in enumerate(batch.t.tolist()) if interval[0] <= t < interval[1]]
        found = source.rows_in(batch, Interval(*interval))
        assert found.dtype == torch.int64
        assert found.tolist() == rows


def test_dtypes_and_groups():
    batch = stream(batch=70, group=32).batch_at(0)
    assert {batch.index.dtype, batch.t.dtype, batch.groups.dtype} == {torch.int64}
    assert batch.flip.dtype == torch.bool
    assert batch.groups.tolist() == [0] * 32 + [1] * 32 + [2] * 6


def test_images_are_drawn_evenly_with_replacement():
    source = stream(count=5)
    index = torch.cat([source.batch_at(step).index for step in range(400)])
    shares = torch.bincount(index, minlength=5) / len(index)
    assert len(shares) == 5
    assert (shares - 0.2).abs().max() < 0.02


def test_flips_are_even_or_absent_and_touch_nothing_else():
    source = stream()
    flipped = torch.cat([source.batch_at(step).flip for step in range(400)]).float()
    assert abs(flipped.mean() - 0.5) < 0.03
    plain = stream(flip=False).batch_at(3)
    assert not plain.flip.any()
    assert torch.equal(plain.index, stream().batch_at(3).index)
    assert torch.equal(plain.t, stream().batch_at(3).t)


def test_draws_do_not_move_together():
    source = stream(count=1 << 20)
    batches = [source.batch_at(step) for step in range(300)]
    columns = torch.stack(
        [
            torch.cat([b.index for b in batches]).double(),
            torch.cat([b.t - torch.arange(24) * 1000 // 24 for b in batches]).double(),
            torch.cat([b.flip for b in batches]).double(),
            source.noise(batches[0], (300,)).flatten().double(),
        ]
    )
    correlations = torch.corrcoef(columns) - torch.eye(4)
    assert correlations.abs().max() < 5 / 7200**0.5


def test_noise_of_some_rows_is_that_of_all():
    source = stream()
    batch = source.batch_at(11)
    whole = source.noise(batch, (3, 4, 4))
    assert whole.shape == (24, 3, 4, 4)
    rows = source.rows_in(batch, Interval(300, 720))
    assert 0 < len(rows) < 24
    assert torch.equal(source.noise(batch, (3, 4, 4), rows), whole[rows])
    assert torch.equal(source.noise(batch, (3, 4, 4), rows.flip(0)), whole[rows.flip(0)])
    other = source.noise(source.batch_at(12), (3, 4, 4))
    assert not torch.isin(other, whole).any()


def test_images_are_scaled_and_flipped():
    source = stream(count=50)
    data = torch.arange(50 * 3 * 2 * 2).remainder(256).to(torch.uint8).view(50, 3, 2, 2)
    batch = source.batch_at(2)
    images = source.images(batch, data)
    assert images.dtype == torch.float32
    for image, index, flip in zip(images, batch.index.tolist(), batch.flip.tolist(), strict=True):
        plain = data[index].double().numpy() / 127.5 - 1
        np.testing.assert_allclose(image.numpy(), plain[:, :, ::-1] if flip else plain, rtol=0, atol=1e-6)
    assert batch.flip.any()
    assert not batch.flip.all()
    rows = torch.tensor([5, 1])
    assert torch.equal(source.images(batch, data, rows), images[rows])
    with pytest.raises(ValueError, match="50 images, the data holds 49"):
        source.images(batch, data[1:])


def test_ends_of_the_pixel_range_are_exact():
    source = stream(count=2)
    data = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    assert set(source.images(source.batch_at(0), data).flatten().tolist()) == {-1.0, 1.0}


def test_streams_are_equal_where_all_that_decides_them_is():
    changes = [{"seed": 1}, {"law": SKEWED}, {"batch": 12}, {"count": 49}, {"flip": False}, {"group": 16}]
    assert len({stream(**change) for change in [*changes, {"fingerprint": "other"}, {}]}) == 8
    assert stream() == stream()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch": 0}, "use at least 1"), ({"count": 0}, "has 0 images"), ({"group": 2}, "at least 3")],
)
def test_impossible_streams(change, message):
    with pytest.raises(UserError, match=message):
        stream(**change)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree():
    source = stream()
    here, there = source.batch_at(5), source.batch_at(5, "cuda")
    for name in ("index", "t", "flip", "groups"):
        assert torch.equal(getattr(there, name).cpu(), getattr(here, name))
    rows = source.rows_in(there, Interval(0, 500))
    assert not rows.is_cuda
    rows = rows.cuda()
    noise = source.noise(there, (3, 8, 8), rows)
    torch.testing.assert_close(noise.cpu(), source.noise(here, (3, 8, 8), rows.cpu()), rtol=1e-6, atol=1e-7)
    data = torch.arange(50 * 12).remainder(256).to(torch.uint8).view(50, 3, 2, 2)
    images = source.images(there, data.cuda(), rows).cpu()
    torch.testing.assert_close(images, source.images(here, data, rows.cpu()), rtol=0, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    source = stream()
    data = torch.arange(50 * 12).remainder(256).to(torch.uint8).view(50, 3, 2, 2).cuda()
    source.noise(source.batch_at(31, "cuda"), (3, 2, 2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in (32, 33):
            batch = source.batch_at(step, "cuda")
            source.rows_in(batch, Interval(0, 500))
            images, noise = source.images(batch, data), source.noise(batch, (3, 2, 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert images.shape == noise.shape == (24, 3, 2, 2)
