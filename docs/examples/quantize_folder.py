"""Quantize a Hugging Face folder and look at the result.

    python quantize_folder.py [MODEL] [-o OUT.gguf] [--type TYPE] [--calibration TEXT] [--sequences N]

MODEL is a folder, OWNER/NAME of the Hugging Face Hub, or a GGUF file.
The default is the model that ships with aaac-gguf.
"""

import argparse
from pathlib import Path

import aaac_gguf as aaac
from aaac_gguf.resources import MODEL

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", default=MODEL)
parser.add_argument("-o", "--output", type=Path, default=Path("model.gguf"))
parser.add_argument("--type", default="AAAC4_G16")
parser.add_argument("--calibration", default="bundled", help="a text file, 'bundled', 'self' or 'none'")
parser.add_argument("--sequences", type=int, default=64, help="fewer are faster and less exact")
args = parser.parse_args()

report = aaac.quantize(args.model, args.output, type=args.type, calibration=args.calibration, sequences=args.sequences)
print(f"{report.files[0]}: {report.n_bytes:,} bytes in {report.seconds:.0f} s")

# Errors are relative: sum (w - q)^2 / sum w^2. The weighted error counts what the error does to the matrix's outputs.
for tensor in report.tensors[:4]:
    print(f"{tensor.plan.name:24} {tensor.plan.type.name:10} {tensor.relative_error:.5f} {tensor.weighted_error:.6f}")

# A file is a mapping from tensor names to decoded weights, float32.
model = aaac.load(args.output)
weight = model["blk.0.attn_q.weight"]
print(f"blk.0.attn_q.weight: {weight.dtype} {weight.shape}, first weights {weight[0, :4]}")
