"""Models with an encoder and a decoder: converted, and what is not checked is said."""

import shutil

import pytest
import torch
import transformers

from aaac_gguf import resources
from aaac_gguf.conversion import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError, AaacWarning
from aaac_gguf.files.gguf import read
from aaac_gguf.models.source import full_precision
from aaac_gguf.reporting.compare import Options, compare
from aaac_gguf.reporting.verify import verify


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "t5"
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=4096,
        d_model=128,
        d_kv=32,
        d_ff=192,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    transformers.T5ForConditionalGeneration(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources.MODEL / name, folder / name)
    return folder


def test_it_is_converted_without_calibration_and_its_tensors_are_verified(llama_source, t5, tmp_path):
    out = tmp_path / "out.gguf"
    with pytest.warns(AaacWarning, match="t5 has an encoder and is no model of the next token.*without calibration"):
        convert.convert(t5, out, Settings())
    assert len(read(out).codecs) == 2 * (7 + 11)
    with pytest.warns(AaacWarning, match="logits are not compared, since t5 is no model of the next token"):
        result = verify(out, t5)
    assert result.failures == []
    assert {t.name for t in result.tensors} >= read(out).codecs.keys()
    assert result.n_tokens == 0


@pytest.mark.parametrize("calibration", ["self", str(resources.SAMPLE_TEXT)])
def test_calibration_on_tokens_is_refused_at_once(llama_source, t5, tmp_path, calibration):
    with pytest.raises(AaacError, match=r"no model of the next token.*set `calibration` to 'none'"):
        convert.dry_run(t5, tmp_path / "out.gguf", Settings(calibration=calibration))


def test_a_gguf_of_it_is_known_too(llama_source, t5, tmp_path):
    with full_precision(t5, tmp_path) as file, pytest.raises(AaacError, match="no model of the next token"):
        convert.dry_run(file.path, tmp_path / "out.gguf", Settings(calibration="self"))


def test_compare_refuses_it(patched, t5, tmp_path):
    with pytest.raises(AaacError, match="no model of the next token, by which types are compared"):
        compare(t5, tmp_path / "comparison", Options())
