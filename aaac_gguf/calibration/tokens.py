"""Make calibration sequences: from a text, sampled from the model, and random."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import AaacError, warn
from ..files.gguf import GgufFile
from ..models.checkpoint import load_tokenizer
from ..progress import progress

RANDOM_SHARE = 1 / 4  # random sequences per sequence of text

# The beginnings of many pieces show more than all of a few. So many tokens of each give the least error on other text.
PIECE_TOKENS = 128


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


def with_random(tokens: Tensor, vocab_size: int, seed: int = 0) -> Tensor:
    """Add sequences of uniformly drawn tokens to `tokens` int64 [n, T], RANDOM_SHARE as many.

    Return all sequences, the random ones last. A random sequence starts with the first token of a text's.

    A text shows few of the directions that activations can take, and quantization errors in the others would count as
    free. Random tokens show the others.
    """
    n_random = math.ceil(RANDOM_SHARE * len(tokens))
    drawn = torch.randint(vocab_size, (n_random, tokens.shape[1]), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = tokens[:n_random, 0]
    return torch.cat([tokens, drawn])


def text_tokens(source: Path, text: Path, n_sequences: int, sequence_length: int) -> tuple[Tensor, str]:
    """Return sequences from all over a text, at most `n_sequences`, and the text's sha256.

    The tokens are int64 [n, sequence_length]. If the tokenizer starts a text with BOS, every sequence's first token is
    replaced by BOS, as in llama-imatrix. Raises AaacError for a text that is empty or shorter than one sequence.

    source: the model, for its tokenizer and chat template. text: plain, or with the suffix .jsonl JSON lines, each with
    a "text" or with the "messages" of a dialogue.
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
    n_tokens = n_sequences * sequence_length
    if text.suffix == ".jsonl":
        ids = _tokens_of_pieces(tokenizer, _pieces(decoded, text), n_tokens, text)
    else:
        ids = _tokens_of_text(tokenizer, decoded, n_sequences, sequence_length)
    n = min(n_sequences, len(ids) // sequence_length)
    if n == 0:
        raise AaacError(
            f"`calibration` {text}: {len(ids)} tokens, shorter than one sequence of {sequence_length}; "
            "give a longer text, or 'self'"
        )
    tokens = torch.tensor(ids[: n * sequence_length]).reshape(n, sequence_length)
    if _starts_with_bos(tokenizer):
        tokens[:, 0] = tokenizer.bos_token_id
    return tokens, hashlib.sha256(content).hexdigest()


def _tokens_of_text(tokenizer: Any, text: str, n_sequences: int, sequence_length: int) -> list[int]:
    """Return the ids of sequences that begin at even distances in the text. A short text gives all of its own in a row.

    Parts far from each other show more than one stretch does.
    """
    distance = len(text) // n_sequences
    # Tokens are shorter than 32 characters on average. All of a book would take minutes.
    parts = [text[i * distance : (i + 1) * distance][: 32 * sequence_length] for i in range(n_sequences)]
    sequences = [tokenizer(part, verbose=False)["input_ids"][:sequence_length] for part in parts]
    if min(map(len, sequences)) < sequence_length:
        return tokenizer(text[: 32 * n_sequences * sequence_length], verbose=False)["input_ids"]
    return list(itertools.chain.from_iterable(sequences))


Dialogue = list[dict[str, str]]  # messages, each with "role" and "content"


def _pieces(content: str, path: Path) -> Iterator[str | Dialogue]:
    """Yield the pieces of a file of JSON lines: each is an object with a "text", or with the "messages" of a dialogue.

    Raises AaacError that names the line of a piece that is neither.
    """
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            piece = json.loads(line)
            if "messages" in piece:
                yield [{"role": str(m["role"]), "content": str(m["content"])} for m in piece["messages"]]
            else:
                yield str(piece["text"])
        except (ValueError, KeyError, TypeError):
            raise AaacError(
                f'`calibration` {path}: line {number} is no JSON object with a "text" or with "messages"; '
                "give such lines, or a plain text with another suffix"
            ) from None


def _tokens_of_pieces(tokenizer: Any, pieces: Iterable[str | Dialogue], n_tokens: int, path: Path) -> list[int]:
    """Return at least `n_tokens` ids, if there are as many. Dialogues go through the chat template.

    The first PIECE_TOKENS of every piece come first, then what is left of the pieces.
    """
    ids: list[int] = [tokenizer.bos_token_id] if _starts_with_bos(tokenizer) else []
    left: list[int] = []
    refused = ""
    for piece in pieces:
        if len(ids) >= n_tokens:
            break
        if isinstance(piece, str):
            text = piece
        else:
            text = "\n\n".join(message["content"] for message in piece)
            if tokenizer.chat_template:
                try:
                    text = tokenizer.apply_chat_template(piece, tokenize=False)
                except Exception as e:  # a template is a program, and refuses what it does not know
                    refused = str(e)
        piece_ids = tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        ids += piece_ids[:PIECE_TOKENS]
        left += piece_ids[PIECE_TOKENS:]
    if refused:
        warn(f"`calibration` {path}: the model's chat template refuses dialogues ({refused}); they are taken as text")
    return ids + left


def _starts_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer starts a text with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


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
