"""Keep what a calibration measured in a folder, so that any number of conversions can start from it.

A folder has these files. All but the last are written once.

measurements.json       what was measured: version of the format, source, settings, tensors
imatrix.gguf            the importance of every matrix, as llama-imatrix writes it; absent without calibration
sequences.safetensors   the tokens that the model ran on, and this and all below only if a model ran:
activations             the inputs of every decoder block (`calibration.activations`)
outputs-*.safetensors   the sums of gradients of every decoder block (`calibration.full_model`)
types.jsonl             the error of each matrix as each type, added by the conversions that measure it
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as T

from .. import __version__
from ..errors import AaacError
from ..files.imatrix import Imatrix, read_imatrix, write_imatrix
from .settings import CalibrationKind, Settings

FORMAT_VERSION = 1

HEADER, _IMATRIX, _SEQUENCES, _TYPES = "measurements.json", "imatrix.gguf", "sequences.safetensors", "types.jsonl"
# The settings that what is measured depends on, and the files too.
SETTINGS = ("calibration", "imatrix", "sequences", "sequence_length", "seed")

TypeErrors = dict[T, tuple[float, float | None]]  # the relative error of the weights; the loss, where it is known


@dataclass(frozen=True, eq=False)
class Measurements:
    """The content of a folder of measurements.

    folder       where they are
    source       the digest of the source's metadata and weights
    settings     those that the measurements depend on, by name
    kind         where importance comes from
    description  what a file will say of the calibration
    n_tokens     of text, or of what an importance file was made of
    n_text       how many of the sequences are text
    tensors      the matrices that were measured
    """

    folder: Path
    source: str
    settings: Mapping[str, Any]
    kind: CalibrationKind
    description: Mapping[str, Any]
    n_tokens: int
    n_text: int
    tensors: Sequence[str]

    @classmethod
    def open(cls, folder: Path) -> Measurements:
        """Read a folder. Raises AaacError for what is none, or is of another version of the format."""
        try:
            header = json.loads((folder / HEADER).read_text("utf-8"))
            version = header.pop("format_version")
            if version != FORMAT_VERSION:
                raise AaacError(
                    f"`moments` {folder}: of format version {version}, this version of aaac-gguf reads "
                    f"{FORMAT_VERSION}; measure again"
                )
            header.pop("program")
            if header["settings"]["imatrix"] is not None:
                header["settings"]["imatrix"] = Path(header["settings"]["imatrix"])
            Settings(**header["settings"])
            return cls(folder, **header)
        except OSError as e:
            what = f"no measurements can be read there: {e.strerror}"
            raise AaacError(f"`moments` {folder}: {what}; make them with `aaac-gguf measure`") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            if isinstance(e, AaacError):
                raise
            raise AaacError(f"`moments` {folder}: {HEADER} is damaged; measure again") from None

    def write(self, imatrix: Imatrix, sequences: torch.Tensor | None) -> None:
        """Write all that the calibration itself did not write into the folder. sequences: int64 [n, T]."""
        from safetensors.torch import save

        if imatrix.entries:
            write_imatrix(self.folder / _IMATRIX, imatrix)
        if sequences is not None:
            (self.folder / _SEQUENCES).write_bytes(save({"sequences": sequences}))
        header = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "folder"}
        header = {"format_version": FORMAT_VERSION, "program": f"aaac-gguf {__version__}", **header}
        (self.folder / HEADER).write_text(json.dumps(header, indent=1, default=str) + "\n", encoding="utf-8")

    def applied(self, settings: Settings) -> Settings:
        """Return settings with those of the measurements. Raises AaacError if others are asked for."""
        defaults = {field.name: field.default for field in fields(Settings)}
        for name, measured in self.settings.items():
            asked = getattr(settings, name)
            if asked not in (defaults[name], measured):
                raise AaacError(
                    f"`moments` {self.folder}: measured with `{name}` {measured}, and not {asked}; "
                    f"leave `{name}` out, or measure again"
                )
        return replace(settings, **self.settings)

    def check_tensors(self, names: Sequence[str], only_looked_up: Sequence[str]) -> None:
        """Raise AaacError if one of the tensors `names` was not measured and is not only looked up."""
        for name in names:
            if name not in self.tensors and name not in only_looked_up:
                raise AaacError(
                    f"`moments` {self.folder}: nothing was measured of {name}; if it is of this model, "
                    "measure again with the `embedding_type` that is wanted"
                )

    def check_source(self, digest: str, source: Path) -> None:
        """Raise AaacError if the measurements are of another source than the one with this digest."""
        if digest != self.source:
            raise AaacError(
                f"`moments` {self.folder}: of another model than {source}, whose weights or metadata differ; measure it"
            )

    @cached_property
    def importance(self) -> Imatrix:
        """Return the importance that was measured, or that the importance file had."""
        path = self.folder / _IMATRIX
        return read_imatrix(path) if path.exists() else Imatrix({})

    @cached_property
    def sequences(self) -> torch.Tensor:
        """Return the tokens that the model ran on, int64 [n, T]."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load((self.folder / _SEQUENCES).read_bytes())["sequences"]
        except (OSError, KeyError, SafetensorError) as e:
            raise AaacError(f"`moments` {self.folder / _SEQUENCES}: cannot be read ({e}); measure again") from None

    @cached_property
    def types(self) -> dict[str, TypeErrors]:
        """Return what each matrix loses as each type, as far as it was measured."""
        found: dict[str, TypeErrors] = {}
        path = self.folder / _TYPES
        for line in path.read_text("utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError, KeyError, TypeError):  # a process that died while it wrote this line
                entry = json.loads(line)
                of_tensor = {
                    T[name]: (float(error), None if loss is None else float(loss))
                    for name, (error, loss) in entry["types"].items()
                }
                found.setdefault(entry["tensor"], {}).update(of_tensor)
        return found

    def add_types(self, name: str, measured: TypeErrors) -> None:
        """Keep what a matrix loses as some types, unless the folder cannot be written."""
        self.types.setdefault(name, {}).update(measured)
        if os.access(self.folder, os.W_OK):
            entry = {"tensor": name, "types": {ggml_type.name: errors for ggml_type, errors in measured.items()}}
            with open(self.folder / _TYPES, "a", encoding="utf-8") as f:
                f.write(f"\n{json.dumps(entry)}\n")
