"""Types by tensor: defaults, fallbacks, overrides, refusals."""

import pytest
from gguf import GGMLQuantizationType as T

from aaac_gguf.conversion.plan import make_plan, parse_override, parse_type
from aaac_gguf.errors import AaacError
from aaac_gguf.files import gguf as gguf_io


def types(source, default="AAAC4_G16", overrides=()):
    plans = make_plan(gguf_io.read(source), T[default], [parse_override(o) for o in overrides])
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
    names, reasons = types(source, overrides=["attn_=Q8_0", r"attn_q\.=f16"])
    assert names["blk.0.attn_q.weight"] == "F16"
    assert names["blk.0.attn_k.weight"] == "Q8_0"
    assert reasons["blk.0.attn_q.weight"] == r"--tensor-type attn_q\."


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nothing=Q8_0", "matches no tensor"),
        ("attn_q", "expected REGEX=TYPE"),
        ("=Q8_0", "expected REGEX=TYPE"),
        ("attn_q=Q3_K", "unknown type; choose from"),
        ("attn_(=Q8_0", "bad regular expression"),
    ],
)
def test_bad_overrides(source, override, words):
    with pytest.raises(AaacError, match=words):
        types(source, overrides=[override])


def test_unknown_type():
    with pytest.raises(AaacError, match="--type Q9: unknown type; choose from F32, F16"):
        parse_type("Q9", "--type")


def test_a_quantized_source_is_refused(tmp_path, rng):
    from gguf_samples import aaac_file

    aaac_file(tmp_path / "a.gguf", rng)
    with pytest.raises(AaacError, match="tensor aaac4_g16 is AAAC4_G16 already"):
        types(tmp_path / "a.gguf")
