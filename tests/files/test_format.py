"""The oracle: layouts by hand, pack and unpack as inverses, decode as FORMAT says, and every refusal."""

import numpy as np
import pytest
from aaac_samples import random_blocks
from conftest import random_codec

from aaac_gguf.errors import AaacError
from aaac_gguf.files import format as fmt

TYPES = list(fmt.TYPES.values())
by_type = pytest.mark.parametrize("qtype", TYPES, ids=lambda t: t.name)


@by_type
def test_sizes(qtype):
    expected = {"AAAC4_G16": (80, 36, 4.5), "AAAC4_G32": (81, 34, 4.25), "AAAC4_G128": (82, 66, 4.125)}[qtype.name]
    assert (qtype.type_id, qtype.type_size, qtype.bits_per_weight) == expected


@by_type
def test_pack_and_unpack_are_inverse_on_random_blocks(qtype):
    data = random_blocks(qtype, 6, 512, seed=0).reshape(3, 2, -1)
    assert data.shape == (3, 2, qtype.row_bytes(512))
    np.testing.assert_array_equal(fmt.pack(qtype, *fmt.unpack(qtype, data)), data)


def test_every_byte_string_is_a_valid_g16_and_g32_row(rng):
    for qtype in (fmt.G16, fmt.G32):
        data = rng.integers(0, 256, (7, 5 * qtype.type_size), dtype=np.uint8)
        fmt.check_blocks(qtype, data, "x")
        np.testing.assert_array_equal(fmt.pack(qtype, *fmt.unpack(qtype, data)), data)


def layout(qtype, header: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Selectors and scale codes of one block with the given header bytes."""
    block = np.array([*header, *[0] * (qtype.block_size // 2)], dtype=np.uint8)
    return fmt.unpack(qtype, block)[1:]


def test_g16_header_by_hand():
    selectors, codes = layout(fmt.G16, [0x80 | 5, 0x7F, 0x80, 0x01])
    assert selectors.tolist() == [1, 0, 1, 0]
    assert codes.tolist() == [5, 127, 0, 1]


def test_g32_header_by_hand():
    selectors, codes = layout(fmt.G32, [0x80 | 0x3F, 0x40 | 9])
    assert selectors.tolist() == [0, 1, 1, 0]
    assert codes.tolist() == [63, 9]


def test_g128_header_by_hand():
    selectors, codes = layout(fmt.G128, [0x55, 0b10000110])
    assert selectors.tolist() == [0, 1, 1, 0, 0, 0, 0, 1]
    assert codes.tolist() == [0x55]


@by_type
def test_nibbles_by_hand(qtype):
    block = np.zeros(qtype.type_size, dtype=np.uint8)
    block[qtype.header_size + 3] = 0xA7  # weight 3 low, weight 35 high
    expected = np.zeros(qtype.block_size, dtype=np.uint8)
    expected[3], expected[35] = 7, 10
    if qtype is fmt.G128:
        block[qtype.header_size + 32 + 31] = 0x1F  # second run of 64
        expected[64 + 31], expected[64 + 63] = 15, 1
    np.testing.assert_array_equal(fmt.unpack(qtype, block)[0], expected)


@pytest.mark.parametrize("m", fmt.MANTISSA_BITS)
def test_scale_factors_are_floats_with_m_mantissa_bits(m):
    factors = fmt.scale_factors(m)
    assert factors.dtype == np.float32
    assert factors[0] == 0
    for i in range(1, 128):
        exponent, mantissa = divmod(i, 1 << m)
        assert factors[i] == 2.0**exponent * (1 + mantissa / (1 << m))


@by_type
@pytest.mark.parametrize("m", fmt.MANTISSA_BITS)
def test_decode_is_scale_times_level(qtype, m, rng):
    codec = random_codec(rng, m)
    data = random_blocks(qtype, 5, 256, seed=0)
    indices, selectors, codes = fmt.unpack(qtype, data)
    weights = fmt.decode(qtype, data, codec)
    assert weights.dtype == np.float32
    factors = fmt.scale_factors(m)
    for row, k in ((0, 0), (1, 17), (2, 33), (3, 130), (4, 255)):
        scale = np.float32(codec.scale_base) * factors[codes[row, k // qtype.group_size]]
        assert weights[row, k] == scale * np.float32(codec.codebooks[selectors[row, k // 16], indices[row, k]])


def test_code_zero_is_exactly_zero(rng):
    data = fmt.pack(
        fmt.G16,
        rng.integers(0, 16, (2, 64), dtype=np.uint8),
        np.ones((2, 4), dtype=np.uint8),
        np.zeros((2, 4), dtype=np.uint8),
    )
    assert not fmt.decode(fmt.G16, data, random_codec(rng)).any()


def test_g128_refuses_a_scale_code_above_127():
    data = random_blocks(fmt.G128, 1, 128, seed=0)
    data[0, 0] |= 0x80
    with pytest.raises(AaacError, match=r"tensor blk\.1: a scale code is above 127"):
        fmt.check_blocks(fmt.G128, data, "blk.1")


def test_ragged_rows_are_refused():
    with pytest.raises(AaacError, match="rows of 100 weights are not whole blocks of 64"):
        fmt.G16.row_bytes(100)


LEVELS = np.tile(np.arange(-8, 8, dtype=np.int8), (2, 1))


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (fmt.Codec(LEVELS[:, ::-1].copy(), 1.0, 3), "not strictly ascending"),
        (fmt.Codec(np.where(LEVELS == 3, 2, LEVELS).astype(np.int8), 1.0, 3), "not strictly ascending"),
        (fmt.Codec(np.where(LEVELS == -8, -128, LEVELS).astype(np.int8), 1.0, 3), "not strictly ascending"),
        (fmt.Codec(LEVELS[:1], 1.0, 3), "expected int8"),
        (fmt.Codec(LEVELS, 0.0, 3), "not positive"),
        (fmt.Codec(LEVELS, -1.0, 3), "not positive"),
        (fmt.Codec(LEVELS, float("nan"), 3), "not finite"),
        (fmt.Codec(LEVELS, float("inf"), 3), "not finite"),
        (fmt.Codec(LEVELS, 3e38, 3), "overflows"),
        (fmt.Codec(LEVELS, 1.0, 1), "mantissa bits are 1"),
        (fmt.Codec(LEVELS, 1.0, 6), "mantissa bits are 6"),
    ],
)
def test_codec_refusals(codec, words):
    with pytest.raises(AaacError, match=words):
        codec.check("t")


def test_metadata_round_trip(rng):
    codecs = {f"t{i}": random_codec(rng, 2 + i) for i in range(3)}
    kv = fmt.codecs_to_metadata(codecs)
    again = fmt.codecs_from_metadata(
        kv[fmt.KEY_VERSION],
        kv[fmt.KEY_TENSOR_NAMES],
        kv[fmt.KEY_CODEBOOKS],
        kv[fmt.KEY_SCALE_BASE],
        kv[fmt.KEY_SCALE_MANTISSA_BITS],
    )
    for name, codec in codecs.items():
        np.testing.assert_array_equal(again[name].codebooks, codec.codebooks)
        assert (again[name].scale_base, again[name].scale_mantissa_bits) == (
            codec.scale_base,
            codec.scale_mantissa_bits,
        )


BOOK = LEVELS.reshape(-1)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ((2, ["a"], BOOK, [1.0], [3]), "aaac.format_version is 2"),
        ((1, ["a", "b"], BOOK, [1.0, 1.0], [3, 3]), "describes 1 tensors and aaac.tensor_names lists 2"),
        ((1, ["a"], BOOK[:31], [1.0], [3]), "aaac.codebooks describes"),
        ((1, ["a"], BOOK, [], [3]), "aaac.scale_base describes 0"),
        ((1, ["a"], BOOK, [1.0], [3, 3]), "aaac.scale_mantissa_bits describes 2"),
        ((1, ["a", "a"], np.tile(BOOK, 2), [1.0, 1.0], [3, 3]), "lists tensor a twice"),
    ],
)
def test_metadata_refusals(args, words):
    with pytest.raises(AaacError, match=words):
        fmt.codecs_from_metadata(*args)


def test_the_spec_copy_names_what_the_code_has():
    from pathlib import Path

    spec = (Path(fmt.__file__).parents[2] / "docs" / "format.md").read_text()
    for qtype in TYPES:
        assert (
            f"| {qtype.type_id} | `{qtype.name}` | {qtype.group_size} | 16 | {qtype.block_size} | "
            f"{qtype.header_size} + {qtype.block_size // 2} |" in spec
        )
    for key in [value for name, value in vars(fmt).items() if name.startswith("KEY_")]:
        assert f"`{key}`" in spec
