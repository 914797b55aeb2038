"""Model cards for the Hub."""

import json
from dataclasses import asdict

import pytest
import yaml
from comparison_samples import comparison, score
from gguf import GGUFValueType as V
from gguf_samples import aaac_file

import aaac_gguf as aaac
from aaac_gguf import cli
from aaac_gguf.errors import AaacWarning
from aaac_gguf.files.gguf import Value
from aaac_gguf.resources import sha256

METADATA = {
    "general.name": Value('A "b": c #d', V.STRING),
    "general.license": Value("apache-2.0", V.STRING),
    "general.base_model.0.repo_url": Value("https://huggingface.co/owner/name", V.STRING),
    "general.tags": Value(["chat", "yes", "1: 2"], V.ARRAY, V.STRING),
    "aaac.quantizer": Value("aaac-gguf 0.1.0", V.STRING),
    "aaac.calibration": Value('{"source": "self"}', V.STRING),
}


def front_matter(text):
    _, matter, rest = text.split("---\n", 2)
    return yaml.safe_load(matter), rest


def test_front_matter_and_provenance(tmp_path, rng):
    path = tmp_path / "model.gguf"
    aaac_file(path, rng, METADATA)
    matter, text = front_matter(aaac.card(path))
    assert matter == {
        "base_model": "owner/name",
        "base_model_relation": "quantized",
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["gguf", "aaac", "4-bit", "chat", "yes", "1: 2"],
    }
    assert '# A "b": c #d, GGUF' in text
    assert "1 AAAC4_G16" in text
    assert f"{path.stat().st_size:,} bytes, sha256 `{sha256(path)}`" in text
    assert '{"source": "self"}' in text
    assert "aaac-gguf llama run llama-cli -m model.gguf" in text
    assert "hf upload OWNER/NAME-GGUF model.gguf model.gguf" in text


def test_a_file_that_names_nothing(source):
    matter, text = front_matter(aaac.card(source))
    assert matter == {"library_name": "gguf", "pipeline_tag": "text-generation", "tags": ["gguf"]}
    assert "every llama.cpp runs it" in text


def test_the_numbers_of_a_comparison(tmp_path, rng):
    path, json_path, out = tmp_path / "model.gguf", tmp_path / "comparison.json", tmp_path / "README.md"
    aaac_file(path, rng)
    result = comparison()
    result.rows[0].n_bytes = path.stat().st_size
    result.cache_scores["b.txt"] = result.rows[0].cache_scores["b.txt"] = {"Q8_0": score(0.125)}
    json_path.write_text(json.dumps(asdict(result)))
    assert cli.main(["card", str(path), "--comparison", str(json_path), "-o", str(out)]) == 0
    text = out.read_text("utf-8")
    assert text.count(" | 0.12500 ± 0.01250 |") == 2
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.split("On b.txt")[1].splitlines()}
    for row in json.loads(json_path.read_text())["rows"]:
        found = row["scores"]["b.txt"]
        _, perplexity, kld, *_ = cells[row["name"]]
        assert perplexity == f"{found['perplexity']:.3f} ± {found['perplexity_error']:.3f}"
        assert kld == f"{found['mean_kld']:.5f} ± {found['mean_kld_error']:.5f}"
        assert f"| {row['n_bytes']:,} |" in text


def test_a_comparison_of_another_file(tmp_path, rng):
    path, json_path = tmp_path / "model.gguf", tmp_path / "comparison.json"
    aaac_file(path, rng)
    json_path.write_text(json.dumps(asdict(comparison())))
    with pytest.warns(AaacWarning, match="is it a comparison of this file"):
        aaac.card(path, json_path)


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"rows": [{}]}', '{"rows": 3}', '{"rows": [], "model": 1}'])
def test_a_file_that_is_no_comparison(content, source, tmp_path, refused):
    path = tmp_path / "comparison.json"
    if content is not None:
        path.write_text(content)
    assert f"--comparison {path}" in refused("card", source, "--comparison", path)


def test_the_card_does_not_replace_the_model(source, refused):
    assert "belongs to the source" in refused("card", source, "-o", source)
