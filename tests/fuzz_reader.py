"""Fuzz the readers of model and importance files: any bytes give a file that works, or an AaacError of one line.

    pip install atheris
    python tests/fuzz_reader.py --seconds 60

Coverage-guided (libFuzzer). Half of the mutations know the header's structure. It ends with status 0 after that time,
or at the first failure with another status, a traceback and the name of the file that made it. A failure is any other
exception, 2 GiB of memory, or 10 seconds for one file.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import tempfile
from pathlib import Path

import atheris
import numpy as np

with atheris.instrument_imports(include=["aaac_gguf.files", "aaac_gguf.reporting", "gguf.gguf_reader"]):
    from aaac_gguf.errors import AaacError
    from aaac_gguf.files import format as fmt
    from aaac_gguf.files import gguf as gguf_io
    from aaac_gguf.files import imatrix
    from aaac_gguf.reporting import inspection

import hostile  # last: what it imports must have been instrumented


def use_model(path: Path) -> None:
    """Read all that the verbs read of a model's file."""
    file = gguf_io.read(path)
    for name in file.codecs:
        fmt.check_blocks(fmt.TYPES_BY_ID[file.tensors[name].tensor_type], file.tensors[name].data, name)
        file[name]
    gguf_io.field_values(file.fields)
    inspection.inspect_text(file)


def use_imatrix(path: Path) -> None:
    entries = imatrix.read_imatrix(path).entries
    shapes = {name: (len(e.sums), 1, e.sums.shape[1]) for name, e in entries.items()}
    fitted = imatrix.read_imatrix(path).fitted(path, shapes)
    for entry in fitted.entries.values():
        entry.importance()
    fitted.coverage(dict.fromkeys(shapes, 1))


def seeds(folder: Path) -> None:
    """One valid file of each kind."""
    hostile.write_corpus(folder, 50)
    entry = imatrix.Entry(np.ones((2, 4), "f4"), np.ones(2, "f4"))
    imatrix.write_imatrix(folder / "imatrix.gguf", imatrix.Imatrix({"a.weight": entry}, ["text"], 1, 4))
    dat = struct.pack("<ii1siiffii4s", 1, 1, b"a", 3, 2, 1.0, 2.0, 5, 4, b"text")
    (folder / "imatrix.dat").write_bytes(dat)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        try:
            return hostile.mutate(data, rng)[:max_size]
        except (ValueError, LookupError):  # no header that can be followed to its end
            pass
    return atheris.Mutate(data, max_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="aaac-fuzz-"))
    corpus, path = folder / "corpus", folder / "input"
    seeds(corpus)

    def one_input(data: bytes) -> None:
        path.write_bytes(data)
        for use in (use_model, use_imatrix):
            try:
                use(path)
            except AaacError as e:
                assert len(str(e).splitlines()) == 1, str(e)

    limits = ["-rss_limit_mb=2048", "-timeout=10", "-max_len=100000", "-print_final_stats=1"]
    flags = [*limits, f"-max_total_time={args.seconds}", f"-seed={args.seed}", f"-artifact_prefix={folder}/"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
