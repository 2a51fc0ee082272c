#!/usr/bin/env bash
# check.sh VENV: compares what margo says of libraries that it opens at run time (kernels/cublaslt.h, kernels/nccl_api.h,
# cuda/nvml.h) with NVIDIA's headers: prototypes, values and sizes when the programs beside this file are
# compiled, functions and attributes by opening the libraries, which needs no GPU and no driver. Installs the
# pinned packages into a virtual environment (750 MB to fetch, 1.0 GB on disk) where they are not there yet.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1
packages=(nvidia-cublas==13.10.0.20 nvidia-nccl-cu13==2.32.3 nvidia-nvml-dev==13.4.92
  nvidia-cuda-runtime==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-cuda-cccl==13.3.5.0.6) # the last three: headers that these include
stamp=$venv/stamp
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "${packages[*]}" ]; then
  python3 -m venv --clear "$venv"
  printf '*\n' >"$venv/.gitignore"
  "$venv/bin/python" -m pip install --quiet --no-deps --no-cache-dir "${packages[@]}"
  printf '%s' "${packages[*]}" >"$stamp"
fi
cd "$venv"/lib/python3*/site-packages/nvidia
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

# check PROGRAM [LIBRARY]
check() {
  "${CXX:-g++}" -std=c++20 -O1 -Wall -Wno-deprecated-declarations -isystem cu13/include -isystem cu13/include/cccl -isystem nccl/include \
    -I "$out" -o "$out/$1" "$here/$1.cpp" -ldl
  local rc=0
  "$out/$1" "${@:2}" || rc=$?
  [ "$rc" = 0 ] || { echo "abi-check: $1 failed ($rc)" >&2; exit 1; }
}
check cublaslt "$PWD/cu13/lib/libcublasLt.so.13"
sed '/#include/d; /#pragma once/d' "$here/../nccl_api.h" >"$out/nccl_ours.h"
check nccl "$PWD/nccl/lib/libnccl.so.2"
check nvml
echo "abi-check: all as declared (${packages[*]:0:3})"
