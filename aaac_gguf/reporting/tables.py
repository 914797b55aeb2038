"""What the verbs print: tables, and the plot of a file's codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType as T

from ..errors import AaacError
from ..files import format as fmt
from ..files.gguf import GgufFile, tensor_bytes
from ..files.output import atomic

if TYPE_CHECKING:  # these import torch, and `inspect` starts without it
    from ..conversion.convert import Report
    from ..conversion.plan import TensorPlan
    from .compare import Comparison
    from .verify import Verification


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (header, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * w for w in widths], *lines[1:]])


def shape_text(shape: Sequence[int]) -> str:
    return " x ".join(str(int(n)) for n in shape)


def plan_text(plans: Sequence[TensorPlan], n_bytes: int, n_files: int) -> str:
    """A plan's tensors, why where there is something to say, and the sums."""
    from ..conversion.plan import summary

    rows = [(p.name, shape_text(p.shape), p.source_type.name, p.type.name, f"{p.n_bytes:,}", p.reason) for p in plans]
    files = "file" if n_files == 1 else f"{n_files} files"
    return f"{table(('tensor', 'shape', 'from', 'to', 'bytes', 'why'), rows)}\n\n{summary(plans)}\n{files:>10} {'':13} {n_bytes:15,} bytes"


def convert_text(report: Report) -> str:
    """One paragraph on a finished conversion."""
    files = f" (the first of {len(report.files)} files)" if len(report.files) > 1 else ""
    lines = [
        f"wrote {report.files[0]}{files}: {report.n_bytes:,} bytes in {report.seconds:.1f} s, peak memory {report.peak_bytes / 2**30:.2f} GiB"
    ]
    if report.tensors:
        n_weights = [t.plan.n_weights for t in report.tensors]
        for what in ("relative_error", "weighted_error"):
            mean = sum(n * getattr(t, what) for n, t in zip(n_weights, report.tensors, strict=True)) / sum(n_weights)
            worst = max(report.tensors, key=lambda t: getattr(t, what))
            lines.append(
                f"{what.replace('_', ' ')}: mean {mean:.5f}, worst {getattr(worst, what):.5f} in {worst.plan.name}"
            )
    if report.coverage and report.coverage.missed:
        share = f"calibration reached {100 * report.coverage.share:.2f} % of the weights"
        lines.append(f"{share}; not reached: {', '.join(report.coverage.missed)}")
    if report.damped:
        lines.append(
            f"calibrate on more tokens: too few for the channels of {', '.join(report.damped)}, damped more than usual"
        )
    if report.left_out:
        lines.append(report.left_out)
    return "\n".join(lines)


def verification_text(result: Verification) -> str:
    """Tensors, logits, verdict."""
    parts = []
    if result.tensors:
        rows = [
            (t.name, t.type, f"{t.relative:.6f}", "" if t.weighted is None else f"{t.weighted:.6f}")
            for t in result.tensors
        ]
        parts.append(table(("tensor", "type", "relative error", "weighted error"), rows))
    if result.n_tokens:
        agreement = f"mean KL divergence {result.mean_kld:.6f}, same top token {100 * result.same_top:.2f} %"
        parts.append(f"patched llama.cpp against {result.reference}, {result.n_tokens} tokens: {agreement}")
    parts.append("\n".join(f"FAILED: {failure}" for failure in result.failures) or "verified")
    return "\n\n".join(parts)


def inspect_text(file: GgufFile) -> str:
    """A file's tensors with types, bytes and bits per weight, its calibration, and the codebooks of AAAC tensors."""
    rows = []
    for name, t in file.tensors.items():
        shape = tuple(int(n) for n in reversed(t.shape))
        rows.append(
            (name, shape_text(shape), t.tensor_type.name, f"{t.n_bytes:,}", f"{8 * t.n_bytes / t.n_elements:.4g}")
        )
    if not rows:
        raise AaacError(f"{file.path}: has no tensors; give a model's file")
    n_bytes, n_weights = (
        sum(t.n_bytes for t in file.tensors.values()),
        sum(tensor_bytes(t.shape, T.I8) for t in file.tensors.values()),
    )
    parts = [table(("tensor", "shape", "type", "bytes", "bits per weight"), rows)]
    for name, codec in file.codecs.items():
        books = "\n".join(f"  {' '.join(f'{int(level):4}' for level in book)}" for book in codec.codebooks)
        parts.append(f"{name}: scale base {codec.scale_base:.6g}, {codec.scale_mantissa_bits} mantissa bits\n{books}")
    parts += [f"{key}: {file.get(key)}" for key in (fmt.KEY_QUANTIZER, fmt.KEY_CALIBRATION) if file.get(key)]
    parts.append(
        f"{len(rows)} tensors, {n_bytes:,} bytes, {8 * n_bytes / n_weights:.3f} bits per weight; file {file.n_bytes:,} bytes"
    )
    return "\n\n".join(parts)


def comparison_text(result: Comparison) -> str:
    """The tables of a comparison: what was made, then the scores on each text."""
    return "\n\n".join(
        [table(*files_table(result)), *(f"{name}\n{table(*scores_table(result, name))}" for name in result.texts)]
    )


def files_table(result: Comparison) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Heading and rows: size, time and speed of every file."""
    header = ("type", "bytes", "bits per weight", "quantized in", "prompt tokens/s", "generated tokens/s")
    rows: list[Sequence[str]] = [(result.full_type, f"{result.full_bytes:,}", "", "", "", "")]
    for r in result.rows:
        speed = [f"{s[0]:.1f} ± {s[1]:.1f}" if s else "" for s in (r.prompt_speed, r.generation_speed)]
        rows.append(
            (
                r.name,
                f"{r.n_bytes:,}",
                f"{r.bits_per_weight:.3f}",
                "" if r.seconds is None else f"{r.seconds:.1f} s",
                *speed,
            )
        )
    return header, rows


def scores_table(result: Comparison, text_name: str) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Heading and rows: perplexity and KL divergence (nats) from the full model on one text."""
    header = ("type", "perplexity", "mean KL divergence", "99.9 %", "maximum", "RMS Δp", "same top token")
    perplexity = "{:.3f} ± {:.3f}"
    rows: list[Sequence[str]] = [
        (result.full_type, perplexity.format(*result.perplexities[text_name]), "", "", "", "", "")
    ]
    for r in result.rows:
        s = r.scores[text_name]
        divergence = f"{s.mean_kld:.5f} ± {s.mean_kld_error:.5f}", f"{s.kld_999:.4f}", f"{s.max_kld:.4f}"
        rows.append(
            (
                r.name,
                perplexity.format(s.perplexity, s.perplexity_error),
                *divergence,
                f"{s.rms_delta_p:.2f} %",
                f"{s.same_top:.2f} %",
            )
        )
    return header, rows


def plot_codebooks(file: GgufFile, out: Path) -> None:
    """Draw each AAAC tensor's two codebooks as two rows of ticks."""
    if not file.codecs:
        raise AaacError(f"{file.path}: has no AAAC tensors, nothing to plot")
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise AaacError("--plot: needs matplotlib; pip install 'aaac-gguf[plot]'") from None
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.28 * len(file.codecs)), layout="constrained")
    for row, codec in enumerate(file.codecs.values()):
        for book, colour, offset in zip(codec.codebooks, ("tab:blue", "tab:orange"), (-0.18, 0.18), strict=True):
            axes.plot(book, [row + offset] * fmt.N_LEVELS, "|", color=colour, markersize=7, markeredgewidth=1.6)
    axes.set_yticks(range(len(file.codecs)), list(file.codecs), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("level (int8), first codebook blue, second orange")
    axes.set_title(f"{file.path.name}: learned codebooks")
    try:
        with atomic(out) as f:
            figure.savefig(f, dpi=120, format=out.suffix[1:] or "png")
    except ValueError as e:
        raise AaacError(f"--plot {e}") from None
    plt.close(figure)
