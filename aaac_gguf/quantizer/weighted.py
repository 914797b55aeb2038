"""The weights of one tensor and the weight of each one's error, in units that suit float32."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightedTensor:
    """The weights [E, N, K] divided by `unit`, which keeps squares inside float32, and their error weights.

    An error weight is the importance, float32 [E, K], of the column. With `by_magnitude` it is
    importance * sqrt(mean(w^2) + w^2), with the mean over the row, as in llama.cpp's quantizers. The importance is
    known for the calibration text only, and with other text the rounding of a large weight can cause a large error.
    """

    def __init__(self, weight: Tensor, importance: Tensor, unit: float, by_magnitude: bool):
        self.weight, self.importance, self.unit, self.by_magnitude = weight, importance, unit, by_magnitude
        flat = weight.reshape(-1, weight.shape[-1])
        self.mean_square = (torch.linalg.vector_norm(flat, dim=1) / unit).square() / flat.shape[1]

    def rows(self, expert: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Return weights float32 [n, K] and their error weights, broadcastable to them."""
        w = self.weight[expert, rows] / self.unit
        mean_square = self.mean_square.view(self.weight.shape[:2])[expert, rows, None]
        return w, self._error_weight(w, self.importance[expert], mean_square)

    def groups(self, group_size: int, limit: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return groups [G, group_size] and their error weights.

        These are all groups in order, or random ones if all would be more than `limit` weights. Random numbers are
        drawn on the CPU, so that they are the same for every device.
        """
        n_experts, n_rows, n_per_row = self.weight.shape
        per_row = n_per_row // group_size
        total, wanted = n_experts * n_rows * per_row, limit // group_size
        drawn = torch.arange(total) if total <= wanted else torch.randint(total, (wanted,), generator=generator)
        drawn = drawn.to(self.weight.device)
        row = drawn // per_row
        w = self.weight.reshape(-1, group_size)[drawn] / self.unit
        importance = self.importance.view(n_experts, per_row, group_size)[row // n_rows, drawn % per_row]
        return w, self._error_weight(w, importance, self.mean_square[row, None])

    def _error_weight(self, w: Tensor, importance: Tensor, mean_square: Tensor) -> Tensor:
        return importance * torch.sqrt(mean_square + w.square()) if self.by_magnitude else importance
