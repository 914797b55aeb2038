"""Results as text."""

from comparison_samples import comparison, score

from aaac_gguf.reporting import tables
from aaac_gguf.reporting.results import TensorError, Verification


def test_a_comparison_has_all_its_figures_by_text():
    text = tables.comparison_text(comparison())
    for cell in (
        "4,500,000",
        "12.0 s",
        "100.0 ± 1.0",
        "50.0 ± 0.5",
        "36.000 ± 0.400",
        "0.00400 ± 0.00040",
        "0.0400",
        "0.0800",
        "1.50 %",
        "96.00 %",
    ):
        assert cell in text, cell
    assert text.index("a.txt") < text.index("0.00400") < text.index("b.txt") < text.index("0.00800")


def test_other_types_of_the_cache_have_columns():
    result = comparison()
    assert not any("cache" in cell for cell in tables.scores_table(result, "a.txt")[0])
    result.cache_scores["a.txt"] = {"Q8_0": score(0.0001), "Q4_0": score(0.5)}
    result.rows[1].cache_scores["a.txt"] = {"Q8_0": score(0.25), "Q4_0": score(0.75)}
    header, rows = tables.scores_table(result, "a.txt")
    assert header[-2:] == ("Q8_0 cache", "Q4_0 cache")
    assert [row[-2:] for row in rows] == [
        ("0.00010 ± 0.00001", "0.50000 ± 0.05000"),
        ("", ""),
        ("0.25000 ± 0.02500", "0.75000 ± 0.07500"),
        ("", ""),
    ]
    assert "Q4_0 cache" not in tables.scores_table(result, "b.txt")[0]


def test_columns_are_aligned():
    text = tables.table(("name", "n"), [("a", "1"), ("longer", "1,000")])
    assert text.splitlines() == ["name        n", "------  -----", "a           1", "longer  1,000"]


def test_a_verification_says_what_it_checked_and_what_failed():
    result = Verification()
    assert tables.verification_text(result) == "verified"
    result.tensors += [TensorError("a", "AAAC4_G16", 0.005, None), TensorError("b", "Q8_0", 0.00001, 0.00002)]
    result.reference, result.n_tokens, result.mean_kld, result.same_top = "the reference", 50, 0.25, 0.5
    text = tables.verification_text(result)
    assert "0.005000\n" in text
    assert "0.000010        0.000020" in text
    assert (
        "patched llama.cpp against the reference, 50 tokens: mean KL divergence 0.250000, same top token 50.00 %"
        in text
    )
    assert text.endswith("\n\nverified")
    result.failures += ["tensor a is wrong", "tensor b too"]
    assert tables.verification_text(result).endswith("\n\nFAILED: tensor a is wrong\nFAILED: tensor b too")
