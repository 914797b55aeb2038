"""The data of the output's tensors: as they are, rounded, or searched, with error feedback in the order in which the model runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.sequential import BlockMoments
from ..calibration.synthetic import SyntheticMoments
from ..files import format as fmt
from ..files.gguf import GgufFile, TensorInfo, dequantize
from ..files.imatrix import Imatrix
from ..files.output import Record
from ..models.weights import load_weight
from ..quantizer.kquants import KQUANTS
from ..quantizer.moments import Moments
from ..quantizer.quantize import Method, quantize
from ..quantizer.types import round_to_nearest as encode_stock
from .plan import TensorPlan


@dataclass(frozen=True)
class Rounding:
    """How matrices are searched; the fields are those of `convert.Settings`."""

    method: Method
    device: str
    seed: int


class Encoder:
    """Tensor by tensor what `writer.write_shards` asks for. A block's matrices are quantized together, and wait for their turn."""

    def __init__(
        self,
        file: GgufFile,
        plans: Sequence[TensorPlan],
        rounding: Rounding,
        imatrix: Imatrix,
        searched: Collection[str],
        moments: BlockMoments | None,
        synthetic: SyntheticMoments | None,
        written: Callable[[str], tuple[NDArray[np.uint8], Record | None] | None],
    ):
        """searched: the tensors for which `imatrix` counts, and `synthetic` moments where none are measured.

        written: what an interrupted run has finished of a tensor, if it has.
        """
        self.file, self.plans, self.rounding, self.imatrix = file, {p.name: p for p in plans}, rounding, imatrix
        self.searched, self.moments, self.synthetic, self.written = set(searched), moments, synthetic, written
        self.ready: dict[str, tuple[Any, Record | None]] = {}

    def __call__(self, info: TensorInfo) -> tuple[Any, Record | None]:
        while self.moments and info.name not in self.ready and self.moments.pending(info.name):
            self._quantize_block(self.moments)
        return self.ready.pop(info.name, None) or self._encode(self.plans[info.name], None)

    def _quantize_block(self, moments: BlockMoments) -> None:
        """Quantize what the next block multiplies with; what an interrupted run finished of it is read back."""
        names = moments.tensors(moments.position)
        finished = {name: done for name in names if (done := self.written(name))}
        if len(finished) == len(names):
            for name, done in finished.items():
                moments.replace(name, self._decoded(name, done))
            moments.advance()
            return
        for layer in moments.layers():
            for name, seen in layer.items():
                done = finished.get(name) or self._encode(self.plans[name], seen)
                moments.replace(name, self._decoded(name, done))
                if name not in finished:
                    self.ready[name] = done

    def _decoded(self, name: str, done: tuple[Any, Record | None]) -> Tensor:
        data, record = done
        return torch.from_numpy(dequantize(data, self.plans[name].type, record.codec if record else None))

    def _encode(self, plan: TensorPlan, seen: Moments | None) -> tuple[Any, Record | None]:
        """The data of one tensor, and what the search says of it, if there is any."""
        if plan.type == plan.source_type:
            return self.file.tensors[plan.name].data, None
        weight = load_weight(self.file, plan.name, self.rounding.device)
        self.file.release()  # most often `weight` is a copy
        if plan.name not in self.searched:
            return encode_stock(weight, plan.type), None
        if not seen and self.synthetic and plan.type != T.Q8_0:
            seen = self.synthetic.moments(plan.name)
        # Importance changes next to nothing from 5 bits up, and Q4_0's own rounding may turn a block's sign round, which the search does not.
        if not seen and plan.type in (T.Q8_0, T.Q4_0, *KQUANTS):
            return encode_stock(weight, plan.type), None
        method = self.rounding.method if plan.type in fmt.TYPES_BY_ID else "aaac"
        if seen:
            result = quantize(
                seen.target(weight),
                plan.type,
                None,
                seen.inputs,
                seen.outputs,
                method=method,
                seed=self.rounding.seed,
            )
        else:
            entry = self.imatrix.entries.get(plan.name)
            importance = torch.from_numpy(entry.importance()).to(weight.device) if entry else None
            result = quantize(weight, plan.type, importance, method=method, seed=self.rounding.seed)
        return result.data, Record(result.codec, result.relative_error, result.weighted_error, result.damping)
