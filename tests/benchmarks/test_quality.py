"""The formats that the quality benchmark compares with: shapes, sizes of error, and their order."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aaac_gguf.quantizer.moments import Moments

spec = importlib.util.spec_from_file_location("quality", Path(__file__).parents[2] / "benchmarks" / "quality.py")
quality = importlib.util.module_from_spec(spec)
sys.modules["quality"] = quality  # dataclasses look their module up
spec.loader.exec_module(quality)

N, K = 32, 256


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    weight = torch.from_numpy((rng.standard_t(5, (N, K)) * 0.05).astype(np.float32))
    x = rng.standard_normal((2048, K)) @ (np.eye(K) + 0.15 * rng.standard_normal((K, K)))
    moments = Moments(torch.from_numpy(x.T @ x / 2048).float(), torch.eye(N))
    return quality.Layer(weight, moments)


@pytest.fixture(scope="module")
def reconstructions(layer):
    return {row.name: row.reconstruct(layer, 0) for row in quality.rows()}


def output_error(layer, reconstruction) -> float:
    d = layer.weight - reconstruction
    return float(((d @ layer.moments.inputs) * d).sum())


def test_every_row_is_a_reconstruction_at_its_bits(layer, reconstructions):
    for row in quality.rows():
        reconstruction = reconstructions[row.name]
        assert reconstruction.shape == (N, K), row.name
        error = (layer.weight - reconstruction).square().sum() / layer.weight.square().sum()
        assert 0.001 < error * 4 ** (row.bits_per_weight - 4.5) < 0.1, (
            row.name
        )  # feedback spends error where the inputs do not see it


def test_what_must_not_be_worse(layer, reconstructions):
    squared = {name: float((layer.weight - r).square().sum()) for name, r in reconstructions.items()}
    assert squared["IF4"] < squared["NVFP4"]
    assert squared["AAAC4_G16, importance"] < squared["paper, G16"]
    errors = {name: output_error(layer, r) for name, r in reconstructions.items()}
    assert errors["GPTQ INT4 g128"] < errors["AWQ INT4 g128"]
    assert errors["AAAC4_G16"] < errors["one codebook g16, feedback"] < errors["INT4 g16, feedback"]
    for name in ("AAAC4_G16", "AAAC4_G32", "AAAC4_G128"):
        assert errors[f"{name}, columns"] < errors[f"{name}, importance"]


def test_divergence_of_a_model_from_itself_is_zero():
    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids, use_cache):
            logits = torch.nn.functional.one_hot(input_ids, 8).float()
            return type("Output", (), {"logits": logits})

    chunks = torch.randint(0, 8, (3, quality.CONTEXT), generator=torch.Generator().manual_seed(0))
    found = quality.divergence(Model(), chunks, list(quality.log_probabilities(Model(), chunks)))
    assert found["mean"] == 0
    assert found["same_top"] == 1
