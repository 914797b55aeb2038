"""The search for scale codes, selectors and indices, by every backend of a CPU."""

import numpy as np
import pytest
import torch
from search_samples import CPU_BACKENDS, NEEDS_C, uneven_rows

from aaac_gguf.files.format import TYPES, Codec, decode, pack, scale_factors
from aaac_gguf.quantizer.backends import BACKENDS
from aaac_gguf.quantizer.grid import Encoded, Grid
from aaac_gguf.quantizer.search import TorchSearch

LAYOUTS = pytest.mark.parametrize("layout", TYPES.values(), ids=TYPES)


def random_codec(rng: np.random.Generator, m: int) -> Codec:
    """Return two unlike codebooks. The first reaches -127, the second 127."""
    books = np.stack([np.sort(rng.choice(np.arange(-126, 127), 16, replace=False)) for _ in range(2)])
    books[0, 0], books[1, 15] = -127, 127
    return Codec(books.astype(np.int8), float(np.float32(rng.uniform(1e-4, 1e-2))), m).check("random")


def random_encoded(rng: np.random.Generator, layout, n_rows: int, n_per_row: int) -> Encoded:
    def draw(high, width):
        return torch.from_numpy(rng.integers(0, high, (n_rows, width), dtype=np.uint8))

    return Encoded(
        draw(16, n_per_row), draw(2, n_per_row // 16), draw(layout.n_scale_codes, n_per_row // layout.group_size)
    )


def codec_for(weight: torch.Tensor, layout) -> Codec:
    """Return a table, its mirror image, and scales that reach the largest weight."""
    book = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.int8)
    base = float(weight.abs().max()) / 127 / float(scale_factors(4)[layout.n_scale_codes - 1])
    return Codec(np.stack([book, -book[::-1]]), float(np.float32(base * 1.1)), 4)


def search_for(codec: Codec, layout, backend: str) -> TorchSearch:
    return BACKENDS[backend](Grid.from_codec(codec, layout, "cpu"), layout.group_size)


@LAYOUTS
@CPU_BACKENDS
def test_decode_is_the_oracle_bit_for_bit(layout, backend):
    rng = np.random.default_rng(1)
    for m in (2, 3, 4, 5):
        codec = random_codec(rng, m)
        encoded = random_encoded(rng, layout, 8, 256)
        blocks = pack(layout, encoded.indices.numpy(), encoded.selectors.numpy(), encoded.scale_codes.numpy())
        ours = search_for(codec, layout, backend).decode(encoded).numpy()
        assert np.array_equal(ours.view(np.uint32), decode(layout, blocks, codec).view(np.uint32))


@LAYOUTS
@CPU_BACKENDS
def test_what_the_format_holds_is_encoded_without_loss(layout, backend):
    """Any weights that decode from blocks whose groups each reach a largest level come back exactly."""
    rng = np.random.default_rng(2)
    for m in (2, 3, 4, 5):
        encoded = random_encoded(rng, layout, 16, 512)
        first = encoded.selectors[:, :: layout.group_size // 16].long()
        search = search_for(random_codec(rng, m), layout, backend)
        encoded.indices[:, :: layout.group_size] = (first * 15).to(torch.uint8)
        weight = search.decode(encoded)
        assert torch.equal(search.decode(search.encode(weight, torch.rand(512) + 0.01)), weight)


@LAYOUTS
@CPU_BACKENDS
def test_search_is_close_to_trying_every_scale(layout, backend):
    rng = np.random.default_rng(3)
    weight = uneven_rows(16, 512)
    error_weight = torch.from_numpy(rng.uniform(0.1, 2, 512).astype(np.float32))
    search = search_for(codec_for(weight, layout), layout, backend)
    difference = (weight - search.decode(search.encode(weight, error_weight))).double()
    found = (error_weight * difference.square()).sum()

    groups = weight.view(-1, layout.group_size // 16, 16).double()
    a = error_weight.expand_as(weight).reshape(groups.shape).double()
    best = (a * groups.square()).sum((1, 2))
    for scale in search.grid.scales[1:].double():
        nearest = [(groups[..., None] - scale * book.double()).square().amin(-1) for book in search.grid.levels]
        best = torch.minimum(best, torch.minimum(*((a * n).sum(2) for n in nearest)).sum(1))
    assert best.sum() <= found <= 1.01 * best.sum()


@LAYOUTS
@CPU_BACKENDS
def test_search_reports_the_errors_of_its_encoding(layout, backend):
    weight, error_weight = uneven_rows(16, 512), torch.rand(16, 512) + 0.1
    search = search_for(codec_for(weight, layout), layout, backend)
    codes, selectors, errors = search.search(weight, error_weight)
    assert len(codes.unique()) > 10
    encoded = search.encode(weight, error_weight)
    assert torch.equal(encoded.scale_codes.reshape(-1), codes.to(torch.int32))
    assert torch.equal(encoded.selectors.reshape(-1), selectors.reshape(-1).to(torch.uint8))
    squares = error_weight * (weight - search.decode(encoded)).square()
    torch.testing.assert_close(squares.reshape(len(codes), -1).sum(1), errors, rtol=1e-3, atol=1e-9)


@NEEDS_C
@LAYOUTS
def test_absmax_scales_are_the_same_for_every_backend(layout):
    weight = uneven_rows(16, 512)
    codec = codec_for(weight, layout)
    found, expected = (
        search_for(codec, layout, name).encode_absmax(weight, torch.ones(512)) for name in ("native", "torch")
    )
    assert torch.equal(found.scale_codes, expected.scale_codes)
    assert torch.equal(found.indices, expected.indices)
    largest = weight.view(16, -1, layout.group_size).abs().amax(2) / 127
    scales = Grid.from_codec(codec, layout, "cpu").scales[1:]
    nearest = (largest[..., None] - scales).abs().argmin(-1)
    assert torch.equal(found.scale_codes.long(), 1 + nearest)
