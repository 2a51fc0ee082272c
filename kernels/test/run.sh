#!/usr/bin/env bash
# run.sh DEVICE FOLDER [PART…]: what a GPU has to say about margo, in one go: the programs of this folder, margo selftest, margo bench
# by both head paths, with FP8 weights and without Hopper's kernels. Each part writes FOLDER/PART.txt under a time limit of its own and
# the next goes on whatever it said; summary.txt says which passed. Exit status 1 if one did not.
# It builds nothing, so bin/ may come from another machine (make build gpu-tests). DEVICE emu:0 tries this script: programs at
# small shapes, selftest --quick, a bench of the demo model (make build emu; make -C kernels/emu programs OUT=…/bin).
set -uo pipefail
cd "$(dirname "$0")/../.."
device=${1:?device, such as cuda:0} out=${2:?folder for the report}
shift 2
wanted=" $* "
mkdir -p "$out"
: >"$out/summary.txt"
failed=0
say() { echo "$*" | tee -a "$out/summary.txt"; }

part() { # NAME SECONDS COMMAND…
  local name=$1 limit=$2 from=$SECONDS
  shift 2
  [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
  { echo "command: $*"; echo; } >"$out/$name.txt"
  timeout -k 10 "$limit" "$@" >>"$out/$name.txt" 2>&1
  local rc=$?
  case $rc in
    0) say "ok    $name ($((SECONDS - from)) s)" ;;
    77) say "left out $name: $(tail -1 "$out/$name.txt")" ;;
    124 | 137) say "FAIL  $name: not done after $limit s"; failed=1 ;;
    *) say "FAIL  $name: exit status $rc after $((SECONDS - from)) s: $(tail -1 "$out/$name.txt")"; failed=1 ;;
  esac
}
bench() { # NAME ARGUMENTS…, with variables before it in VARS
  local name=$1
  shift
  part "$name" 120 env "${vars[@]}" bin/margo bench --device "$device" --dtype bf16 "$@"
}

part devices 30 bin/margo devices
case $device in
emu:*)
  for t in gemm_sm90a attention_sm90a head_latency; do part $t 120 env MARGO_EMU_CC=90 bin/emu/${t}_test small; done
  part selftest 900 bin/margo selftest --device "$device" --quick --out "$out/selftest.report.txt"
  model=(--model models/fashion-mar.safetensors --iters 2 --head-steps 2) batches=1 reps=1
  ;;
*)
  for t in gemm_sm90a attention_sm90a head_latency; do part $t 120 bin/test/${t}_test; done
  part selftest 420 bin/margo selftest --device "$device" --out "$out/selftest.report.txt"
  model=(--model mar-base,mar-large --iters 64 --head-steps 100 --cfg 3) batches=1,8,64 reps=3
  ;;
esac
vars=(MARGO_HEAD_PATH=throughput) && bench bench "${model[@]}" --batch $batches --reps $reps
vars=(MARGO_HEAD_PATH=latency) && bench bench-latency "${model[@]}" --batch 1 --reps $reps
vars=(MARGO_HEAD_PATH=latency) && bench bench-latency-fp8 "${model[@]}" --batch 1 --reps $reps --head-weights fp8
vars=(MARGO_SM90=0) && bench bench-without-sm90a "${model[@]}" --batch $batches --reps 1
say "$([ $failed = 0 ] && echo "all passed" || echo "not all passed"): $device, $SECONDS s"
exit $failed
