"""Mixtures of types, against those that llama-quantize plans for models of many shapes."""

import re
import subprocess

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T
from gguf import GGUFValueType

import aaac_gguf as aaac
from aaac_gguf.conversion.plan import make_plan
from aaac_gguf.conversion.recipes import MIXTURES
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files.gguf import TensorInfo, Value, read
from aaac_gguf.files.imatrix import Entry, Imatrix, write_imatrix
from aaac_gguf.files.output import write

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
DENSE = (*ATTENTION, "ffn_gate", "ffn_up", "ffn_down")
EXPERTS = (*ATTENTION, "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_down_shexp")
FUSED = ("attn_qkv", "attn_output", "ffn_up", "ffn_down")

# architecture, number of blocks, matrices of a block, and what else is unusual
MODELS = {
    "Llama, 4 heads share keys": ("llama", 32, DENSE, {"n_kv": 2}),
    "tied embeddings": ("qwen3", 19, DENSE, {"tied": True}),
    "rows of 576": ("llama", 10, DENSE, {"tied": True, "width": 576}),
    "embeddings of 96": ("llama", 10, DENSE, {"width": 96}),
    "70B": ("llama", 80, DENSE, {"n_kv": 1}),
    "65B": ("llama", 80, DENSE, {}),
    "Mixtral": ("llama", 16, EXPERTS, {"n_experts": 8}),
    "4 experts": ("qwen2moe", 17, EXPERTS, {"n_experts": 4}),
    "Falcon": ("falcon", 33, FUSED, {}),
    "fused": ("phi3", 12, (*FUSED, "attn_rot_embd"), {}),
    "DeepSeek": ("deepseek2", 27, ("attn_q", "attn_kv_b", "attn_output", "ffn_down_exps"), {"n_kv": 1, "n_experts": 4}),
    "Gemma 3n": ("gemma3n", 35, DENSE, {"tied": True, "more": ["per_layer_token_embd"]}),
}


def write_model(path, architecture, n_blocks, matrices, *, tied=False, width=256, n_kv=8, n_experts=0, more=()):
    """Write a file of no real model. To plan, llama-quantize looks at names, shapes and a few numbers."""
    numbers = {
        "block_count": n_blocks,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": 256,
        "attention.head_count": 8,
        "attention.head_count_kv": n_kv,
        "expert_count": n_experts,
        "expert_used_count": min(n_experts, 1),
        "expert_feed_forward_length": 256,
        "expert_shared_count": 1,
        "attention.kv_lora_rank": 64,
        "attention.q_lora_rank": 64,
        "attention.sliding_window": 64,
    }
    metadata = {"general.architecture": Value(architecture, GGUFValueType.STRING)}
    for key, number in numbers.items():
        metadata[f"{architecture}.{key}"] = Value(number, GGUFValueType.UINT32)
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        metadata[f"{architecture}.{key}"] = Value(1e-5, GGUFValueType.FLOAT32)
    stems = ["token_embd", *([] if tied else ["output"]), *more]
    stems += [f"blk.{block}.{stem}" for block in range(n_blocks) for stem in (*matrices, "attn_norm")]
    shapes = {
        f"{stem}.weight": (width,) if "norm" in stem else (*([n_experts] if "_exps" in stem else []), 2, width)
        for stem in stems
    }
    infos = [TensorInfo(name, shape, T.F32) for name, shape in shapes.items()]
    write(path, metadata, infos, [np.zeros(info.shape, np.float32) for info in infos])
    return path


def planned_by_llama(binaries, model, name, imatrix=None) -> dict[str, str]:
    """Return the type of every tensor in llama-quantize's plan; those that it leaves alone are F32."""
    args = ["--dry-run", *(["--imatrix", imatrix] if imatrix else []), model, name]
    run = subprocess.run([binaries / "llama-quantize", *args], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = re.findall(r"\] +(\S+) +- \[.*type =.*size =(?:.*\((\w+)\))?", run.stdout + run.stderr)
    return {tensor: (found or "F32").upper() for tensor, found in lines}


@pytest.mark.parametrize("model", MODELS)
def test_the_types_are_those_of_llama_quantize(patched, tmp_path, model):
    architecture, n_blocks, matrices, more = MODELS[model]
    path = write_model(tmp_path / "model.gguf", architecture, n_blocks, matrices, **more)
    file, imatrix = read(path), tmp_path / "imatrix.gguf"
    some = np.ones((1, 256), np.float32)
    write_imatrix(imatrix, Imatrix({"blk.0.attn_q.weight": Entry(some, some[0, :1])}))
    for name in MIXTURES:
        for calibrated in (True, False) if n_blocks == 32 else (True,):
            theirs = planned_by_llama(patched, path, name, imatrix if calibrated else None)
            ours = {p.name: p.type.name for p in make_plan(file, Settings(type=name), "none", calibrated)}
            assert ours == {tensor: theirs[tensor] for tensor in ours}, (name, calibrated)
            assert len(ours) == len(theirs)


def test_a_file_says_of_itself_what_llama_quantize_says(patched, demo_gguf, tmp_path):
    file = read(demo_gguf)
    shapes = {name: shape for name, shape in file.shapes.items() if len(shape) == 2}
    some = {name: Entry(np.ones((1, shape[-1]), np.float32), np.ones(1, np.float32)) for name, shape in shapes.items()}
    write_imatrix(tmp_path / "some.imatrix", Imatrix(some, ["book.txt"], 3, 512))
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    args = ["--imatrix", "some.imatrix", demo_gguf, theirs, "Q3_K_M"]
    subprocess.run([patched / "llama-quantize", *args], cwd=tmp_path, check=True, capture_output=True)
    aaac.quantize(demo_gguf, ours, type="q3_k_m", imatrix=tmp_path / "some.imatrix", feedback=False)
    made, reference = read(ours), read(theirs)
    assert {name: t.tensor_type for name, t in made.tensors.items()} == {
        name: t.tensor_type for name, t in reference.tensors.items()
    }
    keys = [key for key in reference.fields if "quant" in key or key == "general.file_type"]
    assert len(keys) == 6
    assert {key: made.get(key) for key in keys} == {key: reference.get(key) for key in keys}
