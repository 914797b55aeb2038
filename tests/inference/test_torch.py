"""AAAC files in transformers: against patched llama.cpp, and against transformers with the decoded weights."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import write_source
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType as V
from random_checkpoints import COMMON, SIZES, save_random

import aaac_gguf as aaac
from aaac_gguf.errors import AaacError
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files import output
from aaac_gguf.inference.linear import Linear
from aaac_gguf.inference.torch import load_model, load_tokenizer, replace_linear
from aaac_gguf.llama import evaluate
from aaac_gguf.models import checkpoint
from aaac_gguf.reporting import demo
from aaac_gguf.resources import MODEL, SAMPLE_TEXT

N_CTX = 256
MAX_KLD = 0.005  # as `verify`: patched llama.cpp rounds activations to 8 bits
NO_HEAD_SIZE = {key: n for key, n in SIZES.items() if key != "head_dim"}


@pytest.fixture(scope="module")
def converted(llama_source, tmp_path_factory):
    """The bundled model in AAAC4_G16."""
    out = tmp_path_factory.mktemp("torch") / "demo.gguf"
    aaac.quantize(MODEL, out, calibration="none")
    return out


def quantized(config, folder):
    """A random checkpoint and the AAAC file made of it."""
    source = save_random(config, folder / "model")
    aaac.quantize(source, folder / "out.gguf", calibration="none")
    return source, folder / "out.gguf"


def logits_of(model, tokens):
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits.float()


def kl_divergence(model, path, folder):
    """Mean KL divergence of patched llama.cpp's logits from the model's, and the share of equal top tokens."""
    evaluate.save_logits(path, SAMPLE_TEXT, folder / "logits", N_CTX, 2)
    held = evaluate.read_logits(folder / "logits")
    tokens = torch.from_numpy(held.tokens).long()
    tokens[:, 0] = model.config.bos_token_id  # which llama-perplexity feeds there
    pairs = [
        evaluate.kl_divergence(expected.log_softmax(-1).numpy(), held.log_probabilities(i))
        for i, expected in enumerate(logits_of(model, tokens)[:, held.first : -1])
    ]
    return (float(np.concatenate(parts).mean()) for parts in zip(*pairs, strict=True))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (Linear, torch.nn.Linear))}


#
# The bundled model
#


def test_linear_layers_are_in_blocks_and_nothing_else_is_kept(converted):
    model, file = load_model(converted), aaac.load(converted)
    assert not model.training
    assert [name for name, layer in layers(model).items() if not isinstance(layer, Linear)] == ["lm_head"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    blocks = sum(t.n_bytes for name, t in file.tensors.items() if name in file.codecs)
    rest = sum(4 * int(t.n_elements) for name, t in file.tensors.items() if name not in file.codecs)
    held = [*model.parameters(), *model.buffers()]
    rotary = sum(4 * t.numel() for name, t in model.named_buffers() if "inv_freq" in name)
    assert sum(t.numel() * t.element_size() for t in held) == blocks + rest + rotary


def test_rows_of_queries_and_keys_are_in_the_order_of_the_checkpoint(converted):
    full, model = checkpoint.load_model(MODEL), load_model(converted)
    for name, layer in layers(model).items():
        before, after = full.get_submodule(name).weight, layer.weight
        assert (after - before).norm() < 0.1 * before.norm(), name


@pytest.mark.llama
def test_logits_are_those_of_patched_llama(patched, converted, tmp_path):
    mean, same_top = kl_divergence(load_model(converted), converted, tmp_path)
    print(f"mean KL divergence {mean:.6f}, same top token {same_top:.4f}")
    assert mean < MAX_KLD
    assert same_top > 0.9


@pytest.mark.llama
def test_greedy_text_is_that_of_patched_llama_up_to_a_near_tie(patched, converted, tmp_path):
    model, tokenizer = load_model(converted), load_tokenizer(converted)
    prompt = tokenizer(demo.PROMPT, return_tensors="pt")
    ours = model.generate(**prompt, max_new_tokens=64, do_sample=False)
    theirs = tokenizer(demo.generate(converted, demo.PROMPT, tmp_path / "log"), return_tensors="pt").input_ids
    n = min(ours.shape[1], theirs.shape[1])
    different = (ours[0, :n] != theirs[0, :n]).nonzero()
    if len(different):
        at = int(different[0])
        assert at > prompt.input_ids.shape[1]
        last = logits_of(model, ours[:, :at])[0, -1]
        gap = float(last.max() - last[theirs[0, at]])
        print(f"the texts part after {at - prompt.input_ids.shape[1]} tokens, at a gap of {gap:.3f} between logits")
        assert gap < 0.1


@pytest.mark.llama
def test_tokens_are_those_of_patched_llama(patched, converted, tmp_path):
    evaluate.save_logits(converted, SAMPLE_TEXT, tmp_path / "logits", N_CTX, 2)
    expected = evaluate.read_logits(tmp_path / "logits").tokens[0, 1:]
    tokenizer = load_tokenizer(converted)
    ids = tokenizer(SAMPLE_TEXT.read_text(encoding="utf-8")).input_ids
    assert ids[1 : len(expected) + 1] == expected.tolist()
    assert tokenizer.decode(tokenizer(" two  spaces").input_ids, skip_special_tokens=True) == " two  spaces"


def test_a_model_with_values_is_replaced_in_place(converted):
    model, tokens = checkpoint.load_model(MODEL), torch.arange(3, 40)[None]
    before = logits_of(model, tokens)
    assert replace_linear(model, aaac.load(converted)) == {}
    assert len([m for m in model.modules() if isinstance(m, Linear)]) == 28
    after = logits_of(model, tokens)
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, logits_of(load_model(converted), tokens), atol=1e-3, rtol=1e-4)


def test_an_embedding_of_an_aaac_type_is_decoded_and_said_to_be(llama_source, tmp_path):
    out = tmp_path / "out.gguf"
    aaac.quantize(MODEL, out, calibration="none", embedding_type="AAAC4_G16")
    model, file = checkpoint.load_model(MODEL), aaac.load(out)
    assert replace_linear(model, file) == {"token_embd.weight": "model.embed_tokens.weight"}
    assert torch.equal(model.model.embed_tokens.weight, torch.from_numpy(file["token_embd.weight"]))


def test_the_example_writes_text(converted, tmp_path):
    example = Path(aaac.__file__).parents[1] / "docs/examples/run_in_transformers.py"
    command = [sys.executable, example, converted, "--prompt", "Once upon a time", "--tokens", "8"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=os.environ).stdout
    assert out.startswith("Once upon a time")
    assert len(out.split()) > 6


#
# Other architectures
#

RANDOM = {
    "qwen2, biases": lambda: transformers.Qwen2Config(**COMMON, **NO_HEAD_SIZE),
    "llama, scaled rotary embedding": lambda: transformers.LlamaConfig(
        **COMMON,
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "phi3, fused qkv": lambda: transformers.Phi3Config(**COMMON, **NO_HEAD_SIZE, pad_token_id=0),
}
WITH_CONFIG = {
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(**COMMON, **SIZES, sliding_window=64, query_pre_attn_scalar=32),
    "nemotron, biases": lambda: transformers.NemotronConfig(**COMMON, **SIZES, attention_bias=True, mlp_bias=True),
}


@pytest.mark.llama
@pytest.mark.parametrize("name", [*RANDOM, *WITH_CONFIG])
def test_other_architectures(name, patched, tmp_path):
    source, path = quantized({**RANDOM, **WITH_CONFIG}[name](), tmp_path)
    model = load_model(path, config=transformers.AutoConfig.from_pretrained(source) if name in WITH_CONFIG else None)
    assert all(isinstance(layer, Linear) for name, layer in layers(model).items() if name != "lm_head")
    mean, same_top = kl_divergence(model, path, tmp_path)
    print(f"{name}: mean KL divergence {mean:.6f}, same top token {same_top:.4f}")
    assert mean < MAX_KLD
    assert same_top > 0.9


def write_model(path, model, architecture, numbers, tokenizer_from):
    """Write a transformers model as llama.cpp's converter does: matrices of Conv1D turned, experts' gate and up apart.

    Return the place of every tensor: the parameter, whether it is turned, and which half of its rows it is, if not all.
    """
    n_layers = model.config.num_hidden_layers
    map_ = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), n_layers)
    places = {}
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for half, part in enumerate(("gate", "up")):
                places[f"blk.{name.split('.')[2]}.ffn_{part}_exps.weight"] = name, False, half
        elif name.endswith("experts.down_proj"):
            places[f"blk.{name.split('.')[2]}.ffn_down_exps.weight"] = name, False, None
        else:
            found = map_.get_name(name, try_suffixes=(".weight", ".bias"))
            places[found] = name, ".c_" in name and parameter.dim() == 2, None
    kv = {
        key: value for key, value in gguf_io.field_values(tokenizer_from.fields).items() if key.startswith("tokenizer.")
    }
    kv["general.architecture"] = gguf_io.Value(architecture, V.STRING)
    for key, n in numbers.items():
        kv[f"{architecture}.{key}"] = gguf_io.Value(n, V.UINT32 if isinstance(n, int) else V.FLOAT32)
    tensors = {name: part_of(model, place).detach().contiguous().numpy() for name, place in places.items()}
    infos = [gguf_io.TensorInfo(name, t.shape, T.F32) for name, t in tensors.items()]
    with output.atomic(path) as f:
        f.write(gguf_io.render_header(kv, infos))
        for t in tensors.values():
            f.write(t.tobytes() + bytes(-t.nbytes % 32))
    return places


def part_of(model, place):
    """The view of a parameter that a tensor of `write_model` is."""
    name, turned, half = place
    parameter = model.get_parameter(name)
    if half is not None:
        return parameter.chunk(2, dim=1)[half]
    if name.endswith("shared_expert_gate.weight"):
        return parameter[0]
    return parameter.T if turned else parameter


def gpt2():
    """Biases, learned positions, and matrices that transformers keeps transposed."""
    sizes = {"n_positions": 512, "n_embd": 128, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
    config = transformers.GPT2Config(vocab_size=4096, bos_token_id=1, eos_token_id=2, **sizes)
    numbers = {"context_length": 512, "embedding_length": 128, "feed_forward_length": 512, "block_count": 2}
    return config, "gpt2", {**numbers, "attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5}


def qwen2moe():
    """Experts, and one that all tokens share."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
    config = transformers.Qwen2MoeConfig(**COMMON, **NO_HEAD_SIZE, **experts, shared_expert_intermediate_size=192)
    numbers = {"context_length": 512, "embedding_length": 128, "feed_forward_length": 192, "block_count": 2}
    heads = {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-6}
    return config, "qwen2moe", {**numbers, **heads, "expert_count": 4, "expert_used_count": 2}


@pytest.mark.parametrize("make", [gpt2, qwen2moe], ids=["gpt2", "qwen2moe"])
def test_logits_are_those_of_the_decoded_weights(make, demo_full, tmp_path):
    torch.manual_seed(0)
    config, architecture, numbers = make()
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    places = write_model(tmp_path / "source.gguf", model, architecture, numbers, demo_full)
    aaac.quantize(tmp_path / "source.gguf", tmp_path / "out.gguf", calibration="none")
    file = aaac.load(tmp_path / "out.gguf")
    expected = copy.deepcopy(model)
    for name, place in places.items():
        part_of(expected, place).copy_(torch.from_numpy(file[name]))
    experts = {name: place[0] for name, place in places.items() if "exps" in name}
    tokens = torch.arange(3, 67)[None]
    found = load_model(tmp_path / "out.gguf", config=config)
    assert len([m for m in found.modules() if isinstance(m, Linear)]) == len(file.codecs) - len(experts)
    torch.testing.assert_close(logits_of(found, tokens), logits_of(expected, tokens), atol=1e-3, rtol=1e-4)
    assert not torch.allclose(logits_of(model, tokens), logits_of(expected, tokens), atol=1e-2)
    assert replace_linear(model, file) == experts
    torch.testing.assert_close(logits_of(model, tokens), logits_of(expected, tokens), atol=1e-3, rtol=1e-4)


#
# What is refused
#


def with_metadata(path, out, values):
    """A copy of a file with other metadata."""
    file = gguf_io.read(path)
    infos = [gguf_io.TensorInfo(name, file.shapes[name], t.tensor_type) for name, t in file.tensors.items()]
    with output.atomic(out) as f:
        f.write(gguf_io.render_header({**gguf_io.field_values(file.fields), **values}, infos))
        for info in infos:
            data = np.ascontiguousarray(file.tensors[info.name].data)
            f.write(data.tobytes() + bytes(-info.n_bytes % 32))
    return out


def refusal(call, path):
    with pytest.raises(AaacError, match=re.escape(str(path))) as caught:
        call(path)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_an_architecture_that_transformers_does_not_read(converted, tmp_path):
    path = write_source(tmp_path / "rwkv.gguf", {"output_norm.weight": np.ones(64, np.float32)}, "rwkv7")
    assert "architecture rwkv7 is not supported" in refusal(load_model, path)
    assert "patched llama.cpp" in refusal(lambda path: replace_linear(None, aaac.load(path)), path)


def test_a_scaling_that_transformers_does_not_read(converted, tmp_path):
    path = with_metadata(
        converted, tmp_path / "yarn.gguf", {"llama.rope.scaling.type": gguf_io.Value("yarn", V.STRING)}
    )
    message = refusal(load_model, path)
    assert "yarn scaling" in message
    assert "give `config`" in message
    config = transformers.AutoConfig.from_pretrained(MODEL)
    assert torch.equal(
        logits_of(load_model(path, config=config), torch.arange(9)[None]),
        logits_of(load_model(converted), torch.arange(9)[None]),
    )


def test_a_split_file(llama_source, tmp_path):
    aaac.quantize(MODEL, tmp_path / "demo.gguf", calibration="none", split_max_size=2_000_000)
    assert "llama-gguf-split --merge" in refusal(load_model, next(tmp_path.glob("*-00001-of-*.gguf")))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (WITH_CONFIG["nemotron, biases"], "no parameter of its model holds tensor blk.0."),
        (WITH_CONFIG["qwen3"], "_norm.weight has another shape than model.layers.0.self_attn."),
        (
            lambda: transformers.MixtralConfig(**COMMON, **SIZES, num_local_experts=4),
            "no tensor holds its parameter model.layers.0.mlp.",
        ),
    ],
    ids=["biases", "head size", "experts"],
)
def test_settings_that_transformers_does_not_read(llama_source, config, message, tmp_path):
    _, path = quantized(config(), tmp_path)
    assert message in refusal(load_model, path)


def test_a_config_of_another_model(converted):
    config = transformers.AutoConfig.from_pretrained(MODEL, intermediate_size=1024)
    message = refusal(lambda path: load_model(path, config=config), converted)
    assert "blk.0.ffn_down.weight has another shape than model.layers.0.mlp.down_proj.weight" in message


def test_a_tokenizer_that_transformers_does_not_read(source):
    assert "cannot load its tokenizer" in refusal(load_tokenizer, source)
