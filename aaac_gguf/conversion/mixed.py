"""Choose types by measurement: the least predicted KL divergence for a size of all tensors together.

A tensor's part in the divergence is `tr(O (W - Q) H (W - Q)^T) / 2` (see `quantizer.moments`). It is measured by
quantizing the tensor as each type.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile, tensor_bytes
from ..models.weights import load_weight
from ..progress import progress
from ..quantizer.moments import Moments, output_error
from ..quantizer.quantize import quantize
from ..quantizer.types import TENSOR_TYPES
from .calibrate import Calibration
from .job import Job
from .plan import TensorPlan


@dataclass(frozen=True)
class TypeOption:
    """One type that a tensor can have: its bytes, and the KL divergence that it is predicted to cause."""

    type: T
    n_bytes: int
    loss: float


def mix(job: Job, file: GgufFile, calibration: Calibration) -> Job:
    """Return the job with the best type for every matrix to which no setting gave one, within `bpw` or `size`.

    Raises AaacError if even the smallest types are too large.
    """
    measured, settings = calibration.measured, job.settings
    free = [p for p in job.plans if p.type in fmt.TYPES_BY_ID and not p.reason]
    n_weights = sum(p.n_weights for p in job.plans)
    fixed_bytes = sum(p.n_bytes for p in job.plans) - sum(p.n_bytes for p in free)
    if settings.bpw is not None:
        budget = int(settings.bpw * n_weights / 8) - fixed_bytes
    else:
        assert settings.size is not None
        # Each tensor may need some bytes up to its alignment. The header gets smaller if a tensor becomes a stock type.
        budget = settings.size - job.layout(file.path).n_bytes + sum(p.n_bytes for p in free)
    options = {}
    if free:
        assert measured
        options = measure(free, lambda name: load_weight(file, name, settings.device), measured.moments, settings.seed)
    chosen = choose(options, budget)
    setting = "bpw" if settings.bpw is not None else "size"
    if chosen is None:
        least = fixed_bytes + sum(of_tensor[0].n_bytes for of_tensor in options.values())
        smallest = f"the smallest possible is {8 * least / n_weights:.3f} bits per weight"
        raise AaacError(f"`{setting}`: too little, {smallest}; raise it, or choose a smaller `embedding_type`")
    plans = tuple(
        replace(p, type=chosen[p.name].type, reason=f"{setting}: KLD {chosen[p.name].loss:.2e}")
        if p.name in chosen
        else p
        for p in job.plans
    )
    return replace(job, plans=plans)


def measure(
    plans: Sequence[TensorPlan],
    weight_of: Callable[[str], Tensor],
    moments_of: Callable[[str], Moments | None],
    seed: int,
) -> dict[str, list[TypeOption]]:
    """Return what every type that fits costs each matrix, smallest first, by quantizing its weights.

    weight_of: float32 [N, K] or [E, N, K] by name. Experts, and matrices of too many outputs, are taken to matter as
    much as an average weight: nothing is known of their gradients.
    """
    ranked = [(t.candidate_rank, t.type) for t in TENSOR_TYPES.values() if t.candidate_rank is not None]
    candidates = [ggml_type for _, ggml_type in sorted(ranked)]
    errors: dict[str, dict[T, float]] = {}
    stakes: dict[str, float] = {}  # the divergence at a relative error of 1, all of the matrix gone
    for plan in progress(plans, desc="measuring types", unit="tensor"):
        weight = weight_of(plan.name)
        seen = moments_of(plan.name)
        hessian, outputs = (seen.inputs, seen.outputs) if seen else (None, None)
        fitting = [t for t in candidates if plan.shape[-1] % GGML_QUANT_SIZES[t][0] == 0]
        errors[plan.name] = {t: quantize(weight, t, None, hessian, outputs, seed=seed).weighted_error for t in fitting}
        if hessian is not None and outputs is not None:
            stakes[plan.name] = output_error(weight, hessian, outputs) / 2
    average = sum(stakes.values()) / sum(p.n_weights for p in plans if p.name in stakes) if stakes else 1.0
    return {
        p.name: [
            TypeOption(t, tensor_bytes(p.shape, t), error * stakes.get(p.name, average * p.n_weights))
            for t, error in errors[p.name].items()
        ]
        for p in plans
    }


def choose(options: Mapping[str, Sequence[TypeOption]], budget: int) -> dict[str, TypeOption] | None:
    """Choose one type for each tensor: the least sum of losses found for at most `budget` bytes.

    Steps along each tensor's lower convex hull, taken in the order of loss saved per byte, are the best for every size
    that they pass. What is left of the budget at the end goes to the single changes that save most and still fit.
    Returns None if even the smallest are too many bytes.
    """
    hulls = {name: _hull(of_tensor) for name, of_tensor in options.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.n_bytes for choice in chosen.values())
    if left < 0:
        return None
    # The next step of every tensor; ties go by name.
    steps = [(_slope(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, i = heapq.heappop(steps)
        hull = hulls[name]
        extra = hull[i].n_bytes - chosen[name].n_bytes
        if extra > left:
            continue
        chosen[name], left = hull[i], left - extra
        if i + 1 < len(hull):
            heapq.heappush(steps, (_slope(hull[i], hull[i + 1]), name, i + 1))
    while chosen:
        fitting = [
            (option.loss - chosen[name].loss, name, option)
            for name, of_tensor in options.items()
            for option in of_tensor
            if option.n_bytes - chosen[name].n_bytes <= left
        ]
        saved, name, option = min(fitting, key=lambda item: item[:2])
        if saved >= 0:
            break
        left -= option.n_bytes - chosen[name].n_bytes
        chosen[name] = option
    return chosen


def _slope(a: TypeOption, b: TypeOption) -> float:
    return (b.loss - a.loss) / (b.n_bytes - a.n_bytes)


def _hull(options: Sequence[TypeOption]) -> list[TypeOption]:
    """Return the options on the lower convex hull of loss over bytes, from the smallest to the one of least loss."""
    hull: list[TypeOption] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
