"""Say what calibration did not reach, before anything is quantized and in the report."""

from pathlib import Path

import numpy as np
import pytest
from conftest import write_source
from gguf import GGMLQuantizationType as T

from aaac_gguf.conversion import convert
from aaac_gguf.conversion.coverage import in_short
from aaac_gguf.conversion.plan import Rounding
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError, AaacWarning
from aaac_gguf.files.imatrix import Entry, Imatrix, write_imatrix
from aaac_gguf.models import checkpoint
from aaac_gguf.reporting.conversions import convert_text
from aaac_gguf.resources import MODEL, SAMPLE_TEXT

SHAPES = {
    "token_embd.weight": (8, 128),
    "blk.0.attn_q.weight": (64, 128),
    "blk.0.ffn_up.weight": (64, 128),
    "output.weight": (8, 128),
}


@pytest.fixture
def model(tmp_path, rng) -> Path:
    return write_source(tmp_path / "model.gguf", {n: rng.normal(size=s).astype(np.float32) for n, s in SHAPES.items()})


def imatrix_of(names, folder) -> Path:
    entries = {n: Entry(np.ones((1, 128), np.float32), np.ones(1, np.float32)) for n in names}
    write_imatrix(folder / "imatrix.gguf", Imatrix(entries))
    return folder / "imatrix.gguf"


def settings(folder, *names, **others) -> Settings:
    return Settings(imatrix=imatrix_of(names, folder), **others)


def test_low_coverage_is_a_warning_with_share_and_tensors(model, tmp_path):
    with pytest.warns(AaacWarning, match=r"reached 50.00 % of .*not reached: blk.0.ffn_up.weight"):
        convert.convert(model, tmp_path / "out.gguf", settings(tmp_path, "blk.0.attn_q.weight"))


def test_strict_makes_it_an_error_and_nothing_is_written(model, tmp_path):
    with pytest.raises(AaacError, match=r"reached 50.00 % .*leave out `strict`"):
        convert.convert(model, tmp_path / "out.gguf", settings(tmp_path, "blk.0.attn_q.weight", strict=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imatrix.gguf", "model.gguf"]


def test_embeddings_that_are_only_looked_up_do_not_count(model, tmp_path, recwarn):
    names = [n for n in SHAPES if n != "token_embd.weight"]
    made = convert.convert(
        model, tmp_path / "out.gguf", settings(tmp_path, *names, embedding_type="AAAC4_G16", strict=True)
    )
    assert made.coverage.share == 1
    (said,) = [str(w.message) for w in recwarn if w.category is AaacWarning]  # of the file, which has no tokenizer
    assert said.startswith(f"{model}: transformers cannot load the tokenizer")


def test_strict_changes_nothing_that_a_resumed_run_must_agree_in(model, tmp_path):
    from aaac_gguf.conversion.job import prepare
    from aaac_gguf.files.gguf import read

    first, second = (
        prepare(model, read(model), settings(tmp_path, "blk.0.attn_q.weight", strict=strict)).fingerprint()
        for strict in (False, True)
    )
    assert first == second


@pytest.mark.llama
def test_what_is_not_measured_is_rounded_by_synthetic_moments_and_said(llama_source, tmp_path, monkeypatch):
    """A tensor that no parameter's name stands for, as if the map of names did not know it."""
    known = checkpoint.gguf_names

    def without_ffn_down(parameter, *args):
        return [name for name in known(parameter, *args) if "ffn_down" not in name]

    for module in ("places", "activations"):
        monkeypatch.setattr(f"aaac_gguf.calibration.{module}.gguf_names", without_ffn_down)
    asked = Settings(calibration=str(SAMPLE_TEXT), sequences=1, sequence_length=64)
    with pytest.warns(AaacWarning, match=r"blk\.\*\.ffn_down\.weight \(4 of them\)"):
        made = convert.convert(MODEL, tmp_path / "out.gguf", asked)
    missed = {f"blk.{i}.ffn_down.weight" for i in range(4)}
    assert made.unmeasured == dict.fromkeys(missed, Rounding.SYNTHETIC)
    assert {t.plan.name for t in made.tensors if t.rounding == Rounding.SYNTHETIC} == missed
    assert {t.plan.type for t in made.tensors} == {T["AAAC4_G16"]}
    line = "no measured moments, rounded by feedback (synthetic): blk.*.ffn_down.weight (4 of them)"
    assert line in convert_text(made).splitlines()


def test_names_of_several_blocks_are_one():
    names = ["blk.0.a.weight", "blk.1.a.weight (experts 1, 2)", "blk.1.b.weight (expert 3)", "output.weight"]
    assert in_short(names) == "blk.*.a.weight (2 of them), blk.1.b.weight (expert 3), output.weight"
