"""llama-bench on models with random weights in the shape of Llama 8B, and the quantizer's time: `python benchmarks/gpu_models.py BIN OUT WORK`.

BIN is what `aaac-gguf llama build --backend cuda` prints. One layer is made and quantized to every type; the models repeat its bytes, each layer in
memory of its own, so that what the GPU reads is as large as in a trained model. Speed does not depend on the values. The types take turns, so
that a GPU that warms up or throttles treats them alike.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as T
from random_models import Shape, grow, one_layer

from aaac_gguf import format as fmt
from aaac_gguf.convert import Calibration, Settings, convert
from aaac_gguf.gguf_io import read
from aaac_gguf.quantize import quantize
from aaac_gguf.report import table

SHAPE = Shape(n_layers=32, n_embd=4096, n_ff=14336, n_head=32, n_head_kv=8, n_vocab=128256, tied=False)
STOCK = ("Q4_0", "IQ4_NL", "Q4_K_S", "NVFP4", "Q8_0")
TESTS = ("pp512", "pp2048", "tg128")
RATIOS = (("tg128", "IQ4_NL"), ("tg128", "Q4_0"), ("pp512", "IQ4_NL"), ("pp512", "Q4_0"))


def make_models(binaries: Path, work: Path) -> dict[str, Path]:
    """One file per type, embeddings and output in Q6_K as by default (F16 in the F16 model)."""
    full = work / "layer-F16.gguf"
    one_layer(full, SHAPE)
    layers = {"F16": full}
    for name in fmt.TYPES:
        layers[name] = work / f"layer-{name}.gguf"
        layers[name].unlink(missing_ok=True)
        convert(full, layers[name], Settings(type=T[name], calibration=Calibration("none"), device="cuda"))
    for name in STOCK:
        layers[name] = work / f"layer-{name}.gguf"
        command = [binaries / "llama-quantize", "--token-embedding-type", "q6_k", "--output-tensor-type", "q6_k"]
        # no preset makes an NVFP4 file, so every matrix is named
        command += (
            ["--tensor-type", rf"blk.*({'|'.join(SHAPE.linear)})=nvfp4", full, layers[name], "Q8_0"]
            if name == "NVFP4"
            else ["--pure", full, layers[name], name]
        )
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(f"{name}: llama-quantize refuses: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
            del layers[name]
    models = {}
    for name, layer in layers.items():
        models[name] = work / f"model-{name}.gguf"
        models[name].unlink(missing_ok=True)
        grow(read(layer), SHAPE, models[name])
        layer.unlink()
    return models


def bench(binaries: Path, model: Path, repetitions: int) -> dict[str, float]:
    """Tokens per second by test."""
    command = [binaries / "llama-bench", "-m", model, "-p", "512,2048", "-n", "128", "-ngl", "99", "-fa", "on", "-r", str(repetitions), "-o", "json"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"llama-bench failed on {model}: {result.stderr[-2000:]}")
    runs = json.loads(result.stdout[result.stdout.index("[") :])
    return {(f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}"): float(r["avg_ts"]) for r in runs}


def quantizer_seconds(method: str) -> float:
    """Seconds to quantize the linear weights of the model on the GPU, importance given: one layer, times the layers."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    seconds = 0.0
    for shape in SHAPE.linear.values():
        weight = 0.02 * torch.randn(shape, device="cuda", generator=generator)
        importance = torch.rand(shape[1], device="cuda", generator=generator) + 0.1
        times = []
        for _ in range(3):  # the first includes start-up
            torch.cuda.synchronize()
            start = time.perf_counter()
            quantize(weight, fmt.G16, importance, method=method)  # type: ignore[arg-type]
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        seconds += statistics.median(times)
    return seconds * SHAPE.n_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", type=Path, metavar="BIN")
    parser.add_argument("out", type=Path, help="folder for gpu-models.json and gpu-models.txt")
    parser.add_argument("work", type=Path, help="folder for the models, 60 GB")
    parser.add_argument("--rounds", type=int, default=3, help="how often the types take turns (default 3)")
    args = parser.parse_args()
    for folder in (args.out, args.work):
        folder.mkdir(parents=True, exist_ok=True)
    models = make_models(args.binaries, args.work)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for _ in range(args.rounds):
        for name, model in models.items():
            runs[name].append(bench(args.binaries, model, repetitions=3))
    results: dict[str, Any] = {"device": torch.cuda.get_device_name(), "bytes": {name: path.stat().st_size for name, path in models.items()}}
    speed = {name: {test: statistics.median(run[test] for run in turns) for test in TESTS} for name, turns in runs.items()}
    spread = {name: {test: [min(r[test] for r in turns), max(r[test] for r in turns)] for test in TESTS} for name, turns in runs.items()}
    results |= {"tokens_per_second": speed, "range": spread}
    results["quantizer_seconds"] = {method: quantizer_seconds(method) for method in ("aaac", "paper")}
    version = subprocess.run([args.binaries / "llama-bench", "--version"], capture_output=True, text=True)
    results["llama.cpp"] = (re.findall(r"version: .*", version.stdout + version.stderr) or [""])[0]
    (args.out / "gpu-models.json").write_text(json.dumps(results, indent=1) + "\n")

    rows = []
    for name, tests in speed.items():
        cells = [f"{tests[t]:.1f} ({spread[name][t][0]:.1f} - {spread[name][t][1]:.1f})" for t in TESTS]
        ratios = [f"{tests[t] / speed[other][t]:.3f}" if other in speed else "-" for t, other in RATIOS]
        rows.append((name, f"{results['bytes'][name] / 1e9:.2f}", *cells, *ratios))
    heading = ("type", "GB", *(f"{t}, tokens/s (range)" for t in TESTS), *(f"{t} / {other}" for t, other in RATIOS))
    text = f"{results['device']}, {results['llama.cpp']}, random weights in the shape of Llama 8B\n{table(heading, rows)}\n\n" + "\n".join(
        f"quantize to AAAC4_G16 on the GPU, importance given, method {m}: {s:.1f} s (one layer times {SHAPE.n_layers})"
        for m, s in results["quantizer_seconds"].items()
    )
    (args.out / "gpu-models.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
