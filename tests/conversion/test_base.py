"""A finished file of which some tensors are quantized anew: what is copied, what the new ones see, what is refused."""

import json

import numpy as np
import pytest
from conftest import write_source

import aaac_gguf as aaac
from aaac_gguf import cli, resources
from aaac_gguf.calibration.sequential import BlockMoments
from aaac_gguf.conversion import encoder
from aaac_gguf.files.gguf import read
from aaac_gguf.files.imatrix import Entry, Imatrix, write_imatrix
from aaac_gguf.llama import tools


def convert(source, out, *args) -> int:
    return cli.main(["convert", str(source), "-o", str(out), *map(str, args)])


@pytest.fixture
def finished(source, tmp_path):
    """Return a finished file with AAAC and stock types."""
    out = tmp_path / "finished.gguf"
    assert convert(source, out, "--tensor-type", "attn_q=Q4_K", "--seed", 1) == 0
    return out


def test_only_what_is_named_is_made_anew(source, finished, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    flags = ("--from", finished, "--tensor-type", "attn=Q6_K", "--tensor-type", "ffn=AAAC4_G16")
    capsys.readouterr()
    assert convert(source, out, *flags, "--dry-run") == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "weight" in line}
    assert lines["blk.0.ffn_down.weight"][4:7] == ["F16", "AAAC4_G16", "kept"]
    assert convert(source, out, *flags) == 0
    before, after = read(finished), read(out)
    types = {name: tensor.tensor_type.name for name, tensor in after.tensors.items()}
    assert types["blk.0.attn_q.weight"] == "Q6_K"
    assert types["blk.0.attn_k.weight"] == "Q8_0"  # Q6_K does not fit its rows of 96
    for name in ("token_embd.weight", "blk.0.attn_norm.weight", "blk.0.ffn_down.weight"):
        assert after.tensors[name].tensor_type == before.tensors[name].tensor_type
        np.testing.assert_array_equal(after.tensors[name].data, before.tensors[name].data)
    assert list(after.codecs) == ["blk.0.ffn_down.weight"]
    np.testing.assert_array_equal(after["blk.0.ffn_down.weight"], before["blk.0.ffn_down.weight"])
    assert after.get("general.file_type") == before.get("general.file_type")
    description = json.loads(after.get("aaac.calibration"))
    assert description["others"] == before.get("aaac.calibration")
    full = read(source)["blk.0.attn_q.weight"]
    error = np.square(after["blk.0.attn_q.weight"] - full).sum() / np.square(full).sum()
    assert error < 0.001
    assert not aaac.verify(out).failures


def test_a_file_by_llama_quantize(patched, demo_gguf, tmp_path):
    """Keep what it says of its importance, and copy a type that is not made here."""
    full = read(demo_gguf)
    ones = {name: np.ones((1, shape[-1]), np.float32) for name, shape in full.shapes.items() if len(shape) > 1}
    entries = {name: Entry(sums, np.ones(1, np.float32)) for name, sums in ones.items()}
    write_imatrix(tmp_path / "i.gguf", Imatrix(entries, ["x"], 1, 1))
    theirs, out = tmp_path / "theirs.gguf", tmp_path / "out.gguf"
    flags = ["--imatrix", tmp_path / "i.gguf", "--tensor-type", "attn_q=iq3_s"]
    tools.run_logged_tool("llama-quantize", [*flags, demo_gguf, theirs, "Q4_0"], tmp_path / "log")
    assert convert(demo_gguf, out, "--from", theirs, "--tensor-type", r"blk\.0\.attn_v=Q8_0") == 0
    before, after = read(theirs), read(out)
    assert after.tensors["blk.0.attn_q.weight"].tensor_type.name == "IQ3_S"
    assert after.tensors["blk.0.attn_v.weight"].tensor_type.name == "Q8_0"
    for name in set(after.tensors) - {"blk.0.attn_v.weight"}:
        np.testing.assert_array_equal(after.tensors[name].data, before.tensors[name].data)
    assert after.get("quantize.imatrix.file") == before.get("quantize.imatrix.file") is not None


# Two blocks of four are rounded by search, to 8 bits, which is quick.
TYPES = ("--type", "Q4_0", "--tensor-type", r"blk\.[23]|ffn_(gate|up)=F16", "--embedding-type", "Q8_0")
CALIBRATION = ("--calib-sequences", 2, "--calib-length", 32)
NEW = "blk.1.attn_output.weight"


@pytest.fixture(scope="module")
def demo_finished(llama_source, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "demo.gguf"
    assert convert(resources.MODEL, out, *CALIBRATION, *TYPES) == 0
    return out


def test_new_tensors_make_up_for_the_errors_of_those_that_are_kept(demo_finished, tmp_path, monkeypatch):
    """As if all had been quantized now: the same bytes as in a conversion in which it has the new type at once."""
    seen = []
    replace = BlockMoments.replace
    out, direct = tmp_path / "out.gguf", tmp_path / "direct.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(BlockMoments, "replace", lambda self, name, w: seen.append(name) or replace(self, name, w))
        assert convert(resources.MODEL, out, *CALIBRATION, "--from", demo_finished, "--tensor-type", f"{NEW}=Q5_0") == 0
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
    assert sorted(seen) == sorted(f"blk.{i}.{part}.weight" for i in (0, 1) for part in parts)
    assert seen[-1] == NEW
    assert convert(resources.MODEL, direct, *CALIBRATION, *TYPES, "--tensor-type", f"{NEW}=Q5_0") == 0
    before, after, expected = read(demo_finished), read(out), read(direct)
    np.testing.assert_array_equal(after.tensors[NEW].data, expected.tensors[NEW].data)
    for name in set(after.tensors) - {NEW}:
        np.testing.assert_array_equal(after.tensors[name].data, before.tensors[name].data)


def test_the_result_verifies(patched, demo_finished, tmp_path):
    out = tmp_path / "out.gguf"
    flags = ("--calib", "none", "--from", demo_finished, "--tensor-type", "blk.0.attn_v=AAAC4_G16")
    assert convert(resources.MODEL, out, *flags) == 0
    assert not aaac.verify(out, resources.MODEL).failures


def test_an_interrupted_conversion_resumes(source, finished, tmp_path, monkeypatch, refused, capsys):
    flags = ("--from", finished, "--tensor-type", "attn_q|ffn_down=Q5_0")
    assert convert(source, tmp_path / "whole.gguf", *flags) == 0

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "quantize", interrupted)
        assert convert(source, out, *flags) == 130
    capsys.readouterr()
    content = finished.read_bytes()
    finished.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "cannot resume, content of the base is" in refused("convert", source, "-o", out, *flags, "--resume")
    finished.write_bytes(content)
    assert convert(source, out, *flags, "--resume") == 0
    assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_an_output_in_place_of_the_file(source, finished, refused):
    err = refused("convert", source, "-o", finished, "--from", finished, "--tensor-type", "attn_q=Q8_0")
    assert "choose another output" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "say with --tensor-type what is to be quantized anew"),
        (("--tensor-type", "attn_q=Q4_K"), "has what --tensor-type asks for already; ask for other types"),
        (("--tensor-type", "zzz=Q4_K"), "matches no matrix"),
        (("--tensor-type", "attn_q=Q6_K", "--type", "Q4_0"), "--from and --type: give one of them"),
        (("--tensor-type", "attn_q=Q6_K", "--bpw", 5), "--from and --bpw: give one of them"),
        (("--tensor-type", "attn_q=Q6_K", "--embedding-type", "Q4_0"), "--from and --embedding-type: give one of them"),
    ],
)
def test_bad_flags(source, finished, tmp_path, refused, flags, words):
    assert words in refused("convert", source, "-o", tmp_path / "out.gguf", "--from", finished, *flags)
    assert not (tmp_path / "out.gguf").exists()


def changed(tensors):
    return {name: values + (0.001 if values.ndim == 1 else 0) for name, values in tensors.items()}


def another(tensors):
    return {name: values[::-1].copy() if values.ndim > 1 else values for name, values in tensors.items()}


def more(tensors):
    return {**tensors, "blk.0.attn_v.weight": np.ones((8, 96), np.float32)}


def fewer(tensors):
    return {name: values for name, values in tensors.items() if name != "blk.0.ffn_down.weight"}


def wider(tensors):
    return {**tensors, "blk.0.attn_k.weight": np.ones((9, 96), np.float32)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed, "tensor blk.0.attn_norm.weight is not the one of "),
        (another, "tensor blk.0.ffn_down.weight is not the one of "),
        (fewer, "tensor blk.0.ffn_down.weight is not in "),
        (more, "tensor blk.0.attn_v.weight is missing; is it of another model?"),
        (wider, "tensor blk.0.attn_k.weight has another shape; is it of another model?"),
    ],
)
def test_a_file_of_another_model(source, finished, tmp_path, refused, change, words):
    file = read(source)
    other = write_source(tmp_path / "other.gguf", change({name: np.array(file[name]) for name in file.tensors}))
    flags = ("-o", tmp_path / "out.gguf", "--from", finished, "--tensor-type", "attn_q=Q8_0")
    err = refused("convert", other, *flags)
    assert f"--from {finished}: {words}" in err
    assert "is it of another model?" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["finished.gguf", "other.gguf", "source.gguf"]
