"""The order in which tensors are encoded, for which inputs, and what of an interrupted run is taken over."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as T

from aaac_gguf.conversion.calibrate import Calibration
from aaac_gguf.conversion.encoder import quantized_tensors
from aaac_gguf.conversion.job import prepare
from aaac_gguf.conversion.plan import Rounding, make_plan
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.imatrix import Imatrix
from aaac_gguf.files.journal import Journal
from aaac_gguf.files.output import Output
from aaac_gguf.models.weights import load_weight
from aaac_gguf.quantizer.moments import Moments
from aaac_gguf.quantizer.quantize import quantize

Q, DOWN, K = "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.attn_k.weight"


class TwoBlocks:
    """Stands in for `BlockMoments`: attn_q, then ffn_down in one block, attn_k in the next; and notes its calls."""

    BLOCKS = ((Q, DOWN), (K,))
    looked_up: str | None = None

    def __init__(self):
        self.position, self.events, self.seen = 0, [], {}
        for name, k in ((Q, 256), (DOWN, 192), (K, 96)):
            x = torch.randn(1000, k, generator=torch.Generator().manual_seed(k))
            hessian = x.T @ x / 1000
            self.seen[name] = Moments(hessian, None, 0.3 * hessian.roll(1, 0), n_tokens=10**6)

    def pending(self, name):
        return name in self.seen and any(name in block for block in self.BLOCKS[self.position :])

    def tensors(self, number):
        return [name for name in self.BLOCKS[number] if name in self.seen]

    def layers(self):
        for name in self.tensors(self.position):
            self.events.append(("layer", name, None))
            yield {name: self.seen[name]}
        self.advance()

    def replace(self, name, weight):
        self.events.append(("replace", name, weight))

    def advance(self):
        self.events.append(("advance", "", None))
        self.position += 1

    @property
    def replaced(self):
        return [(name, weight) for kind, name, weight in self.events if kind == "replace"]


class WithEmbeddings(TwoBlocks):
    """As if attn_k were the embeddings."""

    BLOCKS = ((Q, DOWN), ())
    looked_up = K

    def embedding_moments(self):
        return self.seen[K]


@pytest.fixture
def file(source):
    return gguf_io.read(source)


@pytest.fixture
def run(file, tmp_path):
    """run(moments, finished): encode everything that is not finished, in the order of the encoder."""

    def encode_all(moments, finished=()):
        job = prepare(file.path, file, Settings())
        job = type(job)(**{**vars(job), "plans": make_plan(file, job.settings, "measured")})
        with Journal(tmp_path / "out.gguf") as journal:
            output = Output(job.layout(tmp_path / "out.gguf"), journal, {})
            for name, (data, record) in dict(finished).items():
                output.put(name, data, record)
            return dict(quantized_tensors(job, file, Calibration(Imatrix({}), measured=moments), output))

    return encode_all


def test_a_block_is_quantized_in_the_order_of_its_products(file, run):
    moments = TwoBlocks()
    made = run(moments)
    expected_events = [("layer", Q), ("replace", Q), ("layer", DOWN), ("replace", DOWN), ("advance", "")]
    expected_events += [("layer", K), ("replace", K), ("advance", "")]
    assert [event[:2] for event in moments.events] == expected_events
    for name, weight in moments.replaced:
        seen, full = moments.seen[name], load_weight(file, name, "cpu")
        ggml_type = T.IQ4_NL if name == K else T["AAAC4_G16"]
        expected = quantize(seen.target(full), ggml_type, None, seen.inputs)
        data, record = made[name]
        np.testing.assert_array_equal(data, expected.data)
        np.testing.assert_array_equal(weight, gguf_io.dequantize(data, ggml_type, record.codec))
        assert record.rounding == Rounding.FEEDBACK
        assert not torch.allclose(seen.target(full), full, atol=0.01)
    assert made["blk.0.attn_norm.weight"][1].rounding == Rounding.COPY
    assert set(made) == set(file.tensors)


def test_embeddings_come_first(run):
    first, again = WithEmbeddings(), WithEmbeddings()
    made = run(first)
    assert made[K][1].rounding == Rounding.FEEDBACK
    assert K not in run(again, {K: made[K]})
    for moments in (first, again):
        assert [name for name, _ in moments.replaced] == [K, Q, DOWN]
    assert torch.equal(first.replaced[0][1], again.replaced[0][1])


@pytest.mark.parametrize("finished", [[Q], [Q, DOWN]])
def test_what_is_written_is_put_in_place_and_not_made_again(run, finished):
    first, moments = TwoBlocks(), TwoBlocks()
    made = run(first)
    again = run(moments, {name: made[name] for name in finished})
    assert [name for name, _ in moments.replaced] == [Q, DOWN, K]
    for (_, a), (_, b) in zip(first.replaced, moments.replaced, strict=True):
        assert torch.equal(a, b)
    assert set(again) == set(made) - set(finished)
    asked = [name for kind, name, _ in moments.events if kind == "layer"]
    assert asked == ([Q, DOWN, K] if len(finished) == 1 else [K])


def test_nothing_runs_after_the_last_tensor_that_is_not_finished(run):
    first, moments = TwoBlocks(), TwoBlocks()
    made = run(first)
    run(moments, {name: made[name] for name in (Q, DOWN, K)})
    assert moments.events == []


def test_without_moments_importance_decides(file, run):
    """A matrix that the model never multiplied with is rounded as the type's next best way, and the record says so."""
    moments = TwoBlocks()
    del moments.seen[K]
    del moments.seen[DOWN]
    made = run(moments)
    assert made[DOWN][1].rounding == Rounding.IMPORTANCE
    np.testing.assert_array_equal(made[DOWN][0], quantize(load_weight(file, DOWN, "cpu"), T["AAAC4_G16"]).data)
    assert made["blk.0.attn_k.weight"][1].rounding == Rounding.IMPORTANCE  # IQ4_NL, its fallback type
