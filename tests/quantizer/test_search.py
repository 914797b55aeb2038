"""The search for scale codes, selectors and indices, and `quantize` as a whole."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf.files.format import G16, G32, G128, TYPES, Codec, pack, scale_factors
from aaac_gguf.files.format import decode as decode_blocks
from aaac_gguf.quantizer import grid as grid_module
from aaac_gguf.quantizer.grid import Encoded, Grid
from aaac_gguf.quantizer.quantize import _normalised, quantize
from aaac_gguf.quantizer.search import decode, encode

ALL_TYPES = pytest.mark.parametrize("qtype", TYPES.values(), ids=TYPES)


def random_codec(rng: np.random.Generator, m: int) -> Codec:
    """Two unlike codebooks; the first reaches -127, the second 127."""
    books = np.stack([np.sort(rng.choice(np.arange(-126, 127), 16, replace=False)) for _ in range(2)])
    books[0, 0], books[1, 15] = -127, 127
    return Codec(books.astype(np.int8), float(np.float32(rng.uniform(1e-4, 1e-2))), m).check("random")


def random_encoded(rng: np.random.Generator, qtype, n_rows: int, n_per_row: int) -> Encoded:
    def draw(high, width):
        return torch.from_numpy(rng.integers(0, high, (n_rows, width), dtype=np.uint8))

    return Encoded(
        draw(16, n_per_row), draw(2, n_per_row // 16), draw(qtype.n_scale_codes, n_per_row // qtype.group_size)
    )


def heavy_tailed(n_rows: int, n_per_row: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(
        (rng.standard_t(4, (n_rows, n_per_row)) * 0.02 * rng.uniform(0.3, 3, (n_rows, 1))).astype(np.float32)
    )


def test_nearest_level_tables_are_exact_for_integer_levels():
    rng = np.random.default_rng(0)
    codec = random_codec(rng, 3)
    grid = Grid.of_codec(codec, G16, "cpu")
    x = torch.from_numpy(
        np.concatenate([rng.uniform(-140, 140, 100_000), np.arange(-140, 140, 0.5)]).astype(np.float32)
    )
    for r in (0, 1):
        got = grid.nearest_level[grid.cells(x) + r * grid_module.CELLS]
        best = (x[:, None] - grid.levels[r]).abs().amin(1)
        assert torch.equal((x - got).abs(), best)


@ALL_TYPES
def test_decode_is_the_oracle_bit_for_bit(qtype):
    rng = np.random.default_rng(1)
    for m in (2, 3, 4, 5):
        codec = random_codec(rng, m)
        encoded = random_encoded(rng, qtype, 8, 256)
        blocks = pack(qtype, encoded.indices.numpy(), encoded.selectors.numpy(), encoded.scale_codes.numpy())
        ours = decode(encoded, Grid.of_codec(codec, qtype, "cpu")).numpy()
        assert np.array_equal(ours.view(np.uint32), decode_blocks(qtype, blocks, codec).view(np.uint32))


@ALL_TYPES
def test_what_the_format_holds_is_encoded_without_loss(qtype):
    """Any weights that decode from blocks whose groups each reach a largest level come back exactly."""
    rng = np.random.default_rng(2)
    for m in (2, 3, 4, 5):
        codec = random_codec(rng, m)
        encoded = random_encoded(rng, qtype, 16, 512)
        first = encoded.selectors[:, :: qtype.group_size // 16].long()
        encoded.indices[:, :: qtype.group_size] = (first * 15).to(torch.uint8)
        grid = Grid.of_codec(codec, qtype, "cpu")
        weight = decode(encoded, grid)
        assert torch.equal(decode(encode(weight, torch.rand(512) + 0.01, grid, qtype.group_size), grid), weight)


@ALL_TYPES
def test_search_is_close_to_trying_every_scale(qtype):
    rng = np.random.default_rng(3)
    weight = heavy_tailed(16, 512)
    error_weight = torch.from_numpy(rng.uniform(0.1, 2, 512).astype(np.float32))
    book = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
    books = np.stack([book, -book[::-1]])
    base = float(weight.abs().max()) / 127 / float(scale_factors(4)[qtype.n_scale_codes - 1])
    grid = Grid.of_codec(Codec(books, float(np.float32(base * 1.1)), 4), qtype, "cpu")
    difference = (weight - decode(encode(weight, error_weight, grid, qtype.group_size), grid)).double()
    found = (error_weight * difference.square()).sum()

    groups = weight.view(-1, qtype.group_size // 16, 16).double()
    a = error_weight.expand_as(weight).reshape(groups.shape).double()
    best = (a * groups.square()).sum((1, 2))
    for scale in grid.scales[1:].double():
        nearest = [(groups[..., None] - scale * book.double()).square().amin(-1) for book in grid.levels]
        best = torch.minimum(best, torch.minimum(*((a * n).sum(2) for n in nearest)).sum(1))
    assert best.sum() <= found <= 1.01 * best.sum()


def test_zero_groups_are_exactly_zero_and_small_ones_may_be():
    weight = heavy_tailed(4, 128)
    weight[:, 16:48] = 0
    q = quantize(weight, T[G16.name])
    assert (decode_blocks(G16, q.data, q.codec)[:, 16:48] == 0).all()


@ALL_TYPES
@pytest.mark.parametrize("method", ["aaac", "paper"])
@pytest.mark.parametrize("exponent", [-60, 60])
def test_powers_of_two_change_the_scale_base_only(qtype, method, exponent):
    weight = heavy_tailed(8, 256)
    one, other = (
        quantize(weight, T[qtype.name], method=method),
        quantize(weight * 2.0**exponent, T[qtype.name], method=method),
    )
    assert np.array_equal(one.data, other.data)
    assert np.array_equal(one.codec.codebooks, other.codec.codebooks)
    assert other.codec.scale_base == one.codec.scale_base * 2.0**exponent


@pytest.mark.parametrize("method", ["aaac", "paper"])
def test_chunks_do_not_change_the_bytes(method, monkeypatch):
    weight = heavy_tailed(24, 256)
    whole = quantize(weight, T[G32.name], method=method)
    monkeypatch.setitem(grid_module._CHUNK_WEIGHTS, "cpu", 700)
    assert np.array_equal(quantize(weight, T[G32.name], method=method).data, whole.data)


@ALL_TYPES
def test_importance_steers_the_error(qtype):
    weight = heavy_tailed(32, 512)
    importance = torch.from_numpy(np.random.default_rng(4).lognormal(0, 1.5, 512).astype(np.float32))

    def weighted(q):
        difference = weight - torch.from_numpy(decode_blocks(qtype, q.data, q.codec))
        return float((importance * difference.square()).sum() / (importance * weight.square()).sum())

    informed = quantize(weight, T[qtype.name], importance)
    assert informed.weighted_error == pytest.approx(weighted(informed), rel=1e-5)
    assert weighted(informed) < 0.9 * weighted(quantize(weight, T[qtype.name]))
    assert quantize(weight, T[qtype.name], importance * 1e20).data.tobytes() == informed.data.tobytes()


def test_dead_channels_are_still_rounded_sensibly():
    weight = heavy_tailed(8, 256)
    importance = torch.ones(256)
    importance[32:64] = 0
    q = quantize(weight, T[G16.name], importance)
    difference = weight - torch.from_numpy(decode_blocks(G16, q.data, q.codec))
    assert difference[:, 32:64].square().sum() < 0.02 * weight[:, 32:64].square().sum()


def test_experts_share_codebooks_and_an_idle_one_counts_as_one():
    weight = torch.stack([heavy_tailed(8, 128, seed) for seed in range(3)])
    importance = torch.rand(3, 128) + 0.1
    importance[1] = 0
    q = quantize(weight, T[G128.name], importance)
    assert q.data.shape == (3, 8, G128.row_bytes(128))
    assert q.codec.check("experts").codebooks.shape == (2, 16)
    difference = weight - torch.from_numpy(decode_blocks(G128, q.data, q.codec))
    assert (_normalised(importance, 3, 128, weight.device)[1] == 1).all()
    assert (difference.square().sum((1, 2)) < 0.03 * weight.square().sum((1, 2))).all()


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="whole blocks of 64"):
        quantize(torch.ones(2, 96), T[G16.name])
