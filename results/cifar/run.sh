#!/usr/bin/env bash
# Remakes the table of results/cifar on one GPU, in slices of at most nine minutes. The same call goes on where it
# stopped.
#
#   results/cifar/run.sh list             every slice: seconds it should take, and its command
#   results/cifar/run.sh SLICE...         these, then the table of all there is; patterns such as 'headline-*' too
#   results/cifar/run.sh                  all of them, in the order of the list
#   results/cifar/run.sh report           the table alone: of the slices, and of what OUT has from other machines
#   results/cifar/run.sh out|in FOLDER    finished stages into FOLDER in parts of 16 MB, and from there into the store
#
# CIFAR_TEACHER, CIFAR10_ROOT: see suites/cifar_local.yaml. SUITE: another suite, such as suites/cifar.yaml.
# WORK: the store and the compiler's caches (.o2mkd/cifar). OUT: tables and pictures (results/cifar).
# LIMIT: seconds a slice. STUDENTS, SEEDS: of the slices ("half quarter", "0 1 2").
# REHEARSE=1: the slices at toy size on the CPU, in a folder that is removed after unless WORK is given, with
# STUDENTS=quarter and SEEDS=0 unless they are.
#
# What the seconds come from. On one H200 the compiled teacher makes 20,900 evaluations/s, the half-width student
# 44,900. Training is reckoned from them, per image of a stream: the teacher 48 us, an arm (one student, or the K of an
# o2mkd row) of half width 90 us, of quarter width 50 us. None of the three was measured in training.
#   819,200 images, both widths, one student and K = 4: 0.82 M x (48 + 2 x 90 + 2 x 50 us) = 270 s, 3,000 images/s
#   the same, half width alone: 190 s, 4,400 images/s; quarter width alone: 120 s, 6,800 images/s
# Drawing 5,000 images with DDIM 10/20/50 and DPM-Solver++ 10/20 is 550,000 evaluations: the teacher 28 s, a row of
# half width 14 s, of quarter width 8 s; 2.5 s a cell for loading, capturing and scoring; 3 s a probe; 30 s to start
# Python, read the teacher and the data. Compilation, in three processes at once and first of all: 130 s on a fresh
# machine, whose cache WORK/inductor holds from then on. Where training gives less than 2,200 images/s a headline slice
# of both widths no longer fits: take STUDENTS=half and STUDENTS=quarter one after the other, in one store.
set -uo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/../.."
root=$PWD
suite=${SUITE:-suites/cifar_local.yaml}
tuning=results/cifar/tuning.yaml
work=${WORK:-.o2mkd/cifar}
out=${OUT:-results/cifar}
limit=${LIMIT:-540}
students=${STUDENTS:-half quarter}
seeds=${SEEDS:-0 1 2}
tuning_seeds="100 101 102"
warm_images=5120
# results/cifar/tuning.yaml lies elsewhere than the suite, and paths in a suite are relative to it
export CIFAR10_ROOT=${CIFAR10_ROOT:-$root/data/cifar10-jpeg.tar.xz}
export CIFAR_TEACHER=${CIFAR_TEACHER:-$root/data/ddpm-cifar10-jpeg}
export PYTHONUNBUFFERED=1

# toy FOLDER: a teacher of a few channels, 300 random images, and both suites in the size for them
toy() {
  python3 - "$1" <<'PY'
import sys
from pathlib import Path

import numpy as np
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

folder = Path(sys.argv[1])
draw = np.random.default_rng(0)
for split, count in (("train", 30), ("test", 6)):
    for name in "abcdefghij":
        place = folder / "data" / split / name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i:04}.png")
network = UNet2DModel(
    sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=8,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), attention_head_dim=2,
)
DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder / "teacher")
PY
  for name in suite tuning; do
    cat >"$1/$name.yaml" <<YAML
extends: $root/${!name}
device: cpu
precision: fp32
training: {batch: 160}
sampling: {images: 1280, teacher_steps: [2]}
speed: {batch: 8, repeats: 1}
probe: {points: 3, images: 32}
YAML
  done
  cat >>"$1/suite.yaml" <<'YAML'
samplers: [{ddim: {steps: 1}}, {dpm_solver: {steps: 1}}, {progressive: {steps: [1, 2], start: 4}, label: progressive}]
budgets: [{name: 819k, images: 960}, {name: 1638k, images: 1920}]
# rules that name steps have nothing to say here
exclude: [{sampler: progressive, weights: raw}, {student: half, wrapper: [o2mkd-8-per-student, single-8x]}]
YAML
  cat >>"$1/tuning.yaml" <<'YAML'
samplers: [{ddim: {steps: 1}}]
budgets: [{name: 410k, images: 960}]
YAML
}

if [[ ${REHEARSE:-} && ${1:-} != list ]]; then
  [[ ${WORK:-} ]] || { work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT; }
  mkdir -p "$work"
  work=$(realpath "$work") students=${STUDENTS:-quarter} seeds=${SEEDS:-0} tuning_seeds=100 warm_images=960
  [[ -e $work/suite.yaml ]] || toy "$work" || exit
  export CIFAR10_ROOT=$work/data CIFAR_TEACHER=$work/teacher
  suite=$work/suite.yaml tuning=$work/tuning.yaml out=${OUT:-$work/results}
fi
store=$work/store
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton

comma() { local IFS=,; echo "$*"; }

# shown WORD...: a command as one would type it
shown() {
  local word line=()
  for word; do [[ $word =~ ^[A-Za-z0-9_./=,+:-]+$ ]] && line+=("$word") || line+=("${word@Q}"); done
  echo "${line[*]}"
}

# wanted NAME: whether the command line asks for a slice
wanted() {
  local pattern
  ((${#asked[@]})) || return 0
  # shellcheck disable=SC2053
  for pattern in "${asked[@]}"; do [[ $1 == $pattern ]] && return 0; done
  return 1
}

# slice NAME SECONDS SUITE ARGUMENT...: print its command, and run it if it is asked for
found=0 failed=0
slice() {
  local name=$1 seconds=$2 file=$3 begun status
  shift 3
  wanted "$name" || return 0
  found=1
  local command=(o2mkd-bench run "$file" "$@" --store "$store" --out "$work/slices/$name")
  echo "# $name: about $seconds s"
  shown "${command[@]}"
  [[ $listing ]] && return 0
  begun=$SECONDS
  warm
  timeout --foreground --signal=INT --kill-after=30 $((limit - SECONDS + begun)) "${command[@]}"
  status=$?
  ((status == 124)) && echo "$name: cut after $limit s; the same call goes on" >&2
  if ((status)); then
    failed=1
    # what it had finished by then
    o2mkd-bench report "$file" "$@" --store "$store" --out "$work/slices/$name" >/dev/null
  fi
  mkdir -p "$out"
  printf '%s\t%s\t%s s\tstatus %s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$name" $((SECONDS - begun)) "$status" \
    "$(machine)" "$(shown "${command[@]}")" >>"$out/runs.tsv"
}

machine() { nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | grep . || uname -m; }

# Compile everything the headline needs at once, on as many cores as there are; the slices then find it in the cache.
# What else this makes, data, teacher and reference, they need anyway.
warm() {
  [[ -e $work/warm ]] && return
  local tiny=(o2mkd-bench run "$suite" --store "$store" --set seeds=[0] --set methods=[output]
    --set "budgets=[{name: warm, images: $warm_images}]" --set 'samplers=[{ddim: {steps: 2}}]'
    --set sampling.images=1280 --set sampling.teacher_steps=[]
    --set 'wrappers=[single, {o2mkd: {students: 4}}]' --set baselines=[] --set exclude=[])
  local begun=$SECONDS student name done=yes
  local -A pids=()
  mkdir -p "$work"
  for student in $students; do
    # raw weights alone: a teacher has none, and its row stays away
    timeout "$limit" "${tiny[@]}" --set include=[] --set sampling.weights=[raw] --only weights=raw \
      --only student="$student" --out "$work/warm-$student" >"$work/warm-$student.log" 2>&1 &
    pids[$student]=$!
  done
  timeout "$limit" "${tiny[@]}" --set 'include=[{student: nobody}]' --out "$work/warm-teacher" \
    >"$work/warm-teacher.log" 2>&1 &
  pids[teacher]=$!
  for name in "${!pids[@]}"; do
    wait "${pids[$name]}" || { done=''; echo "compiling $name: $(tail -n 1 "$work/warm-$name.log")" >&2; }
  done
  [[ $done ]] && touch "$work/warm"
  echo "compiled in $((SECONDS - begun)) s" >&2
}

# main SECONDS NAME ARGUMENT...: a slice of the suite, without speeds: those are read once, for all seeds and methods
main() {
  local seconds=$1 name=$2
  shift 2
  slice "$name" "$seconds" "$suite" "$@" --set speed.enabled=false
}

slices() {
  local seed student both
  both=$(comma $students)
  local headline=(--only method=output --only wrapper=single,o2mkd-4 --only budget=819k --only sampler=ddim,dpm_solver)
  local pair=("${headline[@]:2}")

  # the teacher alone: its ladder, and what `expect:` in suites/cifar_local.yaml is to say
  main 110 teacher --set 'include=[{student: nobody}]' --only seed=0
  for seed in $seeds; do
    main 440 "headline-$seed" "${headline[@]}" --only weights=ema --only student="$both" --only seed="$seed"
  done
  slice speed 200 "$suite" "${headline[@]}" --only weights=ema --only student="$both" --only seed=0
  # needs the students of the headline in the store, else it trains them anew
  main 310 raw "${headline[@]}" --only weights=raw --only student="$both" --only seed="$(comma $seeds)"

  local students_and_edges=o2mkd-2,o2mkd-8,o2mkd-2-snr,o2mkd-4-snr,o2mkd-8-snr
  local output=(--only method=output --only budget=819k)
  # their baseline is the one student of the headline, which is not to be trained again where its store is gone
  local lone=("${output[@]}" --set baselines=[])
  for seed in $seeds; do
    for student in $students; do
      local own=(--only student="$student" --only seed="$seed")
      main "$(of "$student" 450 300)" "edges-$student-$seed" "${lone[@]}" --only wrapper=$students_and_edges "${own[@]}"
    done
  done
  for seed in $seeds; do
    # its speeds are its own, as each seed has other edges
    slice "auto-$seed" 280 "$suite" "${lone[@]}" --only wrapper=o2mkd-4-auto --only student="$both" \
      --only seed="$seed"
  done
  slice speed-edges 240 "$suite" "${lone[@]}" --only wrapper=$students_and_edges --only student="$both" \
    --only seed=0
  for seed in $seeds; do
    for student in $students; do
      own=(--only student="$student" --only seed="$seed")
      main "$(of "$student" 390 280)" "controls-$student-$seed" "${lone[@]}" \
        --only wrapper=single-snr-law,single-normalised,o2mkd-4-snr-equal "${own[@]}"
      main "$(of "$student" 380 280)" "spending-$student-$seed" "${lone[@]}" \
        --only wrapper=o2mkd-4-scratch,o2mkd-4-full,o2mkd-4-generalists "${own[@]}"
    done
  done
  for seed in $seeds; do
    for student in $students; do
      own=(--only student="$student" --only seed="$seed")
      main "$(of "$student" 440 300)" "features-$student-$seed" --only method=output+feature,feature "${pair[@]}" \
        "${own[@]}"
      main "$(of "$student" 440 300)" "relations-$student-$seed" --only method=relation,none "${pair[@]}" "${own[@]}"
    done
  done
  for seed in $seeds; do
    for student in $students; do
      own=(--only student="$student" --only seed="$seed")
      main "$(of "$student" 390 270)" "each-2-$student-$seed" "${output[@]}" --only wrapper=o2mkd-2-per-student \
        "${own[@]}"
      # of half width 650 s: the limit cuts it, and the same call goes on on the same machine
      main "$(of "$student" 650 440)" "each-4-$student-$seed" "${output[@]}" --only wrapper=o2mkd-4-per-student \
        "${own[@]}"
      main "$(of "$student" 500 370)" "times-4-$student-$seed" "${output[@]}" --only wrapper=single-4x "${own[@]}"
    done
  done
  for seed in $seeds; do
    for student in $students; do
      own=(--only student="$student" --only seed="$seed")
      main "$(of "$student" 440 300)" "longer-$student-$seed" --only method=output --only wrapper=single,o2mkd-4 \
        --only budget=1638k "${own[@]}"
      main "$(of "$student" 300 220)" "progressive-$student-$seed" "${output[@]}" --only wrapper=single,o2mkd-4 \
        --only sampler=progressive "${own[@]}"
    done
  done
  # eight times the budget: two calls each
  if [[ " $students " == *" quarter "* ]]; then
    for seed in $seeds; do
      own=(--only student=quarter --only seed="$seed")
      main 780 "each-8-quarter-$seed" "${output[@]}" --only wrapper=o2mkd-8-per-student "${own[@]}"
      main 690 "times-8-quarter-$seed" "${output[@]}" --only wrapper=single-8x "${own[@]}"
    done
  fi
  # the speeds of what is left share what is read above, save progressive's
  for seed in $tuning_seeds; do
    slice "tuning-$seed" 490 "$tuning" --only seed=$seed
  done
}

# of STUDENT HALF QUARTER: the seconds that belong to a width
of() { [[ $1 == half ]] && echo "$2" || echo "$3"; }

# merged SUITE OUT [SLICE...]: the table of a suite in OUT: what the store has of it, the slices, and what OUT had before
merged() {
  local file=$1 place=$2 plan=$work/plan/$(basename "$1" .yaml)
  shift 2
  [[ -e $place/results.json ]] && set -- "$@" "$place"
  # the plan comes first: it has every cell, in its order, those that nobody has made too
  o2mkd-bench report "$file" --store "$store" --out "$plan" >/dev/null && o2mkd-bench report "$plan" "$@" --out "$place"
}

report() {
  shopt -s nullglob
  local every=("$work"/slices/*/results.json) main=() tuned=() path
  for path in "${every[@]%/results.json}"; do [[ ${path##*/} == tuning-* ]] && tuned+=("$path") || main+=("$path"); done
  merged "$suite" "$out" "${main[@]}" || return
  ((${#tuned[@]})) || return 0
  merged "$tuning" "$out/tuning" "${tuned[@]}" >/dev/null
}

listing='' asked=()
case ${1:-} in
  list) listing=yes ;;
  report) report; exit ;;
  out) exec o2mkd-bench store export "$2" "$suite" "$tuning" --store "$store" ;;
  in) exec o2mkd-bench store import "$2" --store "$store" ;;
  *) asked=("$@") ;;
esac
# what is missing is said once, before three processes find it
[[ $listing ]] || o2mkd-bench plan "$suite" --store "$store" >/dev/null || exit
slices
((found)) || { echo "no slice is called ${asked[*]}; $0 list names them" >&2; exit 2; }
[[ $listing ]] || report >/dev/null || failed=1
exit $failed
