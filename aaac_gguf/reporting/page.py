"""Show a comparison as one HTML page that needs no other file: tables, and plots as inline SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from . import tables
from .results import Comparison, Row

STYLE = """
:root { color-scheme: light dark;
  --bg: #ffffff; --card: #f6f7f9; --text: #1c2330; --faint: #667085; --line: #d9dde4;
  --c0: #0062b8; --c1: #c4500a; --c2: #007d58; --c3: #a8488a; --c4: #8a6a00; --c5: #2a8fb8;
  --c6: #b0303c; --c7: #6b7280;
}
@media (prefers-color-scheme: dark) { :root {
  --bg: #14171c; --card: #1d2129; --text: #e7eaf0; --faint: #98a2b3; --line: #363c48;
  --c0: #5aa9ff; --c1: #ff9a57; --c2: #3ecf9c; --c3: #e58ac6; --c4: #e0bb3c; --c5: #7cd0f2;
  --c6: #ff7a85; --c7: #a3abb8;
} }
body { background: var(--bg); color: var(--text); font: 15px/1.5 system-ui, sans-serif;
  max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 36px 0 8px; }
p { margin: 4px 0 12px; }
.faint { color: var(--faint); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
.card { background: var(--card); border-radius: 8px; padding: 10px 12px; margin: 10px 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 10px; }
.grid .card { margin: 0; }
.card h3 { font-size: 13px; margin: 0 0 2px; font-weight: 600; }
.legend span { margin-right: 16px; white-space: nowrap; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 6px; margin-right: 5px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--faint); font: 11px system-ui, sans-serif; }
svg .grid-line { stroke: var(--line); stroke-width: 1; }
svg .label { fill: var(--text); font-size: 12px; }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
code { font-size: 12px; overflow-wrap: anywhere; }
"""

N_COLOURS = 8


def render(result: Comparison) -> str:
    """Return the page of a comparison."""
    rows = result.rows
    full = f"Against the {escape(result.full_type)} model of {result.full_bytes:,} bytes."
    parts = [
        f"<h1>{escape(result.model)}: quantized types side by side</h1>",
        _note(f"{full} KL divergence in nats per token. The KV cache is F16 where a column names no other type."),
        _legend([row.name for row in rows]),
    ]
    for text in result.texts:
        parts += [
            f"<h2>Divergence from the full model on {escape(text)}</h2>",
            f'<div class="card">{scatter(rows, text)}</div>',
            _table(*tables.scores_table(result, text)),
        ]
    parts += [
        "<h2>Size, time and speed</h2>",
        _table(*tables.files_table(result)),
        _note(
            "Quantizing time includes calibration, whose sweeps all types of aaac-gguf share. "
            "Speed by llama-bench: a prompt of 512 tokens, and 128 tokens generated. It is the median of three rounds "
            "in which the files take turns."
        ),
        "<h2>Error of each tensor</h2>",
        _tensor_errors(rows),
    ]
    learned = [row for row in rows if row.codebooks]
    if learned:
        parts.append("<h2>Learned codebooks</h2>")
        parts.append(_note("The 16 levels of both codebooks of every matrix, from -127 to 127."))
    for row in learned:
        is_open = " open" if row is learned[0] else ""
        plot = f'<div class="card">{_codebooks(row)}</div>'
        parts.append(f"<details{is_open}><summary>{escape(row.name)}</summary>{plot}</details>")
    parts += ["<h2>How it was made</h2>", _settings(result)]
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{meta}<title>{escape(result.model)}: quantized types</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _settings(result: Comparison) -> str:
    """Return the settings, and the sha256 of the texts, as a list."""
    n_chunks, n_ctx = result.settings["n_chunks"], result.settings["n_ctx"]
    how = f"Up to {n_chunks} chunks of {n_ctx} tokens of each text, scored on the second half of a chunk."
    facts = [*result.settings.items(), *((f"sha256 of {name}", digest) for name, digest in result.texts.items())]
    items = "".join(f"<li>{escape(str(key))}: <code>{escape(str(value))}</code></li>" for key, value in facts)
    return f"<p>{how}</p><ul>{items}</ul>"


def _note(html: str) -> str:
    return f'<p class="faint">{html}</p>'


def _colour(i: int) -> str:
    return f"var(--c{i % N_COLOURS})"


def _legend(names: Sequence[str]) -> str:
    items = (f'<span><i style="background:{_colour(i)}"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<p class="legend">{"".join(items)}</p>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def log_axis(values: Iterable[float], top: float, bottom: float) -> tuple[Callable[[float], float], list[float]]:
    """Return a logarithmic scale, which gives a value's height between `bottom` and `top`, and its ticks.

    Ticks are at 1, 2 and 5 times powers of ten. The first and the last of them enclose all values.
    """
    positive = [v for v in values if v > 0] or [1.0]
    steps = [m * 10.0**e for e in range(-12, 7) for m in (1, 2, 5)]
    low = max((s for s in steps if s <= min(positive)), default=steps[0])
    high = min((s for s in steps if s >= max(positive) and s > low), default=steps[-1])
    ticks = [s for s in steps if low <= s <= high]
    if len(ticks) > 7:
        ticks = [low, *(t for t in ticks[1:-1] if f"{t:e}".startswith("1.")), high]
    scale = (bottom - top) / math.log(high / low)
    return lambda v: bottom - scale * math.log(max(v, low) / low), ticks


def scatter(rows: Sequence[Row], text: str) -> str:
    """Return a plot of mean KL divergence, with its standard error, against file size.

    Labels that would overlap are moved apart.
    """
    width, height, left, right, top, bottom = 960, 380, 70, 130, 14, 334
    scores = [row.scores[text] for row in rows]
    ends = [v for s in scores for v in (s.mean_kld - s.mean_kld_error, s.mean_kld + s.mean_kld_error)]
    y, y_ticks = log_axis(ends, top, bottom)
    sizes = [row.n_bytes for row in rows]
    margin = 0.06 * (max(sizes) - min(sizes)) or 0.05 * max(sizes)
    low, high = min(sizes) - margin, max(sizes) + margin

    def x(size: float) -> float:
        return left + (width - left - right) * (size - low) / (high - low)

    parts = [_grid_line(left, y(t), width - right, y(t)) + _text(left - 8, y(t) + 4, f"{t:g}", "end") for t in y_ticks]
    unit, name = (1e9, "GB") if max(sizes) >= 1e9 else (1e6, "MB")
    step = 10 ** math.floor(math.log10((high - low) / unit / 3)) * unit
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 8)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        parts.append(
            _grid_line(x(i * step), top, x(i * step), bottom) + _text(x(i * step), bottom + 18, f"{i * step / unit:g}")
        )
    parts.append(_text((left + width - right) / 2, height - 8, f"file size, {name}"))
    turned = f'transform="translate(16 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>mean KL divergence (less is better)</text>")
    placed: list[tuple[float, float]] = []
    for i in sorted(range(len(rows)), key=lambda i: scores[i].mean_kld, reverse=True):
        row, s, px, py = rows[i], scores[i], x(rows[i].n_bytes), y(scores[i].mean_kld)
        label = py + 4
        while any(abs(px - qx) < 110 and abs(label - qy) < 14 for qx, qy in placed):
            label += 1
        placed.append((px, label))
        bar = f"M{px:.1f} {y(s.mean_kld - s.mean_kld_error):.1f}V{y(s.mean_kld + s.mean_kld_error):.1f}"
        size = f"{row.n_bytes:,} bytes, {row.bits_per_weight:.3f} bits per weight"
        tip = f"{row.name}: {size}, {s.mean_kld:.5f} ± {s.mean_kld_error:.5f}"
        parts.append(f'<g><path d="{bar}" stroke="{_colour(i)}" stroke-width="2"/>')
        parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="6" fill="{_colour(i)}"/><title>{escape(tip)}</title></g>')
        parts.append(f'<text class="label" x="{px + 11:.1f}" y="{label:.1f}">{escape(row.name)}</text>')
    return _svg(width, height, parts)


def _tensor_errors(rows: Sequence[Row]) -> str:
    """Return one small plot for each kind of tensor: relative squared error by layer, all on one scale."""
    kinds: dict[str, list[dict[int, float]]] = {}  # for each kind and row: error by layer
    for i, row in enumerate(rows):
        for tensor, error in row.tensor_errors.items():
            block = re.match(r"blk\.(\d+)\.(.+)", tensor)
            kind, layer = (block[2], int(block[1])) if block else (tensor, 0)
            kinds.setdefault(kind.removesuffix(".weight"), [{} for _ in rows])[i][layer] = error
    width, height, left, top, bottom = 300, 170, 48, 8, 140
    y, ticks = log_axis([v for lines in kinds.values() for line in lines for v in line.values()], top, bottom)
    cards = []
    for kind, lines in kinds.items():
        layers = sorted({layer for line in lines for layer in line})
        x = _positions(layers, left + 12, width - 12)
        parts = [_grid_line(left, y(t), width, y(t)) + _text(left - 6, y(t) + 4, f"{t:g}", "end") for t in ticks]
        shown = layers if len(layers) <= 8 else [layers[0], layers[len(layers) // 2], layers[-1]]
        parts += [_text(x[layer], bottom + 18, str(layer)) for layer in shown if len(layers) > 1]
        for i, line in enumerate(lines):
            points = " ".join(f"{x[layer]:.1f},{y(error):.1f}" for layer, error in sorted(line.items()))
            stroke = f'fill="none" stroke="{_colour(i)}" stroke-width="1.2" opacity="0.6"'
            parts.append(f'<polyline points="{points}" {stroke}/>')
            for layer, error in line.items():
                place = f", layer {layer}" if len(layers) > 1 else ""
                tip = f"<title>{escape(rows[i].name)}{place}: {error:.6f}</title>"
                circle = f'cx="{x[layer]:.1f}" cy="{y(error):.1f}" r="3" fill="{_colour(i)}"'
                parts.append(f"<circle {circle}>{tip}</circle>")
        cards.append(f'<div class="card"><h3>{escape(kind)}</h3>{_svg(width, height, parts)}</div>')
    note = _note(
        "Relative squared error of the weights, by layer. "
        "Error feedback spends more of it where the layer's output does not notice."
    )
    return f'{note}<div class="grid">{"".join(cards)}</div>'


def _positions(layers: Sequence[int], left: float, right: float) -> Mapping[int, float]:
    """Return the horizontal place of each layer."""
    span = max(len(layers) - 1, 1)
    return {layer: left + (right - left) * (i / span if len(layers) > 1 else 0.5) for i, layer in enumerate(layers)}


def _codebooks(row: Row) -> str:
    """Return a plot of two rows of ticks for each tensor."""
    width, left, pitch = 960, 190, 20
    height = pitch * len(row.codebooks) + 26

    def x(level: float) -> float:
        return left + (width - left - 14) * (level + 127) / 254

    parts = [_grid_line(x(v), 0, x(v), height - 24) + _text(x(v), height - 8, str(v)) for v in (-127, -64, 0, 64, 127)]
    for i, (tensor, books) in enumerate(row.codebooks.items()):
        parts.append(_text(left - 12, i * pitch + 13, tensor.removesuffix(".weight"), "end"))
        for j, book in enumerate(books):
            ticks = "".join(f"M{x(level):.1f} {i * pitch + 2 + 8 * j}v7" for level in book)
            parts.append(f'<path d="{ticks}" stroke="{_colour(j)}" stroke-width="2"/>')
    return _svg(width, height, parts)


def _svg(width: float, height: float, parts: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _grid_line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid-line" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, content: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'
