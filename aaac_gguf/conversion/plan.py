"""Which tensor gets which type and why, and the exact size of the file: what `--dry-run` prints and `convert` follows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile, TensorInfo, block_number, tensor_bytes

PLAIN_TYPES = (T.F32, T.F16, T.BF16)
WRITABLE_TYPES = (*PLAIN_TYPES, T.Q8_0, T.Q6_K, T.Q5_K, T.Q4_0, T.IQ4_NL, *(T[name] for name in fmt.TYPES))

# What a type becomes where the row length is not a multiple of its block: the next longer grid that fits.
FALLBACK = {
    T["AAAC4_G128"]: T["AAAC4_G32"],
    T["AAAC4_G32"]: T.Q8_0,
    T["AAAC4_G16"]: T.Q8_0,
    T.Q5_K: T.Q8_0,
    T.Q6_K: T.Q8_0,
    T.Q8_0: T.F16,
}
FALLBACK |= {T.Q4_0: T.F16, T.IQ4_NL: T.F16}

EMBEDDINGS = ("token_embd.weight", "output.weight")

# Weights that llama.cpp itself never quantizes: `tensor_allows_quantization` in src/llama-quant.cpp.
KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|ffn_gate_tid2eid\.weight$|altup|laurel|per_layer_model_proj|^position_embd\.weight$|^token_types\.weight$"
    r"|ssm_conv1d|shortconv\.conv\.weight$|indexer\.[kq]_proj\.weight$|time_mix_(first|w[0-2]|v[0-2]|a[0-2]|g[12]|decay_w[12]|lerp_fused)\.weight$"
    r"|attn_rel_b\.weight$|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output; `shape` in numpy order."""

    name: str
    shape: tuple[int, ...]
    source_type: T
    type: T
    reason: str

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.shape, self.type)

    @property
    def n_weights(self) -> int:
        return tensor_bytes(self.shape, T.I8)

    @property
    def n_bytes(self) -> int:
        return tensor_bytes(self.shape, self.type)


@dataclass(frozen=True)
class Override:
    """`--tensor-type REGEX=TYPE`: tensors whose name the expression matches anywhere get the type."""

    pattern: re.Pattern[str]
    type: T


def parse_type(text: str, flag: str) -> T:
    """A type by its name, any case. Raises AaacError that names `flag` and lists the choices."""
    by_name = {t.name: t for t in WRITABLE_TYPES}
    if text.upper() not in by_name:
        raise AaacError(f"{flag} {text}: unknown type; choose from {', '.join(by_name)}")
    return by_name[text.upper()]


def parse_override(text: str) -> Override:
    """One `REGEX=TYPE`; the last `=` divides."""
    pattern, equals, name = text.rpartition("=")
    if not equals or not pattern:
        raise AaacError(f"--tensor-type {text}: expected REGEX=TYPE, for example 'ffn_down=Q8_0'")
    try:
        return Override(re.compile(pattern), parse_type(name, f"--tensor-type {pattern}="))
    except re.error as e:
        raise AaacError(f"--tensor-type {text}: bad regular expression: {e}") from None


def make_plan(
    source: GgufFile, default: T, overrides: Sequence[Override] = (), embedding: T = T.Q6_K
) -> list[TensorPlan]:
    """Decide every tensor's type, and their order in the file.

    Matrices get `default`, token_embd and output get `embedding` unless `default` is not a 4-bit type.

    Raises AaacError for an override that matches no tensor, and for a source that is quantized already.
    """
    used: set[Override] = set()
    plans = []
    for name, tensor in source.tensors.items():
        if tensor.tensor_type not in PLAIN_TYPES and tensor.tensor_type not in (T.I8, T.I16, T.I32, T.I64, T.F64):
            raise AaacError(
                f"{source.path}: tensor {name} is {tensor.tensor_type.name} already; start from the full-precision file"
            )
        shape = tuple(int(n) for n in reversed(tensor.shape))
        wanted, reason = _wanted(name, shape, tensor.tensor_type, default, embedding)
        for override in overrides:
            if override.pattern.search(name):
                used.add(override)
                wanted, reason = override.type, f"--tensor-type {override.pattern.pattern}"
        fitting = wanted
        while shape[-1] % GGML_QUANT_SIZES[fitting][0]:
            fitting = FALLBACK[fitting]
        if fitting != wanted:
            reason = (
                f"fallback: rows of {shape[-1]} are not whole {wanted.name} blocks of {GGML_QUANT_SIZES[wanted][0]}"
            )
        plans.append(TensorPlan(name, shape, tensor.tensor_type, fitting, reason))
    for override in overrides:
        if override not in used:
            raise AaacError(
                f"--tensor-type {override.pattern.pattern}={override.type.name}: matches no tensor; see the names with --dry-run"
            )
    # Blocks as the model runs them (checkpoints may have them as 0, 1, 10, 11, 2), and the rest behind.
    return sorted(plans, key=lambda p: block_number(p.name, 1 << 30))


def _wanted(name: str, shape: tuple[int, ...], source_type: T, default: T, embedding: T) -> tuple[T, str]:
    if source_type not in PLAIN_TYPES:
        return source_type, "not a floating-point weight"
    if len(shape) < 2:
        return T.F32, "one dimension"
    if not name.endswith(".weight") or KEPT.search(name):
        return (T.F32 if default == T.F32 else source_type), "never quantized"
    if name in EMBEDDINGS and default not in (*PLAIN_TYPES, T.Q8_0):
        return embedding, "embedding or output"
    return default, ""


def summary(plans: Sequence[TensorPlan]) -> str:
    """Bytes, tensors and bits per weight by type: the lines under a plan's listing."""
    lines = []
    for ggml_type in dict.fromkeys(p.type for p in plans):
        group = [p for p in plans if p.type == ggml_type]
        n_bytes = sum(p.n_bytes for p in group)
        lines.append(f"{ggml_type.name:>10} {len(group):5} tensors {n_bytes:15,} bytes")
    n_bytes, n_weights = sum(p.n_bytes for p in plans), sum(p.n_weights for p in plans)
    lines.append(
        f"{'all':>10} {len(plans):5} tensors {n_bytes:15,} bytes  {8 * n_bytes / n_weights:.3f} bits per weight"
    )
    return "\n".join(lines)
