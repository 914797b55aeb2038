"""Second moments of inputs and output gradients, against hooks on the model's own modules."""

import pytest
import torch
import transformers

from aaac_gguf import checkpoint, demo, hessian

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def model():
    return checkpoint.load_model(demo.MODEL)


def random_tokens(vocab_size: int, n: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(0, vocab_size, (n, length), generator=torch.Generator().manual_seed(0))


def parameters(model) -> list[str]:
    return [name for name, p in model.named_parameters() if "layers" in name and p.dim() >= 2]


def test_moments_are_those_of_inputs_and_gradients(model):
    tokens = random_tokens(4096)
    inputs, gradients = [], []
    layer = model.model.layers[1].mlp.down_proj

    def watch(_, args, out):
        inputs.append(args[0].detach()[0])
        out.register_hook(lambda g: gradients.append(g[0]))

    hook = layer.register_forward_hook(watch)
    found = hessian.collect(model, tokens, parameters(model), seed=1)
    hook.remove()
    assert set(found) == set(parameters(model))
    x, g = torch.cat(inputs), torch.cat(gradients)
    assert len(x) == len(g) == tokens.numel()
    torch.testing.assert_close(found[NAME].inputs, x.T @ x / len(x))
    torch.testing.assert_close(found[NAME].outputs * len(x) / (g.T @ g), torch.ones(len(g.T), len(g.T)), atol=1e-2, rtol=1e-2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_error_predicts_the_divergence(model):
    """The KL divergence that a small random change of one matrix causes is about tr(O D H D^T) / 2, over tokens."""
    tokens = random_tokens(4096, 4, 64)
    moments = hessian.collect(model, tokens, [NAME])[NAME]
    weight = dict(model.named_parameters())[NAME]
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.02 * weight.detach().std()
    with torch.no_grad():
        before = model(input_ids=tokens).logits.log_softmax(-1)
        weight += change
        after = model(input_ids=tokens).logits.log_softmax(-1)
        weight -= change
    kld = float((before.exp() * (before - after)).sum(-1).mean())
    predicted = float(((moments.outputs @ change @ moments.inputs) * change).sum()) / 2
    assert 0.5 < predicted / kld < 2


def test_moments_depend_on_the_seed_alone(model):
    runs = [hessian.collect(model, random_tokens(4096), [NAME], seed)[NAME] for seed in (1, 1, 2)]
    assert torch.equal(runs[0].outputs, runs[1].outputs)
    assert not torch.equal(runs[0].outputs, runs[2].outputs)
    assert torch.equal(runs[0].inputs, runs[2].inputs)


def test_equal_inputs_are_summed_once(model):
    found = hessian.collect(model, random_tokens(4096), parameters(model))
    q, k, v, o = (found[f"model.layers.2.self_attn.{part}_proj.weight"] for part in "qkvo")
    assert torch.equal(q.inputs, k.inputs)
    assert torch.equal(q.inputs, v.inputs)
    assert not torch.equal(q.inputs, o.inputs)
    assert len(q.outputs) == 2 * len(k.outputs)


def test_experts_each_have_their_inputs():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=8, experts_implementation="eager",
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    found = hessian.collect(model, random_tokens(64, 1, 4), parameters(model))
    down = found["model.layers.0.mlp.experts.down_proj"]
    assert down.inputs.shape == (8, 48, 48)
    assert down.outputs is None
    reached = down.inputs.diagonal(dim1=1, dim2=2).sum(1) > 0
    assert reached.any()
    assert found["model.layers.0.self_attn.q_proj.weight"].outputs.shape == (32, 32)


def test_passes_keep_to_the_budget(model):
    names = parameters(model)
    runs = hessian.passes(model, names, 4 * 1024 * 1024)
    assert [name for run in runs for name in run] == names
    assert len(runs) > 2
    assert hessian.passes(model, names, 0) == [[name] for name in names]
    assert hessian.passes(model, names, 1 << 40) == [names]


def test_too_many_outputs_are_left_out(model, monkeypatch):
    monkeypatch.setattr(hessian, "MAX_OUTPUTS", 256)
    up = NAME.replace("down", "up")
    found = hessian.collect(model, random_tokens(4096), [up, NAME])
    assert found[up].outputs is None
    assert found[NAME].outputs.shape == (256, 256)


def test_weights_count_as_repetitions(model):
    tokens = random_tokens(4096)
    repeated = torch.cat([tokens, tokens[1:], tokens[1:]])
    weights = torch.ones(len(tokens))
    weights[1:] = 3
    weighted, plain = (hessian.collect(model, t, [NAME], weights=w)[NAME] for t, w in ((tokens, weights), (repeated, None)))
    torch.testing.assert_close(weighted.inputs, plain.inputs)
    # The tokens drawn for the gradients differ.
    assert float(weighted.outputs.trace() / plain.outputs.trace()) == pytest.approx(1, abs=0.2)


def test_random_tokens_come_beside_the_text():
    tokens = random_tokens(4096, 8)
    both, weights = hessian.with_random(tokens, 4096, seed=1)
    assert torch.equal(both[:8], tokens)
    assert both.shape == (10, tokens.shape[1])
    assert torch.equal(both[8:, 0], tokens[:2, 0])
    assert (both[8:, 1:] != tokens[:2, 1:]).float().mean() > 0.9
    assert int(both.min()) >= 0
    assert int(both.max()) < 4096
    assert weights.tolist() == [1] * 8 + [4] * 2


def test_outputs_follow_permuted_and_cut_rows():
    parameter = torch.randn(12, 4)
    parameter[3] = parameter[7]  # equal rows are each taken once
    outputs = torch.arange(144.0).view(12, 12)
    moments = hessian.Moments(torch.eye(4), outputs)
    order = torch.tensor([3, 1, 0, 7, 9, 11])
    found = hessian.in_rows_of(moments, parameter, parameter[order])
    assert torch.equal(found.outputs, outputs[order][:, order])
    assert torch.equal(hessian.in_rows_of(moments, parameter, parameter).outputs, outputs)


def test_transposed_parameters():
    parameter = torch.randn(4, 4)
    outputs = torch.arange(16.0).view(4, 4)
    found = hessian.in_rows_of(hessian.Moments(torch.eye(4), outputs), parameter, parameter.T)
    assert torch.equal(found.outputs, outputs)


def test_changed_weights_lose_their_outputs():
    parameter = torch.randn(4, 4)
    moments = hessian.Moments(torch.eye(4), torch.eye(4))
    found = hessian.in_rows_of(moments, parameter, parameter + 1)
    assert found.outputs is None
    assert found.inputs is moments.inputs
