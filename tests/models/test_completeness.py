"""The tensors of a checkpoint against those that its model needs."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from random_checkpoints import COMMON, SIZES, save_random
from safetensors.torch import load_file, save_file

from aaac_gguf import cli, resources
from aaac_gguf.errors import AaacError, AaacWarning
from aaac_gguf.models import checkpoint
from aaac_gguf.models.completeness import check_tensors
from aaac_gguf.models.source import full_precision

NAMES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, **SIZES),
    "tied": lambda: transformers.LlamaConfig(**COMMON, **SIZES, tie_word_embeddings=True),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=4096, n_embd=128, n_layer=2, n_head=4),
    "experts in one parameter": lambda: transformers.MixtralConfig(**COMMON, **SIZES, num_local_experts=4),
    "linear attention": lambda: transformers.Qwen3NextConfig(
        **COMMON, **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}


def check(folder):
    check_tensors(folder, checkpoint.check(folder))


def change(folder, edit):
    """Edit the tensors of a folder with one file of weights."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(resources.MODEL, tmp_path / "model")


@pytest.mark.filterwarnings("error::aaac_gguf.errors.AaacWarning")
@pytest.mark.parametrize("name", NAMES)
def test_whole_checkpoints_pass(tmp_path, name):
    check(save_random(NAMES[name](), tmp_path / "model"))


BERT = {"vocab_size": 13, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.filterwarnings("error::aaac_gguf.errors.AaacWarning")
@pytest.mark.parametrize(
    ("kind", "named"),
    [("Model", "Model"), ("ForMaskedLM", "ForMaskedLM"), ("ForMaskedLM", "Model"), ("Model", "ForMaskedLM")],
)
def test_the_heads_of_an_encoder_may_be_missing(tmp_path, kind, named):
    """Embedding models come without the head of a masked language model, and some without a pooler."""
    folder = tmp_path / "model"
    getattr(transformers, f"Bert{kind}")(transformers.BertConfig(**BERT)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": [f"Bert{named}"]}
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        if kind != named:  # the other's head is not used, with a warning
            warnings.simplefilter("ignore", AaacWarning)
        check(folder)
    change(folder, lambda w: [w.pop(name) for name in list(w) if "encoder.layer.1.output.dense.weight" in name])
    with pytest.raises(
        AaacError, match=r"1 tensors that .* missing: (bert\.)?encoder\.layer\.1\.output\.dense\.weight"
    ):
        check(folder)


def test_missing_tensors_are_named_before_anything_runs(folder, tmp_path, refused):
    change(folder, lambda w: [w.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(2)])
    for calib in ("self", "none"):
        message = refused("convert", folder, "-o", tmp_path / "out.gguf", "--calib", calib)
        assert f"{folder}: 2 tensors that the model needs are missing: model.layers.0.mlp.up_proj.weight" in message
        assert "--calib" not in message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with pytest.raises(AaacError, match=r"lacks weights that the model needs: model\.layers\.0\.mlp\.up_proj\.weight"):
        checkpoint.load_model(folder)


def test_a_missing_expert_is_named(tmp_path):
    folder = save_random(NAMES["experts in one parameter"](), tmp_path / "model")
    names = load_file(folder / "model.safetensors")
    expert = next(name for name in names if ".experts.3." in name)
    change(folder, lambda w: w.pop(expert))
    with pytest.raises(AaacError, match="tensors that the model needs are missing"):
        check(folder)


def test_names_of_another_form_are_named_beside_the_missing_ones(folder):
    change(folder, lambda w: w.update({f"module.{name}": w.pop(name) for name in list(w)}))
    with pytest.raises(AaacError, match=r"are missing: .*which it does not: module\.model\.embed_tokens\.weight"):
        check(folder)


def test_unused_tensors_are_a_warning(folder):
    change(folder, lambda w: w.update({"value_head.weight": torch.zeros(1, 128)}))
    with pytest.warns(AaacWarning, match=r"1 tensors are no part of the model and are not used in it: value_head"):
        check(folder)


def test_weights_in_other_formats_are_a_warning(folder):
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.warns(AaacWarning, match=r"not read, since model.safetensors .* goes before: pytorch_model.bin"):
        check(folder)


def test_weights_of_another_shape_are_named(folder):
    change(folder, lambda w: w.update({"model.norm.weight": torch.zeros(64, dtype=torch.bfloat16)}))
    with pytest.raises(AaacError, match=r"tensor model.norm.weight is \[64\], and config.json makes it \["):
        check(folder)


def test_quantized_weights_are_compared_by_name(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))

    def pack(weights):
        for name in [name for name in weights if "proj" in name]:
            stem = name.removesuffix(".weight")
            del weights[name]
            for part in ("qweight", "qzeros", "scales", "g_idx"):
                weights[f"{stem}.{part}"] = torch.zeros(4, 4, dtype=torch.int32)

    check(change(folder, pack))
    change(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.qweight"))
    with pytest.raises(AaacError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        check(folder)


def test_no_file_without_tensors(llama_source, folder, tmp_path):
    """Refuse it, though of a model that transformers does not know the converter writes what it finds."""
    change(folder, lambda w: [w.pop(name) for name in list(w) if ".layers.1." in name])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard of"}))
    with (
        pytest.raises(AaacError, match=r"converter finds no weights for blk\.1;"),
        full_precision(folder, tmp_path / "scratch", header_only=True),
    ):
        pass
    change(folder, lambda w: [w.pop(name) for name in list(w)[1:]])
    assert cli.main(["convert", str(folder), "-o", str(tmp_path / "out.gguf"), "--calib", "none"]) == 2
    assert not (tmp_path / "out.gguf").exists()
