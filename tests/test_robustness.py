"""Whatever is in a file or an argument: one line that says what is wrong, and nothing half-written."""

import os
import random
import struct
import subprocess
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import gguf
import hostile
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aaac_gguf import cli, resources
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.errors import AaacError
from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files import imatrix
from aaac_gguf.files.gguf import TensorInfo, Value
from aaac_gguf.reporting import inspection

HYPOTHESIS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def one_line(error: AaacError) -> bool:
    return len(str(error).splitlines()) == 1


def use(path: Path) -> None:
    """Everything that the verbs read of a file."""
    file = gguf_io.read(path)
    for name in file.codecs:
        fmt.check_blocks(fmt.TYPES_BY_ID[file.tensors[name].tensor_type], np.asarray(file.tensors[name].data), name)
        file[name]
    gguf_io.field_values(file.fields)
    inspection.inspect_text(file)


#
# The readers
#


@HYPOTHESIS
@given(seed=st.integers(0, 2**32), n_experts=st.sampled_from([0, 2]))
def test_hostile_files_are_read_or_refused(tmp_path, seed, n_experts):
    path = tmp_path / "hostile.gguf"
    path.write_bytes(hostile.hostile_file(random.Random(seed), n_experts))
    try:
        use(path)
    except AaacError as e:
        assert one_line(e)


def test_lies_about_sizes_allocate_nothing(tmp_path):
    """Every count, length, dimension and offset of the header, made huge, one at a time."""
    data, path = hostile.render(*hostile.tiny_model()), tmp_path / "lie.gguf"
    path.write_bytes(data)
    use(path)
    tracemalloc.start()
    try:
        for place in hostile.places(data):
            if place.kind in ("value", "text", "type"):
                continue
            for n in (2**31, 2**62, 2**64 - 1):
                path.write_bytes(
                    data[: place.offset]
                    + (n % 2 ** (8 * place.size)).to_bytes(place.size, "little")
                    + data[place.offset + place.size :]
                )
                tracemalloc.reset_peak()
                with pytest.raises(AaacError):
                    gguf_io.read(path)
                assert tracemalloc.get_traced_memory()[1] < 10 * len(data) + 4_000_000, place
    finally:
        tracemalloc.stop()


def test_many_names_with_the_last_one_twice_end_at_once(tmp_path):
    """Quadratic in the names, this would take an hour."""
    names = [f"t{i}" for i in range(100_000)]
    with pytest.raises(AaacError, match="lists tensor t99999 twice"):
        fmt.codecs_from_metadata(1, [*names, names[-1]], np.zeros(32 * 100_001, np.int8), *np.ones((2, 100_001)))


def test_many_dimensions_are_refused_before_they_are_multiplied(tmp_path):
    n = 200_000
    path = tmp_path / "bad.gguf"
    path.write_bytes(
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
        + struct.pack("<Q1sI", 1, b"t", n)
        + b"\xff" * 8 * n
        + struct.pack("<IQ", 0, 0)
    )
    with pytest.raises(AaacError, match="has 200000 dimensions, not 1 to 4"):
        gguf_io.read(path)


def test_offsets_beyond_32_bits_with_an_alignment_key(tmp_path):
    """The alignment is a uint32, and the library's arithmetic on it would stay one."""
    kv = {"general.architecture": Value("llama", V.STRING), "general.alignment": Value(32, V.UINT32)}
    infos = [TensorInfo("a", (2**31 + 64,), T.F16), TensorInfo("b", (64,), T.F32)]
    path = tmp_path / "sparse.gguf"
    with open(path, "wb") as f:
        f.write(gguf_io.render_header(kv, infos))
        f.truncate(f.tell() + 2 * (2**31 + 64) + 256)
    assert gguf_io.read(path).tensors["b"].data.shape == (64,)


def test_control_characters_in_names_stay_on_one_line(tmp_path):
    kv, infos, data = hostile.tiny_model()
    kv = {
        **kv,
        fmt.KEY_TENSOR_NAMES: kv[fmt.KEY_TENSOR_NAMES]._replace(
            value=["a\nb\x1b[31m", *kv[fmt.KEY_TENSOR_NAMES].value[1:]]
        ),
    }
    path = tmp_path / "bad.gguf"
    path.write_bytes(hostile.render({**kv, fmt.KEY_SCALE_BASE: Value([0.0] * 8, V.ARRAY, V.FLOAT32)}, infos, data))
    with pytest.raises(AaacError) as e:
        gguf_io.read(path)
    assert r"a\nb\x1b[31m" in str(e.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({fmt.KEY_VERSION: Value(1, V.UINT64)}, "aaac.format_version is not a UINT32"),
        ({fmt.KEY_TENSOR_NAMES: Value([1, 2], V.ARRAY, V.UINT8)}, "aaac.tensor_names is not an array of STRING"),
        ({fmt.KEY_TENSOR_NAMES: Value("abcdefgh", V.STRING)}, "aaac.tensor_names is not an array of STRING"),
        ({fmt.KEY_TENSOR_NAMES: Value([], V.ARRAY, V.STRING)}, "describes 8 tensors and aaac.tensor_names lists 0"),
        ({fmt.KEY_SCALE_BASE: Value([float("inf")] * 8, V.ARRAY, V.FLOAT32)}, "scale base inf"),
    ],
)
def test_wrong_types_of_keys_are_named(tmp_path, change, words):
    kv, infos, data = hostile.tiny_model()
    (tmp_path / "bad.gguf").write_bytes(hostile.render({**kv, **change}, infos, data))
    with pytest.raises(AaacError, match=words):
        gguf_io.read(tmp_path / "bad.gguf")


def test_text_that_is_not_utf8_is_refused_on_reading(tmp_path):
    data = hostile.render(*hostile.tiny_model()).replace(b"no_vocab", b"no_voca\xff")
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(AaacError, match="not a whole GGUF file"):
        gguf_io.read(tmp_path / "bad.gguf")


def imatrix_files(folder: Path) -> tuple[bytes, bytes]:
    entries = {
        "a.weight": imatrix.Entry(np.ones((1, 8), "f4"), np.ones(1, "f4")),
        "e.weight": imatrix.Entry(np.ones((2, 4), "f4"), np.ones(2, "f4")),
    }
    imatrix.write_imatrix(folder / "imatrix.gguf", imatrix.Imatrix(entries, ["x"], 3, 512))
    dat = (
        struct.pack("<i", 2) + 2 * (struct.pack("<i1sii", 1, b"a", 3, 8) + bytes(32)) + struct.pack("<ii1s", 3, 1, b"x")
    )
    return (folder / "imatrix.gguf").read_bytes(), dat


@HYPOTHESIS
@given(seed=st.integers(0, 2**32), form=st.sampled_from([0, 1]))
def test_hostile_importance_files_are_read_or_refused(tmp_path, seed, form):
    rng, path = random.Random(seed), tmp_path / "hostile"
    data = imatrix_files(tmp_path)[form]
    if form == 0:
        data = hostile.mutate(data, rng)
    else:
        at = 4 * rng.randrange(len(data) // 4)
        data = (
            data[:at]
            + struct.pack("<i", rng.choice([0, -1, 1, 2**31 - 1, -(2**31), 9]))
            + data[at + 4 : rng.randrange(at, 2 * len(data))]
        )
    path.write_bytes(data)
    try:
        read = imatrix.read_imatrix(path)
        read.fitted(path, {name: (len(e.sums), 1, e.sums.shape[1]) for name, e in read.entries.items()})
        assert read.n_chunks * read.chunk_size is not None
    except AaacError as e:
        assert one_line(e)


@pytest.mark.parametrize("counts", [np.array([np.nan]), np.array([-1.0])])
def test_counts_that_are_not_numbers_of_tokens_are_refused(counts):
    entry = imatrix.Entry(np.ones((1, 2), "f4"), counts.astype("f4"))
    with pytest.raises(AaacError, match="not finite or negative"):
        imatrix.Imatrix({"a": entry}).fitted(Path("i"), {"a": (5, 2)})


def test_the_fuzzer_runs():
    if not find_spec("atheris"):
        pytest.skip("atheris is not installed (pip install atheris)")
    script = Path(__file__).with_name("fuzz_reader.py")
    result = subprocess.run(
        [sys.executable, script, "--seconds", "2"], capture_output=True, text=True, errors="replace"
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "stat::number_of_executed_units" in result.stderr


#
# Every verb on every kind of bad file
#


def kv_only(path: Path, **kv: Value) -> None:
    path.write_bytes(gguf_io.render_header({"general.architecture": Value("llama", V.STRING), **kv}, []))


def no_architecture(path: Path) -> None:
    tensor = struct.pack("<Q1sIQIQ", 1, b"t", 1, 32, T.F32, 0)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + tensor
    path.write_bytes(head + bytes(-len(head) % 32 + 128))


def unreadable(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    path.write_bytes(hostile.render(*hostile.tiny_model()))
    path.chmod(0)


def damaged(change):
    return lambda path: path.write_bytes(change(hostile.render(*hostile.tiny_model())))


BAD_FILES = {
    "missing": lambda path: None,
    "directory": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("It is a truth universally acknowledged\n" * 50),
    "noise": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "a link to itself": lambda path: path.symlink_to(path),
    "unreadable": unreadable,
    "magic alone": lambda path: path.write_bytes(b"GGUF"),
    "version 99": damaged(lambda data: data[:4] + struct.pack("<I", 99) + data[8:]),
    "big-endian": damaged(lambda data: data[:4] + data[4:8][::-1] + data[8:]),
    "cut in the header": damaged(lambda data: data[:500]),
    "cut in the data": damaged(lambda data: data[:-2000]),
    "no tensors": kv_only,
    "wrong type id": damaged(
        lambda data: data.replace(struct.pack("<QQI", 128, 64, 80), struct.pack("<QQI", 128, 64, 79))
    ),
}
VERBS = {
    "convert": lambda bad, good: ["convert", bad, "-o", bad.parent / "out"],
    "convert --dry-run": lambda bad, good: ["convert", bad, "-o", bad.parent / "out", "--dry-run"],
    "convert --imatrix": lambda bad, good: ["convert", good, "-o", bad.parent / "out", "--imatrix", bad],
    "verify": lambda bad, good: ["verify", bad],
    "verify --source": lambda bad, good: ["verify", good, "--source", bad],
    "dequantize": lambda bad, good: ["dequantize", bad, "-o", bad.parent / "out"],
    "inspect": lambda bad, good: ["inspect", bad],
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("verb", VERBS)
def test_bad_files(verb, kind, source, tmp_path, refused):
    if kind == "no tensors" and verb == "verify":
        pytest.skip("its structure is sound")
    folder = tmp_path / "folder"
    folder.mkdir()
    bad = folder / "bad"
    BAD_FILES[kind](bad)
    assert str(bad) in refused(*VERBS[verb](bad, source))
    assert {p.name for p in folder.iterdir()} <= {"bad"}


@pytest.mark.parametrize("kind", ["missing", "directory", "empty", "noise", "a link to itself", "unreadable"])
def test_bad_texts(kind, tmp_path):
    bad = tmp_path / "bad"
    BAD_FILES[kind](bad)
    with pytest.raises(AaacError) as e:
        tokens_module.text_tokens(resources.MODEL, bad, 1, 8)
    assert str(e.value).startswith(f"`calibration` {bad}: ")


@pytest.mark.parametrize("verb", ["convert", "dequantize"])
def test_a_file_without_architecture_is_refused(verb, tmp_path, refused):
    no_architecture(tmp_path / "bad")
    assert "names no general.architecture" in refused(verb, tmp_path / "bad", "-o", tmp_path / "out")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a\nb"])
@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_odd_names(verb, name, refused):
    refused(verb, name)


@pytest.mark.parametrize("verb", ["convert", "dequantize"])
@pytest.mark.parametrize("out", ["x" * 300, "no/folder/out", "."])
def test_odd_outputs(verb, out, source, tmp_path, refused):
    refused(verb, source, "-o", tmp_path / out)


@pytest.mark.parametrize("plot", ["no/folder/out.png", "out.nothing", "."])
def test_odd_plots(plot, tmp_path, refused):
    (tmp_path / "a.gguf").write_bytes(hostile.render(*hostile.tiny_model()))
    refused("inspect", tmp_path / "a.gguf", "--plot", tmp_path / plot)
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]


def test_a_source_with_an_empty_array_converts(tmp_path, rng):
    """The gguf library refuses to write empty arrays, llama.cpp does not."""
    kv = {"general.architecture": Value("llama", V.STRING), "general.tags": Value([], V.ARRAY, V.STRING)}
    weight = rng.normal(size=(4, 64)).astype("<f4")
    (tmp_path / "a.gguf").write_bytes(
        gguf_io.render_header(kv, [TensorInfo("a.weight", (4, 64), T.F32)]) + weight.tobytes()
    )
    assert cli.main(["convert", str(tmp_path / "a.gguf"), "-o", str(tmp_path / "b.gguf")]) == 0
    field = gguf.GGUFReader(tmp_path / "b.gguf").fields["general.tags"]
    assert (field.types, field.contents()) == ([V.ARRAY], [])
