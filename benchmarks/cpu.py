"""Measure AAAC and stock types with llama-bench on the CPU.

    aaac-gguf llama build
    python benchmarks/cpu.py --rounds 5

The models are Llama 1B and 3B by shape, with random weights: speed does not depend on the values. `convert` or
llama-quantize quantizes a seed file with 64 rows of each matrix. Its rows repeat in the full model, each in memory of
its own. Every matrix, the tied output too, has the type that the model is named after. Models are made once and kept in
the cache folder: 10 GB for 1b, 26 GB for 3b.

The types take turns, and those with the fewest measurements come first. Every measurement is added to the JSON file at
once. So a run can be cut into pieces with --seconds. Delete the file to begin anew. Before each turn cpu_limits.cpp
measures the limits of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from random_models import Shape, grow, one_layer

from aaac_gguf import resources
from aaac_gguf.conversion.convert import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import format as fmt
from aaac_gguf.files.gguf import read
from aaac_gguf.llama import build as llama
from aaac_gguf.llama import tools
from aaac_gguf.reporting.tables import table

SHAPES = {
    "1b": Shape(n_layers=16, n_embd=2048, n_ff=8192, n_head=32, n_head_kv=8, n_vocab=128256, tied=True),
    "3b": Shape(n_layers=28, n_embd=3072, n_ff=8192, n_head=24, n_head_kv=8, n_vocab=128256, tied=True),
}
BITS_4_5 = ("Q4_0", "IQ4_NL", "Q4_K_S", "NVFP4")
BITS_4 = (*BITS_4_5, "IQ4_XS", "MXFP4")
TYPES = (*fmt.TYPES, *BITS_4, "Q5_K_S", "Q8_0", "F16")
TESTS = ("pp512", "pp128", "tg64")
SEED_ROWS = 64


def make_model(shape: str, name: str) -> Path:
    """Return the model of that shape and type, which is made if it is not in the cache."""
    folder = resources.cache_dir() / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / f"llama-{shape}-{name}.gguf"
    if not model.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            full, seed = Path(scratch) / "full.gguf", Path(scratch) / "seed.gguf"
            one_layer(full, SHAPES[shape], SEED_ROWS)
            if name == "F16":
                seed = full
            elif name in fmt.TYPES:
                convert(full, seed, Settings(type=name, embedding_type=name, calibration="none"))
            else:
                # no preset makes an NVFP4 or MXFP4 file of a dense model, so every matrix is named
                how = (
                    ["--tensor-type", f"weight={name.lower()}", full, seed, "Q8_0"]
                    if name in ("NVFP4", "MXFP4")
                    else ["--pure", full, seed, name]
                )
                subprocess.run([tools.tool("llama-quantize"), *how], check=True, capture_output=True)
            grow(read(seed), SHAPES[shape], model)
    return model


def n_bytes(model: Path) -> int:
    """Return the bytes that a token reads: every tensor, since the output matrix is the embedding."""
    return sum(int(tensor.n_bytes) for tensor in read(model).tensors.values())


def limits_program() -> Path:
    """Return the program cpu_limits, compiled in the folder of the patched llama.cpp."""
    source, tree = Path(__file__).parent / "cpu_limits.cpp", llama.source_dir()
    program = tree / "cpu_limits"
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        include = [f"-I{tree}/ggml/src", f"-I{tree}/ggml/src/ggml-cpu/aaac"]
        libraries = [tools.tool("llama-bench").parents[1] / f"ggml/src/libggml-{part}.a" for part in ("cpu", "base")]
        subprocess.run(
            ["g++", "-O3", "-march=native", "-std=c++17", "-fopenmp", *include, "-o", program, source, *libraries],
            check=True,
        )
    return program


def bench(model: Path, threads: int, tests: list[str]) -> dict[str, float]:
    """Return tokens per second by test. A short prompt first warms up: it reads every weight."""
    lengths = {kind: ",".join(t.removeprefix(kind) for t in tests if t.startswith(kind)) for kind in ("pp", "tg")}
    prompt = ",".join(filter(None, ("8", lengths["pp"])))
    options = f"-t {threads} -r 1 --no-warmup -p {prompt} -n {lengths['tg'] or 0} -o json"
    result = subprocess.run([tools.tool("llama-bench"), "-m", model, *options.split()], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"llama-bench failed on {model}: {result.stderr[-2000:]}")
    found = {
        (f"pp{r['n_prompt']}" if r["n_prompt"] else f"tg{r['n_gen']}"): float(r["avg_ts"])
        for r in json.loads(result.stdout)
    }
    return {test: found[test] for test in tests}


def processor() -> str:
    """Return the processor's name and its number of cores."""
    try:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def measure(args: argparse.Namespace, results: dict[str, Any]) -> Iterator[str]:
    """Add measurements to `results["runs"]` until every combination has `--rounds` of them, or `--seconds` are over.

    Yields a line after each.
    """
    start = time.monotonic()
    models = {(shape, name): make_model(shape, name) for shape in args.shapes for name in args.types}
    for (shape, name), model in models.items():
        results["bytes"].setdefault(shape, {})[name] = n_bytes(model)
    limits = limits_program()

    def count(turn: tuple[str, int, str]) -> int:
        return min(len(turns(results, *turn, test)) for test in args.tests)

    combinations = list(itertools.product(args.shapes, args.threads, args.types))
    while (
        (turn := min(combinations, key=count)) and count(turn) < args.rounds and time.monotonic() - start < args.seconds
    ):
        shape, threads, name = turn
        limit = json.loads(subprocess.run([limits, str(threads)], check=True, capture_output=True, text=True).stdout)
        speed = bench(models[shape, name], threads, args.tests)
        results["runs"].append({"shape": shape, "threads": threads, "type": name, "tokens_per_second": speed, **limit})
        figures = "  ".join(f"{test} {v:.2f}" for test, v in speed.items())
        yield f"{shape} {threads} threads {name:10} {figures}  read {limit['read'] / 1e9:.1f} GB/s"


def turns(results: dict[str, Any], shape: str, threads: int, name: str, test: str) -> list[dict[str, Any]]:
    """Return the measurements of one type that include the test."""
    runs = [run for run in results["runs"] if (run["shape"], run["threads"], run["type"]) == (shape, threads, name)]
    return [run for run in runs if test in run["tokens_per_second"]]


def speeds(results: dict[str, Any], shape: str, threads: int) -> dict[str, dict[str, list[float]]]:
    """Return tokens per second by type and test, one for each round, of the types and tests that were measured."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, test in itertools.product(TYPES, TESTS):
        if runs := turns(results, shape, threads, name, test):
            found.setdefault(name, {})[test] = [run["tokens_per_second"][test] for run in runs]
    return found


def bandwidth(results: dict[str, Any], shape: str, threads: int) -> float:
    """Return the median of the bytes per second that cpu_limits read before those turns."""
    return statistics.median(
        run["read"] for run in results["runs"] if (run["shape"], run["threads"]) == (shape, threads)
    )


def groups(results: dict[str, Any]) -> list[tuple[str, int]]:
    """Return the shapes and numbers of threads that were measured."""
    return sorted({(run["shape"], run["threads"]) for run in results["runs"]})


def summary(results: dict[str, Any], shape: str, threads: int) -> str:
    """Return a table of medians (range; number of measurements).

    Its last columns are ratios to the fastest stock types, and the share of the read bandwidth that tg64 reaches.
    """
    found = speeds(results, shape, threads)
    median = {name: {test: statistics.median(v) for test, v in tests.items()} for name, tests in found.items()}
    read_speed = bandwidth(results, shape, threads)

    def ratio(name: str, test: str, others: tuple[str, ...]) -> str:
        best = max((median[other][test] for other in others if test in median.get(other, {})), default=None)
        return f"{median[name][test] / best:.3f}" if best and test in median[name] else "-"

    rows = []
    for name, tests in found.items():
        size = results["bytes"][shape][name]
        cells = [
            f"{median[name][t]:.1f} ({min(tests[t]):.1f} - {max(tests[t]):.1f}; {len(tests[t])})" if t in tests else "-"
            for t in TESTS
        ]
        shares = [
            run["tokens_per_second"]["tg64"] * size / run["read"]
            for run in turns(results, shape, threads, name, "tg64")
        ]
        share = f"{statistics.median(shares):.0%}" if shares else "-"
        ratios = ratio(name, "tg64", BITS_4_5), ratio(name, "pp512", BITS_4)
        rows.append((name, f"{size / 1e9:.3f}", *cells, *ratios, share))
    heading = (
        "type",
        "GB",
        *(f"{t}, tokens/s" for t in TESTS),
        "tg64 / best 4.5 bit",
        "pp512 / best 4 bit",
        "share of bandwidth",
    )
    return f"Llama {shape}, {threads} threads, read bandwidth {read_speed / 1e9:.1f} GB/s\n{table(heading, rows)}"


def kernel_summary(results: dict[str, Any]) -> str:
    """Return a table of the best speed of each type's dot product."""
    names = results["runs"][-1]["kernels"]
    best = {name: max(run["kernels"][name] for run in results["runs"]) for name in names}
    rows = [
        (name, f"{v / 1e9:.1f}", f"{v / best['Q4_0']:.3f}")
        for name, v in sorted(best.items(), key=lambda item: -item[1])
    ]
    return f"One thread, weights in the cache\n{table(('type', 'billion weights per s', 'to Q4_0'), rows)}"


def plot(results: dict[str, Any], out: Path) -> None:
    """Plot prompt processing, and token generation against the bytes of a token with the line of the read bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "aaac"  # the same figures give the same file
    figure, axes = pyplot.subplots(len(groups(results)), 2, figsize=(12, 4 * len(groups(results))), squeeze=False)
    for (shape, threads), (left, right) in zip(groups(results), axes, strict=True):
        found = speeds(results, shape, threads)
        prompt = {name: tests["pp512"] for name, tests in found.items() if "pp512" in tests}
        middle = [statistics.median(v) for v in prompt.values()]
        spread = [(m - min(v), max(v) - m) for m, v in zip(middle, prompt.values(), strict=True)]
        left.barh(list(prompt), middle, xerr=list(zip(*spread, strict=True)))
        left.invert_yaxis()
        left.set_xlabel(f"pp512, tokens/s: Llama {shape}, {threads} threads")
        sizes = [results["bytes"][shape][name] / 1e9 for name in found]
        line = sorted(sizes)
        right.plot(
            line,
            [bandwidth(results, shape, threads) / 1e9 / size for size in line],
            color="gray",
            label="read bandwidth",
        )
        for (name, tests), size in zip(found.items(), sizes, strict=True):
            if "tg64" in tests:
                v = statistics.median(tests["tg64"])
                right.errorbar(
                    size, v, yerr=[[v - min(tests["tg64"])], [max(tests["tg64"]) - v]], marker="o", label=name
                )
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_xlabel("GB read per token")
        right.set_ylabel(f"tg64, tokens/s, {threads} threads")
        right.legend(fontsize="x-small", ncols=2)
    figure.tight_layout()
    figure.savefig(out, format="svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--shapes", choices=SHAPES, default=["1b"], **several)
    parser.add_argument("--types", choices=TYPES, default=list(TYPES), **several)
    parser.add_argument("--tests", choices=TESTS, default=list(TESTS), **several)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[os.cpu_count() or 1], help="numbers of threads (default: all cores)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measurements of each combination (default 5; 0 only makes the models)"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no measurement after so many seconds"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json", help="a plot goes beside it"
    )
    args = parser.parse_args()
    results: dict[str, Any] = {"processor": processor(), "bytes": {}, "runs": []}
    if args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    for line in measure(args, results):
        print(line, flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if results["runs"]:
        print(*(summary(results, *group) for group in groups(results)), kernel_summary(results), sep="\n\n")
        plot(results, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
