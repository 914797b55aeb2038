"""In which order tensors are encoded, for what inputs, and what of an interrupted run is taken over."""

import numpy as np
import pytest
import torch

from aaac_gguf.conversion import plan
from aaac_gguf.conversion.encoder import Encoder, Rounding
from aaac_gguf.conversion.plan import T
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.imatrix import Imatrix
from aaac_gguf.models.weights import load_weight
from aaac_gguf.quantizer.moments import Moments
from aaac_gguf.quantizer.quantize import quantize

Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"


class OneBlock:
    """Stands in for `BlockMoments`: one block that multiplies with attn_q, then with ffn_down, and notes what is put where."""

    def __init__(self):
        self.position, self.events, self.seen = 0, [], {}
        for name, k in ((Q, 256), (DOWN, 192)):
            x = torch.randn(1000, k, generator=torch.Generator().manual_seed(k))
            hessian = x.T @ x / 1000
            self.seen[name] = Moments(hessian, None, 0.3 * hessian.roll(1, 0), 10**6)

    def pending(self, name):
        return name in self.seen and self.position == 0

    def tensors(self, number):
        return list(self.seen)

    def layers(self):
        for name, seen in self.seen.items():
            self.events.append(("layer", name, None))
            yield {name: seen}
        self.advance()

    def replace(self, name, weight):
        self.events.append(("replace", name, weight))

    def advance(self):
        self.events.append(("advance", "", None))
        self.position = 1


@pytest.fixture
def file(source):
    return gguf_io.read(source)


def encoder(file, moments, written):
    plans = plan.make_plan(file, T["AAAC4_G16"])
    names = [p.name for p in plans if p.type == T["AAAC4_G16"]]
    assert sorted(names) == [Q, DOWN]
    return Encoder(file, plans, Rounding("aaac", "cpu", 0), Imatrix({}), names, moments, None, written), plans


def test_a_block_is_quantized_in_the_order_of_its_products(file):
    moments = OneBlock()
    encode, plans = encoder(file, moments, lambda name: None)
    made = {p.name: encode(p.info) for p in plans}
    assert [event[:2] for event in moments.events] == [
        ("layer", Q),
        ("replace", Q),
        ("layer", DOWN),
        ("replace", DOWN),
        ("advance", ""),
    ]
    for name, weight in [(name, weight) for kind, name, weight in moments.events if kind == "replace"]:
        seen, full = moments.seen[name], load_weight(file, name, "cpu")
        expected = quantize(seen.target(full), T["AAAC4_G16"], None, seen.inputs)
        data, record = made[name]
        np.testing.assert_array_equal(data, expected.data)
        np.testing.assert_array_equal(weight, gguf_io.dequantize(data, T["AAAC4_G16"], record.codec))
        assert not torch.allclose(seen.target(full), full, atol=0.01)
    assert made["blk.0.attn_norm.weight"][1] is None
    assert encode.ready == {}


@pytest.mark.parametrize("finished", [[Q], [Q, DOWN]])
def test_what_is_written_is_put_in_place_and_not_made_again(file, finished):
    first = OneBlock()
    encode, plans = encoder(file, first, lambda name: None)
    made = {p.name: encode(p.info) for p in plans}
    moments = OneBlock()
    encode, plans = encoder(file, moments, lambda name: made[name] if name in finished else None)
    assert moments.pending(DOWN)
    encode._quantize_block(moments)
    assert [name for kind, name, _ in moments.events if kind == "replace"] == [Q, DOWN]
    assert all(torch.equal(a, b) for (_, _, a), (_, _, b) in zip(
        [e for e in first.events if e[0] == "replace"], [e for e in moments.events if e[0] == "replace"], strict=True))  # fmt: skip
    assert sorted(encode.ready) == sorted({Q, DOWN} - set(finished))
    assert any(kind == "layer" for kind, _, _ in moments.events) == (len(finished) == 1)
    assert moments.events[-1][0] == "advance"
