"""An exported cell: opened by diffusers with and without us, it draws the harness's images."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file
from toy import EVERYTHING, ToyRun, session

from o2mkd_bench import UserError, pipeline
from o2mkd_bench.cli import main
from o2mkd_bench.core.events import silent
from o2mkd_bench.core.grid import time_grid
from o2mkd_bench.core.plugins import registry
from o2mkd_bench.core.schedule import NoiseSchedule
from o2mkd_bench.core.store import Store
from o2mkd_bench.engine.router import as_epsilon
from o2mkd_bench.engine.sample import run_program, to_uint8
from o2mkd_bench.export import assemble, check_alike, export, table, unfinished
from o2mkd_bench.pipeline import O2MKDDenoiser, O2MKDPipeline, O2MKDScheduler
from o2mkd_bench.stages.bench import Bench
from o2mkd_bench.stages.samples import noise_source, solver

IMAGES = 6


@pytest.fixture(scope="module", autouse=True)
def calm():
    """Progress bars, and advice to install another package, are no warnings of ours."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()


def cell_of(run: ToyRun, wrapper: str):
    return next(cell for cell in run.session.plan.cells if cell.labels["wrapper"].startswith(wrapper))


@pytest.fixture(scope="module")
def two(toy_run, tmp_path_factory) -> Path:
    """K = 2 on a trailing grid, students that predict v."""
    return export(toy_run.session, cell_of(toy_run, "o2mkd"), tmp_path_factory.mktemp("exports") / "two")


def noise(run: ToyRun, cell) -> torch.Tensor:
    """The noise of the harness's first images."""
    spec = run.session.plan.stages[cell.samples].spec
    return noise_source(spec["seed"], tuple(spec["shape"]))(torch.arange(IMAGES), 0)


def drawn(run: ToyRun, cell) -> torch.Tensor:
    """What the harness makes of it, in [0, 1]."""
    stage = run.session.plan.stages[cell.samples]
    spec, students = stage.spec, stage.needs["students"]
    bench = Bench(run.session.store, "cpu", silent, run.session.registry)
    schedule = bench.schedule(students[0])
    router = bench.router(students, spec["edges"], spec["weights"], "fp32")
    denoise = as_epsilon(router, schedule, bench.network(students[0])["prediction"])
    program = solver(spec, schedule, run.session.registry)
    last = run_program(program, schedule, denoise, noise(run, cell), lambda i: pytest.fail("no noise is asked for"))
    return (last.clamp(-1, 1) + 1) / 2


# ---- images --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrapper", "count"), [("single", 1), ("o2mkd", 2), ("", 1)])
def test_its_images_are_those_of_the_harness(toy_run, tmp_path, wrapper, count):
    cell = cell_of(toy_run, wrapper) if wrapper else toy_run.session.plan.cells[0]
    assert cell.facts["spacing"] == "trailing"
    opened = O2MKDPipeline.from_pretrained(export(toy_run.session, cell, tmp_path / "out"))
    assert len(opened.denoiser.experts) == count
    assert opened.denoiser.dtype == torch.float32
    images = opened(latents=noise(toy_run, cell), output_type="pt").images
    torch.testing.assert_close(images, drawn(toy_run, cell), atol=1e-4, rtol=0)
    # and those that were scored; a batch of another size may round the other way
    scored = np.load(Store(toy_run.store).read(cell.samples, "images.npy"))[:IMAGES].astype(int)
    assert np.abs(to_uint8(images * 2 - 1).numpy().astype(int) - scored).max() <= 1
    assert images.std() > 0.05


STRANGER = """
import sys
sys.modules["o2mkd_bench"] = None
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
try:
    DiffusionPipeline.from_pretrained("two", custom_pipeline="two")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code was run without leave")
latents = torch.load("latents.pt", weights_only=True)
def draw(folder, name):
    opened = DiffusionPipeline.from_pretrained(folder, custom_pipeline=name, trust_remote_code=True)
    return opened, opened(latents=latents, output_type="pt").images
opened, images = draw("two", "two")
assert torch.equal(images, draw("two", "pipeline")[1])
opened.save_pretrained("again")
assert torch.equal(images, draw("again", "again")[1])
torch.save(images, "images.pt")
"""


def test_a_stranger_without_the_harness_opens_it(toy_run, two):
    cell, folder = cell_of(toy_run, "o2mkd"), two.parent
    torch.save(noise(toy_run, cell), folder / "latents.pt")
    env = {**os.environ, "HF_HOME": str(folder / "home"), "DIFFUSERS_VERBOSITY": "error", "OMP_NUM_THREADS": "1"}
    env.pop("HF_MODULES_CACHE", None)
    code = [sys.executable, "-c", STRANGER]
    done = subprocess.run(code, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    images = torch.load(folder / "images.pt", weights_only=True)
    torch.testing.assert_close(images, drawn(toy_run, cell), atol=1e-4, rtol=0)
    theirs = {p.relative_to(folder / "again") for p in (folder / "again").rglob("*") if p.is_file()}
    assert theirs == {p.relative_to(two) for p in two.rglob("*") if p.is_file()}
    indices = [json.loads((place / "model_index.json").read_text()) for place in (two, folder / "again")]
    assert indices[1] == {**indices[0], "_name_or_path": "two"}
    for name in (
        "pipeline.py",
        "README.md",
        "scheduler/scheduler_config.json",
        "denoiser/1/diffusion_pytorch_model.safetensors",
    ):
        assert (folder / "again" / name).read_bytes() == (two / name).read_bytes(), name


def test_the_pipeline_needs_nothing_but_torch_and_diffusers():
    found = set()
    for node in ast.walk(ast.parse(Path(pipeline.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            found.add(str(node.module).partition(".")[0])
    assert found - sys.stdlib_module_names == {"torch", "diffusers", "huggingface_hub"}


def test_each_denoiser_is_a_diffusers_model_of_its_own(toy_run, two):
    stage = toy_run.session.plan.stages[cell_of(toy_run, "o2mkd").samples]
    for k, name in enumerate(stage.needs["students"]):
        network = UNet2DModel.from_pretrained(two / "denoiser" / str(k), use_safetensors=True)
        stored = load_file(toy_run.session.store.read(name, f"{stage.spec['weights']}.safetensors"))
        assert stored.keys() == network.state_dict().keys()
        assert all(torch.equal(value, stored[key]) for key, value in network.state_dict().items())


def test_output_types_and_noise(two):
    opened = O2MKDPipeline.from_pretrained(two)
    one, other = (opened(3, generator=torch.Generator().manual_seed(s), output_type="np").images for s in (1, 2))
    assert one.shape == (3, 8, 8, 1)
    assert 0 <= one.min() < one.max() <= 1
    assert not np.array_equal(one, other)
    (pictures,) = opened(3, generator=torch.Generator().manual_seed(1), return_dict=False)
    assert np.array_equal(np.stack([np.asarray(p) for p in pictures]), (one[..., 0] * 255).round().astype(np.uint8))


def test_another_scheduler_takes_its_place(two):
    opened = O2MKDPipeline.from_pretrained(two)
    own = opened.scheduler.config
    keys = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    opened.scheduler = DDIMScheduler(**{key: own[key] for key in keys}, timestep_spacing="trailing")
    images = opened(2, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    assert images.isfinite().all()
    assert opened.config.scheduler[0] == "diffusers"


# ---- the solver ----------------------------------------------------------------------------------------------------

SCHEDULE = NoiseSchedule()
SAMPLERS = [
    ("ddim", {}, "x0"),
    ("ddim", {"eta": 1.0}, "none"),
    ("ddpm", {}, "x0+epsilon"),
    ("dpm_solver", {"order": 3}, "none"),
]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("name", "options", "clip"), SAMPLERS)
def test_the_scheduler_runs_programs_as_the_harness_does(tmp_path, name, options, clip, prediction):
    plugin = registry().get("samplers", name)
    program = plugin.load()(plugin.parse(options)).program(SCHEDULE, time_grid("trailing", 7, 1000), (400,), clip)
    program = replace(program, start=1.25)
    # through the file: no digit may be lost
    O2MKDScheduler(table(program, SCHEDULE), prediction, program.clip, program.start).save_pretrained(tmp_path)
    scheduler = O2MKDScheduler.from_pretrained(tmp_path)
    draws = torch.randn(9, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def network(x: torch.Tensor, t: int) -> torch.Tensor:
        return torch.tanh(x.roll(1, -1)) * (0.5 + t / 2000)

    def epsilon(x: torch.Tensor, t: int) -> torch.Tensor:
        a, s = (torch.tensor(float(v[t])) for v in (SCHEDULE.alpha, SCHEDULE.sigma))
        said = network(x, t)
        return {"epsilon": said, "v_prediction": s * x + a * said, "sample": (x - a * said) / s}[prediction]

    expected = run_program(program, SCHEDULE, epsilon, draws[0], lambda i: draws[i + 1])
    for _ in range(2):
        scheduler.set_timesteps(program.nfe)
        assert scheduler.timesteps.tolist() == [line.t for line in program.lines]
        x = draws[0] * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            seen = scheduler.scale_model_input(x, t)
            x = scheduler.step(network(seen, int(t)), t, x, variance_noise=draws[i + 1]).prev_sample
        assert torch.equal(x, expected)
        assert not any(scheduler._known.values()), "nothing is held that no line asks for again"


def test_fresh_noise_comes_from_the_generator():
    scheduler = O2MKDScheduler(
        [{"t": 5, "alpha": 0.8, "sigma": 0.6, "states": [], "epsilon": [], "x0": [], "noise": 2}]
    )
    x = torch.zeros(1, 1, 2, 2)
    (found,) = scheduler.step(x, 5, x, generator=torch.Generator().manual_seed(3), return_dict=False)
    assert torch.equal(found, 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)))
    assert (scheduler.step_index, len(scheduler)) == (1, 1000)


def test_the_scheduler_says_what_it_cannot_do(two):
    scheduler = O2MKDScheduler.from_pretrained(two, subfolder="scheduler")
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="evaluates its network 2 times, not 50"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match="step 0 at timestep 3: timestep 999 comes next"):
        scheduler.step(x, 3, x)
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match="the program has ended; call set_timesteps"):
        scheduler.step(x, 0, x)


def test_the_denoiser_routes_by_interval(two):
    denoiser = O2MKDDenoiser.from_pretrained(two, subfolder="denoiser")
    assert [denoiser.route(t) for t in (0, 499, 499.5, 500, torch.tensor(999))] == [0, 0, 0, 1, 1]
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        denoiser(x, torch.tensor([499, 0])).sample, denoiser.experts[0](x, torch.tensor([499, 0])).sample
    )
    with pytest.raises(ValueError, match="lie in 2 intervals"):
        denoiser(x, torch.tensor([499, 500]))
    with pytest.raises(ValueError, match=r"2 denoisers do not fit the inner edges \[5, 3\]"):
        O2MKDDenoiser(list(denoiser.experts), [5, 3], [1, 8, 8])


# ---- what is written -----------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_how_to_open_it(toy_run, two, monkeypatch):
    text = (two / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "diffusers"
    row = next(r for r in toy_run.results.document["rows"] if r["wrapper"].startswith("o2mkd"))
    assert row["cell"] in text
    score = next(line for line in text.splitlines() if line.startswith("| `fd_digits` |"))
    assert score.startswith(f"| `fd_digits` | {row['scores']['fd_digits']:.6g} | lower | embedded:digits | 640 |")
    assert "| rounding uint8 round; resize none |" in score
    for line in ("| teacher | tiny |", "| budget | 256 |", "| `denoiser/1` | [500, 1000) | 1 | UNet2DModel |"):
        assert line in text
    assert "2 students, each in charge of an interval" in text
    first, second = (block.partition("```")[0] for block in text.split("```python\n")[1:])
    assert "trust_remote_code=True" in first
    compile(first, "card", "exec")
    monkeypatch.chdir(two.parent)
    found: dict = {}
    exec(second, found)
    assert len(found["images"]) == 4


def test_the_card_of_a_teacher_and_of_a_score_that_could_not_be_had(toy_run, tmp_path):
    session_ = toy_run.session
    text = (export(session_, session_.plan.cells[0], tmp_path / "t") / "README.md").read_text(encoding="utf-8")
    assert "a teacher that others were distilled from" in text
    assert "| method |" not in text
    store = Store(shutil.copytree(toy_run.store, tmp_path / "store"))
    cell = cell_of(toy_run, "single")
    store.discard(cell.scores[0], "for the test")
    store.fail(cell.scores[0], "score", "no weights here", "unavailable")
    text = (export(session(EVERYTHING, store.root), cell, tmp_path / "u") / "README.md").read_text(encoding="utf-8")
    assert "Not measured: no weights here." in text
    assert "One student distilled from" in text


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_stored_as_asked(toy_run, tmp_path, name, dtype):
    cell = cell_of(toy_run, "single")
    folder = export(toy_run.session, cell, tmp_path / name, name)
    stored = load_file(folder / "denoiser" / "0" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    opened = O2MKDPipeline.from_pretrained(folder).to(dtype)
    assert opened.denoiser.dtype == dtype
    assert f").to({dtype})\n" in (folder / "README.md").read_text(encoding="utf-8")
    images = opened(latents=noise(toy_run, cell), output_type="pt").images
    assert images.dtype == torch.float32
    assert (images - drawn(toy_run, cell)).abs().mean() < 0.02


def test_push_to_hub_uploads_the_whole_folder_with_its_card(two, tmp_path, monkeypatch):
    asked = []

    def create_repo(repo_id, **options):
        asked.append((repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload_folder(*, repo_id, folder_path, **options):
        asked.append((repo_id, options))
        return shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(pipeline, "create_repo", create_repo)
    monkeypatch.setattr(pipeline, "upload_folder", upload_folder)
    opened = O2MKDPipeline.from_pretrained(two)
    far = opened.push_to_hub("two", private=True, token="t")
    assert asked == [
        ("two", {"private": True, "token": "t", "exist_ok": True}),
        ("me/two", {"token": "t", "commit_message": "Upload O2MKDPipeline", "create_pr": False}),
    ]
    files = {p.relative_to(two) for p in two.rglob("*") if p.is_file()}
    assert {p.relative_to(far) for p in far.rglob("*") if p.is_file()} == files
    assert (far / "README.md").read_bytes() == (two / "README.md").read_bytes()
    # the Hub's way of finding the code of a part: its module, in its own folder
    index = json.loads((far / "model_index.json").read_text(encoding="utf-8"))
    for part in ("denoiser", "scheduler"):
        assert (far / part / f"{index[part][0]}.py").read_text(encoding="utf-8") == pipeline.SOURCE
    opened.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="other", commit_message="once more")
    assert asked[-1][0] == "me/other"
    assert asked[-1][1]["commit_message"] == "once more"


def test_without_a_card_none_is_made_up(toy_run, tmp_path):
    assemble(toy_run.session, cell_of(toy_run, "single")).save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare" / "README.md").exists()
    O2MKDPipeline.from_pretrained(tmp_path / "bare").save_pretrained(tmp_path / "bare")


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_networks_that_diffusers_cannot_call_alone_are_refused(toy_run):
    family = Bench(toy_run.session.store, "cpu", silent, toy_run.session.registry).family(
        {"family": {"name": "unet2d"}}
    )
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    check_alike(network, family, (1, 8, 8), "student s")

    class Other:
        """A family that calls its networks in another way."""

        def forward(self, network, x, t, condition=None):
            return 2 * x

        def condition_shape(self, network):
            return None

    with pytest.raises(UserError, match="student s is a UNet2DModel that is called with more than"):
        check_alike(network, Other(), (1, 8, 8), "student s")
    network.forward = lambda sample, timestep, prompt, return_dict=True: (2 * sample,)
    with pytest.raises(UserError, match="student s is a UNet2DModel that is called with more than"):
        check_alike(network, Other(), (1, 8, 8), "student s")
    with pytest.raises(UserError, match="student s is a Conv2d, which is no class of diffusers"):
        check_alike(torch.nn.Conv2d(1, 1, 1), Other(), (1, 8, 8), "student s")


@pytest.fixture
def call(toy_run, tmp_path, monkeypatch, capsys):
    """The verb in an empty folder, with the toy suite as a file and its store."""
    monkeypatch.chdir(tmp_path)
    Path("toy.yaml").write_text(yaml.safe_dump(EVERYTHING), encoding="utf-8")

    def run(*words: object, store: Path = toy_run.store) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["export", *map(str, words), "--store", str(store)])
        return stopped.value.code, *capsys.readouterr()

    return run


def test_the_verb_writes_the_folder(toy_run, call):
    cell = cell_of(toy_run, "o2mkd").identity
    Path("out").mkdir()
    code, out, err = call(cell[:8], "out", "--suite", "toy.yaml", "--dtype", "bf16")
    assert (code, out.endswith("in out; out/README.md says how to open it\n")) == (0, True), err
    assert sorted(p.name for p in Path("out").iterdir()) == [
        "README.md", "denoiser", "model_index.json", "pipeline.py", "scheduler",
    ]  # fmt: skip
    assert sorted(p.name for p in Path().iterdir()) == ["out", "toy.yaml"]


def test_an_unknown_cell_is_one_sentence_with_those_most_like_it(toy_run, call):
    cell = cell_of(toy_run, "o2mkd")
    wrong = cell.identity[:7] + "z"
    for words in ((wrong, "out", "--suite", "toy.yaml"), ("o2mkd progressive", "out", "--suite", "toy.yaml")):
        code, out, err = call(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: the suite has no cell {words[0]}, most like it are {cell.identity[:8]} (digits")
    folder = Path("results/toy")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(toy_run.results.document), encoding="utf-8")
    code, out, err = call(wrong, "out")
    assert (code, err.count("\n")) == (2, 1)
    assert f"has a cell {wrong}, most like it are {cell.identity[:8]} (digits / tiny / half" in err
    assert not Path("out").exists()


def test_an_unfinished_cell_is_one_sentence(toy_run, call, tmp_path):
    store = Store(shutil.copytree(toy_run.store, tmp_path / "store"))
    cell, other = cell_of(toy_run, "o2mkd"), cell_of(toy_run, "single")
    store.discard(cell.samples, "for the test")
    code, out, err = call(cell.identity, "out", "--suite", "toy.yaml", store=store.root)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"cell {cell.identity[:8]} ({cell.describe()}) is not finished: samples digits" in err
    assert f"of the finished ones, most like it are {other.identity[:8]}" in err
    assert not Path("out").exists()
    with pytest.raises(UserError, match=r"is not finished: .*; run its suite first"):
        export(session(EVERYTHING, store.root), cell, tmp_path / "out")
    code, _, err = call(cell.identity, "out", "--suite", "toy.yaml", store=tmp_path / "none")
    assert (code, err.rstrip().endswith("of the finished ones there is none")) == (2, True)


def test_a_speed_reading_of_another_machine_is_no_condition(toy_run, tmp_path):
    store = Store(shutil.copytree(toy_run.store, tmp_path / "store"))
    cell = cell_of(toy_run, "single")
    store.discard(cell.speed, "for the test")
    found = session(EVERYTHING, store.root)
    assert unfinished(found, cell) == ""
    assert "| images a second |" not in (export(found, cell, tmp_path / "out") / "README.md").read_text(
        encoding="utf-8"
    )
    store.discard(found.plan.stages[cell.samples].needs["students"][0], "for the test")
    assert " is not in " in unfinished(session(EVERYTHING, store.root), cell)
    waiting = replace(cell, samples="", identity="", unresolved="a hub teacher is not here")
    assert unfinished(found, waiting).endswith("is not finished: a hub teacher is not here")


def test_a_folder_that_is_taken_is_refused(toy_run, call, tmp_path, monkeypatch):
    cell = cell_of(toy_run, "single")
    Path("full").mkdir()
    Path("full/mine").write_text("x")
    for name, said in (("full", "full is not empty; name"), ("toy.yaml", "toy.yaml is no folder; name")):
        code, _, err = call(cell.identity, name, "--suite", "toy.yaml")
        assert (code, err.count("\n")) == (2, 1)
        assert said in err
    assert [p.name for p in Path("full").iterdir()] == ["mine"]

    # somebody else takes it meanwhile
    def taken(*_: object) -> bool:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "theirs").touch()
        return False

    monkeypatch.setattr("o2mkd_bench.export.renamed", taken)
    with pytest.raises(UserError, match="new is not empty"):
        export(toy_run.session, cell, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "new", "toy.yaml"]


def test_a_failure_leaves_nothing(toy_run, tmp_path, monkeypatch):
    monkeypatch.setattr("o2mkd_bench.export.assemble", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(toy_run.session, cell_of(toy_run, "single"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_help_has_an_example(call, capsys):
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    assert "Example: o2mkd-bench export" in " ".join(capsys.readouterr().out.split())
