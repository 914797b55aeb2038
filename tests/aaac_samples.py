"""Blocks and codebooks for the tests of every decoder: exhaustive, random and hand-written."""

import numpy as np

from aaac_gguf.files.format import G16, G32, G128, AaacType, Codec, pack

# asymmetric, unlike, and at both ends of int8's symmetric range
BOOKS = np.array(
    [
        [-127, -101, -80, -64, -50, -37, -25, -14, -3, 8, 20, 33, 48, 66, 88, 115],
        [-90, -71, -55, -42, -31, -21, -12, -4, 5, 15, 27, 41, 57, 76, 99, 127],
    ],
    dtype=np.int8,
)


def codec(m: int, d: float = 0.0013) -> Codec:
    return Codec(BOOKS, float(np.float32(d)), m)


def every_combination(qtype: AaacType) -> np.ndarray:
    """Blocks uint8 [rows, row bytes]: every index with both selectors under every scale code."""
    rng = np.random.default_rng(7)
    rows = []
    for code in range(qtype.n_scale_codes):
        indices = np.resize(np.arange(16, dtype=np.uint8), 256)
        selectors = np.resize(np.array([0, 1], dtype=np.uint8), 16)
        rows.append(
            (
                rng.permuted(indices.reshape(16, 16), axis=1).reshape(-1),
                selectors,
                np.full(256 // qtype.group_size, code, np.uint8),
            )
        )
    indices, selectors, codes = (np.stack(x) for x in zip(*rows, strict=True))
    return pack(qtype, indices, selectors, codes)


def random_blocks(qtype: AaacType, n_rows: int, n_per_row: int, seed: int, max_code: int | None = None) -> np.ndarray:
    """Valid blocks uint8 [n_rows, row bytes] with scale codes 0 .. max_code."""
    rng = np.random.default_rng(seed)
    high = qtype.n_scale_codes if max_code is None else min(max_code + 1, qtype.n_scale_codes)

    def draw(n: int, width: int) -> np.ndarray:
        return rng.integers(0, n, (n_rows, width), dtype=np.uint8)

    return pack(qtype, draw(16, n_per_row), draw(2, n_per_row // 16), draw(high, n_per_row // qtype.group_size))


def hand_written(qtype: AaacType) -> tuple[np.ndarray, np.ndarray]:
    """One block as bytes, and float64 weights worked out by hand from the layout's text: d = 1, m = 3."""
    index_bytes = np.arange(32, dtype=np.uint8) * 7 + 3  # both nibbles vary
    low, high = index_bytes & 15, index_bytes >> 4
    run = np.concatenate([low, high])
    f = {
        0: 0.0,
        1: 1.125,
        9: 2.25,
        63: 2.0**7 * 1.875,
        127: 2.0**15 * 1.875,
    }  # 2^(i >> 3) * (1 + (i & 7) / 8), but 0 for 0
    book0, book1 = BOOKS.astype(np.float64)
    if qtype is G16:
        header = [0x00, 0x80 | 1, 9, 0x80 | 127]
        weights = np.concatenate(
            [f[0] * book0[run[:16]], f[1] * book1[run[16:32]], f[9] * book0[run[32:48]], f[127] * book1[run[48:]]]
        )
    elif qtype is G32:
        header = [0x80 | 9, 0x40 | 63]
        weights = np.concatenate(
            [f[9] * book0[run[:16]], f[9] * book1[run[16:32]], f[63] * book1[run[32:48]], f[63] * book0[run[48:]]]
        )
    else:
        assert qtype is G128
        header = [9, 0b0101_0110]
        books = [book1 if 0b0101_0110 >> j & 1 else book0 for j in range(8)]
        run = np.concatenate([run, run[::-1]])
        second = run[64:96] | run[96:] << 4
        weights = np.concatenate([f[9] * books[j][run[16 * j : 16 * j + 16]] for j in range(8)])
        index_bytes = np.concatenate([index_bytes, second.astype(np.uint8)])
    return np.concatenate([np.array(header, np.uint8), index_bytes])[None], weights[None]
