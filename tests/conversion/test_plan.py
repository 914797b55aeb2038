"""Types by tensor: defaults, fallbacks, overrides, refusals."""

import numpy as np
import pytest
from conftest import write_source

from aaac_gguf.conversion.plan import Rounding, make_plan
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.errors import AaacError
from aaac_gguf.files import gguf as gguf_io


def types(source, default="AAAC4_G16", overrides=()):
    plans = make_plan(gguf_io.read(source), Settings(type=default, tensor_types=overrides), "none")
    return {p.name: p.type.name for p in plans}, {p.name: p.reason for p in plans}


def test_defaults_and_fallback(source):
    names, reasons = types(source)
    assert names == {
        "token_embd.weight": "Q6_K",
        "blk.0.attn_norm.weight": "F32",
        "blk.0.attn_q.weight": "AAAC4_G16",
        "blk.0.ffn_down.weight": "AAAC4_G16",
        "blk.0.attn_k.weight": "IQ4_NL",
    }
    assert reasons["blk.0.attn_k.weight"] == "fallback: rows of 96 are not whole AAAC4_G16 blocks of 64"


def test_g128_falls_back_to_g32_where_64_divides(source):
    names, _ = types(source, "AAAC4_G128")
    assert names["blk.0.attn_q.weight"] == "AAAC4_G128"
    assert names["blk.0.ffn_down.weight"] == "AAAC4_G32"
    assert names["blk.0.attn_k.weight"] == "IQ4_NL"


@pytest.mark.parametrize(
    ("dtype", "n_per_row", "expected"),
    [
        ("F32", 96, "IQ4_NL"), ("BF16", 96, "IQ4_NL"),
        ("F32", 208, "BF16"), ("BF16", 208, "BF16"), ("F16", 208, "F16"),
    ],
)  # fmt: skip
def test_the_last_fallback_holds_what_the_source_holds(tmp_path, dtype, n_per_row, expected):
    """Rows of whole blocks of 32 stay at 4.5 bits. Others get 16 bits that reach as far as the source's."""
    weight = np.full((8, n_per_row), 1.0, np.float16 if dtype == "F16" else np.float32)
    source = write_source(tmp_path / "source.gguf", {"blk.0.attn_q.weight": weight}, bfloat16=dtype == "BF16")
    for name in ("AAAC4_G16", "AAAC4_G128", "Q4_0"):
        names, reasons = types(source, name)
        wanted = name if name == "Q4_0" and n_per_row == 96 else expected
        assert names == {"blk.0.attn_q.weight": wanted}
        assert reasons["blk.0.attn_q.weight"].startswith("fallback: ") == (wanted != name)


def test_full_precision_types_take_embeddings_along(source):
    assert set(types(source, "F16")[0].values()) == {"F16", "F32"}
    assert set(types(source, "F32")[0].values()) == {"F32"}


def test_the_last_match_wins(source):
    names, reasons = types(source, overrides=[("attn_", "Q8_0"), (r"attn_q\.", "f16")])
    assert names["blk.0.attn_q.weight"] == "F16"
    assert names["blk.0.attn_k.weight"] == "Q8_0"
    assert reasons["blk.0.attn_q.weight"] == r"asked for: attn_q\."


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (("nothing", "Q8_0"), "`tensor_types` nothing=Q8_0: matches no matrix"),
        (("norm", "Q8_0"), "`tensor_types` norm=Q8_0: matches no matrix"),
        (("attn_q", "Q3_X"), "`tensor_types` Q3_X: unknown type; choose from"),
        (("attn_(", "Q8_0"), r"`tensor_types` attn_\(: bad regular expression"),
    ],
)
def test_bad_overrides(source, override, words):
    with pytest.raises(AaacError, match=words):
        types(source, overrides=[override])


@pytest.mark.parametrize("pattern", [r"blk\.0\.", "attn", "."])
def test_an_override_reaches_matrices_only(source, pattern):
    """The natural patterns match norms as well, which llama.cpp runs in float32 only."""
    names, _ = types(source, overrides=[(pattern, "AAAC4_G32")])
    assert names["blk.0.attn_norm.weight"] == "F32"
    assert names["blk.0.attn_q.weight"] == "AAAC4_G32"


@pytest.mark.parametrize("text", ["attn_q", "=Q8_0"])
def test_an_override_has_two_parts(source, tmp_path, refused, text):
    line = refused("convert", source, "-o", tmp_path / "out.gguf", "--tensor-type", text)
    assert f"--tensor-type {text}: expected REGEX=TYPE" in line


def test_unknown_type():
    with pytest.raises(AaacError, match="`type` Q9: unknown type; choose from F32, F16"):
        Settings(type="Q9")


@pytest.mark.parametrize(
    ("ggml_type", "moments", "expected"),
    [
        ("AAAC4_G16", "measured", "feedback"),
        ("AAAC4_G16", "synthetic", "feedback"),
        ("AAAC4_G16", "none", "importance"),
        ("IQ4_NL", "none", "importance"),
        ("Q4_0", "synthetic", "feedback"),
        ("Q4_0", "none", "nearest"),
        ("Q5_K", "none", "nearest"),
        ("Q8_0", "measured", "feedback"),
        ("Q8_0", "synthetic", "nearest"),
        ("F16", "measured", "nearest"),
        ("F32", "measured", "copy"),
    ],
)
def test_rounding(source, ggml_type, moments, expected):
    """Round a matrix as its type asks, and the tensors that never change as what they are."""
    plans = {p.name: p for p in make_plan(gguf_io.read(source), Settings(type=ggml_type), moments)}
    assert plans["blk.0.attn_q.weight"].rounding == expected
    assert plans["blk.0.attn_norm.weight"].rounding == Rounding.COPY


def test_embeddings_are_searched_below_5_bits_only(source):
    for name, moments, expected in (
        ("Q6_K", "measured", "nearest"), ("Q8_0", "measured", "nearest"), ("AAAC4_G16", "measured", "feedback"),
        ("AAAC4_G16", "synthetic", "importance"), ("AAAC4_G16", "none", "importance"),
    ):  # fmt: skip
        plan = make_plan(gguf_io.read(source), Settings(embedding_type=name), moments)
        assert {p.rounding for p in plan if p.name == "token_embd.weight"} == {expected}, (name, moments)


def test_a_quantized_source_is_refused(tmp_path, rng):
    from gguf_samples import aaac_file

    aaac_file(tmp_path / "a.gguf", rng)
    with pytest.raises(AaacError, match="tensor aaac4_g16 is AAAC4_G16 already"):
        types(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("settings", "embeddings", "matrices"),
    [
        ({"type": "Q5_K"}, "Q6_K", "Q5_K"),  # a type is that type for all matrices
        ({"type": "Q5_K_S", "embedding_type": "Q8_0"}, "Q8_0", "Q5_K"),
        ({"type": "q2_k"}, "Q6_K", "Q2_K"),  # a mixture: the embeddings are the output matrix
        ({"type": "F16", "embedding_type": "Q6_K"}, "Q6_K", "F16"),
    ],
)
def test_embeddings_are_as_the_type_says_or_as_asked_for(source, settings, embeddings, matrices):
    types = {p.name: p.type.name for p in make_plan(gguf_io.read(source), Settings(**settings), "none")}
    assert types["token_embd.weight"] == embeddings
    assert types["blk.0.attn_q.weight"] == matrices
