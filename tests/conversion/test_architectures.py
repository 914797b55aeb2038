"""Architectures other than plain Llama, small and random: convert, patched llama.cpp and verify, the whole way."""

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from random_checkpoints import COMMON, SIZES, save_random

from aaac_gguf import resources
from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.conversion import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.atomic import atomic
from aaac_gguf.files.imatrix import Coverage, write_imatrix
from aaac_gguf.llama import evaluate
from aaac_gguf.reporting import verify
from aaac_gguf.reporting.results import Verification

CONFIGS = {
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **SIZES, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **COMMON, **SIZES, sliding_window=64, query_pre_attn_scalar=32
    ),  # the head size, as llama.cpp takes it
    "phi3, fused qkv": lambda: transformers.Phi3Config(
        **COMMON, **{key: n for key, n in SIZES.items() if key != "head_dim"}, pad_token_id=0, tie_word_embeddings=False
    ),
    "nemotron, biases": lambda: transformers.NemotronConfig(**COMMON, **SIZES, attention_bias=True, mlp_bias=True),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, **SIZES, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False
    ),
    "hidden size 96": lambda: transformers.LlamaConfig(**COMMON, **{**SIZES, "hidden_size": 96}),
}


@pytest.mark.llama
@pytest.mark.parametrize("name", CONFIGS)
def test_the_whole_way(name, patched, tmp_path):
    source = save_random(CONFIGS[name](), tmp_path / "model")
    out = tmp_path / "out.gguf"
    settings = Settings(calibration=str(resources.SAMPLE_TEXT), sequences=4, sequence_length=256)
    report = convert.convert(source, out, settings)
    file = gguf_io.read(out)
    quantized = {
        n for n, t in file.tensors.items() if n.startswith("blk.") and len(t.shape) > 1 and "ffn_gate_inp" not in n
    }
    if name == "hidden size 96":
        assert {n for n in quantized if file.tensors[n].tensor_type == T.IQ4_NL} == {
            n for n in quantized if "ffn_down" not in n and "attn_output" not in n
        }
    else:
        assert set(file.codecs) == quantized
    assert [n for n in report.coverage.missed if "expert" not in n] == []
    result = verify.verify(out, source, resources.SAMPLE_TEXT)
    print(
        f"{name}: mean KL divergence {result.mean_kld:.6f}, "
        f"same top token {result.same_top:.4f} on {result.n_tokens} tokens"
    )
    assert result.failures == []
    assert all(t.weighted is not None for t in result.tensors if t.name in file.codecs)


def gpt2_gguf(model, tokenizer_from: gguf_io.GgufFile, path):
    """Write the model as llama.cpp's converter does, with a tokenizer that it would not take for a GPT-2's."""
    config = model.config
    numbers = {
        "context_length": 512,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "block_count": config.n_layer,
    }
    kv = {
        key: value for key, value in gguf_io.field_values(tokenizer_from.fields).items() if key.startswith("tokenizer.")
    }
    kv["general.architecture"] = gguf_io.Value("gpt2", V.STRING)
    kv |= {
        f"gpt2.{key}": gguf_io.Value(n, V.UINT32)
        for key, n in {**numbers, "attention.head_count": config.n_head}.items()
    }
    kv["gpt2.attention.layer_norm_epsilon"] = gguf_io.Value(config.layer_norm_epsilon, V.FLOAT32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    tensors = {}
    for name, parameter in model.named_parameters():
        turned = ".c_" in name and parameter.dim() == 2
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = (
            (parameter.T if turned else parameter).detach().contiguous().numpy()
        )
    infos = [gguf_io.TensorInfo(name, t.shape, T.F32) for name, t in tensors.items()]
    with atomic(path) as f:
        f.write(gguf_io.render_header(kv, infos))
        for t in tensors.values():
            f.write(t.tobytes() + bytes(-t.nbytes % 32))
    return path


@pytest.mark.llama
def test_gpt2(patched, demo_full, tmp_path):
    """Biases, learned positions, transposed matrices. From a GGUF, since the converter wants GPT-2's own vocabulary."""
    torch.manual_seed(0)
    sizes = {"n_positions": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=4096, bos_token_id=1, eos_token_id=2, **sizes)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    source, out, logits = (
        gpt2_gguf(model, demo_full, tmp_path / "source.gguf"),
        tmp_path / "out.gguf",
        tmp_path / "logits",
    )
    full = gguf_io.read(source)
    tokens, _ = tokens_module.text_tokens(resources.MODEL, resources.SAMPLE_TEXT, 4, 256)
    imatrix = calibrate.importance(model, tokens, "gpt2", full.tensors, "sample")
    write_imatrix(tmp_path / "imatrix.gguf", imatrix)
    report = convert.convert(source, out, Settings(imatrix=tmp_path / "imatrix.gguf"))
    assert len(report.tensors) == 8
    assert report.coverage == Coverage(1, [])
    assert verify.verify(out, source, resources.SAMPLE_TEXT).failures == []

    file, result = gguf_io.read(out), Verification(reference="transformers")
    assert verify.inject(model, full, file) == []
    evaluate.save_logits(out, resources.SAMPLE_TEXT, logits, verify.N_CTX)
    held = evaluate.read_logits(logits)
    expected = [
        verify.log_probabilities(model, sequence, held.first)
        for sequence in torch.from_numpy(evaluate.with_bos(held.tokens, file)).long()
    ]
    verify.compare_logits(result, expected, held)
    print(f"gpt2: mean KL divergence {result.mean_kld:.6f}, same top token {result.same_top:.4f}")
    assert result.failures == []
