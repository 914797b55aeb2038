"""Quantize one matrix, without a model and without a file.

    python quantize_tensor.py [WEIGHT.npy] [--importance IMPORTANCE.npy] [--type TYPE]

WEIGHT is float32 [N, K], K a multiple of 64. IMPORTANCE is float32 [K]: the mean square of each input.
The default is a matrix of the model that ships with aaac-gguf, with inputs drawn at random.
"""

import argparse

import numpy as np
from safetensors import safe_open

import aaac_gguf as aaac
from aaac_gguf.resources import MODEL

parser = argparse.ArgumentParser()
parser.add_argument("weight", nargs="?")
parser.add_argument("--importance")
parser.add_argument("--type", default="AAAC4_G16")
args = parser.parse_args()

if args.weight:
    weight = np.load(args.weight).astype(np.float32)
else:
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.down_proj.weight").float().numpy()

# The inputs x of the matrix, which a real calibration observes. Here: 2048 vectors, with correlated channels of unequal
# size.
n_per_row = weight.shape[1]
rng = np.random.default_rng(0)
mixing = rng.normal(size=(n_per_row // 4, n_per_row)) * rng.lognormal(size=n_per_row)
x = (rng.normal(size=(2048, n_per_row // 4)) @ mixing + rng.normal(size=(2048, n_per_row))).astype(np.float32)
hessian = x.T @ x / len(x)  # mean of x x^T, [K, K]
importance = np.load(args.importance) if args.importance else hessian.diagonal().copy()  # mean of x^2, [K]


def report(name: str, quantized) -> None:
    decoded = quantized.dequantize()  # float32 [N, K]
    of_outputs = np.square(x @ (weight - decoded).T).sum() / np.square(x @ weight.T).sum()
    print(f"{name:26} weights {quantized.relative_error:.5f}   outputs {of_outputs:.5f}")


print(f"{args.type}, relative squared errors")
report("the weights alone", aaac.quantize_tensor(weight, args.type))
report("with importance", aaac.quantize_tensor(weight, args.type, importance=importance))
if not args.importance:
    # With the hessian, later columns make up for the errors of earlier ones.
    # The weights become less exact and the outputs more exact.
    report("with the hessian", aaac.quantize_tensor(weight, args.type, hessian=hessian))

quantized = aaac.quantize_tensor(weight, args.type)
print(f"{quantized.data.nbytes:,} bytes, {8 * quantized.data.nbytes / weight.size:.3f} bits per weight")
if quantized.codec:  # AAAC types only
    print(f"codebooks:\n{quantized.codec.codebooks}")
