"""The choice of types under a budget, against all combinations."""

import itertools

import pytest
from gguf import GGMLQuantizationType as T
from hypothesis import given
from hypothesis import strategies as st

from aaac_gguf.mixed import CANDIDATES, Choice, choose

OPTIONS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1000)), min_size=1, max_size=len(CANDIDATES), unique_by=lambda o: o[0])


def tensors(sizes) -> dict[str, list[Choice]]:
    return {f"t{i}": [Choice(t, n, loss / 7) for t, (n, loss) in zip(CANDIDATES, options, strict=False)] for i, options in enumerate(sizes)}


def total(chosen) -> tuple[int, float]:
    return sum(c.n_bytes for c in chosen), sum(c.loss for c in chosen)


@given(st.lists(OPTIONS, min_size=1, max_size=4), st.integers(1, 200))
def test_close_to_the_best_of_all_combinations(sizes, budget):
    choices = tensors(sizes)
    within = [total(c) for c in itertools.product(*choices.values()) if total(c)[0] <= budget]
    chosen = choose(choices, budget)
    if not within:
        assert chosen is None
        return
    assert chosen is not None
    n_bytes, loss = total(chosen.values())
    assert n_bytes <= budget
    # No worse than the best for what the largest step may leave unused.
    largest = max(o.n_bytes for options in choices.values() for o in options)
    assert loss <= min([b for n, b in within if n <= budget - largest], default=float("inf"))


def test_all_that_fits_is_used():
    choices = tensors([[(10, 70), (20, 35), (30, 7)]] * 3)
    for budget, expected in ((30, 30), (59, 50), (60, 60), (1000, 90)):
        chosen = choose(choices, budget)
        assert chosen
        assert total(chosen.values())[0] == expected
    assert choose(choices, 29) is None


@pytest.mark.parametrize("losses", [(9, 1), (1, 9)])
def test_the_tensor_that_hurts_most_gets_the_bits(losses):
    choices = {name: [Choice(T.Q5_K, 10, loss), Choice(T.Q6_K, 12, loss / 10)] for name, loss in zip("ab", losses, strict=True)}
    chosen = choose(choices, 22)
    assert chosen
    assert chosen["ab"[losses.index(9)]].type == T.Q6_K
    assert chosen["ab"[losses.index(1)]].type == T.Q5_K
