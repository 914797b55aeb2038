"""AAAC GGUF files for the tests of readers."""

from pathlib import Path

import numpy as np
from aaac_samples import random_blocks
from conftest import random_codec
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V

from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.gguf import TensorInfo, Value

ALL_TYPES = tuple(fmt.TYPES.values())
KV = {"general.architecture": Value("llama", V.STRING), "general.name": Value("x", V.STRING)}


def aaac_file(path: Path, rng: np.random.Generator, change: dict | None = None, types=ALL_TYPES) -> dict:
    """A GGUF with one tensor per type; `change` replaces metadata values. Returns what it holds."""
    data = {t.name.lower(): (t, random_blocks(t, 4, 256, seed=t.type_id)) for t in types}
    codecs = {name: random_codec(rng) for name in data}
    kv = {**KV, **gguf_io.codec_values(codecs), **(change or {})}
    kv = {key: value for key, value in kv.items() if value is not None}
    infos = [TensorInfo(name, (4, 256), T[t.name]) for name, (t, _) in data.items()]
    path.write_bytes(
        gguf_io.render_header(kv, infos) + b"".join(b.tobytes() + bytes(-b.nbytes % 32) for _, b in data.values())
    )
    return {name: (t, blocks, codecs[name]) for name, (t, blocks) in data.items()}
