"""Check a file: its structure, each tensor against the source, and the logits of patched llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as T

from ..calibration.activations import importance
from ..conversion.dequantize import dequantize_file
from ..conversion.plan import bits_per_weight
from ..errors import AaacError, warn
from ..files import format as fmt
from ..files.gguf import GgufFile, block_number, read
from ..files.imatrix import Imatrix, read_imatrix
from ..files.scratch import temporary_folder
from ..inference import kernels
from ..llama import evaluate
from ..llama.embeddings import embeddings
from ..models import checkpoint, encoder
from ..models.source import full_precision
from ..progress import progress
from ..resources import SAMPLE_TEXT
from .results import TensorError, Verification

# Patched llama.cpp rounds activations to 8 bits, the reference does not. For the same reason stock Q8_0 differs from
# F32 by 0.0009 on a small model. A wrong codebook, selector or scale shows up a hundred times larger.
MAX_KLD = 0.005
MIN_SAME_TOP = 0.9

# No type rounds a trained matrix with a relative squared error as large as both of these, the second at its bits per
# weight: with a bit less it is four times as large.
MAX_TENSOR_ERROR, MAX_ERROR_AT_0_BITS = 0.05, 20

N_CTX = 256

# Embeddings are compared on so many pieces of the text, of so many characters each. The product of matrices with 8-bit
# activations turns an embedding by less than this; a wrong tensor turns it far more.
N_PIECES, PIECE_SIZE = 32, 400
MIN_COSINE = 0.995

Place = tuple[torch.Tensor, int]  # a matrix, and the number of a row in it


def verify(
    path: Path, source: Path | None = None, text: Path | None = None, imatrix: Path | None = None, gpu: bool = False
) -> Verification:
    """Check the structure of `path`, and with its `source` also its tensors and llama.cpp's logits on `text`.

    text: SAMPLE_TEXT if there is none. imatrix: weights the errors of tensors if the source is a GGUF; for a folder
    importance is measured on the text. gpu: also decode every tensor on the GPU, and compare it to the bit.
    Raises AaacError for a file that cannot be read at all.
    """
    result = Verification()
    text = text or SAMPLE_TEXT
    file = read(path)
    check_structure(file)
    if gpu:
        result.failures += kernels.compare_file(file)
    if source is None:
        return result
    with temporary_folder("aaac-verify-") as scratch, full_precision(source, scratch) as full:
        compare_shapes(file, full)
        if encoder.is_encoder(full):
            given = read_imatrix(imatrix).fitted(imatrix, full.shapes) if imatrix else Imatrix({})
            compare_tensors(result, file, full, given)
            _compare_embeddings(result, file, full, source, scratch, text)
            return result
        if not checkpoint.is_causal(full):
            given = read_imatrix(imatrix).fitted(imatrix, full.shapes) if imatrix else Imatrix({})
            compare_tensors(result, file, full, given)
            warn(f"{path}: logits are not compared, since {full.architecture} is no model of the next token")
            return result
        n_ctx = full.positions(N_CTX)
        evaluate.save_logits(file.path, text, scratch / "logits", n_ctx)
        logits = evaluate.read_logits(scratch / "logits")
        if source.is_dir():
            expected = _compare_with_transformers(result, file, full, source, logits, text.name)
        else:
            given = read_imatrix(imatrix).fitted(imatrix, full.shapes) if imatrix else Imatrix({})
            compare_tensors(result, file, full, given)
            expected = _logits_of_the_dequantized_file(result, path, scratch, text, n_ctx)
        if expected:
            compare_logits(result, expected, logits)
    return result


def _compare_with_transformers(
    result: Verification, file: GgufFile, full: GgufFile, source: Path, logits: evaluate.Logits, text_name: str
) -> list[np.ndarray]:
    """Compare the tensors under the importance of the text, and return transformers' log probabilities.

    The model has the decoded weights of `file`. If these find no place in it, there are no log probabilities.
    """
    model = checkpoint.load_model(source)
    tokens = torch.from_numpy(evaluate.with_bos(logits.tokens, file)).long()
    compare_tensors(result, file, full, importance(model, tokens, file.architecture, file.tensors, text_name))
    result.reference = "transformers with the decoded weights"
    if unmatched := inject(model, full, file):
        tensors = f"{unmatched[0]} ({len(unmatched)} tensors)"
        result.failures.append(f"no parameter of {source} holds the rows of {tensors}: logits were not compared")
        return []
    return [log_probabilities(model, sequence, logits.first) for sequence in progress(tokens, desc="reference logits")]


def _logits_of_the_dequantized_file(
    result: Verification, path: Path, scratch: Path, text: Path, n_ctx: int
) -> list[np.ndarray]:
    """Return llama.cpp's log probabilities with the decoded weights of `path` in float32."""
    result.reference = "llama.cpp on the dequantized file"
    dequantize_file(path, scratch / "dequantized.gguf")
    evaluate.save_logits(scratch / "dequantized.gguf", text, scratch / "reference", n_ctx)
    reference = evaluate.read_logits(scratch / "reference")
    return [reference.log_probabilities(i) for i in range(len(reference.tokens))]


def _compare_embeddings(
    result: Verification, file: GgufFile, full: GgufFile, source: Path, scratch: Path, text: Path
) -> None:
    """Add the cosines of the embeddings, and a failure for what cannot be compared or is far off.

    The reference is transformers with the decoded weights. Of a GGUF it is llama.cpp on the dequantized file.
    """
    pooling = full.setting("pooling_type")
    if pooling not in (encoder.MEAN, encoder.FIRST, encoder.LAST):
        result.failures.append(f"pooling type {pooling} is no vector of a text: embeddings were not compared")
        return
    content = text.read_text("utf-8", "replace")
    pieces = [content[i : i + PIECE_SIZE].strip() for i in range(0, N_PIECES * PIECE_SIZE, PIECE_SIZE)]
    n_ctx = full.positions(N_CTX)
    pieces = [piece for piece in pieces if piece]
    if not pieces:
        raise AaacError(f"{text}: the text is empty; give a longer one")
    tokens, found = embeddings(file.path, pieces, n_ctx, scratch / "embeddings.log")
    if source.is_dir():
        model = encoder.load_encoder(source)
        original = encoder.embed(model, tokens, pooling)
        result.reference = "transformers with the decoded weights"
        if unmatched := inject(model, full, file):
            tensors = f"{unmatched[0]} ({len(unmatched)} tensors)"
            result.failures.append(
                f"no parameter of {source} holds the rows of {tensors}: embeddings were not compared"
            )
            return
        expected = encoder.embed(model, tokens, pooling)
    else:
        result.reference = "llama.cpp on the dequantized file"
        dequantize_file(file.path, scratch / "dequantized.gguf")
        _, expected = embeddings(scratch / "dequantized.gguf", pieces, n_ctx, scratch / "reference.log")
        _, original = embeddings(full.path, pieces, n_ctx, scratch / "full.log")
    result.n_texts = len(pieces)
    result.cosine = float((found * expected).sum(1).min())
    result.full_cosine = float((found * original).sum(1).mean())
    if not result.cosine >= MIN_COSINE:
        far = f"the least cosine of embeddings with {result.reference} is {result.cosine:.5f}"
        result.failures.append(f"{far}, below {MIN_COSINE}")


def check_structure(file: GgufFile) -> None:
    """Raise AaacError for blocks that the format does not define. Opening the file has checked the rest."""
    for name, tensor in file.tensors.items():
        if tensor.tensor_type in fmt.TYPES_BY_ID:
            fmt.check_blocks(fmt.TYPES_BY_ID[tensor.tensor_type], np.asarray(tensor.data), name)


def compare_shapes(file: GgufFile, full: GgufFile) -> None:
    """Raise AaacError unless both files have the same tensors in the same shapes."""
    shapes, expected = file.shapes, full.shapes
    for name in shapes.keys() ^ expected.keys():
        where = "the file" if name in shapes else "the source"
        raise AaacError(f"{file.path}: tensor {name} is in {where} only; is it made from this source?")
    for name, shape in shapes.items():
        if shape != expected[name]:
            difference = f"tensor {name} has another shape than in the source"
            raise AaacError(f"{file.path}: {difference}; is it made from this source?")


def compare_tensors(result: Verification, file: GgufFile, full: GgufFile, imatrix: Imatrix) -> None:
    """Add the error of every tensor whose type is not the source's, and a failure for every tensor that is wrong."""
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
        largest = max(MAX_TENSOR_ERROR, MAX_ERROR_AT_0_BITS / 4 ** bits_per_weight(tensor.tensor_type))
        if not error.relative < largest:
            far = f"relative squared error {error.relative:.3g} is far from a {error.type} rounding"
            result.failures.append(f"tensor {name}: {far}")


def _ratio(error: Any, power: Any) -> float:
    return float(error / power) if power > 0 else float(error)


def inject(model: Any, full: GgufFile, file: GgufFile) -> list[str]:
    """Replace the parameters of a transformers `model` by the decoded weights of `file`.

    llama.cpp's converter permutes, stacks, cuts and transposes matrices, but leaves their rows whole. So each row of
    the full-precision GGUF is looked up by content among the rows of all parameters, and every equal row is replaced.
    Unlike `models.rows.RowMap`, this needs no parameter's name, and one tensor may be made of several parameters.
    Decoder blocks at the end that predict further tokens are left out: neither program runs them here.
    Returns the tensors with a row that is in no parameter.
    """
    n_blocks = int(full.setting("block_count", 0)) - int(full.setting("nextn_predict_layers", 0))
    changed = [
        name
        for name, t in file.tensors.items()
        if len(t.shape) > 1 and t.tensor_type != full.tensors[name].tensor_type and block_number(name, -1) < n_blocks
    ]
    # MLA's heads are transposed, each for itself.
    kinds = {full.tensors[name].tensor_type for name in changed}
    dtypes = [dtype for kind, dtype in ((T.BF16, torch.bfloat16), (T.F16, torch.float16)) if kind in kinds]
    places = _rows_by_content(model, {n for name in changed for n in full.shapes[name][-2:]}, dtypes)
    unmatched: list[str] = []
    replacements: list[tuple[list[list[Place]], torch.Tensor]] = []
    for name in changed:  # all rows are looked up before the first is replaced
        width = full.shapes[name][-1]
        targets = [places.get(hash(row.tobytes()), []) for row in full[name].reshape(-1, width)]
        after = torch.from_numpy(file[name])
        if not all(targets) and after.dim() == 3:
            rows = np.ascontiguousarray(full[name].swapaxes(1, 2)).reshape(-1, after.shape[1])
            targets, after = [places.get(hash(row.tobytes()), []) for row in rows], after.mT
        if not all(targets):
            unmatched.append(name)
        replacements.append((targets, after.reshape(-1, after.shape[-1])))
    with torch.no_grad():
        for targets, after in replacements:
            for row, target in zip(after, targets, strict=True):
                for matrix, i in target:
                    matrix[i] = row
    return unmatched


def _rows_by_content(model: Any, widths: set[int], dtypes: Sequence[torch.dtype]) -> dict[int, list[Place]]:
    """Return the places of every row of the model's parameters, transposed too, by the hash of its bytes.

    widths: only rows of these lengths. dtypes: what the converter may have rounded a parameter of another dtype to.
    """
    places: dict[int, list[Place]] = {}
    for parameter in model.parameters():
        if parameter.dim() < 2:
            continue
        stored = parameter.data
        matrices = stored.unbind() if stored.dim() == 3 else [stored.flatten(0, -2)]
        for matrix in [*matrices, *(m.T for m in matrices)]:
            if matrix.shape[1] not in widths:
                continue
            rounded = [matrix.to(dtype).float() for dtype in dtypes]
            for values in (matrix, *(r for r in rounded if not torch.equal(r, matrix))):
                for i, row in enumerate(values.numpy()):
                    places.setdefault(hash(row.tobytes()), []).append((matrix, i))
    return places


def log_probabilities(model: Any, sequence: torch.Tensor, first: int) -> np.ndarray:
    """Return log probabilities float32 [positions, n_vocab] after tokens first .. T - 2 of `sequence` int64 [T]."""
    with torch.inference_mode():
        logits = model(input_ids=sequence[None], use_cache=False).logits[0, first:-1]
    return logits.float().log_softmax(-1).numpy()


def compare_logits(result: Verification, expected: Sequence[np.ndarray], logits: evaluate.Logits) -> None:
    """Add KL divergence and top-1 agreement, and a failure if 8-bit activations do not explain them."""
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
        share = f"only {result.same_top:.1%} of the most likely tokens"
        result.failures.append(f"{share} agree with {result.reference}, below {MIN_SAME_TOP:.0%}")
