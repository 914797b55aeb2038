"""Say what a conversion is asked for, and what is meant where nothing is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from gguf import GGMLQuantizationType as T

from ..errors import AaacError
from ..files import format as fmt
from ..quantizer.types import TENSOR_TYPES, Method
from ..resources import CALIBRATION_TEXT
from .recipes import Recipe, parse_recipe

CalibrationKind = Literal["none", "self", "text", "imatrix"]
MomentsKind = Literal["none", "synthetic", "measured"]


@dataclass(frozen=True)
class Settings:
    """The settings of one conversion, as a user gives them. Types are given by name.

    type             type of the matrices, or a mixture of types by llama-quantize's name (`recipes`)
    embedding_type   type of token_embd and output; None for what `type` says, which is Q6_K for AAAC types
    tensor_types     pairs of a regular expression and a type for the tensors whose name it matches; the last match wins
    calibration      path of a text, "bundled" for the package's own, "self" for tokens that the model samples, "none";
                     None for the default
    imatrix          an importance file of llama.cpp instead of a calibration
    sequences        calibration sequences, at most
    sequence_length  tokens in each
    method           "aaac", or "paper" for the paper's Algorithm 1 as published
    feedback         error feedback; without it matrices are rounded by importance alone
    seed             for sampled tokens, and for the groups that codebooks are fitted to
    device           what torch calls the device of calibration and search
    bpw              mixed precision: bits per weight of all tensor data together, at most
    size             the same as bytes of all files together
    stock            mixed precision from types that every llama.cpp runs
    split_max_size   bytes of tensor data in each file, at most; None for one file
    moments          a folder of `measure` instead of a calibration
    base             a finished file of the model, of which only `tensor_types` is quantized anew; the rest is copied
    strict           make a calibration that does not reach enough of the weights an error
    allow_requantize quantize a GGUF again that is quantized to less than 8 bits, or to AAAC types
    """

    type: str = "AAAC4_G16"
    embedding_type: str | None = None
    tensor_types: Sequence[tuple[str, str]] = ()
    calibration: str | None = None
    imatrix: Path | None = None
    sequences: int = 64
    sequence_length: int = 512
    method: Method = "aaac"
    feedback: bool = True
    seed: int = 0
    device: str = "cpu"
    bpw: float | None = None
    size: int | None = None
    stock: bool = False
    split_max_size: int | None = None
    allow_requantize: bool = False
    strict: bool = False
    moments: Path | None = None
    base: Path | None = None

    def __post_init__(self) -> None:
        """Raise AaacError for settings that exclude each other or make no sense."""
        if self.calibration and self.imatrix:
            raise AaacError("`calibration` and `imatrix`: give one of them")
        if self.bpw is not None and self.size is not None:
            raise AaacError("`bpw` and `size`: give one of them")
        if self.stock and not self.mixes:
            raise AaacError("`stock`: is for `bpw` and `size`; otherwise choose a `type` that every llama.cpp runs")
        if self.mixes and parse_recipe(self.type).type not in fmt.TYPES_BY_ID:
            raise AaacError(f"`type` {self.type}: `bpw` and `size` choose the types; leave it out, or set `stock`")
        if self.base is not None:
            default = Settings()
            for name in ("type", "embedding_type", "bpw", "size"):
                if getattr(self, name) != getattr(default, name):
                    raise AaacError(f"`base` and `{name}`: give one of them; `tensor_types` names what is made anew")
            if not self.tensor_types:
                raise AaacError(f"`base` {self.base}: say with `tensor_types` what is to be quantized anew")
        if self.method not in ("aaac", "paper"):
            raise AaacError(f"`method` {self.method}: choose aaac or paper")
        for name in ("sequences", "sequence_length", "bpw", "size", "split_max_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise AaacError(f"`{name}` {value}: give a positive number")
        parse_recipe(self.type)
        if self.embedding_type is not None:
            parse_type(self.embedding_type, "embedding_type")

    @property
    def recipe(self) -> Recipe:
        """Return what `type` means. With `stock`, no type that only the patched llama.cpp runs is left."""
        return parse_recipe("Q4_K" if self.stock else self.type)

    @property
    def mixes(self) -> bool:
        """Return whether types are chosen for a size."""
        return self.bpw is not None or self.size is not None

    def check_device(self) -> None:
        """Raise AaacError unless torch can run on the device."""
        if self.device != "cpu" and not torch.cuda.is_available():
            raise AaacError(f"`device` {self.device}: torch finds no CUDA device here; use cpu")

    def calibration_kind(self, source: Path) -> CalibrationKind:
        """Return where importance comes from, for a model folder or a GGUF file."""
        if self.imatrix:
            return "imatrix"
        if self.calibration in ("none", "self"):
            return "self" if self.calibration == "self" else "none"
        if self.calibration:
            return "text"
        # Nobody waits for a calibration who only asked for 8 or 16 bits.
        return "text" if self.recipe.is_rough and not source.is_file() else "none"

    @property
    def text(self) -> Path:
        """Return the text to calibrate on, where it is a text: the bundled one unless another is named."""
        return Path(self.calibration) if self.calibration not in (None, "bundled") else CALIBRATION_TEXT

    def moments_kind(self, source: Path) -> MomentsKind:
        """Return where error feedback has its second moments from.

        A model that runs, or else the weights and what importance there is.
        """
        if not self.feedback or self.method != "aaac":
            return "none"
        return "measured" if self.calibration_kind(source) in ("self", "text") else "synthetic"


def parse_type(text: str, setting: str) -> T:
    """Return a type by its name, in any case. Raises AaacError that names `setting` and lists the choices."""
    by_name = {t.name: t for t in TENSOR_TYPES}
    if text.upper() not in by_name:
        raise AaacError(f"`{setting}` {text}: unknown type; choose from {', '.join(by_name)}")
    return by_name[text.upper()]
