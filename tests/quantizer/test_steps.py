"""Scales, offsets and levels of types with super-blocks, chosen with error feedback."""

import pytest
import torch
from gguf import GGMLQuantizationType as T
from search_samples import K_TYPES, NEEDS_C, check_alike, moment, samples

from aaac_gguf.quantizer.backends import BACKENDS
from aaac_gguf.quantizer.feedback import feedback
from aaac_gguf.quantizer.kquants import KQUANTS
from aaac_gguf.quantizer.moments import factor, output_error, triangular_inverse
from aaac_gguf.quantizer.steps import StepSearch


def decided(type, w, inputs, backend: str, o=None, sweeps: int = 1) -> torch.Tensor:
    """Return the weights that feedback decides on for scales of super-blocks that suit `w`."""
    layout = KQUANTS[type]
    search = StepSearch(layout, layout.steps(w, torch.ones_like(w)).halves, BACKENDS[backend])
    encoded = feedback(w, inputs, search, o, sweeps)
    return layout.weights(encoded.indices, search.steps(encoded))


@NEEDS_C
@pytest.mark.parametrize("between_rows", [False, True], ids=["columns", "columns and rows"])
@K_TYPES
def test_search_c_decides_as_torch(type, between_rows):
    w, inputs = samples(20, 512), factor(moment(512, 2000))
    o = torch.eye(20) + 0.3 if between_rows else None
    found, expected = (decided(type, w, inputs, backend, o) for backend in ("native", "torch"))
    check_alike(w, found, expected, inputs, o)


@NEEDS_C
@K_TYPES
def test_scales_chosen_with_feedback_and_a_sweep_win(type):
    """Each lowers the error: levels by feedback at scales chosen before it, the scales with it, and a sweep."""
    w, inputs = samples(24, 512), factor(moment(512, 2000))
    layout = KQUANTS[type]
    steps = layout.steps(w, inputs.hessian.diagonal().expand(w.shape))
    moved, u = w.clone(), triangular_inverse(inputs.root)
    values = torch.empty_like(w)
    step, offset, inverse = (t.expand(-1, -1, layout.run).reshape(w.shape) for t in steps.products())
    for j in range(512):
        level = layout.nearest((moved[:, j] + offset[:, j]) * inverse[:, j])
        values[:, j] = level * step[:, j] - offset[:, j]
        moved[:, j:] -= ((moved[:, j] - values[:, j]) / u[j, j])[:, None] * u[j, j:]
    errors = [values, *(decided(type, w, inputs, "native", sweeps=sweeps) for sweeps in (0, 1))]
    before, chosen, swept = (output_error(w - q, inputs.hessian) for q in errors)
    assert chosen < 0.95 * before
    assert swept < 0.99 * chosen


@K_TYPES
def test_codes_are_those_that_there_are(type):
    layout = KQUANTS[type]
    search = StepSearch(layout, torch.ones(1, 1, len(layout.codes), dtype=torch.float16), BACKENDS["torch"])
    wanted = torch.tensor([[-1000.0] * len(layout.codes), [1000.0] * len(layout.codes), [3.4] * len(layout.codes)])
    codes = search._unpack(search._nearest(wanted, torch.ones_like(wanted).half()))
    assert codes.T.tolist() == [[low, high, 3] for low, high in layout.codes]


def test_values_that_the_type_holds_stay():
    layout = KQUANTS[T.Q4_K]
    w = samples(8, 512)
    steps = layout.steps(w, torch.ones_like(w))
    held = layout.weights(layout.round_to(steps, w), steps)
    search = StepSearch(layout, steps.halves, BACKENDS["torch"])
    encoded = feedback(held, factor(moment(512, 2000)), search)
    # The least that rounding to these levels loses is ten times as much.
    error = layout.weights(encoded.indices, search.steps(encoded)) - held
    assert error.square().sum() < 5e-4 * held.square().sum()
