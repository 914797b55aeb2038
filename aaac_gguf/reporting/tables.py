"""Print results as text: tables of a comparison and of a verification."""

from __future__ import annotations

from collections.abc import Sequence

from ..llama.evaluate import Score
from .results import Comparison, Row, Verification


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text. The first column is aligned left, the others right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        for row in (header, *rows)
    ]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * w for w in widths], *lines[1:]])


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape such as "512 x 128"."""
    return " x ".join(str(int(n)) for n in shape)


def verification_text(result: Verification) -> str:
    """Return the tensors' errors, the comparison of the logits, and the verdict."""
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
    if result.n_texts:
        agreement = f"least cosine of embeddings {result.cosine:.6f}; mean with the full model {result.full_cosine:.6f}"
        parts.append(f"patched llama.cpp against {result.reference}, {result.n_texts} texts: {agreement}")
    parts.append("\n".join(f"FAILED: {failure}" for failure in result.failures) or "verified")
    return "\n\n".join(parts)


def comparison_text(result: Comparison) -> str:
    """Return the table of the files, then a table of the scores on each text."""
    return "\n\n".join(
        [table(*files_table(result)), *(f"{name}\n{table(*scores_table(result, name))}" for name in result.texts)]
    )


def files_table(result: Comparison) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return header and rows: size, time and speed of every file."""
    header = ("type", "bytes", "bits per weight", "quantized in", "prompt tokens/s", "generated tokens/s")
    rows: list[Sequence[str]] = [(result.full_type, f"{result.full_bytes:,}", "", "", "", "")]
    for r in result.rows:
        seconds = "" if r.seconds is None else f"{r.seconds:.1f} s"
        speed = [f"{s[0]:.1f} ± {s[1]:.1f}" if s else "" for s in (r.prompt_speed, r.generation_speed)]
        rows.append((r.name, f"{r.n_bytes:,}", f"{r.bits_per_weight:.3f}", seconds, *speed))
    return header, rows


def scores_table(result: Comparison, text_name: str) -> tuple[Sequence[str], list[Sequence[str]]]:
    """Return header and rows: perplexity, and KL divergence (nats) from the full model, on one text.

    The mean divergence with each other type of the KV cache comes last.
    """
    caches = list(result.cache_scores.get(text_name, {}))
    header = ("type", "perplexity", "mean KL divergence", "99.9 %", "maximum", "RMS Δp", "same top token")
    perplexity = "{:.3f} ± {:.3f}"

    def with_caches(of_file: Row | Comparison) -> list[str]:
        scores = of_file.cache_scores.get(text_name, {})
        return [_divergence(scores[name]) if name in scores else "" for name in caches]

    full = result.full_type, perplexity.format(*result.perplexities[text_name]), "", "", "", "", ""
    rows: list[Sequence[str]] = [(*full, *with_caches(result))]
    for r in result.rows:
        s = r.scores[text_name]
        divergence = _divergence(s), f"{s.kld_999:.4f}", f"{s.max_kld:.4f}"
        agreement = f"{s.rms_delta_p:.2f} %", f"{s.same_top:.2f} %"
        of_row = r.name, perplexity.format(s.perplexity, s.perplexity_error), *divergence, *agreement
        rows.append((*of_row, *with_caches(r)))
    return (*header, *(f"{name} cache" for name in caches)), rows


def _divergence(score: Score) -> str:
    return f"{score.mean_kld:.5f} ± {score.mean_kld_error:.5f}"
