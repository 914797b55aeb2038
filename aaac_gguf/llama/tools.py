"""Run the tools of the built llama.cpp, and its Hugging Face converter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import AaacError
from ..files.scratch import disk_full
from ..progress import progress
from .build import TOOLS, build_dir, fetch, is_built, last_error


def tool(name: str) -> Path:
    """Return the built binary `name`, the one for a GPU if that is built. Raises AaacError if there is none."""
    if name not in TOOLS:
        raise AaacError(f"{name}: not one of the built tools; choose from {', '.join(TOOLS)}")
    for backend in ("cuda", "vulkan", "cpu"):
        path = build_dir(backend) / "bin" / name
        if is_built(backend) and path.is_file():
            return path
    raise AaacError(f"{name}: not built; run `aaac-gguf llama build`")


def run_logged_tool(name: str, args: Sequence[str | os.PathLike[str]], log: Path) -> str:
    """Run a built tool with all its output in the file `log`, and return that output.

    llama.cpp logs from a thread of its own, and a pipe may lose the end. So the output goes to a file.
    """
    with open(log, "wb") as f:
        result = subprocess.run([tool(name), *args], stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    text = log.read_text("utf-8", "replace")
    if result.returncode:
        raise _failed(name, result.returncode, text, log)
    return text


def tool_output(name: str, args: Sequence[str | os.PathLike[str]], log: Path) -> str:
    """Run a built tool with its log in the file `log`, and return its standard output."""
    with open(log, "wb") as f:
        result = subprocess.run([tool(name), *args], stdout=subprocess.PIPE, stderr=f, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise _failed(name, result.returncode, log.read_text("utf-8", "replace"), log)
    return result.stdout.decode(errors="replace")


def _failed(name: str, status: int, output: str, log: Path) -> AaacError:
    return AaacError(f"{name} failed with status {status}: {last_error(output)} (see {log})")


def convert_hf(
    source: Path,
    out: Path,
    outtype: str,
    header_only: bool = False,
    name: str | None = None,
    n_bytes: int | None = None,
) -> None:
    """Run the pinned convert_hf_to_gguf.py.

    header_only: write everything but the tensor data, which is a hole in the file. This takes seconds.
    name: of the model, which the converter takes from the folder's; by default the folder's.
    n_bytes: of the tensors, for the progress.
    Raises AaacError with the converter's own words if it refuses the model or the tokenizer.
    """
    tree = fetch()
    wrapper = [Path(__file__).parent / "_hf_header.py"] if header_only else []
    program: list[str | Path] = [sys.executable, *wrapper, tree / "convert_hf_to_gguf.py"]
    folder = source
    if name and name != source.name:
        folder = out.parent / name
        folder.symlink_to(source.resolve())
    command = [*program, folder, "--outfile", out, "--outtype", outtype]
    env = os.environ | {"PYTHONPATH": str(tree), "PYTHONUTF8": "1"}  # it reads and prints texts as the locale has them
    with (
        subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env=env
        ) as process,
        progress(desc="llama.cpp's converter", total=n_bytes, unit="byte", unit_scale=True) as bar,
    ):
        try:
            errors = ""
            while process.returncode is None:
                with suppress(subprocess.TimeoutExpired):
                    _, errors = process.communicate(timeout=1)
                written = out.stat().st_size if out.is_file() else 0
                bar.n = min(written, n_bytes or written)  # the metadata counts in the file only
                bar.refresh()
        except BaseException:
            process.kill()
            raise
    if process.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        if re.search(r"No space left on device|Disk quota exceeded", errors):
            raise disk_full(out.parent)
        reason = f"{last_error(errors)}{_last_frame(errors)}"
        raise AaacError(f"{source}: llama.cpp's converter refuses this model: {reason}")


def _last_frame(output: str) -> str:
    """Return where the exception was raised that ended a Python program, in parentheses; empty if none did."""
    frames = re.findall(r'^ +File "([^"]+)", line (\d+), in (\S+)\n(?: {4,}(\S.*))?', output, re.MULTILINE)
    if not frames:
        return ""
    file, line, function, code = frames[-1]
    return f" ({Path(file).name}, line {line}, in {function}{f': {code}' if code else ''})"
