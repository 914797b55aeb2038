"""Measure time and peak memory of `aaac-gguf convert` beside llama-quantize.

Both get the same full-precision GGUF, importance file, embedding type and threads.

    python benchmarks/quantizer.py [--shape 1b] [--rounds 3]

Random weights in the shape of a Llama, made once. Commands take turns; each is a process of its own, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from cpu import SHAPES, make_model

from aaac_gguf.files.imatrix import Entry, Imatrix, write_imatrix
from aaac_gguf.llama import tools


def write_importance(path: Path, shape: str) -> None:
    rng, one = np.random.default_rng(0), np.ones(1, dtype=np.float32)
    entries = {
        f"blk.{i}.{name}.weight": Entry(rng.random((1, k), dtype=np.float32) + 0.1, one)
        for i in range(SHAPES[shape].n_layers)
        for name, (_, k) in SHAPES[shape].linear.items()
    }
    write_imatrix(path, Imatrix(entries, ["random"], 1, 512))


def timed(command: list[str], threads: int) -> dict[str, float]:
    """Seconds of a whole process, and its peak memory in bytes."""
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            sys.exit(f"{command[0]} failed: {log.read()[-2000:].decode(errors='replace')}")
    return {"seconds": time.monotonic() - start, "peak_bytes": usage.ru_maxrss * 1024.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only-convert", action="store_true", help="leave llama-quantize out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "quantizer.json")
    args = parser.parse_args()
    source = make_model(args.shape, "F16")
    results: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        imatrix, out = Path(folder) / "imatrix.gguf", str(Path(folder) / "out.gguf")
        write_importance(imatrix, args.shape)
        ours = [sys.executable, "-m", "aaac_gguf", "convert", str(source), "-o", out, "--imatrix", str(imatrix)]
        stock = [
            str(tools.tool("llama-quantize")),
            "--imatrix",
            str(imatrix),
            "--token-embedding-type",
            "q6_K",
            "--pure",
            str(source),
            out,
        ]
        commands = {"aaac-gguf convert, AAAC4_G16": ours, "the same, --no-feedback": [*ours, "--no-feedback"]}
        if not args.only_convert:
            commands["llama-quantize, IQ4_NL"] = [*stock, "IQ4_NL", str(args.threads)]
        for _ in range(args.rounds):
            for name, command in commands.items():
                latest = timed(command, args.threads)
                results.setdefault(name, []).append(latest)
                print(
                    f"{name:30} {latest['seconds']:7.1f} s, peak {latest['peak_bytes'] / 2**30:.2f} GiB",
                    flush=True,
                )
    for name, runs in results.items():
        print(f"{name:30} median {statistics.median(r['seconds'] for r in runs):.1f} s of {len(runs)}")
    everything = json.loads(args.out.read_text()) if args.out.is_file() else {}
    everything[args.shape] = {"threads": args.threads, "source_bytes": source.stat().st_size, "runs": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
