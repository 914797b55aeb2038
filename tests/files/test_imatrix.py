"""Importance files: both layouts, experts, coverage, and imatrices of other models."""

import struct
from pathlib import Path

import numpy as np
import pytest

from aaac_gguf import resources
from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.errors import AaacError
from aaac_gguf.files.imatrix import Coverage, Entry, Imatrix, read_imatrix, write_imatrix
from aaac_gguf.llama import tools
from aaac_gguf.models import checkpoint


def entry(values, counts=(1.0,)) -> Entry:
    return Entry(np.atleast_2d(np.asarray(values, dtype=np.float32)), np.asarray(counts, dtype=np.float32))


def write_dat(path: Path, entries: dict[str, tuple[int, list[float]]], dataset: str | None = "text.txt") -> None:
    data = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        data += (
            struct.pack("<i", len(name))
            + name.encode()
            + struct.pack("<ii", n_calls, len(values))
            + np.asarray(values, "<f4").tobytes()
        )
    if dataset is not None:
        data += struct.pack("<ii", 5, len(dataset)) + dataset.encode()
    path.write_bytes(data)


def test_importance_is_the_mean():
    np.testing.assert_array_equal(entry([6, 3], [3]).importance(), [2, 1])
    np.testing.assert_array_equal(entry([0, 0], [0]).importance(), [1, 1])


def test_gguf_round_trip(tmp_path):
    imatrix = Imatrix({"a.weight": entry([1, 2], [4]), "e.weight": entry([[1, 2], [3, 4]], [5, 0])}, ["x.txt"], 7, 512)
    write_imatrix(tmp_path / "i.gguf", imatrix)
    again = read_imatrix(tmp_path / "i.gguf")
    assert (again.datasets, again.n_chunks, again.chunk_size) == (["x.txt"], 7, 512)
    for name, e in imatrix.entries.items():
        np.testing.assert_array_equal(again.entries[name].sums, e.sums)
        np.testing.assert_array_equal(again.entries[name].counts, e.counts)


@pytest.mark.parametrize("dataset", ["text.txt", None])
def test_legacy_dat(tmp_path, dataset):
    write_dat(tmp_path / "i.dat", {"a.weight": (4, [8, 4])}, dataset)
    imatrix = read_imatrix(tmp_path / "i.dat")
    np.testing.assert_array_equal(imatrix.entries["a.weight"].importance(), [2, 1])
    assert imatrix.datasets == ([dataset] if dataset else [])


def test_legacy_experts_are_unfolded(tmp_path):
    write_dat(tmp_path / "i.dat", {"e.weight": (2, [2, 4, 6, 8])})
    fitted = read_imatrix(tmp_path / "i.dat").fitted(tmp_path, {"e.weight": (2, 5, 2)})
    np.testing.assert_array_equal(fitted.entries["e.weight"].importance(), [[1, 2], [3, 4]])


def test_legacy_experts_of_zeros_were_never_reached(tmp_path):
    write_dat(tmp_path / "i.dat", {"e.weight": (2, [2, 4, 0, 0])})
    fitted = read_imatrix(tmp_path / "i.dat").fitted(tmp_path, {"e.weight": (2, 5, 2)})
    assert fitted.coverage({"e.weight": 20}) == Coverage(0.5, ["e.weight (expert 1)"])


def test_coverage():
    imatrix = Imatrix({"a": entry([1]), "e": entry([[1], [0]], [1, 0])})
    assert imatrix.coverage({"a": 10, "b": 10, "e": 20}) == Coverage(0.5, ["b", "e (expert 1)"])


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"other": entry([1, 2])}, "names no tensor of this model"),
        ({"a": entry([1, 2, 3])}, "tensor a has 3 channels, the model's has 2"),
        ({"a": entry([1, np.nan])}, "not finite or negative"),
        ({"a": entry([1, -1])}, "not finite or negative"),
    ],
)
def test_imatrix_of_another_model(entries, words):
    with pytest.raises(AaacError, match=words):
        Imatrix(entries).fitted(Path("i.gguf"), {"a": (5, 2), "b": (5, 2)})


def test_refusals(tmp_path):
    with pytest.raises(AaacError, match="no such file"):
        read_imatrix(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"\x01\x00\x00\x00\xff\xff\xff\x7fabc")
    with pytest.raises(AaacError, match="not an importance matrix, or cut short"):
        read_imatrix(tmp_path / "junk")
    write_dat(tmp_path / "i.dat", {"a.weight": (4, [8, 4])})
    (tmp_path / "cut.dat").write_bytes((tmp_path / "i.dat").read_bytes()[:-12])
    with pytest.raises(AaacError, match="cut short"):
        read_imatrix(tmp_path / "cut.dat")


def test_a_model_is_not_an_imatrix(source):
    with pytest.raises(AaacError, match="not an importance matrix"):
        read_imatrix(source)


@pytest.mark.llama
@pytest.mark.parametrize("suffix", ["gguf", "dat"])
def test_llama_imatrix_sees_what_transformers_sees(patched, demo_full, tmp_path, suffix):
    """The same text through llama-imatrix and through our calibration, in both of its file layouts."""
    out, log = tmp_path / f"imatrix.{suffix}", tmp_path / "log"
    args = [
        "-m",
        demo_full.path,
        "-f",
        resources.SAMPLE_TEXT,
        "-c",
        "256",
        "--chunks",
        "4",
        "-o",
        out,
        "--output-format",
        suffix,
        "--no-ppl",
    ]
    tools.run_logged_tool("llama-imatrix", args, log)
    theirs = read_imatrix(out)
    # In a row, as the text has fewer than 1000 sequences.
    tokens = tokens_module.text_tokens(resources.MODEL, resources.SAMPLE_TEXT, 1000, 256)[0][:4]
    ours = calibrate.importance(checkpoint.load_model(resources.MODEL), tokens, "llama", demo_full.tensors, "sample")
    assert set(theirs.entries) == set(ours.entries) - {"token_embd.weight"}
    for name, e in theirs.entries.items():
        expected, got = e.importance(), ours.entries[name].importance()
        assert np.abs(got - expected).sum() < 0.02 * expected.sum(), name


def test_an_unreached_expert_weighs_as_much_as_the_others_on_average():
    """Not 1 in the units of the activations: the experts of a tensor share its codebooks."""
    sums = np.array([[400, 200], [0, 0], [600, 1200]], dtype=np.float32)
    np.testing.assert_array_equal(
        Entry(sums, np.array([2, 0, 3], dtype=np.float32)).importance(), [[200, 100], [225, 225], [200, 400]]
    )
    np.testing.assert_array_equal(Entry(sums * 0, np.zeros(3, dtype=np.float32)).importance(), np.ones((3, 2)))


def test_coverage_is_by_weights():
    def ones(*counts):
        return Entry(np.ones((len(counts), 2), dtype=np.float32), np.array(counts, dtype=np.float32))

    imatrix = Imatrix({"a": ones(4), "e": ones(1, 0, 5, 0), "none": ones(0, 0), "other": ones(1)})
    expected = Coverage((100 + 20) / 200, ["e (experts 1, 3)", "none", "absent"])
    assert imatrix.coverage({"a": 100, "e": 40, "none": 50, "absent": 10}) == expected
