"""Full disks, caches, other processes and signals: one line says what is wrong, and nothing is half-written."""

import errno
import fcntl
import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
from conftest import write_source

from aaac_gguf import cli
from aaac_gguf.errors import AaacError
from aaac_gguf.files import atomic as atomic_module
from aaac_gguf.files import output
from aaac_gguf.files.atomic import atomic, open_alone
from aaac_gguf.files.journal import Journal
from aaac_gguf.llama import build as llama


class FullDisk:
    """A file on which every write fails."""

    def __init__(self, f):
        self.f = f

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.f.close()

    def __getattr__(self, name):
        return getattr(self.f, name)

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("verb", "module", "opener"), [("convert", output, "open"), ("dequantize", atomic_module, "open_alone")]
)
def test_a_full_disk(verb, module, opener, source, tmp_path, monkeypatch, refused):
    opened = getattr(module, opener, open)
    monkeypatch.setattr(module, opener, lambda *args: FullDisk(opened(*args)), raising=False)
    assert "the disk is full" in refused(verb, source, "-o", tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]


def test_a_limit_on_file_sizes(source, tmp_path):
    """The kernel's own error, in the middle of a file."""
    command = [sys.executable, "-m", "aaac_gguf", "convert", source, "-o", tmp_path / "out.gguf"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert result.returncode == 2
    assert (
        result.stderr.splitlines()[-1]
        == f"aaac-gguf: error: {tmp_path / 'out.gguf'}: cannot be written: File too large; choose another output"
    )
    assert all(".partial" in p.name for p in tmp_path.iterdir() if p.name != "source.gguf")


def test_two_conversions_into_one_output(source, tmp_path, refused):
    out = tmp_path / "out.gguf"
    with Journal(out):
        assert f"{out}: another conversion is writing it" in refused("convert", source, "-o", out)
    assert cli.main(["convert", str(source), "-o", str(out)]) == 0  # the lock went with the journal
    assert {p.name for p in tmp_path.iterdir()} == {"source.gguf", "out.gguf"}


def _write_often(path: Path, letter: bytes, times: int) -> None:
    for _ in range(times):
        try:
            with atomic(path) as f:
                for _ in range(10):
                    f.write(letter * 1000)
                    f.flush()
        except AaacError as e:
            assert "another aaac-gguf" in str(e)


def test_many_writers_of_one_output_leave_one_whole_file(tmp_path):
    context, path = multiprocessing.get_context("fork"), tmp_path / "out"
    writers = [context.Process(target=_write_often, args=(path, letter, 200)) for letter in (b"a", b"b", b"c")]
    for process in writers:
        process.start()
    seen = set()
    while any(process.is_alive() for process in writers):
        if path.exists():
            data = path.read_bytes()
            assert data in (b"a" * 10_000, b"b" * 10_000, b"c" * 10_000)
            seen.add(data[:1])
    assert seen
    assert [process.exitcode for process in writers] == [0, 0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_signals_leave_nothing_half_written(number, tmp_path, rng):
    weight = rng.normal(size=(4096, 1024)).astype(np.float16)
    big = write_source(tmp_path / "big.gguf", {f"blk.{i}.attn_q.weight": weight for i in range(8)})
    out, partial = tmp_path / "out.gguf", tmp_path / "out.gguf.partial"

    # A parent in the background hands down that SIGINT is ignored, and nohup that SIGHUP is, and that would last.
    def restore():
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    command = [sys.executable, "-m", "aaac_gguf", "convert", big, "-o", out]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=restore)
    deadline = time.monotonic() + 120
    while not (partial.exists() and partial.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number, err
    assert err.splitlines()[-1].endswith(f"aaac-gguf: interrupted by {number.name}")
    assert all(".partial" in p.name for p in tmp_path.iterdir() if p.name != "big.gguf")


@pytest.fixture
def read_only_cache(tmp_path, monkeypatch):
    """An empty cache folder in which no lock can be taken."""

    class NoLock:
        def __init__(self, path):
            pass

        def acquire(self):
            raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setenv("AAAC_CACHE", str(tmp_path))
    monkeypatch.setattr(llama, "FileLock", NoLock)
    assert filelock.FileLock is not NoLock
    llama.source_dir.cache_clear()
    yield tmp_path
    llama.source_dir.cache_clear()


def test_a_read_only_cache_without_a_build_says_what_to_do(read_only_cache, refused):
    assert "the cache folder cannot be written: Read-only file system; set AAAC_CACHE" in refused("llama", "build")


def test_a_read_only_cache_with_a_build_is_used(read_only_cache):
    folder = llama.source_dir() / "build-cpu"
    (folder / "bin").mkdir(parents=True)
    (folder / "built").touch()
    assert llama.fetch() == llama.source_dir()
    assert llama.build() == folder / "bin"


def test_a_lock_on_a_file_that_is_gone_does_not_count(tmp_path, monkeypatch):
    """The one who held the lock may have renamed its file away before this one locks it, as a conversion does."""
    path, lock = tmp_path / "out.partial", fcntl.flock

    def late(file, operation):
        if not moved.exists():
            path.rename(moved)
        lock(file, operation)

    moved = tmp_path / "out"
    monkeypatch.setattr(fcntl, "flock", late)
    with open_alone(path) as f:
        f.write(b"x")
    assert moved.read_bytes() == b""
    assert path.read_bytes() == b"x"
