"""The keys' matrices of latent attention are those of llama.cpp, and their inputs are the model's queries."""

import pytest
import torch
import transformers
from random_checkpoints import COMMON

from aaac_gguf.calibration.activations import Products
from aaac_gguf.calibration.recorder import InputRecorder
from aaac_gguf.models.mla import by_queries, key_matrices

HEADS, NOPE, ROTATED, VALUES, LATENT = 3, 16, 8, 12, 24
SIZES = {"hidden_size": 36, "intermediate_size": 48, "num_attention_heads": HEADS, "num_key_value_heads": HEADS}
DIMS = {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROTATED, "v_head_dim": VALUES, "kv_lora_rank": LATENT}
KEYS = "model.layers.1.self_attn.k_b_proj.weight"


def model_of(config, rank):
    torch.manual_seed(0)
    sizes = COMMON | {"vocab_size": 50} | SIZES | DIMS
    return transformers.AutoModelForCausalLM.from_config(config(**sizes, q_lora_rank=rank, first_k_dense_replace=2))


@pytest.fixture(params=[(transformers.DeepseekV2Config, None), (transformers.DeepseekV3Config, 20)], ids=["V2", "V3"])
def model(request):
    return model_of(*request.param)


def test_queries_times_the_matrix_are_what_the_model_computes(model):
    """Queries times keys, from the parts that Products reports: (W^T q)^T c is q^T (W c)."""
    parameters = dict(model.named_parameters())
    keys = key_matrices(model, parameters)
    assert list(keys) == [KEYS.replace("1", "0"), KEYS]
    assert keys[KEYS].shape == (HEADS, LATENT, NOPE)
    seen = {}

    def observe(name, expert, inputs):
        seen[name, expert] = inputs

    attention = model.model.layers[1].self_attn
    made = {}
    queries = attention.q_proj if attention.q_lora_rank is None else attention.q_b_proj
    queries.register_forward_hook(lambda _, args, out: made.update(queries=out))
    attention.kv_b_proj.register_forward_hook(lambda _, args, out: made.update(latent=args[0], keys=out))
    with torch.no_grad(), Products(parameters | keys, observe):
        model(torch.arange(14).view(2, 7))
    latent = made["latent"].reshape(14, LATENT)
    heads = made["keys"].reshape(14, HEADS, NOPE + VALUES)
    for head in range(HEADS):
        q = seen[KEYS, head]
        torch.testing.assert_close(q, made["queries"].reshape(14, HEADS, NOPE + ROTATED)[:, head, :NOPE])
        torch.testing.assert_close(q @ keys[KEYS][head].T @ latent.T, q @ heads[:, head, :NOPE].T)
    assert torch.equal(seen["model.layers.1.self_attn.kv_b_proj.weight", 0], latent)


def test_what_is_written_to_the_matrix_is_in_the_model(model):
    parameters = dict(model.named_parameters())
    key_matrices(model, parameters)[KEYS].data.zero_()
    kv_b = model.model.layers[1].self_attn.kv_b_proj.weight.detach().view(HEADS, NOPE + VALUES, LATENT)
    assert not kv_b[:, :NOPE].any()
    assert kv_b[:, NOPE:].all()
    assert list(key_matrices(model, {KEYS.replace("k_b", "kv_b"): parameters[KEYS.replace("k_b", "kv_b")]})) == [KEYS]


def test_projections_of_the_same_inputs_stay_together():
    """Queries and latent are made of the same inputs, with the keys' matrix between them."""
    model = model_of(transformers.DeepseekV2Config, None)
    parameters = dict(model.named_parameters())
    parameters |= key_matrices(model, parameters)
    recorder = InputRecorder(parameters, parameters)
    with torch.no_grad(), recorder:
        model(torch.arange(14).view(2, 7))
    stem = "model.layers.0.self_attn."
    first = [
        recorder.same_input_as[stem + p] for p in ("q_proj.weight", "k_b_proj.weight", "kv_a_proj_with_mqa.weight")
    ]
    assert first == [stem + p for p in ("q_proj.weight", "k_b_proj.weight", "q_proj.weight")]


def test_other_attention_has_none():
    weights = {"a.q_proj.weight": torch.empty(2, 2), "a.k_b_proj.weight": torch.empty(2, 2)}
    assert by_queries(weights) == {}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON | {"vocab_size": 50} | SIZES, head_dim=12))
    assert key_matrices(model, dict(model.named_parameters())) == {}
