"""Calibration tokens: a text's, the model's own, and random ones."""

import json
import re
import warnings

import pytest
import torch
import transformers
from random_checkpoints import COMMON, SIZES, save_random

from aaac_gguf import resources
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.conversion.job import prepare
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError, AaacWarning
from aaac_gguf.files.gguf import TensorInfo, field_values
from aaac_gguf.files.output import write
from aaac_gguf.models import checkpoint
from aaac_gguf.models.source import full_precision


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


def test_sequences_come_from_all_over_a_text(tmp_path):
    text = tmp_path / "numbers.txt"
    text.write_text(" ".join(map(str, range(10_000))))
    tokenizer = checkpoint.load_tokenizer(resources.MODEL)
    tokens, _ = tokens_module.text_tokens(resources.MODEL, text, 4, 64)
    firsts = [int(tokenizer.decode(row[1:]).split()[1]) for row in tokens]
    assert firsts == pytest.approx([0, 2700, 5200, 7600], abs=200)
    # All of a text that has no more tokens than that, in a row.
    text.write_text(" ".join(map(str, range(60))))
    tokens, _ = tokens_module.text_tokens(resources.MODEL, text, 4, 64)
    ids = tokenizer(text.read_text())["input_ids"]
    assert tokens[:, 1:].tolist() == [ids[64 * i + 1 : 64 * i + 64] for i in range(len(ids) // 64)]


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


DIALOGUE = {"messages": [{"role": "user", "content": "Who is she?"}, {"role": "assistant", "content": "Elizabeth."}]}
TEMPLATE = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
TEMPLATE += "[{{ m.role }}] {{ m.content }}{% endfor %}"


def json_lines(path, *pieces):
    path.write_text("\n".join(json.dumps(piece) for piece in pieces) + "\n")
    return path


def with_template(folder, template):
    """The bundled model's tokenizer with a chat template."""
    tokenizer = checkpoint.load_tokenizer(resources.MODEL)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def test_dialogues_go_through_the_chat_template(tmp_path):
    text = json_lines(tmp_path / "mixed.jsonl", {"text": "It is a truth."}, DIALOGUE, {"text": "The end"})
    tokenizer = checkpoint.load_tokenizer(resources.MODEL)
    for source, said in (
        (with_template(tmp_path / "chat", TEMPLATE), "[user] Who is she?[assistant] Elizabeth."),
        (resources.MODEL, "Who is she?\n\nElizabeth."),
    ):
        tokens, _ = tokens_module.text_tokens(source, text, 1, 24)
        assert tokens[0, 0] == tokenizer.bos_token_id
        assert (tokens == tokenizer.bos_token_id).sum() == 1
        assert tokenizer.decode(tokens[0, 1:]).startswith(f"It is a truth.\n\n{said}"[:36])


def test_all_pieces_begin_before_the_first_goes_on(tmp_path):
    words = ["truth", "wife", "family"]
    text = json_lines(tmp_path / "long.jsonl", *({"text": f" {word}" * 300} for word in words))
    tokenizer = checkpoint.load_tokenizer(resources.MODEL)
    each = tokens_module.PIECE_TOKENS
    tokens, _ = tokens_module.text_tokens(resources.MODEL, text, 5, each)
    found = tokenizer.decode(tokens.flatten(), skip_special_tokens=True).split()
    changes = [word for word, before in zip(found, [None, *found], strict=False) if word in words and word != before]
    assert changes == [*words, *words[:2]]


def test_a_dialogue_that_the_template_refuses_is_text(tmp_path):
    refused = {"messages": [{"role": "system", "content": "Be brief."}, *DIALOGUE["messages"]]}
    text = json_lines(tmp_path / "mixed.jsonl", *[refused] * 4)
    with pytest.warns(AaacWarning, match=r"mixed.jsonl: the model's chat template refuses dialogues \(no system\)"):
        tokens, _ = tokens_module.text_tokens(with_template(tmp_path / "chat", TEMPLATE), text, 1, 24)
    assert "Be brief.\n\nWho is she?" in checkpoint.load_tokenizer(resources.MODEL).decode(tokens[0])


@pytest.mark.parametrize("line", ['{"texts": "a"}', '["text"]', "[1]", "no JSON", '{"messages": ["a"]}', "3"])
def test_lines_that_are_no_pieces_are_named(tmp_path, line):
    text = tmp_path / "bad.jsonl"
    text.write_text('{"text": "a"}\n\n' + line)
    with pytest.raises(AaacError, match=r"bad.jsonl: line 3 is no JSON object"):
        tokens_module.text_tokens(resources.MODEL, text, 4, 64)


def test_a_text_that_says_bos_makes_no_sequence_start_with_it(tmp_path):
    """The tokenizer decides, not the text: some chat models' BOS is what starts each of their messages."""
    tokenizer = checkpoint.load_tokenizer(resources.MODEL)
    tokenizer.add_bos_token = False
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(tokenizer.bos_token + "It is a truth universally acknowledged. " * 20)
    tokens, _ = tokens_module.text_tokens(tmp_path / "model", text, 2, 64)
    assert (tokens == tokenizer.bos_token_id).sum() == 1


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
    both = tokens_module.with_random(tokens, 4096, seed=1)
    assert torch.equal(both[:8], tokens)
    assert both.shape == (10, tokens.shape[1])
    assert torch.equal(both[8:, 0], tokens[:2, 0])
    assert (both[8:, 1:] != tokens[:2, 1:]).float().mean() > 0.9
    assert int(both.min()) >= 0
    assert int(both.max()) < 4096


def test_sequences_are_as_long_as_the_model_allows(tmp_path, llama_source):
    """Also those of a model with rotary embeddings, which would run on."""
    config = transformers.LlamaConfig(**COMMON | {"max_position_embeddings": 96}, **SIZES)
    folder = save_random(config, tmp_path / "model")
    text = str(resources.SAMPLE_TEXT)
    with full_precision(folder, tmp_path / "scratch", header_only=True) as header:
        for calibration in ("self", text):
            with pytest.warns(AaacWarning, match=r"`sequence_length` 512: the model has 96 positions; 96 are taken"):
                job = prepare(folder, header, Settings(calibration=calibration, sequences=2))
            assert job.settings.sequence_length == 96
            assert job.calibration.n_tokens == 2 * 96
        assert job.calibration.tokens.shape == (2, 96)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prepare(folder, header, Settings(calibration=text, sequences=2, sequence_length=96))
            prepare(folder, header, Settings(calibration="none"))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_token_ids_without_embeddings_are_refused(tmp_path, llama_source, refused, capsys, kind):
    """Refuse those of a tokenizer with more ids than the model has rows."""
    if kind == "folder":
        few = save_random(transformers.LlamaConfig(**COMMON | {"vocab_size": 500}, **SIZES), tmp_path / "model")
    else:
        few = gguf_with_few_embeddings(tmp_path / "few.gguf", 500)
    capsys.readouterr()
    message = refused("convert", few, "-o", tmp_path / "out.gguf", "--calib", resources.SAMPLE_TEXT)
    assert re.search(r"the tokenizer makes token \d+, and the model has 500 embeddings", message)
    assert not (tmp_path / "out.gguf").exists()


def gguf_with_few_embeddings(path, n_rows):
    """The bundled model with only the first rows of its embeddings."""
    with full_precision(resources.MODEL, path.parent) as full:
        shapes = full.shapes
        infos, data = [], []
        for name, tensor in full.tensors.items():
            rows = n_rows if name in ("token_embd.weight", "output.weight") else shapes[name][0]
            infos.append(TensorInfo(name, (rows, *shapes[name][1:]), tensor.tensor_type))
            data.append(tensor.data[:rows])
        write(path, field_values(full.fields), infos, data)
    return path


def test_sampling_starts_with_a_token_that_the_model_has(model, monkeypatch):
    monkeypatch.setattr(model.config, "bos_token_id", 10**6)
    assert (tokens_module.self_tokens(model, 1, 3, 0)[:, 0] == 0).all()
