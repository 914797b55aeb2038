"""Run an encoder-only model, which makes embeddings, in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import AaacError
from ..files.gguf import GgufFile
from .checkpoint import one_line

# The values of the architecture's pooling_type that are one vector of a text: LLAMA_POOLING_TYPE_* in llama.h.
MEAN, FIRST, LAST = 1, 2, 3


def is_encoder(file: GgufFile) -> bool:
    """Return whether a GGUF holds an encoder-only model, by its attention."""
    return file.setting("attention.causal") is False


def load_encoder(source: Path) -> Any:
    """Load the encoder of a folder in float32, in evaluation mode.

    Raises AaacError for what transformers cannot load.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    except Exception as e:  # transformers raises whatever the model's own code raises
        raise AaacError(f"{source}: transformers cannot load the encoder ({one_line(e)})") from None


def embed(model: Any, sequences: Sequence[Sequence[int]], pooling: int) -> NDArray[np.float32]:
    """Return the embeddings float32 [n, d] of token sequences, normalised. pooling: MEAN, FIRST or LAST."""
    found = []
    for tokens in sequences:
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        vector = hidden.mean(0) if pooling == MEAN else hidden[0 if pooling == FIRST else -1]
        found.append(torch.nn.functional.normalize(vector, dim=0).numpy())
    return np.stack(found)
