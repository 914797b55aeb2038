"""Quantize a model to several types and measure each file against the full model.

    python compare_types.py [MODEL] [-o FOLDER] [--types LIST] [--text FILE] [--calibration TEXT]

Needs `aaac-gguf llama build` once. The default is the model and the text that ship with aaac-gguf.
FOLDER gets the files, comparison.json and comparison.html, a page with plots.
"""

import argparse
from pathlib import Path

import aaac_gguf as aaac
from aaac_gguf.resources import MODEL, SAMPLE_TEXT

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default=MODEL)
parser.add_argument("-o", "--output", type=Path, default=Path("comparison"))
parser.add_argument("--types", default="AAAC4_G16,IQ4_NL")
parser.add_argument("--text", type=Path, default=SAMPLE_TEXT)
parser.add_argument("--calibration", help="a text file, 'bundled', 'self' (the model writes it) or 'none'")
args = parser.parse_args()

types = args.types.split(",")
comparison = aaac.compare(args.model, args.output, types=types, texts=[args.text], calibration=args.calibration)

# One row for each file, with its scores on each text.
print(f"{'type':12} {'bytes':>12} {'mean KLD':>10} {'same top token':>15}")
for row in comparison.rows:
    score = row.scores[args.text.name]
    print(f"{row.name:12} {row.n_bytes:12,} {score.mean_kld:10.5f} {score.same_top:13.2f} %")
print(f"plots: {args.output / 'comparison.html'}")
