"""A quantized GGUF as the source: 8 bits with a warning, fewer and AAAC types only if allowed."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

import aaac_gguf as aaac
from aaac_gguf import cli
from aaac_gguf.conversion import encoder
from aaac_gguf.conversion.dequantize import dequantize_file
from aaac_gguf.errors import AaacError, AaacWarning
from aaac_gguf.files.gguf import read
from aaac_gguf.files.imatrix import Entry, Imatrix, write_imatrix
from aaac_gguf.models import checkpoint


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


@pytest.mark.parametrize("ggml_type", [T.Q8_0, T.Q5_1])
@pytest.mark.parametrize("how", ["imatrix", "nothing"])
def test_it_is_converted_as_its_decoded_weights_are(ggml_type, how, tmp_path, rng):
    """With feedback: under an importance matrix and the moments that are made of it and the weights."""
    source, full = quantized_source(tmp_path / "s.gguf", ggml_type, rng), tmp_path / "full.gguf"
    dequantize_file(source, full)
    options = {"allow_requantize": True}
    if how == "imatrix":
        sums = rng.uniform(0, 10, (1, 256)).astype(np.float32)
        entry = Entry(sums, np.array([7], np.float32))
        write_imatrix(tmp_path / "i.gguf", Imatrix({"blk.0.attn_q.weight": entry}, ["text"], 1, 7))
        options["imatrix"] = tmp_path / "i.gguf"
    with pytest.warns(AaacWarning, match="is quantized already"):
        report = aaac.quantize(source, tmp_path / "a.gguf", **options)
    aaac.quantize(full, tmp_path / "b.gguf", **options)
    a, b = read(tmp_path / "a.gguf"), read(tmp_path / "b.gguf")
    for name in a.tensors:
        np.testing.assert_array_equal(a.tensors[name].data, b.tensors[name].data)
    (made,) = [t for t in report.tensors if t.plan.name == "blk.0.attn_q.weight"]
    assert made.rounding == "feedback (synthetic)"
    assert report.coverage is None if how == "nothing" else report.coverage.share == 1


@pytest.mark.parametrize("ggml_type", [T.Q8_0, "AAAC4_G16"])
def test_it_resumes(ggml_type, source, tmp_path, rng, monkeypatch):
    """The second run finishes what the first one began, to the same bytes. The source's codecs are not the output's."""
    if ggml_type == T.Q8_0:
        source = quantized_source(tmp_path / "s.gguf", ggml_type, rng)
    else:
        aaac.quantize(source, tmp_path / "s.gguf")
        source = tmp_path / "s.gguf"
    options = {"type": "AAAC4_G32", "allow_requantize": True}
    with pytest.warns(AaacWarning, match="is quantized already"):
        aaac.quantize(source, tmp_path / "whole.gguf", **options)
    encode, encoded = encoder.encode, []

    def stop(plan, *args):
        if len(encoded) == 2:
            raise KeyboardInterrupt
        encoded.append(plan.name)
        return encode(plan, *args)

    monkeypatch.setattr(encoder, "encode", stop)
    with pytest.raises(KeyboardInterrupt), pytest.warns(AaacWarning):
        aaac.quantize(source, tmp_path / "out.gguf", **options)
    monkeypatch.setattr(encoder, "encode", lambda plan, *args: encoded.append(plan.name) or encode(plan, *args))
    with pytest.warns(AaacWarning):
        aaac.quantize(source, tmp_path / "out.gguf", resume=True, **options)
    assert sorted(encoded) == sorted(read(source).tensors)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_the_memory_that_it_takes_to_run(tmp_path, rng, monkeypatch):
    """Every weight counts: transformers decodes all of them to float32."""
    source = quantized_source(tmp_path / "s.gguf", T.Q8_0, rng)
    n_weights = 2 * 64 * 256 + 256
    monkeypatch.setattr(checkpoint, "_config_of_gguf", lambda source: None)
    monkeypatch.setattr(checkpoint, "_memory", lambda: 4 * n_weights)
    assert checkpoint.check_gguf(source) == "float32"
    monkeypatch.setattr(checkpoint, "_memory", lambda: 4 * n_weights - 1)
    with pytest.raises(AaacError, match="to run it takes 0 GiB of memory"):
        checkpoint.check_gguf(source)


def test_types_are_compared_with_full_precision(tmp_path, rng, refused, monkeypatch):
    """The error names no flag that `compare` does not have."""
    monkeypatch.setattr("aaac_gguf.reporting.compare.build", lambda: None)
    source = quantized_source(tmp_path / "s.gguf", T.Q4_0, rng)
    err = refused("compare", source, "-o", tmp_path / "comparison")
    assert f"{source}: tensor blk.0.attn_q.weight is Q4_0 already" in err or "tensor token_embd.weight is Q4_0" in err
    assert "compare types with the full-precision file" in err
    assert "--" not in err
