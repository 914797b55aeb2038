"""Backward passes of the full model, block by block, against one of the whole model."""

import pytest
import torch

from aaac_gguf import resources
from aaac_gguf.calibration.activations import Activations, Squares
from aaac_gguf.calibration.full_model import FullModel
from aaac_gguf.models import checkpoint
from aaac_gguf.models.blocks import Blocks

DOWN = "model.layers.1.mlp.down_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"


def random_tokens(n: int, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 4096, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return checkpoint.load_model(resources.MODEL)


def full_model(model, folder, tokens, n_text=None, seed=0, embeddings=None) -> FullModel:
    blocks = Blocks(model, tokens[:1])
    activations = Activations(blocks, tokens, len(tokens) if n_text is None else n_text, folder)
    activations.run(Squares())
    wanted = [[DOWN] if i == 1 else [] for i in range(len(blocks))]
    return FullModel(activations, wanted, folder, seed, embeddings=embeddings)


def test_gradients_are_those_of_the_whole_model(model, tmp_path):
    """Blocks backward one by one, and the whole model at once, for the tokens that the seed draws."""
    tokens = random_tokens(2)
    full = full_model(model, tmp_path, tokens, seed=3, embeddings=EMBEDDINGS)
    record = full.record(1)
    outputs, inputs = [], {}
    module = model.model.layers[1].mlp.down_proj
    module.register_forward_hook(lambda _, args, out: out.register_hook(outputs.append) and None)
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, i=i: args[0].register_hook(lambda g, i=i: inputs.__setitem__(i, g)) and None
        )
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeddings).logits
    uniform = torch.rand(*tokens.shape, 1, generator=torch.Generator().manual_seed(3))
    drawn = (logits.detach().softmax(-1).cumsum(-1) < uniform).sum(-1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").backward()
    torch.testing.assert_close(full.gradients, inputs[0], atol=1e-6, rtol=1e-3)
    g = inputs[0].flatten(0, 1)
    torch.testing.assert_close(full.at_embeddings(EMBEDDINGS), g.T @ g, atol=1e-5, rtol=1e-3)
    g = torch.cat(outputs).flatten(0, 1)
    torch.testing.assert_close(record.outputs[DOWN] / len(g), g.T @ g / len(g), atol=1e-6, rtol=1e-3)


def test_a_record_has_the_inputs_of_every_batch(model, tmp_path, monkeypatch):
    """Text and other sequences run apart."""
    monkeypatch.setattr("aaac_gguf.calibration.activations.BATCH_TOKENS", 32)
    tokens = random_tokens(5)
    full = full_model(model, tmp_path, tokens, n_text=3)
    assert full.activations.batches(1) == [slice(0, 2), slice(2, 3), slice(3, 5)]
    assert full.activations.batches(4) == [slice(i, i + 1) for i in range(5)]
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=tokens)
    record = full.record(1)
    assert [list(inputs) for inputs in record.inputs] == [[(DOWN, 0)]] * 3
    x = torch.cat([inputs[DOWN, 0] for inputs in record.inputs])
    torch.testing.assert_close(x, seen[0], atol=1e-5, rtol=1e-4)
    assert record.same_input_as == {DOWN: DOWN}


def test_no_parameter_keeps_a_gradient(model, tmp_path):
    full_model(model, tmp_path, random_tokens(1)).record(1)
    assert all(p.grad is None for p in model.parameters())
