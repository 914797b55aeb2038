"""Fetching, patching and finding llama.cpp; the build itself is what CI runs first."""

import shutil
import subprocess
import tarfile

import pytest

from aaac_gguf import cli, llama
from aaac_gguf.errors import AaacError


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("AAAC_CACHE", str(tmp_path / "cache"))
    llama.source_dir.cache_clear()
    yield tmp_path / "cache"
    llama.source_dir.cache_clear()


def archive(folder, files):
    """A stand-in for the source distribution."""
    up = llama.upstream()
    root = f"{up.package.replace('-', '_')}-{up.version}"
    for name, text in files.items():
        path = folder / root / up.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    out = folder / f"{root}.tar.gz"
    with tarfile.open(out, "w:gz") as tar:
        tar.add(folder / root, root)
    return out


def test_a_changed_archive_is_refused(cache, tmp_path, capsys):
    cache.mkdir()
    shutil.copy(archive(tmp_path, {"README.md": "not llama.cpp"}), cache)
    assert cli.main(["llama", "build"]) == 2
    err = capsys.readouterr().err
    assert "sha256 is" in err
    assert "delete the file and try again" in err


def test_no_network_and_nothing_cached(cache, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert cli.main(["llama", "build"]) == 2
    assert "pip could not download it" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AAAC_CACHE", str(tmp_path / "file" / "cache"))
    llama.source_dir.cache_clear()
    assert cli.main(["llama", "build"]) == 2
    llama.source_dir.cache_clear()
    assert "the cache folder cannot be written" in capsys.readouterr().err


def test_the_patch_refuses_a_tree_that_it_does_not_fit(tmp_path):
    (tmp_path / "ggml" / "include").mkdir(parents=True)
    (tmp_path / "ggml" / "include" / "ggml.h").write_text("// another version\n")
    with pytest.raises(AaacError, match="the patch does not apply"):
        llama.apply_patch(tmp_path)


def test_the_patch_is_insertions_only():
    text = "".join(path.read_text() for path in sorted(llama.shipped("patches").glob("*.patch")))
    removed = [line for line in text.splitlines() if line.startswith("-") and not line.startswith("---")]
    assert removed == []
    inserted = [line for line in text.splitlines() if line.startswith("+") and not line.startswith("+++")]
    print(f"{len(inserted)} inserted lines")
    assert inserted


def test_the_patched_source_has_our_files(llama_source):
    for place, path in llama.patch_files().items():
        assert (llama_source / place).read_bytes() == path.read_bytes()
    assert "GGML_TYPE_AAAC4_G128 = 82" in (llama_source / "ggml/include/ggml.h").read_text()


def test_tools_that_do_not_exist(capsys):
    assert cli.main(["llama", "run", "llama-nothing"]) == 2
    assert "not one of the built tools; choose from llama-cli" in capsys.readouterr().err


def test_tools_that_are_not_built(cache, capsys):
    assert cli.main(["llama", "run", "llama-bench"]) == 2
    assert "not built; run `aaac-gguf llama build`" in capsys.readouterr().err


def test_cuda_without_a_toolkit(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["llama", "build", "--backend", "cuda"]) == 2
    assert "nvcc not found" in capsys.readouterr().err


@pytest.mark.llama
def test_run_passes_arguments_and_status_through(patched, capfd):
    assert cli.main(["llama", "run", "llama-perplexity", "--version"]) == 0
    captured = capfd.readouterr()
    assert "version" in captured.out + captured.err
    assert cli.main(["llama", "run", "llama-quantize", "--no-such-flag"]) != 0


@pytest.mark.llama
def test_building_again_does_nothing(patched):
    stamp = patched.parent / "built"
    before = stamp.stat().st_mtime_ns
    assert llama.build() == patched
    assert stamp.stat().st_mtime_ns == before


@pytest.mark.llama
def test_backend_ops(patched):
    """llama.cpp's own operation tests on the AAAC cases, fast kernels against its reference mode."""
    result = subprocess.run([llama.tool("test-backend-ops"), "test", "-b", "CPU", "-p", "aaac"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    n_ok = result.stdout.count("OK")
    print(f"{n_ok} cases")
    assert n_ok > 50
