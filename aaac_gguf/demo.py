"""The whole way with the bundled model: convert, verify, run in patched llama.cpp, and compare with llama.cpp's own 4-bit types."""

from __future__ import annotations

import subprocess
from pathlib import Path

from gguf import GGMLQuantizationType as T

from . import calibrate, checkpoint, convert, evaluate, gguf_io, llama, report, verify
from .errors import AaacError
from .imatrix import write_imatrix

DATA = Path(__file__).parent / "data"
MODEL = DATA / "demo"
SAMPLE_TEXT = DATA / "sample.txt"

STOCK_TYPES = ("Q4_0", "IQ4_NL", "Q4_K_S")
EMBEDDING_TYPE = "q6_k"
N_CTX = 256
PROMPT = "The old gentleman looked at her and said,"


def run(folder: Path) -> int:
    """Run the demo in `folder`, made if absent, and print one table. Returns the exit status."""
    try:
        folder.mkdir(exist_ok=True)
    except OSError as e:
        raise AaacError(f"--output {folder}: cannot be made: {e.strerror}") from None
    print("1/5 build patched llama.cpp (minutes the first time, nothing after that)")
    llama.build()

    print("2/5 convert the bundled model to F16 and to AAAC4_G16, calibrated on tokens that it samples from itself")
    calibration = convert.Calibration()
    full, aaac = folder / "demo-F16.gguf", folder / "demo-AAAC4_G16.gguf"
    convert.convert(MODEL, full, convert.Settings(type=T.F16))
    print(report.convert_text(convert.convert(MODEL, aaac, convert.Settings(calibration=calibration))))

    print("\n3/5 verify: structure, tensors, logits of patched llama.cpp against transformers with the decoded weights")
    result = verify.verify(aaac, MODEL, SAMPLE_TEXT)
    print(report.verification_text(result))

    print("\n4/5 generate with the AAAC file")
    print(generate(aaac, PROMPT, folder / "generate.log"))

    print("\n5/5 compare on the same tokens; all types with the same calibration, embeddings and output in Q6_K")
    imatrix = folder / "demo-imatrix.gguf"
    model = checkpoint.load_model(MODEL)
    tokens = calibrate.self_tokens(model, calibration.n_sequences, calibration.sequence_length, calibration.seed)
    file = gguf_io.read(full)
    write_imatrix(imatrix, calibrate.importance(model, tokens, file.architecture, file.tensors, "sampled from the model"))
    files = {"F16": full}
    for name in STOCK_TYPES:
        files[name] = folder / f"demo-{name}.gguf"
        stock_quantize(full, files[name], name, imatrix)
    files["AAAC4_G16"] = aaac
    print(comparison(files, SAMPLE_TEXT, folder))
    return 1 if result.failures else 0


def generate(model: Path, prompt: str, log: Path, n_tokens: int = 64) -> str:
    """Greedy text after `prompt` from a built llama-completion."""
    args: list[str | Path] = [llama.tool("llama-completion"), "-m", model, "-p", prompt, "-n", str(n_tokens), "--temp", "0", "-no-cnv", "--no-warmup"]
    with open(log, "wb") as f:
        result = subprocess.run(args, stdout=subprocess.PIPE, stderr=f, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise AaacError(f"llama-completion failed with status {result.returncode} (see {log})")
    return result.stdout.decode(errors="replace").strip()


def stock_quantize(full: Path, out: Path, type_name: str, imatrix: Path) -> None:
    """llama-quantize at its best for one type: every matrix of it, importance used, embeddings and output in the type that ours have."""
    embeddings = ["--token-embedding-type", EMBEDDING_TYPE, "--output-tensor-type", EMBEDDING_TYPE]
    llama.run_logged_tool("llama-quantize", ["--pure", "--imatrix", imatrix, *embeddings, full, out, type_name], out.with_suffix(".log"))


def comparison(files: dict[str, Path], text: Path, folder: Path) -> str:
    """Size, bits per weight, perplexity and KL divergence of `files`, by name, against the first of them."""
    full = next(iter(files.values()))
    base = folder / "logits"
    evaluate.save_logits(full, text, base, N_CTX)
    rows = []
    for name, path in files.items():
        tensors = gguf_io.read(path).tensors.values()
        bits = 8 * sum(t.n_bytes for t in tensors) / sum(t.n_elements for t in tensors)
        s = evaluate.score(path, text, base, N_CTX)
        kld = "-" if path == full else f"{s.mean_kld:.5f} ± {s.mean_kld_error:.5f}"
        perplexity = f"{s.perplexity:.3f} ± {s.perplexity_error:.3f}"
        rows.append((name, f"{path.stat().st_size:,}", f"{bits:.3f}", perplexity, kld, "-" if path == full else f"{s.same_top:.2f} %"))
    return report.table(("type", "bytes", "bits per weight", "perplexity", "mean KL divergence", "same top token"), rows)
