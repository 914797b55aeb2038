"""Say which type each matrix has for one name such as Q4_K_M: llama-quantize's mixtures of types, as data.

The rules are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp. A test compares them with what
llama-quantize plans for models of many shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as T

from ..errors import AaacError
from ..files.gguf import GgufFile, block_number
from ..quantizer.types import TENSOR_TYPES

PLAIN_TYPES = (T.F32, T.F16, T.BF16)
EMBEDDINGS = ("token_embd.weight", "output.weight")

# Parts of a block, by the names of their matrices.
_VALUE = re.compile(r"attn_(v|qkv|kv_b)\.weight")
_KEY = re.compile(r"attn_k\.weight")
_ATTENTION_OUTPUT = re.compile(r"attn_output\.weight")
_DOWN = re.compile(r"ffn_down.*\.weight")
_EMBEDDING = re.compile(r"^(per_layer_)?token_embd\.weight")

# How many blocks a model has that llama.cpp calls "70B", by architecture.
_BLOCKS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class Model:
    """The properties of a model that rules ask for.

    n_queries   heads of queries that share one head of keys and values
    n_experts   0 in a dense model
    is_70b      whether llama.cpp calls it "70B"
    is_tied     whether the embeddings are the output matrix too
    calibrated  whether the importance of inputs is known
    """

    architecture: str
    n_blocks: int
    n_queries: int
    n_experts: int
    is_70b: bool
    is_tied: bool
    calibrated: bool

    @classmethod
    def of(cls, file: GgufFile, calibrated: bool) -> Model:
        """Return the properties of a file's model."""

        def number(key: str, default: int = 0) -> int:
            value = file.setting(key, default)
            return int(value[0] if isinstance(value, list) else value)  # an array has a number for each block

        n_blocks, n_heads = number("block_count"), number("attention.head_count")
        n_kv = number("attention.head_count_kv", n_heads)
        is_70b = _BLOCKS_OF_70B.get(file.architecture) == n_blocks
        if file.architecture == "llama":
            is_70b = is_70b and n_heads != n_kv
        n_queries = n_heads // n_kv if n_kv else 0
        is_tied = "output.weight" not in file.tensors
        return cls(file.architecture, n_blocks, n_queries, number("expert_count"), is_70b, is_tied, calibrated)


@dataclass(frozen=True)
class Place:
    """A matrix as rules see it: the `index` among the `n` of its part, which for ffn_down are the model's blocks."""

    model: Model
    index: int = 0
    n: int = 0


Condition = Callable[[Place], bool]
Rule = tuple[T, tuple[Condition, ...]]  # the type if all conditions hold; of several rules the first counts


def _rule(ggml_type: T, *conditions: Condition) -> Rule:
    return ggml_type, conditions


def _in_first(share: int) -> Condition:
    return lambda p: p.index < p.n // share


def _below(index: int) -> Condition:
    return lambda p: p.index < index


def _more_bits(p: Place) -> bool:
    """Return whether it is in the first or the last eighth, or one of three between."""
    return p.index < p.n // 8 or p.index >= 7 * p.n // 8 or (p.index - p.n // 8) % 3 == 2


def _few_bits(p: Place) -> bool:
    return not _more_bits(p)


def _falcon(p: Place) -> bool:
    return p.model.architecture == "falcon"


def _shared(p: Place) -> bool:
    return p.model.n_queries >= 4


def _of_8(p: Place) -> bool:
    """Return whether the model is a mixture of 8 experts, as the first ones were."""
    return p.model.n_experts == 8


def _calibrated(p: Place) -> bool:
    return p.model.calibrated


def _not_calibrated(p: Place) -> bool:
    return not p.model.calibrated


@dataclass(frozen=True)
class Recipe:
    """Says what a name of `type` means.

    file_type  general.file_type, by which llama.cpp and others name the file
    type       of all matrices for which there is no rule
    embedding  of the embeddings and the output matrix; None for llama-quantize's rules
    experts    of tensors that hold all experts, if it is another
    value      rules for the values of attention, also where they are one matrix with queries and keys
    output     rules for attn_output
    down       rules for ffn_down
    """

    file_type: int
    type: T
    embedding: T | None = None
    experts: T | None = None
    value: tuple[Rule, ...] = ()
    output: tuple[Rule, ...] = ()
    down: tuple[Rule, ...] = ()

    @property
    def is_rough(self) -> bool:
        """Return whether it has matrices of less than 8 bits, for which calibration is worth its time."""
        return (self.experts or self.type) not in (*PLAIN_TYPES, T.Q8_0)

    def types(self, file: GgufFile, calibrated: bool) -> dict[str, T]:
        """Return the type of every tensor, as if all were matrices whose rows are whole blocks.

        calibrated: whether the importance of inputs is known.
        """
        if self.embedding is not None:
            return {name: self.embedding if name in EMBEDDINGS else self.type for name in file.tensors}
        model = Model.of(file, calibrated)
        # llama.cpp counts the matrices of a part in this order. Experts may be several matrices of a block.
        shapes = file.shapes
        names = sorted(shapes, key=lambda name: (block_number(name, -1), name))
        values, downs = ([name for name in names if part.search(name)] for part in (_VALUE, _DOWN))
        places = {name: Place(model, i, len(values)) for i, name in enumerate(values)}
        for i, name in enumerate(downs):
            places[name] = Place(model, block_number(name, i) if model.n_experts > 1 else i, model.n_blocks)
        return {name: self._type(name, shapes[name], places.get(name, Place(model))) for name in names}

    def fallback(self, ggml_type: T) -> T | None:
        """Return the type for rows that are no whole blocks of a type; None if only 16 bits are left."""
        of_mixture = _FALLBACKS if self.embedding is None else {}
        return of_mixture.get(ggml_type, TENSOR_TYPES[ggml_type].fallback)

    def _type(self, name: str, shape: tuple[int, ...], place: Place) -> T:
        model = place.model
        if name == "output.weight" or (model.is_tied and _EMBEDDING.search(name)):
            whole = shape[-1] % GGML_QUANT_SIZES[self.type][0] == 0
            return T.Q6_K if whole and not _falcon(place) and self.type != T.Q8_0 else T.Q8_0
        if self.experts is not None:
            return self.experts if len(shape) > 2 else self.type
        if _of_8(place) and (_VALUE.search(name) or _KEY.search(name)):
            return T.Q8_0
        if _VALUE.search(name):
            chosen = self._first_of(self.value, place)
            return T.Q5_K if model.is_70b and chosen in (T.Q3_K, T.Q4_K) else chosen
        if _ATTENTION_OUTPUT.search(name):
            return self._first_of(self.output, place)
        return self._first_of(self.down, place) if _DOWN.search(name) else self.type

    def _first_of(self, rules: tuple[Rule, ...], place: Place) -> T:
        return next((t for t, conditions in rules if all(holds(place) for holds in conditions)), self.type)


_F = LlamaFileType
_OF_8 = (_rule(T.Q5_K, _of_8),)
_IQ4 = {
    "value": (_rule(T.Q5_K, _shared),),
    "output": _OF_8,
    "down": (_rule(T.Q5_K, _not_calibrated, _in_first(8)),),
}

# Where a mixture has another type than TENSOR_TYPES says in rows that are no whole blocks: `tensor_type_fallback`.
_FALLBACKS = {T.Q2_K: T.Q4_0, T.Q3_K: T.Q4_0}

# The mixtures of llama-quantize whose types can all be written.
MIXTURES = {
    "Q4_0": Recipe(_F.MOSTLY_Q4_0, T.Q4_0, down=(_rule(T.Q4_1, _calibrated, _in_first(8)),)),
    "Q4_1": Recipe(_F.MOSTLY_Q4_1, T.Q4_1),
    "Q5_0": Recipe(_F.MOSTLY_Q5_0, T.Q5_0, down=(_rule(T.Q5_1, _calibrated, _in_first(8)),)),
    "Q5_1": Recipe(_F.MOSTLY_Q5_1, T.Q5_1),
    "IQ4_NL": Recipe(_F.MOSTLY_IQ4_NL, T.IQ4_NL, **_IQ4),
    "IQ4_XS": Recipe(_F.MOSTLY_IQ4_XS, T.IQ4_XS, **_IQ4),
    "Q2_K": Recipe(
        _F.MOSTLY_Q2_K,
        T.Q2_K,
        value=(_rule(T.Q4_K, _shared), _rule(T.Q3_K)),
        output=(_rule(T.Q2_K, _falcon), _rule(T.Q5_K, _of_8), _rule(T.Q3_K)),
        down=(_rule(T.Q3_K),),
    ),
    "Q2_K_S": Recipe(_F.MOSTLY_Q2_K_S, T.Q2_K, value=(_rule(T.Q4_K, _shared),), down=(_rule(T.Q4_K, _in_first(8)),)),
    "Q3_K_S": Recipe(_F.MOSTLY_Q3_K_S, T.Q3_K, output=_OF_8),
    "Q3_K_M": Recipe(
        _F.MOSTLY_Q3_K_M,
        T.Q3_K,
        value=(_rule(T.Q5_K, _below(2)), _rule(T.Q4_K)),
        output=(_rule(T.Q3_K, _falcon), _rule(T.Q5_K, _of_8), _rule(T.Q4_K)),
        down=(_rule(T.Q5_K, _in_first(16)), _rule(T.Q3_K, _falcon, _few_bits), _rule(T.Q4_K)),
    ),
    "Q3_K_L": Recipe(
        _F.MOSTLY_Q3_K_L,
        T.Q3_K,
        value=(_rule(T.Q5_K),),
        output=(_rule(T.Q4_K, _falcon), _rule(T.Q3_K, _of_8), _rule(T.Q5_K)),
        down=(_rule(T.Q4_K, _falcon), _rule(T.Q5_K)),
    ),
    "Q4_K_S": Recipe(
        _F.MOSTLY_Q4_K_S,
        T.Q4_K,
        value=(_rule(T.Q5_K, _below(4)),),
        output=_OF_8,
        down=(_rule(T.Q4_K, _falcon), _rule(T.Q5_K, _in_first(8))),
    ),
    "Q4_K_M": Recipe(
        _F.MOSTLY_Q4_K_M,
        T.Q4_K,
        value=(_rule(T.Q6_K, _more_bits),),
        output=_OF_8,
        down=(
            _rule(T.Q6_K, _falcon, _in_first(16)),
            _rule(T.Q5_K, _falcon, _more_bits),
            _rule(T.Q4_K, _falcon),
            _rule(T.Q6_K, _more_bits),
        ),
    ),
    "Q5_K_S": Recipe(_F.MOSTLY_Q5_K_S, T.Q5_K),
    "Q5_K_M": Recipe(_F.MOSTLY_Q5_K_M, T.Q5_K, value=(_rule(T.Q6_K, _more_bits),), down=(_rule(T.Q6_K, _more_bits),)),
    "Q6_K": Recipe(_F.MOSTLY_Q6_K, T.Q6_K),
    "Q8_0": Recipe(_F.MOSTLY_Q8_0, T.Q8_0),
    "MXFP4_MOE": Recipe(_F.MOSTLY_MXFP4_MOE, T.Q8_0, experts=T.MXFP4),
}


def _pure(ggml_type: T) -> Recipe:
    """Return the recipe of one type for all matrices; embeddings have Q6_K beside types of fewer than 16 bits."""
    embedding = ggml_type if ggml_type in PLAIN_TYPES else T.Q6_K
    return Recipe(TENSOR_TYPES[ggml_type].file_type, ggml_type, embedding)


RECIPES = {t.name: _pure(t) for t in TENSOR_TYPES} | MIXTURES


def parse_recipe(text: str) -> Recipe:
    """Return what a name of `type` means, in any case. Raises AaacError that lists the choices."""
    if text.upper() not in RECIPES:
        raise AaacError(f"`type` {text}: unknown type; choose from {', '.join(RECIPES)}")
    return RECIPES[text.upper()]
