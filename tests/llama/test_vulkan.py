"""The patch's Vulkan backend, on a Vulkan device: on Mesa's lavapipe, which is a CPU, if there is no other.

Needs the tools that `aaac-gguf llama build --backend vulkan` builds, or AAAC_VULKAN_BIN, the folder of others. ggml
leaves devices that are CPUs out, unless GGML_VK_VISIBLE_DEVICES names them. Here it is 0, the first device, if it is
not set. A test that skips says what is missing.
"""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import test_ops as ops
import transformers
from aaac_samples import codec, random_blocks
from random_checkpoints import COMMON, SIZES, save_random
from test_ops import (  # noqa: F401, collected here as well
    ALL_TYPES,
    test_decode_every_index_selector_and_scale_code,
    test_decode_hand_written_blocks,
    test_decode_random_bytes,
    test_decode_to_16_bits,
    test_views_keep_the_codebooks,
)

from aaac_gguf import resources
from aaac_gguf.conversion.convert import convert
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files.format import TYPES, decode
from aaac_gguf.llama import build
from aaac_gguf.reporting import demo

pytestmark = pytest.mark.llama
run_op = ops.run_op  # which runs the program below

VULKAN, CPU = ("-ngl", 99), ("--device", "none")
LAYER = "VK_LAYER_KHRONOS_validation"


@pytest.fixture(scope="module")
def vulkan():
    """Return a function that runs a tool of the Vulkan build and returns its standard output and its log."""
    folder = Path(os.environ.get("AAAC_VULKAN_BIN") or build.build_dir("vulkan") / "bin")
    if not (folder / "test-backend-ops").is_file():
        pytest.skip("no Vulkan build; run `aaac-gguf llama build --backend vulkan`, or set AAAC_VULKAN_BIN to one")
    env = {"GGML_VK_VISIBLE_DEVICES": "0"} | os.environ

    def run(name, *args, **settings):
        command = [folder / name, *map(str, args)]
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, env=env | settings
        )
        assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
        return result.stdout, result.stderr

    try:
        stdout, _ = run("llama-completion", "--list-devices")
    except AssertionError as e:
        pytest.skip(f"no Vulkan device: {str(e).splitlines()[0]}")
    if "Vulkan0" not in stdout:
        pytest.skip("no Vulkan device; on Debian and Ubuntu, mesa-vulkan-drivers has one that is a CPU")
    run.folder = folder
    return run


@pytest.fixture(scope="module")
def program(vulkan, tmp_path_factory):
    """Return a program that is test-aaac on the Vulkan device."""
    script = tmp_path_factory.mktemp("vulkan") / "test-aaac-vulkan"
    devices = os.environ.get("GGML_VK_VISIBLE_DEVICES", "0")
    script.write_text(f"#!/bin/sh\nGGML_VK_VISIBLE_DEVICES={devices} exec '{vulkan.folder}/test-aaac' Vulkan0\n")
    script.chmod(0o755)
    return script


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 2, 5, 8])
def test_mul_mat_few_columns(run_op, qtype, n_cols):
    """Weights and activations are float32. So the error is that of the sums, far inside the bound for halves."""
    blocks, x = random_blocks(qtype, 67, 1152, seed=n_cols, max_code=50), ops.activations(n_cols, 1152)
    got = np.frombuffer(run_op(ops.MUL_MAT, qtype, blocks, codec(4), x), np.float32).reshape(n_cols, 67)
    w, x = decode(qtype, blocks, codec(4)).astype(np.float64), x.astype(np.float64)
    assert (np.abs(got - x @ w.T) <= 64 * 2.0**-24 * np.abs(x) @ np.abs(w).T).all()


@ALL_TYPES
@pytest.mark.parametrize("n_cols", [1, 2, 5, 8])
@pytest.mark.parametrize("n_blocks", [3, 18])
def test_mul_mat_integers(run_op, qtype, n_cols, n_blocks, monkeypatch):
    """Activations are rounded to blocks of 8 bits, and then nothing is lost but in sums."""
    k = n_blocks * qtype.block_size
    monkeypatch.setenv("GGML_VK_FORCE_MMVQ", "1")  # ggml's own switch: the device need not say that it is fast
    blocks, x = random_blocks(qtype, 67, k, seed=n_cols, max_code=50), ops.activations(n_cols, k)
    got = np.frombuffer(run_op(ops.MUL_MAT, qtype, blocks, codec(4), x), np.float32).reshape(n_cols, 67)
    run = x.reshape(-1, 32)
    d = np.abs(run).max(-1, keepdims=True) / np.float32(127)
    levels = np.round(run * np.divide(np.float32(1), d, where=d != 0, out=np.zeros_like(d)))
    x = (levels * d.astype(np.float16)).astype(np.float64).reshape(x.shape)
    w = decode(qtype, blocks, codec(4)).astype(np.float64)
    assert (np.abs(got - x @ w.T) <= 64 * 2.0**-24 * np.abs(x) @ np.abs(w).T).all()


def results(stdout):
    return [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in stdout.splitlines() if "aaac" in line]


# What a process of test-backend-ops runs: cases whose shaders bind as many buffers. In a process that mixes them, Mesa
# 22.3's lavapipe crashes now and then, as if it touched freed buffers that an earlier shader left in unused bindings.
CASES = (
    ("MUL_MAT", "n=[1-8],"),
    ("MUL_MAT", r"n=(9|\d\d+),"),
    ("MUL_MAT_ID", "n=[15],"),
    ("MUL_MAT_ID", r"n=\d\d+,"),
    ("GET_ROWS", ""),
    ("CPY", ""),
)


def check_cases(vulkan, op, qtype, cases, **settings):
    """Run the cases of an operation that match, all of which must pass. Returns all output."""
    pattern = rf"{qtype.lower()}\b.*{cases}"
    stdout, stderr = vulkan("test-backend-ops", "test", "-b", "Vulkan0", "-o", op, "-p", pattern, **settings)
    lines = results(stdout)
    assert len([line for line in lines if line.rstrip().endswith("OK")]) >= 8, stdout[-2000:]
    assert not [line for line in lines if "FAIL" in line or "not supported" in line]
    return stdout + stderr


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize(("op", "cases"), CASES)
def test_backend_ops(vulkan, qtype, op, cases):
    """llama.cpp's own comparison with the CPU passes. It skips what Vulkan refuses, so what ran is counted."""
    check_cases(vulkan, op, qtype, cases)


@pytest.mark.parametrize("qtype", TYPES)
def test_backend_ops_with_integers(vulkan, qtype):
    check_cases(vulkan, "MUL_MAT", qtype, "m=(16|67),n=[1-8],", GGML_VK_FORCE_MMVQ="1")


@pytest.mark.parametrize(("op", "cases"), CASES)
def test_validation_layers_are_silent(vulkan, op, cases):
    """Vulkan's validation layers find nothing to say about the operations."""
    try:
        output = check_cases(vulkan, op, "AAAC4_G16", cases, VK_INSTANCE_LAYERS=LAYER, VK_LOADER_DEBUG="layer")
    except AssertionError as e:
        if "ErrorLayerNotPresent" in str(e):
            pytest.skip(f"{LAYER} is not installed; on Debian and Ubuntu, vulkan-validationlayers has it")
        raise
    assert LAYER in output
    assert not re.findall(r"VUID-\S+|UNASSIGNED-\S+", output)


@pytest.fixture(scope="module", params=TYPES)
def model(request, vulkan, demo_gguf, tmp_path_factory):
    out = tmp_path_factory.mktemp("vulkan") / f"demo-{request.param}.gguf"
    convert(demo_gguf, out, Settings(type=request.param, calibration="none", method="paper"))
    return out


def perplexity(vulkan, model, n_tokens, *args):
    options = ("-f", resources.SAMPLE_TEXT, "-c", n_tokens, "-b", n_tokens, "--chunks", 1)
    out = "".join(vulkan("llama-perplexity", "-m", model, *options, *args))
    return float(re.search(r"Final estimate: PPL = ([\d.]+)", out)[1])


def text(vulkan, model, *args):
    args = ("-m", model, "-p", demo.PROMPT, "-n", 24, "--temp", 0, "-no-cnv", "--no-warmup", "-t", 1, *args)
    return vulkan("llama-completion", *args)[0].strip()


def test_perplexity_is_that_of_the_cpu(vulkan, model):
    """Vulkan has 16-bit activations for a prompt, the CPU 8-bit ones."""
    assert abs(perplexity(vulkan, model, 256, *VULKAN) / perplexity(vulkan, model, 256, *CPU) - 1) < 0.005


@pytest.mark.parametrize("n_layers", [2, 99])
def test_text_is_that_of_the_cpu(vulkan, model, n_layers):
    """All layers are on the device, or two of them. Where they are has no influence on the codebooks."""
    cpu, gpu = text(vulkan, model, *CPU), text(vulkan, model, "-ngl", n_layers)
    # greedy choice may part ways at a near tie, but not at once
    same = next((i for i, (a, b) in enumerate(zip(cpu, gpu, strict=False)) if a != b), min(len(cpu), len(gpu)))
    assert same >= min(len(cpu), len(demo.PROMPT) + 40), (cpu, gpu)


def test_split_file(vulkan, model, tmp_path):
    vulkan("llama-gguf-split", "--split", "--split-max-tensors", 20, model, tmp_path / "part")
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 1
    whole = text(vulkan, model, *VULKAN)
    assert len(whole) > len(demo.PROMPT) + 20
    assert text(vulkan, parts[0], *VULKAN) == whole


def test_mixture_of_experts(vulkan, llama_source, tmp_path):
    config = transformers.MixtralConfig(**COMMON, **SIZES, num_local_experts=4, num_experts_per_tok=2)
    model = tmp_path / "mixture.gguf"
    convert(save_random(config, tmp_path / "model"), model, Settings(calibration="none", method="paper"))
    assert abs(perplexity(vulkan, model, 64, *VULKAN) / perplexity(vulkan, model, 64, *CPU) - 1) < 0.005
