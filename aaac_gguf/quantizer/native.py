"""search.c compiled for this machine: the searches of encode.py, codebook.py and feedback.py on a CPU, several times as fast as in torch.

The library is built on first use with the C compiler that building llama.cpp needs anyway, and kept in the cache folder. Without a compiler torch
does the same work. Both make the same choices but for ties within rounding.
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
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..resources import cache_dir

if TYPE_CHECKING:
    from .grid import Grid

_SOURCE = Path(__file__).with_name("search.c")
_FLAGS = [
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-Wno-attributes",
    "-Wno-unknown-pragmas",
]
if platform.machine() in ("x86_64", "AMD64"):
    _FLAGS.append("-mprefer-vector-width=512")


@functools.cache
def native() -> ctypes.CDLL | None:
    """The compiled library, or None, with a warning, where it cannot be built."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc", "clang"))), None)
    if not compiler:
        warnings.warn("no C compiler (cc, gcc, clang) found: rounding takes several times as long", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.CalledProcessError) as e:
        warnings.warn(f"{_SOURCE.name} could not be compiled, rounding takes several times as long: {e}", stacklevel=2)
        return None


def _built(compiler: str) -> Path:
    # The predefined macros name the compiler and every instruction set of this machine, which may share its cache folder with others.
    macros = subprocess.run(
        [compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull], check=True, capture_output=True
    ).stdout
    out = (
        cache_dir()
        / f"search-{hashlib.sha256(_SOURCE.read_bytes() + macros + ' '.join(_FLAGS).encode()).hexdigest()[:16]}.so"
    )
    if out.exists():
        return out
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="search-") as folder:
        made = Path(folder) / out.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(made), "-lm"]
        if subprocess.run([*command, "-fopenmp"], capture_output=True).returncode:
            subprocess.run(command, check=True, capture_output=True)  # Apple's clang has no OpenMP: one thread
        os.replace(made, out)
    return out


def scale_borders(scales: Tensor) -> tuple[Tensor, int]:
    """The borders between neighbouring nonzero scales of float32 [n], padded with infinity to 2^depth - 1; and depth, the steps of a bisection."""
    borders = (scales[2:] + scales[1:-1]) / 2
    depth = len(borders).bit_length()
    padding = borders.new_full(((1 << depth) - 1 - len(borders),), torch.inf)
    return torch.cat([borders, padding]), depth


class CompiledGrid(ctypes.Structure):
    """`grid` of search.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("level", "index", "scales", "middles")] + [
        (name, ctypes.c_int32) for name in ("n_scales", "depth")
    ]

    def __init__(self, grid: Grid):
        scales = grid.scales.contiguous()
        middles, depth = scale_borders(scales)
        self._alive = (grid.nearest_level.contiguous(), grid.nearest_index.contiguous(), scales, middles)
        super().__init__(*(t.data_ptr() for t in self._alive), len(scales), depth)

    def call(self, name: str, *arguments: Tensor | int) -> None:
        """Call a function of search.c with this grid. Tensors live on the CPU, with the shapes and dtypes that search.c gives."""
        function = getattr(native(), name)
        function.restype = None
        if set_threads := getattr(native(), "omp_set_num_threads", None):
            set_threads(torch.get_num_threads())
        given = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments)
        function(ctypes.byref(self), *given)
