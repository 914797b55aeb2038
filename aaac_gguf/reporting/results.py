"""The results of `compare` and of `verify`: what tables and pages show."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..llama.evaluate import Score

Speed = tuple[float, float]  # tokens per second: median, standard deviation


@dataclass
class Row:
    """One file of a comparison. Scores are by the name of the text; errors and codebooks are by tensor.

    cache_scores  with other types of the KV cache than F16: by text, then by the cache's type
    """

    name: str
    n_bytes: int
    bits_per_weight: float  # over all tensors
    seconds: float | None = None  # to quantize, with calibration; None for a finished file
    prompt_speed: Speed | None = None
    generation_speed: Speed | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    tensor_errors: dict[str, float] = field(default_factory=dict)  # relative squared errors
    codebooks: dict[str, list[list[int]]] = field(default_factory=dict)  # two of 16 levels each
    cache_scores: dict[str, dict[str, Score]] = field(default_factory=dict)


@dataclass
class Comparison:
    """The settings and the results of `compare`: the content of comparison.json."""

    model: str
    full_type: str
    full_bytes: int
    texts: dict[str, str]  # sha256 by the name of the text
    settings: dict[str, object]
    perplexities: dict[str, tuple[float, float]] = field(default_factory=dict)  # of the full model, with the error
    rows: list[Row] = field(default_factory=list)
    cache_scores: dict[str, dict[str, Score]] = field(default_factory=dict)  # of the full model, as in `Row`


@dataclass(frozen=True)
class TensorError:
    """The relative squared error of one tensor, plain and weighted by importance (None if there is no importance)."""

    name: str
    type: str
    relative: float
    weighted: float | None


@dataclass
class Verification:
    """The result of `verify`. The file has passed if `failures` is empty."""

    tensors: list[TensorError] = field(default_factory=list)
    reference: str = ""  # what computed the logits that llama.cpp's are compared with
    n_tokens: int = 0
    mean_kld: float = 0.0  # nats per token
    same_top: float = 1.0  # share of the tokens
    n_texts: int = 0  # of which embeddings were compared, for a model that makes them
    cosine: float = 1.0  # the least, with the reference
    full_cosine: float = 1.0  # the mean, with the full model
    failures: list[str] = field(default_factory=list)
