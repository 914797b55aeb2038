"""verify of encoder-only models: embeddings of patched llama.cpp against transformers."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import aaac_gguf as aaac
from aaac_gguf import cli
from aaac_gguf.llama import tools
from aaac_gguf.models import encoder
from aaac_gguf.reporting import verify

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "old", "gentleman", "looked", "at", "her", "and", "said"]


# Runs the converter for a vocabulary that it does not know; the first argument is its path.
CONVERTER = """
import runpy, sys
del sys.argv[0]
sys.path[0:1] = [sys.argv[0].rpartition("/")[0], sys.argv[0].rpartition("/")[0] + "/gguf-py"]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "jina-v2-en"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def _any_vocabulary(monkeypatch, llama_source):
    def convert_hf(source, out, outtype, *others, **more):
        script = llama_source / "convert_hf_to_gguf.py"
        command = [sys.executable, "-c", CONVERTER, script, source, "--outfile", out, "--outtype", outtype]
        subprocess.run(command, check=True, capture_output=True)

    monkeypatch.setattr(tools, "convert_hf", convert_hf)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """A tiny random BERT with mean pooling."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=256, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    module = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    (folder / "modules.json").write_text(json.dumps([module]))
    return folder


@pytest.mark.llama
def test_embeddings_of_an_encoder(patched, bert, tmp_path, capsys, monkeypatch):
    out = tmp_path / "bert.gguf"
    aaac.quantize(bert, out, calibration="none")
    assert cli.main(["verify", str(out), "--source", str(bert)]) == 0
    assert "least cosine of embeddings " in capsys.readouterr().out
    monkeypatch.setattr(encoder, "embed", lambda *args: np.eye(64, dtype=np.float32)[:1])
    assert "least cosine" in verify.verify(out, bert).failures[0]


@pytest.mark.llama
def test_embeddings_of_an_encoder_in_a_gguf(patched, bert, tmp_path):
    full, out = tmp_path / "full.gguf", tmp_path / "bert.gguf"
    aaac.quantize(bert, full, type="F32")
    aaac.quantize(full, out)
    result = aaac.verify(out, full)
    assert result.failures == []
    assert result.n_texts > 10
    assert 0.9 < result.full_cosine < result.cosine


@pytest.mark.llama
def test_an_encoder_without_pooling_is_no_pass(patched, bert, tmp_path):
    folder, out = tmp_path / "bare", tmp_path / "bert.gguf"
    shutil.copytree(bert, folder)
    (folder / "modules.json").unlink()
    aaac.quantize(folder, out, calibration="none")
    assert "were not compared" in aaac.verify(out, folder).failures[0]
