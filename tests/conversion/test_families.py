"""Families of models, tiny and random: all searched weights are reached by calibration, and llama.cpp runs the file."""

from contextlib import nullcontext

import families
import pytest

from aaac_gguf import resources
from aaac_gguf.conversion.convert import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacWarning
from aaac_gguf.files.imatrix import read_imatrix
from aaac_gguf.llama import tools
from aaac_gguf.reporting.compare import Options, compare
from aaac_gguf.reporting.verify import verify

pytestmark = [pytest.mark.llama, pytest.mark.slow]
SETTINGS = Settings(calibration=str(resources.SAMPLE_TEXT), sequences=4, sequence_length=256)

# The matrices that no product of the model shows, by the start of their names.
NOT_REACHED = {
    "GLM-4.5": "blk.2.",  # predicts a second token
    "Qwen3-Next": "blk.2.",  # likewise
}
# Those that are rounded without moments, though they count as reached.
LOOKED_UP = {"Gemma 3n": {"per_layer_token_embd.weight"}}
# llama.cpp's converter transposes each expert, so its rows are no rows of the parameter.
OTHER_ROWS = {"DBRX": ["blk.0.ffn_down_exps.weight", "blk.1.ffn_down_exps.weight"]}
# Models of which llama.cpp computes something else than transformers, from full-precision weights too.
OTHER_LOGITS = {"Phi-3.5-MoE"}  # its router is a sparse mixer, llama.cpp's a softmax


@pytest.fixture(autouse=True)
def any_tokenizer(monkeypatch):
    monkeypatch.setattr(tools, "convert_hf", families.convert_hf)


def whole_way(name, config, folder):
    """Convert, check that calibration reached everything, and let llama.cpp run the file."""
    source, out = families.save(config, folder / "model"), folder / "out.gguf"
    differs = pytest.warns(AaacWarning, match="llama.cpp runs another model than transformers")
    with differs if name in OTHER_LOGITS else nullcontext():
        made = convert(source, out, SETTINGS)
    not_reached = NOT_REACHED.get(name, "none")
    assert all(tensor.startswith(not_reached) for tensor in made.coverage.missed)
    assert set(made.unmeasured) == {*made.coverage.missed, *LOOKED_UP.get(name, ())}
    assert made.coverage.missed or name not in NOT_REACHED
    assert made.not_moved == OTHER_ROWS.get(name, [])
    result = verify(out, source)
    assert result.n_tokens > 1000
    failures = [failure.split(" is ")[0] for failure in result.failures]
    if name in OTHER_LOGITS:
        assert failures[0] == "mean KL divergence from transformers with the decoded weights"
        assert all("agree with transformers" in failure for failure in failures[1:])
    else:
        assert failures == []


@pytest.mark.parametrize("name", families.MIXTURES)
def test_mixtures_of_experts(name, patched, tmp_path):
    whole_way(name, families.MIXTURES[name](), tmp_path)


@pytest.mark.parametrize("name", families.WRAPPERS)
def test_the_text_model_of_a_vision_language_model(name, patched, tmp_path):
    whole_way(name, families.WRAPPERS[name](), tmp_path)


@pytest.mark.parametrize("name", families.DENSE)
def test_dense_models(name, patched, tmp_path):
    whole_way(name, families.DENSE[name](), tmp_path)


def test_comparison_of_a_vision_language_model(patched, tmp_path, monkeypatch):
    """Compare the text model inside: it writes the text, is calibrated, and llama-quantize has its importance."""
    monkeypatch.setattr("aaac_gguf.reporting.compare.SPEED_ROUNDS", 2)
    source = families.save(families.WRAPPERS["Qwen3-VL"](), tmp_path / "model")
    settings = Settings(calibration="self", sequences=4, sequence_length=64)
    result = compare(
        source, tmp_path / "out", Options(("AAAC4_G16", "IQ4_NL"), settings=settings, n_ctx=128, n_chunks=4)
    )
    ours = result.rows[0]
    klds = [row.scores["self-generated.txt"].mean_kld for row in result.rows]  # AAAC4_G16, IQ4_NL by both programs
    assert len(klds) == 3
    assert all(0.01 < kld < 0.2 for kld in klds), klds  # a random model and few tokens
    assert set(ours.codebooks) == {name for name in ours.tensor_errors if name.startswith("blk.")}
    assert len(ours.codebooks) == 2 * 7  # none of images
    entries = read_imatrix(tmp_path / "out" / "model-imatrix.gguf").entries
    assert set(ours.codebooks) <= set(entries)
