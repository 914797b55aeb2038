"""Tiny random models of many families with the bundled model's tokenizer, and a converter that takes all of them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from random_checkpoints import COMMON, SIZES
from safetensors.torch import load_file, save_file

from aaac_gguf import resources
from aaac_gguf.llama import build

WITHOUT_HEAD_DIM = {key: n for key, n in SIZES.items() if key != "head_dim"}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
ONE_GROUP = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
# Without the last one, Granite's attention is to one token alone, and moves to another one with the least error.
MULTIPLIERS = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}
SIGMOID = {"scoring_func": "sigmoid"}  # the converter wants it, and transformers itself does not save it
MLA = {"kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 64, "v_head_dim": 32, "num_key_value_heads": 4}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,  # as many as the text has
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "out_hidden_size": 128,
    "patch_size": 14,
}
QWEN_TOKENS = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7}
SECTIONS = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}

MIXTURES: dict[str, Callable[[], Any]] = {
    "Mixtral": lambda: tf.MixtralConfig(**COMMON, **SIZES, num_local_experts=4, num_experts_per_tok=2),
    "Qwen2-MoE": lambda: tf.Qwen2MoeConfig(
        **COMMON, **WITHOUT_HEAD_DIM, **EXPERTS, num_experts=4, shared_expert_intermediate_size=64
    ),
    # llama.cpp makes the weights of experts sum to 1, as all models of this family have it.
    "Qwen3-MoE": lambda: tf.Qwen3MoeConfig(**COMMON, **SIZES, **EXPERTS, num_experts=4, norm_topk_prob=True),
    "OLMoE": lambda: tf.OlmoeConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM | {"intermediate_size": 64, "num_key_value_heads": 4},
        num_experts=4,
        num_experts_per_tok=2,
    ),
    # Only with 26 or 27 layers does llama.cpp know a q_proj (DeepSeek-V2-Lite).
    "DeepSeek-V2": lambda: tf.DeepseekV2Config(
        **COMMON, **WITHOUT_HEAD_DIM | MLA, **EXPERTS, **ONE_GROUP, q_lora_rank=64, topk_method="greedy"
    ),
    "DeepSeek-V3": lambda: tf.DeepseekV3Config(
        **COMMON, **WITHOUT_HEAD_DIM | MLA, **EXPERTS, **ONE_GROUP, **SIGMOID, q_lora_rank=64
    ),
    "GraniteMoe": lambda: tf.GraniteMoeConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM | {"intermediate_size": 64},
        **MULTIPLIERS,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "GraniteMoeShared": lambda: tf.GraniteMoeSharedConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM | {"intermediate_size": 64},
        **MULTIPLIERS,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
    ),
    "Llama 4": lambda: tf.Llama4TextConfig(
        **COMMON | {"num_hidden_layers": 4},  # every fourth without positions: llama.cpp stops if there is none
        **SIZES | {"intermediate_size": 64},
        intermediate_size_mlp=192,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
    ),
    "Ernie 4.5": lambda: tf.Ernie4_5_MoeConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM | {"intermediate_size": 128},  # for the converter: moe_intermediate_size * KV heads
        moe_intermediate_size=64,
        moe_num_experts=4,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_interval=1,
    ),
    "gpt-oss": lambda: tf.GptOssConfig(
        **COMMON, **SIZES | {"intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2, sliding_window=64
    ),
    # llama.cpp has as many heads of keys and values as of queries.
    "dots1": lambda: tf.Dots1Config(**COMMON, **SIZES | {"num_key_value_heads": 4}, **EXPERTS, **ONE_GROUP, **SIGMOID),
    "Jamba": lambda: tf.JambaConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM,
        num_experts=4,
        num_experts_per_tok=2,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_dt_rank=16,
        use_mamba_kernels=False,
    ),
    "MiniMax-M2": lambda: tf.MiniMaxM2Config(
        **COMMON,
        **SIZES | {"intermediate_size": 64},
        num_local_experts=4,
        num_experts_per_tok=2,
        rotary_dim=16,
        **SIGMOID,
    ),
    "LFM2-MoE": lambda: tf.Lfm2MoeConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM,
        **EXPERTS,
        num_experts=4,
        num_dense_layers=1,
        layer_types=["conv", "full_attention"],
    ),
    "AFMoE": lambda: tf.AfmoeConfig(
        **COMMON | {"num_hidden_layers": 4},
        **SIZES,
        **EXPERTS,
        num_experts=4,
        num_shared_experts=1,
        num_dense_layers=1,
        sliding_window=64,
        route_norm=True,  # the converter wants it, and transformers itself does not save it
        mup_enabled=True,  # llama.cpp scales embeddings in any case
    ),
    "Phi-3.5-MoE": lambda: tf.PhimoeConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM | {"intermediate_size": 64},
        num_local_experts=4,
        num_experts_per_tok=2,
        attention_bias=True,
        lm_head_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 512},
    ),
    "GLM-4.5": lambda: tf.Glm4MoeConfig(**COMMON, **SIZES, **EXPERTS, **ONE_GROUP, use_qk_norm=True),
    "Qwen3-Next": lambda: tf.Qwen3NextConfig(
        **COMMON,
        **SIZES,
        **EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=64,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        layer_types=["linear_attention", "full_attention"],
    ),
    "HunYuan-MoE": lambda: tf.HunYuanMoEV1Config(
        **COMMON,
        **SIZES | {"intermediate_size": 64},
        num_experts=4,
        moe_topk=[2, 2],
        moe_intermediate_size=[64, 64],
        num_shared_expert=[1, 1],
    ),
    "EXAONE-MoE": lambda: tf.ExaoneMoeConfig(
        **COMMON,
        **SIZES,
        **EXPERTS,
        num_experts=4,
        num_shared_experts=1,
        first_k_dense_replace=1,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"],
        **SIGMOID,
    ),
    "DBRX": lambda: tf.DbrxConfig(
        vocab_size=4096,
        d_model=128,
        n_heads=4,
        n_layers=2,
        max_seq_len=512,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"hidden_size": 128, "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        bos_token_id=1,
        eos_token_id=2,
    ),
}

WRAPPERS: dict[str, Callable[[], Any]] = {
    "Gemma 3": lambda: tf.Gemma3Config(
        text_config={**COMMON, **SIZES, "sliding_window": 64, "query_pre_attn_scalar": 32},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
    ),
    "Mistral 3": lambda: tf.Mistral3Config(
        text_config={"model_type": "mistral", **COMMON, **SIZES},
        vision_config={"model_type": "pixtral", "head_dim": 16, **VISION},
        image_token_index=5,
    ),
    "Llama 4": lambda: tf.Llama4Config(
        text_config=MIXTURES["Llama 4"]().to_dict(),
        vision_config={
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            **VISION,
        },
    ),
    "Qwen2.5-VL": lambda: tf.Qwen2_5_VLConfig(
        text_config={**COMMON, **WITHOUT_HEAD_DIM, "rope_parameters": SECTIONS},
        vision_config={"fullatt_block_indexes": [1], **QWEN_VISION},
        **QWEN_TOKENS,
    ),
    "Qwen3-VL": lambda: tf.Qwen3VLConfig(
        text_config={**COMMON, **SIZES, "rope_parameters": {**SECTIONS, "mrope_interleaved": True}},
        vision_config={"deepstack_visual_indexes": [1], **QWEN_VISION},
        **QWEN_TOKENS,
    ),
    "InternVL": lambda: tf.InternVLConfig(
        text_config={"model_type": "qwen2", **COMMON, **WITHOUT_HEAD_DIM, "architectures": ["Qwen2ForCausalLM"]},
        vision_config=VISION,
        image_token_id=5,
        image_seq_length=1,
    ),
    "SmolVLM": lambda: tf.SmolVLMConfig(
        text_config={"model_type": "llama", **COMMON, **SIZES, "architectures": ["VLlama3ForCausalLM"]},
        vision_config=VISION,
        image_token_id=5,
    ),
}

DENSE: dict[str, Callable[[], Any]] = {
    "Llama 3": lambda: tf.LlamaConfig(**COMMON, **SIZES, tie_word_embeddings=True),
    "Qwen2.5": lambda: tf.Qwen2Config(**COMMON, **WITHOUT_HEAD_DIM, tie_word_embeddings=False),
    "Gemma 2": lambda: tf.Gemma2Config(**COMMON, **SIZES, sliding_window=64, query_pre_attn_scalar=32),
    "Mistral": lambda: tf.MistralConfig(**COMMON, **SIZES, sliding_window=None),
    "Phi-4": lambda: tf.Phi3Config(
        **COMMON, **WITHOUT_HEAD_DIM, pad_token_id=0, partial_rotary_factor=0.75, tie_word_embeddings=True
    ),
    "SmolLM3": lambda: tf.SmolLM3Config(**COMMON | {"num_hidden_layers": 4}, **WITHOUT_HEAD_DIM, pad_token_id=0),
    "OLMo 2": lambda: tf.Olmo2Config(**COMMON, **WITHOUT_HEAD_DIM, pad_token_id=0),
    "Granite": lambda: tf.GraniteConfig(
        **COMMON,
        **WITHOUT_HEAD_DIM,
        **MULTIPLIERS,
    ),
    "StableLM": lambda: tf.StableLmConfig(**COMMON, **WITHOUT_HEAD_DIM, partial_rotary_factor=0.25),
    "Falcon-H1": lambda: tf.FalconH1Config(
        **COMMON, **SIZES, mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1
    ),
    # llama.cpp leaves the window out, so it is that of Phi-3-mini, wider than these texts.
    "Phi-3": lambda: tf.Phi3Config(**COMMON, **WITHOUT_HEAD_DIM, pad_token_id=0, sliding_window=2047),
    "GLM-4": lambda: tf.Glm4Config(**COMMON, **SIZES, pad_token_id=0),
    "Falcon": lambda: tf.FalconConfig(
        **COMMON,
        hidden_size=128,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "EXAONE 4": lambda: tf.Exaone4Config(**COMMON, **SIZES, sliding_window=None, layer_types=["full_attention"] * 2),
    "Gemma 3n": lambda: tf.Gemma3nTextConfig(
        **COMMON,
        **SIZES,
        sliding_window=64,
        vocab_size_per_layer_input=4096,
        hidden_size_per_layer_input=256,  # llama.cpp knows no other
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.95, 0.95],
        layer_types=["sliding_attention", "full_attention"],
    ),
}


# Layers that predict a second token. transformers does not run them, and llama.cpp does only if asked to.
# By model type: the decoder block that they are like, their own name, that of their other weights, and these.
PREDICTION_LAYERS = {
    "glm4_moe": (
        "model.layers.1.",
        "model.layers.2.",
        "model.layers.2.",
        ("eh_proj", "enorm", "hnorm", "shared_head.norm"),
    ),
    "qwen3_next": (
        "model.layers.1.",
        "mtp.layers.0.",
        "mtp.",
        ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"),
    ),
}
# The names of classes in checkpoints, where transformers saves others.
CLASSES = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}


def save(config: Any, folder: Path) -> Path:
    """Save a model of this config with random weights, as the class that its family's checkpoints name."""
    torch.manual_seed(0)
    mappings = tf.models.auto.modeling_auto
    wrapper = mappings.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    model = getattr(tf, wrapper)(config) if wrapper else tf.AutoModelForCausalLM.from_config(config)
    model = model.float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("bias"):
                parameter.normal_(std=0.1)  # some start at zero
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources.MODEL / name, folder / name)
    if config.model_type in PREDICTION_LAYERS:
        add_prediction_layer(folder / "model.safetensors", *PREDICTION_LAYERS[config.model_type])
    saved = (folder / "config.json").read_text()
    for ours, theirs in CLASSES.items():
        saved = saved.replace(ours, theirs)
    (folder / "config.json").write_text(saved)
    return folder


def add_prediction_layer(path: Path, like: str, name: str, stem: str, others: Sequence[str]) -> None:
    """Add a layer to a file of weights, like another one but random, with one more matrix and three norms."""
    tensors = load_file(path)
    layer = {key.replace(like, name): torch.randn(t.shape).mul(0.1).to(t) for key, t in tensors.items() if like in key}
    width = tensors["model.norm.weight"].numel()
    layer |= {f"{stem}{other}.weight": torch.ones(width, dtype=torch.bfloat16) for other in others[1:]}
    layer[f"{stem}{others[0]}.weight"] = torch.randn(width, 2 * width).mul(0.1).bfloat16()
    save_file(tensors | layer, path, metadata={"format": "pt"})


@functools.cache
def _converter() -> subprocess.Popen[str]:
    """Return a running any_vocabulary.py. It ends with the tests, whose end it has as its standard input."""
    tree = build.fetch()
    program = [sys.executable, Path(__file__).with_name("any_vocabulary.py"), tree / "convert_hf_to_gguf.py"]
    env = os.environ | {"PYTHONPATH": f"{tree}:{Path(__file__).parents[1]}"}
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def convert_hf(source: Path, out: Path, outtype: str, *_: Any) -> None:
    """Do what `llama.tools.convert_hf` does, for any tokenizer, without a name, once for each source."""
    kept = source.with_name(f"{source.name}-{outtype}.gguf")
    if not kept.exists():
        worker, log = _converter(), kept.with_suffix(".log")
        assert worker.stdin
        assert worker.stdout
        line = [str(log), str(source), "--outfile", str(kept), "--outtype", outtype]
        print(json.dumps(line), file=worker.stdin, flush=True)
        assert worker.stdout.readline() == "0\n", log.read_text()[-2000:]
    shutil.copy(kept, out)
