"""Runs of a block that compute again only what has changed."""

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from aaac_gguf.calibration.replay import Replay


class Counted(TorchFunctionMode):
    """Counts products with weights."""

    n = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.n += func is linear
        return func(*args, **kwargs or {})


def run(replay, is_final, block):
    with Counted() as counted, replay.again(is_final):
        return block(), counted.n


def test_only_what_was_not_kept_is_computed_again():
    x, first, second = torch.randn(3, 4), torch.randn(4, 4), torch.randn(4, 4)
    seen: list[int] = []

    def block():
        y = linear(x, first).relu()
        seen.append(1)
        return linear(y, second)

    replay = Replay()
    expected, n = run(replay, lambda: not seen, block)
    assert n == 2
    second *= 2
    seen.clear()
    out, n = run(replay, lambda: not seen, block)
    assert n == 1
    torch.testing.assert_close(out, 2 * expected)


def test_an_output_that_is_changed_in_place_is_computed_again():
    x, weight = torch.randn(3, 4), torch.randn(4, 4)

    def block():
        y = linear(x, weight)
        y += x
        return linear(y, weight).clone()

    replay = Replay()
    runs = [run(replay, lambda: True, block) for _ in range(3)]
    assert [n for _, n in runs] == [2, 1, 1]
    assert all(torch.equal(out, runs[0][0]) for out, _ in runs)
