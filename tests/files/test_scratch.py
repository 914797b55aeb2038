"""Folders for temporary files: the disk and the logs that errors name."""

import collections
import errno
import shutil
import tempfile
from pathlib import Path

import pytest

from aaac_gguf import cli, resources
from aaac_gguf.errors import AaacError
from aaac_gguf.files import scratch
from aaac_gguf.files.scratch import temporary_folder

Usage = collections.namedtuple("Usage", "total used free")


@pytest.fixture
def full_disk(monkeypatch, tmp_path):
    """A folder of temporary files on a disk with hardly any room."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(3 << 20, 3 << 20, 100))
    return tmp_path


def test_the_folder_is_removed(tmp_path):
    with temporary_folder("x-", tmp_path) as folder:
        (folder / "file").touch()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named(tmp_path, number):
    with pytest.raises(AaacError, match=rf"^{tmp_path}: the disk is full.*TMPDIR"), temporary_folder("x-", tmp_path):
        raise OSError(number, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_the_reason_of_another_programs_error(full_disk):
    with pytest.raises(AaacError, match=rf"^{full_disk}: the disk is full"), temporary_folder("x-"):
        raise AaacError("logits: the file is cut short")


def test_other_errors_pass(tmp_path):
    with pytest.raises(OSError, match="denied"), temporary_folder("x-", tmp_path):
        raise OSError(errno.EACCES, "denied")
    with pytest.raises(AaacError, match=r"^x$"), temporary_folder("x-", tmp_path):
        raise AaacError("x")


def test_a_log_that_an_error_names_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("AAAC_CACHE", str(tmp_path / "cache"))
    with pytest.raises(AaacError) as e, temporary_folder("x-", tmp_path) as folder:
        (folder / "perplexity.log").write_text("the reason")
        (folder / "other.log").touch()
        raise AaacError(f"llama-perplexity failed (see {folder / 'perplexity.log'})")
    kept = Path(str(e.value).partition("(see ")[2].removesuffix(")"))
    assert kept.read_text() == "the reason"
    assert [p.name for p in kept.parent.iterdir()] == ["perplexity.log"]


def test_room_is_checked_before_it_is_used(full_disk):
    with pytest.raises(AaacError, match=rf"^{full_disk}: 1,000 bytes are needed for temporary files, and 100 are free"):
        scratch.check_room(full_disk / "x", 1000)
    scratch.check_room(full_disk / "x", 100)


def test_verify_names_the_disk_of_temporary_files(llama_source, full_disk, source, capsys):
    assert cli.main(["verify", str(source), "--source", str(resources.MODEL)]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"aaac-gguf: error: {full_disk}: ")
    assert "bytes are needed for temporary files, and 100 are free" in err
