"""Calibration tokens: a text's, the model's own, and random ones."""

import warnings

import pytest
import torch

from aaac_gguf import resources
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.errors import AaacError
from aaac_gguf.models import checkpoint


@pytest.fixture(scope="module")
def model():
    return checkpoint.load_model(resources.MODEL)


def test_text_tokens_are_sequences_with_bos():
    tokens, sha256 = tokens_module.text_tokens(resources.MODEL, resources.SAMPLE_TEXT, 4, 64)
    assert tokens.shape == (4, 64)
    assert (tokens[:, 0] == 1).all()
    assert len(sha256) == 64
    tokenizer = checkpoint.load_tokenizer(resources.MODEL)
    assert tokenizer.decode(tokens[0, 1:]).startswith("It is a truth universally acknowledged")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the text is empty"),
        (b" \n ", "the text is empty"),
        (b"too short", "shorter than one sequence of 64"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (None, "No such file"),
    ],
)
def test_bad_texts_are_refused(tmp_path, content, words):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    with pytest.raises(AaacError, match=words) as e:
        tokens_module.text_tokens(resources.MODEL, text, 4, 64)
    assert str(e.value).startswith(f"`calibration` {text}: ")


def test_self_tokens_depend_on_the_seed_alone(model):
    first, again, other = (tokens_module.self_tokens(model, 4, 12, seed) for seed in (1, 1, 2))
    assert first.shape == (4, 12)
    assert (first[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_self_tokens_run_without_warnings(model, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens_module.self_tokens(model, 1, 5, 0)
    assert caplog.records == []


def test_self_tokens_continue_what_the_model_has_seen(model, monkeypatch):
    """The key-value cache reaches the model: with it or without it, the next token has the same probabilities."""
    seen = []

    def most_likely(probabilities, n, generator):
        seen.append(probabilities)
        return probabilities.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", most_likely)
    tokens = tokens_module.self_tokens(model, 2, 8, 0)
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits
    for t, probabilities in enumerate(seen, 1):
        torch.testing.assert_close(probabilities, logits[:, t].softmax(-1), rtol=1e-3, atol=1e-6)


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
