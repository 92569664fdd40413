#!/usr/bin/env bash
# Every figure of benchmarks/README.md that needs a GPU, in at most nine minutes; the table comes last.
# OUT: where the readings go. PYTHON: the interpreter that has torch. REHEARSE=1: at toy size on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-results/bench}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/plugins${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
end=$((SECONDS + 530))
networks=(--device cuda) images=(--device cuda --images 50000)
[[ ${REHEARSE:-} ]] && networks=(--device cpu --small) images=(--device cpu --images 16)

# part NAME SECONDS COMMAND...: at most so long, and never beyond the end; what it has read by then is kept
part() {
  local name=$1 most=$2 left=$((end - SECONDS - 5))
  shift 2
  ((most > left)) && most=$left
  ((most < 10)) && { echo "$name: no time left" >&2; return; }
  echo "== $name, at most $most s" >&2
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || echo "$name: ended with status $?: $(tail -n 1 "$out/$name.log")" >&2
}

part sampling 245 "$python" benchmarks/sampling.py "${networks[@]}" --budget 190 --json "$out/sampling.json"
part training 200 "$python" benchmarks/training.py "${networks[@]}" --budget 160 --json "$out/training.json"
part scoring 80 "$python" benchmarks/scoring.py "${images[@]}" --json "$out/scoring.json"
part harness 60 "$python" benchmarks/harness.py --json "$out/harness.json"
if "$python" -c 'import pytest_benchmark' 2>/dev/null; then
  part overheads 60 "$python" -m pytest -q --no-cov benchmarks/test_overheads.py --benchmark-json "$out/overheads.json"
else
  echo "overheads: pytest-benchmark is not installed" >&2
fi
"$python" benchmarks/table.py "$out" | tee "$out/table.md"
