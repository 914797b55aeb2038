"""A quantized GGUF as the source: 8 bits with a warning, fewer and AAAC types only if allowed."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

import aaac_gguf as aaac
from aaac_gguf import cli
from aaac_gguf.errors import AaacError, AaacWarning
from aaac_gguf.files.gguf import read


def quantized_source(path, ggml_type, rng, more=None):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "bc", "d"])
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(256, np.float32))
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        if ggml_type in (T.Q4_K, T.Q6_K):
            blocks = np.zeros((64, gguf.GGML_QUANT_SIZES[ggml_type][1]), np.uint8)
        else:
            blocks = gguf.quantize(rng.normal(size=(64, 256)).astype(np.float32), ggml_type)
        writer.add_tensor(name, blocks, raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_8_bits_are_taken_with_a_warning(tmp_path, rng):
    source = quantized_source(tmp_path / "s.gguf", T.Q8_0, rng)
    out = tmp_path / "out.gguf"
    with pytest.warns(AaacWarning, match=r"is quantized already \(Q8_0\)"):
        aaac.quantize(source, out)
    full, file = read(source), read(out)
    name = "blk.0.attn_q.weight"
    assert file.tensors[name].tensor_type.name == "AAAC4_G16"
    assert np.square(file[name] - full[name]).sum() < 0.01 * np.square(full[name]).sum()
    with pytest.warns(AaacWarning):
        planned = aaac.plan(source, tmp_path / "p.gguf")
    assert planned.n_bytes == out.stat().st_size


@pytest.mark.parametrize("ggml_type", [T.Q4_0, T.Q5_1, T.Q4_K, T.Q6_K])
def test_fewer_bits_only_if_allowed(ggml_type, tmp_path, rng, refused):
    source = quantized_source(tmp_path / "s.gguf", ggml_type, rng)
    err = refused("convert", source, "-o", tmp_path / "out.gguf")
    assert f"is {ggml_type.name} already" in err
    assert "--allow-requantize" in err
    assert not (tmp_path / "out.gguf").exists()
    args = ["convert", str(source), "-o", str(tmp_path / "out.gguf"), "--allow-requantize"]
    assert cli.main(args) == 0


def test_a_type_that_stays_is_copied_with_its_codec(source, tmp_path):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    aaac.quantize(source, first)
    with pytest.raises(AaacError, match="allow_requantize"):
        aaac.quantize(first, second)
    with pytest.warns(AaacWarning, match="AAAC4_G16"):
        aaac.quantize(first, second, allow_requantize=True)
    a, b = read(first), read(second)
    for name in a.tensors:
        assert np.array_equal(a[name], b[name]), name
    assert list(a.codecs) == list(b.codecs)
    with pytest.raises(AaacError, match="transformers reads no AAAC types"):
        aaac.quantize(first, second, type="AAAC4_G32", calibration="self", allow_requantize=True)


def test_scales_that_are_not_finite_are_refused(tmp_path, rng, refused):
    source = quantized_source(tmp_path / "s.gguf", T.Q8_0, rng)
    data = bytearray(source.read_bytes())
    data[-34:-32] = np.float16(np.inf).tobytes()  # the scale of the last block
    source.write_bytes(data)
    assert cli.main(["convert", str(source), "-o", str(tmp_path / "out.gguf")]) == 2
    assert not (tmp_path / "out.gguf").exists()


def test_mxfp4_is_copied(tmp_path, rng):
    source = quantized_source(tmp_path / "s.gguf", T.MXFP4, rng)
    aaac.quantize(source, tmp_path / "out.gguf")
    a, b = read(source), read(tmp_path / "out.gguf")
    for name in a.tensors:
        assert b.tensors[name].tensor_type == a.tensors[name].tensor_type
        assert np.array_equal(a.tensors[name].data, b.tensors[name].data)
