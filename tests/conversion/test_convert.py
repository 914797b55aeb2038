"""Convert a GGUF and the bundled model: what is written, what is refused, and that nothing half-written stays."""

import json
import os
import shutil
import stat
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import write_source

from aaac_gguf import cli, resources
from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.imatrix import Entry, Imatrix, write_imatrix
from aaac_gguf.models import checkpoint


def run(*args) -> int:
    return cli.main([str(arg) for arg in args])


def convert(source, out, *args) -> int:
    return run("convert", source, "-o", out, *args)


def test_a_gguf_becomes_aaac(source, tmp_path, capsys):
    out = tmp_path / "out.gguf"
    assert convert(source, out) == 0
    full, file = gguf_io.read(source), gguf_io.read(out)
    assert set(file.codecs) == {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"}
    assert file.get("general.name") == "made by a test"
    assert file.get("tokenizer.ggml.tokens") == ["a", "bc", "d"]
    assert json.loads(file.get(fmt.KEY_CALIBRATION)) == {"source": "none", "method": "aaac", "feedback": "synthetic"}
    for name in full.tensors:
        error = np.square(file[name] - full[name]).sum() / np.square(full[name]).sum()
        assert error < (0.0065 if name == "blk.0.attn_k.weight" else 0.006), name  # IQ4_NL, the others AAAC or finer
    assert "relative error: mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    "type_name", ["AAAC4_G16", "AAAC4_G32", "AAAC4_G128", "Q4_0", "IQ4_NL", "Q8_0", "BF16", "F16", "F32"]
)
def test_dry_run_is_exact_to_the_byte(source, tmp_path, capsys, type_name):
    out = tmp_path / "out.gguf"
    assert convert(source, out, "--type", type_name, "--dry-run") == 0
    planned = int(capsys.readouterr().out.splitlines()[-1].split()[1].replace(",", ""))
    assert not out.exists()
    assert convert(source, out, "--type", type_name) == 0
    assert out.stat().st_size == planned


def test_the_same_command_gives_the_same_bytes(source, tmp_path):
    assert convert(source, tmp_path / "a.gguf") == convert(source, tmp_path / "b.gguf") == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_importance_moves_the_error(source, tmp_path, capsys):
    """Channels that matter are rounded better than without importance."""
    sums = np.ones((1, 256), dtype=np.float32)
    sums[0, ::4] = 1000
    write_imatrix(
        tmp_path / "i.gguf", Imatrix({"blk.0.attn_q.weight": Entry(sums, np.ones(1, dtype=np.float32))}, ["x"], 1, 1)
    )
    assert convert(source, tmp_path / "with.gguf", "--imatrix", tmp_path / "i.gguf") == 0
    assert (
        "reached 39.26 % of the weights; not reached: blk.0.ffn_down.weight, blk.0.attn_k.weight"
        in capsys.readouterr().out
    )
    assert convert(source, tmp_path / "without.gguf") == 0
    full = gguf_io.read(source)["blk.0.attn_q.weight"]
    errors = [
        np.square(gguf_io.read(tmp_path / f"{n}.gguf")["blk.0.attn_q.weight"] - full)[:, ::4].sum()
        for n in ("with", "without")
    ]
    assert errors[0] < 0.9 * errors[1]


def test_stock_types_are_ordinary_files(source, tmp_path):
    """The stock gguf library reads and decodes them."""
    assert (
        convert(source, tmp_path / "out.gguf", "--type", "IQ4_NL", "--tensor-type", "attn_q=Q4_0", "--no-feedback") == 0
    )
    file, full = gguf.GGUFReader(tmp_path / "out.gguf"), gguf_io.read(source)
    tensors = {t.name: t for t in file.tensors}
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "IQ4_NL"
    assert tensors["blk.0.attn_k.weight"].tensor_type.name == "IQ4_NL"
    for name, bound in (("blk.0.attn_q.weight", 0.0085), ("blk.0.ffn_down.weight", 0.007)):
        expected, data = full[name], gguf.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert np.square(data - expected).sum() < bound * np.square(expected).sum()
    assert fmt.KEY_TENSOR_NAMES not in file.fields


def test_the_papers_method(source, tmp_path):
    assert convert(source, tmp_path / "out.gguf", "--method", "paper") == 0
    assert json.loads(gguf_io.read(tmp_path / "out.gguf").get(fmt.KEY_CALIBRATION))["method"] == "paper"


def test_dequantize_is_exact(source, tmp_path):
    assert convert(source, tmp_path / "out.gguf") == 0
    assert run("dequantize", tmp_path / "out.gguf", "-o", tmp_path / "full.gguf") == 0
    file, full = gguf_io.read(tmp_path / "out.gguf"), gguf.GGUFReader(tmp_path / "full.gguf")
    assert {t.tensor_type.name for t in full.tensors} == {"F32"}
    assert not any(key.startswith("aaac.") for key in full.fields)
    for tensor in full.tensors:
        np.testing.assert_array_equal(tensor.data, file[tensor.name])


def test_inspect_lists_and_plots(source, tmp_path, capsys):
    assert convert(source, tmp_path / "out.gguf") == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "out.gguf", "--plot", tmp_path / "books.png") == 0
    out = capsys.readouterr().out
    assert ["blk.0.attn_q.weight", "64", "x", "256", "AAAC4_G16", "9,216", "4.5"] in [
        line.split() for line in out.splitlines()
    ]
    assert "mantissa bits" in out
    assert (tmp_path / "books.png").read_bytes().startswith(b"\x89PNG")


def bad_weight(tmp_path: Path, value: float) -> Path:
    weight = np.ones((64, 256), dtype=np.float32)
    weight[3, 5] = value
    return write_source(tmp_path / "bad.gguf", {"blk.0.attn_q.weight": weight})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, capsys, value):
    assert convert(bad_weight(tmp_path, value), tmp_path / "out.gguf") == 2
    assert "tensor blk.0.attn_q.weight holds NaN or Inf" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]


def folder(tmp_path: Path, **changes) -> Path:
    """A copy of the bundled model with entries of config.json changed."""
    copy = tmp_path / "model"
    shutil.copytree(resources.MODEL, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def cut(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:n])


def no_config(tmp_path):
    (folder(tmp_path) / "config.json").unlink()


def truncated_safetensors(tmp_path):
    cut(folder(tmp_path) / "model.safetensors", 1_000_000)


def broken_config(tmp_path):
    cut(folder(tmp_path) / "config.json", 30)


def missing_shard(tmp_path):
    model = folder(tmp_path)
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}})
    )


def not_a_directory(tmp_path):
    (tmp_path / "model").write_bytes(b"GGUF? no")


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda tmp_path: None, "no such file or directory"),
        (not_a_directory, "not a whole GGUF file"),
        (no_config, "has no config.json"),
        (broken_config, "not valid JSON"),
        (truncated_safetensors, "model.safetensors: damaged or cut short"),
        (missing_shard, "model-00002-of-00002.safetensors: is listed in model.safetensors.index.json and missing"),
    ],
)
def test_bad_sources(tmp_path, capsys, prepare, words):
    prepare(tmp_path)
    assert convert(tmp_path / "model", tmp_path / "out.gguf") == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not [p for p in tmp_path.iterdir() if p.name != "model"]


@pytest.mark.parametrize("stored", ["BF16", "F16"])
def test_a_gguf_is_calibrated_like_its_folder(demo_gguf, tmp_path, stored):
    """By tokens that the model writes itself, to the same bytes. Both run in the dtype of the weights or in float32."""
    self_calibration = ("--calib", "self", "--calib-sequences", 1, "--calib-length", 32)
    source = demo_gguf
    if stored == "F16":
        source = tmp_path / "f16.gguf"
        assert convert(demo_gguf, source, "--type", "F16") == 0
    assert convert(source, tmp_path / "file.gguf", *self_calibration) == 0
    file = gguf_io.read(tmp_path / "file.gguf")
    assert json.loads(file.get(fmt.KEY_CALIBRATION))["feedback"] == "measured"
    if stored == "BF16":
        assert convert(resources.MODEL, tmp_path / "folder.gguf", *self_calibration) == 0
        for name, tensor in gguf_io.read(tmp_path / "folder.gguf").tensors.items():
            np.testing.assert_array_equal(file.tensors[name].data, tensor.data)


def test_a_gguf_that_cannot_be_run(demo_gguf, llama_source, tmp_path, capsys, monkeypatch):
    assert (
        convert(resources.MODEL, tmp_path / "part.gguf", "--type", "BF16", "--calib", "none", "--split-max-size", "4M")
        == 0
    )
    before = sorted(tmp_path.iterdir())
    assert convert(before[0], tmp_path / "out.gguf", "--calib", "self", "--calib-sequences", 1) == 2
    assert "runs no split files; join them with llama-gguf-split --merge" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "_memory", lambda: 10**6)
    assert convert(demo_gguf, tmp_path / "out.gguf", "--calib", "self", "--calib-sequences", 1) == 2
    assert "to run it takes 0 GiB of memory; give the Hugging Face folder" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_a_gguf_of_an_architecture_that_transformers_does_not_read(tmp_path, capsys, rng, monkeypatch):
    """It is refused before anything slow."""
    source = write_source(
        tmp_path / "source.gguf", {"blk.0.ffn_down.weight": rng.normal(size=(128, 192)).astype(np.float32)}, "rwkv6"
    )
    monkeypatch.setattr(
        "aaac_gguf.conversion.convert.check_weights", lambda file, largest: pytest.fail("the weights are read")
    )
    assert convert(source, tmp_path / "out.gguf", "--calib", "self") == 2
    assert f"{source}: transformers cannot load it (" in capsys.readouterr().err


def test_unknown_architecture_fails_before_the_weights_are_read(tmp_path, capsys, llama_source):
    assert convert(folder(tmp_path, architectures=["NoSuchForCausalLM"]), tmp_path / "out.gguf") == 2
    err = capsys.readouterr().err
    assert "llama.cpp's converter refuses this model" in err
    assert "NoSuchForCausalLM" in err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--calib", "self"], "transformers cannot load it"),
        (["--calib", "none", "--imatrix", "x"], "--calib and --imatrix: give one of them"),
        (["--imatrix", "/nonexistent"], "--imatrix /nonexistent: no such file"),
        (["--type", "Q9"], "--type Q9: unknown type"),
        (["--tensor-type", "zzz=F16"], "matches no matrix"),
        pytest.param(
            ["--device", "cuda"],
            "no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_bad_flags(source, tmp_path, capsys, args, words):
    assert convert(source, tmp_path / "out.gguf", *args) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        (["--type", "F16"], "tensor blk.0.attn_k.weight holds 99840, and its new type at most 65504"),
        (["--tensor-type", "attn_q=Q4_0", "--embedding-type", "BF16"], ""),
        ([], ""),
    ],
)
def test_a_weight_beyond_float16(tmp_path, rng, refused, recwarn, capsys, flag, words):
    """It is an error for a type that cannot hold it, and exact enough in one that can. Nothing becomes infinite."""
    weights = rng.normal(size=(8, 208)).astype(np.float32)
    weights[3, 7] = 99840  # a number of bfloat16
    tensors = {
        "token_embd.weight": weights[:3],
        "blk.0.attn_k.weight": weights,
        "blk.0.attn_q.weight": weights[:, :192],
    }
    source = write_source(tmp_path / "source.gguf", tensors, bfloat16=True)
    if words:
        assert words in refused("convert", source, "-o", tmp_path / "out.gguf", *flag)
        assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]
    else:
        assert convert(source, tmp_path / "out.gguf", *flag) == 0
        capsys.readouterr()  # it warns that there is no tokenizer
        file = gguf_io.read(tmp_path / "out.gguf")
        for name in tensors:
            assert np.isfinite(file[name]).all()
        assert file["blk.0.attn_k.weight"][3, 7] == pytest.approx(99840, rel=0.01)
        assert "holds 99840" in refused(
            "dequantize", tmp_path / "out.gguf", "-o", tmp_path / "full.gguf", "--type", "F16"
        )
        assert not (tmp_path / "full.gguf").exists()
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_outputs_that_are_not_replaced(source, tmp_path, refused):
    """The source, a file of a folder that is the source, a device node, and a name that split output makes."""
    assert "belongs to the source" in refused("convert", source, "-o", source)
    assert "belongs to the source" in refused("dequantize", source, "-o", source)
    link = tmp_path / "link.gguf"
    link.hardlink_to(source)
    assert "belongs to the source" in refused("convert", source, "-o", link)
    model = folder(tmp_path)
    assert "belongs to the source" in refused("convert", model, "-o", model / "model.safetensors")
    os.mknod(tmp_path / "node", stat.S_IFIFO | 0o600)
    assert "is no ordinary file" in refused("convert", source, "-o", tmp_path / "node")
    assert (tmp_path / "node").is_fifo()
    name = tmp_path / "out-00001-of-00003.gguf"
    assert "is named like one file of a split model" in refused("convert", source, "-o", name)


def test_integer_tensors_that_llama_cpp_does_not_know(tmp_path, rng, capsys):
    """They are left out with a word: llama.cpp refuses a file with tensors that it does not ask for."""
    weight = rng.normal(size=(64, 256)).astype(np.float32)
    integers = {
        "blk.0.attn_mystery.weight": np.ones((4, 4), np.int32),
        "blk.0.ffn_gate_tid2eid.weight": np.ones((4, 4), np.int32),
    }
    source = write_source(tmp_path / "source.gguf", {"blk.0.attn_q.weight": weight, **integers})
    assert convert(source, tmp_path / "out.gguf") == 0
    warning = capsys.readouterr().err
    assert "warning: " in warning
    assert (
        "left out, since llama.cpp knows no such tensors: blk.0.attn_mystery.weight, blk.0.ffn_gate_tid2eid.weight"
        in warning
    )
    assert list(gguf_io.read(tmp_path / "out.gguf").tensors) == ["blk.0.attn_q.weight"]
    deepseek = write_source(
        tmp_path / "deepseek.gguf", {"blk.0.attn_q.weight": weight, "rope_freqs.weight": np.ones(4, np.int32)}
    )
    assert convert(deepseek, tmp_path / "out.gguf") == 0
    assert "warning" not in capsys.readouterr().err
    assert "rope_freqs.weight" in gguf_io.read(tmp_path / "out.gguf").tensors


@pytest.mark.parametrize("out", ["no/such/folder/out.gguf", "."])
def test_bad_outputs(source, tmp_path, capsys, out):
    assert convert(source, tmp_path / out) == 2
    assert "error: " in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert convert(source, tmp_path / "out.gguf") == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk(source, tmp_path, capsys):
    (tmp_path / "out.gguf.partial").symlink_to("/dev/full")
    assert convert(source, tmp_path / "out.gguf") == 2
    assert "the disk is full" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]


def test_the_bundled_model(demo_full, tmp_path, capsys):
    """A checkpoint folder through llama.cpp's converter, calibrated on the bundled text."""
    out = tmp_path / "demo.gguf"
    small = ("--calib-sequences", 2, "--calib-length", 32)
    assert convert(resources.MODEL, out, "--dry-run", *small) == 0
    planned = int(capsys.readouterr().out.splitlines()[-1].split()[1].replace(",", ""))
    assert convert(resources.MODEL, out, *small) == 0
    few = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("calibrate on more tokens"))
    assert few.count("blk.") == 28
    assert out.stat().st_size == planned
    assert [p.name for p in tmp_path.iterdir()] == ["demo.gguf"]
    file = gguf_io.read(out)
    assert len(file.codecs) == 28
    assert file.tensors["token_embd.weight"].tensor_type.name == "Q6_K"
    described = {
        "source": "bundled",
        "file": "mixture.jsonl",
        "sha256": resources.sha256(resources.CALIBRATION_TEXT),
        "tokens": 64,
        "sequence_length": 32,
        "method": "aaac",
        "feedback": "measured",
    }
    assert json.loads(file.get(fmt.KEY_CALIBRATION)) == described
    for name in file.codecs:
        expected = demo_full[name]
        assert (
            np.square(file[name] - expected).sum() / np.square(expected).sum() < 0.02
        )  # feedback trades this error for the layer's


@pytest.mark.slow
def test_a_model_that_memory_does_not_hold(tmp_path, monkeypatch):
    """Its blocks are read from the checkpoint as they run; the file is the same to the byte."""
    calibration = ("--calib", resources.SAMPLE_TEXT, "--calib-sequences", 2, "--calib-length", 32)
    assert convert(resources.MODEL, tmp_path / "a.gguf", *calibration) == 0
    monkeypatch.setattr(checkpoint, "WEIGHTS_SHARE", 0)
    assert convert(resources.MODEL, tmp_path / "b.gguf", *calibration) == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
