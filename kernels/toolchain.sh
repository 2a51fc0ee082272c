#!/usr/bin/env bash
# toolchain.sh VENV: installs the pinned CUDA compiler and its headers from the Python package index into a
# virtual environment (134 MB to fetch, 352 MB on disk). Does nothing if it is there, or if nvcc is on the PATH.
set -euo pipefail
venv=$1
packages=(nvidia-cuda-nvcc==13.5.37 nvidia-nvvm==13.5.37 nvidia-cuda-crt==13.5.37 nvidia-cuda-runtime==13.5.37
  nvidia-cuda-cccl==13.3.5.0.6 nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37)
stamp=$venv/stamp
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "${packages[*]}" ]; then exit 0; fi
if [ ! -d "$venv" ] && command -v nvcc >/dev/null; then
  echo "toolchain: using $(command -v nvcc)"
  exit 0
fi
python3 -m venv --clear "$venv"
printf '*\n' >"$venv/.gitignore"
"$venv/bin/python" -m pip install --quiet --no-deps --no-cache-dir "${packages[@]}"
printf '%s' "${packages[*]}" >"$stamp"
echo "toolchain: $("$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc --version | tail -1) in $venv"
