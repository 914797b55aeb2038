"""The AAAC GGUF format, version 1: type ids, block layouts, metadata keys, and pack, unpack and decode in numpy.

The C header, the CUDA kernels and the llama.cpp patch are tested against this module. The text is `docs/format.md`.

    w[n, k] = S(scale_code) * C[selector][index]

    index       4 bits per weight
    selector    1 bit per 16 weights: which of the tensor's two codebooks
    scale_code  7 bits (6 in AAAC4_G32) per group of `group_size` weights

S(0) = 0 and S(i) = d * f(i), with f an unsigned float of m mantissa bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import AaacError

VERSION = 1

KEY_VERSION = "aaac.format_version"
KEY_TENSOR_NAMES = "aaac.tensor_names"
KEY_CODEBOOKS = "aaac.codebooks"
KEY_SCALE_BASE = "aaac.scale_base"
KEY_SCALE_MANTISSA_BITS = "aaac.scale_mantissa_bits"
KEY_QUANTIZER = "aaac.quantizer"
KEY_CALIBRATION = "aaac.calibration"

N_CODEBOOKS = 2
N_LEVELS = 16
MAX_LEVEL = 127
SELECTOR_SIZE = 16  # weights per selector bit, in every type
RUN_SIZE = 64  # weights per run of 32 index bytes
MANTISSA_BITS = (2, 3, 4, 5)

U8 = NDArray[Any]  # uint8: numpy's stubs widen `uint8 << int`, numpy itself does not
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class AaacType:
    """One tensor type: a block of `block_size` weights is a header of `header_size` bytes and then the indices."""

    name: str
    type_id: int
    group_size: int
    block_size: int
    header_size: int
    scale_bits: int

    @property
    def type_size(self) -> int:
        """Return the bytes of a block."""
        return self.header_size + self.block_size // 2

    @property
    def bits_per_weight(self) -> float:
        """Return the bits that a weight takes, scales and selectors included."""
        return 8 * self.type_size / self.block_size

    @property
    def n_scale_codes(self) -> int:
        """Return the number of scale codes, zero included."""
        return 1 << self.scale_bits

    def row_bytes(self, n_per_row: int) -> int:
        """Return the bytes of a row of `n_per_row` weights. Raises AaacError if the row is not whole blocks."""
        if n_per_row % self.block_size:
            raise AaacError(
                f"{self.name}: rows of {n_per_row} weights are not whole blocks of {self.block_size}; "
                "use another type for this tensor"
            )
        return n_per_row // self.block_size * self.type_size

    # The header is all that differs between the types.

    def pack_header(self, codes: U8, selectors: U8) -> U8:
        """Return headers of codes [..., block_size / group_size] and selectors [..., block_size / 16]."""
        raise NotImplementedError

    def unpack_header(self, header: U8) -> tuple[U8, U8]:
        """Return the codes and selectors of headers."""
        raise NotImplementedError


class _G16(AaacType):
    """Four bytes: selector << 7 | scale_code of 16 weights."""

    def pack_header(self, codes: U8, selectors: U8) -> U8:
        return selectors << 7 | codes

    def unpack_header(self, header: U8) -> tuple[U8, U8]:
        return header & 0x7F, header >> 7


class _G32(AaacType):
    """Two bytes: selector of the last 16 weights << 7 | selector of the first 16 << 6 | scale_code of 32 weights."""

    def pack_header(self, codes: U8, selectors: U8) -> U8:
        return selectors[..., 1::2] << 7 | selectors[..., 0::2] << 6 | codes

    def unpack_header(self, header: U8) -> tuple[U8, U8]:
        pairs = np.stack([header >> 6 & 1, header >> 7], axis=-1)
        return header & 0x3F, pairs.reshape(*header.shape[:-1], -1)


class _G128(AaacType):
    """Two bytes: scale_code of 128 weights; then bit j is the selector of weights 16j .. 16j + 15."""

    def pack_header(self, codes: U8, selectors: U8) -> U8:
        return np.concatenate([codes, np.packbits(selectors, axis=-1, bitorder="little")], axis=-1)

    def unpack_header(self, header: U8) -> tuple[U8, U8]:
        return header[..., :1], np.unpackbits(header[..., 1:], axis=-1, bitorder="little")


G16 = _G16("AAAC4_G16", 80, group_size=16, block_size=64, header_size=4, scale_bits=7)
G32 = _G32("AAAC4_G32", 81, group_size=32, block_size=64, header_size=2, scale_bits=6)
G128 = _G128("AAAC4_G128", 82, group_size=128, block_size=128, header_size=2, scale_bits=7)

TYPES: dict[str, AaacType] = {t.name: t for t in (G16, G32, G128)}
TYPES_BY_ID: dict[int, AaacType] = {t.type_id: t for t in TYPES.values()}


def scale_factors(scale_mantissa_bits: int) -> F32:
    """Return f(i) for the 128 scale codes, with 0 at i = 0: float32 [128]. Multiplied by d it is S."""
    codes = np.arange(128, dtype=np.uint32)
    factors = (np.uint32(0x3F800000) + (codes << np.uint32(23 - scale_mantissa_bits))).view(np.float32)
    factors[0] = 0.0
    return factors


@dataclass(frozen=True, eq=False)
class Codec:
    """The parameters that decode the blocks of one tensor.

    codebooks            int8 [2, 16], each ascending
    scale_base           d
    scale_mantissa_bits  m
    """

    codebooks: NDArray[np.int8]
    scale_base: float
    scale_mantissa_bits: int

    def check(self, name: str) -> Codec:
        """Return self, or raise AaacError that names the tensor `name`."""
        books = self.codebooks
        if books.shape != (N_CODEBOOKS, N_LEVELS) or books.dtype != np.int8:
            raise AaacError(
                f"tensor {name}: codebooks are {books.dtype}{list(books.shape)}, expected int8[2, 16]; "
                "write the file again"
            )
        if (np.diff(books.astype(np.int16)) <= 0).any() or books.min() < -MAX_LEVEL:
            raise AaacError(
                f"tensor {name}: a codebook is not strictly ascending within [-127, 127]; write the file again"
            )
        if self.scale_mantissa_bits not in MANTISSA_BITS:
            raise AaacError(
                f"tensor {name}: scale mantissa bits are {self.scale_mantissa_bits}, expected 2, 3, 4 or 5; "
                "write the file again"
            )
        largest = np.float64(self.scale_base) * scale_factors(self.scale_mantissa_bits)[-1] * MAX_LEVEL
        if not (self.scale_base > 0 and largest <= np.finfo(np.float32).max):
            raise AaacError(
                f"tensor {name}: scale base {self.scale_base} is not positive, or not finite, or overflows float32; "
                "write the file again"
            )
        return self

    def scales(self) -> F32:
        """Return S(i) for the 128 scale codes, float32 [128]."""
        return np.float32(self.scale_base) * scale_factors(self.scale_mantissa_bits)


def pack(qtype: AaacType, indices: U8, selectors: U8, codes: U8) -> U8:
    """Pack rows into blocks uint8 [..., row bytes].

    indices [..., K] in 0..15, selectors [..., K / 16] in 0..1, codes [..., K / group_size], all uint8. Raises AaacError
    if K is not whole blocks.
    """
    *outer, n_per_row = indices.shape
    qtype.row_bytes(n_per_row)  # refuses ragged rows
    blocks = (*outer, n_per_row // qtype.block_size)
    header = qtype.pack_header(codes.reshape(*blocks, -1), selectors.reshape(*blocks, -1))
    low, high = np.moveaxis(indices.reshape(*blocks, -1, 2, RUN_SIZE // 2), -2, 0)
    qs = (low | high << 4).reshape(*blocks, -1)
    return np.concatenate([header, qs], axis=-1).reshape(*outer, -1)


def unpack(qtype: AaacType, data: U8) -> tuple[U8, U8, U8]:
    """Invert `pack`: return indices [..., K], selectors [..., K / 16] and codes [..., K / group_size], all uint8."""
    *outer, n_bytes = data.shape
    if n_bytes % qtype.type_size:
        raise AaacError(
            f"{qtype.name}: rows of {n_bytes} bytes are not whole blocks of {qtype.type_size}; the file is damaged"
        )
    blocks = data.reshape(*outer, n_bytes // qtype.type_size, qtype.type_size)
    codes, selectors = qtype.unpack_header(blocks[..., : qtype.header_size])
    qs = blocks[..., qtype.header_size :].reshape(*blocks.shape[:-1], -1, 1, RUN_SIZE // 2)
    indices = np.concatenate([qs & 0x0F, qs >> 4], axis=-2)
    return indices.reshape(*outer, -1), selectors.reshape(*outer, -1), codes.reshape(*outer, -1)


def decode(qtype: AaacType, data: U8, codec: Codec) -> F32:
    """Decode blocks uint8 [..., row bytes] to weights float32 [..., K].

    S is computed in float32, and each weight is one float32 product. Raises AaacError for blocks with bits that the
    layout does not define.
    """
    indices, selectors, codes = unpack(qtype, data)
    if (codes >= qtype.n_scale_codes).any():
        raise AaacError(f"{qtype.name}: a scale code is above {qtype.n_scale_codes - 1}; the file is damaged")
    levels = codec.codebooks[np.repeat(selectors, SELECTOR_SIZE, axis=-1), indices].astype(np.float32)
    return np.repeat(codec.scales()[codes], qtype.group_size, axis=-1) * levels


def check_blocks(qtype: AaacType, data: U8, name: str) -> None:
    """Raise AaacError if the blocks of tensor `name` hold bits that the layout does not define."""
    _, _, codes = unpack(qtype, data)
    if (codes >= qtype.n_scale_codes).any():
        raise AaacError(f"tensor {name}: a scale code is above {qtype.n_scale_codes - 1}; the file is damaged")


def codecs_to_metadata(codecs: Mapping[str, Codec]) -> dict[str, int | list[str] | NDArray]:
    """Return the aaac.* keys that describe `codecs`, by tensor name."""
    return {
        KEY_VERSION: VERSION,
        KEY_TENSOR_NAMES: list(codecs),
        KEY_CODEBOOKS: np.concatenate([c.codebooks.reshape(-1) for c in codecs.values()]),
        KEY_SCALE_BASE: np.array([c.scale_base for c in codecs.values()], dtype=np.float32),
        KEY_SCALE_MANTISSA_BITS: np.array([c.scale_mantissa_bits for c in codecs.values()], dtype=np.uint8),
    }


def codecs_from_metadata(
    version: int, names: Sequence[str], codebooks: NDArray, scale_base: NDArray, scale_mantissa_bits: NDArray
) -> dict[str, Codec]:
    """Invert `codecs_to_metadata`. Raises AaacError for all that a reader must refuse."""
    if version != VERSION:
        raise AaacError(
            f"{KEY_VERSION} is {version}; this version of aaac-gguf reads {VERSION}: "
            "upgrade aaac-gguf, or write the file again"
        )
    lengths = {
        KEY_CODEBOOKS: len(codebooks) / 32,
        KEY_SCALE_BASE: len(scale_base),
        KEY_SCALE_MANTISSA_BITS: len(scale_mantissa_bits),
    }
    for key, length in lengths.items():
        if length != len(names):
            raise AaacError(
                f"{key} describes {length:g} tensors and {KEY_TENSOR_NAMES} lists {len(names)}; the file is damaged"
            )
    if len(set(names)) != len(names):
        twice = next(n for n, count in Counter(names).items() if count > 1)
        raise AaacError(f"{KEY_TENSOR_NAMES} lists tensor {twice} twice; the file is damaged")
    books = np.asarray(codebooks, dtype=np.int8).reshape(-1, N_CODEBOOKS, N_LEVELS)
    return {
        n: Codec(b, float(d), int(m)).check(n)
        for n, b, d, m in zip(names, books, scale_base, scale_mantissa_bits, strict=True)
    }
