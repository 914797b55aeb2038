"""Tell which files of a folder hold the weights, and the dtype of the weights."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from aaac_gguf import resources
from aaac_gguf.errors import AaacError
from aaac_gguf.models import checkpoint, files

WEIGHTS = {"a": torch.zeros(4, 8, dtype=torch.bfloat16), "b": torch.zeros(8)}


def make(folder, *names, index=None, bin_index=None):
    """Write a folder with a file of weights for each name, and an index of tensors by file."""
    for name in names:
        if name.endswith(".safetensors"):
            save_file(WEIGHTS, folder / name)
        else:
            torch.save(WEIGHTS, folder / name)
    for stem, listed in (("model.safetensors", index), ("pytorch_model.bin", bin_index)):
        if listed:
            (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = {"a": SHARDS[0], "b": SHARDS[1]}
ONE = "model.safetensors"


@pytest.mark.parametrize(
    ("names", "index", "used"),
    [
        ((ONE,), None, [ONE]),
        (SHARDS, INDEX, [*SHARDS]),
        ((ONE,), {"a": ONE, "b": ONE}, [ONE]),
        (("pytorch_model.bin",), None, ["pytorch_model.bin"]),
        ((ONE, "pytorch_model.bin"), None, [ONE]),
        ((ONE, "consolidated.safetensors"), None, [ONE]),
        ((ONE, "training_args.bin"), None, [ONE]),
        (("pytorch_model.bin", "training_args.bin"), None, ["pytorch_model.bin"]),
    ],
)
def test_the_files_that_hold_the_weights(tmp_path, names, index, used):
    make(tmp_path, *names, index=index)
    assert [path.name for path in files.weight_files(tmp_path)] == used


@pytest.mark.parametrize(
    ("names", "index", "words"),
    [
        ((ONE, "model_old.safetensors"), None, "there could be weights in model_old.safetensors; move"),
        ((ONE, "model.fp16.safetensors"), None, "there could be weights in model.fp16.safetensors; move"),
        ((ONE, "backup.safetensors"), None, "there could be weights in backup.safetensors; move"),
        ((ONE, *SHARDS), None, f"there could be weights in {SHARDS[0]}, {SHARDS[1]}; move"),
        ((ONE, *SHARDS), INDEX, "model.safetensors and model.safetensors.index.json are there"),
        ((*SHARDS, "model-00003-of-00003.safetensors"), INDEX, "weights in model-00003-of-00003.safetensors; move"),
        (("pytorch_model.bin", "pytorch_model_old.bin"), None, "there could be weights in pytorch_model_old.bin; move"),
        ((ONE, "adapter_model.safetensors"), None, "adapter_model.safetensors: a LoRA adapter beside the model's own"),
        (("adapter_model.safetensors",), None, "holds a LoRA adapter and not the weights of its model; merge it"),
        (("adapter_model.bin",), None, "holds a LoRA adapter and not the weights of its model; merge it"),
        (SHARDS[:1], None, f"has {SHARDS[0]} and no model.safetensors.index.json, which lists the shards"),
        (SHARDS[:1], INDEX, f"{SHARDS[1]}: is listed in model.safetensors.index.json and missing; download it"),
        (("consolidated.safetensors",), None, "has consolidated.safetensors, and neither model.safetensors nor"),
        (("pytorch_model-00001-of-00002.bin",), None, "no pytorch_model.bin.index.json, which lists the shards"),
        ((), None, "has no *.safetensors files"),
    ],
)
def test_folders_of_doubtful_weights_are_refused(tmp_path, names, index, words):
    make(tmp_path, *names, index=index)
    with pytest.raises(AaacError) as e:
        files.weight_files(tmp_path)
    assert words in str(e.value)


def test_other_formats_are_named(tmp_path):
    make(tmp_path, ONE, "pytorch_model.bin", "consolidated.safetensors")
    assert files.ignored_files(tmp_path) == ["consolidated.safetensors", "pytorch_model.bin"]


@pytest.mark.parametrize("name", [ONE, "pytorch_model.bin"])
def test_tensors_are_read_from_headers(tmp_path, name):
    tensors = files.stored_tensors(make(tmp_path, name))
    assert tensors == {"a": ("BF16", (4, 8), 64), "b": ("F32", (8,), 32)}
    assert files.main_dtype(tensors) == "bfloat16"


def test_the_dtype_of_most_bytes_counts():
    tensor = files.StoredTensor
    assert files.main_dtype({"a": tensor("F32", (9,), 36), "b": tensor("F16", (9,), 18)}) == "float32"
    assert files.main_dtype({"a": tensor("F8_E4M3", (99,), 99), "b": tensor("BF16", (9,), 18)}) == "bfloat16"
    assert files.main_dtype({"a": tensor("U8", (99,), 99)}) == ""


def test_a_tensor_that_only_the_index_has(tmp_path):
    make(tmp_path, *SHARDS, index=INDEX | {"c": SHARDS[1]})
    with pytest.raises(AaacError, match=rf"{SHARDS[1]}: lacks c, which model.safetensors.index.json lists"):
        files.stored_tensors(tmp_path)


@pytest.mark.parametrize("name", [ONE, "pytorch_model.bin"])
def test_a_file_that_is_cut_short(tmp_path, name):
    path = make(tmp_path, name) / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AaacError, match=rf"{name}: damaged.*; download it again"):
        files.stored_tensors(tmp_path)


def test_a_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / ONE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n")
    with pytest.raises(AaacError, match=rf"{ONE}: only a Git LFS pointer .*`git lfs pull`"):
        files.stored_tensors(tmp_path)


@pytest.mark.parametrize("index", ["[]", '{"weight_map": {}}', '{"weight_map": ["a"]}', "{"])
def test_an_index_that_is_none(tmp_path, index):
    make(tmp_path, *SHARDS)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(AaacError, match=r"index\.json: .*; download it again"):
        files.weight_files(tmp_path)


@pytest.mark.parametrize("said", ["bfloat16", "float16", None])
def test_float32_weights_are_loaded_as_such_whatever_config_says(tmp_path, said):
    folder = tmp_path / "model"
    shutil.copytree(resources.MODEL, folder)
    weights = {name: w.float() * 1.0001 for name, w in load_file(folder / ONE).items()}
    save_file(weights, folder / ONE, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if "dtype" not in key} | ({"dtype": said} if said else {})
    (folder / "config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = checkpoint.load_model(folder)
    name, parameter = next(iter(model.named_parameters()))
    assert torch.equal(parameter, weights[name])
