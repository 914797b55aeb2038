"""Check a file: its structure, each tensor against the source, and the logits of patched llama.cpp against an independent reference."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration import activations as calibrate
from ..conversion.dequantize import dequantize_file
from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile, read
from ..files.imatrix import Imatrix, read_imatrix
from ..inference import kernels
from ..llama import evaluate
from ..models import checkpoint
from ..models.source import full_precision
from ..progress import progress
from ..resources import SAMPLE_TEXT

# Patched llama.cpp rounds activations to 8 bits, the reference does not. Stock Q8_0 differs from F32 by 0.0009 for the same reason on a small
# model; a wrong codebook, selector or scale shows up a hundred times larger.
MAX_KLD = 0.005
MIN_SAME_TOP = 0.9

N_CTX = 256


@dataclass(frozen=True)
class TensorError:
    """Relative squared error of one tensor, plain and weighted by importance (None where there is none)."""

    name: str
    type: str
    relative: float
    weighted: float | None


@dataclass
class Verification:
    """What `verify` found. An empty list of failures is a pass."""

    tensors: list[TensorError] = field(default_factory=list)
    reference: str = ""
    n_tokens: int = 0
    mean_kld: float = 0.0
    same_top: float = 1.0
    failures: list[str] = field(default_factory=list)


def verify(
    path: Path, source: Path | None = None, text: Path | None = None, imatrix: Path | None = None, gpu: bool = False
) -> Verification:
    """Check `path`: structure, and with a `source` the tensors and the logits on `text`. Raises AaacError for a file that cannot be read at all."""
    result = Verification()
    text = text or SAMPLE_TEXT
    file = read(path)
    check_structure(file)
    if gpu:
        result.failures += kernels.compare_file(file)
    if source is None:
        return result
    with tempfile.TemporaryDirectory(prefix="aaac-verify-") as scratch, full_precision(source, Path(scratch)) as full:
        compare_shapes(file, full)
        logits_file = Path(scratch) / "logits"
        evaluate.save_logits(file.path, text, logits_file, N_CTX)
        logits = evaluate.read_logits(logits_file)
        tokens = torch.from_numpy(with_bos(logits.tokens, file)).long()
        if source.is_dir():
            model = checkpoint.load_model(source)
            importance = calibrate.importance(model, tokens, file.architecture, file.tensors, text.name)
            compare_tensors(result, file, full, importance)
            result.reference = "transformers with the decoded weights"
            unmatched = inject(model, full, file)
            if unmatched:
                result.failures.append(
                    f"no parameter of {source} holds the rows of {unmatched[0]} ({len(unmatched)} tensors): logits were not compared"
                )
                return result
            expected = [
                log_probabilities(model, sequence, logits.first)
                for sequence in progress(tokens, desc="reference logits")
            ]
        else:
            compare_tensors(
                result, file, full, read_imatrix(imatrix).fitted(imatrix, full.shapes) if imatrix else Imatrix({})
            )
            result.reference = "llama.cpp on the dequantized file"
            dequantized = Path(scratch) / "dequantized.gguf"
            dequantize_file(path, dequantized)
            evaluate.save_logits(dequantized, text, Path(scratch) / "reference", N_CTX)
            reference = evaluate.read_logits(Path(scratch) / "reference")
            expected = [reference.log_probabilities(i) for i in range(len(reference.tokens))]
        compare_logits(result, expected, logits)
    return result


def check_structure(file: GgufFile) -> None:
    """Raise AaacError for blocks that the format does not define; opening the file has checked the rest."""
    for name, tensor in file.tensors.items():
        if tensor.tensor_type in fmt.TYPES_BY_ID:
            fmt.check_blocks(fmt.TYPES_BY_ID[tensor.tensor_type], np.asarray(tensor.data), name)


def compare_shapes(file: GgufFile, full: GgufFile) -> None:
    """Raise AaacError unless both files have the same tensors in the same shapes."""
    for name in file.tensors.keys() ^ full.tensors.keys():
        raise AaacError(
            f"{file.path}: tensor {name} is in {'the file' if name in file.tensors else 'the source'} only; is it made from this source?"
        )
    for name, tensor in file.tensors.items():
        if tuple(tensor.shape) != tuple(full.tensors[name].shape):
            raise AaacError(
                f"{file.path}: tensor {name} has another shape than in the source; is it made from this source?"
            )


def compare_tensors(result: Verification, file: GgufFile, full: GgufFile, imatrix: Imatrix) -> None:
    """Add the error of every tensor that is not stored as in the source."""
    for name, tensor in progress(file.tensors.items(), desc="comparing tensors", unit="tensor"):
        if tensor.tensor_type == full.tensors[name].tensor_type:
            if not np.array_equal(tensor.data, full.tensors[name].data):
                result.failures.append(f"tensor {name} is {tensor.tensor_type.name} in both files and differs")
            continue
        expected = full[name]
        squared = np.square(file[name] - expected)
        power = np.square(expected)
        entry = imatrix.entries.get(name)
        weight = entry.importance() if entry else None
        if weight is not None and weight.ndim == 2:
            weight = weight[:, None, :]  # experts
        weighted = None if weight is None else _ratio((squared * weight).sum(), (power * weight).sum())
        error = TensorError(name, tensor.tensor_type.name, _ratio(squared.sum(), power.sum()), weighted)
        result.tensors.append(error)
        if not error.relative < 0.05:
            result.failures.append(
                f"tensor {name}: relative squared error {error.relative:.3g} is far from a {error.type} rounding"
            )


def _ratio(error: Any, power: Any) -> float:
    return float(error / power) if power > 0 else float(error)


def with_bos(tokens: np.ndarray, file: GgufFile) -> np.ndarray:
    """llama-perplexity feeds BOS in place of each chunk's first token, where the tokenizer adds one, but records the text's own."""
    bos = file.get("tokenizer.ggml.bos_token_id")
    tokens = tokens.copy()
    if bos is not None and tokens[0, 0] == bos:
        tokens[:, 0] = bos
    return tokens


def inject(model: Any, full: GgufFile, file: GgufFile) -> list[str]:
    """Replace the parameters of a transformers `model` by the decoded weights of `file`; returns the tensors that found no place.

    llama.cpp's converter permutes, stacks and transposes matrices but leaves their rows whole, so each row of the full-precision GGUF is looked
    up by content among the rows of the model's parameters.
    """
    changed = [
        name for name, t in file.tensors.items() if len(t.shape) > 1 and t.tensor_type != full.tensors[name].tensor_type
    ]
    wanted = {int(full.tensors[name].shape[0]) for name in changed}
    places: dict[int, list[tuple[torch.Tensor, int]]] = {}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                continue
            stacked = parameter.data.flatten(0, -2)
            for matrix in (stacked, parameter.data.T) if parameter.dim() == 2 else (stacked,):
                if matrix.shape[1] in wanted:
                    for i, row in enumerate(matrix.numpy()):
                        places.setdefault(hash(row.tobytes()), []).append((matrix, i))
        unmatched, found = [], []
        for name in changed:
            before = full[name]
            rows, after = (
                before.reshape(-1, before.shape[-1]),
                torch.from_numpy(file[name]).reshape(-1, before.shape[-1]),
            )
            targets = [places.get(hash(row.tobytes()), []) for row in rows]
            if not all(targets):
                unmatched.append(name)
            found.append((targets, after))
        for targets, after in found:
            for row, target in zip(after, targets, strict=True):
                for matrix, i in target:
                    matrix[i] = row
    return unmatched


def log_probabilities(model: Any, sequence: torch.Tensor, first: int) -> np.ndarray:
    """Float32 [positions, vocabulary] of a transformers `model` after tokens first .. T - 2 of `sequence` int64 [T]."""
    with torch.inference_mode():
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, first:-1]
    return logits.float().log_softmax(-1).numpy()


def compare_logits(result: Verification, expected: Sequence[np.ndarray], logits: evaluate.Logits) -> None:
    """Add KL divergence and top-1 agreement, and fail where they are beyond what 8-bit activations explain."""
    pairs = [
        evaluate.kl_divergence(base[:, : logits.n_vocab], logits.log_probabilities(i))
        for i, base in enumerate(expected)
    ]
    result.n_tokens = sum(len(kld) for kld, _ in pairs)
    result.mean_kld = float(np.concatenate([kld for kld, _ in pairs]).mean())
    result.same_top = float(np.concatenate([same for _, same in pairs]).mean())
    if not result.mean_kld <= MAX_KLD:
        result.failures.append(f"mean KL divergence from {result.reference} is {result.mean_kld:.5f}, above {MAX_KLD}")
    if result.same_top < MIN_SAME_TOP:
        result.failures.append(
            f"only {result.same_top:.1%} of the most likely tokens agree with {result.reference}, below {MIN_SAME_TOP:.0%}"
        )
