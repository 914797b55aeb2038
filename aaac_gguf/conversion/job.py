"""Decide everything about a conversion that can be decided before the weights are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFValueType

from .. import __version__
from ..calibration.recorder import MAX_OUTPUTS
from ..calibration.tokens import RANDOM_SHARE, check_ids, fitting_length, text_tokens
from ..errors import AaacError, warn
from ..files import format as fmt
from ..files.gguf import GgufFile, Metadata, Value, field_values, read_model
from ..files.imatrix import Imatrix, read_imatrix
from ..files.layout import Layout, lay_out
from ..models import checkpoint
from ..quantizer.types import TENSOR_TYPES
from ..resources import CALIBRATION_TEXT, sha256
from .measurements import Measurements
from .plan import Rounding, TensorPlan, make_plan, unknown_integers
from .recipes import EMBEDDINGS, PLAIN_TYPES
from .settings import CalibrationKind, MomentsKind, Settings


@dataclass(frozen=True, eq=False)
class CalibrationInput:
    """The input of a calibration.

    description  what the file will say of it
    n_tokens     of text, or of what an importance file was made of
    tokens       int64 [n, T], of a text
    imatrix      of an importance file, checked against the model
    """

    kind: CalibrationKind
    description: Mapping[str, Any]
    n_tokens: int = 0
    tokens: torch.Tensor | None = None
    imatrix: Imatrix | None = None


_NOTHING = CalibrationInput("none", {"source": "none"})


@dataclass(frozen=True, eq=False)
class Job:
    """One conversion, planned.

    moments      where error feedback has its second moments from
    calibration  what it calibrates on; nothing if no tensor is rounded by search
    plans        the output's tensors in order
    metadata     the output's, but for the codecs
    measurements what an earlier run measured, in place of a calibration
    base         the finished file from which tensors are kept
    """

    source: Path
    settings: Settings
    moments: MomentsKind
    calibration: CalibrationInput
    plans: tuple[TensorPlan, ...]
    metadata: Metadata
    measurements: Measurements | None = None
    base: GgufFile | None = None

    @property
    def searched(self) -> list[str]:
        """Return the names of the tensors that are rounded by search."""
        return [p.name for p in self.plans if p.is_searched]

    @property
    def replaced(self) -> list[str]:
        """Return the names of the quantized tensors that are kept, whose errors the matrices after them make up for."""
        return [
            p.name
            for p in self.plans
            if p.rounding == Rounding.KEPT and p.type not in PLAIN_TYPES and p.name not in EMBEDDINGS
        ]

    def layout(self, out: Path) -> Layout:
        """Return the files of the output and the place of every tensor in them."""
        return lay_out(out, self.metadata, [p.info for p in self.plans], self.settings.split_max_size)

    def fingerprint(self) -> dict[str, Any]:
        """Return what the result depends on besides the source's weights and the mixture of types.

        A conversion that resumes must agree with the interrupted one in all of it.
        """
        names = [field.name for field in fields(self.settings) if field.name != "strict"]
        settings = {name: str(getattr(self.settings, name)) for name in names}
        return {
            "version": f"aaac-gguf {__version__}, torch {torch.__version__}",
            **settings,
            "calibration": dict(self.calibration.description),
            "plan": self.types_digest(),
        }

    def types_digest(self) -> str:
        """Return a digest of the plan's names, shapes and types."""
        return hashlib.sha256(repr([(p.name, p.shape, p.type) for p in self.plans]).encode()).hexdigest()

    @property
    def largest(self) -> dict[str, float]:
        """Return the largest magnitude that each tensor's type can hold, for the tensors that change their type."""
        changed = (p for p in self.plans if p.rounding not in (Rounding.COPY, Rounding.KEPT))
        return {p.name: TENSOR_TYPES[p.type].largest for p in changed}

    def without_calibration(self) -> Job:
        """Return the same job for plans in which nothing is left to be rounded by search."""
        ours = (fmt.KEY_QUANTIZER, fmt.KEY_CALIBRATION, "quantize.")
        metadata = {k: v for k, v in self.metadata.items() if not k.startswith(ours)}
        return replace(self, moments="none", calibration=_NOTHING, metadata=metadata)

    def scratch_bytes(self, header: GgufFile) -> int:
        """Return the disk space for temporary files: a folder's weights as GGUF, and what the calibration takes."""
        return (header.n_bytes if self.source.is_dir() else 0) + self.calibration_bytes(header)

    def calibration_bytes(self, header: GgufFile) -> int:
        """Return the disk space for activations and sums of gradients."""
        if self.moments != "measured" or self.measurements:
            return 0
        n_blocks, width = (int(header.setting(key, 0)) for key in ("block_count", "embedding_length"))
        n_tokens = int(self.calibration.n_tokens * (1 + RANDOM_SHARE))
        rows = [p.shape[-2] for p in self.plans if p.is_searched and len(p.shape) == 2]
        outputs = sum(n * (n + 1) // 2 for n in rows if n <= MAX_OUTPUTS)
        return 4 * ((n_blocks + 1) * n_tokens * width + outputs)


def prepare(source: Path, header: GgufFile, settings: Settings) -> Job:
    """Plan a conversion.

    header: the full-precision GGUF, of which no tensor data is read. Raises AaacError for bad input of every kind that
    shows before the weights are read.
    """
    measurements = Measurements.open(settings.moments) if settings.moments else None
    if measurements:
        settings = measurements.applied(settings)
    settings = _for_encoders(source, header, settings)
    base = read_model(settings.base) if settings.base else None
    calibrated = settings.calibration_kind(source) != "none"
    plans = make_plan(header, settings, settings.moments_kind(source), calibrated, base)
    if unknown := unknown_integers(header):
        warn(f"{source}: left out, since llama.cpp knows no such tensors: {', '.join(unknown)}")
    is_calibrated = any(p.is_searched for p in plans)
    moments = settings.moments_kind(source) if is_calibrated else "none"
    if is_calibrated and settings.calibration_kind(source) in ("self", "text"):
        length = fitting_length(header, settings.sequence_length, "sequence_length")
        settings = replace(settings, sequence_length=length)
    calibration = _NOTHING
    if measurements and is_calibrated:
        searched = [p.name for p in plans if p.is_searched]
        measurements.check_tensors(searched, ["token_embd.weight"] if "output.weight" in header.tensors else [])
        given = measurements.importance if measurements.kind == "imatrix" else None
        calibration = CalibrationInput(
            measurements.kind, measurements.description, measurements.n_tokens, imatrix=given
        )
    elif is_calibrated:
        calibration = _calibration_input(source, header, settings)
    metadata = base_metadata(base) if base else output_metadata(header, settings.recipe.file_type)
    if is_calibrated:
        description = {**calibration.description, "method": settings.method, "feedback": moments}
        if base:
            description["others"] = base.get(fmt.KEY_CALIBRATION)
        metadata[fmt.KEY_QUANTIZER] = Value(f"aaac-gguf {__version__}", GGUFValueType.STRING)
        metadata[fmt.KEY_CALIBRATION] = Value(json.dumps(description), GGUFValueType.STRING)
    if calibration.imatrix and settings.imatrix:
        metadata |= _imatrix_metadata(calibration.imatrix, settings.imatrix)
    return Job(source, settings, moments, calibration, plans, metadata, measurements, base)


def _for_encoders(source: Path, header: GgufFile, settings: Settings) -> Settings:
    """Return the settings without calibration, with a warning, for a model that does not predict the next token.

    Raises AaacError if calibration is asked for.
    """
    if checkpoint.is_causal(header) or settings.calibration_kind(source) not in ("self", "text"):
        return settings
    what = f"{source}: {header.architecture} has an encoder and is no model of the next token, which calibration runs"
    if settings.calibration:
        raise AaacError(f"{what}; calibrate with `imatrix`, or set `calibration` to 'none'")
    warn(f"{what}: it is converted without calibration; `verify` compares its tensors, and no logits of the next token")
    return replace(settings, calibration="none")


def output_metadata(file: GgufFile, file_type: int) -> dict[str, Value]:
    """Return a file's metadata for an output of another type, without what belongs to its own shards and codecs."""
    own = ("split.", "aaac.", "quantize.")
    kept = {key: v for key, v in field_values(file.fields).items() if not key.startswith(own)}
    kept["general.file_type"] = Value(int(file_type), GGUFValueType.UINT32)
    kept["general.quantization_version"] = Value(gguf.GGML_QUANT_VERSION, GGUFValueType.UINT32)
    return kept


def base_metadata(base: GgufFile) -> dict[str, Value]:
    """Return the metadata of a finished file that is kept in part, without what belongs to its shards and codecs."""
    of_calibration = (fmt.KEY_QUANTIZER, fmt.KEY_CALIBRATION)
    values = field_values(base.fields).items()
    return {key: v for key, v in values if not key.startswith(("split.", "aaac.")) or key in of_calibration}


def _imatrix_metadata(imatrix: Imatrix, path: Path) -> dict[str, Value]:
    """Return what llama-quantize says of an importance file."""
    return {
        "quantize.imatrix.file": Value(path.name, GGUFValueType.STRING),
        "quantize.imatrix.dataset": Value(", ".join(imatrix.datasets), GGUFValueType.STRING),
        "quantize.imatrix.entries_count": Value(len(imatrix.entries), GGUFValueType.UINT32),
        "quantize.imatrix.chunks_count": Value(imatrix.n_chunks, GGUFValueType.UINT32),
    }


def _calibration_input(source: Path, header: GgufFile, settings: Settings) -> CalibrationInput:
    """Check and read what the calibration starts from.

    Raises AaacError for a text that is too short, an importance file of another model, and so on.
    """
    kind = settings.calibration_kind(source)
    n, length = settings.sequences, settings.sequence_length
    if kind in ("self", "text") and source.is_file():
        if header.codecs:
            raise AaacError(f"{source}: transformers reads no AAAC types; calibrate with `imatrix`")
        checkpoint.check_gguf(source)
    match kind:
        case "imatrix":
            assert settings.imatrix
            imatrix = read_imatrix(settings.imatrix).fitted(settings.imatrix, header.shapes)
            n_tokens = imatrix.n_chunks * imatrix.chunk_size
            description = {
                "source": "imatrix",
                "file": settings.imatrix.name,
                "sha256": sha256(settings.imatrix),
                "datasets": imatrix.datasets,
                "tokens": n_tokens,
            }
            return CalibrationInput(kind, description, n_tokens, imatrix=imatrix)
        case "self":
            description = {"source": "self", "seed": settings.seed, "tokens": n * length, "sequence_length": length}
            return CalibrationInput(kind, description, n * length)
        case "text":
            text = settings.text
            tokens, digest = text_tokens(source, text, n, length)
            if embeddings := header.shapes.get("token_embd.weight"):
                check_ids(tokens, embeddings[0], text)
            description = {
                "source": "bundled" if text == CALIBRATION_TEXT else "text",
                "file": text.name,
                "sha256": digest,
                "tokens": tokens.numel(),
                "sequence_length": length,
            }
            return CalibrationInput(kind, description, tokens.numel(), tokens=tokens)
    return _NOTHING
