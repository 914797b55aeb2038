"""Write a model card for the Hugging Face Hub: what a file is, how good it was measured to be, and how to run it."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AaacError, printable, warn
from ..files import format as fmt
from ..files.gguf import GgufFile, read_model, shards
from ..llama.evaluate import Score
from ..resources import sha256
from .results import Comparison, Row
from .tables import files_table, scores_table

HUB_ADDRESS = "https://huggingface.co/"


def card(path: Path, comparison: Path | None = None) -> str:
    """Return the Markdown of a model card for a GGUF file, or for a split one by any of its files.

    comparison: a comparison.json of `compare`, for a table of what was measured. Raises AaacError for a file that is no
    model, and for a comparison that cannot be read.
    """
    file = read_model(path)
    files = shards(path)
    name = printable(str(file.get("general.name") or files[0].stem))
    measured = _measured(read_comparison(comparison), files) if comparison else []
    parts = [_front_matter(file), f"# {name}, GGUF", _about(file), *measured, _how_to_run(file, files)]
    parts += [_provenance(file, files), _upload(files)]
    return "\n\n".join(parts) + "\n"


def read_comparison(path: Path) -> Comparison:
    """Return the content of a comparison.json. Raises AaacError for another file."""
    try:
        values = json.loads(path.read_text("utf-8"))
        rows = [Row(**_with_cache_scores(row | {"scores": _scores(row["scores"])})) for row in values.pop("rows")]
        result = Comparison(**_with_cache_scores(values), rows=rows)
        for text in result.texts:  # all that the table shows
            scores_table(result, text)
        files_table(result)
    except OSError as e:
        raise AaacError(f"`comparison` {path}: {e.strerror}; give the comparison.json that compare wrote") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
        reason = f"{type(e).__name__}: {e}"
        raise AaacError(f"`comparison` {path}: not a comparison.json ({reason}); give what compare wrote") from None
    return result


def _scores(values: dict[str, Any]) -> dict[str, Score]:
    return {key: Score(**score) for key, score in values.items()}


def _with_cache_scores(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a row or a comparison. Those of before there were scores with other caches have none."""
    by_text = values.get("cache_scores", {})
    return values | {"cache_scores": {text: _scores(of_text) for text, of_text in by_text.items()}}


def _front_matter(file: GgufFile) -> str:
    """Return the metadata that the Hub reads, in YAML. A string in JSON is one in YAML too."""
    values: dict[str, Any] = {}
    address = str(file.get("general.base_model.0.repo_url") or file.get("general.source.repo_url") or "")
    if address.startswith(HUB_ADDRESS):
        values["base_model"] = address.removeprefix(HUB_ADDRESS)
        values["base_model_relation"] = "quantized"
    values["library_name"] = "gguf"
    values["pipeline_tag"] = "feature-extraction" if _is_encoder(file) else "text-generation"
    if license_name := file.get("general.license"):
        values["license"] = license_name
    if languages := file.get("general.languages"):
        values["language"] = languages
    own = ["gguf", *(["aaac", "4-bit"] if file.codecs else [])]
    values["tags"] = list(dict.fromkeys([*own, *file.get("general.tags", [])]))
    lines = [f"{key}: {_yaml(value)}" for key, value in values.items()]
    if "base_model" not in values:
        lines.insert(0, "# base_model: OWNER/NAME (the file does not name it)")
    return "\n".join(["---", *lines, "---"])


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    return json.dumps(printable(str(value)), ensure_ascii=False)


def _is_encoder(file: GgufFile) -> bool:
    return file.setting("attention.causal") is False or file.setting("pooling_type") is not None


def _about(file: GgufFile) -> str:
    if not file.codecs:
        return "This file has types of llama.cpp, and every llama.cpp runs it."
    return (
        "Each matrix has two codebooks of 16 levels that were fitted to it, and each 16 weights choose one of them "
        "([AAAC](https://arxiv.org/abs/2605.08692)). The file needs a patched llama.cpp, which "
        "aaac-gguf builds."
    )


def _measured(result: Comparison, files: Sequence[Path]) -> list[str]:
    """Return the tables of a comparison."""
    if sum(path.stat().st_size for path in files) not in [row.n_bytes for row in result.rows]:
        warn(f"`comparison`: has no file of the size of {files[0].name}; is it a comparison of this file?")
    parts = ["## Measured", markdown_table(*files_table(result))]
    for text in result.texts:
        words = f"KL divergence is from the {result.full_type} model, in nats per token; lower is better."
        parts += [f"On {printable(text)} (sha256 {result.texts[text][:12]}). {words}"]
        parts += [markdown_table(*scores_table(result, text))]
    return parts


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(printable(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def _how_to_run(file: GgufFile, files: Sequence[Path]) -> str:
    model = shlex.quote(printable(files[0].name))
    encoder = _is_encoder(file)
    tool, flags = ("llama-server", " --embeddings --port 8080") if encoder else ("llama-cli", "")
    if not file.codecs:
        return f"## Run\n\n    {tool} -m {model}{flags}"
    lines = ["pip install aaac-gguf", "aaac-gguf llama build", f"aaac-gguf llama run {tool} -m {model}{flags}"]
    if not encoder:
        lines.append(f"aaac-gguf llama run llama-server -m {model} --port 8080")
    text = "## Run\n\n" + "\n".join(f"    {line}" for line in lines)
    python = ["import aaac_gguf as aaac", "", f"weights = aaac.load({files[0].name!r})  # decoded by tensor, in numpy"]
    if not encoder:
        python.append(f"model = aaac.inference.torch.load_model({files[0].name!r})  # in transformers")
    return text + "\n\nIn Python:\n\n" + "\n".join(f"    {line}".rstrip() for line in python)


def _provenance(file: GgufFile, files: Sequence[Path]) -> str:
    counts = Counter(t.tensor_type.name for t in file.tensors.values())
    types = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    lines = ["## Provenance", ""]
    for label, key in (("quantizer", fmt.KEY_QUANTIZER), ("calibration", fmt.KEY_CALIBRATION)):
        if value := file.get(key):
            lines.append(f"* {label}: `{printable(str(value))}`")
    lines.append(f"* tensors: {types}")
    lines += [f"* `{printable(p.name)}`: {p.stat().st_size:,} bytes, sha256 `{sha256(p)}`" for p in files]
    return "\n".join(lines)


def _upload(files: Sequence[Path]) -> str:
    names = [shlex.quote(printable(p.name)) for p in files] + ["README.md"]
    lines = "\n".join(f"    hf upload OWNER/NAME-GGUF {name} {name}" for name in names)
    return f"## Upload\n\nIn the folder of the files, with this card as README.md:\n\n{lines}"
