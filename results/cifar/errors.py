"""The error over t of one wrapper's students as shares of another's, a line a seed.

``python results/cifar/errors.py WRAPPER OTHER [METHOD]``: of the quarter-width students that both have in results.json.
"""

import json
import sys
from pathlib import Path

wrapper, other, method = [*sys.argv[1:], "output"][:3]
rows = json.loads(Path(__file__).with_name("results.json").read_text(encoding="utf-8"))["rows"]
# samplers share a student, hence its probe
probes = {
    (row["wrapper"], row["seed"]): row["probe"]
    for row in rows
    if row["probe"] and (row["student"], row["method"]) == ("quarter", method)
}
for name, seed in probes:
    if name == wrapper and (other, seed) in probes:
        mine, theirs = probes[wrapper, seed], probes[other, seed]
        shares = zip(mine["t"], mine["error"], theirs["error"], strict=True)
        print(f"seed {seed}:", *(f"{t} {a / b:.2f}" for t, a, b in shares), sep="  ")
