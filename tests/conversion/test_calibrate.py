"""Calibration of a job: synthetic moments where no model runs, and what the file says of it."""

import json

import numpy as np
import torch
from conftest import write_source
from gguf import GGMLQuantizationType as T

from aaac_gguf import resources
from aaac_gguf.calibration import activations as calibrate
from aaac_gguf.calibration import tokens as tokens_module
from aaac_gguf.calibration.synthetic import SyntheticMoments
from aaac_gguf.conversion import convert
from aaac_gguf.conversion.calibrate import Calibration
from aaac_gguf.conversion.encoder import encode
from aaac_gguf.conversion.job import prepare
from aaac_gguf.conversion.plan import Rounding
from aaac_gguf.conversion.settings import Settings
from aaac_gguf.files import format as fmt
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.files.imatrix import Imatrix, write_imatrix
from aaac_gguf.models import checkpoint
from aaac_gguf.models.weights import load_weight
from aaac_gguf.quantizer.quantize import quantize


def test_moments_are_synthetic_where_none_are_measured(rng, tmp_path):
    name = "blk.0.attn_q.weight"
    shapes = {"token_embd.weight": (100, 256), name: (32, 256)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    file = gguf_io.read(write_source(tmp_path / "model.gguf", tensors))
    job = prepare(tmp_path / "model.gguf", file, Settings())
    plan = next(p for p in job.plans if p.name == name)
    assert plan.rounding == Rounding.FEEDBACK
    tokens = torch.randint(100, (4, 64))
    calibration = Calibration(Imatrix({}), synthetic=lambda: SyntheticMoments(file, tokens, Imatrix({})))
    data, record = encode(plan, job, file, calibration)
    assert record.rounding == Rounding.SYNTHETIC
    hessian = SyntheticMoments(file, tokens, Imatrix({})).moments(name).inputs
    expected = quantize(load_weight(file, name, "cpu"), T["AAAC4_G16"], None, hessian)
    np.testing.assert_array_equal(data, expected.data)
    assert record.damping > 0


def test_the_file_names_the_kind_of_feedback(demo_gguf, tmp_path):
    """For a GGUF with an importance matrix, with nothing at all, and without feedback."""
    model = checkpoint.load_model(resources.MODEL)
    tokens, _ = tokens_module.text_tokens(resources.MODEL, resources.SAMPLE_TEXT, 1, 64)
    full = gguf_io.read(demo_gguf)
    write_imatrix(
        tmp_path / "imatrix.gguf", calibrate.importance(model, tokens, full.architecture, full.tensors, "text")
    )
    with_imatrix = {"imatrix": tmp_path / "imatrix.gguf"}
    for feedback, given, expected in (
        (True, with_imatrix, "synthetic"),
        (True, {"calibration": "none"}, "synthetic"),
        (False, with_imatrix, "none"),
    ):
        made = convert.convert(demo_gguf, tmp_path / "out.gguf", Settings(**given, feedback=feedback))
        assert json.loads(gguf_io.read(tmp_path / "out.gguf").get(fmt.KEY_CALIBRATION))["feedback"] == expected
        assert made.damped == []
