#!/bin/sh
# Installs the libraries that make.py runs into .goldens/ at the repository's root, beside the peers' PyTorch in
# .peers/ (bench/peers/setup.sh). Run by `make goldens`; returns at once when nothing changed since the last run.
# PEERS_PIP_FLAGS: further flags for pip.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=$root/.peers/bin/python
target=$root/.goldens

want=$("$python" -V; cat "$here/requirements.txt")
if [ -f "$target/stamp" ] && [ "$want" = "$(cat "$target/stamp")" ]; then
	echo "goldens: ready in $target"
	exit 0
fi
rm -rf "$target"
mkdir "$target"
printf "*\n" >"$target/.gitignore"
"$python" -m pip install --quiet --no-deps --no-cache-dir ${PEERS_PIP_FLAGS:-} --target "$target" -r "$here/requirements.txt"
printf '%s\n' "$want" >"$target/stamp"
echo "goldens: ready in $target"
