"""Times of the CUDA kernels on this machine's GPU: `python benchmarks/gpu.py OUT`.

Few columns: GB/s of the bytes that must move, and their share of a device-to-device copy's rate in the same run.
Many columns: TFLOP/s beside cuBLAS on float16 weights. Each figure is the median over launches. Events time batches of
launches that walk through copies of the
weights larger than the second-level cache together; the range over three rounds says what difference is noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aaac_gguf.files.format import TYPES, AaacType, Codec, pack
from aaac_gguf.inference import kernels
from aaac_gguf.reporting.tables import table

# N x K of the projections of Llama 8B and 70B
SHAPES = {
    "8B k, v": (1024, 4096),
    "8B q, o": (4096, 4096),
    "8B gate, up": (14336, 4096),
    "8B down": (4096, 14336),
    "70B q, o": (8192, 8192),
    "70B gate, up": (28672, 8192),
    "70B down": (8192, 28672),
}
MATVEC_COLUMNS = (1, 2, 4, 8)
MATMUL_SHAPE = (4096, 14336)
MATMUL_COLUMNS = (16, 32, 64, 128, 256, 512, 1024, 2048)
COPIED = 1 << 29  # float32
ROUNDS, BATCHES = 3, 30


def timed(cp: Any, launches: list[Callable[[], None]], per_batch: int | None = None) -> tuple[float, float, float]:
    """Seconds per launch: median over the batches of all rounds, and the least and greatest median of a round."""
    for launch in launches:
        launch()  # compiles, and warms up
    n = per_batch or max(len(launches), 20)
    medians, everything = [], []
    for _ in range(ROUNDS):
        times = []
        for _ in range(BATCHES):
            start, end = cp.cuda.Event(), cp.cuda.Event()
            start.record()
            for i in range(n):
                launches[i % len(launches)]()
            end.record()
            end.synchronize()
            times.append(cp.cuda.get_elapsed_time(start, end) * 1e-3 / n)
        medians.append(statistics.median(times))
        everything += times
    return statistics.median(everything), min(medians), max(medians)


def graph_of(cp: Any, stream: Any, launches: list[Callable[[], None]]) -> Callable[[], None]:
    """The launches as one CUDA graph, so that Python's time per launch does not count."""
    for launch in launches:
        launch()
    stream.synchronize()
    stream.begin_capture()
    for launch in launches:
        launch()
    graph = stream.end_capture()
    return lambda: graph.launch(stream)


def timed_graph(cp: Any, launches: list[Callable[[], None]]) -> tuple[float, float, float]:
    """Like `timed`, of the launches captured in a graph."""
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        run = graph_of(cp, stream, launches)
        median, least, greatest = timed(cp, [run], per_batch=3)
    return median / len(launches), least / len(launches), greatest / len(launches)


def random_weights(cp: Any, qtype: AaacType, n_rows: int, k: int, n_copies: int) -> tuple[list[Any], Codec]:
    """Copies of random valid blocks in different memory."""
    rng = np.random.default_rng(0)
    rows = min(n_rows, 64)  # random bits repeat after 64 rows, which no kernel can notice
    codes = rng.integers(1, 40, (rows, k // qtype.group_size), dtype=np.uint8)
    part = pack(
        qtype,
        rng.integers(0, 16, (rows, k), dtype=np.uint8),
        rng.integers(0, 2, (rows, k // 16), dtype=np.uint8),
        codes,
    )
    blocks = cp.tile(cp.asarray(part), (n_rows // rows, 1))
    books = np.stack([np.sort(rng.choice(np.arange(-127, 128), 16, replace=False)) for _ in range(2)]).astype(np.int8)
    return [blocks] + [blocks.copy() for _ in range(n_copies - 1)], Codec(books, 1e-3, 4)


def copies_for(cache: int, n_bytes: int) -> int:
    return max(2, -(-3 * cache // n_bytes))


def copy_rate(cp: Any) -> float:
    """Bytes read and written per second by a large device-to-device copy."""
    source, target = cp.ones(COPIED, cp.float32), cp.empty(COPIED, cp.float32)
    seconds, _, _ = timed(
        cp,
        [lambda: target.data.copy_from_device_async(source.data, source.nbytes, cp.cuda.get_current_stream())],
        per_batch=5,
    )
    return 2 * source.nbytes / seconds


def matvec_times(cp: Any, cache: int, copy: float, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    for qtype in TYPES.values():
        for shape_name, (n_rows, k) in SHAPES.items():
            n_bytes = n_rows * qtype.row_bytes(k)
            weights, codec = random_weights(cp, qtype, n_rows, k, copies_for(cache, n_bytes))
            params = kernels.codec_params(qtype, codec)
            for n in MATVEC_COLUMNS:
                x = cp.random.default_rng(0).standard_normal((n, k), dtype=cp.float32)
                q8, out = kernels.quantize_activations(x), cp.empty((n, n_rows), cp.float32)
                launches = [partial(kernels.matvec_into, qtype, params, w, q8, "", k, out) for w in weights]
                seconds, least, greatest = timed_graph(cp, launches)
                moved = n_bytes + q8.nbytes + out.nbytes
                rate = moved / seconds
                rows.append(
                    {
                        "type": qtype.name,
                        "shape": shape_name,
                        "n": n_rows,
                        "k": k,
                        "columns": n,
                        "us": seconds * 1e6,
                        "us_least": least * 1e6,
                        "us_greatest": greatest * 1e6,
                        "bytes": moved,
                        "gb_per_s": rate / 1e9,
                        "of_copy": rate / copy,
                    }
                )
            progress(f"matvec {qtype.name} {shape_name}")
            del weights
            cp.get_default_memory_pool().free_all_blocks()
    return rows


def matmul_times(cp: Any, cache: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = []
    n_rows, k = MATMUL_SHAPE
    for n in MATMUL_COLUMNS:
        x = cp.random.default_rng(0).standard_normal((n, k), dtype=cp.float32).astype(cp.float16)
        half = [
            cp.random.default_rng(i).standard_normal((n_rows, k), dtype=cp.float32).astype(cp.float16) for i in range(2)
        ]
        product = cp.empty((n, n_rows), cp.float16)
        cublas, _, _ = timed(cp, [lambda w=w, x=x, product=product: cp.matmul(x, w.T, out=product) for w in half])
        for qtype in TYPES.values():
            weights, codec = random_weights(cp, qtype, n_rows, k, copies_for(cache, n_rows * qtype.row_bytes(k)))
            params, out = kernels.codec_params(qtype, codec), cp.empty((n, n_rows), cp.float32)
            launches = [partial(kernels.matmul_into, qtype, params, w, x, "float16", k, out) for w in weights]
            fused, least, greatest = timed_graph(cp, launches)
            # what the llama.cpp patch does for prompts: decode to float16, then cuBLAS
            decode, _, _ = timed(cp, [partial(kernels.dequant, qtype, w, codec, "float16") for w in weights])
            flop = 2 * n_rows * k * n
            rows.append(
                {
                    "type": qtype.name,
                    "n": n_rows,
                    "k": k,
                    "columns": n,
                    "us_fused": fused * 1e6,
                    "us_fused_least": least * 1e6,
                    "us_fused_greatest": greatest * 1e6,
                    "us_decode": decode * 1e6,
                    "us_cublas_f16": cublas * 1e6,
                    "tflops_fused": flop / fused / 1e12,
                    "tflops_decode_cublas": flop / (decode + cublas) / 1e12,
                    "tflops_cublas_f16": flop / cublas / 1e12,
                }
            )
        progress(f"matmul {n} columns")
    return rows


def registers(cp: Any) -> list[dict[str, Any]]:
    """Return registers, local and shared memory of the compiled kernels with one column."""
    rows = []
    for name, struct in kernels.STRUCTS.items():
        run = kernels.kernel("matvec.cu", f"aaac_matvec_q8<{struct}, 1>")
        rows.append(
            {
                "type": name,
                "registers": run.num_regs,
                "local_bytes": run.local_size_bytes,
                "shared_bytes": run.shared_size_bytes,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for gpu-kernels.json and gpu-kernels.txt")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    cp = kernels._cupy()
    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    cache = int(properties["l2CacheSize"])
    copy = copy_rate(cp)
    progress = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
    device = {
        "name": properties["name"].decode(),
        "l2_bytes": cache,
        "multiprocessors": properties["multiProcessorCount"],
        "cuda": cp.cuda.runtime.runtimeGetVersion(),
        "driver": cp.cuda.runtime.driverGetVersion(),
        "copy_gb_per_s": copy / 1e9,
    }
    results = {"device": device, "registers": registers(cp), "matvec": matvec_times(cp, cache, copy, progress)}
    results["matmul"] = matmul_times(cp, cache, progress)
    (out / "gpu-kernels.json").write_text(json.dumps(results, indent=1) + "\n")

    few = [
        (
            r["type"],
            r["shape"],
            f"{r['n']} x {r['k']}",
            str(r["columns"]),
            f"{r['us']:.2f}",
            f"{r['us_least']:.2f} - {r['us_greatest']:.2f}",
            f"{r['gb_per_s']:.0f}",
            f"{r['of_copy']:.1%}",
        )
        for r in results["matvec"]
    ]
    many = [
        (
            r["type"],
            str(r["columns"]),
            f"{r['us_fused']:.1f}",
            f"{r['tflops_fused']:.1f}",
            f"{r['tflops_decode_cublas']:.1f}",
            f"{r['tflops_cublas_f16']:.1f}",
        )
        for r in results["matmul"]
    ]
    text = "\n\n".join(
        [
            f"{device['name']}, CUDA {device['cuda']}: device-to-device copy {copy / 1e9:.0f} GB/s (read + written)",
            "Few columns, 8-bit activations\n"
            + table(("type", "matrix", "N x K", "columns", "us", "range", "GB/s", "of copy"), few),
            f"Many columns, {MATMUL_SHAPE[0]} x {MATMUL_SHAPE[1]}\n"
            + table(("type", "columns", "us fused", "TFLOP/s fused", "decode + cuBLAS", "cuBLAS f16"), many),
        ]
    )
    (out / "gpu-kernels.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
