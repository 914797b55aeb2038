"""Second moments for error feedback: of every linear layer's inputs, and of the loss's gradient with respect to its outputs.

To second order the KL divergence that a change D of one layer's weights causes is `E[(g^T D x)^2] / 2`, x the layer's inputs and g the gradient, with
respect to its outputs, of the log-likelihood of a token that the model itself drew. Taken as independent, as in K-FAC (Martens and Grosse, 2015) and
YAQA (Tseng et al., 2025), that is `tr(O D H D^T) / 2` with `H = E[x x^T]` and `O = E[g g^T]`: H tells which inputs matter, O which outputs.

Layers are quantized in the order in which the model runs them, each for the inputs x' that the quantized layers before it give: `H = E[x' x'^T]`, and
the weights aimed at are those whose outputs on x' are nearest to the full model's on x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """What calibration saw of one parameter, on the model's device.

    inputs   float32 [K, K], or [E, K, K] for E experts: mean of x x^T over the tokens that reached it; zero for an expert that none reached
    outputs  float32 [N, N]: mean of g g^T over the same tokens; None for experts, and where outputs are too many
    drift    float32 [K, K]: mean of (x_full - x) x^T, how far `inputs` are from the full model's; None where they are those, and for experts
    n_tokens of which `drift` is the mean
    """

    inputs: Tensor
    outputs: Tensor | None
    drift: Tensor | None = None
    n_tokens: int = 0

    def target(self, weight: Tensor) -> Tensor:
        """The weights whose outputs on x are nearest to those of `weight` float32 [N, K] on x_full: W + W E[(x_full - x) x^T] H^-1.

        A regression, and damped as one: of a drift measured on few tokens much is chance.
        """
        if self.drift is None:
            return weight
        inputs = factor(self.inputs, DAMPING + 2 * len(self.inputs) / self.n_tokens)
        return weight + weight @ (self.drift / inputs.mean) @ inputs.u.T @ inputs.u


DAMPING = 0.03  # of the mean of H's diagonal, added to the diagonal


@dataclass(frozen=True)
class Factor:
    """A damped Hessian ready for use, float32 [K, K] each, scaled to a mean diagonal of 1 + damping.

    hessian  H
    u        U upper triangular with H^-1 = U^T U
    damping  what was added to the diagonal, relative to its mean
    mean     the mean of the diagonal before, by which H was divided
    """

    hessian: Tensor
    u: Tensor
    damping: float
    mean: float


def factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Damp and factor `hessian` [K, K], symmetric and positive semidefinite up to rounding.

    Channels that were never active get the mean diagonal and no neighbours: their weights are rounded for themselves. Damping grows tenfold until the
    factorisation holds.
    """
    h = hessian.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else h.new_ones(())
    h[dead] = 0
    h[:, dead] = 0
    diagonal[dead] = mean
    h /= mean  # any overall factor leaves the choices as they are; this one keeps squares inside float32
    while True:
        damped = h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device)
        u, failed = inverse_root(damped)
        if not failed:
            return Factor(damped.float(), u.float().contiguous(), damping, float(mean))
        damping *= 10


def inverse_root(h: Tensor) -> tuple[Tensor, bool]:
    """U upper triangular [..., K, K] with h^-1 = U^T U, and whether h was not positive definite.

    h = R R^T with R upper triangular is the Cholesky factorisation from the last column to the first; U = R^-1.
    """
    lower, failed = torch.linalg.cholesky_ex(h.flip(-2, -1))
    identity = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower.flip(-2, -1), identity.expand_as(h), upper=True), bool(
        (failed != 0).any()
    )


def output_error(difference: Tensor, hessian: Tensor, outputs: Tensor | None = None) -> float:
    """tr(O D H D^T) for D = `difference` float32 [N, K], O the identity unless given: the mean squared error of the outputs, summed over them."""
    products = difference @ hessian.to(difference.dtype)
    if outputs is not None:
        products = outputs.to(difference.dtype) @ products
    return float(torch.linalg.vecdot(products, difference).double().sum())
