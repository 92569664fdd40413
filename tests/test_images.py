"""Where the training set lives changes no number."""

import numpy as np
import pytest
import torch

from o2mkd_bench.core.intervals import Interval, Law
from o2mkd_bench.engine import images
from o2mkd_bench.engine.images import Resident, Streamed, open_images
from o2mkd_bench.engine.stream import Stream

CPU = torch.device("cpu")
COUNT = 40


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 3, 4, 4), dtype=np.uint8)
    file = tmp_path_factory.mktemp("data") / "train.npy"
    np.save(file, pixels)
    return file


def stream(seed=0, batch=12):
    return Stream(seed, Law.uniform(Interval(0, 1000)), batch, COUNT, True)


def expected(path, source, step):
    return torch.from_numpy(np.load(path))[source.batch_at(step).index]


@pytest.mark.parametrize("workers", [0, 2])
def test_read_ahead_equals_the_array_wherever_reading_begins(path, workers):
    data, source = Streamed(path, CPU, workers), stream()
    for step in [5, 6, 7, 7, 30, 31, 32, 33, 2, 3, 70]:
        found = data.take(source, source.batch_at(step))
        assert found.dtype == torch.uint8
        assert torch.equal(found, expected(path, source, step)), step


def test_rows_are_rows_of_the_whole_batch(path):
    source, rows = stream(), torch.tensor([3, 11, 4])
    batch = source.batch_at(1)
    for data in (Streamed(path, CPU, 0), open_images(path, CPU)):
        assert torch.equal(data.take(source, batch, rows), expected(path, source, 1)[rows])
        assert data.take(source, batch, rows[:0]).shape == (0, 3, 4, 4)


def test_another_stream_is_another_order(path):
    data, one, two = Streamed(path, CPU, 0), stream(), stream(seed=1)
    for source, step in [(one, 0), (one, 1), (two, 2), (two, 3), (stream(batch=6), 4)]:
        assert torch.equal(data.take(source, source.batch_at(step)), expected(path, source, step))


def test_reading_is_ahead_and_not_begun_anew_while_steps_follow(path, monkeypatch):
    begun = []
    begin = Streamed._read_from

    def noted(self, source, step):
        begun.append(step)
        return begin(self, source, step)

    monkeypatch.setattr(Streamed, "_read_from", noted)
    data = Streamed(path, CPU, 0)
    for step in [4, 4, 5, 6, 6, 7, 4]:
        # an equal stream, not the same one: each member of a cohort brings its own
        data.take(stream(), stream().batch_at(step))
    assert begun == [4, 4]


def test_reading_draws_no_random_numbers_of_anybody_elses(path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Streamed(path, CPU, 0).take(stream(), stream().batch_at(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_takes_its_images_from_a_tensor_or_from_images(path):
    source = stream()
    batch, rows = source.batch_at(3), torch.tensor([2, 0])
    plain = torch.from_numpy(np.load(path))
    for data in (Resident(plain), Streamed(path, CPU, 0), open_images(path, "cpu")):
        assert data.shape == plain.shape
        assert data.device == CPU
        assert torch.equal(source.images(batch, data), source.images(batch, plain))
        assert torch.equal(source.images(batch, data, rows), source.images(batch, plain, rows))
    small = Stream(0, source.law, 12, COUNT - 1, True)
    with pytest.raises(ValueError, match="39 images, the data holds 40"):
        small.images(batch, data)


def test_on_the_cpu_the_file_is_mapped_and_left_alone(path):
    before = path.read_bytes()
    data = open_images(path, "cpu")
    assert isinstance(data, Resident)
    assert len(data) == COUNT
    data._data.zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize(("free", "kind"), [(COUNT * 48 * 4, Resident), (COUNT * 48 * 4 - 4, Streamed)])
def test_a_set_larger_than_a_quarter_of_the_free_memory_is_read_ahead(path, monkeypatch, free, kind):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    # a device on which nothing is stored stands for one that is not here
    data = open_images(path, "meta")
    assert type(data) is kind
    assert data.device.type == "meta"
    assert data.shape == (COUNT, 3, 4, 4)
    assert type(open_images(path, "meta", room=0)) is Streamed


def test_no_more_processes_than_cores(path, monkeypatch):
    for cores, workers in ((None, 1), (2, 2), (64, 4)):
        monkeypatch.setattr(images.os, "cpu_count", lambda cores=cores: cores)
        assert Streamed(path, CPU)._workers == workers


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree(path):
    source, rows = stream(), torch.tensor([1, 7], device="cuda")
    data = [Streamed(path, torch.device("cuda"), 2), open_images(path, "cuda")]
    for step in [9, 10, 33]:
        batch = source.batch_at(step, "cuda")
        for one in data:
            assert torch.equal(one.take(source, batch).cpu(), expected(path, source, step))
            assert torch.equal(one.take(source, batch, rows).cpu(), expected(path, source, step)[[1, 7]])
