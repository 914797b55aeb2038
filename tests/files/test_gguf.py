"""The reader refuses what docs/format.md lists and survives damage; the writer leaves nothing half-written."""

import io

import gguf
import numpy as np
import pytest
from aaac_samples import random_blocks
from conftest import random_codec, write_source
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from gguf_samples import KV, aaac_file
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from aaac_gguf.errors import AaacError
from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.atomic import atomic
from aaac_gguf.files.gguf import TensorInfo, Value


def test_round_trip(tmp_path, rng):
    held = aaac_file(tmp_path / "a.gguf", rng)
    file = gguf_io.read(tmp_path / "a.gguf")
    assert file.architecture == "llama"
    for name, (qtype, blocks, codec) in held.items():
        assert file.tensors[name].tensor_type == qtype.type_id
        np.testing.assert_array_equal(file.tensors[name].data, blocks)
        np.testing.assert_array_equal(file[name], fmt.decode(qtype, blocks, codec))


def test_the_gguf_library_reads_and_writes_the_types(tmp_path):
    data = random_blocks(fmt.G16, 4, 256, seed=0)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=T["AAAC4_G16"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = gguf.GGUFReader(tmp_path / "a.gguf").tensors[0]
    assert tensor.tensor_type.name == "AAAC4_G16"
    assert tensor.shape.tolist() == [256, 4]
    np.testing.assert_array_equal(tensor.data, data)


BOOKS = np.tile(np.arange(-8, 8), 6).tolist()
i8, f32, u8 = (V.ARRAY, V.INT8), (V.ARRAY, V.FLOAT32), (V.ARRAY, V.UINT8)
NAMES = ["aaac4_g16", "aaac4_g32", "aaac4_g128"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({fmt.KEY_VERSION: Value(7, V.UINT32)}, "aaac.format_version is 7"),
        ({fmt.KEY_VERSION: None}, "metadata key aaac.format_version is missing"),
        ({fmt.KEY_CODEBOOKS: None}, "metadata key aaac.codebooks is missing"),
        ({fmt.KEY_CODEBOOKS: Value(BOOKS, V.ARRAY, V.INT32)}, "aaac.codebooks is not an array of INT8"),
        (
            {fmt.KEY_TENSOR_NAMES: Value(["other", *NAMES[1:]], V.ARRAY, V.STRING)},
            "aaac4_g16 is not in aaac.tensor_names",
        ),
        ({fmt.KEY_TENSOR_NAMES: Value([*NAMES[:2], NAMES[0]], V.ARRAY, V.STRING)}, "lists tensor aaac4_g16 twice"),
        (
            {fmt.KEY_TENSOR_NAMES: Value(NAMES[:2], V.ARRAY, V.STRING)},
            "describes 3 tensors and aaac.tensor_names lists 2",
        ),
        ({fmt.KEY_CODEBOOKS: Value(BOOKS[::-1], *i8)}, "aaac4_g16: a codebook is not strictly ascending"),
        ({fmt.KEY_SCALE_BASE: Value([1.0, -1.0, 1.0], *f32)}, "aaac4_g32: scale base -1.0"),
        ({fmt.KEY_SCALE_BASE: Value([1.0, 1.0, float("nan")], *f32)}, "aaac4_g128: scale base nan"),
        ({fmt.KEY_SCALE_MANTISSA_BITS: Value([3, 3, 9], *u8)}, "aaac4_g128: scale mantissa bits are 9"),
    ],
)
def test_refusals(tmp_path, rng, change, words):
    path = tmp_path / "bad.gguf"
    aaac_file(path, rng, change)
    with pytest.raises(AaacError, match=words) as e:
        gguf_io.read(path)
    assert str(path) in str(e.value)
    assert "\n" not in str(e.value)


def test_a_listed_tensor_that_is_not_aaac_is_refused(tmp_path, rng):
    codecs = {"a": random_codec(rng)}
    header = gguf_io.render_header({**KV, **gguf_io.codec_values(codecs)}, [TensorInfo("a", (1, 32), T.F32)])
    (tmp_path / "bad.gguf").write_bytes(header + bytes(128))
    with pytest.raises(AaacError, match="lists a, which is not an AAAC tensor"):
        gguf_io.read(tmp_path / "bad.gguf")


def test_rows_that_are_not_whole_blocks_are_refused(tmp_path, rng):
    path = tmp_path / "bad.gguf"
    aaac_file(path, rng, types=[fmt.G16])
    data = bytearray(path.read_bytes())
    at = data.index(b"aaac4_g16", data.index(b"aaac.scale_mantissa_bits")) + len("aaac4_g16") + 4
    assert data[at : at + 8] == (256).to_bytes(8, "little")
    data[at : at + 8] = (250).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(AaacError, match="rows of 250 weights, not whole blocks of 64"):
        gguf_io.read(path)


def test_every_truncation_is_refused(tmp_path, rng):
    aaac_file(tmp_path / "a.gguf", rng)
    data = (tmp_path / "a.gguf").read_bytes()
    for n in [*range(0, len(data) - 64, 97), len(data) - 33]:
        (tmp_path / "cut.gguf").write_bytes(data[:n])
        with pytest.raises(AaacError):
            gguf_io.read(tmp_path / "cut.gguf")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(flips=[(1046, 7)])  # a scale code of AAAC4_G128 beyond 127
@given(flips=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_are_read_or_refused(tmp_path, flips):
    """Whatever the damage: a file that opens and decodes, or an AaacError. Nothing else, and no endless loop."""
    path = tmp_path / "flipped.gguf"
    aaac_file(path, np.random.default_rng(0))
    data = bytearray(path.read_bytes())
    header = len(data) - 3000  # the flips are for the header; block bytes are nearly all valid
    for position, bit in flips:
        data[position % header] ^= 1 << bit
    path.write_bytes(data)
    try:
        file = gguf_io.read(path)
        for name in file.codecs:
            file[name]
    except AaacError as e:
        assert "\n" not in str(e)


def test_hostile_lengths_end_at_once(tmp_path):
    head = io.BytesIO()
    head.write(b"GGUF" + (3).to_bytes(4, "little") + (0).to_bytes(8, "little") + (1).to_bytes(8, "little"))
    head.write(
        (1).to_bytes(8, "little")
        + b"k"
        + int(V.ARRAY).to_bytes(4, "little")
        + int(V.UINT8).to_bytes(4, "little")
        + (2**62).to_bytes(8, "little")
    )
    (tmp_path / "bad.gguf").write_bytes(head.getvalue())
    with pytest.raises(AaacError, match="the file ends at"):
        gguf_io.read(tmp_path / "bad.gguf")


def test_atomic_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic(path) as f:
        f.write(b"half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert path.read_bytes() == b"old"


def test_a_full_disk_is_a_clear_error(tmp_path):
    with pytest.raises(AaacError, match="the disk is full"), atomic(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_missing_file():
    with pytest.raises(AaacError, match="no such file"):
        gguf_io.read("/nonexistent.gguf")


def test_the_byte_order_of_a_big_endian_file_is_named(tmp_path):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_token_list(["a", "bc"])
    writer.add_tensor("x", np.ones((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AaacError, match=r"big\.gguf: is big-endian, .*gguf-convert-endian"):
        gguf_io.read(path)


def test_positions_are_no_more_than_the_model_has(tmp_path):
    norm = {"output_norm.weight": np.ones(64, dtype=np.float32)}
    learned = norm | {"position_embd.weight": np.ones((96, 64), dtype=np.float32)}
    for tensors, said, expected in (
        (norm, {}, 512),
        (norm, {"context_length": 1024}, 512),
        (norm, {"context_length": 128}, 128),
        (learned, {}, 96),
        (learned, {"context_length": 128}, 96),
    ):
        file = gguf_io.read(write_source(tmp_path / "x.gguf", tensors, settings=said))
        assert file.positions(512) == expected
