"""What must not depend on the device. Runs wherever there is a CUDA device."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_networks import SCHEDULE, Denoiser, call, setting
from toy import Events, run, suite

from o2mkd_bench.core.identity import canonical
from o2mkd_bench.engine.denoiser import Tables
from o2mkd_bench.engine.distil import Distil, Methods, Teacher
from o2mkd_bench.stages.bench import Bench
from o2mkd_bench.stages.samples import draw
from o2mkd_plugins.kd.options import OutputOptions, RelationOptions
from o2mkd_plugins.kd.output import OutputMatching
from o2mkd_plugins.kd.relation import Relation

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def sampling_stages(toy_run):
    return [stage for stage in toy_run.session.plan.stages.values() if stage.kind == "samples"]


def images_on_cuda(toy_run, stage, batch):
    found = toy_run.session
    bench = Bench(found.store, "cuda:0", Events(), found.registry)
    small = replace(stage, local={"batch": batch})
    return draw(bench, stage.spec, stage.needs["students"], range(stage.spec["images"]), small).numpy().astype(int)


def test_images_are_those_of_the_cpu_whatever_the_batch(toy_run):
    stages = sampling_stages(toy_run)
    assert len(stages) > 2
    for stage in stages:
        stored = np.load(toy_run.session.store.read(stage.identity, "images.npy")).astype(int)
        for batch in (97, 640):
            assert np.abs(images_on_cuda(toy_run, stage, batch) - stored).max() <= 1, (stage.label, batch)


def gradients(device):
    methods = {"output": OutputMatching(OutputOptions()), "relation": Relation(RelationOptions())}
    student, teacher = (copy.deepcopy(n).to(device) for n in (Denoiser(2, seed=1), Denoiser(4, seed=2).eval()))
    base = setting()
    here = replace(base, data=base.data.to(device), tables=Tables.of(SCHEDULE, torch.device(device)))
    objective = Distil(here, call(student), Methods(methods), Teacher(call(teacher), "epsilon"))
    batch = here.stream.batch_at(5, device)
    loss, _ = objective.loss(batch, torch.arange(len(batch.t), device=device), 5)
    loss.backward()
    return torch.cat([p.grad.flatten().cpu() for p in student.parameters()])


def test_gradients_are_those_of_the_cpu():
    torch.backends.cudnn.allow_tf32 = False
    cpu, cuda = gradients("cpu"), gradients("cuda:0")
    assert float((cpu - cuda).norm() / cpu.norm()) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_whole_run_ends_in_finite_scores(tmp_path, precision):
    wrappers = ["single", {"o2mkd": {"students": 2}}]
    samplers = [{"ddim": {"steps": [2]}}, {"progressive": {"steps": [2], "start": 4}}]
    found = suite(device="cuda", precision=precision, store_dtype="fp16", wrappers=wrappers, samplers=samplers)
    results = run(found, tmp_path / "store", tmp_path / "out", Events())
    rows = results.document["rows"]
    assert len(rows) == 5
    assert {row["status"] for row in rows} == {"done"}, canonical([row["reason"] for row in rows])
    assert all(np.isfinite(row["scores"]["fd_digits"]) for row in rows)
    assert {row["speed"]["device"] for row in rows} == {torch.cuda.get_device_name()}
