"""Mixed precision by measurement: for every matrix the type that, for a size of all together, leaves the least predicted KL divergence.

A tensor's part in the divergence is `tr(O (W - Q) H (W - Q)^T) / 2` (see `hessian`), measured by quantizing it as each type.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from torch import Tensor

from ..files.gguf import tensor_bytes
from ..progress import progress
from ..quantizer.moments import Moments, output_error
from ..quantizer.quantize import quantize
from .plan import TensorPlan

# Smallest first. Types between these cost more error for their bytes than a mixture of their neighbours.
CANDIDATES = (T["AAAC4_G128"], T["AAAC4_G32"], T["AAAC4_G16"], T.Q5_K, T.Q6_K, T.Q8_0)


@dataclass(frozen=True)
class Choice:
    """One type that a tensor can have: its bytes, and the KL divergence that it is predicted to cause."""

    type: T
    n_bytes: int
    loss: float


def measured(
    plans: Sequence[TensorPlan],
    weight_of: Callable[[str], Tensor],
    moments_of: Callable[[str], Moments | None],
    seed: int,
) -> dict[str, list[Choice]]:
    """What every type that fits costs each matrix, by quantizing its weights float32 [N, K] or [E, N, K]; smallest first.

    Experts, and matrices of too many outputs, are taken to matter as much as an average weight: of their gradients nothing is known.
    """
    errors: dict[str, dict[T, float]] = {}
    stakes: dict[str, float] = {}  # the divergence at a relative error of 1, all of the matrix gone
    for plan in progress(plans, desc="measuring types", unit="tensor"):
        weight = weight_of(plan.name)
        seen = moments_of(plan.name)
        hessian, outputs = (seen.inputs, seen.outputs) if seen else (None, None)
        fitting = [t for t in CANDIDATES if plan.shape[-1] % GGML_QUANT_SIZES[t][0] == 0]
        errors[plan.name] = {
            t: quantize(weight, t, None, hessian, outputs, seed=seed).weighted_error for t in fitting
        }
        if hessian is not None and outputs is not None:
            stakes[plan.name] = output_error(weight, hessian, outputs) / 2
    average = sum(stakes.values()) / sum(p.n_weights for p in plans if p.name in stakes) if stakes else 1.0
    return {
        p.name: [
            Choice(t, tensor_bytes(p.shape, t), error * stakes.get(p.name, average * p.n_weights))
            for t, error in errors[p.name].items()
        ]
        for p in plans
    }


def choose(choices: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice] | None:
    """One choice for each tensor, the least sum of losses found for at most `budget` bytes; None where even the smallest are too many.

    Steps along each tensor's lower convex hull, taken in the order of loss saved per byte, are the best for every size that they pass; what is left
    of the budget at the end goes to the single changes that save most and still fit.
    """
    hulls = {name: _hull(options) for name, options in choices.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    left = budget - sum(choice.n_bytes for choice in chosen.values())
    if left < 0:
        return None
    # Ahead of every tensor its next step; ties go by name.
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
    while True:
        fitting = [(option.loss - chosen[name].loss, name, option) for name, options in choices.items() for option in options
                   if option.n_bytes - chosen[name].n_bytes <= left]  # fmt: skip
        saved, name, option = min(fitting, key=lambda item: item[:2])
        if saved >= 0:
            return chosen
        left -= option.n_bytes - chosen[name].n_bytes
        chosen[name] = option


def _slope(a: Choice, b: Choice) -> float:
    return (b.loss - a.loss) / (b.n_bytes - a.n_bytes)


def _hull(options: Sequence[Choice]) -> list[Choice]:
    """The options on the lower convex hull of loss over bytes, from the smallest to the one of least loss."""
    hull: list[Choice] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull
