"""The rows of a tensor in the parameter that it was made of."""

import pytest
import torch

from aaac_gguf.models.rows import RowMap


def test_rows_are_found_permuted_and_cut():
    parameter = torch.randn(12, 4)
    parameter[3] = parameter[7]  # equal rows are each taken once
    outputs = torch.arange(144.0).view(12, 12)
    order = torch.tensor([3, 1, 0, 7, 9, 11])
    rows = RowMap.find(parameter, parameter[order])
    assert torch.equal(rows.of_outputs(outputs), outputs[order][:, order])
    assert torch.equal(RowMap.find(parameter, parameter).of_outputs(outputs), outputs)
    assert RowMap.find(parameter, parameter + 1) is None


@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (3, 6, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_are_put_back_where_they_were_found(shape, transposed):
    """Also half of the rows of every expert, as gate and up of a fused parameter are."""
    stored = torch.randn(shape)
    parameter = torch.nn.Parameter(stored.transpose(-2, -1).contiguous() if transposed else stored.clone())
    tensor = stored[..., 1::2, :]
    rows = RowMap.find(parameter, tensor)
    assert rows.transposed == transposed
    rows.replace(parameter, 2 * tensor)
    after = parameter.data.transpose(-2, -1) if transposed else parameter.data
    assert torch.equal(after[..., 1::2, :], 2 * tensor)
    assert torch.equal(after[..., ::2, :], stored[..., ::2, :])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_that_the_converter_rounded_are_found(dtype):
    """Find the rows of a float32 head in a model of 16 bits."""
    parameter = torch.randn(6, 8)
    order = torch.tensor([3, 1, 5])
    rows = RowMap.find(parameter, parameter[order].to(dtype).float())
    assert rows is not None
    assert torch.equal(rows.order, order)
