"""Conversions from measurements: the same bytes as direct ones, what is not measured twice, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_source

import aaac_gguf as aaac
from aaac_gguf import cli, resources
from aaac_gguf.conversion import mixed
from aaac_gguf.files.gguf import read
from aaac_gguf.files.imatrix import Entry, Imatrix, write_imatrix

CALIBRATION = ("--calib-sequences", 2, "--calib-length", 32)
# Two matrices of the first of four blocks are rounded by search.
OTHERS = r"blk\.[1-3]|ffn|attn_[qv]"
TWO = ("--tensor-type", f"{OTHERS}=F16")


def run(*args) -> int:
    return cli.main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def measured(llama_source, tmp_path_factory) -> Path:
    """Return measurements of the bundled model."""
    folder = tmp_path_factory.mktemp("measured") / "demo.moments"
    assert run("measure", resources.MODEL, "-o", folder, *CALIBRATION) == 0
    return folder


@pytest.mark.parametrize(
    "flags",
    [("--type", "AAAC4_G32"), ("--no-feedback",), ("--bpw", 13.45, "--stock")],
    ids=["feedback", "no-feedback", "mixed"],
)
def test_the_same_bytes_as_a_direct_conversion(measured, tmp_path, flags):
    assert run("convert", resources.MODEL, "-o", tmp_path / "direct.gguf", *CALIBRATION, *flags, *TWO) == 0
    flags = (*flags, *TWO, "--moments", measured)
    assert run("convert", resources.MODEL, "-o", tmp_path / "from.gguf", *flags) == 0
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "from.gguf").read_bytes()


def test_no_slow_part_runs_twice(measured, tmp_path, monkeypatch):
    """Neither the sweeps over the full model, nor the measurement of a type for another size."""
    folder = tmp_path / "m.moments"
    shutil.copytree(measured, folder)
    (folder / "types.jsonl").unlink(missing_ok=True)
    monkeypatch.setattr("aaac_gguf.calibration.activations.Activations.run", lambda *_: pytest.fail("runs forward"))
    monkeypatch.setattr("aaac_gguf.calibration.full_model.FullModel._backward", lambda *_: pytest.fail("backward"))
    asked = []
    type_errors = mixed._type_errors
    monkeypatch.setattr(mixed, "_type_errors", lambda name, *rest: asked.append(name) or type_errors(name, *rest))
    bits = []
    for bpw in (13.4, 13.5):
        plan = aaac.plan(
            resources.MODEL,
            tmp_path / "out.gguf",
            moments=folder,
            bpw=bpw,
            stock=True,
            tensor_types={OTHERS: "F16"},
        )
        bits.append(8 * sum(p.n_bytes for p in plan.plans) / sum(p.n_weights for p in plan.plans))
    assert bits[0] <= 13.4 < bits[1] <= 13.5
    assert sorted(asked) == [f"blk.0.attn_{part}.weight" for part in ("k", "output")]
    lines = [json.loads(line) for line in (folder / "types.jsonl").read_text().splitlines() if line]
    assert [line["tensor"] for line in lines] == asked
    assert all(loss > 0 for line in lines for error, loss in line["types"].values())


def imatrix_of(path: Path) -> Path:
    sums = np.linspace(1, 9, 256, dtype=np.float32)[None]
    entries = {f"blk.0.{name}.weight": Entry(sums, np.full(1, 7, np.float32)) for name in ("attn_q", "left_out")}
    write_imatrix(path, Imatrix(entries, ["x"], 7, 1))
    return path


@pytest.mark.parametrize("flags", [("--type", "Q4_K"), ("--bpw", 5, "--stock"), ("--bpw", 6, "--no-feedback")])
def test_a_gguf_and_an_importance_file(source, tmp_path, flags):
    """The moments are estimated, and types are measured under them."""
    imatrix = imatrix_of(tmp_path / "i.gguf")
    assert run("measure", source, "-o", tmp_path / "m", "--imatrix", imatrix) == 0
    assert run("convert", source, "-o", tmp_path / "direct.gguf", "--imatrix", imatrix, *flags) == 0
    imatrix.unlink()
    for _ in range(2):
        assert run("convert", source, "-o", tmp_path / "from.gguf", "--moments", tmp_path / "m", *flags) == 0
        assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "from.gguf").read_bytes()
    assert read(tmp_path / "from.gguf").get("quantize.imatrix.file") == "i.gguf"


def test_files_are_there_for_all_who_may_read_the_folder(measured):
    assert {path.stat().st_mode for path in measured.iterdir()} == {(measured / "measurements.json").stat().st_mode}


def test_a_line_of_types_that_was_cut_short_is_measured_again(source, tmp_path):
    folder = tmp_path / "m"
    assert run("measure", source, "-o", folder) == 0
    flags = ("-o", tmp_path / "out.gguf", "--moments", folder, "--bpw", 6)
    assert run("convert", source, *flags) == 0
    first, text = (tmp_path / "out.gguf").read_bytes(), (folder / "types.jsonl").read_text()
    (folder / "types.jsonl").write_text(text[: len(text) * 2 // 3])
    assert run("convert", source, *flags) == 0
    assert (tmp_path / "out.gguf").read_bytes() == first
    measured = [json.loads(line)["tensor"] for line in text.splitlines() if line]
    found = [line for line in (folder / "types.jsonl").read_text().splitlines() if line.endswith("}}")]
    assert {json.loads(line)["tensor"] for line in found} == set(measured)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(source, tmp_path):
    assert run("measure", source, "-o", tmp_path / "m") == 0
    (tmp_path / "m").chmod(0o555)
    assert run("convert", source, "-o", tmp_path / "out.gguf", "--moments", tmp_path / "m", "--bpw", 6) == 0


@pytest.fixture
def small(source, tmp_path, capsys) -> Path:
    """Return measurements of a small GGUF."""
    assert run("measure", source, "-o", tmp_path / "m", "--seed", 3) == 0
    capsys.readouterr()
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--seed", 4), "measured with --seed 3, and not 4; leave --seed out, or measure again"),
        (("--calib", "self"), "measured with --calib none, and not self; leave --calib out, or measure again"),
        (("--imatrix", "i.gguf"), "measured with --imatrix None, and not i.gguf"),
        (("--calib-sequences", 32), "measured with --calib-sequences 64, and not 32"),
        (("--embedding-type", "Q4_0"), "nothing was measured of token_embd.weight"),
    ],
)
def test_other_settings_are_refused(source, small, tmp_path, refused, flags, words):
    assert words in refused("convert", source, "-o", tmp_path / "out.gguf", "--moments", small, *flags)
    assert not (tmp_path / "out.gguf").exists()


def test_settings_may_be_repeated(source, small, tmp_path):
    flags = ("--seed", 3, "--calib", "none", "--moments", small)
    assert run("convert", source, "-o", tmp_path / "out.gguf", *flags) == 0


def test_the_embeddings_are_measured_if_they_will_be_small(source, tmp_path):
    assert run("measure", source, "-o", tmp_path / "m", "--embedding-type", "Q4_0") == 0
    flags = ("--embedding-type", "Q4_0")
    assert run("convert", source, "-o", tmp_path / "direct.gguf", *flags) == 0
    assert run("convert", source, "-o", tmp_path / "from.gguf", "--moments", tmp_path / "m", *flags) == 0
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "from.gguf").read_bytes()


@pytest.mark.parametrize("more", [(), ("--bpw", 6, "--dry-run")])
def test_another_model_of_the_same_shapes(source, small, tmp_path, rng, refused, more):
    tensors = {name: read(source)[name] + 0.5 for name in read(source).tensors}
    other = write_source(tmp_path / "other.gguf", tensors)
    err = refused("convert", other, "-o", tmp_path / "out.gguf", "--moments", small, *more)
    assert f"--moments {small}: of another model than {other}, whose weights or metadata differ" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other.gguf", "source.gguf"]


def damaged(folder):
    text = (folder / "measurements.json").read_text()
    (folder / "measurements.json").write_text(text[:100])


def of_a_later_version(folder):
    text = (folder / "measurements.json").read_text()
    (folder / "measurements.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))


def of_unknown_settings(folder):
    text = (folder / "measurements.json").read_text()
    (folder / "measurements.json").write_text(text.replace('"seed"', '"sead"'))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shutil.rmtree, "no measurements can be read there: No such file or directory; make them with"),
        (damaged, "measurements.json is damaged; measure again"),
        (of_unknown_settings, "measurements.json is damaged; measure again"),
        (of_a_later_version, "of format version 2, this version of aaac-gguf reads 1; measure again"),
    ],
)
def test_folders_that_are_no_measurements(source, small, tmp_path, refused, change, words):
    change(small)
    err = refused("convert", source, "-o", tmp_path / "out.gguf", "--moments", small)
    assert f"--moments {small}: " in err
    assert words in err


@pytest.mark.parametrize("name", ["activations", "outputs-3.safetensors", "sequences.safetensors"])
def test_a_file_that_is_cut_short(measured, tmp_path, refused, name):
    folder = tmp_path / "m"
    shutil.copytree(measured, folder)
    os.truncate(folder / name, (folder / name).stat().st_size - 100)
    err = refused("convert", resources.MODEL, "-o", tmp_path / "out.gguf", "--moments", folder, *TWO)
    assert f"--moments {folder / name}: " in err
    assert "measure again" in err


def test_outputs_that_are_not_replaced(source, small, tmp_path, refused):
    assert "exists already; remove it, or choose another name" in refused("measure", source, "-o", small)
    assert "make it first" in refused("measure", source, "-o", tmp_path / "absent" / "m")


def test_an_interruption_leaves_nothing(source, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("aaac_gguf.conversion.measure.calibrate", interrupt)
    assert run("measure", source, "-o", tmp_path / "m") == 130
    assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]
