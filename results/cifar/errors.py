"""The error over t of one wrapper's students as shares of another's, a line a seed.

``python results/cifar/errors.py WRAPPER OTHER [METHOD [STUDENT]]``: of the students that both have in
results.json, with output KD and of quarter width unless said otherwise.
"""

import json
import sys
from pathlib import Path

wrapper, other, method, student = [*sys.argv[1:], *("output", "quarter")[len(sys.argv) - 3 :]]
rows = json.loads(Path(__file__).with_name("results.json").read_text(encoding="utf-8"))["rows"]
# samplers share a student, hence its probe
probes = {
    (row["wrapper"], row["seed"]): row["probe"]
    for row in rows
    if row["probe"] and (row["student"], row["method"]) == (student, method)
}
for name, seed in probes:
    if name == wrapper and (other, seed) in probes:
        mine, theirs = probes[wrapper, seed], probes[other, seed]
        shares = zip(mine["t"], mine["error"], theirs["error"], strict=True)
        print(f"seed {seed}:", *(f"{t} {a / b:.2f}" for t, a, b in shares), sep="  ")
