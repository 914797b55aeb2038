"""`quantize` as a whole: every type, importance, experts, odd weights, and what it refuses."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T
from search_samples import AAAC_TYPES, CPU_BACKENDS, G16, G32, G128, METHODS, heavy_tailed, uneven_rows

from aaac_gguf.errors import AaacError
from aaac_gguf.files.format import TYPES_BY_ID, decode
from aaac_gguf.quantizer import codebook, grid, types
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.types import TENSOR_TYPES

SEARCHED = [type for type, entry in TENSOR_TYPES.items() if entry.quantizer]
SEARCHED_TYPES = pytest.mark.parametrize("type", SEARCHED, ids=lambda t: t.name)


def outlier(value: float) -> torch.Tensor:
    weight = heavy_tailed(8, 256)
    weight[3, 5] = value
    return weight


ODD_WEIGHTS = {
    "zeros": torch.zeros(4, 256),
    "constant": torch.full((4, 256), 0.37),
    "one value of each sign": torch.sign(heavy_tailed(4, 256)) * 0.5,
    "three values": torch.sign(heavy_tailed(4, 256)).masked_fill(heavy_tailed(4, 256).abs() < 0.03, 0),
    "positive": heavy_tailed(4, 256).abs(),
    "one weight": torch.zeros(4, 256).index_put((torch.tensor(2), torch.tensor(7)), torch.tensor(1.0)),
    "outlier": outlier(1e4),
    "huge": outlier(3e38),
    "tiny": heavy_tailed(4, 256) * 1e-36,
    "denormal": heavy_tailed(4, 256) * 1e-43,
}


@AAAC_TYPES
@METHODS
@pytest.mark.parametrize("name", ODD_WEIGHTS)
def test_any_weights_give_a_codec_that_readers_accept(type, method, name):
    q = quantize(ODD_WEIGHTS[name], type, method=method)
    decoded = decode(TYPES_BY_ID[type], q.data, q.codec.check(name))
    assert np.isfinite(decoded).all()
    assert np.isfinite([q.relative_error, q.weighted_error]).all()
    if name in ("zeros", "constant", "one value of each sign"):
        assert q.relative_error < 1e-3


@SEARCHED_TYPES
@CPU_BACKENDS
@pytest.mark.parametrize("with_hessian", [False, True], ids=["importance", "feedback"])
def test_the_errors_are_those_of_what_a_reader_sees(type, backend, with_hessian):
    weight = uneven_rows(24, 256)
    x = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0)) * (torch.arange(256) % 7 + 1)
    hessian = x.T @ x / len(x)
    q = quantize(weight, type, hessian.diagonal(), hessian if with_hessian else None, backend=backend)
    assert q.type == type
    assert (q.codec is not None) == (type in TYPES_BY_ID)
    read = q.dequantize()
    assert read.dtype == np.float32
    layout = TYPES_BY_ID.get(type)
    expected = decode(layout, q.data, q.codec) if layout else gguf.dequantize(q.data, type)
    assert np.array_equal(read, expected)
    difference = (torch.from_numpy(read) - weight).double()
    h = hessian.double() if with_hessian else hessian.diagonal().double().diag()

    def squares(values):
        return float(((values @ h) * values).sum())

    assert q.weighted_error == pytest.approx(squares(difference) / squares(weight.double()), rel=2e-3)
    relative = float(difference.square().sum() / weight.double().square().sum())
    assert q.relative_error == pytest.approx(relative, rel=2e-3)
    assert (q.damping > 0) == with_hessian


def test_groups_of_zeros_stay_zero():
    weight = uneven_rows(4, 128)
    weight[:, 16:48] = 0
    assert (quantize(weight, G16).dequantize()[:, 16:48] == 0).all()


@AAAC_TYPES
@METHODS
@pytest.mark.parametrize("exponent", [-60, 60])
def test_powers_of_two_change_the_scale_base_only(type, method, exponent):
    weight = uneven_rows(8, 256)
    one, other = (quantize(w, type, method=method) for w in (weight, weight * 2.0**exponent))
    assert np.array_equal(one.data, other.data)
    assert np.array_equal(one.codec.codebooks, other.codec.codebooks)
    assert other.codec.scale_base == one.codec.scale_base * 2.0**exponent


@METHODS
def test_chunks_do_not_change_the_bytes(method, monkeypatch):
    weight = uneven_rows(24, 256)
    whole = quantize(weight, G32, method=method)
    monkeypatch.setitem(grid.CHUNK_WEIGHTS, "cpu", 700)
    assert np.array_equal(quantize(weight, G32, method=method).data, whole.data)


@METHODS
def test_the_seed_decides(method, monkeypatch):
    monkeypatch.setattr(types, "FIT_SAMPLE", 1 << 12)
    monkeypatch.setattr(codebook, "QUANTILE_SAMPLE", 1 << 12)
    weight = heavy_tailed(64, 256)
    one, same, other = (quantize(weight, G16, method=method, seed=seed) for seed in (0, 0, 1))
    assert one.data.tobytes() == same.data.tobytes()
    assert np.array_equal(one.codec.codebooks, same.codec.codebooks)
    assert not np.array_equal(one.codec.codebooks, other.codec.codebooks)


def test_a_sample_is_nearly_as_good_as_all(monkeypatch):
    weight = heavy_tailed(256, 512)
    everything = quantize(weight, G16)
    monkeypatch.setattr(types, "FIT_SAMPLE", 1 << 15)
    assert quantize(weight, G16).relative_error < 1.01 * everything.relative_error


@AAAC_TYPES
def test_importance_steers_the_error(type):
    weight = uneven_rows(32, 512)
    importance = torch.from_numpy(np.random.default_rng(4).lognormal(0, 1.5, 512).astype(np.float32))

    def weighted(q):
        difference = weight - torch.from_numpy(q.dequantize())
        return float((importance * difference.square()).sum() / (importance * weight.square()).sum())

    informed = quantize(weight, type, importance)
    assert informed.weighted_error == pytest.approx(weighted(informed), rel=1e-5)
    assert weighted(informed) < 0.9 * weighted(quantize(weight, type))
    assert quantize(weight, type, importance * 1e20).data.tobytes() == informed.data.tobytes()


def test_dead_channels_are_still_rounded_sensibly():
    weight = uneven_rows(8, 256)
    importance = torch.ones(256)
    importance[32:64] = 0
    difference = weight - torch.from_numpy(quantize(weight, G16, importance).dequantize())
    assert difference[:, 32:64].square().sum() < 0.02 * weight[:, 32:64].square().sum()


def test_experts_share_codebooks_and_an_idle_one_counts_as_one():
    weight = torch.stack([uneven_rows(8, 128, seed) for seed in range(3)])
    importance = torch.rand(3, 128, generator=torch.Generator().manual_seed(0)) + 0.1
    importance[1] = 0
    q = quantize(weight, G128, importance)
    assert q.data.shape == (3, 8, TYPES_BY_ID[G128].row_bytes(128))
    assert q.codec.check("experts").codebooks.shape == (2, 16)
    difference = weight - torch.from_numpy(q.dequantize())
    assert (difference.square().sum((1, 2)) < 0.03 * weight.square().sum((1, 2))).all()
    importance[1] = importance[[0, 2]].double().mean()
    assert quantize(weight, G128, importance).data.tobytes() == q.data.tobytes()


@SEARCHED_TYPES
def test_ragged_rows_are_refused(type):
    block_size = gguf.GGML_QUANT_SIZES[type][0]
    with pytest.raises(AaacError, match=f"{type.name}: rows of {block_size + 1} .* whole blocks of {block_size}"):
        quantize(torch.ones(2, block_size + 1), type)


@pytest.mark.parametrize("type", [T.F16, T.TQ1_0], ids=lambda t: t.name)
def test_types_without_search_are_refused(type):
    with pytest.raises(AaacError, match=f"`type` {type.name}"):
        quantize(torch.ones(2, 256), type)


def test_outputs_go_with_a_hessian_and_one_matrix():
    weight = uneven_rows(8, 64)
    for given in ({"weight": weight}, {"weight": weight[None], "hessian": torch.eye(64)}):
        with pytest.raises(ValueError, match="single matrix"):
            quantize(type=G16, outputs=torch.eye(8), **given)


def test_the_papers_method_has_no_feedback_and_no_stock_types():
    with pytest.raises(ValueError, match="no error feedback"):
        quantize(uneven_rows(8, 64), G16, hessian=torch.eye(64), method="paper")
    for type in (T.Q4_0, T.Q6_K):
        with pytest.raises(ValueError, match="no stock types"):
            quantize(uneven_rows(8, 256), type, method="paper")
