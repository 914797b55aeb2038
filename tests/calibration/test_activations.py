"""The products of a model are seen, of plain, transposed and expert weights, and their inputs are summed."""

import pytest
import torch

from aaac_gguf import resources
from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration.activations import OnDisk
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_on_disk_is_read_as_it_was_written(tmp_path, dtype):
    values = torch.randn(3, 5, 2, 4).to(dtype)
    tensor = OnDisk(tmp_path / "tensor", values.shape, dtype)
    for i in (1, 2, 0):
        for batch in (slice(2, 4), slice(4, 9), slice(0, 2)):
            tensor[i, batch] = values[i, batch]
    assert (len(tensor), tensor.shape, tensor.dtype) == (3, (3, 5, 2, 4), dtype)
    assert torch.equal(tensor[1, :], values[1])
    assert torch.equal(tensor[2, 3:], values[2, 3:])
    assert (tmp_path / "tensor").stat().st_size == values.nbytes
