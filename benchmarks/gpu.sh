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
[[ ${REHEARSE:-} ]] && networks=(--device cpu --small --compile on) images=(--device cpu --images 16)

# part NAME SECONDS COMMAND...: at most so long, and never beyond the end; what it has read by then is kept
part() {
  local name=$1 most=$2 left=$((end - SECONDS - 5)) begun=$SECONDS
  shift 2
  ((most > left)) && most=$left
  ((most < 10)) && { echo "$name: no time left" >&2; return; }
  timeout "$most" "$@" >"$out/$name.log" 2>&1 || echo "$name: ended with status $?: $(tail -n 1 "$out/$name.log")" >&2
  echo "$name: $((SECONDS - begun)) s" >&2
}

# one after the other the compilations would take the time there is: here they are all made at once, and found below;
# what starts with empty caches is timed beside them
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$cache/inductor TRITON_CACHE_DIR=$cache/triton
# threads that wait for each other spin, and with more of them than cores each waits for all; five warm up here
cores=$(nproc)
few=(env OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 6 ? cores / 6 : 1))}")
# the graphs of the bound are those of our loop
part warm-training 170 "${few[@]}" "$python" benchmarks/training.py "${networks[@]}" --warm --parts bound &
compiled=(batch_256 half_width batch_1 batch_1024)
for one in "${compiled[@]}"; do
  part "warm-$one" 170 "${few[@]}" "$python" benchmarks/sampling.py "${networks[@]}" --warm --parts "$one" &
done
part startup 170 "$python" benchmarks/sampling.py "${networks[@]}" --parts startup --json "$out/startup.json" &
wait

part sampling 190 "$python" benchmarks/sampling.py "${networks[@]}" --parts ceiling "${compiled[@]}" --json "$out/sampling.json"
part scoring 140 "$python" benchmarks/scoring.py "${images[@]}" --json "$out/scoring.json"
part training 200 "$python" benchmarks/training.py "${networks[@]}" --json "$out/training.json"
"$python" benchmarks/table.py "$out" | tee "$out/table.md"
