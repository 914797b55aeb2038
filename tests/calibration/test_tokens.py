"""Calibration tokens: random ones beside the text."""

import torch

from aaac_gguf.calibration import tokens as tokens_module


def random_tokens(vocab_size: int, n: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(0, vocab_size, (n, length), generator=torch.Generator().manual_seed(0))


def test_random_tokens_come_beside_the_text():
    tokens = random_tokens(4096, 8)
    both, weights = tokens_module.with_random(tokens, 4096, seed=1)
    assert torch.equal(both[:8], tokens)
    assert both.shape == (10, tokens.shape[1])
    assert torch.equal(both[8:, 0], tokens[:2, 0])
    assert (both[8:, 1:] != tokens[:2, 1:]).float().mean() > 0.9
    assert int(both.min()) >= 0
    assert int(both.max()) < 4096
    assert weights.tolist() == [1] * 8 + [4] * 2
