"""Types by tensor: defaults, fallbacks, overrides, refusals."""

import pytest

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
        "blk.0.attn_k.weight": "Q8_0",
    }
    assert reasons["blk.0.attn_k.weight"] == "fallback: rows of 96 are not whole AAAC4_G16 blocks of 64"


def test_g128_falls_back_to_g32_where_64_divides(source):
    names, _ = types(source, "AAAC4_G128")
    assert names["blk.0.attn_q.weight"] == "AAAC4_G128"
    assert names["blk.0.ffn_down.weight"] == "AAAC4_G32"
    assert names["blk.0.attn_k.weight"] == "Q8_0"


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
        (("nothing", "Q8_0"), "`tensor_types` nothing=Q8_0: matches no tensor"),
        (("attn_q", "Q3_K"), "`tensor_types` Q3_K: unknown type; choose from"),
        (("attn_(", "Q8_0"), r"`tensor_types` attn_\(: bad regular expression"),
    ],
)
def test_bad_overrides(source, override, words):
    with pytest.raises(AaacError, match=words):
        types(source, overrides=[override])


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
    """Of a matrix by its type, and of the tensors that never change by what they are."""
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
