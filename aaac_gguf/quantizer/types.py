"""The tensor types that can be written: one table, and one class for each family of types that are rounded by search.

A new type is a line in TENSOR_TYPES, and a class if it belongs to no family here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from ..files import format as fmt
from ..files import gguf as _  # noqa: F401  registers the AAAC types with the gguf library
from ..files.format import U8, AaacType, Codec
from .codebook import fit, fit_paper
from .feedback import feedback, feedback_on_steps
from .grid import Encoded, Grid
from .kquants import KQUANTS, KQuant, quantize_rounded
from .moments import Factor
from .search import decode, encode, encode_absmax
from .stock import STOCK_TYPES, StockType
from .weighted import WeightedTensor

Method = Literal["aaac", "paper"]

# Codebooks are fitted to at most so many weights, and scales are searched for every group. For a 4096 x 4096 matrix
# (Student's t, two seeds) the error is 0.00427 and 0.00433 with this sample, and 0.00427 with all weights.
_FIT_SAMPLE = 1 << 20


class Rounder(Protocol):
    """Rounds rows of one tensor."""

    def __call__(
        self, weight: Tensor, error_weight: Tensor, inputs: Factor | None, outputs: Tensor | None
    ) -> tuple[U8, Tensor]:
        """Return the blocks uint8 [n, row bytes] of `weight` float32 [n, K], and what they decode to, float32 [n, K].

        With `inputs`, the factored Hessian, there is error feedback, between rows too with `outputs`. Otherwise the error weights count.
        """
        ...


class Quantizer(Protocol):
    """Knows how one type is rounded by search."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that make this type."""
        ...

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int) -> Codec | None:
        """Return the codec that suits the tensor, or None if the type has none. largest: the largest magnitude, in units."""
        ...

    def rounder(self, codec: Codec | None, unit: float, device: torch.device, method: Method) -> Rounder:
        """Return what rounds weights that were divided by `unit`, a power of two."""
        ...


class GridQuantizer(Protocol):
    """Makes types whose weights are a level of a codebook times a scale of their group."""

    group_size: int

    def grid(self, codec: Codec | None, unit: float, device: torch.device) -> Grid: ...

    def pack(self, encoded: Encoded) -> U8: ...


def _round_to_grid(
    kind: GridQuantizer,
    grid: Grid,
    method: Method,
    weight: Tensor,
    error_weight: Tensor,
    inputs: Factor | None,
    outputs: Tensor | None,
) -> tuple[U8, Tensor]:
    if inputs:
        encoded = feedback(weight, inputs, grid, kind, outputs)
    else:
        encoded = (encode_absmax if method == "paper" else encode)(weight, error_weight, grid, kind.group_size)
    return kind.pack(encoded), decode(encoded, grid)


class AaacQuantizer:
    """Makes an AAAC type: two codebooks that are fitted to the tensor."""

    methods: tuple[Method, ...] = ("aaac", "paper")

    def __init__(self, layout: AaacType):
        self.layout, self.group_size = layout, layout.group_size

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int) -> Codec:
        generator = torch.Generator().manual_seed(seed)
        if method == "paper":
            everything = tensor.groups(self.group_size, tensor.weight.numel(), generator)
            codec = fit_paper(*everything, self.layout, largest, generator)
        else:
            codec = fit(*tensor.groups(self.group_size, _FIT_SAMPLE, generator), self.layout, largest)
        return _in_range(codec, tensor.unit)

    def rounder(self, codec: Codec | None, unit: float, device: torch.device, method: Method) -> Rounder:
        return partial(_round_to_grid, self, self.grid(codec, unit, device), method)

    def grid(self, codec: Codec | None, unit: float, device: torch.device) -> Grid:
        assert codec
        return Grid.of_codec(codec, self.layout, device, unit)

    def pack(self, encoded: Encoded) -> U8:
        parts = (encoded.indices, encoded.selectors, encoded.scale_codes.to(torch.uint8))
        return fmt.pack(self.layout, *(part.cpu().numpy() for part in parts))


def _in_range(codec: Codec, unit: float) -> Codec:
    """Return the codec for weights that are `unit` times as large.

    The scale base stays a normal number, and no scale times a level is beyond float32.
    """
    reach = float(fmt.scale_factors(codec.scale_mantissa_bits)[-1]) * fmt.MAX_LEVEL
    limits = np.finfo(np.float32)
    base = min(max(codec.scale_base * unit, float(limits.tiny)), 0.999 * float(limits.max) / reach)
    return replace(codec, scale_base=float(np.float32(base)))


class StockQuantizer:
    """Makes a type of llama.cpp with a fixed codebook and a float16 scale per group."""

    methods: tuple[Method, ...] = ("aaac",)

    def __init__(self, layout: StockType):
        self.layout, self.group_size = layout, layout.group_size

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int) -> None:
        return None

    def rounder(self, codec: Codec | None, unit: float, device: torch.device, method: Method) -> Rounder:
        return partial(_round_to_grid, self, self.grid(codec, unit, device), method)

    def grid(self, codec: Codec | None, unit: float, device: torch.device) -> Grid:
        return self.layout.grid(device, unit)

    def pack(self, encoded: Encoded) -> U8:
        return self.layout.pack(encoded)


class KQuantizer:
    """Makes a K-quant of llama.cpp: scales are chosen first, and weights are rounded to their steps."""

    methods: tuple[Method, ...] = ("aaac",)

    def __init__(self, layout: KQuant):
        self.layout = layout

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int) -> None:
        return None

    def rounder(self, codec: Codec | None, unit: float, device: torch.device, method: Method) -> Rounder:
        def rounded(
            weight: Tensor, error_weight: Tensor, inputs: Factor | None, outputs: Tensor | None
        ) -> tuple[U8, Tensor]:
            weight = weight * unit
            steps = self.layout.steps(weight, error_weight.expand(weight.shape))
            quants = feedback_on_steps(weight, inputs, steps, outputs) if inputs else steps.quants(weight)
            return self.layout.packed(quants, steps), steps.weights(quants) / unit

        return rounded


@dataclass(frozen=True)
class TensorType:
    """A tensor type that can be written.

    type            the id in the file
    file_type       general.file_type of a file that is mostly of this type, which llama.cpp prints as the model's type
    quantizer       rounds weights by search; None if the type is only rounded to nearest
    fallback        the type that a tensor gets instead if its rows are not whole blocks of this one
    candidate_rank  the place among the types that mixed precision chooses from, smallest first; None if it does not choose this type
    by_importance   whether a search under importance alone is better than rounding to nearest
    """

    type: T
    file_type: int
    quantizer: Quantizer | None = None
    fallback: T | None = None
    candidate_rank: int | None = None
    by_importance: bool = False


_G16, _G32, _G128 = T["AAAC4_G16"], T["AAAC4_G32"], T["AAAC4_G128"]

# In the order in which types are listed. The file type of an AAAC type is its id, in the patch's llama_ftype too.
# Importance alone changes next to nothing from 5 bits up. Q4_0's own rounding may change the sign of a block's scale,
# which the search does not do.
TENSOR_TYPES: dict[T, TensorType] = {
    row.type: row
    for row in (
        TensorType(T.F32, LlamaFileType.ALL_F32),
        TensorType(T.F16, LlamaFileType.MOSTLY_F16),
        TensorType(T.BF16, LlamaFileType.MOSTLY_BF16),
        TensorType(T.Q8_0, LlamaFileType.MOSTLY_Q8_0, StockQuantizer(STOCK_TYPES[T.Q8_0]), T.F16, 5),
        TensorType(T.Q6_K, LlamaFileType.MOSTLY_Q6_K, KQuantizer(KQUANTS[T.Q6_K]), T.Q8_0, 4),
        TensorType(T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S, KQuantizer(KQUANTS[T.Q5_K]), T.Q8_0, 3),
        TensorType(T.Q4_0, LlamaFileType.MOSTLY_Q4_0, StockQuantizer(STOCK_TYPES[T.Q4_0]), T.F16),
        TensorType(T.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL, StockQuantizer(STOCK_TYPES[T.IQ4_NL]), T.F16, None, True),
        TensorType(_G16, fmt.G16.type_id, AaacQuantizer(fmt.G16), T.Q8_0, 2, True),
        TensorType(_G32, fmt.G32.type_id, AaacQuantizer(fmt.G32), T.Q8_0, 1, True),
        TensorType(_G128, fmt.G128.type_id, AaacQuantizer(fmt.G128), _G32, 0, True),
    )
}


def round_to_nearest(weight: Tensor, type: T) -> NDArray[Any]:
    """Return the data of `weight` [..., K] as a type that every llama.cpp reads, each weight rounded for itself.

    The dtype is the type's own for F32 and F16, and uint8 [..., row bytes] for the others.
    """
    if type in KQUANTS:  # the gguf library has no encoder for these
        return quantize_rounded(KQUANTS[type], weight)
    return gguf.quantize(weight.cpu().numpy(), type)
