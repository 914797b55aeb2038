"""Reading llama-perplexity's summary and its logits files."""

import numpy as np
import pytest

from aaac_gguf.errors import AaacError
from aaac_gguf.llama import evaluate

OUTPUT = """
chunk             PPL               ln(PPL(Q)/PPL(base))          KL Divergence              Δp RMS\
            Same top p
   1      36.1203 ±   7.9861       0.00384 ±    0.00741       0.00951 ±    0.00077     1.734 ±  0.163 %\
    94.488 ±  2.033 %
====== Perplexity statistics ======
Mean PPL(Q)                   :  36.571892 ±   2.717042
Mean PPL(base)                :  36.195918 ±   2.696105
Mean PPL(Q)/PPL(base)         :   1.010387 ±   0.003965
Mean    KLD:   0.010120 ±   0.000281
Maximum KLD:   0.094526
99.9%   KLD:   0.086101
99.0%   KLD:   0.047100
Minimum KLD:  -0.000004
RMS Δp    :  1.617 ± 0.065 %
Same top p: 94.094 ± 0.662 %
"""


def test_summary():
    expected = evaluate.Score(36.571892, 2.717042, 0.01012, 0.000281, 0.086101, 0.094526, 1.617, 94.094)
    assert evaluate.parse_summary(OUTPUT, "log") == expected


def test_a_summary_that_was_cut_short_is_refused():
    with pytest.raises(AaacError, match=r"printed no same top \(see log\)"):
        evaluate.parse_summary(OUTPUT[: OUTPUT.index("Same top p: ")], "log")


def write_logits(path, log_probabilities, tokens):
    """Write a logits file in llama-perplexity's layout: 16-bit steps above each row's floor."""
    n_chunks, positions, n_vocab = log_probabilities.shape
    floor = log_probabilities.min(-1, keepdims=True)
    scale = (log_probabilities.max(-1, keepdims=True) - floor) / 65535
    steps = np.round((log_probabilities - floor) / scale).astype("<u2")
    head = np.concatenate([scale, floor], axis=-1).astype("<f4").view("<u2")
    rows = np.concatenate([head, steps, np.zeros((n_chunks, positions, n_vocab % 2), "<u2")], axis=-1)
    sizes = np.array([tokens.shape[1], n_vocab, n_chunks], dtype="<i4")
    path.write_bytes(b"_logits_" + sizes.tobytes() + tokens.astype("<i4").tobytes() + rows.tobytes())


@pytest.mark.parametrize("n_vocab", [50, 51])
def test_logits_file(tmp_path, rng, n_vocab):
    logits = rng.normal(size=(2, 3, n_vocab)).astype(np.float32)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    tokens = rng.integers(0, n_vocab, (2, 8))
    write_logits(tmp_path / "logits", log_probabilities, tokens)
    held = evaluate.read_logits(tmp_path / "logits")
    np.testing.assert_array_equal(held.tokens, tokens)
    assert held.first == 4
    for chunk in range(2):
        np.testing.assert_allclose(held.log_probabilities(chunk), log_probabilities[chunk], atol=1e-4)
    (tmp_path / "cut").write_bytes((tmp_path / "logits").read_bytes()[:-2])
    with pytest.raises(AaacError, match="cut short"):
        evaluate.read_logits(tmp_path / "cut")


def test_kl_divergence_by_hand():
    base, other = (np.log(np.array([row], dtype=np.float32)) for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]))
    kld, same = evaluate.kl_divergence(base, other)
    assert kld == pytest.approx([0.5 * np.log(2) - 0.25 * np.log(2)], abs=1e-6)
    assert not same[0]
    assert evaluate.kl_divergence(base, base)[0] == pytest.approx([0])
