"""Settings of a GGUF that llama.cpp honours and transformers' reader drops."""

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType as V

from aaac_gguf import resources
from aaac_gguf.errors import AaacError, AaacWarning
from aaac_gguf.files.gguf import TensorInfo, Value, field_values, read_model
from aaac_gguf.files.output import write
from aaac_gguf.models import agreement, checkpoint

FACTOR = {"rope.scaling.factor": 4.0}
SCALINGS = {
    "none": {},
    "linear": FACTOR | {"rope.scaling.type": "linear"},
    "linear, of older writers": {"rope.scale_linear": 4.0},
    "yarn": FACTOR | {"rope.scaling.type": "yarn", "rope.scaling.original_context_length": 256},
    "factors in a tensor": {},
}


def with_settings(demo_full, path, settings, factors=False):
    """The bundled model with other settings, and with a tensor of factors."""
    kinds = {float: V.FLOAT32, int: V.UINT32, str: V.STRING}
    metadata = field_values(demo_full.fields)
    metadata |= {f"llama.{key}": Value(value, kinds[type(value)]) for key, value in settings.items()}
    infos = [TensorInfo(name, demo_full.shapes[name], t.tensor_type) for name, t in demo_full.tensors.items()]
    data = [t.data for t in demo_full.tensors.values()]
    if factors:
        values = np.linspace(1, 8, demo_full.setting("rope.dimension_count") // 2, dtype=np.float32)
        infos.insert(0, TensorInfo("rope_freqs.weight", values.shape, gguf.GGMLQuantizationType.F32))
        data.insert(0, values)
    write(path, metadata, infos, data)
    return path


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_positions_are_those_of_llama_cpp(patched, demo_full, tmp_path, monkeypatch, name):
    path = with_settings(demo_full, tmp_path / "x.gguf", SCALINGS[name], factors=name == "factors in a tensor")
    monkeypatch.setattr(agreement, "_MAX_KLD", 0.002)
    agreement.check_agreement(checkpoint.load_model(path), read_model(path), path)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "none"])
def test_another_model_is_found_by_its_logits(patched, demo_full, demo_gguf, tmp_path, name):
    path = with_settings(demo_full, tmp_path / "x.gguf", SCALINGS[name], factors=name == "factors in a tensor")
    with pytest.raises(AaacError, match=r"transformers runs another model than llama.cpp, 0\.\d+ nats away"):
        agreement.check_agreement(checkpoint.load_model(demo_gguf), read_model(path), path)
    with pytest.warns(AaacWarning, match=r"demo: llama.cpp runs another model than transformers, .* nats away"):
        agreement.check_agreement(checkpoint.load_model(resources.MODEL), read_model(path), resources.MODEL)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"attention.scale": 0.5}, "attention.scale"),
        ({"logit_scale": 0.25}, "logit_scale"),
        ({"rope.scaling.type": "longrope"}, "rope.scaling.type"),
        (FACTOR | {"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 8.0}, "rope.scaling.yarn_beta_fast"),
        ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
        ({"attention.sliding_window": 64}, "attention.sliding_window"),
    ],
)
def test_what_transformers_cannot_do_is_refused_at_once(demo_full, tmp_path, refused, settings, key):
    path = with_settings(demo_full, tmp_path / "x.gguf", settings)
    message = refused("convert", path, "-o", tmp_path / "out.gguf", "--calib", resources.SAMPLE_TEXT)
    assert f"{path}: llama.cpp honours {key}, and transformers would run a model without it" in message
    assert "--imatrix" in message


def test_neutral_settings_pass(demo_full, tmp_path):
    neutral = {"rope.scaling.type": "none", "attention.scale": 0.0, "rope.scaling.attn_factor": 1.0}
    checkpoint.check_gguf(with_settings(demo_full, tmp_path / "x.gguf", neutral))


def test_the_comparison_comes_before_calibration(patched, demo_full, tmp_path, refused, monkeypatch):
    path = with_settings(demo_full, tmp_path / "x.gguf", SCALINGS["linear"])
    monkeypatch.setattr(checkpoint, "complete_config", lambda config, file: None)
    args = ("-o", tmp_path / "out.gguf", "--calib", resources.SAMPLE_TEXT, "--calib-sequences", 2)
    assert "transformers runs another model than llama.cpp" in refused("convert", path, *args)
    assert not (tmp_path / "out.gguf").exists()
