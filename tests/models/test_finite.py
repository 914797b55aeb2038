"""A model whose activations overflow is refused within seconds, by the module in which they do."""

import functools

import families
import pytest
import torch
import transformers
from random_checkpoints import COMMON, SIZES, save_random

from aaac_gguf import resources
from aaac_gguf.conversion.convert import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError
from aaac_gguf.llama import tools
from aaac_gguf.models.finite import is_finite


def huge_norm(model, value=1e20):
    model.model.layers[1].post_attention_layernorm.weight.fill_(value)


def huge_squares(model):
    """Inputs of 1e19 themselves are finite, their sum of squares is not."""
    huge_norm(model, 2e19)
    for name in ("gate_proj", "up_proj"):
        model.model.layers[1].mlp.get_submodule(name).weight.mul_(1e-19)


def huge_head(model):
    model.model.norm.weight.fill_(5e37)
    model.lm_head.weight.mul_(1000)


def zero_embedding(model):
    model.model.embed_tokens.weight.zero_()


CASES = {  # what is done to a Llama, and the module that is named
    "norm of 1e20": (huge_norm, "model.layers.1.mlp.down_proj"),
    "logits of inf": (huge_head, "lm_head"),
    "embeddings of 0 and no epsilon": (zero_embedding, "model.layers.0.input_layernorm"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A function of a change: the folder of a tiny Llama that the change has broken, saved once."""

    @functools.cache
    def save(change):
        folder = tmp_path_factory.mktemp("broken") / "model"
        config = transformers.LlamaConfig(**COMMON, **SIZES, rms_norm_eps=0.0, tie_word_embeddings=False)
        save_random(config, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(autouse=True)
def one_conversion_of_each(monkeypatch):
    monkeypatch.setattr(tools, "convert_hf", families.convert_hf)


@pytest.mark.llama
@pytest.mark.parametrize("bfloat16", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("calibration", ["self", str(resources.SAMPLE_TEXT)], ids=["self", "text"])
@pytest.mark.parametrize("case", CASES)
def test_the_first_module_that_is_not_finite(case, calibration, bfloat16, broken, llama_source, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bfloat16})
    change, module = CASES[case]
    settings = Settings(calibration=calibration, sequences=2, sequence_length=32)
    with pytest.raises(AaacError, match=f"the output of {module} is not finite in float32.*'none'"):
        convert(broken(change), tmp_path / "out.gguf", settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.llama
@pytest.mark.parametrize("feedback", [True, False])
def test_squares_that_overflow_are_named(feedback, broken, llama_source, tmp_path):
    settings = Settings(calibration=str(resources.SAMPLE_TEXT), sequences=2, sequence_length=32, feedback=feedback)
    with pytest.raises(AaacError, match=r"squares of the inputs of model.layers.1.mlp.gate_proj.weight overflow"):
        convert(broken(huge_squares), tmp_path / "out.gguf", settings)


@pytest.mark.llama
@pytest.mark.parametrize("case", CASES)
def test_without_a_model_that_runs_it_is_converted(case, broken, llama_source, tmp_path):
    """Estimated moments that overflow are none: the loop of the damping ends."""
    report = convert(broken(CASES[case][0]), tmp_path / "out.gguf", Settings(calibration="none"))
    assert all(tensor.relative_error < 0.01 for tensor in report.tensors)


def test_logits_of_minus_infinity_are_tokens_that_never_come():
    logits = torch.zeros(2, 3)
    logits[:, 1] = -torch.inf
    assert is_finite(logits)
    for bad in (torch.inf, torch.nan):
        logits[1, 2] = bad
        assert not is_finite(logits)
