"""Second moments for error feedback: of every linear layer's inputs, and of the loss's gradient with respect to its outputs.

To second order the KL divergence that a change D of one layer's weights causes is `E[(g^T D x)^2] / 2`, x the layer's inputs and g the gradient, with
respect to its outputs, of the log-likelihood of a token that the model itself drew. Taken as independent, as in K-FAC (Martens and Grosse, 2015) and
YAQA (Tseng et al., 2025), that is `tr(O D H D^T) / 2` with `H = E[x x^T]` and `O = E[g g^T]`: H tells which inputs matter, O which outputs.

Layers are quantized in the order in which the model runs them, each for the inputs x' that the quantized layers before it give: `H = E[x' x'^T]`, and
the weights aimed at are those whose outputs on x' are nearest to the full model's on x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .feedback import DAMPING, factor


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


# Random sequences per sequence of text.
RANDOM_SHARE = 1 / 4


def with_random(tokens: Tensor, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The sequences int64 [n, T] and RANDOM_SHARE as many of uniformly drawn tokens, each after a first token as the text's; and the weight of each.

    A text shows few of the directions that activations can take; what it does not show would count as free. Random tokens show the others: without
    them an error of the layer that only other text excites goes unseen. Together they weigh as much as the text; more of them change nothing.
    """
    n_random = math.ceil(RANDOM_SHARE * len(tokens))
    drawn = torch.randint(vocab_size, (n_random, tokens.shape[1]), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = tokens[:n_random, 0]
    weights = torch.ones(len(tokens) + n_random)
    weights[len(tokens) :] = len(tokens) / n_random
    return torch.cat([tokens, drawn]), weights


@dataclass(frozen=True)
class Rows:
    """Where the rows of a GGUF tensor [..., K] are in the parameter that it was made of: `order` int64, in the parameter or in its transpose.

    llama.cpp's converter permutes Q and K for its rotary embedding and cuts fused projections apart; GPT-2 holds its matrices transposed.
    """

    order: Tensor
    transposed: bool

    @classmethod
    def find(cls, parameter: Tensor, weight: Tensor) -> Rows | None:
        """Rows are known by their values; None where one is not found, since the converter changed the weights."""
        wanted = weight.float().cpu().reshape(-1, weight.shape[-1])
        for transposed in (False, True):
            values = _turned(parameter.detach(), transposed).float().cpu()
            if values.shape[-1] == wanted.shape[-1] and (order := _places(values.reshape(-1, values.shape[-1]), wanted)) is not None:
                return cls(order, transposed)
        return None

    def of_outputs(self, outputs: Tensor) -> Tensor:
        """Moments of the parameter's outputs [N, N] as those of the tensor's."""
        order = self.order.to(outputs.device)
        return outputs[order][:, order]

    def put(self, parameter: Tensor, weight: Tensor) -> None:
        """Give the tensor's place in the parameter other values, `weight` [..., K]."""
        values = _turned(parameter.data, self.transposed)
        order = self.order.to(values.device)
        index = (order,) if values.dim() == 2 else (order // values.shape[1], order % values.shape[1])
        values[index] = weight.reshape(-1, weight.shape[-1]).to(values)


def _turned(parameter: Tensor, transposed: bool) -> Tensor:
    return parameter.transpose(-2, -1) if transposed else parameter


def _places(rows: Tensor, wanted: Tensor) -> Tensor | None:
    """Where in `rows` each row of `wanted` is, int64; None when one is nowhere. Equal rows are taken in turn."""
    if torch.equal(rows, wanted):
        return torch.arange(len(rows))
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows.contiguous().numpy()):
        places.setdefault(hash(row.tobytes()), []).append(place)
    order = []
    for row in wanted.contiguous().numpy():
        found = places.get(hash(row.tobytes()))
        if not found:
            return None
        order.append(found.pop(0) if len(found) > 1 else found[0])
    return torch.tensor(order)
