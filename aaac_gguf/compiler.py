"""Compile a C source of the package for this machine, on first use, into the cache folder.

Building llama.cpp needs the same C compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

from .resources import cache_dir

_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
_FLAGS += ["-Wno-attributes", "-Wno-unknown-pragmas"]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")


@functools.cache
def c_library(source: Path) -> ctypes.CDLL | None:
    """Return the compiled library of one C source, or None, with a warning, if it cannot be built."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if not compiler:
        warnings.warn(f"no C compiler (cc, gcc, clang) for {source.name}: torch does its work, slowly", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(_built(compiler, source)))
    except (OSError, subprocess.CalledProcessError) as e:
        warnings.warn(f"{source.name} could not be compiled, torch does its work, slowly: {e}", stacklevel=2)
        return None


def _built(compiler: str, source: Path) -> Path:
    # The predefined macros name the compiler and every instruction set of this machine. Other machines may share its
    # cache folder.
    macros_of = [compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(macros_of, check=True, capture_output=True).stdout
    digest = hashlib.sha256(source.read_bytes() + macros + " ".join(_FLAGS).encode()).hexdigest()[:16]
    out = cache_dir() / f"{source.stem}-{digest}.so"
    if out.exists():
        return out
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f"{source.stem}-") as folder:
        made = Path(folder) / out.name
        command = [compiler, *_FLAGS, str(source), "-o", str(made), "-lm"]
        if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
            subprocess.run(command, check=True, capture_output=True)  # Apple's clang has no OpenMP: one thread
        os.replace(made, out)
    return out
