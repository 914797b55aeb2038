"""Damaged and hostile GGUF files: a tiny AAAC model, and mutations that know where a header's numbers and names are.

python tests/hostile.py FOLDER --count 1000      # a corpus: base.gguf, base-moe.gguf and mutations of them
"""

from __future__ import annotations

import argparse
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from aaac_samples import codec, random_blocks
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.gguf import Metadata, TensorInfo, Value

N_EMBD, N_VOCAB = 128, 64


def tiny_model(n_experts: int = 0) -> tuple[Metadata, list[TensorInfo], list[bytes]]:
    """Return one random llama layer whose matrices take all three types: metadata, tensors, data. llama.cpp runs it."""
    kv = {
        "general.architecture": Value("llama", V.STRING),
        "llama.block_count": Value(1, V.UINT32),
        "llama.context_length": Value(64, V.UINT32),
        "llama.embedding_length": Value(N_EMBD, V.UINT32),
        "llama.feed_forward_length": Value(N_EMBD, V.UINT32),
        "llama.attention.head_count": Value(2, V.UINT32),
        "llama.attention.layer_norm_rms_epsilon": Value(1e-5, V.FLOAT32),
        "llama.vocab_size": Value(N_VOCAB, V.UINT32),
        "tokenizer.ggml.model": Value("no_vocab", V.STRING),
    }
    square = (N_EMBD, N_EMBD)
    shapes = {"token_embd": (N_VOCAB, N_EMBD), **{f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")}}
    if n_experts:
        kv |= {"llama.expert_count": Value(n_experts, V.UINT32), "llama.expert_used_count": Value(1, V.UINT32)}
        shapes |= {f"blk.0.ffn_{name}_exps": (n_experts, *square) for name in ("gate", "up", "down")}
    else:
        shapes |= {f"blk.0.ffn_{name}": square for name in ("gate", "up", "down")}
    infos, data, codecs = [], [], {}
    for i, (name, shape) in enumerate(shapes.items()):
        qtype = (fmt.G16, fmt.G32, fmt.G128)[i % 3]
        infos.append(TensorInfo(f"{name}.weight", shape, T[qtype.name]))
        data.append(random_blocks(qtype, int(np.prod(shape[:-1])), N_EMBD, seed=i, max_code=40).tobytes())
        codecs[f"{name}.weight"] = codec(2 + i % 4, 1e-5)
    floats = {"output_norm": (N_EMBD,), "blk.0.attn_norm": (N_EMBD,), "blk.0.ffn_norm": (N_EMBD,)}
    if n_experts:
        floats["blk.0.ffn_gate_inp"] = (n_experts, N_EMBD)
    for name, shape in floats.items():
        infos.append(TensorInfo(f"{name}.weight", shape, T.F32))
        data.append(np.ones(shape, dtype="<f4").tobytes())
    return {**kv, **gguf_io.codec_values(codecs)}, infos, data


def render(metadata: Metadata, infos: list[TensorInfo], data: list[bytes]) -> bytes:
    return gguf_io.render_header(metadata, infos) + b"".join(block + bytes(-len(block) % 32) for block in data)


#
# Where a header's numbers and names are
#


class Place(NamedTuple):
    """`size` bytes at `offset`; kind: count, length, type, dims, dim, offset, value or text."""

    offset: int
    size: int
    kind: str


SCALAR_SIZES = {
    V.UINT8: 1, V.INT8: 1, V.BOOL: 1, V.UINT16: 2, V.INT16: 2,
    V.UINT32: 4, V.INT32: 4, V.FLOAT32: 4, V.UINT64: 8, V.INT64: 8, V.FLOAT64: 8,
}  # fmt: skip


def places(data: bytes) -> list[Place]:
    """Every number and text in the header. Raises ValueError where the file ends before its header does."""
    found: list[Place] = []
    at = 4

    def take(size: int, kind: str) -> int:
        nonlocal at
        if at + size > len(data):
            raise ValueError("the header runs past the file")
        found.append(Place(at, size, kind))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def take_text() -> None:
        if size := take(8, "length"):
            take(size, "text")

    take(4, "value")  # version
    n_tensors, n_values = take(8, "count"), take(8, "count")
    for _ in range(n_values):
        take_text()
        kind, n = V(take(4, "type")), 1
        if kind == V.ARRAY:
            kind, n = V(take(4, "type")), take(8, "length")
        for _ in range(n):
            if kind == V.STRING:
                take_text()
            else:
                take(SCALAR_SIZES[kind], "value")
    for _ in range(n_tensors):
        take_text()
        for _ in range(take(4, "dims")):
            take(8, "dim")
        take(4, "type")
        take(8, "offset")
    return found


#
# Mutations
#


def lie(data: bytes, rng: random.Random) -> bytes:
    """One, two or three numbers or texts of the header become others; everything stays in its place."""
    kinds: dict[str, list[Place]] = {}
    for place in places(data):
        kinds.setdefault(place.kind, []).append(place)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = _lie_once(data, kinds, rng)
    return data


def _lie_once(data: bytes, kinds: dict[str, list[Place]], rng: random.Random) -> bytes:
    kind = rng.choice(sorted(kinds))
    place = rng.choice(kinds[kind])
    old = data[place.offset : place.offset + place.size]
    if kind == "text":
        other = rng.choice(kinds["text"])
        new = rng.choice(
            [
                data[other.offset : other.offset + other.size],  # a duplicate, if the lengths agree
                bytes(place.size),
                b"\xff" * place.size,
                b"\n" * place.size,
                rng.randbytes(place.size),
            ]
        )
        new = new[: place.size].ljust(place.size, b"x")
    else:
        n, bits = int.from_bytes(old, "little"), 8 * place.size
        few = [
            0,
            1,
            2,
            3,
            8,
            9,
            13,
            39,
            40,
            64,
            79,
            80,
            81,
            82,
            83,
            n + 1,
            n - 1,
            2 * n,
            n + 64,
            n + 32,
            -n,
            len(data),
            len(data) // 2,
        ]
        many = [(1 << k) + step for k in (7, 8, 15, 16, 20, 24, 31, 32, 40, 62, 63, 64) for step in (-1, 0)]
        new = (rng.choice([*few, *many, rng.getrandbits(bits)]) % (1 << bits)).to_bytes(place.size, "little")
        if place.size == 4 and kind == "value" and rng.random() < 0.3:
            new = struct.pack("<f", rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e38, 1e-45]))
    return data[: place.offset] + new + data[place.offset + place.size :]


def flip(data: bytes, rng: random.Random) -> bytes:
    """One bit of the header."""
    changed = bytearray(data)
    changed[rng.randrange(header_size(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """The file ends early: in the header as often as in the data."""
    return data[: rng.randrange(rng.choice([header_size(data), len(data)]))]


def splice(data: bytes, rng: random.Random) -> bytes:
    """A run of bytes of the header is lost, said twice or overwritten with another one."""
    size = header_size(data)
    a, b, n = rng.randrange(size), rng.randrange(size), rng.randrange(1, 64)
    return rng.choice(
        [data[:a] + data[a + n :], data[:a] + data[b : b + n] + data[a:], data[:a] + data[b : b + n] + data[a + n :]]
    )


def noise(data: bytes, rng: random.Random) -> bytes:
    """Blocks of random bytes: every scale code, selectors, indices, and bits that the layout does not define."""
    start = header_size(data)
    return data[:start] + rng.randbytes(len(data) - start)


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (lie, flip, cut, splice, noise)


def header_size(data: bytes) -> int:
    last = places(data)[-1]
    return last.offset + last.size


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of the mutations of a valid file."""
    return rng.choices(MUTATIONS, weights=(12, 3, 2, 2, 1))[0](data, rng)


def change(kv: Metadata, rng: random.Random) -> Metadata:
    """Yield metadata in which one aaac.* key is missing, repeated, reordered, out of range, or of another type."""
    key = rng.choice(
        [fmt.KEY_VERSION, fmt.KEY_TENSOR_NAMES, fmt.KEY_CODEBOOKS, fmt.KEY_SCALE_BASE, fmt.KEY_SCALE_MANTISSA_BITS]
    )
    kv, old = dict(kv), kv[key]
    if key == fmt.KEY_VERSION or rng.random() < 0.15:
        new = rng.choice(
            [
                None,
                Value(2, V.UINT32),
                Value("1", V.STRING),
                Value(1, V.UINT64),
                Value([1], V.ARRAY, V.UINT32),
                Value([], V.ARRAY, V.STRING),
            ]
        )
    else:
        items = list(old.value)
        i, j = rng.randrange(len(items)), rng.randrange(len(items))
        hostile = {
            fmt.KEY_TENSOR_NAMES: ["", "x", "blk.0.attn_norm.weight", "\n\x1b[31m", "a" * 70],
            fmt.KEY_CODEBOOKS: [-128, 127, 0, -127],
            fmt.KEY_SCALE_BASE: [float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 3e38, 1e-45],
            fmt.KEY_SCALE_MANTISSA_BITS: [0, 1, 6, 23, 24, 32, 255],
        }[key]
        edits = [
            [*items[:i], rng.choice(hostile), *items[i + 1 :]],
            [*items[:i], items[j], *items[i + 1 :]],
            items[:i],
            items + items[:i],
            items[::-1],
            [],
        ]
        new = old._replace(value=rng.choice(edits))
    if new is None:
        del kv[key]
    else:
        kv[key] = new
    return kv


def misplaced(rng: random.Random) -> bytes:
    """A valid file in which a vector, or a matrix that llama.cpp wants in F32, is of an AAAC type."""
    kv, infos, data = tiny_model(2)
    kv = dict(kv)
    places = {
        "blk.0.attn_q.bias": (N_EMBD,),
        "rope_freqs.weight": (N_EMBD,),
        "blk.0.ffn_up_exps.bias": (2, N_EMBD),
        "blk.0.attn_q.scale": (N_EMBD,),
    }
    places |= {t.name: t.shape for t in infos if t.type == T.F32}
    name, qtype = rng.choice(sorted(places)), rng.choice([fmt.G16, fmt.G32, fmt.G128])
    kept = [(t, block) for t, block in zip(infos, data, strict=True) if t.name != name]
    blocks = random_blocks(qtype, int(np.prod(places[name][:-1])), N_EMBD, seed=0, max_code=40).tobytes()
    kept.append((TensorInfo(name, places[name], T[qtype.name]), blocks))
    for key, values in gguf_io.codec_values({name: codec(3, 1e-5)}).items():
        if key != fmt.KEY_VERSION:
            kv[key] = kv[key]._replace(value=[*kv[key].value, *values.value])
    return render(kv, *(list(column) for column in zip(*kept, strict=True)))


def hostile_file(rng: random.Random, n_experts: int = 0) -> bytes:
    """One hostile file, the same for the same state of `rng`."""
    kv, infos, data = tiny_model(n_experts)
    if rng.random() < 0.03:
        return misplaced(rng)
    if rng.random() < 0.25:
        return render(change(kv, rng), infos, data)
    return mutate(render(kv, infos, data), rng)


def write_corpus(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """The two models, whole, and `count` hostile files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.gguf").write_bytes(render(*tiny_model()))
    (folder / "base-moe.gguf").write_bytes(render(*tiny_model(2)))
    paths = []
    for i in range(count):
        paths.append(folder / f"{i:05}.gguf")
        paths[-1].write_bytes(hostile_file(random.Random(f"{seed} {i}"), 2 * (i % 4 == 3)))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"{len(write_corpus(args.folder, args.count, args.seed))} hostile files and two whole ones in {args.folder}")
