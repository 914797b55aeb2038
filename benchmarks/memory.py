"""Peak memory and time of `convert` on random weights in the shape of Llama 3.2 3B: `python benchmarks/memory.py WORK --layers 28`.

The weights are F16 in one GGUF, importance is given, nothing is run: what a model costs that is larger than memory.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType

from aaac_gguf import report
from aaac_gguf.convert import Calibration, Settings, convert
from aaac_gguf.gguf_io import TensorInfo, Value, write
from aaac_gguf.imatrix import Entry, Imatrix, write_imatrix

N_EMBD, N_FF, N_KV, N_VOCAB = 3072, 8192, 1024, 128256
LINEAR = {"attn_q": (N_EMBD, N_EMBD), "attn_k": (N_KV, N_EMBD), "attn_v": (N_KV, N_EMBD), "attn_output": (N_EMBD, N_EMBD),
          "ffn_gate": (N_FF, N_EMBD), "ffn_up": (N_FF, N_EMBD), "ffn_down": (N_EMBD, N_FF)}  # fmt: skip


def write_model(path: Path, n_layers: int) -> list[TensorInfo]:
    """The model with random weights, written as they are drawn; returns its matrices."""
    infos = [TensorInfo("token_embd.weight", (N_VOCAB, N_EMBD), T.F16)]
    for i in range(n_layers):
        infos.append(TensorInfo(f"blk.{i}.attn_norm.weight", (N_EMBD,), T.F32))
        infos += [TensorInfo(f"blk.{i}.{name}.weight", shape, T.F16) for name, shape in LINEAR.items()]
    rng = np.random.default_rng(0)
    data = (
        (0.02 * rng.standard_normal(info.shape, dtype=np.float32)).astype(np.float16 if info.type == T.F16 else np.float32, copy=False)
        for info in infos
    )
    write(path, {"general.architecture": Value("llama", GGUFValueType.STRING), gguf.Keys.LLM.BLOCK_COUNT.format(arch="llama"):
                 Value(n_layers, GGUFValueType.UINT32)}, infos, data)  # fmt: skip
    return [info for info in infos if info.name.startswith("blk.") and len(info.shape) == 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for source and output; 7 GB for all layers")
    parser.add_argument("--layers", type=int, default=28)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    source, imatrix = args.work / "source.gguf", args.work / "imatrix.gguf"
    if not source.is_file():
        matrices = write_model(source, args.layers)
        rng = np.random.default_rng(1)
        one = np.ones(1, dtype=np.float32)
        write_imatrix(imatrix, Imatrix({m.name: Entry(rng.random((1, m.shape[1]), dtype=np.float32) + 0.1, one) for m in matrices}, ["random"], 1, 1))
        print(f"made {source}: {source.stat().st_size:,} bytes; run again to measure, this process held its largest tensor")
        return
    before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"imports: {before / 2**30:.2f} GiB")
    made = convert(source, args.work / "out.gguf", Settings(calibration=Calibration(imatrix=imatrix)))
    print(report.convert_text(made))


if __name__ == "__main__":
    main()
