"""Families of models, tiny and random: all searched weights are reached by calibration, and llama.cpp runs the file."""

import families
import pytest

from aaac_gguf import resources
from aaac_gguf.conversion.convert import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.llama import tools
from aaac_gguf.reporting.verify import verify

pytestmark = pytest.mark.llama
SETTINGS = Settings(calibration=str(resources.SAMPLE_TEXT), sequences=4, sequence_length=256)
# llama.cpp refuses or computes something else with models as small as these, or with their configs.
NOT_RUN = {"DeepSeek-V2", "DeepSeek-V3", "Llama 4", "Ernie 4.5", "dots1", "MiniMax-M2"}


@pytest.fixture(autouse=True)
def any_tokenizer(monkeypatch):
    monkeypatch.setattr(tools, "convert_hf", families.convert_hf)


def whole_way(config, folder, run=True):
    """Convert, check that calibration reached everything, and let llama.cpp run the file."""
    source, out = families.save(config, folder / "model"), folder / "out.gguf"
    made = convert(source, out, SETTINGS)
    assert made.unmeasured == {}
    assert made.coverage.missed == []
    assert made.not_moved == []
    if run:
        assert [f for f in verify(out, source).failures if "relative squared error" not in f] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", families.MIXTURES)
def test_mixtures_of_experts(name, patched, tmp_path):
    whole_way(families.MIXTURES[name](), tmp_path, run=name not in NOT_RUN)


@pytest.mark.parametrize("name", families.WRAPPERS)
def test_the_text_model_of_a_vision_language_model(name, patched, tmp_path):
    whole_way(families.WRAPPERS[name](), tmp_path, run=name not in NOT_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("name", families.DENSE)
def test_dense_models(name, patched, tmp_path):
    whole_way(families.DENSE[name](), tmp_path)
