"""Check a finished file of which a conversion keeps tensors."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import AaacError
from ..files.gguf import GgufFile
from ..models.weights import load_weight
from .job import Job
from .plan import NOT_WEIGHTS, Rounding

# So many rows of a tensor, or one expert, tell whether it is of the same model.
_N_ROWS = 64

# The relative squared error that a type of few bits may have. Weights of two models differ by about 2.
_MAX_ERROR = 0.5


def check_base(job: Job, file: GgufFile) -> None:
    """Raise AaacError if a kept tensor is not one of the source `file`, by the first rows of both."""
    base = job.base
    assert base
    for plan in job.plans:
        if plan.rounding != Rounding.KEPT:
            continue
        if plan.type == plan.source_type or plan.type in NOT_WEIGHTS:
            same = np.array_equal(base.tensors[plan.name].data, file.tensors[plan.name].data)
        else:
            rows = torch.arange(1 if len(plan.shape) > 2 else min(_N_ROWS, plan.shape[0]))
            expected, kept = (load_weight(f, plan.name, "cpu", rows) for f in (file, base))
            same = bool((kept - expected).square().sum() <= _MAX_ERROR * expected.square().sum())
        file.release()
        base.release()
        if not same:
            raise AaacError(
                f"`base` {base.path}: tensor {plan.name} is not the one of {job.source}; is it of another model?"
            )
