"""The table of the benchmarks says what was read, and whether it was enough."""

import json

from table import Row, render


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {what.strip(): [cell.strip() for cell in rest] for what, *rest in rows}


def test_bars_are_met_or_not():
    assert Row("a", 8.0, "", 8).cells() == ["a", "8", "≥ 8", "yes"]
    assert Row("a", 7.99, "", 8).cells() == ["a", "7.99", "≥ 8", "**no**"]
    assert Row("a", 1.31, "s", high=1.3).cells() == ["a", "1.31 s", "≤ 1.3 s", "**no**"]
    assert Row("a", 20_864.4, "images/s").cells() == ["a", "20,864 images/s", "", ""]


def test_what_was_not_read_is_an_empty_cell(tmp_path):
    text = render(tmp_path)
    assert "| batch 256: (c) / (b) |  | ≥ 0.97 |  |" in text
    assert "**no**" not in text


def test_ratios_come_from_the_readings(tmp_path):
    rates = {
        "diffusers_fp32": 40.0,
        "diffusers_tf32": 99.0,
        "diffusers_bf16": 150.0,
        "by_hand": 400.0,
        "ours": 396.0,
        "ours_4": 380.0,
    }
    found = {
        "device": "some GPU",
        "torch": "2",
        "cuda": "13",
        "date": "2026-01-01",
        "ceiling": {"matrix_flops": 8e14, "flops": 1.24e10},
        "batch_256": {"batch": 256, "images_per_second": rates},
        "half_width": {"error": "RuntimeError: none"},
        "batch_1024": {"left_out": "no time"},
    }
    (tmp_path / "sampling.json").write_text(json.dumps(found))
    seven = {"plain": {"seven": 100.0}, "ours_7": {"images_per_second": 251.0, "step_seconds": 0.4}}
    seven["bound"] = {"seven": 300.0, "seconds": {"teacher": 0.1}}
    seven["tried"] = {"seven": 330.0}
    (tmp_path / "training.json").write_text(json.dumps(seven))
    text = render(tmp_path)
    table = cells(text)
    assert table["batch 256: (c) / (b)"] == ["0.99", "≥ 0.97", "yes"]
    assert table["batch 256: (d) / (c)"] == ["0.9596", "≥ 0.98", "**no**"]
    assert table["batch 256: (c) / (a fp32)"] == ["9.9", "≥ 8", "yes"]
    assert table["batch 256: (c) / (a fp32 with TF32)"][0] == "4"
    # 400 images of 50 evaluations of 12.4 GFLOP, of 800 TFLOP/s
    assert table["(b): share of the matrix rate"][0] == "31 %"
    assert table["7 students: ours / plain"] == ["2.51", "≥ 2.5", "yes"]
    assert table["7 students: ours / bound"] == ["0.8367", "≥ 0.9", "**no**"]
    assert table["7 students: the teacher's share of a step"][0] == "25 %"
    assert table["7 students: bound, cuDNN's algorithms tried out"][0] == "330 images/s"
    assert "- sampling, half_width: RuntimeError: none" in text
    assert "- sampling, batch_1024: no time" in text
    assert "- sampling: some GPU, torch 2, CUDA 13, 2026-01-01" in text
