"""Calibration tokens: from a text, sampled from the model, and random."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AaacError
from ..models.checkpoint import load_tokenizer
from ..progress import progress

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


def text_tokens(source: Path, text: Path, n_sequences: int, sequence_length: int) -> tuple[torch.Tensor, str]:
    """The first `n_sequences` sequences of the text as int64 [n, sequence_length], BOS in place of each first token as in
    llama-imatrix, and the sha256 of the text. Raises AaacError for a text that is empty or shorter than one sequence."""
    try:
        content = text.read_bytes()
    except OSError as e:
        raise AaacError(f"--calib {text}: {e.strerror}; give a text file, or `self`") from None
    try:
        decoded = content.decode("utf-8")
    except UnicodeDecodeError as e:
        raise AaacError(f"--calib {text}: not UTF-8 text ({e.reason} at byte {e.start}); give a text file") from None
    if not decoded.strip():
        raise AaacError(f"--calib {text}: the text is empty; give a longer one, or `self`")
    tokenizer = load_tokenizer(source)
    # A little more text than needed, so that a book does not take minutes to tokenize: no token is longer than 32 characters on average.
    ids = tokenizer(decoded[: 32 * n_sequences * sequence_length], verbose=False)["input_ids"]
    n = min(n_sequences, len(ids) // sequence_length)
    if n == 0:
        raise AaacError(
            f"--calib {text}: {len(ids)} tokens, shorter than one sequence of {sequence_length}; give a longer text, or `self`"
        )
    tokens = torch.tensor(ids[: n * sequence_length]).reshape(n, sequence_length)
    if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id:
        tokens[:, 0] = tokenizer.bos_token_id
    return tokens, hashlib.sha256(content).hexdigest()


def self_tokens(model: Any, n_sequences: int, sequence_length: int, seed: int) -> torch.Tensor:
    """Sequences that the model samples from itself at temperature 1: int64 [n_sequences, sequence_length], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().num_embeddings
    bos = model.config.get_text_config().bos_token_id
    first = torch.full((n_sequences, 1), bos if bos is not None else 0)
    second = torch.randint(vocab_size, (n_sequences, 1), generator=generator)  # sequences must differ from their start
    tokens = torch.cat([first, second], dim=1)
    past, batch = None, tokens.to(model.device)
    with torch.inference_mode():
        for _ in progress(range(sequence_length - 2), desc="sampling calibration tokens", unit="token"):
            out = model(input_ids=batch, past_key_values=past, use_cache=True)
            past = out.past_key_values
            probabilities = out.logits[:, -1].float().softmax(-1).cpu()
            batch = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, batch], dim=1)
            batch = batch.to(model.device)
    return tokens
