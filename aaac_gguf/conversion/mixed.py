"""Choose types by measurement: the least predicted loss for a size of all tensors together.

Every tensor is quantized as each type. With measured moments, its loss is its part in the KL divergence,
`tr(O (W - Q) H (W - Q)^T) / 2` (see `quantizer.moments`). Without `O`, it is the relative error of its weights, and all
tensors matter alike: measured parts do not grow with the size of a matrix. The relative error of its outputs would be
worse: where a few channels make up most of the outputs, it is small, and the divergence is not.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from gguf import GGML_QUANT_SIZES, GGUFValueType
from gguf import GGMLQuantizationType as T
from torch import Tensor

from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile, Value, tensor_bytes
from ..models.weights import load_weight
from ..progress import progress
from ..quantizer.moments import Moments, output_error
from ..quantizer.quantize import quantize
from ..quantizer.types import TENSOR_TYPES
from .calibrate import Calibration
from .job import Job
from .measurements import Measurements, TypeErrors
from .plan import ASKED_FOR, TensorPlan, bits_per_weight, plan_rounding
from .recipes import EMBEDDINGS
from .settings import Settings

# The types to choose from. Of those with as many bits, the first that fits the rows counts. Other types cost more error
# for their bytes than a mixture of these.
_CANDIDATES = (*map(T, fmt.TYPES_BY_ID), T.Q2_K, T.Q3_K, T.IQ4_XS, T.Q4_K, T.IQ4_NL, T.Q5_K, T.Q5_0, T.Q6_K, T.Q8_0)


@dataclass(frozen=True)
class TypeOption:
    """One type that a tensor can have: its bytes, and the loss that it is predicted to cause."""

    type: T
    n_bytes: int
    loss: float


def mix(job: Job, file: GgufFile, calibration: Calibration) -> Job:
    """Return the job with the best type for every matrix to which no setting gave one, within `bpw` or `size`.

    Embeddings and the output matrix keep theirs. Raises AaacError if even the smallest types are too large.
    """
    settings = job.settings
    free = [p for p in job.plans if p.is_searched and p.name not in EMBEDDINGS and not p.reason.startswith(ASKED_FOR)]
    n_weights = sum(p.n_weights for p in job.plans)
    fixed_bytes = sum(p.n_bytes for p in job.plans) - sum(p.n_bytes for p in free)
    if settings.bpw is not None:
        budget = int(settings.bpw * n_weights / 8) - fixed_bytes
    else:
        assert settings.size is not None
        # Each tensor may need some bytes up to its alignment. The header gets smaller if a tensor becomes a stock type.
        budget = settings.size - job.layout(file.path).n_bytes + sum(p.n_bytes for p in free)
    estimates = replace(calibration)  # synthetic moments are asked for once more when tensors are quantized

    def moments_of(name: str) -> Moments | None:
        measured = calibration.measured.moments(name) if calibration.measured else None
        return measured or estimates.estimated_moments(name)

    options = measure(
        free,
        lambda name: load_weight(file, name, settings.device),
        moments_of,
        calibration.importance,
        settings,
        job.measurements,
    )
    chosen = choose(options, budget)
    setting = "bpw" if settings.bpw is not None else "size"
    if chosen is None:
        least = fixed_bytes + sum(of_tensor[0].n_bytes for of_tensor in options.values())
        smallest = f"the smallest possible is {8 * least / n_weights:.3f} bits per weight"
        raise AaacError(f"`{setting}`: too little, {smallest}; raise it, or choose a smaller `embedding_type`")
    loss = "KLD" if calibration.measured else "error"
    plans = tuple(
        replace(
            p,
            type=chosen[p.name].type,
            rounding=plan_rounding(p.name, p.source_type, chosen[p.name].type, job.moments),
            reason=f"{setting}: {loss} {chosen[p.name].loss:.2e}",
        )
        if p.name in chosen
        else p
        for p in job.plans
    )
    metadata = dict(job.metadata)
    if free:  # the file is named after the type that most weights got
        n_of_type: Counter[T] = Counter()
        for p in free:
            n_of_type[chosen[p.name].type] += p.n_weights
        file_type = TENSOR_TYPES[n_of_type.most_common(1)[0][0]].file_type
        metadata["general.file_type"] = Value(int(file_type), GGUFValueType.UINT32)
    return replace(job, plans=plans, metadata=metadata)


def candidates(n_per_row: int, stock: bool) -> list[T]:
    """Return the types to choose from for such rows, smallest first. stock: only those that every llama.cpp runs."""
    by_bits: dict[float, T] = {}
    for ggml_type in _CANDIDATES:
        if n_per_row % GGML_QUANT_SIZES[ggml_type][0] == 0 and not (stock and ggml_type in fmt.TYPES_BY_ID):
            by_bits.setdefault(bits_per_weight(ggml_type), ggml_type)
    return [by_bits[bits] for bits in sorted(by_bits)]


def measure(
    plans: Sequence[TensorPlan],
    weight_of: Callable[[str], Tensor],
    moments_of: Callable[[str], Moments | None],
    importance_of: Callable[[str, Tensor], Tensor | None],
    settings: Settings,
    measurements: Measurements | None = None,
) -> dict[str, list[TypeOption]]:
    """Return what every type that fits costs each matrix, smallest first, by quantizing its weights.

    What `measurements` have is taken from there, and what they lack is added to them.

    weight_of: float32 [N, K] or [E, N, K] by name. importance_of: of a matrix without moments, by name and weights.
    Where gradients are not known, the relative error of the weights counts, times the median of the loss that it means
    in the other matrices: for experts, matrices of too many outputs, and all matrices under synthetic moments.
    """
    found: dict[str, TypeErrors] = {}
    for plan in progress(plans, desc="measuring types", unit="tensor"):
        types = candidates(plan.shape[-1], settings.stock)
        known = measurements.types.get(plan.name, {}) if measurements else {}
        if missing := [t for t in types if t not in known]:
            new = _type_errors(plan.name, missing, weight_of, moments_of, importance_of, settings.seed)
            known = known | new
            if measurements:
                measurements.add_types(plan.name, new)
        found[plan.name] = {t: known[t] for t in types}
    of_all = [errors for of_tensor in found.values() for errors in of_tensor.values()]
    per_error = [loss / error for error, loss in of_all if loss is not None and error]
    typical = median(per_error) if per_error else 1.0
    return {
        p.name: [
            TypeOption(t, tensor_bytes(p.shape, t), typical * error if loss is None else loss)
            for t, (error, loss) in found[p.name].items()
        ]
        for p in plans
    }


def _type_errors(
    name: str,
    types: Sequence[T],
    weight_of: Callable[[str], Tensor],
    moments_of: Callable[[str], Moments | None],
    importance_of: Callable[[str, Tensor], Tensor | None],
    seed: int,
) -> TypeErrors:
    """Return the relative error of a matrix's weights as each type, and its loss if its gradients are known."""
    weight = weight_of(name)
    seen = moments_of(name)
    hessian, outputs = (seen.inputs, seen.outputs) if seen else (None, None)
    importance = None if seen else importance_of(name, weight)
    # The divergence at a relative error of 1, all of the matrix gone.
    stake = None
    if outputs is not None:
        assert isinstance(hessian, Tensor)
        stake = output_error(weight, hessian, outputs) / 2
    errors: TypeErrors = {}
    for ggml_type in types:
        result = quantize(weight, ggml_type, importance, hessian, outputs, seed=seed)
        loss = None if stake is None else float(result.weighted_error * stake)
        errors[ggml_type] = float(result.relative_error), loss
    return errors


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
