#!/bin/sh
# Makes the Python environment of the PyTorch peer in .peers/ at the repository's root (about 1.5 GB on disk, half a
# GB of download). Run by `make peers`; returns at once when nothing changed since the last run.
#
#   PEERS_PYTHON     interpreter to use (default python3; 3.11 or later, the wheels differ by version)
#   PEERS_PIP_FLAGS  further flags for pip, such as an index that serves CPU-only builds of torch
set -eu
here=$(cd "$(dirname "$0")" && pwd)
venv=$(cd "$here/../.." && pwd)/.peers
python=${PEERS_PYTHON:-python3}
stamp=$venv/stamp

want=$("$python" -V; cat "$here/requirements.txt" "$here/cuda_stub.py" "$here/setup.sh")
if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ "$want" = "$(cat "$stamp")" ]; then
	echo "peers: ready in $venv"
	exit 0
fi
for tool in cc c++ nm readelf; do
	command -v "$tool" >/dev/null || { echo "peers: $tool not found; a C++ compiler and binutils are needed" >&2; exit 1; }
done
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	{ echo "peers: $("$python" -V) is too old, 3.11 or later is needed (set PEERS_PYTHON)" >&2; exit 1; }

rm -f "$stamp"
"$python" -m venv --clear "$venv"
printf "*\n" >"$venv/.gitignore"
# --no-deps: torch asks for several GB of CUDA libraries that a CPU peer never runs.
"$venv/bin/python" -m pip install --quiet --no-deps --no-cache-dir ${PEERS_PIP_FLAGS:-} -r "$here/requirements.txt"
"$venv/bin/python" "$here/cuda_stub.py"
"$venv/bin/python" -c 'import torch; print("peers: torch", torch.__version__, "with", torch.backends.cpu.get_cpu_capability())'
printf '%s\n' "$want" >"$stamp"
echo "peers: ready in $venv"
