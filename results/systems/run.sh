#!/usr/bin/env bash
# Every figure of results/systems/README.md on one GPU, in at most nine minutes; a system that fails loses only itself.
#
#   results/systems/run.sh                the readings, then the table
#   results/systems/run.sh SYSTEM...      cifar, lsun_church (celebahq is the same network), coco30k
#   REHEARSE=1 results/systems/run.sh     at toy size on the CPU, into a folder that is removed after
#
# OUT: where readings and table go (results/systems). PYTHON: the interpreter that has torch.
set -uo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-results/systems}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/plugins${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
how=(--device cuda)
if [[ ${REHEARSE:-} ]]; then
  out=$(mktemp -d) && trap 'rm -rf "$out"' EXIT
  how=(--device cpu --small)
fi
mkdir -p "$out"
declare -A most=([cifar]=80 [lsun_church]=180 [coco30k]=260)
systems=("$@")
((${#systems[@]})) || systems=(cifar lsun_church coco30k)
failed=0
for system in "${systems[@]}"; do
  begun=$SECONDS
  timeout "${most[$system]}" "$python" benchmarks/systems.py "$system" "${how[@]}" --json "$out/$system.json" \
    >"$out/$system.log" 2>&1 || { failed=1; echo "$system: $(tail -n 1 "$out/$system.log")" >&2; }
  echo "$system: $((SECONDS - begun)) s" >&2
done
"$python" benchmarks/systems.py --table "$out" && cat "$out/README.md"
exit $failed
