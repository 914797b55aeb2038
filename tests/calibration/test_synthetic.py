"""Estimated second moments: the walk through the blocks by their tensors' names, and what it is worth."""

import families
import numpy as np
import pytest
import torch
from conftest import write_source
from gguf import GGMLQuantizationType as T

from aaac_gguf import resources
from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.calibration.experts import SHRINKAGE, ExpertHessians, ExpertInputs, shrunk
from aaac_gguf.calibration.synthetic import LENGTH, N_SEQUENCES, SyntheticMoments, estimation_tokens
from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.imatrix import Entry, Imatrix
from aaac_gguf.llama import tools
from aaac_gguf.models import checkpoint
from aaac_gguf.models.rows import RowMap
from aaac_gguf.models.source import full_precision
from aaac_gguf.models.weights import load_weight
from aaac_gguf.quantizer.moments import output_error
from aaac_gguf.quantizer.quantize import quantize

D, HEAD, FF, VOCAB = 32, 8, 48, 100
SETTINGS = {"attention.head_count": 4, "attention.head_count_kv": 2}
TOKENS = torch.randint(VOCAB, (20, 50), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tensors(rng):
    """Two blocks with two heads in each of two groups."""
    shapes = {
        "attn_norm": (D,),
        "attn_q": (D, D),
        "attn_k": (2 * HEAD, D),
        "attn_v": (2 * HEAD, D),
        "attn_output": (D, D),
        "ffn_norm": (D,),
        "ffn_gate": (FF, D),
        "ffn_up": (FF, D),
        "ffn_down": (D, FF),
    }
    values = {f"blk.{i}.{stem}.weight": rng.normal(size=shape) for i in (0, 1) for stem, shape in shapes.items()}
    values |= {
        "token_embd.weight": rng.normal(size=(VOCAB, D)),
        "output_norm.weight": rng.normal(size=D),
        "output.weight": rng.normal(size=(VOCAB, D)),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


@pytest.fixture
def synthetic(tensors, tmp_path):
    """A function of an imatrix, an architecture and settings: the moments of the model as `tensors` has it now."""
    number = iter(range(100))

    def make(imatrix=None, architecture="llama", **settings):
        path = write_source(tmp_path / f"{next(number)}.gguf", tensors, architecture, SETTINGS | settings)
        return SyntheticMoments(gguf_io.read(path), TOKENS, imatrix or Imatrix({}))

    return make


def rms(x):
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / max(len(x), 1)


def moments_of(x):
    """Return the moments of inputs x float32 [n, K]; its rows stand for all tokens."""
    h = hessian_of(x)
    less = (1 - SHRINKAGE) * TOKENS.numel() / (TOKENS.numel() + len(h)) * h
    return torch.where(torch.eye(len(h), dtype=torch.bool), h, less)


def embeddings(tensors):
    return torch.from_numpy(tensors["token_embd.weight"])[TOKENS.flatten()]


def weight(tensors, name):
    return torch.from_numpy(tensors[name])


def test_a_block_without_attention_by_hand(tensors, synthetic):
    """An output projection of zeros leaves the embeddings to the feed-forward network. The next block gets both."""
    tensors["blk.0.attn_output.weight"][:] = 0
    found = synthetic()
    x = embeddings(tensors)
    attended = rms(x) * weight(tensors, "blk.0.attn_norm.weight")
    torch.testing.assert_close(found.moments("blk.0.attn_q.weight").inputs, moments_of(attended))
    fed = rms(x) * weight(tensors, "blk.0.ffn_norm.weight")
    torch.testing.assert_close(found.moments("blk.0.ffn_up.weight").inputs, moments_of(fed))
    inner = torch.nn.functional.silu(fed @ weight(tensors, "blk.0.ffn_gate.weight").T) * (
        fed @ weight(tensors, "blk.0.ffn_up.weight").T
    )
    torch.testing.assert_close(found.moments("blk.0.ffn_down.weight").inputs, moments_of(inner), rtol=1e-4, atol=1e-3)
    x = x + inner @ weight(tensors, "blk.0.ffn_down.weight").T
    attended = rms(x) * weight(tensors, "blk.1.attn_norm.weight")
    torch.testing.assert_close(found.moments("blk.1.attn_k.weight").inputs, moments_of(attended), rtol=1e-4, atol=1e-4)


def test_heads_mix_the_values_of_their_group(tensors, synthetic):
    """One embedding for all tokens: every mixture is the value itself, once for each head of a group."""
    tensors["token_embd.weight"][:] = tensors["token_embd.weight"][:1]
    found = synthetic()
    value = (rms(embeddings(tensors)[:1]) * weight(tensors, "blk.0.attn_norm.weight")) @ weight(
        tensors, "blk.0.attn_v.weight"
    ).T
    first, second = value.split(HEAD, 1)
    torch.testing.assert_close(
        found.moments("blk.0.attn_output.weight").inputs,
        moments_of(torch.cat([first, first, second, second], 1)),
        rtol=1e-4,
        atol=1e-2,
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_heads_attend_by_their_scores(tensors, synthetic, architecture):
    """Rotary positions turn neighbouring channels in the one architecture, and a head's halves in the other."""
    n, length = TOKENS.shape
    x = rms(embeddings(tensors)) * weight(tensors, "blk.0.attn_norm.weight")
    q, k, v = (
        (x @ weight(tensors, f"blk.0.attn_{stem}.weight").T).view(n, length, -1, HEAD).transpose(1, 2) for stem in "qkv"
    )

    def rotated(t):
        out = torch.empty_like(t)
        for i in range(HEAD // 2):
            a, b = (2 * i, 2 * i + 1) if architecture == "llama" else (i, i + HEAD // 2)
            angle = torch.arange(length) * 10000 ** (-2 * i / HEAD)
            out[..., a] = t[..., a] * angle.cos() - t[..., b] * angle.sin()
            out[..., b] = t[..., a] * angle.sin() + t[..., b] * angle.cos()
        return out

    k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = rotated(q) @ rotated(k).mT / HEAD**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    heads = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n * length, D)
    found = synthetic(architecture=architecture).moments("blk.0.attn_output.weight")
    torch.testing.assert_close(found.inputs, moments_of(heads), rtol=1e-3, atol=1e-3)


def test_channels_have_the_importance_that_is_known(tensors, synthetic, rng):
    names = [name for name in tensors if name.startswith("blk.") and tensors[name].ndim == 2 and "attn_v" not in name]
    entries = {
        name: Entry(
            (7 * rng.uniform(0.1, 9, size=(1, tensors[name].shape[1]))).astype(np.float32), np.full(1, 7, np.float32)
        )
        for name in names
    }
    for i in (0, 1):  # the matrices of one input have one importance
        entries |= {
            f"blk.{i}.{other}.weight": entries[f"blk.{i}.{one}.weight"]
            for one, other in (("attn_q", "attn_k"), ("ffn_gate", "ffn_up"))
        }
    imatrix = Imatrix(entries)
    found = synthetic(imatrix)
    for name in names:
        torch.testing.assert_close(found.moments(name).inputs.diagonal(), torch.from_numpy(entries[name].importance()))
    # It counts for what comes after as well.
    blind = synthetic()
    a, b = (
        s.moments("blk.1.ffn_down.weight").inputs
        for s in (synthetic(Imatrix({"blk.0.attn_q.weight": entries["blk.0.attn_q.weight"]})), blind)
    )
    assert not torch.allclose(a, b, rtol=0.1)


def test_fused_matrices_are_their_parts(tensors, synthetic):
    apart = synthetic()
    expected = {
        name: apart.moments(name).inputs
        for name in ("blk.0.attn_output.weight", "blk.0.ffn_down.weight", "blk.1.ffn_up.weight")
    }
    for i in (0, 1):
        parts = [tensors.pop(f"blk.{i}.attn_{part}.weight") for part in "qkv"]
        tensors[f"blk.{i}.attn_qkv.weight"] = np.concatenate(parts)
        tensors[f"blk.{i}.ffn_up.weight"] = np.concatenate(
            [tensors.pop(f"blk.{i}.ffn_gate.weight"), tensors[f"blk.{i}.ffn_up.weight"]]
        )
    fused = synthetic()
    for name, inputs in expected.items():
        torch.testing.assert_close(fused.moments(name).inputs, inputs, rtol=1e-4, atol=1e-3)
    assert fused.moments("blk.1.attn_qkv.weight") is not None


def test_without_a_second_norm_both_halves_of_a_block_get_the_same(tensors, synthetic):
    one_after_the_other = synthetic()
    assert not torch.allclose(
        one_after_the_other.moments("blk.0.attn_q.weight").inputs,
        one_after_the_other.moments("blk.0.ffn_up.weight").inputs,
        rtol=0.1,
    )
    for i in (0, 1):
        del tensors[f"blk.{i}.ffn_norm.weight"]
    side_by_side = synthetic()
    for i in (0, 1):
        q, up = (side_by_side.moments(f"blk.{i}.{stem}.weight").inputs for stem in ("attn_q", "ffn_up"))
        torch.testing.assert_close(q, up)


def test_norms_after_the_halves_of_a_block(tensors, synthetic, rng):
    """Outputs are as large as their norms say, however large the matrices."""
    for i in (0, 1):
        for stem in ("post_attention_norm", "post_ffw_norm"):
            tensors[f"blk.{i}.{stem}.weight"] = rng.normal(size=D).astype(np.float32)
    small = synthetic().moments("blk.1.attn_q.weight").inputs
    for stem in ("attn_output", "ffn_down"):
        tensors[f"blk.0.{stem}.weight"] *= 100
    torch.testing.assert_close(synthetic().moments("blk.1.attn_q.weight").inputs, small, rtol=1e-3, atol=1e-3)


def test_a_post_attention_norm_alone_is_that_of_the_feed_forward_network(tensors, synthetic):
    expected = synthetic().moments("blk.0.ffn_up.weight").inputs
    for i in (0, 1):
        tensors[f"blk.{i}.post_attention_norm.weight"] = tensors.pop(f"blk.{i}.ffn_norm.weight")
    torch.testing.assert_close(synthetic().moments("blk.0.ffn_up.weight").inputs, expected)


def test_layer_norm_and_biases(tensors, synthetic, rng):
    bias = rng.normal(size=D).astype(np.float32)
    tensors["blk.0.attn_norm.bias"] = bias
    x = embeddings(tensors)
    expected = torch.nn.functional.layer_norm(
        x, (D,), weight(tensors, "blk.0.attn_norm.weight"), torch.from_numpy(bias), 1e-5
    )
    torch.testing.assert_close(synthetic().moments("blk.0.attn_q.weight").inputs, moments_of(expected))
    tensors["blk.0.attn_v.bias"] = np.full(2 * HEAD, 1000, np.float32)
    h = synthetic().moments("blk.0.attn_output.weight").inputs
    assert (h.diagonal() > 0.9e6).all()


def test_scales_of_architectures(tensors, synthetic):
    """Factors of the embeddings and of the blocks' outputs decide which of the two the second block sees."""

    def second(**given):
        return synthetic(**given).moments("blk.1.attn_q.weight").inputs

    alone = moments_of(rms(embeddings(tensors)) * weight(tensors, "blk.1.attn_norm.weight"))
    found = {
        "plain": second(),
        "gemma": second(architecture="gemma2"),
        "large": second(embedding_scale=1e4),
        "quiet": second(residual_scale=1e-4),
    }
    apart = {name: (h - alone).norm() / alone.norm() for name, h in found.items()}
    assert apart["plain"] > 0.3
    assert apart["gemma"] < apart["plain"]
    assert max(apart["large"], apart["quiet"]) < 0.03


def test_unknown_parts_of_a_block_have_no_moments(tensors, synthetic, rng):
    tensors["blk.0.ffn_down_exps.weight"] = rng.normal(size=(3, D, FF)).astype(np.float32)
    tensors["blk.0.ssm_in.weight"] = rng.normal(size=(2 * D, D)).astype(np.float32)
    for stem in ("attn_q", "attn_k", "attn_v"):
        del tensors[f"blk.1.{stem}.weight"]
    found = synthetic()
    for name in (
        "token_embd.weight",
        "output_norm.weight",
        "blk.0.ffn_down_exps.weight",
        "blk.0.ssm_in.weight",
        "blk.0.attn_norm.weight",
    ):
        assert found.moments(name) is None
    assert found.moments("blk.1.attn_output.weight") is None
    assert found.moments("blk.1.ffn_up.weight") is not None
    assert found.moments("output.weight").inputs.shape == (D, D)
    assert list(found.inputs) == ["output.weight"]  # memory is that of one block
    with pytest.raises(ValueError, match="block 0 has gone by"):
        found.moments("blk.0.attn_q.weight")


def test_matrices_of_other_widths_are_left_alone(tensors, synthetic, rng):
    """Low-rank projections and the like: they have the names, and neither read nor write the residual stream."""
    shapes = {
        "blk.0.attn_q": (D, D // 2),
        "blk.0.attn_output": (D // 2, D),
        "blk.0.ffn_down": (2 * D, FF),
        "blk.1.attn_v": (2 * HEAD, D // 2),
    }
    for stem, shape in shapes.items():
        tensors[f"{stem}.weight"] = rng.normal(size=shape).astype(np.float32)
    found = synthetic()
    for stem in ("attn_q", "attn_output", "ffn_down", "ffn_up"):
        assert found.moments(f"blk.0.{stem}.weight") is None, stem
    x = rms(embeddings(tensors)) * weight(tensors, "blk.1.attn_norm.weight")
    torch.testing.assert_close(found.moments("blk.1.attn_q.weight").inputs, moments_of(x))
    assert found.moments("blk.1.attn_output.weight") is None


def test_every_block_may_have_its_own_number_of_groups(tensors, tmp_path, monkeypatch):
    """One embedding for all tokens again. Block 1 has one group, of two heads that are twice as wide."""
    tensors["token_embd.weight"][:] = tensors["token_embd.weight"][:1]
    file = gguf_io.read(write_source(tmp_path / "model.gguf", tensors, settings={"attention.head_count": 4}))
    get = type(file).get
    monkeypatch.setattr(
        type(file),
        "get",
        lambda self, key, default=None: [2, 1] if key.endswith("head_count_kv") else get(self, key, default),
    )
    found = SyntheticMoments(file, TOKENS, Imatrix({}))
    for block, order in ((0, [0, 0, 1, 1]), (1, [0, 1, 0, 1])):
        h = found.moments(f"blk.{block}.attn_output.weight").inputs.diagonal().view(4, HEAD)
        assert not torch.allclose(h[order.index(0)], h[order.index(1)], rtol=0.01)
        for head, value in enumerate(order):
            torch.testing.assert_close(h[head], h[order.index(value)], rtol=1e-3, atol=1e-3)


def test_experts_get_the_tokens_that_the_router_sends_them(tensors, synthetic, rng):
    """Two of three experts for each token."""
    tensors["blk.0.attn_output.weight"][:] = 0
    for stem in ("ffn_gate", "ffn_up", "ffn_down"):
        shape = tensors.pop(f"blk.0.{stem}.weight").shape
        tensors[f"blk.0.{stem}_exps.weight"] = rng.normal(size=(3, *shape)).astype(np.float32)
    tensors["blk.0.ffn_gate_inp.weight"] = rng.normal(size=(3, D)).astype(np.float32)
    found = synthetic(expert_used_count=2)
    x = rms(embeddings(tensors)) * weight(tensors, "blk.0.ffn_norm.weight")
    scores = (x @ weight(tensors, "blk.0.ffn_gate_inp.weight").T).softmax(1)
    left_out = scores.argmin(1)
    kept = scores.scatter(1, left_out[:, None], 0)
    shares = kept / kept.sum(1, keepdim=True)
    hessians, inner = (
        found.moments("blk.0.ffn_up_exps.weight").inputs,
        found.moments("blk.0.ffn_down_exps.weight").inputs,
    )
    assert len(hessians) == len(inner) == 3
    out = torch.zeros_like(x)
    for expert in range(3):
        own = x[left_out != expert]
        torch.testing.assert_close(hessians[expert], shrunk(hessian_of(own), len(own)), rtol=1e-4, atol=1e-5)
        gate, up, down = (weight(tensors, f"blk.0.ffn_{stem}_exps.weight")[expert] for stem in ("gate", "up", "down"))
        opened = torch.nn.functional.silu(own @ gate.T) * (own @ up.T)
        torch.testing.assert_close(inner[expert], shrunk(hessian_of(opened), len(own)), rtol=1e-3, atol=1e-2)
        out[left_out != expert] += (opened @ down.T) * shares[left_out != expert][:, [expert]]
    attended = rms(embeddings(tensors) + out) * weight(tensors, "blk.1.attn_norm.weight")
    torch.testing.assert_close(found.moments("blk.1.attn_q.weight").inputs, moments_of(attended), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("broken", ["attn_k", "ffn_up_exps"])
def test_experts_that_cannot_be_followed_have_no_moments(tensors, synthetic, rng, broken):
    """After attention of another kind, and with matrices of other shapes."""
    for stem in ("ffn_gate", "ffn_up", "ffn_down"):
        shape = tensors.pop(f"blk.0.{stem}.weight").shape
        tensors[f"blk.0.{stem}_exps.weight"] = rng.normal(size=(3, *shape)).astype(np.float32)
    tensors["blk.0.ffn_gate_inp.weight"] = rng.normal(size=(3, D)).astype(np.float32)
    assert synthetic().moments("blk.0.ffn_down_exps.weight") is not None
    del tensors[f"blk.0.{broken}.weight"]
    found = synthetic()
    assert found.moments("blk.0.ffn_down_exps.weight") is None
    assert found.moments("blk.1.ffn_down.weight") is not None


def test_experts_have_the_importance_that_is_known(tensors, rng):
    """Also one that no token reaches: it has the correlations of all tokens."""
    x = torch.from_numpy(rng.normal(size=(50, D)).astype(np.float32))
    inputs = ExpertInputs(x, [torch.arange(0, 50, 2), torch.tensor([], dtype=torch.long)], True)
    importance = torch.from_numpy(rng.uniform(0.1, 9, size=(2, D)).astype(np.float32))
    of_layer = x.T @ x / 50
    blind, known = ExpertHessians(inputs, None, of_layer), ExpertHessians(inputs, importance, of_layer)
    torch.testing.assert_close(blind[1], of_layer)
    for expert, hessian in enumerate(known):
        torch.testing.assert_close(hessian.diagonal(), importance[expert])
        scale = (importance[expert] / blind[expert].diagonal()).sqrt()
        torch.testing.assert_close(hessian, scale[:, None] * blind[expert] * scale, rtol=1e-4, atol=1e-5)
    assert not ExpertHessians(inputs, None, None)[1].any()


@pytest.mark.llama
def test_tokens_are_those_of_the_bundled_text(demo_full):
    tokens = estimation_tokens(resources.MODEL, demo_full)
    assert tokens.shape == (N_SEQUENCES, LENGTH)
    expected, _ = tokens_module.text_tokens(resources.MODEL, resources.CALIBRATION_TEXT, N_SEQUENCES, LENGTH)
    torch.testing.assert_close(tokens, expected)


def test_without_a_tokenizer_tokens_are_random_and_the_seed_decides(tensors, tmp_path, recwarn):
    file = gguf_io.read(write_source(tmp_path / "model.gguf", tensors, settings=SETTINGS))
    first, same, other = (estimation_tokens(file.path, file, seed) for seed in (1, 1, 2))
    torch.testing.assert_close(first, same)
    assert not torch.equal(first, other)
    assert first.shape[0] == N_SEQUENCES
    assert first.min() >= 0
    assert first.max() < VOCAB
    assert "cannot load the tokenizer" in str(recwarn.list[0].message)
    assert "moments are estimated from random tokens" in str(recwarn.list[0].message)


# What is left out of the others: windows shorter than the text, blocks without positions, state spaces.
FAMILIES = (
    "Llama 3",
    "Qwen2.5",
    "Mistral",
    "Phi-4",
    "OLMo 2",
    "Granite",
    "StableLM",
    "GLM-4",
    "EXAONE 4",
    "Gemma 2",
)


MIXTURES = ("Mixtral", "Qwen2-MoE", "Qwen3-MoE")


@pytest.mark.llama
@pytest.mark.parametrize("family", [*FAMILIES, *MIXTURES])
def test_the_walk_is_the_models_forward_pass(family, llama_source, tmp_path, monkeypatch):
    """For sequences of at most 64 tokens, the width of Gemma's window."""
    monkeypatch.setattr(tools, "convert_hf", families.convert_hf)
    folder = families.save((families.DENSE | families.MIXTURES)[family](), tmp_path / "model")
    model = checkpoint.load_model(folder)
    seen: dict[tuple[str, int], list[torch.Tensor]] = {}

    def observe(parameter, expert, x):
        seen.setdefault((parameter, expert), []).append(x.clone())

    with full_precision(folder, tmp_path) as file:
        tokens = estimation_tokens(folder, file)[:8, :64]
        calibrate.Activations(calibrate.Blocks(model, tokens[:1]), tokens, len(tokens)).run(observe)
        expected = {
            (name, expert): hessian_of(torch.cat(x))
            for (parameter, expert), x in seen.items()
            for name in checkpoint.gguf_names(parameter, file.architecture, 2, file.shapes)
            if name.startswith("blk.")
        }
        found = SyntheticMoments(file, tokens, Imatrix({}))
        apart = {}
        for name, expert in sorted(expected, key=lambda key: gguf_io.block_number(key[0], 99)):
            if "ffn_gate_inp" in name:  # is not quantized
                continue
            found.moments(name)
            x = found.inputs[name]
            if isinstance(x, ExpertInputs):
                x = x.x[x.rows[expert]]
            wanted = expected[name, expert]
            apart[name, expert] = float((hessian_of(x) - wanted).norm() / wanted.norm())
    assert len(apart) >= 2 * 4
    assert max(apart.values()) < 2e-3, apart


def test_synthetic_moments_reduce_the_error_on_the_bundled_model(demo_full):
    """By the inputs that the model's own products have on a text, with an importance matrix of the same text."""
    model = checkpoint.load_model(resources.MODEL)
    tokens, _ = tokens_module.text_tokens(resources.MODEL, resources.SAMPLE_TEXT, 8, 128)
    sums: dict[str, torch.Tensor] = {}

    def observe(name, expert, x):
        sums[name] = sums.get(name, 0) + x.T @ x

    calibrate.Activations(calibrate.Blocks(model, tokens[:1]), tokens, len(tokens)).run(observe)
    imatrix = calibrate.importance(model, tokens, demo_full.architecture, demo_full.tensors, "text")
    synthetic = SyntheticMoments(demo_full, estimation_tokens(resources.MODEL, demo_full), imatrix)
    parameters = dict(model.named_parameters())
    ratios = {}
    for i in range(model.config.num_hidden_layers):
        for parameter in [name for name in sums if f"layers.{i}." in name]:
            (name,) = checkpoint.gguf_names(parameter, demo_full.architecture, 99, demo_full.tensors)
            w = load_weight(demo_full, name, "cpu")
            assert RowMap.find(parameters[parameter], w)
            errors = []
            for given in (
                {"importance": torch.from_numpy(imatrix.entries[name].importance())},
                {"hessian": synthetic.moments(name).inputs},
            ):
                made = quantize(w, T["AAAC4_G16"], **given)
                errors.append(
                    output_error(w - torch.from_numpy(fmt.decode(fmt.G16, made.data, made.codec)), sums[parameter])
                )
            ratios[name] = errors[1] / errors[0]
    assert len(ratios) == 28
    assert max(ratios.values()) < 1, ratios
    assert np.exp(np.log(list(ratios.values())).mean()) < 0.75, ratios
