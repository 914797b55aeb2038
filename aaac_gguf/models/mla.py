"""Name the matrices that make keys in multi-head latent attention (MLA), as llama.cpp stores them.

The model computes a key `k = W c` of a latent c, and multiplies it with a query: `q^T (W c)`. llama.cpp computes
`(W^T q)^T c`, which is the same. So its converter cuts W out of the projection of keys and values, and transposes it
for each head. No product of the model has this matrix as its weight. Its inputs are the queries, without the channels
that are rotated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KEYS, _KEYS_AND_VALUES, _QUERIES = "k_b_proj.weight", "kv_b_proj.weight", ("q_b_proj.weight", "q_proj.weight")


def key_matrices(model: Any, parameters: Mapping[str, Tensor]) -> dict[str, torch.nn.Parameter]:
    """Return the keys' matrices [heads, latent, channels] of a transformers model, by the names that the converter has.

    parameters: those of the model in which to look, by name. The result shares their memory.
    """
    found = {}
    for name, module in model.named_modules():
        parameter = parameters.get(f"{name}.{_KEYS_AND_VALUES}")
        if parameter is not None and hasattr(module, "qk_nope_head_dim") and hasattr(module, "v_head_dim"):
            channels = module.qk_nope_head_dim
            heads = parameter.detach().unflatten(0, (-1, channels + module.v_head_dim))
            found[f"{name}.{_KEYS}"] = torch.nn.Parameter(heads[:, :channels].mT, requires_grad=False)
    return found


def by_queries(parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names of the keys' matrices among `parameters`, by the parameter whose outputs are their queries."""
    found = {}
    for name in parameters:
        stem = name.removesuffix(_KEYS)
        if name.endswith(f".{_KEYS}") and stem + _KEYS_AND_VALUES in parameters:
            queries = next((stem + q for q in _QUERIES if stem + q in parameters), None)
            if queries:
                found[queries] = name
    return found
