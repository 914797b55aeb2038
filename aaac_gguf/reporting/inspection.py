"""Describe one GGUF file: its tensors, its calibration and its codebooks, as text and as a plot. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from gguf import GGMLQuantizationType as T

from ..errors import AaacError, printable
from ..files import format as fmt
from ..files.gguf import GgufFile, tensor_bytes
from ..files.output import atomic
from .tables import shape_text, table


def inspect_text(file: GgufFile) -> str:
    """Return a file's tensors with types, bytes and bits per weight, its codebooks and its calibration.

    Raises AaacError for a file without tensors.
    """
    if not file.tensors:
        raise AaacError(f"{file.path}: has no tensors; give a model's file")
    rows = []
    for name, shape in file.shapes.items():
        t = file.tensors[name]
        bits = 8 * t.n_bytes / t.n_elements
        rows.append((name, shape_text(shape), t.tensor_type.name, f"{t.n_bytes:,}", f"{bits:.4g}"))
    parts = [table(("tensor", "shape", "type", "bytes", "bits per weight"), rows)]
    for name, codec in file.codecs.items():
        books = "\n".join(f"  {' '.join(f'{int(level):4}' for level in book)}" for book in codec.codebooks)
        parts.append(f"{name}: scale base {codec.scale_base:.6g}, {codec.scale_mantissa_bits} mantissa bits\n{books}")
    parts += [f"{key}: {file.get(key)}" for key in (fmt.KEY_QUANTIZER, fmt.KEY_CALIBRATION) if file.get(key)]
    n_bytes = sum(t.n_bytes for t in file.tensors.values())
    n_weights = sum(tensor_bytes(t.shape, T.I8) for t in file.tensors.values())
    bits = 8 * n_bytes / n_weights
    parts.append(f"{len(rows)} tensors, {n_bytes:,} bytes, {bits:.3f} bits per weight; file {file.n_bytes:,} bytes")
    return "\n\n".join(parts)


def plot_codebooks(file: GgufFile, out: Path) -> None:
    """Draw each AAAC tensor's two codebooks as two rows of ticks.

    Raises AaacError if the file has no AAAC tensors, if matplotlib is missing, and for a suffix that it does not know.
    """
    if not file.codecs:
        raise AaacError(f"{file.path}: has no AAAC tensors, nothing to plot")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise AaacError("`plot`: needs matplotlib; pip install 'aaac-gguf[plot]'") from None
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(file.codecs)), layout="constrained")
    for row, codec in enumerate(file.codecs.values()):
        for book, colour, offset in zip(codec.codebooks, ("tab:blue", "tab:orange"), (-0.18, 0.18), strict=True):
            axes.plot(book, [row + offset] * fmt.N_LEVELS, "|", color=colour, markersize=7, markeredgewidth=1.6)
    axes.set_yticks(range(len(file.codecs)), list(file.codecs), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("level (int8), first codebook blue, second orange")
    axes.set_title(f"{printable(file.path.name)}: learned codebooks")
    try:
        with atomic(out) as f:
            figure.savefig(f, dpi=120, format=out.suffix[1:] or "png")
    except ValueError as e:
        raise AaacError(f"`plot` {e}") from None
    plt.close(figure)
