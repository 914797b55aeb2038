"""The tensor types that can be written, in one table, and how each is rounded.

A new type is a line in TENSOR_TYPES. If it belongs to no family here, it also needs a class with the methods of
`Quantizer`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf import LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from ..files import format as fmt
from ..files import gguf as _  # noqa: F401  adds the AAAC types to the gguf library
from ..files.format import U8, AaacType, Codec
from .backends import Backend
from .codebook import fit, fit_paper
from .feedback import feedback
from .grid import Encoded, Grid
from .kquants import KQUANTS, KQuant
from .moments import Factor
from .steps import StepSearch
from .stock import STOCK_TYPES, StockType
from .weighted import WeightedTensor

Method = Literal["aaac", "paper"]

# Codebooks are fitted to at most so many weights; scales are then searched for every group. For a 4096 x 4096 matrix
# (Student's t, two seeds) the error is 0.00427 and 0.00433 with this sample, and 0.00427 with all weights.
FIT_SAMPLE = 1 << 20


class Rounder(Protocol):
    """Rounds rows of one tensor."""

    def __call__(
        self, weight: Tensor, error_weight: Tensor, inputs: Factor | None, outputs: Tensor | None
    ) -> tuple[U8, Tensor]:
        """Return the blocks of `weight` float32 [n, K], uint8 [n, row bytes], and what they decode to, float32 [n, K].

        With `inputs`, the factored Hessian, there is error feedback; with `outputs` [n, n] too, also between rows.
        Without `inputs` each weight counts by its error weight, broadcastable to [n, K].
        """
        ...


class Quantizer(Protocol):
    """One type that is rounded by search. `methods` are those that make it."""

    methods: tuple[Method, ...]

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int, backend: Backend) -> Codec | None:
        """Return the codec that suits the tensor, or None if the type has none. largest: the largest |w| / unit."""
        ...

    def rounder(
        self, codec: Codec | None, unit: float, device: torch.device, method: Method, backend: Backend
    ) -> Rounder:
        """Return a rounder for weights that were divided by `unit`, a power of two."""
        ...


class _GridQuantizer(ABC):
    """A type whose weights are a level of a codebook times the scale of their group."""

    group_size: int

    @abstractmethod
    def grid(self, codec: Codec | None, unit: float, device: torch.device) -> Grid:
        """Return the values that weights can take."""

    @abstractmethod
    def pack(self, encoded: Encoded) -> U8:
        """Return blocks uint8 [N, row bytes]."""

    def rounder(
        self, codec: Codec | None, unit: float, device: torch.device, method: Method, backend: Backend
    ) -> Rounder:
        search = backend(self.grid(codec, unit, device), self.group_size)

        def round_rows(
            weight: Tensor, error_weight: Tensor, inputs: Factor | None, outputs: Tensor | None
        ) -> tuple[U8, Tensor]:
            if inputs:
                encoded = feedback(weight, inputs, search, outputs)
            elif method == "paper":
                encoded = search.encode_absmax(weight, error_weight)
            else:
                encoded = search.encode(weight, error_weight)
            return self.pack(encoded), search.decode(encoded)

        return round_rows


class AaacQuantizer(_GridQuantizer):
    """An AAAC type: two codebooks that are fitted to the tensor."""

    methods: tuple[Method, ...] = ("aaac", "paper")

    def __init__(self, layout: AaacType):
        self.layout, self.group_size = layout, layout.group_size

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int, backend: Backend) -> Codec:
        generator = torch.Generator().manual_seed(seed)
        if method == "paper":
            groups = tensor.groups(self.group_size, tensor.weight.numel(), generator)
            codec = fit_paper(*groups, self.layout, largest, generator)
        else:
            groups = tensor.groups(self.group_size, FIT_SAMPLE, generator)
            codec = fit(*groups, self.layout, largest, backend)
        return _scaled(codec, tensor.unit)

    def grid(self, codec: Codec | None, unit: float, device: torch.device) -> Grid:
        assert codec
        return Grid.from_codec(codec, self.layout, device, unit)

    def pack(self, encoded: Encoded) -> U8:
        parts = (encoded.indices, encoded.selectors, encoded.scale_codes.to(torch.uint8))
        return fmt.pack(self.layout, *(part.cpu().numpy() for part in parts))


def _scaled(codec: Codec, unit: float) -> Codec:
    """Return the codec for weights that are `unit` times as large.

    The scale base is kept a normal number, and small enough that no scale times a level overflows float32.
    """
    reach = float(fmt.scale_factors(codec.scale_mantissa_bits)[-1]) * fmt.MAX_LEVEL
    limits = np.finfo(np.float32)
    base = min(max(codec.scale_base * unit, float(limits.tiny)), 0.999 * float(limits.max) / reach)
    return replace(codec, scale_base=float(np.float32(base)))


class StockQuantizer(_GridQuantizer):
    """A type of llama.cpp with a fixed codebook and a float16 scale for each group."""

    methods: tuple[Method, ...] = ("aaac",)

    def __init__(self, layout: StockType):
        self.layout, self.group_size = layout, layout.group_size

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int, backend: Backend) -> None:
        return None

    def grid(self, codec: Codec | None, unit: float, device: torch.device) -> Grid:
        return self.layout.grid(device, unit)

    def pack(self, encoded: Encoded) -> U8:
        return self.layout.pack(encoded)


class KQuantizer:
    """A type of llama.cpp whose float16 numbers are chosen first, and codes that these are multiplied by after."""

    methods: tuple[Method, ...] = ("aaac",)

    def __init__(self, layout: KQuant):
        self.layout = layout

    def fit(self, tensor: WeightedTensor, largest: float, method: Method, seed: int, backend: Backend) -> None:
        return None

    def rounder(
        self, codec: Codec | None, unit: float, device: torch.device, method: Method, backend: Backend
    ) -> Rounder:
        def round_rows(
            weight: Tensor, error_weight: Tensor, inputs: Factor | None, outputs: Tensor | None
        ) -> tuple[U8, Tensor]:
            weight = weight * unit
            steps = self.layout.steps(weight, error_weight.expand(weight.shape))
            if inputs:
                search = StepSearch(self.layout, steps.halves, backend)
                encoded = feedback(weight, inputs, search, outputs)
                indices, steps = encoded.indices, search.steps(encoded)
            else:
                indices = self.layout.round_to(steps, weight)
            return self.layout.packed(indices, steps), self.layout.weights(indices, steps) / unit

        return round_rows


@dataclass(frozen=True)
class TensorType:
    """A tensor type that can be written.

    type            its id in the file
    file_type       general.file_type of a file of mostly this type, which llama.cpp prints as the type of the model
    quantizer       rounds by search; None if the type is only rounded to nearest
    fallback        the type for a tensor whose rows are not whole blocks of this one; None for that of the source
    by_importance   whether search under importance alone is better than rounding to nearest
    largest         the largest magnitude that it can hold
    """

    type: T
    file_type: int
    quantizer: Quantizer | None = None
    fallback: T | None = None
    by_importance: bool = False
    largest: float = math.inf


_F16_LARGEST = float(np.finfo(np.float16).max)  # of the scale of a block, and so it bounds the weights

_G16, _G32, _G128 = T["AAAC4_G16"], T["AAAC4_G32"], T["AAAC4_G128"]


def _stock(type: T, file_type: int, fallback: T | None = None, by_importance: bool = False) -> TensorType:
    """Return the row of a type with one scale for each group."""
    layout = STOCK_TYPES[type]
    largest = layout.levels[-1] * float(layout.scales()[-1])
    return TensorType(type, file_type, StockQuantizer(layout), fallback, by_importance=by_importance, largest=largest)


def _k_quant(type: T, file_type: int, fallback: T | None = None, **more: Any) -> TensorType:
    """Return the row of a type with codes of scales."""
    layout = KQUANTS[type]
    largest = layout.levels[-1] * (1 if layout.folded else layout.codes[0][1]) * _F16_LARGEST
    return TensorType(type, file_type, KQuantizer(layout), fallback, largest=largest, **more)


# In the order in which types are listed.
# The file type of an AAAC type is its id, as in the patch's llama_ftype.
# A fallback has shorter blocks, and about as many bits if there is such a type.
# From 5 bits up, importance alone changes next to nothing. For Q4_0, rounding to nearest may choose the sign of a
# scale, which the search does not.
TENSOR_TYPES: dict[T, TensorType] = {
    row.type: row
    for row in (
        TensorType(T.F32, LlamaFileType.ALL_F32),
        TensorType(T.F16, LlamaFileType.MOSTLY_F16, largest=_F16_LARGEST),
        TensorType(T.BF16, LlamaFileType.MOSTLY_BF16, largest=float(torch.finfo(torch.bfloat16).max)),
        _stock(T.Q8_0, LlamaFileType.MOSTLY_Q8_0),
        _k_quant(T.Q6_K, LlamaFileType.MOSTLY_Q6_K, T.Q8_0),
        _k_quant(T.Q5_K, LlamaFileType.MOSTLY_Q5_K_S, T.Q5_1),
        _k_quant(T.Q4_K, LlamaFileType.MOSTLY_Q4_K_S, T.Q5_0, by_importance=True),
        _k_quant(T.IQ4_XS, LlamaFileType.MOSTLY_IQ4_XS, T.IQ4_NL, by_importance=True),
        _k_quant(T.Q3_K, LlamaFileType.MOSTLY_Q3_K_S, T.IQ4_NL, by_importance=True),
        _k_quant(T.Q2_K, LlamaFileType.MOSTLY_Q2_K_S, T.IQ4_NL, by_importance=True),
        _k_quant(T.Q5_1, LlamaFileType.MOSTLY_Q5_1),
        _stock(T.Q5_0, LlamaFileType.MOSTLY_Q5_0),
        _k_quant(T.Q4_1, LlamaFileType.MOSTLY_Q4_1),
        _stock(T.Q4_0, LlamaFileType.MOSTLY_Q4_0),
        _stock(T.IQ4_NL, LlamaFileType.MOSTLY_IQ4_NL, by_importance=True),
        _stock(T.MXFP4, LlamaFileType.MOSTLY_MXFP4_MOE, by_importance=True),
        _stock(T.NVFP4, LlamaFileType.MOSTLY_NVFP4, T.MXFP4, by_importance=True),
        TensorType(_G16, fmt.G16.type_id, AaacQuantizer(fmt.G16), T.IQ4_NL, True),
        TensorType(_G32, fmt.G32.type_id, AaacQuantizer(fmt.G32), T.IQ4_NL, True),
        TensorType(_G128, fmt.G128.type_id, AaacQuantizer(fmt.G128), _G32, True),
    )
}


def round_to_nearest(weight: Tensor, type: T) -> NDArray[Any]:
    """Return the data of `weight` [..., K] as a type of llama.cpp, each weight rounded for itself.

    The dtype is the type's own for F32 and F16, and uint8 [..., row bytes] for the others. Raises NotImplementedError
    for IQ4_NL and AAAC types, which are searched in every case.
    """
    if type in KQUANTS:  # the gguf library has no encoder for most of these
        return KQUANTS[type].round_to_nearest(weight)
    return gguf.quantize(weight.cpu().numpy(), type)
