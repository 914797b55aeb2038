"""Verification passes on a good file and fails on every kind of bad one."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import write_source

from aaac_gguf import cli, resources
from aaac_gguf.conversion import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.atomic import atomic
from aaac_gguf.files.gguf import TensorInfo
from aaac_gguf.reporting import verify
from aaac_gguf.reporting.results import Verification


@pytest.fixture(scope="module")
def converted(llama_source, tmp_path_factory):
    """The bundled model in AAAC4_G16, without calibration."""
    out = tmp_path_factory.mktemp("verify") / "demo.gguf"
    convert.convert(resources.MODEL, out, Settings(calibration="none"))
    return out


def rewrite(path, out, codecs=None, data=None):
    """Copy an AAAC file with other codecs or other blocks for some tensors, whole in every other respect."""
    file = gguf_io.read(path)
    codecs = {**file.codecs, **(codecs or {})}
    metadata = {**gguf_io.field_values(file.fields), **gguf_io.codec_values(codecs)}
    infos = [TensorInfo(name, shape, file.tensors[name].tensor_type) for name, shape in file.shapes.items()]
    with atomic(out) as f:
        f.write(gguf_io.render_header(metadata, infos))
        for info in infos:
            blocks = (data or {}).get(info.name, np.asarray(file.tensors[info.name].data))
            f.write(np.ascontiguousarray(blocks).tobytes() + bytes(-info.n_bytes % 32))
    return out


def run(*args) -> int:
    return cli.main(["verify", *(str(arg) for arg in args)])


def test_structure_alone(converted, capsys):
    assert run(converted) == 0
    assert capsys.readouterr().out == "verified\n"


@pytest.mark.llama
def test_the_bundled_model(patched, converted, capsys):
    assert run(converted, "--source", resources.MODEL) == 0
    out = capsys.readouterr().out
    assert "patched llama.cpp against transformers with the decoded weights, 1270 tokens" in out
    assert out.endswith("verified\n")


@pytest.mark.llama
def test_a_gguf_source(patched, converted, demo_gguf, capsys):
    assert run(converted, "--source", demo_gguf) == 0
    assert "against llama.cpp on the dequantized file" in capsys.readouterr().out


@pytest.mark.llama
@pytest.mark.parametrize("name", ["Q2_K", "Q3_K_M"])
def test_few_bits_may_err_more(name, patched, demo_gguf, tmp_path):
    convert.convert(demo_gguf, tmp_path / "out.gguf", Settings(type=name, calibration="none"))
    assert run(tmp_path / "out.gguf", "--source", demo_gguf) == 0


@pytest.mark.llama
def test_another_codec_is_noticed(patched, converted, demo_gguf, tmp_path, capsys):
    """A scale base that is 50 % off passes every structural check; the tensors' errors show it."""
    name = "blk.2.ffn_down.weight"
    codec = gguf_io.read(converted).codecs[name]
    bad = rewrite(
        converted, tmp_path / "bad.gguf", {name: dataclasses.replace(codec, scale_base=1.5 * codec.scale_base)}
    )
    assert run(bad, "--source", demo_gguf) == 1
    assert f"FAILED: tensor {name}: relative squared error" in capsys.readouterr().out


def test_logits_that_differ_are_noticed():
    rng = np.random.default_rng(0)

    class Held:
        n_vocab = 20

        def log_probabilities(self, i):
            return other

    logits = rng.normal(size=(50, 20)).astype(np.float32)
    expected, other = (
        x - np.log(np.exp(x).sum(-1, keepdims=True))
        for x in (logits, logits + rng.normal(size=logits.shape).astype(np.float32))
    )
    result = Verification(reference="the reference")
    verify.compare_logits(result, [expected], Held())
    assert result.failures[0].startswith("mean KL divergence from the reference is ")
    assert "of the most likely tokens agree" in result.failures[1]
    result = Verification()
    other = expected
    verify.compare_logits(result, [expected], Held())
    assert result.failures == []
    assert (result.mean_kld, result.same_top, result.n_tokens) == (pytest.approx(0, abs=1e-9), 1, 50)


def test_a_flipped_bit_in_the_blocks_is_named(llama_source, tmp_path, capsys):
    out = tmp_path / "g128.gguf"
    settings = Settings(type="AAAC4_G128", calibration="none")
    convert.convert(resources.MODEL, out, settings)
    name = "blk.1.attn_q.weight"
    blocks = np.array(gguf_io.read(out).tensors[name].data)
    blocks[3, fmt.G128.type_size] |= 0x80
    assert run(rewrite(out, tmp_path / "bad.gguf", data={name: blocks})) == 2
    assert f"tensor {name}: a scale code is above 127" in capsys.readouterr().err


def test_another_models_source_is_refused(converted, source, tmp_path, capsys):
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "other.gguf")]) == 0
    capsys.readouterr()
    assert run(converted, "--source", source) == 2
    assert "is it made from this source?" in capsys.readouterr().err


def test_a_truncated_file_is_refused(converted, tmp_path, capsys):
    (tmp_path / "cut.gguf").write_bytes(converted.read_bytes()[:-40_000])
    assert run(tmp_path / "cut.gguf") == 2
    assert "the data of tensor" in capsys.readouterr().err


def test_rows_that_the_converter_rounded_find_their_place(tmp_path, rng):
    """A float32 matrix in a checkpoint of bfloat16."""
    values = rng.normal(size=(8, 64)).astype(np.float32)
    model = torch.nn.Linear(64, 8, bias=False)
    model.weight.data = torch.from_numpy(values.copy())
    full = gguf_io.read(write_source(tmp_path / "full.gguf", {"output.weight": values}, bfloat16=True))
    file = gguf_io.read(write_source(tmp_path / "file.gguf", {"output.weight": values / 2}))
    assert verify.inject(model, full, file) == []
    np.testing.assert_array_equal(model.weight.detach(), values / 2)
