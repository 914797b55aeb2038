"""Sources that are 4-bit by nature: a type without loss for every such tensor, in the plan, the file and the report."""

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import write_source
from gguf import GGMLQuantizationType as T
from random_checkpoints import COMMON, SIZES, save_random
from safetensors.torch import load_file, save_file

import aaac_gguf as aaac
from aaac_gguf.conversion import exact
from aaac_gguf.conversion.plan import Rounding
from aaac_gguf.errors import AaacError
from aaac_gguf.files.gguf import read
from aaac_gguf.models import checkpoint
from aaac_gguf.models.source import full_precision
from aaac_gguf.reporting.conversions import convert_text, plan_text

INT4, UP, EXPERTS, NORMAL = (f"blk.0.{stem}.weight" for stem in ("attn_q", "ffn_up", "ffn_up_exps", "attn_k"))


def bfloat16(values):
    return torch.from_numpy(values).bfloat16().float().numpy()


@pytest.fixture
def natural(tmp_path, rng):
    """A bfloat16 GGUF with 4-bit weights on a grid of Q4_0, of MXFP4 and of one scale, and with a full matrix."""

    def grid(levels, shape, scales):
        return bfloat16((rng.choice(np.array(levels), shape) * scales.repeat(32, -1)).astype(np.float32))

    float16 = rng.uniform(0.01, 0.1, (64, 8)).astype(np.float16)
    powers = 2.0 ** rng.integers(-8, -3, (3, 32, 8))
    tensors = {
        "token_embd.weight": bfloat16(rng.normal(size=(64, 256)).astype(np.float32)),
        INT4: grid(range(-8, 8), (64, 256), float16),
        UP: grid((-1, 0, 1), (64, 256), np.full((64, 8), 0.0123)),
        EXPERTS: grid([0, 0.5, 1, 1.5, 2, 3, 4, 6, -1, -2, -4, -6], (3, 32, 256), powers),
        NORMAL: bfloat16(rng.normal(size=(64, 256)).astype(np.float32)),
    }
    return write_source(tmp_path / "natural.gguf", tensors, bfloat16=True)


def test_each_tensor_has_the_smallest_type_without_loss(natural, tmp_path):
    out = tmp_path / "out.gguf"
    planned, report = aaac.plan(natural, out), aaac.quantize(natural, out)
    full, file = read(natural), read(out)
    expected = {INT4: T.Q4_0, UP: T["AAAC4_G128"], EXPERTS: T.MXFP4}
    assert report.exact == expected
    for name, ggml_type in expected.items():
        assert file.tensors[name].tensor_type == ggml_type
        np.testing.assert_array_equal(bfloat16(file[name]), full[name])
    assert file.tensors[NORMAL].tensor_type.name == "AAAC4_G16"
    assert set(file.codecs) == {UP, NORMAL}
    assert planned.n_bytes == out.stat().st_size
    assert {p.name for p in planned.plans if p.rounding == Rounding.EXACT} == set(expected)
    assert "exact" in plan_text(planned)
    assert f"4-bit by nature, stored without loss as Q4_0: {INT4}" in convert_text(report)


def test_a_file_for_every_llama_cpp_stays_one(natural, tmp_path):
    report = aaac.quantize(natural, tmp_path / "out.gguf", type="Q4_0")
    assert report.exact == {INT4: T.Q4_0, UP: T.Q4_0, EXPERTS: T.MXFP4}
    assert not read(tmp_path / "out.gguf").codecs


def test_types_that_are_asked_for_stay(natural, tmp_path):
    out = tmp_path / "out.gguf"
    assert aaac.quantize(natural, out, type="F16").exact == {}
    report = aaac.quantize(natural, out, tensor_types={"attn_q": "AAAC4_G32"})
    assert set(report.exact) == {UP, EXPERTS}
    assert read(out).tensors[INT4].tensor_type.name == "AAAC4_G32"


def test_a_budget_counts_what_is_stored_without_loss(natural, tmp_path, monkeypatch):
    """Here that is all but the embeddings, so no model runs."""
    full, out = read(natural), tmp_path / "out.gguf"
    small = write_source(tmp_path / "small.gguf", {n: full[n] for n in (INT4, UP, EXPERTS)}, bfloat16=True)
    monkeypatch.setattr(checkpoint, "check_gguf", lambda source: "bfloat16")
    monkeypatch.setattr(checkpoint, "load_model", None)
    report = aaac.quantize(small, out, calibration="self", bpw=4.5)
    assert report.exact == {INT4: T.Q4_0, UP: T["AAAC4_G128"], EXPERTS: T.MXFP4}
    with pytest.raises(AaacError, match=r"`bpw`: too little, the smallest possible is 4\.\d+ bits"):
        aaac.quantize(small, out, calibration="self", bpw=4.2)


def quantized(weight, group_size, zeros):
    """Numbers of 4 bits int64 [N, K], and scales bfloat16 and zero points [N, K / group_size]."""
    groups = weight.float().reshape(len(weight), -1, group_size)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).bfloat16() if zeros else (groups.abs().amax(2) / 7.5).bfloat16()
    zero = (-low / scale.float()).round().clamp(0, 15) if zeros else torch.full_like(low, 8)
    numbers = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, 15)
    return numbers.reshape(weight.shape).long(), scale, zero.long()


def packed(numbers):
    """Eight numbers of a row in an int32."""
    eights = numbers.reshape(len(numbers), -1, 8)
    words = sum(eights[..., i] << 4 * i for i in range(8))
    return torch.where(words < 2**31, words, words - 2**32).int()


def int4_folder(folder, group_size, zeros):
    """A checkpoint of compressed-tensors with packed matrices. Returns what each of them stands for, float32."""
    save_random(transformers.LlamaConfig(**COMMON, **SIZES | {"intermediate_size": 256}), folder)
    weights, decoded = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if "_proj" in name]:
        numbers, scale, zero = quantized(weights.pop(name), group_size, zeros)
        decoded[name] = (numbers - zero.repeat_interleave(group_size, 1)) * scale.float().repeat_interleave(
            group_size, 1
        )
        weights |= {f"{name}_packed": packed(numbers), f"{name}_scale": scale}
        weights[f"{name}_shape"] = torch.tensor(numbers.shape)
        if zeros:
            weights[f"{name}_zero_point"] = packed(zero.T).T.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    kind = {"num_bits": 4, "type": "int", "symmetric": not zeros, "strategy": "group", "group_size": group_size}
    return decoded, {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": kind}},
    }


def set_quantization(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_packed_int4_of_compressed_tensors(llama_source, tmp_path, monkeypatch):
    """The products of levels and scales are not rounded on the way. With nothing left to calibrate no model runs."""
    folder, out = tmp_path / "model", tmp_path / "out.gguf"
    decoded, settings = int4_folder(folder, group_size=128, zeros=True)
    set_quantization(folder, settings)
    assert exact.may_be_exact(folder)
    monkeypatch.setattr(checkpoint, "load_model", None)
    report = aaac.quantize(folder, out)
    assert len(report.exact) == len(decoded)
    assert set(report.exact.values()) == {T.Q5_0}
    file = read(out)
    assert "aaac.calibration" not in file.fields
    for stem, name in (("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj")):
        np.testing.assert_array_equal(file[f"blk.1.{stem}.weight"], decoded[f"model.layers.1.{name}.weight"].numpy())


def test_a_kind_that_the_converter_does_not_decode(llama_source, tmp_path):
    folder = save_random(transformers.LlamaConfig(**COMMON, **SIZES), tmp_path / "model")
    set_quantization(folder, {"quant_method": "awq", "bits": 4})
    words = r"Quant method is not yet supported: 'awq'.*; the checkpoint is quantized \(awq\); give one that is not"
    with pytest.raises(AaacError, match=words), full_precision(folder, tmp_path / "scratch", header_only=True):
        pass


def test_a_folder_is_read_for_a_dry_run_only_if_its_values_are_few(tmp_path):
    folder = save_random(transformers.LlamaConfig(**COMMON, **SIZES), tmp_path / "model")
    assert not exact.may_be_exact(folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].sign()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert exact.may_be_exact(folder)
