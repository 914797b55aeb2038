"""Second moments in the walk over the blocks, against hooks on the model's own modules."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from aaac_gguf import resources
from aaac_gguf.calibration import places, recorder
from aaac_gguf.calibration.activations import Activations, Squares
from aaac_gguf.calibration.sequential import BlockMoments
from aaac_gguf.files.gguf import GgufFile
from aaac_gguf.models import checkpoint
from aaac_gguf.models.blocks import Blocks

PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = [f"blk.{i}.{part}.weight" for i in range(4) for part in PARTS]
DOWN = "blk.1.ffn_down.weight"


def module(model, name: str) -> torch.nn.Module:
    _, i, part, _ = name.split(".")
    return model.model.layers[int(i)].get_submodule(PARTS[part])


def random_tokens(n: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 4096, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return checkpoint.load_model(resources.MODEL)


def block_moments(
    model,
    file: GgufFile,
    folder: Path,
    tokens: torch.Tensor,
    seed: int = 0,
    names: Sequence[str] = NAMES,
) -> BlockMoments:
    activations = Activations(Blocks(model, tokens[:1]), tokens, len(tokens), folder)
    activations.run(Squares())
    return BlockMoments(activations, file, names, folder, seed)


def test_moments_are_those_of_inputs_and_gradients(model, demo_full, tmp_path):
    tokens = random_tokens()
    inputs, gradients = [], []

    def watch(_, args, out):
        if out.requires_grad:  # the backward sweep
            inputs.append(args[0].detach())
            out.register_hook(lambda g: gradients.append(g.clone()))

    hook = module(model, DOWN).register_forward_hook(watch)
    found = block_moments(model, demo_full, tmp_path, tokens).moments(DOWN)
    hook.remove()
    x, g = torch.cat(inputs).flatten(0, 1), torch.cat(gradients).flatten(0, 1)
    assert len(x) == len(g) == tokens.numel()
    torch.testing.assert_close(found.inputs, x.T @ x / len(x))
    torch.testing.assert_close(found.outputs, g.T @ g / len(x))
    assert all(p.grad is None for p in model.parameters())


def test_the_error_predicts_the_divergence(model, demo_full, tmp_path):
    """The KL divergence that a small random change of one matrix causes is about tr(O D H D^T) / 2, over tokens."""
    tokens = random_tokens(4, 64)
    found = block_moments(model, demo_full, tmp_path, tokens).moments(DOWN)
    weight = module(model, DOWN).weight
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)) * 0.02 * weight.std()
    with torch.no_grad():
        before = model(input_ids=tokens).logits.log_softmax(-1)
        weight += change
        after = model(input_ids=tokens).logits.log_softmax(-1)
    kld = float((before.exp() * (before - after)).sum(-1).mean())
    predicted = float(((found.outputs @ change @ found.inputs) * change).sum()) / 2
    assert 0.5 < predicted / kld < 2


def test_moments_depend_on_the_seed_alone(model, demo_full, tmp_path):
    runs = [block_moments(model, demo_full, tmp_path, random_tokens(), seed=seed).moments(DOWN) for seed in (1, 1, 2)]
    assert torch.equal(runs[0].outputs, runs[1].outputs)
    assert not torch.equal(runs[0].outputs, runs[2].outputs)
    assert torch.equal(runs[0].inputs, runs[2].inputs)


def test_layers_come_in_the_order_of_the_products(model, demo_full, tmp_path):
    moments = block_moments(model, demo_full, tmp_path, random_tokens())
    for i in range(4):
        layers = [[name.split(".")[2] for name in layer] for layer in moments.layers()]
        assert layers == [["attn_q", "attn_k", "attn_v"], ["attn_output"], ["ffn_gate", "ffn_up"], ["ffn_down"]]
        assert moments.position == i + 1


def test_each_layer_sees_the_quantized_layers_before(model, demo_full, tmp_path):
    """Every matrix is replaced in its turn. Moments are of the inputs in the model so far; drift is what they lack."""
    tokens = random_tokens()
    full_model = checkpoint.load_model(resources.MODEL)
    moments = block_moments(model, demo_full, tmp_path, tokens)
    reported = {}
    for _ in range(2):
        for layer in moments.layers():
            for name, seen in layer.items():
                reported[name] = seen
                moments.replace(name, 0.9 * torch.from_numpy(demo_full[name]))
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in reported}
    streams: dict[str, list[torch.Tensor]] = {}  # the residual stream after a matrix whose outputs are added to it

    def watch(m: torch.nn.Module, found: list[torch.Tensor]) -> None:
        m.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))

    for m in (full_model, model):
        for name in reported:
            watch(module(m, name), inputs[name])
        for i in range(2):
            watch(m.model.layers[i].post_attention_layernorm, streams.setdefault(f"blk.{i}.attn_output.weight", []))
            watch(m.model.layers[i + 1].input_layernorm, streams.setdefault(f"blk.{i}.ffn_down.weight", []))
        with torch.no_grad():
            m(input_ids=tokens)
    assert reported["blk.0.attn_q.weight"].drift is None
    for name, seen in reported.items():
        full, x = inputs[name]
        torch.testing.assert_close(seen.inputs, x.T @ x / len(x), atol=1e-5, rtol=1e-3)
        if seen.drift is not None:
            torch.testing.assert_close(seen.drift, (full - x).T @ x / len(x), atol=1e-5, rtol=1e-3)
        if seen.output_drift is not None:
            full, now = streams[name]
            now = now + 0.1 * x @ module(full_model, name).weight.T  # it was asked for the matrix as it is in full
            expected = (full - now).T @ x / len(x)
            assert (seen.output_drift - expected).norm() < 1e-3 * expected.norm()
    assert [name for name, seen in reported.items() if seen.drift is None and seen.output_drift is None] == [
        f"blk.0.attn_{part}.weight" for part in "qkv"
    ]
    assert {name for name, seen in reported.items() if seen.output_drift is not None} == set(streams)
    # Q's rows are permuted on the way to the file and back.
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight"):
        torch.testing.assert_close(module(model, name).weight, 0.9 * module(full_model, name).weight)


def test_bfloat16_products_give_nearly_the_same_moments(demo_full, tmp_path, monkeypatch):
    walks = []
    for features in ({}, {"avx512_bf16": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda features=features: features)
        m, seen = checkpoint.load_model(resources.MODEL), {}
        moments = block_moments(m, demo_full, tmp_path, random_tokens())
        for _ in range(2):
            for layer in moments.layers():
                seen |= layer
                for name in layer:
                    moments.replace(name, 0.9 * torch.from_numpy(demo_full[name]))
        walks.append(seen)
    exact, rounded = walks
    for name, seen in exact.items():
        # Of other tokens, where the last digit decides which one is drawn.
        assert rounded[name].outputs.dtype == torch.float32
        for part in ("inputs", "drift", "output_drift"):
            a, b = getattr(seen, part), getattr(rounded[name], part)
            assert (a is None) == (b is None)
            if a is not None:
                assert b.dtype == torch.float32
                assert (a - b).norm() < 0.05 * a.norm(), (name, part)
    assert not torch.equal(exact[DOWN].inputs, rounded[DOWN].inputs)


def test_a_finished_block_can_be_passed(model, demo_full, tmp_path):
    """As a conversion that resumes does: the same weights, without asking for layers, lead to the same inputs."""
    found = []
    for passing in (False, True):
        m = checkpoint.load_model(resources.MODEL)
        moments = block_moments(m, demo_full, tmp_path, random_tokens())
        names = moments.tensors(0)
        assert moments.pending(names[0])
        if passing:
            for name in names:
                moments.replace(name, 0.9 * torch.from_numpy(demo_full[name]))
            moments.advance()
        else:
            for layer in moments.layers():
                for name in layer:
                    moments.replace(name, 0.9 * torch.from_numpy(demo_full[name]))
        assert not moments.pending(names[0])
        found.append([seen for layer in moments.layers() for seen in layer.values()])
    assert all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.outputs, b.outputs) for a, b in zip(*found, strict=True)
    )


def test_blocks_see_the_quantized_embeddings(model, demo_full, tmp_path):
    tokens = random_tokens()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    moments = block_moments(model, demo_full, tmp_path, tokens, names=["token_embd.weight", *NAMES])
    assert moments.looked_up == "token_embd.weight"
    full = moments.hidden.clone()
    moments.replace("token_embd.weight", 0.9 * torch.from_numpy(demo_full["token_embd.weight"]))
    torch.testing.assert_close(moments.hidden, 0.9 * full)
    first = next(moments.layers())
    assert first["blk.0.attn_q.weight"].drift is not None


def test_embeddings_that_are_the_output_matrix_too_are_not_only_looked_up(model, demo_full, tmp_path):
    moments = block_moments(model, demo_full, tmp_path, random_tokens(), names=["token_embd.weight", DOWN])
    assert moments.looked_up is None


def test_a_tensor_whose_rows_are_not_found_stays_as_it_is(model, demo_full, tmp_path):
    """Its moments are those of its inputs alone, the layers after it see its full weights, and it is listed."""
    down = module(model, DOWN).weight
    with torch.no_grad():
        down[0] += 1
    before = down.clone()
    moments = block_moments(model, demo_full, tmp_path, random_tokens())
    moments.advance()
    for layer in moments.layers():
        for name, seen in layer.items():
            assert (seen.outputs is None) == (name == DOWN)
            moments.replace(name, 0.9 * torch.from_numpy(demo_full[name]))
    assert torch.equal(down, before)
    assert moments.places.without_rows == [DOWN]


def test_equal_inputs_are_summed_once(model, demo_full, tmp_path):
    moments = block_moments(model, demo_full, tmp_path, random_tokens())
    q, k, v, o = (moments.moments(f"blk.2.attn_{part}.weight") for part in ("q", "k", "v", "output"))
    assert torch.equal(q.inputs, k.inputs)
    assert torch.equal(q.inputs, v.inputs)
    assert not torch.equal(q.inputs, o.inputs)
    assert len(q.outputs) == 2 * len(k.outputs)


def test_too_many_outputs_are_left_out(model, demo_full, tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "MAX_OUTPUTS", 256)
    moments = block_moments(model, demo_full, tmp_path, random_tokens())
    assert moments.moments(DOWN.replace("down", "up")).outputs is None
    assert moments.moments(DOWN).outputs.shape == (256, 256)


def test_experts_each_have_their_inputs(demo_full, tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=8,
        experts_implementation="eager",
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    names = [
        "blk.0.attn_q.weight",
        "blk.0.ffn_gate_exps.weight",
        "blk.0.ffn_up_exps.weight",
        "blk.0.ffn_down_exps.weight",
    ]
    layer = model.model.layers[0]
    weights = {names[0]: layer.self_attn.q_proj.weight, names[3]: layer.mlp.experts.down_proj}
    monkeypatch.setattr(places, "load_weight", lambda _, name, device: weights[name].data)
    moments = block_moments(model, demo_full, tmp_path, random_tokens(1, 4) % 64, names=names)
    down = moments.moments(names[3])
    assert down.inputs.shape == (8, 48, 48)
    assert down.outputs is None
    reached = down.inputs.diagonal(dim1=1, dim2=2).sum(1) > 0
    assert 0 < reached.sum() < 8
    assert moments.moments(names[0]).outputs.shape == (32, 32)
