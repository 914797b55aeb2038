"""Run the tools of the built llama.cpp, and its Hugging Face converter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import AaacError
from .build import TOOLS, _build_dir, _last_error, fetch


def tool(name: str) -> Path:
    """The built binary `name`, with CUDA where that was built. Raises AaacError when it is unknown or not built."""
    if name not in TOOLS:
        raise AaacError(f"{name}: not one of the built tools; choose from {', '.join(TOOLS)}")
    for backend in ("cuda", "cpu"):
        path = _build_dir(backend) / "bin" / name
        if (_build_dir(backend) / "built").is_file() and path.is_file():
            return path
    raise AaacError(f"{name}: not built; run `aaac-gguf llama build`")


def run_logged_tool(name: str, args: Sequence[str | os.PathLike[str]], log: Path) -> str:
    """Run a built tool with its output in the file `log`, and return that output.

    A file, not a pipe: llama.cpp logs from a thread of its own, and a pipe may lose the end.
    """
    with open(log, "wb") as f:
        status = subprocess.run(
            [tool(name), *args], stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        ).returncode
    text = log.read_text(errors="replace")
    if status:
        raise AaacError(f"{name} failed with status {status}: {_last_error(text)} (see {log})")
    return text


def tool_output(name: str, args: Sequence[str | os.PathLike[str]], log: Path) -> str:
    """What a built tool writes to standard output; its log goes to the file `log`."""
    with open(log, "wb") as f:
        result = subprocess.run([tool(name), *args], stdout=subprocess.PIPE, stderr=f, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise AaacError(
            f"{name} failed with status {result.returncode}: {_last_error(log.read_text(errors='replace'))} (see {log})"
        )
    return result.stdout.decode(errors="replace")


def convert_hf(source: Path, out: Path, outtype: str, header_only: bool = False) -> None:
    """Run the pinned convert_hf_to_gguf.py; with `header_only`, write everything but the tensor data (zeros, as a sparse file), in seconds.

    Raises AaacError with the converter's own words when it refuses the model or the tokenizer.
    """
    tree = fetch()
    script = [str(Path(__file__).parent / "_hf_header.py")] if header_only else []
    command = [
        sys.executable,
        *script,
        str(tree / "convert_hf_to_gguf.py"),
        str(source),
        "--outfile",
        str(out),
        "--outtype",
        outtype,
    ]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tree)})
    if result.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        raise AaacError(f"{source}: llama.cpp's converter refuses this model: {_last_error(result.stderr)}")
