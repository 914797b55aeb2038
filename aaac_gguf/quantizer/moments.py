"""Second moments for error feedback: of the inputs of a linear layer, and of the loss's gradient at its outputs.

A change D of the weights of one layer causes a KL divergence of `E[(g^T D x)^2] / 2`, to second order. Here x is the
layer's input, and g the gradient, with respect to the output, of the log-likelihood of a token that the model itself
drew. If x and g are taken as independent, as in K-FAC (Martens and Grosse, 2015) and YAQA (Tseng et al., 2025), this is
`tr(O D H D^T) / 2` with `H = E[x x^T]` and `O = E[g g^T]`. H tells which inputs matter, O which outputs.

Layers are quantized in the order in which the model runs them. Each is quantized for the inputs x' that the quantized
layers before it give: `H = E[x' x'^T]`, and the target is the weights whose outputs on x' are nearest to those of the
full model on x. Where outputs are added to the residual stream, these are the outputs with the stream: what the
quantized layers before have added to it wrongly is made good as far as x' tells it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import AaacError


@dataclass(frozen=True)
class Moments:
    """The moments of one parameter as calibration measured them, on the model's device.

    inputs        float32 [K, K], or for E experts [E, K, K] or a sequence of E: the mean of x x^T over the tokens that
                  reached the parameter. It is zero for an expert of which nothing is known.
    outputs       float32 [N, N]: the mean of g g^T over the same tokens; None for experts, and for too many outputs
    drift         float32 [K, K]: the mean of (x_full - x) x^T, how far the inputs are from those of the full model;
                  None if they are the same, for experts, and with `output_drift`
    output_drift  float32 [N, K]: the mean of (y_full - y) x^T, for outputs y together with what the model adds them to
    n_tokens      the number of tokens of which the drifts are means
    """

    inputs: Tensor | Sequence[Tensor]
    outputs: Tensor | None
    drift: Tensor | None = None
    output_drift: Tensor | None = None
    n_tokens: int = 0

    def target(self, weight: Tensor) -> Tensor:
        """Return the weights whose outputs on x are nearest to those of `weight` float32 [N, K] in the full model.

        These are W + E[(y_full - y) x^T] H^-1, where y_full - y is W (x_full - x) if it was not measured itself. This
        is a regression, and is damped as one: much of a drift that was measured on few tokens is chance.
        """
        if self.output_drift is not None:
            drift = self.output_drift
        elif self.drift is not None:
            drift = weight @ self.drift
        else:
            return weight
        assert isinstance(self.inputs, Tensor)
        inputs = factor(self.inputs, DRIFT_DAMPING + 2 * len(self.inputs) / self.n_tokens)
        move = inputs.solve(drift.T / inputs.mean).T
        if self.output_drift is not None:
            move *= min(1, LARGEST_MOVE * float(weight.norm() / move.norm().clamp_min(1e-30)))
        return weight + move


# The norm of a move towards the residual stream, relative to the weights, at most. In eight blocks of SmolLM2-135M none
# has more than about 0.1. A matrix that adds little to the stream would be moved further by what is chance.
LARGEST_MOVE = 0.14
DAMPING = 0.1  # of the mean of H's diagonal, added to the diagonal
DRIFT_DAMPING = 0.03  # likewise, in the regression of a drift


@dataclass(frozen=True)
class Factor:
    """A damped Hessian that can be factored, scaled to a mean diagonal of 1 + damping.

    hessian  float32 [K, K], H
    damping  the number that was added to the diagonal, relative to the mean of the diagonal
    mean     the mean of the diagonal before, by which H was divided
    """

    hessian: Tensor
    damping: float
    mean: float

    @cached_property
    def root(self) -> Tensor:
        """Return R float32 [K, K], upper triangular with H = R R^T. In float32 it takes less than half the time."""
        root, failed = upper_root(self.hessian)
        return upper_root(self.hessian.double())[0].float() if failed else root

    def move(self, block: slice, errors: Tensor) -> Tensor:
        """Return by how much the errors W - Q of all rows before a block move the block, for the least tr(E^T H E).

        errors: float32 [block.start, N]. Returns [n, N]: R_bb^-T R_<b^T errors, since (R^T E)_b = R_bb^T E_b + R_<b^T
        E_<b.
        """
        pull = self.root[: block.start, block].T @ errors
        return torch.linalg.solve_triangular(self.root[block, block].T, pull, upper=False)

    def solve(self, right: Tensor) -> Tensor:
        """Return H^-1 `right`, float32 [K, N]."""
        half = torch.linalg.solve_triangular(self.root, right, upper=True)
        return torch.linalg.solve_triangular(self.root.T, half, upper=False)

    def reordered(self, order: Tensor) -> Factor:
        """Return the same for columns in another order, int64 [K]."""
        return replace(self, hessian=self.hessian[order][:, order])


def factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Damp `hessian` [K, K] so that it has a factor. It is symmetric and positive semidefinite up to rounding.

    A channel that was never active gets the mean diagonal and no neighbours, so its weights are rounded for themselves.
    If the factorisation fails, damping grows tenfold until it does not. Raises AaacError for NaN and Inf.
    """
    if not hessian.isfinite().all():
        raise AaacError("a second moment holds NaN or Inf: the activations or the gradients overflow")
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else h.new_ones(())
    h[dead] = 0
    h[:, dead] = 0
    diagonal[dead] = mean
    h /= mean  # no factor of H changes the choices; this one keeps squares inside float32
    while True:
        damped = (h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device)).float()
        # Mostly float32 tells, which is faster.
        if any(not torch.linalg.cholesky_ex(damped.to(dtype))[1] for dtype in (torch.float32, torch.float64)):
            return Factor(damped, damping, float(mean))
        damping *= 10


def gram(a: Tensor) -> Tensor:
    """Return a^T a for a [n, K], on a CPU exactly symmetric.

    There, stripes of its lower triangle are little more than half of the work.
    """
    if a.is_cuda:
        return a.T @ a
    square = a.new_empty(a.shape[1], a.shape[1])
    for stripe in torch.arange(a.shape[1]).split(max(a.shape[1] // 8, 64)):
        first, end = int(stripe[0]), int(stripe[-1]) + 1
        square[first:end, :end] = a[:, first:end].T @ a[:, :end]
        lower = square[first:end, :end].tril(first)
        square[:end, first:end] = lower.T
        square[first:end, first:end] = lower[:, first:] + lower[:, first:].tril(-1).T
    return square


def upper_root(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return R upper triangular [..., K, K] with h = R R^T, and whether there is none, as int32 [...].

    This is the Cholesky factorisation from the last column on.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(-2, -1))
    return lower.flip(-2, -1), failed


def inverse_root(h: Tensor) -> Tensor:
    """Return U = R^-1 upper triangular [..., K, K], with h^-1 = U^T U."""
    return triangular_inverse(upper_root(h)[0])


def triangular_inverse(r: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix [..., K, K]."""
    identity = torch.eye(r.shape[-1], dtype=r.dtype, device=r.device)
    return torch.linalg.solve_triangular(r, identity.expand_as(r), upper=True)


def output_error(difference: Tensor, hessian: Tensor, outputs: Tensor | None = None) -> float:
    """Return tr(O D H D^T) for D = `difference` float32 [N, K], with O = `outputs`, or the identity if there are none.

    With the identity this is the mean squared error of the outputs, summed over them.
    """
    products = difference @ hessian.to(difference.dtype)
    if outputs is not None:
        products = outputs.to(difference.dtype) @ products
    return float(torch.linalg.vecdot(products, difference).double().sum())
