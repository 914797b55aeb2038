"""Run llama.cpp's convert_hf_to_gguf.py without the tensor data.

    python _hf_header.py PATH/convert_hf_to_gguf.py ARGUMENTS ...

The converter checks and writes vocabulary, metadata and tensor shapes. In place of the weights the file gets a hole of
their size. This is a separate program because the converter must import the gguf library of its own version.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def write_hole(self: Any, *, progress: bool = False) -> None:
    """Write a hole of the size of the tensor data, in place of GGUFWriter.write_tensors_to_file."""
    self.write_ti_data_to_file()
    for f, tensors in zip(self.fout, self.tensors, strict=True):
        self.write_padding(f, f.tell())
        f.truncate(f.tell() + sum(self.ggml_pad(t.nbytes, self.data_alignment) for t in tensors.values()))


if __name__ == "__main__":
    del sys.argv[0]
    folder = Path(sys.argv[0]).parent
    sys.path[0:1] = [str(folder), str(folder / "gguf-py")]
    import gguf

    gguf.GGUFWriter.write_tensors_to_file = write_hole
    runpy.run_path(sys.argv[0], run_name="__main__")
