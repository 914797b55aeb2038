"""The inputs of experts, and Hessians of them that are made one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..quantizer.moments import gram

# How far correlations between channels shrink towards zero, however many tokens show them.
SHRINKAGE = 0.05


@dataclass(frozen=True)
class ExpertInputs:
    """The inputs of experts.

    x          float32 [n, K]
    rows       for each expert the rows of `x` that are its own, int64 [n_e]
    of_tokens  whether `x` is one row for each token, and so the channels are the same for all experts
    """

    x: Tensor
    rows: Sequence[Tensor]
    of_tokens: bool


class ExpertHessians(Sequence[Tensor]):
    """The Hessians [K, K] of experts, each computed when it is asked for: those of all experts take too much memory."""

    def __init__(self, inputs: ExpertInputs, importance: Tensor | None, of_layer: Tensor | None):
        """importance: float32 [E, K], if it is known.

        of_layer: float32 [K, K], H of all tokens, for experts that none of them reach.
        """
        self.inputs, self.importance, self.of_layer = inputs, importance, of_layer

    def __len__(self) -> int:
        return len(self.inputs.rows)

    def __getitem__(self, expert: int) -> Tensor:  # type: ignore[override]
        if not 0 <= expert < len(self):
            raise IndexError(expert)
        x = self.inputs.x[self.inputs.rows[expert]]
        if len(x):
            hessian = shrunk(gram(x) / len(x), len(x))
        else:
            hessian = x.new_zeros(x.shape[1], x.shape[1]) if self.of_layer is None else self.of_layer
        if self.importance is not None:
            wanted = self.importance[expert].to(hessian)
            diagonal = hessian.diagonal()
            scale = torch.where(diagonal > 0, wanted / diagonal, 0).sqrt()
            hessian = scale[:, None] * hessian * scale
            hessian.diagonal().copy_(wanted)
        return hessian


def shrunk(hessian: Tensor, n_tokens: int) -> Tensor:
    """Return a Hessian [K, K] that is a mean over n tokens, with smaller correlations.

    It is as if as many tokens as there are channels had shown no correlation at all, and then SHRINKAGE.
    """
    diagonal = hessian.diagonal().clone()
    hessian = hessian * ((1 - SHRINKAGE) * n_tokens / (n_tokens + len(hessian)))
    hessian.diagonal().copy_(diagonal)
    return hessian
