"""Patched llama.cpp's loader and llama-quantize refuse bad files, each with its own message; split files; file types.

Messages of the loader are read from llama-bench -v, which logs from the thread that loads. The other tools log from a
thread of their own, and may end before it has written: llama-completion never shows the message. llama-quantize makes
no tensors.
"""

import subprocess

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as V

from aaac_gguf import resources
from aaac_gguf.conversion import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.gguf import Value
from aaac_gguf.llama import tools
from aaac_gguf.reporting import demo

pytestmark = pytest.mark.llama

NAMES, BOOKS, BASE, BITS = "aaac.tensor_names", "aaac.codebooks", "aaac.scale_base", "aaac.scale_mantissa_bits"


@pytest.fixture(scope="module")
def converted(patched, tmp_path_factory):
    """Return converted(type), which is the bundled model in that type, made once."""
    folder = tmp_path_factory.mktemp("loader")

    def convert_once(name):
        out = folder / f"{name}.gguf"
        if not out.is_file():
            convert.convert(resources.MODEL, out, Settings(type=name, calibration="none", method="paper"))
        return out

    return convert_once


@pytest.fixture(scope="module", params=["AAAC4_G16", "AAAC4_G32", "AAAC4_G128"])
def model(request, converted):
    return converted(request.param)


@pytest.fixture(scope="module")
def g16(converted):
    return converted("AAAC4_G16")


@pytest.fixture(scope="module")
def g128(converted):
    return converted("AAAC4_G128")


def run(tool, *args, log):
    """Return (status, output). The output goes to a file, since a pipe may lose the end."""
    with open(log, "wb") as f:
        status = subprocess.run(
            [tools.tool(tool), *map(str, args)],
            stdout=f,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=120,
        ).returncode
    return status, log.read_text(errors="replace")


def load(path, *args):
    return run("llama-bench", "-v", "-m", path, "-t", 1, "-r", 1, "-p", 0, "-n", 1, *args, log=path.with_suffix(".log"))


def generate(path):
    args = (
        "-m",
        path,
        "-p",
        demo.PROMPT,
        "-n",
        24,
        "-t",
        1,
        "--temp",
        0,
        "-no-cnv",
        "--no-warmup",
        "--no-display-prompt",
    )
    log = path.with_suffix(".text")
    with open(log, "wb") as f:
        subprocess.run(
            [tools.tool("llama-completion"), *map(str, args)],
            stdout=f,
            stderr=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            check=True,
        )
    return log.read_text()


def rewrite(source, out, change_metadata=None, change_data=None):
    """Make a copy of `source` whose metadata, or whose data of each tensor, a test has changed."""
    file = gguf_io.read(source)
    metadata = gguf_io.field_values(file.fields)
    if change_metadata:
        change_metadata(metadata)
    infos = [
        gguf_io.TensorInfo(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type)
        for t in file.tensors.values()
    ]
    with open(out, "wb") as f:
        f.write(gguf_io.render_header(metadata, infos))
        for t in file.tensors.values():
            data = np.array(t.data)
            if change_data:
                change_data(t.name, data)
            f.write(data.tobytes() + bytes(-data.nbytes % gguf.GGUF_DEFAULT_ALIGNMENT))
    return out


def set_item(key, index, value):
    def change(metadata):
        items = list(metadata[key].value)
        items[index] = value
        metadata[key] = metadata[key]._replace(value=items)

    return change


def shorten(key, n=1):
    def change(metadata):
        metadata[key] = metadata[key]._replace(value=list(metadata[key].value)[:-n])

    return change


def retype(key, kind):
    def change(metadata):
        metadata[key] = metadata[key]._replace(item_kind=kind, value=[abs(int(x)) for x in metadata[key].value])

    return change


def list_twice(metadata):
    names = list(metadata[NAMES].value)
    metadata[NAMES] = metadata[NAMES]._replace(value=[names[1], *names[1:]])


def not_listed(metadata):
    set_item(NAMES, 0, "blk.77.nothing.weight")(metadata)


REFUSED = {
    "no version": (lambda kv: kv.pop("aaac.format_version"), "aaac.tensor_names does not list it"),
    "version 2": (
        lambda kv: kv.update({"aaac.format_version": Value(2, V.UINT32)}),
        "aaac.format_version is 2, this build reads 1",
    ),
    "version of another type": (
        lambda kv: kv.update({"aaac.format_version": Value("1", V.STRING)}),
        "aaac.format_version is",
    ),
    "no names": (lambda kv: kv.pop(NAMES), "aaac.tensor_names is missing"),
    "no codebooks": (lambda kv: kv.pop(BOOKS), "aaac.codebooks is missing"),
    "a tensor not listed": (not_listed, "aaac.tensor_names does not list it"),
    "a tensor listed twice": (list_twice, "twice"),
    "one codebook short": (shorten(BOOKS, 32), "aaac.codebooks has"),
    "one level short": (shorten(BOOKS), "aaac.codebooks has"),
    "one scale short": (shorten(BASE), "aaac.scale_base has"),
    "one m short": (shorten(BITS), "aaac.scale_mantissa_bits has"),
    "codebooks of uint8": (retype(BOOKS, V.UINT8), "aaac.codebooks is not an array of i8"),
    "scales of int32": (retype(BASE, V.INT32), "aaac.scale_base is not an array of f32"),
    "m of uint32": (retype(BITS, V.UINT32), "aaac.scale_mantissa_bits is not an array of u8"),
    "unsorted codebook": (set_item(BOOKS, 3, 127), "codebook"),
    "level of -128": (set_item(BOOKS, 0, -128), "codebook"),
    "d is NaN": (set_item(BASE, 0, float("nan")), "scale base"),
    "d is infinite": (set_item(BASE, 0, float("inf")), "scale base"),
    "d is zero": (set_item(BASE, 0, 0.0), "scale base"),
    "d is negative": (set_item(BASE, 0, -1.0), "scale base"),
    "m is 1": (set_item(BITS, 0, 1), "mantissa bits"),
    "m is 6": (set_item(BITS, 0, 6), "mantissa bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, g16, tmp_path):
    change, message = REFUSED[name]
    status, output = load(rewrite(g16, tmp_path / "bad.gguf", change))
    assert status == 1
    errors = [line for line in output.splitlines() if "error" in line]
    assert any(message in line for line in errors), errors or output[-2000:]


def test_truncated_data_is_refused(g16, tmp_path):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(g16.read_bytes()[:-1000])
    status, output = load(bad)
    assert status == 1
    assert "not within the file bounds" in output


def test_every_type_loads_and_prints_its_name(model, tmp_path):
    status, output = load(rewrite(model, tmp_path / "copy.gguf"))
    assert status == 0
    assert model.stem in output[output.index("file type") :].splitlines()[0]


def test_check_tensors_finds_the_bit_that_must_be_zero(g128, tmp_path):
    def flip(name, data):
        if name == "blk.1.ffn_down.weight":
            data.reshape(-1)[66 * 5] |= 0x80

    # llama-bench has no --check-tensors
    args = ("--check-tensors", "-p", "a", "-n", 1, "-t", 1, "-no-cnv", "--no-warmup")
    good, bad = rewrite(g128, tmp_path / "good.gguf"), rewrite(g128, tmp_path / "bad.gguf", change_data=flip)
    assert run("llama-completion", "-m", good, *args, log=tmp_path / "good.log")[0] == 0
    status, output = run("llama-completion", "-m", bad, *args, log=tmp_path / "bad.log")
    assert status == 1, output
    status, output = run("llama-completion", "-m", bad, *args[1:], log=tmp_path / "unchecked.log")
    assert status == 0, output


def test_quantize_names_what_it_cannot_do(model, tmp_path):
    out = tmp_path / "out.gguf"
    status, output = run("llama-quantize", "--allow-requantize", model, out, "Q4_0", log=tmp_path / "log")
    assert status == 1
    assert f"is {model.stem.lower()}, which can only be copied here" in output
    status, output = run(
        "llama-quantize", "--tensor-type", "ffn_down=aaac4_g16", model, out, "COPY", log=tmp_path / "log"
    )
    assert status == 1
    assert "AAAC types cannot be made here" in output


def test_quantize_copies(model, tmp_path):
    out = tmp_path / "out.gguf"
    status, output = run("llama-quantize", model, out, "COPY", log=tmp_path / "log")
    assert status == 0, output
    assert generate(out) == generate(model)


def test_split_file(model, tmp_path):
    status, output = run(
        "llama-gguf-split", "--split", "--split-max-tensors", 20, model, tmp_path / "part", log=tmp_path / "log"
    )
    assert status == 0, output
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 1
    text = generate(model)
    assert len(text) > 20
    assert generate(parts[0]) == text
