"""Decide for every tensor its type, how it is rounded to it, and why: what a dry run prints and the encoder follows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T

from ..errors import AaacError, warn
from ..files import format as fmt
from ..files.gguf import GgufFile, TensorInfo, block_number, tensor_bytes
from ..quantizer.types import TENSOR_TYPES
from .recipes import EMBEDDINGS, PLAIN_TYPES, Recipe
from .settings import MomentsKind, Settings, parse_type

NOT_WEIGHTS = (T.I8, T.I16, T.I32, T.I64, T.F64)  # what else a full-precision file may hold: copied as it is
BY_NATURE = (T.MXFP4, T.NVFP4)  # checkpoints are trained in these 4-bit types, and so they are copied too

ASKED_FOR = "asked for: "  # the reason of a type that a setting gave

# From so many bits per weight up, search gains nothing for embeddings and the output matrix.
_FINE_BITS = 5
# Sources of so many bits per weight are as good as full precision, nearly.
_REQUANTIZED_BITS = 8

# Weights that llama.cpp itself never quantizes: `tensor_allows_quantization` in src/llama-quant.cpp.
KEPT = re.compile(
    r"_norm\.weight$|ffn_gate_inp\.weight$|ffn_gate_tid2eid\.weight$|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight$|indexer\.[kq]_proj\.weight$"
    r"|time_mix_(first|w[0-2]|v[0-2]|a[0-2]|g[12]|decay_w[12]|lerp_fused)\.weight$|attn_rel_b\.weight$|\.position_embd"
    r"|sam\.(pos_embd|neck\.|net_)|\.rel_pos|\.patch_embd|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)


class Rounding(StrEnum):
    """The ways in which a tensor's weights become those of its type."""

    COPY = "copy"  # as they are
    KEPT = "kept"  # as a finished file has them
    EXACT = "exact"  # found to be 4-bit by nature, and encoded without loss
    NEAREST = "nearest"  # each to the nearest value, as llama-quantize does without an importance matrix
    IMPORTANCE = "importance"  # searched for the least error under the importance of the inputs
    FEEDBACK = "feedback"  # searched with error feedback under second moments
    SYNTHETIC = "feedback (synthetic)"  # the same, under estimated moments


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the output; `shape` in numpy order."""

    name: str
    shape: tuple[int, ...]
    source_type: T
    type: T
    rounding: Rounding
    reason: str  # why it has its type, if there is something to say

    @property
    def info(self) -> TensorInfo:
        """Return what the header will say of it."""
        return TensorInfo(self.name, self.shape, self.type)

    @property
    def n_weights(self) -> int:
        """Return the number of its weights."""
        return tensor_bytes(self.shape, T.I8)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of its data."""
        return tensor_bytes(self.shape, self.type)

    @property
    def without_moments(self) -> Rounding:
        """Return how it is rounded if calibration turns out to have no second moments of it."""
        return Rounding.IMPORTANCE if TENSOR_TYPES[self.type].by_importance else Rounding.NEAREST

    @property
    def is_searched(self) -> bool:
        """Return whether it is rounded by search."""
        kept = self.rounding in (Rounding.EXACT, Rounding.KEPT)
        return not kept and is_searched(self.name, self.source_type, self.type)


def is_searched(name: str, source_type: T, ggml_type: T) -> bool:
    """Return whether a tensor of this type is rounded by search, so that calibration is worth its time."""
    if ggml_type == source_type or not TENSOR_TYPES[ggml_type].quantizer:
        return False
    return not (name in EMBEDDINGS and bits_per_weight(ggml_type) > _FINE_BITS)


def plan_rounding(name: str, source_type: T, ggml_type: T, moments: MomentsKind) -> Rounding:
    """Decide how a tensor is rounded. moments: what error feedback has to go by."""
    if ggml_type == source_type:
        return Rounding.COPY
    if not is_searched(name, source_type, ggml_type):
        return Rounding.NEAREST
    # Synthetic moments are too rough to gain anything at 8 bits, and there are none of the embeddings.
    if moments == "measured" or (moments == "synthetic" and ggml_type != T.Q8_0 and name != EMBEDDINGS[0]):
        return Rounding.FEEDBACK
    return Rounding.IMPORTANCE if TENSOR_TYPES[ggml_type].by_importance else Rounding.NEAREST


@dataclass(frozen=True)
class Override:
    """A type for all matrices whose name the expression matches anywhere."""

    pattern: re.Pattern[str]
    type: T


def parse_override(pattern: str, type_name: str) -> Override:
    """Return an override of its two texts. Raises AaacError if either makes no sense."""
    try:
        return Override(re.compile(pattern), parse_type(type_name, "tensor_types"))
    except re.error as e:
        raise AaacError(f"`tensor_types` {pattern}: bad regular expression: {e}") from None


def make_plan(
    source: GgufFile,
    settings: Settings,
    moments: MomentsKind,
    calibrated: bool = True,
    base: GgufFile | None = None,
) -> tuple[TensorPlan, ...]:
    """Decide the type and the rounding of every tensor, and their order in the file.

    moments: what error feedback has to go by. calibrated: whether the importance of inputs is known.
    base: a finished file, which keeps the tensors to which no override gives another type.
    Raises AaacError for an override that makes no sense or matches no tensor, for a source that is quantized to less
    than 8 bits, unless settings allow it, and for a base of another model.
    """
    check_quantized(source, settings.allow_requantize)
    of_recipe = settings.recipe.types(source, calibrated)
    if settings.embedding_type is not None:
        of_recipe |= dict.fromkeys(EMBEDDINGS, parse_type(settings.embedding_type, "embedding_type"))
    overrides = [parse_override(*texts) for texts in settings.tensor_types]
    used: set[Override] = set()
    plans = []
    unknown = unknown_integers(source)
    for name, tensor in source.tensors.items():
        if name in unknown:
            continue
        shape = tuple(int(n) for n in reversed(tensor.shape))
        wanted, reason = _wanted(name, shape, tensor.tensor_type, of_recipe[name], settings)
        asked_for = False
        for override in overrides if is_matrix(name, shape, tensor.tensor_type) else ():
            if override.pattern.search(name):
                used.add(override)
                asked_for = True
                wanted, reason = override.type, f"{ASKED_FOR}{override.pattern.pattern}"
        fitting = _fitting(wanted, shape[-1], tensor.tensor_type, settings.recipe)
        if base:
            in_base = _type_in(base, name, shape)
            if not asked_for or fitting == in_base:
                plans.append(TensorPlan(name, shape, tensor.tensor_type, in_base, Rounding.KEPT, ""))
                continue
        if fitting != wanted:
            blocks = f"whole {wanted.name} blocks of {GGML_QUANT_SIZES[wanted][0]}"
            reason = f"fallback: rows of {shape[-1]} are not {blocks}"
        rounding = plan_rounding(name, tensor.tensor_type, fitting, moments)
        plans.append(TensorPlan(name, shape, tensor.tensor_type, fitting, rounding, reason))
    for override in overrides:
        if override not in used:
            text = f"{override.pattern.pattern}={override.type.name}"
            raise AaacError(f"`tensor_types` {text}: matches no matrix; see their names with a dry run")
    if base and (others := base.tensors.keys() - {p.name for p in plans}):
        raise AaacError(f"`base` {base.path}: tensor {min(others)} is not in {source.path}; is it of another model?")
    if base and all(p.rounding == Rounding.KEPT for p in plans):
        raise AaacError(f"`base` {base.path}: has what `tensor_types` asks for already; ask for other types")
    # Decoder blocks in the order in which the model runs them (checkpoints may have them as 0, 1, 10, 11, 2), then the
    # rest.
    return tuple(sorted(plans, key=lambda p: block_number(p.name, 1 << 30)))


def _type_in(base: GgufFile, name: str, shape: tuple[int, ...]) -> T:
    """Return a tensor's type in a finished file.

    Raises AaacError if it is not there in this shape, or cannot be decoded.
    """
    if base.shapes.get(name) != shape:
        what = "has another shape" if name in base.shapes else "is missing"
        raise AaacError(f"`base` {base.path}: tensor {name} {what}; is it of another model?")
    ggml_type = base.tensors[name].tensor_type
    if ggml_type not in (*PLAIN_TYPES, *NOT_WEIGHTS) and not _decodable(ggml_type):
        raise AaacError(f"`base` {base.path}: tensor {name} is {ggml_type.name}, which cannot be decoded here")
    return ggml_type


def _fitting(wanted: T, n_per_row: int, source_type: T, recipe: Recipe) -> T:
    """Return the type, or the first of its fallbacks that has whole blocks in such rows.

    The last one has 16 bits and holds whatever the source holds.
    """
    half = T.BF16 if source_type == T.F32 else source_type
    while n_per_row % GGML_QUANT_SIZES[wanted][0]:
        wanted = recipe.fallback(wanted) or half
    return wanted


def check_quantized(
    source: GgufFile, allowed: bool, advice: str = "start from the full-precision file, or set `allow_requantize`"
) -> None:
    """Warn of a source that is quantized to 8 bits. Raise AaacError for fewer bits and AAAC types, unless allowed."""
    quantized: dict[T, str] = {}  # the first tensor of each type
    for name, tensor in source.tensors.items():
        if tensor.tensor_type not in (*PLAIN_TYPES, *NOT_WEIGHTS, *BY_NATURE):
            quantized.setdefault(tensor.tensor_type, name)
    for ggml_type, name in quantized.items():
        what = f"{source.path}: tensor {name} is {ggml_type.name} already"
        if not _decodable(ggml_type):
            raise AaacError(f"{what}, which cannot be decoded here; start from the full-precision file")
        if not allowed and bits_per_weight(ggml_type) < _REQUANTIZED_BITS:
            raise AaacError(f"{what}; {advice}")
    if quantized:
        names = ", ".join(t.name for t in quantized)
        warn(f"{source.path}: is quantized already ({names}), and its errors stay; start from the full-precision file")


def _decodable(ggml_type: T) -> bool:
    if ggml_type in fmt.TYPES_BY_ID:
        return True
    try:
        gguf.dequantize(np.zeros((1, GGML_QUANT_SIZES[ggml_type][1]), np.uint8), ggml_type)
    except NotImplementedError:
        return False
    return True


def unknown_integers(source: GgufFile) -> list[str]:
    """Return the integer tensors that llama.cpp does not know. It would refuse a file that holds them."""
    arch = next((a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == source.architecture), None)
    if arch is None:
        return []
    patterns = (gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch])
    stems = "|".join(re.escape(p).replace(r"\{bid\}", r"\d+").replace(r"\{xid\}", r"\d+") for p in patterns)
    known = re.compile(rf"({stems})(\.\w+)?")
    integers = (name for name, t in source.tensors.items() if t.tensor_type in NOT_WEIGHTS)
    return [name for name in integers if not known.fullmatch(name)]


def is_matrix(name: str, shape: tuple[int, ...], source_type: T) -> bool:
    """Return whether a tensor is a weight matrix that llama.cpp runs in any type."""
    kept = not name.endswith(".weight") or KEPT.search(name)
    return source_type not in (*NOT_WEIGHTS, *BY_NATURE) and len(shape) > 1 and not kept


def _wanted(name: str, shape: tuple[int, ...], source_type: T, of_recipe: T, settings: Settings) -> tuple[T, str]:
    default = settings.recipe.type
    if source_type in NOT_WEIGHTS:
        return source_type, "not a floating-point weight"
    if source_type in BY_NATURE:
        return source_type, "4-bit by nature"
    if len(shape) < 2:
        return T.F32, "one dimension"
    if not is_matrix(name, shape, source_type):
        return (T.F32 if default == T.F32 else source_type), "never quantized"
    if of_recipe == default:
        return default, ""
    return of_recipe, "embedding or output" if name in EMBEDDINGS else f"mixture {settings.type.upper()}"


def bits_per_weight(ggml_type: T) -> float:
    """Return the bits that a weight of a type takes, scales included."""
    n_weights, n_bytes = GGML_QUANT_SIZES[ggml_type]
    return 8 * n_bytes / n_weights
