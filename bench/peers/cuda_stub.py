"""Lets the CUDA build of PyTorch be imported on a machine without CUDA.

The Linux wheel of `torch` on the package index is linked against CUDA's libraries: without them it does not even
import, with them it takes several GB that a CPU peer never runs. This script writes one small shared library with
every function that torch's libraries expect from CUDA, each returning 100 (cudaErrorNoDevice), and puts it beside
torch's libraries under the names they look for. torch then reports that there is no CUDA device. The CPU kernels
(MKL, oneDNN, ATen) are those of the wheel, untouched.

Usage: VENV/bin/python cuda_stub.py        (needs nm and a C compiler, as torch.compile does)
"""

import importlib.util
import pathlib
import re
import subprocess
import tempfile

CUDA_NAME = re.compile(r"^(__)?(cu|nv|nccl)[A-Za-z0-9_]*$")
CUDA_LIB = re.compile(r"\[(lib(?:cu|nv|nccl)[^]]*\.so[^]]*)\]")


def run(*argv):
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def symbols(lib, which):
    """Dynamic symbols of a shared library as {name: version or ""}; which is --undefined-only or --defined-only."""
    pairs = (line.split()[-1].replace("@@", "@").partition("@")
             for line in run("nm", "-D", which, str(lib)).splitlines() if line.strip())
    return {name: version for name, _, version in pairs}


def version_script(functions):
    """Linker script that gives each function the symbol version it is asked for (the loader checks)."""
    by_version = {}
    for name, version in functions.items():
        by_version.setdefault(version, []).append(name)
    by_version.pop("", None)
    return "".join(f'{version} {{ global: {"; ".join(sorted(names))}; }};\n' for version, names in by_version.items())


def main():
    # find_spec does not import torch, which is what cannot work yet.
    lib_dir = pathlib.Path(importlib.util.find_spec("torch").origin).parent / "lib"
    stub = lib_dir / "libcuda_stub.so"
    libs = [p for p in lib_dir.glob("*.so*") if not p.is_symlink() and p != stub]
    missing, needed = {}, set()
    for lib in libs:
        missing |= symbols(lib, "--undefined-only")
        needed |= set(CUDA_LIB.findall(run("readelf", "-d", str(lib))))
    for lib in libs:
        needed.discard(lib.name)
        for name in symbols(lib, "--defined-only"):
            missing.pop(name, None)
    functions = {name: version for name, version in missing.items() if CUDA_NAME.match(name)}
    if not functions:
        print("cuda_stub: this torch needs no CUDA library")
        return
    source = "".join(f"long {name}(void) {{ return 100; }}\n" for name in sorted(functions))
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        script.write(version_script(functions))
        script.flush()
        subprocess.run(["cc", "-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,--version-script={script.name}",
                        "-x", "c", "-", "-o", str(stub)], input=source, text=True, check=True)
    for name in needed:
        link = lib_dir / name
        link.unlink(missing_ok=True)
        link.symlink_to(stub.name)
    print(f"cuda_stub: {len(functions)} functions under {len(needed)} library names")


if __name__ == "__main__":
    main()
