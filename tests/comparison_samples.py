"""Samples of results: a comparison of three types on two texts."""

from aaac_gguf.llama.evaluate import Score
from aaac_gguf.reporting.results import Comparison, Row


def score(kld):
    return Score(37.0, 0.5, kld, kld / 10, 10 * kld, 20 * kld, 1.5, 96.0)


def row(name, n_bytes, kld, layers=3):
    errors = {f"blk.{i}.attn_q.weight": kld * (i + 1) for i in range(layers)} | {"token_embd.weight": 1e-4}
    books = {"blk.0.attn_q.weight": [list(range(-8, 8)), list(range(-7, 9))]} if name.startswith("AAAC") else {}
    return Row(
        name,
        n_bytes,
        4.5,
        12.0,
        (100.0, 1.0),
        (50.0, 0.5),
        {"a.txt": score(kld), "b.txt": score(2 * kld)},
        errors,
        books,
    )


def comparison():
    rows = [row("AAAC4_G16", 4_500_000, 0.004), row("Q4_0", 4_500_000, 0.017), row("<Q5>", 5_500_000, 0.0041)]
    texts = {"a.txt": "1" * 64, "b.txt": "2" * 64}
    return Comparison(
        "m & m",
        "BF16",
        9_000_000,
        texts,
        {"n_ctx": 256, "n_chunks": 8},
        {"a.txt": (36.0, 0.4), "b.txt": (40.0, 0.4)},
        rows,
    )
