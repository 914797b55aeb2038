"""Interrupted conversions go on to the same bytes, split ones load, and nothing half-written looks whole."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_source

from aaac_gguf import cli, resources
from aaac_gguf.errors import AaacError
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files import output
from aaac_gguf.files.atomic import write_error
from aaac_gguf.files.journal import Journal
from aaac_gguf.files.layout import lay_out
from aaac_gguf.llama import evaluate, tools

# Processes that have torch loaded already, forked from one that never ran it: torch's threads do not survive a fork.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["torch", "aaac_gguf.cli", "aaac_gguf.conversion.convert"])


def convert(source, out, *args) -> int:
    return cli.main([str(arg) for arg in ("convert", source, "-o", out, *args)])


@pytest.fixture
def model(tmp_path, rng) -> Path:
    """Ten tensors of some size, so that a conversion takes a while."""
    weight = lambda n: rng.normal(size=(n, 256)).astype(np.float16)  # noqa: E731
    matrices = {
        f"blk.0.{name}.weight": weight(64)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_gate", "ffn_down")
    }
    norm = {"blk.0.attn_norm.weight": np.ones(256, dtype=np.float32)}
    return write_source(
        tmp_path / "source.gguf", {"token_embd.weight": weight(64), **norm, **matrices, "output.weight": weight(64)}
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else b"a folder" for p in folder.iterdir()}


def run_and_kill(
    conversion: tuple, *, after_syncs: int | None = None, after_seconds: float | None = None
) -> int | None:
    """Convert in a process that gets SIGKILL at a time, or at its n-th lasting call. Returns its exit code."""
    process = FORK.Process(target=_child, args=(conversion, after_syncs))
    process.start()
    if after_seconds is not None:
        time.sleep(after_seconds)
        process.kill()
    process.join()
    return process.exitcode


def _kilobytes(text: str) -> int:
    """--split-max-size in K: the models here are small."""
    return 1000 * int(text.removesuffix("K"))


def _child(conversion: tuple, after_syncs: int | None) -> None:
    cli._split_size = _kilobytes
    torch.cpu.get_capabilities = dict  # as in the process of the tests
    if after_syncs is not None:
        left = iter(range(after_syncs))
        for name in ("fsync", "replace"):
            setattr(os, name, _killing(getattr(os, name), left))
    raise SystemExit(convert(*conversion))


def _killing(function: Callable, left) -> Callable:
    def call(*args):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    return call


SPLIT = ("--split-max-size", "25K")


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(cli, "_split_size", _kilobytes)


@pytest.mark.parametrize("args", [(), SPLIT], ids=["one file", "split"])
@pytest.mark.parametrize("seed", range(2))
def test_a_conversion_killed_again_and_again_ends_in_the_same_bytes(model, tmp_path, small_units, args, seed):
    """SIGKILL at random lasting steps of the writer and at random times."""
    for name in ("reference", "killed"):
        (tmp_path / name).mkdir()
    start = time.monotonic()
    assert run_and_kill((model, tmp_path / "reference" / "out.gguf", *args)) == 0
    seconds = time.monotonic() - start
    expected = files_of(tmp_path / "reference")
    assert len(expected) == (5 if args else 1)
    dice = random.Random(seed)
    conversion = (model, tmp_path / "killed" / "out.gguf", *args, "--resume")
    kills = 0
    for n in range(12):
        limit = (
            {"after_syncs": dice.randrange(2, 10)} if n < 2 or n % 2 else {"after_seconds": dice.uniform(0, seconds)}
        )
        code = run_and_kill(conversion, **limit)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        found = files_of(tmp_path / "killed")
        first = next(iter(sorted(expected)))
        if first in found:  # without it nothing can be opened
            assert {name: found.get(name) for name in expected} == expected
    assert kills > 1
    assert code == 0 or run_and_kill(conversion) == 0
    assert files_of(tmp_path / "killed") == expected


@pytest.mark.slow
def test_every_lasting_step_can_be_the_last(model, tmp_path, small_units):
    """Kill before each fsync and rename in turn, over an older model, and resume: never a mixture that looks whole."""
    both = []
    for method in ("paper", "aaac"):
        (tmp_path / method).mkdir()
        assert convert(model, tmp_path / method / "out.gguf", *SPLIT, "--method", method) == 0
        both.append(files_of(tmp_path / method))
    expected = both[1]
    step = 0
    while True:
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "paper", folder)
        code = run_and_kill((model, folder / "out.gguf", *SPLIT), after_syncs=step)
        found = files_of(folder)
        if "out-00001-of-00005.gguf" in found:
            assert {name: found[name] for name in expected} in both
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert run_and_kill((model, folder / "out.gguf", *SPLIT, "--resume")) == 0
        assert files_of(folder) == expected
        shutil.rmtree(folder)
        step += 5 if step < 20 else 1  # the steps of one tensor are like those of another
    assert step > 25


def test_a_calibrated_conversion_resumes(llama_source, tmp_path, capsys):
    """Calibration is done again and comes out the same. The full-precision GGUF of the killed run is removed."""
    args = ("--calib-sequences", 2, "--calib-length", 32)
    assert convert(resources.MODEL, tmp_path / "reference.gguf", *args) == 0
    report = capsys.readouterr().out
    (tmp_path / "killed").mkdir()
    out = tmp_path / "killed" / "out.gguf"
    assert run_and_kill((resources.MODEL, out, *args), after_syncs=30) == -signal.SIGKILL
    assert (tmp_path / "killed" / "out.gguf.partial.source").is_dir()
    capsys.readouterr()
    assert convert(resources.MODEL, out, *args, "--resume") == 0
    assert "starting from the beginning" not in capsys.readouterr().err
    assert files_of(out.parent) == {"out.gguf": (tmp_path / "reference.gguf").read_bytes()}
    assert "relative error: mean" in report


@pytest.fixture
def interrupted(model, tmp_path) -> Path:
    """The output of a conversion that was killed after some tensors."""
    out = tmp_path / "out.gguf"
    assert run_and_kill((model, out), after_syncs=9) == -signal.SIGKILL
    assert len((tmp_path / "out.gguf.partial.jsonl").read_text().splitlines()) == 5
    return out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--type", "AAAC4_G32"], "type is AAAC4_G32 and was AAAC4_G16"),
        (["--tensor-type", "attn_q=F16"], "tensor_types is "),
        (["--seed", "1"], "seed is 1 and was 0"),
        (["--method", "paper"], "method is paper and was aaac"),
        (["--split-max-size", "1M"], "split_max_size is 1000000 and was None"),
    ],
)
def test_other_settings_are_not_resumed(model, interrupted, capsys, args, words):
    before = files_of(interrupted.parent)
    assert convert(model, interrupted, *args, "--resume") == 2
    err = capsys.readouterr().err
    assert f"cannot resume, {words}" in err
    assert err.count("\n") == 1
    assert files_of(interrupted.parent) == before


def test_another_source_or_version_is_not_resumed(model, interrupted, capsys, monkeypatch):
    data = bytearray(model.read_bytes())
    data[-100] ^= 1
    model.write_bytes(data)
    assert convert(model, interrupted, "--resume") == 2
    assert "cannot resume, source is " in capsys.readouterr().err
    data[-100] ^= 1
    model.write_bytes(data)
    with monkeypatch.context() as other:
        other.setattr("aaac_gguf.conversion.job.__version__", "9.9")
        assert convert(model, interrupted, "--resume") == 2
    assert "cannot resume, version is aaac-gguf 9.9" in capsys.readouterr().err
    assert convert(model, interrupted, "--resume") == 0


def test_a_missing_partial_is_not_resumed(model, interrupted, capsys):
    interrupted.with_name("out.gguf.partial").unlink()
    assert convert(model, interrupted, "--resume") == 2
    assert "out.gguf.partial is missing" in capsys.readouterr().err


def test_without_resume_it_starts_over(model, interrupted, capsys):
    """Also where the leftover is of a split conversion: nothing of it stays."""
    assert convert(model, interrupted, "--type", "F16") == 0
    assert sorted(files_of(interrupted.parent)) == ["out.gguf", "source.gguf"]
    assert convert(model, interrupted, "--resume") == 0
    assert "nothing to resume" in capsys.readouterr().err


def test_a_torn_journal_line_is_dropped(model, interrupted):
    journal = interrupted.with_name("out.gguf.partial.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    name = json.loads(lines[-1])["tensor"]
    journal.write_bytes(b"".join(lines)[:-9])
    with Journal(interrupted, resume=True) as state:
        assert len(state.records) == len(lines) - 2
        assert name not in state.records
        with pytest.raises(AaacError, match="another conversion is writing it"), Journal(interrupted):
            pass


def test_ctrl_c_keeps_what_is_finished(model, tmp_path, capsys, monkeypatch):
    assert convert(model, tmp_path / "reference.gguf") == 0
    write_tensor, left = output.write_tensor, iter(range(4))

    def interrupt(*args) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write_tensor(*args)

    monkeypatch.setattr(output, "write_tensor", interrupt)
    assert convert(model, tmp_path / "out.gguf") == 130
    assert "4 tensors of " in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()
    monkeypatch.undo()
    assert convert(model, tmp_path / "out.gguf", "--resume") == 0
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "reference.gguf").read_bytes()


def test_too_little_disk_is_noticed_before_the_first_byte(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    assert convert(model, tmp_path / "out.gguf") == 2
    err = capsys.readouterr().err
    assert "out.gguf: needs 94,112 bytes, and 10,000 are free" in err
    assert sorted(files_of(tmp_path)) == ["source.gguf"]


@pytest.mark.parametrize(
    ("max_bytes", "groups"),
    [(None, [4]), (300, [3, 1]), (160, [1, 2, 1]), (200, [2, 1, 1]), (1, [1, 1, 1, 1]), (480, [4])],
)
def test_shards_hold_what_fits(max_bytes, groups):
    """Padded sizes 128, 64, 96, 128 bytes, as llama-gguf-split counts."""
    infos = [gguf_io.TensorInfo(str(n), (n,), gguf_io.GGMLQuantizationType.F32) for n in (32, 10, 20, 32)]
    kv = {"general.architecture": gguf_io.Value("llama", gguf_io.GGUFValueType.STRING)}
    shards = lay_out(Path("out.gguf"), kv, infos, max_bytes).shards
    assert [len(shard.tensors) for shard in shards] == groups
    assert shards[0].path.name == ("out.gguf" if len(groups) == 1 else f"out-00001-of-{len(groups):05}.gguf")


def test_split_output_reads_like_one_file(model, tmp_path, capsys, small_units):
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    assert convert(model, whole) == 0
    assert convert(model, out, *SPLIT, "--dry-run") == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    shards = sorted(tmp_path.glob("out-*"))
    assert shards == []
    assert convert(model, out, *SPLIT) == 0
    shards = sorted(tmp_path.glob("out-*"))
    assert [p.name for p in shards] == [f"out-0000{no}-of-00005.gguf" for no in range(1, 6)]
    assert last[:2] == ["5", "files"]
    assert int(last[2].replace(",", "")) == sum(p.stat().st_size for p in shards)
    expected = gguf_io.read(whole)
    for path in (shards[0], shards[3]):
        file = gguf_io.read(path)
        assert file.path == shards[0]
        assert list(file.tensors) == list(expected.tensors)
        assert file.get("tokenizer.ggml.tokens") == ["a", "bc", "d"]
        for name in file.tensors:
            np.testing.assert_array_equal(file[name], expected[name])


def test_split_files_that_are_no_whole_model(model, tmp_path, small_units):
    assert convert(model, tmp_path / "out.gguf", *SPLIT) == 0
    shards = sorted(tmp_path.glob("out-*"))
    shards[2].rename(tmp_path / "away")
    with pytest.raises(AaacError, match=r"out-00003-of-00005.gguf: is missing, the model is split into 5 files"):
        gguf_io.read(shards[0])
    shutil.copy(shards[1], shards[2])
    with pytest.raises(AaacError, match=r"out-00003-of-00005.gguf: split.no is 1, the name says 2"):
        gguf_io.read(shards[0])
    shutil.copy(shards[0], tmp_path / "renamed.gguf")
    with pytest.raises(AaacError, match=r"renamed.gguf: split.count is 5, the name says 1"):
        gguf_io.read(tmp_path / "renamed.gguf")


@pytest.mark.parametrize("text", ["2", "G", "0M", "1.5G", "2K"])
def test_split_sizes_are_those_of_llama_gguf_split(text, capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "x", "-o", "y", "--split-max-size", text])
    assert "give a whole number of M or G" in capsys.readouterr().err


@pytest.mark.llama
def test_patched_llama_loads_a_split_model(patched, demo_gguf, tmp_path):
    """The same logits as from one file, and llama-gguf-split merges it into that file's tensors."""
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    assert convert(demo_gguf, whole) == 0
    assert convert(demo_gguf, out, "--split-max-size", "1M") == 0
    first = tmp_path / "out-00001-of-00003.gguf"
    logits = []
    for path in (whole, first):
        evaluate.save_logits(path, resources.SAMPLE_TEXT, tmp_path / "logits", 256)
        logits.append((tmp_path / "logits").read_bytes())
    assert logits[0] == logits[1]
    tools.run_logged_tool("llama-gguf-split", ["--merge", first, tmp_path / "merged.gguf"], tmp_path / "log")
    merged, expected = gguf_io.read(tmp_path / "merged.gguf"), gguf_io.read(whole)
    assert list(merged.tensors) == list(expected.tensors)
    for name, tensor in merged.tensors.items():
        np.testing.assert_array_equal(tensor.data, expected.tensors[name].data)
    assert merged.codecs.keys() == expected.codecs.keys()


def test_an_error_of_another_file_names_it(tmp_path):
    out = tmp_path / "out.gguf"
    own, other = (FileNotFoundError(2, "No such file or directory", str(path)) for path in (f"{out}.partial", "/other"))
    assert str(write_error(out, own)) == f"{out}: cannot be written: No such file or directory; choose another output"
    assert "No such file or directory (/other);" in str(write_error(out, other))
