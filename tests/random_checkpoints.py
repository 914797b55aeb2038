"""Tiny checkpoints with random weights and the bundled model's tokenizer."""

import shutil

import torch
import transformers

from aaac_gguf import resources

COMMON = {
    "vocab_size": 4096,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


SIZES = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def save_random(config, folder):
    """A checkpoint folder with random weights and the bundled model's tokenizer."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)  # transformers starts them at zero, which would hide a lost one
    model.bfloat16().save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources.MODEL / name, folder / name)
    return folder
