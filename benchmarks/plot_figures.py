"""Draw the figures of README and docs/ from committed results and from the bundled model.

    python benchmarks/plot_figures.py [FOLDER]

writes to FOLDER (docs/images by default):

    quality.svg   mean KL divergence against file size, from the tables of real models in docs/results.md
    speed.svg     tokens per second on a CPU, from benchmarks/results/cpu.json
    block.svg     16 weights of the bundled model, the two codebooks of their matrix, and the bytes of their block

The files hold a style for light and one for dark backgrounds, and the same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

import numpy as np
from safetensors import safe_open

import aaac_gguf as aaac
from aaac_gguf.files import format as fmt
from aaac_gguf.resources import MODEL

ROOT = Path(__file__).parents[1]

STYLE = """
text { font: 13px system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px } .small { font-size: 11.5px } .dim { fill: #59636e }
.middle { text-anchor: middle } .end { text-anchor: end }
.mono { font-family: ui-monospace, Menlo, Consolas, monospace }
.card { fill: #ffffff; stroke: #d1d9e0 } .cell { fill: #f6f8fa; stroke: #d1d9e0 }
.grid { stroke: #e4e8ec } .axis { stroke: #818b98 } .line { fill: none; stroke-width: 2 } .bar { stroke-width: 1.5 }
.a { color: #0969da } .b { color: #bc4c00 } .c { color: #59636e } .d { color: #1a7f37 }
.dot { fill: currentColor } .stroke { stroke: currentColor } .label { fill: currentColor; font-weight: 600 }
.soft { fill: currentColor; fill-opacity: .14; stroke: currentColor }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc } .dim { fill: #9198a1 }
  .card { fill: #0d1117; stroke: #3d444d } .cell { fill: #151b23; stroke: #3d444d }
  .grid { stroke: #262c36 } .axis { stroke: #656c76 }
  .a { color: #58a6ff } .b { color: #f0883e } .c { color: #9198a1 } .d { color: #3fb950 }
  .label { fill: currentColor }
}
"""


class Drawing:
    """An SVG file with lines, dots, boxes and text. Colours come from the classes of STYLE."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
        ]
        self.box(0.5, 0.5, width - 1, height - 1, "card", radius=8)

    def text(self, x: float, y: float, text: str, classes: str = "") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}">{escape(text)}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float, classes: str = "axis") -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{classes}"/>')

    def dot(self, x: float, y: float, classes: str, radius: float = 4.5) -> None:
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="dot {classes}"/>')

    def box(self, x: float, y: float, width: float, height: float, classes: str, radius: float = 3) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" class="{classes}"/>'
        )

    def write(self, path: Path) -> None:
        path.write_text("\n".join([*self.parts, "</svg>"]) + "\n", encoding="utf-8")


# Label, class, and the rows of a table that belong to it.
SERIES = [
    ("llama.cpp types, importance matrix", "c", r"I?Q\d\w+"),
    ("AAAC4_G16, GGUF and importance matrix", "b", r"`AAAC4_G16`, GGUF and importance matrix"),
    ("AAAC4_G16, calibrated in the model (the default)", "a", r"`AAAC4_G16`, the default"),
]


@dataclass(frozen=True)
class Point:
    """A file in the figure: its row's name, its size in bytes, and the geometric mean of its divergences."""

    name: str
    n_bytes: int
    divergence: float


def read_tables(document: str) -> dict[str, list[Point]]:
    """Return by model the rows of the tables of results.md that give bytes and mean KL divergences of several texts."""
    models: dict[str, list[Point]] = {}
    model, inside = "", False
    for line in document.splitlines():
        if heading := re.match(r"#+ (?:A real checkpoint: )?([\w.-]+-[\d.]+[MB])$", line):
            model = heading[1]
        elif line.startswith("## "):
            model = ""
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        if cells[:2] == ["mean KL divergence", "bytes"]:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif model and inside and len(cells) > 2 and cells[1].replace(",", "").isdigit():
            values = [float(cell.split()[0]) for cell in cells[2:]]
            mean = math.exp(sum(map(math.log, values)) / len(values))
            models.setdefault(model, []).append(Point(cells[0], int(cells[1].replace(",", "")), mean))
    return models


def draw_quality(document: Path, out: Path) -> None:
    """Draw the divergence of each file against its size, one panel per model."""
    models = read_tables(document.read_text(encoding="utf-8"))
    drawing = Drawing(860, 400, "Mean KL divergence against file size")
    drawing.text(24, 30, "Quality against size, real models", "title")
    subtitle = "mean KL divergence from the full model, geometric mean over texts that chose nothing; lower is better"
    drawing.text(24, 48, subtitle, "small dim")
    low, high = math.log10(0.005), math.log10(0.25)
    ticks, gap = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2), 24
    width = (860 - 70 - 20 - gap * (len(models) - 1)) / len(models)
    top, bottom = 84, 310
    for panel, (model, points) in enumerate(models.items()):
        left = 70 + (width + gap) * panel
        sizes = [point.n_bytes for point in points]
        first, last = min(sizes), max(sizes)

        def x(n_bytes: int, left: float = left, first: int = first, last: int = last) -> float:
            return left + (0.08 + 0.7 * (n_bytes - first) / (last - first)) * width

        def y(divergence: float) -> float:
            return bottom - (math.log10(divergence) - low) / (high - low) * (bottom - top)

        drawing.text(left + width / 2, top - 10, model, "middle")
        for tick in ticks:
            drawing.line(left, y(tick), left + width, y(tick), "grid")
            if panel == 0:
                drawing.text(left - 8, y(tick) + 4, f"{tick:g}", "small dim end")
        drawing.line(left, bottom, left + width, bottom)
        for n_bytes in (first, last):
            drawing.line(x(n_bytes), bottom, x(n_bytes), bottom + 4)
            drawing.text(x(n_bytes), bottom + 18, f"{n_bytes / 1e6:.0f}", "small dim middle")
        drawing.text(left + width / 2, bottom + 36, "megabytes", "small dim middle")
        for _, colour, names in SERIES:
            for point in points:
                if re.fullmatch(names, point.name):
                    drawing.dot(x(point.n_bytes), y(point.divergence), colour)
                    if colour == "c":
                        shift, anchor = (-8, " end") if point.name == "Q5_K_S" else (8, "")  # Q5_K_M is near
                        place = x(point.n_bytes) + shift, y(point.divergence) + 4
                        drawing.text(*place, point.name, f"small dim{anchor}")
    for (label, colour, _), left in zip(SERIES, (24, 270, 548), strict=True):
        drawing.dot(left + 5, 376, colour)
        drawing.text(left + 16, 380, label, "small")
    drawing.write(out)


def draw_block(out: Path) -> None:
    """Draw how 16 weights of the bundled model are stored: the two codebooks, the better one, and the bytes."""
    with safe_open(MODEL / "model.safetensors", "pt") as file:  # NumPy has no bfloat16
        weight = file.get_tensor("model.layers.1.self_attn.o_proj.weight").float().numpy()
    quantized = aaac.quantize_tensor(weight, "AAAC4_G16")
    codec = quantized.codec
    assert codec
    indices, selectors, codes = fmt.unpack(fmt.G16, quantized.data)
    row, group = 0, 5
    span = slice(16 * group, 16 * group + 16)
    scale = float(codec.scales()[codes[row, group]])
    scaled = weight[row, span] / scale
    chosen = int(selectors[row, group])

    drawing = Drawing(860, 470, "Two codebooks, one bit")
    drawing.text(24, 30, "Two codebooks, one bit", "title")
    subtitle = "16 weights of the bundled model, divided by their scale, on the two codebooks of their matrix"
    drawing.text(24, 48, subtitle, "small dim")

    def x(value: float) -> float:
        return 150 + (value + 127) / 254 * 590

    for number in (0, 1):
        y = 100 + 84 * number
        levels = codec.codebooks[number].astype(float)
        nearest = levels[np.abs(scaled[:, None] - levels).argmin(1)]
        error = float(np.square(scale * (scaled - nearest)).sum() / np.square(scale * scaled).sum())
        colour = "a" if number == chosen else "c"
        drawing.text(24, y - 2, f"codebook {number}", f"label {colour}")
        drawing.text(24, y + 16, f"error {error:.5f}" + (", less" if number == chosen else ""), "small dim")
        drawing.line(x(-127), y, x(127), y)
        for level in levels:
            drawing.line(x(level), y - 7, x(level), y + 7, f"bar stroke {colour}")
        for value, level in zip(scaled, nearest, strict=True):
            drawing.dot(x(float(value)), y - 18, colour, 3)
            drawing.line(x(float(value)), y - 15, x(float(level)), y - 8, f"stroke {colour}")
        for edge in (levels[0], levels[-1]):
            drawing.text(x(edge), y + 22, f"{edge:g}", "small dim middle")
        if number == chosen:
            drawing.text(836, y + 4, f"selector {number}", f"label end {colour}")

    drawing.text(24, 258, "A block of AAAC4_G16: 36 bytes for 64 weights, 4.5 bits per weight", "title")
    left, top = 24, 276
    for j in range(4):
        drawing.box(left + 62 * j, top, 60, 30, "soft a" if j == 1 else "cell")
        drawing.text(left + 62 * j + 30, top + 20, f"s[{j}]", "mono small middle")
    drawing.box(left + 254, top, 558, 30, "cell")
    drawing.text(left + 533, top + 20, "qs[0] ... qs[31]: two indices of 4 bits in each byte", "mono small middle")

    top = 352
    drawing.line(left + 62, 308, left, top - 4)
    drawing.line(left + 122, 308, left + 328, top - 4)
    for bit in range(8):
        classes = "soft a" if bit == 0 else "cell"
        drawing.box(left + 41 * bit, top, 40, 30, classes)
        value = chosen if bit == 0 else int(codes[row, group]) >> (7 - bit) & 1
        drawing.text(left + 41 * bit + 20, top + 20, str(value), "mono middle")
    drawing.text(left + 20, top + 48, "selector", "small label middle a")
    drawing.text(left + 41 + 143, top + 48, f"scale code {codes[row, group]} of 7 bits", "small dim middle")
    drawing.line(left + 254, 308, 440, top - 4)
    drawing.line(left + 290, 308, 522, top - 4)
    low, high = indices[row, 64 * (group // 4)], indices[row, 64 * (group // 4) + 32]
    for part, (index, label) in enumerate(((high, "weight 32"), (low, "weight 0"))):
        drawing.box(440 + 164 * part, top, 162, 30, "cell")
        drawing.text(440 + 164 * part + 81, top + 20, f"{index:04b}", "mono middle")
        drawing.text(440 + 164 * part + 81, top + 48, f"index of {label}", "small dim middle")
    drawing.text(24, 434, "weight = scale(scale code) * codebook[selector][index]", "mono small")
    note = "The scale is never negative, so its sign bit is free: the choice between the codebooks costs no space."
    drawing.text(24, 454, note, "small dim")
    drawing.write(out)


def draw_speed(results: Path, out: Path) -> None:
    """Draw the median tokens per second of each type on a CPU with two threads, and the range of the measurements."""
    content = json.loads(results.read_text(encoding="utf-8"))
    types = ("AAAC4_G16", "AAAC4_G32", "AAAC4_G128", "Q4_0", "IQ4_NL", "Q4_K_S", "IQ4_XS")
    tests = {"pp512": ("prompt of 512 tokens", 140), "tg64": ("generation of 64 tokens", 32)}
    drawing = Drawing(860, 296, "Tokens per second on a CPU")
    drawing.text(24, 30, f"Tokens per second, Llama 1B shape, {content['processor']}", "title")
    drawing.text(24, 48, "two threads; the bar is the median, the line is the range of the measurements", "small dim")
    for panel, (test, (title, most)) in enumerate(tests.items()):
        left, width = 120 + 370 * panel, 310
        drawing.text(left, 78, title)
        for number, name in enumerate(types):
            values = [
                run["tokens_per_second"][test]
                for run in content["runs"]
                if (run["shape"], run["threads"], run["type"]) == ("1b", 2, name) and test in run["tokens_per_second"]
            ]
            y, colour = 90 + 27 * number, "a" if name.startswith("AAAC") else "c"
            if panel == 0:
                drawing.text(left - 8, y + 14, name, f"small label end {colour}")
            drawing.box(left, y, median(values) / most * width, 18, f"soft {colour}")
            drawing.line(left + min(values) / most * width, y + 9, left + max(values) / most * width, y + 9, "axis")
            drawing.text(left + max(values) / most * width + 8, y + 14, f"{median(values):.1f}", "small")
    drawing.write(out)


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    draw_quality(ROOT / "docs" / "results.md", folder / "quality.svg")
    draw_speed(ROOT / "benchmarks" / "results" / "cpu.json", folder / "speed.svg")
    draw_block(folder / "block.svg")


if __name__ == "__main__":
    main()
