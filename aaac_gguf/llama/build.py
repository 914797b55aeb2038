"""Fetch the pinned llama.cpp from the Python package index, patch it, and build it.

Everything is in the user's cache folder (`AAAC_CACHE` overrides it), in a folder named after the upstream version and
the patch's content. So a changed patch never meets an old build.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ..errors import AaacError
from ..progress import progress
from ..resources import cache_dir, sha256
from . import patch

BACKEND_FLAGS: dict[str, tuple[str, ...]] = {
    "cpu": (),
    "cuda": ("-DGGML_CUDA=ON",),
    "vulkan": ("-DGGML_VULKAN=ON",),
}

# One static binary for each tool, for this machine's instruction set. The tools are given local files, so they need no
# network client.
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
)

VULKAN_PACKAGES = "on Debian and Ubuntu, `apt install libvulkan-dev glslc spirv-headers`"

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


@functools.cache
def source_dir() -> Path:
    """Return the folder of the patched source, whether it is there yet or not."""
    return cache_dir() / f"llama.cpp-{patch.upstream().version}-{patch.digest()}"


def build_dir(backend: str) -> Path:
    """Return the build folder for `backend`, whether it is there yet or not."""
    return source_dir() / f"build-{backend}"


def is_built(backend: str = "cpu") -> bool:
    """Return whether the tools are built for `backend`."""
    return (build_dir(backend) / "built").is_file()


def fetch() -> Path:
    """Return the folder of the patched source. It is downloaded and patched if it is not there yet."""
    source = source_dir()
    if source.is_dir():  # it appears whole; a cache that cannot be written may be used
        return source
    with _lock():
        if not source.is_dir():
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="unpack-") as scratch:
                tree = unpack(download(patch.upstream().version), Path(scratch))
                if failed := patch.apply(tree, pinned=tree):
                    raise AaacError(f"{failed[0]}: the patch does not apply to the source that it is made for")
                tree.rename(source)
    return source


def download(version: str) -> Path:
    """Return the source distribution of a version. It is downloaded into the cache if it is not there yet.

    Raises AaacError if there is no network, and for a pinned version that has another sha256 than the pinned one.
    """
    up = patch.upstream()
    archive = cache_dir() / f"{up.package.replace('-', '_')}-{version}.tar.gz"
    if not archive.is_file():
        contents = "its source distribution holds llama.cpp's"
        print(f"fetching {up.package} {version} from the Python package index ({contents}) ...", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="download-") as scratch:
            # With --no-binary :all: pip would compile the build tools too, cmake for one.
            options = ["--no-deps", "--no-binary", up.package, "-d", scratch]
            command = [sys.executable, "-m", "pip", "download", *options, f"{up.package}=={version}"]
            result = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if result.returncode or not (Path(scratch) / archive.name).is_file():
                reason = (result.stderr.strip().splitlines() or ["pip saved no file"])[-1]
                advice = f"check the network, or put {archive.name} into {cache_dir()}"
                raise AaacError(f"{up.package}=={version}: pip could not download it ({reason}); {advice}")
            os.replace(Path(scratch) / archive.name, archive)
    if version == up.version and (found := sha256(archive)) != up.sha256:
        raise AaacError(f"{archive}: sha256 is {found}, expected {up.sha256}; delete the file and try again")
    return archive


def unpack(archive: Path, into: Path) -> Path:
    """Unpack llama.cpp's part of a source distribution. Returns its folder."""
    root = f"{archive.name.removesuffix('.tar.gz')}/{patch.upstream().folder}/"
    _extract(archive, into, lambda name: name.startswith(root))
    return into / root


def _extract(archive: Path, into: Path, wanted: Callable[[str], bool]) -> None:
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if wanted(m.name) and ".git" not in m.name.split("/")]
        tar.extractall(into, members, filter="data")


def patched_copy(checkout: Path) -> Path:
    """Make a patched copy, in the cache, of a llama.cpp checkout near the pinned version. The checkout is only read.

    Returns the copy's folder. It is named after the copy's content, so a checkout that changed gets a new one.
    Raises AaacError if the patch does not fit.
    """
    if not (checkout / "ggml" / "include" / "ggml.h").is_file():
        raise AaacError(f"`checkout` {checkout}: not a llama.cpp source folder, it has no ggml/include/ggml.h")
    with _lock(), tempfile.TemporaryDirectory(dir=cache_dir(), prefix="unpack-") as scratch:
        pinned, tree = unpack(download(patch.upstream().version), Path(scratch)), Path(scratch) / "tree"
        shutil.copytree(checkout, tree, symlinks=True, ignore=_not_source)
        if failed := patch.apply(tree, pinned):
            places = "; ".join(str(hunk) for hunk in failed)
            nearer = f"take a version nearer to llama-cpp-python {patch.upstream().version}'s, or see docs/patch.md"
            raise AaacError(
                f"`checkout` {checkout}: {len(failed)} of the patch's {len(patch.hunks())} insertions find no place "
                f"({places}); {nearer}"
            )
        digest = hashlib.sha256()
        for path in sorted(p for p in tree.rglob("*") if p.is_file()):
            digest.update(f"{path.relative_to(tree)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        source = cache_dir() / f"source-{checkout.resolve().name}-{digest.hexdigest()[:12]}"
        if not source.is_dir():
            tree.rename(source)
    return source


def _not_source(folder: str, names: list[str]) -> list[str]:
    """Return the names in a checkout's folder that a build does not read: history, build folders, models."""
    return [n for n in names if n == ".git" or n.endswith(".gguf") or (Path(folder) / n / "CMakeCache.txt").is_file()]


def build(backend: str = "cpu", arch: str | None = None, checkout: Path | None = None) -> Path:
    """Build the tools for `backend`, one of BACKEND_FLAGS, if they are not built yet. Returns the folder of binaries.

    arch: CUDA architectures as CMake takes them, "90" or "80;89". The default is this machine's GPU.
    checkout: build a patched copy of this llama.cpp instead of the pinned one.
    """
    flags = _backend_flags(backend, arch)
    source = patched_copy(checkout) if checkout else fetch()
    folder = source / f"build-{backend}"
    stamp = folder / "built"
    if stamp.is_file():
        return folder / "bin"
    with _lock():
        if not stamp.is_file():
            log = source / f"{folder.name}.log"
            log.unlink(missing_ok=True)
            flags = [*CMAKE_FLAGS, *flags, f"-DCMAKE_MAKE_PROGRAM={_program('ninja')}"]
            _run_logged([_program("cmake"), "-S", source, "-B", folder, "-G", "Ninja", *flags], log)
            _run_logged([_program("cmake"), "--build", folder, "--target", *TOOLS], log)
            stamp.touch()
    return folder / "bin"


def build_wheel(backend: str = "cpu", arch: str | None = None) -> Path:
    """Build the wheel of llama-cpp-python around the patched source if there is none yet. Returns its path.

    Its version ends in "+aaac", so that pip takes it for another than the package index's.
    """
    flags = _backend_flags(backend, arch)
    if wheel := find_wheel(backend):
        return wheel
    source, up = fetch(), patch.upstream()
    folder = source / f"wheel-{backend}"
    with _lock():
        if wheel := find_wheel(backend):
            return wheel
        shutil.rmtree(folder, ignore_errors=True)
        archive = download(up.version)
        root = archive.name.removesuffix(".tar.gz")
        _extract(archive, folder, lambda name: not name.startswith(f"{root}/{up.folder}/"))
        package = folder / root
        (package / up.folder).parent.mkdir(parents=True, exist_ok=True)
        (package / up.folder).symlink_to(source)
        init = package / "llama_cpp" / "__init__.py"
        version = init.read_text("utf-8").replace(f'"{up.version}"', f'"{up.version}+aaac"')
        init.write_text(version, "utf-8")
        options = ["--no-deps", "--config-settings", f"build-dir={folder / 'build'}", "-w", str(folder / "out")]
        env = os.environ | {"CMAKE_ARGS": f"{os.environ.get('CMAKE_ARGS', '')} {shlex.join(flags)}".strip()}
        _run_logged([sys.executable, "-m", "pip", "wheel", "-v", *options, package], source / f"{folder.name}.log", env)
        built = next((folder / "out").glob("*.whl"))
        wheel = built.rename(folder / built.name)
        for scratch in (package, folder / "build", folder / "out"):
            shutil.rmtree(scratch)
    return wheel


def find_wheel(backend: str = "cpu") -> Path | None:
    """Return the wheel that `build_wheel` made of the current patch, None if there is none."""
    return next((source_dir() / f"wheel-{backend}").glob("*.whl"), None)


def _backend_flags(backend: str, arch: str | None) -> list[str]:
    if backend not in BACKEND_FLAGS:
        raise AaacError(f"`backend` {backend}: unknown; choose from {', '.join(BACKEND_FLAGS)}")
    if backend == "cuda" and not shutil.which("nvcc"):
        raise AaacError("`backend` cuda: nvcc not found; install the CUDA toolkit and put its bin folder on PATH")
    if backend == "vulkan" and not shutil.which("glslc"):
        raise AaacError(f"`backend` vulkan: glslc not found; {VULKAN_PACKAGES}")
    return [*BACKEND_FLAGS[backend], *([f"-DCMAKE_CUDA_ARCHITECTURES={arch}"] if arch else [])]


def _program(name: str) -> str:
    """Return the path of cmake or ninja, of this environment first, then of the system."""
    path = shutil.which(name, path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}")
    if path is None:
        raise AaacError(f"{name}: not found; `pip install {name}`")
    return path


def _run_logged(command: Sequence[str | os.PathLike[str]], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a build step with its output in `log`. Its progress is ninja's [done/all]."""
    tail: deque[str] = deque(maxlen=30)
    with (
        open(log, "a", buffering=1, encoding="utf-8") as f,
        progress(desc="building llama.cpp", unit="step") as bar,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", env=env
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            f.write(line)
            tail.append(line)
            if step := re.match(r"\s*\[(\d+)/(\d+)\]", line):
                bar.total = int(step[2])
                bar.update(int(step[1]) - bar.n)
    if process.returncode:
        output = "".join(tail)
        if missing := re.search(r"could not find [^\n]*\b(Vulkan|SPIRV-Headers)\b", output, re.IGNORECASE):
            raise AaacError(f"`backend` vulkan: CMake finds no {missing[1]}; {VULKAN_PACKAGES} (see {log})")
        raise AaacError(f"building llama.cpp failed: {last_error(output)} (see {log})")


@contextmanager
def _lock() -> Iterator[None]:
    """Let one process at a time fetch and build."""
    try:
        cache_dir().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_dir() / "llama.lock")
        lock.acquire()
    except OSError as e:
        reason = f"the cache folder cannot be written: {e.strerror}"
        raise AaacError(f"{cache_dir()}: {reason}; set AAAC_CACHE to another") from None
    try:
        yield
    finally:
        lock.release()


def last_error(output: str) -> str:
    """Return the last line of a program's output that names an error, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line for line in lines if re.search(r"error|unable|failed|unsupported|not supported", line, re.IGNORECASE)
    ]
    return re.sub(r"^ERROR:[\w-]+:", "", (errors or lines or ["no output"])[-1])
