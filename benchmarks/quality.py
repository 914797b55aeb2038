"""Measure 4-bit formats on one checkpoint: the KL divergence of the quantized model from the full model.

    python benchmarks/quality.py MODEL --calib calib.txt --test heldout.txt --test web.txt [--stock Q5_K_S=x.gguf ...]

Every row replaces the weights of all linear layers of the decoder by what its format can hold. Embeddings, norms and
the output matrix stay as they are. The protocol is llama-perplexity's (`-c 512`): BOS in place of each chunk's first
token, and only positions 256 to 510 of a chunk are scored. Bars are the standard error over chunks. Rows other than
ours are reconstructions in torch of what the paper and its neighbours compare with, each at
its own bits per weight; files of stock llama.cpp types are decoded by the gguf library.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from torch import Tensor

from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.calibration.sequential import BlockMoments
from aaac_gguf.calibration.synthetic import SyntheticMoments, estimation_tokens
from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.imatrix import Entry, Imatrix
from aaac_gguf.models import checkpoint
from aaac_gguf.models.blocks import Blocks
from aaac_gguf.models.source import full_precision
from aaac_gguf.models.weights import load_weight
from aaac_gguf.quantizer import codebook
from aaac_gguf.quantizer import moments as hessian
from aaac_gguf.quantizer.backends import choose_backend
from aaac_gguf.quantizer.feedback import feedback
from aaac_gguf.quantizer.grid import Grid
from aaac_gguf.quantizer.moments import factor, triangular_inverse
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.quantizer.search import TorchSearch

CONTEXT = 512
IQ4_NL = torch.tensor(codebook._IQ4_NL, dtype=torch.float32)
INT4 = torch.arange(-8.0, 8.0) * 127 / 8
FP4 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) * 127 / 6


@dataclass
class Layer:
    """One matrix: its weight [N, K], its moments, and what its inputs' moments are by weights and importance alone."""

    weight: Tensor
    moments: hessian.Moments
    synthetic: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        return self.moments.inputs.diagonal()

    @property
    def target(self) -> Tensor:
        return self.moments.target(self.weight)


Method = Callable[[Layer, int], Tensor]


@dataclass(frozen=True)
class Row:
    """A format: how it reconstructs a layer, for the full model's inputs or those of the quantized layers before."""

    name: str
    bits_per_weight: float
    reconstruct: Method
    in_sequence: bool = False


class Calibration(BlockMoments):
    """Moments for one row after the other. The full model's records are kept; the judged model gets the weights too."""

    def __init__(self, judged: Any, *args: Any):
        super().__init__(*args)
        self.judged = dict(judged.named_parameters())
        self.kept: dict[int, Any] = {}
        self.originals = {name: p.detach().clone() for name, p in self.blocks.model.named_parameters()}

    def record(self, i: int) -> Any:
        if i not in self.kept:
            self.kept[i] = super().record(i)
        return replace(self.kept[i], inputs=[dict(inputs) for inputs in self.kept[i].inputs])  # the walk empties them

    def restart(self) -> None:
        for name, p in self.blocks.model.named_parameters():
            p.data.copy_(self.originals[name])
        self.hidden = self.full.hidden[0, :]
        self.position, self.drifting = 0, False
        self._replays = self._new_replays()

    def replace(self, name: str, weight: Tensor) -> None:
        super().replace(name, weight)
        parameter, rows = self.places[name].parameter, self.places.row_map(name)
        if rows is None:
            raise SystemExit(f"{name}: its rows are not those of {parameter}; this benchmark needs them to be")
        rows.replace(self.judged[parameter], weight)


def nearest(x: Tensor, table: Tensor) -> Tensor:
    return table[torch.bucketize(x, (table[1:] + table[:-1]) / 2)]


def grouped(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    groups = weight.reshape(-1, size)
    return groups, groups.abs().amax(1, keepdim=True).clamp_min(1e-12)


def e4m3(scale: Tensor) -> Tensor:
    """Scales as FP8, with one float32 scale per tensor, as NVFP4 has them."""
    top = scale.max() / 448
    return (scale / top).to(torch.float8_e4m3fn).float().clamp_min(2**-9) * top


def rtn(layer: Layer, seed: int) -> Tensor:
    """INT4, groups of 32 with a float16 scale, the largest magnitude on -8 as in Q4_0."""
    groups, largest = grouped(layer.weight, 32)
    signed = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    scale = (signed / -8).half().float()
    scale = torch.where(scale == 0, largest / 8, scale)
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(layer.weight)


def fp4_or_int4(tables: list[Tensor]) -> Method:
    """Round groups of 16 with an FP8 scale to the better of the tables. NVFP4 has one, IF4 has two."""

    def reconstruct(layer: Layer, seed: int) -> Tensor:
        groups, largest = grouped(layer.weight, 16)
        scale = e4m3(largest / 127)
        candidates = torch.stack([nearest(groups / scale, table) * scale for table in tables])
        best = (candidates - groups).square().sum(2).argmin(0)
        return candidates[best, torch.arange(len(best))].view_as(layer.weight)

    return reconstruct


def int4_groups(weight: Tensor) -> Tensor:
    """Symmetric INT4 in groups of 128 with a float16 scale."""
    groups, largest = grouped(weight, 128)
    scale = (largest / 7.5).half().float()
    return ((groups / scale).round().clamp(-8, 7) * scale).view_as(weight)


def awq(layer: Layer, seed: int) -> Tensor:
    """Round INT4 groups of 128 of weights that are scaled by activation^alpha, for the alpha of least output error.

    The scales are folded into the layer before, so they cost no bits.
    """
    activation = layer.importance.sqrt().clamp_min(1e-6)
    best, least = layer.weight, float("inf")
    for alpha in torch.arange(0, 1, 0.1):
        scale = activation**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        candidate = int4_groups(layer.weight * scale) / scale
        d = layer.weight - candidate
        error = float(((d @ layer.moments.inputs) * d).sum())
        if error < least:
            best, least = candidate, error
    return best


def gptq(layer: Layer, seed: int) -> Tensor:
    """INT4 groups of 128, scales by the largest magnitude, error feedback column by column with 1 % damping."""
    u = triangular_inverse(factor(layer.moments.inputs, 0.01).root)
    w = layer.weight.T.clone()
    for j in range(len(w)):
        if j % 128 == 0:
            scale = (w[j : j + 128].abs().amax(0) / 7.5).half().float().clamp_min(1e-8)
        q = (w[j] / scale).round().clamp(-8, 7) * scale
        error = (w[j] - q) / u[j, j]
        w[j] = q
        w[j + 1 :].addr_(u[j, j + 1 :], error, alpha=-1)
    return w.T


def lobcq(layer: Layer, seed: int) -> Tensor:
    """Round blocks of 8 in groups of 64 with an FP8 scale, each to one of 16 codebooks of INT6 levels.

    The codebooks are found by Lloyd-Max for each cluster of blocks.
    """
    groups, largest = grouped(layer.weight, 64)
    scale = e4m3(largest)
    x = (groups / scale).reshape(-1, 8)
    sample = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:20000]]
    cluster = (sample.abs().amax(1).argsort().argsort() * 16) // len(sample)
    books = torch.stack([torch.quantile(sample[cluster == c].reshape(-1), torch.linspace(0, 1, 16)) for c in range(16)])

    def errors(x: Tensor) -> Tensor:
        return torch.stack([(x - nearest(x, book)).square().sum(1) for book in books])

    for _ in range(10):
        cluster = errors(sample).argmin(0)
        for c in range(16):
            members = sample[cluster == c].reshape(-1)
            key = torch.bucketize(members, (books[c, 1:] + books[c, :-1]) / 2)
            count, total = torch.bincount(key, minlength=16), torch.bincount(key, members, 16)
            books[c] = torch.where(count > 0, total / count.clamp_min(1), books[c]).sort().values
    books = (books * 31).round() / 31
    best = errors(x).argmin(0)
    out = torch.empty_like(x)
    for c in range(16):
        out[best == c] = nearest(x[best == c], books[c])
    return (out.view_as(groups) * scale).view_as(layer.weight)


def search_table(weight: Tensor, levels: Tensor) -> TorchSearch:
    """Return the search over our 7-bit scales and one table of levels [16] that is not fitted, for groups of 16."""
    base = codebook.scale_base(codebook.SCALE_HEADROOM * float(weight.abs().amax()), 4, fmt.G16)
    grid = Grid.from_levels(torch.stack([levels, levels]), base * torch.from_numpy(fmt.scale_factors(4)))
    return choose_backend(weight.device)(grid, fmt.G16.group_size)


def one_fitted(layer: Layer) -> Tensor:
    """One codebook for the tensor by the same Lloyd iterations as the pair."""
    groups, _ = grouped(layer.weight, 16)
    drawn = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0))[:30000]
    a = layer.importance.view(-1, 16)[drawn % (layer.weight.shape[1] // 16)]
    levels = IQ4_NL
    for _ in range(8):
        search = search_table(layer.weight, levels)
        numerator, denominator = search.lloyd_sums(groups[drawn], a, codebook.FIT_STARTS)
        means = (numerator.view(2, 16).sum(0) / denominator.view(2, 16).sum(0).clamp_min(1e-30)).float()
        levels = torch.where(denominator.view(2, 16).sum(0) > 0, means, levels).sort().values
        levels = levels * 127 / levels.abs().max()
    return levels.round()


def with_feedback(table: Callable[[Layer], Tensor]) -> Method:
    """The product's feedback, between columns and rows, for one table instead of the fitted pair."""

    def reconstruct(layer: Layer, seed: int) -> Tensor:
        search = search_table(layer.weight, table(layer))
        return search.decode(feedback(layer.target, factor(layer.moments.inputs), search, layer.moments.outputs))

    return reconstruct


def ours(ggml_type: T, mode: str) -> Method:
    """A type as `quantize` makes it."""

    def reconstruct(layer: Layer, seed: int) -> Tensor:
        given: dict[str, Any] = {
            "paper": {"importance": layer.importance, "method": "paper"},
            "importance": {"importance": layer.importance},
            "synthetic": {"importance": layer.importance, "hessian": layer.synthetic},
            "columns": {"hessian": layer.moments.inputs},
            "columns and rows": {"hessian": layer.moments.inputs, "outputs": layer.moments.outputs},
        }[mode]
        q = quantize(layer.target if "hessian" in given else layer.weight, ggml_type, seed=seed, **given)
        return torch.from_numpy(gguf_io.dequantize(q.data, ggml_type, q.codec))

    return reconstruct


def rows() -> Iterator[Row]:
    yield Row("RTN INT4 g32", 4.5, rtn)
    yield Row("NVFP4", 4.5, fp4_or_int4([FP4]))
    yield Row("IF4", 4.5, fp4_or_int4([FP4, INT4]))
    yield Row("AWQ INT4 g128", 4.125, awq)
    yield Row("GPTQ INT4 g128", 4.125, gptq, in_sequence=True)
    yield Row("LO-BCQ", 4 + 4 / 8 + 8 / 64, lobcq)
    yield Row("paper, G16", 4.5, ours(T["AAAC4_G16"], "paper"))
    for name, table in {
        "INT4": lambda _: INT4,
        "FP4": lambda _: FP4,
        "IQ4_NL table": lambda _: IQ4_NL,
        "one codebook": one_fitted,
    }.items():
        yield Row(f"{name} g16, feedback", 4.4375, with_feedback(table), in_sequence=True)
    for name, qtype in fmt.TYPES.items():
        yield Row(f"{name}, importance", qtype.bits_per_weight, ours(T[name], "importance"))
        yield Row(f"{name}, synthetic", qtype.bits_per_weight, ours(T[name], "synthetic"))
        yield Row(f"{name}, columns", qtype.bits_per_weight, ours(T[name], "columns"))
        yield Row(f"{name}, columns and rows", qtype.bits_per_weight, ours(T[name], "columns and rows"))
        yield Row(name, qtype.bits_per_weight, ours(T[name], "columns and rows"), in_sequence=True)
    for stock, bits in ((T.Q4_0, 4.5), (T.IQ4_NL, 4.5), (T.Q5_K, 5.5), (T.Q6_K, 6.5625)):
        yield Row(f"{stock.name}, feedback", bits, ours(stock, "columns and rows"), in_sequence=True)


@torch.inference_mode()
def log_probabilities(model: Any, chunks: Tensor) -> Iterator[Tensor]:
    """[255, vocabulary] for each chunk, float32."""
    for chunk in chunks:
        yield (
            model(input_ids=chunk[None].to(model.device), use_cache=False)
            .logits[0, CONTEXT // 2 : CONTEXT - 1]
            .float()
            .log_softmax(-1)
        )


def divergence(model: Any, chunks: Tensor, reference: list[Tensor]) -> dict[str, float]:
    klds, same = [], []
    for full, log_q in zip(reference, log_probabilities(model, chunks), strict=True):
        log_p = full.float()
        klds.append((log_p.exp() * (log_p - log_q)).sum(1))
        same.append((log_p.argmax(1) == log_q.argmax(1)).float())
    means, kld = torch.stack([k.mean() for k in klds]), torch.cat(klds)
    return {
        "mean": float(kld.mean()),
        "standard_error": float(means.std() / len(means) ** 0.5),
        "p99.9": float(kld.quantile(0.999)),
        "same_top": float(torch.cat(same).mean()),
    }


def quantize_model(row: Row, calibration: Calibration, layers: dict[str, Layer], seed: int) -> None:
    """Give the model's matrices what the row makes of them."""
    calibration.restart()
    if not row.in_sequence:
        for name, layer in layers.items():
            calibration.replace(name, row.reconstruct(layer, seed))
        return
    for _ in range(len(calibration.blocks) - 1):
        for layer in calibration.layers():
            for name, seen in layer.items():
                calibration.replace(name, row.reconstruct(Layer(layers[name].weight, seen), seed))


def stock_row(name: str, path: str, layers: dict[str, Layer]) -> Row:
    """The matrices of a finished file."""
    source = gguf_io.read(Path(path))
    decoded = {id(layer.weight): torch.from_numpy(source[name]) for name, layer in layers.items()}
    bits = (
        8
        * sum(source.tensors[name].n_bytes for name in layers)
        / sum(layer.weight.numel() for layer in layers.values())
    )
    return Row(name, bits, lambda layer, _: decoded[id(layer.weight)])


def plot(results: dict[str, Any], out: Path) -> None:
    import matplotlib.pyplot as plt

    rows = results["rows"]
    texts = list(rows[0]["divergence"])
    figure, axes = plt.subplots(
        1, len(texts), figsize=(6 * len(texts), 0.3 * len(rows) + 1.5), sharey=True, squeeze=False
    )
    for axis, text in zip(axes[0], texts, strict=True):
        values = [row["divergence"][text] for row in rows]
        axis.barh(range(len(rows)), [v["mean"] for v in values], xerr=[v["standard_error"] for v in values])
        axis.set_yticks(range(len(rows)), [f"{row['name']} ({row['bits_per_weight']:.3g})" for row in rows])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel(f"mean KL divergence, {text}")
    figure.tight_layout()
    figure.savefig(out, format="svg")
    plt.close(figure)


def write(
    args: argparse.Namespace, digests: dict[str, str], calibration_seconds: float, rows: list[dict[str, Any]]
) -> None:
    results = {
        "model": args.model.name,
        "calibration": {
            "sha256": digests,
            "sequences": args.calib_sequences,
            "length": CONTEXT,
            "seconds": calibration_seconds,
        },
        "chunks": args.chunks,
        "seed": args.seed,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(results, args.out.with_suffix(".svg"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--calib", type=Path, action="append", required=True, help="several share the sequences equally"
    )
    parser.add_argument("--test", type=Path, action="append", required=True)
    parser.add_argument(
        "--stock",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a GGUF of the same model, its bits per weight taken from it",
    )
    parser.add_argument("--rows", default="", help="only rows whose name contains one of these, separated by commas")
    parser.add_argument("--calib-sequences", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quality")
    args = parser.parse_args()

    model, calibrated = checkpoint.load_model(args.model), checkpoint.load_model(args.model)
    texts = [
        tokens_module.text_tokens(args.model, path, args.calib_sequences // len(args.calib), CONTEXT)
        for path in args.calib
    ]
    tokens, digests = (
        torch.cat([t for t, _ in texts]),
        {path.name: digest for path, (_, digest) in zip(args.calib, texts, strict=True)},
    )
    tests = {path.name: tokens_module.text_tokens(args.model, path, args.chunks, CONTEXT)[0] for path in args.test}
    # Half precision: 48 chunks of a large vocabulary are what takes memory here.
    references = {name: [p.half() for p in log_probabilities(model, chunks)] for name, chunks in tests.items()}
    start = time.monotonic()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, full_precision(args.model, Path(folder)) as file:
        sequences = tokens_module.with_random(tokens, len(checkpoint.load_tokenizer(args.model)), args.seed)
        activations = calibrate.Activations(Blocks(calibrated, tokens[:1]), sequences, len(tokens), Path(folder))
        activations.run(calibrate.Squares())
        names = [name for name, t in file.tensors.items() if name.startswith("blk.") and len(t.shape) == 2]
        calibration = Calibration(model, activations, file, names, Path(folder), args.seed)
        layers = {}
        for name in sorted(calibration.places.places, key=calibration.places.__getitem__):
            weight = load_weight(file, name, "cpu")
            layers[name] = Layer(weight, calibration.moments(name))
        imatrix = Imatrix(
            {name: Entry(layer.importance[None].numpy(), np.ones(1, np.float32)) for name, layer in layers.items()}
        )
        synthetic = SyntheticMoments(file, estimation_tokens(args.model, file), imatrix)
        for name, layer in layers.items():
            moments = synthetic.moments(name)
            layer.synthetic = moments.inputs if moments else None
        calibration_seconds = time.monotonic() - start
        stock = [stock_row(*item.split("=", 1), layers) for item in args.stock]
        for row in (*stock, *rows()):
            if args.rows and not any(part in row.name for part in args.rows.split(",")):
                continue
            start = time.monotonic()
            with torch.no_grad():
                quantize_model(row, calibration, layers, args.seed)
            seconds = time.monotonic() - start
            divergences = {text: divergence(model, chunks, references[text]) for text, chunks in tests.items()}
            results.append(
                {
                    "name": row.name,
                    "bits_per_weight": row.bits_per_weight,
                    "seconds": seconds,
                    "divergence": divergences,
                }
            )
            write(args, digests, calibration_seconds, results)
            figures = "  ".join(
                f"{text} {d['mean']:.5f} ± {d['standard_error']:.5f}, top {d['same_top']:.2%}"
                for text, d in divergences.items()
            )
            print(f"{row.name:30} {row.bits_per_weight:6.3f}  {figures}  ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
