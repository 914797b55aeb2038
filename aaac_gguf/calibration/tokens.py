"""Make calibration sequences: from a text, sampled from the model, and random."""

from __future__ import annotations

import hashlib
import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AaacError, warn
from ..files.gguf import GgufFile
from ..models.checkpoint import load_tokenizer
from ..progress import progress

# Random sequences per sequence of text.
RANDOM_SHARE = 1 / 4


def fitting_length(file: GgufFile, length: int, setting: str) -> int:
    """Return `length`, or with a warning that names the setting the number of positions of a model that has fewer.

    Models with learned positions fail beyond them, and no model was trained there.
    """
    positions = file.positions(length)
    if length > positions:
        warn(f"`{setting}` {length}: the model has {positions} positions; {positions} are taken")
    return positions


def check_ids(tokens: Tensor, n_rows: int, text: Path) -> None:
    """Raise AaacError for token ids that have no row among the embeddings."""
    if (largest := int(tokens.max())) >= n_rows:
        raise AaacError(
            f"`calibration` {text}: the tokenizer makes token {largest}, and the model has {n_rows} embeddings; "
            "the tokenizer is not this model's, or the model must be resized for it"
        )


def with_random(tokens: Tensor, vocab_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Add sequences of uniformly drawn tokens to `tokens` int64 [n, T], RANDOM_SHARE as many.

    Return all sequences, the random ones last, and the weight of each, float32. A random sequence starts with the first
    token of a text's. Together the random sequences weigh as much as the text.

    A text shows few of the directions that activations can take, and quantization errors in the others would count as
    free. Random tokens show the others. More random tokens change nothing.
    """
    n_random = math.ceil(RANDOM_SHARE * len(tokens))
    drawn = torch.randint(vocab_size, (n_random, tokens.shape[1]), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = tokens[:n_random, 0]
    weights = torch.ones(len(tokens) + n_random)
    weights[len(tokens) :] = len(tokens) / n_random
    return torch.cat([tokens, drawn]), weights


def text_tokens(source: Path, text: Path, n_sequences: int, sequence_length: int) -> tuple[Tensor, str]:
    """Return the first sequences of a text, at most `n_sequences`, and the text's sha256.

    The tokens are int64 [n, sequence_length]. If the tokenizer starts a text with BOS, every sequence's first token is
    replaced by BOS, as in llama-imatrix. Raises AaacError for a text that is empty or shorter than one sequence.

    source: the model, for its tokenizer.
    """
    try:
        content = text.read_bytes()
    except OSError as e:
        raise AaacError(f"`calibration` {text}: {e.strerror}; give a text file, or 'self'") from None
    try:
        decoded = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise AaacError(
            f"`calibration` {text}: not UTF-8 text ({e.reason} at byte {e.start}); give a text file"
        ) from None
    if not decoded.strip():
        raise AaacError(f"`calibration` {text}: the text is empty; give a longer one, or 'self'")
    tokenizer = load_tokenizer(source)
    # Only the beginning, since a whole book takes minutes. Tokens are shorter than 32 characters on average.
    ids = tokenizer(decoded[: 32 * n_sequences * sequence_length], verbose=False)["input_ids"]
    n = min(n_sequences, len(ids) // sequence_length)
    if n == 0:
        raise AaacError(
            f"`calibration` {text}: {len(ids)} tokens, shorter than one sequence of {sequence_length}; "
            "give a longer text, or 'self'"
        )
    tokens = torch.tensor(ids[: n * sequence_length]).reshape(n, sequence_length)
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        tokens[:, 0] = tokenizer.bos_token_id
    return tokens, hashlib.sha256(content).hexdigest()


def self_tokens(model: Any, n_sequences: int, sequence_length: int, seed: int) -> Tensor:
    """Sample sequences from the model at temperature 1: int64 [n_sequences, sequence_length].

    The same seed gives the same sequences.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().num_embeddings
    bos = model.config.get_text_config().bos_token_id
    first = torch.full((n_sequences, 1), bos if bos is not None and bos < vocab_size else 0)
    second = torch.randint(vocab_size, (n_sequences, 1), generator=generator)  # makes the sequences differ
    tokens = torch.cat([first, second], dim=1)
    # transformers has renamed its key-value cache.
    cache = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    past, batch = None, tokens.to(model.device)
    with torch.inference_mode():
        for _ in progress(range(sequence_length - 2), desc="sampling calibration tokens", unit="token"):
            out = model(input_ids=batch, **{cache: past}, use_cache=True)
            past = out[cache]
            probabilities = out.logits[:, -1].float().softmax(-1).cpu()
            batch = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, batch], dim=1)
            batch = batch.to(model.device)
    return tokens
