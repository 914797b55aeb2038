"""Find the tensors of a GGUF in a transformers model, and say which are not there."""

import pytest
import torch

from aaac_gguf import resources
from aaac_gguf.calibration.places import Place, TensorPlaces
from aaac_gguf.models import checkpoint
from aaac_gguf.models.blocks import Blocks

Q, DOWN = "blk.1.attn_q.weight", "blk.1.ffn_down.weight"


@pytest.fixture
def blocks():
    return Blocks(checkpoint.load_model(resources.MODEL), torch.arange(16)[None])


def test_tensors_have_a_block_and_a_parameter(blocks, demo_full):
    names = ["token_embd.weight", DOWN, Q, "blk.3.ffn_up.weight"]
    places = TensorPlaces(blocks, demo_full, [*names, "blk.0.unheard_of.weight"])
    assert places[DOWN] == Place(1, "model.layers.1.mlp.down_proj.weight")
    assert places[Q] == Place(1, "model.layers.1.self_attn.q_proj.weight")
    assert places["token_embd.weight"] == Place(4, "model.embed_tokens.weight")  # the head has what is in no block
    assert places.in_block(1) == [Q, DOWN]
    assert places.in_block(2) == []
    assert places.last_block() == 4
    assert DOWN in places
    assert "blk.0.unheard_of.weight" not in places
    assert places.absent == ["blk.0.unheard_of.weight"]
    assert places.parameter(DOWN) is blocks.model.model.layers[1].mlp.down_proj.weight
    assert TensorPlaces(blocks, demo_full, []).last_block() == -1


def test_rows_are_those_of_the_file(blocks, demo_full):
    """llama.cpp's converter permutes Q's."""
    places = TensorPlaces(blocks, demo_full, [Q, DOWN])
    for name in (Q, DOWN):
        order = places.row_map(name).order
        assert torch.equal(places.parameter(name)[order], torch.from_numpy(demo_full[name]))
        assert torch.equal(order, torch.arange(len(order))) == (name == DOWN)
    assert places.without_rows == []


def test_a_tensor_whose_rows_are_not_in_its_parameter_is_listed(blocks, demo_full):
    places = TensorPlaces(blocks, demo_full, [Q, DOWN])
    with torch.no_grad():
        places.parameter(DOWN)[3, 0] += 1
    assert [places.row_map(name) is None for name in (Q, DOWN, DOWN)] == [False, True, True]
    assert places.without_rows == [DOWN]


def test_rows_are_looked_up_once(blocks, demo_full):
    """After their values are replaced they could not be found."""
    places = TensorPlaces(blocks, demo_full, [DOWN])
    found = places.row_map(DOWN)
    found.replace(places.parameter(DOWN), 2 * torch.from_numpy(demo_full[DOWN]))
    assert places.row_map(DOWN) is found
