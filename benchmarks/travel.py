"""Measure how far a calibration travels: the error that matrices quantized on one text have on another.

    python benchmarks/travel.py MODEL --calib mixture.jsonl --calib novel.txt --test web.txt --test wiki.txt

For some decoder blocks, and without the drift of the blocks before them: every matrix is quantized under the moments of
each calibration text, random sequences included, and its error tr(O D H D^T) / tr(O W H W^T) is taken under the moments
of each test text. Printed are geometric means over the matrices. MODEL is a Hugging Face folder.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from aaac_gguf.calibration.activations import Activations, Squares
from aaac_gguf.calibration.sequential import BlockMoments
from aaac_gguf.calibration.tokens import text_tokens, with_random
from aaac_gguf.conversion.settings import parse_type
from aaac_gguf.files.gguf import GgufFile
from aaac_gguf.models import checkpoint
from aaac_gguf.models.blocks import Blocks
from aaac_gguf.models.source import full_precision
from aaac_gguf.models.weights import load_weight
from aaac_gguf.quantizer.moments import Moments, output_error
from aaac_gguf.quantizer.quantize import quantize

CONTEXT = 512


def moments(model: Any, file: GgufFile, names: list[str], tokens: Tensor, random: bool) -> dict[str, Moments]:
    """Return the moments of the tensors `names` in the full model, over the sequences `tokens` int64 [n, T].

    random: with random sequences beside them, as in a conversion.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    sequences = with_random(tokens, vocabulary) if random else tokens
    with tempfile.TemporaryDirectory() as folder:
        activations = Activations(Blocks(model, tokens[:1]), sequences, len(tokens), Path(folder))
        activations.run(Squares())
        walk = BlockMoments(activations, file, names, Path(folder), seed=1)
        found = {name: walk.moments(name) for name in sorted(names, key=walk.places.__getitem__)}
    return {name: seen for name, seen in found.items() if seen and seen.outputs is not None}


def relative_error(weight: Tensor, difference: Tensor, seen: Moments) -> float:
    return output_error(difference, seen.inputs, seen.outputs) / output_error(weight, seen.inputs, seen.outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, action="append", required=True)
    parser.add_argument("--test", type=Path, action="append", required=True)
    parser.add_argument("--type", default="AAAC4_G16")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 14], help="of these decoder blocks (default 3 14)")
    parser.add_argument("--calib-sequences", type=int, default=32)
    parser.add_argument("--test-sequences", type=int, default=16)
    args = parser.parse_args()
    ggml_type: T = parse_type(args.type, "type")

    model = checkpoint.load_model(args.model)
    with tempfile.TemporaryDirectory() as folder, full_precision(args.model, Path(folder)) as file:
        blocks = tuple(f"blk.{i}." for i in args.blocks)
        names = [n for n, shape in file.shapes.items() if n.startswith(blocks) and len(shape) == 2]

        def seen_on(path: Path, n: int, random: bool) -> dict[str, Moments]:
            tokens, _ = text_tokens(args.model, path, n, CONTEXT)
            return moments(model, file, names, tokens, random)

        tests = {path: seen_on(path, args.test_sequences, False) for path in args.test}
        print(f"{'calibrated on':30}" + "".join(f"{path.stem:>16}" for path in tests))
        for path in args.calib:
            errors = []
            for name, seen in seen_on(path, args.calib_sequences, True).items():
                weight = load_weight(file, name, "cpu")
                result = quantize(weight, ggml_type, None, seen.inputs, seen.outputs)
                difference = weight - torch.from_numpy(result.dequantize())
                errors.append([relative_error(weight, difference, at[name]) for at in tests.values()])
            means = torch.tensor(errors).log().mean(0).exp()
            print(f"{path.stem:30}" + "".join(f"{float(mean):16.3e}" for mean in means), flush=True)


if __name__ == "__main__":
    main()
