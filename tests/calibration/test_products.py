"""Products of experts' matrices are seen in whatever form a model computes them, each expert with its own inputs."""

import pytest
import torch

from aaac_gguf.calibration.activations import Products

E, T, K, N = 3, 5, 16, 24
FORMS = {
    "bmm": lambda x, w: torch.bmm(x, w.mT),
    "bmm, stored transposed": lambda x, w: torch.bmm(x, w),
    "baddbmm": lambda x, w: torch.baddbmm(torch.zeros(E, T, N), x, w.mT),
    "matmul": lambda x, w: x @ w.mT,
    "Tensor.matmul": lambda x, w: x.matmul(w.mT),
    "weight first": lambda x, w: (w @ x.mT).mT,
    "einsum": lambda x, w: torch.einsum("etk,enk->etn", x, w),
    "einsum, weight first": lambda x, w: torch.einsum("enk,etk->etn", w, x),
    "einsum, stored transposed": lambda x, w: torch.einsum("etk,ekn->etn", x, w),
    "one at a time": lambda x, w: torch.stack([torch.mm(x[e], w[e].T) for e in range(E)]),
    "linear": lambda x, w: torch.stack([torch.nn.functional.linear(x[e], w[e]) for e in range(E)]),
    "grouped_mm": lambda x, w: torch._grouped_mm(
        x.flatten(0, 1).bfloat16(), w.mT, offs=torch.arange(T, E * T + 1, T, dtype=torch.int32)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_expert_gets_its_inputs(form):
    torch.manual_seed(0)
    x = torch.randn(E, T, K)
    weight = torch.nn.Parameter(torch.randn(E, K, N) if "transposed" in form else torch.randn(E, N, K))
    if form == "grouped_mm":
        weight = torch.nn.Parameter(weight.detach().bfloat16())
    seen: dict[int, torch.Tensor] = {}

    def observe(name: str, expert: int, inputs: torch.Tensor) -> None:
        assert name == "experts"
        seen[expert] = inputs

    try:
        with torch.no_grad(), Products({"experts": weight}, observe):
            FORMS[form](x, weight)
    except RuntimeError as e:
        if form != "grouped_mm":
            raise
        pytest.skip(f"this torch has no grouped_mm here: {e}")
    assert sorted(seen) == list(range(E))
    for expert, inputs in seen.items():
        torch.testing.assert_close(inputs.float(), x[expert], atol=0.02 if form == "grouped_mm" else 0, rtol=0.02)


def test_tokens_of_other_experts_are_zeros_and_do_not_count():
    x, weight = torch.randn(2, 3, 4), torch.nn.Parameter(torch.randn(2, 4, 6))
    x[0, 1:] = 0
    x[1] = 0
    seen = []
    with torch.no_grad(), Products({"experts": weight}, lambda name, expert, inputs: seen.append((expert, inputs))):
        torch.bmm(x, weight)
    assert [expert for expert, _ in seen] == [0]
    assert torch.equal(seen[0][1], x[0, :1])


def test_other_products_are_not_seen():
    weight = torch.nn.Parameter(torch.randn(2, 4, 6))
    with torch.no_grad(), Products({"experts": weight}, lambda *_: pytest.fail("seen")):
        torch.bmm(torch.randn(2, 3, 4), torch.randn(2, 4, 6))
        torch.einsum("ab,bc->ac", torch.randn(2, 4), torch.randn(4, 3))
