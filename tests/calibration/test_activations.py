"""Watching products: what transformers multiplies with is what is counted, for plain, transposed and expert weights."""

import pytest
import torch

from aaac_gguf import resources
from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.errors import AaacError
from aaac_gguf.models import checkpoint


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.transposed = torch.nn.Parameter(torch.randn(4, 5))
        self.experts = torch.nn.Parameter(torch.randn(3, 6, 4))
        self.stacked = torch.nn.Parameter(torch.randn(2, 4, 6))

    def forward(self, x):
        self.linear(x)
        torch.addmm(torch.zeros(5), x.view(-1, 4), self.transposed)
        torch.nn.functional.linear(x[0], self.experts[2])
        x[1] @ self.stacked[1]
        return x @ torch.randn(4, 4)  # not a parameter


def test_products_report_parameter_expert_and_inputs():
    model, seen = Plain(), []
    x = torch.randn(2, 3, 4)
    with (
        torch.no_grad(),
        calibrate.Products(
            dict(model.named_parameters()), lambda name, expert, inputs: seen.append((name, expert, inputs))
        ),
    ):
        model(x)
    assert [(name, expert) for name, expert, _ in seen] == [
        ("linear.weight", 0),
        ("transposed", 0),
        ("experts", 2),
        ("stacked", 1),
    ]
    for (_, _, inputs), expected in zip(seen, (x.view(-1, 4), x.view(-1, 4), x[0], x[1]), strict=True):
        torch.testing.assert_close(inputs, expected)


@pytest.fixture(scope="module")
def model():
    return checkpoint.load_model(resources.MODEL)


NAMES = ["token_embd.weight", *(f"blk.{i}.{part}.weight" for i in range(4) for part in (
    "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))]  # fmt: skip


def test_importance_is_the_sum_of_squared_inputs(model):
    tokens = torch.randint(0, 4096, (3, 16), generator=torch.Generator().manual_seed(0))
    inputs = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    imatrix = calibrate.importance(model, tokens, "llama", NAMES, "random")
    hook.remove()
    assert set(imatrix.entries) == set(NAMES)
    entry = imatrix.entries["blk.1.ffn_down.weight"]
    assert entry.counts.tolist() == [48]
    torch.testing.assert_close(torch.from_numpy(entry.sums[0]), inputs[-1].square().sum((0, 1)))
    assert (imatrix.n_chunks, imatrix.chunk_size) == (3, 16)


def test_self_tokens_depend_on_the_seed_alone(model):
    first, again, other = (tokens_module.self_tokens(model, 4, 12, seed) for seed in (1, 1, 2))
    assert first.shape == (4, 12)
    assert (first[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_text_tokens_are_sequences_with_bos():
    tokens, sha256 = tokens_module.text_tokens(resources.MODEL, resources.SAMPLE_TEXT, 4, 64)
    assert tokens.shape == (4, 64)
    assert (tokens[:, 0] == 1).all()
    assert len(sha256) == 64
    tokenizer = checkpoint.load_tokenizer(resources.MODEL)
    assert tokenizer.decode(tokens[0, 1:]).startswith("It is a truth universally acknowledged")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the text is empty"),
        (b" \n ", "the text is empty"),
        (b"too short", "shorter than one sequence of 64"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_bad_text(tmp_path, content, words):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(AaacError, match=words):
        tokens_module.text_tokens(resources.MODEL, text, 4, 64)


def test_names_come_from_the_gguf_map():
    present = {"blk.3.attn_qkv.weight", "blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"}
    assert checkpoint.gguf_names("transformer.h.3.attn.c_attn.weight", "gpt2", 4, present) == ["blk.3.attn_qkv.weight"]
    experts = checkpoint.gguf_names("model.layers.3.mlp.experts.gate_up_proj", "qwen3moe", 4, present)
    assert experts == ["blk.3.ffn_gate_exps.weight", "blk.3.ffn_up_exps.weight"]
    assert checkpoint.gguf_names("vision.tower.weight", "llama", 4, present) == []
    assert checkpoint.gguf_names("x", "no such architecture", 4, present) == []
