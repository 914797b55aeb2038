"""Sources of a conversion: folders with shards, split GGUFs, quantized checkpoints, models on the Hub.

And files that are no model.
"""

import json
import shutil
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from aaac_gguf import cli, resources
from aaac_gguf.errors import AaacError
from aaac_gguf.files import gguf as gguf_io
from aaac_gguf.models import checkpoint, source

COMMIT = "0123456789" * 4


def convert(src, out, *args) -> int:
    return cli.main([str(arg) for arg in ("convert", src, "-o", out, *args)])


def demo_folder(tmp_path: Path, **config) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(resources.MODEL, folder)
    old = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(old | config))
    return folder


def save_sharded(folder: Path, tensors: dict[str, torch.Tensor], n: int) -> None:
    """Write the weights in `n` files with an index, as transformers does for a large model."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
    weight_map = {name: names[i % n] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: t for name, t in tensors.items() if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    file = gguf_io.read(path)
    return {name: np.asarray(t.data) for name, t in file.tensors.items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def test_a_folder_with_sharded_weights(llama_source, demo_gguf, tmp_path):
    folder = demo_folder(tmp_path)
    save_sharded(folder, load_file(resources.MODEL / "model.safetensors"), 3)
    assert convert(folder, tmp_path / "sharded.gguf", "--calib", "none") == 0
    assert convert(demo_gguf, tmp_path / "whole.gguf") == 0
    assert_same_tensors(tmp_path / "sharded.gguf", tmp_path / "whole.gguf")


def test_a_split_gguf_by_any_of_its_files(source, tmp_path, capsys):
    """Split by the gguf library, which writes as llama.cpp's converter does."""
    writer = gguf.GGUFWriter(tmp_path / "split.gguf", "llama", split_max_tensors=2)
    writer.add_token_list(["a", "bc", "d"])
    for name, tensor in gguf_io.read(source).tensors.items():
        writer.add_tensor(name, np.asarray(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert convert(source, tmp_path / "whole.gguf") == 0
    for no in (1, 2):
        assert convert(tmp_path / f"split-0000{no}-of-00003.gguf", tmp_path / "out.gguf") == 0
        assert_same_tensors(tmp_path / "out.gguf", tmp_path / "whole.gguf")
        assert not any(key.startswith("split.") for key in gguf_io.read(tmp_path / "out.gguf").fields)
    (tmp_path / "split-00003-of-00003.gguf").unlink()
    assert convert(tmp_path / "split-00001-of-00003.gguf", tmp_path / "out.gguf") == 2
    assert "split-00003-of-00003.gguf: is missing, the model is split into 3 files" in capsys.readouterr().err


def to_fp8(folder: Path, block: int = 128) -> dict[str, torch.Tensor]:
    """Turn the folder's matrices into FP8 with a scale per block, as DeepSeek and Qwen publish. Return them decoded."""
    stored, decoded = {}, {}
    for name, w in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = w
            continue
        n, k = (-(-side // block) for side in w.shape)
        padded = torch.zeros(n * block, k * block)
        padded[: w.shape[0], : w.shape[1]] = w.float()
        scale = padded.view(n, block, k, block).abs().amax((1, 3)) / 448
        scales = scale.repeat_interleave(block, 0).repeat_interleave(block, 1)[: w.shape[0], : w.shape[1]]
        stored[name] = (w.float() / scales).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        decoded[name] = stored[name].float() * scales
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return decoded


def test_an_fp8_checkpoint(llama_source, tmp_path):
    """Decoded by llama.cpp's converter."""
    folder = demo_folder(
        tmp_path,
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    )
    decoded = to_fp8(folder)
    assert convert(folder, tmp_path / "full.gguf", "--type", "F32") == 0
    got = gguf_io.read(tmp_path / "full.gguf")["blk.2.ffn_down.weight"]
    np.testing.assert_allclose(
        got, decoded["model.layers.2.mlp.down_proj.weight"].numpy(), rtol=2**-7, atol=1e-6
    )  # by way of BF16
    assert convert(folder, tmp_path / "out.gguf", "--calib", "none") == 0
    assert len(gguf_io.read(tmp_path / "out.gguf").codecs) == 28


@pytest.mark.parametrize("method", ["awq", "bitsandbytes"])
def test_a_quantization_that_the_converter_refuses(llama_source, tmp_path, capsys, method):
    folder = demo_folder(tmp_path, quantization_config={"quant_method": method})
    assert convert(folder, tmp_path / "out.gguf") == 2
    err = capsys.readouterr().err
    assert "llama.cpp's converter refuses this model" in err
    assert f"Quant method is not yet supported: '{method}'" in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mmproj", "a vision or audio projector, which AAAC leaves as it is"),
        ("", "a vision or audio projector, which AAAC leaves as it is"),  # an older writer's
        ("model", "a vision or audio projector, which AAAC leaves as it is"),
        ("adapter", "a LoRA adapter"),
    ],
)
def test_files_that_are_no_language_model(tmp_path, capsys, kind, words):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "clip")
    if kind:
        writer.add_type(kind)
    writer.add_tensor("v.patch_embd.weight", np.ones((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert convert(tmp_path / "x.gguf", tmp_path / "out.gguf") == 2
    assert words in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_vision_part_is_left_alone_with_a_word(llama_source, tmp_path, capsys):
    folder = demo_folder(tmp_path, vision_config={"hidden_size": 32})
    assert convert(folder, tmp_path / "out.gguf", "--type", "F16") == 0
    assert "the vision part is left alone: make its mmproj file" in capsys.readouterr().out


def test_a_folder_without_weights(tmp_path, capsys):
    folder = demo_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    assert convert(folder, tmp_path / "out.gguf") == 2
    assert "has no *.safetensors files" in capsys.readouterr().err


@pytest.fixture
def hub_cache(tmp_path) -> Path:
    """huggingface_hub's cache folder with the bundled model as someone/small."""
    repository = tmp_path / "cache" / "models--someone--small"
    shutil.copytree(resources.MODEL, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return tmp_path / "cache"


@pytest.fixture
def offline(hub_cache, monkeypatch):
    """huggingface_hub with this cache, not allowed to go online."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_name_on_the_hub_is_taken_from_its_cache(offline, hub_cache):
    for name in ("hf://someone/small", "someone/small"):
        folder = source.locate(name)
        assert folder == hub_cache / "models--someone--small" / "snapshots" / COMMIT
        assert checkpoint.check(folder)["architectures"] == ["LlamaForCausalLM"]


def test_offline_and_not_in_the_cache(offline, hub_cache, tmp_path, capsys):
    assert convert("someone/other", tmp_path / "out.gguf") == 2
    err = capsys.readouterr().err
    words = "the Hugging Face cache does not hold all of it, and the Hub cannot be reached"
    assert f"someone/other: no such local path, {words}" in err
    (hub_cache / "models--someone--small" / "snapshots" / COMMIT / "model.safetensors").unlink()
    assert convert("someone/small", tmp_path / "out.gguf") == 2
    assert "has no *.safetensors files" in capsys.readouterr().err


def http_error(kind: type, status: int) -> Exception:
    response = type("Response", (), {"status_code": status, "headers": {}, "request": None})()
    return kind(f"{status} Client Error.\nand more lines", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            http_error(errors.GatedRepoError, 403),
            "accept its terms at https://huggingface.co/a/b, then log in with `hf auth login` or set HF_TOKEN",
        ),
        (http_error(errors.RepositoryNotFoundError, 404), "neither a local path nor a model on the Hugging Face Hub"),
        (http_error(errors.HfHubHTTPError, 500), "cannot be downloaded: 500 Client Error.; try again"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (errors.HFValidationError("bad"), "not a name on the Hugging Face Hub"),
    ],
)
def test_errors_of_the_hub_are_one_line(monkeypatch, error, words):
    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(AaacError) as e:
        source.locate("hf://a/b")
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_paths_are_not_taken_for_names(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: f"downloaded {name}")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").mkdir()
    for path in ("a/b", "./c/d", "/c/d", "c/d.gguf", "c", "c/d/e", "../c"):
        assert source.locate(path) == Path(path)
    assert source.locate("c/d") == Path("downloaded c/d")
    assert source.locate("hf://a/b") == Path("downloaded a/b")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models--someone--small/snapshots/0123abcd", "small"),
        ("models--someone--small--two/snapshots/0123abcd", "small--two"),
        ("models--gpt2/snapshots/0123abcd", "gpt2"),
        ("models/snapshots/0123abcd", "0123abcd"),
        ("a/b", "b"),
        ("a/b.gguf", "b"),
    ],
)
def test_the_name_of_a_model(tmp_path, monkeypatch, path, name):
    folder = tmp_path / path
    if path.endswith(".gguf"):
        folder.parent.mkdir(parents=True)
        folder.touch()
    else:
        folder.mkdir(parents=True)
        monkeypatch.chdir(folder)
        assert source.model_name(Path()) == name
    assert source.model_name(folder) == name


def test_a_snapshot_has_its_repositorys_name(llama_source, hub_cache, tmp_path):
    snapshot = hub_cache / "models--someone--small" / "snapshots" / COMMIT
    assert convert(snapshot, tmp_path / "out.gguf", "--type", "F16") == 0
    assert gguf_io.read(tmp_path / "out.gguf").get("general.name") == "Small"
    assert not any(p.name.startswith(".aaac") for p in tmp_path.iterdir())
