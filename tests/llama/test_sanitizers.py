"""Patched llama.cpp, built with AddressSanitizer and UndefinedBehaviorSanitizer, refuses hostile files or loads them.

Needs AAAC_ASAN_BIN, the folder of such a build's binaries. patches/README.md has the commands. AAAC_ASAN_FILES sets how
many files. A file may trip an assertion of llama.cpp's own, which is no memory error: it is counted and passes. An
assertion in our files fails.
"""

import os
import re
import signal
import subprocess
from collections import Counter
from pathlib import Path

import hostile
import pytest

pytestmark = pytest.mark.llama

OPTIONS = {
    "ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0:hard_rss_limit_mb=3000",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}
ASSERTION = re.compile(r"(\S+?:\d+): (GGML_ASSERT|.*Assertion|.*GGML_ABORT)")


@pytest.fixture(scope="module")
def bench():
    folder = os.environ.get("AAAC_ASAN_BIN")
    if not folder:
        pytest.skip("AAAC_ASAN_BIN is not set to the folder of a sanitizer build (patches/README.md)")
    path = Path(folder) / "llama-bench"
    result = subprocess.run(
        [path, "--help"], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "help=1"}
    )
    assert "AddressSanitizer" in result.stdout + result.stderr, f"{path} is built without it"
    return path


def load(bench: Path, model: Path) -> tuple[int, str]:
    """Load `model`, and compute a prompt of 4 tokens and one more. Returns status and output."""
    log = model.with_suffix(".log")
    with open(log, "wb") as f:
        args = [bench, "-v", "-m", model, "-t", "1", "-r", "1", "-p", "4", "-n", "1"]
        status = subprocess.run(
            args, stdout=f, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | OPTIONS, timeout=120
        ).returncode
    return status, log.read_text(errors="replace")


def outcome(status: int, output: str) -> str:
    """Return what a run ended in: "ran", "message", or the place of an upstream assertion. Fails for anything else."""
    assert "AddressSanitizer" not in output, output[output.index("AddressSanitizer") - 100 :][:3000]
    ours = [line for line in output.splitlines() if "runtime error:" in line and "aaac" in line]
    assert not ours, ours
    if status == 0:
        return "ran"
    if status == 1:
        assert re.search("error|failed|unable", output), output[-2000:]
        return "message"
    found = ASSERTION.search(output)
    assert status == -signal.SIGABRT, (status, output[-2000:])
    assert found, output[-2000:]
    assert "aaac" not in found[0], found[0]
    return f"assertion {found[1]}"


def test_hostile_files(bench, tmp_path):
    paths = hostile.write_corpus(tmp_path, int(os.environ.get("AAAC_ASAN_FILES", "300")))
    for whole in ("base.gguf", "base-moe.gguf"):
        status, output = load(bench, tmp_path / whole)
        assert outcome(status, output) == "ran", output[-2000:]
        assert "runtime error:" not in output
    outcomes, upstream = Counter(), Counter()
    for path in paths:
        status, output = load(bench, path)
        try:
            outcomes[outcome(status, output)] += 1
        except AssertionError as e:
            pytest.fail(f"{path.name} (tests/hostile.py makes it again): {e}")
        upstream.update(set(re.findall(r"(\S+?:\d+):\d+: runtime error:", output)))
        path.unlink()
        path.with_suffix(".log").unlink()
    print(f"{len(paths)} files: {dict(outcomes.most_common())}")
    print(f"undefined behaviour upstream: {dict(upstream.most_common())}")
    assert outcomes["message"] > 0.5 * len(paths)
    assert outcomes["ran"] > 0.02 * len(paths)
