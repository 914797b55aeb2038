"""Keep what a block multiplies its parameters with, once for equal inputs, and sum its second moments."""

import gc
import weakref

import pytest
import torch

from aaac_gguf.calibration import recorder as recorder_module
from aaac_gguf.calibration.recorder import InputRecorder, InputSums, add_product
from aaac_gguf.models.blocks import StopForward


class Attention(torch.nn.Module):
    """Q and K on the same inputs, O on others, experts on some tokens."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = torch.nn.Linear(4, 6), torch.nn.Linear(4, 3), torch.nn.Linear(6, 4)
        self.experts = torch.nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x):
        out = self.o(self.q(x) + self.k(x).sum(-1, keepdim=True))
        return torch.nn.functional.linear(out[:2], self.experts[1]), torch.nn.functional.linear(
            out[2:], self.experts[2]
        )


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Attention()


def run(model, x, **options) -> InputRecorder:
    parameters = dict(model.named_parameters())
    recorder = InputRecorder(parameters, **{"wanted": parameters, **options})
    with recorder:
        model(x)
    return recorder


def test_equal_inputs_are_kept_once(model):
    x = torch.randn(5, 4)
    recorder = run(model, x)
    assert recorder.same_input_as == {
        "q.weight": "q.weight",
        "k.weight": "q.weight",
        "o.weight": "o.weight",
        "experts": "experts",
    }
    assert list(recorder.inputs) == [("q.weight", 0), ("o.weight", 0), ("experts", 1), ("experts", 2)]
    assert torch.equal(recorder.inputs["q.weight", 0], x)
    out = model.o(recorder.inputs["o.weight", 0])
    torch.testing.assert_close(recorder.inputs["experts", 1], out[:2])
    torch.testing.assert_close(recorder.inputs["experts", 2], out[2:])


def test_only_what_is_wanted_is_recorded(model):
    recorder = run(model, torch.randn(5, 4), wanted=["k.weight"])
    assert list(recorder.inputs) == [("k.weight", 0)]
    assert recorder.same_input_as == {"k.weight": "k.weight"}


def test_what_was_recorded_is_freed_at_once(model):
    """It is hundreds of megabytes for every decoder block, and the garbage collector may wait for many of them."""
    recorder = run(model, torch.randn(5, 4, requires_grad=True))
    inputs = weakref.ref(recorder.inputs["o.weight", 0])
    gc.disable()
    try:
        del recorder
        assert inputs() is None
    finally:
        gc.enable()


def test_two_products_with_one_parameter_are_joined(model):
    parameters = dict(model.named_parameters())
    recorder = InputRecorder(parameters, parameters)
    a, b = torch.randn(5, 4), torch.randn(2, 4)
    with recorder:
        model.q(a)
        model.q(b)
    assert torch.equal(recorder.inputs["q.weight", 0], torch.cat([a, b]))


def test_the_forward_pass_stops_at_the_last_parameter(model):
    x = torch.randn(5, 4)
    with pytest.raises(StopForward) as stopped:
        run(model, x, last="q.weight")
    assert torch.equal(stopped.value.hidden, x)


class Residual(torch.nn.Module):
    """Add to the inputs what Q gives, and what K gives only after its norm."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = (torch.nn.Linear(4, 4) for _ in range(3))
        self.norm = torch.nn.LayerNorm(4)

    def forward(self, x):
        x = x + self.q(x)
        x = x + self.norm(self.k(x))
        return self.o(x)


def test_sums_with_the_residual_stream_are_kept():
    model, x = Residual(), torch.randn(2, 5, 4)
    recorder = run(model, x)
    assert list(recorder.sums) == ["q.weight"]
    assert torch.equal(recorder.sums["q.weight"], (x + model.q(x)).reshape(-1, 4))
    with pytest.raises(StopForward) as stopped:
        run(model, x, last_sum="q.weight")
    assert torch.equal(stopped.value.hidden, x + model.q(x))
    assert list(run(model, x, wanted=["k.weight"]).sums) == []


def test_output_gradients_are_summed(model, monkeypatch):
    parameters = dict(model.named_parameters())
    recorder = InputRecorder(parameters, parameters)
    gradients = []
    model.k.register_forward_hook(lambda _, args, out: out.register_hook(gradients.append) and None)
    for _ in range(2):
        recorder.inputs = {}
        with recorder:
            out = model(torch.randn(5, 4))
        (out[0].square().sum() + out[1].square().sum()).backward()
    torch.testing.assert_close(recorder.outputs["k.weight"], sum(g.T @ g for g in gradients))
    assert set(recorder.outputs) == {"q.weight", "k.weight", "o.weight"}  # not of experts

    monkeypatch.setattr(recorder_module, "MAX_OUTPUTS", 5)
    recorder = InputRecorder(parameters, parameters)
    with recorder:
        out = model(torch.randn(5, 4))
    out[0].sum().backward()
    assert set(recorder.outputs) == {"k.weight", "o.weight"}


def test_sums_become_means():
    x, y = torch.randn(10, 4), torch.randn(20, 4)
    full = torch.randn(10, 4)
    sums = InputSums(torch.empty(3, 4))
    outputs = torch.randn(10, 3)
    sums.add(0, x)
    sums.add(0, y)
    sums.add_drift("inputs", full - x, x)
    sums.add_drift("outputs", outputs, x)
    moments = sums.moments(n_tokens=30)
    torch.testing.assert_close(moments.inputs, (x.T @ x + y.T @ y) / 30)
    torch.testing.assert_close(moments.drift, (full - x).T @ x / 30)
    torch.testing.assert_close(moments.output_drift, outputs.T @ x / 30)
    assert (moments.outputs, moments.n_tokens, sums.counts) == (None, 30, [30])


def test_without_the_full_models_inputs_there_is_no_drift():
    sums = InputSums(torch.empty(3, 4))
    sums.add(0, torch.randn(10, 4))
    moments = sums.moments(10)
    assert moments.drift is None
    assert moments.output_drift is None


def test_experts_have_sums_of_their_own():
    x = torch.randn(10, 4)
    sums = InputSums(torch.empty(3, 5, 4))
    sums.add(1, x)
    moments = sums.moments(10)
    torch.testing.assert_close(moments.inputs[1], x.T @ x / 10)
    assert moments.inputs.shape == (3, 4, 4)
    assert not moments.inputs[[0, 2]].any()
    assert sums.counts == [0, 10, 0]


@pytest.mark.parametrize("n_channels", [1, 7, 8, 100])
def test_squares_are_summed_by_their_lower_triangle(n_channels):
    x = torch.randn(30, n_channels)
    sums: dict[str, torch.Tensor] = {}
    add_product(sums, "x", x, x)
    add_product(sums, "y", x, x.clone())
    torch.testing.assert_close(sums["x"], sums["y"])
    assert torch.equal(sums["x"], sums["x"].T)


def test_sums_of_low_precision_products_are_float32():
    sums: dict[str, torch.Tensor] = {}
    for _ in range(300):
        add_product(sums, "x", torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(1, 3, dtype=torch.bfloat16))
    assert sums["x"].dtype == torch.float32
    assert sums["x"].tolist() == [[300.0] * 3] * 2  # bfloat16 would stop at 256
