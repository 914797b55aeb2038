"""Find where each GGUF tensor is in a transformers model."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

import torch

from ..errors import warn
from ..files.gguf import GgufFile
from ..models.blocks import Blocks
from ..models.checkpoint import gguf_names
from ..models.rows import RowMap
from ..models.weights import load_weight


class Place(NamedTuple):
    """The block whose parameter holds a tensor, and the parameter's name in the model."""

    block: int
    parameter: str


class TensorPlaces:
    """The block, the parameter and the rows of the parameter that hold each GGUF tensor.

    places         by tensor name, in the order of the blocks and of their parameters
    absent         the tensors that no parameter's name stands for
    without_rows   the tensors whose rows were looked up and not found: the converter changed their values.
                   The blocks after them see their full-precision weights, and their moments have no `outputs`.
    """

    def __init__(self, blocks: Blocks, file: GgufFile, tensors: Collection[str]):
        """file: the full-precision model; tensors: the names to find."""
        self.blocks, self.file = blocks, file
        self.places: dict[str, Place] = {}
        n_layers = blocks.model.config.get_text_config().num_hidden_layers
        for i in range(len(blocks)):
            for parameter in blocks.parameters(i):
                names = gguf_names(parameter, file.architecture, n_layers, tensors)
                self.places |= dict.fromkeys(names, Place(i, parameter))
        self.absent = [name for name in tensors if name not in self.places]
        self.without_rows: list[str] = []
        self._row_maps: dict[str, RowMap | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Place:
        return self.places[name]

    def in_block(self, i: int) -> list[str]:
        """Return the tensors of block i."""
        return [name for name, place in self.places.items() if place.block == i]

    def last_block(self) -> int:
        """Return the last block that holds a tensor; -1 if none does."""
        return max((place.block for place in self.places.values()), default=-1)

    def parameter(self, name: str) -> torch.nn.Parameter:
        """Return the parameter that holds a tensor, its block loaded."""
        place = self.places[name]
        self.blocks.load(place.block)
        return self.blocks.parameters(place.block)[place.parameter]

    def _warn(self, name: str) -> None:
        """Warn of a tensor in `without_rows`, unless the same tensor of another decoder block was warned of."""
        kind = re.sub(r"^blk\.\d+\.", "", name)
        if sum(other.endswith(kind) for other in self.without_rows) == 1:
            warn(
                f"{name}: its rows are not in {self.places[name].parameter}, the converter changed their values; "
                "what comes after it is calibrated as if it were not quantized"
            )

    def row_map(self, name: str) -> RowMap | None:
        """Return the map from a tensor's rows to its parameter's; None, and an entry in `without_rows`, if not found.

        The first call for a tensor looks its values up, so it must come before they are replaced.
        """
        if name not in self._row_maps:
            self._row_maps[name] = RowMap.find(self.parameter(name), load_weight(self.file, name, "cpu"))
            if self._row_maps[name] is None:
                self.without_rows.append(name)
                self._warn(name)
        return self._row_maps[name]
