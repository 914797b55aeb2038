"""Give tensors that are 4-bit by nature a type that holds them without loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from gguf import GGMLQuantizationType as T

from ..files import format as fmt
from ..files.gguf import GgufFile
from ..models import checkpoint
from ..models.files import weight_files
from ..models.weights import load_weight
from ..progress import progress
from ..quantizer.exact import EXACT_TYPES, encode_exactly, has_few_values
from .job import Job
from .plan import ASKED_FOR, Rounding, TensorPlan, bits_per_weight
from .recipes import PLAIN_TYPES

DTYPES = {T.F32: torch.float32, T.F16: torch.float16, T.BF16: torch.bfloat16}

# So many rows, or one expert, tell whether it is worth while to look at all weights.
_FIRST_ROWS = 64


def keep_exact(job: Job, file: GgufFile) -> Job:
    """Return the job with the smallest type without loss for every tensor that has one and would be quantized.

    A type that a setting gives to the tensor stays. So does the calibration, unless nothing is left to calibrate.
    """
    plans = tuple(
        _exact(plan, job, file) for plan in progress(job.plans, desc="looking for 4-bit weights", unit="tensor")
    )
    kept = replace(job, plans=plans)
    return kept if kept.searched or plans == job.plans else kept.without_calibration()


def may_be_exact(source: Path) -> bool:
    """Return whether a folder may hold tensors that are 4-bit by nature, by its config and first rows."""
    if checkpoint.quantization(source):
        return True
    from safetensors import safe_open

    for path in weight_files(source):
        if path.suffix != ".safetensors":
            return True
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no dictionary
                rows = file.get_slice(name)
                if len(rows.get_shape()) < 2:
                    continue
                if has_few_values(rows[:1].float() if len(rows.get_shape()) > 2 else rows[:_FIRST_ROWS].float()):
                    return True
    return False


def _exact(plan: TensorPlan, job: Job, file: GgufFile) -> TensorPlan:
    copied = plan.rounding in (Rounding.COPY, Rounding.KEPT) or plan.type in PLAIN_TYPES
    if copied or plan.source_type not in PLAIN_TYPES or plan.reason.startswith(ASKED_FOR):
        return plan
    n_first = 1 if len(plan.shape) > 2 else min(_FIRST_ROWS, plan.shape[0])
    first, dtype = load_weight(file, plan.name, "cpu", torch.arange(n_first)), DTYPES[plan.source_type]
    if not has_few_values(first):
        return plan
    # A budget for mixed types is not spent here.
    largest = bits_per_weight(plan.type) if job.settings.mixes else max(map(bits_per_weight, EXACT_TYPES))
    ours = plan.type in fmt.TYPES_BY_ID  # else the file is for every llama.cpp
    types = [t for t in EXACT_TYPES if bits_per_weight(t) <= largest and (ours or t not in fmt.TYPES_BY_ID)]
    types = [t for t in types if encode_exactly(first, dtype, t)]
    weight = load_weight(file, plan.name, "cpu") if types else first
    found = next((t for t in types if encode_exactly(weight, dtype, t)), None)
    file.release()
    return plan if found is None else replace(plan, type=found, rounding=Rounding.EXACT, reason="4-bit by nature")
