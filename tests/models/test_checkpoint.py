"""Loading a model with transformers: dtypes, plain weights, quiet; and the names of its parameters in GGUF."""

import subprocess
import sys

import pytest
import torch
import transformers
from random_checkpoints import COMMON, SIZES, save_random

from aaac_gguf import resources
from aaac_gguf.calibration.tokens import text_tokens
from aaac_gguf.errors import AaacError
from aaac_gguf.llama import evaluate
from aaac_gguf.models import checkpoint


def test_a_gguf_has_plain_weights(demo_gguf):
    """Not GGUF blocks in a module of transformers' own, whose products nobody sees."""
    of_file, of_folder = checkpoint.load_model(demo_gguf), checkpoint.load_model(resources.MODEL)
    assert {type(m) for m in of_file.modules()} == {type(m) for m in of_folder.modules()}
    expected = dict(of_folder.named_parameters())
    for name, parameter in of_file.named_parameters():
        assert torch.equal(parameter, expected[name]), name


TEXTS = ("Once upon a time", " two  spaces", "\nA line\r\n", "été 你好 🙂", "", "x")


def test_a_gguf_has_the_tokens_of_its_folder(demo_gguf):
    """The bundled model's tokenizer puts no space before a text, which transformers does not read from a GGUF."""
    of_file, of_folder = checkpoint.load_tokenizer(demo_gguf), checkpoint.load_tokenizer(resources.MODEL)
    for text in (*TEXTS, resources.SAMPLE_TEXT.read_text("utf-8")):
        ids = of_folder(text).input_ids
        assert of_file(text).input_ids == ids
        decoded = (t.decode(ids, skip_special_tokens=True) for t in (of_file, of_folder))
        assert len(set(decoded)) == 1
    given = [text_tokens(source, resources.SAMPLE_TEXT, 8, 64) for source in (demo_gguf, resources.MODEL)]
    assert torch.equal(given[0][0], given[1][0])


def test_a_gguf_has_the_tokens_of_llama_cpp(demo_full, patched, tmp_path):
    evaluate.save_logits(demo_full.path, resources.SAMPLE_TEXT, tmp_path / "logits", 64, n_chunks=4)
    tokens = evaluate.with_bos(evaluate.read_logits(tmp_path / "logits").tokens, demo_full)
    ours = text_tokens(demo_full.path, resources.SAMPLE_TEXT, 1000, 64)[0][:4]  # in a row: the text has fewer
    assert ours.tolist() == tokens.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("device_share", [0.5, 0])
def test_transformers_is_quiet(tmp_path, device_share):
    """No warning, no bar: loading, with blocks in memory or on disk, sampling and running."""
    config = transformers.MixtralConfig(**COMMON, **SIZES, num_local_experts=4, num_experts_per_tok=2)
    source = save_random(config, tmp_path / "model")
    script = f"""
from pathlib import Path
from aaac_gguf.calibration.tokens import self_tokens
from aaac_gguf.models import checkpoint
from aaac_gguf.models.blocks import Blocks
checkpoint.WEIGHTS_SHARE = {device_share}
source = Path({str(source)!r})
checkpoint.load_tokenizer(source)
model = checkpoint.load_model(source, folder=Path({str(tmp_path / "scratch")!r}))
Blocks(model, self_tokens(model, 1, 4, 0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_loading_a_gguf_is_quiet(demo_gguf, capfd, caplog):
    checkpoint.load_model(demo_gguf)
    checkpoint.load_tokenizer(demo_gguf)
    assert capfd.readouterr() == ("", "")
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []


def test_what_transformers_cannot_load_is_an_error_in_one_line(tmp_path):
    source = save_random(transformers.LlamaConfig(**COMMON, **SIZES), tmp_path / "model")
    (source / "config.json").write_text('{"architectures": ["X"], "model_type": "unheard of"}')
    with pytest.raises(AaacError) as e:
        checkpoint.load_model(source)
    assert str(e.value).startswith(f"{source}: transformers cannot load it (")
    assert str(e.value).endswith("; calibrate with `imatrix`, or set `calibration` to 'none'")
    assert "\n" not in str(e.value)
    for path in source.glob("token*"):
        path.unlink()
    with pytest.raises(AaacError, match=r"transformers cannot load the tokenizer .*set `calibration` to 'self'"):
        checkpoint.load_tokenizer(source)


def test_names_come_from_the_gguf_map():
    present = {"blk.3.attn_qkv.weight", "blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"}
    assert checkpoint.gguf_names("transformer.h.3.attn.c_attn.weight", "gpt2", 4, present) == ["blk.3.attn_qkv.weight"]
    experts = checkpoint.gguf_names("model.layers.3.mlp.experts.gate_up_proj", "qwen3moe", 4, present)
    assert experts == ["blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"]
    inside = "model.text_model.layers.3.mlp.down_proj.weight"  # of a SmolVLM
    assert checkpoint.gguf_names(inside, "llama", 4, ["blk.3.ffn_down.weight"]) == ["blk.3.ffn_down.weight"]
    linear, cut = "model.layers.3.linear_attn.in_proj_qkvz.weight", ["blk.3.attn_qkv.weight", "blk.3.attn_gate.weight"]
    assert checkpoint.gguf_names(linear, "qwen3next", 4, cut) == cut
    assert checkpoint.gguf_names("vision.tower.weight", "llama", 4, present) == []
    assert checkpoint.gguf_names("x", "no such architecture", 4, present) == []
