"""Blocks one by one give what the model gives if they share only hidden states; other models are all head."""

import pytest
import torch
import transformers

from aaac_gguf import resources
from aaac_gguf.models import checkpoint
from aaac_gguf.models.blocks import Blocks, fast_products

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "gemma3": transformers.Gemma3TextConfig(**SMALL, sliding_window=4, sliding_window_pattern=2),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2),
    "mixtral": transformers.MixtralConfig(**SMALL, num_local_experts=3, experts_implementation="eager"),
    "falcon": transformers.FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, bos_token_id=1, eos_token_id=2
    ),
    "mamba": transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=4, pad_token_id=0),
}


def random_model(config) -> torch.nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def tokens(n: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 64, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_one_by_one_are_the_model(name):
    model = random_model(CONFIGS[name])
    blocks = Blocks(model, tokens(1))
    assert len(blocks) == 4
    with torch.no_grad():
        hidden = blocks.embed(tokens())
        for i in range(4):
            hidden = blocks.run(i, tokens(), hidden)
        torch.testing.assert_close(hidden, model(input_ids=tokens()).logits)
    names = [set(blocks.parameters(i)) for i in range(4)]
    assert set().union(*names) == {name for name, _ in model.named_parameters()}
    assert sum(map(len, names)) == len(set().union(*names))


def test_gradients_pass_through_a_block():
    model = random_model(CONFIGS["llama"])
    blocks = Blocks(model, tokens(1))
    hidden = blocks.embed(tokens()).detach().requires_grad_(True)
    blocks.run(0, tokens(), hidden).square().sum().backward()
    assert hidden.grad.abs().sum() > 0


def share_more(model) -> None:
    """Let block 2 use what block 1 computed, as Gemma 3n's blocks do with keys and values."""
    layers, seen = model.model.layers, []
    layers[1].register_forward_hook(lambda _, args, out: seen.append(out))
    layers[2].register_forward_hook(lambda _, args, out: out + seen[-1].mean())
    layers[0].register_forward_pre_hook(lambda _, args: seen.clear())


def test_a_model_whose_blocks_share_more_is_all_head():
    model = random_model(CONFIGS["llama"])
    share_more(model)
    blocks = Blocks(model, tokens(1))
    assert len(blocks) == 1
    assert len(blocks.parameters(0)) == len(list(model.named_parameters()))
    with torch.no_grad():
        torch.testing.assert_close(blocks.run(0, tokens(), blocks.embed(tokens())), model(input_ids=tokens()).logits)
        assert not torch.allclose(blocks.run(0, tokens(), 2 * blocks.embed(tokens())), model(input_ids=tokens()).logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_blocks_stay_on_disk(name, tmp_path, monkeypatch):
    random_model(CONFIGS[name]).to(torch.bfloat16).save_pretrained(tmp_path)
    whole = Blocks(checkpoint.load_model(tmp_path), tokens(1))
    monkeypatch.setattr(checkpoint, "WEIGHTS_SHARE", 0)
    streamed = Blocks(checkpoint.load_model(tmp_path, folder=tmp_path / "scratch"), tokens(1))
    assert len(streamed) == 4
    with torch.no_grad():
        hidden = whole.embed(tokens())
        assert torch.equal(streamed.embed(tokens()), hidden)
        for i in range(4):
            after = whole.run(i, tokens(), hidden)
            assert torch.equal(streamed.run(i, tokens(), hidden), after)
            assert [streamed.parameters(j).popitem()[1].is_meta for j in range(3)] == [j != i for j in range(3)]
            hidden = after
        hidden = whole.embed(tokens())
        streamed.load(0)
        for _, p in streamed.parameters(0).items():
            p.data.mul_(0.5)
        assert not torch.equal(streamed.run(0, tokens(), hidden), whole.run(0, tokens(), hidden))
        streamed.load(1)
        assert torch.equal(streamed.run(0, tokens(), hidden), whole.run(0, tokens(), hidden))


def test_a_model_on_disk_that_is_all_head_is_loaded_whole(tmp_path, monkeypatch):
    random_model(CONFIGS["llama"]).to(torch.bfloat16).save_pretrained(tmp_path)
    whole = checkpoint.load_model(tmp_path)
    monkeypatch.setattr(checkpoint, "WEIGHTS_SHARE", 0)
    streamed = checkpoint.load_model(tmp_path, folder=tmp_path / "scratch")
    for model in (whole, streamed):
        share_more(model)
    blocks = Blocks(streamed, tokens(1))
    assert len(blocks) == 1
    with torch.no_grad():
        torch.testing.assert_close(blocks.run(0, tokens(), blocks.embed(tokens())), whole(input_ids=tokens()).logits)
    assert not any(p.is_meta for p in blocks.parameters(0).values())


def test_only_products_are_rounded_to_bfloat16(monkeypatch):
    """The residual stream of a float32 model stays float32 on a CPU that has products of bfloat16 numbers."""
    model = checkpoint.load_model(resources.MODEL)
    blocks, ids = Blocks(model, tokens()), tokens()
    outputs = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, args, out: outputs.append(out) and None)
    found = []
    for features in ({}, {"avx512_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        with torch.no_grad(), fast_products():
            found.append(blocks.run(0, ids, blocks.embed(ids)))
    assert [out.dtype for out in outputs] == [torch.float32, torch.bfloat16]
    exact, rounded = found
    assert rounded.dtype == torch.float32
    assert 1e-5 < (rounded - exact).norm() / exact.norm() < 1e-2
