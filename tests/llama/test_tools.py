"""Running llama.cpp's converter: what its errors say."""

import pytest

from aaac_gguf import resources
from aaac_gguf.errors import AaacError
from aaac_gguf.files.gguf import read
from aaac_gguf.llama import tools

TRACEBACK = """INFO:hf-to-gguf:Loading model: x
Traceback (most recent call last):
  File "/llama.cpp/convert_hf_to_gguf.py", line 280, in <module>
    main()
  File "/llama.cpp/conversion/qwen.py", line 12, in set_vocab
    assert max(tokenizer.vocab.values()) < vocab_size
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
"""


def replace_converter(monkeypatch, folder, program):
    (folder / "convert_hf_to_gguf.py").write_text(program)
    monkeypatch.setattr(tools, "fetch", lambda: folder)


def converter_fails(monkeypatch, folder, stderr):
    replace_converter(monkeypatch, folder, f"import sys; sys.exit({stderr!r})")


@pytest.mark.parametrize("last", ["AssertionError", "KeyError: 'num_heads'"])
def test_the_converters_last_frame_is_named(monkeypatch, tmp_path, last):
    converter_fails(monkeypatch, tmp_path, TRACEBACK + last + "\n")
    with pytest.raises(AaacError) as e:
        tools.convert_hf(resources.MODEL, tmp_path / "out.gguf", "auto")
    frame = "(qwen.py, line 12, in set_vocab: assert max(tokenizer.vocab.values()) < vocab_size)"
    assert str(e.value) == f"{resources.MODEL}: llama.cpp's converter refuses this model: {last} {frame}"


def test_an_error_without_a_traceback(monkeypatch, tmp_path):
    converter_fails(monkeypatch, tmp_path, "ERROR:hf-to-gguf:Model Foo is not supported\n")
    with pytest.raises(AaacError, match=r"refuses this model: Model Foo is not supported$"):
        tools.convert_hf(resources.MODEL, tmp_path / "out.gguf", "auto")


def test_a_disk_that_the_converter_filled(monkeypatch, tmp_path):
    converter_fails(monkeypatch, tmp_path, TRACEBACK + "OSError: [Errno 28] No space left on device\n")
    with pytest.raises(AaacError, match=rf"^{tmp_path}: the disk is full"):
        tools.convert_hf(resources.MODEL, tmp_path / "out.gguf", "auto")


@pytest.mark.parametrize(("n_bytes", "shown"), [(3000, "3.00k"), (12500, "12.0k")])
def test_progress_is_what_the_converter_has_written(monkeypatch, tmp_path, capsys, n_bytes, shown):
    replace_converter(monkeypatch, tmp_path, f"import sys; open(sys.argv[3], 'wb').write(bytes({n_bytes}))")
    monkeypatch.setattr("aaac_gguf.progress.SECONDS_PER_LINE", 0)
    tools.convert_hf(resources.MODEL, tmp_path / "out.gguf", "auto", n_bytes=12000)
    assert f"llama.cpp's converter: {shown} of 12.0k bytes" in capsys.readouterr().err


def test_the_models_name_can_be_another_than_the_folders(llama_source, tmp_path):
    tools.convert_hf(resources.MODEL, tmp_path / "out.gguf", "auto", header_only=True, name="Tiny-Poet-2B")
    file = read(tmp_path / "out.gguf")
    assert file.get("general.name") == "Tiny Poet 2B"
    assert file.get("general.basename") == "Tiny-Poet"
