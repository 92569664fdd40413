"""The columns of ``results.csv`` beside the scores, whose names no metric may take."""

from __future__ import annotations

COLUMN = r"[a-z][a-z0-9_]*"
"""What the name of a score looks like."""

LEADING_COLUMNS = (
    *("cell", "status", "dataset", "teacher", "student", "method", "wrapper", "role", "baseline_of", "sampler"),
    *("steps", "nfe", "spacing", "clip", "guidance", "budget", "weights", "seed", "students", "edges", "calls"),
    *("prediction", "dtype", "device", "batch", "batch_per_student", "steps_per_student", "images_per_student"),
    *("images_total", "rounds_images", "params_total", "params_active", "macs_per_image", "speed_batch"),
    *("speed_compile", "speed_device", "samples", "reason"),
)
"""Columns before the scores, the same for every suite. A value for each expert is joined with semicolons.

``dtype`` is a suite's ``precision``, which would be the score of that name.
"""

TIMING_COLUMNS = (
    "train_seconds",
    "device_seconds",
    "shared_with",
    "images_per_second",
    "latency_ms_median",
    "latency_ms_p90",
    "peak_memory_mb",
)
"""Columns at the end, which differ from run to run; all others are the same, byte for byte, on the CPU.

``shared_with``: how many other students a row's students at most shared a pass of their teacher with; where it is not
0, the seconds before it hold equal parts of what was done for all.
"""

INCEPTION_COLUMNS = ("fid", "kid", "is", "precision", "recall")
"""Scores in the Inception network of 2015-12-05 and in no other, hence of the built-in metrics alone."""
