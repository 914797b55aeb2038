"""Fetching, patching and finding llama.cpp. The build itself CI runs first."""

import shutil
import subprocess
import tarfile

import pytest

from aaac_gguf import cli, resources
from aaac_gguf.errors import AaacError
from aaac_gguf.llama import build as llama
from aaac_gguf.llama import patch, tools


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder in place of the user's."""
    monkeypatch.setenv("AAAC_CACHE", str(tmp_path / "cache"))
    llama.source_dir.cache_clear()
    yield tmp_path / "cache"
    llama.source_dir.cache_clear()


def archive(folder, files):
    """Make an archive with the source distribution's name and these files."""
    up = patch.upstream()
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


@pytest.fixture
def small_patch(tmp_path, monkeypatch):
    """A patch of one new file and two insertions, the pristine source that it is made for, and a copy to change."""
    shipped = tmp_path / "shipped"
    (shipped / "patches" / "new").mkdir(parents=True)
    (shipped / "cuda_kernels").mkdir()
    (shipped / "patches" / "new" / "ours.h").write_text("// ours\n")
    header = "diff --git a/g.c b/g.c\n--- a/g.c\n+++ b/g.c\n"
    hooks = f"{header}@@ -2,0 +3 @@ name\n+hook 1\n@@ -5,0 +7,2 @@\n+hook 2\n++++ b/not a header\n"
    (shipped / "patches" / "hooks.patch").write_text(hooks)
    shutil.copy(resources.shipped("patches") / "UPSTREAM.toml", shipped / "patches")
    monkeypatch.setattr(patch, "shipped", lambda name: shipped / name)
    for name in ("pinned", "tree"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "g.c").write_text("".join(f"line {i}\n" for i in range(1, 8)))
    return tmp_path / "pinned", tmp_path / "tree", shipped / "patches" / "hooks.patch"


def test_insertions_into_the_pinned_version(small_patch):
    pinned, _, _ = small_patch
    assert patch.apply(pinned, pinned) == []
    inserted = [
        "line 1",
        "line 2",
        "hook 1",
        "line 3",
        "line 4",
        "line 5",
        "hook 2",
        "+++ b/not a header",
        "line 6",
        "line 7",
    ]
    assert (pinned / "g.c").read_text().splitlines() == inserted
    assert (pinned / "ours.h").read_text() == "// ours\n"
    assert "3 lines in 2 insertions into 1 files of llama.cpp, 1 new files" in patch.summary()


def test_insertions_follow_their_neighbours(small_patch):
    pinned, tree, _ = small_patch
    (tree / "g.c").write_text("new\n" * 9 + (pinned / "g.c").read_text())
    assert patch.apply(tree, pinned) == []
    lines = (tree / "g.c").read_text().splitlines()
    assert lines[10:13] == ["line 2", "hook 1", "line 3"]
    assert lines[14:18] == ["line 5", "hook 2", "+++ b/not a header", "line 6"]


def test_insertions_that_find_no_place_are_named(small_patch):
    pinned, tree, _ = small_patch
    (tree / "g.c").write_text((pinned / "g.c").read_text().replace("line 5", "another line"))
    assert [str(hunk) for hunk in patch.apply(tree, pinned)] == ["g.c:5: hook 2"]
    assert "line 2\nhook 1\nline 3\n" in (tree / "g.c").read_text()
    (tree / "g.c").unlink()
    assert len(patch.apply(tree, pinned)) == 2


@pytest.mark.parametrize("line", ["-line 3\n", " line 3\n"])
def test_a_patch_that_does_more_than_insert_is_refused(small_patch, line):
    _, _, hooks = small_patch
    hooks.write_text(hooks.read_text() + line)
    with pytest.raises(AaacError, match=r"hooks.patch:9: not an insertion"):
        patch.hunks()


def test_a_checkout_is_copied_and_patched_and_left_as_it_is(small_patch, cache, tmp_path, monkeypatch):
    pinned, tree, _ = small_patch
    monkeypatch.setattr(llama, "download", lambda version: tmp_path)
    monkeypatch.setattr(llama, "unpack", lambda archive, into: pinned)
    with pytest.raises(AaacError, match=r"has no ggml/include/ggml\.h"):
        llama.patched_copy(tree)
    for name in ("ggml/include/ggml.h", "build/CMakeCache.txt", ".git/HEAD", "models/big.gguf"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("line\n")
    before = (tree / "g.c").read_text()
    copy = llama.patched_copy(tree)
    assert copy.parent == cache
    assert "hook 1" in (copy / "g.c").read_text()
    assert (tree / "g.c").read_text() == before
    assert sorted(path.name for path in copy.iterdir()) == ["g.c", "ggml", "models", "ours.h"]
    assert list((copy / "models").iterdir()) == []
    assert llama.patched_copy(tree) == copy
    (tree / "g.c").write_text(before + "more\n")
    assert llama.patched_copy(tree) != copy
    (tree / "g.c").write_text(before.replace("line 2", "line two"))
    with pytest.raises(AaacError, match=r"1 of the patch's 2 insertions find no place \(g\.c:2: hook 1\)"):
        llama.patched_copy(tree)
    assert not [path for path in cache.iterdir() if path.name.startswith("unpack-")]


def test_the_patched_source_has_our_files(llama_source):
    for place, path in patch.new_files().items():
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


def test_vulkan_without_glslc(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert cli.main(["llama", "build", "--backend", "vulkan"]) == 2
    assert "glslc not found; on Debian and Ubuntu, `apt install libvulkan-dev glslc" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("Vulkan", 'Could NOT find Vulkan (missing: Vulkan_INCLUDE_DIR) (found version "")'),
        ("SPIRV-Headers", 'Could not find a package configuration file provided by "SPIRV-Headers"'),
    ],
)
def test_vulkan_without_headers(tmp_path, package, words):
    command = ["sh", "-c", 'printf "%s\\n" "$@"; exit 1', "cmake", words, "-- Configuring incomplete, errors occurred!"]
    with pytest.raises(AaacError, match=rf"^`backend` vulkan: CMake finds no {package}; .* spirv-headers` \(see .*log"):
        llama._run_logged(command, tmp_path / "log")


def test_errors_of_the_library_name_settings(tmp_path):
    with pytest.raises(AaacError, match=r"^`backend` metal: unknown; choose from cpu, cuda, vulkan"):
        llama.build("metal")
    with pytest.raises(AaacError, match=r"^`checkout` .*: not a llama\.cpp source folder"):
        llama.build(checkout=tmp_path)


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
    """llama.cpp's own operation tests pass on the AAAC cases: fast kernels against its reference mode."""
    result = subprocess.run(
        [tools.tool("test-backend-ops"), "test", "-b", "CPU", "-p", "aaac"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:]
    n_ok = result.stdout.count("OK")
    print(f"{n_ok} cases")
    assert n_ok > 50
