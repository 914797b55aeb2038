"""Go the whole way with the bundled model: quantize, compare with llama.cpp's own types, verify, and generate text."""

from __future__ import annotations

from pathlib import Path

from ..conversion.settings import Settings
from ..llama import tools
from ..llama.build import build
from ..resources import MODEL, SAMPLE_TEXT
from . import tables
from .compare import Options, compare
from .verify import verify

TYPES = ("Q4_0", "IQ4_NL", "Q4_K_S", "AAAC4_G16")
N_CTX = 256
PROMPT = "The old gentleman looked at her and said,"


def run(folder: Path) -> int:
    """Run the demo in `folder`, which is made if there is none. Returns the exit status."""
    print("1/4 build patched llama.cpp (minutes the first time, nothing after that)")
    build()

    print(
        "2/4 quantize the bundled model: AAAC4_G16 and llama.cpp's 4-bit types, all calibrated on the same tokens that"
    )
    print("    the model samples from itself, and compare on a few pages of prose; embeddings and output in Q6_K")
    # The model knows English novels and nothing else.
    options = Options(TYPES, (SAMPLE_TEXT,), Settings(calibration="self"), n_ctx=N_CTX)
    print(tables.comparison_text(compare(MODEL, folder, options)))
    print(f"with plots: {folder / 'comparison.html'}")

    print("\n3/4 verify: structure, tensors, logits of patched llama.cpp against transformers with the decoded weights")
    aaac = folder / "demo-AAAC4_G16.gguf"
    result = verify(aaac, MODEL)
    print(tables.verification_text(result))

    print("\n4/4 generate with the AAAC file")
    print(generate(aaac, PROMPT, folder / "generate.log"))
    return 1 if result.failures else 0


def generate(model: Path, prompt: str, log: Path, n_tokens: int = 64) -> str:
    """Return the most likely text after `prompt`, by the built llama-completion."""
    args: list[str | Path] = ["-m", model, "-p", prompt, "-n", str(n_tokens), "--temp", "0", "-no-cnv", "--no-warmup"]
    return tools.tool_output("llama-completion", args, log).strip()
