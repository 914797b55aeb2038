"""The tables of the values that weights can take."""

import numpy as np
import torch
from conftest import random_codec

from aaac_gguf.files.format import G16
from aaac_gguf.quantizer.grid import CELLS, Grid


def test_nearest_level_tables_are_exact_for_integer_levels():
    rng = np.random.default_rng(0)
    grid = Grid.from_codec(random_codec(rng), G16, "cpu")
    x = torch.from_numpy(
        np.concatenate([rng.uniform(-140, 140, 100_000), np.arange(-140, 140, 0.5)]).astype(np.float32)
    )
    for r in (0, 1):
        got = grid.nearest_level[grid.cells(x) + r * CELLS]
        best = (x[:, None] - grid.levels[r]).abs().amin(1)
        assert torch.equal((x - got).abs(), best)


def test_scale_codes_are_those_of_the_nearest_nonzero_scale():
    rng = np.random.default_rng(1)
    grid = Grid.from_codec(random_codec(rng), G16, "cpu")
    wanted = torch.from_numpy(rng.uniform(-0.1, 1.1, 10_000)).float() * grid.scales[-1]
    nearest = 1 + (wanted[:, None].double() - grid.scales[1:].double()).abs().argmin(1)
    assert torch.equal(grid.scale_codes(wanted), nearest)
