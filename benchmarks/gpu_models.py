"""Run llama-bench on models with random weights in the shape of Llama 8B, and time the quantizer.

    python benchmarks/gpu_models.py BIN OUT WORK

BIN is what `aaac-gguf llama build --backend cuda` prints. A seed file with 64 rows of each matrix is quantized to every
type, by `convert` on the GPU or by llama-quantize. Its rows repeat in the model, each in memory of its own, so that the
GPU reads as much as in a trained model. Speed does not depend on the values. Models that WORK holds are taken as they
are. The types take turns, so that a GPU that warms up or throttles
treats them alike, and the results are written after each round.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as T
from random_models import Shape, grow, one_layer

from aaac_gguf.conversion.convert import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import format as fmt
from aaac_gguf.files.gguf import read
from aaac_gguf.quantizer.quantize import quantize
from aaac_gguf.reporting.tables import table

SHAPE = Shape(n_layers=32, n_embd=4096, n_ff=14336, n_head=32, n_head_kv=8, n_vocab=128256, tied=False)
STOCK = ("Q4_0", "IQ4_NL", "Q4_K_S", "NVFP4", "Q8_0")
SEED_ROWS = 64
DEVICE = "cuda"
TESTS = ("pp512", "pp2048", "tg128")
RATIOS = (("tg128", "IQ4_NL"), ("tg128", "Q4_0"), ("pp512", "IQ4_NL"), ("pp512", "Q4_0"))


def make_model(binaries: Path, work: Path, name: str) -> Path | None:
    """Return the model of one type, from `work` or made now, with embeddings and output in Q6_K (F16 in the F16 model).

    None where llama-quantize
    refuses."""
    model = work / f"model-{name}.gguf"
    if model.exists():
        return model
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        full, seed = Path(scratch) / "full.gguf", Path(scratch) / "seed.gguf"
        one_layer(full, SHAPE, SEED_ROWS)
        if name == "F16":
            seed = full
        elif name in fmt.TYPES:
            convert(full, seed, Settings(type=name, calibration="none", device=DEVICE))
        else:
            # no preset makes an NVFP4 file, so every matrix is named
            nvfp4 = ["--tensor-type", rf"blk.*({'|'.join(SHAPE.linear)})=nvfp4", full, seed, "Q8_0"]
            how = nvfp4 if name == "NVFP4" else ["--pure", full, seed, name]
            command = [
                binaries / "llama-quantize",
                "--token-embedding-type",
                "q6_k",
                "--output-tensor-type",
                "q6_k",
                *how,
            ]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                print(f"{name}: llama-quantize refuses: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
                return None
        grow(read(seed), SHAPE, model)
    return model


def bench(binaries: Path, model: Path, repetitions: int) -> dict[str, float]:
    """Tokens per second by test."""
    p, n = (",".join(test.removeprefix(kind) for test in TESTS if test.startswith(kind)) for kind in ("pp", "tg"))
    options = f"-p {p} -n {n} -ngl 99 -fa on -r {repetitions} -o json"
    result = subprocess.run([binaries / "llama-bench", "-m", model, *options.split()], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"llama-bench failed on {model}: {result.stderr[-2000:]}")
    runs = json.loads(result.stdout[result.stdout.index("[") :])
    if DEVICE == "cuda" and not all(r["gpu_info"] for r in runs):  # it would go on, on the CPU
        raise SystemExit(f"llama-bench finds no GPU: {result.stderr[-2000:]}")
    return {(f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}"): float(r["avg_ts"]) for r in runs}


def quantizer_seconds(method: str) -> float:
    """Seconds to quantize the linear weights of the model on the GPU, importance given: one layer, times the layers."""
    generator = torch.Generator(device=DEVICE).manual_seed(0)
    seconds = 0.0
    for shape in SHAPE.linear.values():
        weight = 0.02 * torch.randn(shape, device=DEVICE, generator=generator)
        importance = torch.rand(shape[1], device=DEVICE, generator=generator) + 0.1
        times = []
        for _ in range(3):  # the first includes start-up
            torch.cuda.synchronize()
            start = time.perf_counter()
            quantize(weight, T["AAAC4_G16"], importance, method=method)  # type: ignore[arg-type]
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds += statistics.median(times)
    return seconds * SHAPE.n_layers


def summary(results: dict[str, Any]) -> str:
    """Medians over the rounds (range), ratios of medians, and the quantizer's time."""
    turns = {name: {test: [r[name][test] for r in results["rounds"]] for test in TESTS} for name in results["bytes"]}
    speed = {name: {test: statistics.median(values) for test, values in tests.items()} for name, tests in turns.items()}
    rows = []
    for name, tests in turns.items():
        cells = [f"{speed[name][t]:.1f} ({min(values):.1f} - {max(values):.1f})" for t, values in tests.items()]
        ratios = [f"{speed[name][t] / speed[other][t]:.3f}" if other in speed else "-" for t, other in RATIOS]
        rows.append((name, f"{results['bytes'][name] / 1e9:.2f}", *cells, *ratios))
    heading = ("type", "GB", *(f"{t}, tokens/s (range)" for t in TESTS), *(f"{t} / {other}" for t, other in RATIOS))
    rounds = f"rounds: {len(results['rounds'])}"
    title = f"{results['device']}, {results['llama.cpp']}, random weights in the shape of Llama 8B, {rounds}"
    quantizer = [
        f"quantize to AAAC4_G16 on the GPU, importance given, method {method}: {seconds:.1f} s "
        f"(one layer times {SHAPE.n_layers})"
        for method, seconds in results["quantizer_seconds"].items()
    ]
    return "\n".join([title, table(heading, rows), "", *quantizer])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", type=Path, metavar="BIN")
    parser.add_argument("out", type=Path, help="folder for gpu-models.json and gpu-models.txt")
    parser.add_argument("work", type=Path, help="folder for the models, 60 GB")
    parser.add_argument("--rounds", type=int, default=3, help="how often the types take turns (default 3)")
    args = parser.parse_args()
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    named = {name: make_model(args.binaries, args.work, name) for name in ("F16", *fmt.TYPES, *STOCK)}
    models = {name: path for name, path in named.items() if path}
    version = subprocess.run([args.binaries / "llama-bench", "--version"], capture_output=True, text=True)
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "llama.cpp": (re.findall(r"version: .*", version.stdout + version.stderr) or [""])[0],
        "bytes": {name: path.stat().st_size for name, path in models.items()},
        "quantizer_seconds": {method: quantizer_seconds(method) for method in ("aaac", "paper")},
        "rounds": [],
    }
    for _ in range(args.rounds):
        results["rounds"].append({name: bench(args.binaries, model, repetitions=3) for name, model in models.items()})
        (args.out / "gpu-models.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "gpu-models.txt").write_text(summary(results) + "\n")
    print(summary(results))


if __name__ == "__main__":
    main()
