"""Mixtures of experts: each expert's inputs count for it alone; one without any is named and still rounded well."""

import numpy as np
import pytest
import torch
import transformers
from random_checkpoints import COMMON, SIZES, save_random

from aaac_gguf import resources
from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.conversion import convert
from aaac_gguf.conversion.plan import Rounding
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.imatrix import write_imatrix
from aaac_gguf.models import checkpoint
from aaac_gguf.models.source import full_precision
from aaac_gguf.reporting import conversions

N_EXPERTS = 16
CONFIG = transformers.MixtralConfig(**COMMON, **SIZES, num_local_experts=N_EXPERTS, num_experts_per_tok=1)
PROJECTIONS = ("ffn_gate_exps", "ffn_down_exps", "ffn_up_exps")


def routed(source, tokens) -> list[np.ndarray]:
    """Return how many of the tokens each expert got, by layer, from the router's own logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.inference_mode():
        logits = model(input_ids=tokens, output_router_logits=True).router_logits
    return [np.bincount(layer.argmax(-1), minlength=N_EXPERTS) for layer in logits]


def test_experts_that_calibration_never_reached(llama_source, tmp_path):
    source = save_random(CONFIG, tmp_path / "model")
    tokens, _ = tokens_module.text_tokens(source, resources.SAMPLE_TEXT, 1, 24)
    counts = routed(source, tokens)
    idle = [np.flatnonzero(layer == 0).tolist() for layer in counts]
    assert all(0 < len(layer) < N_EXPERTS for layer in idle)
    settings = Settings(calibration=str(resources.SAMPLE_TEXT), sequences=1, sequence_length=24, feedback=False)
    made = convert.convert(source, tmp_path / "out.gguf", settings)
    expected = {f"blk.{i}.{p}.weight (experts {', '.join(map(str, idle[i]))})" for i in (0, 1) for p in PROJECTIONS}
    assert made.coverage is not None
    assert set(made.coverage.missed) == expected

    file = gguf_io.read(tmp_path / "out.gguf")
    sizes = {n: file.tensors[n].n_elements for n in file.codecs}
    missed = sum(sizes[f"blk.{i}.{p}.weight"] * len(idle[i]) / N_EXPERTS for i in (0, 1) for p in PROJECTIONS)
    assert made.coverage.share == pytest.approx(1 - missed / sum(sizes.values()))
    assert (
        f"calibration reached {100 * made.coverage.share:.2f} % of the weights; not reached: blk.0."
        in conversions.convert_text(made)
    )

    with full_precision(source, tmp_path) as full:
        for layer, experts in enumerate(idle):
            before, after = (f[f"blk.{layer}.ffn_down_exps.weight"] for f in (full, file))
            errors = np.square(after - before).sum((1, 2)) / np.square(before).sum((1, 2))
            assert errors[experts].max() < 0.005

        # The same with the counts written to an importance file, and no checkpoint.
        imatrix = calibrate.importance(checkpoint.load_model(source), tokens, full.architecture, full.tensors, "text")
        for layer in (0, 1):
            np.testing.assert_array_equal(imatrix.entries[f"blk.{layer}.ffn_up_exps.weight"].counts, counts[layer])
        write_imatrix(tmp_path / "imatrix.gguf", imatrix)
        again = convert.convert(
            full.path,
            tmp_path / "again.gguf",
            Settings(imatrix=tmp_path / "imatrix.gguf", feedback=False),
        )
    assert again.coverage == made.coverage
    for tensor in file.tensors:
        np.testing.assert_array_equal(
            gguf_io.read(tmp_path / "again.gguf").tensors[tensor].data, file.tensors[tensor].data
        )


def test_feedback_where_some_experts_saw_nothing(llama_source, tmp_path):
    source = save_random(CONFIG, tmp_path / "model")
    settings = Settings(calibration="self", sequences=1, sequence_length=4)
    made = convert.convert(source, tmp_path / "out.gguf", settings)
    assert made.coverage is not None
    assert made.coverage.share < 0.7
    with full_precision(source, tmp_path) as full:
        file = gguf_io.read(tmp_path / "out.gguf")
        for name in file.codecs:
            before = full[name]
            assert np.square(file[name] - before).sum() < 0.05 * np.square(before).sum()


def test_experts_of_a_gguf_have_feedback(llama_source, tmp_path):
    """Their moments are estimated, those of the experts that no token reaches from all tokens."""
    source = save_random(CONFIG, tmp_path / "model")
    with full_precision(source, tmp_path) as full:
        made = convert.convert(full.path, tmp_path / "out.gguf", Settings())
        plain = convert.convert(full.path, tmp_path / "plain.gguf", Settings(feedback=False))
        of_experts = [tensor for tensor in made.tensors if "_exps" in tensor.plan.name]
        assert len(of_experts) == 2 * len(PROJECTIONS)
        assert {tensor.rounding for tensor in of_experts} == {Rounding.SYNTHETIC}
        for tensor in of_experts:
            before = full[tensor.plan.name]
            for path, most in ((made.files[0], 0.012), (plain.files[0], 0.006)):
                after = gguf_io.read(path)[tensor.plan.name]
                errors = np.square(after - before).sum((1, 2)) / np.square(before).sum((1, 2))
                assert errors.max() < most, (tensor.plan.name, path, errors)
