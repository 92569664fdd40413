#!/usr/bin/env bash
# Remakes the table of results/cifar on one GPU, in slices that are cut after nine minutes. The same call goes on where
# it stopped.
#
#   results/cifar/run.sh list             every slice: seconds it should take, and its command
#   results/cifar/run.sh SLICE...         these, then the table of all there is; patterns such as 'headline-*' too
#   results/cifar/run.sh                  all of them, in the order of the list
#   results/cifar/run.sh warm [CONFIG]    compile alone; with the config.json of the teacher's U-Net also while neither
#                                         its weights nor the images are there, on random ones
#   results/cifar/run.sh report           the table alone: of the slices, and of what OUT has from other machines
#   results/cifar/run.sh out|in FOLDER    finished students into FOLDER in parts of 16 MB, and from there into the store
#
# CIFAR_TEACHER, CIFAR10_ROOT: see suites/cifar_local.yaml. SUITE: another suite, such as suites/cifar.yaml.
# WORK: the store and the compiler's caches (.o2mkd/cifar). OUT: tables and pictures (results/cifar).
# LIMIT: seconds a slice. STUDENTS, SEEDS: of the slices ("quarter half", "0 1 2").
# WORKERS: processes that share the GPU, one a seed unless said otherwise. Students this small keep a processor busier
# than a GPU, so that three seeds side by side take little longer than one.
# REHEARSE=1: the slices at toy size on the CPU, in a folder that is removed after unless WORK is given, with
# STUDENTS=quarter and SEEDS=0 unless they are.
set -uo pipefail
trap 'exit 130' INT
cd "$(dirname "$0")/../.."
root=$PWD
suite=${SUITE:-suites/cifar_local.yaml}
tuning=results/cifar/tuning.yaml
work=${WORK:-.o2mkd/cifar}
out=${OUT:-results/cifar}
limit=${LIMIT:-540}
students=${STUDENTS:-quarter half}
seeds=${SEEDS:-0 1 2}
tuning_seeds="100 101 102"
methods=(output "{output: {}, feature: {task: 0}, label: output+feature}")
warm_images=5120
lone_steps=10,50
# results/cifar/tuning.yaml lies elsewhere than the suite, and paths in a suite are relative to it
export CIFAR10_ROOT=${CIFAR10_ROOT:-$root/data/cifar10-jpeg.tar.xz}
export CIFAR_TEACHER=${CIFAR_TEACHER:-$root/data/ddpm-cifar10-jpeg}
export PYTHONUNBUFFERED=1

# stand_ins FOLDER CONFIG: a teacher of this shape with random weights, in FOLDER/teacher, and 360 images in FOLDER/data
stand_ins() {
  python3 - "$1" "$2" <<'PY'
import json
import sys
from pathlib import Path

import numpy as np
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

folder, config = Path(sys.argv[1]), Path(sys.argv[2])
draw = np.random.default_rng(0)
for split, count in (("train", 30), ("test", 6)):
    for name in "abcdefghij":
        place = folder / "data" / split / name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(place / f"{i:04}.png")
network = UNet2DModel.from_config(json.loads(config.read_text(encoding="utf-8"))).half()
DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder / "teacher")
PY
}

# toy FOLDER: a teacher of a few channels, random images, and both suites in the size for them
toy() {
  cat >"$1/config.json" <<'JSON'
{"_class_name": "UNet2DModel", "sample_size": 32, "layers_per_block": 1, "block_out_channels": [8, 8],
 "norm_num_groups": 8, "attention_head_dim": 2,
 "down_block_types": ["DownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "UpBlock2D"]}
JSON
  stand_ins "$1" "$1/config.json" || return
  local name
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
  cat >>"$1/suite.yaml" <<YAML
samplers: [{ddim: {steps: 1}}, {dpm_solver: {steps: 1}}, {progressive: {steps: [1, 2], start: 4}, label: progressive}]
budgets: [{name: 819k, images: 960}, {name: 1638k, images: 1920}]
teachers: [{name: ddpm-cifar10-jpeg, path: $1/teacher}]
# rules that name steps have nothing to say here
exclude: [{sampler: progressive, weights: raw}, {student: half, wrapper: [o2mkd-8-per-student, single-8x]}]
YAML
  cat >>"$1/tuning.yaml" <<YAML
samplers: [{ddim: {steps: 1}}]
budgets: [{name: 410k, images: 960}]
teachers: [{name: ddpm-cifar10-jpeg, path: $1/teacher}]
YAML
}

if [[ ${REHEARSE:-} && ${1:-} != list ]]; then
  [[ ${WORK:-} ]] || { work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT; }
  mkdir -p "$work"
  work=$(realpath "$work") students=${STUDENTS:-quarter} seeds=${SEEDS:-0}
  tuning_seeds=100 warm_images=960 lone_steps=1
  [[ -e $work/suite.yaml ]] || toy "$work" || exit
  export CIFAR10_ROOT=$work/data CIFAR_TEACHER=$work/teacher
  suite=$work/suite.yaml tuning=$work/tuning.yaml out=${OUT:-$work/results}
fi
workers=${WORKERS:-$(wc -w <<<"$seeds")}
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
# crew: processes that share the GPU, where it is more than one; kept: the folder for its table
found=0 failed=0 crew='' kept=$work/slices
slice() {
  local name=$1 seconds=$2 file=$3 begun left status
  shift 3
  wanted "$name" || return 0
  found=1
  local ends=(--store "$store" --out "$kept/$name")
  local command=(o2mkd-bench run "$file" "$@" "${ends[@]}" ${crew:+--workers "$crew"})
  echo "# $name: about $seconds s"
  shown "${command[@]}"
  [[ $listing ]] && return 0
  begun=$SECONDS
  warm
  left=$((limit - SECONDS + begun))
  ((left < 10)) && { failed=1; echo "$name: compiling took all of $limit s" >&2; return 1; }
  # workers have two minutes to keep their checkpoints
  timeout --foreground --signal=INT --kill-after=150 "$left" "${command[@]}"
  status=$?
  ((status == 124 || status == 137)) && echo "$name: cut after $limit s; the same call goes on" >&2
  if ((status)); then
    failed=1
    # what it had finished by then
    o2mkd-bench report "$file" "$@" "${ends[@]}" >/dev/null
  fi
  mkdir -p "$out"
  printf '%s\t%s\t%s s\tstatus %s\t%s\t%s\n' "$(date -u +%FT%TZ)" "$name" $((SECONDS - begun)) "$status" \
    "$(machine)" "$(shown "${command[@]}")" >>"$out/runs.tsv"
}

machine() { nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | grep . || uname -m; }

# few_steps NAME: in `few`, arguments for students of a few steps, of a budget and a teacher of that name
few_steps() {
  few=(--set seeds=[0] --set "budgets=[{name: $1, images: $warm_images}]" --set sampling.images=1280
    --set baselines=[] --set include=[] --set exclude=[])
  # nobody asks what this teacher scores
  [[ -e $CIFAR_TEACHER ]] && few+=(--set "teachers=[{name: $1, path: $CIFAR_TEACHER}]")
}

# warm [CONFIG]: compile everything the headline needs at once, on as many cores as there are; the slices then find it
# in the cache. What else this makes, data, teacher and reference, they need anyway.
warm() {
  [[ -e $work/warm ]] && return
  mkdir -p "$work"
  if [[ ${1:-} ]]; then
    stand_ins "$work/stand-ins" "$1" || return
    local -x CIFAR_TEACHER=$work/stand-ins/teacher CIFAR10_ROOT=$work/stand-ins/data
  fi
  local few
  few_steps warm
  local tiny=(o2mkd-bench run "$suite" --store "$store" "${few[@]}" --set 'samplers=[{ddim: {steps: 2}}]'
    --set sampling.teacher_steps=[] --set 'wrappers=[single, {o2mkd: {students: 4}}]')
  local begun=$SECONDS student method name done=yes
  # threads that wait for each other spin, and with more of them than cores each waits for all
  local cores=$(nproc) side=$(($(wc -w <<<"$students") * ${#methods[@]} + 1))
  local -x OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > side ? cores / side : 1))}
  local -A pids=()
  for student in $students; do
    for method in "${!methods[@]}"; do
      name=$student-$method
      # raw weights alone: a teacher has none, and its row stays away
      timeout "$limit" "${tiny[@]}" --set sampling.weights=[raw] --only weights=raw \
        --set "methods=[${methods[method]}]" --only student="$student" --out "$work/warm-$name" \
        >"$work/warm-$name.log" 2>&1 &
      pids[$name]=$!
    done
  done
  timeout "$limit" "${tiny[@]}" --set methods=[output] --only student=teacher --out "$work/warm-teacher" \
    >"$work/warm-teacher.log" 2>&1 &
  pids[teacher]=$!
  for name in "${!pids[@]}"; do
    wait "${pids[$name]}" || { done=''; echo "compiling $name: $(tail -n 1 "$work/warm-$name.log")" >&2; }
  done
  [[ $done ]] && touch "$work/warm"
  echo "compiled in $((SECONDS - begun)) s" >&2
}

# speeds NAME SECONDS ARGUMENT...: speeds alone. They are of architectures, samplers and edges and not of weights, so that
# students of a few steps have those of the whole table. It finds them in the store; their own table is no part of it.
speeds() {
  local name=$1 seconds=$2 few
  shift 2
  few_steps speed
  kept=$work/speeds slice "$name" "$seconds" "$suite" "${few[@]}" --only method=output --only weights=ema \
    --only sampler=ddim,dpm_solver --only student="$(comma $students)" "$@"
}

# main SECONDS NAME ARGUMENT...: a slice of the suite for all seeds, without speeds
main() {
  local seconds=$1 name=$2
  shift 2
  # the ladder of the teacher is a slice of its own
  crew=$workers slice "$name" "$seconds" "$suite" "$@" --only seed="$(comma $seeds)" --set speed.enabled=false \
    --set sampling.teacher_steps=[]
}

slices() {
  local seed student
  local headline=(--only wrapper=single,o2mkd-4 --only budget=819k --only sampler=ddim,dpm_solver)
  local output=(--only method=output --only budget=819k)
  # their baseline is the one student of the headline, which is not to be trained again where its store is gone; steps
  # that they do not take are not for the teacher to take either
  local lone=("${output[@]}" --only steps="$lone_steps" --set baselines=[])

  # the teacher alone: its ladder, and what `expect:` in suites/cifar_local.yaml is to say
  slice teacher 110 "$suite" --only student=teacher --only seed=0 --set speed.enabled=false
  for student in $students; do
    main "$(of "$student" 720 680)" "headline-$student" --only method=output "${headline[@]}" --only weights=ema \
      --only student="$student"
    main "$(of "$student" 540 340)" "batch-$student" "${lone[@]}" --only wrapper=single-batch-128 \
      --only student="$student"
    main "$(of "$student" 720 520)" "features-$student" --only method=output+feature "${headline[@]}" \
      --only student="$student"
  done
  speeds speed 230 --only wrapper=single,o2mkd-4
  # needs the students of the headline in the store, else it trains them anew
  main 310 raw --only method=output "${headline[@]}" --only weights=raw --only student="$(comma $students)"

  local name
  local -A measured=([auto]=o2mkd-4-auto [auto-batch]=o2mkd-4-auto-batch-128)
  local controls=single-snr-law,single-normalised,o2mkd-4-snr-equal,o2mkd-4-generalists
  local students_and_edges=o2mkd-2,o2mkd-8,o2mkd-2-snr,o2mkd-4-snr,o2mkd-8-snr
  for student in $students; do
    main 540 "features-light-$student" --only method=output+feature-light "${headline[@]}" --only student="$student"
    main 700 "batch-32-$student" "${lone[@]}" --only wrapper=single-batch-32 --only student="$student"
    main 900 "batch-experts-$student" "${lone[@]}" --only wrapper=o2mkd-4-batch-128 --only student="$student"
    # measured edges, and so speeds, are each seed's own; these read them of the students that those left in the store
    for name in auto auto-batch; do
      main "$([[ $name == auto ]] && echo 600 || echo 1000)" "$name-$student" "${lone[@]}" --only wrapper="${measured[$name]}" --only student="$student"
      slice "speed-$name-$student" 60 "$suite" "${lone[@]}" --only wrapper="${measured[$name]}" --only student="$student" \
        --only seed="$(comma $seeds)" --set sampling.teacher_steps=[]
    done
    main 900 "edges-$student" "${lone[@]}" --only wrapper=$students_and_edges --only student="$student"
    main 1150 "controls-$student" "${lone[@]}" --only wrapper=$controls --only student="$student"
    main 600 "spending-$student" "${lone[@]}" --only wrapper=o2mkd-4-keep,o2mkd-4-scratch,o2mkd-4-full \
      --only student="$student"
    main 500 "hints-$student" --only method=feature "${headline[@]}" --only student="$student"
    main 800 "relations-$student" --only method=relation,none "${headline[@]}" --only student="$student"
    main 600 "each-2-$student" "${output[@]}" --only wrapper=o2mkd-2-per-student --only student="$student"
    main 1200 "each-4-$student" "${output[@]}" --only wrapper=o2mkd-4-per-student --only student="$student"
    main 1000 "times-4-$student" "${output[@]}" --only wrapper=single-4x --only student="$student"
    main 800 "longer-$student" --only method=output --only wrapper=single,o2mkd-4 --only budget=1638k \
      --only student="$student"
    main 600 "progressive-$student" "${output[@]}" --only wrapper=single,o2mkd-4 --only sampler=progressive \
      --only student="$student"
  done
  speeds speed-edges 240 --only wrapper=$students_and_edges --set sampling.teacher_steps=[]
  # eight times the budget
  if [[ " $students " == *" quarter "* ]]; then
    main 2000 each-8-quarter "${output[@]}" --only wrapper=o2mkd-8-per-student --only student=quarter
    main 1800 times-8-quarter "${output[@]}" --only wrapper=single-8x --only student=quarter
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
  warm) warm "${2:-}"; exit ;;
  # images are drawn again in seconds
  out) exec o2mkd-bench store export "$2" "$suite" "$tuning" --kind student,round,edges --store "$store" ;;
  in) exec o2mkd-bench store import "$2" --store "$store" ;;
  *) asked=("$@") ;;
esac
# what is missing is said once, before three processes find it
[[ $listing ]] || o2mkd-bench plan "$suite" --store "$store" >/dev/null || exit
slices
((found)) || { echo "no slice is called ${asked[*]}; $0 list names them" >&2; exit 2; }
[[ $listing ]] || report >/dev/null || failed=1
exit $failed
