"""Measure perplexity and KL divergence with llama-perplexity, and read its logits files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import AaacError
from ..files.gguf import GgufFile
from . import tools


@dataclass(frozen=True)
class Score:
    """The figures of llama-perplexity for one file against the full model's logits.

    KL divergences are in nats per token, `rms_delta_p` and `same_top` in percent.
    """

    perplexity: float
    perplexity_error: float
    mean_kld: float
    mean_kld_error: float
    kld_999: float
    max_kld: float
    rms_delta_p: float
    same_top: float


_NUMBER = r"\s*:\s*(-?[\d.]+(?:e[-+]?\d+)?)(?:\s*±\s*([\d.]+(?:e[-+]?\d+)?))?"
_SUMMARY = {
    "perplexity": rf"Mean PPL\(Q\)\s*{_NUMBER}",
    "mean_kld": rf"Mean\s+KLD{_NUMBER}",
    "kld_999": rf"99\.9%\s+KLD{_NUMBER}",
    "max_kld": rf"Maximum KLD{_NUMBER}",
    "rms_delta_p": rf"RMS Δp\s*{_NUMBER}",
    "same_top": rf"Same top p{_NUMBER}",
}


def save_logits(model: Path, text: Path, logits: Path, n_ctx: int, n_chunks: int = -1) -> tuple[float, float]:
    """Write the log probabilities of `model` on `text` to the file `logits`, for `score` and `read_logits`.

    n_chunks: -1 for the whole text. Returns the perplexity and its standard error. Raises AaacError for a text of less
    than two chunks.
    """
    log = logits.with_name(logits.name + ".log")
    output = tools.run_logged_tool("llama-perplexity", _arguments(model, text, logits, n_ctx, n_chunks), log)
    if not logits.is_file() or logits.stat().st_size < 20:
        words = re.search(r"the data file you provided tokenizes to only \d+ tokens", output)
        reason = words[0] if words else f"see {log}"
        raise AaacError(
            f"{text}: llama-perplexity wrote no logits ({reason}); give a text of at least {2 * n_ctx} tokens"
        )
    found = re.search(r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)", output)
    if not found:
        raise AaacError(f"llama-perplexity printed no perplexity of {model} (see {log}); run it again")
    return float(found[1]), float(found[2])


def score(model: Path, text: Path, base: Path, n_ctx: int, n_chunks: int = -1, cache_type: str | None = None) -> Score:
    """Compare `model` with the logits `base` that `save_logits` wrote of the full model on the same text.

    cache_type: of the keys and values that the model keeps, by llama.cpp's name in any case; F16 if None.
    """
    log = base.with_name(f"{base.name}-{model.name}{f'-{cache_type}' if cache_type else ''}.log")
    args = [*_arguments(model, text, base, n_ctx, n_chunks), "--kl-divergence"]
    if cache_type:  # llama.cpp quantizes values only for flash attention
        args += ["-ctk", cache_type.lower(), "-ctv", cache_type.lower(), "-fa", "on"]
    return parse_summary(tools.run_logged_tool("llama-perplexity", args, log), log)


def _arguments(model: Path, text: Path, logits: Path, n_ctx: int, n_chunks: int) -> list[str | Path]:
    chunks = ["-c", str(n_ctx), "--chunks", str(n_chunks)]
    return ["-m", model, "-f", text, *chunks, "--kl-divergence-base", logits]


def parse_summary(output: str, log: Path | str) -> Score:
    """Return the figures that `llama-perplexity --kl-divergence` prints last.

    Raises AaacError that names `log` if one is missing.
    """
    values: dict[str, float] = {}
    for name, pattern in _SUMMARY.items():
        found = re.search(pattern, output)
        if not found:
            raise AaacError(f"llama-perplexity printed no {name.replace('_', ' ')} (see {log}); run it again")
        values[name] = float(found[1])
        if f"{name}_error" in Score.__dataclass_fields__:
            values[f"{name}_error"] = float(found[2])
    return Score(**values)


@dataclass(frozen=True)
class Logits:
    """A logits file: the tokens of every chunk, and the log probabilities after those of its second half.

    tokens  int32 [n_chunks, n_ctx]
    rows    uint16 [n_chunks, positions, 4 + n_vocab (made even)], memory-mapped
    """

    tokens: NDArray[np.int32]
    rows: NDArray[np.uint16]
    n_vocab: int

    @property
    def first(self) -> int:
        """Return the first scored position of a chunk. The last is n_ctx - 2."""
        return self.tokens.shape[1] // 2

    def log_probabilities(self, chunk: int) -> NDArray[np.float32]:
        """Return the log probabilities after tokens first .. n_ctx - 2, float32 [positions, n_vocab].

        A row holds its step and its floor as float32, then 16-bit multiples of the step above the floor.
        """
        rows = np.asarray(self.rows[chunk])
        scale, floor = np.ascontiguousarray(rows[:, :4]).view(np.float32).T
        return floor[:, None] + scale[:, None] * rows[:, 4 : 4 + self.n_vocab]


def read_logits(path: Path) -> Logits:
    """Open a file of `save_logits`. Raises AaacError for one that is not whole."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    if len(data) < 20 or bytes(data[:8]) != b"_logits_":
        raise AaacError(f"{path}: not a logits file of llama-perplexity; write it again")
    n_ctx, n_vocab, n_chunks = (int(n) for n in data[8:20].view("<i4"))
    start = 20 + 4 * n_ctx * n_chunks
    positions, width = n_ctx - 1 - n_ctx // 2, 2 * ((n_vocab + 1) // 2) + 4
    if len(data) != start + 2 * n_chunks * positions * width:
        raise AaacError(f"{path}: the logits file is cut short; write it again")
    tokens = np.array(data[20:start]).view("<i4").reshape(n_chunks, n_ctx)
    return Logits(tokens, data[start:].view("<u2").reshape(n_chunks, positions, width), n_vocab)


def with_bos(tokens: NDArray[np.int32], file: GgufFile) -> NDArray[np.int32]:
    """Return the tokens of a logits file, int32 [n_chunks, n_ctx], as the model was given them.

    If the tokenizer adds BOS, llama-perplexity feeds it in place of each chunk's first token, but records the text's.
    """
    bos = file.get("tokenizer.ggml.bos_token_id")
    tokens = tokens.copy()
    if bos is not None and tokens[0, 0] == bos:
        tokens[:, 0] = bos
    return tokens


def kl_divergence(
    base: NDArray[np.float32], other: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return KL(base || other) in nats, and whether both have the same most likely token, for every position.

    base, other: log probabilities [positions, n_vocab].
    """
    difference = base.astype(np.float64) - other
    return (np.exp(base.astype(np.float64)) * difference).sum(1), base.argmax(1) == other.argmax(1)
